//! Reference counts in memory: 2 bits a block as on disk, more only where a count needs more, memory only where counted.
//!
//! Counting 16 million mappings one random access at a time is bound by memory latency, so counters collect increments per
//! region in a [`CountBatch`] of their own and add them to the shared [`CountMap`] a region at a time, under that region's lock.

use crate::units::ENTRIES_PER_BITMAP;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

const PER_WORD: u64 = 32;
/// Blocks in a region: 16 KiB of counts, which stay in a core's first cache while a batch is added.
const REGION_BITS: u32 = 16;
const REGION_WORDS: usize = 1 << (REGION_BITS - 5);
const WORDS_PER_BITMAP: usize = (ENTRIES_PER_BITMAP / PER_WORD) as usize;
/// Increments collected before they are added.
const BATCH: usize = 1024;
/// Buckets of a batch at most, so that they stay in a core's second cache.
const MAX_BUCKETS: u64 = 512;

/// Count stored in 2 bits that says "three or more, see the map".
const MANY: u64 = 3;

#[derive(Debug, Default)]
struct Region {
    /// 2-bit counts, natural bit order; empty until something is counted here.
    words: Vec<u64>,
    /// Exact counts of blocks whose 2 bits say [`MANY`].
    many: HashMap<u16, u32>,
}

impl Region {
    fn add(&mut self, at: u16, n: u32) -> u32 {
        if self.words.is_empty() {
            self.words = vec![0; REGION_WORDS];
        }
        let word = &mut self.words[usize::from(at >> 5)];
        let shift = u32::from(at & 31) * 2;
        let old = *word >> shift & 3;
        if old != MANY && old + u64::from(n) < MANY {
            *word += u64::from(n) << shift;
            return old as u32 + n;
        }
        *word |= MANY << shift;
        let count = self.many.entry(at).or_insert(old as u32);
        *count = count.saturating_add(n);
        *count
    }

    fn get(&self, at: u16) -> u32 {
        let word = self.words.get(usize::from(at >> 5)).copied().unwrap_or(0);
        match word >> (u32::from(at & 31) * 2) & 3 {
            MANY => self.many.get(&at).copied().unwrap_or(0),
            few => few as u32,
        }
    }

    fn remove_one(&mut self, at: u16) {
        let count = self.get(at).saturating_sub(1);
        let Some(word) = self.words.get_mut(usize::from(at >> 5)) else {
            return;
        };
        if u64::from(count) >= MANY {
            self.many.insert(at, count);
        } else {
            let shift = u32::from(at & 31) * 2;
            self.many.remove(&at);
            *word = *word & !(3 << shift) | u64::from(count) << shift;
        }
    }
}

/// Counts of the blocks 0 to `nr_blocks` - 1.
#[derive(Debug)]
pub struct CountMap {
    regions: Vec<Mutex<Region>>,
    nr_blocks: u64,
}

fn split(block: u64) -> (usize, u16) {
    ((block >> REGION_BITS) as usize, block as u16)
}

impl CountMap {
    /// All counts zero. Memory is 2 bits a block in regions that are counted in, and about 100 bytes per 65 536 blocks.
    pub fn new(nr_blocks: u64) -> Self {
        let regions = nr_blocks.div_ceil(1 << REGION_BITS);
        Self {
            regions: (0..regions).map(|_| Mutex::default()).collect(),
            nr_blocks,
        }
    }

    /// Blocks that can be counted.
    pub fn nr_blocks(&self) -> u64 {
        self.nr_blocks
    }

    fn region(&self, index: usize) -> MutexGuard<'_, Region> {
        self.regions[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `n` to the count of `block`, which must be below [`nr_blocks`](Self::nr_blocks).
    pub fn add(&mut self, block: u64, n: u32) {
        let (region, at) = split(block);
        self.regions[region]
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .add(at, n);
    }

    /// Takes one from the count of `block`, which must be below [`nr_blocks`](Self::nr_blocks).
    pub fn remove_one(&mut self, block: u64) {
        let (region, at) = split(block);
        self.regions[region]
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .remove_one(at);
    }

    /// The count of `block`, which must be below [`nr_blocks`](Self::nr_blocks).
    pub fn get(&self, block: u64) -> u32 {
        let (region, at) = split(block);
        self.region(region).get(at)
    }

    /// The words that bitmap `index` holds on disk if these counts are right, and the counts of 3 and more, by block.
    pub fn bitmap(&self, index: u64) -> ([u64; WORDS_PER_BITMAP], Vec<(u64, u32)>) {
        let mut words = [0; WORDS_PER_BITMAP];
        let mut many = Vec::new();
        let first_word = index * WORDS_PER_BITMAP as u64;
        let mut done = 0;
        while done < WORDS_PER_BITMAP {
            let word = first_word + done as u64;
            let number = word / REGION_WORDS as u64;
            let from = (word % REGION_WORDS as u64) as usize;
            let n = (REGION_WORDS - from).min(WORDS_PER_BITMAP - done);
            if number >= self.regions.len() as u64 {
                break;
            }
            let region = self.region(number as usize);
            if !region.words.is_empty() {
                for (to, from) in words[done..done + n]
                    .iter_mut()
                    .zip(&region.words[from..from + n])
                {
                    *to = on_disk(*from);
                }
                let range = from * 32..(from + n) * 32;
                let here = region
                    .many
                    .iter()
                    .filter(|(at, _)| range.contains(&usize::from(**at)));
                many.extend(
                    here.map(|(&at, &count)| (number << REGION_BITS | u64::from(at), count)),
                );
            }
            done += n;
        }
        many.sort_unstable();
        (words, many)
    }
}

/// Natural pairs to disk pairs and back: on disk the lower bit position holds the high-order bit.
fn on_disk(word: u64) -> u64 {
    const LOW: u64 = 0x5555_5555_5555_5555;
    (word & LOW) << 1 | word >> 1 & LOW
}

/// One thread's increments on their way to a [`CountMap`]. Whatever is left is added when it is dropped.
#[derive(Debug)]
pub struct CountBatch<'a> {
    map: &'a CountMap,
    /// Blocks per bucket, as a shift.
    shift: u32,
    buckets: Vec<Vec<u64>>,
}

impl<'a> CountBatch<'a> {
    /// An empty batch.
    pub fn new(map: &'a CountMap) -> Self {
        let mut shift = REGION_BITS;
        while map.nr_blocks >> shift >= MAX_BUCKETS {
            shift += 1;
        }
        let buckets = (map.nr_blocks >> shift) as usize + 1;
        Self {
            map,
            shift,
            buckets: vec![Vec::new(); buckets],
        }
    }

    /// Counts `block` once more; a block past the end of the map is not counted.
    pub fn add(&mut self, block: u64) {
        if block >= self.map.nr_blocks {
            return;
        }
        let bucket = &mut self.buckets[(block >> self.shift) as usize];
        bucket.push(block);
        if bucket.len() >= BATCH {
            add_all(self.map, bucket);
        }
    }
}

fn add_all(map: &CountMap, blocks: &mut Vec<u64>) {
    let mut blocks_left = blocks.drain(..).peekable();
    while let Some(&block) = blocks_left.peek() {
        let (index, _) = split(block);
        let mut region = map.region(index);
        while let Some(block) = blocks_left.next_if(|&b| split(b).0 == index) {
            region.add(split(block).1, 1);
        }
    }
}

impl Drop for CountBatch<'_> {
    fn drop(&mut self) {
        for bucket in &mut self.buckets {
            add_all(self.map, bucket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_sizes_go_up_and_down() {
        let mut map = CountMap::new(200_000);
        for n in [0, 1, 2, 3, 4, 70_000] {
            for _ in 0..n.min(5) {
                map.add(150_000 + u64::from(n), 1);
            }
            map.add(150_000 + u64::from(n), n - n.min(5));
            assert_eq!(map.get(150_000 + u64::from(n)), n);
        }
        for left in (0..4).rev() {
            map.remove_one(150_004);
            assert_eq!(map.get(150_004), left);
        }
        assert_eq!(map.get(150_003), 3);
    }

    #[test]
    fn batches_from_many_threads_add_up() {
        let map = CountMap::new(300_000);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut batch = CountBatch::new(&map);
                    for i in 0..300_000_u64 {
                        batch.add(i.wrapping_mul(7919) % 300_000);
                    }
                    batch.add(300_000);
                });
            }
        });
        assert!((0..300_000).all(|b| map.get(b) == 4));
    }

    #[test]
    fn bitmap_words_are_the_disks_with_the_high_bit_first() {
        let mut map = CountMap::new(3 * ENTRIES_PER_BITMAP);
        for (block, count) in [
            (0, 1),
            (1, 2),
            (2, 3),
            (ENTRIES_PER_BITMAP, 1),
            (70_000 / 2, 9),
        ] {
            map.add(block, count);
        }
        let (words, many) = map.bitmap(0);
        assert_eq!(words[0], 0b11_01_10);
        assert_eq!(many, [(2, 3)]);
        assert_eq!(map.bitmap(1).0[0], 0b10);
        assert_eq!(map.bitmap(2).1, [(35_000, 9)]);
        assert_eq!(map.bitmap(3).0, [0; WORDS_PER_BITMAP]);
    }
}
