//! Splits a trace of many volumes into an event file for each, in one pass.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use zstd::bulk::Compressor;

use super::event::{Batch, TraceIo, TraceOp, TraceReader};
use super::manifest::{self, FLEET_SCHEMA, Volume};
use super::trace::events;
use crate::error::{Error, Result};
use crate::io::make_empty_folder;
use crate::observer::Observer;

/// Bytes of events that are held, of all volumes. The more there are, the larger the pieces of a volume that are compressed by
/// themselves: 13 KiB if 5000 volumes take turns.
const HELD: usize = 64 << 20;
/// The largest such piece.
const FRAME: usize = 1 << 20;
const LEVEL: i32 = 1;

/// Splits what `reader` has into files in `folder`, which is made, or is empty: an event file for each volume, compressed with zstd, one
/// for control events if there are any, and last the manifest. Memory and open files are bounded, however many volumes there are. After an error
/// or a crash there is no manifest.
///
/// # Errors
/// `Unsuitable` if the folder has anything in it; those of the reader; `Io`; `Interrupted`.
pub fn split(
    reader: &mut dyn TraceReader,
    folder: &Path,
    observer: &dyn Observer,
) -> Result<Vec<Volume>> {
    make_empty_folder(folder)?;
    let mut splitter = Splitter {
        folder,
        parts: Vec::new(),
        controls: None,
        held: 0,
    };
    let done = splitter.run(reader, observer);
    if done.is_err() {
        // What went wrong is the error to tell; a file that stays is found by the next run.
        for part in splitter.all().filter(|part| part.is_made) {
            let _ = fs::remove_file(&part.path);
        }
    }
    done
}

struct Splitter<'a> {
    folder: &'a Path,
    /// By the index of the trace's device.
    parts: Vec<Part>,
    controls: Option<Part>,
    /// Bytes in the buffers of all of them.
    held: usize,
}

/// An event file that is being written.
struct Part {
    path: PathBuf,
    is_made: bool,
    buffer: Vec<u8>,
    volume: Volume,
}

impl Part {
    fn new(folder: &Path, file: String, device: &str) -> Self {
        let mut buffer = Vec::new();
        events::header(&mut buffer, device);
        Self {
            path: folder.join(&file),
            is_made: false,
            buffer,
            volume: Volume {
                schema: FLEET_SCHEMA.into(),
                volume: device.into(),
                files: vec![file],
                events: 0,
                reads: 0,
                writes: 0,
                discards: 0,
                flushes: 0,
                bytes_read: 0,
                bytes_written: 0,
                first_ns: u64::MAX,
                last_ns: 0,
                end_sector: 0,
                file_bytes: 0,
            },
        }
    }

    #[inline]
    fn take(&mut self, io: &TraceIo) {
        events::request(&mut self.buffer, io);
        let volume = &mut self.volume;
        let bytes = io.sectors.saturating_mul(512);
        match io.op {
            TraceOp::Read => {
                volume.reads += 1;
                volume.bytes_read = volume.bytes_read.saturating_add(bytes);
            }
            TraceOp::Write | TraceOp::WriteZeroes => {
                volume.writes += 1;
                volume.bytes_written = volume.bytes_written.saturating_add(bytes);
            }
            TraceOp::Discard => volume.discards += 1,
            TraceOp::Flush => volume.flushes += 1,
        }
        volume.events += 1;
        volume.first_ns = volume.first_ns.min(io.time_ns);
        volume.last_ns = volume.last_ns.max(io.time_ns);
        volume.end_sector = volume.end_sector.max(io.sector.saturating_add(io.sectors));
    }

    /// Appends compressed pieces to the file, which is made by the first ones.
    fn append(&mut self, frames: &[Vec<u8>]) -> io::Result<()> {
        let mut file = File::options()
            .append(true)
            .create_new(!self.is_made)
            .open(&self.path)?;
        self.is_made = true;
        for frame in frames {
            file.write_all(frame)?;
            self.volume.file_bytes += frame.len() as u64;
        }
        Ok(())
    }
}

impl Splitter<'_> {
    fn all(&mut self) -> impl Iterator<Item = &mut Part> {
        self.parts.iter_mut().chain(&mut self.controls)
    }

    fn run(
        &mut self,
        reader: &mut dyn TraceReader,
        observer: &dyn Observer,
    ) -> Result<Vec<Volume>> {
        let mut batch = Batch::default();
        while reader.read(&mut batch)? {
            observer.check_cancelled()?;
            if let Some((done, total)) = reader.progress() {
                observer.progress("", done, total);
            }
            self.take(&batch, reader.devices());
            if self.held >= HELD {
                self.write(HELD / 2)?;
            }
        }
        for part in self.all() {
            let events = part.volume.events;
            events::end(&mut part.buffer, events);
        }
        self.write(0)?;
        let sync = File::open(self.folder).and_then(|folder| Ok(rustix::fs::syncfs(folder)?));
        sync.map_err(|e| Error::io(format!("cannot sync {}", self.folder.display()), e))?;
        let controls = self.controls.take();
        let beside = controls.map(|part| part.volume.files).unwrap_or_default();
        let mut volumes: Vec<Volume> = self.parts.iter().map(|part| part.volume.clone()).collect();
        for volume in &mut volumes {
            volume.files.extend_from_slice(&beside);
        }
        manifest::write(self.folder, &volumes)?;
        Ok(volumes)
    }

    fn take(&mut self, batch: &Batch, devices: &[String]) {
        for device in &devices[self.parts.len()..] {
            let file = manifest::file_name(self.parts.len(), device);
            self.parts.push(Part::new(self.folder, file, device));
        }
        for io in &batch.ios {
            self.parts[io.device as usize].take(io);
        }
        for event in &batch.controls {
            let make = || Part::new(self.folder, manifest::control_file_name(), "");
            let part = self.controls.get_or_insert_with(make);
            events::control(&mut part.buffer, event);
            part.volume.events += 1;
            self.held += event.text.len();
        }
        self.held += events::RECORD * (batch.ios.len() + batch.controls.len());
    }

    /// Writes out the largest buffers, until no more than `most` bytes are held.
    fn write(&mut self, most: usize) -> Result<()> {
        let mut held = self.held;
        let mut chosen: Vec<&mut Part> = self.all().collect();
        chosen.sort_by_key(|part| Reverse(part.buffer.len()));
        chosen.retain(|part| {
            let is_chosen = held > most || most == 0;
            held = held.saturating_sub(if is_chosen { part.buffer.len() } else { 0 });
            is_chosen
        });
        let pieces = chosen.iter().flat_map(|part| part.buffer.chunks(FRAME));
        let pieces: Vec<&[u8]> = pieces.collect();
        let frames = pieces.par_iter().map_init(compressor, |compressor, piece| {
            let compressor = compressor.as_mut().map_err(|e| io::Error::from(e.kind()))?;
            compressor.compress(piece)
        });
        let frames: io::Result<Vec<Vec<u8>>> = frames.collect();
        let frames = frames.map_err(|e| Error::io("cannot compress events", e))?;
        let mut frames = frames.as_slice();
        for part in chosen {
            let (own, others) = frames.split_at(part.buffer.len().div_ceil(FRAME));
            part.append(own)
                .map_err(|e| Error::io(format!("cannot write {}", part.path.display()), e))?;
            part.buffer = Vec::new();
            frames = others;
        }
        self.held = held;
        Ok(())
    }
}

fn compressor() -> io::Result<Compressor<'static>> {
    let mut compressor = Compressor::new(LEVEL)?;
    compressor.include_checksum(true)?;
    Ok(compressor)
}
