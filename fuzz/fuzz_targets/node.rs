//! Arbitrary bytes as a node of any tree, sealed or not, with its header made right or not; then in the place of a tree's root in
//! a small pool: nothing may panic, and what is accepted keeps the order and the bounds that its users rely on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use thintools::bytes::put_u32;
use thintools::checksum::{BlockKind, seal};
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::pdata::{IndexEntry, NODE_HEADER, Node, Value, max_entries};
use thintools::thin::{BlockTime, DeviceDetail, SUPERBLOCK, Superblock};
use thintools::tools::repair::{Options, recover};
use thintools::tools::{Selection, restore};
use thintools::units::{BLOCK_SIZE, MetadataBlock};
use thintools_fuzz::{Input, assert_clean, check_all, dump, small};

const VALUE_SIZES: [usize; 4] = [4, 8, 16, 24];

static SMALL: LazyLock<Vec<u8>> = LazyLock::new(small);
/// The blocks that may hold the node, with the size of the values there.
static PLACES: LazyLock<Vec<(MetadataBlock, usize)>> = LazyLock::new(|| {
    let (superblock, _) = Superblock::verify(&SMALL[..BLOCK_SIZE], SUPERBLOCK, 64);
    let superblock = superblock.expect("a good superblock");
    let top = superblock.mapping_root;
    let block = &SMALL[top.0 as usize * BLOCK_SIZE..][..BLOCK_SIZE];
    let devices = Node::parse(block, top, 8).expect("a good node");
    let devices = devices.values_u64().map(|root| (MetadataBlock(root), 8));
    let others = [
        (top, 8),
        (superblock.details_root, 24),
        (superblock.data_space_map.bitmap_root, 16),
        (superblock.data_space_map.ref_count_root, 4),
        (superblock.metadata_space_map.ref_count_root, 4),
    ];
    others.into_iter().chain(devices).collect()
});

fn use_all(node: &Node<'_>, location: MetadataBlock, value_size: usize) {
    let size = if node.is_leaf() { value_size } else { 8 };
    assert_eq!(node.location(), location);
    assert!(node.len() <= max_entries(size) && (node.is_leaf() || !node.is_empty()));
    let keys: Vec<u64> = node.keys().collect();
    assert_eq!(keys.len(), node.len());
    assert!(keys.is_sorted_by(|a, b| a < b));
    assert!(keys.iter().enumerate().all(|(i, &key)| node.key(i) == key));
    assert_eq!(node.values().len(), node.len());
    for value in node.values() {
        assert_eq!(value.len(), size);
        match size {
            4 => assert_survives::<u32>(value),
            8 => assert_survives::<u64>(value),
            16 => assert_survives::<IndexEntry>(value),
            _ => assert_survives::<DeviceDetail>(value),
        }
    }
    if size == 8 {
        assert!(node.values_u64().all(|v| BlockTime::unpack(v).pack() == v));
    }
}

fn assert_survives<V: Value>(bytes: &[u8]) {
    let mut packed = vec![0; V::SIZE];
    V::unpack(bytes).pack(&mut packed);
    assert_eq!(packed, bytes);
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let how = input.u8();
    let (place, value_size) = PLACES[usize::from(input.u8()) % PLACES.len()];
    let entries = u32::from(input.u16());
    let mut block = vec![0; BLOCK_SIZE];
    let contents = input.bytes(BLOCK_SIZE);
    if how & 1 != 0 {
        // All but the number of entries is right.
        let is_leaf = how & 2 != 0;
        let size = if is_leaf { value_size } else { 8 };
        let contents = &contents[..contents.len().min(BLOCK_SIZE - NODE_HEADER)];
        block[NODE_HEADER..][..contents.len()].copy_from_slice(contents);
        put_u32(&mut block, 4, 1 + u32::from(is_leaf));
        put_u32(&mut block, 16, entries);
        put_u32(&mut block, 20, max_entries(size) as u32);
        put_u32(&mut block, 24, size as u32);
    } else {
        block[..contents.len()].copy_from_slice(contents);
    }
    if how & 4 == 0 {
        seal(&mut block, BlockKind::Node, place);
    }
    for size in VALUE_SIZES {
        match Node::parse(&block, place, size) {
            Ok(node) => use_all(&node, place, size),
            Err(fault) => assert!(!fault.to_string().is_empty()),
        }
    }
    let mut image = SMALL.clone();
    image[place.0 as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(&block);
    let engine = RamEngine::from_bytes(image);
    check_all(&engine);
    let _ = dump(&engine, Selection::default());
    let options = Options {
        include_ambiguous: how & 8 != 0,
        ..Options::default()
    };
    if let Ok(recovery) = recover(&engine, &options, &Silent) {
        let output = RamEngine::new(256);
        if restore(
            &recovery.source(Selection::default(), &Silent),
            &output,
            &Silent,
        )
        .is_ok()
        {
            assert_clean(&output);
        }
    }
});
