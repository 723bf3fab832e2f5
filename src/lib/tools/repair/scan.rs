//! Reads every block of a damaged device once, in large reads on all cores, and keeps what may help to rebuild it: a few words
//! about each sealed node, the index blocks, superblocks, and how damaged blocks can be mended.

use super::mend::{Mend, explain};
use crate::bytes::{get_u32, is_zeroed};
use crate::checksum::{self, BlockKind};
use crate::error::Result;
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::Node;
use crate::thin::{Fields, MARKER, SUPERBLOCK};
use crate::units::{BLOCK_SIZE, MAGIC, MAX_METADATA_BLOCKS, MAX_THIN_ID, MAX_TIME, MetadataBlock};
use std::collections::{BTreeMap, HashSet};

/// What kind of node a sealed block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// An inner node of any tree; with the block of its first child.
    Inner(u32),
    /// A leaf of 8-byte values all of which could be roots of devices, with keys that could be device ids.
    MaybeTop,
    /// Any other leaf of 8-byte values: mappings.
    Mappings,
    /// A leaf of device details.
    Details,
    /// A leaf of the data space map's index.
    DataIndex,
    /// A leaf of large counts, of either space map.
    Counts,
}

/// A sealed node in its place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sighting {
    block: u32,
    pub(super) class: Class,
    /// The latest time of a leaf's mappings; none for other nodes.
    time: Option<u32>,
}

impl Sighting {
    pub(super) fn block(&self) -> MetadataBlock {
        MetadataBlock(u64::from(self.block))
    }
}

/// A block that may matter.
enum Found {
    Node(Class, Option<u32>),
    Index,
    Bitmap,
    Superblock(Box<Fields>),
}

/// One thread's findings.
#[derive(Default)]
struct Part {
    found: Vec<(MetadataBlock, Found)>,
    mends: Vec<(MetadataBlock, Mend)>,
    /// Blocks sealed for another place: that place, where they lie, and what they hold.
    misplaced: Vec<(MetadataBlock, MetadataBlock, Option<Found>)>,
    suspects: u64,
    unreadable: u64,
}

/// What a whole device holds.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Every sealed node, ascending by block.
    nodes: Vec<Sighting>,
    /// Block 0 is sealed.
    has_superblock: bool,
    /// Superblocks away from block 0: copies that metadata snapshots hold, of any age.
    pub(super) copies: Vec<(MetadataBlock, Fields)>,
    /// Index blocks of metadata space maps, of any age, ascending.
    pub(super) indexes: Vec<MetadataBlock>,
    /// Sealed bitmaps of either space map, of any age, ascending.
    pub(super) bitmaps: Vec<MetadataBlock>,
    /// Blocks that hold what was sealed for another place.
    misplaced: HashSet<MetadataBlock>,
    /// Damaged blocks whose contents can be told.
    pub(super) mends: BTreeMap<MetadataBlock, Mend>,
    /// Blocks that hold something, but nothing sealed for their place.
    pub(super) suspects: u64,
    /// Blocks that cannot be read.
    pub(super) unreadable: u64,
}

impl Scan {
    /// Reads the first `MAX_METADATA_BLOCKS` blocks of `engine`.
    pub(super) fn of(engine: &dyn BlockEngine, observer: &dyn Observer) -> Result<Self> {
        observer.progress("scanning all blocks", 0, 1);
        let blocks: Vec<u64> = (0..engine.nr_blocks().min(MAX_METADATA_BLOCKS)).collect();
        let limit = blocks.len() as u64;
        let stop = || observer.is_cancelled();
        let parts = sweep(
            engine,
            &blocks,
            &stop,
            Part::default,
            |part, block, data| match data {
                Ok(data) => part.look(data, block, limit),
                Err(_) => part.unreadable += 1,
            },
        );
        observer.check_cancelled()?;
        let mut scan = Self::default();
        let mut misplaced = BTreeMap::new();
        for part in parts {
            scan.suspects += part.suspects;
            scan.unreadable += part.unreadable;
            scan.mends.extend(part.mends);
            for (block, found) in part.found {
                scan.add(block, found);
            }
            for (place, at, found) in part.misplaced {
                scan.misplaced.insert(at);
                let several: &mut Vec<_> = misplaced.entry(place).or_default();
                several.push((at, found));
            }
        }
        scan.nodes.sort_unstable_by_key(|n| n.block);
        scan.indexes.sort_unstable();
        scan.bitmaps.sort_unstable();
        scan.copies.sort_unstable_by_key(|c| c.0);
        let mut homeless = Vec::new();
        for (place, mut several) in misplaced {
            if several.len() == 1 && place.0 < limit && !scan.is_sealed(place) {
                homeless.extend(several.pop().map(|(at, found)| (place, at, found)));
            }
        }
        for (place, block, found) in homeless {
            scan.mends.insert(place, Mend::Elsewhere { block });
            if let Some(found) = found {
                scan.add(place, found);
            }
        }
        scan.nodes.sort_unstable_by_key(|n| n.block);
        Ok(scan)
    }

    fn add(&mut self, block: MetadataBlock, found: Found) {
        match found {
            Found::Node(class, time) => self.nodes.push(Sighting {
                block: block.0 as u32,
                class,
                time,
            }),
            Found::Index => self.indexes.push(block),
            Found::Bitmap => self.bitmaps.push(block),
            Found::Superblock(fields) if block != SUPERBLOCK => self.copies.push((block, *fields)),
            Found::Superblock(_) => self.has_superblock = true,
        }
    }

    /// True if what lies at `block` was meant for another place.
    pub(super) fn is_misplaced(&self, block: MetadataBlock) -> bool {
        self.misplaced.contains(&block)
    }

    /// True if something sealed for its place lies at `block`, or can be told.
    pub(super) fn is_sealed(&self, block: MetadataBlock) -> bool {
        block == SUPERBLOCK && self.has_superblock
            || self.class(block).is_some()
            || self.indexes.binary_search(&block).is_ok()
            || self.bitmaps.binary_search(&block).is_ok()
            || self.mends.contains_key(&block)
    }

    /// Every sealed node, ascending by block.
    pub(super) fn nodes(&self) -> &[Sighting] {
        &self.nodes
    }

    /// What the node at `block` is, if one lies there.
    pub(super) fn class(&self, block: MetadataBlock) -> Option<Class> {
        self.sighting(block).map(|n| n.class)
    }

    /// The latest time of the mappings in the leaf at `block`.
    pub(super) fn time(&self, block: MetadataBlock) -> Option<u32> {
        self.sighting(block)?.time
    }

    fn sighting(&self, block: MetadataBlock) -> Option<&Sighting> {
        let found = self
            .nodes
            .binary_search_by(|n| n.block().cmp(&block))
            .ok()?;
        Some(&self.nodes[found])
    }

    /// The kind of leaves below the node at `block`, as far as its eldest descendants tell.
    pub(super) fn leaf_class(&self, block: MetadataBlock) -> Option<Class> {
        let mut class = self.class(block)?;
        // No tree of the format is higher.
        for _ in 0..8 {
            match class {
                Class::Inner(first) => class = self.class(MetadataBlock(u64::from(first)))?,
                leaf => return Some(leaf),
            }
        }
        None
    }
}

impl Part {
    fn look(&mut self, data: &[u8], block: MetadataBlock, limit: u64) {
        let Some(kind) = checksum::identify(data) else {
            if is_zeroed(data) || data.starts_with(MARKER) {
                return;
            }
            let Some(mend) = explain(data, block) else {
                self.suspects += 1;
                return;
            };
            let mut mended = [0; BLOCK_SIZE];
            mended.copy_from_slice(data);
            match mend {
                Mend::Bit { bit } => mended[usize::from(bit / 8)] ^= 1 << (bit % 8),
                _ => mended[super::mend::SECTOR..].fill(0),
            }
            self.mends.push((block, mend));
            if let Some(kind) = checksum::identify(&mended) {
                let found = look(&mended, kind, block, limit);
                self.found.extend(found.map(|f| (block, f)));
            }
            return;
        };
        let place = checksum::claimed_location(data);
        let found = look(data, kind, place, limit);
        // The copy that a metadata snapshot holds, and nothing else, carries its own place.
        if place == block {
            self.found.extend(found.map(|f| (block, f)));
        } else {
            self.suspects += 1;
            self.misplaced.push((place, block, found));
        }
    }
}

fn look(data: &[u8], kind: BlockKind, block: MetadataBlock, limit: u64) -> Option<Found> {
    match kind {
        BlockKind::Bitmap => Some(Found::Bitmap),
        BlockKind::Superblock => {
            let fields = Fields::unpack(data);
            (fields.magic == MAGIC).then(|| Found::Superblock(Box::new(fields)))
        }
        BlockKind::Index => Some(Found::Index),
        BlockKind::Node => {
            let value_size = get_u32(data, 24) as usize;
            if ![4, 8, 16, 24].contains(&value_size) {
                return None;
            }
            let node = Node::parse(data, block, value_size).ok()?;
            let is_mappings = node.is_leaf() && value_size == 8;
            let latest = || node.values_u64().map(|v| v as u32 & MAX_TIME).max();
            let time = is_mappings.then(latest).flatten();
            Some(Found::Node(classify(&node, value_size, limit), time))
        }
    }
}

fn classify(node: &Node<'_>, value_size: usize, limit: u64) -> Class {
    if !node.is_leaf() {
        let first = node.values_u64().next().unwrap_or(0);
        return Class::Inner(u32::try_from(first).unwrap_or(u32::MAX));
    }
    match value_size {
        24 => Class::Details,
        8 => {
            let may_be_top = node.keys().all(|id| id <= MAX_THIN_ID)
                && node.values_u64().all(|root| root > 0 && root < limit);
            match may_be_top {
                true => Class::MaybeTop,
                false => Class::Mappings,
            }
        }
        16 => Class::DataIndex,
        _ => Class::Counts,
    }
}
