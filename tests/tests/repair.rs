//! What a repair gets back and what it says: nothing is lost to any single damaged block that can be done without, nothing is
//! made up, and every option does what it says.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;
use thintools::Result;
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::tools::check::{CheckOptions, check as checking};
use thintools::tools::event::{Device, PoolInfo, Run, Sink, Source};
use thintools::tools::repair::{Options, Recovery, recover};
use thintools::tools::{Overridden, Overrides, Selection, restore as restoring};
use thintools::units::BLOCK_SIZE;

use crate::support::{Attributes, Finished, Image, Pool, check, expand, fixtures, thintools};

/// `thin_repair -i INPUT ARGUMENTS`.
fn repair(input: &Image, args: &[&str]) -> Finished {
    let call = ["thin_repair", "-i"].map(OsStr::new).into_iter();
    let call = call.chain([input.path().as_os_str()]);
    thintools(call.chain(args.iter().map(OsStr::new))).run()
}

/// Repairs to a new image of the same size, which leaves the input as it is.
#[track_caller]
fn repaired(input: &Image, args: &[&str], code: i32) -> (Image, Finished) {
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
fn runs(pool: &Pool) -> BTreeMap<u64, &Vec<crate::support::Run>> {
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
fn judge(output: &Path) {
    check(&["-q"], output).expect(0).expect_silent();
    if Path::new("/usr/sbin/thin_check").exists() {
        crate::support::peer("thin_check", &[OsStr::new("-q"), output.as_os_str()]).expect(0);
    }
}

/// Values that a lost superblock takes with it, as options.
fn hints(image: &Image) -> [String; 6] {
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

/// A pool as a source tells it, with sharing written out.
#[derive(Debug, Default, PartialEq)]
struct Told {
    pool: PoolInfo,
    devices: BTreeMap<u64, (Device, Vec<Run>)>,
    definitions: HashMap<String, Vec<Run>>,
    defining: Option<String>,
    open: u64,
}

impl Told {
    fn of(source: &dyn Source) -> Self {
        let mut told = Self::default();
        source.emit(&mut told).expect("it can be told");
        told.definitions.clear();
        told
    }

    fn push(&mut self, runs: &[Run]) {
        let to = match &self.defining {
            Some(name) => self.definitions.get_mut(name),
            None => self.devices.get_mut(&self.open).map(|d| &mut d.1),
        };
        let to = to.expect("something is open");
        for run in runs {
            match to.last_mut() {
                Some(last) if last.continues(run) => last.length += run.length,
                _ => to.push(*run),
            }
        }
    }

    /// Only the mappings.
    fn mappings(&self) -> BTreeMap<u64, &Vec<Run>> {
        self.devices.iter().map(|(&id, d)| (id, &d.1)).collect()
    }
}

impl Sink for Told {
    fn pool(&mut self, pool: &PoolInfo) -> Result<()> {
        self.pool = pool.clone();
        Ok(())
    }

    fn define(&mut self, name: &str) -> Result<()> {
        self.definitions.insert(name.to_owned(), Vec::new());
        self.defining = Some(name.to_owned());
        Ok(())
    }

    fn end_define(&mut self) -> Result<()> {
        self.defining = None;
        Ok(())
    }

    fn device(&mut self, device: &Device) -> Result<()> {
        self.open = device.dev_id.0;
        let before = self.devices.insert(self.open, (*device, Vec::new()));
        assert_eq!(before, None, "a device is told twice");
        Ok(())
    }

    fn end_device(&mut self) -> Result<()> {
        Ok(())
    }

    fn mappings(&mut self, runs: &[Run]) -> Result<()> {
        self.push(runs);
        Ok(())
    }

    fn reference(&mut self, name: &str) -> Result<()> {
        let runs = self.definitions[name].clone();
        self.push(&runs);
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        Ok(())
    }
}

fn overridden(source: &dyn Source, overrides: Overrides) -> Overridden<'_> {
    Overridden {
        source,
        overrides,
        observer: &Silent,
        heard: Default::default(),
    }
}

/// What the command would write.
fn told(recovery: &Recovery<'_>, overrides: Overrides) -> Told {
    let source = recovery.source(Selection::default(), &Silent);
    Told::of(&overridden(&source, overrides))
}

/// Writes what was recovered, finds nothing wrong with it, and repairs that again, which changes nothing.
#[track_caller]
fn written_and_repaired_again(recovery: &Recovery<'_>, overrides: Overrides, blocks: usize) {
    let source = recovery.source(Selection::default(), &Silent);
    let source = overridden(&source, overrides);
    let output = RamEngine::new(blocks);
    restoring(&source, &output, &Silent).expect("it can be written");
    let report = checking(&output, &CheckOptions::default(), &Silent)
        .expect("memory can be read")
        .report;
    assert!(report.damages.is_empty(), "{:?}", report.damages);
    let again = recover(&output, &Options::default(), &Silent).expect("it can be repaired");
    assert!(again.report.is_complete, "{:?}", again.report);
    assert!(again.report.notes.is_empty(), "{:?}", again.report.notes);
    assert_eq!(
        told(&again, Overrides::default()),
        told(recovery, overrides)
    );
}

/// Single blocks damaged by the tool for it, in memory.
#[cfg(feature = "devtools")]
mod single {
    use super::*;
    use thintools::tools::devtools::{
        Amount, Damage, Damaged, Inventory, Kind, Spec, Target, compare, damage,
    };
    use thintools::units::MetadataBlock;

    /// An image, and what it holds.
    struct Healthy {
        engine: RamEngine,
        bytes: Vec<u8>,
        inventory: Inventory,
        told: Told,
    }

    impl Healthy {
        fn of(name: &str) -> Self {
            let bytes = expand(&format!("{name}.img"));
            let engine = RamEngine::from_bytes(bytes.clone());
            let inventory = Inventory::read(&engine, &Silent).expect("whole");
            let recovery = recover(&engine, &Options::default(), &Silent).expect("whole");
            assert!(recovery.report.is_complete, "{:?}", recovery.report);
            let told = told(&recovery, Overrides::default());
            Self {
                engine,
                bytes,
                inventory,
                told,
            }
        }

        fn damaged(&self, kind: Kind, damage_: Damage, seed: u64) -> (Vec<u8>, Vec<Damaged>) {
            let spec = Spec {
                target: Target::Of(kind),
                damage: damage_,
                amount: Amount::Number(1),
            };
            let list = damage(&self.engine, &self.inventory, &[spec], seed, &Silent);
            let list = list.expect("there is such a block");
            let mut bytes = self.bytes.clone();
            for one in &list {
                bytes[one.block.0 as usize * BLOCK_SIZE..][..BLOCK_SIZE]
                    .copy_from_slice(&one.contents);
            }
            (bytes, list)
        }

        /// What the user has to know when the superblock is among the damaged blocks.
        fn options(&self, list: &[Damaged]) -> Options {
            let has = |kind| list.iter().any(|one| one.kind == kind);
            let pool = &self.told.pool;
            let overrides = match has(Kind::Superblock) {
                true => Overrides {
                    transaction_id: Some(pool.transaction),
                    data_block_size: Some(pool.data_block_size),
                    nr_data_blocks: Some(pool.nr_data_blocks),
                },
                false => Overrides::default(),
            };
            Options {
                overrides,
                ..Options::default()
            }
        }
    }

    /// All but stale: what a lost write leaves is sealed, and some of it cannot be told from what should be there.
    fn types() -> impl Iterator<Item = Damage> {
        let all = Damage::ALL.into_iter().map(|(damage, _)| damage);
        all.filter(|damage| *damage != Damage::Stale)
    }

    /// A repair gets every mapping of every device back, with its time, whatever single block is damaged, so long as it is no
    /// leaf; and says that nothing is missing only if pool and devices, too, are as they were.
    fn costs_nothing(name: &str) {
        let healthy = Healthy::of(name);
        let counts = healthy.inventory.counts();
        let kinds = counts
            .iter()
            .filter(|(kind, n)| **n > 0 && **kind != Kind::Leaf);
        let mut cases = 0;
        for (&kind, _) in kinds {
            for damage in types() {
                for seed in 0..SEEDS {
                    let case = format!("{name}: {kind}:{damage} --seed {seed}");
                    let (bytes, list) = healthy.damaged(kind, damage, seed);
                    let options = healthy.options(&list);
                    let engine = RamEngine::from_bytes(bytes);
                    let recovery = recover(&engine, &options, &Silent)
                        .unwrap_or_else(|e| panic!("{case}: {e}"));
                    let found = told(&recovery, options.overrides);
                    assert!(
                        found.mappings() == healthy.told.mappings(),
                        "{case}: other mappings; {:?}",
                        recovery.report
                    );
                    let is_same = found == healthy.told;
                    assert!(is_same || !recovery.report.is_complete, "{case}: complete");
                    let harmless = [Kind::Superblock, Kind::Details, Kind::TopLevelRoot];
                    let hurts = list.iter().any(|one| harmless.contains(&one.kind));
                    assert!(is_same || hurts, "{case}: {found:?}");
                    for report in &recovery.report.devices {
                        let (device, runs) = &found.devices[&report.dev_id.0];
                        let mapped: u64 = runs.iter().map(|run| run.length).sum();
                        assert_eq!((device.mapped_blocks, report.mappings), (mapped, mapped));
                    }
                    if seed == 0 {
                        let blocks = engine.nr_blocks() as usize;
                        written_and_repaired_again(&recovery, options.overrides, blocks);
                    }
                    cases += 1;
                }
            }
        }
        assert!(cases >= 7 * 9 * SEEDS, "only {cases} cases");
    }

    /// Blocks that are tried of each kind and type.
    const SEEDS: u64 = 1;

    macro_rules! images {
        ($($test:ident $image:literal)*) => {
            $(#[test]
            fn $test() {
                costs_nothing($image);
            })*
        };
    }

    images! {
        nothing_is_lost_of_mixed_snapshots "snap-mix-a/meta"
        nothing_is_lost_of_more_mixed_snapshots "snap-mix-b/meta"
        nothing_is_lost_beside_a_metadata_snapshot "held-root/meta"
        nothing_is_lost_after_a_crash "crash-log/meta"
        nothing_is_lost_after_discards "discard-no-passdown/meta"
        nothing_is_lost_of_devices_with_high_ids "ids-limits/meta"
        nothing_is_lost_of_devices_with_inner_nodes "bs-512/meta"
        nothing_is_lost_of_a_large_top_level_tree "rand-600thins-5/meta"
        nothing_is_lost_of_a_fan_of_snapshots "snap-fan-60/meta"
        nothing_is_lost_of_external_snapshots "extorigin/meta"
    }

    /// A leaf that is gone costs its own mappings, in every device that shares it, and no others; the report tells the ranges.
    #[test]
    fn a_lost_leaf_costs_its_own_mappings() {
        for name in [
            "snap-mix-a/meta",
            "held-root/meta",
            "snap-fan-60/meta",
            "bs-512/meta",
        ] {
            let healthy = Healthy::of(name);
            for damage in types() {
                for seed in 0..4 {
                    let case = format!("{name}: leaf:{damage} --seed {seed}");
                    let (bytes, list) = healthy.damaged(Kind::Leaf, damage, seed);
                    let engine = RamEngine::from_bytes(bytes);
                    let recovery = recover(&engine, &Options::default(), &Silent)
                        .unwrap_or_else(|e| panic!("{case}: {e}"));
                    let output = RamEngine::new(engine.nr_blocks() as usize);
                    let source = recovery.source(Selection::default(), &Silent);
                    restoring(&source, &output, &Silent).expect("it can be written");
                    let blocks = list.iter().map(|one| one.block).collect();
                    let compared =
                        compare(&healthy.engine, &blocks, &output, &Silent).expect("memory");
                    assert_eq!(
                        (compared.recovered, compared.wrong, compared.unreadable),
                        (compared.held, 0, None),
                        "{case}"
                    );
                    let is_whole = compared.recovered_all == compared.truth;
                    assert!(is_whole || !recovery.report.is_complete, "{case}: complete");
                    lost_is_told(&healthy.told, &recovery, &case);
                }
            }
        }
    }

    /// Every mapping that is missing lies in a range that the report tells as lost, or is told as contested.
    fn lost_is_told(truth: &Told, recovery: &Recovery<'_>, case: &str) {
        let found = told(recovery, Overrides::default());
        for report in &recovery.report.devices {
            let blocks = |told: &Told| -> Vec<u64> {
                let runs = told.devices[&report.dev_id.0].1.iter();
                runs.flat_map(|run| run.thin_begin.0..run.thin_begin.0 + run.length)
                    .collect()
            };
            let there: std::collections::BTreeSet<u64> = blocks(&found).into_iter().collect();
            let missing = blocks(truth).into_iter().filter(|b| !there.contains(b));
            for block in missing {
                let in_range = report
                    .lost
                    .iter()
                    .any(|l| l.begin <= block && l.end.is_none_or(|end| block < end));
                assert!(
                    in_range || report.contested.contains(&block),
                    "{case}: block {block} of device {} is missing without a word",
                    report.dev_id
                );
            }
        }
    }

    /// The same single blocks through the command, as a user would, judged by the checks of both.
    #[test]
    fn the_command_repairs_every_kind_of_block() {
        for name in ["held-root/meta", "rand-600thins-5/meta", "snap-fan-60/meta"] {
            let healthy = Healthy::of(name);
            let image = Image::of(name);
            let before = image.dumped();
            for (kind, count) in healthy.inventory.counts() {
                if count == 0 || kind == Kind::Leaf {
                    continue;
                }
                let (bytes, _) = healthy.damaged(kind, Damage::Junk, 5);
                let copy = Image::from_bytes(&bytes);
                let hints = hints(&image);
                let hints: Vec<&str> = match kind {
                    Kind::Superblock => hints.iter().map(String::as_str).collect(),
                    _ => Vec::new(),
                };
                let output = Image::empty((bytes.len() / BLOCK_SIZE) as u64);
                let path = output.path().to_str().expect("text");
                let done = repair(&copy, &[&["-q", "-o", path], &hints[..]].concat());
                assert!(matches!(done.code, Some(0 | 4)), "{name} {kind}: {done:?}");
                judge(output.path());
                assert!(
                    copy.bytes() == bytes,
                    "{name} {kind}: the input was changed"
                );
                let after = output.dumped();
                assert!(runs(&after) == runs(&before), "{name} {kind}");
                let (again, said) = repaired(&output, &[], 0);
                assert!(again.dumped() == after, "{name} {kind}");
                assert!(!said.stderr.contains("note: "), "{}", said.stderr);
            }
        }
    }

    /// Whatever is damaged: no panic, the output is whole, and what is reported complete is.
    #[test]
    fn several_damaged_blocks_never_make_the_output_bad() {
        for name in [
            "snap-mix-b/meta",
            "held-root/meta",
            "bs-512/meta",
            "discard-passdown/meta",
        ] {
            let healthy = Healthy::of(name);
            for seed in 0..24 {
                let damage_ = types().nth(seed as usize % 7).expect("seven types");
                let spec = Spec {
                    target: Target::Any,
                    damage: damage_,
                    amount: Amount::Number(1 + seed as usize % 9),
                };
                let list = damage(&healthy.engine, &healthy.inventory, &[spec], seed, &Silent)
                    .expect("there are blocks");
                let mut bytes = healthy.bytes.clone();
                for one in &list {
                    bytes[one.block.0 as usize * BLOCK_SIZE..][..BLOCK_SIZE]
                        .copy_from_slice(&one.contents);
                }
                let engine = RamEngine::from_bytes(bytes);
                for include_ambiguous in [false, true] {
                    let options = Options {
                        include_ambiguous,
                        ..healthy.options(&list)
                    };
                    let case = format!("{name}: any:{damage_} --seed {seed} {include_ambiguous}");
                    let Ok(recovery) = recover(&engine, &options, &Silent) else {
                        continue;
                    };
                    written_and_repaired_again(
                        &recovery,
                        options.overrides,
                        engine.nr_blocks() as usize,
                    );
                    let is_same = told(&recovery, options.overrides) == healthy.told;
                    assert!(is_same || !recovery.report.is_complete, "{case}: complete");
                }
            }
        }
    }

    /// The whole of an image's blocks are of a kind, and the one at block 0 is the superblock.
    #[test]
    fn the_kinds_that_are_tried_are_there() {
        let mut seen = std::collections::BTreeSet::new();
        for name in ["held-root/meta", "rand-600thins-5/meta", "snap-fan-60/meta"] {
            let healthy = Healthy::of(name);
            let counts = healthy.inventory.counts();
            seen.extend(counts.into_iter().filter(|c| c.1 > 0).map(|c| c.0));
            assert_eq!(
                healthy.inventory.kind(MetadataBlock(0)),
                Some(Kind::Superblock)
            );
        }
        assert_eq!(seen.len(), Kind::ALL.len(), "{seen:?}");
    }
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
#[ignore = "thin_repair does not do this yet"]
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
#[ignore = "thin_repair does not do this yet"]
fn older_roots_bring_the_older_state_back() {
    for (earlier, later) in EARLIER {
        older_state(earlier, &Image::of(later), &[]);
    }
}

/// The same where the superblock is lost.
#[test]
#[ignore = "thin_repair does not do this yet"]
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
#[ignore = "thin_repair does not do this yet"]
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
#[ignore = "thin_repair does not do this yet"]
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
#[ignore = "thin_repair does not do this yet"]
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
