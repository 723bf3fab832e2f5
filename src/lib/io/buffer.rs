//! Memory that O_DIRECT accepts: 4096 bytes aligned, got without `unsafe` by allocating one block more.

use crate::units::BLOCK_SIZE;

/// A zeroed byte buffer whose first byte lies on a 4096-byte boundary.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// A buffer of `blocks` metadata blocks.
    pub fn new(blocks: usize) -> Self {
        let len = blocks * BLOCK_SIZE;
        let memory = vec![0; len + BLOCK_SIZE];
        let start = memory.as_ptr().addr().next_multiple_of(BLOCK_SIZE) - memory.as_ptr().addr();
        Self { memory, start, len }
    }

    /// The first `blocks` blocks, to read.
    pub fn blocks(&self, blocks: usize) -> &[u8] {
        &self.memory[self.start..self.start + self.len][..blocks * BLOCK_SIZE]
    }

    /// The first `blocks` blocks, to fill.
    pub fn blocks_mut(&mut self, blocks: usize) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len][..blocks * BLOCK_SIZE]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_and_as_large_as_asked() {
        let mut buffer = AlignedBuffer::new(3);
        assert_eq!(buffer.blocks_mut(3).len(), 3 * BLOCK_SIZE);
        assert_eq!(buffer.blocks(3).as_ptr().addr() % BLOCK_SIZE, 0);
    }
}
