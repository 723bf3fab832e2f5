//! Edits a kernel-made image, seals what it edited again, and checks, dumps and repairs it: nothing may panic, and what a
//! repair writes must pass the check.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use thintools::checksum::{identify, seal};
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::thin::Superblock;
use thintools::tools::check::{CheckOptions, Severity, check};
use thintools::tools::event::Source;
use thintools::tools::repair::{plan_in_place, recover};
use thintools::tools::{MetadataSource, Overrides, Selection, TextSink, Trees, restore, text};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

static BASE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let packed = include_bytes!("../../testdata/kernel/snap-mix-a/meta.img.zst");
    zstd::decode_all(&packed[..]).expect("the bundled image expands")
});

/// Each edit: block, byte, eight bytes of value, and whether to seal the block again.
fn edited(script: &[u8]) -> Vec<u8> {
    let mut image = BASE.clone();
    let blocks = image.len() / BLOCK_SIZE;
    for edit in script.chunks_exact(13).take(64) {
        let number = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % blocks;
        let at = usize::from(u16::from_le_bytes([edit[2], edit[3]])) % (BLOCK_SIZE - 8);
        let block = &mut image[number * BLOCK_SIZE..][..BLOCK_SIZE];
        let kind = identify(block);
        block[at..at + 8].copy_from_slice(&edit[4..12]);
        if let (Some(kind), true) = (kind, edit[12] % 4 != 0) {
            seal(block, kind, MetadataBlock(number as u64));
        }
    }
    image
}

fuzz_target!(|script: &[u8]| {
    let engine = RamEngine::from_bytes(edited(script));
    let _ = check(&engine, &CheckOptions::default(), &Silent);
    if let Ok(superblock) = Superblock::read(&engine)
        && let Ok(trees) = Trees::read(&engine, &superblock, superblock.data_space_map.nr_blocks, &Silent)
    {
        let source = MetadataSource {
            engine: &engine,
            trees,
            selection: Selection::default(),
            recovered: None,
            observer: &Silent,
        };
        let _ = source.emit(&mut TextSink::new(&mut std::io::sink(), &text::Xml));
    }
    let overrides = Overrides {
        data_block_size: Some(128),
        ..Overrides::default()
    };
    // It checks what it would write before it is written.
    let _ = plan_in_place(&engine, &overrides, &Silent);
    if let Ok(recovery) = recover(&engine, &overrides, &Silent) {
        let output = RamEngine::new(2048);
        let source = recovery.source(&engine, Selection::default(), &Silent);
        if restore(&source, &output, &Silent).is_ok() {
            let checked = check(&output, &CheckOptions::default(), &Silent).expect("the output is readable");
            let worst = checked.report.verdict.severity;
            assert!(worst <= Some(Severity::Note), "{:?}", checked.report.damages);
        }
    }
});
