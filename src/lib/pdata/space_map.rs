//! Space maps on disk: root, index entries, bitmaps with 2-bit counts; and how a bitmap differs from the counts it should hold.
//!
//! Facts: `FORMAT.md`, "Space maps".

use crate::bytes::{get_u32, get_u64, put_u32, put_u64};
use crate::units::{BLOCK_SIZE, ENTRIES_PER_BITMAP, MetadataBlock};
use serde::Serialize;

/// Bytes of a space-map root in the superblock.
pub const ROOT_SIZE: usize = 32;
/// Bytes of an index entry.
pub const INDEX_ENTRY_SIZE: usize = 16;
/// Bytes before the entries of a bitmap or of the metadata index block.
pub(crate) const BITMAP_HEADER: usize = 16;
/// Bytes of counts in a bitmap block.
pub const BITMAP_BYTES: usize = BLOCK_SIZE - BITMAP_HEADER;

/// Bitmaps needed for `nr_blocks` blocks.
pub fn nr_bitmaps(nr_blocks: u64) -> u64 {
    nr_blocks.div_ceil(ENTRIES_PER_BITMAP)
}

/// Where a space map is and what it claims to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SpaceMapRoot {
    /// Blocks that are counted.
    pub nr_blocks: u64,
    /// Blocks whose count is not zero.
    pub nr_allocated: u64,
    /// Root of the index tree (data) or the index block (metadata).
    pub bitmap_root: MetadataBlock,
    /// Root of the tree of counts of 3 and more.
    pub ref_count_root: MetadataBlock,
}

impl SpaceMapRoot {
    /// Reads the first 32 bytes of a root field; the rest of the field is not defined.
    pub fn unpack(bytes: &[u8]) -> Self {
        Self {
            nr_blocks: get_u64(bytes, 0),
            nr_allocated: get_u64(bytes, 8),
            bitmap_root: MetadataBlock(get_u64(bytes, 16)),
            ref_count_root: MetadataBlock(get_u64(bytes, 24)),
        }
    }

    /// Writes 32 bytes.
    pub fn pack(&self, bytes: &mut [u8]) {
        put_u64(bytes, 0, self.nr_blocks);
        put_u64(bytes, 8, self.nr_allocated);
        put_u64(bytes, 16, self.bitmap_root.0);
        put_u64(bytes, 24, self.ref_count_root.0);
    }
}

/// What an index says of one bitmap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexEntry {
    /// Where the bitmap is.
    pub block: MetadataBlock,
    /// Zero counts in the whole bitmap, its part past the end of the device included.
    pub nr_free: u32,
    /// No count below this entry is zero; a hint that may be lower than exact.
    pub none_free_before: u32,
}

impl IndexEntry {
    /// Reads 16 bytes.
    pub fn unpack(bytes: &[u8]) -> Self {
        Self {
            block: MetadataBlock(get_u64(bytes, 0)),
            nr_free: get_u32(bytes, 8),
            none_free_before: get_u32(bytes, 12),
        }
    }

    /// Writes 16 bytes.
    pub fn pack(&self, bytes: &mut [u8]) {
        put_u64(bytes, 0, self.block.0);
        put_u32(bytes, 8, self.nr_free);
        put_u32(bytes, 12, self.none_free_before);
    }
}

/// An entry of the tree of counts of 3 and more: block and count.
pub type OverflowEntry = (u64, u32);

/// The counts of a bitmap block whose seal has been verified.
#[derive(Clone, Debug)]
pub struct Bitmap {
    words: Vec<u64>,
}

/// A stretch of blocks whose stored count differs from the count that the trees give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// First block of the stretch.
    pub begin: u64,
    /// Blocks in the stretch.
    pub length: u64,
    /// Count on disk.
    pub stored: u32,
    /// Count that follows from the trees.
    pub expected: u32,
}

impl Bitmap {
    /// The counts in a bitmap block of 4096 bytes.
    pub fn from_block(block: &[u8]) -> Self {
        Self {
            words: block[BITMAP_HEADER..]
                .chunks_exact(8)
                .map(|w| get_u64(w, 0))
                .collect(),
        }
    }

    /// A bitmap with these words in disk order.
    pub fn from_words(words: &[u64]) -> Self {
        Self {
            words: words.to_vec(),
        }
    }

    /// Writes the counts into a block of 4096 bytes; the header is not touched.
    pub fn write_to(&self, block: &mut [u8]) {
        for (bytes, word) in block[BITMAP_HEADER..].chunks_exact_mut(8).zip(&self.words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// True when the counts are exactly `words`.
    pub fn equals(&self, words: &[u64]) -> bool {
        self.words == words
    }

    /// The 2-bit count of an entry; 3 means three or more.
    pub fn get(&self, entry: u64) -> u32 {
        let pair = self.words[(entry / 32) as usize] >> (entry % 32 * 2) & 3;
        (pair >> 1 | (pair & 1) << 1) as u32
    }

    /// Zero counts in the whole bitmap.
    pub fn nr_free(&self) -> u32 {
        self.words
            .iter()
            .map(|w| (!(w | w >> 1) & 0x5555_5555_5555_5555).count_ones())
            .sum()
    }

    /// Counts that are not zero at `first` and after it.
    pub fn nr_used_from(&self, first: u64) -> u64 {
        (first..ENTRIES_PER_BITMAP)
            .filter(|&e| self.get(e) != 0)
            .count() as u64
    }

    /// Entries that say "three or more".
    pub fn nr_many(&self) -> u64 {
        self.words
            .iter()
            .map(|w| u64::from((w & w >> 1 & 0x5555_5555_5555_5555).count_ones()))
            .sum()
    }

    /// Index of the first zero count, or the number of entries when none is zero.
    pub fn first_free(&self) -> u32 {
        for (i, w) in self.words.iter().enumerate() {
            let free = !(w | w >> 1) & 0x5555_5555_5555_5555;
            if free != 0 {
                return i as u32 * 32 + free.trailing_zeros() / 2;
            }
        }
        ENTRIES_PER_BITMAP as u32
    }

    /// Every stretch of blocks of bitmap `index` whose count differs from what it should be. `stored_many` and
    /// `expected_many` are the counts of 3 and more within this bitmap, ascending by block.
    pub fn differences(
        &self,
        index: u64,
        stored_many: &[OverflowEntry],
        expected: &[u64],
        expected_many: &[OverflowEntry],
    ) -> Vec<Difference> {
        if self.words == expected && stored_many == expected_many {
            return Vec::new();
        }
        let base = index * ENTRIES_PER_BITMAP;
        let wanted = Self::from_words(expected);
        let exact = |pair: u32, many: &[OverflowEntry], block| match pair {
            // A pair without its entry in the tree counts as 3: the least it can mean.
            3 => many
                .binary_search_by_key(&block, |e| e.0)
                .map_or(3, |i| many[i].1),
            few => few,
        };
        let mut found: Vec<Difference> = Vec::new();
        let same = |word: usize| {
            let w = self.words[word];
            w == expected[word] && w & w >> 1 & 0x5555_5555_5555_5555 == 0
        };
        for entry in (0..ENTRIES_PER_BITMAP).filter(|e| !same((e / 32) as usize)) {
            let block = base + entry;
            let stored = exact(self.get(entry), stored_many, block);
            let expected = exact(wanted.get(entry), expected_many, block);
            if stored == expected {
                continue;
            }
            match found.last_mut() {
                Some(d)
                    if d.begin + d.length == block
                        && d.stored == stored
                        && d.expected == expected =>
                {
                    d.length += 1;
                }
                _ => found.push(Difference {
                    begin: block,
                    length: 1,
                    stored,
                    expected,
                }),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(pairs: &[(u64, u64)]) -> Vec<u64> {
        let mut words = vec![0; BITMAP_BYTES / 8];
        for &(entry, raw) in pairs {
            words[(entry / 32) as usize] |= raw << (entry % 32 * 2);
        }
        words
    }

    #[test]
    fn the_documented_example_decodes() {
        let mut block = vec![0; BLOCK_SIZE];
        block[16] = 0x56;
        block[17] = 0x09;
        let bitmap = Bitmap::from_block(&block);
        assert_eq!(
            [0, 1, 2, 3, 4, 5, 6].map(|e| bitmap.get(e)),
            [1, 2, 2, 2, 2, 1, 0]
        );
        assert_eq!(bitmap.nr_free(), 16_314);
        assert_eq!(bitmap.first_free(), 6);
    }

    #[test]
    fn differences_merge_neighbours_and_read_exact_counts() {
        let disk = Bitmap::from_words(&words(&[(0, 2), (1, 2), (5, 3), (40, 3)]));
        let right = words(&[(5, 3), (40, 3), (41, 2)]);
        let base = ENTRIES_PER_BITMAP;
        let diff = |begin, length, stored, expected| Difference {
            begin: base + begin,
            length,
            stored,
            expected,
        };
        assert_eq!(
            disk.differences(
                1,
                &[(base + 5, 7), (base + 40, 4)],
                &right,
                &[(base + 5, 7), (base + 40, 3)]
            ),
            [diff(0, 2, 1, 0), diff(40, 1, 4, 3), diff(41, 1, 0, 1)]
        );
    }

    #[test]
    fn a_full_bitmap_has_no_free_entry() {
        let full = Bitmap::from_words(&vec![u64::MAX; BITMAP_BYTES / 8]);
        assert_eq!((full.nr_free(), full.first_free()), (0, 16_320));
        assert_eq!(full.nr_used_from(16_319), 1);
    }
}
