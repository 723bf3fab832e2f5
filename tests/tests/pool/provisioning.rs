//! New blocks: one allocation whoever wants it, data before mapping, and nothing lost when the data device fails.

use thintools::pool::{BioError, Op, Reason, Settings};

use super::disk::{CHUNK, Disk};
use super::rig::{BLOCK, Io, Rig, settings};
use super::scene::{
    CHUNKS, assert_sound, crashed, in_one_go, is_bio, is_copy, is_flush, is_zero, recorded,
};

const BLOCKS: u64 = 16;

#[test]
fn t04_two_writers_of_one_unmapped_block_share_one_allocation() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    let first = rig.map_only(&thin, Op::Write, 0, 8);
    let second = rig.map_only(&thin, Op::Write, 16, 8);
    assert_eq!(rig.deferred[&first], Reason::Unprovisioned);
    assert_eq!(rig.deferred[&second], Reason::CellHeld);
    rig.wake();
    // A third one comes while the block is being zeroed.
    let third = rig.submit(&thin, Op::Write, 24, 8);
    assert_eq!(rig.deferred[&third], Reason::CellHeld);
    assert_eq!((rig.pending.len(), rig.used()), (1, 1));
    rig.end_one(is_zero, Ok(()));
    rig.settle();
    assert_eq!(rig.used(), 1);
    let content = rig.content(&thin, 0);
    assert_eq!(content[..5], [first, 0, second, third, 0]);
    assert!(content[5..].iter().all(|&tag| tag == 0));
    rig.assert_counts(&engine);
}

/// What the kernel does in three steps: zeros, the mapping, the write.
#[test]
fn a_write_to_a_part_of_a_new_block_takes_the_zeros_around_it_along() {
    for is_fua in [false, true] {
        let (mut rig, engine) = recorded(BLOCKS, in_one_go());
        let thin = rig.thin(0);
        let first = match is_fua {
            true => rig.submit_fua(&thin, 16, 8),
            false => rig.submit(&thin, Op::Write, 16, 8),
        };
        let second = rig.submit(&thin, Op::Write, 24, 8);
        assert_eq!(rig.deferred[&second], Reason::CellHeld);
        assert_eq!(rig.pending.len(), 1);
        assert!(
            rig.mappings(0).is_empty(),
            "mapped before the data is there"
        );
        rig.end_one(is_bio(first), Ok(()));
        assert_eq!(rig.mappings(0).len(), 1);
        assert_eq!(rig.result(first).is_none(), is_fua, "after its commit");
        rig.settle();
        assert_eq!(rig.result(first), Some(Ok(())));
        let content = rig.content(&thin, 0);
        assert_eq!(content[..5], [0, 0, first, second, 0]);
        assert!(content[5..].iter().all(|&tag| tag == 0));
        rig.assert_counts(&engine);
        let failing = rig.submit(&thin, Op::Write, 3 * BLOCK, 8);
        rig.end_one(is_bio(failing), Err(BioError::Io));
        rig.settle();
        assert_eq!(rig.result(failing), Some(Err(BioError::Io)));
        assert_eq!((rig.mappings(0).len(), rig.used()), (1, 1));
        if is_fua {
            let mut after = crashed(&rig, &engine);
            let thin = after.open(0);
            assert_eq!(after.content(&thin, 0)[..3], [0, 0, first]);
        }
    }
}

/// The same when both were looked up before either had the block.
#[test]
fn t04_a_second_writer_that_the_worker_finds_waits_for_the_first() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    // A durable write does not take the cell in the map half.
    let first = rig.submit_fua(&thin, 0, 8);
    let second = rig.submit_fua(&thin, 8, 8);
    assert_eq!(rig.deferred[&second], Reason::Fua);
    assert_eq!(rig.used(), 1);
    rig.settle();
    assert_eq!(rig.content(&thin, 0)[..3], [first, second, 0]);
    rig.assert_counts(&engine);
}

/// A write of a whole block fills the new block itself, while a partial write and a read of the block wait; then they end in any
/// order.
#[test]
fn t05_a_whole_write_that_fills_a_new_block_is_issued_once_and_others_wait_for_it() {
    for order in 0..3 {
        let (mut rig, engine) = recorded(BLOCKS, settings());
        let thin = rig.thin(0);
        let whole = rig.submit(&thin, Op::Write, 0, BLOCK);
        let part = rig.submit(&thin, Op::Write, 8, 8);
        let read = rig.submit(&thin, Op::Read, 0, BLOCK);
        assert_eq!(rig.deferred[&part], Reason::CellHeld);
        assert_eq!(rig.deferred[&read], Reason::CellHeld);
        assert_eq!(rig.pending.len(), 1);
        assert!(
            rig.mappings(0).is_empty(),
            "mapped before the data is there"
        );
        rig.end_one(is_bio(whole), Ok(()));
        assert_eq!(rig.result(whole), Some(Ok(())));
        assert_eq!(rig.mappings(0).len(), 1);
        let others = [is_bio(part), is_bio(read)];
        if order == 0 {
            rig.end_one(&others[0], Ok(()));
            rig.end_one(&others[1], Ok(()));
        } else {
            rig.end_one(&others[1], Ok(()));
            // Another whole write in between is an ordinary one.
            let again = (order == 2).then(|| rig.submit(&thin, Op::Write, 0, BLOCK));
            rig.settle();
            if let Some(again) = again {
                assert_eq!(rig.deferred.get(&again), None);
                assert_eq!(rig.mappings(0).len(), 1);
            }
        }
        assert_eq!(rig.issued(whole), 1, "the write that filled the block");
        let found = &rig.done[&read].content;
        assert_eq!(found.len() as u64, CHUNKS);
        let may_be =
            |(chunk, tag): (usize, &u64)| *tag == whole || chunk == 1 && *tag == part && order == 0;
        assert!(found.iter().enumerate().all(may_be), "{found:?}");
        assert_eq!(rig.used(), 1);
        rig.assert_counts(&engine);
    }
}

/// Zeroing, copying, and a write that fills a block: if it fails so does the bio, the mapping is as it was, and the block is free
/// again. The next try succeeds.
#[test]
fn t09_a_block_whose_data_could_not_be_put_in_place_is_free_again() {
    type Is = fn(&Io) -> bool;
    let is_issued: Is = |io| matches!(io, Io::Bio { .. });
    let cases: [(bool, u64, Is); 4] = [
        (false, 8, is_zero),
        (false, BLOCK, is_issued),
        (true, 8, is_copy),
        (true, BLOCK, is_issued),
    ];
    for (is_shared, sectors, what) in cases {
        let (mut rig, engine) = recorded(BLOCKS, settings());
        let thin = rig.thin(0);
        let mut old = 0;
        if is_shared {
            old = rig.write(&thin, 0, BLOCK).unwrap();
            rig.message("create_snap 1 0").unwrap();
        }
        let (before, used) = (rig.mappings(0), rig.used());
        let write = rig.submit(&thin, Op::Write, 0, sectors);
        let waiting = rig.submit(&thin, Op::Write, 16, 8);
        assert_eq!(rig.used(), used + 1);
        rig.end_one(what, Err(BioError::Io));
        assert_eq!(rig.result(write), Some(Err(BioError::Io)));
        assert_eq!(rig.result(waiting), Some(Err(BioError::Io)));
        assert!(rig.pending.is_empty());
        assert_eq!((rig.mappings(0), rig.used()), (before, used));
        rig.assert_block(&thin, 0, old);
        rig.assert_counts(&engine);
        assert!(rig.pool.is_idle());
        let again = rig.write(&thin, 0, BLOCK).unwrap();
        rig.assert_block(&thin, 0, again);
        rig.assert_counts(&engine);
    }
}

/// Of a copy and the zeros behind it one fails, the other has to end before the bio does.
#[test]
fn t09_a_block_that_is_filled_in_two_parts_is_freed_after_both() {
    for fails_first in [true, false] {
        let (mut rig, engine) = recorded(BLOCKS, settings());
        rig.message("create_thin 0").unwrap();
        let thin = rig
            .worker
            .open_thin(thintools::units::ThinId(0), Some(16))
            .unwrap();
        rig.origins.insert(thin.number(), Disk::used());
        let write = rig.submit(&thin, Op::Write, 0, 8);
        let result = |fails: bool| if fails { Err(BioError::Io) } else { Ok(()) };
        rig.end_one(is_copy, result(fails_first));
        assert_eq!(rig.result(write), None, "half of the block is being zeroed");
        rig.end_one(is_zero, result(!fails_first));
        assert_eq!(rig.result(write), Some(Err(BioError::Io)));
        assert_eq!((rig.mappings(0).len(), rig.used()), (0, 0));
        rig.assert_counts(&engine);
    }
}

/// Everything that was not flushed is lost right after the write has completed.
#[test]
fn t10_a_durable_write_that_completed_survives_a_crash() {
    for (is_mapped, sectors) in [(false, BLOCK), (false, 8), (true, BLOCK), (true, 8)] {
        let (mut rig, engine) = recorded(BLOCKS, settings());
        let thin = rig.thin(0);
        if is_mapped {
            rig.write(&thin, 0, BLOCK).unwrap();
        }
        let write = rig.submit_fua(&thin, 0, sectors);
        while rig.result(write).is_none() {
            rig.carry_out(0, Ok(()));
        }
        let mut after = crashed(&rig, &engine);
        let thin = after.open(0);
        let found = after.content(&thin, 0);
        let written = &found[..(sectors / CHUNK) as usize];
        assert!(written.iter().all(|&tag| tag == write), "{found:?}");
    }
}

/// A durable write that fills a block completes with the commit, not with its data.
#[test]
fn t10_a_durable_write_waits_for_its_mapping_to_be_committed() {
    let (mut rig, engine) = recorded(BLOCKS, settings());
    let thin = rig.thin(0);
    let write = rig.submit_fua(&thin, 0, BLOCK);
    rig.end_one(is_bio(write), Ok(()));
    assert_eq!(rig.result(write), None);
    rig.end_one(is_flush, Ok(()));
    assert_eq!(rig.result(write), Some(Ok(())));
    assert_sound(engine.contents());
}

/// Blocks that are no power of two of sectors: every sector is where it has to be.
#[test]
fn t23_sectors_of_blocks_that_are_no_power_of_two_are_where_they_have_to_be() {
    let size = 384;
    let mut table = settings().table;
    table.block_sectors = size as u32;
    let engine = std::sync::Arc::new(thintools::io::RamEngine::new(256));
    let mut rig = Rig::new(engine, BLOCKS, Settings::new(table));
    let thin = rig.thin(0);
    let blocks = [7, 0, 1023, 1024, 5];
    for block in blocks {
        let (begin, end) = (block * size, (block + 1) * size);
        let first = rig.write(&thin, begin, 8).unwrap();
        let last = rig.write(&thin, end - 16, 16).unwrap();
        assert_eq!(rig.read(&thin, begin, 16), Ok(vec![first, 0]));
        assert_eq!(rig.read(&thin, end - 24, 24), Ok(vec![0, last, last]));
        let at = rig.mappings(0)[&block] * size;
        assert_eq!(rig.disk.read(at, 16), [first, 0]);
        assert_eq!(rig.disk.read(at + size - 16, 16), [last, last]);
        let across = rig.submit(&thin, Op::Write, end - 8, 16);
        assert_eq!(rig.result(across), Some(Err(BioError::Invalid)));
    }
    // From the second sector of block 0 to the middle of block 7: only 1 to 6 are whole.
    rig.discard(&thin, 8, 7 * size + size / 2 - 8).unwrap();
    let left: Vec<u64> = rig.mappings(0).into_keys().collect();
    assert_eq!(left, [0, 7, 1023, 1024]);
}

/// An external origin that ends within a block, at its end, or before it: what it has is there, behind it are zeros; and so it is
/// after a write made the block the device's own.
#[test]
fn t24_behind_the_end_of_an_external_origin_are_zeros() {
    const ORIGIN: u64 = 77;
    for origin_sectors in [16, BLOCK, BLOCK + 24, 2 * BLOCK] {
        for sectors in [8, BLOCK] {
            let (mut rig, engine) = recorded(BLOCKS, settings());
            rig.message("create_thin 0").unwrap();
            let id = thintools::units::ThinId(0);
            let thin = rig.worker.open_thin(id, Some(origin_sectors)).unwrap();
            let mut origin = Disk::default();
            origin.write(0, &vec![ORIGIN; (origin_sectors / CHUNK) as usize], true);
            // Nobody may look behind its end.
            origin.write(origin_sectors, &[u64::MAX; 64], true);
            rig.origins.insert(thin.number(), origin);
            let of_origin = |block: u64| {
                let chunks = block * CHUNKS..(block + 1) * CHUNKS;
                let tag = |chunk| {
                    if chunk < origin_sectors / CHUNK {
                        ORIGIN
                    } else {
                        0
                    }
                };
                chunks.map(tag).collect::<Vec<_>>()
            };
            for block in 0..3 {
                assert_eq!(rig.content(&thin, block), of_origin(block));
            }
            assert_eq!(rig.used(), 0, "a read provisions nothing");
            for block in 0..3 {
                let write = rig.write(&thin, block * BLOCK, sectors).unwrap();
                let mut expected = of_origin(block);
                expected[..(sectors / CHUNK) as usize].fill(write);
                assert_eq!(
                    rig.content(&thin, block),
                    expected,
                    "{origin_sectors}, block {block}"
                );
            }
            rig.assert_counts(&engine);
        }
    }
}

/// A read that straddles the end of the origin and one behind it, in every mode.
#[test]
fn t24_reads_past_an_external_origin_do_not_need_the_metadata() {
    for read_only in [false, true] {
        let (mut rig, _) = recorded(BLOCKS, settings());
        rig.message("create_thin 0").unwrap();
        let id = thintools::units::ThinId(0);
        let thin = rig.worker.open_thin(id, Some(16)).unwrap();
        let mut origin = Disk::default();
        origin.write(0, &[5, 5, 6, 6], true);
        rig.origins.insert(thin.number(), origin);
        if read_only {
            let mut table = settings().table;
            table.features.read_only = true;
            rig.resume(Some(table)).unwrap();
        }
        assert_eq!(rig.read(&thin, 8, 24), Ok(vec![5, 0, 0]));
        assert_eq!(rig.read(&thin, 16, 8), Ok(vec![0]));
        let write = rig.submit(&thin, Op::Write, 0, 8);
        rig.settle();
        let expected = if read_only { Err(BioError::Io) } else { Ok(()) };
        assert_eq!(rig.result(write), Some(expected));
    }
}
