//! Operations that need more cells and jobs than there are.

use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::io::RamEngine;
use thintools::pool::{AllocationOrder, Bio, Notice, Op, Reason, Settings};

use super::rig::{BLOCK, Rig, settings};
use super::scene::{recorded, reopened};

const BLOCKS: u64 = 12;

fn scarce() -> Settings {
    Settings {
        cells: 0,
        jobs: 2,
        ..settings()
    }
}

/// A device and its snapshot that share all their blocks, with no cell to spare.
fn shared(settings: Settings) -> (Rig, std::sync::Arc<crate::crash::Recorder>) {
    let (mut rig, engine) = recorded(4 * BLOCKS, super::rig::settings());
    let origin = rig.thin(0);
    for block in 0..BLOCKS {
        rig.write(&origin, block * BLOCK, BLOCK).unwrap();
    }
    rig.message("create_snap 1 0").unwrap();
    reopened(&engine.contents(), rig.disk.clone(), 4 * BLOCKS, settings)
}

/// Each of these operations needs a virtual and a data cell; they end in any order.
#[test]
fn t21_operations_with_two_cells_each_all_end_though_there_are_only_two() {
    for seed in 0..20 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (mut rig, engine) = shared(scarce());
        let thins = [rig.open(0), rig.open(1)];
        let mut bios = Vec::new();
        for n in 0..150 {
            let thin = &thins[rng.random_range(0..2)];
            let block = rng.random_range(0..BLOCKS);
            let bio = match rng.random_range(0..6) {
                0 => {
                    let blocks = rng.random_range(1..=BLOCKS - block);
                    rig.map_only(thin, Op::Discard, block * BLOCK, blocks * BLOCK)
                }
                1 => rig.map_only(thin, Op::Read, block * BLOCK, 8),
                2 => rig.submit_fua(thin, block * BLOCK, BLOCK),
                3 => rig.map_only(thin, Op::Write, block * BLOCK, BLOCK),
                _ => rig.map_only(thin, Op::Write, block * BLOCK, 8),
            };
            bios.push(bio);
            if n % 30 == 29 {
                rig.wake();
            }
            if rng.random_ratio(1, 3) && !rig.pending.is_empty() {
                let at = rng.random_range(0..rig.pending.len());
                rig.carry_out(at, Ok(()));
            }
        }
        rig.wake();
        while !rig.pending.is_empty() {
            let at = rng.random_range(0..rig.pending.len());
            rig.carry_out(at, Ok(()));
        }
        let lacking = rig.deferred.values().filter(|&&r| r == Reason::NoCells);
        assert!(lacking.count() > 0, "there were always cells");
        for bio in bios {
            assert_eq!(rig.result(bio), Some(Ok(())), "seed {seed}");
        }
        assert!(rig.pool.is_idle());
        rig.assert_counts(&engine);
    }
}

/// A discard needs a cell for each run; the one that it brought is enough, one run at a time.
#[test]
fn t21_a_discard_of_many_runs_goes_on_with_one_cell() {
    let (mut rig, engine) = recorded(4 * BLOCKS, scarce());
    let thin = rig.thin(0);
    // No two of them are neighbours on the data device.
    for block in (0..BLOCKS).step_by(2).chain((1..BLOCKS).step_by(2)) {
        rig.write(&thin, block * BLOCK, BLOCK).unwrap();
    }
    rig.discard(&thin, 0, BLOCKS * BLOCK).unwrap();
    assert!(rig.mappings(0).is_empty());
    rig.assert_counts(&engine);
    assert_eq!(rig.used(), 0);
}

/// Two writes to shared blocks that are under way at once. Returns the deadlocks that were told.
fn two_writes_of_shared_blocks(
    cells: usize,
    allocation_order: AllocationOrder,
) -> Vec<Vec<String>> {
    let settings = Settings {
        cells,
        allocation_order,
        ..settings()
    };
    let mut rig = Rig::new(Arc::new(RamEngine::new(256)), 16, settings);
    let thin = rig.thin(0);
    for block in 0..2 {
        rig.write(&thin, block * BLOCK, BLOCK).unwrap();
    }
    rig.message("create_snap 1 0").unwrap();
    // Both get their virtual cell before the worker looks at either.
    for block in 0..2 {
        rig.map(
            &thin,
            Bio::new(1_000_000 + block, Op::Write, block * BLOCK, 8),
        );
    }
    rig.wake();
    rig.settle();
    for block in 0..2 {
        assert_eq!(rig.done[&(1_000_000 + block)].result, Ok(()));
    }
    assert!(rig.pool.is_idle());
    let deadlocks = rig.notices.iter().filter_map(|notice| match notice {
        Notice::Deadlock(waits) => Some(waits.iter().map(ToString::to_string).collect()),
        _ => None,
    });
    deadlocks.collect()
}

#[test]
fn t21_cells_taken_one_by_one_end_in_a_deadlock_that_is_told() {
    let told = two_writes_of_shared_blocks(2, AllocationOrder::OneByOne);
    assert_eq!(
        told,
        [[
            "bio 1000000 holds virtual block 0 of device 0 and waits for a cell for data block 0 of device 0",
            "bio 1000001 holds virtual block 1 of device 0 and waits for a cell for data block 1 of device 0",
        ]]
    );
    assert!(two_writes_of_shared_blocks(3, AllocationOrder::OneByOne).is_empty());
    assert!(two_writes_of_shared_blocks(0, AllocationOrder::Reserved).is_empty());
}
