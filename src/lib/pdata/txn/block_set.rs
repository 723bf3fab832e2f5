//! A set of block numbers that costs two kilobytes for each stretch of blocks that one bitmap counts and that it has any of.

use crate::units::ENTRIES_PER_BITMAP;
use std::collections::BTreeMap;

const WORDS: usize = (ENTRIES_PER_BITMAP / 64) as usize;

/// The set.
#[derive(Debug, Default)]
pub(super) struct BlockSet {
    chunks: BTreeMap<u64, Box<[u64; WORDS]>>,
}

fn place(block: u64) -> (u64, usize, u64) {
    let bit = block % ENTRIES_PER_BITMAP;
    (
        block / ENTRIES_PER_BITMAP,
        (bit / 64) as usize,
        1 << (bit % 64),
    )
}

impl BlockSet {
    pub(super) fn insert(&mut self, block: u64) {
        let (chunk, word, bit) = place(block);
        self.chunks
            .entry(chunk)
            .or_insert_with(|| Box::new([0; WORDS]))[word] |= bit;
    }

    /// Takes a block out; true if it was in.
    pub(super) fn remove(&mut self, block: u64) -> bool {
        let (chunk, word, bit) = place(block);
        let Some(words) = self.chunks.get_mut(&chunk) else {
            return false;
        };
        let was_in = words[word] & bit != 0;
        words[word] &= !bit;
        was_in
    }

    pub(super) fn contains(&self, block: u64) -> bool {
        let (chunk, word, bit) = place(block);
        self.chunks
            .get(&chunk)
            .is_some_and(|words| words[word] & bit != 0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u64> {
        self.chunks.iter().flat_map(|(chunk, words)| {
            let begin = chunk * ENTRIES_PER_BITMAP;
            words.iter().enumerate().flat_map(move |(at, &word)| {
                let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
                bits.map(move |bit| begin + at as u64 * 64 + bit)
            })
        })
    }

    pub(super) fn clear(&mut self) {
        self.chunks.clear();
    }
}
