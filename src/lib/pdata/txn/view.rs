//! The words of a cached block, as a btree node and as a bitmap.
//!
//! All access is atomic and relaxed, which costs no more than plain access: whoever reads a block either holds its lock, or asks
//! afterwards whether it was changed meanwhile. A node's counts were verified when it was read into the cache; an index that a
//! torn read makes too large is bounded here, so that nothing is ever read outside the block.

use crate::pdata::forest::TreeKind;
use crate::pdata::node::{FLAG_INTERNAL, FLAG_LEAF, max_entries};
use crate::prefetch::prefetch;
use crate::units::{BLOCK_SIZE, ENTRIES_PER_BITMAP, MetadataBlock};
use std::hint;
use std::sync::atomic::{AtomicU64, Ordering};

/// 64-bit words of a block.
pub(super) const WORDS: usize = BLOCK_SIZE / 8;
const HEADER: usize = 4;
const BITMAP_HEADER: usize = 2;
/// Words of a line of cache.
const LINE: usize = 8;
const LOW_BITS: u64 = 0x5555_5555_5555_5555;

/// A value of any tree: as many of the words as its size needs.
pub(crate) type Cell = [u64; 3];

/// The value of a tree whose values are numbers.
pub(crate) fn cell(value: u64) -> Cell {
    [value, 0, 0]
}

/// Words that are moved at once: all of them are read before one is written.
const STEP: usize = 8;

/// Copies as many words, which may overlap.
#[inline(always)]
fn copy_step(from: &[AtomicU64], to: &[AtomicU64]) {
    if let (Some(from), Some(to)) = (from.first_chunk::<STEP>(), to.first_chunk::<STEP>()) {
        let words = from.each_ref().map(|word| word.load(Ordering::Relaxed));
        for (to, word) in to.iter().zip(words) {
            to.store(word, Ordering::Relaxed);
        }
    }
}

/// The words of one block.
#[derive(Clone, Copy)]
pub(crate) struct View<'a>(pub(super) &'a [AtomicU64; WORDS]);

impl View<'_> {
    #[inline]
    pub(super) fn word(self, at: usize) -> u64 {
        self.0[at % WORDS].load(Ordering::Relaxed)
    }

    pub(super) fn set_word(self, at: usize, word: u64) {
        self.0[at % WORDS].store(word, Ordering::Relaxed);
    }

    pub(super) fn fill_from(self, bytes: &[u8]) {
        for (word, bytes) in self.0.iter().zip(bytes.chunks_exact(8)) {
            let bytes = bytes.try_into().unwrap_or_default();
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
    }

    pub(super) fn copy_to(self, bytes: &mut [u8]) {
        for (word, bytes) in self.0.iter().zip(bytes.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
    }

    pub(super) fn copy_from(self, other: View<'_>) {
        for (to, from) in self.0.iter().zip(other.0) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    pub(super) fn clear(self) {
        self.0.iter().for_each(|w| w.store(0, Ordering::Relaxed));
    }
}

/// As a btree node.
impl View<'_> {
    /// Makes the zeroed block an empty node.
    pub(super) fn init_node(self, is_leaf: bool, kind: TreeKind) {
        let value_size = match is_leaf {
            true => kind.value_size(),
            false => 8,
        };
        let flags = if is_leaf { FLAG_LEAF } else { FLAG_INTERNAL };
        self.set_word(0, u64::from(flags) << 32);
        self.set_word(2, (max_entries(value_size) as u64) << 32);
        self.set_word(3, value_size as u64);
    }

    #[inline]
    pub(super) fn is_leaf(self) -> bool {
        self.word(0) >> 32 == u64::from(FLAG_LEAF)
    }

    #[inline]
    pub(super) fn len(self) -> usize {
        (self.word(2) & 0xffff_ffff) as usize
    }

    pub(super) fn max(self) -> usize {
        (self.word(2) >> 32) as usize
    }

    fn value_size(self) -> usize {
        (self.word(3) & 0xffff_ffff) as usize
    }

    pub(super) fn set_len(self, len: usize) {
        self.set_word(2, self.word(2) >> 32 << 32 | len as u64);
    }

    #[inline]
    pub(super) fn key(self, at: usize) -> u64 {
        self.word(HEADER + at)
    }

    pub(super) fn set_key(self, at: usize, key: u64) {
        self.set_word(HEADER + at, key);
    }

    pub(super) fn value(self, at: usize) -> Cell {
        let base = HEADER + self.max();
        match self.value_size() {
            4 => cell(self.word(base + at / 2) >> (at % 2 * 32) & 0xffff_ffff),
            16 => [self.word(base + 2 * at), self.word(base + 2 * at + 1), 0],
            24 => [0, 1, 2].map(|i| self.word(base + 3 * at + i)),
            _ => cell(self.word(base + at)),
        }
    }

    pub(super) fn set_value(self, at: usize, value: Cell) {
        let base = HEADER + self.max();
        match self.value_size() {
            4 => {
                let shift = at % 2 * 32;
                let old = self.word(base + at / 2) & !(0xffff_ffff << shift);
                self.set_word(base + at / 2, old | (value[0] & 0xffff_ffff) << shift);
            }
            size => {
                let words = size / 8;
                for (i, word) in value.into_iter().take(words).enumerate() {
                    self.set_word(base + words * at + i, word);
                }
            }
        }
    }

    /// The value of a node whose values are 8 bytes.
    #[inline]
    pub(super) fn number(self, max: usize, at: usize) -> u64 {
        self.word(HEADER + max + at)
    }

    #[inline]
    pub(super) fn child(self, at: usize) -> MetadataBlock {
        MetadataBlock(self.number(max_entries(8), at))
    }

    /// How many keys are at most `key`.
    #[inline]
    pub(super) fn upper(self, key: u64) -> usize {
        // Without branches: which way a search goes is as good as random.
        let (mut low, mut len) = (0, self.len().min(WORDS));
        if len == 0 {
            return 0;
        }
        while len > 1 {
            let half = len / 2;
            low += hint::select_unpredictable(self.key(low + half) <= key, half, 0);
            len -= half;
        }
        low + usize::from(self.key(low) <= key)
    }

    /// The same of a leaf: where a device is written from the front to the back, `key` comes behind all of them.
    #[inline]
    pub(super) fn upper_of_leaf(self, key: u64) -> usize {
        let len = self.len().min(WORDS);
        match len > 0 && self.key(len - 1) <= key {
            true => len,
            false => self.upper(key),
        }
    }

    /// The entry with the largest key that is at most `key`.
    #[inline]
    pub(super) fn floor(self, key: u64) -> Option<usize> {
        self.upper(key).checked_sub(1)
    }

    /// The entry that has `key`.
    #[inline]
    pub(super) fn find(self, key: u64) -> Option<usize> {
        // Where no key is left out it is this one, and a search, which reads one line of cache after the other, is spared.
        let guess = key.wrapping_sub(self.key(0));
        if guess < self.len().min(WORDS) as u64 && self.key(guess as usize) == key {
            return Some(guess as usize);
        }
        let at = self.upper_of_leaf(key).checked_sub(1)?;
        (self.key(at) == key).then_some(at)
    }

    /// Asks for the memory of this leaf that looking for `key` takes; `parent` has it at `at`. It is a few lines of cache if no key can be
    /// left out, or all of them: where a search goes, and what an insertion moves, is not known yet.
    pub(super) fn prefetch(self, parent: View<'_>, at: usize, key: u64) {
        let first = parent.key(at);
        let is_last = at + 1 >= parent.len();
        let most = max_entries(8);
        let guess = key.wrapping_sub(first);
        if !is_last && parent.key(at + 1).wrapping_sub(first) <= most as u64 {
            let place = HEADER + guess as usize % most;
            for at in [0, place, place + most] {
                prefetch(&self.0[at]);
            }
            return;
        }
        self.0.iter().step_by(LINE).for_each(prefetch);
    }

    /// Moves words up by `n` places.
    fn make_room(self, begin: usize, end: usize, n: usize) {
        let words = &self.0[begin..end + n];
        let mut at = end - begin;
        while at >= STEP {
            at -= STEP;
            copy_step(&words[at..], &words[at + n..]);
        }
        for at in (0..at).rev() {
            words[at + n].store(words[at].load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Moves words down by `n` places.
    fn close_gap(self, begin: usize, end: usize, n: usize) {
        let words = &self.0[begin - n..end];
        let mut at = n;
        while words.len() - at >= STEP {
            copy_step(&words[at..], &words[at - n..]);
            at += STEP;
        }
        for at in at..words.len() {
            words[at - n].store(words[at].load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    pub(super) fn insert(self, at: usize, key: u64, value: Cell) {
        let len = self.len();
        self.make_room(HEADER + at, HEADER + len, 1);
        match self.value_size() {
            4 => (at..len)
                .rev()
                .for_each(|i| self.set_value(i + 1, self.value(i))),
            size => {
                let (base, words) = (HEADER + self.max(), size / 8);
                self.make_room(base + words * at, base + words * len, words);
            }
        }
        self.set_key(at, key);
        self.set_value(at, value);
        self.set_len(len + 1);
    }

    pub(super) fn append(self, entries: &[(u64, Cell)]) {
        let len = self.len();
        for (i, (key, value)) in entries.iter().enumerate() {
            self.set_key(len + i, *key);
            self.set_value(len + i, *value);
        }
        self.set_len(len + entries.len());
    }

    /// Takes out `n` entries from `at` on.
    pub(super) fn remove(self, at: usize, n: usize) {
        let len = self.len();
        self.close_gap(HEADER + at + n, HEADER + len, n);
        match self.value_size() {
            4 => (at + n..len).for_each(|i| self.set_value(i - n, self.value(i))),
            size => {
                let (base, words) = (HEADER + self.max(), size / 8);
                self.close_gap(base + words * (at + n), base + words * len, words * n);
            }
        }
        self.set_len(len - n);
    }

    /// Moves the first `n` entries of `right` to the end of this node, its left neighbour.
    pub(super) fn take_first(self, right: View<'_>, n: usize) {
        let len = self.len();
        for i in 0..n {
            self.set_key(len + i, right.key(i));
            self.set_value(len + i, right.value(i));
        }
        self.set_len(len + n);
        right.remove(0, n);
    }

    /// Moves the last `n` entries of this node to the front of `right`, its right neighbour.
    pub(super) fn give_last(self, right: View<'_>, n: usize) {
        let (len, others) = (self.len(), right.len());
        for i in (0..others).rev() {
            right.set_key(i + n, right.key(i));
            right.set_value(i + n, right.value(i));
        }
        for i in 0..n {
            right.set_key(i, self.key(len - n + i));
            right.set_value(i, self.value(len - n + i));
        }
        right.set_len(others + n);
        self.set_len(len - n);
    }

    /// Moves entries between this node and its right neighbour until this one has `target`.
    pub(super) fn balance(self, right: View<'_>, target: usize) {
        let len = self.len();
        match len.cmp(&target) {
            std::cmp::Ordering::Less => self.take_first(right, target - len),
            std::cmp::Ordering::Greater => self.give_last(right, len - target),
            std::cmp::Ordering::Equal => {}
        }
    }
}

/// As a bitmap. The lower of two bits is the high one.
impl View<'_> {
    pub(super) fn bits(self, entry: u64) -> u32 {
        let pair = self.word(BITMAP_HEADER + (entry / 32) as usize) >> (entry % 32 * 2) & 3;
        (pair >> 1 | (pair & 1) << 1) as u32
    }

    pub(super) fn set_bits(self, entry: u64, count: u32) {
        let at = BITMAP_HEADER + (entry / 32) as usize;
        let shift = entry % 32 * 2;
        let pair = u64::from(count >> 1 | (count & 1) << 1);
        self.set_word(at, self.word(at) & !(3 << shift) | pair << shift);
    }

    /// The first entry in `from..to` that counts 0 and that `is_taken` does not know.
    pub(super) fn first_free(
        self,
        from: u64,
        to: u64,
        is_taken: impl Fn(u64) -> bool,
    ) -> Option<u64> {
        let to = to.min(ENTRIES_PER_BITMAP);
        let mut at = from;
        while at < to {
            let word = self.word(BITMAP_HEADER + (at / 32) as usize);
            let free = !(word | word >> 1) & LOW_BITS & (u64::MAX << (at % 32 * 2));
            if free == 0 {
                at = (at / 32 + 1) * 32;
                continue;
            }
            at = at / 32 * 32 + u64::from(free.trailing_zeros()) / 2;
            if at < to && !is_taken(at) {
                return Some(at);
            }
            at += 1;
        }
        None
    }
}
