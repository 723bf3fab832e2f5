//! The end of a transaction: committed, or undone.

use super::{PoolMetadata, words_of};
use crate::error::Result;
use crate::pdata::TreeKind;
use crate::thin::superblock::{Fields, NEEDS_CHECK, SUPERBLOCK};
use crate::units::DataBlock;
use std::sync::Arc;

impl PoolMetadata {
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

    pub(super) fn write_superblock(&mut self, fields: Fields) -> Result<()> {
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
}
