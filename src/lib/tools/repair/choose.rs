//! Chooses the roots that a repair starts from.

use super::report::{Candidate, RepairReport};
use super::scan::{Liveness, Scan};
use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{Forest, Leaves, Structure, TreeKind, Value, Walk};
use crate::thin::{DeviceDetail, Fields, Superblock};
use crate::tools::affected::{Affected, affected};
use crate::units::MetadataBlock;
use std::collections::{BTreeMap, HashMap, HashSet};

/// A candidate's root with all its entries.
type DetailsTree = (MetadataBlock, BTreeMap<u64, DeviceDetail>);

/// Candidates that a report lists.
const MOST_CANDIDATES: usize = 16;

/// The devices that a repair starts from.
#[derive(Debug, Default)]
pub(super) struct Chosen {
    /// Root of each device's mapping tree.
    pub(super) roots: BTreeMap<u64, MetadataBlock>,
    /// The nodes of the top-level tree itself.
    pub(super) top_nodes: Vec<MetadataBlock>,
    /// Details of each device, as far as they are left.
    pub(super) details: BTreeMap<u64, DeviceDetail>,
    /// The superblock names the details, or a space map has them in use.
    pub(super) details_are_current: bool,
    /// A metadata snapshot's superblock, which has the block size when block 0 is lost.
    pub(super) copy: Option<Fields>,
}

/// A small tree as far as it can be read.
struct Small<V> {
    entries: BTreeMap<u64, V>,
    /// Blocks in it that are damaged.
    damaged: HashSet<MetadataBlock>,
    forest: Forest,
}

impl<V: Value + Send> Small<V> {
    fn read(
        engine: &dyn BlockEngine,
        tree: TreeKind,
        root: MetadataBlock,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let mut forest = Forest::new(engine.nr_blocks());
        let root = (root.0 > 0 && root.0 < forest.nr_blocks()).then_some(root);
        let parts = forest.walk(
            &Walk {
                engine,
                observer,
                tree,
                leaves: Leaves::Read,
            },
            root,
            Vec::new,
            |entries, node| {
                entries.extend(node.keys().zip(node.values().map(V::unpack)));
            },
        )?;
        let structure = Structure::of(&forest, tree, root.as_slice());
        let damaged = forest.problems.iter().map(|p| p.0);
        let damaged = damaged
            .chain(structure.faults.iter().map(|f| f.0))
            .collect();
        Ok(Self {
            entries: parts.into_iter().flatten().collect(),
            damaged,
            forest,
        })
    }
}

/// Chooses the roots: the superblock's where they can be read, else the best candidates on the device.
pub(super) fn choose(
    engine: &dyn BlockEngine,
    superblock: Option<&Superblock>,
    report: &mut RepairReport,
    observer: &dyn Observer,
) -> Result<Chosen> {
    let mut top = None;
    let mut details = None;
    if let Some(superblock) = superblock {
        let tree = Small::<u64>::read(
            engine,
            TreeKind::TopLevel,
            superblock.mapping_root,
            observer,
        )?;
        let is_lost =
            tree.entries.is_empty() && !tree.damaged.is_empty() || tree.forest.nodes().is_empty();
        top = (!is_lost).then_some((superblock.mapping_root, tree));
        let tree = Small::<DeviceDetail>::read(
            engine,
            TreeKind::Details,
            superblock.details_root,
            observer,
        )?;
        let is_lost =
            tree.entries.is_empty() && !tree.damaged.is_empty() || tree.forest.nodes().is_empty();
        details = (!is_lost).then_some((superblock.details_root, tree));
    }
    report.why = String::from("the superblock names them");
    let mut chosen = Chosen::default();
    if top.is_none() || details.is_none() {
        observer.progress("looking for roots", 0, 1);
        let scan = Scan::of(engine, observer)?;
        let known = superblock.map(|s| s.metadata_space_map.bitmap_root);
        let maps = scan.space_maps(engine, known);
        chosen.copy = scan
            .copies
            .iter()
            .map(|c| c.1)
            .max_by_key(|f| (f.transaction_id, f.time));
        let search = Search {
            engine,
            observer,
            scan: &scan,
            maps: &maps,
        };
        let wanted: Option<Vec<u64>> = details
            .as_ref()
            .map(|d| d.1.entries.keys().copied().collect());
        let given = top.as_ref().map(|t| t.0);
        let mut candidates =
            search.pairs(given, details.as_ref().map(|d| d.0), wanted.as_deref())?;
        order_generations(&mut candidates, engine.nr_blocks());
        candidates.sort_by_key(|c| std::cmp::Reverse(rank(c)));
        let equals = candidates
            .iter()
            .filter(|c| hard_evidence(c) == hard_evidence(&candidates[0]))
            .count();
        if top.is_none() && equals > 1 {
            report.notes.push(format!(
                "{equals} pairs of roots are alike in use, time and transaction; which is the latest was judged by where the kernel \
                 put them, and may be wrong: compare the devices with what LVM knows"
            ));
        }
        let details_known = details.as_ref().is_some_and(|d| !d.1.entries.is_empty());
        // An empty leaf is an empty pool only if nothing else speaks of devices.
        let others = details_known || candidates.iter().any(|c| c.devices > 0);
        candidates.retain(|c| c.devices > 0 || !others);
        report.more_candidates = candidates.len().saturating_sub(MOST_CANDIDATES);
        candidates.truncate(MOST_CANDIDATES);
        report.candidates = candidates;
        match (&top, report.candidates.first()) {
            // The top-level tree is there, so only details are looked for: of the same devices, and in use.
            (Some(_), best) => {
                let root = best
                    .filter(|b| b.in_use != Some(false))
                    .and_then(|b| b.details_root);
                report.why = String::from(
                    "the superblock names the mapping root; its details root is damaged",
                );
                if let Some(root) = root {
                    details = Some((
                        root,
                        Small::read(engine, TreeKind::Details, root, observer)?,
                    ));
                }
            }
            (None, Some(best)) if best.in_use != Some(false) => {
                report.why = format!(
                    "{}; {}",
                    match superblock {
                        Some(_) => "the superblock's mapping root is damaged",
                        None => "the superblock is lost",
                    },
                    match best.in_use {
                        Some(true) =>
                            "a readable metadata space map says that these are in use, and they are the latest such",
                        _ =>
                            "no space map is readable, these are the latest by time and transaction",
                    }
                );
                let root = best.mapping_root;
                if details.is_none()
                    && let Some(root) = best.details_root
                {
                    details = Some((
                        root,
                        Small::read(engine, TreeKind::Details, root, observer)?,
                    ));
                }
                top = Some((
                    root,
                    Small::read(engine, TreeKind::TopLevel, root, observer)?,
                ));
            }
            (None, best) => return Err(nothing_found(best, report)),
        }
        report.is_complete = false;
    }
    if let Some((root, tree)) = top {
        report.mapping_root = root;
        report.lost_ids = lost_ids(&tree, root);
        report.is_complete &= tree.damaged.is_empty();
        chosen.top_nodes = tree.forest.nodes().iter().map(|n| n.block).collect();
        chosen.roots = tree
            .entries
            .into_iter()
            .map(|(id, root)| (id, MetadataBlock(root)))
            .collect();
    }
    if let Some((root, tree)) = details {
        report.details_root = Some(root);
        let in_use = |c: &Candidate| c.details_root == Some(root) && c.in_use == Some(true);
        chosen.details_are_current = superblock.is_some_and(|s| s.details_root == root)
            || report.candidates.first().is_some_and(in_use);
        report.is_complete &= tree.damaged.is_empty();
        chosen.details = tree.entries;
    }
    Ok(chosen)
}

fn nothing_found(best: Option<&Candidate>, report: &RepairReport) -> Error {
    let what = match best {
        None => String::from(
            "nothing on this device looks like the top-level tree of a pool; make sure that it is the metadata device",
        ),
        Some(best) => format!(
            "the top-level tree is lost; {} older ones are left, all of them freed since, so that devices could be missing, \
             deleted ones back and blocks overwritten; the latest: {best}",
            report.candidates.len()
        ),
    };
    Error::new(ErrorKind::Damaged, what)
}

fn lost_ids(tree: &Small<u64>, root: MetadataBlock) -> Vec<Affected> {
    let ranges = affected(&tree.forest, &[(None, root)], &tree.damaged);
    let mut lost: Vec<_> = ranges.into_values().flat_map(|(list, _)| list).collect();
    lost.sort_unstable();
    lost
}

/// Numbers the candidates that are whole and in use by the age of the space map that says so.
///
/// The kernel allocates metadata blocks in ascending order, from the beginning again after the end, so index blocks of
/// successive transactions follow each other around the device, and the latest stands before the widest gap: behind it lies
/// what is overwritten next.
fn order_generations(candidates: &mut [Candidate], size: u64) {
    // One device of several may be damaged.
    let spare = |c: &Candidate| u64::from(c.devices >= 4);
    let counts =
        |c: &Candidate| c.whole_devices + spare(c) >= c.devices && c.details_root.is_some();
    let whole = candidates.iter().filter(|c| counts(c));
    let mut places: Vec<u64> = whole.filter_map(|c| c.space_map).map(|b| b.0).collect();
    places.sort_unstable();
    places.dedup();
    let gap = |i: usize| (places[(i + 1) % places.len()] + size - places[i] - 1) % size;
    let Some(latest) = (0..places.len()).max_by_key(|&i| gap(i)) else {
        return;
    };
    places.rotate_left(latest + 1);
    for candidate in candidates.iter_mut().filter(|c| counts(c)) {
        let place = candidate.space_map.map(|b| b.0);
        candidate.generation = places.iter().position(|&p| Some(p) == place);
    }
}

/// What the metadata itself says of a candidate's age.
fn hard_evidence(candidate: &Candidate) -> (bool, bool, u32, u64) {
    (
        candidate.in_use == Some(true),
        candidate.details_root.is_some(),
        candidate.time,
        candidate.transaction_id,
    )
}

/// What makes one candidate better than another, the most important first.
fn rank(candidate: &Candidate) -> impl Ord + use<> {
    (
        hard_evidence(candidate),
        candidate.generation,
        candidate.whole_devices,
        candidate.mapping_root,
    )
}

/// A search for pairs of roots.
struct Search<'a> {
    engine: &'a dyn BlockEngine,
    observer: &'a dyn Observer,
    scan: &'a Scan,
    maps: &'a [Liveness],
}

impl Search<'_> {
    fn is_used(&self, block: MetadataBlock) -> bool {
        self.maps.iter().any(|m| m.is_used(block))
    }

    /// The index block of a readable space map that has both roots in use.
    fn space_map(
        &self,
        root: MetadataBlock,
        details_root: Option<MetadataBlock>,
    ) -> Option<MetadataBlock> {
        let has_both =
            |map: &&Liveness| map.is_used(root) && details_root.is_none_or(|d| map.is_used(d));
        self.maps.iter().find(has_both).map(|map| map.index)
    }

    /// Every whole top-level tree with the details trees of the same devices. `top` and `details` narrow the search to one
    /// root, `wanted` to trees with exactly these devices.
    fn pairs(
        &self,
        top: Option<MetadataBlock>,
        details: Option<MetadataBlock>,
        wanted: Option<&[u64]>,
    ) -> Result<Vec<Candidate>> {
        let mut by_ids: HashMap<Vec<u64>, Vec<DetailsTree>> = HashMap::new();
        let all = self.scan.details.iter().copied();
        for root in details.map_or_else(|| all.collect(), |d| vec![d]) {
            self.observer.check_cancelled()?;
            let tree =
                Small::<DeviceDetail>::read(self.engine, TreeKind::Details, root, self.observer)?;
            if tree.damaged.is_empty() || details.is_some() {
                let ids = tree.entries.keys().copied().collect();
                by_ids.entry(ids).or_default().push((root, tree.entries));
            }
        }
        let mut tops: Vec<(MetadataBlock, BTreeMap<u64, u64>)> = Vec::new();
        let all = self.scan.tops.iter().copied();
        for root in top.map_or_else(|| all.collect(), |t| vec![t]) {
            self.observer.check_cancelled()?;
            let tree = Small::<u64>::read(self.engine, TreeKind::TopLevel, root, self.observer)?;
            let fits = wanted.is_none_or(|w| tree.entries.keys().eq(w));
            if top.is_some() || tree.damaged.is_empty() && fits {
                tops.push((root, tree.entries));
            }
        }
        // Freed trees matter only where nothing in use is left.
        if tops.iter().any(|t| self.is_used(t.0)) {
            tops.retain(|t| self.is_used(t.0));
        }
        for trees in by_ids.values_mut() {
            if trees.iter().any(|t| self.is_used(t.0)) {
                trees.retain(|t| self.is_used(t.0));
            }
            let age = |t: &DetailsTree| {
                t.1.values()
                    .map(|d| (d.snapshotted_time, d.transaction_id))
                    .max()
            };
            trees.sort_by_key(|t| std::cmp::Reverse(age(t)));
            trees.truncate(MOST_CANDIDATES);
        }
        let sizes = self.sizes(&tops)?;
        let mut candidates = Vec::new();
        for (root, entries) in &tops {
            let ids: Vec<u64> = entries.keys().copied().collect();
            let none = vec![(MetadataBlock(0), BTreeMap::new())];
            let matching = by_ids.get(&ids).unwrap_or(&none);
            for (details_root, details) in matching {
                candidates.push(self.judge(*root, entries, *details_root, details, &sizes));
            }
        }
        Ok(candidates)
    }

    /// Entries of every whole mapping tree that a candidate points to.
    fn sizes(&self, tops: &[(MetadataBlock, BTreeMap<u64, u64>)]) -> Result<HashMap<u64, u64>> {
        let mut forest = Forest::new(self.engine.nr_blocks());
        let all = tops.iter().flat_map(|(_, entries)| entries.values());
        let roots: Vec<MetadataBlock> = all
            .filter(|r| **r < forest.nr_blocks())
            .map(|&r| MetadataBlock(r))
            .collect();
        let tree = TreeKind::Mappings;
        forest.walk(
            &Walk {
                engine: self.engine,
                observer: self.observer,
                tree,
                leaves: Leaves::Read,
            },
            roots.iter().copied(),
            || (),
            |(), _| (),
        )?;
        let structure = Structure::of(&forest, tree, &roots);
        let summary =
            |root: &MetadataBlock| structure.summary(&forest, *root).filter(|s| !s.damaged);
        Ok(roots
            .iter()
            .filter_map(|r| Some((r.0, summary(r)?.entries)))
            .collect())
    }

    fn judge(
        &self,
        root: MetadataBlock,
        entries: &BTreeMap<u64, u64>,
        details_root: MetadataBlock,
        details: &BTreeMap<u64, DeviceDetail>,
        sizes: &HashMap<u64, u64>,
    ) -> Candidate {
        let details_root = (details_root.0 != 0).then_some(details_root);
        let space_map = self.space_map(root, details_root);
        let is_whole = |(id, root): &(&u64, &u64)| {
            let expected = details.get(id).map(|d| d.mapped_blocks);
            sizes
                .get(root)
                .is_some_and(|&size| expected.is_none_or(|e| e == size))
        };
        Candidate {
            mapping_root: root,
            details_root,
            devices: entries.len() as u64,
            whole_devices: entries.iter().filter(is_whole).count() as u64,
            time: details
                .values()
                .map(|d| d.snapshotted_time)
                .max()
                .unwrap_or(0),
            transaction_id: details
                .values()
                .map(|d| d.transaction_id)
                .max()
                .unwrap_or(0),
            in_use: (!self.maps.is_empty()).then_some(space_map.is_some()),
            space_map,
            generation: None,
        }
    }
}
