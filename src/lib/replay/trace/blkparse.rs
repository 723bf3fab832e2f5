//! The text that blkparse prints by default.

use super::blktrace::below;
use super::devices::text;
use super::lines::{Fault, Line, LineFormat, Sink};
use super::rwbs::Rwbs;
use super::scan::{digits, number, time, word};
use crate::replay::event::{TraceIo, TraceOp};

const SECOND: u64 = 1_000_000_000;

/// `major,minor cpu sequence time pid action rwbs`, and what the action brings.
#[derive(Default)]
pub(super) struct Blkparse {
    has_remap: bool,
}

impl LineFormat for Blkparse {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        let mut rest = line;
        let device = device(&mut rest);
        if device.is_empty() {
            return preamble_or_trailer(line);
        }
        if !is_device(device) {
            return Err("no line of blkparse");
        }
        let cpu = number(word(&mut rest)).ok_or("no processor after the device")?;
        let cpu = u16::try_from(cpu).map_err(|_| "a processor above 65535")?;
        number(word(&mut rest)).ok_or("no sequence number")?;
        let time_ns = time(word(&mut rest), SECOND).ok_or("no time")?;
        number(word(&mut rest)).ok_or("no process id")?;
        let action = word(&mut rest);
        let letters = word(&mut rest);
        match action {
            b"Q" => {}
            b"m" => return Ok(out.message(time_ns, rest)),
            b"A" if !self.has_remap => {
                self.has_remap = true;
                out.warn(remap_warning(device, rest));
                return Ok(Line::Other);
            }
            [b'A'..=b'Z'] | [b'U', b'T'] => return Ok(Line::Other),
            _ => return Err("no action"),
        }
        let rwbs = Rwbs::parse(letters).ok_or("no letters that say what was asked for")?;
        let Some((sector, sectors)) = range(rest)? else {
            return Ok(Line::Other);
        };
        let Some(op) = rwbs.op(sectors) else {
            return Ok(Line::Other);
        };
        let device = out.devices.numbered(device)?;
        out.io(TraceIo {
            time_ns,
            sector: if op == TraceOp::Flush { 0 } else { sector },
            sectors,
            device,
            cpu,
            op,
            is_preflush: rwbs.is_preflush,
            is_fua: rwbs.is_fua,
        })
    }
}

/// The word with the device; a minor of fewer than three digits has spaces after it, a major of fewer before it.
fn device<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let is_digit = rest
        .trim_ascii_start()
        .first()
        .is_some_and(u8::is_ascii_digit);
    if is_digit { word(rest) } else { &[] }
}

/// True for `252,3`.
pub(super) fn is_device(device: &[u8]) -> bool {
    let Some((_, len)) = digits(device) else {
        return false;
    };
    device[len..]
        .strip_prefix(b",")
        .is_some_and(|minor| number(minor).is_some())
}

/// The sectors of `sector + count [command]`; none of a line that has none, which an empty flush has not, nor a passed-through command.
pub(super) fn range(mut rest: &[u8]) -> Result<Option<(u64, u64)>, Fault> {
    let sector = word(&mut rest);
    if sector.is_empty() || sector.starts_with(b"[") {
        return Ok(Some((0, 0)));
    }
    let sector = number(sector).ok_or("no sector")?;
    match word(&mut rest) {
        b"+" => {
            let sectors = number(word(&mut rest)).ok_or("no number of sectors")?;
            Ok(Some((sector, sectors)))
        }
        next if next.starts_with(b"(") || next.starts_with(b"[") => Ok(None),
        _ => Err("no number of sectors"),
    }
}

/// What to say about `sector + count <- (major,minor) sector`.
pub(super) fn remap_warning(device: &[u8], rest: &[u8]) -> String {
    let name = |device: &[u8]| text(device).replace(',', ":");
    let from = rest.split(|&b| b == b'(').nth(1).unwrap_or_default();
    let from = from.split(|&b| b == b')').next().unwrap_or_default();
    below(&name(device), &name(from))
}

/// blkparse says what it reads before the events, or among them, and sums up by processor after them.
fn preamble_or_trailer(line: &[u8]) -> Result<Line, Fault> {
    match line {
        [b'C', b'P', b'U', b'0'..=b'9', ..] | [b'T', b'o', b't', b'a', b'l', b' ', ..] => {
            Ok(Line::End)
        }
        [
            b'I',
            b'n',
            b'p',
            b'u',
            b't',
            b' ',
            b'f',
            b'i',
            b'l',
            b'e',
            ..,
        ]
        | [] => Ok(Line::Other),
        _ => Err("no line of blkparse"),
    }
}
