//! Parses segments ahead of the telling: every core reads the next piece of the file in turn and parses it, while the one
//! that tells takes the results in order.
//!
//! At most [`AHEAD`] segments are read and not told yet. Buffers go round: fresh memory costs as much as parsing.

use super::parse::{Parsed, parse};
use super::segments::{Segment, Segments};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Segments that may wait to be told.
const AHEAD: u64 = 8;

/// A segment with its events, or where its text is wrong and why.
pub(super) struct Told {
    pub(super) segment: Segment,
    pub(super) parsed: std::result::Result<Parsed, (usize, Error)>,
}

/// Segments on their way from the file to the telling.
pub(super) struct Ahead<'a> {
    /// What is read next, and its number.
    reader: Mutex<(Segments<'a>, u64)>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Parsed and not told yet, by number.
    ready: BTreeMap<u64, Result<Told>>,
    told: u64,
    /// The number of the first segment that there is not.
    end: Option<u64>,
    /// Nobody listens any more.
    is_over: bool,
    spare: Vec<(Vec<u8>, Parsed)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Ahead<'a> {
    pub(super) fn new(segments: Segments<'a>) -> Self {
        Self {
            reader: Mutex::new((segments, 0)),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Reads and parses until the file ends or nobody listens any more; any number of threads may do so at once.
    pub(super) fn work(&self) {
        // A worker that fails must not leave the telling waiting for it.
        let _failed = EndWhenPanicking(self);
        while let Some((number, read, spare)) = self.read() {
            let result = match read {
                Ok(Some(segment)) => Ok(Told {
                    parsed: parse(&segment.text, spare),
                    segment,
                }),
                Ok(None) => {
                    let mut state = lock(&self.state);
                    state.end = Some(state.end.map_or(number, |end| end.min(number)));
                    self.changed.notify_all();
                    return;
                }
                Err(e) => Err(e),
            };
            let is_error = result.is_err();
            let mut state = lock(&self.state);
            state.ready.insert(number, result);
            if is_error {
                state.end = Some(number + 1);
            }
            self.changed.notify_all();
        }
    }

    /// Reads the next segment when there is room for it.
    #[allow(clippy::type_complexity)]
    fn read(&self) -> Option<(u64, Result<Option<Segment>>, Parsed)> {
        let mut reader = lock(&self.reader);
        let (segments, next) = &mut *reader;
        let mut state = lock(&self.state);
        while *next >= state.told + AHEAD && !state.is_over {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.is_over || state.end.is_some() {
            return None;
        }
        let (text, parsed) = state.spare.pop().unwrap_or_default();
        drop(state);
        *next += 1;
        Some((*next - 1, segments.next(text), parsed))
    }

    /// The next segment in order; none at the end.
    pub(super) fn next(&self) -> Result<Option<Told>> {
        let mut state = lock(&self.state);
        loop {
            let number = state.told;
            if let Some(told) = state.ready.remove(&number) {
                state.told += 1;
                self.changed.notify_all();
                return told.map(Some);
            }
            if state.end.is_some_and(|end| end <= number) {
                return Ok(None);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives the memory of a segment that was told back.
    pub(super) fn give_back(&self, segment: Segment, parsed: Parsed) {
        lock(&self.state).spare.push((segment.text, parsed));
    }

    /// Lets the workers end when the telling does, however it does.
    pub(super) fn stop_when_dropped(&self) -> Stop<'_, 'a> {
        Stop(self)
    }
}

struct EndWhenPanicking<'b, 'a>(&'b Ahead<'a>);

impl Drop for EndWhenPanicking<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut state = lock(&self.0.state);
            state.end = Some(state.told);
            self.0.changed.notify_all();
        }
    }
}

/// Ends the work of an [`Ahead`] when dropped.
pub(super) struct Stop<'b, 'a>(&'b Ahead<'a>);

impl Drop for Stop<'_, '_> {
    fn drop(&mut self) {
        lock(&self.0.state).is_over = true;
        self.0.changed.notify_all();
    }
}
