//! Reads of a replay find what was written, whatever the order in which things end.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::pdata::txn::LockScheme;
use thintools::pool::Features;
use thintools::replay::{
    PlayOptions, Player, Report, SnapshotSchedule, TraceIo, TraceNotes, TraceOp, open, play,
    side_events,
};
use thintools::thin::PoolMetadata;
use thintools::units::ThinId;

use crate::replay::{ORACLE, Sets, options, sets};
use crate::support::{folder, testdata, thintools};

fn player(mut options: PlayOptions, seed: u64) -> Player {
    options.seed = seed;
    let mut metadata =
        PoolMetadata::format(Arc::new(RamEngine::new(4096)), 128, 16 << 20).expect("room");
    metadata.resize_data(options.data_blocks).expect("room");
    metadata.commit().expect("memory");
    let mut player = Player::new(metadata, options).expect("started");
    player.verify(1).expect("read");
    player.make_mapped_devices().expect("made");
    player
}

/// Everything was as written; what was mapped in the end, and the report.
fn outcome(player: &Player, case: &str) -> (Sets, String) {
    let verified = player.verified().expect("verified");
    assert_eq!(verified.first, [""; 0], "{case}");
    assert!(verified.reads > 0 && verified.blocks > 0, "{case}");
    let report = Report::new(player, player.options(), &TraceNotes::default(), true);
    let json = serde_json::to_string(&report.expect("sound")).expect("JSON");
    (player.pool().inspect(sets), json)
}

fn play_oracle(scheme: LockScheme, seed: u64) -> (Sets, String) {
    let path: PathBuf = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let (_, mut reader) = open(&[path], None, false).expect("a trace");
    let mut player = player(options(scheme), seed);
    let schedule = None::<SnapshotSchedule>;
    let mut nothing = |_: &Player| Ok(());
    play(
        &mut player,
        &mut *reader,
        Vec::new(),
        schedule,
        &mut nothing,
        &Silent,
    )
    .expect("played");
    outcome(&player, &format!("{scheme}, seed {seed}"))
}

#[test]
fn a_recorded_pool_reads_what_was_written_in_every_scheme() {
    for scheme in LockScheme::ALL {
        play_oracle(scheme, 0);
    }
}

/// Requests that overlap, snapshots of snapshots, discards of parts and of wholes, and ids that are used again.
fn play_made_up(features: Features, waits: bool, seed: u64) -> (Sets, String) {
    let mut options = options(LockScheme::Kernel);
    options.settings.table.features = features;
    let device = |id: u64| (format!("d{id}"), (ThinId(id), None));
    options.devices = (0..4).map(device).collect();
    let mut player = player(options, seed);
    let mut random: u64 = 9;
    let mut below = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    let mut used = BTreeSet::new();
    for step in 0..6000_u64 {
        let time_ns = step * 7_000;
        if step % 500 == 499 {
            let (id, origin) = (4 + below(6), below(4));
            let first = match used.insert(id) {
                true => String::new(),
                false => format!("{} delete {id}\n", time_ns as f64 / 1e9),
            };
            let text = format!("{first}{} create_snap {id} {origin}", time_ns as f64 / 1e9);
            for event in side_events(&text).expect("events") {
                player.control(&event).expect("carried out");
            }
        }
        let (op, sector, sectors) = match below(10) {
            0..4 => (TraceOp::Write, below(200) * 64, 8 + below(32) * 8),
            4 => (TraceOp::Write, below(100) * 128, 128),
            5 => (TraceOp::Discard, below(200) * 64, 64 + below(8) * 64),
            6 => (TraceOp::Flush, 0, 0),
            _ => (TraceOp::Read, below(200) * 64, 8 + below(32) * 8),
        };
        let device = below(4);
        let io = TraceIo {
            time_ns,
            sector,
            sectors,
            device: device as u32,
            cpu: below(4) as u16,
            op,
            is_preflush: below(20) == 0 && op != TraceOp::Discard,
            is_fua: below(20) == 0,
        };
        player.io(&format!("d{device}"), &io).expect("played");
        // Of a discard and a write at once either may be last; whoever discards waits for it.
        if waits && op == TraceOp::Discard {
            player.settle().expect("at rest");
        }
    }
    player.finish().expect("committed");
    outcome(&player, &format!("{features:?}, seed {seed}"))
}

#[test]
fn whatever_ends_first_the_same_blocks_are_mapped_and_hold_what_was_written() {
    type Play = Box<dyn Fn(u64) -> (Sets, String)>;
    let features = |skip_block_zeroing, no_discard_passdown| Features {
        skip_block_zeroing,
        no_discard_passdown,
        ..Features::default()
    };
    let plays: [Play; 4] = [
        Box::new(|seed| play_oracle(LockScheme::Kernel, seed)),
        Box::new(move |seed| play_made_up(features(false, false), true, seed)),
        Box::new(move |seed| play_made_up(features(false, true), true, seed)),
        Box::new(move |seed| play_made_up(features(true, false), true, seed)),
    ];
    for (number, play) in plays.iter().enumerate() {
        let (mapped, report) = play(0);
        let mut reports = BTreeSet::from([report]);
        for seed in 1..=4 {
            let (again, report) = play(seed);
            for (id, (blocks, shared)) in &mapped {
                let case = format!("trace {number}, seed {seed}, device {id}");
                let (now, now_shared) = &again[id];
                let differs: Vec<_> = now.symmetric_difference(blocks).collect();
                assert!(differs.is_empty(), "{case}: mapped {differs:?}");
                let differs: Vec<_> = now_shared.symmetric_difference(shared).collect();
                assert!(differs.is_empty(), "{case}: shared {differs:?}");
            }
            assert_eq!(again.len(), mapped.len());
            assert_eq!(play(seed).1, report, "trace {number}, seed {seed}");
            assert!(report.contains(&format!("\"seed\":{seed}")));
            reports.insert(report);
        }
        assert_eq!(reports.len(), 5, "trace {number}: a seed changes nothing");
    }
}

/// Which of them is last differs, but not that it is one of them.
#[test]
fn discards_beside_writes_leave_what_one_of_them_left() {
    for seed in 0..6 {
        play_made_up(Features::default(), false, seed);
    }
}

fn recording(name: &str, args: &[&str]) -> serde_json::Value {
    let place = testdata().join("../traces/kernel").join(name);
    let entries = std::fs::read_dir(&place).expect("a recording");
    let paths = entries.map(|entry| entry.expect("readable").path());
    let is_trace = |path: &PathBuf| path.to_string_lossy().contains(".blktrace.");
    let mut all: Vec<OsString> = ["thin_replay", "-q", "--metadata-size", "4m", "--json", "-"]
        .map(Into::into)
        .into();
    all.extend(args.iter().map(Into::into));
    all.extend(paths.filter(is_trace).map(Into::into));
    let played = thintools(all).run();
    assert_eq!(played.code, Some(0), "{name}: {}", played.out());
    let json: serde_json::Value = serde_json::from_str(&played.out()).expect("JSON");
    json[0].clone()
}

#[test]
fn recorded_pools_of_the_kernel_read_what_was_written() {
    for (name, args) in [
        ("snapshots", &["--data-size=256m", "--max-sectors=254"][..]),
        ("space-queue", &["--data-size=4m"]),
        (
            "space-error",
            &["--data-size=2m", "--feature=error_if_no_space"],
        ),
        ("origin", &["--data-size=64m"]),
        (
            "origin-skip",
            &["--data-size=64m", "--feature=skip_block_zeroing"],
        ),
        (
            "no-passdown",
            &["--data-size=64m", "--feature=no_discard_passdown"],
        ),
        ("ignore", &["--data-size=64m", "--feature=ignore_discard"]),
        ("large-256", &["--data-size=1g", "--block-size=256k"]),
        ("together", &["--data-size=256m"]),
    ] {
        for seed in ["--seed=0", "--seed=7"] {
            let report = recording(name, &[&["--verify", seed], args].concat());
            let verify = &report["verify"];
            assert_eq!(verify["wrong"], 0, "{name}: {verify}");
            assert_ne!(verify["blocks"], 0, "{name}");
            assert_eq!(verify["is_cut_short"], false, "{name}");
        }
    }
    let whole = recording("together", &["--data-size=256m", "--verify"]);
    let part = recording("together", &["--data-size=256m", "--verify=4"]);
    let (whole, part) = (&whole["verify"], &part["verify"]);
    let of = |json: &serde_json::Value| json["blocks"].as_u64().expect("a number");
    assert!((1..of(whole)).contains(&of(part)), "{part}");
    assert_eq!(part["one_of"], 4);
}

#[test]
fn data_that_was_there_before_the_trace_stays() {
    let folder = folder();
    let kept = folder.path().join("metadata");
    let run = |args: &[&str], path: &Path| {
        let mut all: Vec<OsString> = vec!["thin_replay".into(), "-q".into()];
        all.extend(args.iter().map(Into::into));
        all.push(path.into());
        thintools(all).run()
    };
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let map = ["--map=254:1=0:2g", "--data-size=1g", "--verify"];
    let output = format!("--output={}", kept.display());
    let first = run(
        &[&map[..], &["--metadata-size=16m", &output]].concat(),
        &trace,
    );
    assert_eq!(first.code, Some(0), "{}", first.out());
    let input = format!("--metadata={}", kept.display());
    let again = run(&[&map[..], &[&input]].concat(), &trace);
    assert_eq!(again.code, Some(0), "{}", again.out());
    assert!(
        again.out().contains("held what was written"),
        "{}",
        again.out()
    );
    let threads = run(&["--verify", "--clock=threads"], &trace);
    assert_ne!(threads.code, Some(0));
}
