//! A small NBD client: one request at a time, plain replies.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const ZEROES: u16 = 6;
pub(crate) const FUA: u16 = 1;

/// The head of a request.
fn head(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut head = 0x2560_9513_u32.to_be_bytes().to_vec();
    head.extend(flags.to_be_bytes());
    head.extend(kind.to_be_bytes());
    head.extend(cookie.to_be_bytes());
    head.extend(offset.to_be_bytes());
    head.extend(len.to_be_bytes());
    head
}

/// The head of a request that is [sent](Client::send) as it is.
pub(crate) fn request(kind: u16, offset: u64, len: u32) -> Vec<u8> {
    head(kind, 0, 0, offset, len)
}

/// A connection to an export.
pub(crate) struct Client {
    stream: UnixStream,
    pub(crate) size: u64,
    /// What the server can do.
    pub(crate) flags: u16,
    next: u64,
}

/// What came of a request; an error is an errno, or none if the server hung up.
pub(crate) type Reply = Result<Vec<u8>, Option<u32>>;

impl Client {
    pub(crate) fn connect(socket: &Path, export: &str) -> std::io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT\0\0\0\x01");
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello)?;
        let (mut size, mut flags) = ([0; 8], [0; 2]);
        stream.read_exact(&mut size)?;
        stream.read_exact(&mut flags)?;
        Ok(Self {
            stream,
            size: u64::from_be_bytes(size),
            flags: u16::from_be_bytes(flags),
            next: 0,
        })
    }

    pub(crate) fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> Reply {
        self.next += 1;
        let mut request = head(kind, flags, self.next, offset, len);
        request.extend(data);
        self.exchange(&request, if kind == READ { len as usize } else { 0 })
            .map_err(|_| None)?
    }

    fn exchange(&mut self, request: &[u8], len: usize) -> std::io::Result<Reply> {
        self.stream.write_all(request)?;
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
        assert_eq!(header[8..], self.next.to_be_bytes());
        let error = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        if error != 0 {
            return Ok(Err(Some(error)));
        }
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(Ok(data))
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sent");
    }

    /// Sends the same again and again, until the server has taken nothing for a while.
    pub(crate) fn send_what_is_taken(&mut self, bytes: &[u8]) {
        let stream = &mut self.stream;
        let patience = Some(std::time::Duration::from_millis(20));
        stream.set_write_timeout(patience).expect("set");
        for _ in 0..1_000_000 {
            if stream.write_all(bytes).is_err() {
                return;
            }
        }
        panic!("a million requests were taken");
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> Reply {
        self.ask(READ, 0, offset, len as u32, &[])
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Reply {
        self.ask(WRITE, 0, offset, data.len() as u32, data)
    }

    pub(crate) fn flush(&mut self) -> Reply {
        self.ask(FLUSH, 0, 0, 0, &[])
    }
}
