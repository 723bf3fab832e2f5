//! What the worker did that its effects do not tell.

use super::Worker;
use super::commit::Waiter;
use serde::{Deserialize, Serialize};

/// What the worker did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerCounts {
    /// Commits that wrote something, by what they were for.
    pub commits: CommitCounts,
    /// Flushes and durable writes that waited for a commit; one commit is for many.
    pub flushes_committed: u64,
    /// Mappings that discards removed.
    pub unmapped: u64,
    /// Data blocks that became free by that; the others somebody else has, too.
    pub freed: u64,
    /// Mapped blocks that discards left as they were because somebody worked on them.
    pub left_mapped: u64,
}

/// Commits by cause; a commit with several is counted under the first of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitCounts {
    /// A flush or a durable write.
    pub flush: u64,
    /// Blocks that were freed in the transaction were needed.
    pub space: u64,
    /// A message, or somebody who asked for one.
    pub message: u64,
    /// A discard of blocks that a snapshot had.
    pub discard: u64,
    /// A suspension.
    pub suspend: u64,
    /// None of these: a second was over.
    pub period: u64,
}

impl CommitCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        [
            self.flush,
            self.space,
            self.message,
            self.discard,
            self.suspend,
            self.period,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

impl Worker {
    /// What it did so far.
    pub fn counts(&self) -> &WorkerCounts {
        &self.counts
    }

    /// Counts a commit that has something to write.
    pub(super) fn count_commit(&mut self, waiters: &[Waiter], is_for_space: bool) {
        let is_flush = |waiter: &&Waiter| matches!(waiter, Waiter::Issue(..) | Waiter::End(_));
        let has = |is: fn(&Waiter) -> bool| waiters.iter().any(is);
        let flushes = waiters.iter().filter(is_flush).count() as u64;
        self.counts.flushes_committed += flushes;
        let commits = &mut self.counts.commits;
        let count = match () {
            () if flushes > 0 => &mut commits.flush,
            () if is_for_space => &mut commits.space,
            () if has(|w| matches!(w, Waiter::Answer(_) | Waiter::Message(..))) => {
                &mut commits.message
            }
            () if has(|w| matches!(w, Waiter::Discard(..))) => &mut commits.discard,
            () if has(|w| matches!(w, Waiter::Suspended(_))) => &mut commits.suspend,
            () => &mut commits.period,
        };
        *count += 1;
    }
}
