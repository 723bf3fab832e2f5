//! Logs of dm-log-writes: everything that was written, in order, without times.

use super::input::Input;
use super::lines::{Fault, Line, Sink, flush, plain};
use super::records::{RecordFormat, bad};
use crate::bytes::{get_u32, get_u64};
use crate::error::Result;
use crate::replay::event::{TraceIo, TraceOp};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const SUPER: usize = 28;
/// Bytes of an entry before a mark's text.
const ENTRY: usize = 32;
/// Flags of an entry.
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// True if `head` begins with the superblock of a log.
pub(super) fn is_log(head: &[u8]) -> bool {
    head.len() >= SUPER && get_u64(head, 0) == MAGIC && get_u64(head, 8) == 1
}

/// A log. The time of an entry is its number: 1 ns for each.
#[derive(Default)]
pub(super) struct LogWrites {
    /// Bytes of a sector; each entry has one.
    sector: usize,
    entries: u64,
    number: u64,
}

impl RecordFormat for LogWrites {
    fn head(&mut self, input: &mut Input, sink: &mut Sink) -> Result<bool> {
        if !input.want(SUPER)? || !is_log(input.data()) {
            return Err(bad(input, "no superblock of dm-log-writes"));
        }
        let data = input.data();
        let (entries, sector) = (get_u64(data, 16), get_u32(data, 24) as usize);
        if !sector.is_power_of_two() || !(512..=64 << 10).contains(&sector) {
            return Err(bad(input, "its sectors are not of 512 to 65536 bytes"));
        }
        (self.entries, self.sector) = (entries, sector);
        sink.notes.has_no_times = true;
        input.skip(sector as u64)
    }

    fn least(&self) -> usize {
        self.sector
    }

    fn behind(&self, entry: &[u8]) -> u64 {
        match get_u64(entry, 16) & (DISCARD | MARK) {
            0 => get_u64(entry, 8).saturating_mul(self.sector as u64),
            _ => 0,
        }
    }

    fn take(&mut self, entry: &[u8], sink: &mut Sink) -> std::result::Result<Line, Fault> {
        let time_ns = self.number;
        self.number += 1;
        let [sector, sectors, flags, text_len] = [0, 8, 16, 24].map(|at| get_u64(entry, at));
        if flags & MARK != 0 {
            let text = usize::try_from(text_len)
                .ok()
                .and_then(|len| entry.get(ENTRY..)?.get(..len));
            let text = text.ok_or("the text of the mark is longer than its sector")?;
            return Ok(sink.message(time_ns, text));
        }
        let in_sectors = |n: u64| n.checked_mul(self.sector as u64 / 512);
        let (sector, sectors) = in_sectors(sector)
            .zip(in_sectors(sectors))
            .ok_or("it ends beyond what a device can have")?;
        let device = sink.devices.named(b"0")?;
        sink.io(request(flags, time_ns, device, sector, sectors))
    }

    fn is_over(&self) -> Option<bool> {
        Some(self.number == self.entries)
    }
}

fn request(flags: u64, time_ns: u64, device: u32, sector: u64, sectors: u64) -> TraceIo {
    let io = match flags {
        _ if flags & DISCARD != 0 => plain(time_ns, device, TraceOp::Discard, sector, sectors),
        _ if sectors == 0 && flags & FLUSH != 0 => flush(time_ns, device),
        _ => plain(time_ns, device, TraceOp::Write, sector, sectors),
    };
    TraceIo {
        is_preflush: flags & FLUSH != 0,
        is_fua: flags & FUA != 0,
        ..io
    }
}
