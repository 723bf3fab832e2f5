//! Which leaves several devices share, in maximal runs that every one of them has in the same order.
//!
//! Two leaves belong to one run when each way through the forest that meets the one goes on to the other. That is decided on
//! the distinct edges of the forest, so five hundred snapshots of one tree cost no more than one.

use crate::pdata::{Forest, Shape};
use crate::units::MetadataBlock;

const UNSET: u32 = u32::MAX;
const MIXED: u32 = u32::MAX - 1;
/// Before the first leaf and after the last leaf of a device.
const BORDER: u32 = u32::MAX - 2;

/// The sharing of leaves among the trees of a forest.
#[derive(Debug)]
pub(super) struct Sharing {
    next: Vec<u32>,
    previous: Vec<u32>,
    /// How often a node is reached from the roots, up to 2.
    uses: Vec<u8>,
}

impl Sharing {
    /// Of the trees at `roots`, which must be free of cycles.
    pub(super) fn of(forest: &Forest, roots: &[MetadataBlock]) -> Self {
        let nodes = forest.nodes().len();
        let mut sharing = Self {
            next: vec![UNSET; nodes],
            previous: vec![UNSET; nodes],
            uses: vec![0; nodes],
        };
        let roots: Vec<usize> = roots.iter().filter_map(|&r| forest.number(r)).collect();
        let order = forest.children_first(&roots);
        let mut first = vec![UNSET; nodes];
        let mut last = vec![UNSET; nodes];
        for &n in &order {
            let children = || children(forest, n);
            if matches!(
                forest.nodes()[n].shape,
                Shape::Leaf { .. } | Shape::UnreadLeaf
            ) {
                (first[n], last[n]) = (n as u32, n as u32);
                continue;
            }
            // A child may be left without leaves when damaged nodes were taken out.
            for child in children() {
                if first[child] == UNSET {
                    continue;
                }
                if first[n] == UNSET {
                    first[n] = first[child];
                } else {
                    sharing.link(last[n], first[child]);
                }
                last[n] = last[child];
            }
        }
        for &root in &roots {
            sharing.uses[root] = (sharing.uses[root] + 1).min(2);
            sharing.link(BORDER, first[root]);
            sharing.link(last[root], BORDER);
        }
        for &n in order.iter().rev() {
            for child in children(forest, n) {
                sharing.uses[child] = (sharing.uses[child] + sharing.uses[n]).min(2);
            }
        }
        sharing
    }

    fn link(&mut self, from: u32, to: u32) {
        let merge = |slot: &mut u32, value| {
            *slot = match *slot {
                UNSET => value,
                same if same == value => same,
                _ => MIXED,
            }
        };
        if let Some(slot) = self.next.get_mut(from as usize) {
            merge(slot, to);
        }
        if let Some(slot) = self.previous.get_mut(to as usize) {
            merge(slot, from);
        }
    }

    /// True when more than one way leads to the leaf.
    pub(super) fn is_shared(&self, leaf: usize) -> bool {
        self.uses[leaf] > 1
    }

    /// True for a leaf that begins a run.
    pub(super) fn begins_run(&self, leaf: usize) -> bool {
        // Inner nodes have no neighbours on record.
        if self.previous[leaf] == UNSET {
            return false;
        }
        match self.previous.get(self.previous[leaf] as usize) {
            Some(_) => self.next[self.previous[leaf] as usize] != leaf as u32,
            None => true,
        }
    }

    /// The leaves of the run that `leaf` begins.
    pub(super) fn run(&self, leaf: usize) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(Some(leaf), |&leaf| {
            let next = self.next[leaf] as usize;
            (*self.previous.get(next)? == leaf as u32).then_some(next)
        })
    }
}

fn children(forest: &Forest, node: usize) -> impl Iterator<Item = usize> + '_ {
    let edges = forest.edges(&forest.nodes()[node]);
    let numbers = edges.iter().filter_map(|e| forest.number(forest.child(e)?));
    numbers.filter(|&n| forest.nodes()[n].shape != Shape::Bad)
}

/// The leaves below `root` in key order.
pub(super) fn leaves(forest: &Forest, root: usize) -> impl Iterator<Item = usize> + '_ {
    let mut stack = vec![(root, 0)];
    std::iter::from_fn(move || {
        while let Some((node, next)) = stack.pop() {
            let info = &forest.nodes()[node];
            match info.shape {
                Shape::Leaf { .. } | Shape::UnreadLeaf => return Some(node),
                Shape::Bad => continue,
                Shape::Internal { .. } => {}
            }
            if let Some(edge) = forest.edges(info).get(next) {
                stack.push((node, next + 1));
                if let Some(child) = forest.child(edge).and_then(|b| forest.number(b)) {
                    stack.push((child, 0));
                }
            }
        }
        None
    })
}
