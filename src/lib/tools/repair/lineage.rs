//! What older trees of a device, which are still on the disk though they were freed, tell of an orphan.
//!
//! A mapping comes into a device's tree in two ways: the device inherits it when it is made as a snapshot, and then it is older
//! than the device; or it is written to the device, and then it is not. So if the device's last tree but one is whole, then
//! 1. an orphan with a mapping that is older than the device and that this tree has not, is not the device's;
//! 2. an orphan with a mapping that another device is known to have written, since this device was made, is not the device's
//!    either, unless this tree has it.

use super::basis::Basis;
use super::orphans::Orphans;
use super::states::State;
use crate::error::Result;
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{Forest, Leaves, Node, Shape, Structure, TreeKind, Walk};
use crate::units::{MAX_TIME, MetadataBlock, ThinId};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Where older trees are looked for.
pub(super) struct Sources<'a> {
    pub(super) engine: &'a dyn BlockEngine,
    /// All states, the latest first.
    pub(super) history: &'a [&'a State],
    pub(super) basis: &'a Basis,
    pub(super) observer: &'a dyn Observer,
}

/// What older trees tell of orphans.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    /// The time of each orphan's mappings.
    times: HashMap<usize, Vec<u32>>,
    /// Which of an orphan's mappings, by their place in `times`, older trees of a device have.
    known: HashMap<(usize, ThinId), BTreeSet<u32>>,
    /// The devices whose last tree but one is whole.
    devices: BTreeSet<ThinId>,
}

/// The leaves of older trees, with the devices that had them.
type OlderLeaves = BTreeMap<MetadataBlock, BTreeSet<ThinId>>;

/// Where mappings (key and value) of orphans are: (orphan, place among its mappings).
type Mappings = HashMap<(u64, u64), Vec<(u32, u32)>>;

impl Lineage {
    /// Holds the `leaves` of orphans, each with its orphan's number, against older trees.
    pub(super) fn of(
        sources: &Sources<'_>,
        orphans: &Orphans,
        mut leaves: Vec<(usize, MetadataBlock)>,
    ) -> Result<Self> {
        let mut lineage = Self::default();
        if leaves.is_empty() {
            return Ok(lineage);
        }
        leaves.sort_unstable_by_key(|l| (l.1, l.0));
        let older = lineage.older_leaves(sources, orphans)?;
        let mappings = lineage.mappings(sources, &leaves)?;
        let blocks: Vec<u64> = older.keys().map(|b| b.0).collect();
        let stop = || sources.observer.is_cancelled();
        let seen = sweep(
            sources.engine,
            &blocks,
            &stop,
            Vec::new,
            |seen, block, data| {
                each_mapping(data, block, |key, value| {
                    for &at in mappings.get(&(key, value)).into_iter().flatten() {
                        seen.push((block, at));
                    }
                });
            },
        );
        sources.observer.check_cancelled()?;
        for (block, (orphan, mapping)) in seen.into_iter().flatten() {
            for &device in &older[&block] {
                let known = lineage.known.entry((orphan as usize, device));
                known.or_default().insert(mapping);
            }
        }
        Ok(lineage)
    }

    /// Reads the mappings of the orphans.
    fn mappings(
        &mut self,
        sources: &Sources<'_>,
        leaves: &[(usize, MetadataBlock)],
    ) -> Result<Mappings> {
        let mut blocks: Vec<u64> = leaves.iter().map(|l| l.1.0).collect();
        blocks.dedup();
        let stop = || sources.observer.is_cancelled();
        let read = sweep(
            sources.engine,
            &blocks,
            &stop,
            Vec::new,
            |read, block, data| {
                each_mapping(data, block, |key, value| read.push((block, key, value)));
            },
        );
        sources.observer.check_cancelled()?;
        let mut mappings = Mappings::new();
        for (block, key, value) in read.into_iter().flatten() {
            let first = leaves.partition_point(|l| l.1 < block);
            for &(orphan, _) in leaves[first..].iter().take_while(|l| l.1 == block) {
                let times = self.times.entry(orphan).or_default();
                let at = (orphan as u32, times.len() as u32);
                times.push(value as u32 & MAX_TIME);
                mappings.entry((key, value)).or_default().push(at);
            }
        }
        Ok(mappings)
    }

    /// The leaves of older trees of the devices that have holes. A tree counts only if it is whole and has as many mappings as
    /// the details of its time say: then none of its blocks was reused. So does a device only if its latest tree but the lost
    /// one counts, and a state only if it is of the same device, not of one that had the id before.
    fn older_leaves(&mut self, sources: &Sources<'_>, orphans: &Orphans) -> Result<OlderLeaves> {
        let lost: HashSet<MetadataBlock> = orphans.holes.iter().filter_map(|h| h.block).collect();
        let wanted: BTreeSet<ThinId> = orphans
            .holes
            .iter()
            .flat_map(|h| h.devices.iter().copied())
            .collect();
        let mut trees: Vec<(ThinId, MetadataBlock, u64)> = Vec::new();
        let mut listed = HashSet::new();
        for state in sources.history {
            for &device in &wanted {
                let (Some(&root), Some(then)) =
                    (state.roots.get(&device.0), state.details.get(&device.0))
                else {
                    continue;
                };
                let now = sources.basis.details.get(&device.0);
                let is_same = now.is_none_or(|now| {
                    (now.creation_time, now.transaction_id)
                        == (then.creation_time, then.transaction_id)
                });
                let tree = (device, root, then.mapped_blocks);
                if is_same && !lost.contains(&root) && listed.insert(tree) {
                    trees.push(tree);
                }
            }
        }
        let mut forest = Forest::new(sources.engine.nr_blocks());
        let limit = forest.nr_blocks();
        let roots: Vec<MetadataBlock> = trees.iter().map(|t| t.1).filter(|r| r.0 < limit).collect();
        let walk = Walk {
            engine: sources.engine,
            observer: sources.observer,
            tree: TreeKind::Mappings,
            leaves: Leaves::Read,
        };
        forest.walk(&walk, roots.iter().copied(), || (), |(), _| ())?;
        let structure = Structure::of(&forest, TreeKind::Mappings, &roots);
        let mut leaves = OlderLeaves::new();
        let mut judged: BTreeMap<ThinId, bool> = BTreeMap::new();
        for (device, root, mapped) in trees {
            let summary = structure.summary(&forest, root);
            let is_whole = summary.is_some_and(|s| !s.damaged && s.entries == mapped);
            if !*judged.entry(device).or_insert(is_whole) || !is_whole {
                continue;
            }
            for n in forest.children_first(forest.number(root).as_slice()) {
                let node = &forest.nodes()[n];
                if matches!(node.shape, Shape::Leaf { .. }) {
                    leaves.entry(node.block).or_default().insert(device);
                }
            }
        }
        self.devices = judged.into_iter().filter(|j| j.1).map(|j| j.0).collect();
        Ok(leaves)
    }

    /// Rules out holes of orphans by both rules.
    pub(super) fn refute(&self, orphans: &mut Orphans, basis: &Basis) {
        let created = |device: &ThinId| basis.details.get(&device.0).map(|d| d.creation_time);
        let mut refuted = Vec::new();
        for (&orphan, times) in &self.times {
            let made_by = self.makers(orphan, times, &created);
            for hole in orphans.candidates(orphan) {
                let is_other = |device: &ThinId| {
                    let Some(created) = created(device) else {
                        return false;
                    };
                    let none = BTreeSet::new();
                    let known = self.known.get(&(orphan, *device)).unwrap_or(&none);
                    let is_strange = |at: &u32| !known.contains(at);
                    let places = (0..times.len() as u32).filter(is_strange);
                    let is_older = |at: u32| times[at as usize] < created;
                    let is_foreign =
                        |at: u32| times[at as usize] >= created && made_by.contains_key(&at);
                    let mut places = places.filter(|&at| made_by.get(&at) != Some(device));
                    places.any(|at| self.devices.contains(device) && is_older(at) || is_foreign(at))
                };
                if orphans.holes[hole].devices.iter().any(is_other) {
                    refuted.push((orphan, hole));
                }
            }
        }
        orphans.refuted.extend(refuted);
    }

    /// The devices that wrote mappings of an orphan themselves, as older trees of theirs show.
    fn makers(
        &self,
        orphan: usize,
        times: &[u32],
        created: &impl Fn(&ThinId) -> Option<u32>,
    ) -> BTreeMap<u32, ThinId> {
        let mut makers = BTreeMap::new();
        for &device in &self.devices {
            let (Some(known), Some(created)) =
                (self.known.get(&(orphan, device)), created(&device))
            else {
                continue;
            };
            let own = known.iter().filter(|&&at| times[at as usize] >= created);
            makers.extend(own.map(|&at| (at, device)));
        }
        makers
    }

    /// Mappings of `orphan` that older trees of these devices have.
    pub(super) fn nr_known(&self, orphan: usize, devices: &[ThinId]) -> usize {
        let known = devices.iter().filter_map(|&d| self.known.get(&(orphan, d)));
        known.map(BTreeSet::len).sum()
    }
}

/// Calls `see` with key and value of each mapping of a leaf.
fn each_mapping(data: std::io::Result<&[u8]>, block: MetadataBlock, mut see: impl FnMut(u64, u64)) {
    let node = data.ok().and_then(|data| Node::parse(data, block, 8).ok());
    if let Some(node) = node.filter(Node::is_leaf) {
        node.keys()
            .zip(node.values_u64())
            .for_each(|(key, value)| see(key, value));
    }
}
