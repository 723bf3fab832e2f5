//! Devices that have grown.

use super::PoolMetadata;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{MAX_DATA_BLOCKS, MAX_METADATA_BLOCKS};

impl PoolMetadata {
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
}
