//! Reads traces that are binary records, one after the other; a format says what a record means.

use super::input::Input;
use super::lines::{Fault, Fill, Line, Sink};
use crate::error::{Error, ErrorKind, Result};

/// What the records of a format mean.
pub(super) trait RecordFormat: Send {
    /// Takes what comes before the records. False if the trace ends before it does.
    ///
    /// # Errors
    /// `Io`; `InvalidDescription` if it is not of the format, with lenient reading, too.
    fn head(&mut self, input: &mut Input, sink: &mut Sink) -> Result<bool>;

    /// Bytes that tell how long a record is, or all of it.
    fn least(&self) -> usize;

    /// Bytes of the record that `data` begins with.
    fn len(&self, _data: &[u8]) -> std::result::Result<usize, Fault> {
        Ok(self.least())
    }

    /// Bytes behind a record that say nothing.
    fn behind(&self, _record: &[u8]) -> u64 {
        0
    }

    /// Tells `sink` what a record says.
    fn take(&mut self, record: &[u8], sink: &mut Sink) -> std::result::Result<Line, Fault>;

    /// Whether the last record was taken; none if that is where the file ends.
    fn is_over(&self) -> Option<bool> {
        None
    }
}

/// A file of records.
pub(super) struct Records<F> {
    input: Input,
    format: F,
    sink: Sink,
    is_lenient: bool,
    is_begun: bool,
    is_ended: bool,
}

impl<F: RecordFormat> Records<F> {
    pub(super) fn new(input: Input, format: F, is_lenient: bool) -> Self {
        Self {
            input,
            format,
            sink: Sink::new(),
            is_lenient,
            is_begun: false,
            is_ended: false,
        }
    }

    /// Takes the record that comes next. False if there is none, or not all of it.
    fn take(&mut self) -> Result<bool> {
        let least = self.format.least();
        if !self.input.want(least)? {
            return Ok(false);
        }
        let len = self.format.len(self.input.data());
        if !self.input.want(len.unwrap_or(least))? {
            return Ok(false);
        }
        let record = &self.input.data()[..len.unwrap_or(least)];
        match len.and_then(|_| self.format.take(record, &mut self.sink)) {
            Ok(line) => self.sink.notes.skipped += u64::from(line == Line::Other),
            Err(_) if self.is_lenient => self.sink.notes.malformed += 1,
            Err(fault) => return Err(bad(&self.input, fault)),
        }
        let behind = self.format.behind(record);
        let is_whole = self
            .input
            .skip(behind.saturating_add(record.len() as u64))?;
        self.sink.notes.is_truncated = !is_whole;
        Ok(is_whole)
    }
}

/// The error that what comes next is none of the format.
pub(super) fn bad(input: &Input, fault: &str) -> Error {
    let (name, at) = (input.name(), input.offset());
    let message = format!("{name}, record at byte {at}: {fault}");
    Error::new(ErrorKind::InvalidDescription, message)
}

impl<F: RecordFormat> Fill for Records<F> {
    fn sink(&self) -> &Sink {
        &self.sink
    }

    fn sink_mut(&mut self) -> &mut Sink {
        &mut self.sink
    }

    fn fill(&mut self) -> Result<()> {
        let is_begun = std::mem::replace(&mut self.is_begun, true)
            || self.format.head(&mut self.input, &mut self.sink)?;
        while !self.is_ended && !self.sink.is_full() {
            if self.format.is_over() == Some(true) {
                self.is_ended = true;
            } else if !is_begun || !self.take()? {
                self.is_ended = true;
                self.sink.notes.is_truncated |= self.format.is_over() == Some(false)
                    || !self.input.data().is_empty()
                    || self.input.is_cut();
                self.sink.notes.warnings.extend(self.input.end_warning());
            }
        }
        Ok(())
    }
}
