//! What a replay found out, as plain values that come back from JSON as they were: a report of one replay, or of several that were merged.
//!
//! Verdicts are never stored: they follow from the rest, and are made anew when a report is read or merged.

mod compare;
mod forecast;
mod gather;
mod html;
mod merge;
mod read;
mod rows;
mod schemes;
mod text;
mod verdicts;

use super::books::{Mark, Sample};
use super::clock::Clock;
use super::counts::{ByReason, InputCounts, WorkCounts};
use super::device::DeviceModel;
use super::device_heat::DeviceHeat;
use super::devices::PlayedDevice;
use super::event::TraceNotes;
use super::expect::Compared;
use super::heat::HeatMap;
use super::latencies::Latencies;
use super::prefill::Prefilled;
use super::verify::Verified;
use crate::pdata::txn::LookupCounts;
use crate::pool::{LockCounts, WorkerCounts};
pub use compare::{best_block_size, compare, ways};
pub use forecast::{Fill, Forecast, NoForecast};
pub use html::html;
pub use merge::merge;
pub use rows::{csv, jsonl};
pub use schemes::{cell_pools, schemes};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
pub use text::{bytes, seconds};
pub use verdicts::{Topic, Verdict};

/// The name of this form of the report, for programs that read it.
pub const SCHEMA: &str = "thintools-replay/1";

/// The report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// The program that made it, and its version; empty if that is not known.
    #[serde(default)]
    pub tool: String,
    /// The trace that it is of; none if that is not known, or if it was merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub played: Option<PlayedTrace>,
    /// Which thin devices the trace's devices were; none if it was merged.
    #[serde(default)]
    pub devices: Vec<PlayedDevice>,
    /// False if the replay was interrupted: the report says how far it came.
    pub is_complete: bool,
    /// The metadata was checked after the replay, and is sound.
    pub is_checked: bool,
    /// Names of the reports that it was merged from; none for that of one replay.
    pub sources: Vec<String>,
    /// The volume of a fleet, or the pool of several, that it is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// The options that it was made with, as they were given; none if that is not known, or if those of its parts differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<Vec<String>>,
    /// The answers, a sentence each.
    #[serde(skip_deserializing)]
    pub verdicts: Vec<Verdict>,
    /// How the pool was set up.
    pub setup: Setup,
    /// What was mapped before the trace began, which is no work of the trace; none unless that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefilled: Option<Prefilled>,
    /// What was read.
    pub trace: TraceNotes,
    /// How many nanoseconds the replay took, by its clock.
    pub trace_ns: u64,
    /// What was asked for.
    pub input: InputCounts,
    /// What the map half did.
    pub map: Map,
    /// What lookups cost.
    pub locks: LookupCounts,
    /// What the other locks cost.
    #[serde(default)]
    pub contention: Contention,
    /// What was done on the data device.
    pub work: WorkCounts,
    /// What the worker did.
    pub worker: WorkerCounts,
    /// What the metadata cost.
    pub metadata: Metadata,
    /// What is in use at the end.
    pub space: Space,
    /// When the pool is full.
    pub forecast: Forecast,
    /// Of several pools, the first whose data was full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_full: Option<String>,
    /// Nanoseconds from submission to completion, by what became of a request: `mapped`, or why it was left to the worker.
    pub latency: BTreeMap<String, Latencies>,
    /// How it went on.
    pub timeline: Vec<Sample>,
    /// Where requests went, and when.
    pub heat: HeatMap,
    /// The same of those devices alone that have most requests, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_heat: Vec<DeviceHeat>,
    /// How things were at the marks.
    pub marks: Vec<Mark>,
    /// What came of comparing with the kernel at the marks; none unless that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<Compared>,
    /// Whether reads found what was written; none unless that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<Verified>,
    /// What the pool reported.
    pub notices: Vec<Noticed>,
}

/// A trace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlayedTrace {
    /// Files, as they were named.
    pub files: Vec<String>,
    /// Its format, by the name that `--format` takes.
    pub format: String,
}

/// How the pool was set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    /// Whose time all numbers of the report are of.
    pub clock: Clock,
    /// How lookups and changes are kept apart.
    pub locks: String,
    /// Sectors of 512 bytes in a data block.
    pub block_sectors: u64,
    /// Data blocks.
    pub data_blocks: u64,
    /// Free data blocks at which the pool is called low.
    pub low_water_blocks: u64,
    /// The pool's table.
    pub table: String,
    /// Threads that submit.
    pub cpus: usize,
    /// The cells there are, if each is taken when it is needed, as in 2013; none if both are taken before.
    #[serde(default)]
    pub cell_pool: Option<u64>,
    /// The data device.
    pub device: DeviceModel,
    /// What varies how long it takes.
    #[serde(default)]
    pub seed: u64,
    /// Snapshots that were taken whatever the trace says: seconds between them, and how many of each device were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshots: Option<(f64, u64)>,
}

/// What the map half did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// Bios, a discard or a large request being several.
    pub bios: u64,
    /// Issued at once.
    pub remapped: u64,
    /// Read as zeros at once.
    pub zero: u64,
    /// Failed at once.
    pub failed: u64,
    /// Left to the worker, by reason.
    pub deferred: ByReason,
}

/// What the locks cost that are not of lookups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contention {
    /// The prison's.
    pub prison: LockCounts,
    /// Those of the deferred sets.
    pub deferred_sets: LockCounts,
    /// Commits that had to wait for lookups.
    pub commit_stalls: u64,
    /// For how many nanoseconds.
    pub commit_stall_ns: u64,
}

/// What the metadata cost, in blocks of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Read from the metadata device.
    pub blocks_read: u64,
    /// Written to it, superblocks included.
    pub blocks_written: u64,
    /// More that were in use at the end than at the beginning.
    pub grown_blocks: i64,
    /// In the cache at the end.
    pub cached_blocks: u64,
    /// That fit into the cache.
    pub cache_blocks: u64,
}

/// What is in use at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Pools: more than one in a report that was merged.
    pub pools: u64,
    /// Data blocks in use.
    pub used_data_blocks: u64,
    /// Mappings of the devices that the trace's devices are; what is in use beyond them others hold, as snapshots do.
    pub mapped_blocks: u64,
    /// Metadata blocks in use, without those kept back for commits.
    pub allocated_metadata_blocks: u64,
    /// Metadata blocks in use, those included.
    pub used_metadata_blocks: u64,
    /// Metadata blocks.
    pub metadata_blocks: u64,
    /// Thin devices.
    pub devices: u64,
}

/// Something that the pool reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noticed {
    /// Which of the reports it is of, in one that was merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Nanoseconds since the start.
    pub time_ns: u64,
    /// What.
    pub text: String,
}

impl Report {
    /// The metadata was checked after the replay, and is sound.
    pub fn metadata_is_sound(&mut self) {
        self.is_checked = true;
        self.judge();
    }

    /// Bytes in a data block.
    pub fn block_bytes(&self) -> u64 {
        self.setup.block_sectors.saturating_mul(512)
    }

    /// The replay is not what it had to be: by what was expected at its marks, or what reads had to find.
    pub fn is_unexpected(&self) -> bool {
        let differs = self.expected.as_ref().is_some_and(|e| e.differences > 0);
        differs || self.verify.as_ref().is_some_and(|v| v.wrong > 0)
    }

    /// What tells this report from others of the same trace.
    pub fn name(&self) -> String {
        let size = bytes(self.block_bytes());
        let cells = match self.setup.cell_pool {
            Some(cells) => format!(", cells one by one of {cells}"),
            None => String::new(),
        };
        format!("{size} blocks, locks {}{cells}", self.setup.locks)
    }
}
