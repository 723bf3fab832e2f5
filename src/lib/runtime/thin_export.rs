//! An open thin device as clients see it: a disk of a size, with what is known of its blocks.

use super::data_device::{DataDevice, SECTOR};
use super::driver::Driver;
use super::io_counts::IoCounts;
use super::runtime::Activation;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{Features, Thin};
use crate::units::{ThinBlock, ThinId};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

/// A thin device that clients use. It is closed when the last of them has gone.
pub(super) struct ThinExport {
    pub(super) driver: Arc<Driver>,
    pub(super) thin: Arc<Thin>,
    /// Size in bytes.
    pub(super) size: u64,
    /// How it is exported, held until it is closed. None if nobody said how.
    pub(super) activation: Option<Arc<Activation>>,
    pub(super) is_read_only: bool,
    pub(super) counts: Arc<IoCounts>,
}

impl Drop for ThinExport {
    fn drop(&mut self) {
        let mut origins = self
            .driver
            .origins
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        origins.remove(&self.thin.number());
        drop(origins);
        let thin = Arc::clone(&self.thin);
        self.driver
            .call_later(move |worker| worker.close_thin(&thin));
    }
}

impl ThinExport {
    /// Opens thin device `id`.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Damaged`; `InvalidArgument` for a size that no thin device can have.
    pub(super) fn open(
        driver: &Arc<Driver>,
        id: ThinId,
        activation: Option<Arc<Activation>>,
        is_read_only: bool,
    ) -> Result<Arc<Self>> {
        let Activation { size, origin } = activation.as_deref().cloned().unwrap_or_default();
        let origin_sectors = origin.as_ref().map(|origin| origin.sectors()).transpose()?;
        let thin = driver.call(move |worker| worker.open_thin(id, origin_sectors))??;
        if let Some(origin) = &origin {
            let mut origins = driver
                .origins
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            origins.insert(thin.number(), Arc::clone(origin));
        }
        let mut export = Self {
            driver: Arc::clone(driver),
            thin,
            size: 0,
            activation,
            is_read_only,
            counts: driver.io_counts(id),
        };
        let block_bytes = export.block_sectors() * SECTOR;
        export.size = match size {
            Some(size) => size,
            None => {
                let highest = export.highest_block()?;
                let of_blocks = highest.map_or(0, |block| {
                    block.0.saturating_add(1).saturating_mul(block_bytes)
                });
                of_blocks.max(origin_sectors.unwrap_or(0) * SECTOR)
            }
        };
        check_size(id, export.size)?;
        Ok(Arc::new(export))
    }

    /// The last block that is mapped. Of a pool that is only read and damaged it is the last that is known.
    fn highest_block(&self) -> Result<Option<ThinBlock>> {
        let (id, pool) = (self.thin.id(), &self.driver.pool);
        if !self.is_read_only {
            return pool.inspect(|pool| pool.highest_block(id));
        }
        let known = pool.inspect(|pool| pool.highest_known_block(id));
        let doubt = match known {
            Ok((highest, None)) => return Ok(highest),
            Ok((_, Some(ref e))) | Err(ref e) => e.to_string(),
        };
        self.driver.events.add(
            "size_unknown",
            format!(
                "where thin device {id} ends cannot be read ({doubt}); --thin {id}:SIZE says it"
            ),
        );
        known.map(|(highest, _)| highest)
    }

    /// Has what was never written.
    pub(super) fn origin(&self) -> Option<&Arc<DataDevice>> {
        self.activation.as_ref()?.origin.as_ref()
    }

    /// Sectors in a block of the pool.
    pub(super) fn block_sectors(&self) -> u64 {
        self.driver.pool.block_sectors()
    }

    pub(super) fn features(&self) -> Features {
        self.driver.table().features
    }

    /// True if what is not mapped reads as zeros, and stays so when a part of the block is written.
    pub(super) fn is_unmapped_zero(&self) -> bool {
        self.origin().is_none() && !self.features().skip_block_zeroing
    }

    /// True if blocks that shall read as zeros can be unmapped.
    pub(super) fn frees_zeros(&self) -> bool {
        self.is_unmapped_zero() && !self.features().ignore_discard
    }

    /// What of a range of bytes is mapped, block by block.
    pub(super) fn mapped(&self, bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let size = self.block_sectors() * SECTOR;
        let mut at = bytes.start;
        std::iter::from_fn(move || {
            if at >= bytes.end {
                return None;
            }
            let from = ThinBlock(at / size);
            let found = self
                .driver
                .pool
                .inspect(|pool| pool.next_block(self.thin.id(), from));
            // Where the metadata cannot be read, whoever goes on to read or write is told.
            let block = found.map_or(Some(from.0), |next| next.map(|(block, _)| block.0));
            let begin = block?.saturating_mul(size).max(at);
            if begin >= bytes.end {
                return None;
            }
            at = (begin - begin % size + size).min(bytes.end);
            Some(begin..at)
        })
    }
}

/// Whether a thin device can have so many bytes.
///
/// # Errors
/// `InvalidArgument`.
pub(super) fn check_size(id: ThinId, size: u64) -> Result<()> {
    let bound = match size {
        _ if size > MOST_BYTES => format!("up to {MOST_BYTES} are possible"),
        _ if !size.is_multiple_of(SECTOR) => format!("it has to be a multiple of {SECTOR}"),
        _ => return Ok(()),
    };
    Err(Error::new(
        ErrorKind::InvalidArgument,
        format!("a size of {size} bytes for thin device {id}: {bound}"),
    ))
}

/// The last byte that a signed offset can name: of a device, and of a file.
pub(super) const MOST_BYTES: u64 = i64::MAX as u64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Options, Runtime};
    use std::fs::File;
    use std::thread;
    use std::time::{Duration, Instant};

    #[test]
    fn it_is_in_use_until_the_worker_knows_that_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let [metadata, data] = ["meta", "data"].map(|name| folder.path().join(name));
        for path in [&metadata, &data] {
            File::create(path).unwrap().set_len(1 << 20).unwrap();
        }
        let options = Options {
            create: Some(128),
            ..Options::new(&metadata, &data)
        };
        let runtime = Runtime::open(&options).unwrap();
        runtime.message("create_thin 7".parse().unwrap()).unwrap();
        runtime.activate(ThinId(7), Activation::default()).unwrap();
        let export = runtime.export(ThinId(7)).unwrap();
        let left = Arc::downgrade(&export);
        // Whoever closes it waits for this before the worker is told.
        let origins = runtime.driver.origins.read().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        thread::scope(|scope| {
            scope.spawn(|| drop(export));
            while left.strong_count() > 0 {
                assert!(Instant::now() < end, "nobody closes it");
                thread::yield_now();
            }
            let refused = runtime.deactivate(ThinId(7)).map_err(|e| e.kind());
            drop(origins);
            assert_eq!(refused, Err(ErrorKind::Busy));
        });
        runtime.deactivate(ThinId(7)).unwrap();
        runtime.message("delete 7".parse().unwrap()).unwrap();
    }
}
