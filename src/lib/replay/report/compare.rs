//! Reports of the same trace beside each other: what differs, and which is better by what.

use super::schemes::cells;
use super::text::{bytes, seconds};
use super::{Clock, Report, Topic, Verdict};
use crate::pool::Reason;
use crate::replay::expect::Compared;
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

/// Figures that say something of lookups, if all have as many cells.
const OF_LOOKUPS: [&str; 2] = ["locks taken", "atomic read-modify-writes"];

/// A table that compares each report with the first, and which of them is best by what. Each has a name.
pub fn compare(reports: &[(String, Report)]) -> String {
    let mut text = interrupted(reports);
    let Some(((first_name, first), rest)) = reports.split_first() else {
        return text;
    };
    for (name, report) in rest {
        let [of_first, of_this] = [first, report].map(|report| report.input.requests);
        if of_first != of_this && first.is_complete && report.is_complete {
            // A string takes whatever is written to it.
            let _ = writeln!(
                text,
                "NOT ALIKE   {first_name} is of {of_first} requests, {name} of {of_this}: another trace, or another part of it"
            );
        }
    }
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

/// Those that were interrupted, in a line.
fn interrupted(reports: &[(String, Report)]) -> String {
    match reports.iter().filter(|(_, r)| !r.is_complete).count() {
        0 => String::new(),
        n => format!(
            "INCOMPLETE  {n} of {} replays were interrupted; what they say is how far they came\n",
            reports.len()
        ),
    }
}

/// What became of each, beside its costs, and which of those that did all they were asked for is best by what.
fn judge(reports: &[(String, Report)]) -> String {
    let clock = clocks_of(reports);
    let mut text = String::new();
    // A string takes whatever is written to it.
    let _ = write!(text, "{}", outcomes(reports, clock));
    let whole: Vec<&(String, Report)> = (reports.iter())
        .filter(|(_, report)| report.is_whole())
        .collect();
    if whole.len() < reports.len() {
        let others = reports.iter().filter(|(_, report)| !report.is_whole());
        let others: Vec<&str> = others.map(|(name, _)| &**name).collect();
        let _ = writeln!(
            text,
            "NOTE       not compared, since not all was done that was asked for: {}",
            list(&others, reports.len())
        );
    }
    if first_differs(&whole) {
        text.push_str("NOTE       they asked for different amounts: these are not replays of the same trace\n");
    }
    let mut differs = false;
    // A bio that gets no cell takes no lock for a lookup, and is none the better for it.
    let cells = |of: &(String, Report)| of.1.setup.cell_pool;
    let are_starved = whole.windows(2).any(|two| cells(two[0]) != cells(two[1]));
    for figure in FIGURES.iter().filter(|figure| figure.least.is_some()) {
        if are_starved && OF_LOOKUPS.contains(&figure.name) {
            continue;
        }
        let values = || whole.iter().map(|(_, report)| (figure.of)(report));
        let (Some(least), Some(most)) = (values().min(), values().max()) else {
            continue;
        };
        let (least, most) = ((figure.shown)(least), (figure.shown)(most));
        if least == most {
            continue;
        }
        differs = true;
        // What is shown as the same is the same to whoever reads it.
        let those = |shown: &str| {
            let are =
                |(_, report): &&&(String, Report)| (figure.shown)((figure.of)(report)) == shown;
            let names: Vec<&str> = whole.iter().filter(are).map(|(name, _)| &**name).collect();
            (list(&names, usize::MAX), names.len() > 1)
        };
        let ((frugal, are_many), (greedy, have_many)) = (those(&least), those(&most));
        let _ = writeln!(
            text,
            "VERDICT    {}: {frugal} with {least}{}; {greedy} {} most with {most} [{clock}]",
            figure.least.unwrap_or_default(),
            if are_many { " each" } else { "" },
            if have_many { "have" } else { "has" }
        );
    }
    let compared: Vec<&Report> = whole.iter().map(|(_, report)| report).collect();
    if let Some(verdict) = best_block_size(&compared) {
        differs = true;
        let _ = writeln!(text, "VERDICT    {verdict}");
    }
    if !differs && whole.len() > 1 {
        let _ = writeln!(
            text,
            "VERDICT    no difference in what is compared [{clock}]"
        );
    }
    text
}

/// What became of each: cells that were waited for, what was full, failed, or is not as it had to be. What is said of several is said
/// once.
fn outcomes(reports: &[(String, Report)], clock: &str) -> String {
    let mut said: Vec<(String, Vec<&str>)> = Vec::new();
    for (name, report) in reports {
        let Some(outcome) = report.outcome() else {
            continue;
        };
        match said.iter_mut().find(|(text, _)| *text == outcome) {
            Some((_, names)) => names.push(name),
            None => said.push((outcome, vec![name])),
        }
    }
    let mut text = String::new();
    if let Some(cells) = cells(reports.iter().map(|(_, report)| report)) {
        text.push_str(&format!("VERDICT    {cells} [{clock}]\n"));
    }
    for (outcome, names) in said {
        let names = list(&names, reports.len());
        text.push_str(&format!("VERDICT    {names}: {outcome} [{clock}]\n"));
    }
    text
}

/// Names, of so many that there are.
fn list(names: &[&str], of: usize) -> String {
    match names {
        _ if names.len() == of => "all".into(),
        [.., last] if names.len() > 1 && names.len() <= 5 => {
            format!("{} and {last}", names[..names.len() - 1].join(", "))
        }
        [first, second, ..] if names.len() > 5 => {
            format!("{first}, {second} and {} more", names.len() - 2)
        }
        names => names.join(""),
    }
}

impl Report {
    /// True if all was done that the trace asked for, so that what it cost compares with what others cost.
    fn is_whole(&self) -> bool {
        let work = &self.work;
        self.is_complete
            && work.unended() == 0
            && work.deadlocks == 0
            && work.failed <= work.unsupported
    }

    /// When data or metadata was full first, in nanoseconds.
    fn full_at_ns(&self) -> Option<u64> {
        let fills = [&self.forecast.data, &self.forecast.metadata];
        fills.into_iter().filter_map(|fill| fill.full_at_ns).min()
    }

    /// What is to be known of it beside what it cost.
    fn outcome(&self) -> Option<String> {
        let mut said = Vec::new();
        let fills = [
            ("data", &self.forecast.data),
            ("metadata", &self.forecast.metadata),
        ];
        for (name, fill) in fills {
            if let Some(at) = fill.full_at_ns {
                said.push(format!("{name} full after {}", self.moment(at)));
            }
        }
        said.extend(self.on_failures());
        said.extend(self.expected.as_ref().map(Compared::outcome));
        said.extend(self.on_verify());
        (!said.is_empty()).then(|| said.join("; "))
    }
}

/// What each of many ways to play one trace came to, a line each, after what became of them and which is best by what; last, what they
/// are of. Bios that failed or had not ended are in the last column.
pub fn ways(reports: &[(String, Report)]) -> String {
    let mut text = interrupted(reports);
    text.push_str(&judge(reports));
    let width = reports.iter().map(|(name, _)| name.len()).max();
    let width = width.unwrap_or(0);
    // A string takes whatever is written to it.
    let _ = writeln!(
        text,
        "\n{:width$} {:>10} {:>10} {:>10} {:>10} {:>8} {:>8} {:>10} {:>10} {:>10} {:>9}",
        "",
        "data",
        "metadata",
        "copied",
        "zeroed",
        "deferred",
        "commits",
        "p99 fast",
        "p99 other",
        "full after",
        "not done"
    );
    for (name, report) in reports {
        let deferred = report.map.deferred.total() as f64 / report.map.bios.max(1) as f64;
        let _ = writeln!(
            text,
            "{name:width$} {:>10} {:>10} {:>10} {:>10} {:>6.1} % {:>8} {:>10} {:>10} {:>10} {:>9}",
            bytes(data_bytes(report)),
            bytes(metadata_bytes(report)),
            bytes(report.work.bytes_copied),
            bytes(report.work.bytes_zeroed),
            100.0 * deferred,
            report.worker.commits.total(),
            seconds(fast(report, 99.0)),
            seconds(slow(report, 99.0)),
            report.full_at_ns().map_or("-".into(), seconds),
            report.work.failed.saturating_add(report.work.unended())
        );
    }
    if let Some((_, first)) = reports.first() {
        text.push('\n');
        let _ = first.fmt_subject(&mut text);
    }
    text
}

fn clocks(first: &Report, report: &Report) -> String {
    match (first.setup.clock, report.setup.clock) {
        (a, b) if a == b => format!("clock {a}"),
        (a, b) => format!("clocks {a} and {b}: times do not compare"),
    }
}

/// Whose time the numbers of all of them are of.
fn clocks_of(reports: &[(String, Report)]) -> &'static str {
    let has = |clock| {
        reports
            .iter()
            .any(|(_, report)| report.setup.clock == clock)
    };
    match (has(Clock::Virtual), has(Clock::Threads)) {
        (true, true) => "virtual and threads: times do not compare",
        (false, true) => "threads",
        _ => "virtual",
    }
}

fn first_differs(reports: &[&(String, Report)]) -> bool {
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
