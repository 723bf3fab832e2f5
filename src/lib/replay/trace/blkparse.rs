//! The text that blkparse prints by default, be it of one run or of several that were joined.

use memchr::memmem;

use super::blktrace::below;
use super::devices::text;
use super::lines::{Fault, Line, LineFormat, Sink};
use super::rwbs::Rwbs;
use super::scan::{digits, next_number, next_time, number, skip_blanks, word};
use crate::replay::event::{TraceIo, TraceOp};

const SECOND: u64 = 1_000_000_000;

/// `major,minor cpu sequence time pid action rwbs`, and what the action brings.
#[derive(Default)]
pub(super) struct Blkparse {
    has_remap: bool,
    /// What comes before the next event is what blkparse says of those before.
    is_summary: bool,
    /// When the run of blkparse began whose events come now, each with times of its own.
    start: u64,
    now: u64,
    is_joined: bool,
}

impl LineFormat for Blkparse {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        let mut rest = line;
        let device = device(&mut rest);
        if !is_device(device) {
            return self.about_events(line, out);
        }
        let cpu = next_number(&mut rest).ok_or("no processor after the device")?;
        let cpu = u16::try_from(cpu).map_err(|_| "a processor above 65535")?;
        next_number(&mut rest).ok_or("no sequence number")?;
        skip_blanks(&mut rest);
        let time_ns = next_time(&mut rest, SECOND).ok_or("no time")?;
        let time_ns = self.in_trace(time_ns, out).ok_or("no time")?;
        next_number(&mut rest).ok_or("no process id")?;
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

impl Blkparse {
    /// The time in the whole trace. After a summary another run may have begun, and time with it.
    fn in_trace(&mut self, time_ns: u64, out: &mut Sink) -> Option<u64> {
        if std::mem::take(&mut self.is_summary) && self.start.checked_add(time_ns)? < self.now {
            self.start = self.now;
            if !std::mem::replace(&mut self.is_joined, true) {
                out.warn(
                    "the text is of several runs of blkparse, one after the other; split it to replay them side by side",
                );
            }
        }
        let time_ns = self.start.checked_add(time_ns)?;
        self.now = self.now.max(time_ns);
        Some(time_ns)
    }

    /// blkparse says what it reads before the events, or among them, and sums up after them, by process and by processor, how many it
    /// missed among the rest; blktrace does so, too.
    fn about_events(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        self.is_summary |= is_summary(line);
        if let Some(lost) = lost(line) {
            out.notes.lost = out.notes.lost.saturating_add(lost);
        } else if !(self.is_summary || line.is_empty() || line.starts_with(b"Input file ")) {
            return Err("no line of blkparse");
        }
        Ok(Line::Other)
    }
}

/// True for the first line of a summary: `CPU0 (name):`, with -s `command (process id)`, or blktrace's `=== name ===`.
fn is_summary(line: &[u8]) -> bool {
    let in_brackets = || line.strip_suffix(b")")?.rsplit(|&b| b == b'(').next();
    matches!(line, [b'C', b'P', b'U', b'0'..=b'9', ..])
        || line.starts_with(b"Total (")
        || line.starts_with(b"=== ")
        || in_brackets().is_some_and(|id| number(id).is_some())
}

/// The events that `Skips: 2 forward (1,500 -  50.0%)` or `(dropped 1500)` say are missing.
fn lost(line: &[u8]) -> Option<u64> {
    let count = if line.starts_with(b"Skips: ") {
        line.split(|&b| b == b'(').nth(1)?
    } else {
        &line[memmem::find(line, b" events (dropped ")? + 17..]
    };
    // The language of whoever ran it may have thousands set off.
    let count = count.split(|&b| b == b'-' || b == b')').next()?;
    let digits: Vec<u8> = count.iter().copied().filter(u8::is_ascii_digit).collect();
    number(&digits)
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
    skip_blanks(&mut rest);
    if matches!(rest, [] | [b'[', ..]) {
        return Ok(Some((0, 0)));
    }
    let sector = next_number(&mut rest).ok_or("no sector")?;
    match word(&mut rest) {
        b"+" => {
            let sectors = next_number(&mut rest).ok_or("no number of sectors")?;
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
