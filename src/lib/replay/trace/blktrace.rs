//! Binary blktrace: one file for each processor, read side by side, or a dump that blkparse made of them.

use std::collections::{HashMap, VecDeque};

use super::input::Input;
use super::lines::{Fault, Fill, Sink, control, plain};
use super::next::Next;
use super::record::{self, Record};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{Batch, ControlEvent, TraceIo, TraceOp};

/// Processes and messages of a dump that are remembered.
const MAX_REMEMBERED: usize = 4096;
/// Pairs of device and processor whose numbers are followed.
const SEQUENCES: usize = 1024;
/// Records of a file that are understood before they are merged with those of others.
const AHEAD: usize = 256;

/// Files of one or more devices and their processors.
pub(super) struct Blktrace {
    streams: Vec<Stream>,
    /// Which stream is next, by time, processor and number on that processor.
    next: Option<Next>,
    shared: Shared,
}

/// What the streams find out together.
struct Shared {
    sink: Sink,
    sequences: Box<[(u64, u32)]>,
    /// The device of the last request, by its number in the trace and by ours.
    device: Option<(u32, u32)>,
    dump: Option<Dump>,
    /// Those of the control event that was judged.
    words: Option<String>,
    has_remap: bool,
    is_lenient: bool,
}

/// One file, and what comes next of it.
struct Stream {
    input: Input,
    is_big: bool,
    found: Vec<Found>,
    /// Those of `found` that were taken.
    taken: usize,
    /// The words of the control events among them.
    controls: VecDeque<String>,
}

/// A request, or the time and processor of a control event.
struct Found {
    io: TraceIo,
    sequence: u32,
    is_control: bool,
}

impl Found {
    fn control(record: Record) -> Self {
        let at = plain(record.time, 0, TraceOp::Flush, 0, 0);
        Self {
            io: TraceIo {
                cpu: record.cpu as u16,
                ..at
            },
            sequence: record.sequence,
            is_control: true,
        }
    }

    /// Where it belongs, for [`Next`].
    #[inline]
    fn key(&self) -> u128 {
        let io = &self.io;
        u128::from(io.time_ns) << 64 | u128::from(io.cpu) << 48 | u128::from(self.sequence) << 16
    }
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
                device: None,
                dump,
                words: None,
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
            keys.push(stream.key(&mut self.shared)?);
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
        while let Some(index) = next.first()
            && !self.shared.sink.is_full()
        {
            let stream = &mut self.streams[index];
            stream.take(&mut self.shared.sink.batch);
            next.replace_first(stream.key(&mut self.shared)?);
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
            found: Vec::with_capacity(AHEAD),
            taken: 0,
            controls: VecDeque::new(),
        }
    }

    /// Where what comes next belongs; none at the end.
    #[inline]
    fn key(&mut self, shared: &mut Shared) -> Result<Option<u128>> {
        if self.taken == self.found.len() {
            self.find(shared)?;
        }
        Ok(self.found.get(self.taken).map(Found::key))
    }

    /// Takes what comes next.
    #[inline]
    fn take(&mut self, batch: &mut Batch) {
        let Some(next) = self.found.get(self.taken) else {
            return;
        };
        self.taken += 1;
        if !next.is_control {
            return batch.ios.push(next.io);
        }
        if let Some(text) = self.controls.pop_front() {
            let time_ns = next.io.time_ns;
            batch.controls.push(ControlEvent { time_ns, text });
        }
    }

    /// Finds the next records that matter; none at the end.
    #[inline(never)]
    fn find(&mut self, shared: &mut Shared) -> Result<()> {
        self.found.clear();
        self.taken = 0;
        let mut has_more = true;
        while self.found.is_empty() && has_more {
            match self.is_big {
                true => self.find_here::<true>(shared)?,
                false => self.find_here::<false>(shared)?,
            }
            has_more = !self.found.is_empty() || self.want_more(shared)?;
        }
        Ok(())
    }

    /// Finds those of the whole records that were read.
    fn find_here<const BIG: bool>(&mut self, shared: &mut Shared) -> Result<()> {
        let data = self.input.data();
        let (mut at, mut fault) = (0, None);
        while self.found.len() < AHEAD
            && fault.is_none()
            && let Some(record) = Record::parse::<BIG>(&data[at..])
            && let Some(whole) = data[at..].get(..record.len())
        {
            match shared.judge(record, whole) {
                Ok(Some(found)) => self.found.push(found),
                Ok(None) => match shared.words.take() {
                    Some(text) => {
                        self.found.push(Found::control(record));
                        self.controls.push_back(text);
                    }
                    None => shared.sink.notes.skipped += 1,
                },
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

    /// What a record means. The words of a control event are left in `words`. A record that is passed on as it is stays in registers.
    #[inline(always)]
    fn judge(&mut self, record: Record, data: &[u8]) -> std::result::Result<Option<Found>, Fault> {
        let Ok(cpu) = u16::try_from(record.cpu) else {
            return Err("a processor above 65535");
        };
        if record.has(record::NOTIFY) {
            self.notification(record, data);
            return Ok(None);
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
        let mut sector = record.sector;
        // Reads and writes take turns at random, so there is no branch between them.
        let mut op = match record.has(record::WRITE) {
            true => TraceOp::Write,
            false => TraceOp::Read,
        };
        if sectors == 0 {
            if !is_preflush {
                return Ok(None);
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
        Ok(Some(Found {
            io: TraceIo {
                time_ns: record.time,
                sector,
                sectors,
                device,
                cpu,
                op,
                is_preflush,
                is_fua: record.has(record::FUA),
            },
            sequence: record.sequence,
            is_control: false,
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
    fn notification(&mut self, record: Record, data: &[u8]) {
        let words = (record.event == record::MESSAGE)
            .then(|| control(record.payload(data)))
            .flatten();
        match &mut self.dump {
            Some(dump) => dump.notice(record, words),
            None => self.words = words,
        }
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
