//! The kernel's block events as text: tracefs, trace-cmd and perf script.

use memchr::memmem;

use super::blkparse::{is_device, range, remap_warning};
use super::lines::{Fault, Line, LineFormat, Sink};
use super::rwbs::Rwbs;
use super::scan::{digits, number, time, word};
use crate::replay::event::{TraceIo, TraceOp};

const QUEUE: &[u8] = b"block_bio_queue:";
const REMAP: &[u8] = b"block_bio_remap:";
const MARK: &[u8] = b"tracing_mark_write:";

/// `task-pid [cpu] flags seconds: event: …`
#[derive(Default)]
pub(super) struct Ftrace {
    has_remap: bool,
}

impl LineFormat for Ftrace {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        if let Some((before, after)) = split(line, QUEUE) {
            return queue(before, after, out);
        }
        if let Some((before, message)) = split(line, MARK) {
            return Ok(out.message(when(before)?, message));
        }
        if let Some((_, lost)) = split(line, b" [LOST ") {
            let lost = digits(lost).map_or(0, |(lost, _)| lost);
            out.notes.lost = out.notes.lost.saturating_add(lost);
        } else if !self.has_remap
            && let Some((_, mut after)) = split(line, REMAP)
        {
            self.has_remap = true;
            let device = word(&mut after);
            out.warn(remap_warning(device, after));
        }
        Ok(Line::Other)
    }
}

fn queue(before: &[u8], mut after: &[u8], out: &mut Sink) -> Result<Line, Fault> {
    let time_ns = when(before)?;
    let device = word(&mut after);
    if !is_device(device) {
        return Err("no device");
    }
    let rwbs = Rwbs::parse(word(&mut after)).ok_or("no letters that say what was asked for")?;
    let (sector, sectors) = range(after)?.ok_or("no number of sectors")?;
    let Some(op) = rwbs.op(sectors) else {
        return Ok(Line::Other);
    };
    let device = out.devices.numbered(device)?;
    out.io(TraceIo {
        time_ns,
        sector: if op == TraceOp::Flush { 0 } else { sector },
        sectors,
        device,
        cpu: cpu(before).ok_or("no processor")?,
        op,
        is_preflush: rwbs.is_preflush,
        is_fua: rwbs.is_fua,
    })
}

fn split<'a>(line: &'a [u8], at: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let found = memmem::find(line, at)?;
    Some((&line[..found], &line[found + at.len()..]))
}

/// The time, which is last before the event; perf puts the event's class between.
fn when(before: &[u8]) -> Result<u64, Fault> {
    let before = before.strip_suffix(b"block:").unwrap_or(before);
    let seconds = before
        .trim_ascii_end()
        .strip_suffix(b":")
        .unwrap_or_default();
    let seconds = seconds.rsplit(u8::is_ascii_whitespace).next();
    time(seconds.unwrap_or_default(), 1_000_000_000).ok_or("no time before the event")
}

/// The last number in brackets; the task's name may have some too.
fn cpu(before: &[u8]) -> Option<u16> {
    let last = before.rsplit(|&b| b == b'[').next()?;
    let number = number(last.split(|&b| b == b']').next()?)?;
    number.try_into().ok()
}
