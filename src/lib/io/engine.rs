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

    /// Nothing refers to the block any more: its contents are not read before it is written again. A device does nothing about it;
    /// what is in memory takes less.
    fn forget(&self, _block: MetadataBlock) {}
}

/// What every implementer promises, run against each.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{AlignedBuffer, FileEngine, OverlayEngine, RamEngine, StagedEngine};
    use crate::units::BLOCK_SIZE;
    use std::sync::Arc;

    fn keeps_the_contract(engine: &dyn BlockEngine) {
        assert_eq!(engine.nr_blocks(), 8);
        assert!(engine.depth() >= 1);
        let mut run = AlignedBuffer::new(3);
        for (i, block) in run.blocks_mut(3).chunks_exact_mut(BLOCK_SIZE).enumerate() {
            block.fill(i as u8 + 1);
        }
        engine.write(MetadataBlock(5), run.blocks(3)).unwrap();
        engine.sync().unwrap();
        let mut read = AlignedBuffer::new(2);
        engine.read(MetadataBlock(6), read.blocks_mut(2)).unwrap();
        assert_eq!(read.blocks(2), &run.blocks(3)[BLOCK_SIZE..]);
        engine.read(MetadataBlock(4), read.blocks_mut(2)).unwrap();
        assert!(
            read.blocks(1).iter().all(|&b| b == 0),
            "other blocks are untouched"
        );
        for (start, blocks) in [(7, 2), (8, 1), (u64::MAX, 1), (1 << 60, 1)] {
            let at = MetadataBlock(start);
            assert!(
                engine.read(at, read.blocks_mut(blocks)).is_err(),
                "read at {start}"
            );
            assert!(
                engine.write(at, run.blocks(blocks)).is_err(),
                "write at {start}"
            );
        }
        assert_eq!(
            engine.nr_blocks(),
            8,
            "a failed write does not make it larger"
        );
        engine.read(MetadataBlock(7), read.blocks_mut(1)).unwrap();
        assert!(
            read.blocks(1).iter().all(|&b| b == 3),
            "nor does it write in part"
        );
        std::thread::scope(|scope| {
            for start in 5..8 {
                scope.spawn(move || {
                    let mut own = AlignedBuffer::new(1);
                    engine
                        .read(MetadataBlock(start), own.blocks_mut(1))
                        .unwrap();
                    assert!(own.blocks(1).iter().all(|&b| u64::from(b) == start - 4));
                });
            }
        });
    }

    #[test]
    fn memory_keeps_the_contract() {
        keeps_the_contract(&RamEngine::new(8));
    }

    #[test]
    fn an_overlay_keeps_the_contract() {
        keeps_the_contract(&OverlayEngine::zeroed(8));
        keeps_the_contract(&OverlayEngine::over(Arc::new(RamEngine::new(8))));
    }

    #[test]
    fn staged_writes_keep_the_contract() {
        keeps_the_contract(&StagedEngine::new(&RamEngine::new(8)).unwrap());
    }

    #[test]
    fn a_file_keeps_the_contract() {
        let file = tempfile::tempfile().unwrap();
        // An incomplete block at the end does not count.
        file.set_len(8 * BLOCK_SIZE as u64 + 100).unwrap();
        keeps_the_contract(&FileEngine::from_file(file, false).unwrap());
    }
}
