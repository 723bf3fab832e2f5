//! How long requests took: which share of each class no longer than what.

use super::chart::{COLOURS, Chart, Ticks, figure as framed, table};
use crate::replay::report::Report;
use crate::replay::report::text::seconds;

/// The distribution of each class, over a logarithmic axis of time.
pub(super) fn figure(report: &Report, number: usize) -> String {
    let curves: Vec<(&String, Vec<(u64, f64)>)> = report
        .latency
        .iter()
        .map(|(class, latencies)| (class, latencies.curve()))
        .collect();
    let values = || {
        curves
            .iter()
            .flat_map(|(_, curve)| curve.iter().map(|(value, _)| *value))
    };
    let Some(longest) = values().max().filter(|&value| value > 0) else {
        return String::new();
    };
    let shortest = values().filter(|&value| value > 0).min().unwrap_or(longest);
    let low = 10f64.powf((shortest as f64).log10().floor());
    let high = 10f64.powf((longest as f64).log10().ceil()).max(low * 10.0);
    let decades = (high / low).log10().round() as i32;
    let each = decades / 9 + 1;
    let x_ticks: Ticks = (0..=decades)
        .step_by(each as usize)
        .map(|n| low * 10f64.powi(n))
        .map(|value| (value, seconds(value as u64)))
        .collect();
    let y_ticks: Ticks = [0, 25, 50, 75, 90, 100]
        .map(|n| (f64::from(n), n.to_string()))
        .into();
    let x_label = format!(
        "time from submission to completion ({})",
        report.setup.clock
    );
    let mut chart = Chart::new(
        260.0,
        (low, high, true),
        (&x_ticks, &x_label),
        100.0,
        (&y_ticks, "requests, %"),
    );
    let mut legend = Vec::new();
    for (n, (class, curve)) in curves.iter().enumerate() {
        let dash = if n >= COLOURS { " dash" } else { "" };
        let look = format!("s{}{dash}", n % COLOURS);
        // From value to value nothing is added, and then all at once.
        let before = std::iter::once(0.0).chain(curve.iter().map(|(_, percent)| *percent));
        let corners = curve
            .iter()
            .zip(before)
            .flat_map(|(&(value, percent), before)| {
                [(value as f64, before), (value as f64, percent)]
            });
        let rest = std::iter::once((high, 100.0));
        chart.line(&look, corners.chain(rest));
        let count = report
            .latency
            .get(*class)
            .map_or(0, |latencies| latencies.len());
        legend.push((format!("line {look}"), format!("{class}: {count}")));
    }
    let rows = curves.iter().flat_map(|(class, curve)| {
        curve.iter().map(|(value, percent)| {
            vec![(*class).clone(), seconds(*value), format!("{percent:.3} %")]
        })
    });
    let numbers = table(&["requests", &x_label, "no longer"], &[1, 2], rows);
    let description = "Which share of the requests took no longer than a time, by what became of them; the axis is logarithmic.";
    framed(
        chart,
        (
            &format!("latency-{number}"),
            "How long requests took",
            description,
        ),
        &legend,
        &numbers,
    )
}
