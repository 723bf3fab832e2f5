//! Binary blktrace: one file for each processor, read side by side, or a dump that blkparse made of them.

use std::collections::HashMap;

use super::input::Input;
use super::lines::{Fault, Fill, Sink, control};
use super::next::Next;
use super::record::{self, Record};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{Batch, ControlEvent, TraceIo, TraceOp};

/// Processes and messages of a dump that are remembered.
const MAX_REMEMBERED: usize = 4096;
/// Pairs of device and processor whose numbers are followed.
const SEQUENCES: usize = 1024;

/// Files of one or more devices and their processors.
pub(super) struct Blktrace {
    streams: Vec<Stream>,
    /// Which stream is next, by time, processor and number on that processor.
    next: Option<Next>,
    shared: Shared,
}

/// Where a record belongs, for [`Next`].
#[inline]
fn key(io: &TraceIo, sequence: u32) -> u128 {
    u128::from(io.time_ns) << 64 | u128::from(io.cpu) << 48 | u128::from(sequence) << 16
}

/// What the streams find out together.
struct Shared {
    sink: Sink,
    sequences: Box<[(u64, u32)]>,
    dump: Option<Dump>,
    has_remap: bool,
    is_lenient: bool,
}

/// One file, and its next record that matters.
struct Stream {
    input: Input,
    is_big: bool,
    io: TraceIo,
    control: Option<String>,
}

/// What is found.
enum Found {
    Io(u32),
    Control(u32),
}

impl Blktrace {
    /// Reads files of single processors, each in order of time.
    pub(super) fn new(inputs: Vec<Input>, is_lenient: bool) -> Self {
        Self::with(inputs, None, is_lenient)
    }

    /// Reads a dump, in which messages are out of place.
    pub(super) fn dump(input: Input, is_lenient: bool) -> Self {
        Self::with(vec![input], Some(Dump::default()), is_lenient)
    }

    fn with(inputs: Vec<Input>, dump: Option<Dump>, is_lenient: bool) -> Self {
        Self {
            streams: inputs.into_iter().map(Stream::new).collect(),
            next: None,
            shared: Shared {
                sink: Sink::new(),
                sequences: vec![(u64::MAX, 0); SEQUENCES].into(),
                dump,
                has_remap: false,
                is_lenient,
            },
        }
    }

    /// Something the reader of the report should know about the files.
    pub(super) fn warn(&mut self, warning: String) {
        self.shared.sink.warn(warning);
    }

    fn prime(&mut self) -> Result<Next> {
        let mut keys = Vec::new();
        for stream in &mut self.streams {
            if stream.input.want(4)? {
                stream.is_big = record::is_big_endian(stream.input.data()).unwrap_or(false);
            }
            keys.push(stream.advance(&mut self.shared)?);
        }
        Next::of(&keys)
    }
}

impl Fill for Blktrace {
    fn sink(&self) -> &Sink {
        &self.shared.sink
    }

    fn sink_mut(&mut self) -> &mut Sink {
        &mut self.shared.sink
    }

    fn fill(&mut self) -> Result<()> {
        let mut next = match self.next.take() {
            Some(next) => next,
            None => self.prime()?,
        };
        let mut last = None;
        while let Some(index) = next.first()
            && !self.shared.sink.is_full()
        {
            let stream = &mut self.streams[index];
            // Requests of a processor often come one after the other; while they come before those of the others the tree can wait.
            let second = if last == Some(index) {
                next.second()
            } else {
                0
            };
            last = Some(index);
            loop {
                let batch = &mut self.shared.sink.batch;
                match stream.control.take() {
                    None => batch.ios.push(stream.io),
                    Some(text) => {
                        let time_ns = stream.io.time_ns;
                        batch.controls.push(ControlEvent { time_ns, text });
                    }
                }
                let key = stream.advance(&mut self.shared)?;
                let stays = key.is_some_and(|key| next.stays_first(key, second));
                if !stays || self.shared.sink.is_full() {
                    next.replace_first(key);
                    break;
                }
            }
        }
        if let Some(dump) = &mut self.shared.dump {
            dump.place(&mut self.shared.sink.batch, next.first().is_none());
        }
        self.next = Some(next);
        Ok(())
    }
}

impl Stream {
    fn new(input: Input) -> Self {
        Self {
            input,
            is_big: false,
            io: super::lines::flush(0, 0),
            control: None,
        }
    }

    #[inline]
    fn advance(&mut self, shared: &mut Shared) -> Result<Option<u128>> {
        if self.is_big {
            self.next::<true>(shared)
        } else {
            self.next::<false>(shared)
        }
    }

    /// Finds the next record that matters and tells where it belongs.
    #[inline]
    fn next<const BIG: bool>(&mut self, shared: &mut Shared) -> Result<Option<u128>> {
        loop {
            let data = self.input.data();
            let Some(record) = Record::parse::<BIG>(data) else {
                if data.len() >= record::V8 {
                    self.bad("no record of a blktrace", shared)?;
                } else if !self.input.fill()? && !self.last_bytes(shared)? {
                    return Ok(None);
                }
                continue;
            };
            if data.len() < record.len() {
                if !self.input.want(record.len())? {
                    shared.sink.notes.is_truncated = true;
                    return Ok(None);
                }
                continue;
            }
            let found = shared.judge(&record, data, &mut self.io, &mut self.control);
            self.input.consume(record.len());
            match found {
                Ok(None) => shared.sink.notes.skipped += 1,
                Ok(Some(Found::Io(sequence) | Found::Control(sequence))) => {
                    return Ok(Some(key(&self.io, sequence)));
                }
                Err(fault) => {
                    let at = self.input.offset() - record.len() as u64;
                    shared.malformed(self.input.name(), at, fault)?;
                }
            }
        }
    }

    /// Judges what is left where nothing follows, less than a record of version 8. False if it is the end.
    #[cold]
    fn last_bytes(&mut self, shared: &mut Shared) -> Result<bool> {
        let left = self.input.data().len();
        if left >= record::V7 && record::is_big_endian(self.input.data()) != Some(self.is_big) {
            self.bad("no record of a blktrace", shared)?;
            return Ok(true);
        }
        shared.sink.notes.is_truncated |= left > 0 || self.input.is_cut();
        Ok(false)
    }

    /// An error, or with lenient reading a search for the next record.
    #[cold]
    fn bad(&mut self, fault: Fault, shared: &mut Shared) -> Result<()> {
        shared.malformed(self.input.name(), self.input.offset(), fault)?;
        let data = self.input.data();
        let next = (1..data.len() - 3).find(|&at| record::is_big_endian(&data[at..]).is_some());
        self.input.consume(next.unwrap_or(data.len() - 3));
        Ok(())
    }
}

impl Shared {
    #[cold]
    fn malformed(&mut self, name: &str, at: u64, fault: Fault) -> Result<()> {
        if self.is_lenient {
            self.sink.notes.malformed += 1;
            return Ok(());
        }
        let message = format!("{name}, record at byte {at}: {fault}");
        Err(Error::new(ErrorKind::InvalidDescription, message))
    }

    /// What a record means, left in `io` or `control`.
    #[inline]
    fn judge(
        &mut self,
        record: &Record,
        data: &[u8],
        io: &mut TraceIo,
        text: &mut Option<String>,
    ) -> std::result::Result<Option<Found>, Fault> {
        let Ok(cpu) = u16::try_from(record.cpu) else {
            return Err("a processor above 65535");
        };
        if record.has(record::NOTIFY) {
            return Ok(self.notification(record, data, io, text));
        }
        self.follow(record);
        if let Some(dump) = &mut self.dump {
            dump.see(record);
        }
        if record.event != record::QUEUE || record.has(record::PASSTHROUGH) {
            if record.event == record::REMAP && !self.has_remap {
                self.remap(record, data);
            }
            return Ok(None);
        }
        let sectors = u64::from(record.bytes).div_ceil(512);
        let is_preflush = record.has(record::FLUSH);
        let op = match () {
            () if sectors == 0 && is_preflush => TraceOp::Flush,
            () if sectors == 0 => return Ok(None),
            () if record.has(record::DISCARD) => TraceOp::Discard,
            () if record.has(record::WRITE) => TraceOp::Write,
            () => TraceOp::Read,
        };
        if record.sector > u64::MAX / 512 - sectors {
            return Err("it ends beyond what a device can have");
        }
        let key = record.device.to_le_bytes();
        *io = TraceIo {
            time_ns: record.time,
            sector: if op == TraceOp::Flush {
                0
            } else {
                record.sector
            },
            sectors,
            device: self
                .sink
                .devices
                .index(&key, || record::device_name(record.device))?,
            cpu,
            op,
            is_preflush,
            is_fua: record.has(record::FUA),
        };
        Ok(Some(Found::Io(record.sequence)))
    }

    #[cold]
    fn notification(
        &mut self,
        record: &Record,
        data: &[u8],
        io: &mut TraceIo,
        text: &mut Option<String>,
    ) -> Option<Found> {
        let words = (record.event == record::MESSAGE)
            .then(|| control(record.payload(data)))
            .flatten();
        if let Some(dump) = &mut self.dump {
            dump.notice(record, words);
            return None;
        }
        *text = Some(words?);
        io.time_ns = record.time;
        io.cpu = record.cpu as u16;
        Some(Found::Control(record.sequence))
    }

    /// Counts what is missing between two records of a processor.
    #[inline]
    fn follow(&mut self, record: &Record) {
        let key = u64::from(record.device) << 32 | u64::from(record.cpu);
        let slot = (record.device ^ record.cpu) as usize % SEQUENCES;
        let (known, last) = &mut self.sequences[slot];
        if *known == key && record.sequence > *last {
            let gap = record.sequence - *last - 1;
            self.sink.notes.lost = self.sink.notes.lost.saturating_add(gap.into());
        }
        (*known, *last) = (key, record.sequence);
    }

    /// A request that came from another device: what was traced may be below the one of interest.
    #[cold]
    fn remap(&mut self, record: &Record, data: &[u8]) {
        self.has_remap = true;
        let from = record.payload(data).first_chunk::<4>();
        let from = from.map_or(0, |from| u32::from_be_bytes(*from));
        self.sink.warn(below(
            &record::device_name(record.device),
            &record::device_name(from),
        ));
    }
}

/// The warning that a device gets requests from another one.
pub(super) fn below(device: &str, from: &str) -> String {
    format!(
        "{device} got requests that were made to {from}: if that is the thin device, {device} is below it and its sectors are not the \
         thin device's"
    )
}

/// blkparse subtracts the start of the trace from the times of records but not of notifications, and writes those out too early.
#[derive(Default)]
struct Dump {
    /// When processes were first noticed, which was just before their first record.
    processes: HashMap<u32, u64>,
    first_notice: Option<u64>,
    /// What was subtracted: no less than this.
    start: Option<i64>,
    messages: Vec<ControlEvent>,
}

impl Dump {
    fn notice(&mut self, record: &Record, words: Option<String>) {
        self.first_notice.get_or_insert(record.time);
        if let Some(text) = words {
            let time_ns = record.time;
            self.messages.push(ControlEvent { time_ns, text });
        } else if record.event == record::PROCESS && self.processes.len() < MAX_REMEMBERED {
            self.processes.entry(record.pid).or_insert(record.time);
        }
    }

    #[inline]
    fn see(&mut self, record: &Record) {
        if self.processes.is_empty() && (self.start.is_some() || self.first_notice.is_none()) {
            return;
        }
        let noticed = self.processes.remove(&record.pid);
        let noticed = noticed.or(self.first_notice.filter(|_| self.start.is_none()));
        if let Some(noticed) = noticed {
            let start = noticed.wrapping_sub(record.time) as i64;
            self.start = self.start.max(Some(start));
        }
    }

    /// Hands over the messages once the start is known.
    fn place(&mut self, batch: &mut Batch, is_end: bool) {
        if self.start.is_none() && !is_end && self.messages.len() < MAX_REMEMBERED {
            return;
        }
        let start = self.start.unwrap_or(0);
        for mut message in self.messages.drain(..) {
            message.time_ns = message
                .time_ns
                .saturating_add_signed(start.saturating_neg());
            batch.controls.push(message);
        }
    }
}
