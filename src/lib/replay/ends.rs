//! What ends when: a heap of times, and beside it what ends, which stays where it is while times move.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Things that end at a time, in nanoseconds; those of one time in the order of their numbers.
#[derive(Debug)]
pub(super) struct Ends<T> {
    /// Time, number, slot.
    times: BinaryHeap<Reverse<(u64, u64, u32)>>,
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Ends<T> {
    fn default() -> Self {
        Self {
            times: BinaryHeap::new(),
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Ends<T> {
    pub(super) fn push(&mut self, at: u64, number: u64, thing: T) {
        let slot = self.free.pop().unwrap_or(self.slots.len() as u32);
        match self.slots.get_mut(slot as usize) {
            Some(free) => *free = Some(thing),
            None => self.slots.push(Some(thing)),
        }
        self.times.push(Reverse((at, number, slot)));
    }

    /// When the first ends.
    #[inline]
    pub(super) fn first(&self) -> Option<u64> {
        self.times.peek().map(|Reverse((at, ..))| *at)
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let Reverse((.., slot)) = self.times.pop()?;
        self.free.push(slot);
        self.slots.get_mut(slot as usize)?.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_end_by_time_and_then_by_number() {
        let mut ends = Ends::default();
        for (number, at) in [50, 10, 50, 30, 10].into_iter().enumerate() {
            ends.push(at, number as u64, (at, number));
        }
        assert_eq!(ends.first(), Some(10));
        assert_eq!(ends.pop(), Some((10, 1)));
        ends.push(10, 9, (10, 9));
        let rest: Vec<_> = std::iter::from_fn(|| ends.pop()).collect();
        assert_eq!(rest, [(10, 4), (10, 9), (30, 3), (50, 0), (50, 2)]);
        assert_eq!(ends.first(), None);
        assert_eq!(ends.slots.len(), 5, "slots are used again");
    }
}
