//! Devices that were deleted, and that older states of the pool, still on the device, hold: finds them, tells what is left of
//! them, and brings one back beside the devices of the current state.
//!
//! Invariants:
//! 1. The current state is whole, or nothing is told: only then is it known which data blocks others have by now.
//! 2. A device is brought back from a state in which its tree is whole and has as many mappings as its details say.
//! 3. A data block that a current device maps is given to the device only if both have it at the same virtual block, mapped
//!    before either last took part in a snapshot. What is mapped after the state is of a later time, so such a block has been
//!    shared ever since.
//! 4. A leaf that may have been written after the state is believed in no part: one that a current device has too, unless a
//!    current device had it in that state already; and one with a mapping that cannot be the device's.

use super::contested::Omitted;
use super::reuse::{Current, Judgement};
use super::scan::Scan;
use super::states::{State, States};
use super::{DataMap, Liveness, Options, Recovery, recover};
use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{Leaves, Shape, Structure, TreeKind, Walk};
use crate::thin::DeviceDetail;
use crate::tools::affected::Affected;
use crate::tools::sharing::leaves;
use crate::units::{MAX_THIN_ID, MetadataBlock, ThinId};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

/// Devices that are listed.
const MOST_LISTED: usize = 1000;
/// States of a device that are listed beside the one that is chosen.
const MOST_OTHERS: usize = 16;
/// Said when the current state is damaged.
const REFUSED: &str = "the current state of the pool is damaged, so that nobody can tell which data blocks of deleted devices others \
                       have by now; repair it first";

/// What became of a deleted device's mappings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Remains {
    /// Mappings whose data blocks nobody maps now. What they hold is not known: they may have been discarded, or used and
    /// freed again.
    pub free: u64,
    /// Mappings that the device shares with a current one, as snapshots do: their data blocks were never freed.
    pub shared: u64,
    /// Mappings whose data blocks others have by now: lost.
    pub reused: u64,
    /// Mappings in leaves that may have been written after the device was deleted: not to be believed.
    pub doubtful: u64,
}

impl Remains {
    /// Mappings that can be brought back.
    pub fn kept(&self) -> u64 {
        self.free + self.shared
    }

    /// Mappings that cannot.
    pub fn left_out(&self) -> u64 {
        self.reused + self.doubtful
    }

    fn add(&mut self, other: Self) {
        self.free += other.free;
        self.shared += other.shared;
        self.reused += other.reused;
        self.doubtful += other.doubtful;
    }
}

/// A device that an older state of the pool has, and the current one has not.
#[derive(Clone, Debug, Serialize)]
pub struct DeletedDevice {
    /// Its id.
    pub dev_id: ThinId,
    /// The pool's transaction id when it was created.
    pub transaction: u64,
    /// The snapshot clock when it was created.
    pub creation_time: u32,
    /// Root of the top-level tree of the state that it is told of: the latest in which it is whole.
    pub mapping_root: MetadataBlock,
    /// Its mappings in that state.
    pub mapped_blocks: u64,
    /// All of its tree is left.
    pub is_whole: bool,
    /// No later version of it is known, be it whole or overwritten.
    pub is_latest: bool,
    /// The last virtual block that is mapped, and one; 0 if none is or the tree is not whole.
    pub end: u64,
    /// What became of its mappings; none if the tree is not whole.
    pub remains: Option<Remains>,
    /// Another device has its id now.
    pub id_is_taken: bool,
    /// Roots of the top-level trees of states with other versions of it that are whole, the latest first.
    pub other_versions: Vec<MetadataBlock>,
}

impl fmt::Display for DeletedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "device {}: {} mapped blocks, created at transaction {}, time {}; in the state of mapping root {}",
            self.dev_id,
            self.mapped_blocks,
            self.transaction,
            self.creation_time,
            self.mapping_root
        )?;
        match self.remains {
            None => f.write_str("; part of its tree is overwritten, it cannot be brought back")?,
            Some(remains) => write!(
                f,
                "; {} shared with current devices, {} in free data blocks, {} reused by others, {} doubtful",
                remains.shared, remains.free, remains.reused, remains.doubtful
            )?,
        }
        if !self.is_latest {
            f.write_str("; a later version of it existed")?;
        }
        if self.id_is_taken {
            f.write_str("; another device has its id")?;
        }
        for (i, root) in self.other_versions.iter().enumerate() {
            let before = if i == 0 { "; other versions: " } else { ", " };
            write!(f, "{before}{root}")?;
        }
        Ok(())
    }
}

/// Deleted devices that are left in older states.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DeletedList {
    /// The devices, ascending by id, those of one id the latest first.
    pub devices: Vec<DeletedDevice>,
    /// How many more there are.
    pub more_devices: usize,
    /// Older versions of devices that still exist.
    pub older_versions: usize,
}

/// Which device to bring back, and as which.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Its id.
    pub dev_id: ThinId,
    /// The id to give it; none for its own.
    pub new_id: Option<ThinId>,
    /// Root of the top-level tree of the state to take it from; none for the latest in which it is whole.
    pub from: Option<MetadataBlock>,
}

/// The current state with a device brought back.
#[derive(Debug)]
pub struct Undeleted<'a> {
    /// The pool, to be told to a restorer.
    pub recovery: Recovery<'a>,
    /// The device as it was found.
    pub device: DeletedDevice,
    /// The id that it has now.
    pub new_id: ThinId,
    /// Ranges of virtual blocks whose mappings are left out, in whole or in part.
    pub left_out: Vec<Affected>,
}

/// A device for good: ids are given again, times of creation are not.
type Identity = (u64, u64, u32);

fn identity(id: u64, detail: &DeviceDetail) -> Identity {
    (id, detail.transaction_id, detail.creation_time)
}

/// A device in a state.
#[derive(Clone, Copy, Debug)]
struct Version {
    /// The state's place in [`States::states`].
    state: usize,
    root: MetadataBlock,
    detail: DeviceDetail,
}

/// The devices that were deleted from the pool on a metadata device, as far as older states hold them.
pub struct Deletions<'a> {
    recovery: Recovery<'a>,
    observer: &'a dyn Observer,
    scan: Scan,
    states: States,
    structure: Structure,
    /// Data blocks of the pool that are counted.
    nr_data_blocks: u64,
    /// All versions of each deleted device, the latest first.
    deleted: BTreeMap<Identity, Vec<Version>>,
    older_versions: usize,
}

impl fmt::Debug for Deletions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deletions")
            .field("deleted", &self.deleted)
            .finish_non_exhaustive()
    }
}

impl<'a> Deletions<'a> {
    /// Finds them on `engine`.
    ///
    /// # Errors
    /// `Damaged` when the current state is not whole; `Io`, `Interrupted`.
    pub fn find(engine: &'a dyn BlockEngine, observer: &'a dyn Observer) -> Result<Self> {
        let mut recovery =
            recover(engine, &Options::default(), observer).map_err(|e| match e.kind() {
                ErrorKind::Damaged => e.context(REFUSED),
                _ => e,
            })?;
        let superblock = recovery.engine.superblock().unwrap_or_default().0;
        let Some(superblock) = superblock.filter(|_| recovery.report.is_complete) else {
            return Err(Error::new(ErrorKind::Damaged, REFUSED));
        };
        let scan = Scan::of(engine, observer)?;
        recovery.engine.mends.clone_from(&scan.mends);
        let map = DataMap::of(&superblock);
        let nr_data_blocks = map
            .nr_countable(&recovery.engine, observer)?
            .min(recovery.trees.pool.nr_data_blocks);
        let states = States::find(&recovery.engine, &scan, observer)?;
        let mut found = Self {
            structure: Structure::of(&recovery.recovered.forest, TreeKind::Mappings, &[]),
            recovery,
            observer,
            scan,
            states,
            nr_data_blocks,
            deleted: BTreeMap::new(),
            older_versions: 0,
        };
        let counts = Liveness::read(
            &found.recovery.engine,
            superblock.metadata_space_map.bitmap_root,
        );
        found.gather(counts.as_ref(), superblock.mapping_root);
        found.walk()?;
        Ok(found)
    }

    /// Takes the deleted devices out of all states.
    fn gather(&mut self, counts: Option<&Liveness>, mapping_root: MetadataBlock) {
        let pool = &self.recovery.trees.pool;
        let current = self.current();
        let states = &self.states.states;
        let latest = states.iter().position(|s| s.mapping_root == mapping_root);
        let places: HashMap<MetadataBlock, usize> =
            (states.iter().map(|s| s.mapping_root)).zip(0..).collect();
        let mut older = BTreeSet::new();
        for state in self.states.history(counts, latest) {
            for (&id, &root) in &state.roots {
                let Some(&detail) = state.details.get(&id) else {
                    continue;
                };
                let identity = identity(id, &detail);
                match current.get(&identity) {
                    Some(now) => {
                        if *now != root {
                            older.insert((id, root));
                        }
                    }
                    // What was created later than the last committed transaction was never there.
                    None if detail.creation_time > pool.time
                        || detail.transaction_id > pool.transaction => {}
                    None => self.deleted.entry(identity).or_default().push(Version {
                        state: places[&state.mapping_root],
                        root,
                        detail,
                    }),
                }
            }
        }
        self.older_versions = older.len();
        // A device's last snapshot never goes back.
        for versions in self.deleted.values_mut() {
            versions.sort_by_key(|v| std::cmp::Reverse(v.detail.snapshotted_time));
        }
    }

    /// The current devices with their roots.
    fn current(&self) -> HashMap<Identity, MetadataBlock> {
        let devices = self.recovery.trees.devices.iter();
        devices
            .map(|(&id, (root, detail))| (identity(id, detail), *root))
            .collect()
    }

    /// Reads the trees of all deleted devices, and of the current ones in the same states.
    fn walk(&mut self) -> Result<()> {
        let current = self.current();
        let versions: Vec<Version> = self.deleted.values().flatten().copied().collect();
        let states: BTreeSet<usize> = versions.iter().map(|v| v.state).collect();
        let mut roots: Vec<MetadataBlock> = versions.iter().map(|v| v.root).collect();
        for state in states {
            roots.extend(survivors(&self.states.states[state], &current).map(|s| s.0));
        }
        let forest = &mut self.recovery.recovered.forest;
        let limit = self
            .recovery
            .engine
            .engine
            .nr_blocks()
            .min(forest.nr_blocks());
        roots.retain(|r| r.0 > 0 && r.0 < limit);
        let walk = Walk {
            engine: &self.recovery.engine,
            observer: self.observer,
            tree: TreeKind::Mappings,
            leaves: Leaves::Read,
        };
        forest.walk(&walk, roots.iter().copied(), || (), |(), _| ())?;
        self.structure = Structure::of(forest, TreeKind::Mappings, &roots);
        Ok(())
    }

    /// True if the tree at `root` is whole and has as many mappings as the details say.
    fn is_tree_whole(&self, root: MetadataBlock, detail: &DeviceDetail) -> bool {
        let forest = &self.recovery.recovered.forest;
        let summary = self.structure.summary(forest, root);
        summary.is_some_and(|s| !s.damaged && s.entries == detail.mapped_blocks)
    }

    /// True if the version can be brought back.
    fn is_whole(&self, version: &Version) -> bool {
        self.is_tree_whole(version.root, &version.detail)
    }
}

/// The current devices in an older state, with the roots and details that they had.
fn survivors<'a>(
    state: &'a State,
    current: &'a HashMap<Identity, MetadataBlock>,
) -> impl Iterator<Item = (MetadataBlock, &'a DeviceDetail)> {
    state.roots.iter().filter_map(|(&id, &root)| {
        let detail = state.details.get(&id)?;
        current
            .contains_key(&identity(id, detail))
            .then_some((root, detail))
    })
}

/// A leaf of a deleted device.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    block: MetadataBlock,
    first: u64,
    last: u64,
    entries: u64,
}

/// The leaves of a deleted device that may be brought back.
struct Sorted {
    /// Those that a current device has too.
    shared: Vec<Leaf>,
    /// Those that no current device has.
    alone: Vec<Leaf>,
    /// Those that may have been written after the device was deleted.
    doubtful: Vec<Leaf>,
}

impl Deletions<'_> {
    /// The current mappings, to hold others against.
    fn mappings(&self) -> Current<'_> {
        Current::of(
            &self.recovery.engine,
            self.observer,
            &self.recovery.recovered.forest,
            &self.recovery.trees.devices,
            self.recovery.trees.pool.time,
            self.nr_data_blocks,
        )
    }

    /// The version that is brought back: the latest that is whole; or else the latest.
    fn best(&self, versions: &[Version]) -> Option<Version> {
        let mut whole = versions.iter().filter(|v| self.is_whole(v));
        whole.next().or(versions.first()).copied()
    }

    /// Leaves that current devices had in this state already.
    fn confirmed(&self, state: usize) -> HashSet<MetadataBlock> {
        let forest = &self.recovery.recovered.forest;
        let current = self.current();
        let whole = survivors(&self.states.states[state], &current)
            .filter(|(root, detail)| self.is_tree_whole(*root, detail));
        let roots: Vec<usize> = whole.filter_map(|(root, _)| forest.number(root)).collect();
        let nodes = forest.children_first(&roots).into_iter();
        let nodes = nodes.map(|n| &forest.nodes()[n]);
        let leaves = nodes.filter(|n| matches!(n.shape, Shape::Leaf { .. }));
        leaves.map(|n| n.block).collect()
    }

    /// Sorts the leaves of a version that is whole, as far as that can be done without reading them.
    fn sort(
        &self,
        version: &Version,
        confirmed: &HashSet<MetadataBlock>,
        mappings: &Current<'_>,
    ) -> Sorted {
        let forest = &self.recovery.recovered.forest;
        let mut sorted = Sorted {
            shared: Vec::new(),
            alone: Vec::new(),
            doubtful: Vec::new(),
        };
        for n in forest
            .number(version.root)
            .into_iter()
            .flat_map(|n| leaves(forest, n))
        {
            let node = &forest.nodes()[n];
            let (first, last, entries) = match node.shape {
                Shape::Leaf {
                    first,
                    last,
                    entries,
                } if entries > 0 => (first, last, entries),
                _ => continue,
            };
            let is_before = |time: u32| {
                let latest = self.scan.time(node.block);
                latest.is_none_or(|latest| latest < time.min(version.detail.snapshotted_time))
            };
            let list = match mappings.snapped(node.block) {
                None => &mut sorted.alone,
                Some(time) if confirmed.contains(&node.block) && is_before(time) => {
                    &mut sorted.shared
                }
                Some(_) => &mut sorted.doubtful,
            };
            list.push(Leaf {
                block: node.block,
                first,
                last,
                entries: u64::from(entries),
            });
        }
        sorted
    }
}

/// A version of a device with what is known of its leaves.
struct Judged {
    version: Version,
    sorted: Sorted,
    /// Leaves that map a data block which the device has elsewhere too.
    repeated: HashSet<MetadataBlock>,
}

impl Judged {
    /// What became of the mappings in a leaf that no current device has.
    fn remains(&self, leaf: &Leaf, judgement: Option<&Judgement>) -> Remains {
        let doubtful = Remains {
            doubtful: leaf.entries,
            ..Remains::default()
        };
        let Some(judgement) = judgement else {
            return doubtful;
        };
        let snapped = self.version.detail.snapshotted_time;
        if judgement.is_foreign
            || judgement.same_until.is_some_and(|time| time >= snapped)
            || self.repeated.contains(&leaf.block)
        {
            return doubtful;
        }
        Remains {
            free: judgement.entries - judgement.same - judgement.reused,
            shared: judgement.same,
            reused: judgement.reused,
            doubtful: 0,
        }
    }

    /// The leaves that no current device has, ascending.
    fn alone(&self) -> Vec<u64> {
        let mut alone: Vec<u64> = self.sorted.alone.iter().map(|l| l.block.0).collect();
        alone.sort_unstable();
        alone
    }

    /// The leaves to bring back, by their first keys, and what is left out, for the device with id `new_id`.
    fn split(
        &self,
        judgements: &HashMap<MetadataBlock, Judgement>,
        omitted: &Omitted,
        new_id: ThinId,
    ) -> (Vec<(u64, Option<MetadataBlock>)>, Vec<Affected>) {
        let mut kept: Vec<&Leaf> = self.sorted.shared.iter().collect();
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut lose = |leaf: &Leaf| ranges.push((leaf.first, leaf.last.saturating_add(1)));
        self.sorted.doubtful.iter().for_each(&mut lose);
        for leaf in &self.sorted.alone {
            let remains = self.remains(leaf, judgements.get(&leaf.block));
            match remains.kept() {
                0 => lose(leaf),
                _ => kept.push(leaf),
            }
        }
        let keys = kept.iter().filter_map(|leaf| omitted.get(&leaf.block));
        ranges.extend(keys.flatten().map(|&key| (key, key.saturating_add(1))));
        kept.sort_unstable_by_key(|leaf| leaf.first);
        let kept = kept.into_iter().map(|leaf| (leaf.first, Some(leaf.block)));
        (kept.collect(), joined(ranges, new_id))
    }

    /// What became of all mappings.
    fn total(&self, judgements: &HashMap<MetadataBlock, Judgement>) -> Remains {
        let sum = |list: &[Leaf]| list.iter().map(|l| l.entries).sum();
        let mut total = Remains {
            shared: sum(&self.sorted.shared),
            doubtful: sum(&self.sorted.doubtful),
            ..Remains::default()
        };
        for leaf in &self.sorted.alone {
            total.add(self.remains(leaf, judgements.get(&leaf.block)));
        }
        total
    }
}

/// Ranges of virtual blocks, those that touch made one.
fn joined(mut ranges: Vec<(u64, u64)>, device: ThinId) -> Vec<Affected> {
    ranges.sort_unstable();
    let mut joined: Vec<Affected> = Vec::new();
    for (begin, end) in ranges.into_iter().filter(|r| r.0 < r.1) {
        match joined.last_mut() {
            Some(last) if last.end == Some(begin) => last.end = Some(end),
            _ => joined.push(Affected {
                device: Some(device),
                begin,
                end: Some(end),
            }),
        }
    }
    joined
}

impl Deletions<'_> {
    /// Lists the devices.
    ///
    /// # Errors
    /// `Io` and `Interrupted` only.
    pub fn list(&self) -> Result<DeletedList> {
        let mappings = self.mappings();
        let mut order: Vec<(&Identity, &Vec<Version>)> = self.deleted.iter().collect();
        order.sort_by_key(|((id, transaction, time), _)| {
            (*id, std::cmp::Reverse((*transaction, *time)))
        });
        let more_devices = order.len().saturating_sub(MOST_LISTED);
        order.truncate(MOST_LISTED);
        let best = order
            .iter()
            .filter_map(|(identity, versions)| Some((**identity, self.best(versions)?)));
        let whole = best.filter(|(_, version)| self.is_whole(version));
        let judged = self.all_judged(whole.collect(), &mappings)?;
        let alone: BTreeSet<u64> = judged.values().flat_map(Judged::alone).collect();
        let alone: Vec<u64> = alone.into_iter().collect();
        let mut judgements = HashMap::new();
        mappings.judge(&alone, |leaf, judgement, _| {
            judgements.insert(leaf, judgement);
        })?;
        let devices = order.iter().filter_map(|&(&identity, versions)| {
            let best = self.best(versions)?;
            let total = judged.get(&identity).map(|j| j.total(&judgements));
            Some(self.describe(identity, &best, total))
        });
        Ok(DeletedList {
            devices: devices.collect(),
            more_devices,
            older_versions: self.older_versions,
        })
    }

    /// Sorts the leaves of whole versions, those of one state together.
    fn all_judged(
        &self,
        mut versions: Vec<(Identity, Version)>,
        mappings: &Current<'_>,
    ) -> Result<BTreeMap<Identity, Judged>> {
        versions.sort_by_key(|(_, version)| version.state);
        let mut judged = BTreeMap::new();
        let mut confirmed = (usize::MAX, HashSet::new());
        for (identity, version) in versions {
            self.observer.check_cancelled()?;
            if confirmed.0 != version.state {
                confirmed = (version.state, self.confirmed(version.state));
            }
            judged.insert(identity, self.judged(version, &confirmed.1, mappings)?);
        }
        Ok(judged)
    }

    /// Sorts the leaves of a whole version; `confirmed` are those that current devices had in its state.
    fn judged(
        &self,
        version: Version,
        confirmed: &HashSet<MetadataBlock>,
        mappings: &Current<'_>,
    ) -> Result<Judged> {
        let mut judged = Judged {
            version,
            sorted: self.sort(&version, confirmed, mappings),
            repeated: HashSet::new(),
        };
        judged.repeated = mappings.repeated(&judged.alone())?;
        Ok(judged)
    }
}

impl<'a> Deletions<'a> {
    /// Describes a deleted device as it is in one of its versions.
    fn describe(
        &self,
        identity: Identity,
        version: &Version,
        remains: Option<Remains>,
    ) -> DeletedDevice {
        let (id, transaction, creation_time) = identity;
        let forest = &self.recovery.recovered.forest;
        let summary = self.structure.summary(forest, version.root);
        let last = summary.filter(|_| remains.is_some()).and_then(|s| s.last);
        let mut seen = HashSet::from([version.root]);
        let others = self.deleted[&identity]
            .iter()
            .filter(|v| self.is_whole(v) && seen.insert(v.root));
        DeletedDevice {
            dev_id: ThinId(id),
            transaction,
            creation_time,
            mapping_root: self.states.states[version.state].mapping_root,
            mapped_blocks: version.detail.mapped_blocks,
            is_whole: remains.is_some(),
            is_latest: self.deleted[&identity].first().map(|v| v.root) == Some(version.root),
            end: last.map_or(0, |last| last.saturating_add(1)),
            remains,
            id_is_taken: self.recovery.trees.devices.contains_key(&id),
            other_versions: others
                .take(MOST_OTHERS)
                .map(|v| self.states.states[v.state].mapping_root)
                .collect(),
        }
    }

    /// Finds the version that is wanted.
    fn choose(&self, wanted: &Wanted) -> Result<(Identity, Version)> {
        let id = wanted.dev_id.0;
        let of_id = self.deleted.range((id, 0, 0)..=(id, u64::MAX, u32::MAX));
        let is_wanted = |v: &&Version| {
            let root = self.states.states[v.state].mapping_root;
            wanted.from.is_none_or(|from| from == root)
        };
        // Of devices that had the same id, the last one.
        for (&identity, versions) in of_id.clone().rev() {
            let mut fitting = versions.iter().filter(is_wanted);
            if let Some(version) = fitting.find(|v| self.is_whole(v)) {
                return Ok((identity, *version));
            }
        }
        let is_there = of_id
            .flat_map(|(_, versions)| versions)
            .any(|v| is_wanted(&v));
        Err(unsuitable(match (is_there, wanted.from) {
            (true, _) => {
                format!("part of the tree of device {id} is overwritten: it cannot be brought back")
            }
            (false, Some(from)) => format!(
                "the state of mapping root {from} has no device {id} that was deleted; --undelete without an id shows what there is"
            ),
            (false, None) => format!(
                "no state of the pool on this device has a device {id} that was deleted; --undelete without an id shows what there is"
            ),
        }))
    }

    /// The id that the device gets.
    fn new_id(&self, wanted: &Wanted) -> Result<ThinId> {
        let id = wanted.new_id.unwrap_or(wanted.dev_id);
        if id.0 > MAX_THIN_ID {
            return Err(unsuitable(format!(
                "device {id}: the kernel takes ids up to {MAX_THIN_ID}"
            )));
        }
        if self.recovery.trees.devices.contains_key(&id.0) {
            return Err(unsuitable(format!(
                "another device has id {id}; give the device that is brought back an id that is free, with --as"
            )));
        }
        Ok(id)
    }

    /// Brings a device back beside those of the current state.
    ///
    /// # Errors
    /// `Unsuitable` when there is no such device that is whole, or its id is not free; `Io` and `Interrupted`.
    pub fn bring_back(mut self, wanted: &Wanted) -> Result<Undeleted<'a>> {
        let (identity, version) = self.choose(wanted)?;
        let new_id = self.new_id(wanted)?;
        let mappings = self.mappings();
        let confirmed = self.confirmed(version.state);
        let judged = self.judged(version, &confirmed, &mappings)?;
        let mut judgements = HashMap::new();
        let mut omitted = Omitted::new();
        mappings.judge(&judged.alone(), |leaf, judgement, keys| {
            judgements.insert(leaf, judgement);
            if !keys.is_empty() {
                omitted.insert(leaf, keys);
            }
        })?;
        let (kept, left_out) = judged.split(&judgements, &omitted, new_id);
        let remains = judged.total(&judgements);
        let device = self.describe(identity, &version, Some(remains));
        drop(mappings);
        let recovered = &mut self.recovery.recovered;
        // An inner node that no block holds leads to the leaves that are kept, whatever else led to the others.
        let root = recovered.forest.invent(TreeKind::Mappings, &kept);
        recovered.omitted.append(&mut omitted);
        let trees = &mut self.recovery.trees;
        let detail = DeviceDetail {
            mapped_blocks: remains.kept(),
            snapshotted_time: trees.pool.time,
            ..version.detail
        };
        trees.devices.insert(new_id.0, (root, detail));
        Ok(Undeleted {
            recovery: self.recovery,
            device,
            new_id,
            left_out,
        })
    }
}

fn unsuitable(message: String) -> Error {
    Error::new(ErrorKind::Unsuitable, message)
}
