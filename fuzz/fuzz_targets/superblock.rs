//! Arbitrary bytes as block 0, alone and before a small pool, sealed or not: nothing may panic, fields survive packing, and what
//! a repair writes must pass the check.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use thintools::checksum::{BlockKind, seal};
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::thin::{Fields, SUPERBLOCK, Superblock, SuperblockFault};
use thintools::tools::check::{CheckOptions, Scope, check};
use thintools::tools::repair::{Options, list_candidates, recover};
use thintools::tools::{Selection, restore};
use thintools::units::BLOCK_SIZE;
use thintools_fuzz::{Input, assert_clean, check_all, dump, small};

static SMALL: LazyLock<Vec<u8>> = LazyLock::new(small);

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let how = input.u8();
    let mut block = SMALL[..BLOCK_SIZE].to_vec();
    let contents = input.bytes(BLOCK_SIZE);
    block[..contents.len()].copy_from_slice(contents);
    if how & 1 != 0 {
        seal(&mut block, BlockKind::Superblock, SUPERBLOCK);
    }
    for device_blocks in [0, 1, 64, u64::MAX] {
        let (superblock, faults) = Superblock::verify(&block, SUPERBLOCK, device_blocks);
        let forbids = faults.iter().any(SuperblockFault::forbids_reading);
        assert_eq!(superblock.is_none(), forbids);
        assert!(faults.iter().all(|f| !f.to_string().is_empty()));
    }
    let fields = Fields::unpack(&block);
    let packed = fields.pack();
    assert_eq!(Fields::unpack(&packed), fields);
    let (_, faults) = Superblock::verify(&packed, SUPERBLOCK, 64);
    assert!(!faults.iter().any(|f| matches!(f, SuperblockFault::Seal(_))));

    let mut image = if how & 2 != 0 {
        SMALL.clone()
    } else {
        vec![0; BLOCK_SIZE]
    };
    image[..BLOCK_SIZE].copy_from_slice(&block);
    let engine = RamEngine::from_bytes(image);
    let only = CheckOptions {
        scope: Scope::SuperblockOnly,
        ..CheckOptions::default()
    };
    check(&engine, &only, &Silent).expect("block 0 is readable");
    check_all(&engine);
    let _ = dump(&engine, Selection::default());
    list_candidates(&engine, &Silent).ok();
    if let Ok(recovery) = recover(&engine, &Options::default(), &Silent) {
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
