//! VMware's binary traces of virtual SCSI disks, versions 1 and 2.

use super::input::Input;
use super::lines::{Fault, Line, Sink, flush, plain, sectors};
use super::records::{RecordFormat, bad};
use crate::bytes::{get_u32, get_u64};
use crate::error::Result;
use crate::replay::event::TraceOp;

/// Records that tell the version.
const TELLING: usize = 2;

/// Where the fields of a version are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    record: usize,
    version: usize,
    length: usize,
    command: usize,
    version_number: u8,
}

const LAYOUTS: [Layout; 2] = [
    Layout {
        record: 40,
        version: 2,
        length: 8,
        command: 0,
        version_number: 2,
    },
    Layout {
        record: 32,
        version: 14,
        length: 4,
        command: 12,
        version_number: 1,
    },
];

impl Layout {
    fn fits(&self, record: &[u8]) -> bool {
        record[self.version + 1] == self.version_number
    }
}

/// The layout of the trace that begins with `head`.
pub(super) fn version(head: &[u8]) -> Option<Layout> {
    LAYOUTS.into_iter().find(|layout| {
        let mut records = head.chunks_exact(layout.record).take(TELLING);
        head.len() >= layout.record && records.all(|record| layout.fits(record))
    })
}

/// A trace of one disk.
#[derive(Default)]
pub(super) struct Vscsi {
    layout: Option<Layout>,
}

impl RecordFormat for Vscsi {
    fn head(&mut self, input: &mut Input, _sink: &mut Sink) -> Result<bool> {
        input.want(TELLING * LAYOUTS[0].record)?;
        self.layout = version(input.data());
        if self.layout.is_none() && input.data().len() >= LAYOUTS[1].record {
            return Err(bad(input, "it has no version that is known, 1 or 2"));
        }
        Ok(self.layout.is_some())
    }

    fn least(&self) -> usize {
        self.layout.unwrap_or(LAYOUTS[1]).record
    }

    fn take(&mut self, record: &[u8], sink: &mut Sink) -> std::result::Result<Line, Fault> {
        let layout = self.layout.filter(|layout| layout.fits(record));
        let layout = layout.ok_or("it is of another version than the first")?;
        let time_ns = get_u64(record, 24).checked_mul(1000).ok_or("no time")?;
        let (_, sectors) = sectors(0, get_u32(record, layout.length).into())?;
        // UNMAP is none of them: its ranges are not in the record.
        let op = match record[layout.command] {
            0x08 | 0x28 | 0xa8 | 0x88 => TraceOp::Read,
            0x0a | 0x2a | 0xaa | 0x8a => TraceOp::Write,
            0x35 | 0x91 => TraceOp::Flush,
            _ => return Ok(Line::Other),
        };
        let device = sink.devices.named(b"0")?;
        let sector = get_u64(record, 16);
        sink.io(match op {
            TraceOp::Flush => flush(time_ns, device),
            _ => plain(time_ns, device, op, sector, sectors),
        })
    }
}
