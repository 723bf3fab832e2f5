//! `thin_replay --dry-run`: what is in a trace.

use std::cmp::Reverse;

use anyhow::Context;
use thintools::observer::Observer;
use thintools::replay::{Batch, TraceOp, bytes, seconds};

use super::trace::TraceArgs;
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// Requests of one operation.
#[derive(Clone, Copy, Default)]
struct Count {
    requests: u64,
    sectors: u64,
}

/// Devices that are named, those with most requests.
const MOST_NAMED: usize = 50;

/// Reads the trace to its end and says what it found.
pub(super) fn run(trace: &TraceArgs, session: &Session) -> anyhow::Result<Exit> {
    let (format, mut reader) = trace.open(session)?;
    let mut counts = [Count::default(); TraceOp::ALL.len()];
    let mut of_devices: Vec<u64> = Vec::new();
    let (mut controls, mut last_ns) = (0, 0);
    let mut batch = Batch::default();
    let mut is_complete = true;
    while is_complete && reader.read(&mut batch)? {
        for io in &batch.ios {
            let count = &mut counts[io.op as usize];
            count.requests += 1;
            let device = io.device as usize;
            if of_devices.len() <= device {
                of_devices.resize(device + 1, 0);
            }
            of_devices[device] += 1;
            count.sectors = count.sectors.saturating_add(io.sectors);
        }
        controls += batch.controls.len();
        let times = [
            batch.ios.last().map(|io| io.time_ns),
            batch.controls.last().map(|control| control.time_ns),
        ];
        last_ns = times.into_iter().flatten().fold(last_ns, u64::max);
        is_complete = !session.is_cancelled();
    }
    let notes = reader.notes();
    let mut text = match is_complete {
        true => String::new(),
        false => "INCOMPLETE  the reading was interrupted; this is how far it came\n".into(),
    };
    text.push_str(&format!(
        "dry run   {format}; nothing was played\n\
         trace     {} requests in {}, {controls} control events, {} other records, {} left out, {} lost, {} malformed, {} back in time",
        notes.events,
        seconds(last_ns),
        notes.skipped,
        notes.left_out,
        notes.lost,
        notes.malformed,
        notes.regressed,
    ));
    if notes.is_truncated {
        text.push_str(", the last one cut off");
    }
    for (op, count) in TraceOp::ALL.iter().zip(counts) {
        if count.requests > 0 {
            let size = bytes(count.sectors.saturating_mul(512));
            text.push_str(&format!(
                "\n{:<9} {:>12} requests, {size}",
                op.to_string(),
                count.requests
            ));
        }
    }
    let devices = reader.devices();
    text.push_str(&format!("\ndevices   {}", devices.len()));
    let requests = of_devices.into_iter().chain(std::iter::repeat(0));
    let mut named: Vec<_> = devices.iter().zip(requests).collect();
    named.sort_by_key(|&(_, requests)| Reverse(requests));
    for (name, requests) in named.iter().take(MOST_NAMED) {
        text.push_str(&format!(
            "\n{:<9} {requests:>12} requests of {name}",
            "device"
        ));
    }
    if let Some(more @ 1..) = named.len().checked_sub(MOST_NAMED) {
        text.push_str(&format!("\n{more} more have no more than those"));
    }
    for warning in &notes.warnings {
        text.push_str(&format!("\nwarning   {warning}"));
    }
    output::stdout_line(&text).context("cannot write to standard output")?;
    Ok(match is_complete {
        true => Exit::Ok,
        false => Exit::Interrupted,
    })
}
