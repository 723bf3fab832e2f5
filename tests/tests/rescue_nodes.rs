//! Pools of which inner nodes are lost, as `thin_serve --read-only` opens them: each block of each device is what it was, or an error;
//! and what is served is what a repair would recover.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::thin::PoolMetadata;
use thintools::tools::Selection;
use thintools::tools::devtools::{Pattern, Recipe, generate};
use thintools::tools::repair::{self, Mending};
use thintools::units::{BLOCK_SIZE, ThinBlock, ThinId};

use crate::repair_damage::Told;
use crate::rescue::Known;
use crate::support::{expand, get_u32, get_u64};

/// What came of the blocks of a damaged pool that are not lost.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    /// Mappings that are served.
    served: u64,
    /// Mappings in whole leaves that are an error.
    refused: u64,
    /// Blocks that are not mapped and are an error, among those that were tried.
    refused_holes: u64,
}

/// Metadata with these blocks lost.
fn without(image: &[u8], lost: &[u64]) -> Vec<u8> {
    let mut bytes = image.to_vec();
    for &block in lost {
        bytes[block as usize * BLOCK_SIZE..][..BLOCK_SIZE].fill(0xa5);
    }
    bytes
}

/// Opens metadata as the command does; true if it was searched.
fn opened(bytes: &[u8], options: &repair::Options) -> (PoolMetadata, bool) {
    let engine: Arc<dyn BlockEngine> = Arc::new(RamEngine::from_bytes(bytes.to_vec()));
    let mending = Arc::new(Mending(Arc::clone(&engine)));
    let (engine, is_searched) = match repair::refuse_lost_nodes(&*mending, &Silent) {
        Ok(()) => (mending as _, false),
        Err(_) => {
            let found = repair::rescue(engine, options, &Silent).expect("something is found");
            (found.engine, true)
        }
    };
    let pool = PoolMetadata::open_to_rescue(engine, 1 << 20).expect("it can be read");
    (pool, is_searched)
}

/// The mappings that a repair recovers.
fn repaired(bytes: &[u8], options: &repair::Options) -> BTreeMap<(u64, u64), u64> {
    let engine = RamEngine::from_bytes(bytes.to_vec());
    let recovery = repair::recover(&engine, options, &Silent).expect("something is found");
    let told = Told::of(&recovery.source(Selection::default(), &Silent));
    let mut mappings = BTreeMap::new();
    for (id, (_, runs)) in told.devices {
        for run in runs {
            let one = |i| ((id, run.thin_begin.0 + i), run.data_begin.0 + i);
            mappings.extend((0..run.length).map(one));
        }
    }
    mappings
}

/// Loses blocks, and holds what is served against what was there, and against what a repair recovers.
fn lose(known: &Known, lost: &[u64], case: &str) -> Outcome {
    let bytes = without(&known.image, lost);
    let options = repair::Options::default();
    let (pool, is_searched) = opened(&bytes, &options);
    let mut outcome = Outcome::default();
    let mut served = BTreeMap::new();
    for (&id, mappings) in &known.thins {
        let truth: BTreeMap<u64, (u64, u64)> = mappings
            .iter()
            .map(|m| (m.thin_block, (m.data_block, m.leaf)))
            .collect();
        let around = truth.keys().flat_map(|&key| {
            [
                key.saturating_sub(1),
                key,
                key.saturating_add(1),
                key.saturating_add(100_000),
            ]
        });
        let tried: BTreeSet<u64> = around.chain([0]).collect();
        for key in tried {
            let found = pool.find_block(ThinId(id), ThinBlock(key));
            let what = || format!("{case}: device {id}, block {key}");
            match (truth.get(&key), found) {
                (Some(&(data, _)), Ok(Some(found))) => {
                    assert_eq!(found.block.0, data, "{}", what());
                    served.insert((id, key), data);
                    outcome.served += 1;
                }
                (Some(_), Ok(None)) => panic!("{} reads as zeros", what()),
                (Some((_, leaf)), Err(_)) => outcome.refused += u64::from(!lost.contains(leaf)),
                (None, Ok(Some(found))) => panic!("{} is mapped to {}", what(), found.block),
                (None, Ok(None)) => {}
                (None, Err(_)) => outcome.refused_holes += 1,
            }
        }
    }
    if is_searched {
        assert!(
            served == repaired(&bytes, &options),
            "{case}: a repair recovers something else"
        );
    }
    outcome
}

/// Inner nodes of mapping trees.
fn inner(known: &Known) -> Vec<u64> {
    let is_inner = |block: &u64| get_u32(&known.image, *block as usize * BLOCK_SIZE + 4) & 1 != 0;
    known.nodes.iter().copied().filter(is_inner).collect()
}

/// Trees of three levels, with snapshots that share parts of them, and some history.
fn generated(seed: u64) -> Known {
    let recipe = Recipe {
        devices: 2,
        mappings: 70_000,
        pattern: Pattern::Random,
        snapshots: 2,
        transactions: 6,
        seed,
        data_block_size: 128,
        metadata_blocks: None,
    };
    let engine = generate(&recipe, &Silent).expect("it can be made");
    Known::of(engine.into_bytes())
}

fn images() -> impl Iterator<Item = (String, Known)> {
    let names = [
        "snap-mix-a",
        "snap-mix-b",
        "snap-chain-20",
        "snap-fan-60",
        "crash-log",
        "needs-check-set",
        "held-root",
        "rand-1thin-70k",
        "bs-512",
        "discard-no-passdown",
    ];
    let kernel = names.map(|name| {
        let known = Known::of(expand(&format!("{name}/meta.img")));
        (name.to_owned(), known)
    });
    kernel
        .into_iter()
        .chain([(String::from("generated"), generated(1))])
}

#[test]
fn a_lost_inner_node_costs_nothing() {
    let mut cases = 0;
    for (name, known) in images() {
        let whole = lose(&known, &[], &name);
        for block in inner(&known) {
            let case = format!("{name}, block {block}");
            assert_eq!(lose(&known, &[block], &case), whole, "{case}");
            cases += 1;
        }
    }
    assert!(cases >= 20, "only {cases} cases");
}

/// A leaf below each inner node that leads to leaves.
fn a_leaf_below(known: &Known) -> Vec<(u64, u64)> {
    let leaves: BTreeSet<u64> = known.thins.values().flatten().map(|m| m.leaf).collect();
    let inner = inner(known).into_iter();
    let pairs = inner.filter_map(|block| {
        let children = children(&known.image, block);
        let child = children[children.len() / 2];
        leaves.contains(&child).then_some((block, child))
    });
    pairs.collect()
}

fn children(image: &[u8], block: u64) -> Vec<u64> {
    let node = &image[block as usize * BLOCK_SIZE..][..BLOCK_SIZE];
    let (entries, max) = (get_u32(node, 16) as usize, get_u32(node, 20) as usize);
    (0..entries)
        .map(|at| get_u64(node, 32 + 8 * (max + at)))
        .collect()
}

/// What is not mapped is an error, too, where the leaf may have been.
#[test]
fn a_lost_inner_node_and_a_lost_leaf_below_it_cost_that_leaf() {
    let mut refused_holes = 0;
    for (name, known) in images() {
        for (block, leaf) in a_leaf_below(&known) {
            let case = format!("{name}, blocks {block} and {leaf}");
            let found = lose(&known, &[block, leaf], &case);
            assert_eq!(found.refused, 0, "{case}");
            refused_holes += found.refused_holes;
        }
    }
    assert!(refused_holes > 0);
}

/// Of two nodes of devices that share much it may be unknown which had which child: that is an error, as a repair leaves it out.
#[test]
fn two_lost_inner_nodes_never_make_a_block_another_one() {
    let mut free = 0;
    for (name, known) in images().filter(|(name, _)| name != "snap-fan-60") {
        let inner = inner(&known);
        for pair in inner.windows(2) {
            let case = format!("{name}, blocks {pair:?}");
            free += u64::from(lose(&known, pair, &case).refused == 0);
        }
    }
    assert!(free >= 20, "only {free} pairs cost nothing");
}

/// The way down from the root to a leaf is lost from end to end, and with it the top-level tree or not.
#[test]
fn a_whole_way_down_that_is_lost_costs_no_more_than_is_in_doubt() {
    for (name, known) in images() {
        let top = get_u64(&known.image, 320);
        for (block, leaf) in a_leaf_below(&known).into_iter().step_by(7) {
            let parents = inner(&known);
            let parent = parents
                .into_iter()
                .find(|&p| children(&known.image, p).contains(&block));
            let way: Vec<u64> = parent.into_iter().chain([block, leaf]).collect();
            lose(&known, &way, &format!("{name}, blocks {way:?}"));
            let all: Vec<u64> = way.iter().copied().chain([top]).collect();
            lose(&known, &all, &format!("{name}, blocks {all:?}"));
        }
    }
}
