//! Talks to the NBD server as arbitrary bytes say: a handshake of these bytes, or a client that has opened an export and sends requests
//! in one of the styles, sound ones and others. Nothing may panic or wait for ever; each request has its one reply, no more and no
//! less, with the error or the data that a model has; whoever talks nonsense is hung up on.
#![no_main]

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use thintools::runtime::export::{Export, Exports};
use thintools::runtime::memory_export::MemoryExport;
use thintools::runtime::nbd::{Listener, Server};

/// No multiple of anything.
const SIZE: u64 = (1 << 20) + 12_345;
/// Bytes of a handshake with whatever follows it, each 28 of which may have a megabyte for an answer.
const MOST_SAID: usize = 4096;
const MOST_REQUESTS: usize = 64;
const CONTEXTS: [&str; 2] = ["base:allocation", "qemu:dirty-bitmap:all"];

/// Each client gets disks of its own.
struct Fresh;

impl Exports for Fresh {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        match name {
            "" | "disk" => Some(Arc::new(MemoryExport::new(SIZE, false))),
            "ro" => Some(Arc::new(MemoryExport::new(SIZE, true))),
            _ => None,
        }
    }

    fn list(&self) -> Vec<(String, String)> {
        ["disk", "ro"]
            .map(|name| (name.into(), "fresh".into()))
            .into()
    }
}

static SERVER: LazyLock<(tempfile::TempDir, Server)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let listener = UnixListener::bind(folder.path().join("s")).expect("a socket");
    let started = Server::start(vec![Listener::Unix(listener)], Arc::new(Fresh), None);
    (folder, started.expect("threads"))
});

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Simple,
    Structured,
    Extended,
}

/// A request that is sent.
struct Asked {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u64,
    data: Vec<u8>,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const STATUS: u16 = 7;

impl Asked {
    /// Ten bytes of a script.
    fn of(script: &[u8], cookie: u64, style: Style) -> Self {
        let at = |i: usize| u64::from(script[i]);
        let (mut command, mut flags) = (u16::from(script[0] & 7), u16::from(script[1] & 63));
        if script[0] >= 0xf0 {
            (command, flags) = (u16::from(script[2]), u16::from(script[1]) << 8);
        }
        let scale = [1, 512, 65536, SIZE / 200][usize::from(script[2] & 3)];
        let mut offset = at(3).wrapping_mul(scale) + at(4);
        if script[2] & 0xc0 == 0xc0 {
            offset = u64::MAX - offset;
        }
        let scale = [1, 512, 4096, 65536][usize::from(script[2] >> 2 & 3)];
        let mut len = at(5) * scale + at(6);
        let has_payload = command == WRITE || style == Style::Extended && flags & 32 != 0;
        if has_payload {
            len %= 200_000;
        }
        if script[2] & 0x30 == 0x30 && !has_payload {
            len = if style == Style::Extended {
                len << 48
            } else {
                len << 16 & 0xffff_ffff
            };
        }
        if command == FLUSH && script[7] < 200 {
            (offset, len) = (0, 0);
        }
        let data = match has_payload {
            true => (0..len).map(|i| (i % 251) as u8 ^ script[8]).collect(),
            false => Vec::new(),
        };
        Self {
            flags,
            command,
            cookie,
            offset,
            len,
            data,
        }
    }

    fn bytes(&self, style: Style) -> Vec<u8> {
        let is_extended = style == Style::Extended;
        let magic = if is_extended {
            0x21e4_1c71_u32
        } else {
            0x2560_9513
        };
        let mut out = magic.to_be_bytes().to_vec();
        out.extend(self.flags.to_be_bytes());
        out.extend(self.command.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(self.offset.to_be_bytes());
        match is_extended {
            true => out.extend(self.len.to_be_bytes()),
            false => out.extend((self.len as u32).to_be_bytes()),
        }
        out.extend(&self.data);
        out
    }

    fn is_within(&self) -> bool {
        self.offset
            .checked_add(self.len)
            .is_some_and(|end| end <= SIZE)
    }

    /// The error that the reply has to have; 0 for none.
    fn error(&self, style: Style, contexts: usize) -> u32 {
        let has_payload = style == Style::Extended;
        let known = 1 | match self.command {
            READ if style != Style::Simple => 4,
            WRITE if has_payload => 32,
            WRITE_ZEROES => 2 | 16,
            STATUS => 8,
            _ => 0,
        };
        let is_known = self.command <= STATUS && self.command != DISCONNECT;
        if !is_known || self.flags & !known != 0 || self.command == STATUS && contexts == 0 {
            return 22;
        }
        if self.command == FLUSH {
            return if (self.offset, self.len) == (0, 0) {
                0
            } else {
                22
            };
        }
        if self.len == 0 || self.command <= WRITE && self.len > 32 << 20 {
            return 22;
        }
        if !self.is_within() {
            return if matches!(self.command, WRITE | WRITE_ZEROES) {
                28
            } else {
                22
            };
        }
        match self.command == WRITE_ZEROES && self.flags & 18 == 18 {
            true => 95,
            false => 0,
        }
    }
}

struct Replies {
    from: BufReader<UnixStream>,
    style: Style,
    contexts: usize,
    model: Vec<u8>,
}

impl Replies {
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.from.read_exact(&mut bytes).expect("a reply");
        bytes
    }

    fn number(&mut self, len: usize) -> u64 {
        self.bytes(len)
            .iter()
            .fold(0, |n, &b| n << 8 | u64::from(b))
    }

    /// Replies to options, up to the last one of `options` options.
    fn skip_handshake(&mut self, options: usize) {
        self.bytes(18);
        let mut left = options;
        while left > 0 {
            assert_eq!(self.number(8), 0x0003_e889_0455_65a9);
            self.number(4);
            let (kind, len) = (self.number(4), self.number(4));
            self.bytes(len as usize);
            assert!(kind < 1 << 31, "option refused: {kind:x}");
            left -= usize::from(kind == 1);
        }
    }

    /// The reply to `asked`, which has to be the next.
    fn check(&mut self, asked: &Asked) {
        let expected = asked.error(self.style, self.contexts);
        let range = match expected == 0 && asked.command != STATUS {
            true => asked.offset as usize..(asked.offset + asked.len) as usize,
            false => 0..0,
        };
        if self.style == Style::Simple {
            assert_eq!(self.number(4), 0x6744_6698);
            assert_eq!(self.number(4) as u32, expected);
            assert_eq!(self.number(8), asked.cookie);
            if expected == 0 && asked.command == READ {
                let data = self.bytes(range.len());
                assert!(data == self.model[range.clone()], "other data");
            }
        } else {
            self.check_chunks(asked, expected);
        }
        match asked.command {
            _ if expected != 0 => {}
            WRITE => self.model[range].copy_from_slice(&asked.data),
            TRIM | WRITE_ZEROES => self.model[range].fill(0),
            _ => {}
        }
    }

    fn check_chunks(&mut self, asked: &Asked, expected: u32) {
        let is_extended = self.style == Style::Extended;
        let (mut told, mut statuses, mut failed) = (0, 0, 0);
        loop {
            let magic = if is_extended {
                0x6e8a_278c
            } else {
                0x668e_33ef
            };
            assert_eq!(self.number(4), magic);
            let (flags, kind) = (self.number(2), self.number(2));
            assert_eq!(self.number(8), asked.cookie);
            if is_extended {
                assert_eq!(self.number(8), asked.offset);
            }
            let len = self.number(if is_extended { 8 } else { 4 }) as usize;
            assert!(len <= (32 << 20) + 8);
            match kind {
                0 => assert_eq!((flags, len), (1, 0)),
                1 | 2 => {
                    assert_eq!(asked.command, READ);
                    let at = self.number(8);
                    let data = match kind {
                        1 => self.bytes(len - 8),
                        _ => vec![0; self.number(4) as usize],
                    };
                    let end = at + data.len() as u64;
                    assert!(asked.offset <= at && end <= asked.offset + asked.len);
                    assert!(data == self.model[at as usize..end as usize], "other data");
                    assert!(asked.flags & 4 == 0 || data.len() as u64 == asked.len);
                    told += data.len() as u64;
                }
                5 | 6 => {
                    assert_eq!((asked.command, kind == 6), (STATUS, is_extended));
                    statuses += 1;
                    assert_eq!(self.number(4), statuses as u64);
                    let each = if is_extended { 8 } else { 4 };
                    let count = match is_extended {
                        true => self.number(4) as usize,
                        false => (len - 4) / 8,
                    };
                    assert!(count > 0 && (asked.flags & 8 == 0 || count == 1));
                    let mut covered = 0;
                    for _ in 0..count {
                        let len = self.number(each);
                        assert!(len > 0 && self.number(each) <= 3);
                        covered += len;
                    }
                    assert!(covered <= asked.len);
                }
                _ => {
                    failed = self.number(4) as u32;
                    self.bytes(len - 4);
                }
            }
            if flags == 1 {
                break;
            }
        }
        assert_eq!(failed, expected, "the error of command {}", asked.command);
        if expected == 0 && asked.command == READ {
            assert_eq!(told, asked.len);
        }
        if expected == 0 && asked.command == STATUS {
            assert_eq!(statuses, self.contexts);
        }
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u32).to_be_bytes();
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &len, data].concat()
}

fn named(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat()
}

/// Says it all on a thread of its own, as replies have to be taken meanwhile.
fn converse(said: &[u8], take: impl FnOnce(UnixStream)) {
    let stream = UnixStream::connect(SERVER.0.path().join("s")).expect("connected");
    let mut sender = stream.try_clone().expect("descriptors");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Whoever is hung up on cannot say the rest.
            let _ = sender.write_all(said);
            let _ = sender.shutdown(Shutdown::Write);
        });
        take(stream);
    });
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&how, script)) = bytes.split_first() else {
        return;
    };
    let style = match how & 3 {
        0 => {
            let said = &script[..script.len().min(MOST_SAID)];
            return converse(said, |mut stream| {
                let mut greeting = [0; 18];
                stream.read_exact(&mut greeting).expect("a greeting");
                assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x03");
                // Resetting is hanging up, too.
                let _ = io::copy(&mut stream, &mut io::sink());
            });
        }
        1 => Style::Simple,
        2 => Style::Structured,
        _ => Style::Extended,
    };
    let contexts = if style == Style::Simple {
        0
    } else {
        usize::from(how >> 2) % 3
    };
    let mut said = vec![0, 0, 0, 3];
    let mut options = 1;
    if style != Style::Simple {
        said.extend(option(if style == Style::Extended { 11 } else { 8 }, &[]));
        let mut queries = named("disk");
        queries.extend((contexts as u32).to_be_bytes());
        CONTEXTS[..contexts]
            .iter()
            .for_each(|context| queries.extend(named(context)));
        said.extend(option(10, &queries));
        options = 3;
    }
    said.extend(option(7, &[named("disk"), vec![0, 0]].concat()));
    let mut asked: Vec<Asked> = script
        .chunks_exact(10)
        .take(MOST_REQUESTS)
        .zip(1..)
        .map(|(script, cookie)| Asked::of(script, cookie, style))
        .collect();
    if let Some(end) = asked.iter().position(|asked| asked.command == DISCONNECT) {
        asked.truncate(end + 1);
    }
    asked
        .iter()
        .for_each(|asked| said.extend(asked.bytes(style)));
    // What is left is the beginning of a request, or nonsense.
    said.extend(script.chunks_exact(10).remainder());
    converse(&said, |stream| {
        let mut replies = Replies {
            from: BufReader::new(stream),
            style,
            contexts,
            model: vec![0; SIZE as usize],
        };
        replies.skip_handshake(options);
        for asked in asked.iter().filter(|asked| asked.command != DISCONNECT) {
            replies.check(asked);
        }
        let mut rest = Vec::new();
        let _ = replies.from.read_to_end(&mut rest);
        assert!(
            rest.is_empty(),
            "{} bytes that nobody asked for",
            rest.len()
        );
    });
});
