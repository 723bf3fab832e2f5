//! The deferred set: work that has to wait until everything that is in flight now has ended.
//!
//! A ring of generations, each with a count of tickets and the work that waits for all generations up to it. The guarantee: work
//! runs only after every ticket that was taken before it was added is returned; a few later ones may be waited for, too. Whoever
//! goes by a mapping takes the ticket while a cell proves it to be current, or before it is looked up.
//!
//! A ticket is an atomic count, taken of the current generation and kept if that is the current one still: then nobody who sweeps
//! has passed it. The lock is for work, and for tickets, too, where a set is to cost what it costs in the kernel.

use super::contention::{LockCounts, Watch};
use super::list::{Linked, List, Taken};
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use crate::sync::{Mutex, MutexGuard, keep_order};

/// A model has fewer, so as to come to an end.
const GENERATIONS: usize = if cfg!(loom) { 4 } else { 64 };

/// Something is in flight. It has to be returned.
#[derive(Debug)]
#[must_use]
pub(super) struct Ticket {
    generation: u8,
    /// Whoever took it held up work for a moment, and nobody may have looked since.
    owes_sweep: bool,
}

/// Work by the generation that it waits for.
#[derive(Debug)]
struct Ring<W: Linked> {
    work: [List<W>; GENERATIONS],
    /// Work in all of them.
    waiting: usize,
    /// The oldest that may have tickets, or the current one.
    sweeper: usize,
    /// Times that the lock was taken.
    taken: u64,
}

/// The set.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct DeferredSet<W: Linked> {
    current: AtomicU32,
    /// There is work that waits.
    is_awaited: AtomicBool,
    /// Every ticket takes the lock.
    is_locked: bool,
    /// By generation.
    tickets: [AtomicU32; GENERATIONS],
    ring: Mutex<Ring<W>>,
    watch: Watch,
}

impl<W: Linked> DeferredSet<W> {
    /// An empty one; with `is_locked` tickets are taken and returned under its lock, as in the kernel.
    pub(super) fn new(is_locked: bool) -> Self {
        Self {
            current: AtomicU32::new(0),
            is_awaited: AtomicBool::new(false),
            is_locked,
            tickets: std::array::from_fn(|_| AtomicU32::new(0)),
            ring: Mutex::new(Ring {
                work: std::array::from_fn(|_| List::default()),
                waiting: 0,
                sweeper: 0,
                taken: 0,
            }),
            watch: Watch::default(),
        }
    }

    #[inline(never)]
    fn ring(&self) -> MutexGuard<'_, Ring<W>> {
        let mut ring = self.watch.lock(&self.ring);
        ring.taken += 1;
        ring
    }

    /// Has waits for its lock counted from here on.
    pub(super) fn watch(&self) {
        self.watch.begin();
    }

    /// What its lock cost.
    pub(super) fn lock_counts(&self) -> LockCounts {
        self.watch.counts(self.watch.lock(&self.ring).taken)
    }

    /// A ticket for something that is in flight from here on. Either work that is added finds it, or whatever is read from here on,
    /// sequentially consistent, is at least as new as what who added the work wrote before.
    #[inline(always)]
    pub(super) fn enter(&self) -> Ticket {
        let _lock = self.is_locked.then(|| self.ring());
        let mut owes_sweep = false;
        loop {
            let current = self.current.load(Ordering::SeqCst);
            self.tickets[current as usize].fetch_add(1, Ordering::SeqCst);
            keep_order();
            if self.current.load(Ordering::SeqCst) == current {
                return Ticket {
                    generation: current as u8,
                    owes_sweep,
                };
            }
            // Who sweeps may have passed it already, or have stopped at it.
            self.tickets[current as usize].fetch_sub(1, Ordering::SeqCst);
            owes_sweep = true;
        }
    }

    /// It has ended. Returns the work whose wait is over, where there is work.
    #[inline(always)]
    pub(super) fn leave(&self, ticket: Ticket) -> Option<Taken<W>> {
        let lock = self.is_locked.then(|| self.ring());
        let left = self.tickets[usize::from(ticket.generation)].fetch_sub(1, Ordering::SeqCst);
        keep_order();
        let is_last = left == 1 || ticket.owes_sweep;
        match is_last && self.is_awaited.load(Ordering::SeqCst) {
            true => Some(self.take_ready(lock)),
            false => None,
        }
    }

    #[cold]
    fn take_ready(&self, lock: Option<MutexGuard<'_, Ring<W>>>) -> Taken<W> {
        self.sweep(&mut lock.unwrap_or_else(|| self.ring()))
    }

    /// Has tickets be taken of the next generation from here on. False if the ring came round: then it goes on with the one it is at.
    fn advance(&self, ring: &Ring<W>) -> bool {
        let next = (self.current.load(Ordering::SeqCst) as usize + 1) % GENERATIONS;
        let has_room = next != ring.sweeper;
        if has_room {
            self.current.store(next as u32, Ordering::SeqCst);
        }
        // Orders this, and what was written before, with the tickets that are counted now.
        fence(Ordering::SeqCst);
        has_room
    }

    /// Takes out the work of all generations up to the oldest that has tickets.
    fn sweep(&self, ring: &mut Ring<W>) -> Taken<W> {
        let mut ready = List::default();
        loop {
            let current = self.current.load(Ordering::SeqCst) as usize;
            while self.tickets[ring.sweeper].load(Ordering::SeqCst) == 0 {
                for work in ring.work[ring.sweeper].take() {
                    ring.waiting -= 1;
                    ready.push(work);
                }
                if ring.sweeper == current {
                    break;
                }
                ring.sweeper = (ring.sweeper + 1) % GENERATIONS;
            }
            // Work that came while the ring was full must not wait for whoever comes from here on: there may always be somebody.
            if ring.work[current].len() == 0 || !self.advance(ring) {
                break;
            }
        }
        if ring.waiting == 0 {
            self.is_awaited.store(false, Ordering::SeqCst);
        }
        ready.take()
    }

    /// Adds work that waits for everything in flight. Returns what does not have to wait any more: this, if nothing is in flight, and
    /// whatever else.
    pub(super) fn defer(&self, work: Box<W>) -> Taken<W> {
        let mut ring = self.ring();
        let current = self.current.load(Ordering::SeqCst);
        ring.work[current as usize].push(work);
        ring.waiting += 1;
        self.is_awaited.store(true, Ordering::SeqCst);
        self.advance(&ring);
        self.sweep(&mut ring)
    }

    /// True if nothing is in flight.
    pub(super) fn is_quiet(&self) -> bool {
        let _ring = self.ring();
        fence(Ordering::SeqCst);
        self.tickets.iter().all(|n| n.load(Ordering::SeqCst) == 0)
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

    fn numbers(taken: impl IntoIterator<Item = Taken<Work>>) -> Vec<u32> {
        taken.into_iter().flatten().map(|w| w.0).collect()
    }

    fn defer(set: &DeferredSet<Work>, n: u32) -> Vec<u32> {
        numbers([set.defer(work(n))])
    }

    fn sets() -> [DeferredSet<Work>; 2] {
        [false, true].map(DeferredSet::new)
    }

    #[test]
    fn work_runs_at_once_when_nothing_is_in_flight() {
        for set in sets() {
            assert_eq!(defer(&set, 1), [1]);
            let ticket = set.enter();
            assert_eq!(defer(&set, 2), [0; 0]);
            assert_eq!(numbers(set.leave(ticket)), [2]);
            assert_eq!(defer(&set, 3), [3]);
        }
    }

    #[test]
    fn work_waits_for_older_tickets_only() {
        for set in sets() {
            let old = set.enter();
            assert_eq!(defer(&set, 1), [0; 0]);
            let new = set.enter();
            assert_eq!(defer(&set, 2), [0; 0]);
            assert_eq!(numbers(set.leave(old)), [1]);
            assert!(!set.is_quiet());
            assert_eq!(numbers(set.leave(new)), [2]);
            assert!(set.is_quiet());
        }
    }

    #[test]
    fn a_newer_ticket_that_ends_first_releases_nothing() {
        for set in sets() {
            let old = set.enter();
            assert_eq!(defer(&set, 1), [0; 0]);
            let new = set.enter();
            assert_eq!(defer(&set, 2), [0; 0]);
            assert!(numbers(set.leave(new)).is_empty());
            assert_eq!(numbers(set.leave(old)), [1, 2]);
        }
    }

    #[test]
    fn more_generations_than_the_ring_has() {
        for set in sets() {
            let first = set.enter();
            let mut later = Vec::new();
            for n in 0..200 {
                assert_eq!(defer(&set, n), [0; 0]);
                later.push(set.enter());
            }
            for ticket in later {
                assert!(numbers(set.leave(ticket)).is_empty());
            }
            assert_eq!(numbers(set.leave(first)), (0..200).collect::<Vec<_>>());
            assert_eq!(defer(&set, 1), [1]);
        }
    }

    #[test]
    fn a_free_ticket_takes_no_lock() {
        for (set, taken) in sets().into_iter().zip([1, 8]) {
            let tickets: Vec<Ticket> = (0..3).map(|_| set.enter()).collect();
            for ticket in tickets {
                assert!(numbers(set.leave(ticket)).is_empty());
            }
            assert!(set.is_quiet());
            // One by whoever asks whether it is quiet.
            assert!(set.lock_counts().acquisitions < taken + 1);
            assert_eq!(set.lock_counts().acquisitions > 1, taken > 1);
        }
    }

    #[test]
    fn work_of_a_full_ring_does_not_wait_for_what_comes_later() {
        for set in sets() {
            let first = set.enter();
            for n in 0..2 * GENERATIONS as u32 {
                assert!(defer(&set, n).is_empty());
            }
            let second = set.enter();
            assert!(numbers(set.leave(first)).len() >= GENERATIONS - 1);
            // Somebody is always in flight.
            let mut last = set.enter();
            let mut ready = numbers(set.leave(second));
            for _ in 0..3 {
                let next = set.enter();
                ready.extend(numbers(set.leave(last)));
                last = next;
            }
            assert_eq!(ready.last(), Some(&(2 * GENERATIONS as u32 - 1)));
            assert!(numbers(set.leave(last)).is_empty());
        }
    }

    #[test]
    fn on_threads_work_waits_for_what_was_in_flight() {
        use std::sync::atomic::{AtomicU64, Ordering};
        // What is in flight adds to the sum of its round and takes it away again when it ends.
        let set = DeferredSet::new(false);
        let (sums, done) = ([const { AtomicU64::new(0) }; 1001], AtomicU64::new(0));
        let (round, early) = (AtomicU64::new(0), AtomicU64::new(0));
        let run = |ready: Option<Taken<Work>>| {
            for n in numbers(ready) {
                let is_early = sums[n as usize].load(Ordering::SeqCst) != 0;
                early.fetch_add(is_early.into(), Ordering::SeqCst);
                done.fetch_add(1, Ordering::SeqCst);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..50_000_000 {
                        let ticket = set.enter();
                        let at = round.load(Ordering::SeqCst) as usize;
                        sums[at].fetch_add(1, Ordering::SeqCst);
                        std::hint::spin_loop();
                        sums[at].fetch_sub(1, Ordering::SeqCst);
                        run(set.leave(ticket));
                        if done.load(Ordering::SeqCst) == 1000 {
                            break;
                        }
                    }
                });
            }
            for n in 0..1000 {
                round.store(u64::from(n) + 1, Ordering::SeqCst);
                run(Some(set.defer(work(n))));
            }
        });
        assert_eq!(
            early.into_inner(),
            0,
            "work came before what it waits for had ended"
        );
        assert_eq!(done.into_inner(), 1000);
    }
}

/// Run with `RUSTFLAGS="--cfg loom"`.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use loom::thread;

    /// Something in flight uses what the work takes away, unless it sees that it is about to.
    fn work_runs_once_and_after_what_was_in_flight(is_locked: bool) {
        loom::model(move || {
            let set = Arc::new(DeferredSet::<Work>::new(is_locked));
            let is_gated = Arc::new(AtomicBool::new(false));
            let is_gone = Arc::new(AtomicBool::new(false));
            let ran = Arc::new(AtomicU32::new(0));
            let run = |is_gone: &AtomicBool, ran: &AtomicU32, ready: Option<Taken<Work>>| {
                for work in ready.into_iter().flatten() {
                    assert_eq!(work.0, 1);
                    is_gone.store(true, Ordering::Relaxed);
                    ran.fetch_add(1, Ordering::Relaxed);
                }
            };
            let other = {
                let (set, is_gated) = (set.clone(), is_gated.clone());
                let (is_gone, ran) = (is_gone.clone(), ran.clone());
                thread::spawn(move || {
                    for _ in 0..2 {
                        let ticket = set.enter();
                        if !is_gated.load(Ordering::SeqCst) {
                            assert!(!is_gone.load(Ordering::Relaxed), "it ran too early");
                        }
                        run(&is_gone, &ran, set.leave(ticket));
                    }
                })
            };
            is_gated.store(true, Ordering::Release);
            run(&is_gone, &ran, Some(set.defer(Box::new(Work(1, None)))));
            other.join().expect("no panic");
            assert_eq!(ran.load(Ordering::Relaxed), 1);
        });
    }

    #[test]
    fn work_runs_once_and_after_what_was_in_flight_without_a_lock() {
        work_runs_once_and_after_what_was_in_flight(false);
    }

    #[test]
    fn work_runs_once_and_after_what_was_in_flight_under_a_lock() {
        work_runs_once_and_after_what_was_in_flight(true);
    }
}
