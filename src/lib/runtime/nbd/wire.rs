//! The numbers of the protocol, and messages of clients as values.

use rustix::io::Errno;

/// How transmission frames its messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Simple,
    Structured,
    Extended,
}

pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Bytes of data that an option may have. A name has up to 4096, and there may be a number of queries.
pub(super) const MOST_OPTION: u32 = 65536;
/// Bytes that a name may have.
const MOST_NAME: usize = 4096;

pub(super) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

pub(super) mod answer {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const UNSUP: u32 = 1 << 31 | 1;
    pub(crate) const POLICY: u32 = 1 << 31 | 2;
    pub(crate) const INVALID: u32 = 1 << 31 | 3;
    pub(crate) const TLS_REQD: u32 = 1 << 31 | 5;
    pub(crate) const UNKNOWN: u32 = 1 << 31 | 6;
    pub(crate) const TOO_BIG: u32 = 1 << 31 | 9;
    pub(crate) const EXT_HEADER_REQD: u32 = 1 << 31 | 10;
}

pub(super) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

pub(super) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISCONNECT: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

pub(super) mod flag {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 2;
    pub(crate) const DF: u16 = 4;
    pub(crate) const REQ_ONE: u16 = 8;
    pub(crate) const FAST_ZERO: u16 = 16;
    pub(crate) const PAYLOAD_LEN: u16 = 32;
}

/// Names and contexts: what the meta context options carry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaQuery<'a> {
    pub(super) export: &'a str,
    pub(super) queries: Vec<&'a str>,
}

/// A reader of the fields of one message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self, len: usize) -> Option<u64> {
        let bytes = self.bytes(len)?;
        Some(bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b)))
    }

    /// A string with its length in front.
    fn name(&mut self) -> Option<&'a str> {
        let len = self.number(4)? as usize;
        name(self.bytes(len)?)
    }
}

/// A name as text, if it is one that is allowed.
pub(super) fn name(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (bytes.len() <= MOST_NAME && !text.contains('\0')).then_some(text)
}

/// The export's name and the kinds of information of INFO and GO.
pub(super) fn info_query(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.name()?;
    let count = fields.number(2)?;
    let kinds: Option<Vec<u16>> = (0..count)
        .map(|_| fields.number(2).map(|n| n as u16))
        .collect();
    fields.0.is_empty().then_some((name, kinds?))
}

pub(super) fn meta_query(data: &[u8]) -> Option<MetaQuery<'_>> {
    let mut fields = Fields(data);
    let export = fields.name()?;
    let count = fields.number(4)?;
    // Each query takes four bytes at least: no more are collected than the message has.
    let queries: Option<Vec<&str>> = (0..count).map(|_| fields.name()).collect();
    let queries = queries?;
    fields.0.is_empty().then_some(MetaQuery { export, queries })
}

/// The head of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Style {
    /// Bytes of a request's head.
    pub(super) fn head_len(self) -> usize {
        match self {
            Self::Extended => 32,
            _ => 28,
        }
    }

    /// A request's head; none if these bytes are none.
    pub(super) fn head(self, bytes: &[u8]) -> Option<Head> {
        let mut fields = Fields(bytes);
        let (magic, len_len) = match self {
            Self::Extended => (0x21e4_1c71, 8),
            _ => (0x2560_9513, 4),
        };
        if fields.number(4)? != magic {
            return None;
        }
        let head = Head {
            flags: fields.number(2)? as u16,
            command: fields.number(2)? as u16,
            cookie: fields.number(8)?,
            offset: fields.number(8)?,
            len: fields.number(len_len)?,
        };
        fields.0.is_empty().then_some(head)
    }

    /// The head of a chunk of a structured or extended reply.
    pub(super) fn chunk(self, head: &Head, kind: u16, is_last: bool, len: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(48);
        let is_extended = self == Self::Extended;
        let magic: u32 = if is_extended {
            0x6e8a_278c
        } else {
            0x668e_33ef
        };
        out.extend(magic.to_be_bytes());
        out.extend(u16::from(is_last).to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(head.cookie.to_be_bytes());
        if is_extended {
            out.extend(head.offset.to_be_bytes());
            out.extend(len.to_be_bytes());
        } else {
            out.extend((len as u32).to_be_bytes());
        }
        out
    }

    /// What comes in front of the data of a reply to `head`, or all of it if there are none.
    pub(super) fn reply(self, head: &Head, done: Result<usize, Errno>) -> Vec<u8> {
        const ERROR: u16 = 1 << 15 | 1;
        match (self, done) {
            (Self::Simple, done) => {
                let error = done.err().map_or(0, number_of);
                let mut out = 0x6744_6698_u32.to_be_bytes().to_vec();
                out.extend(error.to_be_bytes());
                out.extend(head.cookie.to_be_bytes());
                out
            }
            (_, Err(error)) => {
                let mut out = self.chunk(head, ERROR, true, 6);
                out.extend(number_of(error).to_be_bytes());
                out.extend([0, 0]);
                out
            }
            (_, Ok(len)) if head.command == command::READ => {
                self.data(head, head.offset, true, len)
            }
            (_, Ok(_)) => self.chunk(head, 0, true, 0),
        }
    }

    /// What comes in front of data that are at `offset`, in a chunk of their own.
    pub(super) fn data(self, head: &Head, offset: u64, is_last: bool, len: usize) -> Vec<u8> {
        let mut out = self.chunk(head, 1, is_last, len as u64 + 8);
        out.extend(offset.to_be_bytes());
        out
    }

    /// A chunk that tells of zeros without sending them.
    pub(super) fn hole(self, head: &Head, offset: u64, is_last: bool, len: u32) -> Vec<u8> {
        let mut out = self.chunk(head, 2, is_last, 12);
        out.extend(offset.to_be_bytes());
        out.extend(len.to_be_bytes());
        out
    }

    /// A chunk that tells of an error at `offset`.
    pub(super) fn error_at(self, head: &Head, offset: u64, is_last: bool, e: Errno) -> Vec<u8> {
        const ERROR_OFFSET: u16 = 1 << 15 | 2;
        let mut out = self.chunk(head, ERROR_OFFSET, is_last, 14);
        out.extend(number_of(e).to_be_bytes());
        out.extend([0, 0]);
        out.extend(offset.to_be_bytes());
        out
    }
}

/// The protocol's number of an error; what it has none for is an I/O error.
fn number_of(error: Errno) -> u32 {
    match error {
        Errno::PERM => 1,
        Errno::NOMEM => 12,
        Errno::INVAL => 22,
        Errno::NOSPC => 28,
        Errno::OVERFLOW => 75,
        Errno::OPNOTSUPP => 95,
        Errno::SHUTDOWN => 108,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused_at_every_byte(whole: &[u8], parse: impl Fn(&[u8]) -> bool) {
        assert!(parse(whole));
        for len in 0..whole.len() {
            assert!(!parse(&whole[..len]), "{len} bytes");
        }
        assert!(!parse(&[whole, &[0]].concat()), "a byte too many");
    }

    #[test]
    fn a_message_is_read_whole_or_not_at_all() {
        let info = b"\0\0\0\x03abc\0\x02\0\x01\0\x03";
        refused_at_every_byte(info, |data| info_query(data).is_some());
        assert_eq!(info_query(info), Some(("abc", vec![1, 3])));
        let meta = b"\0\0\0\x01a\0\0\0\x02\0\0\0\x05base:\0\0\0\x01q";
        refused_at_every_byte(meta, |data| meta_query(data).is_some());
        let queries = vec!["base:", "q"];
        assert_eq!(
            meta_query(meta),
            Some(MetaQuery {
                export: "a",
                queries
            })
        );
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            let magic: u32 = match style {
                Style::Extended => 0x21e4_1c71,
                _ => 0x2560_9513,
            };
            let mut request = magic.to_be_bytes().to_vec();
            request.extend([0, 1, 0, 4]);
            request.extend(7_u64.to_be_bytes());
            request.extend(8_u64.to_be_bytes());
            request.resize(style.head_len() - 1, 0);
            request.push(9);
            refused_at_every_byte(&request, |bytes| style.head(bytes).is_some());
            let head = style.head(&request).unwrap();
            assert_eq!((head.flags, head.command, head.cookie), (1, 4, 7));
            assert_eq!((head.offset, head.len), (8, 9));
        }
    }

    #[test]
    fn lengths_beyond_the_message_and_bad_names_are_refused() {
        assert_eq!(info_query(b"\xff\xff\xff\xffabc\0\0"), None);
        assert_eq!(meta_query(b"\0\0\0\0\xff\xff\xff\xff"), None);
        assert_eq!(name(b"a\0b"), None);
        assert_eq!(name(b"\xff"), None);
        assert_eq!(name(&[b'a'; 4097]), None);
    }
}
