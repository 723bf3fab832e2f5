//! A lock of 32 bits for one cached block: readers, one writer, and a version that tells an optimistic reader whether what it
//! read is still what was there.
//!
//! Bit 0: held exclusively. Bits 1 to 7: how many hold it shared. Bits 8 to 31: version, one up whenever an exclusive hold ends.
//! A version comes round after 2^24 changes of one block, all within the few nanoseconds between two looks of a reader.

use crate::sync::atomic::{AtomicU32, Ordering, fence};

const WRITER: u32 = 1;
const READER: u32 = 1 << 1;
const READERS: u32 = 0xfe;
const VERSION: u32 = 1 << 8;

/// The lock.
#[derive(Debug)]
pub(super) struct VersionLock(AtomicU32);

impl VersionLock {
    pub(super) fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Shares the lock. False while somebody holds it exclusively, or too many share it.
    #[inline]
    pub(super) fn try_share(&self) -> bool {
        let mut state = self.0.load(Ordering::Relaxed);
        while state & WRITER == 0 && state & READERS != READERS {
            match self.0.compare_exchange_weak(
                state,
                state + READER,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    #[inline]
    pub(super) fn unshare(&self) {
        self.0.fetch_sub(READER, Ordering::Release);
    }

    /// Takes the lock exclusively. False while anybody holds it.
    pub(super) fn try_lock(&self) -> bool {
        let state = self.0.load(Ordering::Relaxed);
        let is_free = state & (WRITER | READERS) == 0;
        let locked = is_free
            && self
                .0
                .compare_exchange(state, state | WRITER, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        if locked {
            // An optimistic reader that sees anything written from here on sees that the lock is held, too.
            fence(Ordering::Release);
        }
        locked
    }

    pub(super) fn unlock(&self) {
        let state = self.0.load(Ordering::Relaxed);
        self.0
            .store((state & !WRITER).wrapping_add(VERSION), Ordering::Release);
    }

    /// The version to read at; none while somebody holds the lock exclusively.
    #[inline]
    pub(super) fn begin_read(&self) -> Option<u32> {
        let state = self.0.load(Ordering::Acquire);
        (state & WRITER == 0).then_some(state & !READERS)
    }

    /// True if nothing was written since [`begin_read`](Self::begin_read) gave `version`.
    #[inline]
    pub(super) fn is_still(&self, version: u32) -> bool {
        fence(Ordering::Acquire);
        self.0.load(Ordering::Relaxed) & !READERS == version
    }
}
