//! What the requests and replies of all connections may have in memory.
//!
//! 1. Each connection has a [`SHARE`] of its own: it never waits for memory that others have.
//! 2. What all have beside, they may [borrow](Memory::borrow) as long as there is some. Whoever gets none does with its share.
//! 3. When nothing is left, connections that have borrowed and whose clients do not take or send what they asked for are hung up on.

use super::outbox::Outbox;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Bytes that a connection can always have.
pub(super) const SHARE: usize = 256 << 10;
/// Bytes that all connections have together beside their shares.
const COMMON: usize = 96 << 20;
/// While nothing is left, clients have this time to take or send what memory was borrowed for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often they are looked at.
const LOOKS: Duration = Duration::from_millis(500);

/// What all connections of a server have together.
#[derive(Debug)]
pub(super) struct Memory {
    left: AtomicUsize,
    borrowers: Mutex<Borrowers>,
}

#[derive(Debug)]
struct Borrowers {
    all: Vec<Weak<Outbox>>,
    looked: Instant,
}

impl Default for Memory {
    fn default() -> Self {
        let borrowers = Borrowers {
            all: Vec::new(),
            looked: Instant::now(),
        };
        Self {
            left: AtomicUsize::new(COMMON),
            borrowers: Mutex::new(borrowers),
        }
    }
}

impl Memory {
    /// One more connection may borrow.
    pub(super) fn join(&self, outbox: &Arc<Outbox>) {
        let mut borrowers = self
            .borrowers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        borrowers.all.retain(|outbox| outbox.strong_count() > 0);
        borrowers.all.push(Arc::downgrade(outbox));
    }

    /// Takes `len` bytes if there are so many left. Never waits.
    pub(super) fn borrow(&self, len: usize) -> bool {
        let order = Ordering::Relaxed;
        let left = (self.left).fetch_update(order, order, |left| left.checked_sub(len));
        if left.is_err() {
            self.look();
        }
        left.is_ok()
    }

    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }

    /// Gives back what was borrowed.
    pub(super) fn give_back(&self, len: usize) {
        self.left.fetch_add(len, Ordering::Relaxed);
    }

    /// Hangs up on those who have borrowed and do not move. Whoever looks may have its own outbox locked, so nobody is waited for.
    fn look(&self) {
        let Ok(mut borrowers) = self.borrowers.try_lock() else {
            return;
        };
        if borrowers.looked.elapsed() < LOOKS {
            return;
        }
        borrowers.looked = Instant::now();
        for outbox in borrowers.all.iter().filter_map(Weak::upgrade) {
            if outbox.has_held_for(PATIENCE) {
                outbox.hang_up();
            }
        }
    }
}
