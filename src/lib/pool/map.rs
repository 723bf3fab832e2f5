//! The map half: where a bio goes, decided on the submitter's thread, or left to the worker.
//!
//! 1. Nothing here waits for I/O, and on the way of a mapped block nothing is allocated, but that the room for mappings looked up lately
//!    doubles four times in the life of a mapper.
//! 2. The virtual cell is held while the mapping is looked up and until the data cell is held; the data cell until the bio has its
//!    ticket. A discard holds the same two cells and then waits for the tickets: either it finds the bio, or the bio finds it. Leave
//!    either cell out, and a bio is issued to a block that was unmapped in between.
//!    Under [`LockScheme::Optimistic`] nothing is held on the way of a mapped block: the bio takes its ticket first, and is looked up if
//!    no cell is near. A discard that takes its cell after that waits for the ticket. So does a break of sharing for a read of the shared
//!    block that passed, which looks for its data cell, too.
//! 3. A device is gated before it is snapshotted. The gate is looked at once the ticket is taken, so a bio that passed it is waited for.

use super::PoolMode;
use super::bio::{Bio, BioError, Op};
use super::cells::{AllocationOrder, Starved};
use super::deferred_set::Ticket;
use super::pool::Pool;
use super::prison::{Cell, Detained, Key};
use super::thin::Thin;
use crate::pdata::txn::{LockScheme, LookupCounts, WouldBlock};
use crate::thin::{Reader, SharedMetadata, TryLookup};
use crate::units::{DataBlock, ThinBlock};
use serde::Serialize;
use std::fmt;
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

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flush => "flush",
            Self::Fua => "fua",
            Self::Discard => "discard",
            Self::Unprovisioned => "unprovisioned",
            Self::Shared => "shared",
            Self::CellHeld => "cell_held",
            Self::NoCells => "no_cells",
            Self::RootBusy => "root_busy",
            Self::BlockBusy => "block_busy",
            Self::CacheMiss => "cache_miss",
            Self::Suspended => "suspended",
        })
    }
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

/// What becomes of a read or write that has no bio yet.
#[derive(Debug)]
pub enum Passed {
    /// Issue it at `sector` of the data device, then [`Pool::end_passage`].
    Remapped {
        /// Sector of the data device.
        sector: u64,
        /// To be returned.
        passage: Passage,
    },
    /// A read of what was never written: zeros, and it is done.
    Zero,
    /// It needs a bio: [`Mapper::map_left`].
    Left(Left),
}

/// What was seen of a block, without holding it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Left {
    /// Number of the open device, and its block.
    block: (u32, ThinBlock),
    /// Why it has to be left to the worker, if that is known.
    reason: Option<Reason>,
    /// It was not mapped, by the [changes](SharedMetadata::time) until then.
    unmapped_at: Option<u64>,
}

/// Something is in flight that has no bio.
#[derive(Debug)]
#[must_use]
pub struct Passage(pub(super) Ticket);

/// What is known of the block of a bio.
#[derive(Clone, Copy, Debug)]
enum Known {
    /// It was not looked up.
    Nothing,
    /// It was, without holding it.
    Left(Left),
    /// A lookup gives up.
    Busy(WouldBlock),
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

impl MapCounts {
    /// Adds those of another mapper.
    pub fn add(&mut self, other: &Self) {
        self.bios += other.bios;
        self.remapped += other.remapped;
        self.zero += other.zero;
        self.failed += other.failed;
        for (sum, n) in self.deferred.iter_mut().zip(other.deferred) {
            *sum += n;
        }
    }
}

/// A thread's way into the pool. It shares no line of cache with that of another thread.
#[derive(Debug)]
#[repr(align(128))]
pub struct Mapper {
    pool: Arc<Pool>,
    reader: Reader<Arc<SharedMetadata>>,
    cells: Option<[Box<Cell>; 2]>,
    counts: MapCounts,
    /// Mapped blocks need no cell.
    is_optimistic: bool,
    /// Reads of shared blocks need none, either.
    passes_shared_reads: bool,
}

impl Drop for Mapper {
    fn drop(&mut self) {
        if self.pool.order == AllocationOrder::Reserved {
            self.pool.cells.shrink(self.cells.take());
        }
    }
}

impl Mapper {
    /// One for each thread that submits bios; with `counting` its lookups are counted.
    pub fn new(pool: &Arc<Pool>, counting: bool) -> Self {
        let is_reserved = pool.order == AllocationOrder::Reserved;
        if is_reserved {
            pool.cells.grow();
        }
        Self {
            reader: Reader::new(Arc::clone(&pool.metadata), counting),
            pool: Arc::clone(pool),
            cells: is_reserved.then(|| [Cell::spare(), Cell::spare()]),
            counts: MapCounts::default(),
            is_optimistic: pool.metadata.scheme() == LockScheme::Optimistic && is_reserved,
            passes_shared_reads: false,
        }
    }

    /// The same mapper, but reads of shared blocks, which the kernel leaves to its worker, are issued at once, too, where nobody works near
    /// them. Only under [`LockScheme::Optimistic`].
    pub fn passing_shared_reads(mut self) -> Self {
        self.passes_shared_reads = self.is_optimistic;
        self
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
    pub fn map(&mut self, thin: &Thin, bio: Box<Bio>) -> Mapped {
        self.map_beside(thin, bio, None)
    }

    /// The same; but if it comes to a lookup, that gives up for the reason given. For models of time, in which nothing happens at once
    /// that would happen at once on real processors.
    pub fn map_beside(&mut self, thin: &Thin, bio: Box<Bio>, busy: Option<WouldBlock>) -> Mapped {
        self.map_with(thin, bio, busy.map_or(Known::Nothing, Known::Busy))
    }

    /// Decides where a read or write goes that lies within a block and need not be durable when it completes, if it may be issued without
    /// holding anything. Nobody but its submitter would look at its bio, so it has none. Only under [`LockScheme::Optimistic`].
    #[inline(always)]
    pub fn pass(&mut self, thin: &Thin, op: Op, sector: u64) -> Passed {
        let pool = &*self.pool;
        if !self.is_optimistic || pool.mode() == PoolMode::Fail || is_held_back(pool, thin) {
            return Passed::Left(Left::default());
        }
        pool.traffic.begin();
        let passed = self.find_way(thin, op, sector);
        self.pool.traffic.end(false);
        match passed {
            Passed::Remapped { .. } => self.counts.remapped += 1,
            Passed::Zero => self.counts.zero += 1,
            Passed::Left(_) => return passed,
        }
        self.counts.bios += 1;
        passed
    }

    /// See [`Reader::prefetch_recent`].
    #[inline]
    pub(crate) fn prefetch_recent(&self, thin: &Thin, sector: u64) {
        let block = ThinBlock(self.pool.block_size().split(sector).0);
        self.reader.prefetch_recent(&thin.metadata, block);
    }

    /// See [`Reader::prefetch_leaf`].
    pub(crate) fn prefetch_leaf(&self, thin: &Thin, sector: u64) {
        let block = ThinBlock(self.pool.block_size().split(sector).0);
        self.reader.prefetch_leaf(&thin.metadata, block);
    }

    /// Decides where the bio of what was just [left](Passed::Left) goes.
    pub fn map_left(&mut self, thin: &Thin, bio: Box<Bio>, left: Left) -> Mapped {
        self.map_with(thin, bio, Known::Left(left))
    }

    fn map_with(&mut self, thin: &Thin, mut bio: Box<Bio>, known: Known) -> Mapped {
        bio.thin = thin.number;
        bio.unmapped_at = None;
        self.counts.bios += 1;
        self.pool.traffic.begin();
        let mapped = self.decide(thin, bio, known);
        self.pool.traffic.end(matches!(mapped, Mapped::Deferred(_)));
        match &mapped {
            Mapped::Remapped { .. } => self.counts.remapped += 1,
            Mapped::Zero(_) => self.counts.zero += 1,
            Mapped::Failed(..) => self.counts.failed += 1,
            Mapped::Deferred(reason) => self.counts.deferred[*reason as usize] += 1,
        }
        mapped
    }

    #[inline]
    fn decide(&mut self, thin: &Thin, mut bio: Box<Bio>, mut known: Known) -> Mapped {
        let pool = &*self.pool;
        if !bio.is_within_bounds(pool.block_size()) {
            return Mapped::Failed(bio, BioError::Invalid);
        }
        if pool.mode() == PoolMode::Fail {
            return Mapped::Failed(bio, BioError::Io);
        }
        let for_worker = match bio.op {
            Op::Flush => Some(Reason::Flush),
            Op::Discard => Some(Reason::Discard),
            _ if bio.is_fua => Some(Reason::Fua),
            _ if is_held_back(pool, thin) => Some(Reason::Suspended),
            _ => None,
        };
        if let Some(reason) = for_worker {
            pool.submit(bio);
            return Mapped::Deferred(reason);
        }
        if matches!(known, Known::Nothing) && self.is_optimistic {
            match self.find_way(thin, bio.op, bio.sector) {
                Passed::Remapped { sector, passage } => {
                    bio.all_io = Some(passage.0);
                    return Mapped::Remapped { bio, sector };
                }
                Passed::Zero => return Mapped::Zero(bio),
                Passed::Left(left) => known = Known::Left(left),
            }
            if self.passes_shared_reads
                && bio.op == Op::Read
                && let Some(sector) = self.find_shared(thin, &mut bio)
            {
                return Mapped::Remapped { bio, sector };
            }
        }
        self.detain(thin, bio, known)
    }

    /// Maps a bio while it holds its blocks.
    fn detain(&mut self, thin: &Thin, bio: Box<Bio>, known: Known) -> Mapped {
        let pool = &*self.pool;
        let block = bio.block(pool.block_size());
        let key = Key::of_virtual(thin.id(), block, ThinBlock(block.0 + 1));
        let Some((first, second)) = take_cells(pool, &mut self.cells) else {
            pool.submit(bio);
            return Mapped::Deferred(Reason::NoCells);
        };
        let (held, mut bio) = match pool.prison.detain(key, bio, first) {
            Detained::Free(held, bio) => (held, bio),
            Detained::Busy(first) => {
                keep_cells(pool, &mut self.cells, first, second);
                return Mapped::Deferred(Reason::CellHeld);
            }
        };
        let found = match known {
            Known::Left(Left {
                block: of,
                reason: Some(reason),
                unmapped_at,
            }) if of == (thin.number, block) => {
                bio.unmapped_at = unmapped_at;
                bio.reserved = Some((held, second));
                pool.submit(bio);
                return Mapped::Deferred(reason);
            }
            Known::Busy(busy) => Ok(TryLookup::WouldBlock(busy)),
            Known::Nothing | Known::Left(_) => self.reader.try_find_block(&thin.metadata, block),
        };
        let reason = match found {
            Ok(TryLookup::Mapped(found)) if !found.is_shared => {
                let key = Key::of_data(thin.id(), found.block, DataBlock(found.block.0 + 1));
                let Some(second) = second.or_else(|| pool.cells.take()) else {
                    let wanted = key;
                    pool.starve(Starved { bio, held, wanted });
                    return Mapped::Deferred(Reason::NoCells);
                };
                let detained = pool.prison.detain(key, bio, second);
                let first = pool.release(held);
                let (held, mut bio) = match detained {
                    Detained::Free(held, bio) => (held, bio),
                    Detained::Busy(second) => {
                        keep_cells(pool, &mut self.cells, first, Some(second));
                        return Mapped::Deferred(Reason::CellHeld);
                    }
                };
                bio.all_io = Some(pool.all_io.enter());
                let second = pool.release(held);
                keep_cells(pool, &mut self.cells, first, Some(second));
                if is_held_back(pool, thin) {
                    pool.leave(&mut bio);
                    pool.submit(bio);
                    return Mapped::Deferred(Reason::Suspended);
                }
                let sector = pool.remap(found.block, bio.sector);
                return Mapped::Remapped { bio, sector };
            }
            Ok(TryLookup::Unmapped) if bio.op == Op::Read && thin.origin_sectors.is_none() => {
                let first = pool.release(held);
                keep_cells(pool, &mut self.cells, first, second);
                return Mapped::Zero(bio);
            }
            Err(_) => {
                let first = pool.release(held);
                keep_cells(pool, &mut self.cells, first, second);
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

impl Mapper {
    /// Where a read or write goes without a lock, if its block is mapped for this device alone, or read and not mapped, and nobody works
    /// near it.
    #[inline(always)]
    fn find_way(&mut self, thin: &Thin, op: Op, sector: u64) -> Passed {
        let pool = &*self.pool;
        let block = ThinBlock(pool.block_size().split(sector).0);
        let key = Key::of_virtual(thin.id(), block, ThinBlock(block.0 + 1));
        let ticket = pool.all_io.enter();
        let is_free = !(pool.prison.may_be_held(&key) || is_held_back(pool, thin));
        let time = pool.metadata.time();
        let found = is_free.then(|| self.reader.try_find_block(&thin.metadata, block));
        let left = |reason, unmapped_at| {
            Passed::Left(Left {
                block: (thin.number, block),
                reason: Some(reason),
                unmapped_at,
            })
        };
        let passed = match found {
            Some(Ok(TryLookup::Mapped(found))) if !found.is_shared => {
                return Passed::Remapped {
                    sector: pool.remap(found.block, sector),
                    passage: Passage(ticket),
                };
            }
            Some(Ok(TryLookup::Mapped(_))) => left(Reason::Shared, None),
            Some(Ok(TryLookup::Unmapped)) if op == Op::Read && thin.origin_sectors.is_none() => {
                Passed::Zero
            }
            Some(Ok(TryLookup::Unmapped)) => left(Reason::Unprovisioned, time),
            _ => Passed::Left(Left::default()),
        };
        pool.end_passage(Passage(ticket));
        passed
    }
}

impl Mapper {
    /// Where a read goes whose block is shared, if nobody works near it; the bio has its tickets then. Whoever breaks the sharing lets
    /// go of the virtual block early, and of the data block once the new mapping is there. So it is the data block that is looked
    /// at once the ticket is taken, and what is looked up after that is either the new mapping, or the old one and waited for.
    #[inline(never)]
    fn find_shared(&mut self, thin: &Thin, bio: &mut Bio) -> Option<u64> {
        let pool = &*self.pool;
        let block = bio.block(pool.block_size());
        let mut shared = || match self.reader.try_find_block(&thin.metadata, block) {
            Ok(TryLookup::Mapped(found)) if found.is_shared => Some(found.block),
            _ => None,
        };
        let data = shared()?;
        bio.all_io = Some(pool.all_io.enter());
        bio.shared_read = Some(pool.shared_read.enter());
        let of_virtual = Key::of_virtual(thin.id(), block, ThinBlock(block.0 + 1));
        let of_data = Key::of_data(thin.id(), data, DataBlock(data.0 + 1));
        let is_free = ![of_virtual, of_data]
            .iter()
            .any(|key| pool.prison.may_be_held(key));
        if is_free && !is_held_back(pool, thin) && shared() == Some(data) {
            return Some(pool.remap(data, bio.sector));
        }
        pool.leave(bio);
        None
    }
}

/// Reads and writes wait: the device is being snapshotted, or the pool is suspended.
#[inline(always)]
fn is_held_back(pool: &Pool, thin: &Thin) -> bool {
    thin.is_gated() || pool.is_suspended()
}

/// The cells that a bio needs, or the first of them where they are taken one by one.
fn take_cells(
    pool: &Pool,
    kept: &mut Option<[Box<Cell>; 2]>,
) -> Option<(Box<Cell>, Option<Box<Cell>>)> {
    if pool.order == AllocationOrder::OneByOne {
        return Some((pool.cells.take()?, None));
    }
    let [first, second] = kept.take().or_else(|| pool.cells.take_two())?;
    Some((first, Some(second)))
}

fn keep_cells(
    pool: &Pool,
    kept: &mut Option<[Box<Cell>; 2]>,
    first: Box<Cell>,
    second: Option<Box<Cell>>,
) {
    match (pool.order, second) {
        (AllocationOrder::Reserved, Some(second)) => *kept = Some([first, second]),
        (_, second) => {
            pool.cells.give(first);
            second.into_iter().for_each(|cell| pool.cells.give(cell));
        }
    }
}

/// Run with `RUSTFLAGS="--cfg loom"`: every order of the steps of a read and a discard of one block.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::pool::deferred_set::DeferredSet;
    use crate::pool::pool::Waiting;
    use crate::pool::prison::{Held, Prison};
    use crate::units::ThinId;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread;

    const THIN: ThinId = ThinId(0);

    /// A device with one block.
    struct Block {
        prison: Prison,
        all_io: DeferredSet<Waiting>,
        is_mapped: AtomicBool,
        /// Its data is gone, or somebody else's.
        is_given_back: AtomicBool,
    }

    impl Block {
        fn give_back(&self) {
            self.is_mapped.store(false, Ordering::Relaxed);
            self.is_given_back.store(true, Ordering::Relaxed);
        }

        /// As the map half, with or without its cells.
        fn read(&self, with_virtual: bool, with_data: bool) {
            let hold = |key, with: bool| match with {
                true => self.prison.try_hold(key, Cell::spare()).map(Some),
                false => Ok(None),
            };
            let free = |held: Option<Held>| drop(held.map(|held| self.prison.release(held)));
            let Ok(of_virtual) = hold(virtual_key(), with_virtual) else {
                return;
            };
            if !self.is_mapped.load(Ordering::Relaxed) {
                return free(of_virtual);
            }
            let of_data = hold(data_key(), with_data);
            free(of_virtual);
            let Ok(of_data) = of_data else { return };
            let ticket = self.all_io.enter();
            free(of_data);
            self.read_data();
            self.leave(ticket);
        }

        /// What is read must still be what was looked up.
        fn read_data(&self) {
            let is_stale = self.is_given_back.load(Ordering::Relaxed);
            assert!(!is_stale, "a block was read that was given back");
        }

        /// Returns a ticket. Whoever returns the last one that is waited for goes on for the worker.
        fn leave(&self, ticket: Ticket) {
            if self
                .all_io
                .leave(ticket)
                .is_some_and(|ready| ready.count() > 0)
            {
                self.give_back();
            }
        }

        /// As the map half without locks; or with the ticket taken too late, or cells that nobody looks for.
        fn pass(&self, has_ticket_first: bool, looks_for_cells: bool) {
            let early = has_ticket_first.then(|| self.all_io.enter());
            let is_held = looks_for_cells && self.prison.may_be_held(&virtual_key());
            let is_mapped = !is_held && self.is_mapped.load(Ordering::Relaxed);
            let ticket = early.unwrap_or_else(|| self.all_io.enter());
            if is_mapped {
                self.read_data();
            }
            self.leave(ticket);
        }

        /// As a read of a shared block without locks; or blind to cells, or without a second look.
        fn find_shared(&self, looks_for_cells: bool, looks_again: bool) {
            let is_shared = || self.is_mapped.load(Ordering::Relaxed);
            if !is_shared() {
                return;
            }
            let ticket = self.all_io.enter();
            let is_held = looks_for_cells && self.prison.may_be_held(&data_key());
            if !is_held && (!looks_again || is_shared()) {
                self.read_data();
            }
            self.leave(ticket);
        }

        /// As the worker that breaks sharing: the virtual cell until it waits, the data cell until the new mapping is there.
        fn break_sharing(&self, job: crate::pool::JobId) {
            let Ok(of_virtual) = self.prison.try_hold(virtual_key(), Cell::spare()) else {
                return;
            };
            if let Ok(of_data) = self.prison.try_hold(data_key(), Cell::spare()) {
                let ready = self.all_io.defer(Waiting::new(job));
                drop(self.prison.release(of_virtual));
                if ready.count() > 0 {
                    self.give_back();
                    drop(self.prison.release(of_data));
                }
            }
        }

        /// As the worker: the virtual cell for all of it, the data cell until the block is unmapped.
        fn discard(&self, job: crate::pool::JobId) {
            let Ok(of_virtual) = self.prison.try_hold(virtual_key(), Cell::spare()) else {
                return;
            };
            if let Ok(of_data) = self.prison.try_hold(data_key(), Cell::spare()) {
                // Its cells are held until it has ended, which a deferred one does later.
                if self.all_io.defer(Waiting::new(job)).count() > 0 {
                    self.give_back();
                    drop(self.prison.release(of_data));
                }
            }
            drop(self.prison.release(of_virtual));
        }
    }

    fn virtual_key() -> Key {
        Key::of_virtual(THIN, ThinBlock(0), ThinBlock(1))
    }

    fn data_key() -> Key {
        Key::of_data(THIN, DataBlock(0), DataBlock(1))
    }

    fn race(read: impl Fn(&Block) + Copy + Send + Sync + 'static) {
        race_with(read, Block::discard);
    }

    fn race_with(
        read: impl Fn(&Block) + Copy + Send + Sync + 'static,
        give_back: impl Fn(&Block, crate::pool::JobId) + Copy + Send + Sync + 'static,
    ) {
        loom::model(move || {
            let block = Arc::new(Block {
                prison: Prison::with_one_shard(),
                all_io: DeferredSet::new(false),
                is_mapped: AtomicBool::new(true),
                is_given_back: AtomicBool::new(false),
            });
            let reader = {
                let block = block.clone();
                thread::spawn(move || read(&block))
            };
            give_back(&block, crate::pool::JobId::of_model());
            reader.join().expect("a block was read that was given back");
        });
    }

    #[test]
    fn a_read_and_a_discard_of_one_block_exclude_each_other() {
        race(|block| block.read(true, true));
    }

    #[test]
    #[should_panic(expected = "given back")]
    fn without_the_virtual_cell_they_do_not() {
        race(|block| block.read(false, true));
    }

    #[test]
    #[should_panic(expected = "given back")]
    fn without_the_data_cell_they_do_not() {
        race(|block| block.read(true, false));
    }

    #[test]
    fn without_locks_they_do_by_the_ticket() {
        race(|block| block.pass(true, true));
    }

    #[test]
    #[should_panic(expected = "given back")]
    fn without_locks_and_with_a_late_ticket_they_do_not() {
        race(|block| block.pass(false, true));
    }

    #[test]
    #[should_panic(expected = "given back")]
    fn without_locks_and_blind_to_cells_they_do_not() {
        race(|block| block.pass(true, false));
    }

    #[test]
    fn a_read_of_a_shared_block_and_a_break_of_sharing_exclude_each_other() {
        race_with(|block| block.find_shared(true, true), Block::break_sharing);
    }

    #[test]
    #[should_panic(expected = "given back")]
    fn blind_to_cells_they_do_not() {
        race_with(|block| block.find_shared(false, true), Block::break_sharing);
    }

    #[test]
    #[should_panic(expected = "given back")]
    fn without_a_second_look_they_do_not() {
        race_with(|block| block.find_shared(true, false), Block::break_sharing);
    }
}
