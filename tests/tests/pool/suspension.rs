//! Suspensions: bios are finished or given back, each once.

use thintools::ErrorKind;
use thintools::pool::{BioError, Op, PoolMode, Reason};

use super::rig::{BLOCK, settings};
use super::scene::{
    assert_sound, is_bio, is_copy, is_discard, is_flush, is_zero, mappings_in, recorded,
};

/// Bios wherever they can be: in a cell behind an operation, in the inbox with and without a cell of their own, waiting for space,
/// behind a snapshot. What has begun ends, everything else is given back, nothing twice and nothing is held.
#[test]
fn t25_a_suspension_that_does_not_wait_gives_every_waiting_bio_back_once() {
    let (mut rig, engine) = recorded(4, settings());
    let (thin, origin) = (rig.thin(0), rig.thin(1));
    rig.write(&thin, 0, BLOCK).unwrap();
    rig.write(&origin, 0, BLOCK).unwrap();
    rig.message("create_snap 2 1").unwrap();
    // Two operations, with a bio that waits for each, and a write that is in flight.
    let begun = [
        rig.submit(&thin, Op::Write, BLOCK, 8),
        rig.submit(&origin, Op::Write, 0, 8),
        rig.submit(&thin, Op::Write, 0, 8),
    ];
    let mut behind = vec![
        rig.submit(&thin, Op::Write, BLOCK + 8, 8),
        rig.submit(&origin, Op::Write, 8, 8),
    ];
    behind.push(rig.submit(&thin, Op::Discard, BLOCK, BLOCK));
    // There is no block left for these.
    let retry = [2, 3].map(|block| rig.submit(&thin, Op::Write, block * BLOCK, 8));
    while rig.has_pending(is_flush) {
        rig.end_one(is_flush, Ok(()));
    }
    rig.assert_mode(PoolMode::OutOfDataSpace);
    // The worker has not looked at these: the first holds a cell, which the second is in.
    let deferred = [
        rig.map_only(&thin, Op::Write, 5 * BLOCK, 8),
        rig.map_only(&thin, Op::Read, 5 * BLOCK, 8),
        rig.map_only(&thin, Op::Flush, 0, 0),
        rig.map_only(&thin, Op::Discard, 0, BLOCK),
    ];
    assert_eq!(rig.deferred[&deferred[0]], Reason::Unprovisioned);
    assert_eq!(rig.deferred[&deferred[1]], Reason::CellHeld);
    let tag = rig.suspend(true);
    rig.wake();
    for bio in retry.into_iter().chain(deferred) {
        assert_eq!(rig.result(bio), Some(Err(BioError::Requeue)), "{bio}");
    }
    assert!(!rig.answers.contains_key(&tag), "something is in flight");
    let late = rig.submit(&thin, Op::Write, 0, 8);
    assert_eq!(rig.deferred[&late], Reason::Suspended);
    rig.end_one(is_zero, Ok(()));
    rig.end_one(is_copy, Ok(()));
    rig.settle();
    for bio in begun {
        assert_eq!(rig.result(bio), Some(Ok(())));
    }
    for bio in behind {
        let result = rig.result(bio);
        assert!(
            [Some(Ok(())), Some(Err(BioError::Requeue))].contains(&result),
            "{bio}: {result:?}"
        );
    }
    assert!(rig.answers.remove(&tag).expect("an answer").is_ok());
    assert!(rig.pool.is_idle() && rig.pending.is_empty());
    assert_eq!(
        rig.result(late),
        None,
        "it came while the pool was suspended"
    );
    // Everything that was given back can be submitted again.
    rig.data_blocks = 16;
    rig.resume(None).unwrap();
    rig.settle();
    assert_eq!(rig.result(late), Some(Ok(())));
    for block in [2, 3, 5] {
        let write = rig.write(&thin, block * BLOCK, 8).unwrap();
        assert_eq!(rig.content(&thin, block)[0], write);
    }
    rig.assert_counts(&engine);
}

/// Bios that wait for a snapshot of their device are given back, the snapshot is made.
#[test]
fn t25_bios_behind_a_snapshot_are_given_back_and_the_snapshot_is_made() {
    let (mut rig, engine) = recorded(8, settings());
    let thin = rig.thin(0);
    let old = rig.write(&thin, 0, BLOCK).unwrap();
    let begun = rig.submit(&thin, Op::Write, 0, 8);
    let snapshot = rig.send("create_snap 1 0");
    let gated = [
        rig.submit(&thin, Op::Write, 0, 8),
        rig.submit(&thin, Op::Write, BLOCK, 8),
        rig.submit_flush(&thin),
    ];
    let tag = rig.suspend(true);
    for bio in gated {
        assert_eq!(rig.result(bio), Some(Err(BioError::Requeue)));
    }
    rig.end_one(is_bio(begun), Ok(()));
    rig.settle();
    for request in [snapshot, tag] {
        assert!(rig.answers.remove(&request).expect("an answer").is_ok());
    }
    rig.resume(None).unwrap();
    let copy = rig.open(1);
    assert_eq!(rig.content(&copy, 0)[..2], [begun, old]);
    let again = rig.write(&thin, 0, 8).unwrap();
    assert_eq!(rig.content(&thin, 0)[0], again);
    rig.assert_counts(&engine);
}

/// One that waits finishes everything that was accepted, commits, and keeps what comes meanwhile.
#[test]
fn t25_a_suspension_that_waits_finishes_what_was_accepted() {
    let (mut rig, engine) = recorded(8, settings());
    let thin = rig.thin(0);
    rig.write(&thin, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    let accepted = [
        rig.submit(&thin, Op::Write, 0, 8),
        rig.submit(&thin, Op::Write, BLOCK, 8),
        rig.submit(&thin, Op::Write, BLOCK + 8, 8),
        rig.submit(&thin, Op::Discard, 0, BLOCK),
        rig.submit(&thin, Op::Discard, BLOCK, BLOCK),
        rig.map_only(&thin, Op::Write, 2 * BLOCK, BLOCK),
    ];
    let tag = rig.suspend(false);
    let held_back = rig.submit(&thin, Op::Write, 3 * BLOCK, 8);
    while !rig.pending.is_empty() {
        assert!(!rig.answers.contains_key(&tag), "{:?}", rig.pending);
        rig.carry_out(rig.pending.len() - 1, Ok(()));
    }
    for bio in accepted {
        assert_eq!(rig.result(bio), Some(Ok(())));
    }
    assert!(rig.answers.remove(&tag).expect("an answer").is_ok());
    assert!(rig.pool.is_idle() && !rig.has_pending(is_discard));
    assert_sound(engine.contents());
    assert_eq!(mappings_in(&engine.contents())[&0], rig.mappings(0));
    assert_eq!(rig.result(held_back), None);
    let steps = engine.nr_steps();
    rig.pass(std::time::Duration::from_secs(100));
    assert_eq!((engine.nr_steps(), rig.result(held_back)), (steps, None));
    rig.resume(None).unwrap();
    rig.settle();
    assert_eq!(rig.result(held_back), Some(Ok(())));
    rig.assert_counts(&engine);
}

/// Whoever waits for space that does not come is no obstacle: the pool is suspended in order to grow, and they go on then.
#[test]
fn a_full_pool_is_suspended_and_grows_while_writes_wait_for_space() {
    let (mut rig, engine) = recorded(1, settings());
    let thin = rig.thin(0);
    rig.write(&thin, 0, BLOCK).unwrap();
    let waits = rig.submit(&thin, Op::Write, BLOCK, BLOCK);
    rig.settle();
    rig.assert_mode(PoolMode::OutOfDataSpace);
    let tag = rig.suspend(false);
    rig.settle();
    assert!(rig.answers.remove(&tag).expect("an answer").is_ok());
    // Nor do they fail meanwhile, however long it takes.
    rig.pass(std::time::Duration::from_secs(100));
    assert_eq!(rig.result(waits), None);
    rig.data_blocks = 2;
    rig.resume(None).unwrap();
    rig.settle();
    rig.assert_mode(PoolMode::Write);
    rig.assert_block(&thin, 1, waits);
    rig.assert_counts(&engine);
}

/// What waited for space before the suspension began ends if it can: here a discard under way makes some.
#[test]
fn t25_a_suspension_that_waits_finishes_what_waits_for_space() {
    let (mut rig, engine) = recorded(1, settings());
    let thin = rig.thin(0);
    rig.write(&thin, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    let waits = rig.submit(&thin, Op::Write, BLOCK, BLOCK);
    rig.settle();
    rig.assert_mode(PoolMode::OutOfDataSpace);
    rig.submit(&thin, Op::Discard, 0, BLOCK);
    let tag = rig.suspend(false);
    rig.settle();
    assert_eq!(rig.result(waits), Some(Ok(())));
    assert!(rig.answers.remove(&tag).expect("an answer").is_ok());
    assert_eq!(rig.mappings(0).into_keys().collect::<Vec<_>>(), [1]);
    rig.resume(None).unwrap();
    rig.assert_counts(&engine);
}

#[test]
fn a_pool_that_is_being_suspended_is_resumed_only_afterwards() {
    let (mut rig, _) = recorded(16, settings());
    let thin = rig.thin(0);
    let write = rig.submit(&thin, Op::Write, 0, 8);
    let suspension = rig.suspend(false);
    let resumption = rig.resume_later();
    let refused = rig.answers.remove(&resumption).expect("an answer at once");
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
    assert!(!rig.answers.contains_key(&suspension));
    rig.settle();
    assert_eq!(rig.done[&write].result, Ok(()));
    rig.answers.remove(&suspension).expect("suspended").unwrap();
    rig.resume(None).unwrap();
    rig.write(&thin, BLOCK, 8).unwrap();
}
