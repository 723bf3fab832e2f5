//! The pool's thin devices as what servers serve.

use super::data_device::SECTOR;
use super::export::{Connection, Export, Exports, Extent, Replier, Request, Space};
use super::runtime::Runtime;
use super::submitter::{Submitter, errno};
use super::thin_contexts;
use super::thin_export::ThinExport;
use super::transfer::Told;
use crate::pool::PoolMode;
use crate::thin::PoolMetadata;
use crate::units::{MAX_THIN_ID, ThinId};
use rustix::io::Errno;
use std::ops::Range;
use std::sync::Arc;

/// The largest block that is preferred, in bytes.
const MOST_PREFERRED: u64 = 1 << 20;

/// A thin device is named by its id; the default is the only one that is exported.
impl Exports for Runtime {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        let id = match name {
            "" => match self.exported().ok()?[..] {
                [only] => only,
                _ => return None,
            },
            // It has no second name such as 07.
            name => ThinId(
                name.parse()
                    .ok()
                    .filter(|id: &u64| id.to_string() == name)?,
            ),
        };
        Some(self.export(id).ok()? as _)
    }

    fn space(&self) -> Space {
        let pool = &self.driver.pool;
        let look = |pool: &PoolMetadata| (pool.used_blocks().0, pool.nr_free_data_blocks());
        let (used, free) = pool.inspect(look);
        Space {
            // A block has 1 GiB at most.
            block_bytes: (pool.block_sectors() * SECTOR) as u32,
            blocks: used + free,
            free,
            most_exports: MAX_THIN_ID + 1,
        }
    }

    fn waits(&self) -> bool {
        let pool = &self.driver.pool;
        let waits_for_space = || !self.driver.table().features.error_if_no_space;
        pool.is_suspended() || pool.mode() == PoolMode::OutOfDataSpace && waits_for_space()
    }

    fn end_waits(&self) {
        // Whoever stops the pool is told how it went.
        self.finish().ok();
    }

    fn list(&self) -> Vec<(String, String)> {
        // A client that asks while the metadata cannot be read finds nothing.
        let ids = self.exported().unwrap_or_default();
        ids.into_iter()
            .map(|id| (id.to_string(), format!("thin device {id}")))
            .collect()
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
        let bytes = self.block_sectors() * SECTOR;
        // Blocks are multiples of 64 KiB, but need not be powers of two.
        (1 << bytes.trailing_zeros()).min(MOST_PREFERRED) as u32
    }

    fn punches_holes(&self) -> bool {
        self.frees_zeros()
    }

    fn contexts(&self) -> Vec<String> {
        let id = self.thin.id();
        self.driver
            .pool
            .inspect(|pool| thin_contexts::names(pool, id))
    }

    fn extents(&self, context: &str, range: Range<u64>, most: usize) -> Result<Vec<Extent>, Errno> {
        match self.statuses(context, &range, most) {
            Ok(found) => found.ok_or(Errno::INVAL),
            Err(_) => Err(Errno::IO),
        }
    }

    fn try_allocation(&self, range: Range<u64>, most: usize) -> Option<Result<Vec<Extent>, Errno>> {
        let found = self.try_allocation(&range, most)?;
        Some(found.map_err(|_| Errno::IO))
    }

    fn always_has(&self, context: &str) -> bool {
        thin_contexts::ALWAYS.contains(&context)
    }

    fn allocated(&self) -> Result<u64, Errno> {
        let id = self.thin.id();
        let details = self.driver.pool.inspect(|pool| pool.details(id));
        let blocks = details.map_err(|_| Errno::IO)?.mapped_blocks;
        Ok(blocks.saturating_mul(self.block_sectors() * SECTOR))
    }

    fn connect(self: Arc<Self>) -> Box<dyn Connection> {
        Box::new(Submitter::new(self))
    }
}

impl Connection for Submitter {
    fn start(&mut self) {
        Self::start(self);
    }

    fn holes(&mut self, range: Range<u64>) -> Vec<Extent> {
        Self::holes(self, range)
    }

    fn submit(&mut self, request: Request, reply: Replier) {
        let is_change = matches!(
            request,
            Request::Write { .. } | Request::Trim { .. } | Request::WriteZeroes { .. }
        );
        if is_change && self.thin().is_read_only {
            return reply.answer(Err(Errno::PERM));
        }
        self.thin().counts.count(&request);
        let told =
            |reply: Replier| -> Told { Box::new(move |done| reply.answer(done.map_err(errno))) };
        match request {
            Request::Read { offset, len } => self.read(offset, len, told(reply)),
            Request::Write { offset, data, fua } => self.write(offset, data, fua, told(reply)),
            Request::Flush => self.flush(told(reply)),
            Request::Trim { offset, len, fua } => self.trim(offset, len, fua, told(reply)),
            Request::WriteZeroes {
                offset,
                len,
                no_hole,
                fast_zero: true,
                ..
            } if no_hole || !self.thin().zeroes_fast(offset..offset + len) => {
                reply.answer(Err(Errno::OPNOTSUPP));
            }
            Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
                ..
            } => {
                self.write_zeroes(offset, len, (fua, no_hole), told(reply));
            }
            // The page cache reads ahead by itself.
            Request::Cache { .. } => reply.answer(Ok(Vec::new())),
        }
    }
}

impl ThinExport {
    /// True if nothing has to be written to make a range zeros.
    fn zeroes_fast(&self, range: Range<u64>) -> bool {
        let size = self.block_sectors() * SECTOR;
        let head = range.start..range.start.next_multiple_of(size).min(range.end);
        let tail = (range.end - range.end % size).max(head.end)..range.end;
        self.frees_zeros()
            && [head, tail]
                .into_iter()
                .all(|edge| self.mapped(edge).next().is_none())
    }
}
