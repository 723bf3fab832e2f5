//! What the verdicts of a replay say where not all went well: what never ended, what was full, what is not known.

use std::fs;
use std::path::Path;

use thintools::replay::{NoForecast, Report};

use crate::support::{Finished, folder, testdata, thintools};

/// The pool that the kernel's trace was recorded on.
const KERNEL: [&str; 6] = [
    "--data-size",
    "1g",
    "--metadata-size",
    "16m",
    "--map",
    "254:1=0:2g",
];

fn text(path: &Path) -> &str {
    path.to_str().expect("plain")
}

/// Plays the kernel's trace.
fn play(options: &[&str]) -> Finished {
    let trace = testdata().join("../traces/oracle/thin.blktrace.0.zst");
    let args = ["thin_replay", "-q"]
        .into_iter()
        .chain(options.iter().copied());
    thintools(args.chain([text(&trace)])).run()
}

/// Plays it, and gives the text and the report.
fn report(options: &[&str]) -> (String, Report) {
    let place = folder();
    let json = place.path().join("report.json");
    let options: Vec<&str> = options
        .iter()
        .copied()
        .chain(["--json", text(&json)])
        .collect();
    let said = play(&options).expect(0).out();
    (said, of_file(&json))
}

fn of_file(json: &Path) -> Report {
    let json = fs::read(json).expect("written");
    Report::read_all(&mut &json[..])
        .expect("a report")
        .remove(0)
}

/// The verdict on something.
fn verdict<'a>(said: &'a str, topic: &str) -> &'a str {
    let start = format!("VERDICT   {topic} ");
    let line = said.lines().find(|line| line.starts_with(&start));
    line.unwrap_or_else(|| panic!("no verdict on {topic}: {said}"))
}

fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn what_waits_for_space_to_the_end_is_told_and_counts_as_nothing() {
    let (said, report) = report(&[
        "--data-size",
        "40m",
        "--metadata-size",
        "16m",
        "--map",
        "254:1=0:2g",
    ]);
    let waiting = report.map.bios - report.work.completed;
    assert!(waiting > 1000, "{waiting}");
    assert_eq!(report.work.waiting_for_space, waiting);
    let failures = verdict(&said, "failures");
    holds(
        failures,
        &[&format!("{waiting} bios still wait for space at the end")],
    );
    let not_written = report.work.bytes_not_written;
    assert!(not_written > 4 << 20 && not_written < report.input.bytes_written);
    holds(
        verdict(&said, "writes"),
        &[" of 49.3 MiB asked for, of which "],
    );
    // Requests that have no end have no latency.
    let ended: u64 = report
        .latency
        .values()
        .map(|latencies| latencies.len())
        .sum();
    assert!(ended < report.input.requests, "{ended}");
}

#[test]
fn what_waits_for_the_resumption_to_the_end_is_told() {
    let place = folder();
    let events = place.path().join("events");
    fs::write(&events, "10 suspend\n").expect("written");
    let options: Vec<&str> = KERNEL
        .into_iter()
        .chain(["--events", text(&events)])
        .collect();
    let (said, report) = report(&options);
    assert!(report.work.waiting_for_resume > 100);
    assert_eq!(report.work.waiting_for_space, 0);
    holds(
        verdict(&said, "failures"),
        &["bios still wait for the pool's resumption at the end"],
    );
    let threads = [&options[..], &["--clock", "threads"]].concat();
    let (said, _) = self::report(&threads);
    holds(
        verdict(&said, "failures"),
        &["bios still wait for the pool's resumption at the end"],
    );
}

#[test]
fn a_replay_whose_requests_all_end_has_written_what_was_asked_for() {
    let (said, report) = report(&KERNEL);
    let work = &report.work;
    assert_eq!(work.completed, report.map.bios);
    assert_eq!((work.unended(), work.bytes_not_written), (0, 0));
    assert!(!said.contains("VERDICT   failures"), "{said}");
    holds(verdict(&said, "writes"), &["49.3 MiB asked for became "]);
    let threads = [&KERNEL[..], &["--clock", "threads"]].concat();
    assert_eq!(self::report(&threads).1.work.bytes_not_written, 0);
}

#[test]
fn metadata_that_is_full_is_named_and_ends_all_forecasts() {
    let (said, report) = report(&[
        "--data-size",
        "1g",
        "--metadata-size",
        "64k",
        "--map",
        "254:1=0:2g",
    ]);
    let at = report
        .forecast
        .moments
        .metadata_full_ns
        .expect("it was full");
    assert_eq!(report.forecast.metadata.full_at_ns, Some(at));
    assert_eq!(
        report.forecast.none_because,
        Some(NoForecast::MetadataFailed)
    );
    assert_eq!(report.forecast.data.linear_ns, None);
    holds(verdict(&said, "metadata"), &["full after 300.0 ms"]);
    holds(
        verdict(&said, "data"),
        &["no forecast: the metadata failed"],
    );
    holds(
        verdict(&said, "failures"),
        &["bios failed for another reason: the metadata device was full after 300.0 ms"],
    );
    assert!(
        !said.contains("in sight") && !said.contains("another 1"),
        "{said}"
    );
    // Requests that fail at once are not what makes the others fast.
    let ended: u64 = report
        .latency
        .values()
        .map(|latencies| latencies.len())
        .sum();
    assert!(ended + report.work.failed <= report.map.bios, "{ended}");
}

#[test]
fn events_beside_a_trace_make_no_device_of_it_unknown() {
    let place = folder();
    let events = place.path().join("events");
    for (beside, left_out) in [
        ("1 phase-end x\n3 create_snap 1 0\n", 0),
        ("", 0),
        ("0 activate 254:1 0 4194304\n", 6677),
    ] {
        fs::write(&events, beside).expect("written");
        let (_, report) = report(&["--data-size", "1g", "--events", text(&events)]);
        assert_eq!(report.input.out_of_range, left_out, "{beside}");
        // What was left out was not written, nor was it discarded.
        if left_out > 0 {
            assert_eq!(report.work.bytes_not_written, report.input.bytes_written);
            assert_eq!(
                report.input.bytes_discards_left_out,
                report.input.bytes_discarded
            );
            assert!(report.input.bytes_discarded > 0);
        }
    }
}

#[test]
fn the_pool_of_metadata_grows_to_the_data_device_and_does_not_shrink() {
    let place = folder();
    let metadata = place.path().join("metadata");
    let kept = [&KERNEL[..], &["-o", text(&metadata)]].concat();
    play(&kept).expect(0);
    let begin = [
        "--metadata",
        text(&metadata),
        "--map",
        "254:1=0:2g",
        "--data-size",
    ];
    let (said, report) = report(&[&begin[..], &["2g"]].concat());
    assert_eq!(report.setup.data_blocks, 32_768);
    assert_eq!(report.forecast.data.total, 32_768);
    holds(&said, &["pool: 0 4194304 thin-pool ", "/32768 - rw "]);
    play(&[&begin[..], &["512m"]].concat())
        .expect(1)
        .expect_stderr(&[
            "8192 blocks are fewer than the 16384 ",
            "give 2097152s or more",
        ]);
    // Metadata that was damaged before is nobody's defect.
    let mut bytes = fs::read(&metadata).expect("read");
    bytes[7 * 4096..60 * 4096].fill(0x5a);
    fs::write(&metadata, bytes).expect("written");
    let said = play(&begin[..4]);
    let said = said.stderr;
    holds(&said, &["damaged"]);
    assert!(!said.contains("defect"), "{said}");
}

#[test]
fn what_has_no_times_of_its_own_is_not_forecast() {
    let place = folder();
    let [iolog, json] = ["iolog", "json"].map(|name| place.path().join(name));
    let log = testdata().join("../traces/misc/log-writes-ext4.img.xz");
    let lines = (0..200).map(|n| format!("/dev/a write {} 4096\n", n * 65_536));
    let lines = String::from_iter(lines);
    let head = "fio version 2 iolog\n/dev/a add\n/dev/a open\n";
    fs::write(&iolog, format!("{head}{lines}")).expect("written");
    let timed = place.path().join("timed");
    fs::write(
        &timed,
        format!("{head}{}", lines.replace('\n', "\n/dev/a wait 9000\n")),
    )
    .expect("written");
    for (trace, why) in [
        (&log, Some(NoForecast::NoTimes)),
        (&iolog, Some(NoForecast::NoTimes)),
        (&timed, None),
    ] {
        let args = [
            "thin_replay",
            "-q",
            "--data-size",
            "1g",
            text(trace),
            "--json",
            text(&json),
        ];
        let said = thintools(args).run().expect(0).out();
        let report = of_file(&json);
        fs::remove_file(&json).expect("there");
        assert_eq!(report.forecast.none_because, why, "{said}");
        assert_eq!(report.forecast.data.linear_ns.is_some(), why.is_none());
        assert_eq!(
            said.contains("no forecast: the trace has no times"),
            why.is_some(),
            "{said}"
        );
    }
    let threads = [&KERNEL[..], &["--clock", "threads"]].concat();
    let (said, report) = report(&threads);
    assert_eq!(
        report.forecast.none_because,
        Some(NoForecast::SpeedOfReplay)
    );
    assert!(!said.contains("full after another"), "{said}");
}

#[test]
fn the_kinds_of_requests_add_up() {
    let (said, report) = report(&KERNEL);
    let input = &report.input;
    assert_eq!(
        input.reads + input.writes + input.discards + input.lone_flushes(),
        6677
    );
    let line = said
        .lines()
        .find(|line| line.starts_with("input "))
        .expect("a line");
    holds(
        line,
        &["10 of them behind a flush", " 35 flushes without data"],
    );
}

#[test]
fn the_lines_on_locks_agree_with_what_was_left_because_of_them() {
    let (said, report) = report(&KERNEL);
    let slept = report.work.root_waits;
    assert!(slept > 0);
    holds(
        verdict(&said, "locks"),
        &[&format!(
            "; {slept} slept until a commit was over, 3.5 ms in all"
        )],
    );
    holds(
        &said,
        &[&format!(
            " acquisitions, {slept} contended, waited 3.5 ms [virtual]"
        )],
    );
    let (said, report) = self::report(&[&KERNEL[..], &["--locks", "2013"]].concat());
    let busy = report.map.deferred.of(thintools::pool::Reason::RootBusy);
    assert!(busy > 0);
    holds(&said, &[&format!("would block: {busy} root, 0 block")]);
    // What a snapshot had when a block was discarded it need not have at the end.
    holds(
        verdict(&said, "discards"),
        &["were not freed then because a snapshot had them"],
    );
}

#[test]
fn a_report_says_what_it_is_of() {
    let place = folder();
    let metadata = place.path().join("metadata");
    let (said, report) = report(&[&KERNEL[..], &["-o", text(&metadata)]].concat());
    let played = report.played.as_ref().expect("one trace");
    assert!(played.files[0].ends_with("thin.blktrace.0.zst"));
    assert_eq!(played.format, "blktrace");
    let tool = format!("thintools {}", env!("CARGO_PKG_VERSION"));
    assert_eq!(report.tool, tool);
    holds(
        &said,
        &[
            "thin.blktrace.0.zst; format blktrace; thintools ",
            "; seed 0; 4 cpus",
        ],
    );
    holds(
        &said,
        &[
            "device    254:1 is thin device 0; 2.0 GiB\n",
            "model     read 80µs, write 20µs",
        ],
    );
    // Nobody said which device of the pool it is.
    let (said, report) = self::report(&["--metadata", text(&metadata)]);
    let [device] = &report.devices[..] else {
        panic!("{:?}", report.devices);
    };
    assert_eq!(
        (device.id, device.is_made, device.is_size_seen),
        (1, true, true)
    );
    assert!(device.sectors > 0 && device.sectors <= 4_194_304);
    holds(
        &said,
        &[
            "device    254:1 is the new, empty thin device 1; ",
            " how far requests went; --map ",
        ],
    );
    let events = place.path().join("events");
    fs::write(
        &events,
        "4 deactivate 254:1\n5 activate 254:1 7 4096\n5 create_thin 7\n",
    )
    .expect("written");
    let (_, report) = self::report(&[&KERNEL[..], &["--events", text(&events)]].concat());
    let ids: Vec<u64> = report.devices.iter().map(|device| device.id).collect();
    assert_eq!(ids, [0, 7]);
}

#[test]
fn a_sweep_says_what_became_of_each_way() {
    let place = folder();
    let trace = testdata().join("../traces/oracle");
    let expected = |mark: &str, file: &str| format!("{mark}={}", trace.join(file).display());
    let wrong = expected("1-provision", "status-2-mixed.txt");
    let right = expected("2-mixed", "status-2-mixed.txt");
    let sweep = |options: &[&str], code| play(&[&KERNEL[..], options].concat()).expect(code).out();
    let said = sweep(&["--locks", "kernel,a", "--expect", &wrong], 6);
    holds(&said, &["VERDICT    all: 1 files expected, DIFFERENCES: "]);
    let said = sweep(&["--locks", "kernel,a", "--expect", &right, "--verify"], 0);
    holds(
        &said,
        &[
            "VERDICT    all: 1 files expected, no difference; ",
            " held what was written [virtual]",
        ],
    );
    // Who stopped writing is not praised for it.
    let options = [
        "--data-size",
        "30m",
        "--metadata-size",
        "16m",
        "--map",
        "254:1=0:2g",
    ];
    let said = play(&[&options[..], &["--snap-every", "never,2s"]].concat())
        .expect(0)
        .out();
    holds(
        &said,
        &[
            "VERDICT    no snapshots: data full after ",
            "bios still wait for space",
            "full after",
        ],
    );
    holds(
        &said,
        &["NOTE       not compared, since not all was done that was asked for: all\n"],
    );
    assert!(!said.contains("fewest"), "{said}");
    // What was asked comes first.
    let said = sweep(&["--cell-pool", "2,3,64"], 0);
    assert!(
        said.starts_with("VERDICT    cells taken one by one: "),
        "{said}"
    );
    assert!(!said.contains("fewest locks taken"), "{said}");
    // What is equally good is named.
    let said = sweep(&["--locks", "2013,kernel,a,optimistic"], 0);
    holds(
        &said,
        &[
            "fewest bios left to the worker: kernel, a and optimistic with 3472 each; 2013 has most with 3474 [virtual]",
        ],
    );
    assert!(!said.contains("with 3.5 ms; "), "{said}");
    let [json, page] = ["json", "page"].map(|name| place.path().join(name));
    sweep(&["--json", text(&json), "--html", text(&page)], 0);
    // The pool's fill is known at each mark, and is drawn as it was found.
    let report = of_file(&json);
    for mark in &report.marks {
        let is_it = |sample: &&thintools::replay::Sample| sample.time_ns == mark.time_ns;
        let sample = report.timeline.iter().find(is_it).expect("a sample");
        holds(
            &mark.pool,
            &[&format!(" {}/16384 ", sample.used_data_blocks)],
        );
    }
    let page = fs::read_to_string(&page).expect("text");
    let line = page
        .lines()
        .find(|line| line.contains("<path class=\"line s0\""));
    let line = line.expect("a line");
    assert!(
        line.contains('H') && line.contains('V') && !line.contains('L'),
        "{line}"
    );
}

#[test]
fn what_was_interrupted_is_not_compared() {
    let place = folder();
    let [whole, part] = ["whole", "part"].map(|name| place.path().join(name));
    play(&[&KERNEL[..], &["--json", text(&whole)]].concat()).expect(0);
    let json = fs::read_to_string(&whole).expect("text");
    let json = json.replace("\"is_complete\": true", "\"is_complete\": false");
    let json = json.replace("\"requests\": 6677", "\"requests\": 600");
    fs::write(&part, json).expect("written");
    let said = thintools(["thin_replay", "compare", text(&whole), text(&part)])
        .run()
        .expect(0)
        .out();
    assert!(
        said.starts_with("INCOMPLETE  1 of 2 replays were interrupted"),
        "{said}"
    );
    assert!(
        !said.contains("not replays of the same trace") && !said.contains("fewest"),
        "{said}"
    );
}

#[test]
fn events_beside_a_trace_come_by_time_among_its_own() {
    let place = folder();
    let events = place.path().join("events");
    // The trace has no request between 0.8 s and its own mark at 2 s.
    fs::write(&events, "1 phase-end before\n2.1 phase-end behind\n").expect("written");
    let options = ["--limit", "1500", "--events", text(&events)];
    let (_, report) = report(&[&KERNEL[..], &options].concat());
    let marks = report.marks.iter();
    let marks: Vec<(&str, u64)> = marks
        .map(|mark| (&*mark.name, mark.time_ns / 100_000_000))
        .collect();
    assert_eq!(marks, [("before", 10), ("1-provision", 19), ("behind", 21)]);
}

#[test]
fn a_new_size_of_the_data_device_counts_from_the_next_resumption_on() {
    let place = folder();
    let events = place.path().join("events");
    let resized = "2.5 resize 4194304\n3 phase-end a\n3.1 suspend\n3.2 resume\n3.3 phase-end b\n";
    fs::write(&events, resized).expect("written");
    let (_, report) = report(&[&KERNEL[..], &["--events", text(&events)]].concat());
    let pool_at = |name: &str| {
        let mark = report.marks.iter().find(|mark| mark.name == name);
        &*mark.expect("it was there").pool
    };
    let (a, b) = (pool_at("a"), pool_at("b"));
    assert!(a.starts_with("0 2097152 ") && a.contains("/16384 "), "{a}");
    assert!(b.starts_with("0 4194304 ") && b.contains("/32768 "), "{b}");
}

#[test]
fn a_report_of_a_replay_with_snapshots_is_compared_and_merged() {
    let place = folder();
    let [first, second] = ["first.json", "second.json"].map(|name| place.path().join(name));
    let snapped = ["--snap-every", "1.5s", "--json", text(&first)];
    play(&[&KERNEL[..], &snapped, &["--limit", "300"]].concat()).expect(0);
    let shorter = ["--json", text(&second), "--limit", "200"];
    play(&[&KERNEL[..], &shorter].concat()).expect(0);
    let of = |subcommand: &str, reports: &[&Path]| {
        let reports = reports.iter().map(|path| text(path));
        thintools(["thin_replay", subcommand].into_iter().chain(reports)).run()
    };
    let said = of("compare", &[&first, &first]).expect(0).out();
    assert!(!said.contains("NOT ALIKE"), "{said}");
    let said = of("compare", &[&first, &second]).expect(0).out();
    holds(&said, &["NOT ALIKE", " is of 300 requests, ", " of 200: "]);
    of("merge-reports", &[&first, &second]).expect(0);
    of("merge-reports", &[&first, &first])
        .expect(2)
        .expect_stderr(&["would count twice"]);
}

#[test]
fn options_that_lead_nowhere_are_refused() {
    for (wrong, why) in [
        (&["-o", "-"][..], "not on standard output"),
        (&["--start", "5", "--end", "3"], "nothing in between"),
    ] {
        play(wrong).expect(2).expect_stderr(&[why]);
    }
}

#[test]
fn a_trace_without_requests_is_warned_of() {
    let place = folder();
    let noise = place.path().join("noise");
    fs::write(&noise, "no event\nat all\n").expect("written");
    thintools(["thin_replay", "--format", "ftrace", text(&noise)])
        .run()
        .expect(0)
        .expect_stderr(&["none of 2 records is a request"]);
}
