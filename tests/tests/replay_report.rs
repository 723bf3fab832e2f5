//! What a replay reports: forms of the report, comparing and merging, and reports that are none.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use quick_xml::Reader;
use quick_xml::events::Event;
use serde_json::Value;
use thintools::replay::{Report, html, merge};

use crate::support::{BINARY, Finished, folder, testdata, thintools};

fn trace() -> PathBuf {
    testdata().join("../traces/oracle/thin.blktrace.0.zst")
}

/// Plays the kernel's trace with more options.
fn replay(options: &[&str]) -> Finished {
    let trace = trace();
    let mut args = vec![
        "thin_replay",
        "-q",
        "--data-size",
        "1g",
        "--metadata-size",
        "16m",
    ];
    args.extend(["--map", "254:1=0:2g"]);
    args.extend(options);
    args.push(trace.to_str().expect("plain"));
    thintools(args).run().expect(0)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("plain")
}

fn reports(bytes: &[u8]) -> Vec<Report> {
    Report::read_all(&mut &bytes[..]).expect("reports")
}

/// A made-up trace: a request of each device in turn, over so many seconds.
fn made_up(devices: &[u32], requests: u32) -> String {
    let mut text = String::new();
    for n in 0..requests {
        let device = n % 2;
        if devices.contains(&device) {
            let op = ["W", "W", "R", "D"][(n / 2 % 4) as usize];
            let (offset, time) = (u64::from(n) * 7919 % 4000 * 65_536, u64::from(n) * 10_000);
            text.push_str(&format!(
                "{device},{op},{offset},{},{time}\n",
                16_384 << (n % 4)
            ));
        }
    }
    text
}

const MADE_UP: &str = "csv:dev=0,op=1,off=2:bytes,len=3:bytes,ts=4:us,read=R,write=W,discard=D";

fn replay_made_up(path: &Path, text: &str) -> Report {
    fs::write(path, text).expect("written");
    let args = [
        "thin_replay",
        "-q",
        "--format",
        MADE_UP,
        "--data-size",
        "4g",
        "--json",
        "-",
    ];
    let args = args.into_iter().chain([self::text(path)]);
    let out = thintools(args).run().expect(0).stdout;
    reports(&out).remove(0)
}

#[test]
fn a_report_comes_back_from_json_as_it_was() {
    let out = replay(&["--locks", "a,kernel", "--json", "-"]).stdout;
    let read = reports(&out);
    assert_eq!(read.len(), 2);
    let again = serde_json::to_vec(&read).expect("JSON");
    assert_eq!(reports(&again), read);
    // The verdicts, too, are those that were written.
    let (written, again): (Value, Value) = (
        serde_json::from_slice(&out).expect("JSON"),
        serde_json::from_slice(&again).expect("JSON"),
    );
    assert_eq!(written, again);
    let report = &read[1];
    assert_eq!(report.worker.unmapped, 2173, "as the kernel's pool");
    assert_eq!(report.input.snapshots, 1);
    let deferred = &report.map.deferred;
    let map = &report.map;
    assert_eq!(
        deferred.total() + map.remapped + map.zero + map.failed,
        map.bios
    );
    let last = report.timeline.last().expect("a sample");
    assert_eq!(last.deferred, *deferred);
    assert_eq!(last.commits, report.worker.commits.total());
    assert_eq!(last.used_data_blocks, report.space.used_data_blocks);
}

#[test]
fn halves_merge_to_the_whole() {
    let place = folder();
    let path = |name: &str| place.path().join(name);
    let whole = replay_made_up(&path("whole.csv"), &made_up(&[0, 1], 4000));
    let halves: Vec<(String, Report)> = [0, 1]
        .map(|n| {
            let name = format!("half {n}");
            let report = replay_made_up(&path(&name), &made_up(&[n], 4000));
            (name, report)
        })
        .into();
    let merged = merge(&halves).expect("alike");
    assert_eq!(merged.input, whole.input);
    assert_eq!(merged.map, whole.map);
    assert_eq!(merged.work.copies, whole.work.copies);
    assert_eq!(merged.work.bytes_zeroed, whole.work.bytes_zeroed);
    assert_eq!(merged.worker.unmapped, whole.worker.unmapped);
    assert_eq!(merged.space.used_data_blocks, whole.space.used_data_blocks);
    // Each request has the same device behind it, whichever pool it is in; only what waits for commits differs.
    for class in ["mapped", "zero"] {
        assert_eq!(
            merged.latency.get(class),
            whole.latency.get(class),
            "{class}"
        );
    }
    assert_eq!(merged.heat.cell_sectors(), whole.heat.cell_sectors());
    // A report of one device has the map of all; those of several have one for each.
    assert!(halves.iter().all(|(_, half)| half.device_heat.is_empty()));
    let maps = |report: &Report| -> Vec<(String, u64)> {
        let maps = report.device_heat.iter();
        maps.map(|map| (map.device.clone(), map.requests)).collect()
    };
    assert_eq!(maps(&merged).len(), 2);
    assert!(
        merged
            .device_heat
            .iter()
            .all(|map| map.device.starts_with("half "))
    );
    let requests = |report: &Report| maps(report).iter().map(|(_, n)| n).sum::<u64>();
    assert_eq!(requests(&merged), whole.input.requests);
    assert_eq!(requests(&whole), whole.input.requests);
    let mut page = Vec::new();
    html(std::slice::from_ref(&whole), &mut page).expect("written");
    let page = String::from_utf8(page).expect("text");
    for (device, _) in maps(&whole) {
        assert!(page.contains(&format!("writes of {device} went, and when")));
    }
    assert_eq!(merged.sources, ["half 0", "half 1"]);
    let last = merged.timeline.last().expect("a sample");
    assert_eq!(last.used_data_blocks, whole.space.used_data_blocks);
    assert_eq!(last.deferred, whole.map.deferred);
    assert!(merged.timeline.is_sorted_by_key(|sample| sample.time_ns));
    assert!(merged.timeline.len() <= 800);
    // In whatever steps it is done.
    let twice = merge(&[("a".into(), merged.clone()), halves[0].clone()]).expect("alike");
    assert_eq!(twice.sources, ["half 0", "half 1", "half 0"]);
    assert_eq!(maps(&twice).len(), 3);
}

#[test]
fn marks_keep_their_source_and_unlike_reports_are_refused() {
    let place = folder();
    let files = ["a.json", "b.json", "c.json"].map(|name| place.path().join(name));
    replay(&["--json", text(&files[0])]);
    replay(&["--json", text(&files[1])]);
    replay(&["--block-size", "128k", "--json", text(&files[2])]);
    let merged = |names: &[&Path]| {
        let names = names.iter().map(|path| text(path));
        let args = ["thin_replay", "merge-reports", "--json", "-"];
        thintools(args.into_iter().chain(names)).run()
    };
    let out = merged(&[&files[0], &files[1]]).expect(0).stdout;
    let report = reports(&out).remove(0);
    assert_eq!(report.marks.len(), 10);
    let source = report.marks[1].source.as_deref();
    assert!(
        source.is_some_and(|source| source.ends_with("b.json")),
        "{source:?}"
    );
    assert_eq!(report.work.copies, 2 * 871);
    merged(&[&files[0], &files[2]])
        .expect(1)
        .expect_stderr(&["sectors in a data block are 256, not 128"]);
    // A file on lines is as good as one with a list.
    let mut lines = String::new();
    for file in &files[..2] {
        let value: Value = serde_json::from_slice(&fs::read(file).expect("read")).expect("JSON");
        lines.push_str(&format!("{}\n", value[0]));
    }
    let args = ["thin_replay", "merge-reports", "-", "--json", "-"];
    let again = thintools(args).stdin(lines).run().expect(0).stdout;
    assert_eq!(reports(&again)[0].input, report.input);
}

#[test]
fn compare_finds_what_differs() {
    let place = folder();
    let [small, large] = ["small", "large"].map(|name| place.path().join(name));
    replay(&["--json", text(&small)]);
    replay(&["--block-size", "256k", "--json", text(&large)]);
    let compare = |a: &Path, b: &Path| {
        let out = thintools(["thin_replay", "compare", text(a), text(b)]).run();
        out.expect(0).out()
    };
    let out = compare(&small, &large);
    let copied = out.lines().find(|line| line.starts_with("blocks copied"));
    let words: Vec<&str> = copied.expect("a row").split_whitespace().collect();
    assert_eq!(words, ["blocks", "copied", "871", "740", "-131", "0.85"]);
    assert!(
        out.contains("VERDICT    fewest bios left to the worker: "),
        "{out}"
    );
    assert!(out.contains("VERDICT    block size "), "{out}");
    let same = compare(&small, &small);
    assert!(same.contains("no difference"), "{same}");
    thintools(["thin_replay", "compare", text(&small)])
        .run()
        .expect(1)
        .expect_stderr(&["nothing to compare"]);
}

#[test]
fn the_page_is_xml_that_refers_to_nothing() {
    let place = folder();
    let [page, evil, merged] = ["page", "evil.json", "merged"].map(|name| place.path().join(name));
    replay(&["--html", text(&page)]);
    // A name out of a trace may be anything.
    let mut json = replay(&["--json", "-"]).out();
    json = json.replace("1-provision", "<script src='http://x'>&\\u0001\\\"");
    fs::write(&evil, json).expect("written");
    let args = [
        "thin_replay",
        "merge-reports",
        text(&evil),
        "--html",
        text(&merged),
    ];
    thintools(args).run().expect(0);
    for path in [&page, &merged] {
        let html = fs::read_to_string(path).expect("text");
        let mut reader = Reader::from_str(&html);
        reader.config_mut().check_end_names = true;
        let (mut charts, mut tables) = (0, 0);
        loop {
            match reader.read_event().expect("XML") {
                Event::Eof => break,
                Event::Start(tag) | Event::Empty(tag) => {
                    let name = String::from(tag.name().as_ref() as &str);
                    assert!(
                        !["script", "link", "img", "iframe", "object"].contains(&&*name),
                        "{name}"
                    );
                    charts += usize::from(name == "figure");
                    tables += usize::from(name == "details");
                    for attribute in tag.attributes() {
                        let attribute = attribute.expect("well-formed");
                        let key = attribute.key.as_ref();
                        assert!(!key.ends_with("href") && key != "src", "{name}");
                    }
                }
                _ => {}
            }
        }
        assert!(charts >= 7, "{charts} charts");
        assert_eq!(charts, tables, "each chart has its numbers beside it");
        assert!(!html.contains("url(") && !html.contains("@import"));
        assert!(!html.contains("NaN") && !html.contains("inf "));
    }
}

#[test]
fn rows_have_the_whole_timeline() {
    let place = folder();
    let [csv, json] = ["rows.csv", "report.json"].map(|name| place.path().join(name));
    let lines = replay(&["--csv", text(&csv), "--json", text(&json), "--jsonl", "-"]).out();
    let report = reports(&fs::read(&json).expect("read")).remove(0);
    let rows = fs::read_to_string(&csv).expect("text");
    let mut rows = rows.lines();
    let columns = rows.next().map(|head| head.split(',').count());
    assert_eq!(columns, Some(26));
    let rows: Vec<&str> = rows.collect();
    assert_eq!(rows.len(), report.timeline.len());
    assert!(
        rows.iter()
            .all(|row| Some(row.split(',').count()) == columns)
    );
    let kinds: Vec<String> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["kind"].to_string())
        .collect();
    let count = |kind: &str| kinds.iter().filter(|k| k.contains(kind)).count();
    assert_eq!(count("sample"), report.timeline.len());
    assert_eq!((count("mark"), count("summary")), (5, 1));
}

#[test]
fn no_output_is_overwritten() {
    let place = folder();
    let there = place.path().join("there");
    fs::write(&there, "mine").expect("written");
    let missing = place.path().join("no trace");
    for option in ["--json", "--jsonl", "--csv", "--html", "-o"] {
        // It says so before it looks at the trace.
        thintools(["thin_replay", option, text(&there), text(&missing)])
            .run()
            .expect(1)
            .expect_stderr(&["exists, and is not overwritten"]);
    }
    assert_eq!(fs::read(&there).expect("read"), b"mine");
    thintools(["thin_replay", "--json", "-", "--csv", "-", text(&missing)])
        .run()
        .expect(2)
        .expect_stderr(&["one form"]);
}

#[test]
fn what_is_no_report_is_an_error() {
    let good = replay(&["--json", "-"]).out();
    let place = folder();
    let path = place.path().join("report");
    let cases: [(String, &str); 13] = [
        (String::new(), "no report"),
        ("[]".into(), "no report"),
        ("{}".into(), "no report of thin_replay"),
        (good[..good.len() / 2].into(), "not JSON"),
        ("\u{0}\u{1}".into(), "not JSON"),
        ("[".repeat(10_000), "not JSON"),
        (
            good.replace("thintools-replay/1", "thintools-replay/2"),
            "of the form \"thintools-replay/2\"",
        ),
        (
            good.replace("\"copies\": 871", "\"copies\": NaN"),
            "not JSON",
        ),
        (
            good.replace("\"copies\": 871", "\"copies\": 1e300"),
            "no replay comes to",
        ),
        (
            good.replace("\"copies\": 871", "\"copies\": 18446744073709551615"),
            "no replay comes to",
        ),
        (
            good.replace("\"copies\": 871", "\"copies\": -1"),
            "the report is wrong",
        ),
        (
            good.replace("\"block_sectors\": 128", "\"block_sectors\": 0"),
            "data blocks of 0 sectors",
        ),
        (
            good.replace(
                "\"marks\":",
                "\"device_heat\": [0,1,2,3,4,5,6,7,8], \"marks\":",
            ),
            "heat maps of more than 8 devices",
        ),
    ];
    for (text, said) in cases {
        fs::write(&path, text).expect("written");
        for subcommand in ["compare", "merge-reports"] {
            let args = ["thin_replay", subcommand, self::text(&path)];
            thintools(args).run().expect(5).expect_stderr(&[said]);
        }
    }
    // The largest numbers that are taken do no harm.
    let large = enlarged(&good);
    let paths = ["first", "second", "third"].map(|name| place.path().join(name));
    for path in &paths {
        fs::write(path, &large).expect("written");
    }
    let page = place.path().join("page");
    let [first, second, third] = paths.each_ref().map(|path| text(path));
    let args = [
        "thin_replay",
        "merge-reports",
        first,
        second,
        third,
        "--html",
        text(&page),
    ];
    thintools(args).run().expect(0);
    thintools(["thin_replay", "compare", first, second])
        .run()
        .expect(0);
}

/// The report with all counts of requests and space as large as they may be.
fn enlarged(report: &str) -> String {
    fn enlarge(value: &mut Value) {
        match value {
            Value::Number(n) if n.as_u64().is_some() => *value = (1u64 << 60).into(),
            Value::Array(values) => values.iter_mut().for_each(enlarge),
            Value::Object(values) => values.values_mut().for_each(enlarge),
            _ => {}
        }
    }
    let mut value: Value = serde_json::from_str(report).expect("JSON");
    for part in [
        "input", "map", "work", "worker", "locks", "space", "forecast", "timeline",
    ] {
        enlarge(&mut value[0][part]);
    }
    value[0]["trace_ns"] = (1u64 << 60).into();
    value.to_string()
}

#[test]
fn an_interrupted_replay_reports_how_far_it_came() {
    // How long it takes to read what there is depends on the machine: it is given more time until that was enough.
    let waits = [200, 1_000, 5_000, 15_000].map(Duration::from_millis);
    let mut said = String::new();
    let cases: [(&[&str], &str); 3] = [
        (&[], "input     500 requests"),
        (
            &["--locks", "kernel,a"],
            "not all was done that was asked for: all\n",
        ),
        (&["--dry-run"], "trace     500 requests"),
    ];
    for (options, part) in cases {
        let is_right = waits.into_iter().any(|wait| {
            said = interrupted_after(wait, options);
            said.starts_with("INCOMPLETE") && said.contains(part)
        });
        assert!(is_right, "{options:?}: {said}");
        assert!(
            !said.contains("fewest") && !said.contains("not replays"),
            "{said}"
        );
    }
}

/// What a replay says that is interrupted while its pipe has no more.
fn interrupted_after(wait: Duration, options: &[&str]) -> String {
    let mut child = Command::new(BINARY)
        .args(["thin_replay", "--format", MADE_UP])
        .args(options)
        .args(["--data-size", "4g", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut pipe = child.stdin.take().expect("piped");
    let text = made_up(&[0, 1], 500);
    pipe.write_all(text.as_bytes()).expect("taken");
    std::thread::sleep(wait);
    let id = child.id().to_string();
    let kill = Command::new("kill").args(["-TERM", &id]).status();
    assert!(kill.is_ok_and(|status| status.success()));
    let finished = child.wait_with_output().expect("ended");
    drop(pipe);
    String::from_utf8_lossy(&finished.stdout).into_owned()
}
