//! Metadata in memory, for tests and for building small images.

use super::BlockEngine;
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::io;
use std::sync::{PoisonError, RwLock};

/// A [`BlockEngine`] over a vector.
#[derive(Debug)]
pub struct RamEngine {
    memory: RwLock<Vec<u8>>,
}

impl RamEngine {
    /// A zeroed store of `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        Self::from_bytes(vec![0; blocks * BLOCK_SIZE])
    }

    /// A store with these contents; an incomplete last block is cut off.
    pub fn from_bytes(mut memory: Vec<u8>) -> Self {
        memory.truncate(memory.len() / BLOCK_SIZE * BLOCK_SIZE);
        Self {
            memory: RwLock::new(memory),
        }
    }

    /// The contents.
    pub fn into_bytes(self) -> Vec<u8> {
        self.memory
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn range(len: usize, start: MetadataBlock, bytes: usize) -> io::Result<std::ops::Range<usize>> {
    let past_end = || {
        io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{start} is past the last block"),
        )
    };
    let first = usize::try_from(start.0)
        .ok()
        .and_then(|b| b.checked_mul(BLOCK_SIZE))
        .ok_or_else(past_end)?;
    match first.checked_add(bytes) {
        Some(end) if end <= len => Ok(first..end),
        _ => Err(past_end()),
    }
}

impl BlockEngine for RamEngine {
    fn nr_blocks(&self) -> u64 {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        (memory.len() / BLOCK_SIZE) as u64
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        buf.copy_from_slice(&memory[range(memory.len(), start, buf.len())?]);
        Ok(())
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        let range = range(memory.len(), start, buf.len())?;
        memory[range].copy_from_slice(buf);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn depth(&self) -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }
}
