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
    #[inline(always)]
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
        !self.has_room(BATCH)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batch.ios.is_empty() && self.batch.controls.is_empty()
    }

    /// True up to so many requests.
    pub(super) fn has_room(&self, most: usize) -> bool {
        self.batch.ios.len() < most && self.batch.controls.len() < CONTROLS
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

/// Understands lines, and counts them.
pub(super) struct Taker<F> {
    pub(super) format: F,
    pub(super) sink: Sink,
    /// Lines that were taken.
    pub(super) lines: u64,
    /// The file's name.
    name: String,
    is_lenient: bool,
    /// What comes up to the next end of a line belongs to one that was too long.
    is_overlong: bool,
}

impl<F: LineFormat> Taker<F> {
    pub(super) fn new(name: String, format: F, is_lenient: bool) -> Self {
        Self {
            format,
            sink: Sink::new(),
            lines: 0,
            name,
            is_lenient,
            is_overlong: false,
        }
    }

    /// One that has taken nothing yet, and does not begin at the beginning. A line that is none of the format ends it.
    pub(super) fn fresh(&self) -> Self
    where
        F: Clone,
    {
        Self::new(self.name.clone(), self.format.clone(), false)
    }

    /// Takes the whole lines from `at` on, which is left where the last one ended, until there are about so many events.
    ///
    /// # Errors
    /// `InvalidDescription` for a line that is none of the format, which `at` is left at.
    pub(super) fn take(&mut self, data: &[u8], at: &mut usize, most: usize) -> Result<()> {
        while self.sink.has_room(most) {
            let text = &data[*at..];
            if !self.is_overlong
                && let Some((line, len)) = self.format.usual(text, &mut self.sink)
            {
                self.sink.notes.skipped += u64::from(line == Line::Other);
                self.lines += 1;
                *at += len;
                continue;
            }
            let Some(len) = memchr(b'\n', text) else {
                break;
            };
            if std::mem::take(&mut self.is_overlong) {
                *at += len + 1;
                continue;
            }
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
                Err(fault) => self.bad(fault, line)?,
            }
            self.lines += 1;
            *at += len + 1;
        }
        Ok(())
    }

    /// Begins with a line that is longer than a window.
    fn take_overlong(&mut self, text: &[u8]) -> Result<()> {
        if !self.is_overlong {
            self.bad(OVERLONG, text)?;
            self.lines += 1;
        }
        self.is_overlong = true;
        Ok(())
    }

    /// Takes a last line without an end. If it means nothing it was cut off.
    fn take_last(&mut self, input: &Input) {
        let line = if self.is_overlong { &[] } else { input.data() };
        let is_cut = match self.format.line(line, &mut self.sink) {
            Err(_) => !line.is_empty(),
            Ok(Line::Other) => {
                self.sink.notes.skipped += u64::from(!line.is_empty());
                false
            }
            Ok(_) => false,
        };
        self.sink.notes.is_truncated = is_cut || input.is_cut();
        self.sink.notes.warnings.extend(input.end_warning());
    }

    /// True if the next line is not one that is passed over.
    pub(super) fn is_at_line(&self) -> bool {
        !self.is_overlong
    }

    /// An error, or with lenient reading one more that is counted.
    #[cold]
    fn bad(&mut self, fault: Fault, text: &[u8]) -> Result<()> {
        if self.is_lenient {
            self.sink.notes.malformed += 1;
            return Ok(());
        }
        let shown = String::from_utf8_lossy(&text[..text.len().min(SHOWN)]);
        Err(Error::new(
            ErrorKind::InvalidDescription,
            format!("{}, line {}: {fault}: {shown:?}", self.name, self.lines + 1),
        ))
    }
}

/// A text that is read with a format.
pub(super) struct Lines<F> {
    pub(super) input: Input,
    pub(super) taker: Taker<F>,
    is_ended: bool,
}

impl<F: LineFormat> Lines<F> {
    pub(super) fn new(input: Input, format: F, is_lenient: bool) -> Self {
        Self {
            taker: Taker::new(input.name().into(), format, is_lenient),
            input,
            is_ended: false,
        }
    }
}

impl<F: LineFormat> Fill for Lines<F> {
    fn sink(&self) -> &Sink {
        &self.taker.sink
    }

    fn sink_mut(&mut self) -> &mut Sink {
        &mut self.taker.sink
    }

    fn fill(&mut self) -> Result<()> {
        let Self {
            input,
            taker,
            is_ended,
        } = self;
        input.pass_over_mark()?;
        while !*is_ended && !taker.sink.is_full() {
            let mut used = 0;
            let taken = taker.take(input.data(), &mut used, BATCH);
            input.consume(used);
            taken?;
            if taker.sink.is_full() {
                break;
            }
            if input.is_live() && !taker.sink.is_empty() {
                break;
            }
            if input.data().len() > MAX_LINE {
                taker.take_overlong(input.data())?;
                input.consume(input.data().len());
            }
            if !input.fill()? {
                *is_ended = true;
                taker.take_last(input);
            }
        }
        Ok(())
    }
}
