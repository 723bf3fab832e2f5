//! What happened how often, over time.

use super::chart::{COLOURS, Chart, ceiling, figure, table, ticks, time_ticks};
use crate::pool::Reason;
use crate::replay::books::Sample;
use crate::replay::report::Report;
use crate::replay::report::text::seconds;
use crate::replay::report::verdicts::words;
use std::fmt::Write;

/// Steps that a chart has at most.
const STEPS: usize = 120;

/// A count that only grows, with what it is of.
struct Series<'a> {
    name: String,
    of: Box<dyn Fn(&Sample) -> u64 + 'a>,
}

fn series<'a>(name: &str, of: impl Fn(&Sample) -> u64 + 'a) -> Series<'a> {
    Series {
        name: name.into(),
        of: Box::new(of),
    }
}

/// Bios that left the fast path, by reason, on top of each other.
pub(super) fn deferrals(report: &Report, number: usize) -> String {
    let mut reasons: Vec<Reason> = Reason::ALL
        .into_iter()
        .filter(|&reason| report.map.deferred.of(reason) > 0)
        .collect();
    reasons.sort_by_key(|&reason| std::cmp::Reverse(report.map.deferred.of(reason)));
    // As many as there are colours; what is left is one.
    let rest = reasons.split_off(reasons.len().min(COLOURS - 1));
    let mut all: Vec<Series> = reasons
        .into_iter()
        .map(|reason| series(words(reason), move |sample| sample.deferred.of(reason)))
        .collect();
    if !rest.is_empty() {
        all.push(series("other reasons", move |sample| {
            rest.iter().fold(0u64, |sum, &reason| {
                sum.saturating_add(sample.deferred.of(reason))
            })
        }));
    }
    let title = "Bios that left the fast path, by reason";
    drawn(
        report,
        (&format!("deferrals-{number}"), title, "bios a second"),
        &all,
        true,
    )
}

/// Blocks copied and unmapped.
pub(super) fn copies(report: &Report, number: usize) -> String {
    let all = [
        series("copied because a snapshot had it", |sample| sample.copies),
        series("unmapped by discards", |sample| sample.unmapped),
    ];
    let title = "Blocks copied and unmapped";
    drawn(
        report,
        (&format!("copies-{number}"), title, "blocks a second"),
        &all,
        false,
    )
}

/// Commits, and what they write.
pub(super) fn commits(report: &Report, number: usize) -> String {
    let all = [
        series("commits", |sample| sample.commits),
        series("metadata blocks written", |sample| {
            sample.metadata_blocks_written
        }),
    ];
    let title = "Commits, and metadata blocks written";
    drawn(
        report,
        (&format!("commits-{number}"), title, "a second"),
        &all,
        false,
    )
}

/// The rates of each series in steps of equal time.
fn stepped(timeline: &[Sample], all: &[Series]) -> (f64, Vec<Vec<f64>>) {
    let end = timeline.last().map_or(0, |sample| sample.time_ns);
    let steps = timeline.len().clamp(1, STEPS);
    let step = (end as f64 / steps as f64).max(1.0);
    // Between two samples it went on evenly, for all that is known.
    let at = |time: f64, of: &dyn Fn(&Sample) -> u64| {
        let next = timeline.partition_point(|sample| (sample.time_ns as f64) < time);
        let to = timeline.get(next).or(timeline.last());
        let from = timeline.get(next.saturating_sub(1));
        let (Some(from), Some(to)) = (from, to) else {
            return 0.0;
        };
        let (t0, t1) = (from.time_ns as f64, to.time_ns as f64);
        let share = if t1 > t0 {
            ((time - t0) / (t1 - t0)).clamp(0.0, 1.0)
        } else {
            1.0
        };
        of(from) as f64 + share * (of(to) as f64 - of(from) as f64)
    };
    let rates = all.iter().map(|series| {
        let rate = |n: usize| {
            let (from, to) = (n as f64 * step, (n + 1) as f64 * step);
            ((at(to, &series.of) - at(from, &series.of)) / step * 1e9).max(0.0)
        };
        (0..steps).map(rate).collect()
    });
    (step, rates.collect())
}

fn drawn(
    report: &Report,
    (id, title, y_label): (&str, &str, &str),
    all: &[Series],
    is_stacked: bool,
) -> String {
    let total = |series: &Series| report.timeline.last().map_or(0, |last| (series.of)(last));
    let all: Vec<&Series> = all.iter().filter(|series| total(series) > 0).collect();
    if all.is_empty() || report.timeline.len() < 2 {
        return String::new();
    }
    let all: Vec<Series> = all
        .into_iter()
        .map(|s| series(&s.name, |sample| (s.of)(sample)))
        .collect();
    let (step, rates) = stepped(&report.timeline, &all);
    let steps = rates.first().map_or(0, Vec::len);
    let sum = |n: usize| rates.iter().map(|of| of[n]).sum::<f64>();
    let high = |n: usize| match is_stacked {
        true => sum(n),
        false => rates.iter().map(|of| of[n]).fold(0.0, f64::max),
    };
    let y_high = ceiling((0..steps).map(high).fold(1e-3, f64::max));
    let x_high = step * steps as f64;
    let (x_ticks, unit) = time_ticks(x_high);
    let clock = report.setup.clock;
    let x_label = format!("time, {unit} ({clock})");
    let mut chart = Chart::new(
        220.0,
        (0.0, x_high, false),
        (&x_ticks, &x_label),
        y_high,
        (&ticks(y_high), y_label),
    );
    let mut legend = Vec::new();
    let mut below = vec![0.0; steps];
    for (colour, (of, rates)) in all.iter().zip(&rates).enumerate() {
        legend.push((
            format!("line s{colour}"),
            format!("{}: {}", of.name, total(of)),
        ));
        if !is_stacked {
            let corners = rates
                .iter()
                .enumerate()
                .flat_map(|(n, &rate)| [(n as f64 * step, rate), ((n + 1) as f64 * step, rate)]);
            chart.line(&format!("s{colour}"), corners);
            continue;
        }
        let mut d = String::new();
        for (n, &rate) in rates.iter().enumerate().filter(|(_, rate)| **rate > 0.0) {
            let (left, right) = (
                chart.x.at(n as f64 * step),
                chart.x.at((n + 1) as f64 * step),
            );
            let (bottom, top) = (chart.y.at(below[n]), chart.y.at(below[n] + rate));
            // A string takes whatever is written to it.
            let _ = write!(d, "M{left:.1} {bottom:.1}V{top:.1}H{right:.1}V{bottom:.1}Z");
            below[n] += rate;
        }
        chart.add(format_args!("<path class=\"f{colour}\" d=\"{d}\"/>"));
    }
    let time = format!("time ({clock})");
    let mut head = vec![&*time];
    head.extend(all.iter().map(|series| &*series.name));
    let rows = report.timeline.iter().map(|sample| {
        let counts = all.iter().map(|series| (series.of)(sample).to_string());
        std::iter::once(seconds(sample.time_ns))
            .chain(counts)
            .collect()
    });
    let columns: Vec<usize> = (0..head.len()).collect();
    let numbers = table(&head, &columns, rows);
    let description = format!(
        "Each step is {}. The numbers are counts since the start.",
        seconds(step as u64)
    );
    figure(chart, (id, title, &description), &legend, &numbers)
}
