//! What a compressed trace expands to, on a thread of its own and in bounded memory.

use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use liblzma::stream::Stream;

/// As much of a file as tells how it is compressed, and how far back it refers.
pub(super) const HEAD: u64 = 34;
const CHUNK: usize = 128 << 10;
/// Chunks between the thread that expands and the one that reads.
const QUEUE: usize = 4;
/// How far back a compressed trace may refer, which takes as much memory for each of its files: half of what a replay may take beside
/// the blocks that are mapped. zstd has no more unless told so, with --ultra or --long.
const MAX_WINDOW: u64 = 32 << 20;
/// The same of xz, whose preset 9 names as much for whatever it compresses; memory is touched only as far as there is something to
/// refer back to.
const MAX_DICTIONARY: u64 = 64 << 20;
/// xz counts what it takes beside its dictionary.
const XZ_MEMORY: u64 = MAX_DICTIONARY + (2 << 20);

/// The first byte of a member of a gzip file.
const GZIP: u8 = 0x1f;

/// What `from`, of which `head` was read already, expands to: itself if it is not compressed.
pub(super) fn expanded(
    head: Vec<u8>,
    from: Box<dyn Read + Send>,
) -> io::Result<Box<dyn Read + Send>> {
    let magic = head.clone();
    let from = Cursor::new(head).chain(from);
    Ok(match magic.as_slice() {
        [GZIP, 0x8b, ..] => piped(Members::new(BufReader::new(from)))?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::Decoder::new(from)?;
            decoder.window_log_max(MAX_WINDOW.ilog2())?;
            piped(Bounded::new(decoder, zstd_window(&magic), MAX_WINDOW))?
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let flags = liblzma::stream::CONCATENATED;
            let stream = Stream::new_stream_decoder(XZ_MEMORY, flags)?;
            let decoder = liblzma::read::XzDecoder::new_stream(from, stream);
            piped(Bounded::new(decoder, xz_dictionary(&magic), MAX_DICTIONARY))?
        }
        [b'B', b'Z', b'h', ..] => piped(bzip2::read::MultiBzDecoder::new(from))?,
        _ => Box::new(from),
    })
}

/// Something else follows what was compressed.
#[derive(Debug)]
pub(super) struct Followed;

impl fmt::Display for Followed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("something else follows what was compressed with gzip")
    }
}

impl std::error::Error for Followed {}

/// The members of a gzip file, one after the other, and zeros behind them, as tapes and block devices leave them.
struct Members<R> {
    /// None at the end.
    member: Option<flate2::bufread::GzDecoder<R>>,
}

impl<R: BufRead> Members<R> {
    fn new(from: R) -> Self {
        let member = Some(flate2::bufread::GzDecoder::new(from));
        Self { member }
    }

    /// Goes on to the next member.
    fn advance(&mut self) -> io::Result<()> {
        let Some(mut from) = self.member.take().map(|member| member.into_inner()) else {
            return Ok(());
        };
        loop {
            let data = from.fill_buf()?;
            if data.is_empty() {
                return Ok(());
            }
            let zeros = data.iter().take_while(|&&byte| byte == 0).count();
            let next = data.get(zeros).copied();
            from.consume(zeros);
            match next {
                None => {}
                Some(GZIP) => {
                    *self = Self::new(from);
                    return Ok(());
                }
                Some(_) => return Err(io::Error::other(Followed)),
            }
        }
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let n = member.read(buf)?;
            if n > 0 || buf.is_empty() {
                return Ok(n);
            }
            self.advance()?;
        }
        Ok(0)
    }
}

/// A decoder that says what to do about a trace that refers back too far.
struct Bounded<R> {
    decoder: R,
    /// How far the beginning of the trace refers back, if that is known.
    window: Option<u64>,
    /// How far it may.
    most: u64,
}

impl<R> Bounded<R> {
    fn new(decoder: R, window: Option<u64>, most: u64) -> Self {
        Self {
            decoder,
            window,
            most,
        }
    }

    #[cold]
    fn explain(&self, e: io::Error) -> io::Error {
        let is_xz = e
            .get_ref()
            .is_some_and(|e| e.downcast_ref() == Some(&liblzma::stream::Error::MemLimit));
        if !is_xz && !e.to_string().contains("too much memory") {
            return e;
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let window = self.window.filter(|&window| window > self.most);
        let window = window.map_or("more".into(), |window| format!("{} MiB", mib(window)));
        io::Error::other(format!(
            "it refers back by {window}, which takes as much memory, and {} MiB is the most; expand it with zstd --long=31 -dc or xz -dc \
             and read that from standard input, or compress it anew with zstd -19 or xz -9 at most",
            mib(self.most)
        ))
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buf).map_err(|e| self.explain(e))
    }
}

/// The window of the zstd frame that `head` begins with (RFC 8878, 3.1.1.1).
fn zstd_window(head: &[u8]) -> Option<u64> {
    let (descriptor, behind) = head.get(4..)?.split_first()?;
    if descriptor & 1 << 5 == 0 {
        let (exponent, mantissa) = (behind.first()? >> 3, u64::from(behind[0] & 7));
        return Some((1 << (10 + exponent)) / 8 * (8 + mantissa));
    }
    // All of the contents, whose size follows the number of a dictionary.
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size = behind.get(dictionary..)?;
    match descriptor >> 6 {
        2 => Some(u32::from_le_bytes(*size.first_chunk()?).into()),
        3 => Some(u64::from_le_bytes(*size.first_chunk()?)),
        // Less than 64 KiB and a bit.
        _ => None,
    }
}

/// The dictionary of the first block of the xz file that `head` begins with, if it has no other filter (its specification, 3.1 and 5.3.1).
fn xz_dictionary(head: &[u8]) -> Option<u64> {
    let (flags, mut rest) = head.get(13..)?.split_first()?;
    // The sizes of the block, of seven bits a byte.
    for _ in 0..(flags >> 6).count_ones() {
        let last = rest.iter().position(|byte| byte & 0x80 == 0)?;
        rest = &rest[last + 1..];
    }
    match *rest {
        [0x21, 1, size @ 0..40, ..] => Some((2 | u64::from(size & 1)) << (size / 2 + 11)),
        _ => None,
    }
}

/// The end of a queue that another thread fills.
struct Piped {
    chunks: Receiver<io::Result<Vec<u8>>>,
    chunk: Cursor<Vec<u8>>,
}

fn piped(from: impl Read + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
    let (to, chunks) = sync_channel(QUEUE);
    thread::Builder::new()
        .name("expand".into())
        .spawn(move || expand(from, &to))?;
    let chunk = Cursor::default();
    Ok(Box::new(Piped { chunks, chunk }))
}

/// Fills the queue until there is no more, or nobody takes it.
fn expand(mut from: impl Read, to: &SyncSender<io::Result<Vec<u8>>>) {
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = (&mut from).take(CHUNK as u64).read_to_end(&mut chunk);
        let is_last = read.is_err() || chunk.is_empty();
        if !chunk.is_empty() && to.send(Ok(chunk)).is_err() {
            return;
        }
        if let Err(e) = read {
            // A receiver that is gone needs no error.
            let _ = to.send(Err(e));
        }
        if is_last {
            return;
        }
    }
}

impl Read for Piped {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.chunk.read(buf)?;
        if n > 0 || buf.is_empty() {
            return Ok(n);
        }
        match self.chunks.recv() {
            Ok(chunk) => {
                self.chunk = Cursor::new(chunk?);
                self.chunk.read(buf)
            }
            Err(_) => Ok(0),
        }
    }
}
