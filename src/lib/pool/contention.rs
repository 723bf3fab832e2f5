//! How often a lock was taken, was not free, and had to be waited for. Taking a free one costs what it costs without: the number of
//! times is kept by what the lock guards, and the rest is counted only by those who wait anyway.

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use std::sync::PoisonError;
use std::time::Instant;

/// What the locks of one class cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockCounts {
    /// Times that one was taken.
    pub acquisitions: u64,
    /// Times that it was not free at once.
    pub contended: u64,
    /// Nanoseconds of waiting for it.
    pub wait_ns: u64,
}

impl LockCounts {
    /// Those of both.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            acquisitions: self.acquisitions + other.acquisitions,
            contended: self.contended + other.contended,
            wait_ns: self.wait_ns + other.wait_ns,
        }
    }
}

/// Watches locks of one class, once it is [on](Self::begin).
#[derive(Debug)]
pub(super) struct Watch {
    is_on: AtomicBool,
    contended: AtomicU64,
    wait_ns: AtomicU64,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            is_on: AtomicBool::new(false),
            contended: AtomicU64::new(0),
            wait_ns: AtomicU64::new(0),
        }
    }
}

impl Watch {
    pub(super) fn begin(&self) {
        self.is_on.store(true, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        // To a model it would only be one more way to get there.
        if !cfg!(loom)
            && let Ok(guard) = mutex.try_lock()
        {
            return guard;
        }
        self.wait(mutex)
    }

    #[cold]
    fn wait<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        let is_on = !cfg!(loom) && self.is_on.load(Ordering::Relaxed);
        let since = is_on.then(Instant::now);
        let guard = mutex.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(since) = since {
            let waited = since.elapsed().as_nanos() as u64;
            self.contended.fetch_add(1, Ordering::Relaxed);
            self.wait_ns.fetch_add(waited, Ordering::Relaxed);
        }
        guard
    }

    /// With how often they were taken.
    pub(super) fn counts(&self, acquisitions: u64) -> LockCounts {
        LockCounts {
            acquisitions,
            contended: self.contended.load(Ordering::Relaxed),
            wait_ns: self.wait_ns.load(Ordering::Relaxed),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn only_who_waits_is_counted_and_only_when_it_is_on() {
        for is_on in [false, true] {
            let (watch, mutex) = (Watch::default(), Mutex::new(()));
            if is_on {
                watch.begin();
            }
            drop(watch.lock(&mutex));
            assert_eq!(watch.counts(0), LockCounts::default());
            let barrier = Barrier::new(2);
            std::thread::scope(|scope| {
                let guard = watch.lock(&mutex);
                scope.spawn(|| {
                    assert!(mutex.try_lock().is_err());
                    barrier.wait();
                    drop(watch.lock(&mutex));
                });
                barrier.wait();
                std::thread::sleep(std::time::Duration::from_millis(50));
                drop(guard);
            });
            // A thread that is late by 50 ms finds the lock free.
            let counts = watch.counts(7);
            assert!(counts.contended <= u64::from(is_on), "{counts:?}");
            assert_eq!(counts.wait_ns > 0, counts.contended > 0);
        }
    }
}
