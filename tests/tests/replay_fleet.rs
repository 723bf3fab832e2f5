//! A fleet of volumes: split, played in shards, resumed, and whatever gets in the way.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{BINARY, Finished, folder, program, testdata, thintools};

/// Requests of `volumes` volumes that take turns, in the form of the Alibaba traces; the names are numbers, as there.
fn csv(volumes: u64, rounds: u64) -> String {
    named_csv(
        &(0..volumes).map(|v| v.to_string()).collect::<Vec<_>>(),
        rounds,
    )
}

fn named_csv(volumes: &[String], rounds: u64) -> String {
    let mut text = String::new();
    let mut state = 1u64;
    for round in 0..rounds {
        for (number, volume) in volumes.iter().enumerate() {
            // The first have more to do than the last.
            if number as u64 > 3 && (number as u64 + round).is_multiple_of(3) {
                continue;
            }
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let op = if state >> 63 == 0 { "R" } else { "W" };
            let (offset, length) = ((state >> 40) % 4096 * 4096, 4096 * (1 + (state >> 33) % 40));
            let time = 1_577_808_000_000_046 + round * 500_000 + number as u64;
            writeln!(text, "{volume},{op},{offset},{length},{time}").expect("memory");
        }
    }
    text
}

fn write(path: &Path, text: impl AsRef<[u8]>) {
    fs::write(path, text).expect("written");
}

/// `thin_replay ARGUMENTS` with small pools where it plays.
fn replay<'a>(args: impl IntoIterator<Item = &'a OsStr>) -> Finished {
    let first = ["thin_replay".as_ref()];
    thintools(first.into_iter().chain(args)).run()
}

macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(AsRef::<OsStr>::as_ref(&$arg)),*] };
}

fn split(trace: &Path, output: &Path) -> Finished {
    replay(args![
        "split", "--format", "alibaba", "--output", output, trace
    ])
}

/// Plays a shard of the fleet in `from`.
fn play(from: &Path, reports: &Path, more: &[&str]) -> Finished {
    let manifest = from.join("manifest.jsonl");
    let all = args![
        "--manifest",
        manifest,
        "--reports",
        reports,
        "--data-size",
        "1g",
        "--metadata-size",
        "1m"
    ];
    replay(all.into_iter().chain(more.iter().map(AsRef::as_ref)))
}

fn manifest(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("manifest.jsonl")).expect("a manifest");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("readable").file_name();
    entries
        .map(|entry| name(entry).into_string().expect("plain"))
        .collect()
}

fn report(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let all: Value = serde_json::from_slice(&text).expect("JSON");
    assert_eq!(all.as_array().map(Vec::len), Some(1));
    all[0].clone()
}

/// What two replays of the same requests must agree on.
fn counted(report: &Value) -> Vec<Value> {
    let parts = [
        "is_complete",
        "setup",
        "input",
        "map",
        "work",
        "space",
        "latency",
    ];
    parts.iter().map(|part| report[part].clone()).collect()
}

#[test]
fn a_volume_that_was_split_off_plays_as_its_lines_do() {
    let place = folder();
    let (trace, fleet, reports) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
    );
    let text = csv(300, 12);
    write(&trace, &text);
    split(&trace, &fleet).expect(0).expect_stderr(&[]);
    play(&fleet, &reports, &[]).expect(0);
    let volumes = manifest(&fleet);
    assert_eq!((volumes.len(), names(&reports).len()), (300, 300));
    let mut lines: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in text.lines() {
        let (volume, _) = line.split_once(',').expect("columns");
        lines.entry(volume).or_default().push(line);
    }
    for volume in &volumes {
        let name = volume["volume"].as_str().expect("a name");
        let lines = &lines[name];
        assert_eq!(volume["events"], lines.len(), "{name}");
        let field = |line: &str, at: usize| line.split(',').nth(at).expect("a column").to_owned();
        let number = |line: &str, at: usize| field(line, at).parse::<u64>().expect("a number");
        let reads = lines.iter().filter(|line| field(line, 1) == "R").count();
        assert_eq!(volume["reads"], reads);
        assert_eq!(volume["writes"], lines.len() - reads);
        let end = lines
            .iter()
            .map(|line| (number(line, 2) + number(line, 3)) / 512);
        assert_eq!(volume["end_sector"], end.max().expect("lines"));
        let since = |line: &str| (number(line, 4) - 1_577_808_000_000_046) * 1000;
        assert_eq!(volume["first_ns"], since(lines[0]));
        assert_eq!(volume["last_ns"], since(lines[lines.len() - 1]));
        let file = volume["files"][0].as_str().expect("a file");
        assert_eq!(
            volume["file_bytes"],
            fs::metadata(fleet.join(file)).expect("there").len()
        );
    }
    // A volume that begins later begins later when it is split off, too.
    for name in ["0", "7", "299"] {
        let alone = place.path().join(format!("{name}.csv"));
        let json = place.path().join(format!("{name}.json"));
        write(&alone, lines[name].join("\n") + "\n");
        replay(args![
            "-q",
            "--data-size",
            "1g",
            "--metadata-size",
            "1m",
            "--json",
            json,
            alone
        ])
        .expect(0);
        let volume = volumes
            .iter()
            .find(|v| v["volume"] == name)
            .expect("listed");
        let stem = volume["files"][0]
            .as_str()
            .expect("a file")
            .trim_end_matches(".events.zst");
        let fleet = report(&reports.join(format!("{stem}.json")));
        assert_eq!(counted(&fleet), counted(&report(&json)), "{name}");
    }
}

#[test]
fn control_events_go_with_every_volume() {
    let place = folder();
    let fleet = place.path().join("fleet");
    let trace = testdata().join("../traces/oracle/thin.blktrace.0.zst");
    replay(args!["split", "--output", fleet, trace]).expect(0);
    let volumes = manifest(&fleet);
    assert_eq!(volumes[0]["files"][1], "control.events.zst", "{volumes:?}");
    let play = |name: &str, args: &[&OsStr]| {
        let json = place.path().join(name);
        let size = args![
            "-q",
            "--data-size",
            "1g",
            "--metadata-size",
            "16m",
            "--map",
            "254:1=0:2g",
            "--json",
            json
        ];
        replay(size.into_iter().chain(args.iter().copied())).expect(0);
        report(&json)
    };
    let files = volumes[0]["files"].as_array().expect("files");
    let files: Vec<PathBuf> = files
        .iter()
        .map(|f| fleet.join(f.as_str().expect("a name")))
        .collect();
    let apart = play("apart", &args![files[0], files[1]]);
    let whole = play("whole", &args![trace]);
    assert_eq!(counted(&apart), counted(&whole));
    assert_eq!(apart["marks"], whole["marks"]);
    assert_eq!(apart["work"]["copies"], 871);
}

#[test]
fn shards_together_are_the_fleet_whatever_their_number() {
    let place = folder();
    let (trace, fleet, all) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("all"),
    );
    write(&trace, csv(60, 6));
    split(&trace, &fleet).expect(0);
    play(&fleet, &all, &[]).expect(0);
    let whole = names(&all);
    assert_eq!(whole.len(), 60);
    for count in [3, 100] {
        let apart = place.path().join(format!("apart-{count}"));
        let mut sizes = Vec::new();
        for number in 1..=count {
            let before = if number == 1 { 0 } else { names(&apart).len() };
            // An existing report would be an error: each volume is in one shard.
            play(&fleet, &apart, &["--shard", &format!("{number}/{count}")]).expect(0);
            sizes.push(names(&apart).len() - before);
        }
        assert_eq!(names(&apart), whole, "{count}");
        assert!(
            count > 60 || sizes.iter().all(|&n| (15..=25).contains(&n)),
            "{sizes:?}"
        );
        for name in &whole {
            let same = fs::read(all.join(name)).ok() == fs::read(apart.join(name)).ok();
            assert!(same, "{name} depends on the shards");
        }
    }
    for shard in ["0/3", "4/3", "1", "1/0", "x/y"] {
        play(&fleet, &all, &["--shard", shard])
            .expect(2)
            .expect_stderr(&["I/N"]);
    }
}

#[test]
fn a_replay_is_resumed_and_never_overwrites() {
    let place = folder();
    let (trace, fleet, reports) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
    );
    write(&trace, csv(20, 5));
    split(&trace, &fleet).expect(0);
    play(&fleet, &reports, &["--shard", "1/2"]).expect(0);
    let kept = names(&reports);
    let before: Vec<_> = kept
        .iter()
        .map(|n| fs::read(reports.join(n)).expect("read"))
        .collect();
    // Refused before anything is played.
    play(&fleet, &reports, &[])
        .expect(1)
        .expect_stderr(&["exists", "--resume"]);
    assert_eq!(names(&reports), kept);
    let told = play(&fleet, &reports, &["--resume"]).expect(0).out();
    assert!(told.contains("10 played, 10 had a report"), "{told}");
    assert_eq!(names(&reports).len(), 20);
    let after: Vec<_> = kept
        .iter()
        .map(|n| fs::read(reports.join(n)).expect("read"))
        .collect();
    assert!(before == after, "a finished report was written again");
    let told = play(&fleet, &reports, &["--resume"]).expect(0).out();
    assert!(told.contains("0 played, 20 had a report"), "{told}");
    // Other options have other reports, however they are run.
    let other = ["--resume", "--block-size", "128k", "--cache=1m,2m"];
    play(&fleet, &reports, &other).expect(1).expect_stderr(&[
        "other options (--data-size=1g --metadata-size=1m)",
        "remove it",
    ]);
    let elsewhere = place.path().join("elsewhere");
    play(&fleet, &elsewhere, &other[1..]).expect(0);
    let told = play(
        &fleet,
        &elsewhere,
        &[&other[..], &["--jobs=1", "-q"]].concat(),
    );
    assert!(told.expect(0).out().contains("0 played, 20 had a report"));
    play(&fleet, &elsewhere, &["--resume"])
        .expect(1)
        .expect_stderr(&["--block-size=128k --cache=1m --cache=2m --data-size=1g"]);
    // What is no report is not taken for one.
    let first = reports.join(kept.first().expect("one"));
    write(&first, "[]");
    play(&fleet, &reports, &["--resume"])
        .expect(5)
        .expect_stderr(&["remove it"]);
}

#[test]
fn an_interrupted_replay_keeps_what_is_finished() {
    let place = folder();
    let (trace, fleet, reports) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
    );
    write(&trace, csv(400, 40));
    split(&trace, &fleet).expect(0);
    let mut child = Command::new(BINARY)
        .args(args![
            "thin_replay",
            "-q",
            "--jobs",
            "1",
            "--data-size",
            "1g",
            "--metadata-size",
            "1m",
            "--manifest",
            fleet.join("manifest.jsonl"),
            "--reports",
            reports
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    let finished = || {
        let entries = fs::read_dir(&reports).into_iter().flatten().flatten();
        entries
            .filter(|e| e.path().extension() == Some("json".as_ref()))
            .count()
    };
    let end = Instant::now() + Duration::from_secs(60);
    while finished() < 3 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    program("kill", ["-INT", &child.id().to_string()])
        .run()
        .expect(0);
    let code = child.wait().expect("ended").code();
    let count = names(&reports).len();
    assert_eq!(finished(), count, "something beside reports is left");
    assert!((3..=400).contains(&count));
    assert_eq!(code, Some(if count == 400 { 0 } else { 130 }));
    play(&fleet, &reports, &["--resume"]).expect(0);
    assert_eq!(names(&reports).len(), 400);
}

#[test]
fn volumes_of_one_pool_share_it() {
    let place = folder();
    let (trace, fleet, reports, pools) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
        place.path().join("pools"),
    );
    write(&trace, csv(5, 10));
    split(&trace, &fleet).expect(0);
    write(&pools, "# volume and pool\n0 both\n3\tboth\n\n2  single\n");
    let shown = pools.to_str().expect("plain");
    play(&fleet, &reports, &["--pools", shown]).expect(0);
    let expected = [
        "00001-1.json",
        "00004-4.json",
        "pool-both.json",
        "pool-single.json",
    ];
    assert!(names(&reports).iter().eq(expected), "{:?}", names(&reports));
    let both = report(&reports.join("pool-both.json"));
    // The same lines of the trace, as one.
    let text: Vec<String> = csv(5, 10)
        .lines()
        .filter(|l| l.starts_with("0,") || l.starts_with("3,"))
        .map(Into::into)
        .collect();
    let (alone, json) = (place.path().join("alone"), place.path().join("json"));
    write(&alone, text.join("\n") + "\n");
    replay(args![
        "-q",
        "--data-size",
        "1g",
        "--metadata-size",
        "1m",
        "--json",
        json,
        alone
    ])
    .expect(0);
    assert_eq!(counted(&both), counted(&report(&json)));
    assert_eq!(both["space"]["devices"], 2);
    for (text, fault) in [
        (
            "9 both\n",
            "line 1: \"9 both\": the manifest has no such volume",
        ),
        ("0 a\n0 b\n", "line 2: \"0 b\": the volume stands twice"),
        ("0\n", "no volume and pool"),
        ("0 a/b\n1 a_b\n", "the name of that of \"a/b\""),
    ] {
        write(&pools, text);
        let other = place.path().join("other");
        play(&fleet, &other, &["--pools", shown])
            .expect(5)
            .expect_stderr(&[fault]);
        assert!(!other.exists(), "{text}");
    }
}

#[test]
fn names_of_volumes_are_harmless_and_kept() {
    let place = folder();
    let (trace, fleet, reports) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
    );
    let mut volumes: Vec<String> = [
        "a/b",
        "a_b",
        "a\\b",
        "..",
        ".",
        "../../x",
        "ä\u{202e}ö",
        "-rf",
        "A/b",
        "$(id)",
        "c d",
        "x\"y",
    ]
    .map(Into::into)
    .into();
    volumes.push("n".repeat(255));
    volumes.push("é".repeat(127));
    write(&trace, named_csv(&volumes, 3));
    split(&trace, &fleet).expect(0);
    let listed = manifest(&fleet);
    let found: Vec<&str> = listed
        .iter()
        .map(|v| v["volume"].as_str().expect("text"))
        .collect();
    assert_eq!(
        found.iter().copied().collect::<BTreeSet<_>>(),
        volumes.iter().map(String::as_str).collect()
    );
    let files = names(&fleet);
    assert_eq!(files.len(), volumes.len() + 1);
    assert!(
        files
            .iter()
            .all(|f| f.len() < 110 && f.is_ascii() && !f.starts_with(['.', '-'])),
        "{files:?}"
    );
    assert_eq!(
        names(place.path()),
        ["all.csv", "fleet"].map(String::from).into()
    );
    play(&fleet, &reports, &[]).expect(0);
    assert_eq!(names(&reports).len(), volumes.len());
    // A name that is too long is told with its line, and nothing is left behind.
    write(&trace, named_csv(&["n".repeat(300)], 2));
    let none = place.path().join("none");
    split(&trace, &none)
        .expect(5)
        .expect_stderr(&["line 1", "too long"]);
    assert!(names(&none).is_empty());
}

#[test]
fn thousands_of_volumes_need_few_open_files_and_little_memory() {
    let place = folder();
    let (trace, fleet, reports) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
    );
    // Enough that buffers are written out on the way.
    write(&trace, csv(5000, 700));
    let script = "ulimit -n 64; exec \"$0\" \"$@\"";
    let manifest_path = fleet.join("manifest.jsonl");
    let limited = |more: &[&OsStr]| {
        let all = args!["-c", script, BINARY, "thin_replay"];
        program("sh", all.into_iter().chain(more.iter().copied())).run()
    };
    let finished = limited(&args!["split", "--output", fleet, trace]).expect(0);
    assert!(finished.peak < 300 << 10, "{} KiB", finished.peak);
    let volumes = manifest(&fleet);
    assert_eq!(volumes.len(), 5000);
    let events: u64 = volumes.iter().filter_map(|v| v["events"].as_u64()).sum();
    assert_eq!(events, csv(5000, 700).lines().count() as u64);
    limited(&args![
        "--manifest",
        manifest_path,
        "--shard",
        "7/500",
        "--reports",
        reports,
        "--data-size",
        "1g",
        "--metadata-size",
        "1m"
    ])
    .expect(0);
    assert_eq!(names(&reports).len(), 10);
}

#[test]
fn a_full_disk_leaves_no_manifest() {
    let place = folder();
    let mounted = place.path().join("small");
    fs::create_dir(&mounted).expect("made");
    let mount = args!["-t", "tmpfs", "-o", "size=256k", "tmpfs", mounted];
    if program("mount", mount).run().code != Some(0) {
        println!("skipped: only root can mount the small file system that this takes");
        return;
    }
    let trace = place.path().join("all.csv");
    write(&trace, csv(200, 100));
    let fleet = mounted.join("fleet");
    let finished = split(&trace, &fleet);
    let left = names(&fleet);
    program("umount", [&mounted]).run().expect(0);
    finished
        .expect(1)
        .expect_stderr(&["cannot write", "No space left"]);
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_is_there_is_not_split_over() {
    let place = folder();
    let (trace, fleet) = (place.path().join("all.csv"), place.path().join("fleet"));
    write(&trace, csv(3, 3));
    fs::create_dir(&fleet).expect("made");
    split(&trace, &fleet).expect(0);
    let before = names(&fleet);
    split(&trace, &fleet)
        .expect(1)
        .expect_stderr(&["is not empty"]);
    assert_eq!(names(&fleet), before);
    split(&trace, &trace).expect(1).expect_stderr(&["all.csv"]);
    assert!(fs::read_to_string(&trace).expect("kept") == csv(3, 3));
    // A trace that goes wrong on the way leaves nothing.
    let (broken, none) = (place.path().join("broken.csv"), place.path().join("none"));
    write(&broken, csv(3, 30000) + "1,X,0,512,5\n");
    split(&broken, &none)
        .expect(5)
        .expect_stderr(&["line 90001"]);
    assert!(names(&none).is_empty());
}

#[test]
fn a_manifest_or_file_that_is_wrong_is_an_error() {
    let place = folder();
    let (trace, fleet, reports) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
    );
    write(&trace, csv(3, 30));
    split(&trace, &fleet).expect(0);
    let good = fs::read_to_string(fleet.join("manifest.jsonl")).expect("there");
    let first = good.lines().next().expect("one");
    for (text, fault) in [
        ("{}\n".into(), "line 1"),
        (format!("{good}{first}\n"), "stands twice"),
        (good.replace("00000-0", "../x"), "beside the manifest"),
        (good.replace(".events.zst", ".json"), "beside the manifest"),
        (good.replace("fleet/1", "fleet/2"), "only thintools-fleet/1"),
        ("\0".repeat(50), "line 1"),
    ] {
        write(&fleet.join("manifest.jsonl"), &text);
        play(&fleet, &reports, &[])
            .expect(5)
            .expect_stderr(&[fault]);
        assert!(!reports.exists(), "{fault}");
    }
    write(&fleet.join("manifest.jsonl"), &good);
    // One that is cut off spares the others.
    let cut = fleet.join("00001-1.events.zst");
    let bytes = fs::read(&cut).expect("there");
    write(&cut, &bytes[..bytes.len() - 20]);
    play(&fleet, &reports, &[])
        .expect(5)
        .expect_stderr(&["1: ", "cut off", "1 of 3 pools"]);
    assert_eq!(names(&reports).len(), 2);
    write(&cut, &bytes);
    play(&fleet, &reports, &["--resume"]).expect(0);
    assert_eq!(names(&reports).len(), 3);
}

#[test]
fn a_fleet_whose_reports_have_no_room_counts_them_all() {
    let place = folder();
    let (trace, fleet, reports) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
    );
    write(&trace, csv(6, 4));
    split(&trace, &fleet).expect(0);
    // Files of 4 KiB at most, which is no reason to be killed.
    let script = "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\"";
    program(
        "sh",
        ["-c", script, BINARY, "thin_replay", "-q", "--jobs", "1"],
    )
    .arg("--manifest")
    .arg(fleet.join("manifest.jsonl"))
    .arg("--reports")
    .arg(&reports)
    .run()
    .expect(1)
    .expect_stderr(&["6 of 6 pools have no report"]);
    assert!(names(&reports).is_empty());
}

#[test]
fn reports_of_a_fleet_have_the_names_of_its_volumes_also_in_one_file() {
    let place = folder();
    let (trace, fleet, reports) = (
        place.path().join("all.csv"),
        place.path().join("fleet"),
        place.path().join("reports"),
    );
    write(&trace, csv(3, 200));
    split(&trace, &fleet).expect(0);
    // Too small for what is written.
    let manifest = fleet.join("manifest.jsonl");
    let small = args!["--data-size", "1m", "--feature", "error_if_no_space"];
    let all = args![
        "--metadata-size",
        "1m",
        "--manifest",
        manifest,
        "--reports",
        reports
    ];
    replay(all.into_iter().chain(small)).expect(0);
    let all: Vec<Value> = names(&reports)
        .iter()
        .map(|name| report(&reports.join(name)))
        .collect();
    let joined = place.path().join("joined.json");
    write(&joined, Value::from(all).to_string());
    let merged = replay(args!["merge-reports", "--json", "-", joined])
        .expect(0)
        .out();
    let merged: Value = serde_json::from_str(&merged).expect("JSON");
    assert_eq!(merged[0]["sources"], serde_json::json!(["0", "1", "2"]));
    let first = merged[0]["first_full"].as_str().expect("one is full");
    let verdict = merged[0]["verdicts"][0]["text"].as_str().expect("a text");
    let said = format!(", which is {first}");
    assert!(
        verdict.contains("the first of the pools full after") && verdict.contains(&said),
        "{verdict}"
    );
}
