//! The report as people read it, and numbers as they read those.

use super::{Clock, PlayedTrace, Report};
use crate::pool::Reason;
use crate::replay::counts::InputCounts;
use std::fmt;
use std::time::Duration;

/// `n` for each of `of`.
pub(super) fn per(n: u64, of: u64) -> f64 {
    n as f64 / of.max(1) as f64
}

pub(super) fn percent(n: u64, of: u64) -> String {
    format!("{:.1} %", 100.0 * per(n, of))
}

/// A number of bytes, for people.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
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
        0.0 => "0 s".into(),
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s if s < 2.0 * 31_556_952.0 => format!("{:.1} d", s / 86_400.0),
        s => format!("{:.1} years", s / 31_556_952.0),
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
        let (setup, space) = (&self.setup, &self.space);
        self.fmt_subject(f)?;
        writeln!(
            f,
            "pool      {}; {} data blocks; locks {}; clock {}, {}; seed {}; {} cpus",
            setup.table,
            setup.data_blocks,
            setup.locks,
            setup.clock,
            seconds(self.trace_ns),
            setup.seed,
            setup.cpus
        )?;
        if setup.clock == Clock::Virtual {
            writeln!(f, "model     {}", setup.device)?;
        }
        if let Some(prefilled) = &self.prefilled {
            writeln!(
                f,
                "prefill   {} blocks of {} thin devices were mapped before the trace began, since it reads them before it writes them",
                prefilled.blocks, prefilled.devices
            )?;
        }
        if !self.sources.is_empty() {
            writeln!(
                f,
                "merged    {} pools, of {}",
                space.pools,
                self.sources.join(", ")
            )?;
        }
        writeln!(
            f,
            "trace     {} events, {} other records, {} left out, {} lost, {} malformed, {} back in time{}",
            self.trace.events,
            self.trace.skipped,
            self.trace.left_out,
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
        self.input.fmt_line(f)?;
        writeln!(
            f,
            "map       {} bios: {} remapped, {} zero, {} failed",
            self.map.bios, self.map.remapped, self.map.zero, self.map.failed
        )?;
        for reason in Reason::ALL {
            match self.map.deferred.of(reason) {
                0 => {}
                n => writeln!(f, "deferred  {n:>10}  {reason}")?,
            }
        }
        self.fmt_work(f)?;
        for (class, latency) in &self.latency {
            writeln!(
                f,
                "latency   {class}: {} requests, p50 {}, p90 {}, p99 {}, p99.9 {}, max {} [{}]",
                latency.len(),
                seconds(latency.percentile(50.0)),
                seconds(latency.percentile(90.0)),
                seconds(latency.percentile(99.0)),
                seconds(latency.percentile(99.9)),
                seconds(latency.max()),
                setup.clock
            )?;
        }
        let of = |source: &Option<String>| match source {
            Some(source) => format!("{source}: "),
            None => String::new(),
        };
        for mark in &self.marks {
            writeln!(
                f,
                "mark      {}{} at {}",
                of(&mark.source),
                mark.name,
                seconds(mark.time_ns)
            )?;
            writeln!(f, "            pool: {}", mark.pool.trim_end())?;
            for (device, status) in &mark.thins {
                writeln!(f, "            {device}: {status}")?;
            }
        }
        if let Some(expected) = &self.expected {
            expected.fmt(f)?;
        }
        if let Some(verified) = &self.verify {
            verified.fmt(f)?;
        }
        for notice in &self.notices {
            writeln!(
                f,
                "notice    {}{}: {}",
                of(&notice.source),
                seconds(notice.time_ns),
                notice.text
            )?;
        }
        Ok(())
    }
}

/// Devices that are named one by one.
const MOST_DEVICES: usize = 16;

impl Report {
    /// What the report is of.
    pub(super) fn fmt_subject(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        if let Some(PlayedTrace { files, format }) = &self.played {
            let files = files.join(", ");
            writeln!(f, "of        {files}; format {format}; {}", self.tool)?;
        }
        for device in self.devices.iter().take(MOST_DEVICES) {
            let size = bytes(device.sectors.saturating_mul(512));
            writeln!(
                f,
                "device    {} is {}thin device {}; {size}{}",
                device.device,
                if device.is_made {
                    "the new, empty "
                } else {
                    ""
                },
                device.id,
                match (device.is_size_seen, device.is_made) {
                    (true, true) => ", which is how far requests went; --map says otherwise",
                    (true, false) => ", which is how far requests went, as no size was given",
                    (false, _) => "",
                }
            )?;
        }
        match self.devices.len().saturating_sub(MOST_DEVICES) {
            0 => Ok(()),
            more => writeln!(f, "device    and {more} more"),
        }
    }

    /// What was done because of what was asked for.
    fn fmt_work(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (w, space) = (&self.work, &self.space);
        writeln!(
            f,
            "worker    {} zeroed, {} overwritten, {} copied, {} from an external origin, {} unmapped, {} freed, {} discards passed down; {} failed",
            w.zeroed,
            w.overwritten,
            w.copies,
            w.origin_copies,
            self.worker.unmapped,
            self.worker.freed,
            w.passed_down,
            w.failed
        )?;
        writeln!(
            f,
            "metadata  {} commits, {} blocks written, {} read; {} of {} blocks in use; {} devices",
            self.worker.commits.total(),
            self.metadata.blocks_written,
            self.metadata.blocks_read,
            space.allocated_metadata_blocks,
            space.metadata_blocks,
            space.devices
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
        for line in self.lines_of_locks() {
            writeln!(f, "locks     {line}")?;
        }
        Ok(())
    }
}

impl InputCounts {
    fn fmt_line(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "input     {} requests: {} reads ({}), {} writes ({}; {} of them behind a flush), {} discards ({}), {} flushes without data; {} map calls; {} control events, {} refused, {} unknown",
            self.requests,
            self.reads,
            bytes(self.bytes_read),
            self.writes,
            bytes(self.bytes_written),
            self.flushes.saturating_sub(self.lone_flushes()),
            self.discards,
            bytes(self.bytes_discarded),
            self.lone_flushes(),
            self.map_calls,
            self.controls,
            self.refused_controls,
            self.unknown_controls
        )
    }
}
