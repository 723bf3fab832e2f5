//! Metadata in a regular file (through the page cache) or on a block device (O_DIRECT where it is accepted).

use super::{AlignedBuffer, BlockEngine};
use crate::units::{BLOCK_SIZE, MetadataBlock};
use rustix::fs::{Advice, FlockOperation, OFlags, fadvise};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Requests in flight on a block device: enough to keep a disk array or an NVMe drive busy.
const DEVICE_DEPTH: usize = 16;

/// A [`BlockEngine`] over a file or a block device.
#[derive(Debug)]
pub struct FileEngine {
    file: File,
    nr_blocks: AtomicU64,
    is_device: bool,
}

/// How a device is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flags {
    pub(super) write: bool,
    /// Block devices only: fail with EBUSY while somebody else (an active pool) uses the device.
    pub(super) exclusive: bool,
    pub(super) is_device: bool,
}

fn options(flags: Flags, direct: bool) -> OpenOptions {
    let mut custom = OFlags::CLOEXEC;
    if flags.is_device && flags.exclusive {
        custom |= OFlags::EXCL;
    }
    if direct {
        custom |= OFlags::DIRECT;
    }
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(flags.write)
        .custom_flags(custom.bits() as i32);
    options
}

impl FileEngine {
    pub(super) fn open(path: &Path, flags: Flags) -> io::Result<Self> {
        let plain = || options(flags, false).open(path);
        let file = if flags.is_device {
            match options(flags, true).open(path) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => plain()?,
                Ok(file) if !accepts_direct(&file) => {
                    drop(file);
                    plain()?
                }
                other => other?,
            }
        } else {
            plain()?
        };
        if flags.write && !flags.is_device {
            // What O_EXCL is for devices: two of our own kind do not write to one file. Where locks are not known, nothing is lost.
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(e) if e == rustix::io::Errno::WOULDBLOCK => {
                    return Err(io::ErrorKind::ResourceBusy.into());
                }
                _ => {}
            }
        }
        Self::from_file(file, flags.is_device)
    }

    /// An engine over an open file; its size is taken now, and again by [`measure`](Self::measure).
    pub fn from_file(file: File, is_device: bool) -> io::Result<Self> {
        let engine = Self {
            file,
            nr_blocks: AtomicU64::new(0),
            is_device,
        };
        engine.measure()?;
        Ok(engine)
    }

    /// Takes the size that the file or device has now, in whole blocks: it may have grown.
    pub fn measure(&self) -> io::Result<u64> {
        let blocks = (&self.file).seek(SeekFrom::End(0))? / BLOCK_SIZE as u64;
        self.nr_blocks.store(blocks, Ordering::Release);
        Ok(blocks)
    }

    /// Makes a regular file larger, and takes the new size.
    pub fn grow(&self, blocks: u64) -> io::Result<u64> {
        if !self.is_device && blocks > self.measure()? {
            self.file
                .set_len(blocks.saturating_mul(BLOCK_SIZE as u64))?;
        }
        self.measure()
    }
}

/// Some file systems and devices take O_DIRECT at open and refuse every read.
fn accepts_direct(file: &File) -> bool {
    let mut buffer = AlignedBuffer::new(1);
    !matches!(file.read_at(buffer.blocks_mut(1), 0), Err(e) if e.kind() == io::ErrorKind::InvalidInput)
}

impl BlockEngine for FileEngine {
    fn nr_blocks(&self) -> u64 {
        self.nr_blocks.load(Ordering::Acquire)
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset(start)?)
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        if start.0.saturating_add((buf.len() / BLOCK_SIZE) as u64) > self.nr_blocks() {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("block {start} is past the last block"),
            ));
        }
        self.file.write_all_at(buf, offset(start)?)?;
        if !self.is_device {
            // Starts writing these pages to the disk now, so that the flush at the end has little left to wait for. Only a
            // hint: a file system that does not take it loses nothing.
            let len = NonZeroU64::new(buf.len() as u64);
            let _ = fadvise(&self.file, offset(start)?, len, Advice::DontNeed);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn depth(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if self.is_device {
            cores.max(DEVICE_DEPTH)
        } else {
            cores
        }
    }
}

fn offset(start: MetadataBlock) -> io::Result<u64> {
    start
        .0
        .checked_mul(BLOCK_SIZE as u64)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("block {start}")))
}
