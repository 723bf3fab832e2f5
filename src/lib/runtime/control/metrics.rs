//! Numbers of a running pool: as JSON, and as text for Prometheus.

use crate::error::Result;
use crate::pool::{PoolMode, WorkerCounts};
use crate::runtime::Runtime;
use crate::thin::{PoolMetadata, PoolStatus};
use serde::Serialize;
use std::fmt::Write;

/// What a pool is, and did since it was started.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    /// What `rw`, `ro`, `out_of_data_space` and `Fail` stand for.
    pub mode: String,
    /// The kernel's numbers.
    pub pool: PoolStatus,
    /// Commits, flushes, discards.
    pub worker: WorkerCounts,
    /// Blocks of 4 KiB read from the metadata device.
    pub metadata_blocks_read: u64,
    /// And written to it.
    pub metadata_blocks_written: u64,
    /// Events so far.
    pub events: u64,
}

impl Runtime {
    /// What the pool is, and did so far.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn stats(&self) -> Result<Stats> {
        let io = self.driver.pool.block_io();
        Ok(Stats {
            mode: self.mode().to_string(),
            pool: self.driver.pool.inspect(PoolMetadata::status)?,
            worker: self.driver.call(|worker| *worker.counts())?,
            metadata_blocks_read: io.read,
            metadata_blocks_written: io.written,
            events: self.events().last(),
        })
    }
}

impl Stats {
    /// Text for Prometheus.
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        let is_writable = self.mode == PoolMode::Write.to_string();
        let WorkerCounts {
            commits,
            unmapped,
            freed,
            ..
        } = self.worker;
        for (kind, name, help, value) in [
            (
                "gauge",
                "data_blocks",
                "Data blocks.",
                self.pool.data_blocks,
            ),
            (
                "gauge",
                "data_blocks_used",
                "Data blocks in use.",
                self.pool.used_data_blocks,
            ),
            (
                "gauge",
                "data_block_bytes",
                "Bytes in a data block.",
                u64::from(self.pool.data_block_size) * 512,
            ),
            (
                "gauge",
                "metadata_blocks",
                "Metadata blocks of 4 KiB.",
                self.pool.metadata_blocks,
            ),
            (
                "gauge",
                "metadata_blocks_used",
                "Metadata blocks in use.",
                self.pool.used_metadata_blocks,
            ),
            ("gauge", "thin_devices", "Thin devices.", self.pool.devices),
            (
                "gauge",
                "transaction_id",
                "The manager's transaction id.",
                self.pool.transaction_id,
            ),
            (
                "gauge",
                "writable",
                "1 if everything may be written.",
                is_writable.into(),
            ),
            (
                "gauge",
                "needs_check",
                "1 if the metadata has to be checked.",
                self.pool.needs_check.into(),
            ),
            (
                "counter",
                "commits_total",
                "Commits that wrote something.",
                commits.total(),
            ),
            (
                "counter",
                "unmapped_blocks_total",
                "Mappings removed by discards.",
                unmapped,
            ),
            (
                "counter",
                "freed_blocks_total",
                "Data blocks freed by discards.",
                freed,
            ),
            (
                "counter",
                "metadata_read_blocks_total",
                "Metadata blocks read.",
                self.metadata_blocks_read,
            ),
            (
                "counter",
                "metadata_written_blocks_total",
                "Metadata blocks written.",
                self.metadata_blocks_written,
            ),
            ("counter", "events_total", "Events.", self.events),
        ] {
            // A string takes everything.
            let _ = write!(
                text,
                "# HELP thin_pool_{name} {help}\n# TYPE thin_pool_{name} {kind}\nthin_pool_{name} {value}\n"
            );
        }
        text
    }
}
