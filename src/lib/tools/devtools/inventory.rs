//! Which blocks of whole metadata are in use, and what each of them is; and what freed blocks still hold.

use super::super::metadata_source::{
    problem_error, read_small_tree, structure_error, walk_inner_nodes,
};
use crate::bytes::get_u32;
use crate::checksum::{self, BlockKind};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{
    BITMAP_HEADER, Bitmap, Forest, INDEX_ENTRY_SIZE, IndexEntry, Node, Shape, TreeKind, nr_bitmaps,
};
use crate::thin::{DeviceDetail, Fields, SUPERBLOCK, Superblock, read_block};
use crate::units::{ENTRIES_PER_BITMAP, MetadataBlock};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// What a block in use is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Block 0.
    Superblock,
    /// The root of the top-level tree, leaf or not.
    TopLevelRoot,
    /// Any other node of the top-level tree.
    TopLevel,
    /// A node of the device details tree.
    Details,
    /// An inner node of a mapping tree.
    Inner,
    /// A leaf of a mapping tree.
    Leaf,
    /// The index block of the metadata space map.
    MetadataIndex,
    /// A bitmap of the metadata space map.
    MetadataBitmap,
    /// A node of the tree of large metadata counts.
    MetadataCounts,
    /// A node of the index tree of the data space map.
    DataIndex,
    /// A bitmap of the data space map.
    DataBitmap,
    /// A node of the tree of large data counts.
    DataCounts,
    /// A block that only the metadata snapshot leads to.
    Held,
}

impl Kind {
    /// All of them, with their names.
    pub const ALL: [(Self, &'static str); 13] = [
        (Self::Superblock, "superblock"),
        (Self::TopLevelRoot, "top-level-root"),
        (Self::TopLevel, "top-level"),
        (Self::Details, "details"),
        (Self::Inner, "inner"),
        (Self::Leaf, "leaf"),
        (Self::MetadataIndex, "metadata-index"),
        (Self::MetadataBitmap, "metadata-bitmap"),
        (Self::MetadataCounts, "metadata-counts"),
        (Self::DataIndex, "data-index"),
        (Self::DataBitmap, "data-bitmap"),
        (Self::DataCounts, "data-counts"),
        (Self::Held, "held"),
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(kind, _)| kind == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

/// Blocks that damage may be aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Any block in use.
    Any,
    /// Blocks of this kind.
    Of(Kind),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Of(kind) => kind.fmt(f),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "any" {
            return Ok(Self::Any);
        }
        let found = Kind::ALL.iter().find(|(_, name)| *name == text);
        found.map(|&(kind, _)| Self::Of(kind)).ok_or_else(|| {
            let names: Vec<&str> = Kind::ALL.iter().map(|(_, name)| *name).collect();
            format!(
                "'{text}' is no kind of block; there are any, {}",
                names.join(", ")
            )
        })
    }
}

/// The blocks in use of metadata that is whole.
#[derive(Debug)]
pub struct Inventory {
    /// The superblock.
    pub superblock: Fields,
    /// Blocks and what they are, ascending.
    blocks: BTreeMap<MetadataBlock, Kind>,
    /// The metadata space map.
    bitmaps: Vec<Bitmap>,
}

impl Inventory {
    /// Finds everything that the superblock leads to.
    ///
    /// # Errors
    /// `Damaged` when any of it is; `Io`, `Interrupted`.
    pub fn read(engine: &dyn BlockEngine, observer: &dyn Observer) -> Result<Self> {
        let superblock = Superblock::read(engine)?;
        let mut blocks = BTreeMap::from([(SUPERBLOCK, Kind::Superblock)]);
        let mut forest = Forest::new(engine.nr_blocks());
        let top = superblock.mapping_root;
        read_trees(engine, &mut forest, &superblock, observer)?;
        let data = superblock.data_space_map;
        let (tree, root) = (TreeKind::DataIndex, data.bitmap_root);
        let index = read_small_tree::<IndexEntry>(engine, &mut forest, tree, root, observer)?;
        let (tree, root) = (TreeKind::DataCounts, data.ref_count_root);
        read_small_tree::<u32>(engine, &mut forest, tree, root, observer)?;
        let (tree, root) = (
            TreeKind::MetadataCounts,
            superblock.metadata_space_map.ref_count_root,
        );
        read_small_tree::<u32>(engine, &mut forest, tree, root, observer)?;
        for node in forest.nodes() {
            let kind = match (node.tree, node.shape) {
                (TreeKind::TopLevel, _) if node.block == top => Kind::TopLevelRoot,
                (TreeKind::TopLevel, _) => Kind::TopLevel,
                (TreeKind::Details, _) => Kind::Details,
                (TreeKind::Mappings, Shape::Internal { .. }) => Kind::Inner,
                (TreeKind::Mappings, _) => Kind::Leaf,
                (TreeKind::DataIndex, _) => Kind::DataIndex,
                (TreeKind::DataCounts, _) => Kind::DataCounts,
                (TreeKind::MetadataCounts, _) => Kind::MetadataCounts,
            };
            blocks.insert(node.block, kind);
        }
        for (_, entry) in index {
            blocks.insert(entry.block, Kind::DataBitmap);
        }
        let map = superblock.metadata_space_map;
        blocks.insert(map.bitmap_root, Kind::MetadataIndex);
        let index = read_sealed(engine, map.bitmap_root, BlockKind::Index)?;
        let mut bitmaps = Vec::new();
        let entries = index[BITMAP_HEADER..].chunks_exact(INDEX_ENTRY_SIZE);
        for bytes in entries.take(nr_bitmaps(map.nr_blocks) as usize) {
            let IndexEntry { block, .. } = IndexEntry::unpack(bytes);
            let bitmap = read_sealed(engine, block, BlockKind::Bitmap)?;
            bitmaps.push(Bitmap::from_block(&bitmap));
            blocks.insert(block, Kind::MetadataBitmap);
        }
        if superblock.held_root != SUPERBLOCK {
            let held = Superblock::read_at(engine, superblock.held_root)?;
            let mut forest = Forest::new(engine.nr_blocks());
            read_trees(engine, &mut forest, &held, observer)?;
            for node in forest.nodes() {
                blocks.entry(node.block).or_insert(Kind::Held);
            }
            blocks.insert(superblock.held_root, Kind::Held);
        }
        Ok(Self {
            superblock: *superblock,
            blocks,
            bitmaps,
        })
    }

    /// What a block is; none if it is not in use.
    pub fn kind(&self, block: MetadataBlock) -> Option<Kind> {
        self.blocks.get(&block).copied()
    }

    /// The blocks that `target` stands for, ascending.
    pub fn of(&self, target: Target) -> Vec<MetadataBlock> {
        let wanted = |kind| match target {
            Target::Any => true,
            Target::Of(wanted) => kind == wanted,
        };
        let found = self.blocks.iter().filter(|&(_, &kind)| wanted(kind));
        found.map(|(&block, _)| block).collect()
    }

    /// How many blocks there are of each kind.
    pub fn counts(&self) -> BTreeMap<Kind, usize> {
        let mut counts: BTreeMap<Kind, usize> =
            Kind::ALL.into_iter().map(|(kind, _)| (kind, 0)).collect();
        for kind in self.blocks.values() {
            *counts.entry(*kind).or_default() += 1;
        }
        counts
    }

    /// Blocks without a reference that hold a block sealed for their place, ascending.
    pub(super) fn freed(
        &self,
        engine: &dyn BlockEngine,
        observer: &dyn Observer,
    ) -> Result<Vec<Freed>> {
        let limit = self
            .superblock
            .metadata_space_map
            .nr_blocks
            .min(engine.nr_blocks());
        let is_free = |block: &u64| {
            let bitmap = self.bitmaps.get((block / ENTRIES_PER_BITMAP) as usize);
            bitmap.is_some_and(|b| b.get(block % ENTRIES_PER_BITMAP) == 0)
                && !self.blocks.contains_key(&MetadataBlock(*block))
        };
        let free: Vec<u64> = (1..limit).filter(is_free).collect();
        let stop = || observer.is_cancelled();
        let parts = sweep(engine, &free, &stop, Vec::new, |found, block, data| {
            // What cannot be read has nothing to offer.
            if let Ok(data) = data
                && let Some(kind) = checksum::identify(data)
                && checksum::claimed_location(data) == block
            {
                let node = NodeFacts::of(data, block, limit);
                if kind != BlockKind::Node || node.is_some() {
                    found.push(Freed { block, kind, node });
                }
            }
        });
        observer.check_cancelled()?;
        let mut freed = parts.concat();
        freed.sort_unstable_by_key(|f| f.block);
        Ok(freed)
    }
}

/// A freed block that still holds what was written last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Freed {
    /// Where.
    pub(super) block: MetadataBlock,
    /// What its seal says.
    pub(super) kind: BlockKind,
    /// More about a node.
    pub(super) node: Option<NodeFacts>,
}

/// What tells nodes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeFacts {
    /// Leaf or inner node.
    pub(super) is_leaf: bool,
    /// Bytes of a value.
    pub(super) value_size: usize,
    /// Every value could be a metadata block, as those of the top-level tree are.
    pub(super) has_pointers: bool,
    /// Smallest and largest key; none when empty.
    pub(super) keys: Option<(u64, u64)>,
}

impl NodeFacts {
    /// Of a block that is a node of any tree of a pool with `limit` metadata blocks.
    pub(super) fn of(data: &[u8], block: MetadataBlock, limit: u64) -> Option<Self> {
        let value_size = get_u32(data, 24) as usize;
        let is_known = TreeKind::ALL.iter().any(|t| t.value_size() == value_size);
        let node = is_known.then(|| Node::parse(data, block, value_size).ok())??;
        let has_pointers = value_size == 8 && node.values_u64().all(|value| value < limit);
        Some(Self {
            is_leaf: node.is_leaf(),
            value_size,
            has_pointers,
            keys: node.keys().next().zip(node.keys().last()),
        })
    }

    /// True when both could belong to the same tree, at the same height or nearly so.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (self.is_leaf, self.value_size, self.has_pointers)
            == (other.is_leaf, other.value_size, other.has_pointers)
    }

    /// How many keys lie in the ranges of both.
    pub(super) fn overlap(&self, other: &Self) -> u64 {
        let (Some(a), Some(b)) = (self.keys, other.keys) else {
            return 0;
        };
        let (first, last) = (a.0.max(b.0), a.1.min(b.1));
        last.checked_sub(first).map_or(0, |n| n.saturating_add(1))
    }
}

/// Reads the top-level tree, the details and the inner nodes of all mapping trees into `forest`.
pub(super) fn read_trees(
    engine: &dyn BlockEngine,
    forest: &mut Forest,
    superblock: &Superblock,
    observer: &dyn Observer,
) -> Result<BTreeMap<u64, MetadataBlock>> {
    let (tree, root) = (TreeKind::TopLevel, superblock.mapping_root);
    let devices = read_small_tree::<u64>(engine, forest, tree, root, observer)?;
    let (tree, root) = (TreeKind::Details, superblock.details_root);
    read_small_tree::<DeviceDetail>(engine, forest, tree, root, observer)?;
    let structure = walk_inner_nodes(engine, forest, &devices, observer)?;
    let problem = problem_error(forest);
    match problem.or_else(|| structure_error(&structure, TreeKind::Mappings)) {
        Some(e) => Err(e),
        None => Ok((devices.into_iter())
            .map(|(id, root)| (id, MetadataBlock(root)))
            .collect()),
    }
}

/// A block that must be of `kind`.
fn read_sealed(engine: &dyn BlockEngine, block: MetadataBlock, kind: BlockKind) -> Result<Vec<u8>> {
    let buffer = read_block(engine, block)?;
    checksum::verify(buffer.blocks(1), kind, block).map_err(|fault| {
        Error::new(
            ErrorKind::Damaged,
            format!("the {kind} in block {block} cannot be used: {fault}; give whole metadata"),
        )
    })?;
    Ok(buffer.blocks(1).to_vec())
}
