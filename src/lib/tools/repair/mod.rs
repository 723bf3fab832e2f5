//! thin_repair: finds what the last committed transaction left of a pool, rebuilds what leads to it, and tells it to a restorer.
//!
//! In three steps, each only if the one before was not enough:
//! 1. The superblock's trees are read. If they are whole and agree with each other, there is nothing to look for.
//! 2. Every block of the device is read once: blocks with one wrong bit, or that were written to the wrong place, are mended, and
//!    a lost superblock's roots are found among the states that the device still holds (`states`).
//! 3. Where top-level, details or inner nodes are lost, the metadata space map tells which blocks are in use, and evidence of
//!    several kinds where they belong (`attribute`).
//!
//! Nothing is invented: what is in doubt is left out and reported. Nothing is written to the input.

mod attribute;
mod basis;
mod bits;
mod common;
mod contested;
mod describe;
mod doubt;
mod in_place;
mod kept;
mod lineage;
mod liveness;
mod mend;
mod orphans;
mod position;
mod rebuild;
mod report;
mod rescue;
mod reuse;
mod scan;
mod small;
mod states;
mod undelete;
mod undo;

pub use attribute::Evidence;
pub use in_place::{InPlace, InPlaceReport, plan_in_place};
pub use mend::{Mend, Mending};
pub use report::{Ambiguous, Candidate, Mended, Reattached, RecoveredDevice, RepairReport};
pub use rescue::{Rescue, refuse_lost_nodes, rescue};
pub use undelete::{DeletedDevice, DeletedList, Deletions, Remains, Undeleted, Wanted};
pub use undo::{Undone, undo};

use self::attribute::Placed;
use self::basis::{Basis, Founder, Pair};
use self::contested::{DataMap, Differences, Omitted};
use self::liveness::Liveness;
use self::mend::MendedEngine;
use self::orphans::Orphans;
use self::rebuild::Rebuild;
use self::scan::{Class, Scan};
use self::small::SmallTrees;
use self::states::States;
use super::event::PoolInfo;
use super::metadata_source::{MetadataSource, Recovered, Selection, Trees};
use super::overrides::Overrides;
use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{
    CountBatch, CountMap, Forest, IndexEntry, Leaves, Node, Shape, Structure, TreeKind, Walk,
};
use crate::thin::{DeviceDetail, Superblock};
use crate::units::{ENTRIES_PER_BITMAP, MAX_TIME, MetadataBlock};
use std::collections::{BTreeMap, HashMap, HashSet};

/// What to recover, and with which values in the place of lost ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Values that stand in for what a lost superblock would say.
    pub overrides: Overrides,
    /// Use these roots of the top-level tree and the details tree, whatever the superblock says.
    pub roots: Option<(MetadataBlock, MetadataBlock)>,
    /// Take in what is in doubt, where it is likeliest.
    pub include_ambiguous: bool,
}

/// Metadata that can be told to a restorer or dumped.
#[derive(Debug)]
pub struct Recovery<'a> {
    /// What was chosen and what is lost.
    pub report: RepairReport,
    engine: MendedEngine<'a>,
    /// The superblock, if it could be read.
    superblock: Option<Superblock>,
    trees: Trees,
    /// Devices that are known of by their details only.
    lost: BTreeMap<u64, DeviceDetail>,
    recovered: Recovered,
}

impl Recovery<'_> {
    /// The recovered trees as a source of events.
    pub fn source<'a>(
        &'a self,
        selection: Selection,
        observer: &'a dyn Observer,
    ) -> MetadataSource<'a> {
        MetadataSource {
            engine: &self.engine,
            trees: self.trees.clone(),
            selection,
            recovered: Some(&self.recovered),
            observer,
        }
    }

    /// The pool as it was recovered.
    pub fn pool(&self) -> &PoolInfo {
        &self.trees.pool
    }
}

/// Finds what can be recovered from `engine`.
///
/// # Errors
/// `Damaged` when no top-level tree can be found, or the data block size is neither known nor given; `Io`.
pub fn recover<'a>(
    engine: &'a dyn BlockEngine,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Recovery<'a>> {
    let mut engine = MendedEngine {
        engine,
        mends: BTreeMap::new(),
    };
    let mut report = RepairReport {
        is_complete: true,
        ..RepairReport::default()
    };
    if let Some((superblock, work)) = as_it_is(&engine, options, observer)? {
        report.take_as_is(&superblock);
        return work.finish(engine, Some(&superblock), options, report);
    }
    let scan = Scan::of(engine.engine, observer)?;
    engine.mends.clone_from(&scan.mends);
    report.tell_scan(&scan);
    if !engine.mends.is_empty()
        && let Some((superblock, work)) = as_it_is(&engine, options, observer)?
    {
        report.take_as_is(&superblock);
        return work.finish(engine, Some(&superblock), options, report);
    }
    let superblock = usable_superblock(&engine)?;
    let states = States::find(&engine, &scan, observer)?;
    let basis = Founder {
        engine: &engine,
        scan: &scan,
        superblock: superblock.as_ref(),
        options,
        observer,
        report: &mut report,
    }
    .found(&states)?;
    let rebuild = Rebuild {
        engine: &engine,
        scan: &scan,
        states: &states,
        superblock: superblock.as_ref(),
        options,
        observer,
    };
    let work = rebuild.run(basis, &mut report)?;
    work.finish(engine, superblock.as_ref(), options, report)
}

/// The states of the pool that the device still holds, the likeliest last one first.
///
/// # Errors
/// `Io` and `Interrupted` only.
pub fn list_candidates(engine: &dyn BlockEngine, observer: &dyn Observer) -> Result<RepairReport> {
    let scan = Scan::of(engine, observer)?;
    let engine = MendedEngine {
        engine,
        mends: scan.mends.clone(),
    };
    let superblock = usable_superblock(&engine)?;
    let states = States::find(&engine, &scan, observer)?;
    let named = superblock.and_then(|s| states.place_of(s.mapping_root));
    let latest = named.or_else(|| states.latest(|block| !scan.is_sealed(block)).state);
    let mut report = RepairReport::default();
    report.tell_scan(&scan);
    report.list(&states, latest);
    if let Some(superblock) = superblock {
        report.take_as_is(&superblock);
    }
    Ok(report)
}

/// The superblock, if its roots can be believed. A wrong size of the device does not matter to a repair.
fn usable_superblock(engine: &MendedEngine<'_>) -> Result<Option<Superblock>> {
    let (superblock, is_unfinished) = engine.superblock().unwrap_or_default();
    if is_unfinished {
        return Err(Error::new(
            ErrorKind::Damaged,
            "writing metadata to this device has not finished: there is nothing to repair; repair the device that it came from",
        ));
    }
    Ok(superblock)
}

/// The superblock and its trees, if these are whole and agree with each other and with the data space map.
fn as_it_is(
    engine: &MendedEngine<'_>,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Option<(Superblock, Work)>> {
    let superblock = match usable_superblock(engine)? {
        Some(superblock) if options.roots.is_none() => superblock,
        _ => return Ok(None),
    };
    let roots = (superblock.mapping_root, superblock.details_root);
    let pair = Pair::read(engine, roots, observer)?;
    if !pair.is_whole() {
        return Ok(None);
    }
    let map = DataMap::of(&superblock);
    let limit = superblock.data_space_map.nr_blocks;
    let work = Work::walk(engine, Basis::of_pair(pair), limit, Some(&map), observer)?;
    // What is counted but not mapped may be a leak, or belong to mappings that an older node in the place of a newer one hides.
    let is_whole =
        work.is_whole() && work.differences.over.is_empty() && work.differences.under == 0;
    Ok(is_whole.then_some((superblock, work)))
}

/// The trees of a basis, read.
struct Work {
    basis: Basis,
    forest: Forest,
    span: Span,
    /// Nodes that could not be mended.
    damaged: HashSet<MetadataBlock>,
    differences: Differences,
    omitted: Omitted,

    orphans: Orphans,
    placed: Vec<Placed>,
}

impl Work {
    fn walk(
        engine: &MendedEngine<'_>,
        basis: Basis,
        nr_data_blocks: u64,
        map: Option<&DataMap>,
        observer: &dyn Observer,
    ) -> Result<Self> {
        observer.progress("reading mappings", 0, 1);
        let mut forest = Forest::new(engine.nr_blocks());
        let limit = forest.nr_blocks();
        let countable = map.map_or(Ok(0), |m| m.nr_countable(engine, observer))?;
        let counts = CountMap::new(countable.min(nr_data_blocks));
        let roots = basis.roots.values().copied();
        let walk = Walk {
            engine,
            observer,
            tree: TreeKind::Mappings,
            leaves: Leaves::Read,
        };
        let state = || (Span::default(), CountBatch::new(&counts));
        let spans = forest.walk(
            &walk,
            roots.filter(|r| r.0 > 0 && r.0 < limit),
            state,
            |(span, batch), node| span.see(node, nr_data_blocks, &counts, batch),
        )?;
        let mut span = Span::default();
        for (one, mut batch) in spans {
            batch.flush(&counts);
            span = span.join(one);
        }
        let differences = match map {
            Some(map) => map.compare(engine, &counts, None, observer)?,
            None => Differences::default(),
        };
        let mut work = Self {
            basis,
            forest,
            span,
            damaged: HashSet::new(),
            differences,
            omitted: Omitted::new(),

            orphans: Orphans::default(),
            placed: Vec::new(),
        };
        // A node of the top-level tree that a device claims as its own is not the device's.
        for &block in &work.basis.small_nodes {
            work.forest.exclude(block);
        }
        let roots = work.roots();
        work.damaged = cut_damaged(&mut work.forest, &roots);
        Ok(work)
    }

    fn roots(&self) -> Vec<MetadataBlock> {
        self.basis.roots.values().copied().collect()
    }

    /// True if every device has all the mappings that its details say.
    fn is_whole(&self) -> bool {
        let structure = Structure::of(&self.forest, TreeKind::Mappings, &self.roots());
        let fits = |(id, root): (&u64, &MetadataBlock)| {
            let summary = structure.summary(&self.forest, *root);
            let has = summary.filter(|s| !s.damaged).map(|s| s.entries);
            has.is_some() && has == self.basis.details.get(id).map(|d| d.mapped_blocks)
        };
        self.forest.problems.is_empty()
            && self.damaged.is_empty()
            && self.span.past_end == 0
            && self.basis.roots.iter().all(fits)
    }
}

impl Work {
    /// Counts the mappings of every leaf that is part of a device.
    fn count_again(
        &mut self,
        engine: &MendedEngine<'_>,
        nr_data_blocks: u64,
        map: Option<&DataMap>,
        observer: &dyn Observer,
    ) -> Result<()> {
        let countable = map.map_or(Ok(0), |m| m.nr_countable(engine, observer))?;
        let counts = CountMap::new(countable.min(nr_data_blocks));
        let leaves = self.leaves();
        let stop = || observer.is_cancelled();
        let state = || (Span::default(), CountBatch::new(&counts));
        let spans = crate::io::sweep(
            engine,
            &leaves,
            &stop,
            state,
            |(span, batch), block, data| {
                if let Some(node) = data.ok().and_then(|data| Node::parse(data, block, 8).ok()) {
                    span.see(&node, nr_data_blocks, &counts, batch);
                }
            },
        );
        observer.check_cancelled()?;
        self.span = Span::default();
        for (one, mut batch) in spans {
            batch.flush(&counts);
            self.span = self.span.join(one);
        }
        if let Some(map) = map {
            let metadata = self.basis.counts.as_ref();
            self.differences = map.compare(engine, &counts, metadata, observer)?;
        }
        Ok(())
    }

    /// Leaves of all devices, ascending.
    fn leaves(&self) -> Vec<u64> {
        let numbers = self
            .basis
            .roots
            .values()
            .filter_map(|&r| self.forest.number(r));
        let nodes = self.forest.children_first(&numbers.collect::<Vec<_>>());
        let nodes = nodes.into_iter().map(|n| self.forest.nodes()[n]);
        let mut leaves: Vec<u64> = nodes
            .filter(|n| matches!(n.shape, Shape::Leaf { .. }))
            .map(|n| n.block.0)
            .collect();
        leaves.sort_unstable();
        leaves
    }
}

impl DataMap {
    fn of(superblock: &Superblock) -> Self {
        Self {
            index_root: superblock.data_space_map.bitmap_root,
            counts_root: Some(superblock.data_space_map.ref_count_root),
            nr_allocated: Some(superblock.data_space_map.nr_allocated),
        }
    }

    /// The one in use, when no superblock tells: the only index tree in use that is no part of another one.
    fn find(scan: &Scan, counts: &Liveness) -> Option<Self> {
        let nodes = scan.nodes().iter().map(|n| n.block());
        let is_index = |b: &MetadataBlock| {
            counts.is_used(*b) == Some(true) && scan.leaf_class(*b) == Some(Class::DataIndex)
        };
        let in_use: Vec<MetadataBlock> = nodes.filter(is_index).collect();
        let mut inner = in_use
            .iter()
            .filter(|b| matches!(scan.class(**b), Some(Class::Inner(_))));
        let index_root = match (&in_use[..], inner.next(), inner.next()) {
            ([only], ..) => *only,
            (_, Some(&only), None) => only,
            _ => return None,
        };
        Some(Self {
            index_root,
            counts_root: None,
            nr_allocated: None,
        })
    }

    /// Data blocks for which there are bitmaps.
    fn nr_countable(&self, engine: &dyn BlockEngine, observer: &dyn Observer) -> Result<u64> {
        let trees = SmallTrees::<IndexEntry>::read(
            engine,
            TreeKind::DataIndex,
            &[self.index_root],
            observer,
        )?;
        Ok(trees.tree(self.index_root).entries.len() as u64 * ENTRIES_PER_BITMAP)
    }
}

/// The furthest data block and the latest time of mappings, and how many are to data blocks that do not exist.
#[derive(Clone, Copy, Default)]
struct Span {
    data_blocks: u64,
    time: u32,
    past_end: u64,
}

impl Span {
    fn see(&mut self, node: &Node<'_>, limit: u64, counts: &CountMap, batch: &mut CountBatch) {
        for value in node.values_u64() {
            batch.add(counts, value >> 24);
            match value >> 24 {
                block if block < limit => self.data_blocks = self.data_blocks.max(block + 1),
                _ => self.past_end += 1,
            }
            self.time = self.time.max(value as u32 & MAX_TIME);
        }
    }

    fn join(self, other: Self) -> Self {
        Self {
            data_blocks: self.data_blocks.max(other.data_blocks),
            time: self.time.max(other.time),
            past_end: self.past_end + other.past_end,
        }
    }
}

/// Rounds of judging after which a tree that still shows new faults is left as it is; honest damage needs one or two.
const MOST_ROUNDS: usize = 16;

/// Cuts every pointer that leads where it should not. Returns the damaged nodes.
fn cut_damaged(forest: &mut Forest, roots: &[MetadataBlock]) -> HashSet<MetadataBlock> {
    // A pointer that is cut may have hidden what is wrong with another, so judge until nothing new is found.
    for round in 0..=MOST_ROUNDS {
        let structure = Structure::of(forest, TreeKind::Mappings, roots);
        let cuts: Vec<(MetadataBlock, MetadataBlock)> = structure
            .faults
            .iter()
            .filter_map(|&(child, fault)| Some((fault.parent()?, child)))
            .collect();
        if cuts.is_empty() {
            break;
        }
        let mut parents: HashMap<MetadataBlock, u32> = HashMap::new();
        for node in forest.nodes() {
            let children = forest.edges(node).iter().filter_map(|e| forest.child(e));
            children.for_each(|c| *parents.entry(c).or_default() += 1);
        }
        for (parent, child) in cuts {
            // What only one node points to is at fault itself, rather than the pointer.
            match parents.get(&child) {
                Some(1) if !roots.contains(&child) => forest.exclude(child),
                _ => forest.cut(parent, child),
            }
            if round == MOST_ROUNDS {
                forest.exclude(parent);
            }
        }
    }
    forest
        .nodes()
        .iter()
        .filter(|n| n.shape == Shape::Bad)
        .map(|n| n.block)
        .collect()
}
