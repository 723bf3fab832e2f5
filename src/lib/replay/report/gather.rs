//! The report of what a player did. It alone knows the player.

use super::{Contention, Forecast, Map, Metadata, Noticed, Report, SCHEMA, Setup, Space};
use crate::pdata::txn::LookupCounts;
use crate::pool::{AllocationOrder, MapCounts};
use crate::replay::counts::ByReason;
use crate::replay::event::TraceNotes;
use crate::replay::player::{PlayOptions, Player};
use crate::thin::PoolMetadata;

impl Report {
    /// The report of what was played so far.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn new(
        player: &Player,
        options: &PlayOptions,
        trace: &TraceNotes,
        is_complete: bool,
    ) -> crate::Result<Self> {
        let pool = player.pool();
        let status = pool.inspect(PoolMetadata::status)?;
        let cache = pool.inspect(PoolMetadata::cache_use);
        let mapped = player.ids().into_iter().map(|id| {
            let details = pool.inspect(|pool| pool.details(id));
            details.map_or(0, |details| details.mapped_blocks)
        });
        let mut counts = MapCounts::default();
        let mut locks = LookupCounts::default();
        for mapper in player.mappers() {
            counts.add(mapper.counts());
            locks.add(&mapper.lookup_counts().unwrap_or_default());
        }
        let (first, last) = (player.timeline().first(), player.timeline().last());
        let (first, last) = (
            first.copied().unwrap_or_default(),
            last.copied().unwrap_or_default(),
        );
        let notices = player.notices().iter().map(|(at, text)| Noticed {
            source: None,
            time_ns: at.as_nanos() as u64,
            text: text.clone(),
        });
        let space = Space {
            pools: 1,
            used_data_blocks: status.used_data_blocks,
            mapped_blocks: mapped.sum(),
            allocated_metadata_blocks: status.allocated_metadata_blocks,
            used_metadata_blocks: status.used_metadata_blocks,
            metadata_blocks: status.metadata_blocks,
            devices: status.devices,
        };
        let [prison, deferred_sets] = pool.lock_counts();
        let (commit_stalls, commit_stall_ns) = pool.commit_stalls();
        let one_by_one = options.settings.allocation_order == AllocationOrder::OneByOne;
        let mut report = Self {
            schema: SCHEMA.into(),
            is_complete,
            is_checked: false,
            sources: Vec::new(),
            volume: None,
            options: None,
            verdicts: Vec::new(),
            setup: Setup {
                clock: player.clock(),
                locks: options.settings.scheme.to_string(),
                block_sectors: pool.block_sectors(),
                data_blocks: status.data_blocks,
                low_water_blocks: options.settings.table.low_water_blocks,
                table: options.settings.table.to_string().trim_end().into(),
                cpus: options.cpus,
                cell_pool: one_by_one.then_some(options.settings.cells as u64),
                device: player.options().device,
                snapshots: None,
                seed: options.seed,
            },
            trace: trace.clone(),
            trace_ns: player.now().as_nanos() as u64,
            input: player.input().clone(),
            map: Map {
                bios: counts.bios,
                remapped: counts.remapped,
                zero: counts.zero,
                failed: counts.failed,
                deferred: ByReason(counts.deferred),
            },
            locks,
            contention: Contention {
                prison,
                deferred_sets,
                commit_stalls,
                commit_stall_ns,
            },
            work: player.work().clone(),
            worker: *player.worker().counts(),
            metadata: Metadata {
                blocks_read: last.metadata_blocks_read - first.metadata_blocks_read,
                blocks_written: last.metadata_blocks_written - first.metadata_blocks_written,
                grown_blocks: last.used_metadata_blocks as i64 - first.used_metadata_blocks as i64,
                cached_blocks: cache.blocks as u64,
                cache_blocks: cache.capacity as u64,
            },
            forecast: Forecast::new(
                player.timeline(),
                status.data_blocks,
                status.metadata_blocks,
                player.moments(),
            ),
            space,
            first_full: None,
            latency: player.latencies().by_name(),
            timeline: player.timeline().to_vec(),
            heat: player.heat(),
            device_heat: Vec::new(),
            marks: player.marks().to_vec(),
            expected: None,
            verify: player.verified().cloned(),
            prefilled: None,
            notices: notices.collect(),
        };
        report.judge();
        Ok(report)
    }
}
