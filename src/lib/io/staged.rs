//! Writes that have not reached their engine: what a change would make of a device, to be judged before it is made.
//!
//! Invariants:
//! 1. The engine below is only read.
//! 2. A block that was written is read back as it was written; every other block is read from the engine below.

use super::BlockEngine;
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// A [`BlockEngine`] over another, whose writes go to an unlinked temporary file.
pub struct StagedEngine<'a> {
    base: &'a dyn BlockEngine,
    /// Written blocks lie at their own place; the rest of the file is a hole.
    file: File,
    written: RwLock<BTreeSet<u64>>,
}

impl std::fmt::Debug for StagedEngine<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StagedEngine")
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl<'a> StagedEngine<'a> {
    /// An engine that reads as `base` does until something is written to it.
    pub fn new(base: &'a dyn BlockEngine) -> io::Result<Self> {
        Ok(Self {
            base,
            file: tempfile::tempfile()?,
            written: RwLock::default(),
        })
    }

    /// The engine below.
    pub fn base(&self) -> &'a dyn BlockEngine {
        self.base
    }

    /// Every block that was written, ascending.
    pub fn written(&self) -> Vec<u64> {
        self.written_set().iter().copied().collect()
    }

    fn written_set(&self) -> RwLockReadGuard<'_, BTreeSet<u64>> {
        self.written.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockEngine for StagedEngine<'_> {
    fn nr_blocks(&self) -> u64 {
        self.base.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        self.base.read(start, buf)?;
        let end = start.0 + (buf.len() / BLOCK_SIZE) as u64;
        for &block in self.written_set().range(start.0..end) {
            let at = (block - start.0) as usize * BLOCK_SIZE;
            self.file
                .read_exact_at(&mut buf[at..at + BLOCK_SIZE], block * BLOCK_SIZE as u64)?;
        }
        Ok(())
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        let end = start.0.saturating_add((buf.len() / BLOCK_SIZE) as u64);
        if end > self.nr_blocks() {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("block {start} is past the last block"),
            ));
        }
        self.file.write_all_at(buf, start.0 * BLOCK_SIZE as u64)?;
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        written.extend(start.0..end);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn depth(&self) -> usize {
        self.base.depth()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RamEngine;

    #[test]
    fn what_is_written_is_read_and_the_engine_below_keeps_what_it_has() {
        let base = RamEngine::from_bytes(vec![7; 8 * BLOCK_SIZE]);
        let staged = StagedEngine::new(&base).unwrap();
        staged
            .write(MetadataBlock(3), &[1; 2 * BLOCK_SIZE])
            .unwrap();
        staged.write(MetadataBlock(0), &[2; BLOCK_SIZE]).unwrap();
        let mut all = vec![0; 8 * BLOCK_SIZE];
        staged.read(MetadataBlock(0), &mut all).unwrap();
        let first: Vec<u8> = all.chunks(BLOCK_SIZE).map(|b| b[BLOCK_SIZE - 1]).collect();
        assert_eq!(first, [2, 7, 7, 1, 1, 7, 7, 7]);
        assert_eq!(staged.written(), [0, 3, 4]);
        assert!(base.into_bytes().iter().all(|&b| b == 7));
    }
}
