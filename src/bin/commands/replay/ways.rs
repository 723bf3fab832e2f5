//! The ways in which a trace is played: whatever there are several of, each with each of the others.

use thintools::io::BlockEngine;
use thintools::pdata::txn::LockScheme;
use thintools::replay::{SnapshotSchedule, bytes, seconds};
use thintools::units::BLOCK_SIZE;

use super::args::Args;

/// One of the ways in which a trace is played.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    /// Sectors of 512 bytes.
    pub(super) block_size: u64,
    pub(super) scheme: LockScheme,
    /// Sectors of 512 bytes.
    pub(super) cache: u64,
    pub(super) snapshots: Option<SnapshotSchedule>,
    /// Cells that are taken one by one; none is that both are reserved.
    pub(super) cells: Option<u32>,
}

impl Args {
    /// How a way differs from the others.
    fn name(&self, way: &Way) -> String {
        let mut differs = Vec::new();
        if self.block_size.len() > 1 {
            differs.push(bytes(way.block_size * 512));
        }
        if self.locks.len() > 1 {
            differs.push(way.scheme.to_string());
        }
        if self.cache.len() > 1 {
            differs.push(format!("cache {}", bytes(way.cache.saturating_mul(512))));
        }
        if self.snap_every.len() > 1 {
            differs.push(way.snapshots.map_or("no snapshots".into(), |schedule| {
                let every = schedule.every.as_nanos() as u64;
                format!("snapshots every {}", seconds(every))
            }));
        }
        if self.cell_pool.len() > 1 {
            differs.push(
                way.cells
                    .map_or("cells reserved".into(), |n| format!("{n} cells")),
            );
        }
        differs.join(", ")
    }

    /// All of them, each with how it differs from the others.
    pub(super) fn ways(&self) -> Vec<(String, Way)> {
        let every: Vec<_> = match self.snap_every.is_empty() {
            true => vec![None],
            false => self.snap_every.iter().map(|schedule| schedule.0).collect(),
        };
        // By comparison with the cells that are reserved.
        let mut pools: Vec<Option<u32>> = self.cell_pool.iter().copied().map(Some).collect();
        if pools.len() != 1 {
            pools.push(None);
        }
        let mut ways = Vec::new();
        for &block_size in &self.block_size {
            for &scheme in &self.locks {
                for &cache in &self.cache {
                    for &every in &every {
                        for &cells in &pools {
                            let keep = self.snap_keep;
                            let way = Way {
                                block_size,
                                scheme,
                                cache,
                                snapshots: every.map(|every| SnapshotSchedule { every, keep }),
                                cells,
                            };
                            ways.push((self.name(&way), way));
                        }
                    }
                }
            }
        }
        ways
    }
}

impl Way {
    /// Bytes of cache.
    pub(super) fn cache(&self, engine: &dyn BlockEngine) -> usize {
        // There is no use for more than all blocks, each with what is noted of it.
        let most = engine.nr_blocks().saturating_mul(BLOCK_SIZE as u64 + 16);
        let bytes = self.cache.saturating_mul(512).min(most);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }
}
