//! What several trees, one of which is a device's, have in common: that much is certainly the device's.

use super::contested::Omitted;
use super::mend::MendedEngine;
use super::orphans::{Group, Orphans};
use crate::error::Result;
use crate::io::sweep;
use crate::observer::Observer;
use crate::pdata::{Forest, Node, Shape, TreeKind};
use crate::units::MetadataBlock;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The leaves of one of the trees, and which of their mappings the others have not.
pub(super) struct Common {
    /// Leaves by their smallest key, each with its largest one.
    leaves: BTreeMap<u64, (MetadataBlock, u64)>,
    /// Keys of mappings that are not common, by leaf; leaves that are part of all of the trees are not among these.
    others: Omitted,
    /// The devices have nothing that is not common.
    is_all: bool,
}

/// Reads the trees of a group.
pub(super) fn of(
    engine: &MendedEngine<'_>,
    forest: &Forest,
    orphans: &Orphans,
    group: &Group,
    observer: &dyn Observer,
) -> Result<Common> {
    let mut trees: HashMap<MetadataBlock, Vec<usize>> = HashMap::new();
    let mut leaves = BTreeMap::new();
    for (i, &orphan) in group.orphans.iter().enumerate() {
        let number = forest.number(orphans.orphans[orphan].block);
        for n in forest.children_first(number.as_slice()) {
            let node = &forest.nodes()[n];
            if let Shape::Leaf {
                first,
                last,
                entries,
            } = node.shape
            {
                trees.entry(node.block).or_default().push(i);
                if i == 0 && entries > 0 {
                    leaves.insert(first, (node.block, last));
                }
            }
        }
    }
    let mut blocks: Vec<u64> = trees.keys().map(|b| b.0).collect();
    blocks.sort_unstable();
    let stop = || observer.is_cancelled();
    let read = sweep(engine, &blocks, &stop, Vec::new, |read, block, data| {
        if let Some(node) = data.ok().and_then(|data| Node::parse(data, block, 8).ok()) {
            read.extend(
                node.keys()
                    .zip(node.values_u64())
                    .map(|mapping| (block, mapping)),
            );
        }
    });
    observer.check_cancelled()?;
    let read: Vec<(MetadataBlock, (u64, u64))> = read.into_iter().flatten().collect();
    let mut found: HashMap<(u64, u64), usize> = HashMap::new();
    for (block, mapping) in &read {
        *found.entry(*mapping).or_default() += trees[block].len();
    }
    let is_part_of_all = |block: &MetadataBlock| trees[block].len() == group.orphans.len();
    let of_first = leaves.values().map(|leaf| leaf.0);
    let mut others: Omitted = of_first
        .filter(|block| !is_part_of_all(block))
        .map(|block| (block, Vec::new()))
        .collect();
    for (block, mapping) in read {
        if trees[&block].contains(&0) && found[&mapping] < group.orphans.len() {
            others.entry(block).or_default().push(mapping.0);
        }
    }
    let entries = orphans.orphans[group.orphans[0]].entries;
    let mut devices = group.devices.iter();
    let is_all = others.values().all(Vec::is_empty)
        && devices.all(|device| orphans.lacking.get(device) == Some(&entries));
    Ok(Common {
        leaves,
        others,
        is_all,
    })
}

impl Common {
    /// Adds a tree of what is common to the forest, with no child where a device may have more. A leaf that other devices have too
    /// cannot lose mappings for this one alone: it stays out as a whole if it has to. Of what another of the trees has in the place of
    /// a leaf it is not known whether it is the device's, so such a leaf is on record even if nothing of it is left out.
    pub(super) fn build(
        self,
        forest: &mut Forest,
        roots: &BTreeMap<u64, MetadataBlock>,
        omitted: &mut Omitted,
    ) -> MetadataBlock {
        let numbers: Vec<usize> = roots.values().filter_map(|&r| forest.number(r)).collect();
        let nodes = forest.children_first(&numbers).into_iter();
        let others: BTreeSet<MetadataBlock> = nodes.map(|n| forest.nodes()[n].block).collect();
        let mut children = Vec::new();
        let mut end = Some(0);
        for (first, (leaf, last)) in self.leaves {
            match self.others.get(&leaf).filter(|_| !self.is_all) {
                None => {}
                Some(keys) if others.contains(&leaf) && !keys.is_empty() => continue,
                Some(keys) => drop(omitted.insert(leaf, keys.clone())),
            }
            children.extend(
                end.filter(|&end| !self.is_all && end < first)
                    .map(|end| (end, None)),
            );
            children.push((first, Some(leaf)));
            end = last.checked_add(1);
        }
        children.extend(end.filter(|_| !self.is_all).map(|end| (end, None)));
        forest.invent(TreeKind::Mappings, &children)
    }
}
