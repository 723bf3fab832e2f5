//! Which of several streams is next: a tree in which each node is the lesser of its two, so that a merge of processors that take turns
//! at random has no branch to mispredict.

use crate::error::{Error, ErrorKind, Result};

/// A stream that has ended.
const ENDED: u128 = u128::MAX;
/// The low bits of a key, which the number of its stream takes.
const STREAM: u128 = 0xffff;

/// The next keys of streams.
pub(super) struct Next {
    /// Node 1 is the least of all, those of node n are 2n and 2n + 1, the second half is the streams.
    nodes: Vec<u128>,
}

impl Next {
    /// The streams have these keys, or have ended; the low 16 bits of each key are 0.
    ///
    /// # Errors
    /// `Unsuitable` with more streams than can be told apart.
    pub(super) fn of(keys: &[Option<u128>]) -> Result<Self> {
        if keys.len() > STREAM as usize {
            let message = format!("{} files of a blktrace are more than 65535", keys.len());
            return Err(Error::new(ErrorKind::Unsuitable, message));
        }
        let half = keys.len().next_power_of_two();
        let mut nodes = vec![ENDED; 2 * half];
        for (stream, key) in keys.iter().enumerate() {
            nodes[half + stream] = key.map_or(ENDED, |key| key | stream as u128);
        }
        for node in (1..half).rev() {
            nodes[node] = nodes[2 * node].min(nodes[2 * node + 1]);
        }
        Ok(Self { nodes })
    }

    /// The stream with the least key; none if all have ended.
    #[inline]
    pub(super) fn first(&self) -> Option<usize> {
        (self.nodes[1] != ENDED).then_some((self.nodes[1] & STREAM) as usize)
    }

    /// Gives the first stream its next key.
    #[inline]
    pub(super) fn replace_first(&mut self, key: Option<u128>) {
        let stream = self.nodes[1] & STREAM;
        let mut least = key.map_or(ENDED, |key| key | stream);
        let mut node = self.nodes.len() / 2 + stream as usize;
        self.nodes[node] = least;
        while node > 1 {
            least = least.min(self.nodes[node ^ 1]);
            node /= 2;
            self.nodes[node] = least;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_comes_first_whatever_the_number_of_streams() {
        for streams in 1..20u128 {
            let left = |stream: u128, turn: u128| {
                (turn < stream % 4).then_some((turn * 7 + stream % 3) << 16)
            };
            let keys: Vec<_> = (0..streams).map(|stream| left(stream, 0)).collect();
            let mut next = Next::of(&keys).unwrap();
            let mut turns = vec![0; streams as usize];
            let mut seen = Vec::new();
            while let Some(stream) = next.first() {
                seen.push((left(stream as u128, turns[stream]).unwrap(), stream));
                turns[stream] += 1;
                next.replace_first(left(stream as u128, turns[stream]));
            }
            assert!(seen.is_sorted(), "{seen:?}");
            assert_eq!(
                seen.len() as u128,
                (0..streams).map(|s| s % 4).sum::<u128>()
            );
        }
        assert!(Next::of(&vec![None; 70_000]).is_err());
    }
}
