//! Edited kernel-made images, and images of nothing but the input, through check, dump and repair: nothing may panic, clean
//! metadata can be dumped, what a repair writes must pass the check and come through another repair unchanged, and a repair in place
//! can be undone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thintools::ErrorKind;
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::pdata::nr_bitmaps;
use thintools::thin::Superblock;
use thintools::tools::check::{CheckOptions, Scope, check};
use thintools::tools::repair::{
    Deletions, Options, Recovery, Wanted, list_candidates, plan_in_place, recover, undo,
};
use thintools::tools::{Overridden, Overrides, Selection, restore};
use thintools::units::{MAX_METADATA_BLOCKS, MetadataBlock, ThinId};
use thintools_fuzz::{
    BASES, Base, Input, assert_clean, check_all, dump, edited, is_clean, told, unshared,
};

/// Blocks of what a repair writes to.
const OUTPUT_BLOCKS: usize = 2048;

fn options(base: &Base, how: u8, input: &mut Input<'_>) -> Options {
    let mut roots = || MetadataBlock(input.block(base) as u64);
    Options {
        overrides: Overrides {
            data_block_size: (how & 1 != 0).then_some(128),
            nr_data_blocks: (how & 2 != 0).then_some(50_000),
            transaction_id: (how & 4 != 0).then_some(7),
        },
        include_ambiguous: how & 8 != 0,
        roots: (how & 0x30 == 0x30).then(|| (roots(), roots())),
    }
}

/// Fails unless what is recovered can be written, passes the check and comes through another repair as it is.
fn assert_good(recovery: &Recovery<'_>, overrides: Overrides) {
    let source = recovery.source(Selection::default(), &Silent);
    let overridden = Overridden {
        source: &source,
        overrides,
        observer: &Silent,
        heard: false.into(),
    };
    let output = RamEngine::new(OUTPUT_BLOCKS);
    if let Err(e) = restore(&overridden, &output, &Silent) {
        // Of a pool whose size is lost, the furthest mapping tells; none is too far for the format.
        let bitmaps = nr_bitmaps(recovery.pool().nr_data_blocks);
        let is_too_large = bitmaps >= MAX_METADATA_BLOCKS;
        assert!(e.kind() == ErrorKind::OutputTooSmall || is_too_large, "{e}");
        return;
    }
    assert_clean(&output);
    let mappings = dump(&output, unshared()).expect("clean metadata can be dumped");
    let again = recover(&output, &Options::default(), &Silent).expect("clean metadata is repaired");
    assert!(again.report.is_complete, "{:?}", again.report);
    let mappings_again = told(&again.source(unshared(), &Silent)).expect("a repair can be told");
    assert!(
        mappings == mappings_again,
        "another repair changes what the first one wrote"
    );
}

/// Brings back a deleted device.
fn undelete(engine: &dyn BlockEngine) {
    let Ok(deletions) = Deletions::find(engine, &Silent) else {
        return;
    };
    let list = deletions.list().expect("memory can be read");
    let Some(device) = list.devices.iter().find(|d| d.remains.is_some()) else {
        return;
    };
    let wanted = Wanted {
        dev_id: device.dev_id,
        new_id: device.id_is_taken.then_some(ThinId(0x00ab_cdef)),
        from: None,
    };
    if let Ok(undeleted) = deletions.bring_back(&wanted) {
        assert_good(&undeleted.recovery, Overrides::default());
    }
}

/// Repairs in place, and takes it back.
fn repair_in_place(image: Vec<u8>, overrides: &Overrides) {
    let engine = RamEngine::from_bytes(image.clone());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let undo_file = folder.path().join("undo");
    match plan_in_place(&engine, overrides, &Silent) {
        Ok(Some(plan)) => plan
            .write(&undo_file, &Silent)
            .expect("memory can be written"),
        Ok(None) => return assert_clean(&engine),
        Err(_) => return,
    }
    assert_clean(&engine);
    dump(&engine, Selection::default()).expect("clean metadata can be dumped");
    undo(&engine, &undo_file, true, &Silent).expect("what was written can be undone");
    assert!(
        engine.into_bytes() == image,
        "an undo leaves something changed"
    );
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let base = &BASES[usize::from(input.u8()) % BASES.len()];
    let how = input.u8();
    let options = options(base, how, &mut input);
    let image = edited(base, &mut input);
    let engine = RamEngine::from_bytes(image.clone());
    let checked = check_all(&engine);
    let other = CheckOptions {
        scope: if how & 0x40 != 0 {
            Scope::SkipMappings
        } else {
            Scope::All
        },
        metadata_snap: how & 0x80 != 0,
        mapping_root: options.roots.map(|r| r.0),
        details_root: options.roots.map(|r| r.1),
    };
    let _ = check(&engine, &other, &Silent);
    let mappings = dump(&engine, unshared());
    let _ = dump(&engine, Selection::default());
    if is_clean(&checked) {
        mappings.expect("clean metadata can be dumped");
        if let Ok(superblock) = Superblock::read(&engine) {
            assert_eq!(
                checked.report.transaction_id,
                Some(superblock.transaction_id)
            );
        }
    }
    if how & 0x40 != 0 {
        list_candidates(&engine, &Silent).ok();
        repair_in_place(image, &options.overrides);
    }
    if how & 0x80 != 0 {
        undelete(&engine);
    }
    if let Ok(recovery) = recover(&engine, &options, &Silent) {
        assert_good(&recovery, options.overrides);
    }
});
