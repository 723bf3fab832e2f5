//! What the kernel did to its pools, done to the engine: the same commands and the same lists of I/O have the same outcome.
//!
//! Held against the kernel are: what is refused, and with which error; how much I/O fails, and how; what reads find; at every labelled
//! moment the table and status lines of the pool and of its thin devices; at the end what is mapped, what is there, and that a check
//! finds nothing.
//!
//! Every command of the logs is carried out; metadata devices that fail for some time are modelled (`player::meta`), and the tools of
//! other versions are played by this project's. The fixtures left out have no lists: `crash-a`, `rand-1thin-70k`, `rand-20thins-10k`.
//!
//! Not byte for byte the same are:
//! 1. The number of metadata blocks in use, by up to [`TOLERANCE`], if lists had 64 requests or more under way at once. Which of them
//!    is inserted first is chance in the kernel, and decides where nodes are split.
//! 2. The block of a metadata snapshot, for the same reason.
//! 3. What is told to [`Replay::differ`], with the reason beside it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use thintools::pool::{Line, PoolMode, PoolStatusLine};

use super::moments::Anchor::{After, End, Waiting};
use super::moments::{Anchor, END, Moment, moments};
use super::player::{Command, Player, content};
use crate::crash::codes_of;
use crate::support::{expand, expand_text, json, testdata, untar};

/// Metadata blocks by which the engine may differ from the kernel where the order of insertion is chance.
const TOLERANCE: u64 = 2;

/// A fixture that is being played.
struct Replay {
    folder: &'static str,
    commands: Vec<Command>,
    moments: Vec<Moment>,
    player: Player,
    tolerance: u64,
}

impl Replay {
    fn new(folder: &'static str, anchors: &[Anchor]) -> Self {
        let log = std::fs::read_to_string(testdata().join(folder).join("commands.log"));
        let commands = Command::read(&log.expect("a log"));
        let is_deep = |c: &Command| ["-q 64 ", "-q 128 "].iter().any(|q| c.text.contains(q));
        let tolerance = match commands.iter().any(is_deep) {
            true => TOLERANCE,
            false => 0,
        };
        let facts = json(&format!("{folder}/fixture.json"));
        let bytes = facts["images"]["meta.img"]["bytes"].as_u64();
        let lists = untar(&expand(&format!("{folder}/io-lists.tar")));
        let lists = lists.into_iter().map(|(name, bytes)| {
            let text = String::from_utf8(bytes).expect("text");
            (name.replacen("in/", "", 1), text)
        });
        Self {
            folder,
            moments: moments(folder, &commands, anchors),
            commands,
            player: Player::new(lists.collect(), bytes.expect("a size") / 4096),
            tolerance,
        }
    }

    /// Carries out a command, and compares at the moments in it and behind it.
    fn step(&mut self, at: usize) {
        let moments = std::mem::take(&mut self.moments);
        let tolerance = self.tolerance;
        let mut here: Vec<&Moment> = moments.iter().filter(|moment| moment.at == at).collect();
        self.player.run(&self.commands[at], &mut |player| {
            if here.first().is_some_and(|moment| moment.is_waiting) {
                compare(player, here.remove(0), tolerance);
            }
        });
        for moment in here {
            assert!(!moment.is_waiting, "{}: nothing waited", moment.label);
            compare(&mut self.player, moment, tolerance);
            if moment.label == END && testdata().join(self.folder).join("truth.json.zst").exists() {
                let truth = expand_text(&format!("{}/truth.json", self.folder));
                compare_truth(&self.player, &serde_json::from_str(&truth).expect("JSON"));
            }
        }
        self.moments = moments;
    }

    /// Has lines of the kernel's be other lines. It fails unless they are there.
    fn differ(&mut self, kernels: &str, ours: &str) {
        let outputs = self.commands.iter_mut().map(|command| &mut command.output);
        let lines = outputs.chain(self.moments.iter_mut().map(|moment| &mut moment.status));
        let mut here: Vec<&mut String> = lines.flatten().filter(|line| *line == kernels).collect();
        assert!(!here.is_empty(), "{kernels:?} is not there");
        here.iter_mut().for_each(|line| **line = ours.to_owned());
    }

    fn play(&mut self) {
        (0..self.commands.len()).for_each(|at| self.step(at));
    }

    /// What a check finds in the metadata.
    fn codes(&self) -> BTreeSet<&'static str> {
        let all = self.player.metadata.values();
        all.flat_map(|meta| codes_of(meta.contents())).collect()
    }
}

fn compare(player: &mut Player, moment: &Moment, tolerance: u64) {
    let label = &moment.label;
    let (mut status, tables, state) = player.lines();
    let kernel = moment.status[0].trim_start_matches("pool: ");
    let kernel: Line<PoolStatusLine> = kernel.parse().expect("a status");
    if let (Some(mut state), PoolStatusLine::Pool(theirs)) = (state, kernel.words) {
        let (ours, used) = (state.used_metadata_blocks, theirs.used_metadata_blocks);
        assert!(
            ours.abs_diff(used) <= tolerance,
            "{label}: {ours} metadata blocks are in use, {used} in the kernel"
        );
        state.used_metadata_blocks = used;
        state.held_root = state.held_root.and(theirs.held_root);
        let line = Line {
            sectors: kernel.sectors,
            words: PoolStatusLine::Pool(state),
        };
        status[0] = format!("pool: {line}");
    }
    assert_eq!(status, moment.status, "{label}");
    assert_eq!(tables, moment.tables, "{label}");
}

/// What is mapped, and what is there.
fn compare_truth(player: &Player, truth: &Value) {
    let rig = &player.pool.as_ref().expect("the pool is active").rig;
    let chunks = truth["block_size_sectors"].as_u64().expect("a number") / 8;
    let runs = |value: &Value| -> Vec<Vec<u64>> {
        serde_json::from_value(value.clone()).expect("lists of numbers")
    };
    for (id, thin) in truth["thins"].as_object().expect("devices") {
        let mappings = rig.mappings(id.parse().expect("a number"));
        let expected = runs(&thin["runs"]);
        let expected: Vec<u64> = expected.iter().flat_map(|r| r[0]..r[0] + r[1]).collect();
        let mapped: Vec<u64> = mappings.keys().copied().collect();
        assert_eq!(mapped, expected, "blocks of device {id}");
        if truth["has_content"] != true {
            continue;
        }
        assert_eq!(truth["unwritten_chunks"], "zero");
        let content = runs(&thin["content"]).into_iter().flat_map(|run| {
            let (begin, len, tag) = (run[0], run[1], run[2]);
            (begin..begin + len).map(move |chunk| (chunk, content(tag, chunk)))
        });
        let content: BTreeMap<u64, u64> = content.collect();
        for (block, data) in mappings {
            let found = rig.disk.read(data * chunks * 8, chunks * 8);
            let range = block * chunks..(block + 1) * chunks;
            let expected = range.map(|chunk| content.get(&chunk).copied().unwrap_or(0));
            assert!(
                found.iter().copied().eq(expected),
                "device {id}, block {block}"
            );
        }
    }
}

/// Plays a fixture, of which a check finds nothing afterwards.
fn play(folder: &'static str, anchors: &[Anchor]) {
    let mut replay = Replay::new(folder, anchors);
    replay.play();
    assert!(replay.codes().is_empty(), "{:?}", replay.codes());
}

#[test]
fn a_pool_without_devices() {
    play("empty-2m", &[]);
}

#[test]
fn one_device_in_ascending_order() {
    play("seq-1thin", &[After("< 0001.list")]);
}

#[test]
fn the_transaction_id() {
    play("transaction-id-5", &[After("set_transaction_id 0 5'")]);
}

#[test]
fn other_block_sizes() {
    for folder in ["bs-384", "bs-512", "bs-1gib"] {
        play(folder, &[End]);
    }
}

#[test]
fn ids_and_addresses_at_their_limits() {
    play("ids-limits", &[End]);
}

#[test]
fn many_devices() {
    play("rand-600thins-5", &[End]);
}

#[test]
fn snapshots_in_any_order() {
    play("snap-mix-a", &[End]);
    play("snap-mix-b", &[End]);
}

#[test]
fn snapshots_of_snapshots() {
    play("snap-chain-20", &[End]);
}

#[test]
fn snapshots_of_one_origin() {
    play("snap-fan-60", &[End]);
}

#[test]
fn discards() {
    play("discard-passdown", &[After("< 0009.list")]);
    play("discard-no-passdown", &[After("< 0009.list")]);
}

#[test]
fn an_external_origin() {
    play("extorigin", &[After("< 0005.list")]);
}

/// The pool is loaded with one set of features after another. The engine refuses a table when it is to come into force, the kernel when
/// it is loaded.
#[test]
fn features() {
    let resumed = After("resume pool");
    let mut anchors = vec![resumed; 6];
    anchors.extend([After("< 0017.list"), resumed, resumed]);
    anchors.extend([After("< 0021.list"), resumed]);
    play("features", &anchors);
}

#[test]
fn a_metadata_snapshot() {
    play("held-root", &[After("reserve_metadata_snap"), End]);
}

#[test]
fn no_data_block_left() {
    play(
        "out-of-data-queue",
        &[
            After("< 0001.list"),
            Waiting("< over.list"),
            After("< over.list"),
            After("create_thin 2'"),
            After("< 0003.list"),
        ],
    );
}

#[test]
fn both_devices_grow() {
    let resumed = After("resume pool");
    play(
        "resize",
        &[After("< 0001.list"), resumed, resumed, resumed, End],
    );
}

/// The log of writes that the kernel's run left is of no interest here; what they led to is.
#[test]
fn a_run_whose_writes_were_logged() {
    play("crash-log", &[End]);
}

/// The tools' parts are played by this project's, so that here the metadata is laid out otherwise.
#[test]
fn metadata_that_was_restored() {
    let mut anchors = vec![
        After("set_transaction_id 0 3'"),
        After("reserve_metadata_snap"),
    ];
    for _ in 0..6 {
        anchors.extend([
            After("/dev/vdc /dev/vdb 128 0 0'"),
            After("< 0046.list"),
            After("delete 900'"),
        ]);
    }
    let mut replay = Replay::new("restored", &anchors);
    replay.tolerance = TOLERANCE;
    replay.play();
    assert!(replay.codes().is_empty(), "{:?}", replay.codes());
}

/// Moments of the fixtures whose metadata device fails for some time.
const FAILING: &[Anchor] = &[
    After("set_transaction_id 0 9'"),
    After("set_transaction_id 9 10'"),
    After("resume meta"),
    After("thin-pool /dev/mapper/meta /dev/mapper/data 128 0 1 skip_block_zeroing'"),
    After("< 0003.list"),
];

/// Only writes fail: what was not committed is undone, and the flag says so.
#[test]
fn a_commit_that_fails() {
    let mut replay = Replay::new("needs-check-set", FAILING);
    // The kernel goes on counting blocks whose mapping it undid, until the device is opened again.
    replay.differ("thin2: 0 8388608 thin 51200 -", "thin2: 0 8388608 thin 0 -");
    // A write fails, and in the kernel the flush behind it, too: a read-only pool takes it for a write to block 0, which is not mapped.
    let errors = |n| {
        format!(
            "thinio: writes=1 reads=0 discards=0 mismatches=0 errors={n} first: Input/output error"
        )
    };
    replay.differ(&errors(2), &errors(1));
    replay.play();
    assert_eq!(replay.codes(), BTreeSet::from(["needs-check"]));
}

/// All metadata I/O fails: it cannot even be undone, and nobody can write that down.
#[test]
fn an_abort_that_fails() {
    play("needs-check-error", FAILING);
}

/// Here the kernel goes wrong: having gone over to read-only it goes on to insert what it had prepared, cannot, cannot abort either,
/// and fails; a data block is lost. The engine gives up what it had prepared, stays read-only and loses nothing.
#[test]
fn no_metadata_block_left() {
    let activated = After("thin-pool /dev/vda /dev/mapper/data 128 0 1 skip_block_zeroing'");
    let anchors = [After("< 0001.list"), After("< 0002.list"), activated];
    let mut replay = Replay::new("out-of-metadata-512k", &anchors);
    let full = |c: &Command| c.text.ends_with("< 0002.list");
    let full = replay.commands.iter().position(full).expect("a list");
    (0..full).for_each(|at| replay.step(at));
    let player = &mut replay.player;
    let tally = player.thinio("/dev/mapper/thin2", "0002.list", 64, &mut |_| {});
    assert_eq!(tally.writes, 12_000);
    // The kernel's list had 4858 errors; each leaf more or less is some 200 mappings.
    assert!((4300..5400).contains(&tally.errors), "{}", tally.errors);
    let mode = |player: &Player| player.pool.as_ref().expect("active").rig.pool.mode();
    assert_eq!(mode(player), PoolMode::OutOfMetadataSpace);
    for command in &replay.commands[full + 1..replay.commands.len() - 1] {
        player.run(command, &mut |_| {});
    }
    let (status, _, state) = player.lines();
    assert_eq!(mode(player), PoolMode::OutOfMetadataSpace);
    let used = state.expect("a status").used_data_blocks;
    assert_eq!(used, 12_000 + tally.writes - tally.errors);
    let line = &replay.moments.last().expect("the last").status[0];
    let line = line.replace("19143/", &format!("{used}/"));
    assert_eq!(status, [line]);
    assert!(replay.codes().is_empty(), "{:?}", replay.codes());
}
