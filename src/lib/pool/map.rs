//! The map half: where a bio goes, decided on the submitter's thread, or left to the worker.
//!
//! 1. Nothing here waits for I/O, and on the way of a mapped block nothing is allocated.
//! 2. The virtual cell is held while the mapping is looked up and until the data cell is held; the data cell until the bio has its
//!    ticket. A discard holds the same two cells and then waits for the tickets: either it finds the bio, or the bio finds it. Leave
//!    either cell out, and a bio is issued to a block that was unmapped in between.
//! 3. A device is gated before it is snapshotted. The gate is looked at once the ticket is taken, so a bio that passed it is waited for.

use super::PoolMode;
use super::bio::{Bio, BioError, Op};
use super::pool::Pool;
use super::prison::{Cell, Detained, Key};
use super::thin::Thin;
use crate::pdata::txn::{LookupCounts, WouldBlock};
use crate::thin::{Reader, SharedMetadata, TryLookup};
use crate::units::{DataBlock, ThinBlock};
use serde::Serialize;
use std::sync::Arc;

/// Why a bio was left to the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// A flush.
    Flush,
    /// A write that has to be durable.
    Fua,
    /// A discard.
    Discard,
    /// A write to, or a read from an external origin of, a block that is not mapped.
    Unprovisioned,
    /// The block may belong to a snapshot, too.
    Shared,
    /// Somebody works on the block: the bio waits in a cell.
    CellHeld,
    /// No cell was left to hold the block with.
    NoCells,
    /// The root of the metadata was locked.
    RootBusy,
    /// A block of the metadata was locked.
    BlockBusy,
    /// A block of the metadata is not in the cache.
    CacheMiss,
    /// The device is being snapshotted, or the pool is suspended.
    Suspended,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Flush,
        Self::Fua,
        Self::Discard,
        Self::Unprovisioned,
        Self::Shared,
        Self::CellHeld,
        Self::NoCells,
        Self::RootBusy,
        Self::BlockBusy,
        Self::CacheMiss,
        Self::Suspended,
    ];
}

/// What becomes of a bio.
#[derive(Debug)]
pub enum Mapped {
    /// Issue it at `sector` of the data device, then [`Pool::end_io`].
    Remapped {
        /// The bio.
        bio: Box<Bio>,
        /// Sector of the data device.
        sector: u64,
    },
    /// A read of what was never written: zeros, and it is done.
    Zero(Box<Bio>),
    /// The worker has it, or will; wake it. Unless the reason is [`Reason::CellHeld`]: whoever holds the cell goes on with it.
    Deferred(Reason),
    /// It failed.
    Failed(Box<Bio>, BioError),
}

/// What the map half did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MapCounts {
    /// Bios.
    pub bios: u64,
    /// Issued to the data device at once.
    pub remapped: u64,
    /// Zeros at once.
    pub zero: u64,
    /// Failed at once.
    pub failed: u64,
    /// Left to the worker, by [`Reason`].
    pub deferred: [u64; Reason::ALL.len()],
}

/// A thread's way into the pool.
#[derive(Debug)]
pub struct Mapper {
    pool: Arc<Pool>,
    reader: Reader<Arc<SharedMetadata>>,
    cells: Option<[Box<Cell>; 2]>,
    counts: MapCounts,
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.pool.cells.shrink(self.cells.take());
    }
}

impl Mapper {
    /// One for each thread that submits bios; with `counting` its lookups are counted.
    pub fn new(pool: &Arc<Pool>, counting: bool) -> Self {
        pool.cells.grow();
        Self {
            reader: Reader::new(Arc::clone(&pool.metadata), counting),
            pool: Arc::clone(pool),
            cells: Some([Cell::spare(), Cell::spare()]),
            counts: MapCounts::default(),
        }
    }

    /// What it did so far.
    pub fn counts(&self) -> &MapCounts {
        &self.counts
    }

    /// What its lookups cost, if they are counted.
    pub fn lookup_counts(&self) -> Option<LookupCounts> {
        self.reader.counts()
    }

    /// Decides where `bio`, for `thin`, goes.
    pub fn map(&mut self, thin: &Thin, mut bio: Box<Bio>) -> Mapped {
        bio.thin = thin.number;
        self.counts.bios += 1;
        let mapped = self.decide(thin, bio);
        match &mapped {
            Mapped::Remapped { .. } => self.counts.remapped += 1,
            Mapped::Zero(_) => self.counts.zero += 1,
            Mapped::Failed(..) => self.counts.failed += 1,
            Mapped::Deferred(reason) => self.counts.deferred[*reason as usize] += 1,
        }
        mapped
    }

    fn decide(&mut self, thin: &Thin, bio: Box<Bio>) -> Mapped {
        let pool = &*self.pool;
        if !bio.is_within_bounds(pool.block_sectors) {
            return Mapped::Failed(bio, BioError::Invalid);
        }
        if pool.mode() == PoolMode::Fail {
            return Mapped::Failed(bio, BioError::Io);
        }
        let for_worker = match bio.op {
            Op::Flush => Some(Reason::Flush),
            Op::Discard => Some(Reason::Discard),
            _ if bio.is_fua => Some(Reason::Fua),
            _ if thin.is_gated() || pool.is_suspended() => Some(Reason::Suspended),
            _ => None,
        };
        if let Some(reason) = for_worker {
            pool.submit(bio);
            return Mapped::Deferred(reason);
        }
        let Some([first, second]) = self.cells.take().or_else(|| pool.cells.take_two()) else {
            pool.submit(bio);
            return Mapped::Deferred(Reason::NoCells);
        };
        let block = bio.block(pool.block_sectors);
        let key = Key::of_virtual(thin.id(), block, ThinBlock(block.0 + 1));
        let (held, mut bio) = match pool.prison.detain(key, bio, first) {
            Detained::Free(held, bio) => (held, bio),
            Detained::Busy(first) => {
                self.cells = Some([first, second]);
                return Mapped::Deferred(Reason::CellHeld);
            }
        };
        let reason = match self.reader.try_find_block(&thin.metadata, block) {
            Ok(TryLookup::Mapped(found)) if !found.is_shared => {
                let key = Key::of_data(thin.id(), found.block, DataBlock(found.block.0 + 1));
                let detained = pool.prison.detain(key, bio, second);
                let (first, inmates) = pool.prison.release(held);
                pool.submit_all(inmates);
                let (held, mut bio) = match detained {
                    Detained::Free(held, bio) => (held, bio),
                    Detained::Busy(second) => {
                        self.cells = Some([first, second]);
                        return Mapped::Deferred(Reason::CellHeld);
                    }
                };
                bio.all_io = Some(pool.all_io.enter());
                let (second, inmates) = pool.prison.release(held);
                pool.submit_all(inmates);
                self.cells = Some([first, second]);
                if thin.is_gated() || pool.is_suspended() {
                    pool.leave(&mut bio);
                    pool.submit(bio);
                    return Mapped::Deferred(Reason::Suspended);
                }
                let sector = pool.remap(found.block, bio.sector);
                return Mapped::Remapped { bio, sector };
            }
            Ok(TryLookup::Unmapped) if bio.op == Op::Read && thin.origin_sectors.is_none() => {
                let (first, inmates) = pool.prison.release(held);
                pool.submit_all(inmates);
                self.cells = Some([first, second]);
                return Mapped::Zero(bio);
            }
            Err(_) => {
                let (first, inmates) = pool.prison.release(held);
                pool.submit_all(inmates);
                self.cells = Some([first, second]);
                return Mapped::Failed(bio, BioError::Io);
            }
            Ok(TryLookup::Mapped(_)) => Reason::Shared,
            Ok(TryLookup::Unmapped) => Reason::Unprovisioned,
            Ok(TryLookup::WouldBlock(WouldBlock::Root)) => Reason::RootBusy,
            Ok(TryLookup::WouldBlock(WouldBlock::Block)) => Reason::BlockBusy,
            Ok(TryLookup::WouldBlock(WouldBlock::Cache)) => Reason::CacheMiss,
        };
        bio.reserved = Some((held, second));
        pool.submit(bio);
        Mapped::Deferred(reason)
    }
}
