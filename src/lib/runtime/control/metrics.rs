//! Numbers of a running pool: as JSON, and as text for Prometheus.

use crate::error::Result;
use crate::pool::{PoolMode, WorkerCounts};
use crate::runtime::{IoTotals, Runtime};
use crate::thin::{PoolMetadata, PoolStatus};
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// A thin device that is exported, and what clients asked of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThinStats {
    /// Its id.
    pub id: u64,
    /// Bytes, if that is known before it is opened.
    pub size: Option<u64>,
    /// Blocks of the pool that it maps, shared ones included.
    pub mapped_blocks: u64,
    /// Clients have it open.
    pub is_open: bool,
    /// What they asked of it since the server was started.
    pub io: IoTotals,
}

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
    /// The thin devices that are exported.
    pub thins: Vec<ThinStats>,
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
            thins: self.thin_stats()?,
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
        self.add_thins(&mut text);
        text
    }

    /// The numbers of each thin device, by its id.
    fn add_thins(&self, text: &mut String) {
        type Number = fn(&ThinStats) -> u64;
        let numbers: [(&str, &str, &str, Number); 7] = [
            ("gauge", "mapped_blocks", "Data blocks mapped.", |thin| {
                thin.mapped_blocks
            }),
            ("counter", "reads_total", "Requests to read.", |thin| {
                thin.io.reads
            }),
            ("counter", "read_bytes_total", "Bytes read.", |thin| {
                thin.io.read_bytes
            }),
            ("counter", "writes_total", "Requests to write.", |thin| {
                thin.io.writes
            }),
            ("counter", "written_bytes_total", "Bytes written.", |thin| {
                thin.io.written_bytes
            }),
            ("counter", "flushes_total", "Requests to flush.", |thin| {
                thin.io.flushes
            }),
            (
                "counter",
                "deferred_total",
                "Bios left to the worker.",
                |thin| thin.io.deferred.values().sum(),
            ),
        ];
        for (kind, name, help, number) in numbers {
            let _ = write!(
                text,
                "# HELP thin_{name} {help}\n# TYPE thin_{name} {kind}\n"
            );
            for thin in &self.thins {
                let _ = writeln!(text, "thin_{name}{{thin=\"{}\"}} {}", thin.id, number(thin));
            }
        }
    }
}
