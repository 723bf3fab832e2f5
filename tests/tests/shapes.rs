//! Trees of shapes that sharing, growth and damage bring about, built in memory: nothing sound may be lost on the way.

use std::collections::BTreeMap;

use thintools::Result;
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::pdata::{Forest, Leaves, Shape, TreeKind, Walk};
use thintools::thin::Superblock;
use thintools::tools::check::{CheckOptions, Severity, check};
use thintools::tools::event::{Device, PoolInfo, Run, Sink, Source};
use thintools::tools::repair::{Options, recover};
use thintools::tools::{MetadataSource, Restored, Selection, Trees, restore};
use thintools::units::{BLOCK_SIZE, DataBlock, MetadataBlock, ThinBlock, ThinId};

/// Part of a device: own mappings (first virtual block, how many), or a definition by number.
#[derive(Clone, Copy)]
enum Part {
    Own(u64, u64),
    Shared(usize),
}

/// A pool: definitions as ranges of virtual blocks, and devices.
struct Pool {
    definitions: Vec<(u64, u64)>,
    devices: Vec<Vec<Part>>,
}

/// Mappings without two neighbours in a row, so that each is an entry and a run of its own.
fn runs(first: u64, count: u64, salt: u64) -> Vec<Run> {
    (first..first + count)
        .map(|thin| Run {
            thin_begin: ThinBlock(thin),
            data_begin: DataBlock((thin * 7919 + salt * 104_729) % 1_000_003),
            length: 1,
            time: 1,
        })
        .collect()
}

impl Source for Pool {
    fn emit(&self, sink: &mut dyn Sink) -> Result<()> {
        sink.pool(&PoolInfo {
            time: 2,
            data_block_size: 128,
            nr_data_blocks: 1_000_003,
            version: 2,
            ..PoolInfo::default()
        })?;
        for (number, &(first, count)) in self.definitions.iter().enumerate() {
            sink.define(&number.to_string())?;
            sink.mappings(&runs(first, count, 0))?;
            sink.end_define()?;
        }
        for (id, parts) in (0..).zip(&self.devices) {
            let size = |part: &Part| match *part {
                Part::Own(_, count) => count,
                Part::Shared(number) => self.definitions[number].1,
            };
            sink.device(&Device {
                dev_id: ThinId(id),
                mapped_blocks: parts.iter().map(size).sum(),
                snap_time: 2,
                ..Device::default()
            })?;
            for part in parts {
                match *part {
                    Part::Own(first, count) => sink.mappings(&runs(first, count, id + 1))?,
                    Part::Shared(number) => sink.reference(&number.to_string())?,
                }
            }
            sink.end_device()?;
        }
        sink.end()
    }
}

/// Adds up the mappings of each device, definitions opened.
#[derive(Default)]
struct Sizes {
    definitions: BTreeMap<String, u64>,
    open: Option<String>,
    device: u64,
    sizes: BTreeMap<u64, u64>,
}

impl Sizes {
    fn add(&mut self, count: u64) {
        match &self.open {
            Some(name) => *self.definitions.entry(name.clone()).or_default() += count,
            None => *self.sizes.entry(self.device).or_default() += count,
        }
    }
}

impl Sink for Sizes {
    fn pool(&mut self, _: &PoolInfo) -> Result<()> {
        Ok(())
    }
    fn define(&mut self, name: &str) -> Result<()> {
        self.open = Some(name.to_owned());
        Ok(())
    }
    fn end_define(&mut self) -> Result<()> {
        self.open = None;
        Ok(())
    }
    fn device(&mut self, device: &Device) -> Result<()> {
        self.device = device.dev_id.0;
        self.add(0);
        Ok(())
    }
    fn end_device(&mut self) -> Result<()> {
        Ok(())
    }
    fn mappings(&mut self, runs: &[Run]) -> Result<()> {
        self.add(runs.iter().map(|r| r.length).sum());
        Ok(())
    }
    fn reference(&mut self, name: &str) -> Result<()> {
        self.add(self.definitions[name]);
        Ok(())
    }
    fn end(&mut self) -> Result<()> {
        Ok(())
    }
}

fn built(pool: &Pool, blocks: usize) -> (RamEngine, Restored) {
    let engine = RamEngine::new(blocks);
    let restored = restore(pool, &engine, &Silent).expect("restores");
    let report = check(&engine, &CheckOptions::default(), &Silent)
        .expect("checks")
        .report;
    assert!(
        report.verdict.severity <= Some(Severity::Note),
        "{:?}",
        report.damages
    );
    (engine, restored)
}

fn dumped(engine: &RamEngine) -> BTreeMap<u64, u64> {
    let superblock = Superblock::read(engine).expect("reads");
    let trees = Trees::read(
        engine,
        &superblock,
        superblock.data_space_map.nr_blocks,
        &Silent,
    )
    .expect("reads");
    let source = MetadataSource {
        engine,
        trees,
        selection: Selection::default(),
        recovered: None,
        observer: &Silent,
    };
    let mut sizes = Sizes::default();
    source.emit(&mut sizes).expect("dumps");
    sizes.sizes
}

/// The mapping trees of a pool in memory: the forest and the root of each device.
fn mapping_trees(engine: &RamEngine) -> (Forest, Vec<MetadataBlock>) {
    let superblock = Superblock::read(engine).expect("reads");
    let trees = Trees::read(engine, &superblock, 1_000_003, &Silent).expect("reads");
    let roots: Vec<_> = trees.devices.values().map(|d| d.0).collect();
    let mut forest = Forest::new(engine.nr_blocks());
    let walk = Walk {
        engine,
        observer: &Silent,
        tree: TreeKind::Mappings,
        leaves: Leaves::Read,
    };
    forest
        .walk(&walk, roots.iter().copied(), || (), |(), _| ())
        .expect("walks");
    (forest, roots)
}

#[test]
fn a_snapshot_lower_than_its_grown_origin_hides_nothing_of_it() {
    for (shared, own) in [(200, 70_000), (20_000, 70_000), (252, 300), (60_000, 100)] {
        let pool = Pool {
            definitions: vec![(0, shared)],
            devices: vec![
                vec![Part::Shared(0)],
                vec![Part::Shared(0), Part::Own(shared, own)],
            ],
        };
        let (engine, _) = built(&pool, 2048);
        assert_eq!(
            dumped(&engine),
            BTreeMap::from([(0, shared), (1, shared + own)])
        );
    }
}

#[test]
fn the_rehearsal_finds_the_very_size_that_is_written() {
    let mut random = 1_u64;
    let mut next = |below: u64| {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for _ in 0..12 {
        let mut definitions = Vec::new();
        let mut first = 0;
        for _ in 0..12 {
            let count = 1 + next(700);
            definitions.push((first, count));
            first += count + 50;
        }
        let mut devices = Vec::new();
        for _ in 0..40 {
            let mut parts = Vec::new();
            for (number, &(first, count)) in definitions.iter().enumerate() {
                if next(3) > 0 {
                    parts.push(Part::Shared(number));
                }
                if next(4) == 0 {
                    parts.push(Part::Own(first + count, 1 + next(49)));
                }
            }
            devices.push(parts);
        }
        let pool = Pool {
            definitions,
            devices,
        };
        let needed = built(&pool, 16_000).1.used_blocks;
        let small = RamEngine::new(needed as usize - 1);
        let error = restore(&pool, &small, &Silent).expect_err("too small");
        assert!(
            error
                .to_string()
                .contains(&format!("needs {needed} blocks")),
            "{error}, {needed}"
        );
        assert!(
            small.into_bytes().iter().all(|&b| b == 0),
            "nothing was written"
        );
        built(&pool, needed as usize);
    }
}

#[test]
fn a_lost_first_subtree_takes_no_sibling_with_it() {
    let pool = Pool {
        definitions: vec![],
        devices: vec![vec![Part::Own(0, 200_000)]],
    };
    let (engine, _) = built(&pool, 2048);
    let (forest, roots) = mapping_trees(&engine);
    let node = |block| &forest.nodes()[forest.number(block).expect("reached")];
    let first = forest
        .child(&forest.edges(node(roots[0]))[0])
        .expect("a child");
    let mut lost = 0;
    for edge in forest.edges(node(first)) {
        let leaf = forest.child(edge).expect("a leaf");
        if let Shape::Leaf { entries, .. } = node(leaf).shape {
            lost += u64::from(entries);
        }
        engine.write(leaf, &[0; BLOCK_SIZE]).expect("writes");
    }
    assert!(lost > 60_000);
    let recovery = recover(&engine, &Options::default(), &Silent).expect("recovers");
    assert_eq!(recovery.report.devices[0].mappings, 200_000 - lost);
    let report = check(&engine, &CheckOptions::default(), &Silent)
        .expect("checks")
        .report;
    assert!(report.damages.iter().all(|d| d.code.name() != "tree-depth"));
}

#[test]
fn a_stray_pointer_costs_the_rightful_owner_nothing() {
    let pool = Pool {
        definitions: vec![],
        devices: vec![vec![Part::Own(0, 1000)], vec![Part::Own(5000, 1000)]],
    };
    let (engine, _) = built(&pool, 256);
    let (forest, roots) = mapping_trees(&engine);
    let node = |block| &forest.nodes()[forest.number(block).expect("reached")];
    let stolen = forest
        .child(&forest.edges(node(roots[1]))[1])
        .expect("a leaf");
    for target in [stolen, roots[1], roots[0]] {
        let bytes = {
            let mut block = vec![0; BLOCK_SIZE];
            engine.read(roots[0], &mut block).expect("reads");
            block
        };
        let mut block = bytes.clone();
        let second_value = 32 + 8 * 252 + 8;
        block[second_value..second_value + 8].copy_from_slice(&target.0.to_le_bytes());
        thintools::checksum::seal(&mut block, thintools::checksum::BlockKind::Node, roots[0]);
        engine.write(roots[0], &block).expect("writes");
        let devices = recover(&engine, &Options::default(), &Silent)
            .expect("recovers")
            .report
            .devices;
        assert_eq!(devices[1].mappings, 1000, "pointer to {target}");
        assert!(
            (500..1000).contains(&devices[0].mappings),
            "pointer to {target}: {}",
            devices[0].mappings
        );
        assert!(!devices[0].lost.is_empty());
        engine.write(roots[0], &bytes).expect("writes");
    }
}
