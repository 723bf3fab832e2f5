//! What the bytes of a blktrace mean: requests, and what is told beside them.

use std::mem;

use super::dump::Dump;
use super::lane::{End, Stretch};
use super::lines::{Fault, control};
use super::record::{self, Plain, Record};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{ControlEvent, TraceIo, TraceOp};

/// Pairs of device and processor whose numbers are followed, in a file of one processor and in a dump: powers of two.
const SEQUENCES: usize = 16;
const DUMP_SEQUENCES: usize = 1024;

/// Where an event belongs: time, processor, number on that processor, and the file.
pub(super) type Key = u128;

/// The low bits of a key, which the number of the file takes.
pub(super) const STREAM: Key = 0xffff;

/// What knows what the bytes of a file mean.
pub(super) struct Decoder {
    name: String,
    is_lenient: bool,
    is_big: bool,
    number: u16,
    is_alone: bool,
    /// Where in the file that begins which was not understood yet, and what there is of it: a record that is not whole.
    offset: u64,
    rest: Vec<u8>,
    /// What comes up to the next record was found to be none.
    is_lost: bool,
    /// The key of what was found last.
    last: Key,
    finder: Finder,
}

/// What was found in a stretch of a file.
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
    /// Why it is the last, if not for the end of the file.
    pub(super) fault: Option<Error>,
    pub(super) is_truncated: bool,
    /// What to say of a compressed file that ended too early, or goes on with something else.
    pub(super) end_warning: Option<String>,
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
        name: String,
        (number, is_alone): (u16, bool),
        dump: Option<Dump>,
        is_lenient: bool,
    ) -> Self {
        let sequences = match dump {
            Some(_) => DUMP_SEQUENCES,
            None => SEQUENCES,
        };
        Self {
            name,
            is_lenient,
            is_big: false,
            number,
            is_alone,
            offset: 0,
            rest: Vec::new(),
            is_lost: false,
            last: 0,
            finder: Finder {
                // Pairs that belong in other places are none that is met.
                sequences: (0..sequences as u32)
                    .map(|slot| (pair(0, slot ^ 1), 0))
                    .collect(),
                dump,
                found: Found::default(),
            },
        }
    }

    /// Finds what there is in the next stretch of the file; of `found` only the room is used.
    pub(super) fn find(&mut self, stretch: &mut Stretch, found: Found) -> Found {
        self.finder.found = found.cleared();
        stretch.put_before(&self.rest);
        let mut rest = stretch.data();
        let done = self.find_all(&mut rest, stretch.end.as_ref());
        self.rest.clear();
        self.rest.extend_from_slice(rest);
        let mut found = mem::take(&mut self.finder.found);
        let failed = stretch.end.as_mut().and_then(|end| end.failed.take());
        found.is_last = stretch.end.is_some() || done.is_err();
        found.fault = done.err().or(failed);
        if let Some(dump) = &mut self.finder.dump {
            // Where they belong is found out by whoever puts all in order.
            let placed = dump.placed(found.is_last).map(|control| (0, control));
            found.controls.extend(placed);
        }
        found.until = self.last;
        found
    }

    /// Finds what there is in `data`, and leaves what goes on beyond its end.
    fn find_all(&mut self, data: &mut &[u8], end: Option<&End>) -> Result<()> {
        if self.offset == 0 && data.len() >= 4 {
            self.is_big = record::is_big_endian(data).unwrap_or(false);
        }
        loop {
            match (self.is_big, self.is_alone) {
                (false, false) => self.find_whole::<false, false>(data)?,
                (false, true) => self.find_whole::<false, true>(data)?,
                (true, false) => self.find_whole::<true, false>(data)?,
                (true, true) => self.find_whole::<true, true>(data)?,
            }
            let record = match self.is_big {
                true => Record::parse::<true>(data),
                false => Record::parse::<false>(data),
            };
            // A header of version 8, or of another byte order, may be no record where one of version 7 would be whole.
            let is_bad = match end {
                _ if record.is_some() => false,
                None => data.len() >= record::V8,
                Some(_) => {
                    data.len() >= record::V8
                        || data.len() >= record::V7
                            && record::is_big_endian(data) != Some(self.is_big)
                }
            };
            if is_bad {
                self.search(data)?;
                continue;
            }
            if let Some(end) = end {
                let found = &mut self.finder.found;
                found.is_truncated = !data.is_empty() || end.is_cut;
                found.end_warning.clone_from(&end.end_warning);
            }
            return Ok(());
        }
    }

    /// Finds the whole records that `data` begins with; with a key for each request, unless the file `IS_ALONE`.
    fn find_whole<const BIG: bool, const IS_ALONE: bool>(
        &mut self,
        data: &mut &[u8],
    ) -> Result<()> {
        let finder = &mut self.finder;
        let mut ios = mem::take(&mut finder.found.ios);
        let mut keys = mem::take(&mut finder.found.keys);
        let (mut rest, mut last) = (*data, self.last);
        let (mut fault, mut skipped) = (None, 0);
        let mut is_looking = finder.is_looking();
        loop {
            while !is_looking
                && let Some((head, behind)) = rest.split_first_chunk()
                && let Some(plain) = Plain::of::<BIG>(head)
                && finder.is_next(plain)
            {
                rest = behind;
                if !plain.is_request {
                    skipped += 1;
                    continue;
                }
                if !IS_ALONE {
                    let cpu = plain.cpu as u16;
                    last = key(plain.time, cpu, plain.sequence, self.number).max(last);
                    keys.push(last);
                }
                ios.push(plain.io());
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
                Err(_) if self.is_lenient => finder.found.malformed += 1,
                Err(found) => {
                    fault = Some(found);
                    break;
                }
            }
            is_looking = finder.is_looking();
            rest = behind;
        }
        (finder.found.ios, finder.found.keys, self.last) = (ios, keys, last);
        finder.found.skipped += skipped;
        self.offset += (data.len() - rest.len()) as u64;
        self.is_lost &= data.len() == rest.len();
        *data = rest;
        fault.map_or(Ok(()), |fault| Err(self.malformed(fault)))
    }

    /// An error, or with lenient reading a search for the next record; nothing but the first of what is passed over counts.
    #[cold]
    fn search(&mut self, data: &mut &[u8]) -> Result<()> {
        if !self.is_lenient {
            return Err(self.malformed("no record of a blktrace"));
        }
        self.finder.found.malformed += u64::from(!mem::replace(&mut self.is_lost, true));
        let next = (1..data.len() - 3).find(|&at| record::is_big_endian(&data[at..]).is_some());
        let next = next.unwrap_or(data.len() - 3);
        self.offset += next as u64;
        *data = &data[next..];
        Ok(())
    }

    #[cold]
    fn malformed(&self, fault: Fault) -> Error {
        let message = format!("{}, record at byte {}: {fault}", self.name, self.offset);
        Error::new(ErrorKind::InvalidDescription, message)
    }
}

fn key(time: u64, cpu: u16, sequence: u32, file: u16) -> Key {
    let own = u64::from(cpu) << 48 | u64::from(sequence) << 16 | u64::from(file);
    Key::from(time) << 64 | Key::from(own)
}

impl Found {
    /// Nothing but the room.
    fn cleared(mut self) -> Self {
        self.ios.clear();
        self.keys.clear();
        self.controls.clear();
        Self {
            ios: self.ios,
            keys: self.keys,
            controls: self.controls,
            ..Self::default()
        }
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
