//! The bytes of a trace: from a file or standard input.

use std::fs::File;
use std::io::{self, ErrorKind as IoError, Read};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memchr::memrchr;

use super::expand::{Followed, HEAD, expanded};
use crate::{Error, Result};

/// Larger than any record: 64 bytes and 64 KiB of payload, or a line.
const BUFFER: usize = 256 << 10;
/// Bytes in front of what is given away, for the beginning of something that ends in it.
const ROOM: usize = 256;

/// What some editors and spreadsheets put before a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// `text` without its mark, if it has one.
pub(super) fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// How much of a file was read, before it is expanded.
#[derive(Clone)]
pub(super) struct Progress {
    done: Arc<AtomicU64>,
    total: u64,
}

impl Progress {
    /// Of all inputs together; none if one of them does not know.
    pub(super) fn sum(all: &[Option<Self>]) -> Option<(u64, u64)> {
        all.iter().try_fold((0u64, 0u64), |(done, total), one| {
            let one = one.as_ref()?;
            let here = one.done.load(Ordering::Relaxed);
            Some((done.saturating_add(here), total.saturating_add(one.total)))
        })
    }
}

/// A file that tells how much of it was read.
struct Counted {
    from: File,
    done: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buf)?;
        self.done.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// A window that slides over the bytes of a trace.
pub(super) struct Input {
    name: String,
    from: Box<dyn Read + Send>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    offset: u64,
    is_cut: bool,
    /// Something else follows what was compressed.
    is_followed: bool,
    is_live: bool,
    progress: Option<Progress>,
}

impl Input {
    /// Opens a file, `-` being standard input.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let is_stdin = path.as_os_str() == "-";
        let name = if is_stdin {
            "standard input".into()
        } else {
            path.display().to_string()
        };
        let mut progress = None;
        let mut raw: Box<dyn Read + Send> = if is_stdin {
            Box::new(io::stdin())
        } else {
            let cannot = |e| Error::io(format!("cannot open the trace {name}"), e);
            let from = File::open(path).map_err(cannot)?;
            let about = from.metadata().map_err(cannot)?;
            let done = Arc::new(AtomicU64::new(0));
            if about.is_file() {
                let done = Arc::clone(&done);
                progress = Some(Progress {
                    done,
                    total: about.len(),
                });
            }
            Box::new(Counted { from, done })
        };
        let mut head = Vec::new();
        (&mut raw)
            .take(HEAD)
            .read_to_end(&mut head)
            .map_err(|e| Error::io(format!("cannot read the trace {name}"), e))?;
        let from = expanded(head, raw)
            .map_err(|e| Error::io(format!("cannot expand the trace {name}"), e))?;
        Ok(Self {
            is_live: is_stdin,
            progress,
            ..Self::new(name, from)
        })
    }

    pub(super) fn new(name: String, from: Box<dyn Read + Send>) -> Self {
        Self {
            name,
            from,
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
            offset: 0,
            is_cut: false,
            is_followed: false,
            is_live: false,
            progress: None,
        }
    }

    /// What comes may be still in the making: whoever has something does not wait for more.
    pub(super) fn is_live(&self) -> bool {
        self.is_live
    }

    /// How much of it was read, if it is known how much there is.
    pub(super) fn progress(&self) -> Option<Progress> {
        self.progress.clone()
    }

    /// The file's name, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where [`Input::data`] begins in the expanded trace.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The compressed file ended before its contents did, or goes on with what cannot be expanded.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut || self.is_followed
    }

    /// What to say of a compressed file that ended before its contents did, or went on with something else.
    pub(super) fn end_warning(&self) -> Option<String> {
        let held = self.offset + self.data().len() as u64;
        let what = match (self.is_cut, self.is_followed) {
            (true, _) => "the compressed file ends too early",
            (_, true) => "the compressed file goes on with something else",
            (false, false) => return None,
        };
        Some(format!(
            "{}: {what}, after {held} bytes of what it held: what came behind is missing from all figures; copy it again",
            self.name
        ))
    }

    /// Passes over a byte-order mark if this is the beginning of a text.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn pass_over_mark(&mut self) -> Result<()> {
        if self.offset > 0 {
            return Ok(());
        }
        self.want(BYTE_ORDER_MARK.len())?;
        let mark = self.data().len() - without_mark(self.data()).len();
        self.consume(mark);
        Ok(())
    }

    /// What was read and not consumed yet.
    #[inline]
    pub(super) fn data(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    #[inline]
    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
        self.offset += len as u64;
    }

    /// Gives the whole lines of the window away, as a part of a vector, for a spare one. Nothing if it has none.
    pub(super) fn give_lines(&mut self, spare: &mut Vec<u8>) -> Range<usize> {
        let lines = memrchr(b'\n', self.data()).map_or(0, |last| last + 1);
        if lines == 0 {
            return 0..0;
        }
        let given = self.start..self.start + lines;
        let rest = &self.buffer[given.end..self.end];
        spare.resize(BUFFER, 0);
        spare[..rest.len()].copy_from_slice(rest);
        (self.start, self.end) = (0, rest.len());
        self.offset += lines as u64;
        std::mem::swap(spare, &mut self.buffer);
        given
    }

    /// Gives all of the window away, as a part of a vector, for a spare one into which so much is read at once.
    pub(super) fn give(&mut self, spare: &mut Vec<u8>, len: usize) -> Range<usize> {
        let given = self.start..self.end;
        spare.resize(ROOM + len, 0);
        (self.start, self.end) = (ROOM, ROOM);
        self.offset += given.len() as u64;
        std::mem::swap(spare, &mut self.buffer);
        given
    }

    /// Reads more. False at the end, and when the window is full.
    pub(super) fn fill(&mut self) -> Result<bool> {
        if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        loop {
            match self.from.read(&mut self.buffer[self.end..]) {
                Ok(n) => {
                    self.end += n;
                    return Ok(n > 0);
                }
                Err(e) if e.kind() == IoError::Interrupted => {}
                Err(e) => {
                    self.is_cut = e.kind() == IoError::UnexpectedEof;
                    self.is_followed = e.get_ref().is_some_and(|e| e.is::<Followed>());
                    if self.is_cut || self.is_followed {
                        self.from = Box::new(io::empty());
                        return Ok(false);
                    }
                    let message = format!("cannot read the trace {} at {}", self.name, self.offset);
                    return Err(Error::io(message, e));
                }
            }
        }
    }

    /// True once there are `len` bytes; false if the trace ends before.
    pub(super) fn want(&mut self, len: usize) -> Result<bool> {
        while self.end - self.start < len {
            if !self.fill()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Passes over `len` bytes. False if the trace ends before.
    pub(super) fn skip(&mut self, mut len: u64) -> Result<bool> {
        loop {
            let here = len.min((self.end - self.start) as u64);
            self.consume(here as usize);
            len -= here;
            if len == 0 {
                return Ok(true);
            }
            if !self.fill()? {
                return Ok(false);
            }
        }
    }
}
