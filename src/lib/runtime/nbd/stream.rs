//! The stream of a connection: a socket of either kind, with TLS once that was asked for. Threads that share it read and write through a
//! reference.

use super::tls::{Session, Tls};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

#[derive(Debug)]
pub(super) struct Stream {
    socket: Socket,
    tls: OnceLock<Session>,
}

impl Stream {
    pub(super) fn new(socket: Socket) -> Self {
        let tls = OnceLock::new();
        Self { socket, tls }
    }

    fn shutdown(&self, how: Shutdown) {
        // It may be closed already.
        let _ = match &self.socket {
            Socket::Unix(s) => s.shutdown(how),
            Socket::Tcp(s) => s.shutdown(how),
        };
    }

    /// Takes no more requests; replies can still be sent.
    pub(super) fn end_requests(&self) {
        self.shutdown(Shutdown::Read);
    }

    /// True if something can be read without a wait, or so it seems.
    pub(super) fn is_readable(&self) -> bool {
        let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
        let now = Timespec::default();
        poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    pub(super) fn hang_up(&self) {
        self.shutdown(Shutdown::Both);
    }

    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match &self.socket {
            Socket::Unix(s) => {
                s.set_read_timeout(timeout)?;
                s.set_write_timeout(timeout)
            }
            Socket::Tcp(s) => {
                s.set_read_timeout(timeout)?;
                s.set_write_timeout(timeout)
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(s) => s.as_fd(),
            Self::Tcp(s) => s.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(s) => (&*s).read(buffer),
            Socket::Tcp(s) => (&*s).read(buffer),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(data)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Unix(s) => (&*s).write_vectored(slices),
            Socket::Tcp(s) => (&*s).write_vectored(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.tls.get() {
            Some(tls) => tls.read(&self.socket, buffer),
            None => (&self.socket).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(data)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.tls.get() {
            Some(tls) => tls.write(&self.socket, slices),
            None => (&self.socket).write_vectored(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stream on which everything has to be said until a time.
pub(super) struct Timed<'a> {
    stream: &'a Stream,
    until: Instant,
}

impl<'a> Timed<'a> {
    pub(super) fn new(stream: &'a Stream, time: Duration) -> Self {
        let until = Instant::now() + time;
        Self { stream, until }
    }

    /// Goes on in TLS, which the client begins.
    pub(super) fn start_tls(&mut self, tls: &Tls) -> io::Result<()> {
        let session = Session::accept(tls, self)?;
        // Nobody else has begun it: only the handshake does.
        let _ = self.stream.tls.set(session);
        Ok(())
    }

    /// There is time again.
    pub(super) fn end(self) -> io::Result<()> {
        self.stream.set_timeout(None)
    }

    fn in_time(&mut self) -> io::Result<&'a Stream> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_timeout(Some(left))?;
        Ok(self.stream)
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.in_time()?.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.in_time()?.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
