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
    /// Leaves by their smallest key.
    leaves: BTreeMap<u64, MetadataBlock>,
    /// Keys, by leaf, of mappings that are not common.
    others: Omitted,
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
            if let Shape::Leaf { first, entries, .. } = node.shape {
                trees.entry(node.block).or_default().push(i);
                if i == 0 && entries > 0 {
                    leaves.insert(first, node.block);
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
    let mut others = Omitted::new();
    for (block, mapping) in read {
        if trees[&block].contains(&0) && found[&mapping] < group.orphans.len() {
            others.entry(block).or_default().push(mapping.0);
        }
    }
    Ok(Common { leaves, others })
}

impl Common {
    /// Adds a tree of what is common to the forest. A leaf that other devices have too cannot lose mappings for this one alone: it
    /// stays out as a whole if it has to.
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
        for (key, leaf) in self.leaves {
            match self.others.get(&leaf) {
                None => children.push((key, leaf)),
                Some(_) if others.contains(&leaf) => {}
                Some(keys) => {
                    omitted.insert(leaf, keys.clone());
                    children.push((key, leaf));
                }
            }
        }
        forest.invent(TreeKind::Mappings, &children)
    }
}
