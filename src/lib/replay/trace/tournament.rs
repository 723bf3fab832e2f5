//! Which of several ascending streams goes on with the smallest key.

use super::decoder::{Key, STREAM};

/// A tree over the keys that come next, with the smaller of two in the node above them. What there is no key of has the largest.
pub(super) struct Tournament {
    /// The root is at 1, the children of a node at twice its place and behind; the streams are the leaves.
    nodes: Vec<Key>,
}

impl Tournament {
    pub(super) fn new(streams: usize) -> Self {
        Self {
            nodes: vec![Key::MAX; 2 * streams.next_power_of_two()],
        }
    }

    /// The smallest key.
    #[inline(always)]
    pub(super) fn first(&self) -> Key {
        self.nodes[1]
    }

    /// The number of the stream that it is of.
    #[inline(always)]
    pub(super) fn stream(key: Key) -> usize {
        (key & STREAM) as usize
    }

    /// Notes what a stream goes on with.
    #[inline(always)]
    pub(super) fn set(&mut self, stream: usize, next: Key) {
        let mut at = self.nodes.len() / 2 + stream;
        self.nodes[at] = next;
        // Streams take turns at random, so there is no branch between two.
        while at > 1 {
            let smaller = self.nodes[at].min(self.nodes[at ^ 1]);
            at /= 2;
            self.nodes[at] = smaller;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_in_order_whatever_the_number_of_streams() {
        for streams in 1..20_usize {
            let key = |at: usize, stream: usize| ((at * at % 97) as Key) << 64 | stream as Key;
            let mut left: Vec<Vec<Key>> = (0..streams)
                .map(|stream| {
                    let mut keys: Vec<Key> = (0..stream * 7 % 30)
                        .map(|at| key(at + stream, stream))
                        .collect();
                    keys.sort_unstable_by(|a, b| b.cmp(a));
                    keys
                })
                .collect();
            let mut expected: Vec<Key> = left.concat();
            expected.sort_unstable();
            let mut tournament = Tournament::new(streams);
            for (stream, keys) in left.iter_mut().enumerate() {
                tournament.set(stream, keys.pop().unwrap_or(Key::MAX));
            }
            let mut found = Vec::new();
            while tournament.first() != Key::MAX {
                let key = tournament.first();
                found.push(key);
                let stream = Tournament::stream(key);
                tournament.set(stream, left[stream].pop().unwrap_or(Key::MAX));
            }
            assert_eq!(found, expected, "{streams}");
        }
    }
}
