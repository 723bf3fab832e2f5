//! Pseudo-random numbers that are the same on every machine for the same seed.

/// The generator called SplitMix64.
#[derive(Clone, Debug)]
pub(super) struct Random {
    state: u64,
}

impl Random {
    /// The sequence of this seed.
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next number.
    pub(super) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ self.state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `limit`, which must not be 0.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        // The upper half of the product: the bias is below limit / 2^64.
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// One of `items`; none if there are none.
    pub(super) fn pick<T: Copy>(&mut self, items: &[T]) -> Option<T> {
        let at = self.below((items.len() as u64).max(1));
        items.get(at as usize).copied()
    }

    /// Takes `n` of `items` out, or all if there are fewer; those that stay are in another order.
    pub(super) fn take<T>(&mut self, items: &mut Vec<T>, n: usize) -> Vec<T> {
        (0..n.min(items.len()))
            .map(|_| {
                let at = self.below(items.len() as u64);
                items.swap_remove(at as usize)
            })
            .collect()
    }
}

/// A pseudo-random order of the numbers below a power of two, computed number by number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shuffle {
    bits: u32,
    keys: [u64; Self::ROUNDS],
}

impl Shuffle {
    const ROUNDS: usize = 4;

    /// An order of the numbers below `1 << bits`; at least 2 bits.
    pub(super) fn new(bits: u32, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let keys = [(); Self::ROUNDS].map(|()| random.next());
        Self { bits, keys }
    }

    /// How many numbers there are.
    pub(super) fn len(self) -> u64 {
        1 << self.bits
    }

    /// The number at place `index`. Each step can be undone modulo `1 << bits`, so no number appears twice: a sum, a product
    /// with an odd number, and the exclusive or with the own upper half.
    pub(super) fn at(self, index: u64) -> u64 {
        let mask = self.len() - 1;
        self.keys.iter().fold(index, |x, key| {
            let x = x.wrapping_add(key >> 8).wrapping_mul(key | 1) & mask;
            x ^ (x >> self.bits.div_ceil(2))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_published_generator() {
        let mut random = Random::new(1_234_567);
        assert_eq!(
            [random.next(), random.next()],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]
        );
    }

    #[test]
    fn what_is_taken_is_gone() {
        let mut random = Random::new(5);
        let mut items: Vec<u32> = (0..10).collect();
        let mut taken = random.take(&mut items, 4);
        assert_eq!((taken.len(), items.len()), (4, 6));
        taken.append(&mut items);
        taken.sort_unstable();
        assert!(taken.into_iter().eq(0..10));
        assert_eq!(random.take(&mut vec![1], 5), [1]);
        assert_eq!(random.pick::<u32>(&[]), None);
        assert!((0..100).all(|_| random.below(3) < 3));
    }

    #[test]
    fn no_number_is_missing_from_an_order() {
        for (bits, seed) in [(2, 0), (3, 7), (12, 1), (13, u64::MAX)] {
            let order = Shuffle::new(bits, seed);
            let mut numbers: Vec<u64> = (0..order.len()).map(|i| order.at(i)).collect();
            numbers.sort_unstable();
            assert!(numbers.into_iter().eq(0..order.len()), "{bits} {seed}");
        }
    }
}
