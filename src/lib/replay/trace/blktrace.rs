//! Binary blktrace: one file for each processor, read side by side, or a dump that blkparse made of them.

use std::collections::HashMap;

use super::input::Input;
use super::lines::{CONTROLS, Fault, Fill, Sink, control};
use super::record::{self, Record};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{Batch, ControlEvent, TraceIo, TraceOp};

/// Processes and messages of a dump that are remembered.
const MAX_REMEMBERED: usize = 4096;
/// Pairs of device and processor whose numbers are followed.
const SEQUENCES: usize = 1024;
/// Requests that are found in all files together before they are merged, and in one of them at least and at most.
const AHEAD: usize = 4096;
const LEAST_AHEAD: usize = 16;
const MOST_AHEAD: usize = 1024;

/// Where an event belongs: time, processor, number on that processor, and the file.
type Key = u128;

/// The low bits of a key, which the number of the file takes.
const STREAM: Key = 0xffff;

/// Files of one or more devices and their processors.
pub(super) struct Blktrace {
    streams: Vec<Stream>,
    /// Those of the requests that are merged.
    keys: Vec<Key>,
    shared: Shared,
}

/// What the streams find out together.
struct Shared {
    sink: Sink,
    sequences: Box<[(u64, u32)]>,
    /// The device of the last request, by its number in the trace and by ours.
    device: Option<(u32, u32)>,
    dump: Option<Dump>,
    /// Control events that were found.
    controls: Vec<(Key, ControlEvent)>,
    has_remap: bool,
    is_lenient: bool,
}

/// What a record is.
enum Found {
    Io(TraceIo),
    Control,
    /// Nothing that a replay needs.
    Nothing,
}

/// One file, and the requests that were found in it.
struct Stream {
    input: Input,
    is_big: bool,
    number: u16,
    /// How many are found at once.
    ahead: usize,
    ios: Vec<TraceIo>,
    /// Theirs; those of a file never go back.
    keys: Vec<Key>,
    /// Those of `ios` that were taken.
    taken: usize,
    /// The key of what was found last.
    last: Key,
    is_ended: bool,
}

impl Blktrace {
    /// Reads files of single processors, each in order of time.
    ///
    /// # Errors
    /// `Unsuitable` with more files than can be told apart.
    pub(super) fn new(inputs: Vec<Input>, is_lenient: bool) -> Result<Self> {
        if inputs.len() > STREAM as usize {
            let message = format!("{} files of a blktrace are more than 65535", inputs.len());
            return Err(Error::new(ErrorKind::Unsuitable, message));
        }
        Ok(Self::with(inputs, None, is_lenient))
    }

    /// Reads a dump, in which messages are out of place.
    pub(super) fn dump(input: Input, is_lenient: bool) -> Self {
        Self::with(vec![input], Some(Dump::default()), is_lenient)
    }

    fn with(inputs: Vec<Input>, dump: Option<Dump>, is_lenient: bool) -> Self {
        let ahead = (AHEAD / inputs.len().max(1)).clamp(LEAST_AHEAD, MOST_AHEAD);
        let streams = inputs.into_iter().enumerate();
        Self {
            streams: streams
                .map(|(number, input)| Stream::new(input, number as u16, ahead))
                .collect(),
            keys: Vec::new(),
            shared: Shared {
                sink: Sink::new(),
                sequences: vec![(u64::MAX, 0); SEQUENCES].into(),
                device: None,
                dump,
                controls: Vec::new(),
                has_remap: false,
                is_lenient,
            },
        }
    }

    /// Something the reader of the report should know about the files.
    pub(super) fn warn(&mut self, warning: String) {
        self.shared.sink.warn(warning);
    }

    /// Takes what is found up to where no file can have anything that comes before. False at the end of all.
    fn merge(&mut self) -> Result<bool> {
        let mut end = Key::MAX;
        for stream in &mut self.streams {
            stream.find_if_needed(&mut self.shared)?;
            if !stream.is_ended {
                end = end.min(stream.last);
            }
        }
        let ios = &mut self.shared.sink.batch.ios;
        self.keys.clear();
        for stream in &self.streams {
            self.keys.extend_from_slice(stream.keys_until(end));
        }
        self.keys.sort();
        for key in &self.keys {
            let stream = &mut self.streams[(key & STREAM) as usize];
            ios.push(stream.ios[stream.taken]);
            stream.taken += 1;
        }
        self.shared.take_controls(end);
        Ok(end != Key::MAX)
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
        let mut has_more = true;
        while has_more && !self.shared.sink.is_full() {
            has_more = self.merge()?;
        }
        if let Some(dump) = &mut self.shared.dump {
            dump.place(&mut self.shared.sink.batch, !has_more);
        }
        Ok(())
    }
}

impl Stream {
    fn new(input: Input, number: u16, ahead: usize) -> Self {
        Self {
            input,
            is_big: false,
            number,
            ahead,
            ios: Vec::with_capacity(ahead),
            keys: Vec::with_capacity(ahead),
            taken: 0,
            last: 0,
            is_ended: false,
        }
    }

    /// Keys of the requests that were found and not taken, up to and with `end`.
    fn keys_until(&self, end: Key) -> &[Key] {
        let keys = &self.keys[self.taken..];
        &keys[..keys.partition_point(|&key| key <= end)]
    }

    /// Finds the next events, if all those that were found are taken.
    fn find_if_needed(&mut self, shared: &mut Shared) -> Result<()> {
        if self.taken < self.ios.len() || self.is_ended {
            return Ok(());
        }
        self.ios.clear();
        self.keys.clear();
        self.taken = 0;
        if self.input.offset() == 0 && self.input.want(4)? {
            self.is_big = record::is_big_endian(self.input.data()).unwrap_or(false);
        }
        let controls = shared.controls.len();
        while self.ios.is_empty() && shared.controls.len() == controls && !self.is_ended {
            match self.is_big {
                true => self.find::<true>(shared)?,
                false => self.find::<false>(shared)?,
            }
            if self.ios.is_empty() && shared.controls.len() == controls {
                self.is_ended = !self.want_more(shared)?;
            }
        }
        Ok(())
    }

    /// Finds those of the whole records that were read.
    fn find<const BIG: bool>(&mut self, shared: &mut Shared) -> Result<()> {
        let data = self.input.data();
        let (mut at, mut fault) = (0, None);
        // One may be found however many of other files wait.
        let most_controls = CONTROLS.max(shared.controls.len() + 1);
        while self.ios.len() < self.ahead
            && shared.controls.len() < most_controls
            && fault.is_none()
            && let Some(record) = Record::parse::<BIG>(&data[at..])
            && let Some(whole) = data[at..].get(..record.len())
        {
            let own = Key::from(record.sequence) << 16 | Key::from(self.number);
            let key = Key::from(record.time) << 64 | Key::from(record.cpu as u16) << 48 | own;
            let key = key.max(self.last);
            match shared.judge(record, whole, key) {
                Ok(Found::Io(io)) => {
                    self.ios.push(io);
                    self.keys.push(key);
                    self.last = key;
                }
                Ok(Found::Control) => self.last = key,
                Ok(Found::Nothing) => shared.sink.notes.skipped += 1,
                Err(found) => fault = Some((at, found)),
            }
            at += record.len();
        }
        if let Some((at, fault)) = fault {
            let at = self.input.offset() + at as u64;
            shared.malformed(self.input.name(), at, fault)?;
        }
        self.input.consume(at);
        Ok(())
    }

    /// Reads on, where no whole record was read. False at the end.
    fn want_more(&mut self, shared: &mut Shared) -> Result<bool> {
        let data = self.input.data();
        let record = match self.is_big {
            true => Record::parse::<true>(data),
            false => Record::parse::<false>(data),
        };
        match record {
            // All of those that were read were of no interest.
            Some(record) if data.len() >= record.len() => Ok(true),
            Some(record) => {
                let is_whole = self.input.want(record.len())?;
                shared.sink.notes.is_truncated |= !is_whole;
                Ok(is_whole)
            }
            None if data.len() >= record::V8 => {
                self.bad("no record of a blktrace", shared)?;
                Ok(true)
            }
            None => Ok(self.input.fill()? || self.last_bytes(shared)?),
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

    /// What a record means. A control event is left in `controls`. A record that is passed on as it is stays in registers.
    #[inline(always)]
    fn judge(
        &mut self,
        record: Record,
        data: &[u8],
        key: Key,
    ) -> std::result::Result<Found, Fault> {
        let Ok(cpu) = u16::try_from(record.cpu) else {
            return Err("a processor above 65535");
        };
        if record.has(record::NOTIFY) {
            return Ok(self.notification(record, data, key));
        }
        self.follow(record);
        if let Some(dump) = &mut self.dump {
            dump.see(record);
        }
        if record.event != record::QUEUE || record.has(record::PASSTHROUGH) {
            if record.event == record::REMAP && !self.has_remap {
                self.remap(record, data);
            }
            return Ok(Found::Nothing);
        }
        let sectors = u64::from(record.bytes).div_ceil(512);
        let is_preflush = record.has(record::FLUSH);
        let mut sector = record.sector;
        // Reads and writes take turns at random, so there is no branch between them.
        let mut op = match record.has(record::WRITE) {
            true => TraceOp::Write,
            false => TraceOp::Read,
        };
        if sectors == 0 {
            if !is_preflush {
                return Ok(Found::Nothing);
            }
            (op, sector) = (TraceOp::Flush, 0);
        } else if record.has(record::DISCARD) {
            op = TraceOp::Discard;
        }
        if sector > u64::MAX / 512 - sectors {
            return Err("it ends beyond what a device can have");
        }
        let device = match self.device {
            Some((device, index)) if device == record.device => index,
            _ => self.index(record.device)?,
        };
        Ok(Found::Io(TraceIo {
            time_ns: record.time,
            sector,
            sectors,
            device,
            cpu,
            op,
            is_preflush,
            is_fua: record.has(record::FUA),
        }))
    }

    /// Our number of a device.
    fn index(&mut self, device: u32) -> std::result::Result<u32, Fault> {
        let key = device.to_le_bytes();
        let index = self
            .sink
            .devices
            .index(&key, || record::device_name(device))?;
        self.device = Some((device, index));
        Ok(index)
    }

    #[cold]
    fn notification(&mut self, record: Record, data: &[u8], key: Key) -> Found {
        let words = (record.event == record::MESSAGE)
            .then(|| control(record.payload(data)))
            .flatten();
        if let Some(dump) = &mut self.dump {
            dump.notice(record, words);
            return Found::Nothing;
        }
        let Some(text) = words else {
            return Found::Nothing;
        };
        let time_ns = record.time;
        self.controls.push((key, ControlEvent { time_ns, text }));
        Found::Control
    }

    /// Takes the control events up to and with `end`.
    fn take_controls(&mut self, end: Key) {
        self.controls.sort_by_key(|&(key, _)| key);
        let taken = self.controls.partition_point(|&(key, _)| key <= end);
        let taken = self.controls.drain(..taken).map(|(_, control)| control);
        self.sink.batch.controls.extend(taken);
    }

    /// Counts what is missing between two records of a processor.
    #[inline(always)]
    fn follow(&mut self, record: Record) {
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
    fn remap(&mut self, record: Record, data: &[u8]) {
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
    fn notice(&mut self, record: Record, words: Option<String>) {
        self.first_notice.get_or_insert(record.time);
        if let Some(text) = words {
            let time_ns = record.time;
            self.messages.push(ControlEvent { time_ns, text });
        } else if record.event == record::PROCESS && self.processes.len() < MAX_REMEMBERED {
            self.processes.entry(record.pid).or_insert(record.time);
        }
    }

    #[inline(always)]
    fn see(&mut self, record: Record) {
        if !self.processes.is_empty() || (self.start.is_none() && self.first_notice.is_some()) {
            self.look_for_start(record);
        }
    }

    #[inline(never)]
    fn look_for_start(&mut self, record: Record) {
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
