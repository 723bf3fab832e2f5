//! What a repair starts from: the devices of the last committed transaction with their roots and details, and what a space map
//! says of every metadata block.

use super::Options;
use super::contested::DataMap;

use super::liveness::Liveness;
use super::mend::MendedEngine;
use super::report::RepairReport;
use super::scan::{Class, Scan};
use super::small::{SmallTree, SmallTrees};
use super::states::{Sighted, State, States};
use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{TreeKind, Value};
use crate::thin::{DeviceDetail, Fields, SUPERBLOCK, Superblock};
use crate::tools::held_root;
use crate::units::MetadataBlock;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// The start of a repair.
#[derive(Debug, Default)]
pub(super) struct Basis {
    /// Root of each device's mapping tree, where it is known.
    pub(super) roots: BTreeMap<u64, MetadataBlock>,
    /// Roots that the top-level tree names though the space map says that they were freed.
    pub(super) freed: BTreeMap<u64, MetadataBlock>,
    /// Details of each device, where they are left.
    pub(super) details: BTreeMap<u64, DeviceDetail>,
    /// Devices that the latest older state had.
    pub(super) older_ids: BTreeSet<u64>,
    /// All of `details` are the last transaction's.
    pub(super) details_are_current: bool,
    /// The top-level tree is whole, so that there are no devices but those in `roots`.
    pub(super) top_is_whole: bool,
    /// The details tree is whole.
    pub(super) details_are_whole: bool,
    /// Nodes of top-level and details trees, the metadata snapshot's included: not part of a mapping tree.
    pub(super) small_nodes: HashSet<MetadataBlock>,
    /// Roots in the metadata snapshot's top-level tree.
    pub(super) held: Vec<MetadataBlock>,
    /// There is a metadata snapshot that cannot be read.
    pub(super) held_is_lost: bool,
    /// Counts of all metadata blocks.
    pub(super) counts: Option<Liveness>,
    /// What counts the mappings.
    pub(super) data_map: Option<DataMap>,
    /// A metadata snapshot's superblock, which has the block size when block 0 is lost.
    pub(super) copy: Option<Fields>,
}

/// The trees of a pool at two roots.
pub(super) struct Pair {
    pub(super) top: SmallTree<u64>,
    pub(super) details: SmallTree<DeviceDetail>,
}

impl Pair {
    pub(super) fn read(
        engine: &dyn BlockEngine,
        roots: (MetadataBlock, MetadataBlock),
        observer: &dyn Observer,
    ) -> Result<Self> {
        Ok(Self {
            top: one_tree(engine, TreeKind::TopLevel, roots.0, observer)?,
            details: one_tree(engine, TreeKind::Details, roots.1, observer)?,
        })
    }

    pub(super) fn is_whole(&self) -> bool {
        self.top.damaged.is_empty()
            && self.details.damaged.is_empty()
            && self.top.entries.keys().eq(self.details.entries.keys())
    }
}

fn one_tree<V: Value + Send>(
    engine: &dyn BlockEngine,
    tree: TreeKind,
    root: MetadataBlock,
    observer: &dyn Observer,
) -> Result<SmallTree<V>> {
    Ok(SmallTrees::read(engine, tree, &[root], observer)?.tree(root))
}

impl Basis {
    /// The devices of two whole trees; nothing else is looked at.
    pub(super) fn of_pair(pair: Pair) -> Self {
        let roots = pair.top.entries.iter();
        Self {
            roots: roots
                .map(|(&id, &root)| (id, MetadataBlock(root)))
                .collect(),
            details: pair.details.entries,
            details_are_current: true,
            top_is_whole: pair.top.damaged.is_empty(),
            details_are_whole: pair.details.damaged.is_empty(),
            small_nodes: pair
                .top
                .nodes
                .into_iter()
                .chain(pair.details.nodes)
                .collect(),
            ..Self::default()
        }
    }
}

impl Basis {
    /// The same without any device's root: all have to be found.
    pub(super) fn without_roots(self) -> Self {
        Self {
            roots: BTreeMap::new(),
            freed: BTreeMap::new(),
            top_is_whole: false,
            ..self
        }
    }

    /// The same with details that may be of an older transaction, and without roots if the top-level tree is in doubt too.
    pub(super) fn with_doubtful_details(self, without_roots: bool) -> Self {
        let basis = match without_roots {
            true => self.without_roots(),
            false => self,
        };
        Self {
            details_are_current: false,
            ..basis
        }
    }
}

/// Finds the start of a repair on a device that was scanned.
pub(super) struct Founder<'a> {
    pub(super) engine: &'a MendedEngine<'a>,
    pub(super) scan: &'a Scan,
    pub(super) superblock: Option<&'a Superblock>,
    pub(super) options: &'a Options,
    pub(super) observer: &'a dyn Observer,
    pub(super) report: &'a mut RepairReport,
}

impl Founder<'_> {
    /// Finds the roots, the counts and the devices. `states` are all states on the device.
    pub(super) fn found(&mut self, states: &States) -> Result<Basis> {
        let mut basis = Basis {
            copy: self
                .scan
                .copies
                .iter()
                .map(|c| c.1)
                .max_by_key(|f| (f.transaction_id, f.time)),
            ..Basis::default()
        };
        let latest = states.latest(|block| !self.scan.is_sealed(block));
        let best = latest.state.map(|i| &states.states[i]);
        self.report.list(states, latest.state);
        let (mapping_root, details_root) = match (self.options.roots, self.superblock) {
            (Some((mapping, details)), _) => {
                self.report.why = "they were asked for".into();
                (Some(mapping), Some(details))
            }
            (None, Some(superblock)) => {
                self.report.why = "the superblock names them".into();
                (Some(superblock.mapping_root), Some(superblock.details_root))
            }
            (None, None) if latest.is_ahead => {
                self.report.why = "the superblock and the last top-level tree are lost; the last space map tells what is in use".into();
                (None, None)
            }
            (None, None) => match best {
                None => return Err(nothing_found()),
                Some(best) => {
                    self.say_why(best, &latest.rivals, states);
                    (Some(best.mapping_root), best.details_root)
                }
            },
        };
        self.report.mapping_root = mapping_root;
        self.report.details_root = details_root;
        basis.counts = match self.superblock {
            _ if self.is_older(best) => None,
            Some(superblock) => {
                let map = superblock.metadata_space_map;
                let mut counts = Liveness::read(self.engine, map.bitmap_root).or_else(|| {
                    let roots = [
                        superblock.mapping_root,
                        superblock.details_root,
                        map.bitmap_root,
                    ];
                    Liveness::of_only_bitmap(self.engine, &self.scan.bitmaps, &roots)
                });
                if let Some(counts) = &mut counts {
                    counts.read_many(self.engine, map.ref_count_root, self.observer)?;
                }
                counts
            }
            None => match latest.index {
                Some(index) => Liveness::read(self.engine, index),
                None => None,
            },
        };
        basis.data_map = match self.superblock {
            _ if self.is_older(best) => None,
            Some(superblock) => Some(DataMap::of(superblock)),
            None => {
                let counts = basis.counts.as_ref();
                counts.and_then(|counts| DataMap::find(self.scan, counts))
            }
        };
        self.read_snapshot(&mut basis)?;
        let nowhere = MetadataBlock(0);
        let roots = (
            mapping_root.unwrap_or(nowhere),
            details_root.unwrap_or(nowhere),
        );
        let pair = Pair::read(self.engine, roots, self.observer)?;
        if self.options.roots.is_some() && !pair.is_whole() {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!(
                    "blocks {} and {} are not the roots of a top-level tree and of the details of the same devices; --list-candidates \
                     shows which are",
                    roots.0, roots.1
                ),
            ));
        }
        basis
            .small_nodes
            .extend(pair.top.nodes.iter().chain(&pair.details.nodes));
        let history = states.history(basis.counts.as_ref(), latest.state);
        self.devices(&mut basis, pair, &history, &states.sighted)?;
        Ok(basis)
    }

    /// True if the roots that were asked for are not those of the last state: what is in use now says nothing of them.
    fn is_older(&self, best: Option<&State>) -> bool {
        let last = match self.superblock {
            Some(superblock) => Some(superblock.mapping_root),
            None => best.map(|b| b.mapping_root),
        };
        self.options
            .roots
            .is_some_and(|roots| Some(roots.0) != last)
    }

    fn say_why(&mut self, best: &State, rivals: &[usize], states: &States) {
        self.report.why = format!(
            "the superblock is lost; of {} states on the device this is the last: no other follows on it in the order in which the kernel \
             allocates blocks{}",
            states.states.len(),
            match best.index {
                Some(index) =>
                    format!(", and the space map with index block {index} has all of it in use"),
                None => ", and no space map is readable".into(),
            }
        );
        for &rival in rivals {
            let rival = &states.states[rival];
            self.report.notes.push(format!(
                "mapping root {} may be as late as {}: compare the devices with what LVM knows, and choose with --roots",
                rival.mapping_root, best.mapping_root
            ));
        }
    }

    /// The trees of the metadata snapshot share blocks with the pool's, and count in the space map.
    fn read_snapshot(&mut self, basis: &mut Basis) -> Result<()> {
        let superblock = match self.superblock {
            Some(superblock) if superblock.held_root != SUPERBLOCK => {
                held_root(self.engine, superblock, None)
            }
            Some(_) => return Ok(()),
            None => {
                // The copies that are in use; there can be only one.
                let used = |block: &&MetadataBlock| {
                    basis
                        .counts
                        .as_ref()
                        .is_some_and(|c| c.is_used(**block) == Some(true))
                };
                let copies: Vec<MetadataBlock> = self.scan.copies.iter().map(|c| c.0).collect();
                match copies.iter().find(used) {
                    Some(&block) => Superblock::read_at(self.engine, block),
                    None => return Ok(()),
                }
            }
        };
        let Ok(held) = superblock else {
            basis.held_is_lost = true;
            return Ok(());
        };
        let pair = Pair::read(
            self.engine,
            (held.mapping_root, held.details_root),
            self.observer,
        )?;
        basis.held_is_lost = !pair.top.damaged.is_empty();
        basis.held = pair
            .top
            .entries
            .values()
            .map(|&r| MetadataBlock(r))
            .collect();
        basis
            .small_nodes
            .extend(pair.top.nodes.iter().chain(&pair.details.nodes));
        Ok(())
    }

    /// Completes the devices of damaged trees: from leaves in use that nothing leads to any more, then from older states.
    fn devices(
        &mut self,
        basis: &mut Basis,
        pair: Pair,
        history: &[&State],
        sighted: &Sighted,
    ) -> Result<()> {
        let Pair { top, details } = pair;
        basis.top_is_whole = top.damaged.is_empty();
        basis.details_are_whole = details.damaged.is_empty();
        basis.details_are_current = true;
        let mut tops = top.entries;
        let mut known = details.entries;
        if !basis.top_is_whole {
            self.report.is_complete = false;
            let (found, conflicts) =
                self.loose_leaves::<u64>(basis, Class::MaybeTop, TreeKind::TopLevel)?;
            add(
                &mut tops,
                found,
                conflicts,
                &mut self.report.notes,
                "top-level",
            );
            self.report.lost_ids = top.lost;
        }
        if !basis.details_are_whole {
            let (found, conflicts) =
                self.loose_leaves::<DeviceDetail>(basis, Class::Details, TreeKind::Details)?;
            add(
                &mut known,
                found,
                conflicts,
                &mut self.report.notes,
                "details",
            );
        }
        // A root that is not in use was freed: the leaf that names it may not be the last one.
        if let Some(counts) = &basis.counts {
            let is_freed =
                |(_, root): &(u64, u64)| counts.is_used(MetadataBlock(*root)) == Some(false);
            let (freed, kept): (BTreeMap<u64, u64>, _) = tops.into_iter().partition(is_freed);
            tops = kept;
            basis.freed = freed
                .into_iter()
                .map(|(id, root)| (id, MetadataBlock(root)))
                .collect();
        }
        basis.roots = tops
            .into_iter()
            .map(|(id, root)| (id, MetadataBlock(root)))
            .collect();
        basis.details = known;
        // The last state itself is among the states, unless its top-level tree is damaged.
        let latest = history.iter().find(|s| !s.roots.is_empty());
        basis.older_ids = latest.map_or_else(BTreeSet::new, |s| s.roots.keys().copied().collect());
        let is_used = |root: &MetadataBlock| {
            basis
                .counts
                .as_ref()
                .is_some_and(|c| c.is_used(*root) == Some(true))
        };
        let sighted = sighted
            .iter()
            .filter(|(_, roots)| roots.iter().any(is_used));
        basis.older_ids.extend(sighted.map(|s| s.0));
        if !basis.details_are_whole {
            self.older_details(basis, history);
        }
        Ok(())
    }

    /// Entries of leaves of a small tree that are in use though nothing leads to them; ids with several entries apart.
    fn loose_leaves<V: Value + Send + PartialEq>(
        &mut self,
        basis: &mut Basis,
        class: Class,
        tree: TreeKind,
    ) -> Result<Loose<V>> {
        let mut loose = (BTreeMap::new(), HashSet::new());
        let Some(counts) = &basis.counts else {
            return Ok(loose);
        };
        let nodes = self.scan.nodes().iter().filter(|n| n.class == class);
        let blocks = nodes
            .map(|n| n.block())
            .filter(|b| counts.is_used(*b) == Some(true) && !basis.small_nodes.contains(b));
        let blocks: Vec<MetadataBlock> = blocks.collect();
        let trees = SmallTrees::<V>::read(self.engine, tree, &blocks, self.observer)?;
        for block in blocks {
            let leaf = trees.tree(block);
            let entries = leaf.entries;
            if class == Class::MaybeTop && !self.is_top(&entries) || entries.is_empty() {
                continue;
            }
            basis.small_nodes.insert(block);
            for (id, value) in entries {
                if loose.0.insert(id, value).is_some_and(|old| old != value) {
                    loose.1.insert(id);
                }
            }
        }
        Ok(loose)
    }

    /// True when what the entries of a leaf point to are mapping nodes, mostly.
    fn is_top<V: Value>(&self, entries: &BTreeMap<u64, V>) -> bool {
        let root = |value: &V| {
            let mut bytes = [0; 8];
            value.pack(&mut bytes);
            MetadataBlock(u64::from_le_bytes(bytes))
        };
        let is_mappings = |value: &&V| {
            matches!(
                self.scan.leaf_class(root(value)),
                Some(Class::Mappings | Class::MaybeTop)
            )
        };
        2 * entries.values().filter(is_mappings).count() >= entries.len()
    }

    /// Details from the latest older state that has them. A device's transaction and creation change only if its id was
    /// given to another one since.
    fn older_details(&mut self, basis: &mut Basis, history: &[&State]) {
        basis.details_are_current = false;
        self.report.is_complete = false;
        let mut ids: BTreeSet<u64> = basis.roots.keys().copied().collect();
        ids.extend(&basis.older_ids);
        let mut found: Vec<String> = Vec::new();
        for id in ids {
            if !basis.details.contains_key(&id)
                && let Some(detail) = history.iter().find_map(|s| s.details.get(&id))
            {
                basis.details.insert(id, *detail);
                found.push(id.to_string());
            }
        }
        if !found.is_empty() {
            let ids = found.join(", ");
            self.report.notes.push(format!(
                "the details of these devices are of an older transaction: {ids}"
            ));
        }
    }
}

/// Entries that are told the same way wherever they stand, and ids that are not.
type Loose<V> = (BTreeMap<u64, V>, HashSet<u64>);

fn add<V>(
    known: &mut BTreeMap<u64, V>,
    found: BTreeMap<u64, V>,
    conflicts: HashSet<u64>,
    notes: &mut Vec<String>,
    tree: &str,
) {
    for id in &conflicts {
        notes.push(format!(
            "device {id}: several {tree} leaves in use have it, with different contents"
        ));
    }
    for (id, value) in found {
        if !conflicts.contains(&id) {
            known.entry(id).or_insert(value);
        }
    }
}

fn nothing_found() -> Error {
    Error::new(
        ErrorKind::Damaged,
        "the superblock is lost and nothing on this device looks like the top-level tree of a pool; make sure that it is the metadata \
         device",
    )
}
