//! Binary blktrace: one file for each processor, read side by side, or a dump that blkparse made of them.

use std::{mem, slice};

use super::crew::Crew;
use super::decoder::{Decoder, Found, Key, STREAM};
use super::dump::Dump;
use super::input::Input;
use super::lane::{Lane, Lanes};
use super::lines::{BATCH, Fill, Sink};
use super::record;
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{ControlEvent, TraceIo};

/// Bytes of all files that are read at once, and of one of them at least and at most.
const AT_ONCE: usize = 256 << 10;
const LEAST_AT_ONCE: usize = 8 << 10;
const MOST_AT_ONCE: usize = 128 << 10;
/// Requests of a file that are merged at once at least.
const LEAST_MERGED: usize = 16;
/// Requests that a batch is not filled up beyond.
const ENOUGH: usize = BATCH / 2;
/// The number of a device that is one too many.
const NONE: u32 = u32::MAX;

/// Files of one or more devices and their processors.
pub(super) struct Blktrace {
    streams: Vec<Stream>,
    /// Those who read the files.
    crew: Crew<Lanes>,
    /// What comes may be still in the making.
    is_live: bool,
    sink: Sink,
    /// The keys of the requests that are merged.
    keys: Vec<Key>,
    /// Everything is merged up to here.
    merged: Key,
    /// Control events that were found and not taken.
    controls: Vec<(Key, ControlEvent)>,
    /// The device of the last request, by its number in the trace and by ours.
    device: Option<(u32, u32)>,
    has_remap: bool,
    is_lenient: bool,
}

/// One file, and what was found in it.
struct Stream {
    name: String,
    found: Found,
    /// Those of its requests that were taken.
    taken: usize,
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
        let share = AT_ONCE / inputs.len().max(1);
        let at_once = share.clamp(LEAST_AT_ONCE, MOST_AT_ONCE);
        Ok(Self::of(inputs, false, at_once, is_lenient))
    }

    /// Reads a dump, in which messages are out of place.
    pub(super) fn dump(input: Input, is_lenient: bool) -> Self {
        Self::of(vec![input], true, MOST_AT_ONCE, is_lenient)
    }

    fn of(inputs: Vec<Input>, is_dump: bool, at_once: usize, is_lenient: bool) -> Self {
        let stream = |input: &Input| Stream {
            name: input.name().into(),
            found: Found::default(),
            taken: 0,
        };
        let streams: Vec<_> = inputs.iter().map(stream).collect();
        let is_live = inputs.iter().any(Input::is_live);
        let is_alone = inputs.len() == 1;
        let lane = |(number, input): (u16, Input)| {
            let dump = is_dump.then(Dump::default);
            let decoder = Decoder::new(input.name().into(), (number, is_alone), dump, is_lenient);
            Lane::new(input, decoder, at_once)
        };
        let lanes = Lanes::new((0..).zip(inputs).map(lane).collect());
        // Whoever waits for a pipe waits on a thread of its own already.
        let threads = if is_live { 0 } else { 2 * streams.len() };
        Self {
            streams,
            crew: Crew::new(lanes, threads),
            is_live,
            sink: Sink::new(),
            keys: Vec::new(),
            merged: 0,
            controls: Vec::new(),
            device: None,
            has_remap: false,
            is_lenient,
        }
    }

    /// Something the reader of the report should know about the files.
    pub(super) fn warn(&mut self, warning: String) {
        self.sink.warn(warning);
    }

    /// Takes what is found up to where no file can have anything that comes before. False at the end of all.
    fn merge(&mut self) -> Result<bool> {
        let mut end = Key::MAX;
        // Whoever plays a batch looks up afterwards.
        let room = BATCH.saturating_sub(self.sink.batch.ios.len());
        let share = (room / self.streams.len().max(1)).max(LEAST_MERGED);
        for number in 0..self.streams.len() {
            if self.streams[number].is_used_up(self.merged) {
                self.find(number)?;
            }
            let Stream { found, taken, .. } = &self.streams[number];
            if !found.is_last {
                end = end.min(found.until);
            }
            if let Some(&key) = found.keys.get(taken + share) {
                end = end.min(key);
            }
        }
        self.keys.clear();
        for stream in &self.streams {
            self.keys.extend_from_slice(stream.keys_until(end));
        }
        self.keys.sort();
        let mut untaken: Vec<_> = self.streams.iter().map(Stream::untaken).collect();
        let ios = &mut self.sink.batch.ios;
        let first = ios.len();
        ios.extend(self.keys.iter().map(|key| {
            let io = untaken[(key & STREAM) as usize].next();
            io.expect("each key is of one")
        }));
        let left: Vec<_> = untaken.iter().map(|left| left.len()).collect();
        for (stream, left) in self.streams.iter_mut().zip(left) {
            stream.taken = stream.found.ios.len() - left;
        }
        self.name_devices(first)?;
        self.take_controls(end);
        self.merged = end;
        Ok(end != Key::MAX)
    }

    /// Takes what is found in the only file. False at its end.
    fn take_all(&mut self) -> Result<bool> {
        if self.streams[0].found.is_last {
            return Ok(false);
        }
        self.find(0)?;
        let found = &mut self.streams[0].found;
        let all = &mut self.sink.batch.ios;
        let first = all.len();
        // The vectors go round.
        match all.is_empty() {
            true => mem::swap(all, &mut found.ios),
            false => all.append(&mut found.ios),
        }
        found.ios.clear();
        let is_last = found.is_last;
        self.name_devices(first)?;
        self.take_controls(Key::MAX);
        Ok(!is_last)
    }

    /// Gives the devices of the requests from `first` on, which were found as `keys` says or all in the only file, our numbers instead of
    /// the trace's. Lenient reading leaves out requests of devices that are too many.
    fn name_devices(&mut self, first: usize) -> Result<()> {
        let mut ios = mem::take(&mut self.sink.batch.ios);
        let malformed = self.sink.notes.malformed;
        let mut found = ios[first..].iter_mut().enumerate();
        let named = found.try_for_each(|(at, io)| {
            io.device = match self.device {
                Some((known, index)) if known == io.device => index,
                _ => self.find_device(io.device, at)?,
            };
            Ok(())
        });
        if named.is_err() {
            ios.truncate(first);
        } else if self.sink.notes.malformed > malformed {
            ios.retain(|io| io.device != NONE);
        }
        self.sink.batch.ios = ios;
        named
    }

    /// Our number of a device, or [`NONE`]; `at` is the place of its request among those of `keys`.
    #[cold]
    fn find_device(&mut self, device: u32, at: usize) -> Result<u32> {
        let name = || record::device_name(device);
        match self.sink.devices.index(&device.to_le_bytes(), name) {
            Ok(index) => {
                self.device = Some((device, index));
                Ok(index)
            }
            Err(_) if self.is_lenient => {
                self.sink.notes.malformed += 1;
                Ok(NONE)
            }
            Err(fault) => {
                let number = self.keys.get(at).map_or(0, |key| key & STREAM);
                let message = format!("{}: {fault}", self.streams[number as usize].name);
                Err(Error::new(ErrorKind::InvalidDescription, message))
            }
        }
    }

    /// Gets what comes next in a file.
    fn find(&mut self, number: usize) -> Result<()> {
        let stream = &mut self.streams[number];
        stream.taken = 0;
        self.crew.take(|lanes| {
            let lane = lanes.get(number);
            lane.exchange(&mut stream.found).then_some(())
        })?;
        if let Some(fault) = stream.found.fault.take() {
            return Err(fault);
        }
        self.note(number);
        Ok(())
    }

    /// Takes what was found beside requests.
    fn note(&mut self, number: usize) {
        let found = &mut self.streams[number].found;
        let notes = &mut self.sink.notes;
        notes.skipped += found.skipped;
        notes.malformed += found.malformed;
        notes.lost = notes.lost.saturating_add(found.lost);
        notes.is_truncated |= found.is_truncated;
        notes.warnings.extend(found.end_warning.take());
        self.controls.append(&mut found.controls);
        if let Some((device, from)) = found.remap
            && !mem::replace(&mut self.has_remap, true)
        {
            let (device, from) = (record::device_name(device), record::device_name(from));
            self.sink.warn(below(&device, &from));
        }
    }

    /// Takes the control events up to and with `end`.
    fn take_controls(&mut self, end: Key) {
        self.controls.sort_by_key(|&(key, _)| key);
        let taken = self.controls.partition_point(|&(key, _)| key <= end);
        let taken = self.controls.drain(..taken).map(|(_, control)| control);
        self.sink.batch.controls.extend(taken);
    }
}

impl Fill for Blktrace {
    fn sink(&self) -> &Sink {
        &self.sink
    }

    fn sink_mut(&mut self) -> &mut Sink {
        &mut self.sink
    }

    fn fill(&mut self) -> Result<()> {
        while self.sink.has_room(ENOUGH) {
            let has_more = match self.streams.len() {
                1 => self.take_all()?,
                _ => self.merge()?,
            };
            if !has_more || self.is_live && !self.sink.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

impl Stream {
    /// All that was found is taken, what there may be more comes after it, and everything up to there is `merged`: of a file that is
    /// ahead of the others nothing more is held.
    fn is_used_up(&self, merged: Key) -> bool {
        let found = &self.found;
        self.taken == found.ios.len() && !found.is_last && found.until <= merged
    }

    /// The requests that were found and not taken.
    fn untaken(&self) -> slice::Iter<'_, TraceIo> {
        self.found.ios[self.taken..].iter()
    }

    /// Keys of the requests that were found and not taken, up to and with `end`.
    fn keys_until(&self, end: Key) -> &[Key] {
        let keys = &self.found.keys[self.taken..];
        &keys[..keys.partition_point(|&key| key <= end)]
    }
}

/// The warning that a device gets requests from another one.
pub(super) fn below(device: &str, from: &str) -> String {
    format!(
        "{device} got requests that were made to {from}: if that is the thin device, {device} is below it and its sectors are not the \
         thin device's"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::event::{Batch, TraceNotes, TraceReader};
    use crate::replay::trace::resort::Resort;
    use std::io::Cursor;

    type All = (Vec<TraceIo>, Vec<ControlEvent>, TraceNotes, Option<String>);

    fn all(files: &[Vec<u8>], at_once: usize, is_dump: bool, is_lenient: bool) -> All {
        let input = |bytes: &Vec<u8>| {
            let from = Cursor::new(bytes.clone());
            Input::new("t".into(), Box::new(from))
        };
        let inputs = files.iter().map(input).collect();
        let mut reader = Resort::new(Blktrace::of(inputs, is_dump, at_once, is_lenient));
        let (mut ios, mut controls, mut batch) = (Vec::new(), Vec::new(), Batch::default());
        let error = loop {
            let more = reader.read(&mut batch);
            ios.append(&mut batch.ios);
            controls.append(&mut batch.controls);
            match more {
                Ok(true) => {}
                Ok(false) => break None,
                Err(e) => break Some(e.to_string()),
            }
        };
        (ios, controls, reader.notes().clone(), error)
    }

    /// A file of a processor: requests, and now and then a message, a payload of any length, or something missing.
    fn file(cpu: u32, records: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for at in 0..records {
            let odd = at.wrapping_mul(0x9e37_79b1) >> 8;
            let message = format!("ctl phase-end {at}");
            let (action, payload) = match odd % 31 {
                0 => (1 << 26 | 2, message.into_bytes()),
                1 => (1 << 17 | 7, vec![0x65; (odd >> 8) as usize % 70]),
                2 => (1 << 17 | 1, vec![7; (odd >> 8) as usize % 9000]),
                3 => (1 << 18 | 1 << 17 | 1, Vec::new()),
                _ => ((1 + odd % 2) << 16 | 1, Vec::new()),
            };
            let missing = u32::from(odd % 97 == 5);
            let words = [0x6561_7407, at + missing, at * 50 + cpu, 0, odd, 0, 4096];
            let more = [action, 9, 0x00fd_0000 + odd % 3, cpu];
            let words = words.iter().chain(&more);
            bytes.extend(words.flat_map(|word| word.to_le_bytes()));
            // The last word is an error and the length of the payload.
            bytes.extend(((payload.len() as u32) << 16).to_le_bytes());
            bytes.extend(payload);
        }
        bytes
    }

    #[test]
    fn messages_of_a_file_that_is_ahead_are_not_held() {
        let record = |at: u32, time: u32, action: u32, payload: &[u8]| {
            let words = [0x6561_7407, at, time, 0, 8, 0, 4096, action, 9, 1 << 20, 0];
            let last = (payload.len() as u32) << 16;
            let words = words.into_iter().chain([last]);
            let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
            bytes.extend(payload);
            bytes
        };
        let message = |at| record(at, 1 << 30 | at, 1 << 26 | 2, b"ctl phase-end far");
        let requests: Vec<u8> = (0..20_000)
            .flat_map(|at| record(at, at, 1 << 16 | 1, b""))
            .collect();
        let messages: Vec<u8> = (0..20_000).flat_map(message).collect();
        let input = |bytes| Input::new("t".into(), Box::new(Cursor::new(bytes)));
        let inputs = vec![input(messages), input(requests)];
        let mut reader = Blktrace::of(inputs, false, LEAST_AT_ONCE, false);
        let (mut ios, mut controls, mut held) = (0, 0, 0);
        let mut batch = Batch::default();
        while reader.read(&mut batch).expect("sound") {
            (ios, controls) = (ios + batch.ios.len(), controls + batch.controls.len());
            held = held.max(reader.controls.len());
        }
        assert_eq!((ios, controls), (20_000, 20_000));
        assert!(held < 1000, "{held}");
    }

    #[test]
    fn what_is_found_does_not_depend_on_how_the_bytes_come() {
        let sound = [file(0, 3000), file(1, 2500)];
        let cut = [sound[0][..sound[0].len() - 5].to_vec(), sound[1].clone()];
        let mut bad = sound.clone();
        let middle = bad[0].len() / 2;
        bad[0][middle..middle + 100_000].fill(3);
        for files in [&sound, &cut, &bad] {
            for (is_dump, is_lenient) in
                [(false, false), (false, true), (true, false), (true, true)]
            {
                let files = if is_dump { &files[..1] } else { &files[..] };
                let whole = all(files, MOST_AT_ONCE, is_dump, is_lenient);
                assert!(whole.0.len() > 1000 || whole.3.is_some());
                for at_once in [50, 1000, 9000] {
                    let parts = all(files, at_once, is_dump, is_lenient);
                    // What was found before an error is not all of it.
                    if whole.3.is_none() {
                        assert!(parts.0 == whole.0, "{at_once} {is_dump} {is_lenient}");
                        assert_eq!((&parts.1, &parts.2), (&whole.1, &whole.2), "{at_once}");
                    }
                    assert_eq!(parts.3, whole.3, "{at_once} {is_dump}");
                }
            }
        }
    }
}
