//! Recorded pools of the kernel, played through the command line: at each mark the replay is where the kernel was.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Finished, folder, testdata, thintools};

fn traces(name: &str) -> PathBuf {
    testdata().join("../traces").join(name)
}

fn play(args: &[&str], paths: &[PathBuf]) -> Finished {
    let mut all: Vec<OsString> = vec!["thin_replay".into(), "-q".into()];
    all.extend(args.iter().map(Into::into));
    all.extend(paths.iter().map(Into::into));
    thintools(all).run()
}

/// Plays a recording, with the report as JSON.
fn play_recording(name: &str, sizes: &[&str]) -> serde_json::Value {
    let place = traces("kernel").join(name);
    let entries = std::fs::read_dir(&place).expect("a recording");
    let paths = entries.map(|entry| entry.expect("readable").path());
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.to_string_lossy().contains(".blktrace."))
        .collect();
    paths.sort();
    let mut args = vec!["--create", "--metadata-size", "4m", "--json", "-"];
    // To the block of metadata: the kernel inserted in the same order.
    args.extend(["--metadata-tolerance", "0"]);
    args.extend(["--expect", place.to_str().expect("plain")]);
    args.extend(sizes);
    let played = play(&args, &paths);
    assert_eq!(played.code, Some(0), "{name}: {}", played.out());
    let json: serde_json::Value = serde_json::from_str(&played.out()).expect("JSON");
    json[0].clone()
}

/// How often the kernel called a function until a mark.
fn count(name: &str, mark: &str, function: &str) -> u64 {
    let path = traces("kernel")
        .join(name)
        .join(format!("counts-{mark}.txt"));
    let text = std::fs::read_to_string(path).expect("counts");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("p_{function} ")));
    line.expect("counted").trim().parse().expect("a number")
}

#[test]
fn snapshots_of_snapshots_and_reused_ids_end_as_in_the_kernel() {
    play_recording(
        "snapshots",
        &["--data-size", "256m", "--max-sectors", "254"],
    );
}

#[test]
fn a_full_pool_ends_as_in_the_kernel() {
    play_recording("space-queue", &["--data-size", "4m", "--low-water", "8"]);
    let sizes = ["--data-size", "2m", "--feature", "error_if_no_space"];
    play_recording("space-error", &sizes);
}

#[test]
fn external_origins_end_as_in_the_kernel() {
    let last = "again";
    for (name, sizes) in [
        ("origin", &["--data-size", "64m"][..]),
        (
            "origin-skip",
            &["--data-size", "64m", "--feature", "skip_block_zeroing"],
        ),
    ] {
        let report = play_recording(name, sizes);
        let mapped = count(name, last, "process_prepared_mapping");
        assert_eq!(count(name, last, "dm_thin_insert_block"), mapped, "{name}");
        assert_eq!(report["input"]["map_calls"], count(name, last, "thin_map"));
    }
}

#[test]
fn snapshots_of_devices_with_an_external_origin_end_as_in_the_kernel() {
    let sizes = [
        "--block-size",
        "192k",
        "--data-size",
        "192m",
        "--max-sectors",
        "128",
        "--verify",
    ];
    play_recording("origin-nested", &sizes);
}

/// Which writes fill a block depends on where the kernel cuts them; the calls of its map function say where.
#[test]
fn requests_are_cut_where_the_kernel_cuts_them() {
    for (name, most) in [
        ("large-default", "128"),
        ("large-256", "512"),
        ("large-1280", "2560"),
    ] {
        let sizes = [
            "--block-size",
            "192k",
            "--data-size",
            "96m",
            "--max-sectors",
            most,
        ];
        let report = play_recording(name, &sizes);
        let work = |what: &str| report["work"][what].as_u64().expect("a number");
        let of_kernel = |function| count(name, "snapshot", function);
        assert_eq!(
            report["input"]["map_calls"],
            of_kernel("thin_map"),
            "{name}"
        );
        let new = work("zeroed") + work("overwritten") + work("copies");
        assert_eq!(new, of_kernel("process_prepared_mapping"), "{name}");
        assert_eq!(work("overwritten") > 0, most != "128", "{name}");
    }
}

#[test]
fn discards_that_are_not_passed_down_or_not_taken_end_as_in_the_kernel() {
    let sizes = ["--data-size", "64m", "--feature", "no_discard_passdown"];
    play_recording("no-passdown", &sizes);
    let sizes = ["--data-size", "64m", "--feature", "ignore_discard"];
    play_recording("ignore", &sizes);
}

#[test]
fn devices_in_use_together_end_as_in_the_kernel() {
    play_recording("together", &["--data-size", "256m"]);
}

const ORACLE: [&str; 6] = [
    "--map",
    "254:1=0:2g",
    "--data-size",
    "1g",
    "--metadata-size",
    "16m",
];

/// blkparse's text has no messages; the file beside it has those of the binary trace.
#[test]
fn text_with_its_events_beside_it_ends_as_in_the_kernel() {
    let (place, events) = (traces("oracle"), traces("oracle/thin.events"));
    let mut args = ORACLE.to_vec();
    args.extend(["--events", events.to_str().expect("plain")]);
    args.extend(["--expect", place.to_str().expect("plain")]);
    let played = play(&args, &[place.join("thin.blkparse.txt.zst")]).expect(0);
    assert!(
        played.out().contains("10 files, no difference"),
        "{}",
        played.out()
    );
}

#[test]
fn what_differs_is_told_with_device_and_values_and_the_exit_status_is_6() {
    let place = traces("oracle");
    let status = place.join("status-2-mixed.txt");
    let dump = place.join("phase-2-mixed.xml.gz");
    let status = format!("1-provision={}", status.display());
    let dump = format!("1-provision={}", dump.display());
    let missing = format!("no-such-mark={}", place.join("status-5-ext4.txt").display());
    let mut args = ORACLE.to_vec();
    args.extend(["--expect", &status, "--expect", &dump]);
    let played = play(&args, &[place.join("thin.blktrace.0.zst")]).expect(6);
    for text in [
        "1-provision: pool, data blocks in use: ",
        "1-provision: 254:1, mapped sectors: ",
        "1-provision: thin device 0, block",
        "mapped was expected, unmapped found",
    ] {
        assert!(
            played.out().contains(text),
            "no {text:?} in {}",
            played.out()
        );
    }
    let mut args = ORACLE.to_vec();
    args.extend(["--expect", &missing]);
    let played = play(&args, &[place.join("thin.blktrace.0.zst")]).expect(6);
    let text = "no-such-mark: trace, mark: such a mark was expected, none found";
    assert!(played.out().contains(text), "{}", played.out());
    let mut args = ORACLE.to_vec();
    let binary = format!(
        "1-provision={}",
        traces("pool/fio-iologs.tar.zst").display()
    );
    args.extend(["--expect", &binary]);
    let played = play(&args, &[place.join("thin.blktrace.0.zst")]).expect(5);
    let text = "fio-iologs.tar.zst has no line of dmsetup status";
    assert!(played.stderr.contains(text), "{}", played.stderr);
}

fn unpack(archive: &str, place: &Path) {
    let tar = Command::new("tar")
        .args(["-I", "zstd", "-C"])
        .arg(place)
        .arg("-xf")
        .arg(traces(archive))
        .status();
    assert!(tar.expect("tar runs").success());
}

/// The same workload seen as binary, dump and text: its thin device ends with the mappings that the kernel's metadata has.
#[test]
fn one_workload_ends_as_in_the_kernel_in_every_form() {
    let place = folder();
    unpack("pool/blktrace-binary.tar.zst", place.path());
    let meta = traces("pool/meta-after.img.zst");
    let dump = place.path().join("after.xml");
    let args: [OsString; 4] = ["thin_dump".into(), "-o".into(), (&dump).into(), meta.into()];
    thintools(args).run().expect(0);
    let events = place.path().join("events");
    std::fs::write(&events, "99999 phase-end after\n").expect("written");
    let expect = format!("after={}", dump.display());
    for path in [
        place.path().join("dm-1.blktrace.0"),
        traces("pool/merged-thin1.blktrace-dump.zst"),
        traces("pool/blkparse-thin1.txt.zst"),
    ] {
        let args = [
            "--map",
            "253:1=1:512m",
            "--data-size",
            "512m",
            "--events",
            events.to_str().expect("plain"),
            "--expect",
            &expect,
        ];
        play(&args, &[path]).expect(0);
    }
    for name in ["dm-0.blktrace.0", "vda.blktrace.0", "vdb.blktrace.0"] {
        play(&[], &[place.path().join(name)]).expect(0);
    }
    for kind in ["pool", "vda-metadata", "vdb-data"] {
        for name in [
            format!("pool/merged-{kind}.blktrace-dump.zst"),
            format!("pool/blkparse-{kind}.txt.zst"),
        ] {
            play(&[], &[traces(&name)]).expect(0);
        }
    }
}

/// The log of the oracle's first phase has no messages; what it maps is what the kernel had then.
#[test]
fn logs_of_fio_are_replayed() {
    let place = folder();
    let events = place.path().join("events");
    std::fs::write(&events, "99999 phase-end 1-provision\n").expect("written");
    let dump = traces("oracle/phase-1-provision.xml.gz");
    let dump = format!("1-provision={}", dump.display());
    let mut args = vec!["--map", "/dev/mapper/thin=0:2g"];
    args.extend(&ORACLE[2..]);
    args.extend([
        "--events",
        events.to_str().expect("plain"),
        "--expect",
        &dump,
    ]);
    let played = play(&args, &[traces("oracle/fio-v3.iolog")]).expect(0);
    let status = std::fs::read_to_string(traces("oracle/status-1-provision.txt"));
    let status = status.expect("a status");
    let thin = status.lines().nth(1).expect("a thin device");
    assert!(played.out().contains(thin), "{}", played.out());
    unpack("pool/fio-iologs.tar.zst", place.path());
    for entry in std::fs::read_dir(place.path().join("iologs")).expect("logs") {
        play(&[], &[entry.expect("readable").path()]).expect(0);
    }
}

#[test]
fn what_is_read_before_it_is_written_is_there_with_prefill() {
    let place = folder();
    let trace = place.path().join("trace");
    let text = "fio version 3 iolog\n0 d add\n1 d open\n10 d read 0 131072\n20 d write 131072 65536\n\
                30 d read 131072 65536\n40 d write 0 4096\n50 d close\n";
    std::fs::write(&trace, text).expect("written");
    let report = |args: &[&str]| {
        let mut all = vec!["--json", "-", "--data-size", "1g"];
        all.extend(args);
        let json = play(&all, std::slice::from_ref(&trace)).expect(0).out();
        serde_json::from_str::<serde_json::Value>(&json).expect("JSON")[0].clone()
    };
    let without = report(&[]);
    assert!(without["prefilled"].is_null());
    assert_eq!(without["space"]["used_data_blocks"], 2);
    let with = report(&["--prefill", "read-before-write"]);
    assert_eq!(with["prefilled"]["blocks"], 2);
    assert_eq!(with["space"]["used_data_blocks"], 3);
    assert_eq!(with["work"]["overwritten"], 1);
    assert_eq!(with["work"]["zeroed"], 0);
    play(&["--prefill", "read-before-write"], &["-".into()])
        .expect(1)
        .expect_stderr(&["cannot be read twice", "write the trace to a file"]);
}

/// A seed varies the modelled latencies, and so the order in which requests end.
#[test]
fn another_seed_gives_another_report_and_the_same_mappings() {
    let place = traces("oracle");
    let run = |seed| {
        let mut args = ORACLE.to_vec();
        args.extend(["--seed", seed, "--json", "-"]);
        args.extend(["--expect", place.to_str().expect("plain")]);
        play(&args, &[place.join("thin.blktrace.0.zst")])
            .expect(0)
            .out()
    };
    assert_eq!(run("1"), run("1"));
    assert_ne!(run("1"), run("2"));
    // The modelled device is the same.
    let half = |report: &str| {
        let report: serde_json::Value = serde_json::from_str(report).expect("JSON");
        report[0]["latency"]["mapped"]["p50"]
            .as_u64()
            .expect("a number")
    };
    let (plain, varied) = (half(&run("0")), half(&run("1")));
    assert!(
        varied.abs_diff(plain) < plain / 4,
        "{varied} ns by the seed 1, {plain} ns without"
    );
}
