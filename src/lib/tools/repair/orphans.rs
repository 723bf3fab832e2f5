//! Mapping nodes that are in use, as a space map on disk says, though not everything that leads to them is left: the orphans; and
//! the holes that they may have been in: lost inner nodes, and devices whose root is not known.

use super::basis::Basis;
use super::liveness::Liveness;
use super::mend::MendedEngine;
use super::scan::{Class, Scan};
use crate::error::Result;
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{CountMap, Forest, Leaves, Shape, Structure, TreeKind, Walk};
use crate::tools::affected::affected;
use crate::units::{MetadataBlock, ThinId};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// A subtree that lacks a parent.
#[derive(Clone, Debug)]
pub(super) struct Orphan {
    pub(super) block: MetadataBlock,
    /// Its smallest and largest key; none if it is empty.
    pub(super) keys: Option<(u64, u64)>,
    pub(super) entries: u64,
    /// Something below it is lost.
    is_damaged: bool,
    /// Levels below it.
    height: u8,
    /// Parents that are missing.
    pub(super) missing: u32,
}

/// Where orphans may belong.
#[derive(Clone, Debug)]
pub(super) struct Hole {
    /// The block of the lost node; none for a device whose root is not known.
    pub(super) block: Option<MetadataBlock>,
    /// The devices that the lost node belonged to.
    pub(super) devices: Vec<ThinId>,
    pub(super) begin: u64,
    pub(super) end: Option<u64>,
    /// Levels below the lost node, where its siblings tell.
    height: Option<u8>,
    /// The orphans that were found to belong here, by their smallest key.
    pub(super) filled: BTreeMap<u64, usize>,
}

/// Devices each of which has one of some orphans as its root, no telling which.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) devices: Vec<ThinId>,
    /// More than one, by their place in [`Orphans::orphans`].
    pub(super) orphans: Vec<usize>,
}

/// Orphans and holes.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    pub(super) orphans: Vec<Orphan>,
    pub(super) holes: Vec<Hole>,
    /// Holes that an orphan cannot be in, whatever its keys.
    pub(super) refuted: HashSet<(usize, usize)>,
    /// Mappings that each device is known to lack, where its details tell.
    pub(super) lacking: HashMap<ThinId, u64>,
    /// More devices have the same root than the space map counts.
    pub(super) roots_are_contested: bool,
}

impl Hole {
    /// True if nothing but the level and the keys speaks against `orphan` in this hole.
    fn has_room_for(&self, orphan: &Orphan, orphans: &[Orphan]) -> bool {
        let Some((first, last)) = orphan.keys else {
            return self.block.is_none() && self.filled.is_empty();
        };
        let before = self.filled.range(..=last).next_back();
        let is_free = before.is_none_or(|(_, &o)| orphans[o].keys.is_some_and(|k| k.1 < first));
        is_free
            && first >= self.begin
            && self.end.is_none_or(|end| last < end)
            && self.height.is_none_or(|h| orphan.height < h)
    }
}

impl Orphans {
    /// True if `orphan` can be in `hole`, by keys, level, and the number of mappings that its devices lack.
    pub(super) fn fits(&self, orphan: usize, hole: usize) -> bool {
        let (o, h) = (&self.orphans[orphan], &self.holes[hole]);
        let lacking = h.devices.iter().filter_map(|d| self.lacking.get(d));
        let has_mappings = lacking.into_iter().all(|&n| match h.block {
            Some(_) => o.entries <= n,
            // A tree that is whole has all of its device's mappings.
            None => o.entries == n || o.is_damaged && o.entries < n,
        });
        o.missing > 0
            && !self.refuted.contains(&(orphan, hole))
            && has_mappings
            && h.has_room_for(o, &self.orphans)
    }

    /// The holes that `orphan` can be in.
    pub(super) fn candidates(&self, orphan: usize) -> Vec<usize> {
        (0..self.holes.len())
            .filter(|&h| self.fits(orphan, h))
            .collect()
    }

    /// True when a device has no root though there are subtrees without a place.
    pub(super) fn is_stuck(&self) -> bool {
        let is_rootless = |h: &Hole| h.block.is_none() && h.filled.is_empty();
        let is_homeless = |o: usize| self.orphans[o].missing > 0 && self.candidates(o).is_empty();
        self.holes.iter().any(is_rootless) && (0..self.orphans.len()).any(is_homeless)
    }

    /// Devices without a root, with the orphans one of which is it, where there are as many devices as places missing.
    pub(super) fn groups(&self) -> Vec<Group> {
        let mut by_holes: BTreeMap<Vec<usize>, Vec<usize>> = BTreeMap::new();
        for orphan in (0..self.orphans.len()).filter(|&o| self.orphans[o].missing > 0) {
            let holes = self.candidates(orphan);
            if !holes.is_empty() && holes.iter().all(|&h| self.holes[h].block.is_none()) {
                by_holes.entry(holes).or_default().push(orphan);
            }
        }
        let mut groups = Vec::new();
        for (holes, orphans) in &by_holes {
            let missing: u32 = orphans.iter().map(|&o| self.orphans[o].missing).sum();
            let is_alone = by_holes
                .keys()
                .all(|other| other == holes || other.iter().all(|h| !holes.contains(h)));
            if missing as usize == holes.len() && orphans.len() > 1 && is_alone {
                groups.push(Group {
                    devices: holes
                        .iter()
                        .flat_map(|&h| self.holes[h].devices.iter().copied())
                        .collect(),
                    orphans: orphans.clone(),
                });
            }
        }
        groups
    }

    /// Puts `orphan` into `hole`.
    pub(super) fn fill(&mut self, orphan: usize, hole: usize) {
        let o = &mut self.orphans[orphan];
        o.missing -= 1;
        let key = o.keys.map_or(0, |k| k.0);
        let entries = o.entries;
        self.holes[hole].filled.insert(key, orphan);
        for device in &self.holes[hole].devices {
            if let Some(lacking) = self.lacking.get_mut(device) {
                *lacking = lacking.saturating_sub(entries);
            }
        }
    }

    /// The children of a lost node: those that were found, and none where there may have been others. There were none if a device that
    /// the node belongs to has all of its mappings.
    fn children(&self, hole: &Hole) -> Vec<(u64, Option<MetadataBlock>)> {
        let is_all = hole
            .devices
            .iter()
            .any(|device| self.lacking.get(device) == Some(&0));
        let mut children = Vec::new();
        let mut end = Some(hole.begin);
        for &orphan in hole.filled.values() {
            let orphan = &self.orphans[orphan];
            let Some((first, last)) = orphan.keys else {
                return vec![(hole.begin, is_all.then_some(orphan.block))];
            };
            children.extend(
                end.filter(|&end| !is_all && end < first)
                    .map(|end| (end, None)),
            );
            children.push((first, Some(orphan.block)));
            end = last.checked_add(1);
        }
        let is_open = |end: &u64| !is_all && hole.end.is_none_or(|limit| *end < limit);
        children.extend(end.filter(is_open).map(|end| (end, None)));
        children
    }

    /// Mends the forest: lost nodes get the children that were found. Returns the roots of devices that had none.
    pub(super) fn mend(&self, forest: &mut Forest) -> BTreeMap<ThinId, MetadataBlock> {
        let mut roots = BTreeMap::new();
        for hole in self.holes.iter().filter(|h| !h.filled.is_empty()) {
            let children = self.children(hole);
            match (hole.block, &children[..]) {
                (Some(block), _) => forest.mend(block, &children),
                (None, [(_, Some(root))]) => {
                    roots.extend(hole.devices.iter().map(|&d| (d, *root)));
                }
                (None, _) => {
                    let root = forest.invent(TreeKind::Mappings, &children);
                    roots.extend(hole.devices.iter().map(|&d| (d, root)));
                }
            }
        }
        roots
    }
}

/// Looks for orphans and holes.
pub(super) struct Finder<'a> {
    pub(super) engine: &'a MendedEngine<'a>,
    pub(super) scan: &'a Scan,
    pub(super) basis: &'a Basis,
    pub(super) observer: &'a dyn Observer,
}

impl Finder<'_> {
    /// Adds every mapping node in use to the forest of the trees at `roots`, and finds which lack a parent.
    pub(super) fn find(&self, forest: &mut Forest, roots: &[MetadataBlock]) -> Result<Orphans> {
        let loose = self.loose(forest);
        let walk = Walk {
            engine: self.engine,
            observer: self.observer,
            tree: TreeKind::Mappings,
            leaves: Leaves::Read,
        };
        forest.walk(&walk, loose.iter().copied(), || (), |(), _| ())?;
        let all: Vec<MetadataBlock> = roots.iter().chain(&loose).copied().collect();
        super::cut_damaged(forest, &all);
        self.cut_stale(forest, &all);
        let missing = self.missing(forest);
        // What a stale node led to is reached from nowhere else.
        let all: Vec<MetadataBlock> = all.into_iter().chain(missing.iter().map(|m| m.0)).collect();
        let structure = Structure::of(forest, TreeKind::Mappings, &all);
        let orphan = |(block, missing): (MetadataBlock, u32)| {
            let summary = structure.summary(forest, block)?;
            Some(Orphan {
                block,
                keys: summary.first.zip(summary.last),
                entries: summary.entries,
                is_damaged: summary.damaged,
                height: summary.height?,
                missing,
            })
        };
        let orphans: Vec<Orphan> = missing.into_iter().filter_map(orphan).collect();
        let mut found = Orphans {
            holes: self.holes(forest, &structure),
            orphans,
            lacking: HashMap::new(),
            refuted: HashSet::new(),
            roots_are_contested: self.roots_are_contested(forest),
        };
        if self.basis.details_are_current {
            for (&id, detail) in &self.basis.details {
                let root = self.basis.roots.get(&id);
                let has = root
                    .and_then(|&r| structure.summary(forest, r))
                    .map_or(0, |s| s.entries);
                let lacking = detail.mapped_blocks.saturating_sub(has);
                found.lacking.insert(ThinId(id), lacking);
            }
        }
        Ok(found)
    }

    /// Mapping nodes in use that no device's tree reaches.
    fn loose(&self, forest: &Forest) -> Vec<MetadataBlock> {
        let Some(counts) = &self.basis.counts else {
            return Vec::new();
        };
        let is_loose = |block: &MetadataBlock| {
            counts.is_used(*block) == Some(true)
                && forest.number(*block).is_none()
                && !self.basis.small_nodes.contains(block)
                && matches!(
                    self.scan.leaf_class(*block),
                    Some(Class::Mappings | Class::MaybeTop)
                )
        };
        self.scan
            .nodes()
            .iter()
            .map(|n| n.block())
            .filter(is_loose)
            .collect()
    }

    /// A node that points to a freed block, the place of which an orphan can take, is older than it should be: it lies in the
    /// place of one that was lost.
    fn cut_stale(&self, forest: &mut Forest, roots: &[MetadataBlock]) {
        let Some(counts) = &self.basis.counts else {
            return;
        };
        let structure = Structure::of(forest, TreeKind::Mappings, roots);
        let unclaimed: Vec<(u64, u64)> = self
            .missing(forest)
            .iter()
            .filter_map(|(block, _)| {
                let summary = structure.summary(forest, *block)?;
                summary.first.zip(summary.last)
            })
            .collect();
        let mut stale = BTreeSet::new();
        for node in forest.nodes() {
            let edges = forest.edges(node);
            for (i, edge) in edges.iter().enumerate() {
                let Some(child) = forest.child(edge) else {
                    continue;
                };
                let end = edges.get(i + 1).map_or(u64::MAX, |e| e.key);
                let is_replaced = |&(first, last): &(u64, u64)| first < end && last >= edge.key;
                if counts.is_used(child) == Some(false)
                    && counts.is_used(node.block) != Some(false)
                    && unclaimed.iter().any(is_replaced)
                {
                    stale.insert(node.block);
                }
            }
        }
        stale.into_iter().for_each(|block| forest.exclude(block));
    }

    /// Nodes that more should point to than do, and how many.
    fn missing(&self, forest: &Forest) -> Vec<(MetadataBlock, u32)> {
        let Some(counts) = &self.basis.counts else {
            return Vec::new();
        };
        let claims = self.claims(forest, counts);
        let good = forest
            .nodes()
            .iter()
            .filter(|n| n.shape != Shape::Bad && n.block.0 < claims.nr_blocks());
        let missing = good.filter_map(|node| {
            let claimed = claims.get(node.block.0);
            let missing = match counts.count(node.block) {
                Some(count) => count.saturating_sub(claimed),
                None => u32::from(counts.is_used(node.block) == Some(true) && claimed == 0),
            };
            (missing > 0).then_some((node.block, missing))
        });
        missing.collect()
    }

    fn roots_are_contested(&self, forest: &Forest) -> bool {
        let Some(counts) = &self.basis.counts else {
            return false;
        };
        let claims = self.claims(forest, counts);
        let is_contested = |root: &&MetadataBlock| {
            root.0 < claims.nr_blocks()
                && counts
                    .count(**root)
                    .is_some_and(|count| claims.get(root.0) > count)
        };
        self.basis.roots.values().any(|root| is_contested(&root))
    }

    /// How often each block is pointed to by what is in use.
    fn claims(&self, forest: &Forest, counts: &Liveness) -> CountMap {
        let limit = self.engine.nr_blocks();
        let mut claims = CountMap::new(limit);
        let mut claim = |block: MetadataBlock| {
            if block.0 < limit {
                claims.add(block.0, 1);
            }
        };
        self.basis
            .roots
            .values()
            .chain(&self.basis.held)
            .copied()
            .for_each(&mut claim);
        for node in forest.nodes() {
            let is_live = counts.is_used(node.block) != Some(false);
            let edges = forest.edges(node).iter().filter(|_| is_live);
            edges.filter_map(|e| forest.child(e)).for_each(&mut claim);
        }
        claims
    }

    fn holes(&self, forest: &Forest, structure: &Structure) -> Vec<Hole> {
        let bad = forest.nodes().iter().filter(|n| n.shape == Shape::Bad);
        let bad: HashSet<MetadataBlock> = bad.map(|n| n.block).collect();
        let roots = self.basis.roots.iter();
        let by_device: Vec<_> = roots.map(|(&id, &root)| (Some(ThinId(id)), root)).collect();
        let mut heights: HashMap<MetadataBlock, Option<u8>> = HashMap::new();
        for node in forest.nodes() {
            let edges = forest.edges(node).iter().filter_map(|e| forest.child(e));
            for child in edges.filter(|c| bad.contains(c)) {
                let height = structure.summary(forest, node.block).and_then(|s| s.height);
                let height = height.and_then(|h| h.checked_sub(1));
                let known = heights.entry(child).or_default();
                *known = known.or(height);
            }
        }
        let mut holes: Vec<Hole> = Vec::new();
        for (block, (list, _)) in affected(forest, &by_device, &bad) {
            if !bad.contains(&block) {
                continue;
            }
            let devices: BTreeSet<ThinId> = list.iter().filter_map(|a| a.device).collect();
            let end = list.iter().map(|a| a.end.unwrap_or(u64::MAX)).max();
            holes.push(Hole {
                block: Some(block),
                devices: devices.into_iter().collect(),
                begin: list.iter().map(|a| a.begin).min().unwrap_or(0),
                end: end.filter(|&e| e != u64::MAX),
                height: heights.get(&block).copied().flatten(),
                filled: BTreeMap::new(),
            });
        }
        // The top-level tree may have had more devices than are left of it, or than an older one had.
        let basis = self.basis;
        if !basis.top_is_whole || !basis.freed.is_empty() || basis.details_are_whole {
            let ids = match self.basis.details_are_whole {
                true => self.basis.details.keys().copied().collect(),
                false => self
                    .basis
                    .older_ids
                    .iter()
                    .chain(self.basis.details.keys())
                    .copied()
                    .collect::<BTreeSet<u64>>(),
            };
            let rootless = ids
                .into_iter()
                .filter(|id| !self.basis.roots.contains_key(id));
            holes.extend(rootless.map(|id| Hole {
                block: None,
                devices: vec![ThinId(id)],
                begin: 0,
                end: None,
                height: None,
                filled: BTreeMap::new(),
            }));
        }
        holes.retain(|h| h.height != Some(0));
        holes.sort_by_key(|h| (h.block, h.devices.first().copied()));
        holes
    }
}
