//! How long the data device takes, in virtual time.

use crate::pool::Op;
use std::fmt;
use std::time::Duration;

/// The modelled device: a time for each request and one for each 4 KiB of it. Requests do not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct DeviceModel {
    /// A read.
    pub read: Duration,
    /// A write.
    pub write: Duration,
    /// A flush.
    pub flush: Duration,
    /// A discard, of any size.
    pub discard: Duration,
    /// Beside that, each 4 KiB that is read, written, zeroed or copied.
    pub each_4k: Duration,
    /// A block of metadata that is not in the cache.
    pub metadata_read: Duration,
    /// A flush of the metadata device, of which a commit has two.
    pub metadata_flush: Duration,
    /// Processor time of the worker for each thing that it wants done.
    pub worker_step: Duration,
}

/// A solid-state disk of the usual kind.
impl Default for DeviceModel {
    fn default() -> Self {
        Self {
            read: Duration::from_micros(80),
            write: Duration::from_micros(20),
            flush: Duration::from_micros(500),
            discard: Duration::from_micros(50),
            each_4k: Duration::from_micros(1),
            metadata_read: Duration::from_micros(80),
            metadata_flush: Duration::from_micros(500),
            worker_step: Duration::from_micros(1),
        }
    }
}

impl DeviceModel {
    /// Whatever it is asked for is done at once.
    pub const NULL: Self = Self {
        read: Duration::ZERO,
        write: Duration::ZERO,
        flush: Duration::ZERO,
        discard: Duration::ZERO,
        each_4k: Duration::ZERO,
        metadata_read: Duration::ZERO,
        metadata_flush: Duration::ZERO,
        worker_step: Duration::ZERO,
    };

    fn moved(&self, sectors: u64) -> u64 {
        ns(self.each_4k).saturating_mul(sectors.div_ceil(8))
    }

    /// How many nanoseconds a bio takes.
    pub fn bio(&self, op: Op, sectors: u64, is_fua: bool) -> u64 {
        let flush = if is_fua { ns(self.flush) } else { 0 };
        let moved = self.moved(sectors);
        match op {
            Op::Read => ns(self.read).saturating_add(moved),
            Op::Write => ns(self.write).saturating_add(moved).saturating_add(flush),
            Op::Flush => ns(self.flush),
            Op::Discard => ns(self.discard),
        }
    }

    /// How many nanoseconds zeroing takes.
    pub fn zero(&self, sectors: u64) -> u64 {
        ns(self.write).saturating_add(self.moved(sectors))
    }

    /// How many nanoseconds the worker waits for so many blocks of metadata, which it reads one by one.
    pub fn metadata_reads(&self, blocks: u64) -> u64 {
        ns(self.metadata_read).saturating_mul(blocks)
    }

    /// How many nanoseconds the worker takes for so many things that it wants done.
    pub fn worker_steps(&self, steps: u64) -> u64 {
        ns(self.worker_step).saturating_mul(steps)
    }

    /// How many nanoseconds commits take that write so many blocks, many at a time.
    pub fn commits(&self, commits: u64, blocks: u64) -> u64 {
        let flushes = ns(self.metadata_flush).saturating_mul(2);
        let each = ns(self.write).saturating_add(flushes);
        each.saturating_mul(commits)
            .saturating_add(self.moved(blocks.saturating_mul(8)))
    }

    /// How many nanoseconds a copy takes.
    pub fn copy(&self, sectors: u64) -> u64 {
        let moved = self.moved(sectors).saturating_mul(2);
        ns(self.read)
            .saturating_add(ns(self.write))
            .saturating_add(moved)
    }
}

impl fmt::Display for DeviceModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "read {:?}, write {:?}, flush {:?}, discard {:?}, {:?} more for each 4 KiB; metadata read {:?}, flush {:?}; worker {:?} a step",
            self.read,
            self.write,
            self.flush,
            self.discard,
            self.each_4k,
            self.metadata_read,
            self.metadata_flush,
            self.worker_step
        )
    }
}

/// How long something takes, by a seed and its number, that takes so many nanoseconds by the model: up to an eighth more or less, and the
/// same on average. Just as long with seed 0.
pub(super) fn varied(takes: u64, seed: u64, number: u64) -> u64 {
    if seed == 0 {
        return takes;
    }
    // The finalizer of MurmurHash3: all bits of both decide.
    let mut mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number;
    for factor in [0xff51_afd7_ed55_8ccd, 0xc4ce_b9fe_1a85_ec53] {
        mixed = (mixed ^ mixed >> 33).wrapping_mul(factor);
    }
    let most = takes / 8;
    (takes - most).saturating_add((mixed ^ mixed >> 33) % (2 * most + 1))
}

/// Nanoseconds, of a time that is at most some centuries.
fn ns(time: Duration) -> u64 {
    time.as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_varies_around_the_model() {
        assert_eq!(varied(20_000, 0, 7), 20_000);
        for seed in 1..4 {
            let all: Vec<u64> = (0..10_000)
                .map(|number| varied(20_000, seed, number))
                .collect();
            assert!(all.iter().all(|takes| (17_500..=22_500).contains(takes)));
            let mean = all.iter().sum::<u64>() / 10_000;
            assert!((19_900..20_100).contains(&mean), "{mean}");
        }
        assert_eq!(varied(0, 1, 1), 0);
        assert!(varied(u64::MAX, 1, 1) > u64::MAX / 4);
    }
}
