//! From mode to mode, and what becomes of those who wait for space.
//!
//! ```text
//! write ──no data block, even after a commit──▶ out of data space ──a commit that finds one──▶ write
//! write, out of data space ──a commit leaves no metadata block──▶ out of metadata space ──resumed, grown──▶ write
//! any of them ──an operation on the metadata fails: undone, needs_check──▶ read-only
//! any ──it cannot be undone──▶ fail
//! ```

use super::{Effects, Worker, end};
use crate::error::Error;
use crate::pool::bio::BioError;
use crate::pool::effect::{Effect, Notice};
use crate::pool::mode::PoolMode;
use crate::thin::PoolMetadata;
use crate::units::DataBlock;

impl Worker {
    pub(super) fn set_mode(&mut self, wanted: PoolMode, effects: &mut Effects) {
        let old = self.pool.mode();
        let needs_check = self.pool.metadata.inspect(PoolMetadata::needs_check);
        let new = match wanted {
            _ if old == PoolMode::Fail => PoolMode::Fail,
            PoolMode::Write if needs_check => old.max(PoolMode::ReadOnly),
            wanted => wanted,
        };
        self.pool.mode.set(new);
        let is_read_only = !new.is_writable();
        self.pool
            .metadata
            .inspect(|pool| pool.set_read_only(is_read_only));
        match new {
            PoolMode::Write => {
                self.out_of_space_since = None;
                self.features.error_if_no_space = self.settings.table.features.error_if_no_space;
            }
            PoolMode::OutOfDataSpace => {
                if !self.features.error_if_no_space && old != new {
                    self.out_of_space_since = Some(self.now);
                }
            }
            _ => {
                self.out_of_space_since = None;
                self.fail_retries(BioError::Io, effects);
            }
        }
        if new != old {
            effects.push(Effect::Notice(Notice::Mode(new)));
        }
    }

    /// An operation on the metadata failed: everything since the last commit is undone, and the metadata is not changed any more.
    pub(super) fn metadata_failed(&mut self, error: Error, effects: &mut Effects) {
        effects.push(Effect::Notice(Notice::MetadataFailed(error)));
        if self.pool.mode() >= PoolMode::ReadOnly {
            return;
        }
        self.pool.note_loss();
        for device in self.devices.values_mut() {
            device.has_lost |= std::mem::take(&mut device.is_changed);
        }
        self.pool.metadata.inspect(|pool| pool.set_read_only(false));
        match self.pool.metadata.abort() {
            Ok(()) => {
                // Should the device not take the flag, memory has it, and the device has the last transaction all the same.
                let flagged = self.pool.metadata.change(PoolMetadata::set_needs_check);
                if let Err(e) = flagged {
                    effects.push(Effect::Notice(Notice::MetadataFailed(e)));
                }
                self.set_mode(PoolMode::ReadOnly, effects);
            }
            Err(e) => {
                effects.push(Effect::Notice(Notice::MetadataFailed(e)));
                self.set_mode(PoolMode::Fail, effects);
            }
        }
        self.disappoint(effects);
    }

    /// Nothing will be mapped any more: while there still is the reserve, the blocks of new mappings are given back. The kernel leaks
    /// them.
    pub(super) fn metadata_is_full(&mut self, effects: &mut Effects) {
        let blocks = self.jobs.give_up_mappings();
        let given_back = self.pool.metadata.change(|pool| {
            let mut blocks = blocks.iter();
            blocks.try_for_each(|block| pool.dec_data_range(*block, DataBlock(block.0 + 1)))
        });
        let committed = given_back.and_then(|()| match blocks.is_empty() {
            true => Ok(()),
            false => self.commit_metadata(),
        });
        if self.metadata_ok(committed, effects) {
            self.set_mode(PoolMode::OutOfMetadataSpace, effects);
        }
    }

    /// Those who waited for space go on.
    pub(super) fn retry_all(&mut self) {
        self.pool.submit_all(self.retry.drain(..));
    }

    fn fail_retries(&mut self, error: BioError, effects: &mut Effects) {
        for bio in self.retry.drain(..) {
            end(bio, Err(error), effects);
        }
    }

    /// What waited for space too long fails.
    pub(super) fn expire(&mut self, effects: &mut Effects) {
        let timeout = self.settings.no_space_timeout;
        let Some((since, timeout)) = self.out_of_space_since.zip(timeout) else {
            return;
        };
        if self.now.saturating_sub(since) < timeout {
            return;
        }
        self.out_of_space_since = None;
        self.features.error_if_no_space = true;
        effects.push(Effect::Notice(Notice::NoSpaceTimeout));
        self.fail_retries(BioError::NoSpace, effects);
    }
}
