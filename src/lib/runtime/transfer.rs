//! A client's request while parts of it are with the worker: its data, and what is to be told when the last part has ended.

use super::buffers;
use super::data_device::{DataDevice, SECTOR};
use super::thin_export::ThinExport;
use crate::io::AlignedBuffer;
use crate::pool::{Bio, BioError, BioResult, Op};
use crate::units::BLOCK_SIZE;
use rustix::io::Errno;
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Parts of one request that are under way at once.
const MOST_PARTS: usize = 1024;

/// Told how a request went; a read brings its data.
pub(super) type Told = Box<dyn FnOnce(Result<Vec<u8>, BioError>) + Send>;

/// What a part of a request moves.
#[derive(Clone, Debug)]
pub(super) enum Payload {
    /// Nothing: a flush, or a discard.
    Nothing,
    /// These bytes of the request's buffer.
    Buffer(Range<usize>),
    /// This many zeros.
    Zeros(u64),
}

struct State {
    /// Parts that have not ended, and one for whoever still adds some.
    left: usize,
    result: BioResult,
    /// Filled by the parts of a read.
    buffer: Vec<u8>,
    told: Option<Told>,
    /// Somebody waits for parts to end.
    is_awaited: bool,
}

/// A request of which parts are under way.
pub(super) struct Transfer {
    /// What a write writes.
    data: Vec<u8>,
    state: Mutex<State>,
    has_ended: Condvar,
    /// Open until the last part has ended.
    _thin: Arc<ThinExport>,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        buffers::give(std::mem::take(&mut self.data));
    }
}

impl Transfer {
    /// Of a read that fills `buffer`, or of a write of `data`. Whoever makes it [ends](Self::end) it once when it has added its parts.
    pub(super) fn new(
        thin: &Arc<ThinExport>,
        buffer: Vec<u8>,
        data: Vec<u8>,
        told: Told,
    ) -> Arc<Self> {
        Arc::new(Self {
            data,
            state: Mutex::new(State {
                left: 1,
                result: Ok(()),
                buffer,
                told: Some(told),
                is_awaited: false,
            }),
            has_ended: Condvar::new(),
            _thin: Arc::clone(thin),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a write writes.
    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }

    /// Has `fill` put bytes into the buffer of a read.
    pub(super) fn fill<T>(&self, fill: impl FnOnce(&mut [u8]) -> T) -> T {
        fill(&mut self.state().buffer)
    }

    /// True once a part has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.state().result.is_err()
    }

    /// One more part is under way.
    pub(super) fn begin(&self) {
        self.state().left += 1;
    }

    /// True while so many parts are under way that one more has to wait.
    pub(super) fn is_full(&self) -> bool {
        self.state().left > MOST_PARTS
    }

    /// Waits while many parts are under way, so that a request of any size takes so much memory only.
    pub(super) fn wait_for_room(&self) {
        let is_full = |state: &mut State| {
            state.is_awaited = state.left > MOST_PARTS;
            state.is_awaited
        };
        let waited = self.has_ended.wait_while(self.state(), is_full);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// A part has ended. The first error is the request's.
    pub(super) fn end(&self, result: BioResult) {
        let mut state = self.state();
        state.result = state.result.and(result);
        state.left -= 1;
        if state.is_awaited {
            self.has_ended.notify_all();
        }
        if state.left > 0 {
            return;
        }
        let told = state.told.take();
        let buffer = std::mem::take(&mut state.buffer);
        let result = state.result;
        drop(state);
        if let Some(told) = told {
            told(result.map(|()| buffer));
        }
    }
}

/// A part of a request that the worker has.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) transfer: Arc<Transfer>,
    pub(super) payload: Payload,
    /// Bytes of the first sector that it leaves out.
    pub(super) skip: u64,
}

impl Part {
    /// Moves its data, to or from a device on which it begins at `sector`.
    pub(super) fn carry_out(&self, bio: &Bio, device: &DataDevice, sector: u64) -> BioResult {
        let byte = sector * SECTOR + self.skip;
        let done = match (bio.op, &self.payload) {
            (Op::Flush, _) => device.flush(),
            (Op::Read, Payload::Buffer(range)) => {
                let mut own = vec![0; range.len()];
                let read = device.read(&mut own, byte);
                self.transfer
                    .fill(|all| all[range.clone()].copy_from_slice(&own));
                read
            }
            (Op::Write, Payload::Buffer(range)) => {
                let data = &self.transfer.data()[range.clone()];
                // What fills a new block is flushed by the commit that follows.
                match bio.is_fua && !bio.fills_a_new_block() {
                    true => device.write_durably(data, byte),
                    false => device.write(data, byte),
                }
            }
            (Op::Write, Payload::Zeros(len)) => device.write_zeros(byte, *len),
            _ => Ok(()),
        };
        done.map_err(|e| bio_error(&e))
    }

    /// What moves its data without a thread, if it is whole units of a device that is used directly: whether it is a write, aligned memory
    /// with the data of a write, how many bytes, and where on the device.
    pub(super) fn flight(
        &self,
        bio: &Bio,
        device: &DataDevice,
        sector: u64,
    ) -> Option<(bool, AlignedBuffer, usize, u64)> {
        let Payload::Buffer(range) = &self.payload else {
            return None;
        };
        let (byte, len) = (sector * SECTOR + self.skip, range.len());
        if !device.is_whole(byte, len) {
            return None;
        }
        let mut buffer = AlignedBuffer::new(len.div_ceil(BLOCK_SIZE));
        let is_write = bio.op == Op::Write;
        if is_write {
            let memory = buffer.blocks_mut(len.div_ceil(BLOCK_SIZE));
            memory[..len].copy_from_slice(&self.transfer.data()[range.clone()]);
        }
        Some((is_write, buffer, len, byte))
    }

    /// Takes what was read.
    pub(super) fn land(&self, buffer: &AlignedBuffer) {
        if let Payload::Buffer(range) = &self.payload {
            let read = &buffer.blocks(range.len().div_ceil(BLOCK_SIZE))[..range.len()];
            self.transfer
                .fill(|all| all[range.clone()].copy_from_slice(read));
        }
    }

    /// Fills it from an external origin that has `sectors` of it; the rest is zeros already.
    pub(super) fn read_origin(&self, bio: &Bio, origin: &DataDevice, sectors: u64) -> BioResult {
        let Payload::Buffer(range) = &self.payload else {
            return Ok(());
        };
        let there = (sectors * SECTOR)
            .saturating_sub(self.skip)
            .min(range.len() as u64);
        let mut own = vec![0; there as usize];
        let read = origin.read(&mut own, bio.sector * SECTOR + self.skip);
        self.transfer
            .fill(|all| all[range.start..range.start + own.len()].copy_from_slice(&own));
        read.map_err(|e| bio_error(&e))
    }
}

/// What a failed system call means to a bio.
pub(super) fn bio_error(error: &io::Error) -> BioError {
    match error.raw_os_error() == Some(Errno::NOSPC.raw_os_error()) {
        true => BioError::NoSpace,
        false => BioError::Io,
    }
}

/// Tables that share the parts among them, so that connections do not wait for each other.
const TABLES: u64 = 64;

/// The parts that the worker has, by the numbers of their bios.
pub(super) struct Parts {
    tables: Vec<Mutex<HashMap<u64, Part>>>,
    last: AtomicU64,
    /// The worker does nothing any more: no part is added.
    is_closed: AtomicBool,
}

impl Default for Parts {
    fn default() -> Self {
        Self {
            tables: (0..TABLES).map(|_| Mutex::default()).collect(),
            last: AtomicU64::new(0),
            is_closed: AtomicBool::new(false),
        }
    }
}

impl Parts {
    /// A number for the next bio.
    pub(super) fn number(&self) -> u64 {
        self.last.fetch_add(1, Ordering::Relaxed)
    }

    /// The table of a bio. It is locked while the bio is mapped, so that nobody looks for a part that is about to be added.
    pub(super) fn table(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Part>> {
        let table = &self.tables[(id % TABLES) as usize];
        table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the worker looks at no part any more. To be asked with a table locked, before a part is added to it.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// The worker does nothing any more: what it has fails.
    pub(super) fn close(&self, error: BioError) {
        self.is_closed.store(true, Ordering::Release);
        for id in 0..TABLES {
            let left = std::mem::take(&mut *self.table(id));
            left.into_values()
                .for_each(|part| part.transfer.end(Err(error)));
        }
    }

    /// The part of a bio.
    pub(super) fn get(&self, id: u64) -> Option<Part> {
        self.table(id).get(&id).cloned()
    }

    /// The bio has ended.
    pub(super) fn end(&self, id: u64, result: BioResult) {
        let part = self.table(id).remove(&id);
        if let Some(part) = part {
            part.transfer.end(result);
        }
    }
}
