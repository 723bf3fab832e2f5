//! Where requests went, and when.

use super::chart::{Chart, Ticks, figure, table, time_ticks};
use crate::replay::clock::Clock;
use crate::replay::device_heat::{MOST_MAPS, MOST_SHOWN};
use crate::replay::heat::{COLUMNS, HeatMap, KINDS, ROWS};
use crate::replay::report::Report;
use crate::replay::report::text::{bytes, seconds};
use std::fmt::Write;

/// Shades that there are.
const SHADES: u32 = 6;

/// A map for each kind of requests that there are, of all devices, and of each if there are several.
pub(super) fn figures(report: &Report, number: usize) -> String {
    let maps = |of: &str, heat: &HeatMap, id: &str| -> String {
        (0..KINDS.len())
            .map(|kind| {
                map(
                    (of, heat),
                    report.setup.clock,
                    &format!("{id}-{number}"),
                    kind,
                )
            })
            .collect()
    };
    let mut figures = maps("", &report.heat, "heat");
    if !report.device_heat.is_empty() {
        let _ = writeln!(
            figures,
            "<details><summary>Each device: the {MOST_SHOWN} with most requests, of the first {MOST_MAPS} or of reports that were merged</summary>"
        );
        for (device, map) in report.device_heat.iter().enumerate() {
            figures.push_str(&maps(
                &format!(" of {}", map.device),
                &map.heat,
                &format!("heat{device}"),
            ));
        }
        figures.push_str("</details>\n");
    }
    figures
}

fn map((of, heat): (&str, &HeatMap), clock: Clock, id: &str, kind: usize) -> String {
    let most = (0..ROWS)
        .flat_map(|row| heat.row(kind, row))
        .copied()
        .max()
        .unwrap_or(0);
    if most == 0 {
        return String::new();
    }
    // All kinds have the same edges, so that they can be held beside each other.
    let any =
        |row: usize, column: usize| (0..KINDS.len()).any(|kind| heat.row(kind, row)[column] > 0);
    let rows = (0..ROWS)
        .rposition(|row| (0..COLUMNS).any(|column| any(row, column)))
        .map_or(1, |last| last + 1);
    let columns = (0..COLUMNS)
        .rposition(|column| (0..ROWS).any(|row| any(row, column)))
        .map_or(1, |last| last + 1);
    let x_high = columns as f64 * heat.cell_ns() as f64;
    let y_high = rows as f64 * heat.cell_sectors() as f64 * 512.0;
    let (x_ticks, unit) = time_ticks(x_high);
    let y_ticks: Ticks = (0..=4u8)
        .map(|n| y_high * f64::from(n) / 4.0)
        .map(|value| (value, bytes(value as u64)))
        .collect();
    let x_label = format!("time, {unit} ({clock})");
    let mut chart = Chart::new(
        200.0,
        (0.0, x_high, false),
        (&x_ticks, &x_label),
        y_high,
        (&y_ticks, "address"),
    );
    let shade = |n: u32| match n {
        0 => 0,
        n => {
            1 + ((f64::from(n).ln() / f64::from(most).ln().max(1e-9)) * f64::from(SHADES - 1))
                .round() as u32
        }
    };
    let mut paths = vec![String::new(); SHADES as usize + 1];
    for row in 0..rows {
        let cells = &heat.row(kind, row)[..columns];
        let (bottom, top) = (edge(&chart, row, rows), edge(&chart, row + 1, rows));
        let mut column = 0;
        for run in cells.chunk_by(|a, b| shade(*a) == shade(*b)) {
            let shade = shade(run[0]) as usize;
            let (from, to) = (column as f64, (column + run.len()) as f64);
            column += run.len();
            if shade > 0 {
                let scale = heat.cell_ns() as f64;
                let (left, right) = (chart.x.at(from * scale), chart.x.at(to * scale));
                // A string takes whatever is written to it.
                let _ = write!(
                    paths[shade.min(SHADES as usize)],
                    "M{left:.1} {bottom:.1}V{top:.1}H{right:.1}V{bottom:.1}Z"
                );
            }
        }
    }
    for (shade, d) in paths.iter().enumerate().filter(|(_, d)| !d.is_empty()) {
        chart.add(format_args!("<path class=\"h h{shade}\" d=\"{d}\"/>"));
    }
    let description = format!(
        "The stronger the colour, the more; {most} in a cell at most, of {} and {}.",
        bytes(heat.cell_sectors().saturating_mul(512)),
        seconds(heat.cell_ns())
    );
    let numbers = (0..rows).map(|row| {
        let size = heat.cell_sectors().saturating_mul(512);
        let all: u64 = heat.row(kind, row).iter().map(|&n| u64::from(n)).sum();
        vec![bytes(size.saturating_mul(row as u64)), all.to_string()]
    });
    let numbers = table(&["from address", KINDS[kind]], &[0, 1], numbers);
    let title = format!("Where {}{of} went, and when", KINDS[kind]);
    figure(
        chart,
        (&format!("{id}-{}", KINDS[kind]), &title, &description),
        &[],
        &numbers,
    )
}

fn edge(chart: &Chart, row: usize, rows: usize) -> f64 {
    let (bottom, top) = (chart.y.at(0.0), chart.y.at(f64::MAX));
    bottom + (top - bottom) * row as f64 / rows as f64
}
