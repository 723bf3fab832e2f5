//! VMware's binary traces of virtual SCSI disks, versions 1 and 2.

use super::input::Input;
use super::lines::{Sink, flush, plain, sectors};
use crate::bytes::{get_u32, get_u64};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{Batch, TraceNotes, TraceOp, TraceReader};

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
pub(super) struct Vscsi {
    input: Input,
    layout: Option<Layout>,
    sink: Sink,
    is_lenient: bool,
}

impl Vscsi {
    pub(super) fn new(input: Input, is_lenient: bool) -> Self {
        Self {
            input,
            layout: None,
            sink: Sink::new(),
            is_lenient,
        }
    }

    fn fill_batch(&mut self) -> Result<()> {
        let layout = match self.layout {
            Some(layout) => layout,
            None => {
                self.input.want(TELLING * LAYOUTS[0].record)?;
                let Some(layout) = version(self.input.data()) else {
                    self.sink.notes.is_truncated |= !self.input.data().is_empty();
                    return if self.input.data().len() < LAYOUTS[1].record {
                        Ok(())
                    } else {
                        Err(self.bad("it has no version that is known, 1 or 2"))
                    };
                };
                *self.layout.insert(layout)
            }
        };
        while !self.sink.is_full() {
            if !self.input.want(layout.record)? {
                let is_cut = !self.input.data().is_empty() || self.input.is_cut();
                self.sink.notes.is_truncated |= is_cut;
                break;
            }
            if let Err(fault) = self.take(layout) {
                if !self.is_lenient {
                    return Err(self.bad(fault));
                }
                self.sink.notes.malformed += 1;
            }
            self.input.consume(layout.record);
        }
        Ok(())
    }

    fn take(&mut self, layout: Layout) -> std::result::Result<(), &'static str> {
        let record = &self.input.data()[..layout.record];
        if !layout.fits(record) {
            return Err("it is of another version than the first");
        }
        let time_ns = get_u64(record, 24).checked_mul(1000).ok_or("no time")?;
        let (_, sectors) = sectors(0, get_u32(record, layout.length).into())?;
        // UNMAP is none of them: its ranges are not in the record.
        let op = match record[layout.command] {
            0x08 | 0x28 | 0xa8 | 0x88 => TraceOp::Read,
            0x0a | 0x2a | 0xaa | 0x8a => TraceOp::Write,
            0x35 | 0x91 => TraceOp::Flush,
            _ => {
                self.sink.notes.skipped += 1;
                return Ok(());
            }
        };
        let device = self.sink.devices.named(b"0")?;
        let sector = get_u64(record, 16);
        let line = self.sink.io(match op {
            TraceOp::Flush => flush(time_ns, device),
            _ => plain(time_ns, device, op, sector, sectors),
        })?;
        self.sink.notes.skipped += u64::from(line == super::lines::Line::Other);
        Ok(())
    }

    fn bad(&self, fault: &str) -> Error {
        let (name, at) = (self.input.name(), self.input.offset());
        Error::new(
            ErrorKind::InvalidDescription,
            format!("{name}, record at byte {at}: {fault}"),
        )
    }
}

impl TraceReader for Vscsi {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        std::mem::swap(batch, &mut self.sink.batch);
        self.sink.batch.ios.clear();
        self.sink.batch.controls.clear();
        let done = self.fill_batch();
        std::mem::swap(batch, &mut self.sink.batch);
        done?;
        Ok(!batch.ios.is_empty())
    }

    fn devices(&self) -> &[String] {
        self.sink.devices.names()
    }

    fn notes(&self) -> &TraceNotes {
        &self.sink.notes
    }
}
