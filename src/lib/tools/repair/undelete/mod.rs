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

mod leaves;
mod report;

use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{Leaves, Structure, TreeKind, Walk};
use crate::thin::DeviceDetail;
use crate::tools::repair::contested::Omitted;
use crate::tools::repair::reuse::Current;
use crate::tools::repair::scan::Scan;
use crate::tools::repair::states::States;
use crate::tools::repair::{DataMap, Liveness, Options, Recovery, recover};
use crate::units::{MAX_THIN_ID, MetadataBlock, ThinId};
use leaves::{Judged, survivors};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

pub use report::{DeletedDevice, DeletedList, Remains, Undeleted, Wanted};

/// Devices that are listed.
const MOST_LISTED: usize = 1000;
/// States of a device that are listed beside the one that is chosen.
const MOST_OTHERS: usize = 16;
/// Said when the current state is damaged.
const REFUSED: &str = "the current state of the pool is damaged, so that nobody can tell which data blocks of deleted devices others \
                       have by now; repair it first";

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
