//! Loads of blkreplay.

use super::lines::{Fault, Line, LineFormat, Sink, plain};
use super::scan;
use crate::replay::event::TraceOp;

/// `seconds ; sector ; sectors ; R or W ; …`, after words about where the load is from.
#[derive(Default)]
pub(super) struct Load {
    is_begun: bool,
}

impl LineFormat for Load {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        match event(line, out) {
            Err(_) if !self.is_begun || line.trim_ascii().is_empty() => Ok(Line::Other),
            Err(fault) => Err(fault),
            Ok(line) => {
                self.is_begun = true;
                Ok(line)
            }
        }
    }
}

fn event(line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
    let mut fields = line.split(|&b| b == b';').map(<[u8]>::trim_ascii);
    let mut next = || fields.next().unwrap_or_default();
    let time = scan::time(next(), 1_000_000_000).ok_or("no time")?;
    let sector = scan::number(next()).ok_or("no sector")?;
    let sectors = scan::number(next()).ok_or("no number of sectors")?;
    let op = match next() {
        b"R" | b"r" => TraceOp::Read,
        b"W" | b"w" => TraceOp::Write,
        _ => return Err("no operation, R or W"),
    };
    let device = out.devices.named(b"0")?;
    out.io(plain(time, device, op, sector, sectors))
}
