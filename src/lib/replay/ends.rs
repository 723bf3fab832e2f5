//! What ends when: what takes as long as something before it ends after it, so that a queue is enough; a heap has the rest.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

/// Queues that there are, at most.
const MOST_LANES: usize = 8;

#[derive(Debug)]
struct End<T> {
    /// Its time, in nanoseconds, and its number.
    key: (u64, u64),
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

/// Things that take equally long, in the order of their ends.
#[derive(Debug)]
struct Lane<T> {
    takes: u64,
    ends: VecDeque<End<T>>,
}

/// Things that end at a time; those of one time in the order of their numbers.
#[derive(Debug)]
pub(super) struct Ends<T> {
    lanes: Vec<Lane<T>>,
    heap: BinaryHeap<End<T>>,
}

impl<T> Default for Ends<T> {
    fn default() -> Self {
        Self {
            lanes: Vec::new(),
            heap: BinaryHeap::new(),
        }
    }
}

impl<T> Ends<T> {
    /// Something begins `now` and takes so long. Numbers grow.
    #[inline]
    pub(super) fn push(&mut self, now: u64, takes: u64, number: u64, thing: T) {
        let key = (now.saturating_add(takes), number);
        let end = End { key, thing };
        let lane = self.lanes.iter_mut().find(|lane| lane.takes == takes);
        let lane = match lane {
            Some(lane) => lane,
            None => {
                // One that is empty may be for something else from here on.
                let at = self.lanes.iter().position(|lane| lane.ends.is_empty());
                let at = match at {
                    Some(at) => at,
                    None if self.lanes.len() < MOST_LANES => {
                        self.lanes.push(Lane {
                            takes,
                            ends: VecDeque::new(),
                        });
                        self.lanes.len() - 1
                    }
                    None => return self.heap.push(end),
                };
                self.lanes[at].takes = takes;
                &mut self.lanes[at]
            }
        };
        match lane.ends.back().is_none_or(|last| last.key < key) {
            true => lane.ends.push_back(end),
            false => self.heap.push(end),
        }
    }

    /// The first end, and its lane if it is in one.
    #[inline]
    fn find_first(&self) -> Option<((u64, u64), Option<usize>)> {
        let mut first = self.heap.peek().map(|end| (end.key, None));
        for (at, lane) in self.lanes.iter().enumerate() {
            if let Some(end) = lane.ends.front()
                && first.is_none_or(|(key, _)| end.key < key)
            {
                first = Some((end.key, Some(at)));
            }
        }
        first
    }

    /// When the first ends.
    #[inline]
    pub(super) fn first(&self) -> Option<u64> {
        self.find_first().map(|(key, _)| key.0)
    }

    #[inline]
    pub(super) fn pop(&mut self) -> Option<T> {
        let end = match self.find_first()? {
            (_, Some(lane)) => self.lanes.get_mut(lane)?.ends.pop_front(),
            (_, None) => self.heap.pop(),
        };
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
                    assert_eq!(ends.first(), Some(first.0));
                    assert_eq!(ends.pop(), Some(first));
                    expected.retain(|&end| end != first);
                    now = now.max(first.0);
                }
                now += below(5);
            }
            assert!(most > 20);
            expected.sort_unstable();
            let rest: Vec<_> = std::iter::from_fn(|| ends.pop()).collect();
            assert_eq!(rest, expected);
            assert_eq!(ends.first(), None);
        }
    }
}
