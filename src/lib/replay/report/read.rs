//! Reports that come back: from a file that may be anything.

use super::{Report, SCHEMA};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::Reason;
use crate::replay::device_heat::MOST_SHOWN;
use crate::replay::latencies::is_fast;
use serde_json::{Deserializer, Value};
use std::io::Read;

/// Larger than any file of reports that anybody made.
const MOST_BYTES: u64 = 1 << 30;
/// No count of a replay is larger, nor is a sum of as many reports as anybody has.
const MOST: u64 = 1 << 60;
/// More samples, marks or notices than any replay keeps.
const MOST_ITEMS: usize = 1 << 20;

impl Report {
    /// Reads the reports of a JSON text: one, a list of them, or one after the other, as on lines. There is at least one.
    ///
    /// # Errors
    /// `Io`; `InvalidDescription` if something else is there, a report of another form among it.
    pub fn read_all(from: &mut dyn Read) -> Result<Vec<Self>> {
        let mut text = Vec::new();
        from.take(MOST_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(|e| Error::io("cannot read it", e))?;
        if text.len() as u64 > MOST_BYTES {
            return Err(wrong("it is longer than 1 GiB"));
        }
        let mut reports = Vec::new();
        for value in Deserializer::from_slice(&text).into_iter::<Value>() {
            let value = value.map_err(|e| wrong(format!("it is not JSON: {e}")))?;
            match value {
                Value::Array(values) => {
                    for value in values {
                        reports.push(report(value)?);
                    }
                }
                value => reports.push(report(value)?),
            }
        }
        match reports.is_empty() {
            true => Err(wrong("it has no report")),
            false => Ok(reports),
        }
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidDescription, message)
}

/// One report, whose numbers are such that nothing done with them overflows.
fn report(value: Value) -> Result<Report> {
    match value.get("schema") {
        Some(Value::String(schema)) if schema == SCHEMA => {}
        Some(schema) => {
            return Err(wrong(format!(
                "it is a report of the form {schema}; this program reads {SCHEMA}"
            )));
        }
        None if value.get("kind").is_some() => {
            return Err(wrong("it is the output of --jsonl; give that of --json"));
        }
        None => {
            return Err(wrong(format!(
                "it is no report of thin_replay --json: there is no \"schema\": \"{SCHEMA}\""
            )));
        }
    }
    look_at_numbers(&value)?;
    // Each takes far more memory than its text.
    let maps = value.get("device_heat").and_then(Value::as_array);
    if maps.is_some_and(|maps| maps.len() > MOST_SHOWN) {
        return Err(wrong(format!(
            "it has heat maps of more than {MOST_SHOWN} devices"
        )));
    }
    let mut report: Report =
        serde_json::from_value(value).map_err(|e| wrong(format!("the report is wrong: {e}")))?;
    let size = report.setup.block_sectors;
    if !(128..=1 << 21).contains(&size) {
        return Err(wrong(format!("no pool has data blocks of {size} sectors")));
    }
    let items = [
        report.timeline.len(),
        report.devices.len(),
        report.marks.len(),
        report.notices.len(),
    ];
    if let Some(items) = items.into_iter().find(|&items| items > MOST_ITEMS) {
        return Err(wrong(format!(
            "a list has {items} items, more than any replay has"
        )));
    }
    if !report.timeline.is_sorted_by_key(|sample| sample.time_ns) {
        return Err(wrong("time goes back in the timeline"));
    }
    let is_class =
        |name: &str| is_fast(name) || Reason::ALL.iter().any(|reason| reason.to_string() == name);
    if let Some(name) = report.latency.keys().find(|name| !is_class(name)) {
        return Err(wrong(format!("there is no class of latencies {name:?}")));
    }
    report.judge();
    Ok(report)
}

/// Refuses numbers that no replay came to.
fn look_at_numbers(value: &Value) -> Result<()> {
    match value {
        Value::Number(number) => {
            let is_small = match (number.as_u64(), number.as_i64()) {
                (Some(n), _) => n <= MOST,
                (None, Some(n)) => n.unsigned_abs() <= MOST,
                (None, None) => number.as_f64().is_some_and(|n| n.abs() <= MOST as f64),
            };
            match is_small {
                true => Ok(()),
                false => Err(wrong(format!(
                    "the report has a number {number}, which no replay comes to"
                ))),
            }
        }
        Value::Array(values) => values.iter().try_for_each(look_at_numbers),
        Value::Object(values) => values.values().try_for_each(look_at_numbers),
        _ => Ok(()),
    }
}
