//! What a replay counts.

use super::event::{TraceIo, TraceOp};
use super::requests::Cut;
use crate::pool::{Message, Reason};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the trace asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Bytes that discards were about.
    pub bytes_discarded: u64,
    /// Of these, bytes of discards that were left out.
    #[serde(default)]
    pub bytes_discards_left_out: u64,
    /// Of these, bytes at the edges of a discard that are no whole block, and stay.
    pub bytes_partly_discarded: u64,
    /// Discards with such edges.
    pub partial_discards: u64,
    /// Calls of the kernel's map function that this makes: reads and writes are cut at block boundaries, a flush in front of a write is
    /// a call of its own.
    pub map_calls: u64,
    /// Requests to devices that are no thin device of this pool, or past the end of one: left out.
    pub out_of_range: u64,
    /// Snapshots taken.
    pub snapshots: u64,
    /// Devices deleted, snapshots among them.
    pub deletions: u64,
    /// Control events carried out.
    pub controls: u64,
    /// Control events that are not known.
    pub unknown_controls: u64,
    /// Control events that the pool refused.
    pub refused_controls: u64,
}

impl InputCounts {
    /// Counts a request.
    pub(super) fn count(&mut self, io: &TraceIo) {
        self.requests += 1;
        let size = io.sectors.saturating_mul(512);
        match io.op {
            TraceOp::Read => {
                self.reads += 1;
                self.bytes_read += size;
            }
            TraceOp::Write | TraceOp::WriteZeroes => {
                self.writes += 1;
                self.bytes_written += size;
            }
            TraceOp::Discard => {
                self.discards += 1;
                self.bytes_discarded = self.bytes_discarded.saturating_add(size);
            }
            TraceOp::Flush => {}
        }
    }

    /// Counts a request that goes to no thin device, or past the end of one.
    pub(super) fn leave_out(&mut self, io: &TraceIo) {
        self.out_of_range += 1;
        if io.op == TraceOp::Discard {
            let left_out = &mut self.bytes_discards_left_out;
            *left_out = left_out.saturating_add(io.sectors.saturating_mul(512));
        }
    }

    /// Flushes without data: those in front of a write are no requests of their own.
    pub fn lone_flushes(&self) -> u64 {
        let others = [self.reads, self.writes, self.discards];
        others.into_iter().fold(self.requests, u64::saturating_sub)
    }

    /// Counts a flush, also one in front of a write.
    pub(super) fn count_flush(&mut self) {
        self.flushes += 1;
        self.map_calls += 1;
    }

    /// Counts the bios of a request, on blocks of so many sectors.
    pub(super) fn count_bios(&mut self, io: &TraceIo, cut: &Cut, block_sectors: u64) {
        if io.op == TraceOp::Discard {
            self.count_discard(io, block_sectors);
        }
        self.map_calls += cut.map_calls();
    }

    /// Adds what was counted of other requests.
    pub(super) fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.reads += other.reads;
        self.writes += other.writes;
        self.discards += other.discards;
        self.flushes += other.flushes;
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
        self.bytes_discarded = self.bytes_discarded.saturating_add(other.bytes_discarded);
        self.bytes_discards_left_out = self
            .bytes_discards_left_out
            .saturating_add(other.bytes_discards_left_out);
        self.bytes_partly_discarded = self
            .bytes_partly_discarded
            .saturating_add(other.bytes_partly_discarded);
        self.partial_discards += other.partial_discards;
        self.map_calls += other.map_calls;
        self.out_of_range += other.out_of_range;
    }

    /// Counts a message that was carried out.
    pub(super) fn count_message(&mut self, message: Message) {
        match message {
            Message::CreateSnap { .. } => self.snapshots += 1,
            Message::Delete(_) => self.deletions += 1,
            _ => {}
        }
    }

    /// Counts what a discard is about, in blocks of so many sectors.
    fn count_discard(&mut self, io: &TraceIo, block_sectors: u64) {
        let end = io.sector.saturating_add(io.sectors);
        let first = io.sector.div_ceil(block_sectors);
        let whole = (end / block_sectors).saturating_sub(first) * block_sectors;
        let partly = io.sectors.saturating_sub(whole).saturating_mul(512);
        self.bytes_partly_discarded = self.bytes_partly_discarded.saturating_add(partly);
        self.partial_discards += u64::from(partly > 0);
    }
}

/// When something first happened, in nanoseconds since the start of the trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moments {
    /// Free data blocks came down to the low-water mark.
    pub low_water_ns: Option<u64>,
    /// A write found no data block.
    pub out_of_space_ns: Option<u64>,
    /// The metadata could not be changed any more, for whatever reason.
    pub metadata_failed_ns: Option<u64>,
    /// The reason was that no metadata block was left.
    pub metadata_full_ns: Option<u64>,
}

/// Bios left to the worker, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "BTreeMap<String, u64>", try_from = "BTreeMap<String, u64>")]
pub struct ByReason(pub [u64; Reason::ALL.len()]);

impl ByReason {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, &n| sum.saturating_add(n))
    }

    /// Those of one reason.
    pub fn of(&self, reason: Reason) -> u64 {
        self.0[reason as usize]
    }
}

impl From<ByReason> for BTreeMap<String, u64> {
    fn from(from: ByReason) -> Self {
        let named = Reason::ALL
            .iter()
            .map(|&reason| (reason.to_string(), from.of(reason)));
        named.collect()
    }
}

impl TryFrom<BTreeMap<String, u64>> for ByReason {
    type Error = String;

    fn try_from(from: BTreeMap<String, u64>) -> Result<Self, String> {
        let mut by = Self::default();
        for (name, n) in from {
            let reason = Reason::ALL
                .into_iter()
                .find(|reason| reason.to_string() == name);
            let reason =
                reason.ok_or_else(|| format!("{name:?} is no reason to leave the fast path"))?;
            by.0[reason as usize] = n;
        }
        Ok(by)
    }
}

/// What the pool did for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Lookups that slept until a commit was over, because it held the root. Under the virtual clock.
    #[serde(default)]
    pub root_waits: u64,
    /// Nanoseconds that they slept.
    #[serde(default)]
    pub root_wait_ns: u64,
    /// Bios that ended, each once.
    #[serde(default)]
    pub completed: u64,
    /// Bios that failed, no space included.
    pub failed: u64,
    /// Bios that failed for want of space.
    pub no_space: u64,
    /// Discards that failed because the pool ignores them.
    #[serde(default)]
    pub unsupported: u64,
    /// Bios that had not ended when all was over, since they waited for space.
    #[serde(default)]
    pub waiting_for_space: u64,
    /// Those that waited for the pool's resumption.
    #[serde(default)]
    pub waiting_for_resume: u64,
    /// Those that waited for something else, such as a cell.
    #[serde(default)]
    pub waiting: u64,
    /// Bytes that requests asked to write and that were not written: they were left out, failed, or had not ended.
    #[serde(default)]
    pub bytes_not_written: u64,
    /// Times that every cell was held by somebody who waited for another one.
    pub deadlocks: u64,
}

impl WorkCounts {
    /// Bios that had not ended when all was over.
    pub fn unended(&self) -> u64 {
        let waiting = [self.waiting_for_space, self.waiting_for_resume];
        waiting.into_iter().fold(self.waiting, u64::saturating_add)
    }
}
