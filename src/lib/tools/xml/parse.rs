//! Turns one segment of XML into events.
//!
//! Mapping tags as every known dump writes them are read by [`plain_mapping`], which makes a restore five times as fast; whatever it
//! does not recognise at once goes to quick-xml, so both read the same language.

use super::Pool;
use crate::error::{Error, ErrorKind, Result};
use crate::tools::event::{Device, Run};
use crate::units::{DataBlock, ThinBlock, ThinId};
use quick_xml::Reader;
use quick_xml::events::attributes::Attribute;
use quick_xml::events::{BytesStart, Event};

/// A tag that is not a mapping.
#[derive(Debug)]
pub(super) enum Tag {
    Pool(Box<Pool>),
    Device(Box<Device>),
    Define(String),
    Reference(String),
    /// A mapping or reference, told before, was not written as an empty tag: its end must follow.
    Opened(&'static str),
    End(&'static str),
}

impl Tag {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Pool(_) => "superblock",
            Self::Device(_) => "device",
            Self::Define(_) => "def",
            Self::Reference(_) => "ref",
            Self::Opened(name) | Self::End(name) => name,
        }
    }
}

/// The events of a segment.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub(super) runs: Vec<Run>,
    /// Where each run's tag begins in the segment.
    pub(super) offsets: Vec<u32>,
    /// Runs before the tag, where the tag begins, the tag.
    pub(super) tags: Vec<(usize, u32, Tag)>,
}

/// The events of a segment's text (in memory that was used before), or the offset of the tag that is wrong and why.
pub(super) fn parse(
    text: &[u8],
    mut parsed: Parsed,
) -> std::result::Result<Parsed, (usize, Error)> {
    parsed.runs.clear();
    parsed.offsets.clear();
    parsed.tags.clear();
    let mut at = 0;
    loop {
        at += text[at..]
            .iter()
            .take_while(|b| b.is_ascii_whitespace())
            .count();
        if at == text.len() {
            return Ok(parsed);
        }
        if let Some((run, length)) = plain_mapping(&text[at..]) {
            parsed.runs.push(run);
            parsed.offsets.push(at as u32);
            at += length;
            continue;
        }
        at += any_tag(&text[at..], at, &mut parsed).map_err(|e| (at, e))?;
    }
}

fn fault(attribute: &'static str, what: impl Into<String>) -> Error {
    Error::event(0, attribute, what)
}

/// Reads `prefix`, digits and a quote; the number and what follows.
fn plain_number<'a>(text: &'a [u8], prefix: &[u8]) -> Option<(u64, &'a [u8])> {
    let digits = text.strip_prefix(prefix)?;
    let mut number = 0_u64;
    for (i, &byte) in digits.iter().enumerate() {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return (byte == b'"' && i > 0).then(|| (number, &digits[i + 1..]));
        }
        number = number.checked_mul(10)?.checked_add(u64::from(digit))?;
    }
    None
}

/// A mapping tag with the usual attributes in the usual order, and its length in bytes.
fn plain_mapping(text: &[u8]) -> Option<(Run, usize)> {
    let (thin, data, length, rest) = if let Some(rest) = text.strip_prefix(b"<single_mapping ") {
        let (thin, rest) = plain_number(rest, b"origin_block=\"")?;
        let (data, rest) = plain_number(rest, b" data_block=\"")?;
        (thin, data, 1, rest)
    } else {
        let rest = text.strip_prefix(b"<range_mapping ")?;
        let (thin, rest) = plain_number(rest, b"origin_begin=\"")?;
        let (data, rest) = plain_number(rest, b" data_begin=\"")?;
        let (length, rest) = plain_number(rest, b" length=\"")?;
        (thin, data, length, rest)
    };
    let (time, rest) = plain_number(rest, b" time=\"")?;
    let rest = rest.strip_prefix(b"/>")?;
    let run = Run {
        thin_begin: ThinBlock(thin),
        data_begin: DataBlock(data),
        length,
        time: u32::try_from(time).ok()?,
    };
    Some((run, text.len() - rest.len()))
}

/// Reads whatever tag `text` begins with, and returns its length in bytes.
fn any_tag(text: &[u8], offset: usize, parsed: &mut Parsed) -> Result<usize> {
    let mut reader = Reader::from_reader(text);
    reader.config_mut().check_end_names = false;
    reader.config_mut().allow_unmatched_ends = true;
    let event = reader
        .read_event()
        .map_err(|e| fault("", format!("this is not XML: {e}")))?;
    let (tag, is_empty) = match &event {
        Event::Start(tag) => (tag, false),
        Event::Empty(tag) => (tag, true),
        Event::End(tag) => {
            let end = Tag::End(known_name(tag.name().as_ref())?);
            parsed.tags.push((parsed.runs.len(), offset as u32, end));
            return Ok(reader.buffer_position() as usize);
        }
        _ => {
            let shown = String::from_utf8_lossy(&text[..text.len().min(40)]).into_owned();
            return Err(fault(
                "",
                format!("text where a tag is expected: {shown:?}"),
            ));
        }
    };
    let name = known_name(tag.name().as_ref())?;
    let mut attributes = Attributes::of(tag, name)?;
    let mut push = |tag| parsed.tags.push((parsed.runs.len(), offset as u32, tag));
    match name {
        "superblock" => push(Tag::Pool(Box::new(attributes.pool()?))),
        "device" => push(Tag::Device(Box::new(attributes.device()?))),
        "def" => push(Tag::Define(attributes.text("name")?)),
        "ref" => push(Tag::Reference(attributes.text("name")?)),
        _ => {
            parsed.runs.push(attributes.run()?);
            parsed.offsets.push(offset as u32);
        }
    }
    attributes.none_left()?;
    let holds_tags = matches!(name, "superblock" | "device" | "def");
    let follows = match (is_empty, holds_tags) {
        (true, true) => Some(Tag::End(name)),
        (false, false) => Some(Tag::Opened(name)),
        _ => None,
    };
    if let Some(tag) = follows {
        parsed.tags.push((parsed.runs.len(), offset as u32, tag));
    }
    Ok(reader.buffer_position() as usize)
}

fn known_name(name: &str) -> Result<&'static str> {
    [
        "superblock",
        "device",
        "def",
        "ref",
        "single_mapping",
        "range_mapping",
    ]
    .into_iter()
    .find(|&known| known == name)
    .ok_or_else(|| fault("", format!("unknown tag <{name}>")))
}

/// The attributes of a tag, taken one by one.
struct Attributes {
    tag: &'static str,
    left: Vec<(String, String)>,
}

impl Attributes {
    fn of(tag: &BytesStart<'_>, name: &'static str) -> Result<Self> {
        let mut left = Vec::new();
        for attribute in tag.attributes() {
            let Attribute { key, value } =
                attribute.map_err(|e| fault("", format!("bad attributes of <{name}>: {e}")))?;
            let key = key.as_ref().to_owned();
            let text = quick_xml::escape::unescape(&value)
                .map_err(|e| fault("", format!("attribute {key} of <{name}>: {e}")))?
                .into_owned();
            left.push((key, text));
        }
        Ok(Self { tag: name, left })
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.left.iter().position(|(key, _)| key == name)?;
        Some(self.left.swap_remove(at).1)
    }

    fn text(&mut self, name: &'static str) -> Result<String> {
        self.take(name)
            .ok_or_else(|| fault(name, format!("it is missing from <{}>", self.tag)))
    }

    fn number<N: TryFrom<u64>>(&mut self, name: &'static str) -> Result<N> {
        let text = self.text(name)?;
        let bits = size_of::<N>() * 8;
        // Rust's parser would take a leading plus sign; no dump has one.
        let number = text
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse::<u64>().ok());
        number
            .flatten()
            .and_then(|n| N::try_from(n).ok())
            .ok_or_else(|| {
                fault(
                    name,
                    format!("{text:?} is not a number of at most {bits} bits"),
                )
            })
    }

    fn pool(&mut self) -> Result<Pool> {
        let optional = |attributes: &mut Self, name: &'static str, default: u64| match attributes
            .left
            .iter()
            .any(|(key, _)| key == name)
        {
            true => attributes.number(name),
            false => Ok(default),
        };
        // Neither is taken over: restored metadata is consistent, and has no metadata snapshot.
        optional(self, "metadata_snap", 0)?;
        let flags = optional(self, "flags", 0)?;
        let version = optional(self, "version", 2)?;
        let narrow = |name, value| {
            u32::try_from(value)
                .map_err(|_| fault(name, format!("{value} is not a number of at most 32 bits")))
        };
        Ok(Pool {
            uuid: self.text("uuid")?,
            time: self.number("time")?,
            transaction: self.number("transaction")?,
            flags: narrow("flags", flags)?,
            version: narrow("version", version)?,
            data_block_size: self.number("data_block_size")?,
            nr_data_blocks: self.number("nr_data_blocks")?,
        })
    }

    fn device(&mut self) -> Result<Device> {
        Ok(Device {
            dev_id: ThinId(self.number("dev_id")?),
            mapped_blocks: self.number("mapped_blocks")?,
            transaction: self.number("transaction")?,
            creation_time: self.number("creation_time")?,
            snap_time: self.number("snap_time")?,
        })
    }

    fn run(&mut self) -> Result<Run> {
        let is_single = self.tag == "single_mapping";
        let (thin, data) = if is_single {
            ("origin_block", "data_block")
        } else {
            ("origin_begin", "data_begin")
        };
        Ok(Run {
            thin_begin: ThinBlock(self.number(thin)?),
            data_begin: DataBlock(self.number(data)?),
            length: if is_single { 1 } else { self.number("length")? },
            time: self.number("time")?,
        })
    }

    fn none_left(&self) -> Result<()> {
        match self.left.first() {
            None => Ok(()),
            Some((name, _)) => Err(Error::event(
                0,
                "",
                format!("unknown attribute {name:?} of <{}>", self.tag),
            )
            .with_kind(ErrorKind::InvalidDescription)),
        }
    }
}
