//! Traces of the kernel's own pools, played through the engine: it ends where the kernel ended.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
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

use crate::support::{Image, folder, testdata, thintools};

/// Beside the metadata.
pub(crate) const ORACLE: &str = "../traces/oracle";
pub(crate) const PHASES: [&str; 5] = [
    "1-provision",
    "2-mixed",
    "3-breaksharing",
    "4-discard",
    "5-ext4",
];

pub(crate) fn file(name: &str) -> Vec<u8> {
    std::fs::read(testdata().join(ORACLE).join(name)).expect("a file of the trace")
}

/// For each device the virtual blocks that are mapped, and which of them another device has, too.
pub(crate) type Sets = BTreeMap<u64, (BTreeSet<u64>, BTreeSet<u64>)>;

pub(crate) fn sets(pool: &PoolMetadata) -> Sets {
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
pub(crate) fn sets_of_dump(phase: &str) -> Sets {
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

pub(crate) fn options(scheme: LockScheme) -> PlayOptions {
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
        seed: 0,
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

#[test]
fn the_same_trace_gives_the_same_report() {
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let place = folder();
    let made = place.path().join("made");
    let reports = [0, 1].map(|_| {
        let args: [&OsStr; 10] = [
            "thin_replay".as_ref(),
            "-q".as_ref(),
            "--map".as_ref(),
            "254:1=0:2g".as_ref(),
            "--locks".as_ref(),
            "a,optimistic".as_ref(),
            "--json".as_ref(),
            "-".as_ref(),
            trace.as_ref(),
            "--lenient".as_ref(),
        ];
        thintools(args).run().expect(0).out()
    });
    assert_eq!(reports[0], reports[1]);
    let json: serde_json::Value = serde_json::from_str(&reports[0]).expect("JSON");
    assert_eq!(json[0]["work"]["copies"], 871);
    assert_eq!(json[1]["setup"]["locks"], "optimistic");
    // What is kept is a pool that the other commands take, and it is kept once.
    let keep = || {
        let args: [&OsStr; 6] = [
            "thin_replay".as_ref(),
            "--map".as_ref(),
            "254:1=0:2g".as_ref(),
            "-o".as_ref(),
            made.as_ref(),
            trace.as_ref(),
        ];
        thintools(args).run()
    };
    keep().expect(0);
    assert_eq!(crate::support::check(&[], &made).code, Some(0));
    keep()
        .expect(1)
        .expect_stderr(&["exists, and is not overwritten"]);
}

#[test]
fn a_dry_run_says_what_is_in_a_trace() {
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let args = |more: &[&str]| {
        let mut all: Vec<&OsStr> = vec!["thin_replay".as_ref(), "--dry-run".as_ref()];
        all.extend(more.iter().map(OsStr::new));
        all.push(trace.as_ref());
        thintools(all).run().expect(0)
    };
    let told = "blktrace: it begins with a record of blktrace";
    let out = args(&[]).expect_stderr(&[told]).out();
    for line in [
        "dry run   blktrace; nothing was played",
        "trace     6677 requests in 21.1 s, 7 control events, 7454 other records, 0 left out, 0 lost",
        "discard             15 requests, 493.8 MiB",
    ] {
        assert!(out.contains(line), "{out}");
    }
    let part = args(&["--start", "5s", "--skip", "read,discard", "--limit", "300"]).out();
    assert!(part.contains("trace     300 requests in "), "{part}");
    assert!(!part.contains("\nread"), "{part}");
}

#[test]
fn what_cannot_be_played_is_an_error() {
    let place = folder();
    let file = |name: &str, bytes: &[u8]| {
        let path = place.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path
    };
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let events = file("events", b"1.0 activate here\n");
    for (args, path, code, text) in [
        (vec![], file("empty", b""), 1, "is empty"),
        (vec![], file("noise", &[0xa5; 5000]), 1, "name its format"),
        (vec![], place.path().join("none"), 1, "cannot open"),
        (
            vec!["--metadata-size", "1t"],
            trace.clone(),
            1,
            "of metadata at most",
        ),
        (
            vec!["--block-size", "65k"],
            trace.clone(),
            1,
            "data blocks of 130 sectors",
        ),
        (
            vec!["--feature", "magic"],
            trace.clone(),
            1,
            "feature requested",
        ),
        (vec!["--map", "1=x"], trace.clone(), 2, "DEV=ID"),
        (vec!["--cpus", "0"], trace.clone(), 2, "1..=1024"),
        (vec!["--only", "trim"], trace.clone(), 2, "is none of read"),
        (vec!["--locks", "c"], trace.clone(), 2, "locking scheme"),
        (
            vec!["--events", events.to_str().expect("plain")],
            trace.clone(),
            5,
            "activate here",
        ),
    ] {
        let mut all: Vec<&OsStr> = vec!["thin_replay".as_ref(), "-q".as_ref()];
        all.extend(args.iter().map(OsStr::new));
        all.push(path.as_ref());
        thintools(all).run().expect(code).expect_stderr(&[text]);
    }
}
