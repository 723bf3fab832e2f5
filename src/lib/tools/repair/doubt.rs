//! Leaves out what contradicts the data space map, and what cannot be told from it.

use super::contested::Contested;
use super::mend::MendedEngine;
use super::report::RepairReport;
use super::scan::Scan;
use super::{Options, Work, describe};
use crate::error::Result;
use crate::observer::Observer;
use crate::pdata::Shape;
use crate::units::{MetadataBlock, ThinId};
use std::collections::HashSet;

/// Nodes older than they should be, up to which the others are believed.
pub(super) const MOST_OLDER: usize = 8;

impl Work {
    /// Leaves out mappings that contradict the data space map, if it is the map that is right: where details have other numbers of
    /// mappings, or other data blocks are mapped too seldom. Then leaves out devices that are in doubt as a whole.
    pub(super) fn leave_out_doubtful(
        &mut self,
        engine: &MendedEngine<'_>,
        options: &Options,
        scan: &Scan,
        observer: &dyn Observer,
        report: &mut RepairReport,
    ) -> Result<()> {
        if options.include_ambiguous {
            return Ok(());
        }
        let totals = describe::totals(&self.forest, &self.basis.roots, &self.omitted);
        let fits = |(id, has): (&u64, &u64)| {
            let detail = self.basis.details.get(id);
            detail.is_some_and(|d| d.mapped_blocks == *has)
        };
        let is_told = self.basis.details_are_current && totals.iter().all(fits);
        let is_contradicted =
            !self.differences.over.is_empty() && (!is_told || self.differences.under > 0);
        let mut older = HashSet::new();
        if is_contradicted {
            let contested = self.differences.contested(
                engine,
                &self.leaves(),
                self.damaged.is_empty(),
                observer,
            )?;
            older.clone_from(&contested.older);
            self.omit(contested);
        }
        if self.basis.details_are_current {
            let sealed = self.damaged.iter().copied();
            older.extend(sealed.filter(|&b| scan.class(b).is_some()));
            let is_contradicted = is_contradicted
                || self.differences.over_many > 0
                || self.differences.nothing_compared;
            self.leave_out_devices(&older, is_contradicted, report);
        }
        Ok(())
    }

    fn omit(&mut self, contested: Contested) {
        for (leaf, keys) in contested.omitted {
            let all = self.omitted.entry(leaf).or_default();
            all.extend(keys);
            all.sort_unstable();
            all.dedup();
        }
        if contested.is_all_doubtful {
            for leaf in contested.older {
                self.omitted.remove(&leaf);
                self.exclude(leaf);
            }
        }
    }

    fn exclude(&mut self, leaf: MetadataBlock) {
        self.forest.exclude(leaf);
        self.damaged.insert(leaf);
    }

    /// Where more than a few nodes are older than they should be, though sealed, writes to this disk got lost, and others may be
    /// older without contradicting anything. A device that has such nodes is believed only if its number of mappings is right; where
    /// they are so many that one is likely to map what another one should, not even then. A device that has more mappings than it
    /// should is not believed where mappings contradict the data space map, or it cannot be read.
    fn leave_out_devices(
        &mut self,
        older: &HashSet<MetadataBlock>,
        is_contradicted: bool,
        report: &mut RepairReport,
    ) {
        let totals = describe::totals(&self.forest, &self.basis.roots, &self.omitted);
        let nodes = |root: MetadataBlock| {
            let number = self.forest.number(root);
            let nodes = self.forest.children_first(number.as_slice());
            nodes.into_iter().map(|n| self.forest.nodes()[n])
        };
        let n = older.len() as u64;
        let is_hopeless = n > MOST_OLDER as u64
            && n * n > self.leaves().len() as u64 / 4
            && self.differences.under > 0;
        let mut proved = HashSet::new();
        let mut doubtful = HashSet::new();
        let mut ids = Vec::new();
        for (id, &root) in &self.basis.roots {
            let expected = self.basis.details.get(id).map(|d| d.mapped_blocks);
            let is_older =
                || older.len() > MOST_OLDER && nodes(root).any(|n| older.contains(&n.block));
            if expected == Some(totals[id]) && !is_hopeless {
                proved.extend(nodes(root).map(|n| n.block));
            } else if is_contradicted && expected.is_some_and(|n| n < totals[id])
                || is_hopeless
                || is_older()
            {
                let leaves = nodes(root).filter(|n| matches!(n.shape, Shape::Leaf { .. }));
                doubtful.extend(leaves.map(|n| n.block));
                ids.push(ThinId(*id));
            }
        }
        for leaf in doubtful {
            if !proved.contains(&leaf) {
                self.exclude(leaf);
            }
        }
        if !ids.is_empty() {
            ids.sort_unstable();
            report.note_doubtful(older.len(), &ids);
        }
    }
}
