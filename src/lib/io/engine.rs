//! What every store of metadata blocks can do.

use crate::units::MetadataBlock;
use std::io;

/// A store of 4 KiB blocks, read and written in runs, from any number of threads.
///
/// * `buf` is a whole number of blocks; for engines on block devices it is an [`AlignedBuffer`](super::AlignedBuffer).
/// * Reads and writes are complete or an error; a run past the end is an error.
/// * A write is durable only after the next [`sync`](Self::sync) has succeeded, which is both the wait and the flush.
pub trait BlockEngine: Send + Sync {
    /// Size in whole blocks.
    fn nr_blocks(&self) -> u64;

    /// Reads the run of blocks that starts at `start` and fills `buf`.
    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()>;

    /// Writes `buf` to the run of blocks that starts at `start`.
    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()>;

    /// Makes everything written so far durable.
    fn sync(&self) -> io::Result<()>;

    /// How many requests it pays to have in flight.
    fn depth(&self) -> usize;
}
