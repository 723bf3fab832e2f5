//! Direct I/O: data moves between memory and the device itself, past the page cache, in whole units of the device.
//!
//! 1. What is no whole unit, or lies in memory that is not aligned, goes through memory of our own.
//! 2. A unit of which a part is written is read, changed and written back while nobody else writes: a write of its other part would be undone.
//! 3. Many at once go through an io_uring ([`Ring`]); where the kernel has none, each needs a thread.

use super::ring::{Flight, Ring};
use crate::io::AlignedBuffer;
use crate::units::BLOCK_SIZE;
use rustix::fs::{AtFlags, StatxFlags, statx};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that are moved at once through memory of our own.
const CHUNK: usize = 1 << 20;

/// Writes of whole units, which may be many, and of parts, which are alone.
#[derive(Debug, Default)]
struct Turns {
    state: Mutex<Turn>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Turn {
    whole: usize,
    /// A part is written, or waits until nothing else is.
    has_part: bool,
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, Turn> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_whole(&self, writes: usize) {
        let waited = self.changed.wait_while(self.state(), |turn| turn.has_part);
        waited.unwrap_or_else(PoisonError::into_inner).whole += writes;
    }

    fn end_whole(&self) {
        let mut turn = self.state();
        turn.whole -= 1;
        if turn.whole == 0 && turn.has_part {
            drop(turn);
            self.changed.notify_all();
        }
    }

    fn alone<T>(&self, write: impl FnOnce() -> T) -> T {
        let waited = self.changed.wait_while(self.state(), |turn| turn.has_part);
        let mut turn = waited.unwrap_or_else(PoisonError::into_inner);
        turn.has_part = true;
        let waited = self.changed.wait_while(turn, |turn| turn.whole > 0);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        let written = write();
        self.state().has_part = false;
        self.changed.notify_all();
        written
    }
}

/// How a file that was opened with O_DIRECT is used.
#[derive(Debug)]
pub(super) struct Direct {
    /// Bytes: ranges and memory are multiples of it.
    unit: usize,
    turns: Arc<Turns>,
    ring: Option<Ring>,
}

impl Direct {
    /// Finds out what the file wants, and starts an io_uring if it can be had.
    ///
    /// # Errors
    /// `InvalidInput` if it takes no direct I/O after all, and other errors of a read.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let told = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let told = told.filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let unit = told.map_or(BLOCK_SIZE, |stat| {
            stat.stx_dio_offset_align.max(stat.stx_dio_mem_align) as usize
        });
        // Zero: it takes none. Memory of our own is aligned to blocks.
        if !unit.is_power_of_two() || unit > BLOCK_SIZE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let direct = Self {
            unit: unit.max(512),
            turns: Arc::default(),
            ring: Ring::start(file).ok(),
        };
        // Some take the flag and refuse every read.
        file.read_at(AlignedBuffer::new(1).blocks_mut(1), 0)?;
        Ok(direct)
    }

    /// True if it takes many requests at once without threads.
    pub(super) fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// True if a range is one of whole units.
    pub(super) fn is_whole(&self, byte: u64, len: usize) -> bool {
        byte.is_multiple_of(self.unit as u64) && len.is_multiple_of(self.unit)
    }

    /// Starts reads and writes of whole units together; without an io_uring they end here, one by one.
    pub(super) fn start_all(&self, file: &File, flights: Vec<Flight>) {
        let writes = flights.iter().filter(|flight| flight.is_write).count();
        if writes > 0 {
            self.turns.begin_whole(writes);
        }
        let flights = flights.into_iter().map(|flight| match flight.is_write {
            false => flight,
            true => {
                let (turns, ended) = (Arc::clone(&self.turns), flight.ended);
                Flight {
                    ended: Box::new(move |done, buffer| {
                        turns.end_whole();
                        ended(done, buffer);
                    }),
                    ..flight
                }
            }
        });
        match &self.ring {
            Some(ring) => ring.start_all(flights),
            None => flights.for_each(|flight| flight.end(file, 0)),
        }
    }

    /// The units that a range touches: first byte, and bytes.
    fn around(&self, byte: u64, len: usize) -> (u64, usize) {
        let begin = byte - byte % self.unit as u64;
        let end = (byte + len as u64).next_multiple_of(self.unit as u64);
        (begin, (end - begin) as usize)
    }

    fn is_aligned(&self, memory: &[u8], byte: u64) -> bool {
        memory.as_ptr().addr().is_multiple_of(self.unit) && self.is_whole(byte, memory.len())
    }

    /// Fills a buffer.
    pub(super) fn read(&self, file: &File, buffer: &mut [u8], byte: u64) -> io::Result<()> {
        if self.is_aligned(buffer, byte) {
            return file.read_exact_at(buffer, byte);
        }
        let mut at = byte;
        for part in buffer.chunks_mut(CHUNK) {
            let (begin, len) = self.around(at, part.len());
            let mut own = AlignedBuffer::new(len.div_ceil(BLOCK_SIZE));
            let own = &mut own.blocks_mut(len.div_ceil(BLOCK_SIZE))[..len];
            file.read_exact_at(own, begin)?;
            part.copy_from_slice(&own[(at - begin) as usize..][..part.len()]);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes data by calls of `put`, which is given aligned memory and a place for all of it.
    pub(super) fn write(
        &self,
        file: &File,
        data: &[u8],
        byte: u64,
        put: impl Fn(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        if !self.is_whole(byte, data.len()) {
            return self.turns.alone(|| self.write_part(file, data, byte, put));
        }
        self.turns.begin_whole(1);
        let written = match self.is_aligned(data, byte) {
            true => put(data, byte),
            false => data.chunks(CHUNK).zip(0..).try_for_each(|(part, n)| {
                let mut own = AlignedBuffer::new(part.len().div_ceil(BLOCK_SIZE));
                let own = own.blocks_mut(part.len().div_ceil(BLOCK_SIZE));
                own[..part.len()].copy_from_slice(part);
                put(&own[..part.len()], byte + n * CHUNK as u64)
            }),
        };
        self.turns.end_whole();
        written
    }

    /// Writes data that begins or ends within a unit.
    fn write_part(
        &self,
        file: &File,
        data: &[u8],
        byte: u64,
        put: impl Fn(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut at = byte;
        for part in data.chunks(CHUNK) {
            let (begin, len) = self.around(at, part.len());
            let skip = (at - begin) as usize;
            let mut own = AlignedBuffer::new(len.div_ceil(BLOCK_SIZE));
            let own = &mut own.blocks_mut(len.div_ceil(BLOCK_SIZE))[..len];
            let last = len - self.unit;
            if skip > 0 {
                file.read_exact_at(&mut own[..self.unit], begin)?;
            }
            if skip + part.len() < len && (last > 0 || skip == 0) {
                file.read_exact_at(&mut own[last..], begin + last as u64)?;
            }
            own[skip..skip + part.len()].copy_from_slice(part);
            put(own, begin)?;
            at += part.len() as u64;
        }
        Ok(())
    }
}
