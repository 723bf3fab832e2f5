//! Five ways to keep lookups and changes apart, behind one trait; and the lookup that goes by any of them.
//!
//! | scheme | the root | each block | a commit |
//! |---|---|---|---|
//! | `2013` | a reader/writer lock, tried | a lock, tried | holds the root lock |
//! | `kernel` | a reader/writer lock, waited for | a lock, tried | holds the root lock |
//! | `a` | a lock for as long as it is read | locks hand over hand | waits for the lookups before it |
//! | `b` | a reader/writer lock, tried | none, but in debug builds; its version is compared afterwards, for it may leave the cache | holds the root lock |
//! | `optimistic` | read atomically | none: its version is compared afterwards | waits for the lookups before it |
//!
//! Why `optimistic` is right: a change that moves entries from one node to another holds their parent exclusively. A reader takes the
//! child's version before it looks at the parent's again, so either it sees that the parent was changed, or the child was not yet
//! when its version was taken, and is found out afterwards.

use super::block_manager::{BlockManager, Missed, Peek, ReadGuard};
use super::btree::{MOST_LEVELS, too_deep};
use super::epoch::{Epochs, Pin, Place};
use super::validator::Validator;
use super::view::View;
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::node::max_entries;
use crate::units::MetadataBlock;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError};
use std::time::Instant;

/// How lookups and changes are kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LockScheme {
    /// As dm-thin did in 2013: both locks are tried.
    #[serde(rename = "2013")]
    V2013,
    /// As Linux does today: the root lock is waited for.
    Kernel,
    /// A short root lock, block locks hand over hand, a commit barrier.
    A,
    /// The root lock alone.
    B,
    /// No shared write at all.
    Optimistic,
}

impl LockScheme {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::V2013,
        Self::Kernel,
        Self::A,
        Self::B,
        Self::Optimistic,
    ];

    /// True if changes and commits hold the root lock, so that no lookup runs meanwhile.
    pub(crate) fn excludes_lookups(self) -> bool {
        !matches!(self, Self::A | Self::Optimistic)
    }
}

impl fmt::Display for LockScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V2013 => "2013",
            Self::Kernel => "kernel",
            Self::A => "a",
            Self::B => "b",
            Self::Optimistic => "optimistic",
        })
    }
}

impl FromStr for LockScheme {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|s| s.to_string() == text);
        found.ok_or_else(|| {
            format!("no locking scheme is called {text:?}: 2013, kernel, a, b and optimistic are")
        })
    }
}

/// Why a lookup that must not wait gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum WouldBlock {
    /// The root is held.
    Root,
    /// A block is held, or was changed again and again.
    Block,
    /// A block is not in the cache; it will be read.
    Cache,
}

/// What lookups cost. Those of two threads share no line of cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[repr(align(128))]
pub struct LookupCounts {
    /// Lookups.
    pub lookups: u64,
    /// Lookups that gave up because of the root.
    pub would_block_root: u64,
    /// Lookups that gave up because of a block.
    pub would_block_block: u64,
    /// Lookups that gave up because a block was not in the cache.
    pub would_block_cache: u64,
    /// Lookups that began again because something changed under them.
    pub retries: u64,
    /// Locks that were taken.
    pub acquisitions: u64,
    /// Locks that were not free at once.
    pub contended: u64,
    /// Nanoseconds of waiting for them.
    pub wait_ns: u64,
    /// Atomic read-modify-write operations.
    pub atomic_rmws: u64,
    /// Of the locks that were taken, those of the root.
    #[serde(default)]
    pub root_acquisitions: u64,
    /// Of those that were not free, the root's.
    #[serde(default)]
    pub root_contended: u64,
    /// Of the waiting, that for the root's.
    #[serde(default)]
    pub root_wait_ns: u64,
}

impl LookupCounts {
    /// Adds those of another reader.
    pub fn add(&mut self, other: &Self) {
        self.lookups += other.lookups;
        self.would_block_root += other.would_block_root;
        self.would_block_block += other.would_block_block;
        self.would_block_cache += other.would_block_cache;
        self.retries += other.retries;
        self.acquisitions += other.acquisitions;
        self.contended += other.contended;
        self.wait_ns += other.wait_ns;
        self.atomic_rmws += other.atomic_rmws;
        self.root_acquisitions += other.root_acquisitions;
        self.root_contended += other.root_contended;
        self.root_wait_ns += other.root_wait_ns;
    }
}

/// Who is told what a lookup costs. Telling nobody costs nothing.
pub(crate) trait Tally {
    const IS_ON: bool;
    fn with(&mut self, tell: impl FnOnce(&mut LookupCounts));
}

/// Nobody.
pub(crate) struct NoTally;

impl Tally for NoTally {
    const IS_ON: bool = false;
    fn with(&mut self, _: impl FnOnce(&mut LookupCounts)) {}
}

impl Tally for &mut LookupCounts {
    const IS_ON: bool = true;
    fn with(&mut self, tell: impl FnOnce(&mut LookupCounts)) {
        tell(self);
    }
}

/// What all lookups of a pool start from.
#[derive(Debug)]
pub(crate) struct Roots {
    /// The root of the top-level tree; 0 while there is none.
    published: AtomicU64,
    /// An abort failed, so that there will be no root any more.
    has_failed: AtomicBool,
    /// Guards the root from 2013 until today.
    pub(crate) lock: RwLock<()>,
    /// Guards `published` in scheme `a`.
    short: Mutex<()>,
    pub(crate) epochs: Epochs,
}

impl Roots {
    pub(crate) fn new(root: MetadataBlock) -> Self {
        Self {
            published: AtomicU64::new(root.0),
            has_failed: AtomicBool::new(false),
            lock: RwLock::new(()),
            short: Mutex::new(()),
            epochs: Epochs::new(),
        }
    }

    pub(crate) fn publish(&self, root: MetadataBlock, scheme: LockScheme) {
        let _short: Option<MutexGuard<'_, ()>> = (scheme == LockScheme::A)
            .then(|| self.short.lock().unwrap_or_else(PoisonError::into_inner));
        self.published.store(root.0, Ordering::Release);
    }

    /// From here on every lookup is an error.
    pub(crate) fn fail(&self) {
        self.has_failed.store(true, Ordering::Release);
    }

    pub(super) fn root(&self) -> Option<MetadataBlock> {
        match self.published.load(Ordering::Acquire) {
            0 => None,
            root => Some(MetadataBlock(root)),
        }
    }
}

/// Taking a lock of the root.
fn take<G, T: Tally>(
    wait: bool,
    tally: &mut T,
    rmws: u64,
    try_it: impl FnOnce() -> Option<G>,
    wait_for: impl FnOnce() -> G,
) -> Option<G> {
    tally.with(|c| {
        c.acquisitions += 1;
        c.root_acquisitions += 1;
        c.atomic_rmws += rmws;
    });
    if let Some(guard) = try_it() {
        return Some(guard);
    }
    tally.with(|c| {
        c.contended += 1;
        c.root_contended += 1;
    });
    if !wait {
        return None;
    }
    let since = T::IS_ON.then(Instant::now);
    let guard = wait_for();
    tally.with(|c| {
        let waited = since.map_or(0, |s| s.elapsed().as_nanos() as u64);
        c.wait_ns += waited;
        c.root_wait_ns += waited;
    });
    Some(guard)
}

#[inline]
fn under_root_lock<'a, T: Tally>(
    roots: &'a Roots,
    wait: bool,
    tally: &mut T,
) -> Option<(RwLockReadGuard<'a, ()>, MetadataBlock)> {
    let try_it = || match roots.lock.try_read() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    };
    let wait_for = || roots.lock.read().unwrap_or_else(PoisonError::into_inner);
    let held = take(wait, tally, 2, try_it, wait_for)?;
    Some((held, roots.root()?))
}

/// A way to keep lookups and changes apart.
pub(crate) trait Scheme {
    /// What is held for the whole lookup.
    type Held<'a>;
    /// A node that is being looked at.
    type Node<'a>;

    fn enter<'a, T: Tally>(
        roots: &'a Roots,
        place: &'a Place,
        wait: bool,
        tally: &mut T,
    ) -> Option<(Self::Held<'a>, MetadataBlock)>;

    fn node<'a, T: Tally>(
        blocks: &'a BlockManager,
        block: MetadataBlock,
        wait: bool,
        tally: &mut T,
    ) -> Result<std::result::Result<Self::Node<'a>, Missed>>;

    fn view<'b>(node: &'b Self::Node<'_>) -> View<'b>;

    fn is_valid(node: &Self::Node<'_>) -> bool;
}

#[inline(always)]
fn locked_node<'a, T: Tally>(
    blocks: &'a BlockManager,
    block: MetadataBlock,
    wait: bool,
    tally: &mut T,
) -> Result<std::result::Result<ReadGuard<'a>, Missed>> {
    tally.with(|c| {
        c.acquisitions += 1;
        c.atomic_rmws += 2;
    });
    let tried = blocks.try_read(block, Validator::Node8)?;
    if tried.is_ok() || !wait {
        let is_held = matches!(tried, Err(Missed::Held));
        tally.with(|c| c.contended += u64::from(is_held));
        return Ok(tried);
    }
    let since = T::IS_ON.then(Instant::now);
    let guard = blocks.read(block, Validator::Node8)?;
    tally.with(|c| {
        c.contended += 1;
        c.wait_ns += since.map_or(0, |s| s.elapsed().as_nanos() as u64);
    });
    Ok(Ok(guard))
}

/// Looks that even those take who must not wait: most changes are over by then.
const MOST_LOOKS: u32 = 64;

// Returning it through memory costs a third of a lookup.
#[inline(always)]
fn unlocked_node(
    blocks: &BlockManager,
    block: MetadataBlock,
    wait: bool,
) -> Result<std::result::Result<Peek<'_>, Missed>> {
    let mut looks = 0;
    loop {
        looks += 1;
        match blocks.peek(block) {
            Err(Missed::Held) if looks < MOST_LOOKS => std::hint::spin_loop(),
            Err(Missed::NotCached) if wait => drop(blocks.read(block, Validator::Node8)?),
            Err(Missed::Held) if wait => std::thread::yield_now(),
            other => return Ok(other),
        }
    }
}

/// A scheme whose nodes are locked.
macro_rules! locked_nodes {
    () => {
        type Node<'a> = ReadGuard<'a>;

        #[inline(always)]
        fn node<'a, T: Tally>(
            blocks: &'a BlockManager,
            block: MetadataBlock,
            wait: bool,
            tally: &mut T,
        ) -> Result<std::result::Result<ReadGuard<'a>, Missed>> {
            locked_node(blocks, block, wait, tally)
        }

        fn view<'b>(node: &'b Self::Node<'_>) -> View<'b> {
            node.view()
        }

        fn is_valid(_: &Self::Node<'_>) -> bool {
            true
        }
    };
}

pub(crate) struct V2013;
pub(crate) struct Kernel;
pub(crate) struct A;
pub(crate) struct B;
pub(crate) struct Optimistic;

impl Scheme for V2013 {
    type Held<'a> = RwLockReadGuard<'a, ()>;
    locked_nodes!();

    fn enter<'a, T: Tally>(
        roots: &'a Roots,
        _: &'a Place,
        wait: bool,
        tally: &mut T,
    ) -> Option<(Self::Held<'a>, MetadataBlock)> {
        under_root_lock(roots, wait, tally)
    }
}

impl Scheme for Kernel {
    type Held<'a> = RwLockReadGuard<'a, ()>;
    locked_nodes!();

    fn enter<'a, T: Tally>(
        roots: &'a Roots,
        _: &'a Place,
        _: bool,
        tally: &mut T,
    ) -> Option<(Self::Held<'a>, MetadataBlock)> {
        under_root_lock(roots, true, tally)
    }
}

impl Scheme for A {
    type Held<'a> = Pin<'a>;
    locked_nodes!();

    fn enter<'a, T: Tally>(
        roots: &'a Roots,
        place: &'a Place,
        _: bool,
        tally: &mut T,
    ) -> Option<(Self::Held<'a>, MetadataBlock)> {
        let pin = roots.epochs.pin(place);
        let try_it = || match roots.short.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let wait_for = || roots.short.lock().unwrap_or_else(PoisonError::into_inner);
        // It is held for a moment only, so even those who must not wait do.
        let short = take(true, tally, 2, try_it, wait_for)?;
        let root = roots.root();
        drop(short);
        Some((pin, root?))
    }
}

/// A node under the root lock. In debug builds it is locked as well: a change that does not hold the root lock then waits for the
/// reader, and is found out, rather than being seen in part.
pub(crate) struct Checked<'a> {
    peek: Peek<'a>,
    #[cfg(debug_assertions)]
    _lock: ReadGuard<'a>,
}

impl Scheme for B {
    type Held<'a> = RwLockReadGuard<'a, ()>;
    type Node<'a> = Checked<'a>;

    fn enter<'a, T: Tally>(
        roots: &'a Roots,
        _: &'a Place,
        wait: bool,
        tally: &mut T,
    ) -> Option<(Self::Held<'a>, MetadataBlock)> {
        under_root_lock(roots, wait, tally)
    }

    #[inline(always)]
    fn node<'a, T: Tally>(
        blocks: &'a BlockManager,
        block: MetadataBlock,
        wait: bool,
        _: &mut T,
    ) -> Result<std::result::Result<Checked<'a>, Missed>> {
        #[cfg(debug_assertions)]
        let _lock = match blocks.try_read(block, Validator::Node8)? {
            Err(_) if wait => blocks.read(block, Validator::Node8)?,
            Err(missed) => return Ok(Err(missed)),
            Ok(lock) => lock,
        };
        let peek = unlocked_node(blocks, block, wait)?;
        Ok(peek.map(|peek| Checked {
            peek,
            #[cfg(debug_assertions)]
            _lock,
        }))
    }

    fn view<'b>(node: &'b Self::Node<'_>) -> View<'b> {
        node.peek.view()
    }

    fn is_valid(node: &Self::Node<'_>) -> bool {
        node.peek.is_valid()
    }
}

impl Scheme for Optimistic {
    type Held<'a> = Pin<'a>;
    type Node<'a> = Peek<'a>;

    #[inline(always)]
    fn node<'a, T: Tally>(
        blocks: &'a BlockManager,
        block: MetadataBlock,
        wait: bool,
        _: &mut T,
    ) -> Result<std::result::Result<Peek<'a>, Missed>> {
        unlocked_node(blocks, block, wait)
    }

    fn view<'b>(node: &'b Self::Node<'_>) -> View<'b> {
        node.view()
    }

    fn is_valid(node: &Self::Node<'_>) -> bool {
        node.is_valid()
    }

    fn enter<'a, T: Tally>(
        roots: &'a Roots,
        place: &'a Place,
        _: bool,
        _: &mut T,
    ) -> Option<(Self::Held<'a>, MetadataBlock)> {
        let pin = roots.epochs.pin(place);
        Some((pin, roots.root()?))
    }
}

/// What a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The value of the mapping.
    Value(u64),
    /// The block is not mapped.
    Nothing,
    /// There is no such device.
    NoDevice,
    /// It could not be told at once.
    WouldBlock(WouldBlock),
}

/// Attempts of a lookup that must not wait.
const MOST_ATTEMPTS: u32 = 16;

enum Step {
    Down(MetadataBlock),
    End(Found),
}

/// What one node says.
#[inline(always)]
fn step(view: View<'_>, key: u64, is_top: bool) -> (Step, bool) {
    let is_leaf = view.is_leaf();
    let at = match is_leaf {
        true => view.find(key),
        false => view.floor(key),
    };
    let Some(at) = at else {
        let end = match is_top {
            true => Found::NoDevice,
            false => Found::Nothing,
        };
        return (Step::End(end), false);
    };
    let value = view.number(max_entries(8), at);
    match (is_leaf, is_top) {
        (true, false) => (Step::End(Found::Value(value)), false),
        (is_device, _) => (Step::Down(MetadataBlock(value)), is_device),
    }
}

/// Looks a virtual block of a device up.
pub(crate) fn lookup<S: Scheme, T: Tally>(
    blocks: &BlockManager,
    roots: &Roots,
    place: &Place,
    (device, block): (u64, u64),
    wait: bool,
    mut tally: T,
) -> Result<Found> {
    tally.with(|c| c.lookups += 1);
    let mut attempts = 0;
    loop {
        let found = attempt::<S, T>(blocks, roots, place, (device, block), wait, &mut tally)?;
        attempts += 1;
        let reason = match found {
            Some(Found::WouldBlock(WouldBlock::Root)) if wait => {
                std::thread::yield_now();
                continue;
            }
            Some(Found::WouldBlock(reason)) => reason,
            Some(found) => return Ok(found),
            None => {
                tally.with(|c| c.retries += 1);
                if wait || attempts < MOST_ATTEMPTS {
                    continue;
                }
                WouldBlock::Block
            }
        };
        tally.with(|c| match reason {
            WouldBlock::Root => c.would_block_root += 1,
            WouldBlock::Block => c.would_block_block += 1,
            WouldBlock::Cache => c.would_block_cache += 1,
        });
        return Ok(Found::WouldBlock(reason));
    }
}

/// One way down; none if something changed meanwhile.
fn attempt<S: Scheme, T: Tally>(
    blocks: &BlockManager,
    roots: &Roots,
    place: &Place,
    (device, block): (u64, u64),
    wait: bool,
    tally: &mut T,
) -> Result<Option<Found>> {
    let Some((_held, root)) = S::enter(roots, place, wait, tally) else {
        return match roots.has_failed.load(Ordering::Acquire) {
            true => Err(Error::new(
                ErrorKind::Io,
                "the metadata could not be read again after a failure; open it anew",
            )),
            false => Ok(Some(Found::WouldBlock(WouldBlock::Root))),
        };
    };
    let would_block = |missed| {
        Found::WouldBlock(match missed {
            Missed::NotCached => WouldBlock::Cache,
            Missed::Held => WouldBlock::Block,
        })
    };
    let mut node = match S::node(blocks, root, wait, tally)? {
        Ok(node) => node,
        Err(missed) => {
            blocks.note_miss(missed, root);
            return Ok(Some(would_block(missed)));
        }
    };
    let (mut key, mut is_top) = (device, true);
    for _ in 0..2 * MOST_LEVELS {
        let (step, is_device) = step(S::view(&node), key, is_top);
        match step {
            Step::End(found) => return Ok(S::is_valid(&node).then_some(found)),
            Step::Down(child) => {
                let below = S::node(blocks, child, wait, tally);
                // What was read of a node that changed meanwhile may be anything.
                if !S::is_valid(&node) {
                    return Ok(None);
                }
                match below? {
                    Ok(below) => node = below,
                    Err(missed) => {
                        blocks.note_miss(missed, child);
                        return Ok(Some(would_block(missed)));
                    }
                }
                if is_device {
                    (key, is_top) = (block, false);
                }
            }
        }
    }
    match S::is_valid(&node) {
        true => Err(too_deep(root)),
        false => Ok(None),
    }
}
