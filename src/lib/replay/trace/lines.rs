//! Reads traces that are text, line by line; a format says what a line means.

use memchr::memchr;

use super::devices::{Devices, text};
use super::input::Input;
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{Batch, ControlEvent, TraceIo, TraceNotes, TraceOp, TraceReader};

/// Events in one batch.
pub(super) const BATCH: usize = 4096;
/// Control events in one batch; their text can be long.
pub(super) const CONTROLS: usize = 256;
const MAX_LINE: usize = 64 << 10;
const OVERLONG: Fault = "it is longer than 64 KiB";
/// As much of a bad line as is shown.
const SHOWN: usize = 200;
/// Sectors that bytes can be counted of.
const MAX_SECTOR: u64 = u64::MAX / 512;

/// What a line was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// An event.
    Event,
    /// Something that says nothing about I/O.
    Other,
}

/// Why a line is none of its format.
pub(super) type Fault = &'static str;

/// What the lines of a format mean.
pub(super) trait LineFormat: Send {
    /// Tells `out` what `line` says.
    fn line(&mut self, line: &[u8], out: &mut Sink) -> std::result::Result<Line, Fault>;

    /// Does the same with the line that `text` begins with, if it is of the usual form and whole, without a search for its end first.
    /// Tells how long it is with its end.
    #[inline]
    fn usual(&mut self, _text: &[u8], _out: &mut Sink) -> Option<(Line, usize)> {
        None
    }
}

/// Where a format leaves what it finds.
pub(super) struct Sink {
    pub(super) batch: Batch,
    pub(super) devices: Devices,
    pub(super) notes: TraceNotes,
}

impl Sink {
    pub(super) fn new() -> Self {
        Self {
            batch: Batch::default(),
            devices: Devices::new(),
            notes: TraceNotes::default(),
        }
    }

    /// Takes a request that has sectors, or is a flush.
    #[inline]
    pub(super) fn io(&mut self, io: TraceIo) -> std::result::Result<Line, Fault> {
        if io.sectors == 0 && io.op != TraceOp::Flush {
            return Ok(Line::Other);
        }
        if io
            .sector
            .checked_add(io.sectors)
            .is_none_or(|end| end > MAX_SECTOR)
        {
            return Err("it ends beyond what a device can have");
        }
        self.batch.ios.push(io);
        Ok(Line::Event)
    }

    /// Takes a message, if it is for us.
    pub(super) fn message(&mut self, time_ns: u64, message: &[u8]) -> Line {
        match control(message) {
            Some(text) => {
                self.batch.controls.push(ControlEvent { time_ns, text });
                Line::Event
            }
            None => Line::Other,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.batch.ios.len() >= BATCH || self.batch.controls.len() >= CONTROLS
    }

    pub(super) fn warn(&mut self, warning: impl Into<String>) {
        self.notes.warnings.push(warning.into());
    }
}

/// A reader that leaves what it finds in a sink.
pub(super) trait Fill: Send {
    fn sink(&self) -> &Sink;

    fn sink_mut(&mut self) -> &mut Sink;

    /// Finds what comes next, until the sink is full; nothing at the end.
    fn fill(&mut self) -> Result<()>;
}

impl<F: Fill> TraceReader for F {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        // The vectors of both go round.
        std::mem::swap(batch, &mut self.sink_mut().batch);
        self.sink_mut().batch.ios.clear();
        self.sink_mut().batch.controls.clear();
        let done = self.fill();
        std::mem::swap(batch, &mut self.sink_mut().batch);
        done?;
        Ok(!(batch.ios.is_empty() && batch.controls.is_empty()))
    }

    fn devices(&self) -> &[String] {
        self.sink().devices.names()
    }

    fn notes(&self) -> &TraceNotes {
        &self.sink().notes
    }
}

/// The words of a control event, if `message` is one: `ctl …` or `thinreplay: …`, with whatever end it was written with.
pub(in crate::replay) fn control(message: &[u8]) -> Option<String> {
    let is_end = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0;
    let end = message.iter().rposition(|byte| !is_end(byte))? + 1;
    let message = message[..end].trim_ascii_start();
    let words = [&b"ctl "[..], b"thinreplay:"]
        .into_iter()
        .find_map(|prefix| message.strip_prefix(prefix))?;
    Some(text(words.trim_ascii()))
}

/// The sectors that `len` bytes from `offset` on touch, the first and their number.
#[inline]
pub(super) fn sectors(offset: u64, len: u64) -> std::result::Result<(u64, u64), Fault> {
    let end = offset
        .checked_add(len)
        .ok_or("it ends beyond what a device can have")?;
    let first = offset / 512;
    Ok((
        first,
        if len == 0 {
            0
        } else {
            end.div_ceil(512) - first
        },
    ))
}

/// A flush as formats without flags have it.
pub(super) fn flush(time_ns: u64, device: u32) -> TraceIo {
    TraceIo {
        is_preflush: true,
        ..plain(time_ns, device, TraceOp::Flush, 0, 0)
    }
}

/// A request as formats without flags have it.
#[inline]
pub(super) fn plain(time_ns: u64, device: u32, op: TraceOp, sector: u64, sectors: u64) -> TraceIo {
    TraceIo {
        time_ns,
        sector,
        sectors,
        device,
        cpu: 0,
        op,
        is_preflush: false,
        is_fua: false,
    }
}

/// A text that is read with a format.
pub(super) struct Lines<F> {
    input: Input,
    format: F,
    sink: Sink,
    line: u64,
    is_lenient: bool,
    is_ended: bool,
    /// What comes up to the next end of a line belongs to one that was too long.
    is_overlong: bool,
}

impl<F: LineFormat> Lines<F> {
    pub(super) fn new(input: Input, format: F, is_lenient: bool) -> Self {
        Self {
            input,
            format,
            sink: Sink::new(),
            line: 0,
            is_lenient,
            is_ended: false,
            is_overlong: false,
        }
    }

    /// Takes the whole lines in the window, as far as the batch has room; how many bytes that were.
    fn take_lines(&mut self) -> Result<usize> {
        let data = self.input.data();
        let mut at = 0;
        while !self.sink.is_full() {
            let text = &data[at..];
            if !self.is_overlong
                && let Some((line, len)) = self.format.usual(text, &mut self.sink)
            {
                self.sink.notes.skipped += u64::from(line == Line::Other);
                self.line += 1;
                at += len;
                continue;
            }
            let Some(len) = memchr(b'\n', text) else {
                break;
            };
            at += len + 1;
            if std::mem::take(&mut self.is_overlong) {
                continue;
            }
            self.line += 1;
            let line = match &text[..len] {
                [line @ .., b'\r'] => line,
                line => line,
            };
            let found = if len <= MAX_LINE {
                self.format.line(line, &mut self.sink)
            } else {
                Err(OVERLONG)
            };
            match found {
                Ok(Line::Event) => {}
                Ok(Line::Other) => self.sink.notes.skipped += u64::from(!line.is_empty()),
                Err(fault) => {
                    bad(&self.input, self.line, fault, line, self.is_lenient)?;
                    self.sink.notes.malformed += 1;
                }
            }
        }
        Ok(at)
    }

    /// Takes a last line without an end. If it means nothing it was cut off.
    fn take_last(&mut self) {
        self.is_ended = true;
        let line = if self.is_overlong {
            &[]
        } else {
            self.input.data()
        };
        let is_cut = match self.format.line(line, &mut self.sink) {
            Err(_) => !line.is_empty(),
            Ok(Line::Other) => {
                self.sink.notes.skipped += u64::from(!line.is_empty());
                false
            }
            Ok(_) => false,
        };
        self.sink.notes.is_truncated = is_cut || self.input.is_cut();
        self.sink.notes.warnings.extend(self.input.cut_warning());
    }
}

#[cold]
fn bad(input: &Input, line: u64, fault: Fault, text: &[u8], is_lenient: bool) -> Result<()> {
    if is_lenient {
        return Ok(());
    }
    let name = input.name();
    let shown = String::from_utf8_lossy(&text[..text.len().min(SHOWN)]);
    Err(Error::new(
        ErrorKind::InvalidDescription,
        format!("{name}, line {line}: {fault}: {shown:?}"),
    ))
}

impl<F: LineFormat> Fill for Lines<F> {
    fn sink(&self) -> &Sink {
        &self.sink
    }

    fn sink_mut(&mut self) -> &mut Sink {
        &mut self.sink
    }

    fn fill(&mut self) -> Result<()> {
        while !self.is_ended && !self.sink.is_full() {
            let used = self.take_lines()?;
            self.input.consume(used);
            if self.sink.is_full() {
                break;
            }
            let Batch { ios, controls } = &self.sink.batch;
            if self.input.is_live() && !(ios.is_empty() && controls.is_empty()) {
                break;
            }
            if self.input.data().len() > MAX_LINE {
                if !self.is_overlong {
                    self.line += 1;
                    let text = self.input.data();
                    bad(&self.input, self.line, OVERLONG, text, self.is_lenient)?;
                    self.sink.notes.malformed += 1;
                }
                self.is_overlong = true;
                self.input.consume(self.input.data().len());
            }
            if !self.input.fill()? {
                self.take_last();
            }
        }
        Ok(())
    }
}
