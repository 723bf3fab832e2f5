//! Discards against what else is in flight.

use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::pool::{Bio, BioError, Features, Op, PoolMode, Thin, pieces};

use super::disk::{CHUNK, Disk};
use super::rig::{BLOCK, Io, Rig, settings};
use super::scene::{
    CHUNKS, assert_sound, image_of, in_one_go, is_bio, is_copy, is_discard, is_flush, mappings_in,
    recorded, reopened, with,
};
use crate::support::Image;

/// A write that was looked up and is not issued yet: the discard waits for it, however late it is.
#[test]
fn t01_a_discard_waits_for_a_write_that_was_looked_up_before() {
    let (mut rig, engine) = recorded(1, settings());
    let thin = rig.thin(0);
    rig.write(&thin, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    let late = rig.submit(&thin, Op::Write, 0, 8);
    assert_eq!(rig.deferred.get(&late), None);
    let discard = rig.submit(&thin, Op::Discard, 0, BLOCK);
    // Whatever comes after the discard waits for it.
    let after = rig.submit(&thin, Op::Read, 0, 8);
    rig.commit_now();
    assert_eq!(rig.result(discard), None);
    assert_eq!((rig.mappings(0).len(), rig.used()), (1, 1));
    rig.end_one(is_bio(late), Ok(()));
    assert!(rig.mappings(0).is_empty());
    rig.settle();
    assert_eq!(rig.result(discard), Some(Ok(())));
    assert_eq!(rig.done[&after].content, [0]);
    rig.assert_counts(&engine);
}

/// Discards, writes and reads of one block in a loop, with any delay between the lookup and the I/O, while another device waits to
/// get hold of the block.
#[test]
fn t01_discards_and_writes_of_a_block_leave_the_last_write_or_zeros() {
    for no_discard_passdown in [false, true] {
        let features = Features {
            no_discard_passdown,
            ..Features::default()
        };
        let (mut rig, engine) = recorded(2, with(features));
        let (thin, other) = (rig.thin(0), rig.thin(1));
        let mut rng = SmallRng::seed_from_u64(1);
        let mut before = 0;
        let mut unmapped = 0;
        for _ in 0..400 {
            let mut ops = [Op::Write, Op::Discard, Op::Read];
            ops.swap(0, rng.random_range(0..3));
            ops.swap(1, rng.random_range(1..3));
            let bios = ops.map(|op| {
                if rng.random() && !rig.pending.is_empty() {
                    let at = rng.random_range(0..rig.pending.len());
                    rig.carry_out(at, Ok(()));
                }
                rig.submit(&thin, op, 0, BLOCK)
            });
            let mine = rig.write(&other, BLOCK, BLOCK).unwrap();
            while !rig.pending.is_empty() {
                let at = rng.random_range(0..rig.pending.len());
                rig.carry_out(at, Ok(()));
            }
            let write = bios[ops.iter().position(|&op| op == Op::Write).expect("one")];
            let read = bios[ops.iter().position(|&op| op == Op::Read).expect("one")];
            for bio in bios {
                assert_eq!(rig.result(bio), Some(Ok(())));
            }
            let found = rig.done[&read].content[0];
            assert!([before, write, 0].contains(&found), "{found}");
            before = rig.content(&thin, 0)[0];
            assert!([write, 0].contains(&before), "{before} after {write}");
            rig.assert_block(&thin, 0, before);
            rig.assert_block(&other, 1, mine);
            unmapped += u64::from(rig.mappings(0).is_empty());
            // The other one gives its block back and takes one again.
            rig.discard(&other, BLOCK, BLOCK).unwrap();
            rig.commit().unwrap();
        }
        assert!((50..350).contains(&unmapped), "{unmapped} of 400");
        rig.assert_counts(&engine);
    }
}

/// A block that is being discarded on the data device is nobody's, though it is unmapped and the metadata is committed.
#[test]
fn t02_a_block_is_not_reused_before_its_discard_and_a_commit_have_ended() {
    let (mut rig, engine) = recorded(2, settings());
    let (first, second) = (rig.thin(0), rig.thin(1));
    rig.write(&first, 0, BLOCK).unwrap();
    rig.write(&second, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    let block = rig.mappings(0)[&0];
    let discard = rig.submit(&first, Op::Discard, 0, BLOCK);
    assert!(rig.has_pending(is_discard) && rig.mappings(0).is_empty());
    let write = rig.submit(&second, Op::Write, BLOCK, BLOCK);
    rig.end_one(is_flush, Ok(()));
    rig.assert_mode(PoolMode::OutOfDataSpace);
    assert_eq!((rig.result(write), rig.issued(write)), (None, 0));
    rig.end_one(is_discard, Ok(()));
    assert_eq!(rig.result(discard), Some(Ok(())));
    assert_eq!(rig.used(), 1);
    // A crash now would still find it mapped.
    assert_eq!((rig.pending.len(), rig.issued(write)), (0, 0));
    rig.pass(std::time::Duration::from_secs(1));
    rig.assert_mode(PoolMode::Write);
    assert_eq!(rig.result(write), Some(Ok(())));
    assert_eq!(rig.mappings(1)[&1], block);
    rig.assert_block(&second, 1, write);
    rig.assert_counts(&engine);
}

/// Neighbours that wait for the worker are one discard; what lies between two of them, or belongs to somebody else, parts them.
#[test]
fn discards_of_neighbours_that_wait_are_done_as_one() {
    let (mut rig, engine) = recorded(16, in_one_go());
    let (thin, other) = (rig.thin(0), rig.thin(1));
    for block in 0..6 {
        rig.write(&thin, block * BLOCK, BLOCK).unwrap();
    }
    rig.write(&other, 6 * BLOCK, BLOCK).unwrap();
    rig.commit().unwrap();
    let discards = [2, 0, 1, 4].map(|block| rig.map_only(&thin, Op::Discard, block * BLOCK, BLOCK));
    let no_block = rig.map_only(&thin, Op::Discard, 5 * BLOCK, BLOCK - CHUNK);
    let others = rig.map_only(&other, Op::Discard, 6 * BLOCK, BLOCK);
    rig.wake();
    let mut passed_down: Vec<_> = (rig.pending.iter())
        .map(|pending| match pending.io {
            Io::Discard { sectors, .. } => sectors / BLOCK,
            ref io => panic!("{io:?}"),
        })
        .collect();
    passed_down.sort_unstable();
    assert_eq!(passed_down, [1, 1, 3]);
    assert_eq!(rig.result(no_block), Some(Ok(())));
    assert!(discards.iter().all(|&bio| rig.result(bio).is_none()));
    rig.settle();
    for bio in discards.into_iter().chain([others]) {
        assert_eq!(rig.result(bio), Some(Ok(())));
    }
    assert_eq!(rig.mappings(0).keys().collect::<Vec<_>>(), [&3, &5]);
    assert!(rig.mappings(1).is_empty());
    assert_eq!(rig.used(), 2);
    rig.assert_counts(&engine);
}

/// A write that is in the way of one of them is waited for by that one at least, and by none for ever.
#[test]
fn neighbours_of_a_block_that_somebody_works_on_are_discarded_all_the_same() {
    let (mut rig, engine) = recorded(16, in_one_go());
    let thin = rig.thin(0);
    for block in [0, 1, 3] {
        rig.write(&thin, block * BLOCK, BLOCK).unwrap();
    }
    let write = rig.submit(&thin, Op::Write, 2 * BLOCK, BLOCK);
    let discards = [0, 1, 2, 3].map(|block| rig.map_only(&thin, Op::Discard, block * BLOCK, BLOCK));
    rig.wake();
    rig.end_one(is_bio(write), Ok(()));
    rig.settle();
    assert_eq!(rig.result(write), Some(Ok(())));
    for bio in discards {
        assert_eq!(rig.result(bio), Some(Ok(())));
    }
    assert_eq!((rig.mappings(0).len(), rig.used()), (0, 0));
    rig.assert_counts(&engine);
}

#[test]
fn t03_a_crash_between_unmapping_and_freeing_leaves_no_leak() {
    let (mut rig, engine) = recorded(4, settings());
    let (first, second) = (rig.thin(0), rig.thin(1));
    rig.write(&first, 0, BLOCK).unwrap();
    let kept = rig.write(&second, 0, BLOCK).unwrap();
    rig.commit().unwrap();
    rig.submit(&first, Op::Discard, 0, BLOCK);
    assert_sound(engine.contents());
    assert_eq!(mappings_in(&engine.contents())[&0].len(), 1);
    rig.commit_now();
    rig.end_one(is_flush, Ok(()));
    assert!(rig.has_pending(is_discard));
    let image = engine.contents();
    assert_sound(image.clone());
    let disk = rig.disk.clone().crash(|| false);
    let (mut after, _) = reopened(&image, disk, 4, settings());
    let (first, second) = (after.open(0), after.open(1));
    after.assert_block(&first, 0, 0);
    after.assert_block(&second, 0, kept);
    let write = after.write(&first, 0, BLOCK).unwrap();
    after.assert_block(&first, 0, write);
    // The one that did not crash gives the block back.
    rig.settle();
    rig.assert_counts(&engine);
}

/// A pool whose device 0 has `blocks` mappings in order.
fn mapped(blocks: u64) -> (Vec<u8>, Disk) {
    let (mut rig, engine) = reopened(&image_of(256, blocks), Disk::used(), blocks, settings());
    let thin = rig.thin(0);
    for block in 0..blocks {
        rig.submit(&thin, Op::Write, block * BLOCK, BLOCK);
    }
    rig.settle();
    rig.assert_counts(&engine);
    (engine.contents(), rig.disk.clone())
}

fn discard_blocks(rig: &mut Rig, thin: &Thin, begin: u64, end: u64) {
    rig.discard(thin, begin * BLOCK, (end - begin) * BLOCK)
        .unwrap();
}

/// Discards a part, makes a snapshot, discards `rest`: after each the counts are right, and the snapshot has what it had.
fn discard_snapshot_discard(
    image: &[u8],
    disk: Disk,
    blocks: u64,
    first: (u64, u64),
    rest: (u64, u64),
) {
    let (mut rig, engine) = reopened(image, disk, blocks, settings());
    let thin = rig.open(0);
    discard_blocks(&mut rig, &thin, first.0, first.1);
    rig.assert_counts(&engine);
    rig.message("create_snap 1 0").unwrap();
    assert_sound(engine.contents());
    let kept = rig.mappings(0);
    assert_eq!(kept.len() as u64, blocks - (first.1 - first.0));
    discard_blocks(&mut rig, &thin, rest.0, rest.1);
    rig.assert_counts(&engine);
    assert_eq!(rig.mappings(1), kept);
    assert_eq!(rig.used(), kept.len() as u64);
    let snapshot = rig.open(1);
    for thin in [&thin, &snapshot] {
        discard_blocks(&mut rig, thin, 0, blocks);
    }
    rig.assert_counts(&engine);
    assert_eq!(rig.used(), 0);
}

/// Discards that stop anywhere in a tree of three leaves.
#[test]
fn t18_counts_are_right_wherever_a_discard_before_a_snapshot_stops() {
    const BLOCKS: u64 = 520;
    let (image, disk) = mapped(BLOCKS);
    for stop in [1, 126, 127, 251, 252, 253, 378, 379, 394, 519] {
        let (low, high) = ((0, stop), (stop, BLOCKS));
        discard_snapshot_discard(&image, disk.clone(), BLOCKS, low, high);
        discard_snapshot_discard(&image, disk.clone(), BLOCKS, high, low);
    }
}

/// The root has exactly one child, as the kernel leaves it at times, and both are shared with the snapshot.
#[test]
fn t18_counts_are_right_after_discards_under_a_root_with_one_child() {
    const BLOCKS: u64 = 200;
    let (image, disk) = mapped(BLOCKS);
    let image = Image::from_bytes(&image);
    image.split(0, &[(0..BLOCKS as usize, 0)]);
    let image = image.bytes();
    assert_sound(image.clone());
    for stop in [0, 1, 100, 199] {
        for rest in [(0, BLOCKS), (stop, BLOCKS), (0, 1), (190, 200)] {
            if stop == 0 {
                // Nothing is changed before the snapshot.
                let (mut rig, engine) = reopened(&image, disk.clone(), BLOCKS, settings());
                rig.message("create_snap 1 0").unwrap();
                let (thin, kept) = (rig.open(0), rig.mappings(0));
                discard_blocks(&mut rig, &thin, rest.0, rest.1);
                rig.assert_counts(&engine);
                assert_eq!(rig.mappings(1), kept);
            } else {
                discard_snapshot_discard(&image, disk.clone(), BLOCKS, (0, stop), rest);
            }
        }
    }
}

/// The sharing of the block in the middle is just being broken: the discard leaves it out and succeeds, and nobody waits for ever.
#[test]
fn t22_a_discard_skips_blocks_that_somebody_works_on() {
    let (mut rig, engine) = recorded(16, settings());
    let thin = rig.thin(0);
    // Their data blocks are no neighbours.
    for block in [0, 9, 1, 8, 2] {
        rig.write(&thin, block * BLOCK, BLOCK).unwrap();
    }
    rig.message("create_snap 1 0").unwrap();
    let old = rig.mappings(1);
    let write = rig.submit(&thin, Op::Write, BLOCK, 8);
    let discard = rig.submit(&thin, Op::Discard, 0, 3 * BLOCK);
    rig.commit_now();
    while !rig.pending.iter().all(|p| is_copy(&p.io)) {
        rig.end_one(|io| !is_copy(io), Ok(()));
    }
    assert_eq!(rig.result(discard), Some(Ok(())));
    assert_eq!(rig.mappings(0).into_keys().collect::<Vec<_>>(), [1, 8, 9]);
    // The virtual blocks of the discard are nobody's any more.
    let next = rig.submit(&thin, Op::Write, 2 * BLOCK, BLOCK);
    rig.end_one(is_bio(next), Ok(()));
    assert_eq!(rig.result(next), Some(Ok(())));
    assert_eq!(rig.result(write), None);
    rig.settle();
    assert_eq!(rig.result(write), Some(Ok(())));
    assert_eq!(rig.content(&thin, 1)[0], write);
    assert_eq!(rig.mappings(1), old);
    assert_ne!(rig.mappings(0)[&1], old[&1]);
    rig.assert_counts(&engine);
    assert!(rig.pool.is_idle());
}

#[test]
fn t23_a_discard_unmaps_whole_blocks_only() {
    let cases: BTreeMap<(u64, u64), &[u64]> = [
        ((64, 3 * BLOCK), [0, 3].as_slice()),
        ((0, BLOCK - 8), &[0, 1, 2, 3]),
        ((8, BLOCK), &[0, 1, 2, 3]),
        ((8, 2 * BLOCK - 8), &[0, 2, 3]),
        ((BLOCK, BLOCK), &[0, 2, 3]),
        ((8, 8), &[0, 1, 2, 3]),
        ((2 * BLOCK, 9 * BLOCK), &[0, 1]),
    ]
    .into();
    for ((sector, sectors), left) in cases {
        let (mut rig, engine) = recorded(16, settings());
        let thin = rig.thin(0);
        let written = [0, 1, 2, 3].map(|block| rig.write(&thin, block * BLOCK, BLOCK).unwrap());
        rig.discard(&thin, sector, sectors).unwrap();
        assert_eq!(rig.mappings(0).into_keys().collect::<Vec<_>>(), left);
        for block in 0..4 {
            let is_left = left.contains(&block);
            let expected = if is_left { written[block as usize] } else { 0 };
            rig.assert_block(&thin, block, expected);
        }
        rig.assert_counts(&engine);
        assert_eq!(rig.used(), left.len() as u64);
    }
}

/// A cell covers no more than 1024 aligned blocks, so whoever submits a discard cuts it there.
#[test]
fn t23_a_discard_across_1024_blocks_is_cut_where_a_cell_ends() {
    let (mut rig, engine) = recorded(16, settings());
    let thin = rig.thin(0);
    for block in [1021, 1022, 1023, 1024, 1025, 2047, 2048] {
        rig.write(&thin, block * BLOCK, BLOCK).unwrap();
    }
    let (sector, sectors) = (1022 * BLOCK, 1025 * BLOCK + 64);
    let whole = rig.submit(&thin, Op::Discard, sector, sectors);
    assert_eq!(rig.result(whole), Some(Err(BioError::Invalid)));
    let cut: Vec<_> = pieces(Op::Discard, sector, sectors, BLOCK, None).collect();
    assert_eq!(cut.len(), 2);
    for (sector, sectors) in cut {
        let id = rig.number();
        rig.submit_bio(&thin, Bio::new(id, Op::Discard, sector, sectors));
        rig.settle();
        assert_eq!(rig.result(id), Some(Ok(())));
    }
    let left: Vec<u64> = rig.mappings(0).into_keys().collect();
    assert_eq!(left, [1021, 2047, 2048]);
    rig.assert_counts(&engine);
    assert_eq!(rig.content(&thin, 2047).len() as u64, CHUNKS);
}
