//! What a connection begins with: options, until one of them opens an export.

use super::stream::Timed;
use super::tls::Tls;
use super::wire::{
    MOST_OPTION, OPTION_MAGIC, OPTION_REPLY_MAGIC, Style, answer, info, info_query, meta_query,
    name, option,
};
use crate::runtime::export::{Export, Exports, MOST_PAYLOAD};
use std::cell::LazyCell;
use std::io::{self, Read, Write};
use std::sync::Arc;

/// Contexts that a client may have.
const MOST_CONTEXTS: usize = 64;
/// Options of one client, and exports of one list: nobody negotiates for ever.
const MOST_OPTIONS: usize = 1024;

/// What a server offers to one client.
pub(super) struct Terms<'a> {
    pub(super) exports: &'a dyn Exports,
    /// Tells whether there is a place for one that opens an export.
    pub(super) admit: &'a dyn Fn() -> bool,
    pub(super) tls: Option<&'a Tls>,
    /// Nothing is said before it is encrypted.
    pub(super) needs_tls: bool,
}

/// What was agreed.
pub(super) struct Session {
    pub(super) export: Arc<dyn Export>,
    pub(super) style: Style,
    /// Their ids are their places, counted from one.
    pub(super) contexts: Vec<String>,
}

/// Agrees with a client; none if it wants no export.
///
/// # Errors
/// Of the stream, and `InvalidData` for what no client may say.
pub(super) fn negotiate(stream: &mut Timed<'_>, terms: &Terms<'_>) -> io::Result<Option<Session>> {
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
    let client_flags = u32::from_be_bytes(number(stream)?);
    if client_flags & 1 == 0 || client_flags & !3 != 0 {
        return Err(bad("the client is not of the fixed newstyle"));
    }
    let mut client = Client {
        stream,
        terms,
        is_encrypted: false,
        option: 0,
        wants_zeroes: client_flags & 2 == 0,
        style: Style::Simple,
        contexts: None,
    };
    for _ in 0..MOST_OPTIONS {
        match client.next_option()? {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::Open(export, contexts) => {
                return Ok(Some(Session {
                    export,
                    style: client.style,
                    contexts,
                }));
            }
        }
    }
    Err(bad("too many options"))
}

enum Next {
    Option,
    End,
    Open(Arc<dyn Export>, Vec<String>),
}

struct Client<'a, 'b> {
    stream: &'a mut Timed<'b>,
    terms: &'a Terms<'a>,
    is_encrypted: bool,
    /// The one that is answered.
    option: u32,
    wants_zeroes: bool,
    style: Style,
    /// What was chosen, for the export of this name.
    contexts: Option<(String, Vec<String>)>,
}

impl Client<'_, '_> {
    fn next_option(&mut self) -> io::Result<Next> {
        if u64::from_be_bytes(number(self.stream)?) != OPTION_MAGIC {
            return Err(bad("no option"));
        }
        self.option = u32::from_be_bytes(number(self.stream)?);
        let len = u32::from_be_bytes(number(self.stream)?);
        if len > MOST_OPTION {
            if self.option == option::EXPORT_NAME || len > MOST_PAYLOAD {
                return Err(bad("an option that is too long"));
            }
            io::copy(&mut (&mut *self.stream).take(len.into()), &mut io::sink())?;
            self.reply(answer::TOO_BIG, b"options have up to 65536 bytes of data")?;
            return Ok(Next::Option);
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        let is_early = self.terms.needs_tls && !self.is_encrypted;
        match self.option {
            option::EXPORT_NAME if is_early => return Err(bad("no TLS, which has to be")),
            option::ABORT | option::STARTTLS => {}
            _ if is_early => {
                self.reply(answer::TLS_REQD, b"this server wants STARTTLS first")?;
                return Ok(Next::Option);
            }
            _ => {}
        }
        match self.option {
            option::EXPORT_NAME => return self.export_name(&data),
            option::INFO | option::GO => return self.info(&data),
            option::ABORT => {
                // Whoever has hung up already needs no answer.
                let _ = self.reply(answer::ACK, &[]);
                return Ok(Next::End);
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(&data)?,
            option::LIST
            | option::STRUCTURED_REPLY
            | option::EXTENDED_HEADERS
            | option::STARTTLS
                if !data.is_empty() =>
            {
                self.reply(answer::INVALID, b"this option has no data")?;
            }
            option::LIST => {
                for (name, description) in self.terms.exports.list() {
                    let mut data = (name.len() as u32).to_be_bytes().to_vec();
                    data.extend(name.as_bytes());
                    data.extend(description.as_bytes());
                    self.reply(answer::SERVER, &data)?;
                }
                self.reply(answer::ACK, &[])?;
            }
            option::STARTTLS => self.start_tls()?,
            option::STRUCTURED_REPLY if self.style == Style::Extended => {
                self.reply(answer::EXT_HEADER_REQD, b"extended headers are in use")?;
            }
            option::STRUCTURED_REPLY => self.agree(Style::Structured)?,
            option::EXTENDED_HEADERS => self.agree(Style::Extended)?,
            _ => self.reply(answer::UNSUP, &[])?,
        }
        Ok(Next::Option)
    }

    /// What was agreed before is forgotten: whoever listened in may have said it.
    fn start_tls(&mut self) -> io::Result<()> {
        match self.terms.tls {
            None => self.reply(answer::POLICY, b"this server has no TLS"),
            Some(_) if self.is_encrypted => self.reply(answer::INVALID, b"TLS is in use"),
            Some(tls) => {
                self.reply(answer::ACK, &[])?;
                self.stream.start_tls(tls)?;
                self.is_encrypted = true;
                (self.style, self.contexts) = (Style::Simple, None);
                Ok(())
            }
        }
    }

    /// Contexts are chosen in a style; another one begins without.
    fn agree(&mut self, style: Style) -> io::Result<()> {
        if self.style != style {
            (self.style, self.contexts) = (style, None);
        }
        self.reply(answer::ACK, &[])
    }

    fn reply(&mut self, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut out = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        out.extend(self.option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        self.stream.write_all(&out)
    }

    fn export_name(&mut self, data: &[u8]) -> io::Result<Next> {
        let name = name(data).ok_or_else(|| bad("no name of an export"))?;
        // This option has no answer for what goes wrong.
        let export = self.terms.exports.find(name);
        let export = export.ok_or_else(|| bad("no such export"))?;
        if !(self.terms.admit)() {
            return Err(bad("no place for one more client"));
        }
        let mut out = export.size().to_be_bytes().to_vec();
        out.extend(flags(&*export, self.style).to_be_bytes());
        if self.wants_zeroes {
            out.extend([0; 124]);
        }
        self.stream.write_all(&out)?;
        Ok(self.open(export, name))
    }

    fn open(&mut self, export: Arc<dyn Export>, name: &str) -> Next {
        let chosen = self.contexts.take().filter(|(of, _)| of == name);
        Next::Open(export, chosen.map_or_else(Vec::new, |(_, chosen)| chosen))
    }

    fn info(&mut self, data: &[u8]) -> io::Result<Next> {
        let Some((name, kinds)) = info_query(data) else {
            self.reply(answer::INVALID, b"the request is malformed")?;
            return Ok(Next::Option);
        };
        let Some(export) = self.terms.exports.find(name) else {
            self.reply(answer::UNKNOWN, b"there is no export of this name")?;
            return Ok(Next::Option);
        };
        if self.option == option::GO && !(self.terms.admit)() {
            self.reply(
                answer::POLICY,
                b"the server has as many clients as it takes",
            )?;
            return Ok(Next::Option);
        }
        let mut data = info::EXPORT.to_be_bytes().to_vec();
        data.extend(export.size().to_be_bytes());
        data.extend(flags(&*export, self.style).to_be_bytes());
        self.reply(answer::INFO, &data)?;
        let mut data = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, export.preferred_block(), MOST_PAYLOAD] {
            data.extend(size.to_be_bytes());
        }
        self.reply(answer::INFO, &data)?;
        if kinds.contains(&info::NAME) {
            let data = [&info::NAME.to_be_bytes(), name.as_bytes()].concat();
            self.reply(answer::INFO, &data)?;
        }
        if kinds.contains(&info::DESCRIPTION) {
            let list = self.terms.exports.list();
            if let Some((_, text)) = list.iter().find(|(listed, _)| listed == name) {
                let data = [&info::DESCRIPTION.to_be_bytes(), text.as_bytes()].concat();
                self.reply(answer::INFO, &data)?;
            }
        }
        self.reply(answer::ACK, &[])?;
        Ok(match self.option {
            option::GO => self.open(export, name),
            _ => Next::Option,
        })
    }

    fn meta_context(&mut self, data: &[u8]) -> io::Result<()> {
        let is_set = self.option == option::SET_META_CONTEXT;
        if is_set {
            self.contexts = None;
        }
        if self.style == Style::Simple {
            return self.reply(answer::INVALID, b"structured replies come first");
        }
        let Some(query) = meta_query(data) else {
            return self.reply(answer::INVALID, b"the request is malformed");
        };
        let Some(export) = self.terms.exports.find(query.export) else {
            return self.reply(answer::UNKNOWN, b"there is no export of this name");
        };
        let chosen = match is_set {
            true => chosen(&*export, &query.queries),
            false => listed(&*export, &query.queries),
        };
        for (place, context) in chosen.iter().enumerate() {
            let id = if is_set { place as u32 + 1 } else { 0 };
            let data = [&id.to_be_bytes(), context.as_bytes()].concat();
            self.reply(answer::META_CONTEXT, &data)?;
        }
        if is_set {
            self.contexts = Some((query.export.to_owned(), chosen));
        }
        self.reply(answer::ACK, &[])
    }
}

/// The contexts of an export that are asked for by name. Those that it always has are not looked for.
fn chosen(export: &dyn Export, queries: &[&str]) -> Vec<String> {
    let all = LazyCell::new(|| export.contexts());
    let mut chosen: Vec<String> = Vec::new();
    for &asked in queries {
        let is_new = chosen.len() < MOST_CONTEXTS && chosen.iter().all(|old| old != asked);
        if is_new && (export.always_has(asked) || all.iter().any(|known| known == asked)) {
            chosen.push(asked.to_owned());
        }
    }
    chosen
}

/// The contexts of an export that match: all, or by name, or by a wildcard: a namespace, or the first part of what has several.
fn listed(export: &dyn Export, queries: &[&str]) -> Vec<String> {
    let is_asked = |context: &String| {
        let is_it =
            |asked: &&str| *asked == context || asked.ends_with(':') && context.starts_with(asked);
        queries.is_empty() || queries.iter().any(is_it)
    };
    let all = export.contexts().into_iter();
    all.filter(is_asked).take(MOST_CONTEXTS).collect()
}

/// What transmission can do with an export.
fn flags(export: &dyn Export, style: Style) -> u16 {
    const HAS_FLAGS: u16 = 1;
    const READ_ONLY: u16 = 2;
    const FLUSH: u16 = 4;
    const FUA: u16 = 8;
    const TRIM: u16 = 32;
    const WRITE_ZEROES: u16 = 64;
    const DF: u16 = 128;
    const MULTI_CONN: u16 = 256;
    const CACHE: u16 = 1024;
    const FAST_ZERO: u16 = 2048;
    let mut flags = HAS_FLAGS | FLUSH | FUA | TRIM | WRITE_ZEROES | CACHE | FAST_ZERO;
    if export.is_read_only() {
        flags |= READ_ONLY;
    }
    if style != Style::Simple {
        flags |= DF;
    }
    if export.is_multi_conn() {
        flags |= MULTI_CONN;
    }
    flags
}

fn number<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(super) fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
