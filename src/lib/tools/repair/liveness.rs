//! What a metadata space map on disk says of each metadata block, as far as it can be read and believed.
//!
//! A bitmap is believed only if it is sealed, has as many free entries as the index says, and counts the map's own blocks.

use crate::checksum::{self, BlockKind};
use crate::error::Result;
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{BITMAP_HEADER, Bitmap, INDEX_ENTRY_SIZE, IndexEntry, TreeKind};
use crate::thin::read_block;
use crate::tools::repair::small::SmallTrees;
use crate::units::{ENTRIES_PER_BITMAP, MetadataBlock};
use std::collections::BTreeMap;

/// The counts of a metadata space map.
#[derive(Debug)]
pub(super) struct Liveness {
    /// Its index block.
    pub(super) index: MetadataBlock,
    /// Where the bitmaps are.
    pub(super) blocks: Vec<MetadataBlock>,
    bitmaps: Vec<Option<Bitmap>>,
    /// Exact counts of 3 and more; none if their tree cannot be read.
    many: Option<BTreeMap<u64, u32>>,
}

impl Liveness {
    /// Reads an index and its bitmaps. Counts of 3 and more are not known yet. None if the index is damaged, not a single
    /// bitmap can be believed, or one that can denies the map's own blocks.
    pub(super) fn read(engine: &dyn BlockEngine, index: MetadataBlock) -> Option<Self> {
        let data = read_block(engine, index).ok()?;
        checksum::verify(data.blocks(1), BlockKind::Index, index).ok()?;
        let slots = data.blocks(1)[BITMAP_HEADER..].chunks_exact(INDEX_ENTRY_SIZE);
        let entries = slots.map(IndexEntry::unpack);
        let entries: Vec<IndexEntry> = entries.take_while(|e| e.block.0 != 0).collect();
        let bitmaps = entries.iter().map(|entry| {
            let data = read_block(engine, entry.block).ok()?;
            checksum::verify(data.blocks(1), BlockKind::Bitmap, entry.block).ok()?;
            let bitmap = Bitmap::from_block(data.blocks(1));
            (bitmap.nr_free() == entry.nr_free).then_some(bitmap)
        });
        let map = Self {
            index,
            blocks: entries.iter().map(|e| e.block).collect(),
            bitmaps: bitmaps.collect(),
            many: None,
        };
        let own = || map.blocks.iter().chain([&map.index]);
        let is_sound = own().all(|&block| map.is_used(block) != Some(false));
        (is_sound && map.bitmaps.iter().any(Option::is_some)).then_some(map)
    }

    /// The only one of `bitmaps` that has itself and all of `used` in use, of a device that needs no more than one bitmap: the
    /// space map, when its index is lost.
    pub(super) fn of_only_bitmap(
        engine: &dyn BlockEngine,
        bitmaps: &[MetadataBlock],
        used: &[MetadataBlock],
    ) -> Option<Self> {
        if engine.nr_blocks() > ENTRIES_PER_BITMAP {
            return None;
        }
        let mut fitting = bitmaps.iter().filter_map(|&block| {
            let bitmap = Bitmap::from_block(read_block(engine, block).ok()?.blocks(1));
            let map = Self {
                index: block,
                blocks: vec![block],
                bitmaps: vec![Some(bitmap)],
                many: None,
            };
            let is_used = |b: &MetadataBlock| map.is_used(*b) == Some(true);
            // A bitmap of the data space map may have them in use as well, but others past the end of this device too.
            let tail = map.bitmaps[0]
                .as_ref()
                .map_or(0, |b| b.nr_used_from(engine.nr_blocks()));
            (tail == 0 && is_used(&block) && used.iter().all(is_used)).then_some(map)
        });
        match (fitting.next(), fitting.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        }
    }

    /// Reads the counts of 3 and more.
    pub(super) fn read_many(
        &mut self,
        engine: &dyn BlockEngine,
        root: MetadataBlock,
        observer: &dyn Observer,
    ) -> Result<()> {
        let trees = SmallTrees::<u32>::read(engine, TreeKind::MetadataCounts, &[root], observer)?;
        let tree = trees.tree(root);
        self.many = tree.damaged.is_empty().then_some(tree.entries);
        Ok(())
    }

    fn bits(&self, block: MetadataBlock) -> Option<u32> {
        let bitmap = self.bitmaps.get((block.0 / ENTRIES_PER_BITMAP) as usize)?;
        Some(bitmap.as_ref()?.get(block.0 % ENTRIES_PER_BITMAP))
    }

    /// Whether `block` is in use; none if that is not known.
    pub(super) fn is_used(&self, block: MetadataBlock) -> Option<bool> {
        self.bits(block).map(|bits| bits > 0)
    }

    /// How often `block` is referred to; none if that is not known exactly.
    pub(super) fn count(&self, block: MetadataBlock) -> Option<u32> {
        match self.bits(block)? {
            3 => self.many.as_ref()?.get(&block.0).copied(),
            few => Some(few),
        }
    }
}
