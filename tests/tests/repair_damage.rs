//! Repairs of blocks that the tool for it damaged, in memory: nothing is lost to a single block that can be done without, and
//! whatever is damaged, what comes out is whole and tells what is missing.

use std::collections::{BTreeMap, HashMap};

use thintools::Result;
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::tools::check::{CheckOptions, check as checking};
use thintools::tools::devtools::{
    Amount, Damage, Damaged, Inventory, Kind, Spec, Target, compare, damage,
};
use thintools::tools::event::{Device, PoolInfo, Run, Sink, Source};
use thintools::tools::repair::{Options, Recovery, recover};
use thintools::tools::{Overridden, Overrides, Selection, restore as restoring};
use thintools::units::BLOCK_SIZE;
use thintools::units::MetadataBlock;

use crate::repair::{hints, judge, repair, repaired, runs};
use crate::support::{Image, expand};

/// A pool as a source tells it, with sharing written out.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Told {
    pool: PoolInfo,
    pub(crate) devices: BTreeMap<u64, (Device, Vec<Run>)>,
    definitions: HashMap<String, Vec<Run>>,
    defining: Option<String>,
    open: u64,
}

impl Told {
    pub(crate) fn of(source: &dyn Source) -> Self {
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
            bytes[one.block.0 as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(&one.contents);
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
                let recovery =
                    recover(&engine, &options, &Silent).unwrap_or_else(|e| panic!("{case}: {e}"));
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
                for (id, (device, _)) in &found.devices {
                    // A clock that is too low would let the kernel write to blocks that are shared.
                    let truth = healthy.told.devices[id].0;
                    assert!(device.snap_time >= truth.snap_time, "{case}: {device:?}");
                    assert!(found.pool.time >= healthy.told.pool.time, "{case}");
                }
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
                let compared = compare(&healthy.engine, &blocks, &output, &Silent).expect("memory");
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
