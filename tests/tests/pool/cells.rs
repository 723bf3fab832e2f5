//! Operations that need more cells and jobs than there are.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::pool::{Op, Reason, Settings};

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
