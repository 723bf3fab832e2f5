//! What survives a crash or a failure of the metadata device: the last transaction or the next one, and whatever was flushed.

use std::collections::BTreeSet;
use std::sync::Arc;

use thintools::ErrorKind;
use thintools::io::RamEngine;
use thintools::pool::{BioError, Features, Notice, Op, PoolMode, Reason};
use thintools::thin::PoolMetadata;
use thintools::units::ThinId;

use super::disk::Disk;
use super::rig::{BLOCK, Rig, kind, settings};
use super::scene::{
    CHUNKS, Mappings, assert_sound, commits, crashed, is_bio, is_discard, is_flush, mappings_in,
    recorded, reopened, with,
};
use crate::crash::{Fault, Lands, Recorder, Request, Step, after_crashes, codes_of};

const BLOCKS: u64 = 16;

/// Flushes that come together, of several devices that changed.
#[test]
fn t11_flushes_that_come_together_share_one_commit() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thins = [rig.thin(0), rig.thin(1)];
    let before = commits(&engine);
    let writes = [0, 1].map(|i| rig.write(&thins[i], 0, BLOCK).unwrap());
    let flushes = [0, 1, 0, 1, 0].map(|i| rig.map_only(&thins[i], Op::Flush, 0, 0));
    let durable = rig.number();
    let bio = thintools::pool::Bio::new(durable, Op::Write, BLOCK, BLOCK).with_fua();
    rig.map(&thins[0], bio);
    rig.wake();
    // The write that has to be durable fills its block meanwhile, the commit does not wait for it.
    assert!(flushes.iter().all(|&flush| rig.result(flush).is_none()));
    rig.end_one(is_flush, Ok(()));
    assert_eq!(commits(&engine), before + 1);
    for flush in flushes {
        assert_eq!((rig.result(flush), rig.issued(flush)), (Some(Ok(())), 0));
    }
    assert_eq!(rig.result(durable), None);
    let mut after = crashed(&rig, &engine);
    for (id, write) in (0..).zip(writes) {
        let thin = after.open(id);
        after.assert_block(&thin, 0, write);
    }
    rig.settle();
    assert_eq!(commits(&engine), before + 2);
    assert_eq!(rig.result(durable), Some(Ok(())));
}

#[test]
fn t11_a_commit_that_fails_fails_all_flushes_that_wait_for_it() {
    for request in [Request::Write, Request::Sync] {
        let (mut rig, engine) = recorded(BLOCKS, settings());
        let thin = rig.thin(0);
        rig.write(&thin, 0, BLOCK).unwrap();
        let flushes = [(); 4].map(|()| rig.map_only(&thin, Op::Flush, 0, 0));
        engine.set_faults(&[Fault::once(request, 0)]);
        rig.wake();
        rig.settle();
        for flush in flushes {
            assert_eq!(rig.result(flush), Some(Err(BioError::Io)));
        }
        // What was acknowledged is lost, and stays lost.
        assert_eq!(rig.flush(&thin), Err(BioError::Io));
    }
}

/// A flush that comes while a commit is under way is not covered by it.
#[test]
fn t11_a_flush_during_a_commit_waits_for_what_was_written_meanwhile() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    rig.write(&thin, 0, BLOCK).unwrap();
    rig.commit_now();
    let write = rig.submit(&thin, Op::Write, 0, 8);
    rig.end_one(is_bio(write), Ok(()));
    let flush = rig.submit_flush(&thin);
    rig.end_one(is_flush, Ok(()));
    assert_eq!(rig.result(flush), None);
    rig.end_one(is_bio(flush), Ok(()));
    let mut after = crashed(&rig, &engine);
    let thin = after.open(0);
    assert_eq!(after.content(&thin, 0)[0], write);
}

#[test]
fn t12_a_flush_of_a_device_that_did_not_change_commits_nothing() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let (changed, unchanged) = (rig.thin(0), rig.thin(1));
    rig.write(&unchanged, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    rig.write(&changed, 0, BLOCK).unwrap();
    let old = rig.write(&unchanged, 0, 8).unwrap();
    let before = engine.nr_steps();
    let flush = rig.submit_flush(&unchanged);
    assert!(!rig.has_pending(is_flush) && rig.has_pending(is_bio(flush)));
    rig.settle();
    assert_eq!(rig.result(flush), Some(Ok(())));
    assert_eq!(engine.nr_steps(), before, "something was written");
    let mut after = crashed(&rig, &engine);
    let (changed, unchanged) = (after.open(0), after.open(1));
    assert_eq!(after.content(&unchanged, 0)[0], old);
    after.assert_block(&changed, 0, 0);
    // Of the changed one it does.
    let changed = Arc::clone(&changed);
    after.write(&changed, 0, 8).unwrap();
    let flush = after.submit_flush(&changed);
    assert!(after.has_pending(is_flush) && !after.has_pending(is_bio(flush)));
}

/// Where a commit can fail.
#[derive(Clone, Copy, Debug)]
enum Breaks {
    DataFlush,
    /// Of the metadata device: which request, and whether all that follow fail, too.
    Metadata(Fault),
}

/// A commit fails in each of its steps: it is undone, the flag is set, and what is there afterwards is the last transaction or, if
/// the superblock got through, this one.
#[test]
fn t13_a_commit_that_fails_in_any_step_is_undone() {
    // How many writes the commit makes.
    let (mut rig, engine, _) = about_to_commit();
    let before = engine.count(Request::Write);
    rig.commit().unwrap();
    let writes = engine.count(Request::Write) - before;
    assert!(writes > 3, "{writes}");
    let once = |request, after| [Fault::once(request, after), Fault::lasting(request, after)];
    let mut cases = vec![Breaks::DataFlush];
    for at in 0..writes {
        cases.extend(once(Request::Write, at).map(Breaks::Metadata));
    }
    let landed = Fault {
        lands: Lands::All,
        ..Fault::once(Request::Write, writes - 1)
    };
    cases.push(Breaks::Metadata(landed));
    for at in 0..2 {
        cases.extend(once(Request::Sync, at).map(Breaks::Metadata));
    }
    let mut found = [0, 0];
    for case in cases {
        let (mut rig, engine, [old, new]) = about_to_commit();
        let thin = rig.worker.open_thin(ThinId(0), None).unwrap();
        let flush = rig.submit_flush(&thin);
        let waits = rig.send("set_transaction_id 0 1");
        let mut is_lasting = false;
        if let Breaks::Metadata(fault) = case {
            engine.set_faults(&[fault]);
            is_lasting = fault.is_lasting;
        }
        let flushed = match case {
            Breaks::DataFlush => Err(BioError::Io),
            Breaks::Metadata(_) => Ok(()),
        };
        rig.end_one(is_flush, flushed);
        rig.settle();
        assert_eq!(rig.result(flush), Some(Err(BioError::Io)), "{case:?}");
        let answer = rig.answers.remove(&waits).expect("an answer");
        assert_eq!(kind(answer), Some(ErrorKind::Io), "{case:?}");
        rig.assert_mode(PoolMode::ReadOnly);
        let failed = |n: &Notice| matches!(n, Notice::MetadataFailed(_));
        assert!(rig.notices.iter().any(failed));
        let status = rig.pool.inspect(|pool| pool.status().expect("read"));
        assert!(status.needs_check, "{case:?}");
        // What the memory says is what the device has.
        let image = engine.contents();
        let codes = codes_of(image.clone());
        let is_told = codes == ["needs-check"].into();
        assert!(
            is_told || is_lasting && codes.is_empty(),
            "{case:?}: {codes:?}"
        );
        let there = mappings_in(&image);
        assert_eq!(rig.mappings(0), there[&0], "{case:?}");
        assert!([&old, &new].contains(&&there), "{case:?}: {there:?}");
        found[usize::from(there == new)] += 1;
        // Nothing is changed any more.
        let write = rig.submit(&thin, Op::Write, 9 * BLOCK, 8);
        assert_eq!(rig.result(write), Some(Err(BioError::Io)));
        assert_eq!(
            kind(rig.message("create_thin 7")),
            Some(ErrorKind::ReadOnly)
        );
        // A crash of what had become of the writes leaves one of the two as well.
        let steps = engine.steps();
        if matches!(steps.last(), Some(Step::Sync)) {
            after_crashes(&engine.before(), &steps, &mut |image, what| {
                let codes = codes_of(image.to_vec());
                assert!(
                    codes
                        .iter()
                        .all(|c| ["needs-check", "data-leak"].contains(c)),
                    "{case:?}, {what}: {codes:?}"
                );
                let there = mappings_in(image);
                assert!([&old, &new].contains(&&there), "{case:?}, {what}");
            });
        }
    }
    assert!(found[0] > 5 && found[1] > 0, "{found:?}");
}

/// A pool with something to commit, and its mappings before and after.
fn about_to_commit() -> (Rig, Arc<Recorder>, [Mappings; 2]) {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    rig.write(&thin, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    let (mut rig, engine) = reopened(&engine.contents(), rig.disk.clone(), BLOCKS, settings());
    let thin = rig.open(0);
    let old = mappings_in(&engine.contents());
    rig.write(&thin, BLOCK, BLOCK).unwrap();
    rig.discard(&thin, 0, BLOCK).unwrap();
    let new = [(0, rig.mappings(0))].into();
    assert_ne!(old, new);
    (rig, engine, [old, new])
}

/// The needs_check flag holds: the pool comes up read-only until somebody has checked it.
#[test]
fn t13_a_pool_that_needs_a_check_is_read_only_when_it_is_opened_again() {
    let (mut rig, engine, [old, _]) = about_to_commit();
    engine.set_faults(&[Fault::once(Request::Write, 0)]);
    assert!(rig.commit().is_err());
    let disk = rig.disk.clone();
    let (mut rig, engine) = reopened(&engine.contents(), disk, BLOCKS, settings());
    rig.assert_mode(PoolMode::ReadOnly);
    assert_eq!(rig.mappings(0), old[&0]);
    rig.resume(Some(settings().table)).unwrap();
    rig.assert_mode(PoolMode::ReadOnly);
    let refused = rig.message("create_thin 9").unwrap_err().to_string();
    assert!(
        refused.contains("thin_check --clear-needs-check-flag"),
        "{refused}"
    );
    assert_eq!(engine.nr_steps(), 0);
}

/// Every kind of change, with commits in between. After a crash at any boundary, and after any loss of what was not flushed, the
/// metadata is that of the last commit or the next one, and sound.
#[test]
fn t14_a_crash_at_any_boundary_leaves_the_last_transaction_or_the_next() {
    for no_discard_passdown in [false, true] {
        let features = Features {
            no_discard_passdown,
            ..Features::default()
        };
        let (mut rig, engine) = recorded(BLOCKS, with(features));
        let thin = rig.thin(0);
        for block in 0..5 {
            rig.write(&thin, block * BLOCK, 8 + block * 8).unwrap();
        }
        rig.commit().unwrap();
        rig.message("create_snap 1 0").unwrap();
        let snapshot = rig.open(1);
        rig.write(&thin, 0, 8).unwrap();
        rig.write(&snapshot, 8 * BLOCK, BLOCK).unwrap();
        rig.commit().unwrap();
        rig.discard(&thin, 0, 3 * BLOCK).unwrap();
        rig.commit().unwrap();
        rig.discard(&snapshot, 0, 9 * BLOCK).unwrap();
        rig.write(&thin, 0, BLOCK).unwrap();
        rig.commit().unwrap();
        rig.worker.close_thin(&snapshot);
        rig.message("delete 1").unwrap();
        // The pool commits by itself while the discard of the data is under way.
        rig.submit(&thin, Op::Discard, 3 * BLOCK, 2 * BLOCK);
        rig.commit_now();
        while rig.has_pending(|io| !is_discard(io)) {
            rig.end_one(|io| !is_discard(io), Ok(()));
        }
        rig.settle();
        rig.assert_counts(&engine);
        let (mut image, mut images, mut transactions) = (engine.before(), 0, 0);
        for transaction in transactions_of(&engine.steps()) {
            let old = mappings_in(&image);
            let mut states = Vec::new();
            image = after_crashes(&image, &transaction, &mut |image, what| {
                assert_eq!(codes_of(image.to_vec()), [].into(), "{what}");
                states.push(mappings_in(image));
            });
            let new = mappings_in(&image);
            assert!(states.iter().all(|state| [&old, &new].contains(&state)));
            assert!(states.contains(&old) && states.contains(&new));
            images += states.len();
            transactions += 1;
        }
        assert_eq!(mappings_in(&image)[&0], rig.mappings(0));
        assert!(images > 100 && transactions > 7, "{images}, {transactions}");
    }
}

/// The writes of each transaction: a superblock and a flush end one.
fn transactions_of(steps: &[Step]) -> Vec<Vec<Step>> {
    let mut transactions = vec![Vec::new()];
    let mut is_last = false;
    for step in steps {
        transactions.last_mut().expect("one").push(step.clone());
        match step {
            Step::Write(0, _) => is_last = true,
            Step::Sync if std::mem::take(&mut is_last) => transactions.push(Vec::new()),
            _ => {}
        }
    }
    transactions.pop();
    transactions
}

/// The data, too: whatever I/O is done next, a crash before it finds what was flushed.
#[test]
fn t14_a_crash_before_any_io_finds_what_was_flushed() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    let mut flushed = [0; 4];
    let mut crashes = 0;
    for round in 0..12 {
        let block = round % 4;
        if round == 5 {
            rig.message("create_snap 1 0").unwrap();
        }
        if round == 9 {
            rig.message("delete 1").unwrap();
        }
        let write = rig.submit(
            &thin,
            Op::Write,
            block * BLOCK,
            if round % 2 == 0 { BLOCK } else { 8 },
        );
        let mut look = |rig: &Rig, may_be: [u64; 2]| {
            crashes += 1;
            let mut after = crashed(rig, &engine);
            let thin = after.open(0);
            for (other, &tag) in (0..).zip(&flushed) {
                let found = after.content(&thin, other)[0];
                let is_same = other == block && may_be.contains(&found);
                assert!(
                    found == tag || is_same,
                    "round {round}, block {other}: {found}, not {tag}"
                );
            }
        };
        while rig.result(write).is_none() {
            look(&rig, [0, write]);
            rig.carry_out(0, Ok(()));
        }
        let flush = rig.submit_flush(&thin);
        while rig.result(flush).is_none() {
            look(&rig, [0, write]);
            rig.carry_out(0, Ok(()));
        }
        flushed[block as usize] = write;
        let mut after = crashed(&rig, &engine);
        let there = after.open(0);
        assert_eq!(after.content(&there, block)[0], write, "round {round}");
    }
    assert!(crashes > 20, "{crashes}");
}

/// The block of the metadata snapshot and the counts of what it holds come and go together, whatever fails or is lost.
#[test]
fn t19_a_metadata_snapshot_and_its_counts_appear_together_or_not_at_all() {
    for releases in [false, true] {
        let prepared = || {
            let (mut rig, engine) = recorded(BLOCKS, settings());
            let thin = rig.thin(0);
            for block in 0..3 {
                rig.write(&thin, block * BLOCK, BLOCK).unwrap();
            }
            rig.commit().unwrap();
            if releases {
                rig.message("reserve_metadata_snap").unwrap();
                rig.write(&thin, 0, BLOCK).unwrap();
                rig.discard(&thin, BLOCK, BLOCK).unwrap();
                rig.commit().unwrap();
            }
            // And something that is not committed.
            rig.write(&thin, 5 * BLOCK, BLOCK).unwrap();
            (rig, engine)
        };
        let message = ["reserve_metadata_snap", "release_metadata_snap"][usize::from(releases)];
        let held = |image: &[u8]| {
            let engine = Arc::new(RamEngine::from_bytes(image.to_vec()));
            let pool = PoolMetadata::open(engine, 1 << 20).expect("opened");
            pool.status().expect("read").held_root.is_some()
        };
        let (mut rig, engine) = prepared();
        let (image, from) = (engine.contents(), engine.nr_steps());
        let before = [Request::Write, Request::Sync].map(|r| engine.count(r));
        rig.message(message).unwrap();
        assert_sound(engine.contents());
        let mut seen = BTreeSet::new();
        after_crashes(&image, &engine.steps()[from..], &mut |image, what| {
            assert!(codes_of(image.to_vec()).is_empty(), "{message}, {what}");
            seen.insert(held(image));
        });
        assert_eq!(seen.len(), 2, "with and without it");
        let counts = [Request::Write, Request::Sync].map(|r| engine.count(r));
        for (request, n) in [
            (Request::Write, counts[0] - before[0]),
            (Request::Sync, counts[1] - before[1]),
        ] {
            for at in 0..n {
                let (mut rig, engine) = prepared();
                engine.set_faults(&[Fault::once(request, at)]);
                assert!(rig.message(message).is_err(), "{message}, {request:?} {at}");
                let image = engine.contents();
                let codes = codes_of(image.clone());
                assert_eq!(codes, ["needs-check"].into(), "{message}, {request:?} {at}");
                let status = rig.pool.inspect(|pool| pool.status().expect("read"));
                assert_eq!(status.held_root.is_some(), held(&image));
            }
        }
    }
}

/// After an abort the counters of open devices are those on the disk, and their flushes fail: what they acknowledged is lost.
#[test]
fn t29_after_an_abort_open_devices_are_as_they_are_on_the_disk() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let (changed, unchanged) = (rig.thin(0), rig.thin(1));
    let kept = rig.write(&changed, 0, BLOCK).unwrap();
    rig.write(&unchanged, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    for block in 1..5 {
        rig.write(&changed, block * BLOCK, BLOCK).unwrap();
    }
    assert_eq!(mapped(&rig), [5, 1]);
    engine.set_faults(&[Fault::once(Request::Write, 1)]);
    assert!(rig.commit().is_err());
    rig.assert_mode(PoolMode::ReadOnly);
    assert_eq!(mapped(&rig), [1, 1]);
    assert_eq!((rig.mappings(0).len(), rig.used()), (1, 2));
    rig.assert_block(&changed, 0, kept);
    rig.assert_block(&changed, 4, 0);
    assert_eq!(rig.flush(&changed), Err(BioError::Io));
    assert_eq!(rig.flush(&unchanged), Ok(()));
    let durable = rig.submit_fua(&changed, 0, 8);
    assert_eq!(rig.result(durable), Some(Err(BioError::Io)));
    // Who opens it again has seen that it failed.
    rig.worker.close_thin(&changed);
    let again = rig.open(0);
    assert_eq!(rig.flush(&again), Ok(()));
    assert_eq!(codes_of(engine.contents()), ["needs-check"].into());
}

fn mapped(rig: &Rig) -> [u64; 2] {
    [0, 1].map(|id| {
        let details = rig.pool.inspect(|pool| pool.details(ThinId(id)));
        details.expect("read").mapped_blocks
    })
}

/// New blocks under way when the transaction is undone: their data comes too late.
#[test]
fn t29_what_was_being_provisioned_at_an_abort_fails() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    rig.write(&thin, 0, BLOCK).unwrap();
    let late = rig.submit(&thin, Op::Write, BLOCK, BLOCK);
    let waits = rig.submit(&thin, Op::Write, BLOCK, 8);
    rig.commit_now();
    engine.set_faults(&[Fault::once(Request::Write, 0)]);
    rig.end_one(is_flush, Ok(()));
    rig.assert_mode(PoolMode::ReadOnly);
    rig.settle();
    assert_eq!(rig.result(late), Some(Err(BioError::Io)));
    assert_eq!(rig.result(waits), Some(Err(BioError::Io)));
    assert_eq!((rig.mappings(0).len(), rig.used()), (0, 0));
    assert!(rig.pool.is_idle());
}

/// A metadata device that can be read but not written: I/O that needs no change of the metadata goes on.
#[test]
fn t30_without_writes_to_the_metadata_reads_and_overwrites_go_on() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    let old = [0, 1].map(|block| rig.write(&thin, block * BLOCK, BLOCK).unwrap());
    rig.message("create_snap 1 0").unwrap();
    let own = rig.write(&thin, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    engine.set_faults(&[Fault::lasting(Request::Write, 0)]);
    let lost = rig.write(&thin, 5 * BLOCK, BLOCK).unwrap();
    rig.assert_block(&thin, 5, lost);
    assert_eq!(rig.flush(&thin), Err(BioError::Io));
    rig.assert_mode(PoolMode::ReadOnly);
    rig.assert_block(&thin, 0, own);
    rig.assert_block(&thin, 1, old[1]);
    rig.assert_block(&thin, 5, 0);
    let overwrite = rig.write(&thin, 0, 8).unwrap();
    assert_eq!(rig.content(&thin, 0)[..2], [overwrite, own]);
    for (block, reason) in [(1, Reason::Shared), (7, Reason::Unprovisioned)] {
        let write = rig.submit(&thin, Op::Write, block * BLOCK, 8);
        assert_eq!(rig.deferred[&write], reason);
        assert_eq!(rig.result(write), Some(Err(BioError::Io)));
    }
    assert_eq!(rig.discard(&thin, 0, BLOCK), Ok(()));
    assert_eq!(
        rig.content(&thin, 0)[0],
        overwrite,
        "the discard did something"
    );
    assert_eq!(rig.content(&thin, 3).len() as u64, CHUNKS);
    assert_eq!(
        kind(rig.message("create_thin 9")),
        Some(ErrorKind::ReadOnly)
    );
    let snapshot = rig.open(1);
    rig.assert_block(&snapshot, 0, old[0]);
    // What the device has is the last transaction, whole.
    assert_sound(engine.contents());
    let (mut after, _) = reopened(&engine.contents(), Disk::used(), BLOCKS, settings());
    after.assert_mode(PoolMode::Write);
    let thin = after.open(0);
    after.write(&thin, 5 * BLOCK, BLOCK).unwrap();
}
