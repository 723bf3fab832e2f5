//! How full the pool gets, and when it would be.

use super::chart::{Chart, ceiling, figure as framed, table, ticks, time_ticks};
use crate::replay::books::Sample;
use crate::replay::report::text::{percent, seconds};
use crate::replay::report::{Fill, Report};

/// Data and metadata in use, in percent, with the forecasts as dashed lines.
pub(super) fn figure(report: &Report, number: usize) -> String {
    let (data, metadata) = (&report.forecast.data, &report.forecast.metadata);
    let end = report.timeline.last().map_or(0, |sample| sample.time_ns) as f64;
    let rates = |fill: &Fill| [fill.linear_ns, fill.last_ns, fill.worst_ns];
    let has_forecast = rates(data)
        .iter()
        .chain(&rates(metadata))
        .any(Option::is_some);
    let x_high = if has_forecast { end * 1.4 } else { end }.max(1.0);
    let share = |used: u64, total: u64| 100.0 * used as f64 / total.max(1) as f64;
    let rate = |fill: &Fill, time: u64| {
        (100.0 - share(fill.used, fill.total)).max(0.0) / (time.max(1) as f64)
    };
    let low_water = report.setup.low_water_blocks;
    let low_water = (low_water > 0).then(|| 100.0 - share(low_water, report.setup.data_blocks));
    // The forecast of the whole replay is in sight; steeper ones may leave the chart.
    let mut most: f64 = 0.0;
    for sample in &report.timeline {
        most = most
            .max(share(sample.used_data_blocks, data.total))
            .max(share(sample.used_metadata_blocks, metadata.total));
    }
    for fill in [data, metadata] {
        if let Some(time) = fill.linear_ns {
            most = most.max(share(fill.used, fill.total) + rate(fill, time) * (x_high - end));
        }
    }
    if let Some(low) = low_water.filter(|low| most > low / 4.0) {
        most = most.max(low);
    }
    let y_high = ceiling(most.max(1e-3) * 1.05).min(100.0);
    let (x_ticks, unit) = time_ticks(x_high);
    let x_label = format!("time, {unit} ({})", report.setup.clock);
    let mut chart = Chart::new(
        260.0,
        (0.0, x_high, false),
        (&x_ticks, &x_label),
        y_high,
        (&ticks(y_high), "in use, %"),
    );
    let mut legend = Vec::new();
    type Used = fn(&Sample) -> u64;
    let kinds: [(&str, &Fill, Used); 2] = [
        ("data", data, |sample| sample.used_data_blocks),
        ("metadata", metadata, |sample| sample.used_metadata_blocks),
    ];
    for (colour, (name, fill, used)) in kinds.into_iter().enumerate() {
        let points = report
            .timeline
            .iter()
            .map(|sample| (sample.time_ns as f64, share(used(sample), fill.total)));
        let class = format!("s{colour}");
        chart.steps(&class, points);
        legend.push((
            format!("line {class}"),
            format!("{name}, {}", percent(fill.used, fill.total)),
        ));
        let names = [
            "by the whole replay",
            "by its last quarter",
            "by its steepest tenth",
        ];
        for (time, (words, dash)) in
            rates(fill)
                .into_iter()
                .zip(names.into_iter().zip(["dash", "dash", "dash dots"]))
        {
            let Some(time) = time else { continue };
            let from = share(fill.used, fill.total);
            let rate = rate(fill, time);
            // It ends where it leaves the chart.
            let until = match rate > 0.0 {
                true => x_high.min(end + (y_high - from).max(0.0) / rate),
                false => x_high,
            };
            let class = format!("{class} {dash}");
            chart.line(
                &class,
                [(end, from), (until, from + rate * (until - end))].into_iter(),
            );
            legend.push((
                format!("line {class}"),
                format!("{name} {words}: full after another {}", seconds(time)),
            ));
        }
    }
    if has_forecast {
        let at = chart.x.at(end);
        let (top, bottom) = (chart.y.at(y_high), chart.y.at(0.0));
        chart.add(format_args!(
            "<path class=\"mark\" d=\"M{at:.1} {top:.1}V{bottom:.1}\"/>"
        ));
        chart.add(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\">end of the replay</text>",
            at + 5.0,
            top + 12.0
        ));
    }
    let mut description = String::from(
        "Data in use, and metadata with what is kept back for commits, as it was found at each sample; dashed, how it would go on.",
    );
    if let Some(low) = low_water {
        if low <= y_high {
            let at = chart.y.at(low);
            let (left, right) = (chart.x.at(0.0), chart.x.at(x_high));
            chart.add(format_args!(
                "<path class=\"mark\" d=\"M{left:.1} {at:.1}H{right:.1}\"/>"
            ));
            chart.add(format_args!(
                "<text x=\"{:.1}\" y=\"{:.1}\">low-water mark</text>",
                left + 6.0,
                at - 5.0
            ));
        }
        description.push_str(&format!(
            " The low-water mark is at {low:.1} % of the data."
        ));
    }
    let rows = report.timeline.iter().map(|sample| {
        vec![
            seconds(sample.time_ns),
            sample.used_data_blocks.to_string(),
            percent(sample.used_data_blocks, data.total),
            sample.used_metadata_blocks.to_string(),
            percent(sample.used_metadata_blocks, metadata.total),
        ]
    });
    let time = format!("time ({})", report.setup.clock);
    let head = [&*time, "data blocks", "of all", "metadata blocks", "of all"];
    let numbers = table(&head, &[0, 1, 2, 3, 4], rows);
    framed(
        chart,
        (
            &format!("fill-{number}"),
            "How full the pool gets",
            &description,
        ),
        &legend,
        &numbers,
    )
}
