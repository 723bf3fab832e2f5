//! Allocates free metadata blocks in ascending order and writes them in large runs; or only rehearses it, to learn the size.

use super::build::BlockSink;
use super::counts::CountMap;
use crate::checksum::{self, BlockKind};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine};
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Blocks gathered before they are written: 1 MiB.
const RUN: usize = 256;

/// A [`BlockSink`] over the free blocks of a device.
pub struct MetadataWriter<'a> {
    /// None rehearses: blocks are counted and their contents dropped.
    engine: Option<&'a dyn BlockEngine>,
    counts: CountMap,
    next: u64,
    run: AlignedBuffer,
    run_start: u64,
    run_blocks: usize,
    /// What a rehearsal keeps, in an unlinked temporary file: block after block.
    kept: Option<File>,
}

impl std::fmt::Debug for MetadataWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MetadataWriter")
            .field("next", &self.next)
            .field("rehearsal", &self.engine.is_none())
            .finish_non_exhaustive()
    }
}

impl<'a> MetadataWriter<'a> {
    /// A writer that uses the blocks without a reference in `counts`; block 0 is never handed out.
    pub fn new(engine: Option<&'a dyn BlockEngine>, mut counts: CountMap) -> Self {
        if counts.nr_blocks() > 0 && counts.get(0) == 0 {
            counts.add(0, 1);
        }
        Self {
            engine,
            counts,
            next: 1,
            run: AlignedBuffer::new(RUN),
            run_start: 0,
            run_blocks: 0,
            kept: None,
        }
    }

    /// One past the highest block handed out so far.
    pub fn used(&self) -> u64 {
        self.next
    }

    /// Blocks that may be used, those in use included.
    pub fn nr_blocks(&self) -> u64 {
        self.counts.nr_blocks()
    }

    /// Writes what is still gathered.
    pub fn flush(&mut self) -> Result<()> {
        let blocks = std::mem::take(&mut self.run_blocks);
        let (Some(engine), true) = (self.engine, blocks > 0) else {
            return Ok(());
        };
        engine
            .write(MetadataBlock(self.run_start), self.run.blocks(blocks))
            .map_err(|e| {
                let last = self.run_start + blocks as u64 - 1;
                Error::io(
                    format!("cannot write metadata blocks {} to {last}", self.run_start),
                    e,
                )
            })
    }
}

fn cannot_keep(e: std::io::Error) -> Error {
    Error::io(
        "cannot keep shared mappings in a temporary file; set TMPDIR to a folder with room",
        e,
    )
}

impl BlockSink for MetadataWriter<'_> {
    fn allocate(&mut self) -> Result<MetadataBlock> {
        let limit = self.counts.nr_blocks();
        while self.next < limit && self.counts.get(self.next) != 0 {
            self.next += 1;
        }
        if self.next >= limit {
            return Err(Error::new(
                ErrorKind::OutputTooSmall,
                format!(
                    "no free metadata block is left among {limit}; give a larger metadata device"
                ),
            ));
        }
        self.counts.add(self.next, 1);
        self.next += 1;
        Ok(MetadataBlock(self.next - 1))
    }

    fn write(&mut self, block: MetadataBlock, kind: BlockKind, contents: &[u8]) -> Result<()> {
        if self.engine.is_none() {
            return Ok(());
        }
        if self.run_blocks == RUN || block.0 != self.run_start + self.run_blocks as u64 {
            self.flush()?;
            self.run_start = block.0;
        }
        let at = self.run_blocks * BLOCK_SIZE;
        self.run_blocks += 1;
        let slot = &mut self.run.blocks_mut(self.run_blocks)[at..];
        slot.copy_from_slice(contents);
        checksum::seal(slot, kind, block);
        Ok(())
    }

    fn keep(&mut self, block: MetadataBlock, contents: &[u8]) -> Result<()> {
        if self.engine.is_some() {
            return Ok(());
        }
        let file = match self.kept.take() {
            Some(file) => file,
            None => tempfile::tempfile().map_err(cannot_keep)?,
        };
        file.write_all_at(contents, block.0 * BLOCK_SIZE as u64)
            .map_err(cannot_keep)?;
        self.kept = Some(file);
        Ok(())
    }

    fn read_back(&mut self, block: MetadataBlock) -> Result<Vec<u8>> {
        let mut buffer = AlignedBuffer::new(1);
        let read = match (self.engine, &self.kept) {
            (Some(engine), _) => {
                self.flush()?;
                engine.read(block, buffer.blocks_mut(1))
            }
            (None, Some(file)) => {
                file.read_exact_at(buffer.blocks_mut(1), block.0 * BLOCK_SIZE as u64)
            }
            (None, None) => Err(std::io::ErrorKind::NotFound.into()),
        };
        read.map_err(|e| Error::io(format!("cannot read back metadata block {block}"), e))?;
        Ok(buffer.blocks(1).to_vec())
    }

    fn counts(&mut self) -> &mut CountMap {
        &mut self.counts
    }
}
