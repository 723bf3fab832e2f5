//! What always holds between two events. Debug builds check it; in others nothing is left of this but an empty call.
//!
//! 1. A bio is issued to a block while its mapping is current (I1), and a write only to a block that is not shared (I3).
//! 2. One operation at a time works on a virtual block (I2), and what it maps is not mapped before its data is in place (I4).
//! 3. Whatever the last commit consists of is on the device as it was, so that a crash finds it (I10); no block that it maps is handed
//!    out again (I7).
//! 4. A commit counts what is referred to, no more and no less (I8).
//! 5. A device has as many mappings as it says (I9).
//! 6. A bio that the map half let in is in one place, until it is issued or ended (I12).
//!
//! Where it happens it is asserted that the data is flushed before a commit (I5), that nothing durable ends before its commit (I6), and
//! that with zeroing no block is mapped that was not written from end to end since it was allocated (I11).

use super::commit::Waiter;
use super::committed::Committed;
use super::jobs::{Job, JobId};
use super::provision::NewMapping;
use super::{Effect, Worker};
use crate::error::Result;
use crate::pool::bio::Op;
use crate::pool::effect::Notice;
use crate::pool::mode::PoolMode;
use crate::thin::PoolMetadata;
use crate::units::{ThinBlock, ThinId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// More of anything is not looked at, lest every step take longer than the one before.
const FEW: usize = 64;

/// The bios that the map half let in and the worker has not let out. Whoever is on the way in is counted already.
#[derive(Debug, Default)]
pub(in crate::pool) struct Traffic {
    inside: AtomicU64,
    /// Calls of the map half, begun and ended.
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Traffic {
    pub(in crate::pool) fn begin(&self) {
        if cfg!(debug_assertions) {
            self.begun.fetch_add(1, Ordering::SeqCst);
            self.inside.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(in crate::pool) fn end(&self, is_let_in: bool) {
        if cfg!(debug_assertions) {
            self.inside
                .fetch_sub(u64::from(!is_let_in), Ordering::SeqCst);
            self.ended.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn leave(&self, bios: u64) {
        self.inside.fetch_sub(bios, Ordering::SeqCst);
    }
}

/// What was there before. What was wrong when it was first looked at may be wrong later.
#[derive(Debug, Default)]
pub(super) struct Before {
    /// Whether the number of mappings of an open device was right.
    mappings: BTreeMap<u64, bool>,
    /// The last commit, if it is small.
    committed: Option<Committed>,
    /// Whether it counted rightly what it refers to.
    is_counted: Option<bool>,
    /// Sectors that were written, or are being, of the blocks of new mappings.
    written: BTreeMap<JobId, u64>,
}

impl Worker {
    /// Checks everything after a step that had these effects.
    pub(super) fn check_invariants(&mut self, effects: &[Effect]) {
        if !cfg!(debug_assertions) {
            return;
        }
        self.check_bios(effects);
        self.note_written(effects);
        let has_failed = |e: &Effect| matches!(e, Effect::Notice(Notice::MetadataFailed(_)));
        if self.pool.mode() >= PoolMode::ReadOnly || effects.iter().any(has_failed) {
            // What was issued may have been undone in the same step.
            return;
        }
        self.check_issued(effects);
        self.check_jobs();
        self.check_counts();
        // A device that cannot be read is not what this is about.
        self.check_committed(effects).ok();
    }

    fn check_committed(&mut self, effects: &[Effect]) -> Result<()> {
        let engine = self.pool.metadata.inspect(|pool| Arc::clone(pool.engine()));
        let committed = match self.before.committed.take() {
            Some(committed) if committed.is_current(&*engine)? => {
                let lost = committed.overwritten(&*engine)?;
                assert_eq!(
                    lost, None,
                    "I10: a block of the last commit was written over"
                );
                Some(committed)
            }
            _ => Committed::read(&*engine)?,
        };
        let size = self.pool.block_sectors();
        for effect in effects {
            let sector = match effect {
                Effect::Zero { sector, .. } | Effect::Copy { sector, .. } => sector,
                Effect::Issue { bio, sector } if bio.fills.is_some() => sector,
                _ => continue,
            };
            let is_mapped = committed.as_ref().is_some_and(|c| c.maps(sector / size));
            assert!(
                !is_mapped,
                "I7: {effect:?} is to a block that the last commit maps"
            );
        }
        self.before.committed = committed;
        Ok(())
    }

    fn note_written(&mut self, effects: &[Effect]) {
        for effect in effects {
            let (job, sectors) = match effect {
                Effect::Zero { job, sectors, .. } | Effect::Copy { job, sectors, .. } => {
                    (*job, *sectors)
                }
                Effect::Issue { bio, .. } => match bio.fills {
                    Some(job) => (job, bio.zeroes.map_or(bio.sectors, |(_, all)| all)),
                    None => continue,
                },
                _ => continue,
            };
            *self.before.written.entry(job).or_default() += sectors;
        }
    }

    /// Checks a mapping that is about to be inserted.
    pub(super) fn check_covered(&mut self, job: JobId, mapping: &NewMapping) {
        if !cfg!(debug_assertions) {
            return;
        }
        let written = self.before.written.remove(&job).unwrap_or(0);
        assert!(
            !mapping.is_covered || written == self.pool.block_sectors(),
            "I11: {mapping:?} is to a block of which {written} sectors were written"
        );
    }

    /// Checks what was committed just now.
    pub(super) fn check_commit(&mut self) {
        if !cfg!(debug_assertions) {
            return;
        }
        let engine = self.pool.metadata.inspect(|pool| Arc::clone(pool.engine()));
        if let Ok(Some(committed)) = Committed::read(&*engine) {
            let wrong = committed.miscounted();
            let was_right = *self.before.is_counted.get_or_insert(wrong.is_none());
            assert!(
                !was_right || wrong.is_none(),
                "I8: {}",
                wrong.unwrap_or_default()
            );
        }
    }

    fn check_issued(&self, effects: &[Effect]) {
        for effect in effects {
            let Effect::Issue { bio, sector } = effect else {
                continue;
            };
            let Some(thin) = self.thins.get(&bio.thin) else {
                continue;
            };
            if bio.op == Op::Flush || bio.fills.is_some() {
                continue;
            }
            let size = self.pool.block_size();
            let look = |pool: &PoolMetadata| pool.find_block(thin.id(), bio.block(size));
            let Ok(found) = self.pool.metadata.inspect(look) else {
                continue;
            };
            assert_eq!(
                found.map(|found| self.pool.remap(found.block, bio.sector)),
                Some(*sector),
                "I1: {bio:?} is issued to a block that is not mapped"
            );
            assert!(
                bio.op == Op::Read || found.is_some_and(|found| !found.is_shared),
                "I3: {bio:?} is issued to a shared block"
            );
        }
    }

    fn check_jobs(&self) {
        let mut ranges = Vec::new();
        for (_, job) in self.jobs.iter().take(FEW) {
            match job {
                Job::Mapping(mapping) => {
                    let (block, data) = (mapping.block, mapping.data);
                    let Some(thin) = self.thins.get(&mapping.thin) else {
                        continue;
                    };
                    ranges.push((thin.id().0, block.0, block.0 + 1));
                    let look = |pool: &PoolMetadata| pool.find_block(thin.id(), block);
                    if let (Ok(Some(found)), Some(data)) = (self.pool.metadata.inspect(look), data)
                    {
                        assert_ne!(found.block, data, "I4: {mapping:?} is mapped already");
                    }
                }
                Job::Run(run) => ranges.push(run.range()),
                Job::Discard(_) | Job::Snapshot(_) | Job::Commit | Job::Drain => {}
            }
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            let (before, after) = (pair[0], pair[1]);
            assert!(
                before.0 != after.0 || before.2 <= after.1,
                "I2: two operations on one block: {pair:?}"
            );
        }
    }

    /// After every commit, and when a device is seen for the first time.
    fn check_counts(&mut self) {
        let is_changed = self.pool.metadata.is_changed();
        let devices = &self.devices;
        let is_open = |id: &u64| devices.get(id).is_some_and(|device| device.open > 0);
        self.before.mappings.retain(|id, _| is_open(id));
        for id in devices.keys().copied().filter(is_open).take(4) {
            if is_changed && self.before.mappings.contains_key(&id) {
                continue;
            }
            let counts = |pool: &PoolMetadata| counts(pool, ThinId(id));
            let Some((said, counted)) = self.pool.metadata.inspect(counts) else {
                continue;
            };
            let was_right = self.before.mappings.entry(id).or_insert(said == counted);
            assert!(
                !*was_right || said == counted,
                "I9: device {id} has {counted} mappings and says {said}"
            );
        }
    }

    fn check_bios(&self, effects: &[Effect]) {
        let traffic = &self.pool.traffic;
        let is_out = |effect: &&Effect| match effect {
            Effect::Issue { bio, .. } => bio.fills.is_none(),
            Effect::ReadOrigin { .. } | Effect::End { .. } => true,
            _ => false,
        };
        traffic.leave(effects.iter().filter(is_out).count() as u64);
        let begun = traffic.begun.load(Ordering::SeqCst);
        if traffic.ended.load(Ordering::SeqCst) != begun {
            return;
        }
        let waiters = self.commit.iter().flat_map(|commit| commit.waiters());
        let waiters = waiters.chain(&self.waiters);
        let of_waiters = waiters.filter(|w| matches!(w, Waiter::Issue(..) | Waiter::End(_)));
        let of_jobs = self.jobs.iter().map(|(_, job)| match job {
            // It is the one that fills the block, or waits.
            Job::Mapping(_) => 1,
            Job::Discard(discard) => discard.bios(),
            _ => 0,
        });
        let found = self.todo.len()
            + self.starved.len()
            + self.retry.len()
            + of_waiters.count()
            + of_jobs.sum::<usize>()
            + self.pool.prison.count_inmates()
            + self.pool.count_waiting();
        let inside = traffic.inside.load(Ordering::SeqCst);
        // Nobody moved one meanwhile?
        if traffic.begun.load(Ordering::SeqCst) == begun {
            assert_eq!(
                found as u64, inside,
                "I12: a bio was lost, or is in two places"
            );
        }
    }
}

/// How many mappings a device says it has, and how many it has, if they are few.
fn counts(pool: &PoolMetadata, id: ThinId) -> Option<(u64, u64)> {
    let said = pool.details(id).ok()?.mapped_blocks;
    if said > FEW as u64 {
        return None;
    }
    let (mut counted, mut from) = (0, 0);
    while counted <= FEW as u64
        && let Some((block, _)) = pool.next_block(id, ThinBlock(from)).ok()?
    {
        counted += 1;
        from = block.0 + 1;
    }
    Some((said, counted))
}
