//! Turns of the worker: whoever has something for it is the worker for a moment, if nobody else is.
//!
//! The worker has a thread of its own, which takes the turns that nobody else takes. To wake that costs as much as a turn does, and whoever
//! waits for what comes of it waits for two threads to be woken. So a thread that has something for the worker tries to take the turn
//! itself, and tells the worker's thread only if somebody else is at it.
//!
//! 1. One thread at a time takes a turn, and passes on what came of it afterwards: it holds nothing then.
//! 2. A turn may have to wait for the metadata device. As long as turns do, they are the worker's thread's.
//! 3. Between the flush of the data device that begins a commit and its end nobody takes a turn. The flush, and the deadlines, are the
//!    worker's thread's.

use super::event_log::EventLog;
use crate::error::Result;
use crate::pool::{BioResult, Effect, Event, JobId, Worker};
use std::cell::Cell;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// A turn that takes longer has waited for something.
const SLOW: Duration = Duration::from_millis(1);

thread_local! {
    /// This thread can take a turn after what it does, and whether it has to: somebody was not woken for that reason.
    static COMES: Cell<(bool, bool)> = const { Cell::new((false, false)) };
}

/// Does something after which this thread can take a turn, so that nobody has to be woken for what the worker gets meanwhile. It `owes` the
/// turn if the worker got something, whatever came of the act itself: a read that returns the last ticket somebody waits for is over, and
/// leaves that somebody to the worker.
pub(super) fn before_a_turn<T>(owes: &mut bool, act: impl FnOnce() -> T) -> T {
    let outer = COMES.replace((true, false));
    let done = act();
    let (_, got_something) = COMES.replace(outer);
    *owes |= got_something;
    done
}

/// True if this thread takes a turn after what it does, which it has to from here on.
pub(super) fn comes() -> bool {
    let (can, has_to) = COMES.get();
    COMES.set((can, has_to || can));
    can
}

/// What came of a turn.
#[derive(Default)]
pub(super) struct Turn {
    /// For carriers.
    pub(super) effects: Vec<Effect>,
    /// Bios that ended, by their numbers.
    pub(super) ends: Vec<(u64, BioResult)>,
    /// To those who asked.
    pub(super) answers: Vec<(u64, Result<()>)>,
    /// There is more to do at once.
    pub(super) has_more: bool,
    /// There is something for the worker's thread: a flush, or a deadline that it does not know.
    pub(super) is_for_thread: bool,
}

/// The worker, and what is known of it between two turns.
pub(super) struct Shared {
    pub(super) worker: Worker,
    start: Instant,
    effects: Vec<Effect>,
    /// The flush that a commit begins with, until its thread does it.
    pub(super) flush: Option<JobId>,
    /// Its thread looks around by then.
    looks_around: Option<Duration>,
    /// The last turn took long: it had to wait for the metadata.
    is_slow: bool,
    is_over: bool,
}

impl Shared {
    /// Has it take events.
    pub(super) fn turn(&mut self, all: impl IntoIterator<Item = Event>, events: &EventLog) -> Turn {
        let mut turn = Turn::default();
        let now = self.start.elapsed();
        // The worker says whether it got more meanwhile.
        turn.has_more = before_a_turn(&mut false, || {
            self.worker.apply_all(now, all, &mut self.effects)
        });
        self.is_slow = self.start.elapsed() - now > SLOW;
        for effect in self.effects.drain(..) {
            match effect {
                Effect::End { bio, result, .. } => turn.ends.push((bio.id, result)),
                Effect::Answer { tag, result } => turn.answers.push((tag, result)),
                Effect::Notice(notice) => events.add_notice(&notice),
                Effect::Flush { job } => self.flush = Some(job),
                other => turn.effects.push(other),
            }
        }
        let deadline = self.worker.deadline();
        let is_sooner = deadline.is_some_and(|at| self.looks_around.is_none_or(|then| at < then));
        if is_sooner {
            self.looks_around = deadline;
        }
        turn.is_for_thread = is_sooner || self.flush.is_some();
        turn
    }

    /// For how long its thread may wait; none is until it is told something.
    pub(super) fn rest(&mut self) -> Option<Duration> {
        self.looks_around = self.worker.deadline();
        self.looks_around
            .map(|at| at.saturating_sub(self.start.elapsed()))
    }
}

/// A worker that threads share.
pub(super) struct Turns(Mutex<Shared>);

impl Turns {
    pub(super) fn of(worker: Worker) -> Self {
        Self(Mutex::new(Shared {
            worker,
            start: Instant::now(),
            effects: Vec::new(),
            flush: None,
            looks_around: None,
            is_slow: false,
            is_over: false,
        }))
    }

    /// Waits for the worker. None if it is over, or if a turn was not brought to its end: nobody knows then what it has done.
    pub(super) fn wait(&self) -> Option<MutexGuard<'_, Shared>> {
        self.0.lock().ok().filter(|shared| !shared.is_over)
    }

    /// The worker, if nobody is at it, no flush is due, and a turn is not likely to take long.
    pub(super) fn try_take(&self) -> Option<MutexGuard<'_, Shared>> {
        let shared = self.0.try_lock().ok()?;
        let is_free = !shared.is_over && !shared.is_slow && shared.flush.is_none();
        is_free.then_some(shared)
    }

    /// Nobody takes a turn any more.
    pub(super) fn end(&self) {
        if let Some(mut shared) = self.wait() {
            shared.is_over = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_owed_if_somebody_was_not_woken() {
        assert!(!comes());
        let (mut owes, mut outer) = (false, false);
        before_a_turn(&mut owes, || ());
        assert!(!owes);
        before_a_turn(&mut outer, || before_a_turn(&mut owes, || assert!(comes())));
        assert_eq!((owes, outer), (true, false));
        before_a_turn(&mut owes, || ());
        assert!(owes, "it was not taken");
        assert!(!comes());
    }
}
