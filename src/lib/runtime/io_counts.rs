//! What clients asked of a thin device, counted as they ask.

use super::export::Request;
use crate::pool::Reason;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of one thin device, from the first time that it was opened.
#[derive(Debug, Default)]
pub(super) struct IoCounts {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    trims: AtomicU64,
    flushes: AtomicU64,
    deferred: [AtomicU64; Reason::ALL.len()],
}

/// What clients asked of a thin device so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoTotals {
    /// Requests to read.
    pub reads: u64,
    /// Bytes of them.
    pub read_bytes: u64,
    /// Requests to write.
    pub writes: u64,
    /// Bytes of them.
    pub written_bytes: u64,
    /// Requests to free a range, or to make it zeros.
    pub trims: u64,
    /// Requests to make durable what was written, without durable writes.
    pub flushes: u64,
    /// Bios that could not be carried out at once, by why; a request has one for each block that it touches.
    pub deferred: BTreeMap<String, u64>,
}

impl IoCounts {
    /// Somebody asked for this.
    pub(super) fn count(&self, request: &Request) {
        let add = |count: &AtomicU64, n: usize| {
            count.fetch_add(n as u64, Ordering::Relaxed);
        };
        match request {
            Request::Read { len, .. } => {
                add(&self.reads, 1);
                add(&self.read_bytes, *len);
            }
            Request::Write { data, .. } => {
                add(&self.writes, 1);
                add(&self.written_bytes, data.len());
            }
            Request::Trim { .. } | Request::WriteZeroes { .. } => add(&self.trims, 1),
            Request::Flush => add(&self.flushes, 1),
            Request::Cache { .. } => {}
        }
    }

    /// A bio was left to the worker.
    pub(super) fn count_deferred(&self, reason: Reason) {
        self.deferred[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// What there is so far.
    pub(super) fn totals(&self) -> IoTotals {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let deferred = Reason::ALL.iter().zip(&self.deferred);
        IoTotals {
            reads: of(&self.reads),
            read_bytes: of(&self.read_bytes),
            writes: of(&self.writes),
            written_bytes: of(&self.written_bytes),
            trims: of(&self.trims),
            flushes: of(&self.flushes),
            deferred: deferred
                .map(|(reason, count)| (reason.to_string(), of(count)))
                .filter(|(_, count)| *count > 0)
                .collect(),
        }
    }
}
