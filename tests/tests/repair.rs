//! What a repair gets back and what it says: nothing is lost to any single damaged block that can be done without, nothing is
//! made up, and every option does what it says.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;
use thintools::units::BLOCK_SIZE;

use crate::support::{Attributes, Finished, Image, Pool, check, fixtures, thintools};

/// `thin_repair -i INPUT ARGUMENTS`.
pub(crate) fn repair(input: &Image, args: &[&str]) -> Finished {
    let call = ["thin_repair", "-i"].map(OsStr::new).into_iter();
    let call = call.chain([input.path().as_os_str()]);
    thintools(call.chain(args.iter().map(OsStr::new))).run()
}

/// Repairs to a new image of the same size, which leaves the input as it is.
#[track_caller]
pub(crate) fn repaired(input: &Image, args: &[&str], code: i32) -> (Image, Finished) {
    let before = input.bytes();
    let output = Image::empty((before.len() / BLOCK_SIZE) as u64);
    let path = output.path().to_str().expect("text").to_owned();
    let finished = repair(input, &[&["-o", &path], args].concat()).expect(code);
    assert!(input.bytes() == before, "the input was changed");
    (output, finished)
}

/// The report of a dry run.
#[track_caller]
fn reported(input: &Image, args: &[&str], code: i32) -> Value {
    let finished = repair(input, &[&["--dry-run", "--json"], args].concat()).expect(code);
    let all: Value = serde_json::from_str(&finished.out()).expect("JSON");
    assert_eq!(all["exit_status"], code);
    all["report"].clone()
}

/// `image` with these blocks zeroed.
fn zeroed(image: &Image, blocks: &[u64]) -> Image {
    let copy = Image::from_bytes(&image.bytes());
    for &block in blocks {
        copy.put_block(block, &[0; BLOCK_SIZE]);
    }
    copy
}

/// Roots of the top-level and the details tree, as --roots takes them.
fn roots(image: &Image) -> (u64, u64) {
    let fields = image.superblock();
    (fields.mapping_root.0, fields.details_root.0)
}

/// Only the mappings of a pool.
pub(crate) fn runs(pool: &Pool) -> BTreeMap<u64, &Vec<crate::support::Run>> {
    pool.devices.iter().map(|(&id, d)| (id, &d.1)).collect()
}

fn mapped(pool: &Pool) -> u64 {
    let all = pool.devices.values().flat_map(|d| &d.1);
    all.map(|run| run.2).sum()
}

fn names(folder: &Path) -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> = entries.map(|e| e.expect("readable").file_name()).collect();
    names.sort();
    names
}

/// Debian's tools, where they are installed, and our own take the output for whole.
#[track_caller]
pub(crate) fn judge(output: &Path) {
    check(&["-q"], output).expect(0).expect_silent();
    if Path::new("/usr/sbin/thin_check").exists() {
        crate::support::peer("thin_check", &[OsStr::new("-q"), output.as_os_str()]).expect(0);
    }
}

/// Values that a lost superblock takes with it, as options.
pub(crate) fn hints(image: &Image) -> [String; 6] {
    let fields = image.superblock();
    [
        "--data-block-size".into(),
        fields.data_block_size.to_string(),
        "--nr-data-blocks".into(),
        fields.data_space_map.nr_blocks.to_string(),
        "--transaction-id".into(),
        fields.transaction_id.to_string(),
    ]
}

/// Whole metadata is told as it is, by all fixtures: nothing is guessed, and a repair of the output changes nothing.
#[test]
fn whole_metadata_stays_as_it_is() {
    for name in [
        "snap-mix-a/meta",
        "bs-384/meta",
        "empty-2m/meta",
        "extorigin/meta",
        "restored/meta",
    ] {
        let image = Image::of(name);
        let (output, said) = repaired(&image, &[], 0);
        assert!(
            said.stderr.contains("the superblock names them"),
            "{}",
            said.stderr
        );
        assert!(output.dumped() == image.dumped(), "{name}");
        judge(output.path());
        let (again, _) = repaired(&output, &[], 0);
        assert!(again.dumped() == image.dumped(), "{name}");
    }
}

/// --dry-run needs no output, writes nothing anywhere, and says what a repair says.
#[test]
fn a_dry_run_says_what_would_be_done() {
    let healthy = Image::of("snap-mix-a/meta");
    let (top, details) = roots(&healthy);
    for (blocks, code) in [
        (vec![], 0),
        (vec![top], 4),
        (vec![details], 4),
        (vec![top, details], 4),
    ] {
        let image = zeroed(&healthy, &blocks);
        let (before, files) = (
            image.bytes(),
            names(image.path().parent().expect("a folder")),
        );
        let dry = repair(&image, &["--dry-run"]).expect(code);
        assert!(image.bytes() == before);
        assert_eq!(names(image.path().parent().expect("a folder")), files);
        let (dry, last) = dry
            .stderr
            .trim_end()
            .rsplit_once('\n')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .expect("lines");
        assert_eq!(last, "nothing was written");
        let (output, wet) = repaired(&image, &[], code);
        let (wet, last) = wet
            .stderr
            .trim_end()
            .rsplit_once('\n')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .expect("lines");
        assert_eq!(dry, wet);
        let written = mapped(&output.dumped());
        assert!(
            last.starts_with(&format!("wrote {written} mappings in ")),
            "{last}"
        );
        judge(output.path());
    }
    let output = healthy.beside("new.img");
    repair(
        &healthy,
        &["--dry-run", "-o", output.to_str().expect("text")],
    )
    .expect(2);
    assert!(!output.exists());
    repair(&healthy, &[]).expect(2).expect_stderr(&["--output"]);
}

/// One line of --list-candidates: roots, devices, whole ones, mappings, time and transaction.
fn candidates(image: &Image) -> Vec<[u64; 7]> {
    let out = repair(image, &["--list-candidates"])
        .expect(0)
        .expect_stderr(&[])
        .out();
    let mut list = Vec::new();
    for line in out.lines().filter(|l| !l.ends_with(" more")) {
        let words = line.split([' ', ',', ':']).filter_map(|w| w.parse().ok());
        let numbers: Vec<u64> = words.take(7).collect();
        list.push(numbers.try_into().unwrap_or_else(|_| panic!("{line}")));
    }
    list
}

/// The states on a device are listed, the last committed one first; nothing is written, and all of it can be read.
#[test]
fn the_first_candidate_is_the_last_state() {
    let mut seen = 0;
    for fixture in fixtures() {
        // What a crash interrupted is on the device as well, and the tools of 0.9 once wrote no superblock.
        let is_crash = fixture.image.contains("-cut-") || fixture.image.contains("-torn-");
        if is_crash || fixture.image == "meta-restore-0.9-of-dump-1.3.3" {
            continue;
        }
        let image = Image::of(&fixture.name());
        let before = image.bytes();
        let list = candidates(&image);
        assert!(image.bytes() == before);
        let (top, details) = roots(&image);
        let pool = image.dumped();
        let devices = pool.devices.len() as u64;
        assert_eq!(
            list[0][..5],
            [top, details, devices, devices, mapped(&pool)],
            "{}",
            fixture.name()
        );
        let mut pairs: Vec<_> = list.iter().map(|c| (c[0], c[1])).collect();
        pairs.sort_unstable();
        pairs.dedup();
        assert_eq!(
            pairs.len(),
            list.len(),
            "{}: a pair is listed twice",
            fixture.name()
        );
        // Without the superblock the order is the same.
        image.put_block(0, &[0; BLOCK_SIZE]);
        assert_eq!(candidates(&image), list, "{}", fixture.name());
        seen += list.len();
    }
    assert!(seen > 200, "{seen}");
    let image = Image::empty(64);
    let out = repair(&image, &["--list-candidates"]).expect(0).out();
    assert_eq!(out, "no state of a pool was found\n");
}

/// A superblock that can be used decides which state is first, also where later blocks were written but not committed.
#[test]
fn the_superblock_decides_which_candidate_is_first() {
    for name in [
        "crash-log/meta-cut-185",
        "crash-log/meta-cut-237",
        "crash-log/meta-cut-425",
    ] {
        let image = Image::of(name);
        let (top, details) = roots(&image);
        assert_eq!(candidates(&image)[0][..2], [top, details], "{name}");
    }
}

#[test]
fn candidates_as_json() {
    let image = Image::of("held-root/meta");
    let text = repair(&image, &["--list-candidates", "--json"])
        .expect(0)
        .out();
    let all: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(all["exit_status"], 0);
    assert!(all["more_candidates"].is_u64());
    let list = all["candidates"].as_array().expect("a list");
    let names = [
        "mapping_root",
        "details_root",
        "devices",
        "whole_devices",
        "mappings",
        "time",
        "transaction_id",
    ];
    let list: Vec<[u64; 7]> = list
        .iter()
        .map(|c| names.map(|name| c[name].as_u64().expect("a number")))
        .collect();
    assert_eq!(list, candidates(&image));
}

/// Pools copied at two times: the image of the earlier one, that of the later one.
const EARLIER: [(&str, &str); 5] = [
    ("snap-fan-60/meta-before-origin-delete", "snap-fan-60/meta"),
    ("held-root/meta-just-reserved", "held-root/meta"),
    (
        "discard-no-passdown/meta-before-snap",
        "discard-no-passdown/meta",
    ),
    ("discard-passdown/meta-before-snap", "discard-passdown/meta"),
    ("resize/meta-before", "resize/meta"),
];

/// With --roots of an older state, the devices are those that the pool had then, in every mapping.
#[test]
fn older_roots_bring_the_older_state_back() {
    for (earlier, later) in EARLIER {
        older_state(earlier, &Image::of(later), &[]);
    }
}

/// The same where the superblock is lost.
#[test]
fn older_roots_bring_the_older_state_back_without_a_superblock() {
    for (earlier, later) in EARLIER {
        let image = Image::of(later);
        let hints = hints(&image);
        let hints: Vec<&str> = hints.iter().map(String::as_str).collect();
        older_state(earlier, &zeroed(&image, &[0]), &hints);
    }
}

#[track_caller]
fn older_state(earlier: &str, later: &Image, hints: &[&str]) {
    let truth = Image::of(earlier);
    let (top, details) = roots(&truth);
    assert!(candidates(later).iter().any(|c| c[..2] == [top, details]));
    let pair = format!("{top},{details}");
    let path = later.beside("older.img");
    std::fs::write(&path, vec![0; later.bytes().len()]).expect("written");
    let output = path.to_str().expect("text");
    let done = repair(later, &[&["--roots", &pair, "-o", output], hints].concat());
    assert!(matches!(done.code, Some(0 | 4)), "{earlier}: {done:?}");
    judge(&path);
    let found = Image::from_bytes(&std::fs::read(&path).expect("written")).dumped();
    assert!(
        runs(&found) == runs(&truth.dumped()),
        "{earlier}: {}",
        done.stderr
    );
}

/// The roots that the superblock names may be given as well.
#[test]
fn the_roots_in_use_can_be_asked_for() {
    for name in ["held-root/meta", "snap-fan-60/meta", "bs-512/meta"] {
        let image = Image::of(name);
        let (top, details) = roots(&image);
        let (output, said) = repaired(&image, &["--roots", &format!("{top},{details}")], 0);
        assert!(output.dumped() == image.dumped(), "{name}");
        said.expect_stderr(&["they were asked for"]);
    }
}

/// Blocks that are no roots: whatever is made of them, there is no panic, and no output that is bad.
#[test]
fn wrong_roots_do_no_harm() {
    let image = Image::of("held-root/meta");
    for pair in ["5", ",", "5,x", "5,-1", "5,6,7", "5,99999999999999999999"] {
        let refused = repair(&image, &["--dry-run", "--roots", pair]).expect(2);
        refused.expect_stderr(&["two block numbers", "--list-candidates"]);
    }
    for pair in wrong_pairs(&image) {
        let output = Image::empty(1024);
        let path = output.path().to_str().expect("text");
        let done = repair(&image, &["--roots", &pair, "-o", path]);
        match done.code {
            Some(4) => judge(output.path()),
            Some(1 | 5) => assert!(output.bytes().iter().all(|&b| b == 0), "{pair}"),
            _ => panic!("{pair}: {done:?}"),
        }
    }
}

/// Pairs of blocks that are no pair of roots.
fn wrong_pairs(image: &Image) -> Vec<String> {
    let (top, details) = roots(image);
    let leaf = image.first_leaf(image.device_root(1));
    let index = image.superblock().metadata_space_map.bitmap_root.0;
    let pairs = [
        (details, top),
        (0, 0),
        (top, top),
        (leaf, details),
        (top, leaf),
        (index, index),
        (99_999, details),
        (top, 99_999),
        (u64::MAX, u64::MAX),
    ];
    pairs
        .map(|(top, details)| format!("{top},{details}"))
        .to_vec()
}

/// They are told to be wrong.
#[test]
fn wrong_roots_are_errors() {
    let image = Image::of("held-root/meta");
    for pair in wrong_pairs(&image) {
        let done = repair(&image, &["--dry-run", "--roots", &pair]);
        assert!(matches!(done.code, Some(1 | 5)), "{pair}: {done:?}");
    }
}

/// Without its top-level and its details tree, some subtrees of this pool may belong to two devices.
fn doubtful() -> (Image, Image) {
    let healthy = Image::of("snap-mix-a/meta");
    let (top, details) = roots(&healthy);
    let image = zeroed(&healthy, &[top, details]);
    (healthy, image)
}

/// What is in doubt is left out, and listed with where it may belong.
#[test]
fn what_is_in_doubt_is_listed() {
    let (healthy, image) = doubtful();
    let report = reported(&image, &[], 4);
    let (output, said) = repaired(&image, &[], 4);
    let truth = healthy.dumped();
    let found = output.dumped();
    let list = report["ambiguous"].as_array().expect("a list");
    assert!(!list.is_empty());
    for one in list {
        let number = |name: &str| one[name].as_u64().expect("a number");
        let devices: Vec<u64> = serde_json::from_value(one["devices"].clone()).expect("ids");
        let (block, mappings) = (number("block"), number("mappings"));
        said.clone().expect_stderr(&[
            &format!(
                "left out: {mappings} mappings of blocks {}..",
                number("begin")
            ),
            &format!(" in block {block} may belong to device {}", devices[0]),
        ]);
        // It does belong to one of them, and none of them has all of it now.
        let leaf = crate::support::entries(&image.block(block), 8);
        assert_eq!(leaf.len() as u64, mappings);
        let has_all = |pool: &Pool, id: &u64| {
            let has = |key: u64| {
                let all = pool.devices.get(id).into_iter().flat_map(|d| &d.1);
                all.into_iter().any(|r| r.0 <= key && key < r.0 + r.2)
            };
            leaf.iter().all(|(key, _)| has(*key))
        };
        assert!(
            devices.iter().any(|id| has_all(&truth, id)),
            "block {block}"
        );
    }
    for (id, (_, runs)) in &found.devices {
        let of: Vec<_> = expanded(runs);
        let there = expanded(&truth.devices[id].1);
        assert!(
            of.iter().all(|m| there.contains(m)),
            "device {id} has what it never had"
        );
    }
    assert!(mapped(&found) < mapped(&truth));
    assert_eq!(report["is_complete"], false);
}

fn expanded(runs: &[crate::support::Run]) -> Vec<(u64, u64)> {
    let one = |r: &crate::support::Run| (0..r.2).map(|i| (r.0 + i, r.1 + i)).collect::<Vec<_>>();
    runs.iter().flat_map(one).collect()
}

/// With --include-ambiguous all of it is taken in, and said to be a guess.
#[test]
fn what_is_in_doubt_is_taken_in_on_request() {
    let (healthy, image) = doubtful();
    let without = mapped(&repaired(&image, &[], 4).0.dumped());
    let (output, said) = repaired(&image, &["--include-ambiguous"], 4);
    judge(output.path());
    said.expect_stderr(&["nothing decides; it is the likeliest place"]);
    let report = reported(&image, &["--include-ambiguous"], 4);
    assert_eq!(report["ambiguous"].as_array().map(Vec::len), Some(0));
    let (found, truth) = (output.dumped(), healthy.dumped());
    assert!(mapped(&found) > without);
    assert_eq!(mapped(&found), mapped(&truth));
    assert!(found.devices.keys().eq(truth.devices.keys()));
}

/// The members of the JSON report, which programs go by.
#[test]
fn the_report_as_json() {
    let (_, image) = doubtful();
    let output = image.beside("new.img");
    std::fs::write(&output, vec![0; image.bytes().len()]).expect("written");
    let path = output.to_str().expect("text");
    let done = repair(&image, &["--json", "-o", path]).expect(4);
    assert_eq!(done.stderr, "");
    let all: Value = serde_json::from_str(&done.out()).expect("JSON");
    let keys = |value: &Value| -> Vec<String> {
        value
            .as_object()
            .expect("an object")
            .keys()
            .cloned()
            .collect()
    };
    assert_eq!(keys(&all), ["exit_status", "mappings", "report"]);
    let written = Image::from_bytes(&std::fs::read(&output).expect("written")).dumped();
    assert_eq!(all["mappings"], mapped(&written));
    let report = &all["report"];
    for (name, is_right) in [
        ("mapping_root", report["mapping_root"].is_u64()),
        ("details_root", report["details_root"].is_u64()),
        ("why", report["why"].is_string()),
        ("candidates", report["candidates"].is_array()),
        ("more_candidates", report["more_candidates"].is_u64()),
        ("mended", report["mended"].is_array()),
        ("devices", report["devices"].is_array()),
        ("lost_ids", report["lost_ids"].is_array()),
        ("ambiguous", report["ambiguous"].is_array()),
        ("notes", report["notes"].is_array()),
        ("is_complete", report["is_complete"] == false),
    ] {
        assert!(is_right, "{name}: {}", report[name]);
    }
    for device in report["devices"].as_array().expect("a list") {
        let names = [
            "contested",
            "dev_id",
            "expected",
            "lost",
            "mappings",
            "reattached",
        ];
        assert_eq!(keys(device), names);
        for subtree in device["reattached"].as_array().expect("a list") {
            assert_eq!(keys(subtree), ["begin", "block", "evidence", "mappings"]);
            assert!(subtree["evidence"].is_string());
        }
        let id = device["dev_id"].as_u64().expect("a number");
        let has: u64 = written.devices[&id].1.iter().map(|run| run.2).sum();
        assert_eq!(device["mappings"], has);
    }
    let dry = repair(&image, &["--json", "--dry-run"]).expect(4);
    let dry: Value = serde_json::from_str(&dry.out()).expect("JSON");
    assert_eq!((&dry["report"], &dry["mappings"]), (report, &Value::Null));
}

/// Blocks whose contents could be told are listed with how.
#[test]
fn mended_blocks_are_told() {
    let healthy = Image::of("snap-mix-a/meta");
    let (top, details) = roots(&healthy);
    let image = Image::from_bytes(&healthy.bytes());
    image.spoil_block(top, |block| block[777] ^= 0x10);
    let last = image.superblock().metadata_space_map.nr_blocks - 1;
    let moved = image.block(details);
    image.put_block(last, &moved);
    image.put_block(details, &[0; BLOCK_SIZE]);
    image.spoil_block(0, |block| block[4000..4010].fill(0xa5));
    let (output, said) = repaired(&image, &[], 0);
    assert!(output.dumped() == healthy.dumped());
    said.expect_stderr(&[
        &format!("mended: block {top}: bit 4 of byte 777 is flipped"),
        &format!("mended: block {details}: its contents lie in block {last}"),
        "mended: block 0: only what lies behind the superblock's fields is damaged",
    ]);
    let report = reported(&image, &[], 0);
    let mends: Vec<&Value> = report["mended"]
        .as_array()
        .expect("a list")
        .iter()
        .collect();
    let blocks: Vec<u64> = mends
        .iter()
        .map(|m| m["block"].as_u64().expect("a number"))
        .collect();
    assert_eq!(blocks, [0, top, details]);
    assert_eq!(
        mends[1]["mend"],
        serde_json::json!({"bit": {"bit": 777 * 8 + 4}})
    );
}

/// A lost superblock takes values with it: what is guessed is said, what is given is not, and what cannot be guessed is asked for.
#[test]
fn values_of_a_lost_superblock() {
    let healthy = Image::of("transaction-id-5/meta");
    let attributes = |image: &Image| -> Attributes { image.dumped().superblock };
    let truth = attributes(&healthy);
    let image = zeroed(&healthy, &[0]);
    let output = image.beside("new.img");
    std::fs::write(&output, vec![0xa5; image.bytes().len()]).expect("written");
    let path = output.to_str().expect("text");
    let refused = repair(&image, &["-o", path]).expect(5);
    refused.expect_stderr(&["--data-block-size", "lvs -o chunksize", "table", "sectors"]);
    let kept = std::fs::read(&output).expect("there");
    assert!(kept.iter().all(|&b| b == 0xa5), "nothing is written");
    repair(&image, &["--dry-run"])
        .expect(5)
        .expect_stderr(&["--data-block-size"]);

    let hints = hints(&healthy);
    let hints: Vec<&str> = hints.iter().map(String::as_str).collect();
    let guess = "the transaction id is guessed to be";
    let size = "the size of the data device is taken to be";
    let (_, said) = repaired(&image, &hints[..2], 4);
    said.expect_stderr(&[guess, "--transaction-id", size]);
    let (output, said) = repaired(&image, &hints[..4], 4);
    assert!(
        said.stderr.contains(guess) && !said.stderr.contains(size),
        "{}",
        said.stderr
    );
    assert_eq!(
        attributes(&output)["nr_data_blocks"],
        truth["nr_data_blocks"]
    );
    let (output, said) = repaired(&image, &hints, 4);
    assert!(
        !said.stderr.contains(guess) && !said.stderr.contains(size),
        "{}",
        said.stderr
    );
    assert_eq!(attributes(&output), truth);
    judge(output.path());
    let (output, _) = repaired(&image, &["--data-block-size", "256"], 4);
    assert_eq!(attributes(&output)["data_block_size"], "256");
    // A superblock that is there knows better than what is guessed, and says nothing of guesses.
    let (_, said) = repaired(&healthy, &[], 0);
    assert!(!said.stderr.contains(guess), "{}", said.stderr);
}

/// The transaction id that LVM has is written, though devices are as recent as the last transaction: a guess does not overrule it.
#[test]
fn a_given_transaction_id_is_not_raised_to_a_guess() {
    for name in ["snap-mix-a/meta", "bs-1gib/meta"] {
        let healthy = Image::of(name);
        let hints = hints(&healthy);
        let hints: Vec<&str> = hints.iter().map(String::as_str).collect();
        let (output, said) = repaired(&zeroed(&healthy, &[0]), &hints, 4);
        let written = output.dumped().superblock["transaction"].clone();
        assert_eq!(
            written,
            healthy.dumped().superblock["transaction"],
            "{}",
            said.stderr
        );
    }
}

/// An input that no repair helps is an error that says so, and nothing is written.
#[test]
fn nothing_to_recover() {
    let hints = ["--data-block-size", "128"];
    for image in [
        Image::empty(64),
        Image::from_bytes(&[0x5a; 64 * BLOCK_SIZE]),
    ] {
        let before = image.bytes();
        let output = image.beside("new.img");
        std::fs::write(&output, vec![0xa5; 64 * BLOCK_SIZE]).expect("written");
        let path = output.to_str().expect("text");
        let refused = repair(&image, &[&["-o", path], &hints[..]].concat()).expect(5);
        refused.expect_stderr(&["nothing on this device looks like"]);
        assert!(
            std::fs::read(&output)
                .expect("there")
                .iter()
                .all(|&b| b == 0xa5)
        );
        assert!(image.bytes() == before);
    }
}
