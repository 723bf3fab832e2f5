//! Snapshots, and the breaking of what they share.

use thintools::ErrorKind;
use thintools::io::AlignedBuffer;
use thintools::pool::{Op, PoolMode, Reason};
use thintools::thin::{Fields, PoolMetadata};
use thintools::units::{BLOCK_SIZE, ThinId};

use super::rig::{BLOCK, Io, Rig, kind, settings};
use super::scene::{is_bio, is_copy, is_discard, is_flush, is_zero, recorded, reopened};

const BLOCKS: u64 = 16;

/// The origin and its snapshot read the block that the origin gets a copy of: the copy is mapped only when both have read.
#[test]
fn t06_sharing_is_broken_only_after_the_reads_of_the_shared_block_have_ended() {
    for origin_first in [true, false] {
        let (mut rig, engine) = recorded(BLOCKS, settings());
        let origin = rig.thin(0);
        let old = rig.write(&origin, 0, BLOCK).unwrap();
        rig.message("create_snap 1 0").unwrap();
        let snapshot = rig.open(1);
        let shared = rig.mappings(0);
        let mut reads = [&origin, &snapshot].map(|thin| rig.submit(thin, Op::Read, 0, BLOCK));
        if !origin_first {
            reads.reverse();
        }
        let write = rig.submit(&origin, Op::Write, 0, 8);
        let late = rig.submit(&snapshot, Op::Read, 8, 8);
        rig.end_one(is_copy, Ok(()));
        for read in reads {
            assert_eq!((rig.mappings(0), rig.issued(write)), (shared.clone(), 0));
            rig.end_one(is_bio(read), Ok(()));
        }
        assert_ne!(rig.mappings(0), shared);
        assert_eq!(rig.issued(write), 1);
        rig.settle();
        for read in reads {
            assert!(rig.done[&read].content.iter().all(|&tag| tag == old));
        }
        assert_eq!(rig.done[&late].content, [old]);
        // The origin goes on, and gives the block up.
        let again = rig.write(&origin, 0, BLOCK).unwrap();
        assert_eq!(rig.deferred.get(&again), None);
        rig.discard(&origin, 0, BLOCK).unwrap();
        rig.assert_counts(&engine);
        rig.write(&origin, 0, BLOCK).unwrap();
        rig.assert_block(&snapshot, 0, old);
        assert_eq!(rig.mappings(1), shared);
    }
}

/// What was written into the copy while it was being made, by the same device.
#[test]
fn t06_those_who_come_while_sharing_is_broken_find_the_copy() {
    let (mut rig, _) = recorded(BLOCKS, settings());
    let origin = rig.thin(0);
    let old = rig.write(&origin, 0, BLOCK).unwrap();
    rig.message("create_snap 1 0").unwrap();
    let first = rig.submit(&origin, Op::Write, 0, 8);
    let second = rig.submit(&origin, Op::Write, 8, 8);
    let read = rig.submit(&origin, Op::Read, 16, 8);
    assert_eq!(rig.deferred[&second], Reason::Shared);
    assert_eq!((rig.pending.len(), rig.used()), (1, 2));
    rig.settle();
    assert_eq!(rig.content(&origin, 0)[..3], [first, second, old]);
    assert_eq!(rig.done[&read].content, [old]);
    assert_eq!(rig.used(), 2);
}

/// Both devices break the sharing of one block at once, in any order: two new blocks, and the old one is freed once.
#[test]
fn t07_two_devices_that_break_the_sharing_of_a_block_free_it_once() {
    for first in [0, 1] {
        for sectors in [8, BLOCK] {
            let (mut rig, engine) = recorded(BLOCKS, settings());
            let origin = rig.thin(0);
            let old = rig.write(&origin, 0, BLOCK).unwrap();
            rig.message("create_snap 1 0").unwrap();
            let snapshot = rig.open(1);
            let shared = rig.mappings(0)[&0];
            let writes = [&origin, &snapshot].map(|thin| rig.submit(thin, Op::Write, 0, sectors));
            assert_eq!((rig.pending.len(), rig.used()), (2, 3));
            rig.carry_out(first, Ok(()));
            assert_eq!(rig.used(), 3, "one of them still has it");
            let moved = [0, 1].map(|id| rig.mappings(id)[&0] != shared);
            assert_eq!(moved.iter().filter(|&&m| m).count(), 1);
            let fills = |io: &Io| is_copy(io) || sectors == BLOCK;
            rig.end_one(fills, Ok(()));
            assert_eq!(rig.used(), 2);
            rig.settle();
            let now = [0, 1].map(|id| rig.mappings(id)[&0]);
            assert!(now[0] != now[1] && !now.contains(&shared));
            for (thin, write) in [&origin, &snapshot].into_iter().zip(writes) {
                let found = rig.content(thin, 0);
                assert_eq!(
                    (found[0], found[15]),
                    (write, if sectors == 8 { old } else { write })
                );
            }
            rig.assert_counts(&engine);
            // Until the commit a crash would have needed the block, now it is to be had.
            let third = rig.write(&origin, BLOCK, BLOCK).unwrap();
            rig.assert_block(&origin, 1, third);
        }
    }
}

/// Bios of the origin that are under way, each in another way, when it is snapshotted: the snapshot has them all or waits for them,
/// and what comes later is not in it.
#[test]
fn t08_a_snapshot_waits_for_the_io_of_its_origin_and_later_io_waits_for_the_snapshot() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let origin = rig.thin(0);
    rig.write(&origin, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    let mapped = rig.submit(&origin, Op::Write, 0, BLOCK);
    let new = rig.submit(&origin, Op::Write, BLOCK, 8);
    let tag = rig.send("create_snap 1 0");
    let late = rig.submit(&origin, Op::Write, 0, 8);
    let late_new = rig.submit(&origin, Op::Write, BLOCK, 8);
    assert_eq!(rig.deferred[&late], Reason::Suspended);
    assert!(rig.answers.is_empty());
    // The last of what was under way decides.
    rig.end_one(is_zero, Ok(()));
    rig.end_one(is_bio(new), Ok(()));
    assert!(rig.worker.open_thin(ThinId(1), None).is_err());
    assert_eq!((rig.issued(late), rig.issued(late_new)), (0, 0));
    rig.end_one(is_bio(mapped), Ok(()));
    let snapshot = rig.open(1);
    assert!(rig.answers.is_empty(), "it is not durable yet");
    rig.end_one(is_flush, Ok(()));
    assert!(
        rig.answers
            .remove(&tag)
            .is_some_and(|answer| answer.is_ok())
    );
    rig.settle();
    rig.assert_block(&snapshot, 0, mapped);
    assert_eq!(rig.content(&snapshot, 1)[..2], [new, 0]);
    assert_eq!(rig.content(&origin, 0)[..2], [late, mapped]);
    assert_eq!(rig.content(&origin, 1)[..2], [late_new, 0]);
    rig.assert_counts(&engine);
}

/// Nothing was issued for the origin, but a block is being zeroed or copied for it.
#[test]
fn t08_a_snapshot_waits_for_the_new_blocks_of_its_origin() {
    for is_copied in [false, true] {
        let (mut rig, engine) = recorded(BLOCKS, settings());
        let origin = rig.thin(0);
        if is_copied {
            rig.write(&origin, 0, BLOCK).unwrap();
            rig.message("create_snap 1 0").unwrap();
        }
        let write = rig.submit(&origin, Op::Write, 0, 8);
        let tag = rig.send("create_snap 2 0");
        assert_eq!(rig.pending.len(), 1);
        rig.commit_now();
        rig.end_one(is_flush, Ok(()));
        let is_there = |rig: &Rig| {
            let details = |pool: &PoolMetadata| pool.details(ThinId(2)).is_ok();
            rig.pool.inspect(details)
        };
        assert!(!is_there(&rig));
        rig.end_one(|io| is_zero(io) || is_copy(io), Ok(()));
        assert!(!is_there(&rig), "the write itself is in flight");
        rig.end_one(is_bio(write), Ok(()));
        assert!(is_there(&rig));
        rig.settle();
        assert!(
            rig.answers
                .remove(&tag)
                .is_some_and(|answer| answer.is_ok())
        );
        let snapshot = rig.open(2);
        assert_eq!(rig.content(&snapshot, 0)[0], write);
        rig.assert_counts(&engine);
    }
}

/// A snapshot that is refused leaves the origin as it was, and its I/O goes on.
#[test]
fn t08_io_goes_on_after_a_snapshot_that_was_refused() {
    let (mut rig, _) = recorded(BLOCKS, settings());
    let origin = rig.thin(0);
    let write = rig.submit(&origin, Op::Write, 0, 8);
    let tag = rig.send("create_snap 0 0");
    let late = rig.submit(&origin, Op::Write, 8, 8);
    rig.settle();
    let refused = rig.answers.remove(&tag).expect("an answer");
    assert_eq!(kind(refused), Some(ErrorKind::Exists));
    assert_eq!(rig.content(&origin, 0)[..2], [write, late]);
    assert_eq!(rig.used(), 1);
}

/// The clock is at the last time that a mapping can hold.
#[test]
fn t27_no_snapshot_is_made_once_the_clock_is_at_its_end() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    let old = rig.write(&thin, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    let mut image = engine.contents();
    let mut superblock = AlignedBuffer::new(1);
    superblock
        .blocks_mut(1)
        .copy_from_slice(&image[..BLOCK_SIZE]);
    let mut fields = Fields::unpack(superblock.blocks(1));
    fields.time = (1 << 24) - 2;
    image[..BLOCK_SIZE].copy_from_slice(&fields.pack());
    let disk = rig.disk.clone();
    let (mut rig, engine) = reopened(&image, disk, BLOCKS, settings());
    let thin = rig.open(0);
    rig.message("create_snap 1 0").expect("the last one");
    let refused = rig.message("create_snap 2 0");
    assert_eq!(kind(refused), Some(ErrorKind::InvalidArgument));
    rig.assert_mode(PoolMode::Write);
    // Mappings of the last time are as any other.
    let new = rig.write(&thin, 0, 8).unwrap();
    let other = rig.write(&thin, 5 * BLOCK, BLOCK).unwrap();
    assert_eq!(rig.content(&thin, 0)[..2], [new, old]);
    rig.assert_block(&thin, 5, other);
    let again = rig.write(&thin, 0, 8).unwrap();
    assert_eq!(rig.deferred.get(&again), None, "it is the device's own");
    let snapshot = rig.open(1);
    rig.assert_block(&snapshot, 0, old);
    rig.assert_counts(&engine);
}

/// By its time the block may be shared, by its count it is not: writes copy it once more, discards pass it down.
#[test]
fn t28_after_its_snapshot_is_deleted_a_block_is_passed_down() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let origin = rig.thin(0);
    for block in 0..3 {
        rig.write(&origin, block * BLOCK, BLOCK).unwrap();
    }
    rig.message("create_snap 1 0").unwrap();
    rig.message("create_snap 2 0").unwrap();
    rig.message("delete 1").unwrap();
    let data = rig.mappings(0);
    // Snapshot 2 has it still: nothing is passed down.
    rig.log.clear();
    rig.discard(&origin, 0, BLOCK).unwrap();
    assert!(!rig.log.iter().any(|line| line.starts_with("Discard")));
    assert_eq!(rig.used(), 3);
    rig.message("delete 2").unwrap();
    assert_eq!(rig.used(), 2);
    let write = rig.write(&origin, BLOCK, 8).unwrap();
    assert_eq!(rig.deferred[&write], Reason::Shared);
    assert_eq!(rig.content(&origin, 1)[0], write);
    assert_eq!(rig.used(), 2);
    let discard = rig.submit(&origin, Op::Discard, 2 * BLOCK, BLOCK);
    // A crash before the commit would need the block.
    assert!(!rig.has_pending(is_discard));
    rig.end_one(is_flush, Ok(()));
    let sector = data[&2] * BLOCK;
    assert!(rig.has_pending(
        |io| matches!(io, Io::Discard { sector: s, sectors: BLOCK, .. } if *s == sector)
    ));
    rig.settle();
    assert_eq!(rig.result(discard), Some(Ok(())));
    rig.assert_block(&origin, 2, 0);
    assert_eq!(rig.used(), 1);
    rig.assert_counts(&engine);
}
