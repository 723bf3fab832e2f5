//! The metadata of a pool, to be changed: what the kernel's dm-thin-metadata does, under its names.
//!
//! Every change is part of a transaction that [`PoolMetadata::commit`] ends and [`PoolMetadata::abort`] undoes. Nothing that the
//! last commit wrote is overwritten but the superblock, so whatever happens in between, the device holds the last transaction or
//! the next. An operation that fails leaves its transaction in part done: abort it.
//!
//! Facts: `FORMAT.md`; the order of a commit is nodes, flush, superblock, flush.

use super::superblock::{Fields, NEEDS_CHECK, SUPERBLOCK, Superblock, SuperblockFault, read_block};
use super::{BlockTime, DeviceDetail};
use crate::checksum::{self, BlockKind};
use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::pdata::TreeKind;
use crate::pdata::txn::{BlockManager, CacheUse, Cell, LowSpace, Transaction, cell};
use crate::units::{
    DataBlock, MAX_DATA_BLOCKS, MAX_METADATA_BLOCKS, MAX_THIN_ID, MAX_TIME, MetadataBlock,
    ThinBlock, ThinId, is_legal_data_block_size,
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

    fn root_of(&self, id: ThinId) -> Result<MetadataBlock> {
        let found = self
            .txn
            .lookup(TreeKind::TopLevel, self.current.mapping_root, id.0)?;
        found
            .map(|v| MetadataBlock(v[0]))
            .ok_or_else(|| no_device(id))
    }

    /// What the pool knows of a device.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Damaged`.
    pub fn details(&self, id: ThinId) -> Result<DeviceDetail> {
        self.refuse_if_failed()?;
        if let Some(thin) = self.thins.get(&id.0) {
            return Ok(thin.detail);
        }
        let root = self.current.details_root;
        match self.txn.lookup(TreeKind::Details, root, id.0) {
            Ok(Some(found)) => Ok(detail_of(found)),
            _ if self.is_rescue => self.made_up_details(id),
            Ok(None) => Err(no_device(id)),
            Err(e) => Err(e),
        }
    }

    /// What stands in for lost details: everything may be shared, and mapped.
    fn made_up_details(&self, id: ThinId) -> Result<DeviceDetail> {
        let root = self.root_of(id)?;
        let last = self.txn.last_known_key(TreeKind::Mappings, root);
        let last = last.map_or(None, |(key, _)| key);
        Ok(DeviceDetail {
            mapped_blocks: last.unwrap_or(0).saturating_add(1),
            transaction_id: self.current.transaction_id,
            creation_time: 0,
            snapshotted_time: self.current.time,
        })
    }

    fn set_details(&mut self, id: ThinId, detail: DeviceDetail) {
        let thin = Thin {
            detail,
            is_changed: true,
        };
        self.thins.insert(id.0, thin);
    }

    /// The ids of all devices, ascending.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn devices(&self) -> Result<Vec<ThinId>> {
        self.refuse_if_failed()?;
        let root = self.current.mapping_root;
        let entries = self.txn.cursor(TreeKind::TopLevel, root, 0)?;
        entries.map(|entry| Ok(ThinId(entry?.0))).collect()
    }

    fn refuse_if_taken(&self, id: ThinId) -> Result<()> {
        if id.0 > MAX_THIN_ID {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("device id {id}: 0 to {MAX_THIN_ID} are possible"),
            ));
        }
        match self.details(id) {
            Ok(_) => Err(Error::new(
                ErrorKind::Exists,
                format!("thin device {id} exists already"),
            )),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn set_root(&mut self, id: ThinId, root: MetadataBlock) -> Result<()> {
        let top = self.current.mapping_root;
        let changed = self
            .txn
            .insert(TreeKind::TopLevel, top, id.0, cell(root.0))?;
        self.current.mapping_root = changed.root;
        Ok(())
    }

    /// Makes a device without mappings.
    ///
    /// # Errors
    /// `Exists`, `InvalidArgument` for an id past 24 bits, `NoSpace`, `Io`, `Damaged`.
    pub fn create_thin(&mut self, id: ThinId) -> Result<()> {
        self.refuse_if_taken(id)?;
        self.begin()?;
        let root = self.txn.new_tree(TreeKind::Mappings)?;
        self.set_root(id, root)?;
        let detail = DeviceDetail {
            mapped_blocks: 0,
            transaction_id: self.current.transaction_id,
            creation_time: self.current.time,
            snapshotted_time: self.current.time,
        };
        self.set_details(id, detail);
        Ok(())
    }

    /// Makes device `id` a snapshot of `origin`. I/O to the origin must be quiesced.
    ///
    /// # Errors
    /// `Exists`, `NotFound`, `InvalidArgument` for an id past 24 bits or when the clock is at its end, 2^24 - 1, `NoSpace`, `Io`,
    /// `Damaged`.
    pub fn create_snap(&mut self, id: ThinId, origin: ThinId) -> Result<()> {
        self.refuse_if_taken(id)?;
        let of_origin = self.details(origin)?;
        if self.current.time >= MAX_TIME {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "the snapshot clock is at its end, {MAX_TIME}: a later time does not fit a mapping; copy the data to a new pool"
                ),
            ));
        }
        self.begin()?;
        let root = self.root_of(origin)?;
        self.txn.increment_metadata(root.0)?;
        self.set_root(id, root)?;
        self.current.time += 1;
        let time = self.current.time;
        let detail = DeviceDetail {
            mapped_blocks: of_origin.mapped_blocks,
            transaction_id: self.current.transaction_id,
            creation_time: time,
            snapshotted_time: time,
        };
        self.set_details(id, detail);
        let of_origin = DeviceDetail {
            snapshotted_time: time,
            ..of_origin
        };
        self.set_details(origin, of_origin);
        Ok(())
    }

    /// Deletes a device and all that no other one shares.
    ///
    /// # Errors
    /// `NotFound`, `NoSpace`, `Io`, `Damaged`.
    pub fn delete_device(&mut self, id: ThinId) -> Result<()> {
        self.details(id)?;
        self.begin()?;
        self.thins.remove(&id.0);
        let details = self.current.details_root;
        if let Some(changed) = self.txn.remove(TreeKind::Details, details, id.0)? {
            self.current.details_root = changed.root;
        }
        let top = self.current.mapping_root;
        let changed = self
            .txn
            .remove(TreeKind::TopLevel, top, id.0)?
            .ok_or_else(|| no_device(id))?;
        self.current.mapping_root = changed.root;
        match changed.old {
            Some(old) => self.txn.decrement_value(TreeKind::TopLevel, old[0]),
            None => Ok(()),
        }
    }

    /// Where a virtual block of a device is; none if it is not mapped.
    ///
    /// # Errors
    /// `NotFound` for the device, `Io`, `Damaged`.
    pub fn find_block(&self, id: ThinId, block: ThinBlock) -> Result<Option<Lookup>> {
        let snapshotted_time = self.details(id)?.snapshotted_time;
        let found = self
            .txn
            .lookup(TreeKind::Mappings, self.root_of(id)?, block.0)?;
        Ok(found.map(|value| {
            let mapping = BlockTime::unpack(value[0]);
            Lookup {
                block: mapping.block,
                is_shared: snapshotted_time > mapping.time,
            }
        }))
    }

    /// The first mapping of a device at `block` or behind it.
    ///
    /// # Errors
    /// `NotFound` for the device, `Io`, `Damaged`.
    pub fn next_block(
        &self,
        id: ThinId,
        block: ThinBlock,
    ) -> Result<Option<(ThinBlock, BlockTime)>> {
        self.blocks_from(id, block)?.next().transpose()
    }

    /// The mappings of a device from `block` on, ascending.
    ///
    /// # Errors
    /// `NotFound` for the device, `Io`, `Damaged`; each mapping may be an error of the latter kinds, too.
    pub fn blocks_from(
        &self,
        id: ThinId,
        block: ThinBlock,
    ) -> Result<impl Iterator<Item = Result<(ThinBlock, BlockTime)>>> {
        self.refuse_if_failed()?;
        let root = self.root_of(id)?;
        let entries = self.txn.cursor(TreeKind::Mappings, root, block.0)?;
        Ok(entries.map(|entry| {
            let (key, value) = entry?;
            Ok((ThinBlock(key), BlockTime::unpack(value[0])))
        }))
    }

    /// The last virtual block of a device that is mapped.
    ///
    /// # Errors
    /// `NotFound` for the device, `Io`, `Damaged`.
    pub fn highest_block(&self, id: ThinId) -> Result<Option<ThinBlock>> {
        self.refuse_if_failed()?;
        let last = self.txn.last_key(TreeKind::Mappings, self.root_of(id)?)?;
        Ok(last.map(ThinBlock))
    }

    /// The same of a device whose tree may be damaged, with what keeps it from being certain: behind the block there may be more that
    /// cannot be found.
    ///
    /// # Errors
    /// `NotFound` for the device; `Io` or `Damaged` if nothing is known.
    pub fn highest_known_block(&self, id: ThinId) -> Result<(Option<ThinBlock>, Option<Error>)> {
        self.refuse_if_failed()?;
        let root = self.root_of(id)?;
        let (last, doubt) = self.txn.last_known_key(TreeKind::Mappings, root)?;
        Ok((last.map(ThinBlock), doubt))
    }

    /// Changes the mapping tree of a device; `change` gets its root and gives back the new one.
    fn change_tree<T>(
        &mut self,
        id: ThinId,
        change: impl FnOnce(&mut Transaction, MetadataBlock) -> Result<(MetadataBlock, T)>,
    ) -> Result<T> {
        let root = match self.path.take() {
            Some((of, root)) if of == id => root,
            _ => {
                let root = self.root_of(id)?;
                // The path is copied from the top: what a shared leaf of the top-level tree points to is counted once more before
                // it is asked whether it is shared.
                self.shadow_path_to(id)?;
                root
            }
        };
        let (new_root, result) = change(&mut self.txn, root)?;
        if new_root != root {
            let (leaf, at) = self.shadow_path_to(id)?;
            self.txn
                .set_value(TreeKind::TopLevel, leaf, at, cell(new_root.0))?;
        }
        self.path = Some((id, new_root));
        Ok(result)
    }

    /// Makes the path through the top-level tree to a device one that may be changed; the leaf, and the entry's place in it.
    fn shadow_path_to(&mut self, id: ThinId) -> Result<(MetadataBlock, usize)> {
        let top = self.current.mapping_root;
        let (top, leaf, at) = self.txn.shadow_path(TreeKind::TopLevel, top, id.0)?;
        self.current.mapping_root = top;
        Ok((leaf, at))
    }

    /// Maps a virtual block to a data block, at the present time. The data block that it was mapped to before loses a reference; the
    /// new one has its reference already ([`alloc_data_block`](Self::alloc_data_block)).
    ///
    /// # Errors
    /// `NotFound` for the device, `InvalidArgument` for a data block past the device, `NoSpace`, `Io`, `Damaged`.
    pub fn insert_block(&mut self, id: ThinId, block: ThinBlock, data: DataBlock) -> Result<()> {
        let mut detail = self.details(id)?;
        if data.0 >= self.txn.data_map().nr_blocks {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "data block {data} is past the last of {}",
                    self.txn.data_map().nr_blocks
                ),
            ));
        }
        self.begin_on_path()?;
        let mapping = BlockTime {
            block: data,
            time: self.current.time,
        };
        let old = self.change_tree(id, |txn, root| {
            let changed = txn.insert(TreeKind::Mappings, root, block.0, cell(mapping.pack()))?;
            Ok((changed.root, changed.old))
        })?;
        match old {
            Some(old) if old[0] >> 24 != data.0 => self.txn.decrement_data(old[0] >> 24)?,
            Some(_) => {}
            None => detail.mapped_blocks = detail.mapped_blocks.saturating_add(1),
        }
        self.set_details(id, detail);
        Ok(())
    }

    /// Unmaps the virtual blocks `begin..end` of a device. Returns how many were mapped.
    ///
    /// # Errors
    /// `NotFound` for the device, `NoSpace`, `Io`, `Damaged`.
    pub fn remove_range(&mut self, id: ThinId, begin: ThinBlock, end: ThinBlock) -> Result<u64> {
        self.unmap(id, begin, end, |txn, block| txn.decrement_data(block))
    }

    /// The same, but the references of the mappings to data blocks are the caller's now, who has to take them back
    /// ([`dec_data_range`](Self::dec_data_range)).
    ///
    /// # Errors
    /// Those of [`remove_range`](Self::remove_range).
    pub fn take_range(&mut self, id: ThinId, begin: ThinBlock, end: ThinBlock) -> Result<u64> {
        self.unmap(id, begin, end, |_, _| Ok(()))
    }

    /// Unmaps; `release` is told of each data block that a mapping led to.
    fn unmap(
        &mut self,
        id: ThinId,
        begin: ThinBlock,
        end: ThinBlock,
        release: impl Fn(&mut Transaction, u64) -> Result<()>,
    ) -> Result<u64> {
        let mut detail = self.details(id)?;
        let next_in = |txn: &Transaction, root, from| {
            let next = txn.lookup_next(TreeKind::Mappings, root, from)?;
            Ok::<_, Error>(next.map(|(key, _)| key).filter(|&key| key < end.0))
        };
        let mut next = next_in(&self.txn, self.root_of(id)?, begin.0)?;
        if next.is_none() {
            return Ok(0);
        }
        self.begin()?;
        let removed = self.change_tree(id, |txn, mut root| {
            let mut removed = 0;
            while let Some(key) = next {
                let (new_root, run) = txn.remove_run(TreeKind::Mappings, root, key, end.0)?;
                root = new_root;
                for (_, value) in &run {
                    release(txn, value[0] >> 24)?;
                }
                removed += run.len() as u64;
                let from = run.last().and_then(|last| last.0.checked_add(1));
                next = match from.filter(|&from| from < end.0) {
                    Some(from) => next_in(txn, root, from)?,
                    None => None,
                };
            }
            Ok((root, removed))
        })?;
        detail.mapped_blocks = detail.mapped_blocks.saturating_sub(removed);
        self.set_details(id, detail);
        Ok(removed)
    }

    /// A data block that nothing refers to, with one reference. None if only blocks are left that were freed in this transaction,
    /// or none at all.
    ///
    /// # Errors
    /// `NoSpace` when the metadata device is full, `Io`, `Damaged`.
    pub fn alloc_data_block(&mut self) -> Result<Option<DataBlock>> {
        self.begin_on_path()?;
        Ok(self.txn.new_data_block()?.map(DataBlock))
    }

    /// Adds a reference to each data block of `begin..end`.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Damaged`.
    pub fn inc_data_range(&mut self, begin: DataBlock, end: DataBlock) -> Result<()> {
        self.begin()?;
        (begin.0..end.0).try_for_each(|block| self.txn.increment_data(block))
    }

    /// Takes a reference from each data block of `begin..end`.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Damaged` when one has none.
    pub fn dec_data_range(&mut self, begin: DataBlock, end: DataBlock) -> Result<()> {
        self.begin()?;
        (begin.0..end.0).try_for_each(|block| self.txn.decrement_data(block))
    }

    /// How many references a data block has.
    ///
    /// # Errors
    /// `Io`, `Damaged`, also when there is no such block.
    pub fn data_count(&self, block: DataBlock) -> Result<u32> {
        self.refuse_if_failed()?;
        self.txn.data_count(block.0)
    }

    /// True if a data block has more than one reference.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn block_is_shared(&self, block: DataBlock) -> Result<bool> {
        Ok(self.data_count(block)? > 1)
    }

    /// Ends the transaction: once it returns, all changes are durable. The data that new mappings point to must be durable before.
    /// Nothing is written if nothing was changed.
    ///
    /// # Errors
    /// `Io`, `NoSpace`, `Damaged`: the transaction has to be aborted.
    pub fn commit(&mut self) -> Result<()> {
        self.refuse_if_failed()?;
        self.refuse_until_abort()?;
        if !self.is_changed {
            return Ok(());
        }
        self.must_abort = true;
        self.path = None;
        for (&id, thin) in &mut self.thins {
            if thin.is_changed {
                let root = self.current.details_root;
                let changed =
                    self.txn
                        .insert(TreeKind::Details, root, id, words_of(&thin.detail))?;
                self.current.details_root = changed.root;
                thin.is_changed = false;
            }
        }
        self.txn.pre_commit()?;
        self.current.data_space_map = self.txn.data_map();
        self.current.metadata_space_map = self.txn.metadata_map();
        self.write_superblock(self.current)?;
        self.txn.next();
        self.is_changed = false;
        self.must_abort = false;
        Ok(())
    }

    /// The same; but what is committed has a reference less to each data block of `kept`, ranges of first block and end. Here they have it
    /// all the same, for operations that keep blocks which no mapping leads to: so a crash leaks none.
    ///
    /// # Errors
    /// Those of [`commit`](Self::commit).
    pub fn commit_without(&mut self, kept: &[(DataBlock, DataBlock)]) -> Result<()> {
        if !self.is_changed {
            return self.commit();
        }
        for &(begin, end) in kept {
            self.dec_data_range(begin, end)?;
        }
        self.commit()?;
        // The next commit takes them back again: there is nothing that is worth one.
        let mut blocks = kept.iter().flat_map(|(begin, end)| begin.0..end.0);
        let counted = blocks.try_for_each(|block| self.txn.increment_data(block));
        self.must_abort = counted.is_err();
        counted
    }

    fn write_superblock(&mut self, fields: Fields) -> Result<()> {
        self.is_in_doubt = true;
        self.txn
            .blocks()
            .write_through(SUPERBLOCK, &fields.pack())?;
        self.is_in_doubt = false;
        self.committed = fields;
        Ok(())
    }

    /// Forgets everything since the last commit; what the pool knows of its devices, too, is as it was then.
    ///
    /// # Errors
    /// `Io` or `Damaged` when the last commit cannot be read: nothing more can be done with this object.
    pub fn abort(&mut self) -> Result<()> {
        let blocks = Arc::clone(self.txn.blocks());
        let low_space = self.txn.low_space.take();
        blocks.reset();
        match Self::open_cached(blocks) {
            Ok(again) => {
                *self = Self {
                    is_in_doubt: self.is_in_doubt,
                    ..again
                };
                self.txn.low_space = low_space;
                Ok(())
            }
            Err(e) => {
                self.is_failed = true;
                Err(e)
            }
        }
    }

    /// Sets the flag that tells everybody to check this metadata before it is changed again. The superblock is otherwise as it was
    /// last written.
    ///
    /// # Errors
    /// `Io`.
    pub fn set_needs_check(&mut self) -> Result<()> {
        self.current.flags |= NEEDS_CHECK;
        let fields = Fields {
            flags: self.committed.flags | NEEDS_CHECK,
            ..self.committed
        };
        self.write_superblock(fields)
    }

    /// Refuses every change from here on, or no longer.
    pub fn set_read_only(&self, is_read_only: bool) {
        self.txn.blocks().set_read_only(is_read_only);
    }

    /// Grows the data device to `nr_blocks` blocks.
    ///
    /// # Errors
    /// `InvalidArgument` to shrink it or past 2^40 blocks, `NoSpace`, `Io`, `Damaged`.
    pub fn resize_data(&mut self, nr_blocks: u64) -> Result<()> {
        let now = self.txn.data_map().nr_blocks;
        self.refuse_size("data", now, nr_blocks, MAX_DATA_BLOCKS)?;
        if nr_blocks > now {
            self.begin()?;
            self.txn.extend_data(nr_blocks)?;
        }
        Ok(())
    }

    /// Grows the metadata to the first `nr_blocks` blocks of its device.
    ///
    /// # Errors
    /// `InvalidArgument` to shrink it, or past the device or the format's limit, `Io`, `Damaged`.
    pub fn resize_metadata(&mut self, nr_blocks: u64) -> Result<()> {
        let now = self.txn.metadata_map().nr_blocks;
        let most = self
            .txn
            .blocks()
            .engine()
            .nr_blocks()
            .min(MAX_METADATA_BLOCKS);
        self.refuse_size("metadata", now, nr_blocks, most)?;
        if nr_blocks > now {
            self.begin()?;
            self.txn.extend_metadata(nr_blocks)?;
        }
        Ok(())
    }

    fn refuse_size(&self, device: &str, now: u64, wanted: u64, most: u64) -> Result<()> {
        self.refuse_if_failed()?;
        if (now..=most).contains(&wanted) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "the {device} device has {now} blocks and can have {now} to {most}, not {wanted}"
            ),
        ))
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

    /// Keeps the metadata as it is now for others to read, until it is released. Commits.
    ///
    /// # Errors
    /// `Busy` if there is a metadata snapshot, `NoSpace`, `Io`, `Damaged`.
    pub fn reserve_metadata_snap(&mut self) -> Result<MetadataBlock> {
        if self.current.held_root != SUPERBLOCK {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "pool metadata snapshot already exists, in block {}",
                    self.current.held_root
                ),
            ));
        }
        self.commit()?;
        self.begin()?;
        let block = self.txn.new_metadata_block()?;
        let copy = Fields {
            data_space_map: Default::default(),
            metadata_space_map: Default::default(),
            held_root: SUPERBLOCK,
            ..self.current
        };
        self.txn.increment_metadata(self.current.mapping_root.0)?;
        self.txn.increment_metadata(self.current.details_root.0)?;
        let mut bytes = copy.pack();
        checksum::seal(&mut bytes, BlockKind::Superblock, block);
        self.txn.blocks().write_through(block, &bytes)?;
        // It is published by the commit that has its reference counts.
        self.current.held_root = block;
        Ok(block)
    }

    /// Gives up the metadata snapshot.
    ///
    /// # Errors
    /// `InvalidArgument` if there is none, `NoSpace`, `Io`, `Damaged`.
    pub fn release_metadata_snap(&mut self) -> Result<()> {
        let block = self.current.held_root;
        if block == SUPERBLOCK {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "no pool metadata snapshot found: nothing to release",
            ));
        }
        self.begin()?;
        let engine = Arc::clone(self.txn.blocks().engine());
        let bytes = read_block(&*engine, block)?;
        checksum::verify(bytes.blocks(1), BlockKind::Superblock, block).map_err(|fault| {
            Error::new(
                ErrorKind::Damaged,
                format!("metadata snapshot in block {block}: {fault}; run thin_check"),
            )
        })?;
        let held = Fields::unpack(bytes.blocks(1));
        self.current.held_root = SUPERBLOCK;
        self.txn
            .delete_tree(TreeKind::TopLevel, held.mapping_root)?;
        self.txn.delete_tree(TreeKind::Details, held.details_root)?;
        self.txn.decrement_metadata(block.0)
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
