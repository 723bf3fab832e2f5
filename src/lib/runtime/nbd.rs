//! A plain NBD server: fixed newstyle, simple replies. A connection has a thread that reads requests and carries out what is mapped, and
//! one that sends the replies of what the worker had.

use super::export::{Answer, Connection, Export, Exports, Replier, Request};
use crate::error::{Error, Result};
use rustix::io::Errno;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

/// Bytes that one request may read or write.
const MOST_PAYLOAD: u32 = 32 << 20;
/// Requests of one connection that are under way at once.
const MOST_PENDING: usize = 256;
/// Bytes that they may have, beside those of the last one.
const MOST_BYTES: usize = 32 << 20;
/// Connections at once.
const MOST_CONNECTIONS: usize = 256;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// A socket that clients connect to.
#[derive(Debug)]
pub enum Listener {
    /// A Unix socket.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(s) => Self::Unix(s.try_clone()?),
            Self::Tcp(s) => Self::Tcp(s.try_clone()?),
        })
    }

    fn shutdown(&self) {
        let _ = match self {
            Self::Unix(s) => s.shutdown(Shutdown::Both),
            Self::Tcp(s) => s.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.read(buffer),
            Self::Tcp(s) => s.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write(data),
            Self::Tcp(s) => s.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
}

impl Server {
    /// Serves the exports on these sockets.
    ///
    /// # Errors
    /// `Io` if there are no threads to be had.
    pub fn start(listeners: Vec<Listener>, exports: Arc<dyn Exports>) -> Result<Self> {
        let shared = Arc::new(Shared {
            exports,
            is_over: AtomicBool::new(false),
            connections: Mutex::default(),
            has_left: Condvar::new(),
        });
        for listener in listeners {
            let shared = Arc::clone(&shared);
            let accept = move || loop {
                let stream = match &listener {
                    Listener::Unix(l) => l.accept().map(|(s, _)| Stream::Unix(s)),
                    Listener::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
                };
                if shared.is_over.load(Ordering::Acquire) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                if let Stream::Tcp(s) = &stream {
                    let _ = s.set_nodelay(true);
                }
                begin(&shared, stream);
            };
            let spawned = std::thread::Builder::new().name("nbd".into()).spawn(accept);
            spawned.map_err(|e| Error::io("cannot start a thread", e))?;
        }
        Ok(Self { shared })
    }

    /// Hangs up on all clients and waits until their requests have ended.
    pub fn stop(self) {
        self.shared.is_over.store(true, Ordering::Release);
        let mut connections = self.shared.connections();
        connections
            .0
            .iter()
            .for_each(|(_, stream)| stream.shutdown());
        while !connections.0.is_empty() {
            connections = self
                .shared
                .has_left
                .wait(connections)
                .unwrap_or_else(PoisonError::into_inner);
        }
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
    let of_thread = Arc::clone(shared);
    let leave = move |shared: &Shared| {
        shared.connections().0.retain(|(n, _)| *n != number);
        shared.has_left.notify_all();
    };
    let spawned = std::thread::Builder::new()
        .name("nbd".into())
        .spawn(move || {
            let _ = serve(&*of_thread.exports, stream);
            leave(&of_thread);
        });
    if spawned.is_err() {
        leave(shared);
    }
}

fn number<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn flags(export: &dyn Export) -> u16 {
    let read_only = if export.is_read_only() { 2 } else { 0 };
    let multi_conn = if export.is_multi_conn() { 256 } else { 0 };
    1 | read_only | 4 | 8 | 32 | 64 | multi_conn | 2048
}

fn find(exports: &dyn Exports, name: &[u8]) -> Option<Arc<dyn Export>> {
    exports.find(std::str::from_utf8(name).ok()?)
}

fn serve(exports: &dyn Exports, mut stream: Stream) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
    let client = u32::from_be_bytes(number(&mut stream)?);
    let mut reader = BufReader::with_capacity(256 << 10, stream.try_clone()?);
    loop {
        if u64::from_be_bytes(number(&mut reader)?) != u64::from_be_bytes(*b"IHAVEOPT") {
            return Err(bad("no option"));
        }
        let option = u32::from_be_bytes(number(&mut reader)?);
        let len = u32::from_be_bytes(number(&mut reader)?);
        if len > 65536 {
            return Err(bad("a long option"));
        }
        let mut data = vec![0; len as usize];
        reader.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut out = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            out.extend(option.to_be_bytes());
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            stream.write_all(&out)
        };
        match option {
            1 => {
                let Some(export) = find(exports, &data) else {
                    return Err(bad("no such export"));
                };
                let mut out = export.size().to_be_bytes().to_vec();
                out.extend(flags(&*export).to_be_bytes());
                if client & 2 == 0 {
                    out.extend([0; 124]);
                }
                stream.write_all(&out)?;
                return transmit(export, stream, reader);
            }
            2 => {
                reply(1, &[])?;
                return Ok(());
            }
            3 => {
                for (name, _) in exports.list() {
                    let mut data = (name.len() as u32).to_be_bytes().to_vec();
                    data.extend(name.as_bytes());
                    reply(2, &data)?;
                }
                reply(1, &[])?;
            }
            6 | 7 => {
                let name = data
                    .get(..4)
                    .map(|n| u32::from_be_bytes([n[0], n[1], n[2], n[3]]) as usize);
                let Some(name) = name.and_then(|len| data.get(4..4 + len)) else {
                    reply(0x8000_0003, b"malformed")?;
                    continue;
                };
                let Some(export) = find(exports, name) else {
                    reply(0x8000_0006, b"no such export")?;
                    continue;
                };
                let mut info = vec![0, 0];
                info.extend(export.size().to_be_bytes());
                info.extend(flags(&*export).to_be_bytes());
                reply(3, &info)?;
                let mut sizes = vec![0, 3];
                let preferred = export.preferred_block();
                for size in [1, preferred, MOST_PAYLOAD] {
                    sizes.extend(size.to_be_bytes());
                }
                reply(3, &sizes)?;
                reply(1, &[])?;
                if option == 7 {
                    return transmit(export, stream, reader);
                }
            }
            _ => reply(0x8000_0001, &[])?,
        }
    }
}

/// Replies that wait to be sent, and requests that wait to be answered.
#[derive(Default)]
struct Out {
    bytes: Vec<u8>,
    pending: usize,
    /// Bytes of data that the pending requests have or will have.
    pending_bytes: usize,
    is_over: bool,
}

struct Outbox {
    out: Mutex<Out>,
    changed: Condvar,
    stream: Mutex<Stream>,
    /// The thread that reads requests; it sends what it answered itself before it waits for more.
    reader: ThreadId,
}

impl Outbox {
    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more request of `len` bytes may be under way.
    fn begin(&self, len: usize) -> io::Result<()> {
        let is_full = |out: &Out| {
            out.pending > 0 && (out.pending >= MOST_PENDING || out.pending_bytes + len > MOST_BYTES)
        };
        let mut out = self.out();
        if is_full(&out) || out.bytes.len() > MOST_BYTES {
            drop(out);
            self.write()?;
            let waited = self.changed.wait_while(self.out(), |out| is_full(out));
            out = waited.unwrap_or_else(PoisonError::into_inner);
        }
        out.pending += 1;
        out.pending_bytes += len;
        Ok(())
    }

    fn reply(&self, cookie: u64, len: usize, done: Answer) {
        let mut out = self.out();
        let error = done.as_ref().err().map_or(0, |e| e.raw_os_error() as u32);
        out.bytes.extend(REPLY_MAGIC.to_be_bytes());
        out.bytes.extend(error.to_be_bytes());
        out.bytes.extend(cookie.to_be_bytes());
        out.bytes.extend(done.unwrap_or_default());
        out.pending -= 1;
        out.pending_bytes -= len;
        drop(out);
        if std::thread::current().id() != self.reader {
            self.changed.notify_all();
        }
    }

    fn write(&self) -> io::Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = std::mem::take(&mut self.out().bytes);
        stream.write_all(&bytes)
    }

    fn be_writer(&self) {
        loop {
            let out = self.out();
            let idle = |out: &mut Out| out.bytes.is_empty() && !out.is_over;
            let out = self
                .changed
                .wait_while(out, idle)
                .unwrap_or_else(PoisonError::into_inner);
            if out.bytes.is_empty() {
                return;
            }
            drop(out);
            if self.write().is_err() {
                // Whoever hung up gets no replies; those that come are dropped.
                self.out().bytes.clear();
            }
        }
    }
}

fn transmit(
    export: Arc<dyn Export>,
    stream: Stream,
    mut reader: BufReader<Stream>,
) -> io::Result<()> {
    let outbox = Arc::new(Outbox {
        out: Mutex::default(),
        changed: Condvar::new(),
        stream: Mutex::new(stream),
        reader: std::thread::current().id(),
    });
    std::thread::scope(|scope| {
        scope.spawn(|| outbox.be_writer());
        let mut connection = Arc::clone(&export).connect();
        let served = requests(&*export, &mut *connection, &outbox, &mut reader);
        let out = outbox.out();
        let out = outbox.changed.wait_while(out, |out| out.pending > 0);
        out.unwrap_or_else(PoisonError::into_inner).is_over = true;
        outbox.changed.notify_all();
        served
    })
}

fn requests(
    export: &dyn Export,
    connection: &mut dyn Connection,
    outbox: &Arc<Outbox>,
    reader: &mut BufReader<Stream>,
) -> io::Result<()> {
    loop {
        if reader.buffer().len() < 28 {
            outbox.write()?;
        }
        let header: [u8; 28] = number(reader)?;
        let field = |at: usize, len: usize| {
            header[at..at + len]
                .iter()
                .fold(0_u64, |n, &b| n << 8 | u64::from(b))
        };
        if field(0, 4) != 0x2560_9513 {
            return Err(bad("no request"));
        }
        let (flags, kind, cookie, offset, len) = (
            field(4, 2),
            field(6, 2),
            field(8, 8),
            field(16, 8),
            field(24, 4),
        );
        let fua = flags & 1 != 0;
        if kind == 2 {
            return Ok(());
        }
        let mut data = Vec::new();
        if kind == 1 {
            if len > u64::from(MOST_PAYLOAD) {
                return Err(bad("a long write"));
            }
            data = vec![0; len as usize];
            reader.read_exact(&mut data)?;
        }
        let held = match kind {
            0 | 1 => len.min(u64::from(MOST_PAYLOAD)) as usize,
            _ => 0,
        };
        outbox.begin(held)?;
        let is_within = offset
            .checked_add(len)
            .is_some_and(|end| end <= export.size());
        let outbox = Arc::clone(outbox);
        let reply = Replier::new(move |answer| outbox.reply(cookie, held, answer));
        let request = match kind {
            1 if !is_within => Err(Errno::NOSPC),
            0 | 4 | 6 if !is_within => Err(Errno::INVAL),
            0 if len > u64::from(MOST_PAYLOAD) => Err(Errno::INVAL),
            0 => Ok(Request::Read {
                offset,
                len: len as usize,
            }),
            1 => Ok(Request::Write { offset, data, fua }),
            3 => Ok(Request::Flush),
            4 => Ok(Request::Trim { offset, len, fua }),
            6 => Ok(Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: flags & 2 != 0,
                fast_zero: flags & 16 != 0,
            }),
            _ => Err(Errno::INVAL),
        };
        match request {
            Ok(request) => connection.submit(request, reply),
            Err(error) => reply.answer(Err(error)),
        }
    }
}
