//! What a replay found out: verdicts first, then everything that was counted. Every number of virtual time says so.

use super::counts::{InputCounts, Latencies, WorkCounts};
use super::event::TraceNotes;
use super::expect::Compared;
use super::player::{Mark, PlayOptions, Player, Sample};
use super::prefill::Prefilled;
use crate::pdata::txn::LookupCounts;
use crate::pool::{MapCounts, Reason};
use crate::thin::PoolMetadata;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// The name of this form of the report, for programs that read it.
pub const SCHEMA: &str = "thintools-replay/1";

/// The report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// False if the replay was interrupted: the report says how far it came.
    pub is_complete: bool,
    /// The answers, a sentence each.
    pub verdicts: Vec<String>,
    /// How the pool was set up.
    pub setup: Setup,
    /// What was mapped before the trace began, which is no work of the trace; none unless that was asked for.
    pub prefilled: Option<Prefilled>,
    /// What was read.
    pub trace: TraceNotes,
    /// Of how many nanoseconds, by the trace.
    pub trace_ns: u64,
    /// What was asked for.
    pub input: InputCounts,
    /// What the map half did.
    pub map: Map,
    /// What lookups cost.
    pub locks: LookupCounts,
    /// What the worker did.
    pub work: WorkCounts,
    /// Commits.
    pub commits: u64,
    /// What is in use at the end.
    pub space: Space,
    /// Nanoseconds of virtual time from submission to completion.
    pub latency: BTreeMap<&'static str, Latency>,
    /// How it went on.
    pub timeline: Vec<Sample>,
    /// How things were at the marks.
    pub marks: Vec<Mark>,
    /// What came of comparing with the kernel at the marks; none unless that was asked for.
    pub expected: Option<Compared>,
    /// What the pool reported: nanoseconds of virtual time, and what.
    pub notices: Vec<(u64, String)>,
}

/// How the pool was set up.
#[derive(Clone, Debug, Serialize)]
pub struct Setup {
    /// Virtual time.
    pub clock: &'static str,
    /// How lookups and changes are kept apart.
    pub locks: String,
    /// Sectors of 512 bytes in a data block.
    pub block_sectors: u64,
    /// Data blocks.
    pub data_blocks: u64,
    /// The pool's table.
    pub table: String,
    /// Threads that submit.
    pub cpus: usize,
    /// The data device.
    pub device: super::DeviceModel,
}

/// What the map half did.
#[derive(Clone, Debug, Default, Serialize)]
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
    pub deferred: BTreeMap<String, u64>,
}

/// What is in use at the end.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Space {
    /// Data blocks in use.
    pub used_data_blocks: u64,
    /// Metadata blocks in use, without those kept back for commits.
    pub allocated_metadata_blocks: u64,
    /// Metadata blocks.
    pub metadata_blocks: u64,
    /// Thin devices.
    pub devices: u64,
}

/// Percentiles of a latency.
#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    /// How many.
    pub count: u64,
    /// Half of them took no longer.
    pub p50: u64,
    /// 90 in 100.
    pub p90: u64,
    /// 99 in 100.
    pub p99: u64,
    /// 999 in 1000.
    pub p999: u64,
    /// The longest.
    pub max: u64,
    /// Nanoseconds, and the percentage that took no longer.
    pub curve: Vec<(u64, f64)>,
}

impl Latency {
    fn of(latencies: &Latencies) -> Self {
        Self {
            count: latencies.len(),
            p50: latencies.percentile(50.0),
            p90: latencies.percentile(90.0),
            p99: latencies.percentile(99.0),
            p999: latencies.percentile(99.9),
            max: latencies.max(),
            curve: latencies.curve(),
        }
    }
}

impl Report {
    /// The report of what was played so far.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn new(
        player: &Player,
        options: &PlayOptions,
        trace: &TraceNotes,
        is_complete: bool,
    ) -> crate::Result<Self> {
        let status = player.pool().inspect(PoolMetadata::status)?;
        let mut counts = MapCounts::default();
        let mut locks = LookupCounts::default();
        for mapper in player.mappers() {
            counts.add(mapper.counts());
            locks.add(&mapper.lookup_counts().unwrap_or_default());
        }
        let deferred = Reason::ALL
            .iter()
            .map(|&reason| (reason.to_string(), counts.deferred[reason as usize]));
        let (mapped, deferred_latency) = player.latencies();
        let mut report = Self {
            schema: SCHEMA,
            is_complete,
            verdicts: Vec::new(),
            setup: Setup {
                clock: "virtual",
                locks: options.settings.scheme.to_string(),
                block_sectors: player.pool().block_sectors(),
                data_blocks: status.data_blocks,
                table: options.settings.table.to_string(),
                cpus: options.cpus,
                device: options.device,
            },
            prefilled: None,
            trace: trace.clone(),
            trace_ns: player.now().as_nanos() as u64,
            input: player.input().clone(),
            map: Map {
                bios: counts.bios,
                remapped: counts.remapped,
                zero: counts.zero,
                failed: counts.failed,
                deferred: deferred.collect(),
            },
            locks,
            work: player.work().clone(),
            commits: player.pool().commits(),
            space: Space {
                used_data_blocks: status.used_data_blocks,
                allocated_metadata_blocks: status.allocated_metadata_blocks,
                metadata_blocks: status.metadata_blocks,
                devices: status.devices,
            },
            latency: BTreeMap::from([
                ("mapped", Latency::of(mapped)),
                ("deferred", Latency::of(deferred_latency)),
            ]),
            timeline: player.timeline().to_vec(),
            marks: player.marks().to_vec(),
            expected: None,
            notices: player
                .notices()
                .iter()
                .map(|(at, text)| (at.as_nanos() as u64, text.clone()))
                .collect(),
        };
        report.verdicts = report.judge();
        Ok(report)
    }

    fn judge(&self) -> Vec<String> {
        let block = self.setup.block_sectors * 512;
        let work = &self.work;
        let mut verdicts = vec![self.forecast()];
        let left: u64 = self.map.deferred.values().sum();
        let of_locks: u64 = ["root_busy", "block_busy", "cache_miss"]
            .iter()
            .filter_map(|reason| self.map.deferred.get(*reason))
            .sum();
        verdicts.push(format!(
            "{} of {} bios left the fast path ({}), {} of them because a lookup would have waited",
            left,
            self.map.bios,
            percent(left, self.map.bios),
            of_locks
        ));
        let written = self.input.bytes_written;
        let more = work.bytes_copied + work.bytes_zeroed;
        verdicts.push(format!(
            "{} blocks were copied because a snapshot had them, {} zeroed, {} filled by one write: {} written beside {} asked for",
            work.copies,
            work.zeroed,
            work.overwritten,
            bytes(more),
            bytes(written)
        ));
        match self.input.discards {
            0 => verdicts.push("the trace has no discards: nothing is ever given back".into()),
            n => verdicts.push(format!(
                "{n} discards, {} of the data device with {}",
                work.passed_down,
                bytes(work.bytes_passed_down)
            )),
        }
        verdicts.push(format!(
            "locks ({}): {:.1} acquisitions and {:.1} atomic read-modify-writes for each lookup, {} lookups gave up",
            self.setup.locks,
            per(self.locks.acquisitions, self.locks.lookups),
            per(self.locks.atomic_rmws, self.locks.lookups),
            self.locks.would_block_root + self.locks.would_block_block + self.locks.would_block_cache
        ));
        if work.no_space > 0 {
            verdicts.push(format!("{} bios failed for want of space", work.no_space));
        }
        if self.input.out_of_range > 0 {
            verdicts.push(format!(
                "{} requests were left out: to no thin device of this pool, or past its end",
                self.input.out_of_range
            ));
        }
        verdicts.push(format!(
            "a data block is {}; at the end {} are in use, {}",
            bytes(block),
            self.space.used_data_blocks,
            bytes(self.space.used_data_blocks.saturating_mul(block))
        ));
        verdicts
    }

    /// When the pool is full, if it goes on as it did.
    fn forecast(&self) -> String {
        let total = self.setup.data_blocks;
        let used = self.space.used_data_blocks;
        let share = percent(used, total);
        if let Some(full) = self.timeline.iter().find(|s| s.used_data_blocks >= total) {
            let at = seconds(full.time_ns);
            return format!("the pool was full after {at} of virtual time");
        }
        let half = self.timeline.len() / 2;
        let rate = |from: Option<&Sample>, to: Option<&Sample>| {
            let (from, to) = (from?, to?);
            let time = to.time_ns.checked_sub(from.time_ns).filter(|&t| t > 0)?;
            let grown = to.used_data_blocks.checked_sub(from.used_data_blocks)?;
            Some(grown as f64 / time as f64).filter(|&r| r > 0.0)
        };
        let last = self.timeline.last();
        let rates = [
            rate(self.timeline.first(), last),
            rate(self.timeline.get(half), last),
        ];
        let times: Vec<String> = rates
            .into_iter()
            .flatten()
            .map(|rate| seconds(((total - used) as f64 / rate) as u64))
            .collect();
        match &times[..] {
            [] => format!("{share} of the data is in use, no fill in sight"),
            [all] => {
                format!("{share} of the data is in use; full {all} after the end at this rate")
            }
            [all, half, ..] => format!(
                "{share} of the data is in use; full {all} after the end at the rate of the whole trace, {half} at that of its second half"
            ),
        }
    }
}

fn per(n: u64, of: u64) -> f64 {
    n as f64 / of.max(1) as f64
}

fn percent(n: u64, of: u64) -> String {
    format!("{:.1} %", 100.0 * per(n, of))
}

/// A number of bytes, for people.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// A time, for people.
pub fn seconds(nanos: u64) -> String {
    let time = Duration::from_nanos(nanos);
    let s = time.as_secs_f64();
    match s {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} d", s / 86_400.0),
    }
}

/// As people read it.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_complete {
            writeln!(
                f,
                "INCOMPLETE  the replay was interrupted; this is how far it came"
            )?;
        }
        for verdict in &self.verdicts {
            writeln!(f, "VERDICT   {verdict}")?;
        }
        let i = &self.input;
        writeln!(
            f,
            "pool      {}; {} data blocks; locks {}; clock {}, {}",
            self.setup.table.trim_end(),
            self.setup.data_blocks,
            self.setup.locks,
            self.setup.clock,
            seconds(self.trace_ns)
        )?;
        if let Some(prefilled) = &self.prefilled {
            writeln!(
                f,
                "prefill   {} blocks of {} thin devices were mapped before the trace began, since it reads them before it writes them",
                prefilled.blocks, prefilled.devices
            )?;
        }
        writeln!(
            f,
            "trace     {} events, {} other records, {} lost, {} malformed, {} back in time{}",
            self.trace.events,
            self.trace.skipped,
            self.trace.lost,
            self.trace.malformed,
            self.trace.regressed,
            if self.trace.is_truncated {
                ", the last one cut off"
            } else {
                ""
            }
        )?;
        for warning in &self.trace.warnings {
            writeln!(f, "warning   {warning}")?;
        }
        writeln!(
            f,
            "input     {} requests: {} reads ({}), {} writes ({}), {} discards, {} flushes; {} map calls; {} control events, {} refused, {} unknown",
            i.requests,
            i.reads,
            bytes(i.bytes_read),
            i.writes,
            bytes(i.bytes_written),
            i.discards,
            i.flushes,
            i.map_calls,
            i.controls,
            i.refused_controls,
            i.unknown_controls
        )?;
        writeln!(
            f,
            "map       {} bios: {} remapped, {} zero, {} failed",
            self.map.bios, self.map.remapped, self.map.zero, self.map.failed
        )?;
        for (reason, n) in self.map.deferred.iter().filter(|d| *d.1 > 0) {
            writeln!(f, "deferred  {n:>10}  {reason}")?;
        }
        let w = &self.work;
        writeln!(
            f,
            "worker    {} zeroed, {} overwritten, {} copied, {} from an external origin, {} discards passed down; {} failed",
            w.zeroed, w.overwritten, w.copies, w.origin_copies, w.passed_down, w.failed
        )?;
        writeln!(
            f,
            "metadata  {} commits; {} of {} blocks in use; {} devices",
            self.commits,
            self.space.allocated_metadata_blocks,
            self.space.metadata_blocks,
            self.space.devices
        )?;
        let l = &self.locks;
        writeln!(
            f,
            "locks     {} lookups, {} acquisitions ({} contended), {} read-modify-writes, {} began again; would block: {} root, {} block, {} cache",
            l.lookups,
            l.acquisitions,
            l.contended,
            l.atomic_rmws,
            l.retries,
            l.would_block_root,
            l.would_block_block,
            l.would_block_cache
        )?;
        for (class, latency) in &self.latency {
            writeln!(
                f,
                "latency   {class}: {} requests, p50 {}, p90 {}, p99 {}, p99.9 {}, max {} (virtual)",
                latency.count,
                seconds(latency.p50),
                seconds(latency.p90),
                seconds(latency.p99),
                seconds(latency.p999),
                seconds(latency.max)
            )?;
        }
        for mark in &self.marks {
            writeln!(f, "mark      {} at {}", mark.name, seconds(mark.time_ns))?;
            writeln!(f, "            pool: {}", mark.pool.trim_end())?;
            for (device, status) in &mark.thins {
                writeln!(f, "            {device}: {status}")?;
            }
        }
        if let Some(expected) = &self.expected {
            expected.fmt(f)?;
        }
        for (at, notice) in &self.notices {
            writeln!(f, "notice    {}: {notice}", seconds(*at))?;
        }
        Ok(())
    }
}
