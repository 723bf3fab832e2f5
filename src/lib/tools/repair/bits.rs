//! A set of metadata blocks, one bit each.

use crate::units::MetadataBlock;

/// Blocks of a device of a known size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bits {
    /// Up to the last block that is in it: most of a large device is seldom in use.
    words: Vec<u64>,
    size: u64,
}

impl Bits {
    /// No blocks, of a device of `size` blocks.
    pub(super) fn new(size: u64) -> Self {
        Self {
            words: Vec::new(),
            size,
        }
    }

    /// Blocks of the device.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn insert(&mut self, block: MetadataBlock) {
        if block.0 < self.size {
            let word = (block.0 / 64) as usize;
            self.words.resize(self.words.len().max(word + 1), 0);
            self.words[word] |= 1 << (block.0 % 64);
        }
    }

    pub(super) fn contains(&self, block: MetadataBlock) -> bool {
        self.word(block.0 / 64) >> (block.0 % 64) & 1 == 1
    }

    fn word(&self, word: u64) -> u64 {
        self.words.get(word as usize).copied().unwrap_or(0)
    }

    /// Adds all blocks of `other`.
    pub(super) fn join(&mut self, other: &Self) {
        self.words
            .resize(self.words.len().max(other.words.len()), 0);
        let pairs = self.words.iter_mut().zip(&other.words);
        pairs.for_each(|(a, b)| *a |= b);
    }

    /// The blocks, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = MetadataBlock> + '_ {
        (0..64 * self.words.len() as u64)
            .map(MetadataBlock)
            .filter(|&b| self.contains(b))
    }

    /// How many blocks there are.
    pub(super) fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// How many blocks of `self` are not in `other`.
    pub(super) fn nr_missing_from(&self, other: &Self) -> u64 {
        let words = (0..).zip(&self.words);
        words
            .map(|(w, word)| u64::from((word & !other.word(w)).count_ones()))
            .sum()
    }

    /// How far an allocator that starts at `start`, goes upwards and once around, and takes every block that is in neither set
    /// would have to leave such blocks out in order to allocate exactly what `next` has and `self` has not. None if that is
    /// nothing.
    pub(super) fn nr_skipped(&self, next: &Self, start: u64) -> Option<u64> {
        let start = start.min(self.size);
        let new = |from: u64, to: u64| self.last(next, from, to);
        let ranges = match new(0, start) {
            Some(last) => vec![(start, self.size), (0, last)],
            None => vec![(start, new(start, self.size)?)],
        };
        let skipped = ranges
            .into_iter()
            .map(|(from, to)| self.nr_free_in_both(next, from, to));
        Some(skipped.sum())
    }

    /// The last block in `from..to` that `next` has and `self` has not.
    fn last(&self, next: &Self, from: u64, to: u64) -> Option<u64> {
        let words = to.div_ceil(64).min(next.words.len() as u64);
        (from / 64..words).rev().find_map(|w| {
            let word = next.word(w) & !self.word(w) & within(w, from, to);
            (word != 0).then(|| w * 64 + 63 - u64::from(word.leading_zeros()))
        })
    }

    fn nr_free_in_both(&self, other: &Self, from: u64, to: u64) -> u64 {
        let words = self.words.len().max(other.words.len()) as u64;
        let used = (from / 64..to.div_ceil(64).min(words)).map(|w| {
            let used = (self.word(w) | other.word(w)) & within(w, from, to);
            u64::from(used.count_ones())
        });
        to.saturating_sub(from) - used.sum::<u64>()
    }
}

/// The bits of word `w` that stand for blocks in `from..to`.
fn within(w: u64, from: u64, to: u64) -> u64 {
    let low = from.saturating_sub(w * 64).min(64);
    let high = to.saturating_sub(w * 64).min(64);
    let below = |n: u64| if n == 64 { u64::MAX } else { (1 << n) - 1 };
    below(high) & !below(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(blocks: &[u64]) -> Bits {
        let mut bits = Bits::new(200);
        blocks.iter().for_each(|&b| bits.insert(MetadataBlock(b)));
        bits
    }

    #[test]
    fn an_allocator_that_goes_upwards_skips_nothing() {
        let old = set(&[1, 2, 70, 71]);
        assert_eq!(old.nr_skipped(&set(&[1, 2, 72, 73]), 72), Some(0));
        assert_eq!(old.nr_skipped(&set(&[1, 2, 72, 74]), 72), Some(1));
        assert_eq!(old.nr_skipped(&set(&[1, 2, 3]), 72), Some(200 - 72 + 1));
        assert_eq!(old.nr_skipped(&set(&[1, 2, 0, 3, 4]), 0), Some(0));
        assert_eq!(old.nr_skipped(&set(&[1, 70]), 0), None);
    }

    #[test]
    fn counts_cross_words() {
        let (a, b) = (set(&[63, 64, 199]), set(&[64]));
        assert_eq!((a.nr_missing_from(&b), b.nr_missing_from(&a)), (2, 0));
        assert_eq!(b.nr_skipped(&a, 60), Some(3 + 199 - 65));
    }
}
