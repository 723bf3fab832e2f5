//! Every kind of I/O once, by itself.

use std::sync::Arc;
use thintools::io::RamEngine;
use thintools::pool::{Op, PoolMode, Reason};

use super::rig::{BLOCK, Rig, settings};

fn rig() -> Rig {
    Rig::new(Arc::new(RamEngine::new(256)), 16, settings())
}

#[test]
fn a_new_block_is_zeroed_and_an_old_one_mapped_at_once() {
    let mut rig = rig();
    let thin = rig.thin(0);
    assert_eq!(rig.read(&thin, 0, 8), Ok(vec![0]));
    assert_eq!(rig.used(), 0, "a read provisions nothing");
    let first = rig.write(&thin, 8, 8).unwrap();
    assert_eq!(rig.deferred.remove(&first), Some(Reason::Unprovisioned));
    assert_eq!(rig.read(&thin, 0, 24), Ok(vec![0, first, 0]));
    let second = rig.write(&thin, 16, 8).unwrap();
    assert_eq!(rig.deferred.get(&second), None);
    assert_eq!(rig.read(&thin, 0, 24), Ok(vec![0, first, second]));
    assert_eq!(rig.used(), 1);
    assert_eq!(rig.pool.mode(), PoolMode::Write);
}

#[test]
fn a_snapshot_keeps_what_was_there() {
    let mut rig = rig();
    let origin = rig.thin(0);
    let old = rig.write(&origin, 0, BLOCK).unwrap();
    rig.message("create_snap 1 0").unwrap();
    let snapshot = rig.open(1);
    let new = rig.write(&origin, 0, 8).unwrap();
    assert_eq!(rig.deferred.get(&new), Some(&Reason::Shared));
    assert_eq!(rig.read(&origin, 0, 16), Ok(vec![new, old]));
    assert_eq!(rig.read(&snapshot, 0, 16), Ok(vec![old, old]));
    assert_eq!(rig.used(), 2);
}

#[test]
fn a_discard_gives_whole_blocks_back() {
    let mut rig = rig();
    let thin = rig.thin(0);
    for block in 0..4 {
        rig.write(&thin, block * BLOCK, 8).unwrap();
    }
    // From the middle of block 0 to the middle of block 3.
    rig.discard(&thin, 64, 3 * BLOCK).unwrap();
    assert_eq!(rig.mappings(0).into_keys().collect::<Vec<_>>(), [0, 3]);
    rig.commit().unwrap();
    assert_eq!(rig.used(), 2);
    assert_eq!(rig.read(&thin, BLOCK, 8), Ok(vec![0]));
    let id = rig.submit(&thin, Op::Discard, 0, 8);
    assert_eq!(rig.done[&id].result, Ok(()), "less than a block is nothing");
}
