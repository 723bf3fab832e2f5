//! One file of a blktrace, and the requests that are found in it.

use super::dump::Dump;
use super::input::Input;
use super::lines::{Fault, control};
use super::record::{self, Plain, Record};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{ControlEvent, TraceIo, TraceOp};

/// Control events that are found at once; their text can be long.
const CONTROLS: usize = 16;
/// Pairs of device and processor whose numbers are followed, in a file of one processor and in a dump: powers of two.
const SEQUENCES: usize = 16;
const DUMP_SEQUENCES: usize = 1024;

/// Where an event belongs: time, processor, number on that processor, and the file.
pub(super) type Key = u128;

/// The low bits of a key, which the number of the file takes.
pub(super) const STREAM: Key = 0xffff;

/// A file that is read.
pub(super) struct Decoder {
    input: Input,
    is_lenient: bool,
    is_big: bool,
    number: u16,
    is_alone: bool,
    /// How many requests are found at once.
    ahead: usize,
    /// The key of what was found last.
    last: Key,
    finder: Finder,
    /// Why nothing more is found.
    fault: Option<Error>,
}

/// What was found in one go.
#[derive(Default)]
pub(super) struct Found {
    /// Requests; their device is the trace's number of it.
    pub(super) ios: Vec<TraceIo>,
    /// Theirs, which never go back; none of a file that is alone.
    pub(super) keys: Vec<Key>,
    pub(super) controls: Vec<(Key, ControlEvent)>,
    /// What is found later comes no earlier, in a file that is not alone.
    pub(super) until: Key,
    pub(super) is_last: bool,
    pub(super) is_truncated: bool,
    /// What to say of a compressed file that ended too early.
    pub(super) cut_warning: Option<String>,
    /// Records of no interest, bad ones, and those that are missing between others.
    pub(super) skipped: u64,
    pub(super) malformed: u64,
    pub(super) lost: u64,
    /// A device that got requests which were made to another one, and that one.
    pub(super) remap: Option<(u32, u32)>,
}

/// What a record is.
enum Event {
    Io(TraceIo),
    Control(ControlEvent),
    /// Nothing that a replay needs.
    Nothing,
}

/// What knows the meaning of records.
struct Finder {
    sequences: Box<[(u64, u32)]>,
    dump: Option<Dump>,
    found: Found,
}

impl Decoder {
    /// Of a file with this number among the files of processors, or of a `dump`. There are no others if it `is_alone`.
    pub(super) fn new(
        input: Input,
        (number, is_alone): (u16, bool),
        ahead: usize,
        dump: Option<Dump>,
        is_lenient: bool,
    ) -> Self {
        let sequences = match dump {
            Some(_) => DUMP_SEQUENCES,
            None => SEQUENCES,
        };
        Self {
            input,
            is_lenient,
            is_big: false,
            number,
            is_alone,
            ahead,
            last: 0,
            finder: Finder {
                sequences: vec![(u64::MAX, 0); sequences].into(),
                dump,
                found: Found::default(),
            },
            fault: None,
        }
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }

    /// The file's name, for messages.
    pub(super) fn name(&self) -> &str {
        self.input.name()
    }

    /// What comes may be still in the making.
    pub(super) fn is_live(&self) -> bool {
        self.input.is_live()
    }

    /// Exchanges what was found for room to find more.
    ///
    /// # Errors
    /// Whatever kept more from being found.
    pub(super) fn exchange(&mut self, found: &mut Found) -> Result<()> {
        std::mem::swap(&mut self.finder.found, found);
        self.fault.take().map_or(Ok(()), Err)
    }

    /// Finds what comes next.
    pub(super) fn find(&mut self) {
        self.finder.found.clear();
        self.fault = self.find_some().err();
        let Finder { dump, found, .. } = &mut self.finder;
        if let Some(dump) = dump {
            // Where they belong is found out by whoever puts all in order.
            let placed = dump.placed(found.is_last).map(|control| (0, control));
            found.controls.extend(placed);
        }
        found.until = self.last;
    }

    /// Finds something, or the end.
    fn find_some(&mut self) -> Result<()> {
        if self.input.offset() == 0 && self.input.want(4)? {
            self.is_big = record::is_big_endian(self.input.data()).unwrap_or(false);
        }
        while !self.has_enough() {
            match (self.is_big, self.is_alone) {
                (false, false) => self.find_whole::<false, false>()?,
                (false, true) => self.find_whole::<false, true>()?,
                (true, false) => self.find_whole::<true, false>()?,
                (true, true) => self.find_whole::<true, true>()?,
            }
            if !self.has_enough() {
                self.finder.found.is_last = !self.want_more()?;
            }
        }
        Ok(())
    }

    /// What was found is as much as is found at once, or the last. Of what may be still in the making it is whatever there is.
    fn has_enough(&self) -> bool {
        let found = &self.finder.found;
        let least = if self.is_live() { 1 } else { self.ahead };
        let most_controls = CONTROLS.min(least);
        found.is_last || found.ios.len() >= least || found.controls.len() >= most_controls
    }

    /// Finds those of the whole records that were read; with a key for each request, unless the file `IS_ALONE`.
    fn find_whole<const BIG: bool, const IS_ALONE: bool>(&mut self) -> Result<()> {
        let data = self.input.data();
        let finder = &mut self.finder;
        let mut ios = std::mem::take(&mut finder.found.ios);
        let mut keys = std::mem::take(&mut finder.found.keys);
        let (mut rest, mut fault, mut last) = (data, None, self.last);
        let mut is_looking = finder.is_looking();
        loop {
            while ios.len() < self.ahead
                && !is_looking
                && let Some((head, behind)) = rest.split_first_chunk()
                && let Some(plain) = Plain::of::<BIG>(head)
                && finder.is_next(plain)
            {
                if !IS_ALONE {
                    let cpu = plain.cpu as u16;
                    last = key(plain.time, cpu, plain.sequence, self.number).max(last);
                    keys.push(last);
                }
                ios.push(plain.io());
                rest = behind;
            }
            if ios.len() >= self.ahead || finder.found.controls.len() >= CONTROLS {
                break;
            }
            let Some(record) = Record::parse::<BIG>(rest) else {
                break;
            };
            let Some((whole, behind)) = rest.split_at_checked(record.len()) else {
                break;
            };
            let key = key(record.time, record.cpu as u16, record.sequence, self.number).max(last);
            match finder.judge(record, whole) {
                Ok(Event::Io(io)) => {
                    ios.push(io);
                    if !IS_ALONE {
                        keys.push(key);
                    }
                    last = key;
                }
                Ok(Event::Control(control)) => {
                    finder.found.controls.push((key, control));
                    last = key;
                }
                Ok(Event::Nothing) => finder.found.skipped += 1,
                Err(found) => fault = Some((data.len() - rest.len(), found)),
            }
            is_looking = finder.is_looking();
            rest = behind;
            if fault.is_some() {
                break;
            }
        }
        (finder.found.ios, finder.found.keys, self.last) = (ios, keys, last);
        let used = data.len() - rest.len();
        if let Some((at, fault)) = fault {
            self.malformed(self.input.offset() + at as u64, fault)?;
        }
        self.input.consume(used);
        Ok(())
    }

    /// Reads on, where there is not enough in what was read. False at the end.
    fn want_more(&mut self) -> Result<bool> {
        let data = self.input.data();
        let record = match self.is_big {
            true => Record::parse::<true>(data),
            false => Record::parse::<false>(data),
        };
        match record {
            // Those before it ended with a bad one.
            Some(record) if data.len() >= record.len() => Ok(true),
            Some(record) => {
                let is_whole = self.input.want(record.len())?;
                self.finder.found.is_truncated |= !is_whole;
                self.finder.found.cut_warning = self.input.cut_warning();
                Ok(is_whole)
            }
            None if data.len() >= record::V8 => {
                self.bad("no record of a blktrace")?;
                Ok(true)
            }
            None => Ok(self.input.fill()? || self.last_bytes()?),
        }
    }

    /// Judges what is left where nothing follows, less than a record of version 8. False if it is the end.
    #[cold]
    fn last_bytes(&mut self) -> Result<bool> {
        let left = self.input.data().len();
        if left >= record::V7 && record::is_big_endian(self.input.data()) != Some(self.is_big) {
            self.bad("no record of a blktrace")?;
            return Ok(true);
        }
        self.finder.found.is_truncated |= left > 0 || self.input.is_cut();
        self.finder.found.cut_warning = self.input.cut_warning();
        Ok(false)
    }

    /// An error, or with lenient reading a search for the next record.
    #[cold]
    fn bad(&mut self, fault: Fault) -> Result<()> {
        self.malformed(self.input.offset(), fault)?;
        let data = self.input.data();
        let next = (1..data.len() - 3).find(|&at| record::is_big_endian(&data[at..]).is_some());
        self.input.consume(next.unwrap_or(data.len() - 3));
        Ok(())
    }

    #[cold]
    fn malformed(&mut self, at: u64, fault: Fault) -> Result<()> {
        if self.is_lenient {
            self.finder.found.malformed += 1;
            return Ok(());
        }
        let message = format!("{}, record at byte {at}: {fault}", self.name());
        Err(Error::new(ErrorKind::InvalidDescription, message))
    }
}

fn key(time: u64, cpu: u16, sequence: u32, file: u16) -> Key {
    let own = u64::from(cpu) << 48 | u64::from(sequence) << 16 | u64::from(file);
    Key::from(time) << 64 | Key::from(own)
}

impl Found {
    /// Keeps nothing but the room.
    fn clear(&mut self) {
        self.ios.clear();
        self.keys.clear();
        self.controls.clear();
        *self = Self {
            ios: std::mem::take(&mut self.ios),
            keys: std::mem::take(&mut self.keys),
            controls: std::mem::take(&mut self.controls),
            ..Self::default()
        };
    }
}

impl Finder {
    /// What a record means. One that is passed on as it is stays in registers.
    #[inline(always)]
    fn judge(&mut self, record: Record, data: &[u8]) -> std::result::Result<Event, Fault> {
        let Ok(cpu) = u16::try_from(record.cpu) else {
            return Err("a processor above 65535");
        };
        if record.has(record::NOTIFY) {
            return Ok(self.notification(record, data));
        }
        self.follow(record);
        if let Some(dump) = &mut self.dump {
            dump.see(record);
        }
        if record.event != record::QUEUE || record.has(record::PASSTHROUGH) {
            if record.event == record::REMAP && self.found.remap.is_none() {
                self.remap(record, data);
            }
            return Ok(Event::Nothing);
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
                return Ok(Event::Nothing);
            }
            (op, sector) = (TraceOp::Flush, 0);
        } else if record.has(record::DISCARD) {
            op = TraceOp::Discard;
        }
        if sector > u64::MAX / 512 - sectors {
            return Err("it ends beyond what a device can have");
        }
        Ok(Event::Io(TraceIo {
            time_ns: record.time,
            sector,
            sectors,
            device: record.device,
            cpu,
            op,
            is_preflush,
            is_fua: record.has(record::FUA),
        }))
    }

    /// Every record has to be seen, for what it tells of the start of a dump.
    fn is_looking(&self) -> bool {
        self.dump.as_ref().is_some_and(Dump::is_looking)
    }

    /// True for a record that follows the one before of its processor and device.
    #[inline(always)]
    fn is_next(&mut self, plain: Plain) -> bool {
        let (known, last) = self.sequence(plain.device, plain.cpu);
        let is_next =
            *known == pair(plain.device, plain.cpu) && plain.sequence == last.wrapping_add(1);
        if is_next {
            *last = plain.sequence;
        }
        is_next
    }

    #[cold]
    fn notification(&mut self, record: Record, data: &[u8]) -> Event {
        let words = (record.event == record::MESSAGE)
            .then(|| control(record.payload(data)))
            .flatten();
        if let Some(dump) = &mut self.dump {
            dump.notice(record, words);
            return Event::Nothing;
        }
        let time_ns = record.time;
        words.map_or(Event::Nothing, |text| {
            Event::Control(ControlEvent { time_ns, text })
        })
    }

    /// Counts what is missing between two records of a processor.
    #[inline(always)]
    fn follow(&mut self, record: Record) {
        let key = pair(record.device, record.cpu);
        let (known, last) = self.sequence(record.device, record.cpu);
        let gap = match *known == key && record.sequence > *last {
            true => record.sequence - *last - 1,
            false => 0,
        };
        (*known, *last) = (key, record.sequence);
        self.found.lost = self.found.lost.saturating_add(gap.into());
    }

    /// The pair of device and processor that was met last of those that are kept in one place, and the number of its last record.
    #[inline(always)]
    fn sequence(&mut self, device: u32, cpu: u32) -> &mut (u64, u32) {
        let slot = (device ^ cpu) as usize & (self.sequences.len() - 1);
        &mut self.sequences[slot]
    }

    /// A request that came from another device: what was traced may be below the one of interest.
    #[cold]
    fn remap(&mut self, record: Record, data: &[u8]) {
        let from = record.payload(data).first_chunk::<4>();
        let from = from.map_or(0, |from| u32::from_be_bytes(*from));
        self.found.remap = Some((record.device, from));
    }
}

fn pair(device: u32, cpu: u32) -> u64 {
    u64::from(device) << 32 | u64::from(cpu)
}
