//! Where on the device the kernel writes the children of a node: after it, for it goes through a tree from the root down, and
//! allocates blocks upwards.
//!
//! That says whose child a leaf is only as long as one device is written at a time, so it is held against all children that are
//! known first.

use super::basis::Basis;
use super::scan::Scan;
use crate::pdata::{Forest, Shape};
use crate::units::MetadataBlock;
use std::collections::{BTreeSet, HashMap};

/// Known children that must bear it out before it is evidence.
const SAMPLE: u64 = 8;

/// When the first of the devices that each node belongs to was created.
fn created(forest: &Forest, basis: &Basis) -> Vec<Option<u32>> {
    let mut created: Vec<Option<u32>> = vec![None; forest.nodes().len()];
    let mut lower = |n: usize, time: Option<u32>| {
        created[n] = match (created[n], time) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        created[n]
    };
    let mut roots = Vec::new();
    for (id, &root) in &basis.roots {
        if let Some(n) = forest.number(root) {
            lower(n, basis.details.get(id).map(|d| d.creation_time));
            roots.push(n);
        }
    }
    for n in forest.children_first(&roots).into_iter().rev() {
        let time = lower(n, None);
        for child in forest
            .edges(&forest.nodes()[n])
            .iter()
            .filter_map(|e| forest.number(forest.child(e)?))
        {
            lower(child, time);
        }
    }
    created
}

/// True for a leaf that was written after its device was created, rather than inherited from the device's origin.
pub(super) fn is_own(time: Option<u32>, created: Option<u32>) -> bool {
    time.zip(created)
        .is_some_and(|(time, created)| time >= created)
}

/// Where the children of inner nodes lie that are known.
pub(super) struct KnownChildren {
    /// All inner nodes: of trees, lost ones, and freed ones that are still there.
    inner: BTreeSet<MetadataBlock>,
    /// Children behind their parent with no other inner node between them.
    behind: u64,
    /// Children behind an inner node in use that is not their parent.
    elsewhere: u64,
}

impl KnownChildren {
    pub(super) fn of(
        forest: &Forest,
        basis: &Basis,
        scan: &Scan,
        others: impl Iterator<Item = MetadataBlock>,
    ) -> Self {
        let created = created(forest, basis);
        let nodes = forest.nodes().iter();
        let inner = nodes
            .filter(|n| matches!(n.shape, Shape::Internal { .. }))
            .map(|n| n.block);
        let in_use: BTreeSet<MetadataBlock> = inner.collect();
        let mut known = Self {
            inner: others.chain(in_use.iter().copied()).collect(),
            behind: 0,
            elsewhere: 0,
        };
        let mut parents: HashMap<MetadataBlock, Vec<MetadataBlock>> = HashMap::new();
        for node in forest.nodes() {
            for child in forest.edges(node).iter().filter_map(|e| forest.child(e)) {
                parents.entry(child).or_default().push(node.block);
            }
        }
        // A shared child was written with the first of its parents, which may be gone.
        for (child, parents) in parents
            .into_iter()
            .filter(|(_, parents)| parents.len() == 1)
        {
            let created = forest.number(parents[0]).and_then(|n| created[n]);
            if !is_own(scan.time(child), created) {
                continue;
            }
            match known.inner_before(child) {
                Some(before) if parents.contains(&before) => known.behind += 1,
                Some(before) if in_use.contains(&before) => known.elsewhere += 1,
                _ => {}
            }
        }
        known
    }

    pub(super) fn is_reliable(&self) -> bool {
        self.behind >= SAMPLE && self.elsewhere == 0
    }

    /// The inner node that lies before `block`, the last one of the device if none does.
    pub(super) fn inner_before(&self, block: MetadataBlock) -> Option<MetadataBlock> {
        let before = self.inner.range(..block).next_back();
        before.or(self.inner.last()).copied()
    }
}
