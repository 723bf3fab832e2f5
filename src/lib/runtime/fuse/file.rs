//! An open file: its export, and the connections on which its requests are submitted.

use crate::runtime::export::{Connection, Export, Replier, Request};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::sync::{Arc, Mutex, PoisonError};

/// The status bits of `base:allocation`: nothing is allocated, and it reads as zeros.
const HOLE: u32 = 3;
/// Extents that are asked for at once.
const EXTENTS: usize = 1024;
const ALLOCATION: &str = "base:allocation";

/// A file that somebody has open.
pub(super) struct File {
    export: Arc<dyn Export>,
    /// Those that no thread uses now.
    idle: Mutex<Vec<Box<dyn Connection>>>,
}

impl File {
    pub(super) fn new(export: Arc<dyn Export>) -> Self {
        Self {
            export,
            idle: Mutex::default(),
        }
    }

    pub(super) fn export(&self) -> &Arc<dyn Export> {
        &self.export
    }

    /// Submits a request, on a connection that this thread has alone meanwhile.
    pub(super) fn submit(&self, request: Request, reply: Replier) {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let found = idle().pop();
        let mut connection = found.unwrap_or_else(|| Arc::clone(&self.export).connect());
        connection.submit(request, reply);
        connection.start();
        idle().push(connection);
    }

    /// What a read comes to: up to the end of the file.
    pub(super) fn read(&self, offset: u64, len: usize) -> Option<Request> {
        let left = self.export.size().saturating_sub(offset);
        let len = len.min(usize::try_from(left).unwrap_or(usize::MAX));
        (len > 0).then_some(Request::Read { offset, len })
    }

    /// What a write comes to.
    ///
    /// # Errors
    /// `NOSPC` past the end, as on a block device; `ROFS`.
    pub(super) fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<Request, Errno> {
        self.check_change(offset, data.len() as u64)?;
        let data = data.to_vec();
        Ok(Request::Write { offset, data, fua })
    }

    /// What a fallocate comes to; none if there is nothing to be done.
    ///
    /// # Errors
    /// `OPNOTSUPP` for a mode that would move or share data, or allocate without writing, and for a hole where zeros give no space back:
    /// whoever needs them writes them then, and whoever wanted to give space back does not fill the pool. `NOSPC` past the end; `ROFS`.
    pub(super) fn fallocate(
        &self,
        offset: u64,
        len: u64,
        mode: FallocateFlags,
    ) -> Result<Request, Errno> {
        self.check_change(offset, len)?;
        let no_hole = match mode - FallocateFlags::KEEP_SIZE {
            FallocateFlags::PUNCH_HOLE if self.export.punches_holes() => false,
            FallocateFlags::ZERO_RANGE => true,
            _ => return Err(Errno::OPNOTSUPP),
        };
        // A hole has to read as zeros, which a trim does not promise.
        Ok(Request::WriteZeroes {
            offset,
            len,
            fua: false,
            no_hole,
            fast_zero: false,
        })
    }

    fn check_change(&self, offset: u64, len: u64) -> Result<(), Errno> {
        if self.export.is_read_only() {
            return Err(Errno::ROFS);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.export.size() => Ok(()),
            _ => Err(Errno::NOSPC),
        }
    }

    /// Where data, or a hole, begins at or after `offset`.
    ///
    /// # Errors
    /// `NXIO` if there is none, or if the offset is past the end; `IO`.
    pub(super) fn seek(&self, offset: u64, is_hole: bool) -> Result<u64, Errno> {
        let size = self.export.size();
        let mut at = offset;
        while at < size {
            let extents = self.export.extents(ALLOCATION, at..size, EXTENTS)?;
            let before = at;
            for extent in extents {
                if (extent.status & HOLE == HOLE) == is_hole {
                    return Ok(at);
                }
                at += extent.len;
            }
            if at == before {
                return Err(Errno::IO);
            }
        }
        // The end of a file is a hole.
        match is_hole && offset < size {
            true => Ok(size),
            false => Err(Errno::NXIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::memory_export::MemoryExport;

    const PAGE: u64 = 65536;

    fn file(is_read_only: bool) -> File {
        File::new(Arc::new(MemoryExport::new(4 * PAGE, is_read_only)))
    }

    #[test]
    fn seeking_finds_data_holes_and_the_end() {
        let file = file(false);
        let request = file.write(PAGE + 5, &[1; 10], false).unwrap();
        file.submit(request, Replier::new(|answer| assert!(answer.is_ok())));
        assert_eq!(file.seek(0, true), Ok(0));
        assert_eq!(file.seek(0, false), Ok(PAGE));
        assert_eq!(file.seek(PAGE + 7, false), Ok(PAGE + 7));
        assert_eq!(file.seek(PAGE + 7, true), Ok(2 * PAGE));
        assert_eq!(file.seek(2 * PAGE, false), Err(Errno::NXIO));
        assert_eq!(file.seek(4 * PAGE, true), Err(Errno::NXIO));
        assert_eq!(file.seek(u64::MAX, true), Err(Errno::NXIO));
    }

    #[test]
    fn requests_keep_to_the_file() {
        let file = file(false);
        let read = |offset, len| match file.read(offset, len) {
            Some(Request::Read { len, .. }) => len,
            _ => 0,
        };
        assert_eq!((read(4 * PAGE - 1, 9), read(4 * PAGE, 9)), (1, 0));
        assert!(file.write(4 * PAGE - 1, &[0], false).is_ok());
        assert_eq!(file.write(4 * PAGE, &[0], false), Err(Errno::NOSPC));
        assert_eq!(file.write(u64::MAX, &[0], false), Err(Errno::NOSPC));
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(file.fallocate(0, 4 * PAGE, punch).is_ok());
        assert_eq!(file.fallocate(1, 4 * PAGE, punch), Err(Errno::NOSPC));
        let collapse = FallocateFlags::COLLAPSE_RANGE;
        assert_eq!(file.fallocate(0, PAGE, collapse), Err(Errno::OPNOTSUPP));
    }

    #[test]
    fn a_file_to_read_refuses_every_change() {
        let file = file(true);
        assert_eq!(file.write(0, &[0], false), Err(Errno::ROFS));
        let zero = FallocateFlags::ZERO_RANGE;
        assert_eq!(file.fallocate(0, 1, zero), Err(Errno::ROFS));
    }
}
