//! What the superblock on the device leads to, read without the cache. Debug builds look at it after every step: whatever happens,
//! a crash now has to find the last commit whole.

use crate::bytes::{get_u32, get_u64};
use crate::error::{Error, Result};
use crate::io::BlockEngine;
use crate::observer::Silent;
use crate::pdata::{
    BITMAP_HEADER, Bitmap, Forest, INDEX_ENTRY_SIZE, IndexEntry, Leaves, Shape, SpaceMapRoot,
    TreeKind, Walk,
};
use crate::thin::{BlockTime, Superblock};
use crate::units::{BLOCK_SIZE, ENTRIES_PER_BITMAP, MetadataBlock};
use std::collections::BTreeMap;

/// Pools with more blocks in use are not looked at, lest every step take longer than the one before.
const FEW: usize = 96;

/// How often something is referred to, by its block; without those that nothing refers to.
type Counts = BTreeMap<u64, u64>;

/// A commit on the device.
#[derive(Debug)]
pub(super) struct Committed {
    /// The blocks that it consists of, with what they hold.
    blocks: Vec<(MetadataBlock, u32)>,
    /// References to data blocks, and what the space map says of them.
    data: (Counts, Counts),
    /// The same of metadata blocks.
    metadata: (Counts, Counts),
}

/// Reads trees, and counts who refers to what.
struct Reading<'a> {
    engine: &'a dyn BlockEngine,
    forest: Forest,
    counts: Counts,
}

impl Reading<'_> {
    fn refer(&mut self, block: MetadataBlock) {
        *self.counts.entry(block.0).or_default() += 1;
    }

    /// Keys and values in the leaves of trees, each leaf once.
    fn walk(
        &mut self,
        tree: TreeKind,
        roots: impl IntoIterator<Item = MetadataBlock>,
    ) -> Result<Vec<(u64, Vec<u8>)>> {
        let roots: Vec<MetadataBlock> = roots.into_iter().filter(|root| root.0 > 0).collect();
        roots.iter().for_each(|&root| self.refer(root));
        let walk = Walk {
            engine: self.engine,
            observer: &Silent,
            tree,
            leaves: Leaves::Read,
        };
        let found = self.forest.walk(&walk, roots, Vec::new, |found, node| {
            found.extend(node.keys().zip(node.values().map(<[u8]>::to_vec)));
        })?;
        Ok(found.into_iter().flatten().collect())
    }

    fn stored(
        &mut self,
        root: SpaceMapRoot,
        many: TreeKind,
        at: &[MetadataBlock],
    ) -> Result<Counts> {
        let mut counts = Counts::new();
        let mut block = vec![0; BLOCK_SIZE];
        for (first, &bitmap) in (0..).step_by(ENTRIES_PER_BITMAP as usize).zip(at) {
            self.refer(bitmap);
            read(self.engine, bitmap, &mut block)?;
            let bitmap = Bitmap::from_block(&block);
            let entries = 0..ENTRIES_PER_BITMAP.min(root.nr_blocks - first);
            let counted = entries.map(|entry| (first + entry, u64::from(bitmap.get(entry))));
            counts.extend(counted.filter(|counted| counted.1 > 0));
        }
        for (block, count) in self.walk(many, [root.ref_count_root])? {
            counts.insert(block, u64::from(get_u32(&count, 0)));
        }
        Ok(counts)
    }
}

impl Committed {
    /// Reads it. None if it is not small, or not sound to begin with.
    pub(super) fn read(engine: &dyn BlockEngine) -> Result<Option<Self>> {
        let superblock = Superblock::read(engine)?;
        let maps = (superblock.data_space_map, superblock.metadata_space_map);
        if maps.1.nr_allocated > FEW as u64 || maps.0.nr_allocated > 16 * FEW as u64 {
            return Ok(None);
        }
        let mut reading = Reading {
            engine,
            forest: Forest::new(engine.nr_blocks()),
            counts: Counts::new(),
        };
        let mut pools = vec![(superblock.mapping_root, superblock.details_root)];
        reading.refer(MetadataBlock(0));
        if superblock.held_root.0 > 0 {
            let held = Superblock::read_at(engine, superblock.held_root)?;
            reading.refer(superblock.held_root);
            pools.push((held.mapping_root, held.details_root));
        }
        reading.walk(TreeKind::Details, pools.iter().map(|roots| roots.1))?;
        let tops = reading.walk(TreeKind::TopLevel, pools.iter().map(|roots| roots.0))?;
        let roots = tops.iter().map(|(_, root)| MetadataBlock(get_u64(root, 0)));
        let mappings = reading.walk(TreeKind::Mappings, roots)?;
        let mut data = Counts::new();
        for (_, value) in mappings {
            let value = BlockTime::unpack(get_u64(&value, 0));
            *data.entry(value.block.0).or_default() += 1;
        }
        let index = reading.walk(TreeKind::DataIndex, [maps.0.bitmap_root])?;
        let at: Vec<_> = index
            .iter()
            .map(|(_, e)| IndexEntry::unpack(e).block)
            .collect();
        let stored_data = reading.stored(maps.0, TreeKind::DataCounts, &at)?;
        reading.refer(maps.1.bitmap_root);
        let mut index = vec![0; BLOCK_SIZE];
        read(engine, maps.1.bitmap_root, &mut index)?;
        let entries = index[BITMAP_HEADER..]
            .chunks_exact(INDEX_ENTRY_SIZE)
            .map(IndexEntry::unpack);
        let at: Vec<_> = entries.map(|e| e.block).take_while(|b| b.0 > 0).collect();
        let stored_metadata = reading.stored(maps.1, TreeKind::MetadataCounts, &at)?;
        let Reading {
            forest, mut counts, ..
        } = reading;
        if !forest.problems.is_empty() {
            return Ok(None);
        }
        for node in forest.nodes() {
            if let Shape::Internal { .. } = node.shape {
                let children = forest
                    .edges(node)
                    .iter()
                    .filter_map(|edge| forest.child(edge));
                children.for_each(|child| *counts.entry(child.0).or_default() += 1);
            }
        }
        let blocks = counts.keys().map(|&block| (MetadataBlock(block), 0));
        let mut this = Self {
            blocks: blocks.collect(),
            data: (data, stored_data),
            metadata: (counts, stored_metadata),
        };
        for (block, held) in &mut this.blocks {
            *held = contents(engine, *block)?;
        }
        Ok(Some(this))
    }

    /// True if it is the one that the device's superblock leads to.
    pub(super) fn is_current(&self, engine: &dyn BlockEngine) -> Result<bool> {
        Ok(self.blocks.first() == Some(&(MetadataBlock(0), contents(engine, MetadataBlock(0))?)))
    }

    /// The first block that was written over.
    pub(super) fn overwritten(&self, engine: &dyn BlockEngine) -> Result<Option<MetadataBlock>> {
        for &(block, held) in &self.blocks {
            if contents(engine, block)? != held {
                return Ok(Some(block));
            }
        }
        Ok(None)
    }

    /// True if it maps this block of the data device.
    pub(super) fn maps(&self, block: u64) -> bool {
        self.data.0.contains_key(&block)
    }

    /// What is counted otherwise than trees refer to it.
    pub(super) fn miscounted(&self) -> Option<String> {
        let differ = |what, found: &Counts, stored: &Counts| {
            let of = |counts: &Counts, block| counts.get(&block).copied().unwrap_or(0);
            let blocks = found.keys().chain(stored.keys());
            let wrong = blocks.copied().find(|&b| of(found, b) != of(stored, b))?;
            let (found, stored) = (of(found, wrong), of(stored, wrong));
            Some(format!(
                "{what} block {wrong}: {found} references, counted {stored}"
            ))
        };
        differ("data", &self.data.0, &self.data.1)
            .or_else(|| differ("metadata", &self.metadata.0, &self.metadata.1))
    }
}

fn read(engine: &dyn BlockEngine, block: MetadataBlock, bytes: &mut [u8]) -> Result<()> {
    let cannot = |e| Error::io(format!("cannot read block {block}"), e);
    engine.read(block, bytes).map_err(cannot)
}

fn contents(engine: &dyn BlockEngine, block: MetadataBlock) -> Result<u32> {
    let mut bytes = vec![0; BLOCK_SIZE];
    read(engine, block, &mut bytes)?;
    Ok(crc32c::crc32c(&bytes))
}
