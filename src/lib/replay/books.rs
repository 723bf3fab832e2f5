//! What is kept of a replay: counters, latencies, notices, marks and a timeline.

use super::counts::{ByReason, InputCounts, Moments, WorkCounts};
use super::device_heat::HeatByDevice;
use super::latencies::LatencyClasses;
use crate::error::ErrorKind;
use crate::pool::{
    Bio, BioError, BioResult, Effect, MapCounts, Notice, Op, Pool, PoolMode, Source, WorkerCounts,
};
use crate::thin::PoolMetadata;
use std::collections::BTreeMap;
use std::time::Duration;

/// How things were at a mark.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Mark {
    /// Which of the reports it is of, in one that was merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Its name.
    pub name: String,
    /// Nanoseconds by the replay's clock.
    pub time_ns: u64,
    /// The pool's status line.
    pub pool: String,
    /// The status lines of the thin devices that are active, by the name of the trace's device.
    pub thins: BTreeMap<String, String>,
    /// Metadata blocks in use, without those kept back.
    pub allocated_metadata_blocks: u64,
}

/// How much was in use at a time, and what was counted until then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sample {
    /// Nanoseconds by the replay's clock.
    pub time_ns: u64,
    /// Data blocks in use.
    pub used_data_blocks: u64,
    /// Metadata blocks in use, those included that are kept back.
    pub used_metadata_blocks: u64,
    /// Bios.
    pub bios: u64,
    /// Bios that the map half left to the worker, by reason.
    pub deferred: ByReason,
    /// Blocks copied because sharing was broken.
    pub copies: u64,
    /// Mappings that discards removed.
    pub unmapped: u64,
    /// Commits that wrote something.
    pub commits: u64,
    /// Metadata blocks read, and written.
    pub metadata_blocks_read: u64,
    /// Metadata blocks written.
    pub metadata_blocks_written: u64,
}

/// Samples that a timeline has, at most; then every second one goes.
const MOST_SAMPLES: usize = 400;

/// Marks whose samples stay, the first ones.
const MOST_MARKED: usize = 100;

/// Notices that are kept; a pool that fills up and is emptied again and again has any number of them.
const MOST_NOTICES: usize = 1000;

/// Control events of a kind that are told one by one; the others are counted.
pub(super) const MOST_TOLD: u64 = 100;

/// The books.
#[derive(Debug)]
pub(super) struct Books {
    pub(super) input: InputCounts,
    pub(super) work: WorkCounts,
    /// Bytes that were written, and acknowledged.
    pub(super) bytes_written: u64,
    /// When the last request came, by the trace.
    pub(super) last_io_ns: u64,
    pub(super) latencies: LatencyClasses,
    pub(super) moments: Moments,
    pub(super) heat: HeatByDevice,
    pub(super) notices: Vec<(Duration, String)>,
    pub(super) marks: Vec<Mark>,
    pub(super) timeline: Vec<Sample>,
    /// When it is time for the next sample, and how long after that for another one, in nanoseconds.
    next_sample: u64,
    step: u64,
}

impl Default for Books {
    fn default() -> Self {
        Self {
            input: InputCounts::default(),
            work: WorkCounts::default(),
            bytes_written: 0,
            last_io_ns: 0,
            latencies: LatencyClasses::default(),
            moments: Moments::default(),
            heat: HeatByDevice::default(),
            notices: Vec::new(),
            marks: Vec::new(),
            timeline: Vec::new(),
            next_sample: 0,
            step: 1_000_000,
        }
    }
}

impl Books {
    /// Adds what others counted of requests and bios.
    pub(super) fn add(&mut self, other: &Self) {
        self.input.add(&other.input);
        self.work.completed += other.work.completed;
        self.work.failed += other.work.failed;
        self.work.no_space += other.work.no_space;
        self.work.unsupported += other.work.unsupported;
        self.bytes_written += other.bytes_written;
        self.latencies.add(&other.latencies);
        self.heat.add(&other.heat);
    }

    /// When it is time for the next sample, in nanoseconds.
    pub(super) fn next_sample(&self) -> u64 {
        self.next_sample
    }

    /// Notes how much is in use. The map half did `counts`, in all.
    pub(super) fn sample(
        &mut self,
        now: u64,
        pool: &Pool,
        counts: &MapCounts,
        worker: &WorkerCounts,
    ) {
        let (used_data_blocks, used_metadata_blocks) = pool.inspect(PoolMetadata::used_blocks);
        let metadata = pool.block_io();
        self.timeline.push(Sample {
            time_ns: now,
            used_data_blocks,
            used_metadata_blocks,
            bios: counts.bios,
            deferred: ByReason(counts.deferred),
            copies: self.work.copies,
            unmapped: worker.unmapped,
            commits: worker.commits.total(),
            metadata_blocks_read: metadata.read,
            metadata_blocks_written: metadata.written,
        });
        if self.timeline.len() > MOST_SAMPLES {
            let marks = self.marks.iter().take(MOST_MARKED);
            let marked: Vec<u64> = marks.map(|mark| mark.time_ns).collect();
            let mut keep = false;
            self.timeline.retain(|sample| {
                keep = !keep;
                keep || marked.contains(&sample.time_ns)
            });
            self.step *= 2;
        }
        let last = self.timeline.last().map_or(0, |last| last.time_ns);
        self.next_sample = last.saturating_add(self.step);
    }

    /// Counts a bio that ended.
    pub(super) fn count_end(&mut self, bio: &Bio, result: BioResult) {
        self.work.completed += 1;
        match result {
            Ok(()) if bio.op == Op::Write => self.bytes_written += bio.sectors * 512,
            Ok(()) => {}
            Err(error) => {
                self.work.failed += 1;
                self.work.no_space += u64::from(error == BioError::NoSpace);
                self.work.unsupported += u64::from(error == BioError::Unsupported);
            }
        }
    }

    /// Counts a request without a bio that ended after so many nanoseconds.
    #[inline]
    pub(super) fn count_plain(&mut self, is_zero: bool, nanos: u64) {
        self.work.completed += 1;
        self.latencies.record(None, is_zero, nanos);
    }

    /// Counts what is about to be done on the data device, whose blocks have so many sectors.
    pub(super) fn count_effect(&mut self, effect: &Effect, block_sectors: u64) {
        let work = &mut self.work;
        match effect {
            Effect::Issue { bio, .. } => work.overwritten += u64::from(bio.fills_a_new_block()),
            Effect::Zero { sectors, .. } => {
                // Behind what was copied it is no block of its own.
                work.zeroed += u64::from(*sectors == block_sectors);
                work.bytes_zeroed += sectors * 512;
            }
            Effect::Copy { from, sectors, .. } => {
                match from {
                    Source::Data => work.copies += 1,
                    Source::Origin(_) => work.origin_copies += 1,
                }
                work.bytes_copied += sectors * 512;
            }
            Effect::Discard { sectors, .. } => {
                work.passed_down += 1;
                work.bytes_passed_down += sectors * 512;
            }
            Effect::Flush { .. } => work.data_flushes += 1,
            _ => {}
        }
    }

    /// Notes what the pool says.
    pub(super) fn notice(&mut self, now: u64, notice: Notice) {
        let text = match notice {
            Notice::Mode(mode) => {
                if mode == PoolMode::OutOfDataSpace {
                    self.moments.out_of_space_ns.get_or_insert(now);
                }
                format!("the pool is in mode {mode}")
            }
            Notice::LowWater => {
                self.moments.low_water_ns.get_or_insert(now);
                "free data blocks are down to the low-water mark".into()
            }
            // It comes again and again while metadata is low.
            Notice::MetadataThreshold => return,
            Notice::Deadlock(waits) => {
                self.work.deadlocks += 1;
                if self.work.deadlocks > MOST_TOLD {
                    return;
                }
                let waits: Vec<String> = waits.iter().map(ToString::to_string).collect();
                format!("a deadlock of cells: {}", waits.join("; "))
            }
            Notice::NoSpaceTimeout => "writes waited for space too long and fail".into(),
            Notice::MetadataFailed(e) => {
                self.moments.metadata_failed_ns.get_or_insert(now);
                if e.kind() == ErrorKind::NoSpace {
                    self.moments.metadata_full_ns.get_or_insert(now);
                }
                format!("the metadata failed: {e}")
            }
        };
        self.tell(now, text);
    }

    /// Tells whoever reads the report, unless it was told too much already.
    pub(super) fn tell(&mut self, now: u64, text: String) {
        let text = match self.notices.len() {
            n if n < MOST_NOTICES => text,
            MOST_NOTICES => "more happened than is told here".into(),
            _ => return,
        };
        self.notices.push((Duration::from_nanos(now), text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_are_bounded_and_say_so() {
        let mut books = Books::default();
        for now in 0..3000 {
            books.notice(now, Notice::Mode(PoolMode::OutOfDataSpace));
        }
        assert_eq!(books.notices.len(), MOST_NOTICES + 1);
        let (at, last) = books.notices.last().unwrap();
        assert_eq!(at.as_nanos(), MOST_NOTICES as u128);
        assert!(last.starts_with("more happened"), "{last}");
    }
}
