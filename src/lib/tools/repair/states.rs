//! The states of a pool that a device still holds: the last committed one, and older ones whose blocks were not reused yet.
//!
//! The kernel allocates metadata blocks upwards from a cursor, once around the device, and the cursor starts at 0 when a pool is
//! activated; no block of the transaction before is reused. So a state that follows directly on another one has exactly the next
//! free blocks as its new ones, and read backwards the same two states would need an allocator that leaves out all the others.

use super::bits::Bits;
use super::liveness::Liveness;
use super::scan::{Class, Scan};
use super::small::{SmallTree, SmallTrees};
use crate::error::Result;
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{Forest, Leaves, Structure, TreeKind, Walk};
use crate::thin::DeviceDetail;
use crate::units::{MAX_METADATA_BLOCKS, MetadataBlock};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Top-level trees, details trees and index blocks that are looked at. A pool's history on one device is seldom longer, and
/// memory and time must not follow what a hostile device holds.
const MOST_ROOTS: usize = 4096;
/// States that are held against each other.
const MOST_STATES: usize = 256;

/// A state of the pool.
#[derive(Debug)]
pub(super) struct State {
    /// Root of the top-level tree.
    pub(super) mapping_root: MetadataBlock,
    /// Root of the details tree that fits best.
    pub(super) details_root: Option<MetadataBlock>,
    /// Each device's root.
    pub(super) roots: BTreeMap<u64, MetadataBlock>,
    /// Each device's details.
    pub(super) details: BTreeMap<u64, DeviceDetail>,
    /// Devices whose mapping tree is whole and has as many mappings as the details say.
    pub(super) whole: u64,
    /// Mappings in the trees, shared ones as often as they are reached.
    pub(super) mappings: u64,
    /// The furthest data block that whole trees map.
    pub(super) last_data_block: u64,
    /// Index block of the metadata space map that has all blocks of this state in use.
    pub(super) index: Option<MetadataBlock>,
    /// Blocks of its top-level and details trees.
    small: Bits,
    /// Blocks of all of its trees.
    pub(super) reached: Bits,
    /// Blocks in use: those of its trees, and what its space map says.
    blocks: Bits,
    /// Where the allocator went on.
    end: u64,
}

impl State {
    /// Latest time of any device's details.
    pub(super) fn time(&self) -> u32 {
        let times = self
            .details
            .values()
            .map(|d| d.snapshotted_time.max(d.creation_time));
        times.max().unwrap_or(0)
    }

    /// Latest transaction id of any device's details.
    pub(super) fn transaction_id(&self) -> u64 {
        self.details
            .values()
            .map(|d| d.transaction_id)
            .max()
            .unwrap_or(0)
    }

    /// Free blocks that the allocator left out if `next` follows directly on this state.
    fn nr_skipped(&self, next: &Bits) -> Option<u64> {
        let from = |start| self.blocks.nr_skipped(next, start);
        Some(from(self.end)?.min(from(0)?))
    }

    /// True when `next` has in use just the blocks that one more transaction would have taken.
    fn is_adjacent(&self, next: &Self) -> bool {
        // Where a space map is not known, its own blocks look skipped.
        let most = match self.index.is_some() && next.index.is_some() {
            true => 1,
            false => MOST_MAP_BLOCKS,
        };
        let skips = (self.nr_skipped(&next.blocks), next.nr_skipped(&self.blocks));
        matches!(skips, (Some(skipped), Some(backwards)) if skipped <= most && backwards > 4 * skipped)
    }

    /// True when `next` has just what one more transaction would make of this state.
    fn is_followed_by(&self, next: &Self) -> bool {
        // Every message to the pool that makes or deletes a device is a transaction of its own.
        let apart = |a: &Self, b: &Self| {
            a.roots
                .keys()
                .filter(|id| !b.roots.contains_key(id))
                .count()
        };
        let loses = |(id, old): (&u64, &DeviceDetail)| {
            let new = next.details.get(id);
            new.is_some_and(|new| new.mapped_blocks < old.mapped_blocks / 2)
        };
        self.is_adjacent(next)
            && apart(self, next) + apart(next, self) <= 1
            && next.time() >= self.time()
            && !self.details.iter().any(loses)
    }

    /// True when this state is later than `other`, neither of which another state follows.
    fn is_later_than(&self, other: &Self) -> bool {
        let adjacent = (other.is_adjacent(self), self.is_adjacent(other));
        if adjacent.0 != adjacent.1 {
            return adjacent.0;
        }
        // Clocks, transaction ids and the cursor of data blocks go up, until devices or mappings are deleted.
        let evidence = |s: &Self| (s.time(), s.transaction_id(), s.last_data_block);
        if evidence(self) != evidence(other) {
            return evidence(self) > evidence(other);
        }
        // The way upwards from the earlier state to the later is the shorter.
        let way = |a: &Self, b: &Self| a.blocks.nr_skipped(&b.blocks, a.end).unwrap_or(u64::MAX);
        way(other, self) < way(self, other)
    }
}

/// Blocks of space maps that a transaction writes, about.
const MOST_MAP_BLOCKS: u64 = 8;

/// All states that can be found.
#[derive(Debug)]
pub(super) struct States {
    /// Those with a top-level tree.
    pub(super) states: Vec<State>,
    /// Readable space maps, by index block.
    pub(super) maps: BTreeMap<MetadataBlock, Map>,
    /// What single leaves of top-level trees tell, of any age.
    pub(super) sighted: Sighted,
}

/// All roots that each device ever had, as far as leaves of top-level trees are left.
pub(super) type Sighted = BTreeMap<u64, BTreeSet<MetadataBlock>>;

/// A readable space map with the blocks that it has in use.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) counts: Liveness,
    pub(super) used: Bits,
}

/// The last committed state, as far as can be told.
#[derive(Debug)]
pub(super) struct Latest {
    /// The state, by its place in [`States::states`].
    pub(super) state: Option<usize>,
    /// The index block of the space map that was written last.
    pub(super) index: Option<MetadataBlock>,
    /// The space map is of a later transaction, the top-level tree of which is lost.
    pub(super) is_ahead: bool,
    /// States that might as well be the last one.
    pub(super) rivals: Vec<usize>,
}

impl States {
    /// Finds the state that no other state follows. `is_damaged` tells blocks that hold nothing sealed.
    pub(super) fn latest(&self, is_damaged: impl Fn(MetadataBlock) -> bool) -> Latest {
        let state = |&i: &usize| &self.states[i];
        let of = |fits: &dyn Fn(&State) -> bool| -> Vec<usize> {
            (0..self.states.len())
                .filter(|&i| fits(&self.states[i]))
                .collect()
        };
        let mut eligible = of(&|s| !s.roots.is_empty() && s.details_root.is_some());
        if eligible.is_empty() {
            eligible = of(&|s| !s.roots.is_empty());
        }
        if eligible.is_empty() {
            eligible = of(&|_| true);
        }
        let is_last = |i: &usize| {
            !eligible
                .iter()
                .any(|j| i != j && state(i).is_followed_by(state(j)))
        };
        let mut last: Vec<usize> = eligible.iter().copied().filter(is_last).collect();
        if last.is_empty() {
            last = eligible;
        }
        let wins = |a: &usize| {
            last.iter()
                .filter(|b| a != *b && state(a).is_later_than(state(b)))
                .count()
        };
        let rank = |a: &usize| (wins(a), state(a).index.is_some(), state(a).whole);
        let Some(best) = last.iter().copied().max_by_key(rank) else {
            return Latest {
                state: None,
                index: None,
                is_ahead: false,
                rivals: Vec::new(),
            };
        };
        let is_rival = |b: &usize| *b != best && !state(&best).is_later_than(state(b));
        let rivals = last.iter().copied().filter(is_rival).collect();
        let (index, is_ahead) = self.last_map(best, is_damaged);
        Latest {
            state: Some(best),
            index,
            is_ahead,
            rivals,
        }
    }

    /// The last space map that has all of a state in use; or one that follows on it and has blocks in use that are damaged.
    fn last_map(
        &self,
        best: usize,
        is_damaged: impl Fn(MetadataBlock) -> bool,
    ) -> (Option<MetadataBlock>, bool) {
        let best = &self.states[best];
        let size = best.blocks.size();
        let distance = |index: &MetadataBlock| (index.0 + 1 + size - best.end) % size;
        let with_all = self
            .maps
            .iter()
            .filter(|(_, map)| best.small.nr_missing_from(&map.used) == 0);
        let with_all = with_all.map(|(&index, _)| index);
        let last = with_all
            .filter(|i| distance(i) < size / 2)
            .max_by_key(distance)
            .or(best.index);
        let is_next = |map: &&Map| {
            let freed = best.blocks.nr_missing_from(&map.used);
            let holes = map
                .used
                .iter()
                .filter(|&b| b.0 > 0 && is_damaged(b))
                .count();
            self.states
                .iter()
                .all(|s| s.index != Some(map.counts.index))
                && Some(map.counts.index) != last
                && best.nr_skipped(&map.used).is_some_and(|n| n <= 1)
                && map
                    .used
                    .nr_skipped(&best.blocks, map.counts.index.0 + 1)
                    .is_some_and(|n| n > 4)
                && freed > 0
                && freed <= 4 + best.blocks.len() / 4
                && holes > 0
        };
        match self.maps.values().find(is_next) {
            Some(map) => (Some(map.counts.index), true),
            None => (last, false),
        }
    }

    /// Which of the states has this root of its top-level tree.
    pub(super) fn place_of(&self, mapping_root: MetadataBlock) -> Option<usize> {
        self.states
            .iter()
            .position(|s| s.mapping_root == mapping_root)
    }

    /// All states, the latest first. A block that two states share is in use in all between them, so the later of two states
    /// shares more with what is in use now, which `counts` or the state `latest` tells.
    pub(super) fn history(&self, counts: Option<&Liveness>, latest: Option<usize>) -> Vec<&State> {
        let Some(size) = self.states.first().map(|s| s.blocks.size()) else {
            return Vec::new();
        };
        let best = latest.map(|i| &self.states[i]);
        let now = match counts {
            Some(counts) => used(counts, size),
            None => best.map_or_else(|| Bits::new(size), |b| b.reached.clone()),
        };
        let end = counts
            .map(|c| c.index.0)
            .or(best.map(|b| b.end))
            .unwrap_or(0);
        let mut history: Vec<&State> = self.states.iter().collect();
        history.sort_by_key(|s| {
            let shared = s.reached.len() - s.reached.nr_missing_from(&now);
            (
                std::cmp::Reverse(shared),
                (end + size - s.end % size) % size,
            )
        });
        history
    }
}

impl States {
    /// Finds them.
    pub(super) fn find(
        engine: &dyn BlockEngine,
        scan: &Scan,
        observer: &dyn Observer,
    ) -> Result<Self> {
        observer.progress("looking for roots", 0, 1);
        let mut maps = BTreeMap::new();
        for &index in scan.indexes.iter().rev().take(MOST_ROOTS) {
            observer.check_cancelled()?;
            if let Some(counts) = Liveness::read(engine, index) {
                let used = used(&counts, engine.nr_blocks().min(MAX_METADATA_BLOCKS));
                maps.insert(index, Map { counts, used });
            }
            if maps.len() == MOST_STATES {
                break;
            }
        }
        let mut search = Search {
            engine,
            observer,
            scan,
            maps,
            sighted: Sighted::new(),
        };
        let states = search.states()?;
        Ok(Self {
            states,
            maps: search.maps,
            sighted: search.sighted,
        })
    }
}

struct Search<'a> {
    engine: &'a dyn BlockEngine,
    observer: &'a dyn Observer,
    scan: &'a Scan,
    maps: BTreeMap<MetadataBlock, Map>,
    sighted: Sighted,
}

impl Search<'_> {
    fn roots(&self, class: Class) -> Vec<MetadataBlock> {
        let nodes = self.scan.nodes().iter().map(|n| n.block());
        let fitting = nodes.filter(|&b| self.scan.leaf_class(b) == Some(class));
        fitting.take(MOST_ROOTS).collect()
    }

    fn states(&mut self) -> Result<Vec<State>> {
        let size = self.engine.nr_blocks().min(MAX_METADATA_BLOCKS);
        let tops = self.tops()?;
        let roots = self.roots(Class::Details);
        let trees = SmallTrees::<DeviceDetail>::read(
            self.engine,
            TreeKind::Details,
            &roots,
            self.observer,
        )?;
        let mut details: HashMap<Vec<u64>, Vec<(MetadataBlock, SmallTree<DeviceDetail>)>> =
            HashMap::new();
        for root in roots {
            let tree = trees.tree(root);
            if tree.damaged.is_empty() {
                let ids = tree.entries.keys().copied().collect();
                details.entry(ids).or_default().push((root, tree));
            }
        }
        let mut forest = Forest::new(size);
        let targets = tops.iter().flat_map(|(_, t)| t.entries.values());
        let targets: Vec<MetadataBlock> = targets
            .filter(|r| **r < size)
            .map(|&r| MetadataBlock(r))
            .collect();
        let walk = Walk {
            engine: self.engine,
            observer: self.observer,
            tree: TreeKind::Mappings,
            leaves: Leaves::Read,
        };
        let furthest = forest.walk(
            &walk,
            targets.iter().copied(),
            Vec::new,
            |furthest, node| {
                let last = node.values_u64().map(|value| value >> 24).max();
                furthest.push((node.location(), last.unwrap_or(0)));
            },
        )?;
        let furthest: HashMap<MetadataBlock, u64> = furthest.into_iter().flatten().collect();
        let structure = Structure::of(&forest, TreeKind::Mappings, &targets);
        let entries = |root: u64| {
            let summary = structure.summary(&forest, MetadataBlock(root))?;
            (!summary.damaged).then_some(summary.entries)
        };
        let mut states = Vec::new();
        for (root, top) in &tops {
            self.observer.check_cancelled()?;
            let whole = |details: &SmallTree<DeviceDetail>| {
                let fits = |(id, root): &(&u64, &u64)| {
                    entries(**root) == details.entries.get(id).map(|d| d.mapped_blocks)
                };
                top.entries.iter().filter(fits).count() as u64
            };
            let ids: Vec<u64> = top.entries.keys().copied().collect();
            // The details of a transaction are written after its top-level tree.
            let distance = |block: MetadataBlock| (block.0 + size - root.0) % size;
            let fitting = details.get(&ids).into_iter().flatten();
            let best = fitting
                .max_by_key(|(block, tree)| (whole(tree), std::cmp::Reverse(distance(*block))));
            let mut small = Bits::new(size);
            small.insert(MetadataBlock(0));
            let details_nodes = best.iter().flat_map(|b| &b.1.nodes);
            top.nodes
                .iter()
                .chain(details_nodes)
                .for_each(|&b| small.insert(b));
            let mut blocks = small.clone();
            let numbers = top
                .entries
                .values()
                .filter_map(|&r| forest.number(MetadataBlock(r)));
            let numbers: Vec<usize> = numbers.collect();
            let mut last_data_block = 0;
            for n in forest.children_first(&numbers) {
                let block = forest.nodes()[n].block;
                blocks.insert(block);
                last_data_block = last_data_block.max(furthest.get(&block).copied().unwrap_or(0));
            }
            let mut end = root.0;
            if let Some((details_root, _)) = best
                && distance(*details_root) < size / 2
            {
                end = details_root.0;
            }
            let reached = blocks.clone();
            let index = self.index_of(&small, &blocks, end, size);
            if let Some(map) = index.and_then(|i| self.maps.get(&i)) {
                blocks.join(&map.used);
                end = map.counts.index.0;
            }
            states.push(State {
                mapping_root: *root,
                details_root: best.map(|b| b.0),
                roots: top
                    .entries
                    .iter()
                    .map(|(&id, &r)| (id, MetadataBlock(r)))
                    .collect(),
                details: best.map_or_else(BTreeMap::new, |b| b.1.entries.clone()),
                whole: best.map_or(0, |b| whole(&b.1)),
                mappings: top.entries.values().filter_map(|&r| entries(r)).sum(),
                last_data_block,
                index,
                small,
                reached,
                blocks,
                end: end + 1,
            });
        }
        Ok(states)
    }

    /// Top-level trees: leaves of which at least half of what they point to are mapping nodes, and the nodes above such.
    fn tops(&mut self) -> Result<Vec<(MetadataBlock, SmallTree<u64>)>> {
        let roots = self.roots(Class::MaybeTop);
        let trees =
            SmallTrees::<u64>::read(self.engine, TreeKind::TopLevel, &roots, self.observer)?;
        let is_mappings = |root: &&u64| {
            let class = self.scan.leaf_class(MetadataBlock(**root));
            matches!(class, Some(Class::Mappings | Class::MaybeTop))
        };
        let tops: Vec<_> = roots
            .into_iter()
            .map(|root| (root, trees.tree(root)))
            .collect();
        let fits = |tree: &SmallTree<u64>| {
            let fitting = tree.entries.values().filter(is_mappings).count();
            tree.damaged.is_empty() && fitting * 2 >= tree.entries.len()
        };
        for (_, leaf) in tops
            .iter()
            .filter(|(_, tree)| tree.nodes.len() == 1 && fits(tree))
        {
            for (&id, &root) in &leaf.entries {
                self.sighted
                    .entry(id)
                    .or_default()
                    .insert(MetadataBlock(root));
            }
        }
        let tops = tops.into_iter();
        Ok(tops.filter(|(_, tree)| fits(tree)).collect())
    }

    /// The index block of the space map that has all of `small`, and most of `blocks`, in use; the next after `end` if several have.
    fn index_of(&self, small: &Bits, blocks: &Bits, end: u64, size: u64) -> Option<MetadataBlock> {
        let fitting = self
            .maps
            .iter()
            .filter(|(_, map)| small.nr_missing_from(&map.used) == 0);
        let fitting = fitting.map(|(&index, map)| {
            (
                blocks.nr_missing_from(&map.used),
                (index.0 + size - end) % size,
                index,
            )
        });
        fitting.min().map(|f| f.2)
    }
}

/// The blocks that a space map is known to have in use, of a device of `size` blocks.
fn used(map: &Liveness, size: u64) -> Bits {
    let mut used = Bits::new(size);
    let blocks = (0..size).map(MetadataBlock);
    blocks
        .filter(|&b| map.is_used(b) == Some(true))
        .for_each(|b| used.insert(b));
    used
}
