//! What all threads share of a pool: the metadata to look up in, the prison, the deferred sets, and what waits for the worker.

use super::bio::{Bio, BioResult};
use super::block_size::BlockSize;
use super::cells::{AllocationOrder, CellPool, Starved};
use super::contention::LockCounts;
use super::deferred_set::DeferredSet;
use super::list::{Linked, List, Taken};
use super::map::Passage;
use super::mode::{AtomicMode, PoolMode};
use super::prison::{Cell, Held, Prison};
use super::worker::{JobId, Traffic};
use crate::pdata::txn::{BlockIo, LockScheme};
use crate::thin::{PoolMetadata, SharedMetadata};
use crate::units::DataBlock;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// Something of the worker's that waited in a deferred set.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) job: JobId,
    next: Option<Box<Waiting>>,
}

impl Waiting {
    pub(super) fn new(job: JobId) -> Box<Self> {
        Box::new(Self { job, next: None })
    }
}

impl Linked for Waiting {
    fn link(&mut self) -> &mut Option<Box<Self>> {
        &mut self.next
    }
}

/// What waits for the worker.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Bios that the map half left to it, or that waited in a cell.
    pub(super) bios: List<Bio>,
    /// Bios that came while the pool was suspended.
    pub(super) held_back: List<Bio>,
    /// Writes that filled a new block.
    pub(super) filled: List<Bio>,
    /// Bios of the map half that wait for a second cell.
    pub(super) starved: Vec<Starved>,
    /// Work that no longer has to wait.
    pub(super) ready: List<Waiting>,
    pub(super) is_suspended: bool,
}

/// Holds submitters back while the worker is behind.
#[derive(Debug, Default)]
struct Throttle {
    is_on: AtomicBool,
    changing: Mutex<()>,
    is_off: Condvar,
}

impl Throttle {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Called when there is something for the worker to do; false if the caller comes to it itself.
type Waker = Box<dyn Fn() -> bool + Send + Sync>;

/// A pool.
pub struct Pool {
    pub(super) metadata: Arc<SharedMetadata>,
    block_size: BlockSize,
    pub(super) prison: Prison,
    pub(super) all_io: DeferredSet<Waiting>,
    pub(super) shared_read: DeferredSet<Waiting>,
    pub(super) cells: CellPool,
    pub(super) order: AllocationOrder,
    pub(super) mode: AtomicMode,
    inbox: Mutex<Inbox>,
    is_suspended: AtomicBool,
    /// A transaction was undone.
    has_lost: AtomicBool,
    throttle: Throttle,
    has_work: AtomicBool,
    /// The waker was called for it.
    is_woken: AtomicBool,
    pub(super) traffic: Traffic,
    waker: OnceLock<Waker>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("mode", &self.mode())
            .finish_non_exhaustive()
    }
}

impl Pool {
    pub(super) fn new(
        metadata: SharedMetadata,
        block_sectors: u64,
        (cells, order): (usize, AllocationOrder),
        mode: PoolMode,
    ) -> Self {
        let is_locked = metadata.scheme() != LockScheme::Optimistic;
        Self {
            metadata: Arc::new(metadata),
            block_size: BlockSize::new(block_sectors),
            prison: Prison::default(),
            all_io: DeferredSet::new(is_locked),
            shared_read: DeferredSet::new(is_locked),
            cells: CellPool::new(cells),
            order,
            mode: AtomicMode::new(mode),
            inbox: Mutex::default(),
            is_suspended: AtomicBool::new(false),
            has_lost: AtomicBool::new(false),
            throttle: Throttle::default(),
            has_work: AtomicBool::new(false),
            is_woken: AtomicBool::new(false),
            traffic: Traffic::default(),
            waker: OnceLock::new(),
        }
    }

    /// Has `waker` called whenever the worker gets something to do while it has nothing. It is called on any thread that maps or
    /// ends bios, and must not wait; it returns false if this thread sees to it that the worker looks around, so that whoever comes with
    /// something more may have to wake it. Only the first call counts.
    pub fn set_waker(&self, waker: impl Fn() -> bool + Send + Sync + 'static) {
        self.waker.set(Box::new(waker)).ok();
    }

    fn wake(&self) {
        self.has_work.store(true, Ordering::Release);
        if let Some(waker) = self.waker.get()
            && !self.is_woken.swap(true, Ordering::AcqRel)
            && !waker()
        {
            self.is_woken.store(false, Ordering::Release);
        }
    }

    /// True if the worker has something to do.
    pub fn has_work(&self) -> bool {
        self.has_work.load(Ordering::Acquire)
    }

    /// Looks at what waits, for the last time before the next [`wake`](Self::wake); none if nobody woke the worker since.
    pub(super) fn open_inbox(&self) -> Option<MutexGuard<'_, Inbox>> {
        // Whoever sets either from here on calls the waker, or somebody does whose call is on its way. Left set without work, `is_woken`
        // would keep everybody from calling it.
        if !self.has_work() && !self.is_woken.load(Ordering::Acquire) {
            return None;
        }
        self.has_work.store(false, Ordering::Release);
        self.is_woken.store(false, Ordering::Release);
        Some(self.inbox())
    }

    /// True if no bio is in flight and nobody holds a block. Without others at work: that may change the moment after.
    pub fn is_idle(&self) -> bool {
        self.prison.is_quiet() && self.all_io.is_quiet() && self.shared_read.is_quiet()
    }

    /// Sectors of 512 bytes in a data block.
    pub fn block_sectors(&self) -> u64 {
        self.block_size.sectors()
    }

    /// The same, to divide by.
    #[inline]
    pub(crate) fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Looks at the metadata, between two changes.
    pub fn inspect<T>(&self, look: impl FnOnce(&PoolMetadata) -> T) -> T {
        self.metadata.inspect(look)
    }

    /// The same, if nobody changes or commits it now.
    pub fn try_inspect<T>(&self, look: impl FnOnce(&PoolMetadata) -> T) -> Option<T> {
        self.metadata.try_inspect(look)
    }

    /// What was read from the metadata device, and written to it, since it was opened.
    pub fn block_io(&self) -> BlockIo {
        self.metadata.block_io()
    }

    /// True if a commit would change nothing: what was acknowledged so far is durable once the data is. False also if that cannot be told
    /// without waiting, or while bios that come are held back.
    pub fn is_committed(&self) -> bool {
        self.mode() == PoolMode::Write
            && !self.is_suspended()
            // It is noted before a transaction is undone, after which nothing is changed either.
            && self.metadata.try_inspect(|pool| pool.is_changed() || self.has_lost.load(Ordering::Acquire))
                == Some(false)
    }

    /// A transaction is about to be undone.
    pub(super) fn note_loss(&self) {
        self.has_lost.store(true, Ordering::Release);
    }

    /// Commits so far.
    pub fn commits(&self) -> u64 {
        self.metadata.barrier_waits().0
    }

    /// Has waits for the locks of the prison and of the deferred sets counted from here on.
    pub fn watch_locks(&self) {
        self.prison.watch();
        self.all_io.watch();
        self.shared_read.watch();
    }

    /// What the locks of the prison cost, and those of the deferred sets. Waits are counted since [`watch_locks`](Self::watch_locks).
    pub fn lock_counts(&self) -> [LockCounts; 2] {
        let sets = [self.all_io.lock_counts(), self.shared_read.lock_counts()];
        [self.prison.lock_counts(), sets[0].plus(&sets[1])]
    }

    /// Commits that had to wait for lookups, and for how many nanoseconds in all.
    pub fn commit_stalls(&self) -> (u64, u64) {
        let (stalls, (_, wait_ns)) = (
            self.metadata.barrier_stalls(),
            self.metadata.barrier_waits(),
        );
        (stalls, wait_ns)
    }

    /// The mode it is in.
    pub fn mode(&self) -> PoolMode {
        self.mode.get()
    }

    /// True while the worker has been busy for more than a second: whoever had a bio deferred should [wait](Self::throttle) before it
    /// submits more.
    pub fn is_throttled(&self) -> bool {
        self.throttle.is_on.load(Ordering::Acquire)
    }

    /// Waits while the worker has been busy for more than a second. For threads whose bio was deferred, before they submit the next one:
    /// so they cannot outrun the worker. [`map`](super::Mapper::map) itself never waits, and what it issues at once is not held up.
    pub fn throttle(&self) {
        if !self.is_throttled() {
            return;
        }
        let mut guard = self.throttle.lock();
        while self.is_throttled() {
            guard = (self.throttle.is_off.wait(guard)).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn set_throttled(&self, is_on: bool) {
        if self.is_throttled() == is_on {
            return;
        }
        let guard = self.throttle.lock();
        self.throttle.is_on.store(is_on, Ordering::Release);
        drop(guard);
        self.throttle.is_off.notify_all();
    }

    /// True while bios that come are held back.
    pub fn is_suspended(&self) -> bool {
        self.is_suspended.load(Ordering::SeqCst)
    }

    pub(super) fn suspend(&self, is_suspended: bool) {
        self.inbox().is_suspended = is_suspended;
        self.is_suspended.store(is_suspended, Ordering::Release);
        // A bio that was let in before may be in the inbox though nobody has woken the worker yet.
        self.has_work.store(true, Ordering::Release);
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a bio to the worker.
    pub(super) fn submit(&self, bio: Box<Bio>) {
        let mut inbox = self.inbox();
        // What holds a cell was let in before.
        match inbox.is_suspended && bio.reserved.is_none() {
            true => return inbox.held_back.push(bio),
            false => inbox.bios.push(bio),
        }
        drop(inbox);
        self.wake();
    }

    /// Bios that wait for the worker, but for those that it knows by the block they fill.
    pub(super) fn count_waiting(&self) -> usize {
        let inbox = self.inbox();
        inbox.bios.len() + inbox.held_back.len() + inbox.starved.len()
    }

    /// Leaves a bio to the worker that holds a cell and waits for another one.
    pub(super) fn starve(&self, starved: Starved) {
        self.inbox().starved.push(starved);
        self.wake();
    }

    /// Lets bios go on that came while the pool was suspended.
    pub(super) fn resubmit_held_back(&self) {
        let held_back = self.inbox().held_back.take();
        held_back.for_each(|bio| self.submit(bio));
    }

    /// Leaves bios to the worker that waited for something: they were let in before, a suspension does not hold them back.
    pub(super) fn submit_all(&self, mut waited: impl Iterator<Item = Box<Bio>>) {
        if let Some(first) = waited.next() {
            let mut inbox = self.inbox();
            inbox.bios.push(first);
            waited.for_each(|bio| inbox.bios.push(bio));
            drop(inbox);
            self.wake();
        }
    }

    /// Gives a cell up; bios that waited in it are left to the worker.
    pub(super) fn release(&self, held: Held) -> Box<Cell> {
        let (cell, inmates) = self.prison.release(held);
        self.submit_all(inmates);
        cell
    }

    /// The sector of the data device that has `sector` of a thin device whose block is `block`.
    #[inline(always)]
    pub(super) fn remap(&self, block: DataBlock, sector: u64) -> u64 {
        block.0 * self.block_size.sectors() + self.block_size.split(sector).1
    }

    /// Returns the tickets of a bio.
    #[inline(always)]
    pub(super) fn leave(&self, bio: &mut Bio) {
        if let Some(ticket) = bio.all_io.take() {
            self.end_passage(Passage(ticket));
        }
        if let Some(ticket) = bio.shared_read.take()
            && let Some(ready) = self.shared_read.leave(ticket)
        {
            self.go_on_with(ready);
        }
    }

    /// What was issued without a bio has ended.
    #[inline(always)]
    pub fn end_passage(&self, passage: Passage) {
        if let Some(ready) = self.all_io.leave(passage.0) {
            self.go_on_with(ready);
        }
    }

    #[cold]
    fn go_on_with(&self, ready: Taken<Waiting>) {
        let mut inbox = self.inbox();
        ready.for_each(|work| inbox.ready.push(work));
        drop(inbox);
        self.wake();
    }

    /// The I/O of a bio that was issued by either half has ended. It is to be completed to its submitter, unless the worker goes on
    /// with it.
    #[inline(always)]
    pub fn end_io(&self, mut bio: Box<Bio>, result: BioResult) -> Option<(Box<Bio>, BioResult)> {
        self.leave(&mut bio);
        if bio.fills.is_none() {
            return Some((bio, result));
        }
        bio.filled = result;
        self.inbox().filled.push(bio);
        self.wake();
        None
    }
}
