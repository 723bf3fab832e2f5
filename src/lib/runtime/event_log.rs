//! What whoever manages a pool wants to know: each event with a number, the last ones kept for those who come to look.

use crate::pool::Notice;
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Events that are kept.
const KEPT: usize = 1024;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PoolEvent {
    /// Counts from 1, as the event number of the pool's device in the kernel.
    pub number: u64,
    /// One word: `mode`, `low_water`, `metadata_threshold`, `no_space_timeout`, `metadata_failed`, `deadlock`, `grown`, `grow_failed`,
    /// `size_unknown`, `data_short`.
    pub event: &'static str,
    /// More about it, for people.
    pub detail: String,
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    events: VecDeque<PoolEvent>,
    is_over: bool,
}

/// The events of a pool.
#[derive(Debug, Default)]
pub struct EventLog {
    kept: Mutex<Kept>,
    has_event: Condvar,
}

impl EventLog {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, event: &'static str, detail: String) {
        let mut kept = self.kept();
        kept.last += 1;
        let number = kept.last;
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        kept.events.push_back(PoolEvent {
            number,
            event,
            detail,
        });
        drop(kept);
        self.has_event.notify_all();
    }

    pub(super) fn add_notice(&self, notice: &Notice) {
        let (event, detail) = match notice {
            Notice::Mode(mode) => ("mode", mode.to_string()),
            Notice::LowWater => (
                "low_water",
                "free data blocks are down to the low-water mark".into(),
            ),
            Notice::MetadataThreshold => (
                "metadata_threshold",
                "free metadata blocks are down to the threshold".into(),
            ),
            Notice::Deadlock(waits) => (
                "deadlock",
                format!("{} bios waited for each other's cells", waits.len()),
            ),
            Notice::NoSpaceTimeout => (
                "no_space_timeout",
                "writes waited for space too long, and fail from now on".into(),
            ),
            Notice::MetadataFailed(error) => ("metadata_failed", error.to_string()),
        };
        self.add(event, detail);
    }

    /// The number of the last event.
    pub fn last(&self) -> u64 {
        self.kept().last
    }

    /// Events behind `number`, of those that are kept. Waits for one up to `patience`; none come any more once it is over.
    pub fn after(&self, number: u64, patience: Duration) -> Option<Vec<PoolEvent>> {
        let kept = self.kept();
        let is_quiet = |kept: &mut Kept| kept.last <= number && !kept.is_over;
        let waited = self.has_event.wait_timeout_while(kept, patience, is_quiet);
        let (kept, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let new: Vec<_> = kept
            .events
            .iter()
            .filter(|e| e.number > number)
            .cloned()
            .collect();
        (!kept.is_over || !new.is_empty()).then_some(new)
    }

    /// Lets those go who wait for events.
    pub(super) fn end(&self) {
        self.kept().is_over = true;
        self.has_event.notify_all();
    }
}
