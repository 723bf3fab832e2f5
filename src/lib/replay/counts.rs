//! What a replay counts.

use hdrhistogram::Histogram;
use serde::Serialize;

/// What the trace asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct InputCounts {
    /// Requests.
    pub requests: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Discards.
    pub discards: u64,
    /// Flushes, also those in front of a write.
    pub flushes: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Calls of the kernel's map function that this makes: reads and writes are cut at block boundaries, a flush in front of a write is
    /// a call of its own.
    pub map_calls: u64,
    /// Requests to devices that are no thin device of this pool, or past the end of one: left out.
    pub out_of_range: u64,
    /// Control events carried out.
    pub controls: u64,
    /// Control events that are not known.
    pub unknown_controls: u64,
    /// Control events that the pool refused.
    pub refused_controls: u64,
}

/// What the pool did for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkCounts {
    /// New blocks whose data was zeroed first.
    pub zeroed: u64,
    /// New blocks that a write filled.
    pub overwritten: u64,
    /// Blocks copied: sharing that was broken.
    pub copies: u64,
    /// Blocks copied from external origins.
    pub origin_copies: u64,
    /// Bytes zeroed.
    pub bytes_zeroed: u64,
    /// Bytes copied.
    pub bytes_copied: u64,
    /// Discards of the data device.
    pub passed_down: u64,
    /// Bytes discarded on the data device.
    pub bytes_passed_down: u64,
    /// Flushes of the data device that commits began with.
    pub data_flushes: u64,
    /// Bios that failed, no space included.
    pub failed: u64,
    /// Bios that failed for want of space.
    pub no_space: u64,
}

/// Latencies in nanoseconds, of one class of bios.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        // Three digits; grows with what is recorded.
        #[expect(clippy::expect_used, reason = "3 is a legal number of digits")]
        Self(Histogram::new(3).expect("3 is a legal number of digits"))
    }
}

impl Latencies {
    pub(super) fn record(&mut self, nanos: u64) {
        // It grows with what it is told.
        self.0.record(nanos).ok();
    }

    /// How many.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The latency that this share of them does not exceed.
    pub fn percentile(&self, percent: f64) -> u64 {
        self.0.value_at_percentile(percent)
    }

    /// The longest.
    pub fn max(&self) -> u64 {
        self.0.max()
    }

    /// Value and how many percent do not exceed it, in steps.
    pub fn curve(&self) -> Vec<(u64, f64)> {
        let steps = self.0.iter_quantiles(5);
        steps
            .map(|v| (v.value_iterated_to(), 100.0 * v.quantile()))
            .collect()
    }
}
