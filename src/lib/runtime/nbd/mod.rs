#![doc = include_str!("../NBD.md")]

mod handshake;
mod outbox;
mod stream;
mod transmission;
mod wire;

use self::stream::{Stream, Timed};
use super::export::Exports;
use crate::error::{Error, ErrorKind, Result};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Connections at once.
const MOST_CONNECTIONS: usize = 256;
/// Within this time a client has to have opened an export.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// Clients have this time to take their last replies when the server stops.
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
    is_over: AtomicBool,
    connections: Mutex<(Vec<(u64, Stream)>, u64)>,
    has_left: Condvar,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, (Vec<(u64, Stream)>, u64)> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server.
pub struct Server {
    shared: Arc<Shared>,
    acceptors: Vec<(Arc<Listener>, JoinHandle<()>)>,
}

impl Server {
    /// Serves exports on these sockets.
    ///
    /// # Errors
    /// `Unsuitable` for a TCP socket that others than this machine could reach; `Io` if there are no threads to be had.
    pub fn start(listeners: Vec<Listener>, exports: Arc<dyn Exports>) -> Result<Self> {
        for listener in &listeners {
            refuse_remote(listener)?;
        }
        let mut this = Self {
            shared: Arc::new(Shared {
                exports,
                is_over: AtomicBool::new(false),
                connections: Mutex::default(),
                has_left: Condvar::new(),
            }),
            acceptors: Vec::new(),
        };
        for listener in listeners {
            let listener = Arc::new(listener);
            let (shared, own) = (Arc::clone(&this.shared), Arc::clone(&listener));
            let thread = std::thread::Builder::new().name("nbd-accept".into());
            let spawned = thread.spawn(move || accept(&own, &shared));
            let spawned = spawned.map_err(|e| Error::io("cannot start a thread", e))?;
            this.acceptors.push((listener, spawned));
        }
        Ok(this)
    }

    /// Takes no more clients and no more requests, waits until those under way have ended, and hangs up. Clients that do not take
    /// their replies within a few seconds lose them.
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
        connections.0.iter().for_each(|(_, s)| s.end_requests());
        let waited = shared
            .has_left
            .wait_timeout_while(connections, LAST_REPLIES, |c| !c.0.is_empty());
        let connections = waited.unwrap_or_else(PoisonError::into_inner).0;
        connections.0.iter().for_each(|(_, s)| s.hang_up());
        let waited = shared.has_left.wait_while(connections, |c| !c.0.is_empty());
        drop(waited);
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

/// There is no encryption: TCP is for this machine alone.
fn refuse_remote(listener: &Listener) -> Result<()> {
    let Listener::Tcp(tcp) = listener else {
        return Ok(());
    };
    let address = tcp.local_addr();
    let address = address.map_err(|e| Error::io("cannot tell the address of a socket", e))?;
    if address.ip().is_loopback() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsuitable,
        format!(
            "{address} can be reached from other machines, and nothing that is sent is encrypted; listen on 127.0.0.1, on [::1] or on a \
             Unix socket, and forward that"
        ),
    ))
}

fn accept(listener: &Listener, shared: &Arc<Shared>) {
    loop {
        let stream = match listener {
            Listener::Unix(l) => l.accept().map(|(s, _)| Stream::Unix(s)),
            Listener::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
        };
        if shared.is_over.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else {
            // Out of descriptors, most likely: others have to leave first.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if let Stream::Tcp(s) = &stream {
            // It is slower without.
            let _ = s.set_nodelay(true);
        }
        begin(shared, stream);
    }
}

/// A connection that is counted; it is no longer when this is dropped.
struct Present(Arc<Shared>, u64);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.connections().0.retain(|(n, _)| *n != self.1);
        self.0.has_left.notify_all();
    }
}

fn begin(shared: &Arc<Shared>, stream: Stream) {
    let Ok(own) = stream.try_clone() else { return };
    let mut connections = shared.connections();
    if connections.0.len() >= MOST_CONNECTIONS {
        return;
    }
    connections.1 += 1;
    let number = connections.1;
    connections.0.push((number, own));
    drop(connections);
    let present = Present(Arc::clone(shared), number);
    // Where there are no threads to be had, the client finds the connection closed.
    let _ = std::thread::Builder::new()
        .name("nbd".into())
        .spawn(move || {
            // Whoever breaks the protocol or hangs up has nothing to be told.
            let _ = serve(&*present.0.exports, stream);
        });
}

fn serve(exports: &dyn Exports, mut stream: Stream) -> io::Result<()> {
    let mut timed = Timed::new(&mut stream, HANDSHAKE);
    let Some(session) = handshake::negotiate(&mut timed, exports)? else {
        return Ok(());
    };
    timed.end()?;
    transmission::transmit(session, stream)
}
