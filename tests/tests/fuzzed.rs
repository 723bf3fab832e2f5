//! What fuzzing has found, each made small.

use std::sync::Arc;
use std::time::{Duration, Instant};
use thintools::ErrorKind;
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::thin::PoolMetadata;
use thintools::tools::repair::{Options, recover};
use thintools::tools::{Selection, restore};
use thintools::units::{BLOCK_SIZE, MetadataBlock, ThinBlock, ThinId};

use crate::support::{Image, Map, expand, put_u64};

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

/// Changes of an image, and what the error says of them.
type Case = (fn(&Image), &'static str);

/// Lookups would wait for ever for a root in block 0, sums would overflow, and the superblock would be written over.
#[test]
fn metadata_that_cannot_be_changed_is_refused() {
    let cases: [Case; 7] = [
        (
            |image| image.edit_superblock(|f| f.mapping_root.0 = 0),
            "the mapping root is block 0;",
        ),
        (
            |image| image.edit_superblock(|f| f.details_root.0 = 1 << 40),
            "the device details root is block 1099511627776;",
        ),
        (
            |image| image.edit_superblock(|f| f.data_space_map.nr_blocks = u64::MAX),
            "the data space map counts 18446744073709551615 blocks",
        ),
        (
            |image| image.edit_superblock(|f| f.data_space_map.nr_allocated = u64::MAX),
            "the data space map has 18446744073709551615 of",
        ),
        (
            |image| image.edit_superblock(|f| f.metadata_space_map.nr_allocated = u64::MAX),
            "the metadata space map has 18446744073709551615 of",
        ),
        (
            |image| image.edit_index(Map::Data, 0, |free, _| *free = u32::MAX),
            "bitmap 0 has 4294967295 of 16320 blocks free",
        ),
        (
            |image| {
                image.set_count(Map::Metadata, 0, 0);
                image.edit_index(Map::Metadata, 0, |_, hint| *hint = 0);
            },
            "metadata block 0, the superblock, counts as free",
        ),
    ];
    for (damage, expected) in cases {
        let image = Image::of("snap-mix-a/meta");
        damage(&image);
        let before = image.bytes();
        let engine = Arc::new(RamEngine::from_bytes(before.clone()));
        let refused = PoolMetadata::open(Arc::clone(&engine) as _, 0)
            .and_then(|mut pool| {
                let data = pool.alloc_data_block()?.expect("a free block");
                pool.insert_block(ThinId(0), ThinBlock(9999), data)?;
                pool.commit()
            })
            .expect_err(expected);
        assert_eq!(refused.kind(), ErrorKind::Damaged, "{refused}");
        let text = refused.to_string();
        assert!(text.contains(expected), "{text}");
        let engine = Arc::into_inner(engine).expect("nobody else has it");
        assert!(engine.into_bytes() == before, "{expected}: written over");
    }
}

/// A device that counts as many mappings as there are numbers gets no other number.
#[test]
fn a_count_of_mappings_at_its_end_stays_there() {
    let image = Image::of("snap-mix-a/meta");
    let leaf = image.first_leaf(image.superblock().details_root.0);
    image.edit_block(leaf, |leaf| put_u64(leaf, 32 + 8 * 126, u64::MAX));
    let engine = Arc::new(RamEngine::from_bytes(image.bytes()));
    let mut pool = PoolMetadata::open(engine, 0).expect("opened");
    let id = pool.devices().expect("read")[0];
    let data = pool.alloc_data_block().expect("room");
    pool.insert_block(id, ThinBlock(9999), data.expect("a block"))
        .expect("room");
    assert_eq!(pool.details(id).expect("there").mapped_blocks, u64::MAX);
}
