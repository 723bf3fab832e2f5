//! A pool of which inner nodes, the top-level tree or the superblock are lost, to be read where it lies: nothing is written to the
//! device.
//!
//! What a repair finds out stands in a temporary file in front of the device: block 0; top-level tree and details, behind the last
//! block; the blocks that could be mended; and the nodes that the repair put together of what it found, in the place of those that were
//! lost. Everything else is read on the device itself.
//!
//! A repair leaves out what it does not know, which then reads as zeros. Here that stays an error for whoever reads it:
//! 1. Where a lost node may have had other children than those that were found, a pointer to a block that does not exist.
//! 2. Nodes that the repair does not believe, though they are sealed, are blocks of zeros.
//! 3. Of a leaf of which it does not believe everything, the rest of its mappings is left, with nothing but errors between them.

use super::{Options, Recovery, RepairReport, recover};
use crate::checksum::BlockKind;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine, StagedEngine};
use crate::observer::Observer;
use crate::pdata::{
    BlockSink, CountMap, Forest, MetadataWriter, Node, NodeProblem, Shape, SharedTree,
    SpaceMapRoot, TreeBuilder, TreeKind, Value, inner_node, max_entries,
};
use crate::thin::{DeviceDetail, Fields, SUPERBLOCK, Superblock, read_block};
use crate::tools::metadata_source::{
    problem_error, read_small_tree, structure_error, walk_inner_nodes,
};
use crate::tools::restorer::uuid_bytes;
use crate::units::{BLOCK_SIZE, MAX_METADATA_BLOCKS, MetadataBlock};
use std::collections::{BTreeSet, HashSet};
use std::io;
use std::sync::Arc;

/// A pool that can be read.
#[expect(missing_debug_implementations, reason = "an engine has none")]
pub struct Rescue {
    /// The metadata as it should be, as far as it is known.
    pub engine: Arc<dyn BlockEngine>,
    /// What was chosen and what is lost.
    pub report: RepairReport,
}

/// Makes sure that all that leads to leaves of mappings is there. Reads the top-level tree and the inner nodes of all devices, and of
/// the leaves one below each of the lowest of these; other leaves may be lost.
///
/// # Errors
/// `Damaged` when something is lost that [`rescue`] may find the children of; `Interrupted`.
pub fn refuse_lost_nodes(engine: &dyn BlockEngine, observer: &dyn Observer) -> Result<()> {
    let mut forest = Forest::new(engine.nr_blocks());
    let top = Superblock::read(engine)?.mapping_root;
    let devices = read_small_tree::<u64>(engine, &mut forest, TreeKind::TopLevel, top, observer)?;
    let structure = walk_inner_nodes(engine, &mut forest, &devices, observer)?;
    let height = |block| structure.summary(&forest, block).and_then(|s| s.height);
    let lowest = forest.nodes().iter().filter(|n| height(n.block) == Some(1));
    let lowest: HashSet<MetadataBlock> = lowest.map(|n| n.block).collect();
    let edges = lowest.iter().filter_map(|&block| forest.number(block));
    let edges = edges.flat_map(|n| forest.edges(&forest.nodes()[n]));
    let leaves: HashSet<MetadataBlock> = edges.filter_map(|e| forest.child(e)).collect();
    forest.problems.retain(|(block, _, problem)| match problem {
        NodeProblem::Pointers { .. } => !lowest.contains(block),
        _ => !leaves.contains(block),
    });
    let problem = problem_error(&mut forest);
    match problem.or_else(|| structure_error(&structure, TreeKind::Mappings)) {
        Some(e) => Err(e.with_kind(ErrorKind::Damaged)),
        None => Ok(()),
    }
}

/// Finds the devices of a pool and what belongs to them, and makes what leads to it.
///
/// # Errors
/// `Damaged` when no top-level tree can be found, or the data block size is neither known nor given; `OutputTooSmall` when the format
/// has no room for more blocks; `Io`.
pub fn rescue(
    engine: Arc<dyn BlockEngine>,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Rescue> {
    let recovery = recover(&*engine, options, observer)?;
    let on_device = engine.nr_blocks();
    let forest = &recovery.recovered.forest;
    // Behind the last block there is as much as the format can have; the file has only what is written.
    let more = MAX_METADATA_BLOCKS.saturating_sub(on_device);
    let staged = StagedEngine::longer(Arc::clone(&engine), more).map_err(no_room)?;
    let mut block = AlignedBuffer::new(1);
    for &mended in recovery.engine.mends.keys() {
        let read = recovery.engine.read(mended, block.blocks_mut(1));
        read.map_err(|e| Error::io(format!("cannot read block {mended}"), e))?;
        staged.write(mended, block.blocks(1)).map_err(no_room)?;
    }
    // Nodes that a repair made up have numbers behind the last block already.
    let mut counts = CountMap::new(on_device.max(MAX_METADATA_BLOCKS));
    (0..forest.nr_blocks().max(on_device)).for_each(|block| counts.add(block, 1));
    let mut nodes = Nodes {
        staged: &staged,
        writer: MetadataWriter::new(Some(&staged), counts),
        nowhere: MetadataBlock(staged.nr_blocks()),
    };
    let fields = nodes.write(&recovery).map_err(|e| match e.kind() {
        ErrorKind::OutputTooSmall => Error::new(
            ErrorKind::OutputTooSmall,
            "there is no room for new nodes behind the last block; thin_repair -i DEV -o NEWDEV recovers what is whole",
        ),
        _ => e,
    })?;
    block.blocks_mut(1).copy_from_slice(&fields.pack());
    staged.write(SUPERBLOCK, block.blocks(1)).map_err(no_room)?;
    let report = recovery.report;
    Ok(Rescue {
        engine: Arc::new(staged),
        report,
    })
}

fn no_room(e: io::Error) -> Error {
    Error::io(
        "cannot write to a temporary file; set TMPDIR to a folder with room",
        e,
    )
}

/// What stands in front of the device.
struct Nodes<'a> {
    staged: &'a dyn BlockEngine,
    writer: MetadataWriter<'a>,
    /// A block that does not exist.
    nowhere: MetadataBlock,
}

impl Nodes<'_> {
    /// Writes everything but block 0, and returns what that should hold.
    fn write(&mut self, recovery: &Recovery<'_>) -> Result<Fields> {
        let forest = &recovery.recovered.forest;
        // What points past the end of the device would find what is written there.
        let past_end = forest.problems.iter();
        let past_end = past_end.filter(|p| matches!(p.2, NodeProblem::Pointers { .. }));
        let past_end: BTreeSet<MetadataBlock> = past_end.map(|p| p.0).collect();
        for &block in forest.changed().union(&past_end) {
            self.node(forest, block)?;
        }
        for (&leaf, keys) in &recovery.recovered.omitted {
            let data = read_block(&recovery.engine, leaf)?;
            if let Ok(node) = Node::parse(data.blocks(1), leaf, TreeKind::Mappings.value_size()) {
                self.rest(&node, keys)?;
            }
        }
        let devices = recovery.trees.devices.iter();
        let lost = recovery.lost.iter();
        // What a repair does not know of is not the device's.
        let is_known = |root: &MetadataBlock| root.0 > 0 && forest.number(*root).is_some();
        let root = |root| Some(root).filter(is_known).unwrap_or(self.nowhere);
        let mut roots: Vec<(u64, u64)> = devices
            .clone()
            .map(|(&id, device)| (id, root(device.0).0))
            .collect();
        roots.extend(lost.clone().map(|(&id, _)| (id, self.nowhere.0)));
        roots.sort_unstable();
        let mut details: Vec<(u64, DeviceDetail)> =
            devices.map(|(&id, &(_, detail))| (id, detail)).collect();
        details.extend(lost.map(|(&id, &detail)| (id, detail)));
        details.sort_unstable_by_key(|d| d.0);
        let pool = &recovery.trees.pool;
        let known = recovery.superblock.map(|superblock| *superblock);
        let known = known.unwrap_or_else(|| Fields::fresh(recovery.engine.nr_blocks()));
        let fields = Fields {
            uuid: uuid_bytes(&pool.uuid),
            mapping_root: self.tree(roots)?,
            details_root: self.tree(details)?,
            time: pool.time,
            transaction_id: pool.transaction,
            data_block_size: pool.data_block_size,
            data_space_map: SpaceMapRoot {
                nr_blocks: pool.nr_data_blocks,
                ..known.data_space_map
            },
            ..known
        };
        self.writer.flush()?;
        Ok(fields)
    }

    fn tree<V: Value>(&mut self, entries: Vec<(u64, V)>) -> Result<MetadataBlock> {
        let mut none = SharedTree::default();
        let mut tree = TreeBuilder::<V>::new();
        for (key, value) in entries {
            tree.push(&mut self.writer, &mut none, key, value)?;
        }
        Ok(tree.finish(&mut self.writer, &mut none)?.root)
    }

    /// Puts the node of a forest in its place.
    fn node(&mut self, forest: &Forest, block: MetadataBlock) -> Result<()> {
        let Some(number) = forest.number(block) else {
            return Ok(());
        };
        let node = &forest.nodes()[number];
        match node.shape {
            Shape::Internal { .. } => {
                let edges = forest.edges(node).iter();
                let edges = edges.map(|e| (e.key, forest.child(e).unwrap_or(self.nowhere)));
                self.inner(block, edges.collect())
            }
            _ => self.staged.write(block, &[0; BLOCK_SIZE]).map_err(no_room),
        }
    }

    /// Writes an inner node to `block`, with others below it if it has more children than fit.
    fn inner(
        &mut self,
        block: MetadataBlock,
        mut children: Vec<(u64, MetadataBlock)>,
    ) -> Result<()> {
        const MAX: usize = max_entries(8);
        while children.len() > MAX {
            let mut parents = Vec::new();
            for few in children.chunks(MAX) {
                let parent = self.writer.allocate()?;
                self.writer
                    .write(parent, BlockKind::Node, &inner_node(few.iter().copied()))?;
                parents.push((few[0].0, parent));
            }
            children = parents;
        }
        self.writer
            .write(block, BlockKind::Node, &inner_node(children))
    }

    /// Puts, in the place of a leaf, an inner node that leads to its mappings but those with these keys, and nowhere else.
    fn rest(&mut self, leaf: &Node<'_>, left_out: &[u64]) -> Result<()> {
        let mappings = leaf.keys().zip(leaf.values_u64());
        let kept: Vec<(u64, u64)> = mappings
            .filter(|m| left_out.binary_search(&m.0).is_err())
            .collect();
        let mut children = Vec::new();
        let mut end = Some(0);
        for run in kept.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0)) {
            let (first, last) = (run[0].0, run[run.len() - 1].0);
            children.extend(
                end.filter(|&end| end < first)
                    .map(|end| (end, self.nowhere)),
            );
            children.push((first, self.tree(run.to_vec())?));
            end = last.checked_add(1);
        }
        children.extend(end.map(|end| (end, self.nowhere)));
        self.inner(leaf.location(), children)
    }
}
