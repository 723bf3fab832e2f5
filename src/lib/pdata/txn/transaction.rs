//! The transaction manager: which blocks this transaction may change in place, copies of those it may not, and both space maps.
//!
//! Invariants:
//! 1. No block that the last committed superblock leads to is written before the next commit, but for block 0.
//! 2. A metadata block that was freed in this transaction is not handed out again before the next commit, whoever allocated it: a
//!    lookup that takes no locks may still be on its way through it.
//! 3. What a block points to is counted once for each copy of the block ([`Transaction::shadow`]).

use super::block_manager::{BlockManager, WriteGuard};
use super::block_set::BlockSet;
use super::maps::Map;
use super::open_leaf::OpenLeaf;
use super::validator::Validator;
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::forest::TreeKind;
use crate::pdata::space_map::{SpaceMapRoot, nr_bitmaps};
use crate::units::{MAX_METADATA_BLOCKS, MetadataBlock};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;

/// An operation on counts of metadata blocks that waits for another one to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) block: u64,
    pub(super) is_increment: bool,
}

/// The state of the open transaction.
#[derive(Debug)]
pub struct Transaction {
    pub(super) blocks: Arc<BlockManager>,
    /// Blocks that are new in this transaction.
    shadows: BlockSet,
    /// Those of them that were counted again since they are new.
    again: BlockSet,
    pub(super) metadata: Map,
    pub(super) data: Map,
    /// Where the last insertion went, if its tree was not changed in another way since, nor any count of a metadata block.
    pub(super) last_leaf: Option<OpenLeaf>,
    /// How deep in operations on the metadata map we are; 1 is the outermost.
    pub(super) depth: u32,
    pub(super) queue: VecDeque<Pending>,
    /// The sum of what waits in the queue, by block.
    pub(super) pending: HashMap<u64, i64>,
    /// Who is told that few metadata blocks are left.
    pub(crate) low_space: Option<LowSpace>,
}

/// Tells somebody once when free metadata blocks become few, and again only after they were more.
pub(crate) struct LowSpace {
    pub(crate) threshold: u64,
    pub(crate) was_told: bool,
    pub(crate) tell: Box<dyn FnMut() + Send>,
}

impl fmt::Debug for LowSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LowSpace")
            .field("threshold", &self.threshold)
            .field("was_told", &self.was_told)
            .finish_non_exhaustive()
    }
}

impl LowSpace {
    pub(super) fn look(&mut self, free: u64) {
        let is_low = free <= self.threshold;
        if is_low && !self.was_told {
            (self.tell)();
        }
        self.was_told = is_low;
    }
}

impl Transaction {
    /// The first transaction on metadata whose space maps are at these roots.
    ///
    /// # Errors
    /// `Io`, and `Damaged` when the index of the metadata space map or a root is not sound.
    pub fn open(
        blocks: Arc<BlockManager>,
        metadata: SpaceMapRoot,
        data: SpaceMapRoot,
    ) -> Result<Self> {
        Ok(Self {
            metadata: Map::metadata(&blocks, metadata)?,
            data: Map::data(data)?,
            ..Self::empty(blocks)
        })
    }

    /// A transaction on metadata that is only read, whose space maps may be lost: they are not looked at until somebody asks for a count.
    pub(crate) fn to_read(
        blocks: Arc<BlockManager>,
        metadata: SpaceMapRoot,
        data: SpaceMapRoot,
    ) -> Self {
        Self {
            metadata: Map::new(metadata),
            data: Map::new(data),
            ..Self::empty(blocks)
        }
    }

    /// A transaction on nothing, in which metadata is made.
    pub(super) fn empty(blocks: Arc<BlockManager>) -> Self {
        Self {
            blocks,
            shadows: BlockSet::default(),
            again: BlockSet::default(),
            metadata: Map::new(SpaceMapRoot::default()),
            data: Map::new(SpaceMapRoot::default()),
            last_leaf: None,
            depth: 0,
            queue: VecDeque::new(),
            pending: HashMap::new(),
            low_space: None,
        }
    }

    /// A transaction on a device without metadata, with empty space maps and trees in it: what the kernel makes of a zeroed device.
    /// Returns the roots of the top-level and the details tree, too.
    pub(crate) fn format(
        blocks: Arc<BlockManager>,
    ) -> Result<(Self, MetadataBlock, MetadataBlock)> {
        let nr_blocks = blocks.engine().nr_blocks().min(MAX_METADATA_BLOCKS);
        let mut this = Self::empty(blocks);
        let (index, counts, first_bitmap) = (1, 2, 3);
        let end = first_bitmap + nr_bitmaps(nr_blocks);
        if nr_blocks < end + 4 {
            return Err(Error::new(
                ErrorKind::OutputTooSmall,
                format!(
                    "a metadata device needs {} blocks at least, this has {nr_blocks}",
                    end + 4
                ),
            ));
        }
        this.metadata.root = SpaceMapRoot {
            nr_blocks,
            nr_allocated: 0,
            bitmap_root: MetadataBlock(index),
            ref_count_root: MetadataBlock(counts),
        };
        this.begin_maps(first_bitmap, end)?;
        this.data.root.bitmap_root = this.new_tree(TreeKind::DataIndex)?;
        this.data.root.ref_count_root = this.new_tree(TreeKind::DataCounts)?;
        let mapping_root = this.new_tree(TreeKind::TopLevel)?;
        let details_root = this.new_tree(TreeKind::Details)?;
        Ok((this, mapping_root, details_root))
    }

    /// Where the data space map is.
    pub fn data_map(&self) -> SpaceMapRoot {
        self.data.root
    }

    /// Where the metadata space map is.
    pub fn metadata_map(&self) -> SpaceMapRoot {
        self.metadata.root
    }

    /// True if the block is of this transaction, so that it may be changed in place unless it is shared.
    pub(super) fn is_new(&self, block: MetadataBlock) -> bool {
        self.shadows.contains(block.0)
    }

    /// True if the block, which is new, is certainly counted once only. Asking the map costs more.
    pub(super) fn is_new_once(&self, block: MetadataBlock) -> bool {
        !self.again.contains(block.0)
    }

    /// The block is about to be counted once more.
    pub(super) fn note_again(&mut self, block: u64) {
        if self.shadows.contains(block) {
            self.again.insert(block);
        }
    }

    pub(super) fn note_new(&mut self, block: MetadataBlock) {
        self.shadows.insert(block.0);
    }

    /// An empty node of a new block.
    pub(super) fn new_node<'a>(
        &mut self,
        blocks: &'a BlockManager,
        kind: TreeKind,
        is_leaf: bool,
    ) -> Result<WriteGuard<'a>> {
        let block = self.new_metadata_block()?;
        let node = blocks.write_zeroed(block, Validator::of(kind))?;
        self.note_new(block);
        node.view().init_node(is_leaf, kind);
        Ok(node)
    }

    /// A tree without entries.
    pub(crate) fn new_tree(&mut self, kind: TreeKind) -> Result<MetadataBlock> {
        let blocks = Arc::clone(&self.blocks);
        let node = self.new_node(&blocks, kind, true)?;
        Ok(node.location())
    }

    /// The node at `block`, to be changed: itself if it is new and not shared; else a copy, which takes the place of one reference
    /// to it. The caller stores where the copy is.
    pub(super) fn shadow<'a>(
        &mut self,
        blocks: &'a BlockManager,
        kind: TreeKind,
        block: MetadataBlock,
    ) -> Result<WriteGuard<'a>> {
        if self.is_own(block)? {
            return blocks.write(block, Validator::of(kind));
        }
        let is_shared = self.metadata_count_is_many(block)?;
        let copy = self.new_metadata_block()?;
        let to = {
            let from = blocks.read(block, Validator::of(kind))?;
            blocks.write_copy(copy, Validator::of(kind), from.view())?
        };
        self.note_new(copy);
        self.decrement_metadata(block.0)?;
        if is_shared {
            self.increment_children(kind, &to)?;
        }
        Ok(to)
    }

    /// Counts what a copied node points to once more.
    pub(super) fn increment_children(
        &mut self,
        kind: TreeKind,
        node: &WriteGuard<'_>,
    ) -> Result<()> {
        let view = node.view();
        let points_to_metadata = !view.is_leaf() || kind == TreeKind::TopLevel;
        if points_to_metadata {
            for at in 0..view.len() {
                self.increment_metadata(view.child(at).0)?;
            }
        } else if kind == TreeKind::Mappings {
            for at in 0..view.len() {
                self.increment_data(view.value(at)[0] >> 24)?;
            }
        }
        Ok(())
    }

    /// Takes back the reference that an entry of a leaf holds.
    pub(crate) fn decrement_value(&mut self, kind: TreeKind, value: u64) -> Result<()> {
        match kind {
            TreeKind::Mappings => self.decrement_data(value >> 24),
            TreeKind::TopLevel => self.delete_tree(TreeKind::Mappings, MetadataBlock(value)),
            _ => Ok(()),
        }
    }

    /// Ends the transaction but for the superblock: both space maps are written back, and all blocks are durable.
    ///
    /// # Errors
    /// `Io`, `NoSpace`, `Damaged`.
    pub fn pre_commit(&mut self) -> Result<()> {
        self.write_data_index()?;
        self.write_metadata_index()?;
        self.blocks.flush()
    }

    /// The cache that it works in.
    pub(crate) fn blocks(&self) -> &Arc<BlockManager> {
        &self.blocks
    }

    /// Begins the next transaction, once the superblock is durable.
    pub fn next(&mut self) {
        self.last_leaf = None;
        self.shadows.clear();
        self.again.clear();
        let engine = self.blocks.engine();
        (self.metadata.freed()).for_each(|block| engine.forget(MetadataBlock(block)));
        self.metadata.next();
        self.data.next();
    }
}
