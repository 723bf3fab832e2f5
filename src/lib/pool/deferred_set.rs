//! The deferred set: work that has to wait until everything that is in flight now has ended.
//!
//! A ring of generations, each with a count of tickets and the work that waits for all generations up to it. The guarantee: work
//! runs only after every ticket that was taken before it was added is returned; a few later ones may be waited for, too. Whoever
//! holds the cell that proves a mapping to be current takes the ticket *before* releasing it.

use super::contention::{LockCounts, Watch};
use super::list::{Linked, List, Taken};
use crate::sync::{Mutex, MutexGuard};

const GENERATIONS: usize = 64;

/// Something is in flight. It has to be returned.
#[derive(Debug)]
#[must_use]
pub(super) struct Ticket(u8);

#[derive(Debug)]
struct Generation<W: Linked> {
    tickets: u32,
    work: List<W>,
}

#[derive(Debug)]
struct Ring<W: Linked> {
    generations: [Generation<W>; GENERATIONS],
    current: usize,
    /// The oldest that has tickets, or the current one.
    sweeper: usize,
    /// Times that the lock was taken.
    taken: u64,
}

/// The set.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct DeferredSet<W: Linked>(Mutex<Ring<W>>, Watch);

impl<W: Linked> Default for DeferredSet<W> {
    fn default() -> Self {
        let ring = Ring {
            generations: std::array::from_fn(|_| Generation {
                tickets: 0,
                work: List::default(),
            }),
            current: 0,
            sweeper: 0,
            taken: 0,
        };
        Self(Mutex::new(ring), Watch::default())
    }
}

impl<W: Linked> DeferredSet<W> {
    fn ring(&self) -> MutexGuard<'_, Ring<W>> {
        let mut ring = self.1.lock(&self.0);
        ring.taken += 1;
        ring
    }

    /// Has waits for its lock counted from here on.
    pub(super) fn watch(&self) {
        self.1.begin();
    }

    /// What its lock cost.
    pub(super) fn lock_counts(&self) -> LockCounts {
        self.1.counts(self.1.lock(&self.0).taken)
    }

    /// A ticket for something that is in flight from here on.
    pub(super) fn enter(&self) -> Ticket {
        let mut ring = self.ring();
        let current = ring.current;
        ring.generations[current].tickets += 1;
        Ticket(current as u8)
    }

    /// It has ended. Returns the work whose wait is over.
    pub(super) fn leave(&self, ticket: Ticket) -> Taken<W> {
        let mut ring = self.ring();
        let Ring {
            generations,
            current,
            sweeper,
            ..
        } = &mut *ring;
        generations[usize::from(ticket.0)].tickets -= 1;
        let mut ready = List::default();
        while generations[*sweeper].tickets == 0 {
            for work in generations[*sweeper].work.take() {
                ready.push(work);
            }
            if sweeper == current {
                break;
            }
            *sweeper = (*sweeper + 1) % GENERATIONS;
        }
        drop(ring);
        ready.take()
    }

    /// Adds work that waits for everything in flight. It comes back if nothing is.
    pub(super) fn defer(&self, work: Box<W>) -> Option<Box<W>> {
        let mut ring = self.ring();
        let current = ring.current;
        if ring.sweeper == current && ring.generations[current].tickets == 0 {
            return Some(work);
        }
        ring.generations[current].work.push(work);
        let next = (current + 1) % GENERATIONS;
        // A ring that came round goes on with the generation it is at.
        if next != ring.sweeper {
            ring.current = next;
        }
        None
    }

    /// True if nothing is in flight.
    pub(super) fn is_quiet(&self) -> bool {
        let ring = self.ring();
        ring.generations.iter().all(|g| g.tickets == 0)
    }
}

#[cfg(test)]
#[derive(Debug)]
struct Work(u32, Option<Box<Work>>);

#[cfg(test)]
impl Linked for Work {
    fn link(&mut self) -> &mut Option<Box<Self>> {
        &mut self.1
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn work(n: u32) -> Box<Work> {
        Box::new(Work(n, None))
    }

    fn numbers(taken: Taken<Work>) -> Vec<u32> {
        taken.map(|w| w.0).collect()
    }

    #[test]
    fn work_runs_at_once_when_nothing_is_in_flight() {
        let set = DeferredSet::default();
        assert!(set.defer(work(1)).is_some());
        let ticket = set.enter();
        assert!(set.defer(work(2)).is_none());
        assert_eq!(numbers(set.leave(ticket)), [2]);
        assert!(set.defer(work(3)).is_some());
    }

    #[test]
    fn work_waits_for_older_tickets_only() {
        let set = DeferredSet::default();
        let old = set.enter();
        assert!(set.defer(work(1)).is_none());
        let new = set.enter();
        assert!(set.defer(work(2)).is_none());
        assert_eq!(numbers(set.leave(old)), [1]);
        assert_eq!(numbers(set.leave(new)), [2]);
        assert!(set.is_quiet());
    }

    #[test]
    fn a_newer_ticket_that_ends_first_releases_nothing() {
        let set = DeferredSet::default();
        let old = set.enter();
        assert!(set.defer(work(1)).is_none());
        let new = set.enter();
        assert!(set.defer(work(2)).is_none());
        assert!(numbers(set.leave(new)).is_empty());
        assert_eq!(numbers(set.leave(old)), [1, 2]);
    }

    #[test]
    fn more_generations_than_the_ring_has() {
        let set = DeferredSet::default();
        let first = set.enter();
        let mut later = Vec::new();
        for n in 0..200 {
            assert!(set.defer(work(n)).is_none());
            later.push(set.enter());
        }
        for ticket in later {
            assert!(numbers(set.leave(ticket)).is_empty());
        }
        assert_eq!(numbers(set.leave(first)), (0..200).collect::<Vec<_>>());
        assert!(set.defer(work(1)).is_some());
    }
}

/// Run with `RUSTFLAGS="--cfg loom"`.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread;

    #[test]
    fn work_runs_once_and_after_what_was_in_flight() {
        loom::model(|| {
            let set = Arc::new(DeferredSet::<Work>::default());
            let has_ended = Arc::new(AtomicBool::new(false));
            let ticket = set.enter();
            let other = {
                let (set, has_ended) = (set.clone(), has_ended.clone());
                thread::spawn(move || {
                    has_ended.store(true, Ordering::Relaxed);
                    let ready = set.leave(ticket).count();
                    let another = set.enter();
                    ready + set.leave(another).count()
                })
            };
            let ran_here = match set.defer(Box::new(Work(1, None))) {
                Some(_) => {
                    assert!(has_ended.load(Ordering::Relaxed), "before it ended");
                    1
                }
                None => 0,
            };
            let ran_there = other.join().expect("no panic");
            assert_eq!(ran_here + ran_there, 1);
        });
    }
}
