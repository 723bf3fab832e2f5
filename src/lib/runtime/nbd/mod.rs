#![doc = include_str!("../NBD.md")]

mod handshake;
mod memory;
mod outbox;
mod spin;
mod stream;
#[cfg_attr(not(feature = "tls"), path = "no_tls.rs")]
mod tls;
mod transmission;
mod wire;

use self::handshake::Terms;
use self::memory::Memory;
use self::stream::{Socket, Stream, Timed};
pub use self::tls::Tls;
use super::export::Exports;
use crate::error::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Clients at once that have opened an export.
const MOST_CLIENTS: usize = 256;
/// Clients at once that have not; of more the oldest has to go.
const MOST_STRANGERS: usize = 64;
/// Connections at once that have a thread: some that were hung up on may not have noticed yet.
const MOST_CONNECTIONS: usize = MOST_CLIENTS + 2 * MOST_STRANGERS;
/// Within this time a client has to have opened an export.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// Requests have this time to end by themselves when the server stops.
const LAST_REQUESTS: Duration = Duration::from_secs(1);
/// Clients have this time to take their last replies then.
const LAST_REPLIES: Duration = Duration::from_secs(5);

/// A socket that clients connect to.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

struct Shared {
    exports: Arc<dyn Exports>,
    tls: Option<Tls>,
    memory: Arc<Memory>,
    is_over: AtomicBool,
    connections: Mutex<Connections>,
    has_left: Condvar,
}

/// Whoever is connected, by numbers that grow.
#[derive(Default)]
struct Connections {
    /// Those in the handshake.
    strangers: BTreeMap<u64, Arc<Stream>>,
    /// Those who have opened an export.
    clients: BTreeMap<u64, Arc<Stream>>,
    /// All that have a thread.
    count: usize,
    last: u64,
}

impl Connections {
    fn streams(&self) -> impl Iterator<Item = &Arc<Stream>> {
        self.strangers.values().chain(self.clients.values())
    }

    /// Takes one more in, for which the oldest stranger may have to go. None if there are too many threads.
    fn take_in(&mut self, stream: &Arc<Stream>) -> Option<u64> {
        if self.count >= MOST_CONNECTIONS {
            return None;
        }
        if self.strangers.len() >= MOST_STRANGERS
            && let Some((_, oldest)) = self.strangers.pop_first()
        {
            oldest.hang_up();
        }
        self.count += 1;
        self.last += 1;
        self.strangers.insert(self.last, Arc::clone(stream));
        Some(self.last)
    }

    /// Makes a stranger a client, if there is a place.
    fn admit(&mut self, number: u64) -> bool {
        if self.clients.len() >= MOST_CLIENTS {
            return false;
        }
        let stream = self.strangers.remove(&number);
        stream.is_some_and(|stream| self.clients.insert(number, stream).is_none())
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all have left, for so long.
    fn wait_for_all<'a>(
        &self,
        connections: MutexGuard<'a, Connections>,
        most: Duration,
    ) -> MutexGuard<'a, Connections> {
        let waited = self
            .has_left
            .wait_timeout_while(connections, most, |c| c.count > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A running server.
pub struct Server {
    shared: Arc<Shared>,
    acceptors: Vec<(Arc<Listener>, JoinHandle<()>)>,
}

impl Server {
    /// Serves exports on these sockets, to those who want it with TLS, if there is any. Where others than this machine could come it has
    /// to be.
    ///
    /// # Errors
    /// `Unsuitable` for a TCP socket that others than this machine could reach without TLS; `Io` if there are no threads to be had.
    pub fn start(
        listeners: Vec<Listener>,
        exports: Arc<dyn Exports>,
        tls: Option<Tls>,
    ) -> Result<Self> {
        let reached = listeners.into_iter().map(|listener| {
            let is_remote = is_remote(&listener, tls.is_some())?;
            Ok((listener, is_remote))
        });
        let reached: Vec<_> = reached.collect::<Result<_>>()?;
        let mut this = Self {
            shared: Arc::new(Shared {
                exports,
                tls,
                memory: Arc::default(),
                is_over: AtomicBool::new(false),
                connections: Mutex::default(),
                has_left: Condvar::new(),
            }),
            acceptors: Vec::new(),
        };
        for (listener, is_remote) in reached {
            let listener = Arc::new(listener);
            let (shared, own) = (Arc::clone(&this.shared), Arc::clone(&listener));
            let thread = std::thread::Builder::new().name("nbd-accept".into());
            let spawned = thread.spawn(move || accept(&own, is_remote, &shared));
            let spawned = spawned.map_err(|e| Error::io("cannot start a thread", e))?;
            this.acceptors.push((listener, spawned));
        }
        Ok(this)
    }

    /// Takes no more clients and no more requests, waits until those under way have ended, and hangs up. Where some do not end soon, the
    /// exports are told to [end waits](Exports::end_waits). Clients that do not take their replies within a few seconds lose them.
    pub fn stop(self) {
        let Self { shared, acceptors } = self;
        shared.is_over.store(true, Ordering::Release);
        for (listener, thread) in acceptors {
            let how = rustix::net::Shutdown::Both;
            let woken = rustix::net::shutdown(listener.as_fd(), how);
            // A thread that cannot be woken ends with the process.
            if woken.is_ok() {
                let _ = thread.join();
            }
        }
        let connections = shared.connections();
        connections.streams().for_each(|s| s.end_requests());
        let connections = shared.wait_for_all(connections, LAST_REQUESTS);
        if connections.count == 0 {
            return;
        }
        drop(connections);
        shared.exports.end_waits();
        let connections = shared.wait_for_all(shared.connections(), LAST_REPLIES);
        connections.streams().for_each(|s| s.hang_up());
        // Whoever is left waits for a disk.
        drop(shared.wait_for_all(connections, LAST_REPLIES));
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(l) => l.as_fd(),
            Self::Tcp(l) => l.as_fd(),
        }
    }
}

/// True if others than this machine can come, which takes TLS.
fn is_remote(listener: &Listener, has_tls: bool) -> Result<bool> {
    let Listener::Tcp(tcp) = listener else {
        return Ok(false);
    };
    let address = tcp.local_addr();
    let address = address.map_err(|e| Error::io("cannot tell the address of a socket", e))?;
    let is_remote = !address.ip().is_loopback();
    if has_tls || !is_remote {
        return Ok(is_remote);
    }
    Err(Error::new(
        ErrorKind::Unsuitable,
        format!(
            "{address} can be reached from other machines, and nothing that is sent is encrypted; give --tls-certificates, or listen on \
             127.0.0.1, on [::1] or on a Unix socket, and forward that"
        ),
    ))
}

fn accept(listener: &Listener, needs_tls: bool, shared: &Arc<Shared>) {
    loop {
        let socket = match listener {
            Listener::Unix(l) => l.accept().map(|(s, _)| Socket::Unix(s)),
            Listener::Tcp(l) => l.accept().map(|(s, _)| Socket::Tcp(s)),
        };
        if shared.is_over.load(Ordering::Acquire) {
            return;
        }
        let Ok(socket) = socket else {
            // Out of descriptors, most likely: others have to leave first.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if let Socket::Tcp(s) = &socket {
            // It is slower without.
            let _ = s.set_nodelay(true);
        }
        begin(shared, Stream::new(socket), needs_tls);
    }
}

/// A connection that is counted; it is no longer when this is dropped.
struct Present(Arc<Shared>, u64);

impl Drop for Present {
    fn drop(&mut self) {
        let mut connections = self.0.connections();
        connections.strangers.remove(&self.1);
        connections.clients.remove(&self.1);
        connections.count -= 1;
        self.0.has_left.notify_all();
    }
}

fn begin(shared: &Arc<Shared>, stream: Stream, needs_tls: bool) {
    let stream = Arc::new(stream);
    let Some(number) = shared.connections().take_in(&stream) else {
        return;
    };
    let present = Present(Arc::clone(shared), number);
    // Where there are no threads to be had, the client finds the connection closed.
    let _ = std::thread::Builder::new()
        .name("nbd".into())
        .spawn(move || {
            // Whoever breaks the protocol or hangs up has nothing to be told.
            let _ = serve(&present, &stream, needs_tls);
        });
}

fn serve(
    Present(shared, number): &Present,
    stream: &Arc<Stream>,
    needs_tls: bool,
) -> io::Result<()> {
    let mut timed = Timed::new(stream, HANDSHAKE);
    let terms = Terms {
        exports: &*shared.exports,
        admit: &|| shared.connections().admit(*number),
        tls: shared.tls.as_ref(),
        needs_tls,
    };
    let Some(session) = handshake::negotiate(&mut timed, &terms)? else {
        return Ok(());
    };
    timed.end()?;
    transmission::transmit(session, stream, &shared.memory)
}
