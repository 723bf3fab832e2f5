//! Finds which devices, and which of their blocks, a damaged node puts out of reach.

use crate::pdata::Forest;
use crate::units::{MetadataBlock, ThinId};
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::fmt;

/// A range of keys that a damage puts out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Affected {
    /// The device whose virtual blocks are meant; none when the keys are ids of devices.
    pub device: Option<ThinId>,
    /// First key.
    pub begin: u64,
    /// First key that is not meant; none without an upper bound.
    pub end: Option<u64>,
}

impl fmt::Display for Affected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.device {
            Some(device) => write!(f, "device {device} blocks {}..", self.begin)?,
            None => write!(f, "device ids {}..", self.begin)?,
        }
        match self.end {
            Some(end) => write!(f, "{end}"),
            None => Ok(()),
        }
    }
}

/// Ranges kept for one block; a damaged leaf of five hundred snapshots is told with this many.
const MOST: usize = 512;
/// Edges followed in all: a forest that shares without end is not followed without end.
const BUDGET: u64 = 4_000_000;

/// The ranges per damaged block, and whether some were left out.
pub(super) type Ranges = HashMap<MetadataBlock, (Vec<Affected>, bool)>;

/// Follows the trees at `roots` to the `damaged` blocks. Keys of a tree without a device are device ids themselves.
pub(super) fn affected(
    forest: &Forest,
    roots: &[(Option<ThinId>, MetadataBlock)],
    damaged: &HashSet<MetadataBlock>,
) -> Ranges {
    let numbers: Vec<usize> = roots
        .iter()
        .filter_map(|&(_, block)| forest.number(block))
        .collect();
    let leads = leads_to(forest, &numbers, damaged);
    let mut ranges = Ranges::new();
    let mut budget = BUDGET;
    for &(device, root) in roots {
        let Some(root) = forest.number(root) else {
            continue;
        };
        let mut stack = vec![(root, 0, None)];
        while let Some((number, begin, end)) = stack.pop() {
            let node = &forest.nodes()[number];
            if budget == 0 || !leads[number] {
                continue;
            }
            budget -= 1;
            if damaged.contains(&node.block) {
                let (list, more) = ranges.entry(node.block).or_default();
                if list.len() < MOST {
                    list.push(Affected { device, begin, end });
                } else {
                    *more = true;
                }
            }
            let edges = forest.edges(node);
            for (i, edge) in edges.iter().enumerate().rev() {
                if let Some(child) = forest.child(edge).and_then(|b| forest.number(b)) {
                    let begin = if i == 0 { begin } else { edge.key };
                    stack.push((child, begin, edges.get(i + 1).map_or(end, |e| Some(e.key))));
                }
            }
        }
    }
    if budget == 0 {
        for (_, more) in ranges.values_mut() {
            *more = true;
        }
    }
    ranges
}

/// Which nodes have a damaged block at or below them.
fn leads_to(forest: &Forest, roots: &[usize], damaged: &HashSet<MetadataBlock>) -> Vec<bool> {
    let mut leads = vec![false; forest.nodes().len()];
    for number in forest.children_first(roots) {
        let node = &forest.nodes()[number];
        leads[number] = damaged.contains(&node.block)
            || forest
                .edges(node)
                .iter()
                .filter_map(|e| forest.number(forest.child(e)?))
                .any(|child| leads[child]);
    }
    leads
}
