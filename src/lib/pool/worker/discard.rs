//! Discards: whole blocks are unmapped, run by run, and what nobody else has is discarded on the data device, too.
//!
//! The virtual range is held until the discard completes. For each run of mappings to neighbouring data blocks the data range is held,
//! too; then whatever is in flight has to end. A run whose blocks somebody works on is left as it is: a discard is a hint.
//!
//! Passed down, the blocks of a run are unmapped but kept from being handed out (they keep their reference) until the data device is done.
//! Where a snapshot had a block, too, it may have given it up in this very transaction: it would need it again after a crash. Such
//! blocks are passed down after the next commit; the kernel does not wait for it.

use super::commit::Waiter;
use super::jobs::{Job, JobId};
use super::{Effects, Worker, end};
use crate::error::Result;
use crate::pool::bio::{Bio, BioError, BioResult, DISCARD_BLOCKS, Op};
use crate::pool::effect::Effect;
use crate::pool::mode::PoolMode;
use crate::pool::prison::{Cell, Detained, Held, Key};
use crate::pool::thin::Thin;
use crate::thin::PoolMetadata;
use crate::units::{DataBlock, ThinBlock, ThinId};
use std::ops::Range;

/// A discard under way.
#[derive(Debug)]
pub(super) struct Discard {
    /// More than one if they cover neighbouring blocks.
    #[expect(clippy::vec_box, reason = "they come and go in boxes")]
    bios: Vec<Box<Bio>>,
    id: ThinId,
    held: Held,
    /// Blocks that were not looked at yet.
    next: u64,
    end: u64,
    /// Runs under way.
    runs: u32,
    /// To hold the next run with.
    spare: Option<Box<Cell>>,
    result: BioResult,
}

impl Discard {
    /// How many bios it is of.
    pub(super) fn bios(&self) -> usize {
        self.bios.len()
    }
}

/// Virtual blocks of a discard that follow on each other and are mapped to data blocks that do, too.
#[derive(Debug)]
pub(super) struct Run {
    discard: JobId,
    id: ThinId,
    held: Held,
    begin: u64,
    data: u64,
    len: u64,
    /// A snapshot may have the blocks, too.
    is_shared: bool,
    /// Discards of the data device that have not ended; none before the run was unmapped. Until then each of its blocks has a
    /// reference that keeps it from being handed out.
    passed_down: Option<u32>,
}

impl Run {
    /// Its device, first block and end.
    pub(super) fn range(&self) -> (u64, u64, u64) {
        (self.id.0, self.begin, self.begin + self.len)
    }

    /// The data blocks that it keeps from being handed out.
    pub(super) fn kept(&self) -> Option<Range<u64>> {
        self.passed_down.map(|_| self.data..self.data + self.len)
    }
}

/// Where a run is.
#[derive(Clone, Copy)]
struct Place {
    begin: u64,
    data: u64,
    len: u64,
    is_shared: bool,
}

impl Worker {
    pub(super) fn discard(&mut self, thin: &Thin, bio: Box<Bio>, effects: &mut Effects) {
        if self.features.ignore_discard {
            return end(bio, Err(BioError::Unsupported), effects);
        }
        let (begin, mut end_block) = bio.whole_blocks(self.pool.block_sectors());
        if begin == end_block || !self.pool.mode().is_writable() {
            return end(bio, Ok(()), effects);
        }
        // The experiment is about the cells of reads and writes; a discard takes both in any order.
        let both = self.cells.take().or_else(|| self.pool.cells.take_two());
        let Some([first, second]) = both else {
            return self.todo.put_back(bio);
        };
        let mut bios = Vec::new();
        while self.settings.joins_discards
            && let Some(next) = self.todo.pop_if(|next| {
                let (from, to) = next.whole_blocks(self.pool.block_sectors());
                let is_near = begin / DISCARD_BLOCKS == to.saturating_sub(1) / DISCARD_BLOCKS;
                next.op == Op::Discard
                    && next.thin == bio.thin
                    && from == end_block
                    && to > from
                    && is_near
            })
        {
            end_block = next.whole_blocks(self.pool.block_sectors()).1;
            bios.push(next);
        }
        let key = Key::of_virtual(thin.id(), ThinBlock(begin), ThinBlock(end_block));
        let (held, bio) = match self.pool.prison.detain(key, bio, first) {
            Detained::Free(held, bio) => (held, bio),
            Detained::Busy(first) => {
                // Whoever is in the way of one need not be in the way of all.
                bios.into_iter()
                    .rev()
                    .for_each(|bio| self.todo.put_back(bio));
                return self.keep_cells([first, second]);
            }
        };
        bios.push(bio);
        self.device(thin.id()).jobs += 1;
        let job = self.jobs.add(Job::Discard(Discard {
            bios,
            id: thin.id(),
            held,
            next: begin,
            end: end_block,
            runs: 0,
            spare: Some(second),
            result: Ok(()),
        }));
        self.discard_goes_on(job, effects);
    }

    /// Begins as many runs as there are cells for; ends the discard when there is nothing left.
    fn discard_goes_on(&mut self, job: JobId, effects: &mut Effects) {
        loop {
            let has_room = self.jobs.has_room(1);
            let Some(Job::Discard(discard)) = self.jobs.get_mut(job) else {
                return;
            };
            if discard.next >= discard.end || discard.result.is_err() {
                break;
            }
            if discard.runs > 0 && !has_room {
                return;
            }
            let spare = discard.spare.take().or_else(|| self.pool.cells.take());
            let Some(spare) = spare else {
                // The run that has the discard's own cell brings it back.
                return;
            };
            let (id, from, to) = (discard.id, discard.next, discard.end);
            let found = self
                .pool
                .metadata
                .inspect(|pool| next_run(pool, id, from, to));
            let place = match found {
                Ok(place) => place,
                Err(e) => {
                    self.metadata_failed(e, effects);
                    if let Some(Job::Discard(discard)) = self.jobs.get_mut(job) {
                        discard.result = Err(BioError::Io);
                        discard.spare = Some(spare);
                    }
                    break;
                }
            };
            let Some(Job::Discard(discard)) = self.jobs.get_mut(job) else {
                return;
            };
            let Some(place) = place else {
                discard.next = discard.end;
                discard.spare = Some(spare);
                break;
            };
            discard.next = place.begin + place.len;
            let data = (DataBlock(place.data), DataBlock(place.data + place.len));
            match self
                .pool
                .prison
                .try_hold(Key::of_data(id, data.0, data.1), spare)
            {
                Err(spare) => {
                    discard.spare = Some(spare);
                    self.counts.left_mapped += place.len;
                }
                Ok(held) => {
                    discard.runs += 1;
                    let run = self.jobs.add(Job::Run(Run {
                        discard: job,
                        id,
                        held,
                        begin: place.begin,
                        data: place.data,
                        len: place.len,
                        is_shared: place.is_shared,
                        passed_down: None,
                    }));
                    self.after_all_io(run);
                }
            }
        }
        self.end_discard(job, effects);
    }

    fn end_discard(&mut self, job: JobId, effects: &mut Effects) {
        match self.jobs.get_mut(job) {
            Some(Job::Discard(discard)) if discard.runs == 0 => {}
            _ => return,
        }
        let Some(Job::Discard(discard)) = self.jobs.remove(job) else {
            return;
        };
        self.device(discard.id).jobs -= 1;
        for bio in discard.bios {
            end(bio, discard.result, effects);
        }
        self.release(discard.held);
        if let Some(spare) = discard.spare {
            self.keep_cells([spare]);
        }
    }

    /// What a run waited for is over: the I/O that was in flight, or a discard of the data device.
    pub(super) fn run_goes_on(&mut self, job: JobId, effects: &mut Effects) {
        let Some(Job::Run(run)) = self.jobs.get_mut(job) else {
            return;
        };
        let place = Place {
            begin: run.begin,
            data: run.data,
            len: run.len,
            is_shared: run.is_shared,
        };
        let id = run.id;
        match &mut run.passed_down {
            None => self.unmap_run(job, id, place, effects),
            Some(0 | 1) => self.allow_reuse(job, place, effects),
            Some(n) => *n -= 1,
        }
    }

    fn unmap_run(&mut self, job: JobId, id: ThinId, place: Place, effects: &mut Effects) {
        if self.pool.mode() > PoolMode::OutOfDataSpace {
            return self.end_run(job, Ok(()), effects);
        }
        let passes_down = !self.features.no_discard_passdown;
        let unmapped = self
            .pool
            .metadata
            .change(|pool| unmap(pool, id, place, passes_down));
        let own = match unmapped {
            Ok((own, freed)) => {
                self.counts.unmapped += place.len;
                self.counts.freed += freed;
                own
            }
            Err(e) => {
                self.metadata_failed(e, effects);
                return self.end_run(job, Err(BioError::Io), effects);
            }
        };
        self.device(id).is_changed = true;
        if !passes_down {
            return self.end_run(job, Ok(()), effects);
        }
        if let Some(Job::Run(run)) = self.jobs.get_mut(job) {
            run.passed_down = Some(own.len() as u32);
        }
        if own.is_empty() {
            return self.allow_reuse(job, place, effects);
        }
        match place.is_shared {
            true => self.waiters.push(Waiter::Discard(job, own)),
            false => self.pass_down(job, own, effects),
        }
    }

    /// Discards blocks of a run on the data device: first block and number of each stretch.
    pub(super) fn pass_down(&mut self, job: JobId, own: Vec<(u64, u64)>, effects: &mut Effects) {
        let size = self.pool.block_sectors();
        for (block, blocks) in own {
            effects.push(Effect::Discard {
                job,
                sector: block * size,
                sectors: blocks * size,
            });
        }
    }

    /// The data device is done with a run.
    fn allow_reuse(&mut self, job: JobId, place: Place, effects: &mut Effects) {
        // If the metadata must not change any more, the transaction that unmapped the run is undone already.
        let mut result = Ok(());
        if self.pool.mode().is_writable() {
            let (begin, end) = (DataBlock(place.data), DataBlock(place.data + place.len));
            let freed = self
                .pool
                .metadata
                .change(|pool| pool.dec_data_range(begin, end));
            if !self.metadata_ok(freed, effects) {
                result = Err(BioError::Io);
            }
        }
        self.end_run(job, result, effects);
    }

    pub(super) fn end_run(&mut self, job: JobId, result: BioResult, effects: &mut Effects) {
        let Some(Job::Run(run)) = self.jobs.remove(job) else {
            return;
        };
        let cell = self.pool.release(run.held);
        if let Some(Job::Discard(discard)) = self.jobs.get_mut(run.discard) {
            discard.runs -= 1;
            discard.result = discard.result.and(result);
            match &discard.spare {
                None => discard.spare = Some(cell),
                Some(_) => self.keep_cells([cell]),
            }
        }
        self.discard_goes_on(run.discard, effects);
    }
}

/// The first run of mappings in `from..to`.
fn next_run(pool: &PoolMetadata, id: ThinId, from: u64, to: u64) -> Result<Option<Place>> {
    let mut run: Option<Place> = None;
    let snapshotted_time = pool.details(id)?.snapshotted_time;
    for next in pool.blocks_from(id, ThinBlock(from))? {
        let (block, mapping) = next?;
        if block.0 >= to {
            break;
        }
        let is_shared = snapshotted_time > mapping.time;
        match &mut run {
            None => {
                run = Some(Place {
                    begin: block.0,
                    data: mapping.block.0,
                    len: 1,
                    is_shared,
                });
            }
            Some(run)
                if block.0 == run.begin + run.len
                    && mapping.block.0 == run.data + run.len
                    && is_shared == run.is_shared
                    && mapping.block.0 % DISCARD_BLOCKS != 0 =>
            {
                run.len += 1;
            }
            Some(_) => break,
        }
    }
    Ok(run)
}

/// Unmaps a run, and counts the blocks that nobody else has. If it is passed down, each block keeps its reference, and those that nobody
/// else has are returned: first block and number.
fn unmap(
    pool: &mut PoolMetadata,
    id: ThinId,
    place: Place,
    passes_down: bool,
) -> Result<(Vec<(u64, u64)>, u64)> {
    let (begin, end) = (ThinBlock(place.begin), ThinBlock(place.begin + place.len));
    if !passes_down {
        let free = pool.nr_free_data_blocks();
        pool.remove_range(id, begin, end)?;
        let freed = pool.nr_free_data_blocks().saturating_sub(free);
        return Ok((Vec::new(), freed));
    }
    pool.take_range(id, begin, end)?;
    let (first, last) = (place.data, place.data + place.len);
    let mut own: Vec<(u64, u64)> = Vec::new();
    for block in first..last {
        // Times only say that a block may be shared; the count knows.
        if place.is_shared && pool.block_is_shared(DataBlock(block))? {
            continue;
        }
        match own.last_mut() {
            Some((begin, len)) if *begin + *len == block => *len += 1,
            _ => own.push((block, 1)),
        }
    }
    let freed = own.iter().map(|(_, len)| len).sum();
    Ok((own, freed))
}
