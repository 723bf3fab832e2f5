//! Holds both space maps against themselves and against the references that the trees give.

use super::Checker;
use super::damage::{Code, Damage};
use super::trees::Walked;
use crate::checksum::{self, BlockKind};
use crate::error::Result;
use crate::io::sweep;
use crate::pdata::{
    BITMAP_HEADER, Bitmap, CountMap, Difference, INDEX_ENTRY_SIZE, IndexEntry, OverflowEntry,
    Shape, TreeKind, nr_bitmaps,
};
use crate::thin::{SUPERBLOCK, Superblock};
use crate::tools::held_root;
use crate::units::{ENTRIES_PER_BITMAP, MAX_METADATA_BITMAPS, MetadataBlock};
use std::collections::{BTreeMap, HashMap};

/// Which of the two space maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Data,
    Metadata,
}

impl Which {
    fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Metadata => "metadata",
        }
    }
}

/// Index entries and counts of 3 and more, as they are on disk.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// By number of the bitmap.
    pub(super) entries: BTreeMap<u64, IndexEntry>,
    /// Ascending by block; none if the tree of large counts is damaged, which is on record.
    many: Option<Vec<OverflowEntry>>,
}

/// Both indexes.
#[derive(Debug, Default)]
pub(super) struct Indexes {
    data: Index,
    metadata: Index,
}

impl Indexes {
    /// Data blocks that are worth counting: those for which there are bitmaps. Memory follows what is on disk, not a number
    /// in the superblock.
    pub(super) fn countable_data_blocks(&self, superblock: &Superblock) -> u64 {
        let bitmaps = self.data.entries.len() as u64;
        superblock
            .data_space_map
            .nr_blocks
            .min(bitmaps * ENTRIES_PER_BITMAP)
    }
}

/// One space map after the comparison.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) index: Index,
    pub(super) counts: CountMap,
    /// Bitmaps that hold exactly the right counts already.
    pub(super) right: Vec<u64>,
    /// Blocks in use, as the bitmaps have it.
    pub(super) nr_allocated: u64,
    /// Bitmaps, index or counts must be written anew.
    pub(super) is_wrong: bool,
}

/// Both space maps after the comparison: what a repair in place starts from.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) data: Judged,
    pub(super) metadata: Judged,
    /// Nodes of the trees that a space map consists of.
    pub(super) data_nodes: Vec<MetadataBlock>,
    pub(super) metadata_nodes: Vec<MetadataBlock>,
}

impl Checker<'_> {
    /// Reads the index of both space maps, and their trees of large counts.
    pub(super) fn read_indexes(&mut self) -> Result<Indexes> {
        let maps = (
            self.superblock.data_space_map,
            self.superblock.metadata_space_map,
        );
        let mut by_leaf = HashMap::new();
        let tree = TreeKind::DataIndex;
        let root = self.usable(maps.0.bitmap_root);
        self.walk_small::<IndexEntry>(tree, root, &mut by_leaf)?;
        let mut indexes = Indexes::default();
        for (number, entry, _) in self.entries(tree, root, &by_leaf) {
            indexes.data.entries.insert(number, entry);
        }
        let is_whole = self.is_whole(tree, root);
        let needed = nr_bitmaps(maps.0.nr_blocks);
        self.judge_numbers(&mut indexes.data, needed, maps.0.bitmap_root, is_whole);
        indexes.data.many = self.read_many(TreeKind::DataCounts, maps.0.ref_count_root)?;
        indexes.metadata.entries =
            self.read_metadata_index(maps.1.bitmap_root, maps.1.nr_blocks)?;
        indexes.metadata.many = self.read_many(TreeKind::MetadataCounts, maps.1.ref_count_root)?;
        Ok(indexes)
    }

    fn usable(&self, root: MetadataBlock) -> Option<MetadataBlock> {
        (root.0 > 0 && root.0 < self.forest.nr_blocks()).then_some(root)
    }

    /// The index must have one entry per bitmap, no more and no fewer; of a damaged tree that says nothing new.
    fn judge_numbers(
        &mut self,
        index: &mut Index,
        needed: u64,
        block: MetadataBlock,
        is_whole: bool,
    ) {
        let beyond = index.entries.split_off(&needed).len();
        let has = index.entries.len() as u64;
        if is_whole && (beyond > 0 || has < needed) {
            let message = format!(
                "the data space map needs {needed} bitmaps; {has} are there, and {beyond} too many"
            );
            self.damages
                .push(Damage::new(Code::IndexEntries, block, message));
        }
    }

    fn read_many(
        &mut self,
        tree: TreeKind,
        root: MetadataBlock,
    ) -> Result<Option<Vec<OverflowEntry>>> {
        let mut by_leaf = HashMap::new();
        let root = self.usable(root);
        self.walk_small::<u32>(tree, root, &mut by_leaf)?;
        let mut many: Vec<OverflowEntry> = Vec::new();
        for (block, count, leaf) in self.entries(tree, root, &by_leaf) {
            if count < 3 {
                let message = format!(
                    "{tree}: block {block} has count {count}; only 3 and more belong there"
                );
                self.damages
                    .push(Damage::new(Code::CountTree, leaf, message));
            }
            many.push((block, count));
        }
        many.sort_unstable();
        many.dedup_by_key(|e| e.0);
        Ok(self.is_whole(tree, root).then_some(many))
    }

    fn read_metadata_index(
        &mut self,
        block: MetadataBlock,
        nr_blocks: u64,
    ) -> Result<BTreeMap<u64, IndexEntry>> {
        let mut entries = BTreeMap::new();
        if self.usable(block).is_none() {
            return Ok(entries);
        }
        let mut fault = None;
        let mut read = |data: std::io::Result<&[u8]>| match data {
            Err(e) => fault = Some((Code::ReadError, e.to_string())),
            Ok(data) => match checksum::verify(data, BlockKind::Index, block) {
                Err(f) => fault = Some((Code::IndexBlock, f.to_string())),
                Ok(()) => {
                    let slots = data[BITMAP_HEADER..].chunks_exact(INDEX_ENTRY_SIZE);
                    let needed = nr_bitmaps(nr_blocks).min(MAX_METADATA_BITMAPS);
                    entries.extend((0..needed).zip(slots.map(IndexEntry::unpack)));
                }
            },
        };
        let mut buffer = crate::io::AlignedBuffer::new(1);
        let data = self.engine.read(block, buffer.blocks_mut(1));
        read(data.map(|()| buffer.blocks(1)));
        if let Some((code, message)) = fault {
            let message = format!("metadata space map's index: {message}");
            self.damages.push(Damage::new(code, block, message));
        }
        Ok(entries)
    }

    /// What every metadata block is counted by, if all that refers to blocks was read.
    fn metadata_counts(&self, indexes: &Indexes, walked: &Walked) -> CountMap {
        let nr_blocks = self.forest.nr_blocks();
        let mut counts = CountMap::new(nr_blocks);
        let mut add = |block: MetadataBlock| {
            if block.0 < nr_blocks {
                counts.add(block.0, 1);
            }
        };
        let superblock = &self.superblock;
        add(SUPERBLOCK);
        let maps = [&superblock.data_space_map, &superblock.metadata_space_map];
        maps.into_iter().for_each(|m| {
            add(m.bitmap_root);
            add(m.ref_count_root);
        });
        let mut roots = vec![(superblock.mapping_root, superblock.details_root)];
        if superblock.held_root != SUPERBLOCK {
            add(superblock.held_root);
            let snapshot = held_root(self.engine, superblock, None);
            roots.extend(snapshot.map(|s| (s.mapping_root, s.details_root)));
        }
        for (mapping_root, details_root) in roots {
            add(mapping_root);
            add(details_root);
        }
        walked.device_roots().for_each(&mut add);
        let entries = indexes
            .data
            .entries
            .values()
            .chain(indexes.metadata.entries.values());
        entries.for_each(|e| add(e.block));
        for node in self.forest.nodes() {
            self.forest
                .edges(node)
                .iter()
                .filter_map(|e| self.forest.child(e))
                .for_each(&mut add);
        }
        counts
    }

    /// Reads the bitmaps of one space map and judges each. Counts are compared only when `expected` are given.
    fn judge_bitmaps(
        &mut self,
        which: Which,
        index: &Index,
        expected: Option<&CountMap>,
    ) -> Vec<Sighting> {
        let limit = self.forest.nr_blocks();
        let map = match which {
            Which::Data => self.superblock.data_space_map,
            Which::Metadata => self.superblock.metadata_space_map,
        };
        let mut wanted: Vec<(u64, u64)> = Vec::with_capacity(index.entries.len());
        for (&number, entry) in &index.entries {
            if entry.block.0 == 0 || entry.block.0 >= limit {
                let message = format!(
                    "{} space map: bitmap {number} is past the last of {limit} blocks",
                    which.name()
                );
                self.damages
                    .push(Damage::new(Code::BitmapBlock, entry.block, message));
            } else {
                wanted.push((entry.block.0, number));
            }
        }
        wanted.sort_unstable();
        let mut blocks: Vec<u64> = wanted.iter().map(|w| w.0).collect();
        blocks.dedup();
        let observer = self.observer;
        let judge =
            |seen: &mut Vec<Sighting>, block: MetadataBlock, data: std::io::Result<&[u8]>| {
                let first = wanted.partition_point(|w| w.0 < block.0);
                for &(_, number) in wanted[first..].iter().take_while(|w| w.0 == block.0) {
                    let data = data.as_ref().map(|d| *d).map_err(ToString::to_string);
                    seen.push(judge_bitmap(
                        which,
                        number,
                        index,
                        map.nr_blocks,
                        block,
                        data,
                        expected,
                    ));
                }
            };
        let parts = sweep(
            self.engine,
            &blocks,
            &|| observer.is_cancelled(),
            Vec::new,
            judge,
        );
        let mut seen: Vec<Sighting> = parts.into_iter().flatten().collect();
        seen.sort_unstable_by_key(|s| s.number);
        for sighting in &mut seen {
            self.damages.append(&mut sighting.damages);
        }
        seen
    }

    /// The nodes of space-map trees of these kinds.
    fn nodes_of(&self, kinds: &[TreeKind]) -> Vec<MetadataBlock> {
        let nodes = self.forest.nodes().iter();
        nodes
            .filter(|n| kinds.contains(&n.tree))
            .map(|n| n.block)
            .collect()
    }
}

/// One bitmap, judged.
struct Sighting {
    number: u64,
    /// Blocks in use below the end of the device; none if the bitmap cannot be read.
    allocated: Option<u64>,
    /// It holds exactly the right counts.
    is_right: bool,
    /// It, its index entry or its counts of 3 and more must be written anew.
    is_wrong: bool,
    damages: Vec<Damage>,
}

fn judge_bitmap(
    which: Which,
    number: u64,
    index: &Index,
    nr_blocks: u64,
    block: MetadataBlock,
    data: std::result::Result<&[u8], String>,
    expected: Option<&CountMap>,
) -> Sighting {
    let name = which.name();
    let mut sighting = Sighting {
        number,
        allocated: None,
        is_right: false,
        is_wrong: false,
        damages: Vec::new(),
    };
    let fault = match &data {
        Err(e) => Some((Code::ReadError, e.clone())),
        Ok(data) => checksum::verify(data, BlockKind::Bitmap, block)
            .err()
            .map(|f| (Code::BitmapBlock, f.to_string())),
    };
    let (Ok(data), None) = (data, &fault) else {
        let (code, what) = fault.unwrap_or((Code::BitmapBlock, String::new()));
        let message = format!("{name} space map, bitmap {number}: {what}");
        sighting.damages.push(Damage::new(code, block, message));
        return sighting;
    };
    let bitmap = Bitmap::from_block(data);
    let mut add = |code, message: String| {
        let message = format!("{name} space map, bitmap {number}: {message}");
        sighting.damages.push(Damage::new(code, block, message));
    };
    let entry = index.entries.get(&number).copied().unwrap_or_default();
    let (nr_free, first_free) = (bitmap.nr_free(), bitmap.first_free());
    if entry.nr_free != nr_free {
        add(
            Code::IndexFreeCount,
            format!(
                "the index says {} entries are free, {nr_free} are",
                entry.nr_free
            ),
        );
    }
    if entry.none_free_before > first_free {
        let message = format!(
            "the index says that none is free before entry {}, entry {first_free} is",
            entry.none_free_before
        );
        add(Code::IndexFreeHint, message);
    }
    let base = number * ENTRIES_PER_BITMAP;
    let tail = bitmap.nr_used_from(nr_blocks.saturating_sub(base).min(ENTRIES_PER_BITMAP));
    if tail > 0 {
        add(
            Code::BitmapTail,
            format!("{tail} counts past the last of {nr_blocks} blocks are not zero"),
        );
    }
    let in_range = |many: &[OverflowEntry]| -> Vec<OverflowEntry> {
        let first = many.partition_point(|e| e.0 < base);
        let past = many.partition_point(|e| e.0 < base.saturating_add(ENTRIES_PER_BITMAP));
        many[first..past].to_vec()
    };
    let stored_many = index.many.as_deref().map(in_range);
    let has_pair = |e: &OverflowEntry| bitmap.get(e.0 - base) == 3;
    if let Some(stored_many) = &stored_many {
        let matching = stored_many.iter().filter(|e| has_pair(e)).count();
        if matching != stored_many.len() || matching as u64 != bitmap.nr_many() {
            let message = format!(
                "{} entries say 3 or more, the tree of counts has {} of this bitmap's blocks, {matching} agree",
                bitmap.nr_many(),
                stored_many.len()
            );
            add(Code::CountTree, message);
        }
    }
    if let (Some(expected), Some(stored_many)) = (expected, stored_many) {
        let (words, expected_many) = expected.bitmap(number);
        let differences = bitmap.differences(number, &stored_many, &words, &expected_many);
        sighting.is_right = bitmap.equals(&words) && stored_many == expected_many;
        sighting
            .damages
            .extend(count_damages(which, number, block, &differences));
    }
    sighting.is_wrong = !sighting.damages.is_empty();
    sighting.allocated = Some(ENTRIES_PER_BITMAP - u64::from(nr_free) - tail);
    sighting
}

/// Ranges of differing counts that a message lists.
const SHOWN: usize = 4;

/// At most one leak and one low count per bitmap, with the first few ranges.
fn count_damages(
    which: Which,
    number: u64,
    block: MetadataBlock,
    differences: &[Difference],
) -> impl Iterator<Item = Damage> {
    let name = which.name();
    let (leak, low) = match which {
        Which::Data => (Code::DataLeak, Code::DataCountLow),
        Which::Metadata => (Code::MetadataLeak, Code::MetadataCountLow),
    };
    let (high, under): (Vec<Difference>, Vec<Difference>) =
        differences.iter().partition(|d| d.stored > d.expected);
    let crash = which == Which::Data && high.iter().all(|d| (d.stored, d.expected) == (1, 0));
    [(leak, high, "leaked"), (low, under, "counted too low")]
        .into_iter()
        .filter(|(_, list, _)| !list.is_empty())
        .map(move |(code, list, what)| {
            let total: u64 = list.iter().map(|d| d.length).sum();
            let mut message =
                format!("{name} space map, bitmap {number}: {total} {name} blocks {what}:");
            for (i, d) in list.iter().take(SHOWN).enumerate() {
                let comma = if i > 0 { "," } else { "" };
                let range = match d.length {
                    1 => d.begin.to_string(),
                    n => format!("{}..{}", d.begin, d.begin + n),
                };
                message += &format!(
                    "{comma} {range} (counted {}, used {})",
                    d.stored, d.expected
                );
            }
            if list.len() > SHOWN {
                message += &format!(", and {} more ranges", list.len() - SHOWN);
            }
            if code == Code::DataLeak && crash {
                message += "; a crash of a healthy pool leaves such leaks";
            }
            Damage::new(code, block, message)
        })
}

/// Judges both space maps. Returns the counts only if everything that refers to blocks was read.
pub(super) fn compare(
    checker: &mut Checker<'_>,
    indexes: Indexes,
    walked: &Walked,
    data_counts: CountMap,
) -> Result<Option<Counted>> {
    let is_complete = !checker.damages.iter().any(|d| hides_references(d.code))
        && checker.forest.nodes().iter().all(|n| n.shape != Shape::Bad);
    let metadata_counts = is_complete.then(|| checker.metadata_counts(&indexes, walked));
    checker.observer.progress("space maps", 0, 1);
    let data_seen = checker.judge_bitmaps(
        Which::Data,
        &indexes.data,
        is_complete.then_some(&data_counts),
    );
    let metadata_seen =
        checker.judge_bitmaps(Which::Metadata, &indexes.metadata, metadata_counts.as_ref());
    checker.observer.check_cancelled()?;
    let data_allocated = judge_allocated(checker, Which::Data, &data_seen);
    let metadata_allocated = judge_allocated(checker, Which::Metadata, &metadata_seen);
    let (Some(metadata_counts), Some(data_allocated), Some(metadata_allocated)) =
        (metadata_counts, data_allocated, metadata_allocated)
    else {
        if !is_complete {
            let message =
                "reference counts are not compared: what refers to blocks is damaged in part";
            checker
                .damages
                .push(Damage::new(Code::CountsNotCompared, SUPERBLOCK, message));
        }
        return Ok(None);
    };
    let judged = |index: Index, counts, seen: &[Sighting], nr_allocated| Judged {
        index,
        counts,
        right: seen
            .iter()
            .filter(|s| s.is_right)
            .map(|s| s.number)
            .collect(),
        nr_allocated,
        is_wrong: seen.iter().any(|s| s.is_wrong),
    };
    Ok(Some(Counted {
        data: judged(indexes.data, data_counts, &data_seen, data_allocated),
        metadata: judged(
            indexes.metadata,
            metadata_counts,
            &metadata_seen,
            metadata_allocated,
        ),
        data_nodes: checker.nodes_of(&[TreeKind::DataIndex, TreeKind::DataCounts]),
        metadata_nodes: checker.nodes_of(&[TreeKind::MetadataCounts]),
    }))
}

/// True for damage behind which there may be references that nobody has counted.
fn hides_references(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::ReadError
            | C::SuperblockRoot
            | C::SuperblockIndexRoot
            | C::NodeZeroed
            | C::NodeChecksum
            | C::NodeWrongKind
            | C::NodeLocation
            | C::NodeHeader
            | C::NodeKeyOrder
            | C::NodePointer
            | C::NodeUsedTwice
            | C::TreeKeyRange
            | C::TreeDepth
            | C::TreeCycle
            | C::TreeEmptyLeaf
            | C::SnapshotBlock
            | C::IndexBlock
            | C::IndexEntries
    )
}

/// Holds the superblock's number of blocks in use against the bitmaps'. None when a bitmap is missing.
fn judge_allocated(checker: &mut Checker<'_>, which: Which, seen: &[Sighting]) -> Option<u64> {
    let map = match which {
        Which::Data => checker.superblock.data_space_map,
        Which::Metadata => checker.superblock.metadata_space_map,
    };
    if seen.len() as u64 != nr_bitmaps(map.nr_blocks) {
        return None;
    }
    let allocated: u64 = seen.iter().map(|s| s.allocated).sum::<Option<u64>>()?;
    if allocated != map.nr_allocated {
        let name = which.name();
        let message = format!(
            "{name} space map: the superblock says {} blocks are in use, {allocated} are",
            map.nr_allocated
        );
        checker
            .damages
            .push(Damage::new(Code::SpaceMapAllocated, SUPERBLOCK, message));
    }
    Some(allocated)
}
