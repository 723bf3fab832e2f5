//! Reports of the same trace beside each other: what differs, and which is better by what.

use super::text::{bytes, seconds};
use super::{Clock, Report, Topic, Verdict};
use crate::pool::Reason;
use crate::replay::latencies::{Latencies, MAPPED, is_fast};
use std::fmt::Write;

/// Something that a report says, of which less is better.
struct Figure {
    /// As rows of the table are called.
    name: &'static str,
    /// As a verdict says it, if it says anything of it: "needs ...".
    least: Option<&'static str>,
    of: fn(&Report) -> u64,
    shown: fn(u64) -> String,
}

const fn figure(
    name: &'static str,
    least: Option<&'static str>,
    of: fn(&Report) -> u64,
    shown: fn(u64) -> String,
) -> Figure {
    Figure {
        name,
        least,
        of,
        shown,
    }
}

fn plain(n: u64) -> String {
    n.to_string()
}

fn data_bytes(report: &Report) -> u64 {
    report
        .space
        .used_data_blocks
        .saturating_mul(report.block_bytes())
}

fn metadata_bytes(report: &Report) -> u64 {
    report.space.allocated_metadata_blocks.saturating_mul(4096)
}

fn written(report: &Report) -> u64 {
    let metadata = report.metadata.blocks_written.saturating_mul(4096);
    let work = &report.work;
    work.bytes_copied
        .saturating_add(work.bytes_zeroed)
        .saturating_add(metadata)
}

fn slow(report: &Report, percent: f64) -> u64 {
    let mut all = Latencies::default();
    let deferred = report.latency.iter().filter(|(class, _)| !is_fast(class));
    deferred.for_each(|(_, latencies)| all.add(latencies));
    all.percentile(percent)
}

fn fast(report: &Report, percent: f64) -> u64 {
    report
        .latency
        .get(MAPPED)
        .map_or(0, |latencies| latencies.percentile(percent))
}

/// What matters, in the order of the table.
const FIGURES: [Figure; 21] = [
    figure("requests", None, |r| r.input.requests, plain),
    figure(
        "bytes written by requests",
        None,
        |r| r.input.bytes_written,
        bytes,
    ),
    figure("data in use", Some("least data space"), data_bytes, bytes),
    figure(
        "metadata in use",
        Some("least metadata"),
        metadata_bytes,
        bytes,
    ),
    figure("blocks copied", None, |r| r.work.copies, plain),
    figure(
        "bytes copied",
        Some("fewest bytes copied"),
        |r| r.work.bytes_copied,
        bytes,
    ),
    figure(
        "bytes zeroed",
        Some("fewest bytes zeroed"),
        |r| r.work.bytes_zeroed,
        bytes,
    ),
    figure(
        "bytes written beside requests",
        Some("fewest bytes written beside requests"),
        written,
        bytes,
    ),
    figure(
        "bytes given back by discards",
        None,
        |r| r.worker.freed.saturating_mul(r.block_bytes()),
        bytes,
    ),
    figure("bios", None, |r| r.map.bios, plain),
    figure(
        "bios left to the worker",
        Some("fewest bios left to the worker"),
        |r| r.map.deferred.total(),
        plain,
    ),
    figure(
        "lookups that would have waited",
        Some("fewest lookups that would have waited"),
        |r| {
            let waiting = [Reason::RootBusy, Reason::BlockBusy, Reason::CacheMiss];
            let of = |reason| r.map.deferred.0[reason as usize];
            waiting.into_iter().map(of).fold(0, u64::saturating_add)
        },
        plain,
    ),
    figure(
        "time that lookups slept behind commits",
        Some("least sleep behind commits"),
        |r| r.work.root_wait_ns,
        seconds,
    ),
    figure(
        "locks taken",
        Some("fewest locks taken"),
        |r| r.locks.acquisitions,
        plain,
    ),
    figure(
        "atomic read-modify-writes",
        Some("fewest atomic read-modify-writes"),
        |r| r.locks.atomic_rmws,
        plain,
    ),
    figure(
        "commits",
        Some("fewest commits"),
        |r| r.worker.commits.total(),
        plain,
    ),
    figure(
        "metadata blocks written",
        Some("fewest metadata blocks written"),
        |r| r.metadata.blocks_written,
        plain,
    ),
    figure("fast path, p50", None, |r| fast(r, 50.0), seconds),
    figure(
        "fast path, p99",
        Some("shortest 99th percentile on the fast path"),
        |r| fast(r, 99.0),
        seconds,
    ),
    figure("left to the worker, p50", None, |r| slow(r, 50.0), seconds),
    figure(
        "left to the worker, p99",
        Some("shortest 99th percentile off it"),
        |r| slow(r, 99.0),
        seconds,
    ),
];

/// A table that compares each report with the first, and which of them is best by what. Each has a name.
pub fn compare(reports: &[(String, Report)]) -> String {
    let mut text = String::new();
    let Some(((first_name, first), rest)) = reports.split_first() else {
        return text;
    };
    for (name, report) in rest {
        let clock = clocks(first, report);
        // A string takes whatever is written to it.
        let _ = writeln!(text, "{name} against {first_name}, {clock}");
        let _ = writeln!(
            text,
            "{:<39} {:>14} {:>14} {:>14} {:>8}",
            "", "first", "this", "difference", "ratio"
        );
        for figure in &FIGURES {
            let (a, b) = ((figure.of)(first), (figure.of)(report));
            let sign = match a.cmp(&b) {
                std::cmp::Ordering::Less => "+",
                std::cmp::Ordering::Equal => "",
                std::cmp::Ordering::Greater => "-",
            };
            let difference = format!("{sign}{}", (figure.shown)(a.abs_diff(b)));
            let ratio = match (a, b) {
                (0, 0) => "1.00".into(),
                (0, _) => "-".into(),
                (a, b) => format!("{:.2}", b as f64 / a as f64),
            };
            let _ = writeln!(
                text,
                "{:<39} {:>14} {:>14} {difference:>14} {ratio:>8}",
                figure.name,
                (figure.shown)(a),
                (figure.shown)(b)
            );
        }
        text.push('\n');
    }
    text.push_str(&judge(reports));
    text
}

/// Which of them is best by what.
fn judge(reports: &[(String, Report)]) -> String {
    let mut text = String::new();
    if first_differs(reports) {
        text.push_str("NOTE       they asked for different amounts: these are not replays of the same trace\n");
    }
    for figure in FIGURES.iter().filter(|figure| figure.least.is_some()) {
        let values = || {
            reports
                .iter()
                .map(|(name, report)| ((figure.of)(report), name))
        };
        let (Some(least), Some(most)) = (values().min(), values().max()) else {
            continue;
        };
        if least.0 < most.0 {
            let _ = writeln!(
                text,
                "VERDICT    {}: {} with {}; {} has most with {}",
                figure.least.unwrap_or_default(),
                least.1,
                (figure.shown)(least.0),
                most.1,
                (figure.shown)(most.0)
            );
        }
    }
    let reports: Vec<&Report> = reports.iter().map(|(_, report)| report).collect();
    if let Some(verdict) = best_block_size(&reports) {
        let _ = writeln!(text, "VERDICT    {verdict}");
    }
    if !text.contains("VERDICT") {
        text.push_str("VERDICT    no difference in what is compared\n");
    }
    text
}

/// What each of many ways to play one trace came to, a line each, after which is best by what.
pub fn ways(reports: &[(String, Report)]) -> String {
    let mut text = judge(reports);
    let width = reports.iter().map(|(name, _)| name.len()).max();
    let width = width.unwrap_or(0);
    // A string takes whatever is written to it.
    let _ = writeln!(
        text,
        "\n{:width$} {:>10} {:>10} {:>10} {:>10} {:>8} {:>8} {:>10} {:>10}",
        "", "data", "metadata", "copied", "zeroed", "deferred", "commits", "p99 fast", "p99 other"
    );
    for (name, report) in reports {
        let deferred = report.map.deferred.total() as f64 / report.map.bios.max(1) as f64;
        let _ = writeln!(
            text,
            "{name:width$} {:>10} {:>10} {:>10} {:>10} {:>6.1} % {:>8} {:>10} {:>10}",
            bytes(data_bytes(report)),
            bytes(metadata_bytes(report)),
            bytes(report.work.bytes_copied),
            bytes(report.work.bytes_zeroed),
            100.0 * deferred,
            report.worker.commits.total(),
            seconds(fast(report, 99.0)),
            seconds(slow(report, 99.0))
        );
    }
    text
}

fn clocks(first: &Report, report: &Report) -> String {
    match (first.setup.clock, report.setup.clock) {
        (a, b) if a == b => format!("clock {a}"),
        (a, b) => format!("clocks {a} and {b}: times do not compare"),
    }
}

fn first_differs(reports: &[(String, Report)]) -> bool {
    let asked = |report: &Report| (report.input.requests, report.input.bytes_written);
    reports
        .windows(2)
        .any(|pair| asked(&pair[0].1) != asked(&pair[1].1))
}

/// Which of the block sizes that these replays of one trace had is best; none if they all had the same.
///
/// Of two costs neither can be had for the other, so both are said: space, of data and metadata, and what is written beside the requests.
pub fn best_block_size(reports: &[&Report]) -> Option<Verdict> {
    let first = reports.first()?;
    let size = |report: &Report| report.setup.block_sectors;
    if reports.iter().all(|report| size(report) == size(first)) {
        return None;
    }
    let space = |report: &Report| data_bytes(report).saturating_add(metadata_bytes(report));
    let frugal = reports.iter().min_by_key(|report| space(report))?;
    let gentle = reports.iter().min_by_key(|report| written(report))?;
    let said = |report: &Report| {
        format!(
            "{} (in use {} of data and {} of metadata, {} written beside the requests)",
            bytes(report.block_bytes()),
            bytes(data_bytes(report)),
            bytes(metadata_bytes(report)),
            bytes(written(report))
        )
    };
    let text = match size(frugal) == size(gentle) {
        true => format!("{} takes least space and has least written", said(frugal)),
        false => format!(
            "{} takes least space, {} has least written",
            said(frugal),
            said(gentle)
        ),
    };
    let clock = match reports
        .iter()
        .any(|report| report.setup.clock == Clock::Threads)
    {
        true => Clock::Threads,
        false => Clock::Virtual,
    };
    Some(Verdict {
        topic: Topic::BlockSize,
        clock,
        text,
    })
}
