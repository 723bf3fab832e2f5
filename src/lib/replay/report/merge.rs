//! Several reports as one: of a trace that was split by device, each part played on a pool of its own.
//!
//! Counts add up, histograms and heat maps without loss. Timelines are laid over each other: at the end of each step the sum of
//! what each pool had last. What is full first is what the forecast says.

use super::{Map, Metadata, Report, Space};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::books::Sample;
use crate::replay::device_heat::busiest;
use crate::replay::expect::Compared;
use crate::replay::heat::HeatMap;
use crate::replay::prefill::Prefilled;
use crate::replay::verify::Verified;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Steps of a merged timeline, at most.
const STEPS: u64 = 400;

/// Merges reports, each with the name that its marks, notices and warnings get. Those that were merged before keep their names.
///
/// # Errors
/// `InvalidArgument` without a report; `Unsuitable` if their numbers are of different clocks or their blocks of different sizes.
pub fn merge(reports: &[(String, Report)]) -> Result<Report> {
    let Some(((_, first), rest)) = reports.split_first() else {
        return Err(Error::new(ErrorKind::InvalidArgument, "no report is named"));
    };
    let mut all = first.clone();
    all.sources.clear();
    all.volume = None;
    all.marks.clear();
    all.notices.clear();
    all.trace.warnings.clear();
    all.played = None;
    all.devices.clear();
    for (name, report) in rest {
        unless_alike(name, first, report)?;
        add(&mut all, report)?;
    }
    for (name, report) in reports {
        let named = |source: &Option<String>| Some(source.clone().unwrap_or_else(|| name.clone()));
        for mark in &report.marks {
            let source = named(&mark.source);
            all.marks.push(super::Mark {
                source,
                ..mark.clone()
            });
        }
        for notice in &report.notices {
            let source = named(&notice.source);
            all.notices.push(super::Noticed {
                source,
                ..notice.clone()
            });
        }
        for warning in &report.trace.warnings {
            all.trace.warnings.push(match report.sources.is_empty() {
                true => format!("{name}: {warning}"),
                false => warning.clone(),
            });
        }
        match report.sources.is_empty() {
            true => all.sources.push(name.clone()),
            false => all.sources.extend_from_slice(&report.sources),
        }
    }
    all.prefilled = (reports.iter())
        .filter_map(|(_, report)| report.prefilled)
        .reduce(|a, b| Prefilled {
            devices: a.devices.saturating_add(b.devices),
            blocks: a.blocks.saturating_add(b.blocks),
        });
    all.expected = (reports.iter())
        .filter_map(|(_, report)| report.expected.clone())
        .reduce(Compared::with);
    all.verify = (reports.iter())
        .filter_map(|(_, report)| report.verify.clone())
        .reduce(Verified::with);
    let full = reports.iter().filter_map(|(name, report)| {
        let named = report.first_full.as_ref().unwrap_or(name);
        Some((report.forecast.data.full_at_ns?, named.clone()))
    });
    // Of those that are full at the same time, the one whose name comes first.
    all.first_full = full.min().map(|(_, name)| name);
    all.marks.sort_by_key(|mark| mark.time_ns);
    all.notices.sort_by_key(|notice| notice.time_ns);
    all.device_heat = busiest(reports.iter().flat_map(|(name, report)| heat(name, report)));
    all.timeline = timeline(reports.iter().map(|(_, report)| &report.timeline[..]))?;
    all.judge();
    Ok(all)
}

/// Heat maps by device. A report of one device has one map, which goes by the report's name.
fn heat<'a>(name: &'a str, report: &'a Report) -> impl Iterator<Item = (String, u64, &'a HeatMap)> {
    let is_one = report.device_heat.is_empty();
    let one = is_one.then(|| (name.to_owned(), report.input.requests, &report.heat));
    one.into_iter()
        .chain(report.device_heat.iter().map(move |map| {
            let device = match report.sources.is_empty() {
                true => format!("{name}: {}", map.device),
                false => map.device.clone(),
            };
            (device, map.requests, &map.heat)
        }))
}

/// Numbers of different kinds have no sum.
fn unless_alike(name: &str, first: &Report, report: &Report) -> Result<()> {
    let (a, b) = (&first.setup, &report.setup);
    let differs = |what: &str, a: &dyn std::fmt::Display, b: &dyn std::fmt::Display| {
        let message = format!("{name} cannot be merged with those before: {what} are {b}, not {a}");
        Err(Error::new(ErrorKind::Unsuitable, message))
    };
    if a.clock != b.clock {
        return differs("clocks", &a.clock, &b.clock);
    }
    if a.block_sectors != b.block_sectors {
        return differs(
            "sectors in a data block",
            &a.block_sectors,
            &b.block_sectors,
        );
    }
    if a.locks != b.locks {
        return differs("locking schemes", &a.locks, &b.locks);
    }
    Ok(())
}

fn add(all: &mut Report, report: &Report) -> Result<()> {
    all.is_complete &= report.is_complete;
    all.is_checked &= report.is_checked;
    all.options
        .take_if(|options| report.options.as_ref() != Some(options));
    all.trace_ns = all.trace_ns.max(report.trace_ns);
    all.setup.data_blocks = all
        .setup
        .data_blocks
        .saturating_add(report.setup.data_blocks);
    all.setup.cpus = all.setup.cpus.max(report.setup.cpus);
    let low_water = &mut all.setup.low_water_blocks;
    *low_water = low_water.saturating_add(report.setup.low_water_blocks);
    if all.setup.table != report.setup.table {
        all.setup.table = "several tables".into();
    }
    let is_truncated = all.trace.is_truncated || report.trace.is_truncated;
    let has_no_times = all.trace.has_no_times || report.trace.has_no_times;
    all.trace = sum(&all.trace, &report.trace)?;
    all.trace.is_truncated = is_truncated;
    all.trace.has_no_times = has_no_times;
    all.input = sum(&all.input, &report.input)?;
    all.map = sum::<Map>(&all.map, &report.map)?;
    all.locks = sum(&all.locks, &report.locks)?;
    all.contention = sum(&all.contention, &report.contention)?;
    all.work = sum(&all.work, &report.work)?;
    all.worker = sum(&all.worker, &report.worker)?;
    all.metadata = sum::<Metadata>(&all.metadata, &report.metadata)?;
    all.space = sum::<Space>(&all.space, &report.space)?;
    all.forecast = all.forecast.sooner(&report.forecast);
    for (class, latencies) in &report.latency {
        all.latency.entry(class.clone()).or_default().add(latencies);
    }
    all.heat.add(&report.heat);
    Ok(())
}

/// Counts that are all numbers, added one by one under whatever names they have.
fn sum<T: Serialize + DeserializeOwned>(a: &T, b: &T) -> Result<T> {
    let no_sum = |e: serde_json::Error| {
        Error::with_source(ErrorKind::InvalidDescription, "counts cannot be added", e)
    };
    let (mut a, b) = (
        serde_json::to_value(a).map_err(no_sum)?,
        serde_json::to_value(b).map_err(no_sum)?,
    );
    add_values(&mut a, &b);
    serde_json::from_value(a).map_err(no_sum)
}

fn add_values(a: &mut Value, b: &Value) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            for (name, value) in a {
                if let Some(more) = b.get(name) {
                    add_values(value, more);
                }
            }
        }
        (Value::Number(a), Value::Number(b)) => {
            let unsigned = a.as_u64().zip(b.as_u64());
            let signed = a.as_i64().zip(b.as_i64());
            match (unsigned, signed) {
                (Some((x, y)), _) => *a = x.saturating_add(y).into(),
                (None, Some((x, y))) => *a = x.saturating_add(y).into(),
                (None, None) => {}
            }
        }
        _ => {}
    }
}

/// Timelines over each other, in as many steps as one has at most. Steps are powers of two, so that those of a part are within those of the
/// whole, and parts that are merged first come to the same.
fn timeline<'a>(lines: impl Iterator<Item = &'a [Sample]>) -> Result<Vec<Sample>> {
    let lines: Vec<&[Sample]> = lines.filter(|line| !line.is_empty()).collect();
    let mut times: Vec<u64> = lines
        .iter()
        .flat_map(|line| line.iter().map(|s| s.time_ns))
        .collect();
    times.sort_unstable();
    if let Some(&last) = times.last() {
        let step = last.div_ceil(STEPS).max(1);
        let step = step.checked_next_power_of_two().unwrap_or(step);
        // The first ones stay: what there was before anything happened.
        let first = times.first().copied().unwrap_or(0);
        times
            .iter_mut()
            .filter(|time| **time > first)
            .for_each(|time| {
                *time = time.div_ceil(step).saturating_mul(step).min(last);
            });
        times.dedup();
    }
    let at = |time: u64| {
        // A pool that has not begun has what it begins with.
        let last = |line: &&'a [Sample]| {
            let next = line.partition_point(|sample| sample.time_ns <= time);
            line[next.saturating_sub(1)]
        };
        let all = lines
            .iter()
            .map(last)
            .try_fold(Sample::default(), |all, sample| sum(&all, &sample));
        Ok(Sample {
            time_ns: time,
            ..all?
        })
    };
    times.into_iter().map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Timelines of different lengths that begin at different times.
    fn lines() -> Vec<Vec<Sample>> {
        let mut state = 1u64;
        let mut random = move |most: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % most
        };
        let mut line = |number: u64| {
            let (mut time_ns, mut used) = (number * 1_000, 0);
            let samples = (0..40 + number * 60).map(|_| {
                time_ns += random(200_000_000);
                used += random(50);
                Sample {
                    time_ns,
                    used_data_blocks: used,
                    ..Sample::default()
                }
            });
            samples.collect()
        };
        (0..6).map(&mut line).collect()
    }

    #[test]
    fn timelines_come_to_the_same_in_whatever_steps_they_are_merged() {
        let lines = lines();
        let merged =
            |lines: &[&[Sample]]| timeline(lines.iter().copied()).expect("counts can be added");
        let all: Vec<&[Sample]> = lines.iter().map(Vec::as_slice).collect();
        let whole = merged(&all);
        assert!((200..=403).contains(&whole.len()), "{}", whole.len());
        for cut in 1..6 {
            let first = merged(&all[..cut]);
            let mut rest: Vec<&[Sample]> = all[cut..].to_vec();
            rest.insert(0, &first);
            assert_eq!(merged(&rest), whole, "the first {cut}");
            let last = merged(&all[cut..]);
            assert_eq!(merged(&[&first, &last]), whole, "cut at {cut}");
        }
    }
}
