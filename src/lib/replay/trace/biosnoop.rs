//! What biosnoop prints, of bcc and libbpf-tools, whose columns differ by version.

use super::lines::{Fault, Line, LineFormat, Sink, flush, plain, sectors};
use super::rwbs::Rwbs;
use super::scan;
use crate::replay::event::{TraceIo, TraceOp};

/// A heading, and requests when they were complete.
#[derive(Default)]
pub(super) struct Biosnoop {
    columns: Option<Columns>,
}

/// Columns by their distance from the end: the command at the beginning may have spaces, and the disk may be missing.
#[derive(Clone, Copy)]
struct Columns {
    rwbs: usize,
    sector: usize,
    bytes: usize,
    latency: usize,
}

impl LineFormat for Biosnoop {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        let words = line
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty());
        let words: Vec<&[u8]> = words.collect();
        if words.is_empty() {
            return Ok(Line::Other);
        }
        if words[0].starts_with(b"TIME") {
            self.columns =
                Some(Columns::of(&words).ok_or("no heading with T, SECTOR, BYTES and LAT(ms)")?);
            return Ok(Line::Other);
        }
        let columns = self.columns.ok_or("no heading of biosnoop before it")?;
        event(columns, &words, out)
    }
}

impl Columns {
    fn of(heading: &[&[u8]]) -> Option<Self> {
        let from_end =
            |name: &[u8]| Some(heading.len() - heading.iter().position(|word| *word == name)?);
        Some(Self {
            rwbs: from_end(b"T")?,
            sector: from_end(b"SECTOR")?,
            bytes: from_end(b"BYTES")?,
            latency: from_end(b"LAT(ms)")?,
        })
    }
}

fn event(columns: Columns, words: &[&[u8]], out: &mut Sink) -> Result<Line, Fault> {
    let at = |from_end: usize| {
        words
            .len()
            .checked_sub(from_end)
            .and_then(|at| words.get(at).copied())
    };
    let column = |from_end: usize| at(from_end).ok_or("too few columns");
    let complete = scan::time(words[0], 1_000_000_000).ok_or("no time")?;
    let latency = scan::time(column(columns.latency)?, 1_000_000).ok_or("no latency")?;
    let time_ns = complete.saturating_sub(latency);
    let bytes = scan::number(column(columns.bytes)?).ok_or("no number of bytes")?;
    let rwbs =
        Rwbs::parse(column(columns.rwbs)?).ok_or("no letters that say what was asked for")?;
    let disk = column(columns.rwbs + 1)?;
    // A process id there means that the disk is not known.
    let disk = if scan::number(disk).is_some() {
        b"?"
    } else {
        disk
    };
    let device = out.devices.named(disk)?;
    if bytes == 0 {
        let is_flush = rwbs.is_preflush || rwbs.op == Some(TraceOp::Write);
        return if is_flush {
            out.io(flush(time_ns, device))
        } else {
            Ok(Line::Other)
        };
    }
    let sector = scan::number(column(columns.sector)?).ok_or("no sector")?;
    let (_, sectors) = sectors(0, bytes)?;
    let Some(op) = rwbs.op(sectors) else {
        return Ok(Line::Other);
    };
    out.io(TraceIo {
        is_preflush: rwbs.is_preflush,
        is_fua: rwbs.is_fua,
        ..plain(time_ns, device, op, sector, sectors)
    })
}
