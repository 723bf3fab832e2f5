//! Space maps that change: how often each metadata block and each data block is referred to.
//!
//! The metadata map counts its own blocks. A count is changed in a bitmap, which may have to be copied first, which allocates and
//! frees; so while one operation runs, those it causes wait in a queue, and what waits counts as if it were done.

use super::block_manager::BlockManager;
use super::block_set::BlockSet;
use super::map_blocks::missing;
use super::transaction::{Pending, Transaction};
use super::validator::Validator;
use super::view::{View, cell};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::forest::TreeKind;
use crate::pdata::space_map::{IndexEntry, SpaceMapRoot, nr_bitmaps};
use crate::units::{ENTRIES_PER_BITMAP, MAX_DATA_BLOCKS, MAX_METADATA_BLOCKS, MetadataBlock};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Which of the two maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    Metadata,
    Data,
}

/// An entry of the index in memory.
#[derive(Clone, Copy, Debug)]
struct Cached {
    entry: IndexEntry,
    is_dirty: bool,
}

/// One space map.
#[derive(Debug)]
pub(super) struct Map {
    pub(super) root: SpaceMapRoot,
    /// All entries of the metadata map's index; those of the data map's that were used since the last commit. But for the last.
    others: BTreeMap<u64, Cached>,
    /// The entry that was remembered last, which is asked for and changed most. What the others have of it is old.
    last: Option<(u64, Cached)>,
    /// Counted at the last commit, and not any more.
    freed: BlockSet,
    /// Not counted at the last commit, but now.
    fresh: BlockSet,
    cursor: u64,
}

/// Index entries kept of a data space map between two commits.
const MOST_CACHED: usize = 4096;

impl Map {
    pub(super) fn new(root: SpaceMapRoot) -> Self {
        Self {
            root,
            others: BTreeMap::new(),
            last: None,
            freed: BlockSet::default(),
            fresh: BlockSet::default(),
            cursor: 0,
        }
    }

    /// The map of a data device.
    pub(super) fn data(root: SpaceMapRoot) -> Result<Self> {
        if root.nr_blocks > MAX_DATA_BLOCKS {
            return Err(Error::new(
                ErrorKind::Damaged,
                format!(
                    "the data space map counts {} blocks, mappings can name {MAX_DATA_BLOCKS}; run thin_check",
                    root.nr_blocks
                ),
            ));
        }
        Self::refuse_overfull("data", root)?;
        Ok(Self::new(root))
    }

    fn refuse_overfull(which: &str, root: SpaceMapRoot) -> Result<()> {
        if root.nr_allocated <= root.nr_blocks {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Damaged,
            format!(
                "the {which} space map has {} of {} blocks in use; run thin_check",
                root.nr_allocated, root.nr_blocks
            ),
        ))
    }

    pub(super) fn metadata(blocks: &BlockManager, root: SpaceMapRoot) -> Result<Self> {
        let index = blocks.read(root.bitmap_root, Validator::Index)?;
        let most = blocks.engine().nr_blocks().min(MAX_METADATA_BLOCKS);
        if root.nr_blocks > most {
            return Err(Error::new(
                ErrorKind::Damaged,
                format!(
                    "the metadata space map counts {} blocks, the device has {most}; run thin_check",
                    root.nr_blocks
                ),
            ));
        }
        Self::refuse_overfull("metadata", root)?;
        let mut map = Self::new(root);
        for number in 0..nr_bitmaps(root.nr_blocks) {
            let at = 2 + 2 * number as usize;
            let words = [index.view().word(at), index.view().word(at + 1), 0];
            map.remember(number, entry_of(number, words)?, false);
        }
        Ok(map)
    }

    fn remember(&mut self, number: u64, entry: IndexEntry, is_dirty: bool) {
        let last = (number, Cached { entry, is_dirty });
        if let Some((old, cached)) = self.last.replace(last)
            && old != number
        {
            self.others.insert(old, cached);
        }
    }

    /// All that are remembered.
    fn index(&mut self) -> &mut BTreeMap<u64, Cached> {
        self.others.extend(self.last.take());
        &mut self.others
    }

    fn recall(&self, number: u64) -> Option<IndexEntry> {
        let cached = match &self.last {
            Some((last, cached)) if *last == number => Some(cached),
            _ => self.others.get(&number),
        };
        cached.map(|cached| cached.entry)
    }

    /// Blocks that were counted at the last commit and are not any more.
    pub(super) fn freed(&self) -> impl Iterator<Item = u64> {
        self.freed.iter()
    }

    pub(super) fn next(&mut self) {
        self.freed.clear();
        self.fresh.clear();
    }
}

pub(super) fn entry_of(number: u64, words: [u64; 3]) -> Result<IndexEntry> {
    let entry = IndexEntry {
        block: MetadataBlock(words[0]),
        nr_free: words[1] as u32,
        none_free_before: (words[1] >> 32) as u32,
    };
    if u64::from(entry.nr_free) > ENTRIES_PER_BITMAP {
        return Err(Error::new(
            ErrorKind::Damaged,
            format!(
                "bitmap {number} has {} of {ENTRIES_PER_BITMAP} blocks free by the index; run thin_check",
                entry.nr_free
            ),
        ));
    }
    Ok(entry)
}

fn empty_bitmap(block: MetadataBlock) -> IndexEntry {
    IndexEntry {
        block,
        nr_free: ENTRIES_PER_BITMAP as u32,
        none_free_before: 0,
    }
}

fn words_of(entry: IndexEntry) -> [u64; 3] {
    let low = u64::from(entry.nr_free) | u64::from(entry.none_free_before) << 32;
    [entry.block.0, low, 0]
}

impl Transaction {
    fn map(&self, which: Which) -> &Map {
        match which {
            Which::Metadata => &self.metadata,
            Which::Data => &self.data,
        }
    }

    /// Where the bitmaps of the metadata map are.
    pub(super) fn metadata_bitmaps(&mut self) -> impl Iterator<Item = MetadataBlock> {
        let index = self.metadata.index();
        index.values().map(|cached| cached.entry.block)
    }

    fn map_mut(&mut self, which: Which) -> &mut Map {
        match which {
            Which::Metadata => &mut self.metadata,
            Which::Data => &mut self.data,
        }
    }

    fn counts_tree(which: Which) -> TreeKind {
        match which {
            Which::Metadata => TreeKind::MetadataCounts,
            Which::Data => TreeKind::DataCounts,
        }
    }

    /// Where a bitmap is.
    fn known_entry(&self, which: Which, number: u64) -> Result<IndexEntry> {
        if let Some(entry) = self.map(which).recall(number) {
            return Ok(entry);
        }
        if which == Which::Metadata {
            return Err(missing(number));
        }
        let root = self.data.root.bitmap_root;
        let found = self.lookup(TreeKind::DataIndex, root, number)?;
        entry_of(number, found.ok_or_else(|| missing(number))?)
    }

    /// The same, remembered.
    fn entry(&mut self, which: Which, number: u64) -> Result<IndexEntry> {
        if let Some(entry) = self.map(which).recall(number) {
            return Ok(entry);
        }
        let entry = self.known_entry(which, number)?;
        if self.data.others.len() >= MOST_CACHED {
            self.data.index().retain(|_, cached| cached.is_dirty);
        }
        self.data.remember(number, entry, false);
        Ok(entry)
    }

    fn refuse_past_end(&self, which: Which, block: u64) -> Result<()> {
        let nr_blocks = self.map(which).root.nr_blocks;
        if block < nr_blocks {
            return Ok(());
        }
        let device = match which {
            Which::Metadata => "metadata",
            Which::Data => "data",
        };
        Err(Error::new(
            ErrorKind::Damaged,
            format!("{device} block {block} is past the last of {nr_blocks}; run thin_check"),
        ))
    }

    /// The count in the map itself, without what waits.
    fn stored(&self, which: Which, block: u64) -> Result<u32> {
        self.refuse_past_end(which, block)?;
        match self.bits(which, block)? {
            3 => {
                let root = self.map(which).root.ref_count_root;
                let found = self.lookup(Self::counts_tree(which), root, block)?;
                let missing = || {
                    Error::new(
                        ErrorKind::Damaged,
                        format!(
                            "block {block} has no large count though its bitmap says so; run thin_check"
                        ),
                    )
                };
                Ok(found.ok_or_else(missing)?[0] as u32)
            }
            few => Ok(few),
        }
    }

    fn bits(&self, which: Which, block: u64) -> Result<u32> {
        let entry = self.known_entry(which, block / ENTRIES_PER_BITMAP)?;
        let bits = |view: View<'_>| view.bits(block % ENTRIES_PER_BITMAP);
        self.blocks.look(entry.block, Validator::Bitmap, bits)
    }

    /// Makes a bitmap one that may be changed.
    fn shadow_bitmap(&mut self, which: Which, number: u64) -> Result<IndexEntry> {
        let mut entry = self.entry(which, number)?;
        if self.is_new(entry.block) {
            return Ok(entry);
        }
        let copy = self.new_metadata_block()?;
        {
            let from = self.blocks.read(entry.block, Validator::Bitmap)?;
            self.blocks
                .write_copy(copy, Validator::Bitmap, from.view())?;
        }
        self.note_new(copy);
        let old = std::mem::replace(&mut entry.block, copy);
        self.map_mut(which).remember(number, entry, true);
        self.decrement_metadata(old.0)?;
        // What was just queued waits, or is about the other map, so the entry is as it was remembered.
        Ok(entry)
    }

    /// Changes a count by one, either way.
    fn change(&mut self, which: Which, block: u64, is_increment: bool) -> Result<()> {
        let old = self.stored(which, block)?;
        self.change_from(which, block, old, is_increment)
    }

    /// The same of a count that is known.
    fn change_from(
        &mut self,
        which: Which,
        block: u64,
        old: u32,
        is_increment: bool,
    ) -> Result<()> {
        let new = match is_increment {
            true => old.checked_add(1),
            false => old.checked_sub(1),
        };
        let new = new.ok_or_else(|| {
            Error::new(
                ErrorKind::Damaged,
                format!("the count of block {block} is {old} and cannot change; run thin_check"),
            )
        })?;
        let number = block / ENTRIES_PER_BITMAP;
        let at = block % ENTRIES_PER_BITMAP;
        if old.min(3) != new.min(3) {
            let mut entry = self.shadow_bitmap(which, number)?;
            let bitmap = self.blocks.write(entry.block, Validator::Bitmap)?;
            bitmap.view().set_bits(at, new.min(3));
            drop(bitmap);
            let map = self.map_mut(which);
            if old == 0 {
                entry.nr_free = entry.nr_free.saturating_sub(1);
                if u64::from(entry.none_free_before) == at {
                    entry.none_free_before += 1;
                }
                map.root.nr_allocated += 1;
                if !map.freed.contains(block) {
                    map.fresh.insert(block);
                }
            } else if new == 0 {
                entry.nr_free += 1;
                entry.none_free_before = entry.none_free_before.min(at as u32);
                map.root.nr_allocated = map.root.nr_allocated.saturating_sub(1);
                if !map.fresh.remove(block) || which == Which::Metadata {
                    map.freed.insert(block);
                }
            }
            map.remember(number, entry, true);
        }
        let kind = Self::counts_tree(which);
        let root = self.map(which).root.ref_count_root;
        let root = match (old, new) {
            (_, 3..) => self.insert(kind, root, block, cell(u64::from(new)))?.root,
            (3.., _) => self.remove(kind, root, block)?.map_or(root, |r| r.root),
            _ => root,
        };
        self.map_mut(which).root.ref_count_root = root;
        Ok(())
    }

    /// Looks for a block that may be handed out, from the cursor on and once around.
    fn find_free(&mut self, which: Which) -> Result<Option<u64>> {
        let (start, end) = (self.map(which).cursor, self.map(which).root.nr_blocks);
        for (from, to) in [(start, end), (0, start.min(end))] {
            let mut at = from;
            while at < to {
                let number = at / ENTRIES_PER_BITMAP;
                let base = number * ENTRIES_PER_BITMAP;
                let entry = self.entry(which, number)?;
                if entry.nr_free > 0 {
                    let first = (at - base).max(u64::from(entry.none_free_before));
                    let map = self.map(which);
                    let is_taken = |bit: u64| {
                        let block = base + bit;
                        map.freed.contains(block)
                            || which == Which::Metadata && self.pending.contains_key(&block)
                    };
                    let free = |view: View<'_>| view.first_free(first, to - base, is_taken);
                    if let Some(bit) = self.blocks.look(entry.block, Validator::Bitmap, free)? {
                        return Ok(Some(base + bit));
                    }
                }
                at = base + ENTRIES_PER_BITMAP;
            }
        }
        Ok(None)
    }

    /// A metadata block that nothing refers to, counted once.
    pub(crate) fn new_metadata_block(&mut self) -> Result<MetadataBlock> {
        let block = self.find_free(Which::Metadata)?.ok_or_else(|| {
            Error::new(ErrorKind::NoSpace, "the metadata device is full; extend it")
        })?;
        if block == 0 {
            return Err(Error::new(
                ErrorKind::Damaged,
                "metadata block 0, the superblock, counts as free; run thin_check",
            ));
        }
        self.metadata.cursor = block + 1;
        self.increment_metadata(block)?;
        let root = self.metadata.root;
        if let Some(low) = &mut self.low_space {
            low.look(root.nr_blocks.saturating_sub(root.nr_allocated));
        }
        Ok(MetadataBlock(block))
    }

    /// A data block that nothing refers to, counted once. None if there is none before the next commit.
    pub(crate) fn new_data_block(&mut self) -> Result<Option<u64>> {
        let block = self.find_free(Which::Data)?;
        if let Some(block) = block {
            self.data.cursor = block + 1;
            self.change_from(Which::Data, block, 0, true)?;
        }
        Ok(block)
    }

    pub(crate) fn increment_data(&mut self, block: u64) -> Result<()> {
        self.change(Which::Data, block, true)
    }

    pub(crate) fn decrement_data(&mut self, block: u64) -> Result<()> {
        self.change(Which::Data, block, false)
    }

    pub(crate) fn data_count(&self, block: u64) -> Result<u32> {
        self.stored(Which::Data, block)
    }

    pub(crate) fn increment_metadata(&mut self, block: u64) -> Result<()> {
        self.note_again(block);
        self.change_metadata(block, true)
    }

    pub(crate) fn decrement_metadata(&mut self, block: u64) -> Result<()> {
        self.change_metadata(block, false)
    }

    fn change_metadata(&mut self, block: u64, is_increment: bool) -> Result<()> {
        self.last_leaf = None;
        if self.depth > 0 {
            self.queue.push_back(Pending {
                block,
                is_increment,
            });
            let sum = self.pending.entry(block).or_default();
            *sum += if is_increment { 1 } else { -1 };
            return Ok(());
        }
        self.depth = 1;
        let mut done = self.change(Which::Metadata, block, is_increment);
        while let (Ok(()), Some(next)) = (&done, self.queue.pop_front()) {
            if let Some(sum) = self.pending.get_mut(&next.block) {
                *sum -= if next.is_increment { 1 } else { -1 };
            }
            done = self.change(Which::Metadata, next.block, next.is_increment);
        }
        self.queue.clear();
        self.pending.clear();
        self.depth = 0;
        done
    }

    /// True if a metadata block is referred to more than once.
    pub(super) fn metadata_count_is_many(&self, block: MetadataBlock) -> Result<bool> {
        self.refuse_past_end(Which::Metadata, block.0)?;
        let bits = self.bits(Which::Metadata, block.0)?;
        // A copy too many does no harm, and the tree of large counts may just be being changed.
        let waiting = self.pending.get(&block.0).copied().unwrap_or(0);
        Ok(bits == 3 || i64::from(bits) + waiting > 1)
    }

    /// Writes what changed of the data map's index into its tree.
    pub(super) fn write_data_index(&mut self) -> Result<()> {
        let index = self.data.index().iter();
        let dirty: Vec<_> = index
            .filter(|(_, cached)| cached.is_dirty)
            .map(|(&number, cached)| (number, cached.entry))
            .collect();
        for (number, entry) in dirty {
            self.data.remember(number, entry, false);
            let root = self.data.root.bitmap_root;
            let inserted = self.insert(TreeKind::DataIndex, root, number, words_of(entry))?;
            self.data.root.bitmap_root = inserted.root;
        }
        Ok(())
    }

    /// Writes the metadata map's index, if it changed, to a new block.
    pub(super) fn write_metadata_index(&mut self) -> Result<()> {
        if !self.metadata.index().values().any(|c| c.is_dirty) {
            return Ok(());
        }
        let old = self.metadata.root.bitmap_root;
        if !self.is_new(old) {
            let copy = self.new_metadata_block()?;
            self.note_new(copy);
            self.decrement_metadata(old.0)?;
            self.metadata.root.bitmap_root = copy;
        }
        let index = self
            .blocks
            .write_zeroed(self.metadata.root.bitmap_root, Validator::Index)?;
        for (&number, cached) in self.metadata.index() {
            let words = words_of(cached.entry);
            index.view().set_word(2 + 2 * number as usize, words[0]);
            index.view().set_word(3 + 2 * number as usize, words[1]);
            cached.is_dirty = false;
        }
        Ok(())
    }

    /// Makes the first bitmaps of the metadata map, in blocks `first..end`; all blocks before `end` count once.
    pub(super) fn begin_maps(&mut self, first: u64, end: u64) -> Result<()> {
        let blocks = Arc::clone(&self.blocks);
        for block in 1..end {
            self.note_new(MetadataBlock(block));
        }
        let counts = blocks.write_zeroed(self.metadata.root.ref_count_root, Validator::Node4)?;
        counts.view().init_node(true, TreeKind::MetadataCounts);
        drop(counts);
        for (number, block) in (first..end).enumerate() {
            drop(blocks.write_zeroed(MetadataBlock(block), Validator::Bitmap)?);
            self.metadata
                .remember(number as u64, empty_bitmap(MetadataBlock(block)), true);
        }
        self.metadata.cursor = end;
        (0..end).try_for_each(|block| self.increment_metadata(block))
    }

    /// Makes the data map count `nr_blocks` blocks, which are more than now.
    pub(crate) fn extend_data(&mut self, nr_blocks: u64) -> Result<()> {
        self.recount_last(Which::Data)?;
        let from = nr_bitmaps(self.data.root.nr_blocks);
        for number in from..nr_bitmaps(nr_blocks) {
            let entry = self.new_bitmap()?;
            self.data.remember(number, entry, true);
            if self.data.others.len() >= MOST_CACHED {
                self.write_data_index()?;
                self.data.index().clear();
            }
        }
        self.data.root.nr_blocks = nr_blocks;
        Ok(())
    }

    /// Counts anew what is free in the last bitmap of a map that is about to grow. Debian's thin_restore leaves out what lies behind
    /// the end of the device: none of that would be found.
    fn recount_last(&mut self, which: Which) -> Result<()> {
        let Some(number) = nr_bitmaps(self.map(which).root.nr_blocks).checked_sub(1) else {
            return Ok(());
        };
        let old = self.entry(which, number)?;
        let bitmap = self.blocks.read(old.block, Validator::Bitmap)?;
        let mut free = (0..ENTRIES_PER_BITMAP).filter(|&at| bitmap.view().bits(at) == 0);
        let first = free.next();
        let entry = IndexEntry {
            none_free_before: first.unwrap_or(ENTRIES_PER_BITMAP) as u32,
            nr_free: (u64::from(first.is_some()) + free.count() as u64) as u32,
            ..old
        };
        drop(bitmap);
        if entry.nr_free != old.nr_free || entry.none_free_before < old.none_free_before {
            self.map_mut(which).remember(number, entry, true);
        }
        Ok(())
    }

    /// A bitmap that counts nothing.
    fn new_bitmap(&mut self) -> Result<IndexEntry> {
        let block = self.new_metadata_block()?;
        drop(self.blocks.write_zeroed(block, Validator::Bitmap)?);
        self.note_new(block);
        Ok(empty_bitmap(block))
    }

    /// Makes the metadata map count `nr_blocks` blocks, which are more than now. The bitmaps of what is new lie in it.
    pub(crate) fn extend_metadata(&mut self, nr_blocks: u64) -> Result<()> {
        self.recount_last(Which::Metadata)?;
        let old = self.metadata.root.nr_blocks;
        let bitmaps = nr_bitmaps(old)..nr_bitmaps(nr_blocks);
        self.metadata.root.nr_blocks = nr_blocks;
        let first = old;
        for (number, block) in bitmaps.clone().zip(first..) {
            drop(
                self.blocks
                    .write_zeroed(MetadataBlock(block), Validator::Bitmap)?,
            );
            self.note_new(MetadataBlock(block));
            self.metadata
                .remember(number, empty_bitmap(MetadataBlock(block)), true);
        }
        let taken = bitmaps.end.saturating_sub(bitmaps.start);
        self.metadata.cursor = first + taken;
        for block in first..first + taken {
            self.increment_metadata(block)?;
        }
        Ok(())
    }
}
