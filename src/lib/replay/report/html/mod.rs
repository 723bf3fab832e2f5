//! The report as one page that needs nothing else: charts are inline SVG, colours go with the reader's, and beside each chart are its
//! numbers. The page is well-formed XML, too, without any reference to the outside.

mod chart;
mod fill;
mod heat;
mod latency;
mod rates;

use super::compare::compare;
use super::text::{bytes, seconds};
use super::{Report, SCHEMA};
use crate::error::{Error, Result};
use chart::{escaped, table};
use std::io::Write;

const CSS: &str = include_str!("page.css");

/// Writes a page about reports; several are compared, too.
///
/// # Errors
/// `Io`.
pub fn html(reports: &[Report], out: &mut dyn Write) -> Result<()> {
    let mut page =
        String::from("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>");
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>");
    page.push_str(&format!(
        "<title>thin_replay: what a load does to a pool</title><style>{CSS}</style></head><body>\n"
    ));
    page.push_str("<h1>What a load does to a pool</h1>\n");
    page.push_str(&format!(
        "<p class=\"dim\">Made by thin_replay of thintools {}, {SCHEMA}.</p>\n",
        env!("CARGO_PKG_VERSION")
    ));
    if reports.len() > 1 {
        let named: Vec<(String, Report)> = reports
            .iter()
            .enumerate()
            .map(|(n, report)| (format!("{}: {}", n + 1, report.name()), report.clone()))
            .collect();
        page.push_str(&format!(
            "<h2>Compared</h2>\n<pre>{}</pre>\n",
            escaped(&compare(&named))
        ));
    }
    for (number, report) in reports.iter().enumerate() {
        section(&mut page, number, report);
    }
    page.push_str("</body></html>\n");
    out.write_all(page.as_bytes())
        .map_err(|e| Error::io("cannot write the report", e))
}

/// Everything about one report.
fn section(page: &mut String, number: usize, report: &Report) {
    let setup = &report.setup;
    page.push_str(&format!(
        "<section>\n<h2>{}</h2>\n",
        escaped(&report.name())
    ));
    if !report.is_complete {
        page.push_str("<p class=\"warn\">Incomplete: the replay was interrupted; this is how far it came.</p>\n");
    }
    page.push_str(&format!(
        "<p class=\"dim\">Table: {}. {} requests in {}. All times are of the clock <b>{}</b>.</p>\n",
        escaped(&setup.table),
        report.input.requests,
        seconds(report.trace_ns),
        setup.clock
    ));
    let mut subject = String::new();
    // A string takes whatever is written to it.
    let _ = report.fmt_subject(&mut subject);
    page.push_str(&format!("<pre>{}</pre>\n", escaped(subject.trim_end())));
    if !report.sources.is_empty() {
        page.push_str(&format!(
            "<p>Merged from {}.</p>\n",
            escaped(&report.sources.join(", "))
        ));
    }
    for warning in &report.trace.warnings {
        page.push_str(&format!("<p class=\"warn\">{}</p>\n", escaped(warning)));
    }
    let verdicts = report
        .verdicts
        .iter()
        .map(|verdict| vec![verdict.topic.to_string(), verdict.text.clone()]);
    page.push_str(&table(&["about", "verdict"], &[], verdicts));
    let clock = setup.clock;
    for figure in [
        fill::figure(report, number),
        rates::deferrals(report, number),
        latency::figure(report, number),
        heat::figures(report, number),
        rates::copies(report, number),
        rates::commits(report, number),
    ] {
        page.push_str(&figure);
    }
    if !report.marks.is_empty() {
        let rows = report.marks.iter().map(|mark| {
            let thins: Vec<String> = mark
                .thins
                .iter()
                .map(|(device, line)| format!("{device}: {line}"))
                .collect();
            let name = match &mark.source {
                Some(source) => format!("{source}: {}", mark.name),
                None => mark.name.clone(),
            };
            vec![
                name,
                seconds(mark.time_ns),
                mark.pool.clone(),
                thins.join("; "),
            ]
        });
        page.push_str(&format!(
            "<h3>Marks</h3>\n{}",
            table(
                &["mark", &format!("time ({clock})"), "pool", "thin devices"],
                &[1],
                rows
            )
        ));
    }
    if !report.notices.is_empty() {
        let rows = report.notices.iter().map(|notice| {
            vec![
                notice.source.clone().unwrap_or_default(),
                seconds(notice.time_ns),
                notice.text.clone(),
            ]
        });
        page.push_str(&format!(
            "<h3>What the pool reported</h3>\n{}",
            table(&["of", &format!("time ({clock})"), "what"], &[1], rows)
        ));
    }
    page.push_str("<h3>Latencies</h3>\n");
    let rows = report.latency.iter().map(|(class, latencies)| {
        let at = |percent| seconds(latencies.percentile(percent));
        vec![
            class.clone(),
            latencies.len().to_string(),
            at(50.0),
            at(90.0),
            at(99.0),
            at(99.9),
            seconds(latencies.max()),
        ]
    });
    page.push_str(&table(
        &[
            "requests", "number", "p50", "p90", "p99", "p99.9", "longest",
        ],
        &[1, 2, 3, 4, 5, 6],
        rows,
    ));
    page.push_str(&format!(
        "<p class=\"dim\">Read {}, written {}, discarded {} by requests.</p>\n</section>\n",
        bytes(report.input.bytes_read),
        bytes(report.input.bytes_written),
        bytes(report.input.bytes_discarded)
    ));
}
