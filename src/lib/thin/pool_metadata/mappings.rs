//! The mappings of a device, and the counts of the data blocks that they point to.

use super::{Lookup, PoolMetadata};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::TreeKind;
use crate::pdata::txn::{Transaction, cell};
use crate::thin::BlockTime;
use crate::units::{DataBlock, MetadataBlock, ThinBlock, ThinId};

impl PoolMetadata {
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
}
