//! Messages, and the snapshot of a device that is in use: the engine lets its I/O end first.

use super::commit::Waiter;
use super::jobs::{Job, JobId};
use super::{Effects, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::effect::Effect;
use crate::pool::message::Message;
use crate::thin::PoolMetadata;
use crate::units::ThinId;

/// A snapshot that waits for the I/O of its origin.
#[derive(Debug)]
pub(super) struct Snapshot {
    tag: u64,
    id: ThinId,
    origin: ThinId,
}

impl Worker {
    pub(super) fn message(&mut self, tag: u64, message: Message, effects: &mut Effects) {
        if let Message::CreateSnap { id, origin } = message
            && self.is_open(origin)
            && self.pool.mode().is_writable()
            && self.pool.metadata.inspect(|pool| pool.details(id).is_err())
        {
            self.gate(origin, true);
            let job = self.jobs.add(Job::Snapshot(Snapshot { tag, id, origin }));
            return self.snapshots.push(job);
        }
        // Its first half is a commit, which would come before the flush of the data.
        if message == Message::ReserveMetadataSnap {
            return self.waiters.push(Waiter::Message(tag, message));
        }
        let result = self.carry_out(message);
        self.answer(tag, result, effects);
    }

    fn is_open(&self, id: ThinId) -> bool {
        self.devices
            .get(&id.0)
            .is_some_and(|device| device.open > 0)
    }

    fn gate(&self, id: ThinId, is_gated: bool) {
        for thin in self.thins.values().filter(|thin| thin.id() == id) {
            thin.gate(is_gated);
        }
    }

    /// An error is answered at once, success after the commit that makes it durable.
    pub(super) fn answer(&mut self, tag: u64, result: Result<()>, effects: &mut Effects) {
        match result {
            Ok(()) => self.waiters.push(Waiter::Answer(tag)),
            // A refusal leaves no trace; anything else may have left half of a change.
            Err(e) => {
                if matches!(
                    e.kind(),
                    ErrorKind::Io | ErrorKind::Damaged | ErrorKind::NoSpace
                ) {
                    let again = Error::new(e.kind(), e.to_string());
                    self.metadata_failed(again, effects);
                }
                effects.push(Effect::Answer {
                    tag,
                    result: Err(e),
                });
            }
        }
    }

    pub(super) fn carry_out(&mut self, message: Message) -> Result<()> {
        let mode = self.pool.mode();
        if !mode.is_writable() {
            let needs_check = self.pool.inspect(PoolMetadata::needs_check);
            let hint = match needs_check {
                true => {
                    "; its metadata needs a check: thin_check --clear-needs-check-flag lets it be written again if nothing is wrong with it, \
                     and thin_repair writes it anew if something is"
                }
                false => "",
            };
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("the pool is in mode {mode} and takes no messages{hint}"),
            ));
        }
        if let Message::Delete(id) = message
            && self.is_open(id)
        {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("thin device {id} is in use"),
            ));
        }
        self.pool.metadata.change(|pool| message.apply(pool))?;
        if let Message::CreateSnap { origin, .. } = message {
            self.device(origin).is_changed = true;
        }
        Ok(())
    }

    /// Snapshots whose origin has no operation under way wait for what was issued.
    pub(super) fn start_snapshots(&mut self) {
        if self.snapshots.is_empty() {
            return;
        }
        let mut snapshots = std::mem::take(&mut self.snapshots);
        snapshots.retain(|&job| {
            let Some(&mut Job::Snapshot(Snapshot { origin, .. })) = self.jobs.get_mut(job) else {
                return false;
            };
            let is_busy = self.device(origin).jobs > 0;
            if !is_busy {
                self.after_all_io(job);
            }
            is_busy
        });
        self.snapshots = snapshots;
    }

    /// Nothing of the origin is in flight: the snapshot is taken.
    pub(super) fn snapshot(&mut self, job: JobId, effects: &mut Effects) {
        let Some(Job::Snapshot(Snapshot { tag, id, origin })) = self.jobs.remove(job) else {
            return;
        };
        let result = self.carry_out(Message::CreateSnap { id, origin });
        let is_last = !self
            .jobs
            .iter()
            .any(|(_, other)| matches!(other, Job::Snapshot(s) if s.origin == origin));
        if is_last {
            self.gate(origin, false);
        }
        self.answer(tag, result, effects);
    }
}
