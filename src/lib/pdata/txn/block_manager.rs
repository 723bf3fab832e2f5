//! The cache of metadata blocks, as the kernel's dm-block-manager: a bounded number of blocks, held shared or exclusively.
//!
//! Invariants:
//! 1. A block that was changed and not written is never given up: it is written first, and if that fails it stays.
//! 2. A block is verified when it is read, as what it is wanted as; wanted as something else later, it is an error.
//! 3. Contents change only under the exclusive lock, which changes the version of the slot; so does giving a slot another block.
//!    Whoever reads without a lock looks at version and block number before and after.
//!
//! 16 bytes are kept for each block beside its contents: number and flags, lock and version, and two entries of the hash table.

use super::validator::Validator;
use super::version_lock::VersionLock;
use super::view::{View, WORDS};
use crate::checksum::{self, BlockKind};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine};
use crate::units::{BLOCK_SIZE, MAX_METADATA_BLOCKS, MetadataBlock};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Block number and one, of 22 bits (no metadata device has more blocks), 3 bits of [`Validator`], and two flags.
const TAG_BLOCK: u32 = (1 << 23) - 1;
const TAG_VALIDATOR: u32 = 7 << 23;
const DIRTY: u32 = 1 << 26;
const REFERENCED: u32 = 1 << 27;

fn tag(block: MetadataBlock, validator: Validator) -> u32 {
    (block.0 as u32 + 1) | (validator as u32) << 23
}

#[derive(Debug)]
struct Slot {
    tag: AtomicU32,
    lock: VersionLock,
}

/// Sets flags, if they are not set. Only whoever holds the slot's lock, or is the one thread that changes blocks, says that a block is
/// not changed any more.
#[inline]
fn mark(slot: &Slot, flags: u32) {
    if slot.tag.load(Ordering::Relaxed) & flags != flags {
        slot.tag.fetch_or(flags, Ordering::Relaxed);
    }
}

/// A bounded cache over a metadata device.
pub struct BlockManager {
    engine: Arc<dyn BlockEngine>,
    slots: Box<[Slot]>,
    words: Box<[[AtomicU64; WORDS]]>,
    /// Slot numbers and one, by block number, open addressing; twice as many as slots, so that a search always ends.
    table: Box<[AtomicU32]>,
    fill: Mutex<Fill>,
    blocks_read: AtomicU64,
    blocks_written: AtomicU64,
    is_read_only: AtomicBool,
    /// Blocks that somebody who could not wait missed; 0 is none.
    missed: Box<[AtomicU32]>,
    /// There may be such blocks.
    has_missed: AtomicBool,
}

/// What giving slots to blocks needs.
#[derive(Debug)]
struct Fill {
    /// Slots never used yet start here.
    used: usize,
    hand: usize,
    buffer: AlignedBuffer,
}

impl fmt::Debug for BlockManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockManager")
            .field("blocks", &self.slots.len())
            .finish_non_exhaustive()
    }
}

/// What a cache takes. Beside that it has one request of 256 blocks, which all writes go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheUse {
    /// Blocks that are in it now, those included that an operation holds.
    pub blocks: usize,
    /// Blocks that fit.
    pub capacity: usize,
    /// Bytes of the tables beside the contents of the blocks.
    pub table_bytes: usize,
}

/// Blocks of the device that were read and written so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockIo {
    /// Read.
    pub read: u64,
    /// Written, the superblock included.
    pub written: u64,
}

/// Blocks below which no cache is: an operation holds several at once.
const LEAST_BLOCKS: usize = 64;
/// Misses that are remembered for reading ahead.
const MOST_MISSED: usize = 128;
/// Blocks written in one request.
const RUN: usize = 256;

/// Waits for a lock that others hold for moments. The one thread that changes blocks waits for itself, for ever, where a block is
/// part of two structures.
#[derive(Default)]
struct Wait {
    turns: u32,
    since: Option<Instant>,
}

/// Longer than any lock is held. While fuzzing there is one thread only, which waits for nobody but itself.
const MOST_WAIT: Duration = Duration::from_secs(if cfg!(fuzzing) { 0 } else { 10 });

impl Wait {
    fn turn(&mut self, block: MetadataBlock) -> Result<()> {
        self.turns += 1;
        if self.turns < 1000 {
            std::hint::spin_loop();
            return Ok(());
        }
        std::thread::yield_now();
        if self.since.get_or_insert_with(Instant::now).elapsed() < MOST_WAIT {
            return Ok(());
        }
        Err(shared_by_two(block))
    }
}

fn shared_by_two(block: MetadataBlock) -> Error {
    Error::new(
        ErrorKind::Damaged,
        format!("metadata block {block} is part of two structures; run thin_check"),
    )
}

/// A block held shared.
#[derive(Debug)]
pub(crate) struct ReadGuard<'a> {
    manager: &'a BlockManager,
    slot: usize,
}

impl<'a> ReadGuard<'a> {
    #[inline]
    pub(super) fn view(&self) -> View<'a> {
        View(&self.manager.words[self.slot])
    }
}

impl Drop for ReadGuard<'_> {
    fn drop(&mut self) {
        self.manager.slots[self.slot].lock.unshare();
    }
}

/// A block held exclusively; it counts as changed.
#[derive(Debug)]
pub(crate) struct WriteGuard<'a> {
    manager: &'a BlockManager,
    slot: usize,
    location: MetadataBlock,
}

impl<'a> WriteGuard<'a> {
    #[inline]
    pub(super) fn view(&self) -> View<'a> {
        View(&self.manager.words[self.slot])
    }

    pub(super) fn location(&self) -> MetadataBlock {
        self.location
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        let slot = &self.manager.slots[self.slot];
        mark(slot, DIRTY | REFERENCED);
        slot.lock.unlock();
    }
}

/// A block looked at without a lock.
#[derive(Clone, Copy)]
pub(crate) struct Peek<'a> {
    slot: &'a Slot,
    words: &'a [AtomicU64; WORDS],
    block: u32,
    version: u32,
}

impl<'a> Peek<'a> {
    #[inline]
    pub(super) fn view(&self) -> View<'a> {
        View(self.words)
    }

    /// True if all that was read since is of one moment.
    #[inline]
    pub(super) fn is_valid(&self) -> bool {
        self.slot.lock.is_still(self.version)
            && self.slot.tag.load(Ordering::Relaxed) & (TAG_BLOCK | TAG_VALIDATOR) == self.block
    }
}

/// Why a block could not be had at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missed {
    /// It is not in the cache.
    NotCached,
    /// Somebody changes it.
    Held,
}

impl BlockManager {
    /// A cache of at most `bytes` of blocks of `engine`, at least 64 of them.
    pub fn new(engine: Arc<dyn BlockEngine>, bytes: usize) -> Self {
        let most = engine.nr_blocks().clamp(1, MAX_METADATA_BLOCKS) as usize;
        let nr_slots = (bytes / (BLOCK_SIZE + 16))
            .max(LEAST_BLOCKS)
            .min(most.max(LEAST_BLOCKS));
        let slot = || Slot {
            tag: AtomicU32::new(0),
            lock: VersionLock::new(),
        };
        let numbers = |n: usize| (0..n).map(|_| AtomicU32::new(0)).collect();
        Self {
            engine,
            slots: (0..nr_slots).map(|_| slot()).collect(),
            // Taken of the system as it is used.
            words: bytemuck::zeroed_slice_box(nr_slots),
            table: numbers(2 * nr_slots),
            fill: Mutex::new(Fill {
                used: 0,
                hand: 0,
                buffer: AlignedBuffer::new(RUN),
            }),
            blocks_read: AtomicU64::new(0),
            blocks_written: AtomicU64::new(0),
            is_read_only: AtomicBool::new(false),
            missed: numbers(MOST_MISSED),
            has_missed: AtomicBool::new(false),
        }
    }

    /// The device below.
    pub fn engine(&self) -> &Arc<dyn BlockEngine> {
        &self.engine
    }

    /// What was read from the device, and written to it.
    pub fn io(&self) -> BlockIo {
        BlockIo {
            read: self.blocks_read.load(Ordering::Relaxed),
            written: self.blocks_written.load(Ordering::Relaxed),
        }
    }

    /// What the cache takes.
    pub fn cache_use(&self) -> CacheUse {
        let has_block = |slot: &&Slot| slot.tag.load(Ordering::Relaxed) & TAG_BLOCK != 0;
        let used = self.filling().used;
        CacheUse {
            blocks: self.slots[..used].iter().filter(has_block).count(),
            capacity: self.slots.len(),
            table_bytes: size_of_val(&*self.slots) + size_of_val(&*self.table),
        }
    }

    /// Refuses every exclusive lock and flush from here on, or no longer.
    pub fn set_read_only(&self, is_read_only: bool) {
        self.is_read_only.store(is_read_only, Ordering::Relaxed);
    }

    fn refuse_if_read_only(&self) -> Result<()> {
        match self.is_read_only.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::ReadOnly, "the metadata is read-only")),
            false => Ok(()),
        }
    }

    fn filling(&self) -> MutexGuard<'_, Fill> {
        self.fill.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn start(&self, block: MetadataBlock) -> usize {
        let hash = block.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((u128::from(hash) * self.table.len() as u128) >> 64) as usize
    }

    #[inline]
    fn after(&self, at: usize) -> usize {
        match at + 1 {
            end if end == self.table.len() => 0,
            next => next,
        }
    }

    /// The slot that has `block`. A concurrent change of the table may hide it, which looks like a miss.
    #[inline]
    fn find(&self, block: MetadataBlock) -> Option<usize> {
        if block.0 >= MAX_METADATA_BLOCKS {
            return None;
        }
        let wanted = block.0 as u32 + 1;
        let mut at = self.start(block);
        loop {
            let slot = self.table[at].load(Ordering::Acquire).checked_sub(1)? as usize;
            if self.slots[slot].tag.load(Ordering::Relaxed) & TAG_BLOCK == wanted {
                return Some(slot);
            }
            at = self.after(at);
        }
    }

    /// True if the slot, which is locked, has the block as what it is wanted as.
    #[inline]
    fn holds(&self, slot: usize, block: MetadataBlock, validator: Validator) -> Result<bool> {
        let found = self.slots[slot].tag.load(Ordering::Relaxed);
        if found & TAG_BLOCK != block.0 as u32 + 1 {
            return Ok(false);
        }
        if found & TAG_VALIDATOR == (validator as u32) << 23 {
            return Ok(true);
        }
        // Inner nodes are the same in all trees.
        let is_node = |v: u32| v < Validator::Bitmap as u32;
        let view = View(&self.words[slot]);
        if is_node((found & TAG_VALIDATOR) >> 23) && is_node(validator as u32) && !view.is_leaf() {
            return Ok(true);
        }
        Err(shared_by_two(block))
    }

    /// The block, shared; read if it is not in the cache.
    pub(super) fn read(&self, block: MetadataBlock, validator: Validator) -> Result<ReadGuard<'_>> {
        let mut wait = Wait::default();
        loop {
            if let Some(slot) = self.find(block)
                && self.slots[slot].lock.try_share()
            {
                let guard = ReadGuard {
                    manager: self,
                    slot,
                };
                if self.holds(slot, block, validator)? {
                    mark(&self.slots[slot], REFERENCED);
                    return Ok(guard);
                }
            } else if self.find(block).is_none() {
                self.load(block, Some(validator))?;
            } else {
                wait.turn(block)?;
            }
        }
    }

    /// The block, shared, if it can be had at once.
    #[inline]
    pub(super) fn try_read(
        &self,
        block: MetadataBlock,
        validator: Validator,
    ) -> Result<std::result::Result<ReadGuard<'_>, Missed>> {
        let Some(slot) = self.find(block) else {
            return Ok(Err(Missed::NotCached));
        };
        if !self.slots[slot].lock.try_share() {
            return Ok(Err(Missed::Held));
        }
        let guard = ReadGuard {
            manager: self,
            slot,
        };
        if !self.holds(slot, block, validator)? {
            return Ok(Err(Missed::NotCached));
        }
        mark(&self.slots[slot], REFERENCED);
        Ok(Ok(guard))
    }

    /// A look at the block without a lock, if it is in the cache and nobody changes it.
    #[inline(always)]
    pub(super) fn peek(&self, block: MetadataBlock) -> std::result::Result<Peek<'_>, Missed> {
        let peek = self.peek_unmarked(block)?;
        mark(peek.slot, REFERENCED);
        Ok(peek)
    }

    /// The same, and the block does not count as looked at.
    #[inline(always)]
    pub(super) fn peek_unmarked(
        &self,
        block: MetadataBlock,
    ) -> std::result::Result<Peek<'_>, Missed> {
        let Some(slot) = self.find(block) else {
            return Err(Missed::NotCached);
        };
        let of_slot = &self.slots[slot];
        let version = of_slot.lock.begin_read().ok_or(Missed::Held)?;
        let found = of_slot.tag.load(Ordering::Relaxed);
        if found & TAG_BLOCK != block.0 as u32 + 1 {
            return Err(Missed::NotCached);
        }
        Ok(Peek {
            slot: of_slot,
            words: &self.words[slot],
            block: found & (TAG_BLOCK | TAG_VALIDATOR),
            version,
        })
    }

    /// How many blocks count as looked at, none of which do afterwards.
    #[cfg(test)]
    pub(super) fn unmark_all(&self) -> usize {
        let unmark =
            |slot: &&Slot| slot.tag.fetch_and(!REFERENCED, Ordering::Relaxed) & REFERENCED != 0;
        self.slots.iter().filter(unmark).count()
    }

    /// What `look` finds in the block, which is read if it is not in the cache. For the thread that changes blocks: nobody else does, so
    /// that a look without a lock is seldom one too few.
    #[inline]
    pub(super) fn look<T>(
        &self,
        block: MetadataBlock,
        validator: Validator,
        look: impl Fn(View<'_>) -> T,
    ) -> Result<T> {
        if let Ok(peek) = self.peek(block)
            && peek.block == tag(block, validator)
        {
            let found = look(peek.view());
            if peek.is_valid() {
                return Ok(found);
            }
        }
        Ok(look(self.read(block, validator)?.view()))
    }

    /// The block, exclusively; read if it is not in the cache.
    pub(super) fn write(
        &self,
        block: MetadataBlock,
        validator: Validator,
    ) -> Result<WriteGuard<'_>> {
        let slot = self.lock(block, Some(validator))?;
        Ok(WriteGuard {
            manager: self,
            slot,
            location: block,
        })
    }

    /// The slot that has the block, held exclusively; without `validator`, whatever it holds.
    fn lock(&self, block: MetadataBlock, validator: Option<Validator>) -> Result<usize> {
        self.refuse_if_read_only()?;
        let mut wait = Wait::default();
        loop {
            let Some(slot) = self.find(block) else {
                self.load(block, validator)?;
                continue;
            };
            let found = &self.slots[slot];
            if !found.lock.try_lock() {
                wait.turn(block)?;
                continue;
            }
            let holds = match validator {
                Some(validator) => self.holds(slot, block, validator),
                None => Ok(found.tag.load(Ordering::Relaxed) & TAG_BLOCK == block.0 as u32 + 1),
            };
            if matches!(holds, Ok(true)) {
                return Ok(slot);
            }
            found.lock.unlock();
            holds?;
        }
    }

    /// The block, zeroed and exclusively, without reading it.
    pub(super) fn write_zeroed(
        &self,
        block: MetadataBlock,
        validator: Validator,
    ) -> Result<WriteGuard<'_>> {
        self.write_new(block, validator, |block| block.clear())
    }

    /// The block, as a copy of another one and exclusively, without reading it.
    pub(super) fn write_copy(
        &self,
        block: MetadataBlock,
        validator: Validator,
        from: View<'_>,
    ) -> Result<WriteGuard<'_>> {
        self.write_new(block, validator, |to| to.copy_from(from))
    }

    fn write_new(
        &self,
        block: MetadataBlock,
        validator: Validator,
        fill: impl FnOnce(View<'_>),
    ) -> Result<WriteGuard<'_>> {
        let slot = self.lock(block, None)?;
        self.slots[slot].tag.store(
            tag(block, validator) | DIRTY | REFERENCED,
            Ordering::Relaxed,
        );
        fill(View(&self.words[slot]));
        Ok(WriteGuard {
            manager: self,
            slot,
            location: block,
        })
    }

    /// Brings the block into the cache, if it is not there: verified, or zeroed without `validator`.
    fn load(&self, block: MetadataBlock, validator: Option<Validator>) -> Result<()> {
        if block.0 >= self.engine.nr_blocks().min(MAX_METADATA_BLOCKS) {
            return Err(Error::new(
                ErrorKind::Damaged,
                format!(
                    "metadata block {block} is past the device's {} blocks; run thin_check",
                    self.engine.nr_blocks()
                ),
            ));
        }
        let mut fill = self.filling();
        if self.find(block).is_some() {
            return Ok(());
        }
        let slot = self.free_slot(&mut fill)?;
        let lock = &self.slots[slot].lock;
        let filled = match validator {
            None => Ok(()),
            Some(validator) => {
                self.blocks_read.fetch_add(1, Ordering::Relaxed);
                let buffer = fill.buffer.blocks_mut(1);
                self.engine
                    .read(block, buffer)
                    .map_err(|e| Error::io(format!("cannot read metadata block {block}"), e))
                    .and_then(|()| validator.check(buffer, block))
                    .map(|()| View(&self.words[slot]).fill_from(buffer))
            }
        };
        if filled.is_ok() {
            let as_what = validator.unwrap_or(Validator::Node8);
            self.slots[slot]
                .tag
                .store(tag(block, as_what) | REFERENCED, Ordering::Relaxed);
            let mut at = self.start(block);
            while self.table[at].load(Ordering::Relaxed) != 0 {
                at = self.after(at);
            }
            self.table[at].store(slot as u32 + 1, Ordering::Release);
        }
        lock.unlock();
        filled
    }

    /// A slot without a block, locked. One that was not looked at for longest, about, is given up.
    fn free_slot(&self, fill: &mut Fill) -> Result<usize> {
        while fill.used < self.slots.len() {
            let slot = fill.used;
            fill.used += 1;
            if self.slots[slot].lock.try_lock() {
                return Ok(slot);
            }
        }
        let mut failed = None;
        // Once to take the mark away, once to find it gone, once more for those that were held meanwhile.
        for _ in 0..3 * self.slots.len() {
            let slot = fill.hand;
            fill.hand = (fill.hand + 1) % self.slots.len();
            let found = &self.slots[slot];
            if found.tag.fetch_and(!REFERENCED, Ordering::Relaxed) & REFERENCED != 0
                || !found.lock.try_lock()
            {
                continue;
            }
            let now = found.tag.load(Ordering::Relaxed);
            if now & DIRTY != 0
                && let Err(e) = self.write_slots(fill, &[slot])
            {
                failed = Some(e);
                found.lock.unlock();
                continue;
            }
            if now & TAG_BLOCK != 0 {
                self.forget(slot, MetadataBlock(u64::from(now & TAG_BLOCK) - 1));
            }
            return Ok(slot);
        }
        Err(failed.unwrap_or_else(|| {
            Error::new(
                ErrorKind::Busy,
                "every block of the metadata cache is held; give it more memory",
            )
        }))
    }

    /// Takes the block of a locked slot out of the table.
    fn forget(&self, slot: usize, block: MetadataBlock) {
        let behind = |from: usize, to: usize| (to + self.table.len() - from) % self.table.len();
        self.slots[slot].tag.store(0, Ordering::Relaxed);
        let mut hole = self.start(block);
        while self.table[hole].load(Ordering::Relaxed) != slot as u32 + 1 {
            hole = self.after(hole);
        }
        // What follows moves up, so that no search ends too early.
        let mut at = hole;
        loop {
            at = self.after(at);
            let entry = self.table[at].load(Ordering::Relaxed);
            let Some(other) = entry.checked_sub(1) else {
                break;
            };
            let tag = self.slots[other as usize].tag.load(Ordering::Relaxed) & TAG_BLOCK;
            let home = self.start(MetadataBlock(u64::from(tag.saturating_sub(1))));
            if behind(home, at) >= behind(hole, at) {
                self.table[hole].store(entry, Ordering::Release);
                hole = at;
            }
        }
        self.table[hole].store(0, Ordering::Release);
    }

    /// Writes the blocks of these slots, which nobody changes meanwhile and whose numbers follow on each other.
    fn write_slots(&self, fill: &mut Fill, slots: &[usize]) -> Result<()> {
        let buffer = fill.buffer.blocks_mut(slots.len());
        let mut first = None;
        for (&slot, bytes) in slots.iter().zip(buffer.chunks_exact_mut(BLOCK_SIZE)) {
            let tag = self.slots[slot].tag.load(Ordering::Relaxed);
            let block = MetadataBlock(u64::from(tag & TAG_BLOCK) - 1);
            first.get_or_insert(block);
            View(&self.words[slot]).copy_to(bytes);
            checksum::seal(bytes, kind_of(tag), block);
        }
        let first = first.unwrap_or_default();
        self.engine
            .write(first, buffer)
            .map_err(|e| Error::io(format!("cannot write metadata blocks from {first} on"), e))?;
        self.blocks_written
            .fetch_add(slots.len() as u64, Ordering::Relaxed);
        for &slot in slots {
            self.slots[slot].tag.fetch_and(!DIRTY, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Writes every changed block and waits until all of them are durable. Only the thread that changes blocks may call it.
    ///
    /// # Errors
    /// `Io` when a write or the flush fails: what could not be written stays changed. `ReadOnly`.
    pub fn flush(&self) -> Result<()> {
        self.refuse_if_read_only()?;
        let mut fill = self.filling();
        let mut dirty: Vec<(u32, usize)> = Vec::new();
        for (number, slot) in self.slots[..fill.used].iter().enumerate() {
            let tag = slot.tag.load(Ordering::Relaxed);
            if tag & DIRTY != 0 {
                dirty.push((tag & TAG_BLOCK, number));
            }
        }
        dirty.sort_unstable();
        let follows = |a: &(u32, usize), b: &(u32, usize)| a.0 + 1 == b.0;
        for run in dirty.chunk_by(follows).flat_map(|run| run.chunks(RUN)) {
            let slots: Vec<usize> = run.iter().map(|r| r.1).collect();
            self.write_slots(&mut fill, &slots)?;
        }
        self.engine
            .sync()
            .map_err(|e| Error::io("cannot flush the metadata device", e))
    }

    /// Writes one sealed block around the cache, and waits until it is durable.
    pub(crate) fn write_through(&self, block: MetadataBlock, bytes: &[u8]) -> Result<()> {
        self.refuse_if_read_only()?;
        let mut fill = self.filling();
        let buffer = fill.buffer.blocks_mut(1);
        buffer.copy_from_slice(bytes);
        self.engine
            .write(block, buffer)
            .map_err(|e| Error::io(format!("cannot write metadata block {block}"), e))?;
        self.blocks_written.fetch_add(1, Ordering::Relaxed);
        self.engine
            .sync()
            .map_err(|e| Error::io("cannot flush the metadata device", e))
    }

    /// Forgets everything, changes that were not written included.
    pub fn reset(&self) {
        let fill = self.filling();
        for slot in &self.slots[..fill.used] {
            while !slot.lock.try_lock() {
                std::hint::spin_loop();
            }
            slot.tag.store(0, Ordering::Relaxed);
        }
        self.table
            .iter()
            .for_each(|e| e.store(0, Ordering::Release));
        self.slots[..fill.used].iter().for_each(|s| s.lock.unlock());
    }

    /// Notes a block that somebody wanted who could not wait, if it was not there.
    pub(super) fn note_miss(&self, missed: Missed, block: MetadataBlock) {
        if missed != Missed::NotCached || block.0 >= MAX_METADATA_BLOCKS {
            return;
        }
        // The first comer keeps the place.
        let at = block.0 as usize % self.missed.len();
        let wanted = block.0 as u32 + 1;
        self.missed[at]
            .compare_exchange(0, wanted, Ordering::Relaxed, Ordering::Relaxed)
            .ok();
        self.has_missed.store(true, Ordering::Release);
    }

    /// Reads the blocks that were missed since the last call. What cannot be read is no error here, and met again.
    pub fn read_missed(&self) {
        if !self.has_missed.load(Ordering::Relaxed)
            || !self.has_missed.swap(false, Ordering::Acquire)
        {
            return;
        }
        for missed in &self.missed {
            if let Some(block) = missed.swap(0, Ordering::Relaxed).checked_sub(1) {
                let block = MetadataBlock(u64::from(block));
                // Only nodes of mapping and top-level trees are read without waiting.
                self.load(block, Some(Validator::Node8)).ok();
            }
        }
    }
}

fn kind_of(tag: u32) -> BlockKind {
    match (tag & TAG_VALIDATOR) >> 23 {
        v if v == Validator::Bitmap as u32 => BlockKind::Bitmap,
        v if v == Validator::Index as u32 => BlockKind::Index,
        _ => BlockKind::Node,
    }
}
