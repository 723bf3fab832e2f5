//! Binary blktrace: one file for each processor, read side by side, or a dump that blkparse made of them.

use std::{mem, slice};

use super::crew::Crew;
use super::decoder::{Decoder, Found, Key, STREAM};
use super::dump::Dump;
use super::input::Input;
use super::lines::{BATCH, Fill, Sink};
use super::record;
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{ControlEvent, TraceIo};

/// Requests that are found in all files together before they are merged, and in one of them at least and at most.
const AHEAD: usize = 16384;
const LEAST_AHEAD: usize = 16;
const MOST_AHEAD: usize = 8192;
/// The number of a device that is one too many.
const NONE: u32 = u32::MAX;

/// Files of one or more devices and their processors.
pub(super) struct Blktrace {
    streams: Vec<Stream>,
    /// Threads that decode the files; none where that is done as it is needed.
    crew: Option<Crew<Box<Decoder>>>,
    sink: Sink,
    /// The keys of the requests that are merged.
    keys: Vec<Key>,
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
    /// None while the crew has it.
    decoder: Option<Box<Decoder>>,
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
        let ahead = (AHEAD / inputs.len().max(1)).clamp(LEAST_AHEAD, MOST_AHEAD);
        let is_alone = inputs.len() == 1;
        let numbered = inputs.into_iter().zip(0..);
        let decoders = numbered.map(|(input, number)| {
            Decoder::new(input, (number, is_alone), ahead, None, is_lenient)
        });
        Ok(Self::of(decoders, is_lenient))
    }

    /// Reads a dump, in which messages are out of place.
    pub(super) fn dump(input: Input, is_lenient: bool) -> Self {
        let dump = Some(Dump::default());
        let decoder = Decoder::new(input, (0, true), MOST_AHEAD, dump, is_lenient);
        Self::of([decoder].into_iter(), is_lenient)
    }

    fn of(decoders: impl Iterator<Item = Decoder>, is_lenient: bool) -> Self {
        let decoders: Vec<_> = decoders.collect();
        // Whoever waits for a pipe waits on a thread of its own already.
        let crew = match decoders.iter().any(Decoder::is_live) {
            true => None,
            false => Crew::new(decoders.len(), |decoder: &mut Box<Decoder>| decoder.find()),
        };
        let mut this = Self {
            streams: decoders.into_iter().map(Stream::new).collect(),
            crew,
            sink: Sink::new(),
            keys: Vec::new(),
            controls: Vec::new(),
            device: None,
            has_remap: false,
            is_lenient,
        };
        if let Some(crew) = &this.crew {
            let all = this
                .streams
                .iter_mut()
                .filter_map(|stream| stream.decoder.take());
            all.for_each(|decoder| crew.give(decoder));
        }
        this
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
        let share = (room / self.streams.len().max(1)).max(LEAST_AHEAD);
        for number in 0..self.streams.len() {
            if self.streams[number].is_used_up() {
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
        while let Some(crew) = &self.crew
            && self.streams[number].decoder.is_none()
        {
            let decoder = crew.take()?;
            let number = usize::from(decoder.number());
            self.streams[number].decoder = Some(decoder);
        }
        let stream = &mut self.streams[number];
        if self.crew.is_none()
            && let Some(decoder) = &mut stream.decoder
        {
            decoder.find();
        }
        if let Some(decoder) = &mut stream.decoder {
            decoder.exchange(&mut stream.found)?;
        }
        stream.taken = 0;
        if !stream.found.is_last
            && let Some(crew) = &self.crew
            && let Some(decoder) = stream.decoder.take()
        {
            crew.give(decoder);
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
        notes.warnings.extend(found.cut_warning.take());
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
        let mut has_more = true;
        while has_more && !self.sink.is_full() {
            has_more = match self.streams.len() {
                1 => self.take_all()?,
                _ => self.merge()?,
            };
        }
        Ok(())
    }
}

impl Stream {
    fn new(decoder: Decoder) -> Self {
        Self {
            name: decoder.name().into(),
            decoder: Some(Box::new(decoder)),
            found: Found::default(),
            taken: 0,
        }
    }

    /// All that was found is taken, and there may be more.
    fn is_used_up(&self) -> bool {
        self.taken == self.found.ios.len() && !self.found.is_last
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
