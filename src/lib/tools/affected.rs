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

/// Follows the trees at `roots` to the `damaged` blocks, and to pointers that lead nowhere, whose ranges stand under the block
/// that holds them. Keys of a tree without a device are device ids themselves.
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
    let mut on_path = vec![false; forest.nodes().len()];
    for &(device, root) in roots {
        let Some(root) = forest.number(root).filter(|&n| leads[n]) else {
            continue;
        };
        // One frame per level: a node, its next edge, and the range of keys that its parents give it.
        let mut path = Vec::new();
        let mut entered = Some((root, 0, None));
        while budget > 0 {
            if let Some((number, begin, end)) = entered.take() {
                let node = &forest.nodes()[number];
                if damaged.contains(&node.block) && !has_hole(forest, number) {
                    add(&mut ranges, node.block, Affected { device, begin, end });
                }
                on_path[number] = true;
                path.push((number, 0, begin, end));
            }
            let Some((number, next, begin, end)) = path.last_mut() else {
                break;
            };
            let edges = forest.edges(&forest.nodes()[*number]);
            let Some(edge) = edges.get(*next) else {
                on_path[*number] = false;
                path.pop();
                continue;
            };
            budget -= 1;
            let begin = if *next == 0 { *begin } else { edge.key };
            *next += 1;
            let end = edges.get(*next).map_or(*end, |e| Some(e.key));
            let block = forest.nodes()[*number].block;
            if forest.child(edge).is_none() {
                add(&mut ranges, block, Affected { device, begin, end });
            }
            let child = forest.child(edge).and_then(|b| forest.number(b));
            if let Some(child) = child.filter(|&c| leads[c] && !on_path[c]) {
                entered = Some((child, begin, end));
            }
        }
        for (number, ..) in path {
            on_path[number] = false;
        }
    }
    if budget == 0 {
        for (_, more) in ranges.values_mut() {
            *more = true;
        }
    }
    ranges
}

fn add(ranges: &mut Ranges, block: MetadataBlock, range: Affected) {
    let (list, more) = ranges.entry(block).or_default();
    if list.len() < MOST {
        list.push(range);
    } else {
        *more = true;
    }
}

/// True for an inner node with a pointer that leads nowhere.
fn has_hole(forest: &Forest, number: usize) -> bool {
    let edges = forest.edges(&forest.nodes()[number]);
    edges.iter().any(|e| forest.child(e).is_none())
}

/// Which nodes have a damaged block, or a pointer to nowhere, at or below them.
fn leads_to(forest: &Forest, roots: &[usize], damaged: &HashSet<MetadataBlock>) -> Vec<bool> {
    let mut leads = vec![false; forest.nodes().len()];
    for number in forest.children_first(roots) {
        let node = &forest.nodes()[number];
        leads[number] = damaged.contains(&node.block)
            || has_hole(forest, number)
            || forest
                .edges(node)
                .iter()
                .filter_map(|e| forest.number(forest.child(e)?))
                .any(|child| leads[child]);
    }
    leads
}
