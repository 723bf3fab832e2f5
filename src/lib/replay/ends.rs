//! What ends when: what takes as long as something before it ends after it, so that a queue is enough; a heap has the rest.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

/// Queues that there are.
const LANES: usize = 8;

/// A time, in nanoseconds, above a number: what is compared again and again.
type Key = u128;

#[inline]
fn key(time: u64, number: u64) -> Key {
    Key::from(time) << 64 | Key::from(number)
}

#[derive(Debug)]
struct End<T> {
    key: Key,
    thing: T,
}

impl<T> PartialEq for End<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl<T> Eq for End<T> {}

impl<T> PartialOrd for End<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for End<T> {
    /// The first to end is the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        other.key.cmp(&self.key)
    }
}

/// Comes after everything.
const NEVER: Key = Key::MAX;

/// Where the first end is: in one of the lanes, or in the heap, which counts as the one behind them.
#[derive(Clone, Copy, Debug)]
struct First {
    key: Key,
    place: usize,
}

/// Things that end at a time; those of one time in the order of their numbers.
#[derive(Debug)]
pub(super) struct Ends<T> {
    /// Things that take equally long, in the order of their ends.
    lanes: [VecDeque<End<T>>; LANES],
    /// How long those of each lane take.
    takes: [u64; LANES],
    heap: BinaryHeap<End<T>>,
    /// The first of each lane and of the heap.
    heads: [Key; LANES + 1],
    /// Which of them have one, by bits.
    used: u32,
    first: First,
}

impl<T> Default for Ends<T> {
    fn default() -> Self {
        Self {
            lanes: std::array::from_fn(|_| VecDeque::new()),
            takes: [0; LANES],
            heap: BinaryHeap::new(),
            heads: [NEVER; LANES + 1],
            used: 0,
            first: First {
                key: NEVER,
                place: LANES,
            },
        }
    }
}

impl<T> Ends<T> {
    /// Something begins `now` and takes so long. Numbers grow.
    #[inline]
    pub(super) fn push(&mut self, now: u64, takes: u64, number: u64, thing: T) {
        // What ends when all is over ends just before.
        let key = key(now.saturating_add(takes).min(u64::MAX - 1), number);
        let place = self.place(key, takes);
        let end = End { key, thing };
        match self.lanes.get_mut(place) {
            Some(lane) => lane.push_back(end),
            None => self.heap.push(end),
        }
        if key < self.heads[place] {
            self.heads[place] = key;
            self.used |= 1 << place;
            if key < self.first.key {
                self.first = First { key, place };
            }
        }
    }

    /// The lane of what takes so long, or one that is empty, which is for such things from here on; or the heap.
    #[inline]
    fn place(&mut self, key: Key, takes: u64) -> usize {
        let of_takes = self.takes.iter().position(|&of| of == takes);
        let place = match of_takes {
            Some(place) => place,
            None => match self.used.trailing_ones() as usize {
                place if place < LANES => {
                    self.takes[place] = takes;
                    place
                }
                _ => return LANES,
            },
        };
        let last = self.lanes[place].back();
        match last.is_none_or(|last| last.key < key) {
            true => place,
            false => LANES,
        }
    }

    /// When the first ends; at the end of time if there is none.
    #[inline]
    pub(super) fn first(&self) -> u64 {
        (self.first.key >> 64) as u64
    }

    /// All of them, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let queued = self.lanes.iter().flatten();
        queued.chain(&self.heap).map(|end| &end.thing)
    }

    #[inline]
    pub(super) fn pop(&mut self) -> Option<T> {
        let place = self.first.place;
        let (end, head) = match self.lanes.get_mut(place) {
            Some(lane) => (lane.pop_front(), lane.front()),
            None => (self.heap.pop(), self.heap.peek()),
        };
        let mut first = First { key: NEVER, place };
        match head {
            Some(end) => first.key = end.key,
            None => self.used &= !(1 << place),
        }
        self.heads[place] = first.key;
        let mut used = self.used;
        while used != 0 {
            let place = used.trailing_zeros() as usize;
            let key = self.heads[place];
            if key < first.key {
                first = First { key, place };
            }
            used &= used - 1;
        }
        self.first = first;
        end.map(|end| end.thing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_end_by_time_and_then_by_number() {
        let mut random: u64 = 7;
        let mut below = |n: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % n
        };
        // Few lengths, more than there are lanes, and each another one.
        for lengths in [3, 20, 1 << 40] {
            let (mut ends, mut expected) = (Ends::default(), Vec::new());
            let (mut now, mut most) = (0, 0);
            for number in 0..20_000 {
                if below(2) == 0 {
                    let takes = below(lengths) * 10;
                    ends.push(now, takes, number, (now + takes, number));
                    expected.push((now + takes, number));
                    most = most.max(expected.len());
                } else if let Some(first) = expected.iter().copied().min() {
                    assert_eq!(ends.first(), first.0);
                    assert_eq!(ends.pop(), Some(first));
                    expected.retain(|&end| end != first);
                    now = now.max(first.0);
                }
                now += below(5);
            }
            let mut left: Vec<_> = ends.iter().copied().collect();
            left.sort_unstable();
            expected.sort_unstable();
            assert_eq!(left, expected);
            assert!(most > 20);
            expected.sort_unstable();
            let rest: Vec<_> = std::iter::from_fn(|| ends.pop()).collect();
            assert_eq!(rest, expected);
            assert_eq!(ends.first(), u64::MAX);
        }
    }
}
