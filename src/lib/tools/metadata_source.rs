//! The source that reads a pool's trees: devices in order of id, leaves many at a time on all cores, shared runs of leaves
//! told once and referred to.

use super::event::{Device, PoolInfo, Run, Sink, Source};
use super::sharing::{Sharing, leaves};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{
    Forest, Leaves, Node, NodeProblem, Structure, StructureFault, TreeKind, Value, Walk,
};
use crate::thin::{BlockTime, DeviceDetail, SUPERBLOCK, Superblock};
use crate::units::{DataBlock, MetadataBlock, ThinBlock, ThinId};
use std::collections::{BTreeMap, HashMap};

/// Leaves that are read and decoded together: at most 2 MiB of runs.
const LEAVES_AT_ONCE: usize = 256;

/// What of a pool is told.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only these devices; empty means all.
    pub devices: Vec<ThinId>,
    /// Devices without their mappings.
    pub skip_mappings: bool,
    /// Shared mappings are told again for each device.
    pub no_shared: bool,
}

/// The roots and details from which a pool can be told.
#[derive(Clone, Debug)]
pub struct Trees {
    /// The pool.
    pub pool: PoolInfo,
    /// Every device with its details and the root of its mapping tree.
    pub devices: BTreeMap<u64, (MetadataBlock, DeviceDetail)>,
}

/// A damaged place, as the error of a command that needs it whole.
pub(super) fn damaged(tree: TreeKind, block: MetadataBlock, what: &str) -> Error {
    Error::new(
        ErrorKind::Damaged,
        format!(
            "{tree}, block {block}: {what}; run thin_check to see all damage, thin_repair to recover what is whole"
        ),
    )
}

/// The first problem that a walk has put on record, as an error.
pub(super) fn problem_error(forest: &mut Forest) -> Option<Error> {
    let (block, tree, problem) = forest.problems.drain(..).next()?;
    Some(match problem {
        NodeProblem::Unreadable(e) => Error::io(
            format!("cannot read metadata block {block} of the {tree}"),
            e,
        ),
        NodeProblem::Fault(fault) => damaged(tree, block, &fault.to_string()),
        NodeProblem::Pointers {
            key, child, limit, ..
        } => damaged(
            tree,
            block,
            &format!("the child for key {key} is block {child}, past the last of {limit}"),
        ),
        NodeProblem::UsedTwice { first } => damaged(
            tree,
            block,
            &format!("the block is part of the {first} too"),
        ),
    })
}

/// The first fault between nodes that is one, as an error.
pub(super) fn structure_error(structure: &Structure, tree: TreeKind) -> Option<Error> {
    let mut faults = structure.faults.iter();
    let (block, fault) = faults.find(|(_, f)| !matches!(f, StructureFault::UnderFull { .. }))?;
    Some(damaged(tree, *block, &fault.to_string()))
}

/// Every entry of a small tree, in key order.
pub(super) fn read_small_tree<V: Value + Send>(
    engine: &dyn BlockEngine,
    forest: &mut Forest,
    tree: TreeKind,
    root: MetadataBlock,
    observer: &dyn Observer,
) -> Result<Vec<(u64, V)>> {
    if root.0 >= forest.nr_blocks() {
        let what = format!("the root is past the last of {} blocks", forest.nr_blocks());
        return Err(damaged(tree, root, &what));
    }
    let parts = forest.walk(
        &Walk {
            engine,
            observer,
            tree,
            leaves: Leaves::Read,
        },
        [root],
        Vec::new,
        |entries, node| {
            entries.extend(node.keys().zip(node.values().map(V::unpack)));
        },
    )?;
    let structure = Structure::of(forest, tree, &[root]);
    if let Some(e) = problem_error(forest).or_else(|| structure_error(&structure, tree)) {
        return Err(e);
    }
    let mut entries = parts.concat();
    entries.sort_unstable_by_key(|e| e.0);
    Ok(entries)
}

/// Reads the inner nodes of the mapping trees of `devices`, entries of the top-level tree, into `forest`. What is wrong with a node is
/// put on record there.
pub(super) fn walk_inner_nodes(
    engine: &dyn BlockEngine,
    forest: &mut Forest,
    devices: &[(u64, u64)],
    observer: &dyn Observer,
) -> Result<Structure> {
    let (tree, limit) = (TreeKind::Mappings, forest.nr_blocks());
    if let Some((id, root)) = devices.iter().find(|d| d.1 >= limit) {
        return Err(Error::new(
            ErrorKind::Damaged,
            format!("the root of device {id} is block {root}, past the last of {limit}"),
        ));
    }
    let roots: Vec<MetadataBlock> = devices.iter().map(|d| MetadataBlock(d.1)).collect();
    let walk = Walk {
        engine,
        observer,
        tree,
        leaves: Leaves::Find,
    };
    forest.walk(&walk, roots.iter().copied(), || (), |(), _| ())?;
    Ok(Structure::of(forest, tree, &roots))
}

/// The text that a dump has for the uuid field: nothing if it is zeros or no text.
pub(super) fn uuid_text(uuid: &[u8; 16]) -> String {
    let end = uuid.iter().rposition(|&b| b != 0).map_or(0, |i| i + 1);
    match std::str::from_utf8(&uuid[..end]) {
        Ok(text) if text.bytes().all(|b| (0x20..0x7f).contains(&b)) => text.to_owned(),
        _ => String::new(),
    }
}

impl Trees {
    /// Reads the top-level tree and the device details that `superblock` (or a metadata snapshot's copy) points to.
    /// `nr_data_blocks` comes from the pool's superblock: the copy has none.
    ///
    /// # Errors
    /// `Damaged` when either tree is, or when they disagree about which devices there are; `Io`.
    pub fn read(
        engine: &dyn BlockEngine,
        superblock: &Superblock,
        nr_data_blocks: u64,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let mut forest = Forest::new(engine.nr_blocks());
        let kind = TreeKind::TopLevel;
        let roots =
            read_small_tree::<u64>(engine, &mut forest, kind, superblock.mapping_root, observer)?;
        let kind = TreeKind::Details;
        let details: BTreeMap<u64, DeviceDetail> =
            read_small_tree(engine, &mut forest, kind, superblock.details_root, observer)?
                .into_iter()
                .collect();
        if let Some(id) = details
            .keys()
            .copied()
            .find(|id| roots.binary_search_by_key(id, |r| r.0).is_err())
        {
            let what = format!("device {id} has details but no mapping tree");
            return Err(damaged(TreeKind::TopLevel, superblock.mapping_root, &what));
        }
        let mut devices = BTreeMap::new();
        for (id, root) in roots {
            let Some(&detail) = details.get(&id) else {
                let what = format!("device {id} has a mapping tree but no details");
                return Err(damaged(TreeKind::Details, superblock.details_root, &what));
            };
            devices.insert(id, (MetadataBlock(root), detail));
        }
        Ok(Self {
            pool: PoolInfo {
                uuid: uuid_text(&superblock.uuid),
                time: superblock.time,
                transaction: superblock.transaction_id,
                flags: superblock.flags,
                version: superblock.version,
                data_block_size: superblock.data_block_size,
                nr_data_blocks,
            },
            devices,
        })
    }
}

/// The copy of the superblock that the pool's metadata snapshot holds, in `block` or where the superblock says.
///
/// # Errors
/// `Unsuitable` when the pool has no metadata snapshot, `Damaged` when the block is no superblock, `Io`.
pub fn held_root(
    engine: &dyn BlockEngine,
    superblock: &Superblock,
    block: Option<MetadataBlock>,
) -> Result<Superblock> {
    let block = block.unwrap_or(superblock.held_root);
    if block == SUPERBLOCK {
        return Err(Error::new(
            ErrorKind::Unsuitable,
            "the pool has no metadata snapshot; reserve one: dmsetup message POOL 0 reserve_metadata_snap",
        ));
    }
    Superblock::read_at(engine, block)
        .map_err(|e| e.context("the metadata snapshot cannot be read"))
}

/// What a repair recovered of mapping trees.
#[derive(Debug)]
pub struct Recovered {
    /// The trees, with damaged nodes taken out.
    pub forest: Forest,
    /// Virtual blocks, by leaf and ascending, the mappings of which are left out. Of virtual blocks that such a leaf does not map it is
    /// not known whether they are mapped.
    pub omitted: BTreeMap<MetadataBlock, Vec<u64>>,
}

/// A pool's trees on a device, as a source of events.
pub struct MetadataSource<'a> {
    /// Where the trees are.
    pub engine: &'a dyn BlockEngine,
    /// Which trees.
    pub trees: Trees,
    /// What of them is told.
    pub selection: Selection,
    /// The mapping trees as a repair has recovered them. Mappings that a pool cannot have are then left out instead of told.
    pub recovered: Option<&'a Recovered>,
    /// Asked whether to stop.
    pub observer: &'a dyn Observer,
}

impl std::fmt::Debug for MetadataSource<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MetadataSource")
            .field("trees", &self.trees)
            .finish_non_exhaustive()
    }
}

/// One step of the telling; leaves stand for the mappings in them.
enum Step {
    Define(MetadataBlock),
    EndDefine,
    Device(Device),
    EndDevice(Device, MetadataBlock),
    Reference(MetadataBlock),
    Leaf(MetadataBlock),
}

impl Source for MetadataSource<'_> {
    fn emit(&self, sink: &mut dyn Sink) -> Result<()> {
        let selected = self.selected()?;
        sink.pool(&self.trees.pool)?;
        if self.selection.skip_mappings {
            for (device, _) in selected {
                sink.device(&device)?;
                sink.end_device()?;
            }
            return sink.end();
        }
        let roots: Vec<MetadataBlock> = selected.iter().map(|s| s.1).collect();
        let found;
        let forest = match self.recovered {
            Some(recovered) => &recovered.forest,
            None => {
                found = self.find_leaves(&roots)?;
                &found
            }
        };
        let sharing = Sharing::of(forest, &roots);
        let mut teller = Teller {
            engine: self.engine,
            observer: self.observer,
            pool: &self.trees.pool,
            sink,
            steps: Vec::new(),
            leaves: 0,
            runs: Vec::new(),
            recovered: self.recovered,
            defined: HashMap::new(),
            open: None,
            told: 0,
        };
        let is_shared = |leaf| !self.selection.no_shared && sharing.is_shared(leaf);
        let block = |leaf: usize| forest.nodes()[leaf].block;
        // Definitions stand in order of block, whoever refers to them first.
        let mut heads: Vec<(MetadataBlock, usize)> = (0..forest.nodes().len())
            .filter(|&n| is_shared(n) && sharing.begins_run(n))
            .map(|n| (block(n), n))
            .collect();
        heads.sort_unstable();
        for (head, leaf) in heads {
            teller.step(Step::Define(head))?;
            for leaf in sharing.run(leaf) {
                teller.step(Step::Leaf(block(leaf)))?;
            }
            teller.step(Step::EndDefine)?;
        }
        let total = selected.len() as u64;
        for (done, (device, root)) in (0..).zip(selected) {
            self.observer.progress("devices", done, total);
            teller.step(Step::Device(device))?;
            for leaf in forest
                .number(root)
                .iter()
                .flat_map(|&root| leaves(forest, root))
            {
                if !is_shared(leaf) {
                    teller.step(Step::Leaf(block(leaf)))?;
                } else if sharing.begins_run(leaf) {
                    teller.step(Step::Reference(block(leaf)))?;
                }
            }
            teller.step(Step::EndDevice(device, root))?;
        }
        teller.play()?;
        sink.end()
    }
}

impl MetadataSource<'_> {
    fn selected(&self) -> Result<Vec<(Device, MetadataBlock)>> {
        let wanted = &self.selection.devices;
        if let Some(id) = wanted
            .iter()
            .find(|id| !self.trees.devices.contains_key(&id.0))
        {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!("there is no device {id} in this metadata"),
            ));
        }
        let devices = self.trees.devices.iter();
        let told = devices.filter(|(id, _)| wanted.is_empty() || wanted.contains(&ThinId(**id)));
        Ok(told
            .map(|(&id, &(root, detail))| {
                let device = Device {
                    dev_id: ThinId(id),
                    mapped_blocks: detail.mapped_blocks,
                    transaction: detail.transaction_id,
                    creation_time: detail.creation_time,
                    snap_time: detail.snapshotted_time,
                };
                (device, root)
            })
            .collect())
    }

    /// Reads the inner nodes of the mapping trees.
    fn find_leaves(&self, roots: &[MetadataBlock]) -> Result<Forest> {
        let tree = TreeKind::Mappings;
        let mut forest = Forest::new(self.engine.nr_blocks());
        if let Some(root) = roots.iter().find(|r| r.0 >= forest.nr_blocks()) {
            let what = format!("the root is past the last of {} blocks", forest.nr_blocks());
            return Err(damaged(tree, *root, &what));
        }
        let roots_read = roots.iter().copied();
        forest.walk(
            &Walk {
                engine: self.engine,
                observer: self.observer,
                tree,
                leaves: Leaves::Find,
            },
            roots_read,
            || (),
            |(), _| (),
        )?;
        let structure = Structure::of(&forest, tree, roots);
        match problem_error(&mut forest).or_else(|| structure_error(&structure, tree)) {
            Some(e) => Err(e),
            None => Ok(forest),
        }
    }
}

/// Gathers steps until they have enough leaves to read at once, then plays them to the sink.
struct Teller<'a> {
    engine: &'a dyn BlockEngine,
    observer: &'a dyn Observer,
    pool: &'a PoolInfo,
    sink: &'a mut dyn Sink,
    steps: Vec<Step>,
    leaves: usize,
    /// Runs not told yet: the last one may go on in the next leaf.
    runs: Vec<Run>,
    /// What a repair leaves out, and that mappings past the end of the pool are left out.
    recovered: Option<&'a Recovered>,
    /// Mappings of each definition told.
    defined: HashMap<MetadataBlock, u64>,
    /// The definition that is being told.
    open: Option<MetadataBlock>,
    /// Mappings told of the open definition or device.
    told: u64,
}

impl Teller<'_> {
    fn step(&mut self, step: Step) -> Result<()> {
        self.leaves += usize::from(matches!(step, Step::Leaf(_)));
        self.steps.push(step);
        if self.leaves >= LEAVES_AT_ONCE || self.steps.len() >= 64 * LEAVES_AT_ONCE {
            self.play()?;
        }
        Ok(())
    }

    fn play(&mut self) -> Result<()> {
        self.observer.check_cancelled()?;
        let steps = std::mem::take(&mut self.steps);
        self.leaves = 0;
        let leaves = self.read_leaves(&steps)?;
        for step in steps {
            match step {
                Step::Leaf(block) => {
                    let at = leaves.binary_search_by_key(&block, |l| l.0);
                    let runs = at.map_or(&[][..], |i| &leaves[i].1);
                    match self.recovered {
                        None => {
                            self.judge_runs(block, runs)?;
                            self.add_runs(block, runs)?;
                        }
                        Some(recovered) => {
                            let mut told = within(runs, self.pool.nr_data_blocks);
                            if let Some(keys) = recovered.omitted.get(&block) {
                                told = without(&told, keys);
                            }
                            self.add_runs(block, &told)?;
                        }
                    }
                }
                Step::Define(block) => {
                    (self.open, self.told) = (Some(block), 0);
                    self.sink.define(&block.to_string())?;
                }
                Step::EndDefine => {
                    self.tell_runs(0)?;
                    if let Some(block) = self.open.take() {
                        self.defined.insert(block, self.told);
                    }
                    self.sink.end_define()?;
                }
                Step::Device(device) => {
                    self.told = 0;
                    self.sink.device(&device)?;
                }
                Step::EndDevice(device, root) => {
                    self.tell_runs(0)?;
                    self.judge_told(&device, root)?;
                    self.sink.end_device()?;
                }
                Step::Reference(block) => {
                    self.tell_runs(0)?;
                    self.told += self.defined.get(&block).copied().unwrap_or(0);
                    self.sink.reference(&block.to_string())?;
                }
            }
        }
        self.tell_runs(1)
    }

    /// Tells all runs but the last `keep`.
    fn tell_runs(&mut self, keep: usize) -> Result<()> {
        let told = self.runs.len().saturating_sub(keep);
        if told > 0 {
            self.told += self.runs[..told].iter().map(|r| r.length).sum::<u64>();
            self.sink.mappings(&self.runs[..told])?;
            self.runs.drain(..told);
        }
        Ok(())
    }

    /// Mappings that the pool cannot have are an error: no restore would take them.
    fn judge_runs(&self, block: MetadataBlock, runs: &[Run]) -> Result<()> {
        let PoolInfo {
            time,
            nr_data_blocks,
            ..
        } = *self.pool;
        let past_end = |r: &&Run| {
            r.data_begin.0 >= nr_data_blocks || r.length > nr_data_blocks - r.data_begin.0
        };
        if let Some(run) = runs.iter().find(past_end) {
            let what = format!(
                "virtual block {} is mapped to data block {}, past the last of {nr_data_blocks}",
                run.thin_begin, run.data_begin
            );
            return Err(damaged(TreeKind::Mappings, block, &what));
        }
        if let Some(run) = runs.iter().find(|r| r.time > time) {
            let what = format!(
                "virtual block {} was mapped at time {}, later than the snapshot clock {time}",
                run.thin_begin, run.time
            );
            return Err(damaged(TreeKind::Mappings, block, &what));
        }
        Ok(())
    }

    /// A device told with another number of mappings than its details have is an error: nobody should keep such a dump. A
    /// repair has said before what is missing.
    fn judge_told(&self, device: &Device, root: MetadataBlock) -> Result<()> {
        if self.recovered.is_some() || self.told == device.mapped_blocks {
            return Ok(());
        }
        let what = format!(
            "device {} has {} mappings, its details say {}",
            device.dev_id, self.told, device.mapped_blocks
        );
        Err(damaged(TreeKind::Mappings, root, &what))
    }

    fn add_runs(&mut self, block: MetadataBlock, mut runs: &[Run]) -> Result<()> {
        if let (Some(last), Some(first)) = (self.runs.last_mut(), runs.first()) {
            let end = last.thin_begin.0.saturating_add(last.length - 1);
            if first.thin_begin.0 <= end {
                let what = format!(
                    "its first virtual block {} is not after block {end} in the leaf before",
                    first.thin_begin
                );
                return Err(damaged(TreeKind::Mappings, block, &what));
            }
            if last.continues(first) {
                last.length += first.length;
                runs = &runs[1..];
            }
        }
        self.runs.extend_from_slice(runs);
        Ok(())
    }

    /// The mapping runs of every leaf among the steps, ascending by block.
    fn read_leaves(&self, steps: &[Step]) -> Result<Vec<(MetadataBlock, Vec<Run>)>> {
        let leaf = |step: &Step| match step {
            Step::Leaf(block) => Some(block.0),
            _ => None,
        };
        let mut blocks: Vec<u64> = steps.iter().filter_map(leaf).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let parts = sweep(
            self.engine,
            &blocks,
            &|| self.observer.is_cancelled(),
            Vec::new,
            |leaves, block, data| leaves.push((block, decode_leaf(block, data))),
        );
        self.observer.check_cancelled()?;
        let mut leaves = Vec::with_capacity(blocks.len());
        for (block, runs) in parts.into_iter().flatten() {
            leaves.push((block, runs?));
        }
        leaves.sort_unstable_by_key(|l| l.0);
        Ok(leaves)
    }
}

/// The parts of `runs` that lie below data block `limit`.
fn within(runs: &[Run], limit: u64) -> Vec<Run> {
    let below = runs.iter().filter(|run| run.data_begin.0 < limit);
    below
        .map(|run| Run {
            length: run.length.min(limit - run.data_begin.0),
            ..*run
        })
        .collect()
}

/// `runs` without the mappings of these virtual blocks, which ascend.
fn without(runs: &[Run], keys: &[u64]) -> Vec<Run> {
    let mut left = Vec::with_capacity(runs.len() + keys.len());
    for run in runs {
        let mut rest = *run;
        let first = keys.partition_point(|&k| k < run.thin_begin.0);
        let inside = keys[first..]
            .iter()
            .take_while(|&&k| k - run.thin_begin.0 < run.length);
        for &key in inside {
            let before = key - rest.thin_begin.0;
            if before > 0 {
                left.push(Run {
                    length: before,
                    ..rest
                });
            }
            rest = Run {
                thin_begin: ThinBlock(key + 1),
                data_begin: DataBlock(rest.data_begin.0 + before + 1),
                length: rest.length - before - 1,
                time: rest.time,
            };
        }
        if rest.length > 0 {
            left.push(rest);
        }
    }
    left
}

fn decode_leaf(block: MetadataBlock, data: std::io::Result<&[u8]>) -> Result<Vec<Run>> {
    let tree = TreeKind::Mappings;
    let data = data.map_err(|e| {
        Error::io(
            format!("cannot read metadata block {block} of the {tree}"),
            e,
        )
    })?;
    let node = Node::parse(data, block, tree.value_size())
        .map_err(|f| damaged(tree, block, &f.to_string()))?;
    if !node.is_leaf() {
        return Err(damaged(
            tree,
            block,
            "an inner node stands where its siblings are leaves",
        ));
    }
    let mut runs: Vec<Run> = Vec::with_capacity(node.len());
    for (thin, value) in node.keys().zip(node.values_u64()) {
        let BlockTime { block, time } = BlockTime::unpack(value);
        let next = Run {
            thin_begin: ThinBlock(thin),
            data_begin: DataBlock(block.0),
            length: 1,
            time,
        };
        match runs.last_mut() {
            Some(run) if run.continues(&next) => run.length += 1,
            _ => runs.push(next),
        }
    }
    Ok(runs)
}
