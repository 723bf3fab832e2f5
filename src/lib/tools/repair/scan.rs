//! Reads every block of a damaged device once and keeps what may help: candidates for roots, and readable space maps.

use crate::bytes::get_u32;
use crate::checksum::{self, BlockKind};
use crate::error::Result;
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{BITMAP_HEADER, Bitmap, INDEX_ENTRY_SIZE, IndexEntry, Node};
use crate::thin::Fields;
use crate::units::{ENTRIES_PER_BITMAP, MAGIC, MAX_METADATA_BLOCKS, MAX_THIN_ID, MetadataBlock};
use std::collections::{HashMap, HashSet};

/// A sealed block that may matter.
enum Found {
    /// A leaf that may be one of the top-level tree: device ids to blocks of the device.
    Top(Vec<(u64, u64)>),
    /// A leaf of device details.
    Details,
    /// An inner node with its children.
    Inner(Vec<u64>),
    /// Any other node: a root of a mapping tree looks like this.
    OtherNode,
    /// The metadata space map's index.
    Index(Vec<IndexEntry>),
    /// A superblock, or the copy of a metadata snapshot.
    Superblock(Box<Fields>),
}

/// What a whole device holds.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Blocks that may be roots of a top-level tree.
    pub(super) tops: Vec<MetadataBlock>,
    /// Blocks that may be roots of a details tree.
    pub(super) details: Vec<MetadataBlock>,
    /// Superblocks away from block 0.
    pub(super) copies: Vec<(MetadataBlock, Fields)>,
    /// Index blocks of metadata space maps, of any age.
    indexes: Vec<(MetadataBlock, Vec<IndexEntry>)>,
}

impl Scan {
    /// Reads the first `MAX_METADATA_BLOCKS` blocks of `engine`.
    pub(super) fn of(engine: &dyn BlockEngine, observer: &dyn Observer) -> Result<Self> {
        let blocks: Vec<u64> = (0..engine.nr_blocks().min(MAX_METADATA_BLOCKS)).collect();
        let limit = blocks.len() as u64;
        let parts = sweep(
            engine,
            &blocks,
            &|| observer.is_cancelled(),
            Vec::new,
            |found, block, data| {
                if let Some(kind) = data.ok().and_then(|data| look(data, block, limit)) {
                    found.push((block, kind));
                }
            },
        );
        observer.check_cancelled()?;
        let mut scan = Self::default();
        let mut nodes = HashSet::new();
        let mut top_leaves = Vec::new();
        let mut inner = HashMap::new();
        for (block, found) in parts.into_iter().flatten() {
            match found {
                Found::Index(entries) => scan.indexes.push((block, entries)),
                Found::Superblock(fields) if block.0 > 0 => scan.copies.push((block, *fields)),
                Found::Superblock(_) => {}
                node => {
                    nodes.insert(block.0);
                    match node {
                        Found::Top(entries) => top_leaves.push((block, entries)),
                        Found::Details => scan.details.push(block),
                        Found::Inner(children) => {
                            inner.insert(block, children);
                        }
                        _ => {}
                    }
                }
            }
        }
        // A device or two may have lost its root.
        let is_top = |entries: &[(u64, u64)]| {
            entries
                .iter()
                .filter(|(_, root)| nodes.contains(root))
                .count()
                * 2
                >= entries.len()
        };
        top_leaves.retain(|(_, entries)| is_top(entries));
        scan.tops = top_leaves.into_iter().map(|(block, _)| block).collect();
        add_inner(&mut scan.tops, &inner);
        add_inner(&mut scan.details, &inner);
        scan.indexes.sort_unstable_by_key(|i| i.0);
        Ok(scan)
    }

    /// The space maps that can be read whole, by place: that of `known` (from a superblock), or all that account for themselves.
    pub(super) fn space_maps(
        &self,
        engine: &dyn BlockEngine,
        known: Option<MetadataBlock>,
    ) -> Vec<Liveness> {
        let known_first = self.indexes.iter().filter(|i| Some(i.0) == known);
        let maps: Vec<Liveness> = known_first
            .filter_map(|i| Liveness::read(engine, i))
            .collect();
        if !maps.is_empty() {
            return maps;
        }
        self.indexes
            .iter()
            .filter_map(|i| Liveness::read(engine, i))
            .collect()
    }
}

/// Adds the inner nodes all of whose children are among `level`, level by level.
fn add_inner(level: &mut Vec<MetadataBlock>, inner: &HashMap<MetadataBlock, Vec<u64>>) {
    let mut all: HashSet<u64> = level.iter().map(|b| b.0).collect();
    loop {
        let more: Vec<MetadataBlock> = inner
            .iter()
            .filter(|(block, children)| {
                !all.contains(&block.0) && children.iter().all(|c| all.contains(c))
            })
            .map(|(block, _)| *block)
            .collect();
        if more.is_empty() {
            level.sort_unstable();
            return;
        }
        all.extend(more.iter().map(|b| b.0));
        level.extend(more);
    }
}

fn look(data: &[u8], block: MetadataBlock, limit: u64) -> Option<Found> {
    let kind = checksum::identify(data)?;
    match kind {
        _ if checksum::claimed_location(data) != block => None,
        BlockKind::Bitmap => None,
        BlockKind::Superblock => {
            let fields = Fields::unpack(data);
            (fields.magic == MAGIC).then(|| Found::Superblock(Box::new(fields)))
        }
        BlockKind::Index => {
            let slots = data[BITMAP_HEADER..]
                .chunks_exact(INDEX_ENTRY_SIZE)
                .map(IndexEntry::unpack);
            Some(Found::Index(
                slots
                    .take_while(|e| e.block.0 != 0 && e.block.0 < limit)
                    .collect(),
            ))
        }
        BlockKind::Node => {
            let value_size = get_u32(data, 24) as usize;
            if ![4, 8, 16, 24].contains(&value_size) {
                return None;
            }
            let node = Node::parse(data, block, value_size).ok()?;
            Some(look_at_node(&node, value_size, limit))
        }
    }
}

fn look_at_node(node: &Node<'_>, value_size: usize, limit: u64) -> Found {
    if !node.is_leaf() {
        return Found::Inner(node.values_u64().collect());
    }
    match value_size {
        24 => Found::Details,
        8 => {
            let may_be_top = node.keys().all(|id| id <= MAX_THIN_ID)
                && node.values_u64().all(|root| root > 0 && root < limit);
            if may_be_top {
                Found::Top(node.keys().zip(node.values_u64()).collect())
            } else {
                Found::OtherNode
            }
        }
        _ => Found::OtherNode,
    }
}

/// Which metadata blocks a space map on disk says are in use.
#[derive(Debug)]
pub(super) struct Liveness {
    /// Its index block.
    pub(super) index: MetadataBlock,
    bitmaps: Vec<Bitmap>,
}

impl Liveness {
    /// Reads the bitmaps of an index; none unless all are whole and the map counts its own blocks as used.
    fn read(
        engine: &dyn BlockEngine,
        (block, entries): &(MetadataBlock, Vec<IndexEntry>),
    ) -> Option<Self> {
        let mut bitmaps = Vec::with_capacity(entries.len());
        for entry in entries {
            let data = crate::thin::read_block(engine, entry.block).ok()?;
            checksum::verify(data.blocks(1), BlockKind::Bitmap, entry.block).ok()?;
            bitmaps.push(Bitmap::from_block(data.blocks(1)));
        }
        let map = Self {
            index: *block,
            bitmaps,
        };
        let own = entries.iter().map(|e| e.block).chain([*block]);
        own.into_iter().all(|b| map.is_used(b)).then_some(map)
    }

    /// True when the space map says that `block` is in use.
    pub(super) fn is_used(&self, block: MetadataBlock) -> bool {
        let bitmap = self.bitmaps.get((block.0 / ENTRIES_PER_BITMAP) as usize);
        bitmap.is_some_and(|b| b.get(block.0 % ENTRIES_PER_BITMAP) > 0)
    }
}
