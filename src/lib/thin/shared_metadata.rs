//! A pool's metadata in the hands of many: any number of threads look blocks up while one changes them.
//!
//! How the two are kept apart is a [`LockScheme`]. Under `2013`, `kernel` and `b` a change or a commit holds the root lock, and no
//! lookup runs meanwhile. Under `a` and `optimistic` lookups go on, also during a commit; the next transaction begins only when
//! those that began before the commit are over.

use super::BlockTime;
use super::pool_metadata::{Lookup, PoolMetadata};
use super::recent_mappings::{Changes, RecentMappings, Room};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::txn::{
    A, B, BlockIo, BlockManager, Found, Kernel, LockScheme, LookupCounts, NoTally, Optimistic,
    Place, Roots, V2013, WouldBlock, lookup, prefetch_leaf,
};
use crate::units::{DataBlock, MetadataBlock, ThinBlock, ThinId};
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLockWriteGuard, TryLockError, Weak};
use std::time::{Duration, Instant};

/// A device whose blocks are looked up.
#[derive(Debug)]
pub struct OpenThin {
    id: ThinId,
    snapshotted_time: AtomicU32,
}

impl OpenThin {
    /// Its id.
    pub fn id(&self) -> ThinId {
        self.id
    }
}

/// What a lookup that does not wait says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TryLookup {
    /// The block is mapped.
    Mapped(Lookup),
    /// It is not.
    Unmapped,
    /// It could not be told at once.
    WouldBlock(WouldBlock),
}

/// What only one thread at a time has.
#[derive(Debug)]
struct Writer {
    pool: PoolMetadata,
    thins: HashMap<u64, Weak<OpenThin>>,
    time: u32,
}

/// The metadata.
#[derive(Debug)]
pub struct SharedMetadata {
    scheme: LockScheme,
    blocks: Arc<BlockManager>,
    roots: Roots,
    changes: Changes,
    room: Room,
    writer: Mutex<Writer>,
    /// A commit would change something.
    is_changed: AtomicBool,
    commits: AtomicU64,
    barrier_stalls: AtomicU64,
    barrier_wait_ns: AtomicU64,
}

/// A thread's way to look blocks up, with what it needs to reach the metadata: a reference, or a share of it.
#[derive(Debug)]
pub struct Reader<P: Deref<Target = SharedMetadata>> {
    shared: P,
    place: Arc<Place>,
    counts: Option<Box<LookupCounts>>,
    /// Under [`LockScheme::Optimistic`].
    recent: Option<RecentMappings>,
}

impl<P: Deref<Target = SharedMetadata>> Drop for Reader<P> {
    fn drop(&mut self) {
        self.shared.roots.epochs.leave(&self.place);
        if let Some(recent) = &self.recent {
            recent.give_back(&self.shared.room);
        }
    }
}

impl SharedMetadata {
    /// Shares `pool` by `scheme`.
    pub fn new(pool: PoolMetadata, scheme: LockScheme) -> Self {
        Self {
            scheme,
            blocks: Arc::clone(pool.blocks()),
            roots: Roots::new(pool.mapping_root()),
            changes: Changes::new(),
            room: Room::new(),
            is_changed: AtomicBool::new(pool.is_changed()),
            commits: AtomicU64::new(0),
            barrier_stalls: AtomicU64::new(0),
            barrier_wait_ns: AtomicU64::new(0),
            writer: Mutex::new(Writer {
                time: pool.time(),
                pool,
                thins: HashMap::new(),
            }),
        }
    }

    /// The scheme.
    pub fn scheme(&self) -> LockScheme {
        self.scheme
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root lock, under the schemes in which changes hold it.
    fn exclude(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        let take = || {
            self.roots
                .lock
                .write()
                .unwrap_or_else(PoisonError::into_inner)
        };
        self.scheme.excludes_lookups().then(take)
    }

    /// The same if nobody looks anything up at this moment.
    fn try_exclude(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        let take = || match self.roots.lock.try_write() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        self.scheme.excludes_lookups().then(take).flatten()
    }

    /// A way to look blocks up, one for each thread; with `counting` it keeps [`LookupCounts`].
    pub fn reader(&self, counting: bool) -> Reader<&Self> {
        Reader::new(self, counting)
    }

    /// A device to look up blocks of.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Damaged`.
    pub fn open_thin(&self, id: ThinId) -> Result<Arc<OpenThin>> {
        let mut writer = self.writer();
        if let Some(open) = writer.thins.get(&id.0).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let snapshotted_time = writer.pool.details(id)?.snapshotted_time;
        let thin = Arc::new(OpenThin {
            id,
            snapshotted_time: AtomicU32::new(snapshotted_time),
        });
        writer.thins.retain(|_, thin| thin.strong_count() > 0);
        writer.thins.insert(id.0, Arc::downgrade(&thin));
        Ok(thin)
    }

    /// Changes the metadata: everything but commit and abort, which are methods of their own. One thread at a time does.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn change<T>(&self, change: impl FnOnce(&mut PoolMetadata) -> Result<T>) -> Result<T> {
        let (mut writer, held) = self.begin_change();
        let changed = change(&mut writer.pool);
        self.end_change(writer, held);
        changed
    }

    // Two changes of each new block share these instructions in the processor's cache.
    #[inline(never)]
    fn begin_change(&self) -> (MutexGuard<'_, Writer>, Option<RwLockWriteGuard<'_, ()>>) {
        let (writer, held) = (self.writer(), self.exclude());
        self.changes.begin();
        (writer, held)
    }

    #[inline(never)]
    fn end_change(
        &self,
        mut writer: MutexGuard<'_, Writer>,
        held: Option<RwLockWriteGuard<'_, ()>>,
    ) {
        self.roots.publish(writer.pool.mapping_root(), self.scheme);
        self.changes.end();
        self.note_changed(&writer);
        drop(held);
        if writer.pool.time() != writer.time {
            writer.refresh();
        }
    }

    /// The number of changes so far, unless one is under way: what is looked up from here on is right for as long as it is the same.
    #[inline]
    pub(crate) fn time(&self) -> Option<u64> {
        self.changes.time()
    }

    fn note_changed(&self, writer: &Writer) {
        self.is_changed
            .store(writer.pool.is_changed(), Ordering::Relaxed);
    }

    /// True if a commit would change something; for whoever changes and commits, as others may be told too late.
    pub(crate) fn is_changed(&self) -> bool {
        self.is_changed.load(Ordering::Relaxed)
    }

    /// What was read from the metadata device, and written to it, since it was opened.
    pub fn block_io(&self) -> BlockIo {
        self.blocks.io()
    }

    /// Looks at the metadata, between two changes.
    pub fn inspect<T>(&self, look: impl FnOnce(&PoolMetadata) -> T) -> T {
        look(&self.writer().pool)
    }

    /// The same, if nobody changes or commits it now.
    pub fn try_inspect<T>(&self, look: impl FnOnce(&PoolMetadata) -> T) -> Option<T> {
        let writer = match self.writer.try_lock() {
            Ok(writer) => writer,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(look(&writer.pool))
    }

    /// Ends the transaction, see [`PoolMetadata::commit`]. Changes wait until no lookup can be on its way through what it freed.
    ///
    /// # Errors
    /// Those of [`PoolMetadata::commit`].
    pub fn commit(&self) -> Result<()> {
        self.commit_without(&[])
    }

    /// The same, see [`PoolMetadata::commit_without`].
    ///
    /// # Errors
    /// Those of [`PoolMetadata::commit`].
    pub fn commit_without(&self, kept: &[(DataBlock, DataBlock)]) -> Result<()> {
        let mut writer = self.writer();
        let since = Instant::now();
        let held = self.try_exclude();
        let mut has_waited = held.is_none() && self.scheme.excludes_lookups();
        let held = held.or_else(|| self.exclude());
        let mut waited = if has_waited {
            since.elapsed()
        } else {
            Duration::ZERO
        };
        // The top-level tree is final: what a commit still changes are the details and the space maps.
        let barrier = self.roots.epochs.begin();
        let committed = writer.pool.commit_without(kept);
        self.note_changed(&writer);
        drop(held);
        if !self.scheme.excludes_lookups() {
            let since = Instant::now();
            has_waited = self.roots.epochs.wait(barrier);
            waited = since.elapsed();
        }
        if has_waited {
            let waited = waited.as_nanos() as u64;
            self.barrier_wait_ns.fetch_add(waited, Ordering::Relaxed);
            self.barrier_stalls.fetch_add(1, Ordering::Relaxed);
        }
        self.commits.fetch_add(1, Ordering::Relaxed);
        committed
    }

    /// Undoes the transaction, see [`PoolMetadata::abort`]. No lookup runs meanwhile.
    ///
    /// # Errors
    /// Those of [`PoolMetadata::abort`].
    pub fn abort(&self) -> Result<()> {
        let mut writer = self.writer();
        let held = self.exclude();
        // For good, if it fails.
        self.changes.begin();
        // What is on the disk of this transaction is not whole: nobody may look at it.
        self.roots.publish(MetadataBlock(0), self.scheme);
        self.roots.epochs.wait(self.roots.epochs.begin());
        writer.pool.abort().inspect_err(|_| self.roots.fail())?;
        self.note_changed(&writer);
        self.roots.publish(writer.pool.mapping_root(), self.scheme);
        self.changes.end();
        drop(held);
        writer.refresh();
        Ok(())
    }

    /// Reads the blocks that lookups missed which could not wait.
    pub fn read_missed(&self) {
        self.blocks.read_missed();
    }

    /// Commits so far, and nanoseconds that they waited for lookups.
    pub fn barrier_waits(&self) -> (u64, u64) {
        (
            self.commits.load(Ordering::Relaxed),
            self.barrier_wait_ns.load(Ordering::Relaxed),
        )
    }

    /// Commits that had to wait for lookups.
    pub fn barrier_stalls(&self) -> u64 {
        self.barrier_stalls.load(Ordering::Relaxed)
    }

    /// The metadata alone.
    pub fn into_pool(self) -> PoolMetadata {
        self.writer
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .pool
    }
}

impl Writer {
    /// Tells open devices when they were last snapshotted.
    fn refresh(&mut self) {
        self.time = self.pool.time();
        for (&id, thin) in &self.thins {
            if let (Some(thin), Ok(details)) = (thin.upgrade(), self.pool.details(ThinId(id))) {
                thin.snapshotted_time
                    .store(details.snapshotted_time, Ordering::Release);
            }
        }
    }
}

impl<P: Deref<Target = SharedMetadata>> Reader<P> {
    /// See [`SharedMetadata::reader`].
    pub fn new(shared: P, counting: bool) -> Self {
        Self {
            place: shared.roots.epochs.join(),
            counts: counting.then(Box::default),
            recent: (shared.scheme == LockScheme::Optimistic).then(RecentMappings::new),
            shared,
        }
    }

    fn look(&mut self, thin: &OpenThin, block: ThinBlock, wait: bool) -> Result<Found> {
        let key = (thin.id.0, block.0);
        let (blocks, roots, place) = (&*self.shared.blocks, &self.shared.roots, &*self.place);
        macro_rules! by {
            ($scheme:ty) => {
                match self.counts.as_deref_mut() {
                    None => lookup::<$scheme, _>(blocks, roots, place, key, wait, NoTally),
                    Some(counts) => lookup::<$scheme, _>(blocks, roots, place, key, wait, counts),
                }
            };
        }
        match self.shared.scheme {
            LockScheme::V2013 => by!(V2013),
            LockScheme::Kernel => by!(Kernel),
            LockScheme::A => by!(A),
            LockScheme::B => by!(B),
            LockScheme::Optimistic => by!(Optimistic),
        }
    }

    /// Where a virtual block is, without waiting for I/O, nor, but under `kernel`, for a change.
    ///
    /// # Errors
    /// `NotFound` for the device, `Damaged`.
    #[inline]
    pub fn try_find_block(&mut self, thin: &OpenThin, block: ThinBlock) -> Result<TryLookup> {
        let key = (thin.id.0, block.0);
        let time = match &self.recent {
            Some(_) => self.shared.changes.time(),
            None => None,
        };
        if let (Some(recent), Some(time)) = (&mut self.recent, time)
            && let Some(value) = recent.get(time, key.0, key.1)
        {
            if let Some(counts) = self.counts.as_deref_mut() {
                counts.lookups += 1;
            }
            return Ok(TryLookup::Mapped(lookup_of(thin, value)));
        }
        Ok(match self.look(thin, block, false)? {
            Found::Value(value) => {
                if let (Some(recent), Some(time)) = (&mut self.recent, time) {
                    recent.put(&self.shared.changes, time, key, value);
                    recent.grow(&self.shared.room);
                }
                TryLookup::Mapped(lookup_of(thin, value))
            }
            Found::Nothing => TryLookup::Unmapped,
            Found::WouldBlock(reason) => TryLookup::WouldBlock(reason),
            Found::NoDevice => return Err(no_device(thin)),
        })
    }

    /// Asks for the memory where the mapping of a block would be remembered.
    #[inline]
    pub(crate) fn prefetch_recent(&self, thin: &OpenThin, block: ThinBlock) {
        if let Some(recent) = &self.recent {
            recent.prefetch(thin.id.0, block.0);
        }
    }

    /// Prefetches the leaf that a walk to a block will end in, unless its mapping is remembered.
    pub(crate) fn prefetch_leaf(&self, thin: &OpenThin, block: ThinBlock) {
        let key = (thin.id.0, block.0);
        let is_remembered = self.recent.as_ref().is_some_and(|recent| {
            let time = self.shared.changes.time();
            time.is_some_and(|time| recent.has(time, key.0, key.1))
        });
        if !is_remembered {
            prefetch_leaf(&self.shared.blocks, &self.shared.roots, key);
        }
    }

    /// Where a virtual block is; none if it is not mapped. May wait.
    ///
    /// # Errors
    /// `NotFound` for the device, `Io`, `Damaged`.
    pub fn find_block(&mut self, thin: &OpenThin, block: ThinBlock) -> Result<Option<Lookup>> {
        loop {
            match self.look(thin, block, true)? {
                Found::Value(value) => return Ok(Some(lookup_of(thin, value))),
                Found::Nothing => return Ok(None),
                Found::WouldBlock(_) => std::thread::yield_now(),
                Found::NoDevice => return Err(no_device(thin)),
            }
        }
    }

    /// What the lookups cost, if they are counted.
    pub fn counts(&self) -> Option<LookupCounts> {
        self.counts.as_deref().copied()
    }
}

fn lookup_of(thin: &OpenThin, value: u64) -> Lookup {
    let mapping = BlockTime::unpack(value);
    Lookup {
        block: mapping.block,
        is_shared: thin.snapshotted_time.load(Ordering::Acquire) > mapping.time,
    }
}

fn no_device(thin: &OpenThin) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("thin device {} was deleted", thin.id),
    )
}
