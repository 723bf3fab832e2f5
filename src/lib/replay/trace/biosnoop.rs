//! What biosnoop prints, of bcc and libbpf-tools, whose columns and units differ by version and options.

use super::lines::{Fault, Line, LineFormat, Sink, flush, plain, sectors};
use super::rwbs::Rwbs;
use super::scan;
use crate::replay::event::{TraceIo, TraceOp};

/// A heading, and requests when they were complete.
#[derive(Default)]
pub(super) struct Biosnoop {
    columns: Option<Columns>,
}

/// Columns by their distance from the end: the command may have spaces, and the disk, if it follows that, may be missing.
#[derive(Clone, Copy)]
struct Columns {
    rwbs: usize,
    sector: usize,
    bytes: usize,
    /// With nanoseconds of one unit.
    latency: (usize, u64),
    queued: Option<(usize, u64)>,
    /// Nanoseconds of one unit of the time, which comes first.
    time: u64,
    /// The disk by its distance from the beginning, if it comes before the command.
    disk: Option<usize>,
}

/// True if a heading comes among the first lines, of columns that suffice or not.
pub(super) fn has_heading(lines: &[&[u8]]) -> bool {
    lines.iter().any(|&(mut line)| {
        let has_latency = line.windows(4).any(|name| name == b"LAT(");
        has_latency && scan::word(&mut line).starts_with(b"TIME(")
    })
}

impl LineFormat for Biosnoop {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        let words = line
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty());
        let words: Vec<&[u8]> = words.collect();
        match *words.as_slice() {
            [] | [b"Tracing" | b"Attaching" | b"Attached", ..] => Ok(Line::Other),
            [b"Possibly", b"lost", lost, ..] | [b"lost" | b"Lost", lost, ..] => {
                let lost = scan::number(lost).ok_or("no number of lost events")?;
                out.notes.lost = out.notes.lost.saturating_add(lost);
                Ok(Line::Other)
            }
            [first, ..] if first.starts_with(b"TIME") => {
                self.columns = Some(Columns::of(&words)?);
                Ok(Line::Other)
            }
            _ => {
                let columns = self.columns.ok_or("no heading of biosnoop before it")?;
                event(columns, &words, out)
            }
        }
    }
}

impl Columns {
    fn of(heading: &[&[u8]]) -> Result<Self, Fault> {
        let at = |name: &[u8]| heading.iter().position(|word| *word == name);
        let from_end = |name| Some(heading.len() - at(name)?);
        let timed = |name: &[u8]| {
            let units = |word: &&[u8]| unit(word.strip_prefix(name)?);
            let at = heading.iter().position(|word| units(word).is_some())?;
            Some((heading.len() - at, units(&heading[at])?))
        };
        let wanted = from_end(b"T")
            .zip(from_end(b"SECTOR"))
            .zip(from_end(b"BYTES"));
        let ((rwbs, sector), bytes) = wanted.ok_or(
            "the heading has no T, SECTOR and BYTES, as that of bpftrace's biosnoop.bt has not, so that there is nothing to replay; \
             record it with bcc's biosnoop",
        )?;
        Ok(Self {
            rwbs,
            sector,
            bytes,
            latency: timed(b"LAT").ok_or("the heading has no LAT in s, ms, us or ns")?,
            queued: timed(b"QUE"),
            time: unit(&heading[0][4..]).ok_or("the heading has no TIME in s, ms, us or ns")?,
            disk: at(b"DISK").filter(|disk| at(b"COMM").is_some_and(|command| *disk < command)),
        })
    }
}

/// Nanoseconds of the unit that a heading has in brackets.
fn unit(name: &[u8]) -> Option<u64> {
    match name {
        b"(s)" => Some(1_000_000_000),
        b"(ms)" => Some(1_000_000),
        b"(us)" => Some(1000),
        b"(ns)" => Some(1),
        _ => None,
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
    let duration = |(from_end, unit)| Ok(scan::time(column(from_end)?, unit));
    let complete = scan::time(words[0], columns.time).ok_or("no time")?;
    let latency = duration(columns.latency)?.ok_or("no latency")?;
    // It is -1 if nobody saw the request queued.
    let queued = columns.queued.map_or(Ok(None), duration)?.unwrap_or(0);
    let time_ns = complete.saturating_sub(latency).saturating_sub(queued);
    let bytes = scan::number(column(columns.bytes)?).ok_or("no number of bytes")?;
    let rwbs =
        Rwbs::parse(column(columns.rwbs)?).ok_or("no letters that say what was asked for")?;
    let disk = match columns.disk {
        Some(at) => words.get(at).ok_or("too few columns")?,
        None => column(columns.rwbs + 1)?,
    };
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
