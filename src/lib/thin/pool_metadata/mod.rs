//! The metadata of a pool, to be changed: what the kernel's dm-thin-metadata does, under its names.
//!
//! Every change is part of a transaction that [`PoolMetadata::commit`] ends and [`PoolMetadata::abort`] undoes. Nothing that the
//! last commit wrote is overwritten but the superblock, so whatever happens in between, the device holds the last transaction or
//! the next. An operation that fails leaves its transaction in part done: abort it.
//!
//! Facts: `FORMAT.md`; the order of a commit is nodes, flush, superblock, flush.

mod commit;
mod devices;
mod mappings;
mod metadata_snap;
mod resize;

use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::pdata::txn::{BlockManager, CacheUse, Cell, LowSpace, Transaction};
use crate::thin::DeviceDetail;
use crate::thin::superblock::{Fields, SUPERBLOCK, Superblock, SuperblockFault};
use crate::units::{
    DataBlock, MAX_METADATA_BLOCKS, MetadataBlock, ThinId, is_legal_data_block_size,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of metadata cached by default: 64 MiB.
pub const DEFAULT_CACHE: usize = 64 << 20;
/// Blocks that the kernel keeps back for commits, at most.
const MOST_RESERVE: u64 = 4096;
/// Free metadata blocks at which a pool is called low, at most.
const MOST_THRESHOLD: u64 = 1024;

/// A device's state in memory.
#[derive(Clone, Copy, Debug)]
struct Thin {
    detail: DeviceDetail,
    is_changed: bool,
}

/// Where a virtual block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The data block.
    pub block: DataBlock,
    /// A snapshot was taken since it was mapped, so that another device may have it, too.
    pub is_shared: bool,
}

/// Numbers that the kernel's status line has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PoolStatus {
    /// The transaction id of whoever manages the pool.
    pub transaction_id: u64,
    /// Metadata blocks in use, those included that are kept back for commits.
    pub used_metadata_blocks: u64,
    /// Metadata blocks.
    pub metadata_blocks: u64,
    /// Data blocks in use.
    pub used_data_blocks: u64,
    /// Data blocks.
    pub data_blocks: u64,
    /// Block of the metadata snapshot.
    pub held_root: Option<MetadataBlock>,
    /// Sectors of 512 bytes in a data block.
    pub data_block_size: u32,
    /// An aborted transaction left the flag behind.
    pub needs_check: bool,
    /// Free metadata blocks at which the pool is called low.
    pub metadata_threshold: u64,
    /// Metadata blocks in use, without those kept back.
    pub allocated_metadata_blocks: u64,
    /// The snapshot clock.
    pub time: u32,
    /// Thin devices.
    pub devices: u64,
}

/// The metadata of a pool.
#[derive(Debug)]
pub struct PoolMetadata {
    txn: Transaction,
    /// The superblock as it was last written.
    committed: Fields,
    /// What the next commit writes.
    current: Fields,
    thins: BTreeMap<u64, Thin>,
    /// The device whose mappings were changed last, and their root: the path there may be changed in place. Forgotten by whatever else may
    /// end that.
    path: Option<(ThinId, MetadataBlock)>,
    is_changed: bool,
    /// The last commit cannot be read any more.
    is_failed: bool,
    /// A superblock was written and it is not known whether it will last, whatever a reader finds now.
    is_in_doubt: bool,
    /// A commit failed: what it wrote counts as written, though it may be lost.
    must_abort: bool,
    /// It may be damaged, and is read as far as it can be.
    is_rescue: bool,
}

fn detail_of(words: Cell) -> DeviceDetail {
    DeviceDetail {
        mapped_blocks: words[0],
        transaction_id: words[1],
        creation_time: words[2] as u32,
        snapshotted_time: (words[2] >> 32) as u32,
    }
}

fn words_of(detail: &DeviceDetail) -> Cell {
    let times = u64::from(detail.creation_time) | u64::from(detail.snapshotted_time) << 32;
    [detail.mapped_blocks, detail.transaction_id, times]
}

fn no_device(id: ThinId) -> Error {
    Error::new(ErrorKind::NotFound, format!("there is no thin device {id}"))
}

impl PoolMetadata {
    /// Opens the metadata on `engine` with a cache of `cache_bytes`. Nothing is written until something is changed.
    ///
    /// # Errors
    /// `Io`, and `Damaged` when the superblock or the space map's index cannot be used.
    pub fn open(engine: Arc<dyn BlockEngine>, cache_bytes: usize) -> Result<Self> {
        Self::open_cached(Arc::new(BlockManager::new(engine, cache_bytes)))
    }

    fn open_cached(blocks: Arc<BlockManager>) -> Result<Self> {
        let superblock = Superblock::read(&**blocks.engine())?;
        let faults = superblock.faults(blocks.engine().nr_blocks());
        // A lookup takes a root in block 0 for one that is not there yet.
        let is_root = |f: &&SuperblockFault| matches!(f, SuperblockFault::Root { .. });
        if let Some(fault) = faults.iter().find(is_root) {
            return Err(Error::new(
                ErrorKind::Damaged,
                format!("bad superblock in block {SUPERBLOCK}: {fault}; run thin_check"),
            ));
        }
        let txn = Transaction::open(
            blocks,
            superblock.metadata_space_map,
            superblock.data_space_map,
        )?;
        Ok(Self::at(txn, *superblock, false))
    }

    /// Metadata of which nothing was changed yet.
    fn at(txn: Transaction, superblock: Fields, is_rescue: bool) -> Self {
        Self {
            txn,
            committed: superblock,
            current: superblock,
            thins: BTreeMap::new(),
            path: None,
            is_changed: false,
            is_failed: false,
            is_in_doubt: false,
            must_abort: false,
            is_rescue,
        }
    }

    /// Reads both space maps: indexes and bitmaps, which are 4 KiB for 16320 blocks, but not the trees of counts of three and more.
    ///
    /// # Errors
    /// `Damaged` with the first block that cannot be used, `Io`.
    pub fn verify_space_maps(&mut self) -> Result<()> {
        self.txn.verify_maps()
    }

    /// Opens metadata that may be damaged, to be read only. Neither space maps nor device details need be there; a device whose
    /// details are lost has made-up ones: everything in it is shared, and all up to its last block mapped.
    ///
    /// # Errors
    /// `Io`, and `Damaged` when the superblock cannot be used.
    pub fn open_to_rescue(engine: Arc<dyn BlockEngine>, cache_bytes: usize) -> Result<Self> {
        let blocks = Arc::new(BlockManager::new(engine, cache_bytes));
        blocks.set_read_only(true);
        let superblock = Superblock::read(&**blocks.engine())?;
        let root = superblock.mapping_root;
        // A lookup takes a root in block 0 for one that is not there yet.
        if root == SUPERBLOCK {
            return Err(Error::new(
                ErrorKind::Damaged,
                format!("bad superblock in block {SUPERBLOCK}: the mapping root is block {root}"),
            ));
        }
        let (metadata, data) = (superblock.metadata_space_map, superblock.data_space_map);
        let txn = Transaction::to_read(blocks, metadata, data);
        Ok(Self::at(txn, *superblock, true))
    }

    /// Makes an empty pool with data blocks of `data_block_size` sectors, as the kernel does on a zeroed device. Whatever the device
    /// holds is lost. The data device has no blocks until [`resize_data`](Self::resize_data).
    ///
    /// # Errors
    /// `InvalidArgument` for a block size that is no multiple of 128 in 128..=2097152, `OutputTooSmall`, `Io`.
    pub fn format(
        engine: Arc<dyn BlockEngine>,
        data_block_size: u32,
        cache_bytes: usize,
    ) -> Result<Self> {
        if !is_legal_data_block_size(data_block_size) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "data blocks of {data_block_size} sectors: a multiple of 128 in 128..2097152 is possible"
                ),
            ));
        }
        let nr_blocks = engine.nr_blocks().min(MAX_METADATA_BLOCKS);
        let blocks = Arc::new(BlockManager::new(engine, cache_bytes));
        let (txn, mapping_root, details_root) = Transaction::format(blocks)?;
        let current = Fields {
            mapping_root,
            details_root,
            data_block_size,
            ..Fields::fresh(nr_blocks)
        };
        let mut this = Self {
            is_changed: true,
            ..Self::at(txn, current, false)
        };
        this.commit()?;
        Ok(this)
    }

    fn refuse_if_failed(&self) -> Result<()> {
        match self.is_failed {
            true => Err(Error::new(
                ErrorKind::Io,
                "the metadata could not be read again after a failure; open it anew",
            )),
            false => Ok(()),
        }
    }

    fn refuse_until_abort(&self) -> Result<()> {
        match self.must_abort {
            true => Err(Error::new(
                ErrorKind::Io,
                "a commit failed: abort before anything else",
            )),
            false => Ok(()),
        }
    }

    fn begin(&mut self) -> Result<()> {
        self.path = None;
        self.begin_on_path()
    }

    /// The same of what leaves the path to the mappings changed last as it is.
    fn begin_on_path(&mut self) -> Result<()> {
        self.refuse_if_failed()?;
        self.refuse_until_abort()?;
        if self.is_in_doubt {
            // What either of two superblocks leads to must not be written over.
            self.write_superblock(self.committed)?;
        }
        self.is_changed = true;
        Ok(())
    }

    /// Sets the transaction id of whoever manages the pool, if it is `old` now.
    ///
    /// # Errors
    /// `InvalidArgument` when it is not.
    pub fn set_transaction_id(&mut self, old: u64, new: u64) -> Result<()> {
        if self.current.transaction_id != old {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "mismatched transaction id: it is {}, not {old}",
                    self.current.transaction_id
                ),
            ));
        }
        self.begin()?;
        self.current.transaction_id = new;
        Ok(())
    }

    /// Calls `tell` when an allocation leaves no more than the threshold of the status line free, and again only after there were
    /// more. An abort takes back nothing of that.
    pub fn register_metadata_threshold(&mut self, tell: impl FnMut() + Send + 'static) {
        self.txn.low_space = Some(LowSpace {
            threshold: (self.txn.metadata_map().nr_blocks / 4).min(MOST_THRESHOLD),
            was_told: false,
            tell: Box::new(tell),
        });
    }

    /// Blocks of the metadata device that are kept back for commits.
    fn reserve(&self) -> u64 {
        (self.txn.metadata_map().nr_blocks / 10).min(MOST_RESERVE)
    }

    /// Metadata blocks that operations may still use.
    pub fn nr_free_metadata_blocks(&self) -> u64 {
        let map = self.txn.metadata_map();
        map.nr_blocks
            .saturating_sub(map.nr_allocated)
            .saturating_sub(self.reserve())
    }

    /// Blocks of the metadata device that a pool can use; the metadata may have fewer until it is resized.
    pub fn nr_blocks_on_device(&self) -> u64 {
        let on_device = self.txn.blocks().engine().nr_blocks();
        on_device.min(MAX_METADATA_BLOCKS)
    }

    /// Data blocks that nothing refers to.
    pub fn nr_free_data_blocks(&self) -> u64 {
        let map = self.txn.data_map();
        map.nr_blocks.saturating_sub(map.nr_allocated)
    }

    /// Data and metadata blocks in use, of the latter those included that are kept back for commits.
    pub fn used_blocks(&self) -> (u64, u64) {
        let metadata = self.txn.metadata_map().nr_blocks;
        (
            self.txn.data_map().nr_allocated,
            metadata - self.nr_free_metadata_blocks(),
        )
    }

    /// The device that it is on.
    pub(crate) fn engine(&self) -> &Arc<dyn BlockEngine> {
        self.txn.blocks().engine()
    }

    /// The cache that it works in.
    pub(super) fn blocks(&self) -> &Arc<BlockManager> {
        self.txn.blocks()
    }

    /// Root of the top-level tree.
    pub(super) fn mapping_root(&self) -> MetadataBlock {
        self.current.mapping_root
    }

    /// The snapshot clock.
    pub(super) fn time(&self) -> u32 {
        self.current.time
    }

    /// True if the flag is set that tells everybody to check this metadata before it is changed again.
    pub fn needs_check(&self) -> bool {
        self.current.needs_check()
    }

    /// What the cache takes.
    pub fn cache_use(&self) -> CacheUse {
        self.txn.blocks().cache_use()
    }

    /// True if there is something to commit.
    pub fn is_changed(&self) -> bool {
        self.is_changed
    }

    /// The numbers of the kernel's status line, with what is not committed.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn status(&self) -> Result<PoolStatus> {
        let (metadata, data) = (self.txn.metadata_map(), self.txn.data_map());
        let held_root = self.current.held_root;
        Ok(PoolStatus {
            transaction_id: self.current.transaction_id,
            used_metadata_blocks: metadata.nr_blocks - self.nr_free_metadata_blocks(),
            metadata_blocks: metadata.nr_blocks,
            used_data_blocks: data.nr_allocated,
            data_blocks: data.nr_blocks,
            held_root: (held_root != SUPERBLOCK).then_some(held_root),
            data_block_size: self.current.data_block_size,
            needs_check: self.current.needs_check(),
            metadata_threshold: (metadata.nr_blocks / 4).min(MOST_THRESHOLD),
            allocated_metadata_blocks: metadata.nr_allocated,
            time: self.current.time,
            devices: self.devices()?.len() as u64,
        })
    }
}
