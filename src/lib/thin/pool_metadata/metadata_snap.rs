//! The metadata snapshot: a state that is kept for others to read.

use super::PoolMetadata;
use crate::checksum::{self, BlockKind};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::TreeKind;
use crate::thin::superblock::{Fields, SUPERBLOCK, read_block};
use crate::units::MetadataBlock;
use std::sync::Arc;

impl PoolMetadata {
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
}
