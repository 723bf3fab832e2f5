//! The thread that has the worker, and with it the data device, which does everything at once.

use super::Yard;
use super::submitter::Submitter;
use crate::pool::{Bio, BioResult, Effect, Event, MapCounts, PoolMode, Worker};
use crate::replay::books::Books;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The worker looks around so often, at least: memory of a cell that comes back wakes nobody.
const LOOK_AROUND: Duration = Duration::from_millis(2);

/// Wakes the worker.
#[derive(Debug, Default)]
pub(super) struct Bell {
    state: Mutex<State>,
    changed: Condvar,
    /// The worker has nothing to do.
    is_idle: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    is_rung: bool,
    stops: bool,
}

impl Bell {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ring(&self) {
        self.state().is_rung = true;
        self.changed.notify_one();
    }

    /// A stretch begins.
    pub(super) fn open(&self) {
        self.state().stops = false;
    }

    /// The worker ends once it has nothing to do.
    pub(super) fn stop(&self) {
        self.state().stops = true;
        self.changed.notify_one();
    }

    /// Waits until there is something to do. False if there will be nothing.
    fn rest(&self, time: Duration) -> bool {
        let mut state = self.state();
        if !state.is_rung && !state.stops {
            self.is_idle.store(true, Ordering::SeqCst);
            let waited = self.changed.wait_timeout(state, time);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            self.is_idle.store(false, Ordering::SeqCst);
            return std::mem::take(&mut state.is_rung) || !state.stops;
        }
        std::mem::take(&mut state.is_rung)
    }
}

impl Yard<'_> {
    /// True if what is under way waits for space, or for the resumption: there is nothing to wait for here.
    pub(super) fn is_stuck(&self) -> bool {
        let pool = self.player.pool;
        (pool.mode() == PoolMode::OutOfDataSpace || pool.is_suspended())
            && self.bell.is_idle.load(Ordering::SeqCst)
            && !pool.has_work()
    }

    fn put(&self, bio: Box<Bio>, result: BioResult) {
        if let Some(desk) = self.desks.get(Submitter::of(&bio)) {
            desk.put(bio, result);
        }
    }
}

/// Is the worker until it is stopped and has nothing to do.
pub(super) fn work(worker: &mut Worker, books: &mut Books, yard: &Yard<'_>) {
    let pool = yard.player.pool;
    let size = pool.block_sectors();
    let mut effects = Vec::new();
    let mut done = VecDeque::new();
    let mut event = Event::Work;
    loop {
        let now = yard.start.elapsed();
        let has_more = worker.apply(now, event, &mut effects);
        let now = now.as_nanos() as u64;
        for effect in effects.drain(..) {
            books.count_effect(&effect, size);
            match effect {
                Effect::Issue { bio, .. } | Effect::ReadOrigin { bio, .. } => {
                    if let Some((bio, result)) = pool.end_io(bio, Ok(())) {
                        yard.put(bio, result);
                    }
                }
                Effect::End { bio, result, .. } => yard.put(bio, result),
                Effect::Zero { job, .. }
                | Effect::Copy { job, .. }
                | Effect::Discard { job, .. }
                | Effect::Flush { job } => done.push_back(job),
                // Nobody asks while requests are played.
                Effect::Answer { .. } => {}
                Effect::Notice(notice) => books.notice(now, notice),
            }
        }
        if now >= books.next_sample() {
            let mut counts = MapCounts::default();
            yard.desks
                .iter()
                .for_each(|desk| desk.add_counts(&mut counts));
            books.sample(now, pool, &counts, worker.counts());
        }
        event = match done.pop_front() {
            Some(job) => Event::Done {
                job,
                result: Ok(()),
            },
            None => {
                let is_busy = has_more || pool.has_work();
                if !is_busy && !yard.bell.rest(LOOK_AROUND) && !pool.has_work() {
                    return;
                }
                Event::Work
            }
        };
    }
}
