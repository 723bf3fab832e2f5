//! Reference counts in memory: 2 bits a block as on disk, more only where a count needs more, memory only where counted.
//!
//! Counting 16 million mappings one random access at a time is bound by memory latency, so counters collect increments per
//! region in a [`CountBatch`] of their own and add them to the shared [`CountMap`] a region at a time, under that region's lock.

use crate::units::ENTRIES_PER_BITMAP;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

const PER_WORD: u64 = 32;
/// Blocks in a region, as a shift: 16 KiB of counts, which stay in a core's first cache while a batch is added.
const REGION_BITS: u32 = 16;
const REGION_WORDS: usize = 1 << (REGION_BITS - 5);
const WORDS_PER_BITMAP: usize = (ENTRIES_PER_BITMAP / PER_WORD) as usize;
/// Increments of one region collected before they are added, at most.
const MAX_BATCH: usize = 1024;
/// Increments that one [`CountBatch`] collects in all: 8 MiB of them.
const MAX_COLLECTED: usize = 4 << 20;

/// Count stored in 2 bits that says "three or more, see the map".
const MANY: u64 = 3;

#[derive(Debug)]
struct Region {
    /// 2-bit counts, natural bit order.
    words: [u64; REGION_WORDS],
    /// Exact counts of blocks whose 2 bits say [`MANY`].
    many: HashMap<u16, u32>,
}

impl Default for Region {
    fn default() -> Self {
        Self {
            words: [0; REGION_WORDS],
            many: HashMap::new(),
        }
    }
}

impl Region {
    fn add_one(&mut self, at: u16) {
        let word = &mut self.words[usize::from(at >> 5)];
        let shift = u32::from(at & 31) * 2;
        if (*word >> shift) & 3 < MANY - 1 {
            *word += 1 << shift;
        } else {
            self.add(at, 1);
        }
    }

    fn add(&mut self, at: u16, n: u32) {
        let word = &mut self.words[usize::from(at >> 5)];
        let shift = u32::from(at & 31) * 2;
        let old = (*word >> shift) & 3;
        if old != MANY && old + u64::from(n) < MANY {
            *word += u64::from(n) << shift;
            return;
        }
        *word |= MANY << shift;
        let count = self.many.entry(at).or_insert(old as u32);
        *count = count.saturating_add(n);
    }

    fn get(&self, at: u16) -> u32 {
        match (self.words[usize::from(at >> 5)] >> (u32::from(at & 31) * 2)) & 3 {
            MANY => self.many.get(&at).copied().unwrap_or(0),
            few => few as u32,
        }
    }

    fn remove_one(&mut self, at: u16) {
        let count = self.get(at).saturating_sub(1);
        if u64::from(count) >= MANY {
            self.many.insert(at, count);
            return;
        }
        let word = &mut self.words[usize::from(at >> 5)];
        let shift = u32::from(at & 31) * 2;
        self.many.remove(&at);
        *word = (*word & !(3 << shift)) | u64::from(count) << shift;
    }
}

/// A region comes into being when something is counted in it.
type Slot = Option<Box<Region>>;

/// Counts of the blocks 0 to `nr_blocks` - 1.
#[derive(Debug)]
pub struct CountMap {
    regions: Vec<Mutex<Slot>>,
    nr_blocks: u64,
}

fn split(block: u64) -> (usize, u16) {
    ((block >> REGION_BITS) as usize, block as u16)
}

impl CountMap {
    /// All counts zero. Memory is 2 bits a block in regions that are counted in, and 16 bytes per 65 536 blocks.
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

    fn slot(&self, index: usize) -> MutexGuard<'_, Slot> {
        self.regions[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn region(&mut self, index: usize) -> &mut Region {
        let slot = self.regions[index]
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert_default()
    }

    /// Adds `n` to the count of `block`, which must be below [`nr_blocks`](Self::nr_blocks).
    pub fn add(&mut self, block: u64, n: u32) {
        let (region, at) = split(block);
        self.region(region).add(at, n);
    }

    /// Takes one from the count of `block`, which must be below [`nr_blocks`](Self::nr_blocks).
    pub fn remove_one(&mut self, block: u64) {
        let (region, at) = split(block);
        self.region(region).remove_one(at);
    }

    /// The count of `block`, which must be below [`nr_blocks`](Self::nr_blocks).
    pub fn get(&self, block: u64) -> u32 {
        let (region, at) = split(block);
        self.slot(region).as_ref().map_or(0, |r| r.get(at))
    }

    /// True when no block of bitmap `index` can have a count: a large pool is mostly of this kind.
    pub fn is_untouched(&self, index: u64) -> bool {
        let first = (index * ENTRIES_PER_BITMAP) >> REGION_BITS;
        let last = ((index + 1) * ENTRIES_PER_BITMAP - 1) >> REGION_BITS;
        (first..=last.min(self.regions.len() as u64 - 1))
            .all(|region| self.slot(region as usize).is_none())
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
            if let Some(region) = &*self.slot(number as usize) {
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

/// One thread's increments on their way to a [`CountMap`].
#[derive(Debug)]
pub struct CountBatch {
    /// Increments collected per region before they are added.
    size: usize,
    /// `size` places for each region.
    places: Vec<u16>,
    /// Places in use, by region.
    used: Vec<u16>,
    nr_blocks: u64,
}

impl CountBatch {
    /// An empty batch for `map`.
    pub fn new(map: &CountMap) -> Self {
        let regions = map.regions.len();
        let size = (MAX_COLLECTED / regions.max(1)).clamp(16, MAX_BATCH);
        Self {
            size,
            places: vec![0; regions * size],
            used: vec![0; regions],
            nr_blocks: map.nr_blocks,
        }
    }

    /// Counts `block` of `map` once more, now or later; a block past the end of the map is not counted.
    #[inline]
    pub fn add(&mut self, map: &CountMap, block: u64) {
        if block >= self.nr_blocks {
            return;
        }
        let (region, at) = split(block);
        let used = usize::from(self.used[region]);
        self.places[region * self.size + used] = at;
        self.used[region] = used as u16 + 1;
        if used + 1 == self.size {
            self.add_region(map, region);
        }
    }

    /// Adds everything that was collected; until then counts of `map` are too low.
    pub fn flush(&mut self, map: &CountMap) {
        for region in 0..self.used.len() {
            self.add_region(map, region);
        }
    }

    fn add_region(&mut self, map: &CountMap, region: usize) {
        let used = std::mem::take(&mut self.used[region]);
        if used == 0 {
            return;
        }
        let mut slot = map.slot(region);
        let counts = slot.get_or_insert_default();
        for &at in &self.places[region * self.size..][..usize::from(used)] {
            counts.add_one(at);
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
                        batch.add(&map, i.wrapping_mul(7919) % 300_000);
                    }
                    batch.add(&map, 300_000);
                    batch.flush(&map);
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
