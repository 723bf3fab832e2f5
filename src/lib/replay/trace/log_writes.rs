//! Logs of dm-log-writes: everything that was written, in order, without times.

use super::input::Input;
use super::lines::{Sink, flush, plain};
use crate::bytes::{get_u32, get_u64};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{Batch, TraceIo, TraceNotes, TraceOp, TraceReader};

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
pub(super) struct LogWrites {
    input: Input,
    sector: usize,
    left: u64,
    number: u64,
    sink: Sink,
}

impl LogWrites {
    pub(super) fn new(input: Input) -> Self {
        Self {
            input,
            sector: 0,
            left: 0,
            number: 0,
            sink: Sink::new(),
        }
    }

    fn superblock(&mut self) -> Result<()> {
        if !self.input.want(SUPER)? || !is_log(self.input.data()) {
            return Err(self.bad("no superblock of dm-log-writes"));
        }
        let data = self.input.data();
        let (entries, sector) = (get_u64(data, 16), get_u32(data, 24) as usize);
        if !sector.is_power_of_two() || !(512..=64 << 10).contains(&sector) {
            return Err(self.bad("its sectors are not of 512 to 65536 bytes"));
        }
        (self.left, self.sector) = (entries, sector);
        self.skip(sector as u64)
    }

    fn fill_batch(&mut self) -> Result<()> {
        if self.sector == 0 {
            self.superblock()?;
        }
        while self.left > 0 && !self.sink.is_full() {
            if !self.input.want(self.sector)? {
                self.cut();
                break;
            }
            self.entry()?;
        }
        Ok(())
    }

    fn entry(&mut self) -> Result<()> {
        let entry = &self.input.data()[..self.sector];
        let [sector, sectors, flags, text_len] = [0, 8, 16, 24].map(|at| get_u64(entry, at));
        let time_ns = self.number;
        let in_sectors = |n: u64| n.checked_mul(self.sector as u64 / 512);
        let (Some(sector), Some(count)) = (in_sectors(sector), in_sectors(sectors)) else {
            return Err(self.bad("it ends beyond what a device can have"));
        };
        let taken = if flags & MARK != 0 {
            let text = usize::try_from(text_len)
                .ok()
                .and_then(|len| entry.get(ENTRY..)?.get(..len));
            match text {
                Some(text) => Ok(self.sink.message(time_ns, text)),
                None => Err("the text of the mark is longer than its sector"),
            }
        } else {
            let device = self.sink.devices.named(b"0");
            device.and_then(|device| self.sink.io(request(flags, time_ns, device, sector, count)))
        };
        match taken {
            Ok(line) => self.sink.notes.skipped += u64::from(line == super::lines::Line::Other),
            Err(fault) => return Err(self.bad(fault)),
        }
        (self.left, self.number) = (self.left - 1, self.number + 1);
        let data = if flags & (DISCARD | MARK) == 0 {
            count
        } else {
            0
        };
        let len = data
            .checked_mul(512)
            .and_then(|len| len.checked_add(self.sector as u64));
        match len {
            Some(len) => self.skip(len),
            None => Err(self.bad("it ends beyond what a device can have")),
        }
    }

    fn skip(&mut self, len: u64) -> Result<()> {
        if !self.input.skip(len)? {
            self.cut();
        }
        Ok(())
    }

    fn cut(&mut self) {
        self.left = 0;
        self.sink.notes.is_truncated = true;
    }

    fn bad(&self, fault: &str) -> Error {
        let (name, at, number) = (self.input.name(), self.input.offset(), self.number);
        let message = format!("{name}, entry {number} at byte {at}: {fault}");
        Error::new(ErrorKind::InvalidDescription, message)
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

impl TraceReader for LogWrites {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        std::mem::swap(batch, &mut self.sink.batch);
        self.sink.batch.ios.clear();
        self.sink.batch.controls.clear();
        let done = self.fill_batch();
        std::mem::swap(batch, &mut self.sink.batch);
        done?;
        Ok(!(batch.ios.is_empty() && batch.controls.is_empty()))
    }

    fn devices(&self) -> &[String] {
        self.sink.devices.names()
    }

    fn notes(&self) -> &TraceNotes {
        &self.sink.notes
    }
}
