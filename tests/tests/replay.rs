//! Traces of the kernel's own pools, played through the engine: it ends where the kernel ended.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use flate2::read::GzDecoder;
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::pdata::txn::LockScheme;
use thintools::pool::{Features, PoolTable, Settings};
use thintools::replay::{DeviceModel, PlayOptions, Player, open, play};
use thintools::thin::PoolMetadata;
use thintools::tools::check::{CheckOptions, check};
use thintools::units::{ThinBlock, ThinId};

use crate::support::{Image, testdata};

/// Beside the metadata.
const ORACLE: &str = "../traces/oracle";
const PHASES: [&str; 5] = [
    "1-provision",
    "2-mixed",
    "3-breaksharing",
    "4-discard",
    "5-ext4",
];

fn file(name: &str) -> Vec<u8> {
    std::fs::read(testdata().join(ORACLE).join(name)).expect("a file of the trace")
}

/// For each device the virtual blocks that are mapped, and which of them another device has, too.
type Sets = BTreeMap<u64, (BTreeSet<u64>, BTreeSet<u64>)>;

fn sets(pool: &PoolMetadata) -> Sets {
    let mut users: BTreeMap<u64, u32> = BTreeMap::new();
    let mut mappings: BTreeMap<u64, BTreeMap<u64, u64>> = BTreeMap::new();
    for id in pool.devices().expect("read") {
        let of_device = mappings.entry(id.0).or_default();
        let mut from = 0;
        while let Some((block, at)) = pool.next_block(id, ThinBlock(from)).expect("read") {
            of_device.insert(block.0, at.block.0);
            *users.entry(at.block.0).or_default() += 1;
            from = block.0 + 1;
        }
    }
    let sets = mappings.into_iter().map(|(id, of_device)| {
        let is_shared = |&(_, data): &(&u64, &u64)| users[data] > 1;
        let shared = of_device.iter().filter(is_shared).map(|(&b, _)| b);
        (id, (of_device.keys().copied().collect(), shared.collect()))
    });
    sets.collect()
}

/// What the kernel's dump after a phase says.
fn sets_of_dump(phase: &str) -> Sets {
    let packed = file(&format!("phase-{phase}.xml.gz"));
    let mut xml = String::new();
    GzDecoder::new(&packed[..])
        .read_to_string(&mut xml)
        .expect("text");
    // The kernel's metadata snapshots do not say how large the data device is.
    let xml = xml.replace("nr_data_blocks=\"0\"", "nr_data_blocks=\"16384\"");
    let image = Image::restored(&xml, 4096);
    let bytes = std::fs::read(image.path()).expect("restored");
    let engine = Arc::new(RamEngine::from_bytes(bytes));
    sets(&PoolMetadata::open(engine, 16 << 20).expect("sound"))
}

fn options(scheme: LockScheme) -> PlayOptions {
    let table = PoolTable {
        metadata_device: "metadata".into(),
        data_device: "data".into(),
        block_sectors: 128,
        low_water_blocks: 1024,
        features: Features::default(),
    };
    PlayOptions {
        settings: Settings {
            scheme,
            ..Settings::new(table)
        },
        data_blocks: 16_384,
        max_sectors: None,
        cpus: 2,
        device: DeviceModel::default(),
        devices: BTreeMap::from([("254:1".into(), (ThinId(0), Some(4_194_304)))]),
        makes_devices: false,
    }
}

/// Plays what was recorded of the kernel's pool, and compares at each of its five marks.
fn plays_as_the_kernel(trace: &str, scheme: LockScheme) {
    let case = format!("{trace}, {scheme}");
    let path: PathBuf = testdata().join(ORACLE).join(trace);
    let (_, mut reader) = open(&[path], None, false).expect("a trace");
    let engine = Arc::new(RamEngine::new(4096));
    let mut metadata = PoolMetadata::format(Arc::clone(&engine) as _, 128, 16 << 20).expect("room");
    metadata.resize_data(16_384).expect("room");
    metadata.commit().expect("memory");
    let mut player = Player::new(metadata, options(scheme)).expect("started");
    player.make_mapped_devices().expect("made");
    let mut found: Vec<Sets> = Vec::new();
    let mut at_control = |player: &Player| {
        if player.marks().len() > found.len() {
            found.push(player.pool().inspect(sets));
        }
        Ok(())
    };
    let played = play(
        &mut player,
        &mut *reader,
        Vec::new(),
        None,
        &mut at_control,
        &Silent,
    );
    assert!(played.expect("played"), "{case}");
    assert_eq!(player.marks().len(), PHASES.len(), "{case}");
    for ((mark, phase), found) in player.marks().iter().zip(PHASES).zip(&found) {
        let expected = String::from_utf8(file(&format!("status-{phase}.txt"))).expect("text");
        let mut lines = expected.lines();
        // Metadata in use is equal, too, although the order in which concurrent writes are mapped is not: it decides where nodes split.
        assert_eq!(Some(&*mark.pool), lines.next(), "{case}, {phase}");
        let thin = mark.thins.values().next().map(String::as_str);
        assert_eq!(thin, lines.next(), "{case}, {phase}");
        assert!(
            *found == sets_of_dump(phase),
            "{case}, {phase}: other mappings"
        );
    }
    let (input, work) = (player.input(), player.work());
    assert_eq!(input.map_calls, 7411, "{case}");
    assert_eq!(work.copies, 871, "{case}");
    assert_eq!(work.zeroed + work.overwritten, 2515, "{case}");
    assert_eq!(work.overwritten, 369, "{case}");
    drop(player);
    let report = check(&*engine, &CheckOptions::default(), &Silent).expect("memory");
    assert!(
        report.report.damages.is_empty(),
        "{case}: {:?}",
        report.report.damages
    );
}

#[test]
fn a_recorded_pool_ends_where_the_kernel_ended() {
    for trace in ["thin.blktrace.0.zst", "thin.blkparse-d.bin.gz"] {
        plays_as_the_kernel(trace, LockScheme::Kernel);
    }
}

#[test]
fn a_recorded_pool_ends_where_the_kernel_ended_in_every_scheme() {
    for scheme in LockScheme::ALL {
        plays_as_the_kernel("thin.blktrace.1.zst", scheme);
    }
}
