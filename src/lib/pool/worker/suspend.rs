//! Suspension and resumption, where a pool also grows.

use super::commit::Waiter;
use super::jobs::Job;
use super::{Effects, Worker, in_force};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::bio::BioError;
use crate::pool::effect::Effect;
use crate::pool::mode::PoolMode;
use crate::pool::table::PoolTable;

/// How far a suspension has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suspension {
    /// There is none.
    None,
    /// What was accepted ends.
    Draining { tag: u64, is_noflush: bool },
    /// The last commit is under way.
    Committing,
    /// The pool does nothing.
    Done,
}

impl Worker {
    /// True if the pool does nothing until it is resumed.
    pub(super) fn is_quiet_now(&self) -> bool {
        self.suspension == Suspension::Done
    }

    /// True if bios are given back rather than looked at.
    pub(super) fn is_giving_back(&self) -> bool {
        matches!(
            self.suspension,
            Suspension::Draining {
                is_noflush: true,
                ..
            }
        )
    }

    pub(super) fn suspend(&mut self, tag: u64, is_noflush: bool, effects: &mut Effects) {
        if self.suspension != Suspension::None {
            return effects.push(Effect::Answer {
                tag,
                result: Err(Error::new(
                    ErrorKind::InvalidArgument,
                    "the pool is suspended already",
                )),
            });
        }
        self.pool.suspend(true);
        self.suspension = Suspension::Draining { tag, is_noflush };
    }

    /// Looks whether everything that was accepted has ended.
    pub(super) fn go_on_suspending(&mut self, effects: &mut Effects) {
        let Suspension::Draining { tag, is_noflush } = self.suspension else {
            return;
        };
        if is_noflush {
            let given_back = std::mem::take(&mut self.retry);
            for bio in given_back.into_iter().chain(self.todo.take()) {
                self.give_up(bio, BioError::Requeue, effects);
            }
        }
        let is_idle = self.jobs.len() == 0
            && self.todo.is_empty()
            && self.starved.is_empty()
            && !self.pool.has_work();
        if !is_idle {
            return;
        }
        // A commit may find space for those who wait for it. If not, they wait for the resumption, as the pool may have grown then.
        if !self.retry.is_empty() && self.pool.metadata.is_changed() {
            self.wants_commit = true;
            return;
        }
        if !self.pool.all_io.is_quiet() && self.waiters.is_empty() {
            let job = self.jobs.add(Job::Drain);
            return self.after_all_io(job);
        }
        if self.pool.all_io.is_quiet() {
            self.suspension = Suspension::Committing;
            self.waiters.push(Waiter::Suspended(tag));
        }
    }

    /// The last commit is over.
    pub(super) fn suspended(&mut self, tag: u64, effects: &mut Effects) {
        self.suspension = Suspension::Done;
        self.out_of_space_since = None;
        effects.push(Effect::Answer {
            tag,
            result: Ok(()),
        });
    }

    pub(super) fn resume(
        &mut self,
        tag: u64,
        table: Option<PoolTable>,
        data_blocks: u64,
        effects: &mut Effects,
    ) {
        if !matches!(self.suspension, Suspension::None | Suspension::Done) {
            return effects.push(Effect::Answer {
                tag,
                result: Err(Error::new(
                    ErrorKind::Busy,
                    "the pool is being suspended; resume it when that has ended",
                )),
            });
        }
        if let Err(e) = self.prepare_to_resume(table, data_blocks, effects) {
            return effects.push(Effect::Answer {
                tag,
                result: Err(e),
            });
        }
        self.pool.suspend(false);
        self.suspension = Suspension::None;
        self.was_low_told = false;
        if self.pool.mode() == PoolMode::OutOfDataSpace && !self.features.error_if_no_space {
            self.out_of_space_since = Some(self.now);
        }
        self.retry_all();
        self.pool.resubmit_held_back();
        self.waiters.push(Waiter::Answer(tag));
    }

    fn prepare_to_resume(
        &mut self,
        table: Option<PoolTable>,
        data_blocks: u64,
        effects: &mut Effects,
    ) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::InvalidArgument, message));
        let (data, metadata) = self
            .pool
            .metadata
            .inspect(|pool| pool.status().map(|s| (s.data_blocks, s.metadata_blocks)))?;
        if data_blocks < data {
            return refuse(format!(
                "pool target ({data_blocks} blocks) too small: expected {data}"
            ));
        }
        let has_table = table.is_some();
        if let Some(table) = table {
            if table.features.ignore_discard && !self.settings.table.features.ignore_discard {
                return refuse("discard support cannot be disabled once enabled".into());
            }
            // A block size that differs is ignored, as the kernel does.
            self.settings.table = PoolTable {
                block_sectors: self.settings.table.block_sectors,
                ..table
            };
        }
        // Whoever gave up waiting for space waits again.
        self.features = in_force(&self.settings);
        if has_table {
            let wanted = match self.features.read_only {
                true => PoolMode::ReadOnly,
                false => PoolMode::Write,
            };
            self.set_mode(wanted, effects);
        }
        let on_device = self
            .pool
            .metadata
            .inspect(|pool| pool.nr_blocks_on_device());
        if on_device < metadata {
            return refuse(format!(
                "metadata device ({on_device} blocks) too small: expected {metadata}"
            ));
        }
        if self.pool.mode() == PoolMode::OutOfMetadataSpace && on_device > metadata {
            self.set_mode(PoolMode::Write, effects);
        }
        if !self.pool.mode().is_writable() {
            return Ok(());
        }
        let grown = self.pool.metadata.change(|pool| {
            pool.resize_metadata(on_device)?;
            pool.resize_data(data_blocks)
        });
        grown.inspect_err(|e| {
            let again = Error::new(e.kind(), e.to_string());
            self.metadata_failed(again, effects);
        })
    }
}
