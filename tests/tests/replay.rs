//! Traces of the kernel's own pools, played through the engine: it ends where the kernel ended.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
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

use crate::support::{BINARY, Image, folder, program, testdata, thintools};

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
    assert!(out.contains("requests of 254:1"), "{out}");
    let part = args(&["--start", "0.05m", "--end", "3.5"]).out();
    assert!(part.contains("nothing was played"), "{part}");
    let part = args(&["--start", "5s", "--skip", "read,discard", "--limit", "300"]).out();
    assert!(part.contains("trace     300 requests in "), "{part}");
    assert!(!part.contains("\nread"), "{part}");
}

#[test]
fn control_events_that_are_wrong_are_told_and_spare_the_replay() {
    let place = folder();
    let (trace, events) = (place.path().join("trace"), place.path().join("events"));
    std::fs::write(
        &trace,
        "  8,0    0        1     0.000000000     1  Q   W 0 + 8 [a]\n\
         \u{20} 8,0    0        0     0.500000000     0  m   N ctl activate x y z\n\
         \u{20} 8,0    0        2     3.000000000     1  Q   W 8 + 8 [a]\n",
    )
    .expect("written");
    std::fs::write(
        &events,
        "1.5 phase-end\n1.5 phase-end a b\n2 ctl phase-end good\n2 hop\n",
    )
    .expect("written");
    let args = ["thin_replay", "-q", "--json", "-", "--events"].map(OsStr::new);
    let found = thintools(args)
        .arg(&events)
        .arg(&trace)
        .run()
        .expect(0)
        .out();
    let report: serde_json::Value = serde_json::from_str(&found).expect("JSON");
    let report = &report[0];
    assert_eq!(report["input"]["refused_controls"], 3);
    assert_eq!(report["input"]["unknown_controls"], 1);
    assert_eq!(report["marks"][0]["name"], "good");
    for text in [
        "\\\"activate x y z\\\" was refused: its arguments are wrong; it is activate MAJ:MIN ID",
        "\\\"phase-end a b\\\" was refused: its arguments are wrong; it is phase-end NAME",
    ] {
        assert!(found.contains(text), "{found}");
    }
}

#[test]
fn a_report_that_no_file_takes_is_printed_all_the_same() {
    let place = folder();
    let (json, csv) = (place.path().join("r.json"), place.path().join("r.csv"));
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    // Files of 4 KiB at most, which is no reason to be killed.
    let script = "trap '' XFSZ; ulimit -f 8; umask 027; exec \"$0\" \"$@\"";
    let limited = program("sh", ["-c", script, BINARY, "thin_replay", "-q", "--json"])
        .arg(&json)
        .arg(&trace)
        .run()
        .expect(1);
    let named = format!("cannot write {}", json.display());
    let limited = limited.expect_stderr(&[&named]);
    assert!(limited.out().contains("VERDICT"), "{}", limited.out());
    assert!(
        !limited.stderr.contains(".thintools-"),
        "{}",
        limited.stderr
    );
    assert!(!json.exists());
    // The umask is respected.
    let script = "umask 027; exec \"$0\" \"$@\"";
    program("sh", ["-c", script, BINARY, "thin_replay", "-q", "--csv"])
        .arg(&csv)
        .arg(&trace)
        .run()
        .expect(0);
    let mode = std::fs::metadata(&csv)
        .expect("written")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn marks_of_one_name_are_dumped_with_numbers_into_a_new_folder() {
    let place = folder();
    let (trace, events) = (place.path().join("trace"), place.path().join("events"));
    std::fs::write(
        &trace,
        "  8,0    0        1     0.000000000     1  Q   W 0 + 8 [a]\n",
    )
    .expect("written");
    std::fs::write(
        &events,
        "0 activate 8:0 0 4096\n0 create_thin 0\n1 phase-end a\n2 phase-end a\n3 phase-end a.2\n",
    )
    .expect("written");
    let dumps = place.path().join("made/for/this");
    let replay = || {
        thintools(["thin_replay", "-q", "--dump-at-marks"])
            .arg(&dumps)
            .arg("--events")
            .arg(&events)
            .arg(&trace)
            .run()
    };
    replay().expect(0);
    let mut names: Vec<_> = std::fs::read_dir(&dumps)
        .expect("made")
        .map(|entry| entry.expect("readable").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["a.2.2.xml", "a.2.xml", "a.xml"]);
    replay().expect(1).expect_stderr(&["is not empty"]);
}

#[test]
fn the_manual_page_of_split_has_its_flags_as_flags() {
    let place = folder();
    thintools(["man".as_ref(), place.path().as_os_str()])
        .run()
        .expect(0);
    let page = std::fs::read_to_string(place.path().join("thin_replay.8")).expect("written");
    assert!(page.contains("\\-o, \\-\\-output <DIR>"), "{page}");
    for wrong in ["<LENIENT>", "<QUIET>", "<lenient>"] {
        assert!(!page.contains(wrong), "{wrong}");
    }
    // The example is one that can be used.
    let from = page.find("csv:dev=0").expect("an example");
    let spec: String = page[from..]
        .chars()
        .take_while(|c| !c.is_whitespace())
        .filter(|&c| c != '\\')
        .collect();
    let spec = spec.trim_end_matches([',', '.']);
    let place = folder();
    let trace = place.path().join("trace");
    std::fs::write(&trace, "1,W,0,4096,1\n1,R,0,4096,2\n").expect("written");
    thintools(["thin_replay", "-q", "--dry-run", "--format", spec])
        .arg(&trace)
        .run()
        .expect(0);
}

#[test]
fn one_large_discard_says_nothing_of_writes() {
    let place = folder();
    let trace = place.path().join("trace");
    let writes: String = (0..20)
        .map(|i| format!("1,W,0,65536,{}\n", 2 + i * 10))
        .collect();
    std::fs::write(&trace, format!("{writes}1,D,0,1099511627776,1000\n")).expect("written");
    let spec = "csv:dev=0,op=1,off=2,len=3,ts=4:s,read=R,write=W,discard=D";
    let report = thintools(["thin_replay", "-q", "--data-size", "1g", "--format", spec])
        .arg(&trace)
        .run()
        .expect(0)
        .out();
    assert!(report.contains("1 of 20 bios left it, 5"), "{report}");
    assert!(report.contains("bios of discards"), "{report}");
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
    let events = file("events", b"1.0 suspend\nsoon resume\n");
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
            2,
            "data blocks of 130 sectors",
        ),
        (
            vec!["--feature", "magic"],
            trace.clone(),
            2,
            "feature requested",
        ),
        (
            vec!["--block-size", "100k"],
            trace.clone(),
            2,
            "multiple of 64k",
        ),
        (vec!["--format", "foo"], trace.clone(), 2, "is no format"),
        (
            vec!["--format", "csv:x=1"],
            trace.clone(),
            2,
            "x is none of",
        ),
        (vec!["--expect", "nofile"], trace.clone(), 2, "NAME=FILE"),
        (vec!["--expect", "=file"], trace.clone(), 2, "NAME=FILE"),
        (
            vec!["--verify", "--clock", "threads"],
            trace.clone(),
            2,
            "for the virtual clock",
        ),
        (
            vec!["--json", "-", "--csv", "-"],
            trace.clone(),
            2,
            "one form of the report",
        ),
        (
            vec!["--json", "a", "--csv", "a"],
            trace.clone(),
            2,
            "two forms of the report",
        ),
        (
            vec!["--json", "a", "-o", "a"],
            trace.clone(),
            2,
            "for the metadata and for the report",
        ),
        (vec!["--data-size", "0"], trace.clone(), 2, "no room"),
        (vec!["--data-size", "1k"], trace.clone(), 2, "no room"),
        (vec!["--reports", "r"], trace.clone(), 2, "--manifest"),
        (vec!["--resume"], trace.clone(), 2, "--manifest"),
        (vec!["--shard", "1/2"], trace.clone(), 2, "--manifest"),
        (vec!["--start", "0"], trace.clone(), 2, "no interval"),
        (vec!["--start", "1e3"], trace.clone(), 2, "not a number"),
        (vec!["--start", "-1"], trace.clone(), 2, ""),
        (vec!["--map", "1=x"], trace.clone(), 2, "DEV=ID"),
        (vec!["--cpus", "0"], trace.clone(), 2, "1..=1024"),
        (vec!["--only", "trim"], trace.clone(), 2, "is none of read"),
        (vec!["--locks", "c"], trace.clone(), 2, "locking scheme"),
        (
            vec!["--events", events.to_str().expect("plain")],
            trace.clone(),
            5,
            "line 2: \"soon",
        ),
    ] {
        let mut all: Vec<&OsStr> = vec!["thin_replay".as_ref(), "-q".as_ref()];
        all.extend(args.iter().map(OsStr::new));
        all.push(path.as_ref());
        thintools(all).run().expect(code).expect_stderr(&[text]);
    }
}
