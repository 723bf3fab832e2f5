//! A store in memory of what was written over another one, or over zeros: as large as what is in use of it.

use super::BlockEngine;
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

type Written = HashMap<u64, Box<[u8; BLOCK_SIZE]>>;

/// A [`BlockEngine`] in memory. What was not written, or [forgotten](BlockEngine::forget), is as in the engine below, which is only
/// read; or zeros, if there is none.
pub struct OverlayEngine {
    below: Option<Arc<dyn BlockEngine>>,
    nr_blocks: u64,
    written: RwLock<Written>,
}

impl std::fmt::Debug for OverlayEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OverlayEngine")
            .field("nr_blocks", &self.nr_blocks)
            .finish_non_exhaustive()
    }
}

impl OverlayEngine {
    /// Over `below`.
    pub fn over(below: Arc<dyn BlockEngine>) -> Self {
        Self {
            nr_blocks: below.nr_blocks(),
            below: Some(below),
            written: RwLock::default(),
        }
    }

    /// Over so many blocks of zeros.
    pub fn zeroed(nr_blocks: u64) -> Self {
        Self {
            below: None,
            nr_blocks,
            written: RwLock::default(),
        }
    }

    fn refuse_past_end(&self, start: MetadataBlock, blocks: usize) -> io::Result<()> {
        let end = start.0.checked_add(blocks as u64);
        match end.is_some_and(|end| end <= self.nr_blocks) {
            true => Ok(()),
            false => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{start} is past the last block"),
            )),
        }
    }
}

impl BlockEngine for OverlayEngine {
    fn nr_blocks(&self) -> u64 {
        self.nr_blocks
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        self.refuse_past_end(start, buf.len() / BLOCK_SIZE)?;
        let written = self.written.read().unwrap_or_else(PoisonError::into_inner);
        let is_written = |n: usize| written.contains_key(&(start.0 + n as u64));
        let is_all = (0..buf.len() / BLOCK_SIZE).all(is_written);
        match &self.below {
            Some(below) if !is_all => below.read(start, buf)?,
            None if !is_all => buf.fill(0),
            _ => {}
        }
        for (block, number) in buf.chunks_exact_mut(BLOCK_SIZE).zip(start.0..) {
            if let Some(found) = written.get(&number) {
                block.copy_from_slice(&**found);
            }
        }
        Ok(())
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        self.refuse_past_end(start, buf.len() / BLOCK_SIZE)?;
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        for (block, number) in buf.chunks_exact(BLOCK_SIZE).zip(start.0..) {
            let place = written
                .entry(number)
                .or_insert_with(|| Box::new([0; BLOCK_SIZE]));
            place.copy_from_slice(block);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn depth(&self) -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    fn forget(&self, block: MetadataBlock) {
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        written.remove(&block.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RamEngine;
    use crate::thin::PoolMetadata;
    use crate::units::{ThinBlock, ThinId};

    #[test]
    fn what_is_forgotten_takes_no_memory_and_is_as_below() {
        let below = RamEngine::from_bytes(vec![7; 4 * BLOCK_SIZE]);
        let overlay = OverlayEngine::over(Arc::new(below));
        overlay
            .write(MetadataBlock(1), &[8; 2 * BLOCK_SIZE])
            .unwrap();
        overlay.forget(MetadataBlock(2));
        let mut found = vec![0; 4 * BLOCK_SIZE];
        overlay.read(MetadataBlock(0), &mut found).unwrap();
        let first: Vec<u8> = found.chunks(BLOCK_SIZE).map(|block| block[0]).collect();
        assert_eq!(first, [7, 8, 7, 7]);
        assert_eq!(overlay.written.read().unwrap().len(), 1);
    }

    #[test]
    fn a_pool_takes_as_much_as_is_in_use_however_often_it_is_committed() {
        let overlay = Arc::new(OverlayEngine::zeroed(512));
        let mut pool = PoolMetadata::format(Arc::clone(&overlay) as _, 128, 1 << 20).unwrap();
        pool.resize_data(5000).unwrap();
        pool.create_thin(ThinId(0)).unwrap();
        for round in 0..500 {
            let data = pool.alloc_data_block().unwrap().unwrap();
            pool.insert_block(ThinId(0), ThinBlock(round * 7), data)
                .unwrap();
            pool.commit().unwrap();
            let (in_use, written) = (
                pool.status().unwrap().allocated_metadata_blocks,
                overlay.written.read().unwrap().len() as u64,
            );
            assert!(
                written <= in_use + 16,
                "{written} of {in_use} in round {round}"
            );
        }
    }
}
