//! The commit barrier: waits until every lookup that began before is over.
//!
//! A lookup that takes no locks may be on its way through nodes that this transaction freed. They keep their contents until the next
//! transaction hands them out, so between "the root is final" and "the first allocation of the next transaction" every lookup
//! that may have seen an older root must have ended. Each reader writes the epoch that it began in into a place of its own, which
//! costs no line that others write, too.

use crate::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

/// Where a reader says since when it has been reading; 0 is not at all. Two lines of cache, which are fetched together.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Place(AtomicU64);

impl Place {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }
}

/// All readers, and the epoch.
#[derive(Debug)]
pub(crate) struct Epochs {
    current: AtomicU64,
    places: Mutex<Vec<Arc<Place>>>,
}

/// A reader that is reading.
#[derive(Debug)]
pub(crate) struct Pin<'a>(&'a Place);

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
    }
}

/// A wait that has begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Barrier(u64);

impl Epochs {
    pub(crate) fn new() -> Self {
        Self {
            current: AtomicU64::new(1),
            places: Mutex::new(Vec::new()),
        }
    }

    /// A place for one more reader.
    pub(crate) fn join(&self) -> Arc<Place> {
        let place = Arc::new(Place::new());
        self.places().push(Arc::clone(&place));
        place
    }

    pub(crate) fn leave(&self, place: &Arc<Place>) {
        self.places().retain(|p| !Arc::ptr_eq(p, place));
    }

    fn places(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Place>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to read. The root is looked at afterwards.
    pub(crate) fn pin<'a>(&self, place: &'a Place) -> Pin<'a> {
        place
            .0
            .store(self.current.load(Ordering::Relaxed), Ordering::Relaxed);
        // Either the barrier sees this reader, or the reader sees all that was written before the barrier began.
        fence(Ordering::SeqCst);
        Pin(place)
    }

    /// Begins a barrier: the root is final.
    pub(crate) fn begin(&self) -> Barrier {
        let next = self.current.load(Ordering::Relaxed) + 1;
        self.current.store(next, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Barrier(next)
    }

    /// Waits until all that read before [`begin`](Self::begin) have ended. False if none did.
    pub(crate) fn wait(&self, barrier: Barrier) -> bool {
        let mut has_waited = false;
        for place in self.places().iter() {
            let mut turns = 0;
            while Self::is_before(place, barrier) {
                turns += 1;
                has_waited = true;
                if turns % 64 == 0 {
                    std::thread::yield_now();
                }
                std::hint::spin_loop();
            }
        }
        has_waited
    }

    fn is_before(place: &Place, barrier: Barrier) -> bool {
        let since = place.0.load(Ordering::Acquire);
        since != 0 && since < barrier.0
    }
}

/// Run with `RUSTFLAGS="--cfg loom"`: every order of these few steps that the memory model allows.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::pdata::txn::version_lock::VersionLock;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn nothing_is_reused_before_a_reader_is_through() {
        loom::model(|| {
            let epochs = Arc::new(Epochs::new());
            let place = Arc::new(Place::new());
            // Two blocks: the root is in 0 first, then in 1; 0 is used for something else (9) after the barrier.
            let root = Arc::new(AtomicU64::new(0));
            let blocks = Arc::new([AtomicU64::new(1), AtomicU64::new(2)]);
            let reader = {
                let (epochs, place) = (Arc::clone(&epochs), Arc::clone(&place));
                let (root, blocks) = (Arc::clone(&root), Arc::clone(&blocks));
                thread::spawn(move || {
                    let pin = epochs.pin(&place);
                    let at = root.load(Ordering::Acquire) as usize;
                    let found = blocks[at].load(Ordering::Relaxed);
                    drop(pin);
                    assert_ne!(found, 9, "a block was reused under a reader");
                })
            };
            root.store(1, Ordering::Release);
            let barrier = epochs.begin();
            while Epochs::is_before(&place, barrier) {
                thread::yield_now();
            }
            blocks[0].store(9, Ordering::Relaxed);
            reader.join().expect("no panic");
        });
    }

    #[test]
    fn an_optimistic_reader_sees_all_of_a_change_or_nothing() {
        loom::model(|| {
            let lock = Arc::new(VersionLock::new());
            let words = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
            let writer = {
                let (lock, words) = (Arc::clone(&lock), Arc::clone(&words));
                thread::spawn(move || {
                    assert!(lock.try_lock());
                    words[0].store(1, Ordering::Relaxed);
                    words[1].store(1, Ordering::Relaxed);
                    lock.unlock();
                })
            };
            if let Some(version) = lock.begin_read() {
                let seen = [0, 1].map(|i| words[i].load(Ordering::Relaxed));
                if lock.is_still(version) {
                    assert_eq!(seen[0], seen[1], "half of a change was seen");
                }
            }
            writer.join().expect("no panic");
        });
    }

    #[test]
    fn guards_exclude_each_other() {
        loom::model(|| {
            let lock = Arc::new(VersionLock::new());
            let words = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
            let writer = {
                let (lock, words) = (Arc::clone(&lock), Arc::clone(&words));
                thread::spawn(move || {
                    if lock.try_lock() {
                        words[0].store(1, Ordering::Relaxed);
                        words[1].store(1, Ordering::Relaxed);
                        lock.unlock();
                    }
                })
            };
            if lock.try_share() {
                let seen = [0, 1].map(|i| words[i].load(Ordering::Relaxed));
                assert_eq!(seen[0], seen[1], "a change under a shared lock");
                lock.unshare();
            }
            writer.join().expect("no panic");
        });
    }
}
