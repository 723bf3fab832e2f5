//! What fuzzing has found, each made small.

use std::time::{Duration, Instant};
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::tools::repair::{Options, recover};
use thintools::tools::{Selection, restore};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

use crate::support::{Image, expand, put_u64};

/// No input may take longer.
const LIMIT: Duration = Duration::from_secs(5);

/// Each of 600 trees could be each of 600 devices then.
#[test]
fn roots_that_lead_nowhere_are_soon_dealt_with() {
    let mut bytes = expand("rand-600thins-5/meta.img");
    bytes.truncate(1795 * BLOCK_SIZE);
    let engine = RamEngine::from_bytes(bytes);
    let nowhere = MetadataBlock(2047);
    for include_ambiguous in [false, true] {
        let options = Options {
            roots: Some((nowhere, nowhere)),
            include_ambiguous,
            ..Options::default()
        };
        let start = Instant::now();
        let _ = recover(&engine, &options, &Silent);
        assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
    }
}

/// With the superblock the size of the data device is lost, and the furthest mapping stands for it.
#[test]
fn one_impossible_mapping_does_not_keep_a_repair_from_being_written() {
    let image = Image::of("snap-mix-a/meta");
    image.edit_block(image.first_leaf(image.device_root(0)), |leaf| {
        put_u64(leaf, 32 + 8 * 252, u64::MAX << 24);
    });
    image.spoil_block(0, |block| block.fill(0));
    let engine = RamEngine::from_bytes(image.bytes());
    let mut options = Options::default();
    options.overrides.data_block_size = Some(128);
    let recovery = recover(&engine, &options, &Silent).expect("recovered");
    let source = recovery.source(Selection::default(), &Silent);
    let restored = restore(&source, &RamEngine::new(2048), &Silent).expect("written");
    assert!(restored.mappings >= 600, "{}", restored.mappings);
}
