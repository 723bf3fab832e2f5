//! Threads that read a trace before anybody needs it.

use std::collections::VecDeque;
use std::num::NonZero;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::error::{Error, ErrorKind, Result};

/// Work that is done step by step, by whoever has the time.
pub(super) trait Steps: Send + Sync + 'static {
    /// Does one thing that can be done. False if there is none until another one is done, or something that was found is taken.
    fn step(&self) -> bool;
}

/// Threads for the same work: with whoever waits for what they find, who helps, as many as there are processors. They end when the crew is
/// gone, but one that waits for its input ends with the process at the latest: a read cannot be broken off.
pub(super) struct Crew<S>(Arc<Shared<S>>);

struct Shared<S> {
    steps: S,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Steps that are done, and things that were taken.
    changes: u64,
    /// Threads that wait for another change.
    waiting: u32,
    is_over: bool,
    has_panicked: bool,
}

impl<S: Steps> Crew<S> {
    /// A crew of at most so many threads. With none, as with one processor, whoever waits does everything.
    pub(super) fn new(steps: S, most: usize) -> Self {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let shared = Arc::new(Shared {
            steps,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        for _ in 1..processors.min(most.saturating_add(1)) {
            let shared = Arc::clone(&shared);
            let thread = thread::Builder::new().name("read".into());
            // There is no need of any one of them.
            thread.spawn(move || shared.run()).ok();
        }
        Self(shared)
    }

    /// Gives something to do, or room for what is found.
    pub(super) fn give(&self, give: impl FnOnce(&S)) {
        give(&self.0.steps);
        self.0.change();
    }

    /// Takes what was found, once there is something; does a step itself rather than wait.
    ///
    /// # Errors
    /// `Io` if a step panicked.
    pub(super) fn take<T>(&self, mut take: impl FnMut(&S) -> Option<T>) -> Result<T> {
        loop {
            let state = self.0.state();
            let (changes, has_panicked) = (state.changes, state.has_panicked);
            drop(state);
            if let Some(found) = take(&self.0.steps) {
                self.0.change();
                return Ok(found);
            }
            if has_panicked {
                let message = "a thread that read the trace panicked";
                return Err(Error::new(ErrorKind::Io, message));
            }
            if !self.0.step() {
                self.0.wait(changes);
            }
        }
    }
}

impl<S> Drop for Crew<S> {
    fn drop(&mut self) {
        self.0.state().is_over = true;
        self.0.changed.notify_all();
    }
}

impl<S> Shared<S> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody that there may be something to do, or to take.
    fn change(&self) {
        let mut state = self.state();
        state.changes += 1;
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Waits for a change after that many.
    fn wait(&self, changes: u64) {
        let mut state = self.state();
        state.waiting += 1;
        while state.changes == changes && !state.is_over {
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
    }
}

impl<S: Steps> Shared<S> {
    /// Does a step. False if there is none.
    fn step(&self) -> bool {
        // Nobody takes what is half done afterwards.
        let step = panic::catch_unwind(AssertUnwindSafe(|| self.steps.step()));
        if step.is_err() {
            self.state().has_panicked = true;
        }
        let is_done = step.unwrap_or(true);
        if is_done {
            self.change();
        }
        is_done
    }

    fn run(&self) {
        loop {
            let state = self.state();
            let changes = state.changes;
            if state.is_over || state.has_panicked {
                return;
            }
            drop(state);
            if !self.step() {
                self.wait(changes);
            }
        }
    }
}

/// Parts that have nothing to do with each other; the same is done with each.
pub(super) struct Parts<T> {
    work: fn(&mut T),
    given: Mutex<VecDeque<T>>,
    done: Mutex<VecDeque<T>>,
}

impl<T> Parts<T> {
    pub(super) fn new(work: fn(&mut T)) -> Self {
        Self {
            work,
            given: Mutex::default(),
            done: Mutex::default(),
        }
    }

    /// Gives one to do.
    pub(super) fn give(&self, part: T) {
        locked(&self.given).push_back(part);
    }

    /// One that is done, whichever it is.
    pub(super) fn take(&self) -> Option<T> {
        locked(&self.done).pop_front()
    }
}

impl<T: Send + 'static> Steps for Parts<T> {
    fn step(&self) -> bool {
        let part = locked(&self.given).pop_front();
        let Some(mut part) = part else {
            return false;
        };
        (self.work)(&mut part);
        locked(&self.done).push_back(part);
        true
    }
}

/// A lock that nobody panics with.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_given_is_done_and_a_panic_is_an_error() {
        let work = |part: &mut u32| *part = 100_u32.checked_div(*part).expect("no zero");
        for most in 0..3 {
            let crew = Crew::new(Parts::new(work), most);
            (1..=50).for_each(|part| crew.give(|parts| parts.give(part)));
            let take = || crew.take(Parts::take);
            let mut done: Vec<u32> = (1..=50).map(|_| take().expect("a part")).collect();
            done.sort_unstable();
            let mut expected: Vec<u32> = (1..=50).map(|part| 100 / part).collect();
            expected.sort_unstable();
            assert_eq!(done, expected);
            crew.give(|parts| parts.give(0));
            assert!(take().is_err());
        }
    }
}
