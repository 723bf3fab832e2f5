//! Pools that run full, of data or of metadata, and what lets them go on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use thintools::ErrorKind;
use thintools::io::{BlockEngine, RamEngine};
use thintools::pool::{BioError, Features, Notice, Op, PoolMode, Thin};
use thintools::units::MetadataBlock;

use super::disk::Disk;
use super::rig::{BLOCK, Rig, settings};
use super::scene::{assert_sound, commits, image_of, is_flush, is_zero, recorded, reopened, with};
use crate::crash::Recorder;
use crate::support::{Image, Map};

const BLOCKS: u64 = 2;
const SECOND: Duration = Duration::from_secs(1);

/// A pool without a free block.
fn full(features: Features) -> (Rig, Arc<Recorder>, Arc<Thin>) {
    let (mut rig, engine) = recorded(BLOCKS, with(features));
    let thin = rig.thin(0);
    for block in 0..BLOCKS {
        rig.write(&thin, block * BLOCK, BLOCK).unwrap();
    }
    rig.commit().unwrap();
    rig.assert_mode(PoolMode::Write);
    (rig, engine, thin)
}

fn modes(rig: &Rig) -> Vec<PoolMode> {
    let mode = |notice: &Notice| match notice {
        Notice::Mode(mode) => Some(*mode),
        _ => None,
    };
    rig.notices.iter().filter_map(mode).collect()
}

/// Writes to new blocks wait; what needs no block goes on; a discard lets them go on, two to the same block in their order.
#[test]
fn t15_writes_wait_for_space_and_go_on_in_order_when_a_discard_frees_some() {
    let (mut rig, engine, thin) = full(Features::default());
    rig.message("create_snap 1 0").unwrap();
    let snapshot = rig.open(1);
    let waiting = [8, 16, 8].map(|sector| {
        let id = rig.submit(&thin, Op::Write, 5 * BLOCK + sector, 8);
        rig.settle();
        id
    });
    let breaks = rig.submit(&snapshot, Op::Write, 0, 8);
    let whole = rig.submit(&thin, Op::Write, 6 * BLOCK, BLOCK);
    rig.settle();
    assert_eq!(modes(&rig), [PoolMode::OutOfDataSpace]);
    for write in waiting.into_iter().chain([breaks, whole]) {
        assert_eq!(rig.result(write), None);
    }
    assert!(rig.pool.is_idle(), "those who wait hold nothing");
    // Reads and messages are served.
    assert_eq!(rig.read(&thin, 5 * BLOCK, 8), Ok(vec![0]));
    rig.message("create_thin 2").unwrap();
    // What the snapshot has, too, frees nothing.
    rig.discard(&thin, BLOCK, BLOCK).unwrap();
    rig.pass(2 * SECOND);
    rig.assert_mode(PoolMode::OutOfDataSpace);
    rig.log.clear();
    rig.discard(&snapshot, BLOCK, BLOCK).unwrap();
    rig.pass(2 * SECOND);
    // There is one block, for the first of them.
    let same = [waiting[0], waiting[2]];
    assert_eq!(rig.issued_first(&same), same);
    for write in waiting {
        assert_eq!(rig.result(write), Some(Ok(())));
    }
    assert_eq!(rig.content(&thin, 5)[..4], [0, waiting[2], waiting[1], 0]);
    rig.assert_mode(PoolMode::OutOfDataSpace);
    assert_eq!((rig.result(breaks), rig.result(whole)), (None, None));
    rig.data_blocks += 2;
    rig.resume(None).unwrap();
    rig.assert_mode(PoolMode::Write);
    rig.settle();
    assert_eq!(rig.result(breaks), Some(Ok(())));
    assert_eq!(rig.result(whole), Some(Ok(())));
    assert_eq!(rig.content(&snapshot, 0)[0], breaks);
    rig.assert_block(&thin, 6, whole);
    assert_eq!(rig.used(), 4);
    rig.assert_counts(&engine);
}

#[test]
fn t15_with_error_if_no_space_writes_fail_at_once() {
    let features = Features {
        error_if_no_space: true,
        ..Features::default()
    };
    let (mut rig, engine, thin) = full(features);
    for op in [(5 * BLOCK, 8), (5 * BLOCK, BLOCK)] {
        let write = rig.submit(&thin, Op::Write, op.0, op.1);
        rig.settle();
        assert_eq!(rig.result(write), Some(Err(BioError::NoSpace)));
    }
    rig.assert_mode(PoolMode::OutOfDataSpace);
    rig.write(&thin, 0, 8).expect("it has the block");
    rig.discard(&thin, 0, BLOCK).unwrap();
    rig.pass(2 * SECOND);
    rig.assert_mode(PoolMode::Write);
    rig.write(&thin, 5 * BLOCK, 8).unwrap();
    rig.assert_counts(&engine);
}

#[test]
fn t15_after_a_minute_without_space_writes_fail_until_there_is_some() {
    let (mut rig, engine, thin) = full(Features::default());
    let start = rig.now;
    let first = rig.submit(&thin, Op::Write, 5 * BLOCK, 8);
    rig.settle();
    rig.pass(30 * SECOND);
    let second = rig.submit(&thin, Op::Write, 6 * BLOCK, 8);
    rig.settle();
    rig.pass(30 * SECOND - Duration::from_millis(1));
    assert_eq!((rig.result(first), rig.result(second)), (None, None));
    assert_eq!(rig.worker.deadline(), Some(start + 60 * SECOND));
    rig.pass(Duration::from_millis(1));
    for write in [first, second] {
        assert_eq!(rig.result(write), Some(Err(BioError::NoSpace)));
    }
    let timeouts = |n: &&Notice| matches!(n, Notice::NoSpaceTimeout);
    assert_eq!(rig.notices.iter().filter(timeouts).count(), 1);
    rig.assert_mode(PoolMode::OutOfDataSpace);
    let late = rig.submit(&thin, Op::Write, 7 * BLOCK, 8);
    assert_eq!(rig.result(late), Some(Err(BioError::NoSpace)));
    // With space the policy of the table is in force again.
    rig.discard(&thin, 0, BLOCK).unwrap();
    rig.pass(2 * SECOND);
    rig.assert_mode(PoolMode::Write);
    rig.write(&thin, 0, BLOCK).unwrap();
    let waits = rig.submit(&thin, Op::Write, 7 * BLOCK, 8);
    rig.settle();
    rig.pass(59 * SECOND);
    assert_eq!(rig.result(waits), None);
    rig.pass(2 * SECOND);
    assert_eq!(rig.result(waits), Some(Err(BioError::NoSpace)));
    rig.assert_counts(&engine);
}

#[test]
fn t15_without_a_timeout_writes_wait_for_space_for_ever() {
    let mut settings = settings();
    settings.no_space_timeout = None;
    let (mut rig, engine) = recorded(1, settings);
    let thin = rig.thin(0);
    rig.write(&thin, 0, BLOCK).unwrap();
    let write = rig.submit(&thin, Op::Write, BLOCK, BLOCK);
    rig.settle();
    rig.pass(100_000 * SECOND);
    assert_eq!(rig.result(write), None);
    rig.data_blocks = 2;
    rig.resume(None).unwrap();
    assert_eq!(rig.result(write), Some(Ok(())));
    rig.assert_counts(&engine);
}

/// The manager is told once, and again after a resumption.
#[test]
fn t15_the_low_water_mark_is_told_once() {
    let mut settings = settings();
    settings.table.low_water_blocks = 4;
    let (mut rig, _) = recorded(8, settings);
    let thin = rig.thin(0);
    let told = |rig: &Rig| {
        let is = |n: &&Notice| matches!(n, Notice::LowWater);
        rig.notices.iter().filter(is).count()
    };
    for (block, expected) in (0..7).zip([0, 0, 0, 0, 1, 1, 1]) {
        rig.write(&thin, block * BLOCK, BLOCK).unwrap();
        assert_eq!(told(&rig), expected, "block {block}");
    }
    rig.resume(None).unwrap();
    rig.write(&thin, 7 * BLOCK, BLOCK).unwrap();
    assert_eq!(told(&rig), 2);
}

/// Memory of which only a part is there yet.
struct Growing {
    memory: RamEngine,
    blocks: AtomicU64,
}

impl BlockEngine for Growing {
    fn nr_blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        self.memory.read(start, buf)
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        self.memory.write(start, buf)
    }

    fn sync(&self) -> io::Result<()> {
        self.memory.sync()
    }

    fn depth(&self) -> usize {
        self.memory.depth()
    }
}

/// Devices are made until there is no metadata block left: without an error of the metadata and without a flag that wants a check.
/// Once the metadata device has grown it goes on.
#[test]
fn t16_a_pool_out_of_metadata_goes_on_when_the_metadata_has_grown() {
    let engine = Arc::new(Growing {
        memory: RamEngine::new(400),
        blocks: AtomicU64::new(80),
    });
    let mut rig = Rig::new(Arc::clone(&engine) as _, 16, settings());
    let thin = rig.thin(0);
    let old = rig.write(&thin, 0, BLOCK).unwrap();
    let mut made = 1;
    let refused = loop {
        if let Err(e) = rig.message(&format!("create_thin {made}")) {
            break e;
        }
        made += 1;
    };
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    // The kernel makes 63 on as many blocks, without the data block and its mapping.
    assert!((55..=63).contains(&made), "{made}");
    rig.assert_mode(PoolMode::OutOfMetadataSpace);
    assert_eq!(rig.pool.mode().to_string(), "ro");
    let status = rig.pool.inspect(|pool| pool.status().expect("read"));
    assert_eq!((status.needs_check, status.devices), (false, made));
    let lost = |n: &&Notice| matches!(n, Notice::MetadataFailed(_));
    assert_eq!(rig.notices.iter().filter(lost).count(), 0);
    assert!(
        rig.notices
            .iter()
            .any(|n| matches!(n, Notice::MetadataThreshold))
    );
    // What needs no metadata goes on.
    let overwrite = rig.write(&thin, 0, 8).unwrap();
    assert_eq!(rig.content(&thin, 0)[..2], [overwrite, old]);
    assert_eq!(rig.write(&thin, BLOCK, 8), Err(BioError::Io));
    assert_eq!(rig.discard(&thin, 0, BLOCK), Ok(()));
    assert_eq!(rig.content(&thin, 0)[0], overwrite);
    assert_eq!(rig.flush(&thin), Ok(()));
    // A resumption alone does not help.
    rig.resume(None).unwrap();
    rig.assert_mode(PoolMode::OutOfMetadataSpace);
    engine.blocks.store(400, Ordering::Relaxed);
    rig.resume(None).unwrap();
    rig.assert_mode(PoolMode::Write);
    let status = rig.pool.inspect(|pool| pool.status().expect("read"));
    assert_eq!((status.metadata_blocks, status.devices), (400, made));
    rig.message(&format!("create_thin {made}")).unwrap();
    rig.write(&thin, BLOCK, BLOCK).unwrap();
    rig.commit().unwrap();
    let mut image = thintools::io::AlignedBuffer::new(400);
    let bytes = image.blocks_mut(400);
    engine.read(Default::default(), bytes).unwrap();
    assert_sound(bytes.to_vec());
}

/// No block is free but those that this transaction gave up: one commit, and there is one.
#[test]
fn t17_blocks_freed_in_this_transaction_can_be_had_after_one_commit() {
    for no_discard_passdown in [true, false] {
        let features = Features {
            no_discard_passdown,
            ..Features::default()
        };
        let (mut rig, engine, thin) = full(features);
        let freed = rig.mappings(0)[&0];
        rig.discard(&thin, 0, BLOCK).unwrap();
        let before = commits(&engine);
        let writes = [5, 6].map(|block| rig.map_only(&thin, Op::Write, block * BLOCK, 8));
        rig.wake();
        // The block may not be touched before.
        assert!(rig.has_pending(is_flush) && !rig.has_pending(is_zero));
        rig.end_one(is_flush, Ok(()));
        assert_eq!(commits(&engine), before + 1);
        assert!(rig.has_pending(is_zero));
        rig.settle();
        assert_eq!(rig.result(writes[0]), Some(Ok(())));
        assert_eq!(rig.mappings(0)[&5], freed);
        // There was none for the other one.
        assert_eq!(rig.result(writes[1]), None);
        assert_eq!(modes(&rig), [PoolMode::OutOfDataSpace]);
        rig.assert_counts(&engine);
    }
}

/// Debian's thin_restore counts as free in a bitmap only what lies before the end of the device, so that its number is 0 on a full
/// one; a device that grows within the bitmap has its new blocks nonetheless.
#[test]
fn t20_a_device_that_grows_within_a_bitmap_has_its_new_blocks_whatever_the_index_says() {
    const GROWN: u64 = 20;
    for (blocks, wrong_hint) in [(10, 10), (10, 16_320), (1, 7), (10, 0)] {
        let (mut rig, engine) = reopened(&image_of(64, blocks), Disk::used(), blocks, settings());
        let thin = rig.thin(0);
        for block in 0..blocks {
            rig.write(&thin, block * BLOCK, BLOCK).unwrap();
        }
        rig.commit().unwrap();
        let image = Image::from_bytes(&engine.contents());
        image.edit_index(Map::Data, 0, |free, hint| {
            assert_eq!(u64::from(*free), 16_320 - blocks);
            (*free, *hint) = (0, wrong_hint);
        });
        let disk = rig.disk.clone();
        let (mut rig, engine) = reopened(&image.bytes(), disk, blocks, settings());
        let thin = rig.open(0);
        let waits = rig.submit(&thin, Op::Write, 100 * BLOCK, BLOCK);
        rig.settle();
        rig.assert_mode(PoolMode::OutOfDataSpace);
        rig.data_blocks = GROWN;
        rig.resume(None).unwrap();
        rig.settle();
        assert_eq!(rig.result(waits), Some(Ok(())));
        for block in blocks + 1..GROWN {
            rig.write(&thin, block * BLOCK, BLOCK).unwrap();
        }
        rig.assert_mode(PoolMode::Write);
        assert_eq!(rig.used(), GROWN);
        rig.assert_counts(&engine);
    }
}

impl Rig {
    /// Those of `bios` that were issued, in the order in which they first were.
    fn issued_first(&self, bios: &[u64]) -> Vec<u64> {
        let at = |id: u64| {
            let bio = format!("Issue {{ bio: Bio {{ id: {id},");
            self.log.iter().position(|line| line.starts_with(&bio))
        };
        let mut issued: Vec<_> = bios.iter().filter_map(|&id| Some((at(id)?, id))).collect();
        issued.sort_unstable();
        issued.into_iter().map(|(_, id)| id).collect()
    }
}
