//! Commits: one for everybody who waits for it. The data device is flushed first, so that what the metadata says is there is there.

use super::jobs::{Job, JobId};
use super::{Effects, SECOND, Worker, end};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::bio::{Bio, BioError, BioResult};
use crate::pool::effect::Effect;
use crate::pool::message::Message;
use crate::pool::mode::PoolMode;

/// Who waits for a commit.
#[derive(Debug)]
pub(super) enum Waiter {
    /// A flush, which the commit does, or a durable write, which is issued after it: at this sector.
    Issue(Box<Bio>, u64),
    /// A durable write whose data is in place.
    End(Box<Bio>),
    /// A run of a discard, with the blocks that are to be discarded on the data device.
    Discard(JobId, Vec<(u64, u64)>),
    /// A message that needs everything committed first.
    Message(u64, Message),
    /// Whoever sent a request.
    Answer(u64),
    /// Whoever suspends the pool.
    Suspended(u64),
}

/// A commit under way.
#[derive(Debug)]
pub(super) struct Commit {
    waiters: Vec<Waiter>,
    /// It began with a flush of the data device.
    was_flushed: bool,
}

impl Commit {
    pub(super) fn waiters(&self) -> &[Waiter] {
        &self.waiters
    }
}

impl Worker {
    pub(super) fn is_commit_due(&self) -> bool {
        if !self.waiters.is_empty() {
            return true;
        }
        self.pool.mode().is_writable()
            && self.now.saturating_sub(self.last_commit) >= SECOND
            && self.pool.metadata.is_changed()
    }

    /// Begins a commit: with the flush of the data device, if there is anything to commit.
    pub(super) fn begin_commit(&mut self, effects: &mut Effects) {
        let is_for_space = std::mem::take(&mut self.wants_commit);
        let waiters = std::mem::take(&mut self.waiters);
        let is_changed = self.pool.metadata.is_changed();
        if !self.pool.mode().is_writable() {
            let refused = || Error::new(ErrorKind::ReadOnly, "the pool's metadata is read-only");
            // What is not changed is committed already.
            return self.tell(waiters, !is_changed, refused, effects);
        }
        if is_changed {
            self.count_commit(&waiters, is_for_space);
        }
        self.commit = Some(Commit {
            waiters,
            was_flushed: is_changed,
        });
        if !is_changed {
            return self.data_is_flushed(Ok(()), effects);
        }
        let job = self.jobs.add(Job::Commit);
        effects.push(Effect::Flush { job });
    }

    /// The second half of a commit.
    pub(super) fn data_is_flushed(&mut self, result: BioResult, effects: &mut Effects) {
        let Some(commit) = self.commit.take() else {
            return;
        };
        let flushed = result
            .map_err(|e| Error::with_source(ErrorKind::Io, "cannot flush the data device", e));
        // I5: whatever the metadata leads to is durable first.
        debug_assert!(
            commit.was_flushed || !self.pool.metadata.is_changed(),
            "I5: a commit without a flush of the data"
        );
        let committed = flushed.and_then(|()| self.commit_metadata());
        self.last_commit = self.now;
        let is_done = self.metadata_ok(committed, effects);
        if is_done {
            self.check_commit();
            self.devices.retain(|_, device| {
                device.is_changed = false;
                device.open > 0
            });
            self.look_at_space(effects);
        }
        self.tell(commit.waiters, is_done, lost, effects);
    }

    /// Commits the metadata. Data blocks that operations keep, though no mapping leads to them yet or any more, are not counted in what
    /// is committed. The kernel counts them, and leaks them in a crash.
    pub(super) fn commit_metadata(&self) -> Result<()> {
        self.pool.metadata.commit_without(&self.jobs.kept_blocks())
    }

    /// The transaction was undone: whoever waits for its commit waits in vain.
    pub(super) fn disappoint(&mut self, effects: &mut Effects) {
        let waiters = std::mem::take(&mut self.waiters);
        self.tell(waiters, false, lost, effects);
    }

    fn tell(
        &mut self,
        waiters: Vec<Waiter>,
        is_done: bool,
        error: impl Fn() -> Error,
        effects: &mut Effects,
    ) {
        let result = |is_done| match is_done {
            true => Ok(()),
            false => Err(BioError::Io),
        };
        for waiter in waiters {
            debug_assert!(
                !is_done || !self.is_waiter_ahead(&waiter),
                "I6: something durable ends before its commit"
            );
            match waiter {
                Waiter::Issue(bio, sector) if is_done && bio.sectors > 0 => {
                    effects.push(Effect::Issue { bio, sector });
                }
                Waiter::Issue(bio, _) => self.end_issued(bio, result(is_done), effects),
                Waiter::End(bio) => end(bio, result(is_done), effects),
                Waiter::Discard(run, own) if is_done => self.pass_down(run, own, effects),
                Waiter::Discard(run, _) => self.end_run(run, Ok(()), effects),
                Waiter::Message(tag, message) if is_done => {
                    let result = self.carry_out(message);
                    self.answer(tag, result, effects);
                }
                Waiter::Answer(tag) | Waiter::Message(tag, _) => effects.push(Effect::Answer {
                    tag,
                    result: is_done.then_some(()).ok_or_else(&error),
                }),
                Waiter::Suspended(tag) => self.suspended(tag, effects),
            }
        }
    }

    /// True if a bio that asked for a commit would end before what it asked for is committed.
    fn is_waiter_ahead(&self, waiter: &Waiter) -> bool {
        let (Waiter::Issue(bio, _) | Waiter::End(bio)) = waiter else {
            return false;
        };
        let device = self.thins.get(&bio.thin_number()).map(|thin| thin.id().0);
        let device = device.and_then(|id| self.devices.get(&id));
        device.is_some_and(|device| device.is_changed)
    }

    /// After a commit it is known what space there is.
    fn look_at_space(&mut self, effects: &mut Effects) {
        let (metadata, data) = self
            .pool
            .metadata
            .inspect(|pool| (pool.nr_free_metadata_blocks(), pool.nr_free_data_blocks()));
        if metadata == 0 {
            return self.metadata_is_full(effects);
        }
        if data > 0 && self.pool.mode() == PoolMode::OutOfDataSpace {
            self.set_mode(PoolMode::Write, effects);
            self.retry_all();
        }
    }
}

fn lost() -> Error {
    Error::new(
        ErrorKind::Io,
        "the metadata could not be changed; what was not committed is lost",
    )
}
