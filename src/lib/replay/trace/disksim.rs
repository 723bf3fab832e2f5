//! DiskSim's ASCII form, which MQSim has too, with times in other units.

use super::lines::{Fault, Line, LineFormat, Sink, plain};
use super::scan::{self, word};
use crate::replay::event::TraceOp;

/// `time device sector sectors flags`; bit 0 of the flags is set for a read.
#[derive(Default)]
pub(super) struct Disksim {
    /// Nanoseconds of one unit: DiskSim has milliseconds with a fraction, MQSim whole nanoseconds. The first time other than 0 tells.
    unit: Option<u64>,
}

impl LineFormat for Disksim {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        let mut rest = line;
        let time = word(&mut rest);
        if time.is_empty() || time.starts_with(b"#") {
            return Ok(Line::Other);
        }
        let guess = if time.contains(&b'.') { 1_000_000 } else { 1 };
        let time_ns = scan::time(time, self.unit.unwrap_or(guess)).ok_or("no time")?;
        if time_ns > 0 {
            self.unit.get_or_insert(guess);
        }
        let device = word(&mut rest);
        if scan::number(device).is_none() {
            return Err("no device");
        }
        let sector = scan::number(word(&mut rest)).ok_or("no sector")?;
        let sectors = scan::number(word(&mut rest)).ok_or("no number of sectors")?;
        let flags = scan::number(word(&mut rest)).ok_or("no flags")?;
        let op = if flags & 1 == 1 {
            TraceOp::Read
        } else {
            TraceOp::Write
        };
        if !rest.trim_ascii().is_empty() {
            return Err("more than five columns");
        }
        let device = out.devices.named(device)?;
        out.io(plain(time_ns, device, op, sector, sectors))
    }
}
