//! Reads what a basis leads to, looks for what nothing leads to any more, and puts it where it belongs.

use super::attribute::Attribution;
use super::basis::Basis;
use super::contested::DataMap;

use super::mend::MendedEngine;
use super::orphans::{Finder, Orphans};
use super::report::RepairReport;
use super::scan::Scan;
use super::states::States;
use super::{Options, Work, common};
use crate::error::Result;
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::Shape;
use crate::thin::Superblock;
use crate::units::{ENTRIES_PER_BITMAP, MetadataBlock};

/// What a rebuild works with.
pub(super) struct Rebuild<'a> {
    pub(super) engine: &'a MendedEngine<'a>,
    pub(super) scan: &'a Scan,
    pub(super) states: &'a States,
    pub(super) superblock: Option<&'a Superblock>,
    pub(super) options: &'a Options,
    pub(super) observer: &'a dyn Observer,
}

impl Rebuild<'_> {
    /// Rebuilds all that `basis` tells of.
    pub(super) fn run(&self, mut basis: Basis, report: &mut RepairReport) -> Result<Work> {
        let map = basis.data_map.take();
        let nr_data_blocks = self.nr_data_blocks(map.as_ref())?;
        let mut top_was_doubted = false;
        let mut details_were_doubted = false;
        let mut work = loop {
            let mut work = Work::walk(self.engine, basis, nr_data_blocks, None, self.observer)?;
            let mut orphans = self.find_orphans(&mut work)?;
            let has_contradiction = orphans.roots_are_contested || !work.basis.freed.is_empty();
            if has_contradiction && !orphans.orphans.is_empty() && !top_was_doubted {
                // The top-level tree is older than the space map: its roots are known from an older transaction, no more.
                top_was_doubted = true;
                report.note_old_top();
                basis = work.basis.without_roots();
                continue;
            }
            self.attribute(&mut work, &mut orphans)?;
            if orphans.is_stuck() && work.basis.details_are_current && !details_were_doubted {
                // No tree has the mappings that the details say: these may be the older ones.
                details_were_doubted = true;
                report.note_old_details();
                basis = work.basis.with_doubtful_details(top_was_doubted);
                continue;
            }
            work.orphans = orphans;
            break work;
        };
        self.settle(&mut work, report)?;
        work.count_again(self.engine, nr_data_blocks, map.as_ref(), self.observer)?;
        work.leave_out_doubtful(self.engine, self.options, self.scan, self.observer, report)?;
        Ok(work)
    }

    /// Data blocks of the pool; without a superblock, as many as there are bitmaps for, or as the device could hold bitmaps for.
    fn nr_data_blocks(&self, map: Option<&DataMap>) -> Result<u64> {
        if let Some(superblock) = self.superblock {
            return Ok(superblock.data_space_map.nr_blocks);
        }
        if let Some(given) = self.options.overrides.nr_data_blocks {
            return Ok(given);
        }
        let countable = map.map_or(Ok(0), |m| m.nr_countable(self.engine, self.observer))?;
        Ok(match countable {
            0 => self.engine.nr_blocks().saturating_mul(ENTRIES_PER_BITMAP),
            countable => countable,
        })
    }

    fn find_orphans(&self, work: &mut Work) -> Result<Orphans> {
        let roots = work.roots();
        let finder = Finder {
            engine: self.engine,
            scan: self.scan,
            basis: &work.basis,
            observer: self.observer,
        };
        finder.find(&mut work.forest, &roots)
    }

    fn attribute(&self, work: &mut Work, orphans: &mut Orphans) -> Result<()> {
        let latest = self
            .states
            .latest(|block| !self.scan.is_sealed(block))
            .state;
        let history = self.states.history(work.basis.counts.as_ref(), latest);
        let mut attribution = Attribution {
            engine: self.engine,
            scan: self.scan,
            basis: &work.basis,
            history: &history,
            sighted: &self.states.sighted,
            observer: self.observer,
            orphans,
            has_other_place: work.basis.held_is_lost,
            placed: Vec::new(),
        };
        attribution.run(&work.forest, self.options.include_ambiguous)?;
        work.placed = attribution.placed;
        Ok(())
    }

    /// Gives every device the root that was found, or what all that it could have have in common.
    fn settle(&self, work: &mut Work, report: &mut RepairReport) -> Result<()> {
        for (device, root) in work.orphans.mend(&mut work.forest) {
            work.basis.roots.insert(device.0, root);
        }
        // A block that was freed too early is better than nothing, if no other root was found.
        let is_all_placed = work.orphans.orphans.iter().all(|o| o.missing == 0);
        let freed: Vec<(u64, MetadataBlock)> =
            work.basis.freed.iter().map(|(&id, &r)| (id, r)).collect();
        for (id, root) in freed {
            if is_all_placed
                && !work.basis.roots.contains_key(&id)
                && self.scan.class(root).is_some()
            {
                work.basis.roots.insert(id, root);
            }
        }
        for group in work.orphans.groups() {
            let common = common::of(
                self.engine,
                &work.forest,
                &work.orphans,
                &group,
                self.observer,
            )?;
            let root = common.build(&mut work.forest, &work.basis.roots, &mut work.omitted);
            report.note_common(&group.devices);
            for device in group.devices {
                work.basis.roots.insert(device.0, root);
            }
        }
        let bad = work.forest.nodes().iter().filter(|n| n.shape == Shape::Bad);
        work.damaged = bad.map(|n| n.block).collect();
        Ok(())
    }
}
