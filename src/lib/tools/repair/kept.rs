//! What a repair in place leaves where it is: whole trees, with every reference in them counted; and beside them all that the
//! old superblock leads to, so that a crash leaves the old state as it was.
//!
//! Invariant: a [`Kept`] that exists was read whole, so its counts are exact.

use crate::checksum::{self, BlockKind};
use crate::error::Result;
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{
    BITMAP_HEADER, Bitmap, CountBatch, CountMap, Forest, INDEX_ENTRY_SIZE, IndexEntry, Leaves,
    Node, Structure, StructureFault, TreeKind, Value, Walk, nr_bitmaps,
};
use crate::thin::{DeviceDetail, Superblock, read_block};
use crate::tools::metadata_source::{damaged, problem_error, read_small_tree, structure_error};
use crate::units::{MAX_TIME, MetadataBlock};
use std::collections::{BTreeMap, HashMap};

/// A device of the top-level tree, as its mapping tree has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeptDevice {
    /// Its id.
    pub(super) id: u64,
    /// The root of its mapping tree.
    pub(super) root: MetadataBlock,
    /// Mappings in it.
    pub(super) mapped_blocks: u64,
}

/// Trees that stay, counted.
#[derive(Debug)]
pub(super) struct Kept {
    forest: Forest,
    /// Pointers to nodes from outside of the forest's trees.
    pointers: Vec<MetadataBlock>,
    /// The devices of the top-level tree.
    pub(super) devices: Vec<KeptDevice>,
    /// References to data blocks.
    pub(super) data: CountMap,
    /// The latest time of any mapping.
    pub(super) time: u32,
}

impl Kept {
    /// Reads the top-level tree at `root` and all mapping trees, and those of a metadata snapshot with its details, and counts the
    /// data blocks in them.
    ///
    /// # Errors
    /// `Damaged` when a node is not whole or a mapping leads past `nr_data_blocks`, `Io`, `Interrupted`.
    pub(super) fn read(
        engine: &dyn BlockEngine,
        root: MetadataBlock,
        snapshot: Option<(MetadataBlock, Superblock)>,
        nr_data_blocks: u64,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let mut forest = Forest::new(engine.nr_blocks());
        let top = |forest: &mut Forest, root| {
            read_small_tree::<u64>(engine, forest, TreeKind::TopLevel, root, observer)
        };
        let mut entries = top(&mut forest, root)?;
        let current = entries.len();
        let mut pointers = vec![root];
        if let Some((block, snapshot)) = snapshot {
            // A leaf that both trees share is read, and counted, once.
            entries.extend(top(&mut forest, snapshot.mapping_root)?);
            let (kind, details) = (TreeKind::Details, snapshot.details_root);
            read_small_tree::<DeviceDetail>(engine, &mut forest, kind, details, observer)?;
            pointers.extend([block, snapshot.mapping_root, details]);
        }
        if let Some((id, block)) = entries
            .iter()
            .find(|d| d.1 == 0 || d.1 >= forest.nr_blocks())
        {
            let what =
                format!("the mapping tree of device {id} would have its root in block {block}");
            return Err(damaged(TreeKind::TopLevel, root, &what));
        }
        let trees: Vec<MetadataBlock> = entries.iter().map(|d| MetadataBlock(d.1)).collect();
        let mut kept = Self {
            forest,
            devices: Vec::new(),
            data: CountMap::new(nr_data_blocks),
            time: 0,
            pointers,
        };
        let structure = kept.read_mappings(engine, &trees, observer)?;
        for &(id, root) in &entries[..current] {
            let root = MetadataBlock(root);
            let summary = structure.summary(&kept.forest, root).unwrap_or_default();
            kept.devices.push(KeptDevice {
                id,
                root,
                mapped_blocks: summary.entries,
            });
        }
        kept.pointers.extend(trees);
        Ok(kept)
    }

    /// Reads all mapping trees and counts the data blocks in them.
    fn read_mappings(
        &mut self,
        engine: &dyn BlockEngine,
        roots: &[MetadataBlock],
        observer: &dyn Observer,
    ) -> Result<Structure> {
        let tree = TreeKind::Mappings;
        let counts = &self.data;
        observer.progress("counting", 0, 1);
        let counters = self.forest.walk(
            &Walk {
                engine,
                observer,
                tree,
                leaves: Leaves::Read,
            },
            roots.iter().copied(),
            || Counter::new(counts),
            |counter, node| counter.see(counts, node),
        )?;
        let structure = Structure::of(&self.forest, tree, roots);
        if let Some(e) =
            problem_error(&mut self.forest).or_else(|| structure_error(&structure, tree))
        {
            return Err(e);
        }
        for mut counter in counters {
            counter.batch.flush(counts);
            self.time = self.time.max(counter.time);
            if let Some((leaf, block)) = counter.past_end {
                let limit = counts.nr_blocks();
                let what = format!("a mapping to data block {block}, past the last of {limit}");
                return Err(damaged(tree, leaf, &what));
            }
        }
        Ok(structure)
    }

    /// Keeps the details tree at `root` too.
    ///
    /// # Errors
    /// `Damaged` when a node of it is not whole, or part of another tree; `Io`, `Interrupted`.
    pub(super) fn keep_details(
        &mut self,
        engine: &dyn BlockEngine,
        root: MetadataBlock,
        observer: &dyn Observer,
    ) -> Result<()> {
        let kind = TreeKind::Details;
        read_small_tree::<DeviceDetail>(engine, &mut self.forest, kind, root, observer)?;
        self.pointers.push(root);
        Ok(())
    }

    /// Counts the references to every block of the kept trees: those from outside, and those between nodes.
    pub(super) fn count_metadata(&self) -> CountMap {
        let mut counts = CountMap::new(self.forest.nr_blocks());
        let edges = self
            .forest
            .nodes()
            .iter()
            .flat_map(|n| self.forest.edges(n));
        let children = edges.filter_map(|e| self.forest.child(e));
        for block in self.pointers.iter().copied().chain(children) {
            counts.add(block.0, 1);
        }
        counts
    }
}

/// One thread's view of the leaves of mapping trees.
struct Counter {
    batch: CountBatch,
    /// A leaf with a mapping past the last data block, and the block it leads to.
    past_end: Option<(MetadataBlock, u64)>,
    time: u32,
}

impl Counter {
    fn new(counts: &CountMap) -> Self {
        Self {
            batch: CountBatch::new(counts),
            past_end: None,
            time: 0,
        }
    }

    fn see(&mut self, counts: &CountMap, node: &Node<'_>) {
        for value in node.values_u64() {
            self.batch.add(counts, value >> 24);
            self.time = self.time.max(value as u32 & MAX_TIME);
            if value >> 24 >= counts.nr_blocks() {
                self.past_end = Some((node.location(), value >> 24));
            }
        }
    }
}

/// The entries of a details tree as far as it can be read, and whether that is all of it.
pub(super) fn read_details(
    engine: &dyn BlockEngine,
    root: MetadataBlock,
    observer: &dyn Observer,
) -> Result<(BTreeMap<u64, DeviceDetail>, bool)> {
    let mut forest = Forest::new(engine.nr_blocks());
    let tree = TreeKind::Details;
    let entries = walk_old(engine, &mut forest, tree, &[root], observer)?;
    let structure = Structure::of(&forest, tree, &[root]);
    let mut faults = structure.faults.iter().map(|f| f.1);
    let is_whole = !forest.nodes().is_empty()
        && forest.problems.is_empty()
        && faults.all(|f| matches!(f, StructureFault::UnderFull { .. }));
    Ok((entries.into_iter().collect(), is_whole))
}

/// What an old superblock leads to beside the trees that are kept.
#[derive(Debug, Default)]
pub(super) struct Old {
    /// Blocks, whole or not.
    pub(super) blocks: Vec<MetadataBlock>,
    /// The bitmaps of the data space map, by number.
    bitmaps: BTreeMap<u64, MetadataBlock>,
}

impl Old {
    /// Follows the superblock to its details, its space maps and its metadata snapshot, as far as they can be read.
    pub(super) fn read(
        engine: &dyn BlockEngine,
        superblock: &Superblock,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let mut forest = Forest::new(engine.nr_blocks());
        let (data, metadata) = (superblock.data_space_map, superblock.metadata_space_map);
        let mut details = vec![superblock.details_root];
        let mut blocks = vec![superblock.held_root, metadata.bitmap_root];
        if let Some((_, snapshot)) = snapshot(engine, superblock) {
            let kind = TreeKind::TopLevel;
            let top = [snapshot.mapping_root];
            let devices: Vec<(u64, u64)> = walk_old(engine, &mut forest, kind, &top, observer)?;
            let roots: Vec<_> = devices.iter().map(|d| MetadataBlock(d.1)).collect();
            find_mappings(engine, &mut forest, &roots, observer)?;
            details.push(snapshot.details_root);
            blocks.extend(top);
            blocks.extend(roots);
        }
        walk_old::<DeviceDetail>(engine, &mut forest, TreeKind::Details, &details, observer)?;
        let trees = [
            (TreeKind::DataCounts, data.ref_count_root),
            (TreeKind::MetadataCounts, metadata.ref_count_root),
        ];
        for (kind, root) in trees {
            walk_old::<u32>(engine, &mut forest, kind, &[root], observer)?;
        }
        let kind = TreeKind::DataIndex;
        let root = [data.bitmap_root];
        let index: Vec<(u64, IndexEntry)> = walk_old(engine, &mut forest, kind, &root, observer)?;
        let bitmaps: BTreeMap<_, _> = index.into_iter().map(|(n, e)| (n, e.block)).collect();
        blocks.extend(metadata_bitmaps(engine, superblock));
        blocks.extend(bitmaps.values());
        blocks.extend(forest.nodes().iter().map(|n| n.block));
        blocks.retain(|b| b.0 > 0 && b.0 < forest.nr_blocks());
        Ok(Self { blocks, bitmaps })
    }

    /// The bitmaps of the data space map that hold what `data` counts and lie where `metadata` counts nothing, by number.
    pub(super) fn right_bitmaps(
        &self,
        engine: &dyn BlockEngine,
        data: &CountMap,
        metadata: &CountMap,
        observer: &dyn Observer,
    ) -> Result<HashMap<u64, MetadataBlock>> {
        let needed = nr_bitmaps(data.nr_blocks());
        let limit = metadata.nr_blocks();
        let is_usable = |block: u64| block > 0 && block < limit && metadata.get(block) == 0;
        let mut numbers = BTreeMap::new();
        for (&number, block) in self.bitmaps.range(..needed) {
            if is_usable(block.0) {
                numbers.entry(block.0).or_insert(number);
            }
        }
        let blocks: Vec<u64> = numbers.keys().copied().collect();
        let parts = sweep(
            engine,
            &blocks,
            &|| observer.is_cancelled(),
            Vec::new,
            |right, block, contents| {
                let Ok(contents) = contents else { return };
                let number = numbers[&block.0];
                if checksum::verify(contents, BlockKind::Bitmap, block).is_ok()
                    && Bitmap::from_block(contents).equals(&data.bitmap(number).0)
                {
                    right.push((number, block));
                }
            },
        );
        observer.check_cancelled()?;
        Ok(parts.into_iter().flatten().collect())
    }
}

/// The metadata snapshot of a pool, if it has one that can be read.
pub(super) fn snapshot(
    engine: &dyn BlockEngine,
    superblock: &Superblock,
) -> Option<(MetadataBlock, Superblock)> {
    let block = superblock.held_root;
    let is_there = block.0 > 0 && block.0 < engine.nr_blocks();
    let snapshot = is_there.then(|| Superblock::read_at(engine, block))?;
    Some((block, snapshot.ok()?))
}

/// Reads those of `roots` that lie on the device, whatever is damaged in them. Returns the entries of the leaves.
fn walk_old<V: Value + Send>(
    engine: &dyn BlockEngine,
    forest: &mut Forest,
    tree: TreeKind,
    roots: &[MetadataBlock],
    observer: &dyn Observer,
) -> Result<Vec<(u64, V)>> {
    let on_device = on_device(forest, roots);
    let parts = forest.walk(
        &Walk {
            engine,
            observer,
            tree,
            leaves: Leaves::Read,
        },
        on_device,
        Vec::new,
        |entries, node| entries.extend(node.keys().zip(node.values().map(V::unpack))),
    )?;
    Ok(parts.concat())
}

/// Puts the nodes of mapping trees on record, without reading the leaves.
fn find_mappings(
    engine: &dyn BlockEngine,
    forest: &mut Forest,
    roots: &[MetadataBlock],
    observer: &dyn Observer,
) -> Result<()> {
    let walk = Walk {
        engine,
        observer,
        tree: TreeKind::Mappings,
        leaves: Leaves::Find,
    };
    let on_device = on_device(forest, roots);
    forest.walk(&walk, on_device, || (), |(), _| ())?;
    Ok(())
}

fn on_device(forest: &Forest, roots: &[MetadataBlock]) -> Vec<MetadataBlock> {
    let limit = forest.nr_blocks();
    let roots = roots.iter().copied();
    roots.filter(|r| r.0 > 0 && r.0 < limit).collect()
}

/// Where the bitmaps of the old metadata space map are; nothing if its index cannot be read.
fn metadata_bitmaps(engine: &dyn BlockEngine, superblock: &Superblock) -> Vec<MetadataBlock> {
    let map = superblock.metadata_space_map;
    let on_device = map.bitmap_root.0 < engine.nr_blocks();
    let index = on_device.then(|| read_block(engine, map.bitmap_root));
    let Some(Ok(index)) = index else {
        return Vec::new();
    };
    let index = index.blocks(1);
    if checksum::verify(index, BlockKind::Index, map.bitmap_root).is_err() {
        return Vec::new();
    }
    let slots = index[BITMAP_HEADER..].chunks_exact(INDEX_ENTRY_SIZE);
    slots.map(|slot| IndexEntry::unpack(slot).block).collect()
}
