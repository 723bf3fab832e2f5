//! Event files: the form into which every other trace can be brought, by [`crate::replay::split`]. The bytes are described at
//! [`crate::replay::Format::Events`].

use super::input::Input;
use super::lines::{Fault, Line, Sink};
use super::records::{RecordFormat, bad};
use crate::bytes::{get_u32, get_u64, put_u32, put_u64};
use crate::error::Result;
use crate::replay::event::{ControlEvent, TraceIo, TraceOp};

const MAGIC: &[u8; 8] = b"thinevts";
const VERSION: u32 = 1;
/// Bytes of a record, and of the header before the name.
pub(in crate::replay) const RECORD: usize = 32;
/// A name of 255 bytes that was no UTF-8 takes up to three times as many.
const MAX_NAME: usize = 1024;
const MAX_TEXT: usize = 64 << 10;

/// Kinds of records that are no request.
const CONTROL: u8 = 0xfe;
const END: u8 = 0xff;
/// By the number that stands for it.
const OPS: [TraceOp; 5] = [
    TraceOp::Read,
    TraceOp::Write,
    TraceOp::Discard,
    TraceOp::WriteZeroes,
    TraceOp::Flush,
];
/// Flags of a request.
const PREFLUSH: u8 = 1;
const FUA: u8 = 2;

/// True if `head` begins with the header of an event file, of whatever version.
pub(super) fn is_events(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

/// Bytes of a name or text with the zeros behind it.
fn padded(len: usize) -> usize {
    len.next_multiple_of(RECORD)
}

fn append(out: &mut Vec<u8>, record: &[u8; RECORD], text: &[u8]) {
    out.extend_from_slice(record);
    out.extend_from_slice(text);
    out.resize(out.len() + padded(text.len()) - text.len(), 0);
}

/// Appends the header of the file of this device; of none, if the file has control events alone.
pub(in crate::replay) fn header(out: &mut Vec<u8>, device: &str) {
    let mut record = [0; RECORD];
    record[..8].copy_from_slice(MAGIC);
    put_u32(&mut record, 8, VERSION);
    put_u32(&mut record, 12, device.len() as u32);
    append(out, &record, device.as_bytes());
}

/// Appends a request.
#[inline]
pub(in crate::replay) fn request(out: &mut Vec<u8>, io: &TraceIo) {
    let mut record = [0; RECORD];
    put_u64(&mut record, 0, io.time_ns);
    put_u64(&mut record, 8, io.sector);
    put_u64(&mut record, 16, io.sectors);
    record[28] = match io.op {
        TraceOp::Read => 0,
        TraceOp::Write => 1,
        TraceOp::Discard => 2,
        TraceOp::WriteZeroes => 3,
        TraceOp::Flush => 4,
    };
    record[29] = (u8::from(io.is_preflush) * PREFLUSH) | (u8::from(io.is_fua) * FUA);
    record[30..].copy_from_slice(&io.cpu.to_le_bytes());
    out.extend_from_slice(&record);
}

/// Appends a control event; no trace has one whose text is longer than 64 KiB.
pub(in crate::replay) fn control(out: &mut Vec<u8>, event: &ControlEvent) {
    let mut record = [0; RECORD];
    put_u64(&mut record, 0, event.time_ns);
    put_u64(&mut record, 16, event.text.len() as u64);
    record[28] = CONTROL;
    append(out, &record, event.text.as_bytes());
}

/// Appends what follows the last of so many events.
pub(in crate::replay) fn end(out: &mut Vec<u8>, events: u64) {
    let mut record = [0; RECORD];
    put_u64(&mut record, 8, events);
    record[28] = END;
    out.extend_from_slice(&record);
}

/// An event file that is being read.
#[derive(Default)]
pub(super) struct Events {
    is_ended: bool,
    events: u64,
}

impl RecordFormat for Events {
    fn head(&mut self, input: &mut Input, sink: &mut Sink) -> Result<bool> {
        if !input.want(RECORD)? {
            return Ok(false);
        }
        if !is_events(input.data()) {
            return Err(bad(input, "no header of an event file"));
        }
        let data = input.data();
        let (version, len) = (get_u32(data, 8), get_u32(data, 12) as usize);
        if version != VERSION {
            let message = format!("version {version} of the form is not known, only {VERSION}");
            return Err(bad(input, &message));
        }
        if len > MAX_NAME {
            let message = format!("a device with a name of {len} bytes; {MAX_NAME} is the most");
            return Err(bad(input, &message));
        }
        if data[16..RECORD] != [0; 16] {
            return Err(bad(input, "reserved bytes of the header are not zero"));
        }
        if !input.want(RECORD + padded(len))? {
            return Ok(false);
        }
        let name = &input.data()[RECORD..RECORD + len];
        let Ok(name) = std::str::from_utf8(name).map(str::to_owned) else {
            return Err(bad(input, "the name of the device is not UTF-8"));
        };
        if len > 0 {
            let added = sink.devices.index(b"0", || name);
            added.map_err(|fault| bad(input, fault))?;
        }
        input.consume(RECORD + padded(len));
        Ok(true)
    }

    fn least(&self) -> usize {
        RECORD
    }

    fn len(&self, data: &[u8]) -> std::result::Result<usize, Fault> {
        if data[28] != CONTROL {
            return Ok(RECORD);
        }
        match usize::try_from(get_u64(data, 16)) {
            Ok(len) if len <= MAX_TEXT => Ok(RECORD + padded(len)),
            _ => Err("the text of the control event is longer than 64 KiB"),
        }
    }

    fn take(&mut self, data: &[u8], sink: &mut Sink) -> std::result::Result<Line, Fault> {
        let (time_ns, sector, sectors) = (get_u64(data, 0), get_u64(data, 8), get_u64(data, 16));
        if self.is_ended {
            return Err("there is more behind the last record");
        }
        if get_u32(data, 24) != 0 {
            return Err("reserved bytes of the record are not zero");
        }
        let line = match data[28] {
            CONTROL => {
                let text = &data[RECORD..RECORD + sectors as usize];
                let text = std::str::from_utf8(text)
                    .map_err(|_| "the text of the control event is not UTF-8")?;
                let text = text.to_owned();
                sink.batch.controls.push(ControlEvent { time_ns, text });
                Line::Event
            }
            END => {
                self.is_ended = true;
                return match sector == self.events {
                    true => Ok(Line::Event),
                    false => Err("there are not as many events as the last record says"),
                };
            }
            op => {
                let op = *OPS.get(usize::from(op)).ok_or("no operation, 0 to 4")?;
                let flags = data[29];
                if flags & !(PREFLUSH | FUA) != 0 {
                    return Err("flags that are not known");
                }
                if sink.devices.names().is_empty() {
                    return Err("a request, but the header names no device");
                }
                sink.io(TraceIo {
                    time_ns,
                    sector,
                    sectors,
                    device: 0,
                    cpu: u16::from_le_bytes([data[30], data[31]]),
                    op,
                    is_preflush: flags & PREFLUSH != 0,
                    is_fua: flags & FUA != 0,
                })?
            }
        };
        self.events += 1;
        Ok(line)
    }

    /// The last record is always the one that says how many there were; nothing follows it.
    fn is_over(&self) -> Option<bool> {
        (!self.is_ended).then_some(false)
    }
}
