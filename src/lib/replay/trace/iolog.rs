//! Logs of fio, versions 2 and 3.

use super::lines::{Fault, Line, LineFormat, Sink, flush, plain, sectors};
use super::scan::{number, word};
use crate::replay::event::TraceOp;

const MICROSECOND: u64 = 1000;

/// `[microseconds] file action [offset length]` after a line with the version.
#[derive(Default)]
pub(super) struct Iolog {
    version: Version,
    /// When the log began: fio appends those of several jobs to one file, each with a first line and times of its own.
    start: u64,
    now: u64,
    logs: u32,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Version {
    #[default]
    None,
    V2,
    V3,
}

impl LineFormat for Iolog {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        let mut rest = line;
        if let Some(version) = line.strip_prefix(b"fio version ") {
            self.version = match version.trim_ascii() {
                b"2 iolog" => Version::V2,
                b"3 iolog" => Version::V3,
                _ => return Err("no version of fio's logs that is known, 2 or 3"),
            };
            self.start = self.now;
            self.logs += 1;
            if self.logs == 2 {
                out.warn("the log has several jobs one after the other; split it to replay them side by side");
            }
            return Ok(Line::Other);
        }
        let time = match self.version {
            Version::None => return Err("no log of fio, which begins with its version"),
            Version::V2 => self.now,
            Version::V3 if line.trim_ascii().is_empty() => 0,
            Version::V3 => {
                let time = number(word(&mut rest)).and_then(|time| time.checked_mul(MICROSECOND));
                let time = time.and_then(|time| self.start.checked_add(time));
                time.ok_or("no time")?
            }
        };
        let file = word(&mut rest);
        let op = match word(&mut rest) {
            b"read" => TraceOp::Read,
            b"write" => TraceOp::Write,
            b"trim" => TraceOp::Discard,
            b"sync" | b"datasync" => TraceOp::Flush,
            b"wait" => return self.wait(number(word(&mut rest))),
            b"add" | b"open" | b"close" => return Ok(Line::Other),
            b"" if file.is_empty() => return Ok(Line::Other),
            _ => return Err("no action of fio's logs"),
        };
        let range = if op == TraceOp::Flush {
            (0, 0)
        } else {
            let offset = number(word(&mut rest)).ok_or("no offset")?;
            sectors(offset, number(word(&mut rest)).ok_or("no length")?)?
        };
        let device = out.devices.named(file)?;
        self.now = time;
        out.io(match op {
            TraceOp::Flush => flush(time, device),
            _ => plain(time, device, op, range.0, range.1),
        })
    }
}

impl Iolog {
    /// Microseconds since the wait before.
    fn wait(&mut self, time: Option<u64>) -> Result<Line, Fault> {
        let time = time
            .and_then(|time| time.checked_mul(MICROSECOND))
            .ok_or("no time to wait")?;
        if self.version == Version::V2 {
            self.now = self.now.checked_add(time).ok_or("no time to wait")?;
        }
        Ok(Line::Other)
    }
}
