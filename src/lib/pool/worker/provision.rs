//! New blocks: for what was never written, and for what a snapshot has, too.

use super::commit::Waiter;
use super::jobs::{Job, JobId};
use super::{Effects, Worker, end};
use crate::error::Result;
use crate::pool::bio::{Bio, BioError, BioResult};
use crate::pool::effect::{Effect, Notice, Source};
use crate::pool::mode::PoolMode;
use crate::pool::pool::Waiting;
use crate::pool::prison::{Cell, Held};
use crate::pool::thin::Thin;
use crate::units::{DataBlock, ThinBlock};

/// A mapping whose data is being put in place.
#[derive(Debug)]
pub(super) struct NewMapping {
    /// Number of the open device.
    pub(super) thin: u32,
    pub(super) block: ThinBlock,
    /// None if it was given up and the block given back.
    pub(super) data: Option<DataBlock>,
    /// Of the virtual block, or of the data block whose sharing is broken.
    held: Held,
    /// None while it is the bio itself that fills the block.
    bio: Option<Box<Bio>>,
    /// Things to wait for.
    pub(super) waits: u32,
    /// What its data block held before must not be seen.
    pub(super) is_covered: bool,
    pub(super) result: BioResult,
}

/// What an allocation came to.
enum Allocated {
    Block(DataBlock),
    /// Blocks that were freed in this transaction can be had after a commit.
    AfterCommit,
    No,
    Failed,
}

impl Worker {
    fn allocate(&mut self, effects: &mut Effects) -> Allocated {
        let low_water = self.settings.table.low_water_blocks;
        let allocated = self.pool.metadata.change(|pool| {
            let is_low = pool.nr_free_data_blocks() <= low_water;
            let was_changed = pool.is_changed();
            let block = match pool.nr_free_data_blocks() {
                0 => None,
                _ => pool.alloc_data_block()?,
            };
            let is_metadata_full = pool.nr_free_metadata_blocks() == 0;
            Ok((is_low, was_changed, block, is_metadata_full))
        });
        let (is_low, was_changed, block, is_metadata_full) = match allocated {
            Ok(allocated) => allocated,
            Err(e) => {
                self.metadata_failed(e, effects);
                return Allocated::Failed;
            }
        };
        if is_low && !self.was_low_told {
            self.was_low_told = true;
            effects.push(Effect::Notice(Notice::LowWater));
        }
        match block {
            Some(block) => {
                // The reserve is there for commits.
                self.wants_commit |= is_metadata_full;
                Allocated::Block(block)
            }
            None if was_changed => {
                self.wants_commit = true;
                Allocated::AfterCommit
            }
            None => {
                self.set_mode(PoolMode::OutOfDataSpace, effects);
                Allocated::No
            }
        }
    }

    /// A block for a virtual block that has none.
    pub(super) fn provision(
        &mut self,
        thin: &Thin,
        block: ThinBlock,
        mut bio: Box<Bio>,
        held: Held,
        spare: Option<Box<Cell>>,
        effects: &mut Effects,
    ) {
        let data = match self.allocate(effects) {
            Allocated::Block(data) => data,
            Allocated::AfterCommit => {
                bio.reserved = Some((held, spare));
                return self.todo.put_back(bio);
            }
            Allocated::No => {
                self.keep_cells(spare);
                return self.cannot_serve(held, bio, effects);
            }
            Allocated::Failed => {
                self.keep_cells(spare);
                return self.fail_cell(held, bio, BioError::Io, effects);
            }
        };
        self.keep_cells(spare);
        let size = self.pool.block_sectors();
        let begin = block.0 * size;
        let of_origin = thin.origin_sectors.unwrap_or(0).saturating_sub(begin);
        let job = self.begin_mapping(thin, block, data, held);
        let source = (of_origin > 0).then_some((Source::Origin(thin.number), begin));
        self.fill(job, bio, data, source, of_origin.min(size), effects);
    }

    /// A block of its own for a device that shares `old`.
    pub(super) fn break_sharing(
        &mut self,
        thin: &Thin,
        block: ThinBlock,
        old: DataBlock,
        mut bio: Box<Bio>,
        (held, data_held): (Held, Held),
        effects: &mut Effects,
    ) {
        let data = match self.allocate(effects) {
            Allocated::Block(data) => data,
            Allocated::AfterCommit => {
                let cell = self.pool.release(data_held);
                bio.reserved = Some((held, Some(cell)));
                return self.todo.put_back(bio);
            }
            Allocated::No => {
                self.release(held);
                return self.cannot_serve(data_held, bio, effects);
            }
            Allocated::Failed => {
                self.release(held);
                return self.fail_cell(data_held, bio, BioError::Io, effects);
            }
        };
        let job = self.begin_mapping(thin, block, data, data_held);
        // What was read from the old block has to have ended before it may become somebody else's.
        self.wait_for_more(job);
        let ready = self.pool.shared_read.defer(Waiting::new(job));
        self.ready.extend(ready.map(|work| work.job));
        let size = self.pool.block_sectors();
        let source = Some((Source::Data, old.0 * size));
        self.fill(job, bio, data, source, size, effects);
        self.release(held);
    }

    fn begin_mapping(
        &mut self,
        thin: &Thin,
        block: ThinBlock,
        data: DataBlock,
        held: Held,
    ) -> JobId {
        self.device(thin.id()).jobs += 1;
        self.jobs.add(Job::Mapping(NewMapping {
            thin: thin.number,
            block,
            data: Some(data),
            held,
            bio: None,
            waits: 0,
            is_covered: !self.features.skip_block_zeroing,
            result: Ok(()),
        }))
    }

    fn wait_for_more(&mut self, job: JobId) {
        if let Some(Job::Mapping(mapping)) = self.jobs.get_mut(job) {
            mapping.waits += 1;
        }
    }

    /// Puts the data of a new block in place: `len` sectors from `source` and zeros behind them, or the bio itself if it covers all or
    /// nothing else but zeros is to be there.
    fn fill(
        &mut self,
        job: JobId,
        mut bio: Box<Bio>,
        data: DataBlock,
        source: Option<(Source, u64)>,
        len: u64,
        effects: &mut Effects,
    ) {
        let size = self.pool.block_sectors();
        let sector = data.0 * size;
        let zeroes = !self.features.skip_block_zeroing;
        let mut waits = 0;
        let is_whole = bio.sectors == size && (zeroes || source.is_some());
        let is_in_zeros =
            self.settings.zeroes_with_write && zeroes && source.is_none() && !is_whole;
        if is_whole || is_in_zeros {
            bio.fills = Some(job);
            bio.zeroes = is_in_zeros.then_some((sector, size));
            bio.all_io = Some(self.pool.all_io.enter());
            let sector = self.pool.remap(data, bio.sector);
            effects.push(Effect::Issue { bio, sector });
            return self.wait_for_more(job);
        }
        if let Some((from, from_sector)) = source {
            waits += 1;
            effects.push(Effect::Copy {
                job,
                from,
                from_sector,
                sector,
                sectors: len,
            });
        }
        let copied = if source.is_some() { len } else { 0 };
        if zeroes && copied < size {
            waits += 1;
            effects.push(Effect::Zero {
                job,
                sector: sector + copied,
                sectors: size - copied,
            });
        }
        let Some(Job::Mapping(mapping)) = self.jobs.get_mut(job) else {
            return;
        };
        mapping.bio = Some(bio);
        mapping.waits += waits;
        if mapping.waits == 0 {
            self.prepared.push_back(job);
        }
    }

    /// The write that fills a new block has ended.
    pub(super) fn filled(&mut self, mut bio: Box<Bio>, effects: &mut Effects) {
        let Some(job) = bio.fills else { return };
        let result = bio.filled;
        if let Some(Job::Mapping(mapping)) = self.jobs.get_mut(job) {
            bio.all_io = None;
            mapping.bio = Some(bio);
        }
        self.done(job, result, effects);
    }

    /// The data of a new block is in place: the mapping becomes true, and those who wait for it go on.
    pub(super) fn insert_prepared(&mut self, job: JobId, effects: &mut Effects) {
        let Some(Job::Mapping(mapping)) = self.jobs.remove(job) else {
            return;
        };
        self.check_covered(job, &mapping);
        match self.take_thin(mapping.thin) {
            Some(thin) => {
                self.insert(&thin, mapping, effects);
                self.last_thin = Some(thin);
            }
            None => self.release(mapping.held),
        }
    }

    fn insert(&mut self, thin: &Thin, mapping: NewMapping, effects: &mut Effects) {
        let NewMapping {
            block,
            data,
            held,
            bio,
            result,
            ..
        } = mapping;
        let Some(bio) = bio else {
            return self.release(held);
        };
        self.device(thin.id()).jobs -= 1;
        let Some(data) = data.filter(|_| self.pool.mode().is_writable()) else {
            return self.fail_cell(held, bio, BioError::Io, effects);
        };
        if let Err(error) = result {
            // Nobody refers to the block.
            let freed = self
                .pool
                .metadata
                .change(|pool| pool.dec_data_range(data, DataBlock(data.0 + 1)));
            self.metadata_ok(freed, effects);
            return self.fail_cell(held, bio, error, effects);
        }
        let inserted = self
            .pool
            .metadata
            .change(|pool| pool.insert_block(thin.id(), block, data));
        if !self.metadata_ok(inserted, effects) {
            return self.fail_cell(held, bio, BioError::Io, effects);
        }
        self.device(thin.id()).is_changed = true;
        if bio.fills.is_none() {
            self.enter_and_issue(thin, bio, data, effects);
            return self.issue_inmates(thin, held, data, effects);
        }
        self.issue_inmates(thin, held, data, effects);
        match self.triggers_commit(thin, &bio) {
            None => end(bio, Ok(()), effects),
            Some(Ok(())) => self.waiters.push(Waiter::End(bio)),
            Some(Err(error)) => end(bio, Err(error), effects),
        }
    }

    /// True if an operation on the metadata went well; if not, the transaction is undone.
    pub(super) fn metadata_ok<T>(&mut self, result: Result<T>, effects: &mut Effects) -> bool {
        match result {
            Ok(_) => true,
            Err(e) => {
                self.metadata_failed(e, effects);
                false
            }
        }
    }

    /// A bio that needs a block, which there is none for: it waits, with those in its cell, or fails.
    pub(super) fn cannot_serve(&mut self, held: Held, bio: Box<Bio>, effects: &mut Effects) {
        let error = match self.pool.mode() {
            PoolMode::OutOfDataSpace if self.features.error_if_no_space => BioError::NoSpace,
            PoolMode::OutOfDataSpace => {
                self.retry.push(bio);
                let writes = self.release_to_writes(held);
                return self.retry.extend(writes);
            }
            _ => BioError::Io,
        };
        self.fail_cell(held, bio, error, effects);
    }
}
