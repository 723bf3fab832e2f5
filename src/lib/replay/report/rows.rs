//! The report as rows for other programs: the timeline as CSV, everything as JSON lines.

use super::Report;
use crate::error::{Error, Result};
use crate::pool::Reason;
use serde_json::{Value, json};
use std::io::Write;

fn cannot(e: impl Into<std::io::Error>) -> Error {
    Error::io("cannot write the report", e.into())
}

/// The timelines: a line of names, then a line for each sample. Counts are those since the start.
///
/// # Errors
/// `Io`.
pub fn csv(reports: &[Report], out: &mut dyn Write) -> Result<()> {
    let reasons: Vec<String> = Reason::ALL
        .iter()
        .map(|reason| format!("deferred_{reason}"))
        .collect();
    writeln!(
        out,
        "report,clock,locks,block_sectors,time_ns,data_blocks,used_data_blocks,metadata_blocks,used_metadata_blocks,bios,{},copies,unmapped,\
         commits,metadata_blocks_read,metadata_blocks_written",
        reasons.join(",")
    )
    .map_err(cannot)?;
    for (number, report) in reports.iter().enumerate() {
        let setup = &report.setup;
        // A report that was read may have any text here.
        let locks = quoted(&setup.locks);
        for sample in &report.timeline {
            let deferred: Vec<String> = sample.deferred.0.iter().map(u64::to_string).collect();
            writeln!(
                out,
                "{number},{},{locks},{},{},{},{},{},{},{},{},{},{},{},{},{}",
                setup.clock,
                setup.block_sectors,
                sample.time_ns,
                setup.data_blocks,
                sample.used_data_blocks,
                report.space.metadata_blocks,
                sample.used_metadata_blocks,
                sample.bios,
                deferred.join(","),
                sample.copies,
                sample.unmapped,
                sample.commits,
                sample.metadata_blocks_read,
                sample.metadata_blocks_written
            )
            .map_err(cannot)?;
        }
    }
    Ok(())
}

fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.into(),
    }
}

/// A line for each sample (`"kind": "sample"`), mark (`"mark"`) and notice (`"notice"`), and one for all the rest (`"summary"`). Each
/// has the number of the report that it is of and whose time it tells.
///
/// # Errors
/// `Io`.
pub fn jsonl(reports: &[Report], out: &mut dyn Write) -> Result<()> {
    for (number, report) in reports.iter().enumerate() {
        let Value::Object(mut rest) = serde_json::to_value(report).map_err(cannot)? else {
            continue;
        };
        // They are too large for a line, and have a form of their own in --json.
        rest.remove("heat");
        rest.remove("device_heat");
        let clock = report.setup.clock.to_string();
        let mut line = |kind: &str, fields: Value| -> Result<()> {
            let mut line = json!({ "kind": kind, "report": number, "clock": &clock });
            if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields) {
                line.extend(fields);
            }
            serde_json::to_writer(&mut *out, &line).map_err(cannot)?;
            writeln!(out).map_err(cannot)
        };
        for (kind, list) in [
            ("sample", "timeline"),
            ("mark", "marks"),
            ("notice", "notices"),
        ] {
            if let Some(Value::Array(items)) = rest.remove(list) {
                items.into_iter().try_for_each(|item| line(kind, item))?;
            }
        }
        line("summary", Value::Object(rest))?;
    }
    Ok(())
}
