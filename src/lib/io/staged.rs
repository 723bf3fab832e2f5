//! Writes that have not reached their engine: what a change would make of a device, to be judged before it is made, or to be used in
//! the place of a device that must stay as it is.
//!
//! Invariants:
//! 1. The engine below is only read.
//! 2. A block that was written is read back as it was written; every other block is read from the engine below. Behind its end there are
//!    zeros until something is written there.

use super::BlockEngine;
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// A [`BlockEngine`] over another, whose writes go to an unlinked temporary file.
pub struct StagedEngine<B> {
    base: B,
    nr_blocks: u64,
    /// Written blocks lie at their own place; the rest of the file is a hole.
    file: File,
    written: RwLock<BTreeSet<u64>>,
}

impl<B> std::fmt::Debug for StagedEngine<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StagedEngine")
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}

impl<B: Deref<Target: BlockEngine>> StagedEngine<B> {
    /// An engine that reads as `base` does until something is written to it.
    pub fn new(base: B) -> io::Result<Self> {
        Self::longer(base, 0)
    }

    /// The same with `more` blocks behind the last one of `base`.
    pub fn longer(base: B, more: u64) -> io::Result<Self> {
        Ok(Self {
            nr_blocks: base.nr_blocks().saturating_add(more),
            base,
            file: tempfile::tempfile()?,
            written: RwLock::default(),
        })
    }

    /// The engine below.
    pub fn base(&self) -> &B::Target {
        &self.base
    }

    /// Every block that was written, ascending.
    pub fn written(&self) -> Vec<u64> {
        self.written_set().iter().copied().collect()
    }

    fn written_set(&self) -> RwLockReadGuard<'_, BTreeSet<u64>> {
        self.written.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Deref<Target: BlockEngine> + Send + Sync> BlockEngine for StagedEngine<B> {
    fn nr_blocks(&self) -> u64 {
        self.nr_blocks
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        let blocks = (buf.len() / BLOCK_SIZE) as u64;
        if start.0.saturating_add(blocks) > self.nr_blocks {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // What is behind its end is not the business of the engine below.
        let below = self.base.nr_blocks().saturating_sub(start.0).min(blocks);
        let (below, behind) = buf.split_at_mut(below as usize * BLOCK_SIZE);
        let end = start.0.saturating_add(blocks);
        // What the engine below cannot read may have been written for that very reason.
        let is_needed = self.written_set().range(start.0..end).count() as u64 != blocks;
        if is_needed && !below.is_empty() {
            self.base.read(start, below)?;
        }
        behind.fill(0);
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
        let staged = StagedEngine::longer(&base, 2).unwrap();
        staged
            .write(MetadataBlock(3), &[1; 2 * BLOCK_SIZE])
            .unwrap();
        staged.write(MetadataBlock(0), &[2; BLOCK_SIZE]).unwrap();
        staged.write(MetadataBlock(9), &[3; BLOCK_SIZE]).unwrap();
        let mut all = vec![0; 10 * BLOCK_SIZE];
        staged.read(MetadataBlock(0), &mut all).unwrap();
        assert!(staged.read(MetadataBlock(1), &mut all).is_err());
        let first: Vec<u8> = all.chunks(BLOCK_SIZE).map(|b| b[BLOCK_SIZE - 1]).collect();
        assert_eq!(first, [2, 7, 7, 1, 1, 7, 7, 7, 0, 3]);
        assert_eq!(staged.written(), [0, 3, 4, 9]);
        assert!(base.into_bytes().iter().all(|&b| b == 7));
    }
}
