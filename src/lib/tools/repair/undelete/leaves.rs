//! The leaves of deleted devices: which of them may be believed, and what became of their mappings.

use super::report::Remains;
use super::{Deletions, Identity, Version, identity};
use crate::pdata::Shape;
use crate::thin::DeviceDetail;
use crate::tools::affected::Affected;
use crate::tools::repair::contested::Omitted;
use crate::tools::repair::reuse::{Current, Judgement};
use crate::tools::repair::states::State;
use crate::tools::sharing::leaves;
use crate::units::{MetadataBlock, ThinId};
use std::collections::{HashMap, HashSet};

/// The current devices in an older state, with the roots and details that they had.
pub(super) fn survivors<'a>(
    state: &'a State,
    current: &'a HashMap<Identity, MetadataBlock>,
) -> impl Iterator<Item = (MetadataBlock, &'a DeviceDetail)> {
    state.roots.iter().filter_map(|(&id, &root)| {
        let detail = state.details.get(&id)?;
        current
            .contains_key(&identity(id, detail))
            .then_some((root, detail))
    })
}

/// A leaf of a deleted device.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    block: MetadataBlock,
    first: u64,
    last: u64,
    entries: u64,
}

/// The leaves of a deleted device that may be brought back.
pub(super) struct Sorted {
    /// Those that a current device has too.
    shared: Vec<Leaf>,
    /// Those that no current device has.
    alone: Vec<Leaf>,
    /// Those that may have been written after the device was deleted.
    doubtful: Vec<Leaf>,
}

impl Deletions<'_> {
    /// The current mappings, to hold others against.
    pub(super) fn mappings(&self) -> Current<'_> {
        Current::of(
            &self.recovery.engine,
            self.observer,
            &self.recovery.recovered.forest,
            &self.recovery.trees.devices,
            self.recovery.trees.pool.time,
            self.nr_data_blocks,
        )
    }

    /// The version that is brought back: the latest that is whole; or else the latest.
    pub(super) fn best(&self, versions: &[Version]) -> Option<Version> {
        let mut whole = versions.iter().filter(|v| self.is_whole(v));
        whole.next().or(versions.first()).copied()
    }

    /// Leaves that current devices had in this state already.
    pub(super) fn confirmed(&self, state: usize) -> HashSet<MetadataBlock> {
        let forest = &self.recovery.recovered.forest;
        let current = self.current();
        let whole = survivors(&self.states.states[state], &current)
            .filter(|(root, detail)| self.is_tree_whole(*root, detail));
        let roots: Vec<usize> = whole.filter_map(|(root, _)| forest.number(root)).collect();
        let nodes = forest.children_first(&roots).into_iter();
        let nodes = nodes.map(|n| &forest.nodes()[n]);
        let leaves = nodes.filter(|n| matches!(n.shape, Shape::Leaf { .. }));
        leaves.map(|n| n.block).collect()
    }

    /// Sorts the leaves of a version that is whole, as far as that can be done without reading them.
    pub(super) fn sort(
        &self,
        version: &Version,
        confirmed: &HashSet<MetadataBlock>,
        mappings: &Current<'_>,
    ) -> Sorted {
        let forest = &self.recovery.recovered.forest;
        let mut sorted = Sorted {
            shared: Vec::new(),
            alone: Vec::new(),
            doubtful: Vec::new(),
        };
        for n in forest
            .number(version.root)
            .into_iter()
            .flat_map(|n| leaves(forest, n))
        {
            let node = &forest.nodes()[n];
            let (first, last, entries) = match node.shape {
                Shape::Leaf {
                    first,
                    last,
                    entries,
                } if entries > 0 => (first, last, entries),
                _ => continue,
            };
            let is_before = |time: u32| {
                let latest = self.scan.time(node.block);
                latest.is_none_or(|latest| latest < time.min(version.detail.snapshotted_time))
            };
            let list = match mappings.snapped(node.block) {
                None => &mut sorted.alone,
                Some(time) if confirmed.contains(&node.block) && is_before(time) => {
                    &mut sorted.shared
                }
                Some(_) => &mut sorted.doubtful,
            };
            list.push(Leaf {
                block: node.block,
                first,
                last,
                entries: u64::from(entries),
            });
        }
        sorted
    }
}

/// A version of a device with what is known of its leaves.
pub(super) struct Judged {
    pub(super) version: Version,
    pub(super) sorted: Sorted,
    /// Leaves that map a data block which the device has elsewhere too.
    pub(super) repeated: HashSet<MetadataBlock>,
}

impl Judged {
    /// What became of the mappings in a leaf that no current device has.
    fn remains(&self, leaf: &Leaf, judgement: Option<&Judgement>) -> Remains {
        let doubtful = Remains {
            doubtful: leaf.entries,
            ..Remains::default()
        };
        let Some(judgement) = judgement else {
            return doubtful;
        };
        let snapped = self.version.detail.snapshotted_time;
        if judgement.is_foreign
            || judgement.same_until.is_some_and(|time| time >= snapped)
            || self.repeated.contains(&leaf.block)
        {
            return doubtful;
        }
        Remains {
            free: judgement.entries - judgement.same - judgement.reused,
            shared: judgement.same,
            reused: judgement.reused,
            doubtful: 0,
        }
    }

    /// The leaves that no current device has, ascending.
    pub(super) fn alone(&self) -> Vec<u64> {
        let mut alone: Vec<u64> = self.sorted.alone.iter().map(|l| l.block.0).collect();
        alone.sort_unstable();
        alone
    }

    /// The leaves to bring back, by their first keys, and what is left out, for the device with id `new_id`.
    pub(super) fn split(
        &self,
        judgements: &HashMap<MetadataBlock, Judgement>,
        omitted: &Omitted,
        new_id: ThinId,
    ) -> (Vec<(u64, Option<MetadataBlock>)>, Vec<Affected>) {
        let mut kept: Vec<&Leaf> = self.sorted.shared.iter().collect();
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut lose = |leaf: &Leaf| ranges.push((leaf.first, leaf.last.saturating_add(1)));
        self.sorted.doubtful.iter().for_each(&mut lose);
        for leaf in &self.sorted.alone {
            let remains = self.remains(leaf, judgements.get(&leaf.block));
            match remains.kept() {
                0 => lose(leaf),
                _ => kept.push(leaf),
            }
        }
        let keys = kept.iter().filter_map(|leaf| omitted.get(&leaf.block));
        ranges.extend(keys.flatten().map(|&key| (key, key.saturating_add(1))));
        kept.sort_unstable_by_key(|leaf| leaf.first);
        let kept = kept.into_iter().map(|leaf| (leaf.first, Some(leaf.block)));
        (kept.collect(), joined(ranges, new_id))
    }

    /// What became of all mappings.
    pub(super) fn total(&self, judgements: &HashMap<MetadataBlock, Judgement>) -> Remains {
        let sum = |list: &[Leaf]| list.iter().map(|l| l.entries).sum();
        let mut total = Remains {
            shared: sum(&self.sorted.shared),
            doubtful: sum(&self.sorted.doubtful),
            ..Remains::default()
        };
        for leaf in &self.sorted.alone {
            total.add(self.remains(leaf, judgements.get(&leaf.block)));
        }
        total
    }
}

/// Ranges of virtual blocks, those that touch made one.
fn joined(mut ranges: Vec<(u64, u64)>, device: ThinId) -> Vec<Affected> {
    ranges.sort_unstable();
    let mut joined: Vec<Affected> = Vec::new();
    for (begin, end) in ranges.into_iter().filter(|r| r.0 < r.1) {
        match joined.last_mut() {
            Some(last) if last.end == Some(begin) => last.end = Some(end),
            _ => joined.push(Affected {
                device: Some(device),
                begin,
                end: Some(end),
            }),
        }
    }
    joined
}
