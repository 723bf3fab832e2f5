//! The report of what a player did. It alone knows the player.

use super::{
    Clock, Contention, Forecast, Map, Metadata, NoForecast, Noticed, Report, SCHEMA, Setup, Space,
};
use crate::pdata::txn::LookupCounts;
use crate::pool::{AllocationOrder, MapCounts, PoolMode, Reason};
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
        let mut work = player.work().clone();
        let unended = counts.bios.saturating_sub(work.completed);
        *match (pool.is_suspended(), pool.mode()) {
            (true, _) => &mut work.waiting_for_resume,
            (false, PoolMode::OutOfDataSpace) => &mut work.waiting_for_space,
            (false, _) => &mut work.waiting,
        } = unended;
        let asked = player.input().bytes_written;
        work.bytes_not_written = asked.saturating_sub(player.bytes_written());
        let has_no_times =
            trace.has_no_times || player.input().requests > 1 && player.last_io_ns() == 0;
        let none_because = match player.clock() {
            Clock::Threads => Some(NoForecast::SpeedOfReplay),
            Clock::Virtual => has_no_times.then_some(NoForecast::NoTimes),
        };
        if player.clock() == Clock::Virtual {
            // There is one thread, so what holds a lock against a lookup is a commit that is played.
            locks.would_block_root += counts.deferred[Reason::RootBusy as usize];
            for n in [&mut locks.contended, &mut locks.root_contended] {
                *n += work.root_waits;
            }
            for ns in [&mut locks.wait_ns, &mut locks.root_wait_ns] {
                *ns += work.root_wait_ns;
            }
        }
        let one_by_one = options.settings.allocation_order == AllocationOrder::OneByOne;
        let mut report = Self {
            schema: SCHEMA.into(),
            tool: format!("thintools {}", env!("CARGO_PKG_VERSION")),
            played: None,
            devices: player.played_devices(),
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
            work,
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
                none_because,
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
