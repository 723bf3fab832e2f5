//! Finds out which hole each orphan belongs to.
//!
//! Evidence, the strongest first:
//! 1. What is left of the lost node itself names the orphan, with its first key.
//! 2. An older top-level tree has the orphan as a device's root.
//! 3. There is as much room as there are parents missing.
//! 4. An older tree of the device has mappings of the orphan that no other device in question ever had.
//! 5. The kernel writes a node's new children after the node: the orphan lies behind the lost node, no other inner node between
//!    them. That is believed only of a pool in which it holds for every child whose parent is known.
//!
//! An orphan that none of these decides stays an orphan, and is reported.

use super::orphans::Orphans;
use super::scan::{Class, Scan};
use super::states::State;
use crate::bytes::get_u64;
use crate::error::Result;
use crate::io::{AlignedBuffer, BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{
    Forest, Leaves, NODE_HEADER, Node, Shape, Structure, TreeKind, Walk, max_entries,
};
use crate::units::{MetadataBlock, ThinId};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

/// Why an orphan was put where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// What is left of the lost node names it.
    Remnant,
    /// An older top-level tree has it as the device's root.
    OlderRoot,
    /// There is no other place for it.
    OnlyPlace,
    /// An older tree of the device has its mappings.
    OlderMappings,
    /// It was written right after the lost node.
    Position,
    /// None that would do: the user asked for it.
    Likeliest,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Remnant => "what is left of the lost node names it",
            Self::OlderRoot => "an older top-level tree has it as the device's root",
            Self::OnlyPlace => "there is no other place for it",
            Self::OlderMappings => {
                "older trees of the device, and of no other in question, have its mappings"
            }
            Self::Position => {
                "it was written right after the lost node, as all others in this pool"
            }
            Self::Likeliest => "nothing decides; it is the likeliest place",
        })
    }
}

/// How many distinctive mappings make evidence.
const DISTINCT: usize = 2;
/// Known children that must bear out where the kernel writes children before that is evidence.
const SAMPLE: u64 = 8;

/// A place found for an orphan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub(super) orphan: usize,
    pub(super) hole: usize,
    pub(super) evidence: Evidence,
}

/// Puts orphans into holes.
pub(super) struct Attribution<'a> {
    pub(super) engine: &'a dyn BlockEngine,
    pub(super) scan: &'a Scan,
    pub(super) history: &'a [&'a State],
    pub(super) observer: &'a dyn Observer,
    pub(super) orphans: &'a mut Orphans,
    /// Orphans may belong to a metadata snapshot that is lost, so that there is always another place for them.
    pub(super) has_other_place: bool,
    pub(super) placed: Vec<Placed>,
}

impl Attribution<'_> {
    /// Goes through the evidence until nothing more is decided; with `take_all`, puts the rest where it is likeliest.
    pub(super) fn run(&mut self, forest: &Forest, take_all: bool) -> Result<()> {
        if self.orphans.holes.is_empty() || self.orphans.orphans.is_empty() {
            return Ok(());
        }
        self.observer.progress("finding parents of orphans", 0, 1);
        let lost = self.orphans.holes.iter().filter_map(|h| h.block);
        let stale = self
            .scan
            .nodes()
            .iter()
            .filter(|n| matches!(n.class, Class::Inner(_)))
            .map(|n| n.block());
        let known = KnownChildren::of(forest, lost.chain(stale));
        if std::env::var_os("DBG").is_some() {
            eprintln!(
                "known behind {} elsewhere {}",
                known.behind, known.elsewhere
            );
        }
        self.remnants();
        self.older_roots();
        self.only_places();
        let owned = self.older_mappings(forest)?;
        self.decide(
            |this, o, holes| this.by_mappings(&owned, o, holes),
            Evidence::OlderMappings,
        );
        if known.is_reliable() {
            self.decide(
                |this, o, holes| this.by_position(&known, o, holes),
                Evidence::Position,
            );
        }
        self.only_places();
        if take_all {
            self.decide(
                |this, o, holes| this.likeliest(&owned, o, holes),
                Evidence::Likeliest,
            );
        }
        Ok(())
    }

    fn place(&mut self, orphan: usize, hole: usize, evidence: Evidence) {
        self.orphans.fill(orphan, hole);
        self.placed.push(Placed {
            orphan,
            hole,
            evidence,
        });
    }

    /// The orphans that something is missing of, with the holes that they fit.
    fn open(&self) -> Vec<(usize, Vec<usize>)> {
        let missing =
            (0..self.orphans.orphans.len()).filter(|&o| self.orphans.orphans[o].missing > 0);
        missing
            .map(|o| (o, self.orphans.candidates(o)))
            .filter(|(_, holes)| !holes.is_empty())
            .collect()
    }

    /// Evidence 1. The block must not be one that was meant for another place.
    fn remnants(&mut self) {
        let at: HashMap<MetadataBlock, usize> = self
            .orphans
            .orphans
            .iter()
            .enumerate()
            .map(|(i, o)| (o.block, i))
            .collect();
        let mut block = AlignedBuffer::new(1);
        let mut named: Vec<(usize, usize)> = Vec::new();
        for (h, hole) in self.orphans.holes.iter().enumerate() {
            let Some(place) = hole.block else { continue };
            if self.engine.read(place, block.blocks_mut(1)).is_err()
                || self.scan.is_misplaced(place)
            {
                continue;
            }
            let data = block.blocks(1);
            for i in 0..max_entries(8) {
                let key = get_u64(data, NODE_HEADER + 8 * i);
                let child = get_u64(data, NODE_HEADER + 8 * (max_entries(8) + i));
                let orphan = at.get(&MetadataBlock(child)).copied();
                let begins = |o: &usize| self.orphans.orphans[*o].keys.is_some_and(|k| k.0 == key);
                named.extend(orphan.filter(begins).map(|o| (o, h)));
            }
        }
        for (orphan, hole) in named {
            if self.orphans.fits(orphan, hole) {
                self.place(orphan, hole, Evidence::Remnant);
            }
        }
    }

    /// Evidence 2, for devices whose root is not known: the latest state that knows the device has a root for it that lacks a
    /// parent. If it has that root for more devices than parents are missing, one of them was changed since.
    fn older_roots(&mut self) {
        let at: HashMap<MetadataBlock, usize> = self
            .orphans
            .orphans
            .iter()
            .enumerate()
            .map(|(i, o)| (o.block, i))
            .collect();
        let mut claims: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (h, hole) in self.orphans.holes.iter().enumerate() {
            let (None, Some(device)) = (hole.block, hole.devices.first()) else {
                continue;
            };
            let root = self.history.iter().find_map(|s| s.roots.get(&device.0));
            if let Some(&orphan) = root.and_then(|root| at.get(root)) {
                claims.entry(orphan).or_default().push(h);
            }
        }
        for (orphan, holes) in claims {
            let holes: Vec<usize> = holes
                .into_iter()
                .filter(|&h| self.orphans.fits(orphan, h))
                .collect();
            if holes.len() <= self.orphans.orphans[orphan].missing as usize {
                for hole in holes {
                    self.place(orphan, hole, Evidence::OlderRoot);
                }
            }
        }
    }

    /// Evidence 3.
    fn only_places(&mut self) {
        while !self.has_other_place {
            let open = self.open();
            // Of several orphans that fit the same device, none has to be its root.
            let mut contenders: HashMap<usize, usize> = HashMap::new();
            for hole in open.iter().flat_map(|(_, holes)| holes) {
                *contenders.entry(*hole).or_default() += 1;
            }
            let is_decided = |(o, holes): &&(usize, Vec<usize>)| {
                let is_free =
                    |h: &usize| self.orphans.holes[*h].block.is_some() || contenders[h] == 1;
                let rivals = holes.iter().any(|&h| self.has_rival(*o, h, &open));
                holes.len() <= self.orphans.orphans[*o].missing as usize
                    && holes.iter().all(is_free)
                    && !rivals
            };
            let decided: Vec<(usize, Vec<usize>)> =
                open.iter().filter(is_decided).cloned().collect();
            let before = self.placed.len();
            for (orphan, holes) in decided {
                for hole in holes {
                    if self.orphans.fits(orphan, hole) {
                        self.place(orphan, hole, Evidence::OnlyPlace);
                    }
                }
            }
            if self.placed.len() == before {
                return;
            }
        }
    }

    /// True if another orphan claims the same keys of the hole, or all that fit it are more than its devices lack.
    fn has_rival(&self, orphan: usize, hole: usize, open: &[(usize, Vec<usize>)]) -> bool {
        let orphans = &self.orphans.orphans;
        let Some((first, last)) = orphans[orphan].keys else {
            return false;
        };
        let overlaps = |o: usize| orphans[o].keys.is_some_and(|k| k.0 <= last && k.1 >= first);
        open.iter()
            .any(|(o, holes)| *o != orphan && holes.contains(&hole) && overlaps(*o))
    }

    /// Places every orphan that `choose` decides: it gets the orphan and the holes that it fits, more than are missing.
    fn decide(
        &mut self,
        choose: impl Fn(&Self, usize, &[usize]) -> Vec<usize>,
        evidence: Evidence,
    ) {
        for (orphan, holes) in self.open() {
            let chosen = choose(self, orphan, &holes);
            for hole in chosen {
                if self.orphans.fits(orphan, hole) {
                    self.place(orphan, hole, evidence);
                }
            }
        }
    }

    /// Evidence 4: which mappings of each orphan older trees of each device have.
    fn older_mappings(&self, forest: &Forest) -> Result<Owned> {
        let open = self.open();
        let holes = open.iter().flat_map(|(_, holes)| holes);
        let wanted: BTreeSet<ThinId> = holes
            .flat_map(|&h| self.orphans.holes[h].devices.iter().copied())
            .collect();
        let mut owned = Owned::default();
        if wanted.is_empty() {
            return Ok(owned);
        }
        // Where each mapping of the open orphans is: (orphan, number of the mapping).
        let mut mappings: HashMap<(u64, u64), Vec<(u32, u32)>> = HashMap::new();
        for (orphan, leaf) in self.leaves(forest, &open) {
            self.read_leaf(leaf, |n, key, value| {
                let at = mappings.entry((key, value)).or_default();
                at.push((orphan as u32, leaf.0 as u32 * 256 + n));
            });
        }
        let older = self.older_leaves(&wanted)?;
        for ((first, last), devices) in older.values() {
            for &device in devices {
                owned
                    .ranges
                    .entry(device)
                    .or_default()
                    .push((*first, *last));
            }
        }
        let blocks: Vec<u64> = older.keys().map(|b| b.0).collect();
        let stop = || self.observer.is_cancelled();
        let parts = sweep(
            self.engine,
            &blocks,
            &stop,
            Vec::new,
            |seen: &mut Vec<_>, block, data| {
                let node = data.ok().and_then(|data| Node::parse(data, block, 8).ok());
                let Some(node) = node.filter(Node::is_leaf) else {
                    return;
                };
                for (key, value) in node.keys().zip(node.values_u64()) {
                    for &at in mappings.get(&(key, value)).into_iter().flatten() {
                        seen.push((block, at));
                    }
                }
            },
        );
        self.observer.check_cancelled()?;
        for (block, (orphan, mapping)) in parts.into_iter().flatten() {
            for &device in &older[&block].1 {
                owned
                    .by
                    .entry((orphan as usize, device))
                    .or_default()
                    .insert(mapping);
            }
        }
        Ok(owned)
    }

    fn leaves(&self, forest: &Forest, open: &[(usize, Vec<usize>)]) -> Vec<(usize, MetadataBlock)> {
        let mut leaves = Vec::new();
        for &(orphan, _) in open {
            let number = forest.number(self.orphans.orphans[orphan].block);
            for n in forest.children_first(number.as_slice()) {
                let node = &forest.nodes()[n];
                if matches!(node.shape, Shape::Leaf { .. }) {
                    leaves.push((orphan, node.block));
                }
            }
        }
        leaves
    }

    fn read_leaf(&self, block: MetadataBlock, mut see: impl FnMut(u32, u64, u64)) {
        let mut data = AlignedBuffer::new(1);
        if self.engine.read(block, data.blocks_mut(1)).is_err() {
            return;
        }
        if let Ok(node) = Node::parse(data.blocks(1), block, 8) {
            for (n, (key, value)) in (0..).zip(node.keys().zip(node.values_u64())) {
                see(n, key, value);
            }
        }
    }

    /// The leaves of older trees of these devices. A tree counts only if it is whole and has as many mappings as details of its
    /// time say: then its blocks were not reused.
    fn older_leaves(&self, wanted: &BTreeSet<ThinId>) -> Result<OlderLeaves> {
        let mut trees: BTreeSet<(ThinId, MetadataBlock, u64)> = BTreeSet::new();
        for state in self.history {
            for &device in wanted {
                if let (Some(&root), Some(detail)) =
                    (state.roots.get(&device.0), state.details.get(&device.0))
                {
                    trees.insert((device, root, detail.mapped_blocks));
                }
            }
        }
        let mut forest = Forest::new(self.engine.nr_blocks());
        let limit = forest.nr_blocks();
        let roots: Vec<MetadataBlock> = trees.iter().map(|t| t.1).filter(|r| r.0 < limit).collect();
        let walk = Walk {
            engine: self.engine,
            observer: self.observer,
            tree: TreeKind::Mappings,
            leaves: Leaves::Read,
        };
        forest.walk(&walk, roots.iter().copied(), || (), |(), _| ())?;
        let structure = Structure::of(&forest, TreeKind::Mappings, &roots);
        let mut leaves = OlderLeaves::new();
        for (device, root, mapped) in trees {
            let summary = structure.summary(&forest, root);
            if !summary.is_some_and(|s| !s.damaged && s.entries == mapped) {
                continue;
            }
            for n in forest.children_first(forest.number(root).as_slice()) {
                let node = &forest.nodes()[n];
                if let Shape::Leaf { first, last, .. } = node.shape {
                    let leaf = leaves.entry(node.block).or_default();
                    leaf.0 = (first, last);
                    leaf.1.insert(device);
                }
            }
        }
        Ok(leaves)
    }

    fn by_mappings(&self, owned: &Owned, orphan: usize, holes: &[usize]) -> Vec<usize> {
        // Of a device without a history here, nothing can be said.
        let keys = self.orphans.orphans[orphan].keys;
        let has_history = |&h: &usize| owned.has_history(&self.orphans.holes[h].devices, keys);
        if !holes.iter().all(has_history) {
            return Vec::new();
        }
        let of = |h: usize| owned.of(orphan, &self.orphans.holes[h].devices);
        let sets: Vec<(usize, BTreeSet<u32>)> = holes.iter().map(|&h| (h, of(h))).collect();
        let missing = self.orphans.orphans[orphan].missing as usize;
        let mut order: Vec<&(usize, BTreeSet<u32>)> = sets.iter().collect();
        order.sort_by_key(|s| std::cmp::Reverse(s.1.len()));
        let (chosen, rest) = order.split_at(missing.min(order.len()));
        let is_clear = |a: &BTreeSet<u32>, b: &BTreeSet<u32>| {
            let (more, less) = (a.difference(b).count(), b.difference(a).count());
            more >= DISTINCT && 8 * less <= more
        };
        match chosen
            .iter()
            .all(|a| rest.iter().all(|b| is_clear(&a.1, &b.1)))
        {
            true => chosen.iter().map(|c| c.0).collect(),
            false => Vec::new(),
        }
    }

    fn by_position(&self, known: &KnownChildren, orphan: usize, holes: &[usize]) -> Vec<usize> {
        let orphan = &self.orphans.orphans[orphan];
        let before = known.inner_before(orphan.block);
        let is_it = |h: &&usize| before.is_some() && self.orphans.holes[**h].block == before;
        match orphan.missing {
            1 => holes.iter().find(is_it).copied().into_iter().collect(),
            _ => Vec::new(),
        }
    }

    fn likeliest(&self, owned: &Owned, orphan: usize, holes: &[usize]) -> Vec<usize> {
        let place = self.orphans.orphans[orphan].block;
        let score = |h: &usize| {
            let hole = &self.orphans.holes[*h];
            let mappings = owned.of(orphan, &hole.devices).len();
            let behind = hole.block.filter(|b| *b < place);
            (mappings, behind)
        };
        let mut order = holes.to_vec();
        order.sort_by_key(|h| std::cmp::Reverse(score(h)));
        order.truncate(self.orphans.orphans[orphan].missing as usize);
        order
    }
}

/// Leaves of older trees: smallest and largest key, and the devices that had them.
type OlderLeaves = BTreeMap<MetadataBlock, ((u64, u64), BTreeSet<ThinId>)>;

/// Which mappings of an orphan older trees of a device have.
#[derive(Default)]
struct Owned {
    by: HashMap<(usize, ThinId), BTreeSet<u32>>,
    /// Ranges of keys of which older leaves of a device are left.
    ranges: HashMap<ThinId, Vec<(u64, u64)>>,
}

impl Owned {
    fn has_history(&self, devices: &[ThinId], keys: Option<(u64, u64)>) -> bool {
        let overlaps =
            |r: &(u64, u64)| keys.is_some_and(|(first, last)| r.0 <= last && r.1 >= first);
        let ranges = devices.iter().filter_map(|d| self.ranges.get(d)).flatten();
        ranges.into_iter().any(overlaps)
    }

    fn of(&self, orphan: usize, devices: &[ThinId]) -> BTreeSet<u32> {
        let sets = devices.iter().filter_map(|&d| self.by.get(&(orphan, d)));
        sets.flatten().copied().collect()
    }
}

/// Where the children of inner nodes lie that are known.
struct KnownChildren {
    /// All inner nodes: of trees, lost ones, and freed ones that are still there.
    inner: BTreeSet<MetadataBlock>,
    /// Children behind their parent with no other inner node between them.
    behind: u64,
    /// Children behind an inner node in use that is not their parent.
    elsewhere: u64,
}

impl KnownChildren {
    fn of(forest: &Forest, others: impl Iterator<Item = MetadataBlock>) -> Self {
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
            match known.inner_before(child) {
                Some(before) if parents.contains(&before) => known.behind += 1,
                Some(before) if in_use.contains(&before) => known.elsewhere += 1,
                _ => {}
            }
        }
        known
    }

    fn is_reliable(&self) -> bool {
        self.behind >= SAMPLE && self.elsewhere == 0
    }

    /// The inner node that lies before `block`, the last one of the device if none does.
    fn inner_before(&self, block: MetadataBlock) -> Option<MetadataBlock> {
        let before = self.inner.range(..block).next_back();
        before.or(self.inner.last()).copied()
    }
}
