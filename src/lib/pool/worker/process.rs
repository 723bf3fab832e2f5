//! Bios that the map half left to the worker: where they go, once the lookup may wait.

use super::commit::Waiter;
use super::{BATCH, Effects, Worker, end};
use crate::pool::bio::{Bio, BioError, BioResult, Op};
use crate::pool::cells::{AllocationOrder, Starved};
use crate::pool::effect::Effect;
use crate::pool::list::List;
use crate::pool::mode::PoolMode;
use crate::pool::prison::{Cell, Detained, Held, Key};
use crate::pool::thin::Thin;
use crate::thin::Lookup;
use crate::units::{DataBlock, ThinBlock};

impl Worker {
    /// Goes through what is to be done. True if it cannot go on until something else has ended.
    pub(super) fn process_todo(&mut self, effects: &mut Effects) -> bool {
        if self.is_giving_back() {
            return true;
        }
        if self.todo.is_empty() {
            return self.is_quiet_now();
        }
        let mut later = Vec::new();
        let mut is_stuck = false;
        for _ in 0..BATCH {
            if self.wants_commit || self.is_quiet_now() {
                break;
            }
            let Some(bio) = self.todo.pop() else {
                break;
            };
            let Some(thin) = self.take_thin(bio.thin) else {
                self.give_up(bio, BioError::Io, effects);
                continue;
            };
            if thin.is_gated() {
                later.push(bio);
                continue;
            }
            if !self.jobs.has_room(2) || bio.reserved.is_none() && !self.has_cells(&bio) {
                later.push(bio);
                is_stuck = true;
                break;
            }
            self.process(&thin, bio, effects);
            self.last_thin = Some(thin);
        }
        let is_all_gated = self.todo.is_empty() && !later.is_empty();
        for bio in later.into_iter().rev() {
            self.todo.put_back(bio);
        }
        is_stuck || is_all_gated || self.is_quiet_now()
    }

    fn has_cells(&mut self, bio: &Bio) -> bool {
        match self.pool.order {
            AllocationOrder::Reserved => self.reserve_cells(),
            AllocationOrder::OneByOne => {
                self.pool.cells.free() > usize::from(bio.op == Op::Discard)
            }
        }
    }

    /// Ends a bio that will not be looked at, and lets those go on that wait for it.
    pub(super) fn give_up(&mut self, mut bio: Box<Bio>, error: BioError, effects: &mut Effects) {
        if let Some((held, spare)) = bio.reserved.take() {
            self.release(held);
            self.keep_cells(spare);
        }
        end(bio, Err(error), effects);
    }

    fn process(&mut self, thin: &Thin, mut bio: Box<Bio>, effects: &mut Effects) {
        if self.pool.mode() == PoolMode::Fail {
            return self.give_up(bio, BioError::Io, effects);
        }
        match bio.op {
            Op::Flush => self.issue(thin, bio, 0, effects),
            Op::Discard => self.discard(thin, bio, effects),
            Op::Read | Op::Write => {
                let block = bio.block(self.pool.block_size());
                let (held, spare) = match bio.reserved.take() {
                    Some(reserved) => reserved,
                    None => {
                        let Some((first, second)) = self.take_cells() else {
                            return self.todo.put_back(bio);
                        };
                        let key = Key::of_virtual(thin.id(), block, ThinBlock(block.0 + 1));
                        match self.pool.prison.detain(key, bio, first) {
                            Detained::Busy(first) => {
                                return self.keep_cells([first].into_iter().chain(second));
                            }
                            Detained::Free(held, found) => {
                                bio = found;
                                (held, second)
                            }
                        }
                    }
                };
                self.process_cell(thin, block, bio, held, spare, effects);
            }
        }
    }

    /// A read or write whose virtual block is held.
    fn process_cell(
        &mut self,
        thin: &Thin,
        block: ThinBlock,
        bio: Box<Bio>,
        held: Held,
        spare: Option<Box<Cell>>,
        effects: &mut Effects,
    ) {
        // Nothing was changed since the map half looked it up.
        let is_unmapped = bio.unmapped_at.is_some() && bio.unmapped_at == self.pool.metadata.time();
        let found = match is_unmapped {
            true => Ok(None),
            false => self.reader.find_block(&thin.metadata, block),
        };
        let Ok(found) = found else {
            self.keep_cells(spare);
            return self.fail_cell(held, bio, BioError::Io, effects);
        };
        let is_write = bio.op == Op::Write;
        match found {
            Some(found) if !found.is_shared => {
                self.keep_cells(spare);
                self.enter_and_issue(thin, bio, found.block, effects);
                self.issue_inmates(thin, held, found.block, effects);
            }
            Some(found) => self.process_shared(thin, block, found, bio, (held, spare), effects),
            None if is_write && self.pool.mode() != PoolMode::Write => {
                self.keep_cells(spare);
                self.cannot_serve(held, bio, effects);
            }
            None if is_write => {
                self.provision(thin, block, bio, held, spare, effects);
            }
            None => {
                self.keep_cells(spare);
                self.read_unmapped(thin, bio, effects);
                self.release(held);
            }
        }
    }

    fn process_shared(
        &mut self,
        thin: &Thin,
        block: ThinBlock,
        found: Lookup,
        bio: Box<Bio>,
        (held, spare): (Held, Option<Box<Cell>>),
        effects: &mut Effects,
    ) {
        if bio.op == Op::Write && self.pool.mode() != PoolMode::Write {
            self.keep_cells(spare);
            return self.cannot_serve(held, bio, effects);
        }
        let key = Key::of_data(thin.id(), found.block, DataBlock(found.block.0 + 1));
        let Some(spare) = spare.or_else(|| self.pool.cells.take()) else {
            let wanted = key;
            return self.starved.push_back(Starved { bio, held, wanted });
        };
        let (data_held, bio) = match self.pool.prison.detain(key, bio, spare) {
            // The sharing is being broken: it waits there.
            Detained::Busy(spare) => {
                self.keep_cells([spare]);
                return self.release(held);
            }
            Detained::Free(data_held, bio) => (data_held, bio),
        };
        if bio.op == Op::Write {
            return self.break_sharing(thin, block, found.block, bio, (held, data_held), effects);
        }
        self.issue_shared_read(bio, found.block, effects);
        for cell in [data_held, held] {
            self.issue_shared_inmates(cell, found.block, effects);
        }
    }

    fn issue_shared_read(&mut self, mut bio: Box<Bio>, data: DataBlock, effects: &mut Effects) {
        bio.shared_read = Some(self.pool.shared_read.enter());
        bio.all_io = Some(self.pool.all_io.enter());
        let sector = self.pool.remap(data, bio.sector);
        effects.push(Effect::Issue { bio, sector });
    }

    /// Releases a cell of a shared block: reads go on, the rest is looked at again.
    fn issue_shared_inmates(&mut self, held: Held, data: DataBlock, effects: &mut Effects) {
        let pool = &*self.pool;
        let (mut reads, mut others) = (List::default(), List::default());
        let cell = pool.prison.visit_release(held, |inmates| {
            for mut bio in inmates {
                match bio.op {
                    Op::Read => {
                        bio.shared_read = Some(pool.shared_read.enter());
                        bio.all_io = Some(pool.all_io.enter());
                        reads.push(bio);
                    }
                    _ => others.push(bio),
                }
            }
        });
        for bio in reads.take() {
            let sector = self.pool.remap(data, bio.sector);
            effects.push(Effect::Issue { bio, sector });
        }
        self.pool.submit_all(others.take());
        self.keep_cells([cell]);
    }

    /// Releases a cell of a block that is the device's own: those that waited for it go on to it, but for discards.
    pub(super) fn issue_inmates(
        &mut self,
        thin: &Thin,
        held: Held,
        data: DataBlock,
        effects: &mut Effects,
    ) {
        let pool = &*self.pool;
        let (mut ours, mut others) = (List::default(), List::default());
        let cell = pool.prison.visit_release(held, |inmates| {
            for mut bio in inmates {
                match bio.op {
                    Op::Read | Op::Write => {
                        bio.all_io = Some(pool.all_io.enter());
                        ours.push(bio);
                    }
                    Op::Discard | Op::Flush => others.push(bio),
                }
            }
        });
        for bio in ours.take() {
            let sector = self.pool.remap(data, bio.sector);
            self.issue(thin, bio, sector, effects);
        }
        self.pool.submit_all(others.take());
        self.keep_cells([cell]);
    }

    /// Issues a bio to a block whose virtual cell is held.
    pub(super) fn enter_and_issue(
        &mut self,
        thin: &Thin,
        mut bio: Box<Bio>,
        data: DataBlock,
        effects: &mut Effects,
    ) {
        bio.all_io = Some(self.pool.all_io.enter());
        let sector = self.pool.remap(data, bio.sector);
        self.issue(thin, bio, sector, effects);
    }

    /// Issues a bio. What has to be durable and whose device changed waits for a commit first.
    fn issue(&mut self, thin: &Thin, bio: Box<Bio>, sector: u64, effects: &mut Effects) {
        match self.triggers_commit(thin, &bio) {
            None => effects.push(Effect::Issue { bio, sector }),
            Some(Ok(())) => self.waiters.push(Waiter::Issue(bio, sector)),
            Some(Err(error)) => self.end_issued(bio, Err(error), effects),
        }
    }

    /// Whether a bio has to wait for a commit; an error if what it has to make durable is lost.
    pub(super) fn triggers_commit(&mut self, thin: &Thin, bio: &Bio) -> Option<BioResult> {
        let is_durable = bio.op == Op::Flush || bio.is_fua;
        if !is_durable {
            return None;
        }
        let device = self.device(thin.id());
        match (device.has_lost, device.is_changed) {
            (true, _) => Some(Err(BioError::Io)),
            (_, true) => Some(Ok(())),
            _ => None,
        }
    }

    /// Ends a bio that has tickets.
    pub(super) fn end_issued(
        &mut self,
        mut bio: Box<Bio>,
        result: BioResult,
        effects: &mut Effects,
    ) {
        self.pool.leave(&mut bio);
        end(bio, result, effects);
    }

    /// A read of a block that is not mapped.
    fn read_unmapped(&mut self, thin: &Thin, mut bio: Box<Bio>, effects: &mut Effects) {
        let of_origin = thin.origin_sectors.unwrap_or(0).saturating_sub(bio.sector);
        if of_origin == 0 {
            effects.push(Effect::End {
                bio,
                result: Ok(()),
                is_zero: true,
            });
            return;
        }
        bio.all_io = Some(self.pool.all_io.enter());
        let sectors = of_origin.min(bio.sectors);
        effects.push(Effect::ReadOrigin { bio, sectors });
    }
}
