//! An open thin device as clients see it: a disk of a size, with what is known of its blocks.

use super::data_device::{DataDevice, SECTOR};
use super::driver::Driver;
use super::export::{
    Connection, Export, Exports, Extent, MOST_PAYLOAD, Replier, Request, add_extent,
};
use super::runtime::Runtime;
use super::submitter::{Submitter, errno};
use super::transfer::Told;
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{BioError, Features, Thin};
use crate::thin::BlockTime;
use crate::units::{ThinBlock, ThinId};
use rustix::io::Errno;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

/// A thin device that clients use. It is closed when the last of them has gone.
pub(super) struct ThinExport {
    pub(super) driver: Arc<Driver>,
    pub(super) thin: Arc<Thin>,
    /// Size in bytes.
    pub(super) size: u64,
    /// Has what was never written.
    pub(super) origin: Option<Arc<DataDevice>>,
    pub(super) is_read_only: bool,
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
    /// Opens thin device `id`, of `size` bytes; if none is given it ends with its last mapped block.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Damaged`; `InvalidArgument` for a size that no thin device can have.
    pub(super) fn open(
        driver: &Arc<Driver>,
        id: ThinId,
        size: Option<u64>,
        origin: Option<Arc<DataDevice>>,
        is_read_only: bool,
    ) -> Result<Arc<Self>> {
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
            origin,
            is_read_only,
        };
        let block_bytes = export.block_sectors() * SECTOR;
        export.size = match size {
            Some(size) => size,
            None => {
                let highest = driver.pool.inspect(|pool| pool.highest_block(id))?;
                let of_blocks = highest.map_or(0, |block| {
                    block.0.saturating_add(1).saturating_mul(block_bytes)
                });
                of_blocks.max(origin_sectors.unwrap_or(0) * SECTOR)
            }
        };
        if export.size > MOST_BYTES {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "a size of {} bytes for thin device {id}: up to {MOST_BYTES} are possible",
                    export.size
                ),
            ));
        }
        Ok(Arc::new(export))
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
        let features = self.features();
        self.origin.is_none() && !features.skip_block_zeroing && !features.ignore_discard
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

/// Blocks that are looked at for one answer about extents, so that it does not take long.
const MOST_BLOCKS: u64 = 16384;
const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";
const TIME: &str = "dm-thin:time";
/// What differs from another thin device of the pool; its id follows.
const SINCE: &str = "qemu:dirty-bitmap:since-";

impl ThinExport {
    /// The status of a block in a context.
    fn status(&self, context: &str, mapping: Option<BlockTime>, snapshotted: u32) -> u32 {
        match (context, mapping) {
            (ALLOCATION, Some(_)) => 0,
            (ALLOCATION, None) if self.is_unmapped_zero() => 3,
            (ALLOCATION, None) if self.origin.is_some() => 0,
            (ALLOCATION, None) => 1,
            (DEPTH, None) => 0,
            (DEPTH, Some(mapping)) => 1 + u32::from(snapshotted > mapping.time),
            (_, mapping) => mapping.map_or(0, |mapping| mapping.time),
        }
    }
}

impl Export for ThinExport {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn preferred_block(&self) -> u32 {
        // Only powers of two can be told.
        let block = self.block_sectors() * SECTOR;
        let power = 1_u64 << block.trailing_zeros();
        power.min(MOST_PAYLOAD.into()) as u32
    }

    fn contexts(&self) -> Vec<String> {
        let mut contexts = [ALLOCATION, DEPTH, TIME].map(String::from).to_vec();
        let others = self.driver.pool.inspect(|pool| pool.devices());
        let own = self.thin.id();
        let others = others
            .unwrap_or_default()
            .into_iter()
            .filter(|&id| id != own);
        contexts.extend(others.map(|id| format!("{SINCE}{id}")));
        contexts
    }

    fn extents(
        &self,
        context: &str,
        range: Range<u64>,
        most: usize,
    ) -> std::result::Result<Vec<Extent>, Errno> {
        let size = self.block_sectors() * SECTOR;
        let other = match context.strip_prefix(SINCE) {
            Some(id) => Some(ThinId(id.parse().map_err(|_| Errno::INVAL)?)),
            None => None,
        };
        let id = self.thin.id();
        let mut extents = Vec::new();
        self.driver.pool.inspect(|pool| {
            let next = |id, block| pool.next_block(id, block).map_err(|_| Errno::IO);
            let snapshotted = pool.details(id).map_err(|_| Errno::IO)?.snapshotted_time;
            let (mut here, mut there) = (None, None);
            let mut at = range.start;
            for _ in 0..MOST_BLOCKS {
                if at >= range.end {
                    break;
                }
                let block = ThinBlock(at / size);
                let advance = |known: &mut Option<Option<(ThinBlock, BlockTime)>>, id| {
                    if known.is_none_or(|next| next.is_some_and(|(b, _)| b < block)) {
                        *known = Some(next(id, block)?);
                    }
                    Ok(known.flatten())
                };
                let mine = advance(&mut here, id)?;
                let theirs = match other {
                    Some(other) => advance(&mut there, other)?,
                    None => None,
                };
                let first = [mine, theirs].into_iter().flatten().map(|(b, _)| b).min();
                // Up to the next mapping of either it is all the same.
                let (end, status) = match first {
                    Some(first) if first == block => {
                        let at_block = |found: Option<(ThinBlock, BlockTime)>| {
                            found
                                .filter(|(b, _)| *b == block)
                                .map(|(_, mapping)| mapping)
                        };
                        let status = match other {
                            None => self.status(context, at_block(mine), snapshotted),
                            Some(_) => {
                                let data = |found| at_block(found).map(|m: BlockTime| m.block);
                                u32::from(data(mine) != data(theirs))
                            }
                        };
                        (block.0.saturating_add(1), status)
                    }
                    first => {
                        let status = match other {
                            None => self.status(context, None, snapshotted),
                            Some(_) => 0,
                        };
                        (first.map_or(u64::MAX, |first| first.0), status)
                    }
                };
                let is_new = extents.last().is_none_or(|e: &Extent| e.status != status);
                if is_new && extents.len() == most {
                    break;
                }
                let end = end.saturating_mul(size).min(range.end);
                add_extent(&mut extents, end - at, status);
                at = end;
            }
            Ok(extents)
        })
    }

    fn connect(self: Arc<Self>) -> Box<dyn Connection> {
        Box::new(Submitter::new(self))
    }
}

impl Connection for Submitter {
    fn submit(&mut self, request: Request, reply: Replier) {
        let told: Told = Box::new(move |done| {
            reply.answer(done.map_err(errno));
        });
        match request {
            Request::Read { offset, len } => self.read(offset, len, told),
            Request::Write { offset, data, fua } => self.write(offset, data, fua, told),
            Request::Flush => self.flush(told),
            Request::Trim { offset, len, fua } => self.trim(offset, len, fua, told),
            Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
                fast_zero,
            } => {
                // Zeros are fast where blocks are unmapped.
                if fast_zero && (no_hole || !self.thin().is_unmapped_zero()) {
                    return told(Err(BioError::Unsupported));
                }
                self.write_zeroes(offset, len, (fua, no_hole), told);
            }
            // A hint that the page cache does well without.
            Request::Cache { .. } => told(Ok(Vec::new())),
        }
    }
}

impl Exports for Runtime {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        let id = match name {
            "" => match self.exported().ok()?[..] {
                [only] => only,
                _ => return None,
            },
            name => ThinId(name.parse().ok()?),
        };
        Some(self.export(id).ok()?)
    }

    fn list(&self) -> Vec<(String, String)> {
        let exported = self.exported().unwrap_or_default().into_iter();
        exported
            .map(|id| (id.to_string(), format!("thin device {id}")))
            .collect()
    }
}

/// The last byte that a signed offset can name.
const MOST_BYTES: u64 = i64::MAX as u64;
