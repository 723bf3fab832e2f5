//! The space maps of a small pool with bytes of the input in them, most often sealed again: nothing may panic, bitmaps say what
//! each of their entries says, and what is put right in place passes the check and has lost no mapping.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use thintools::checksum::{BlockKind, seal};
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::pdata::{Bitmap, CountMap, INDEX_ENTRY_SIZE, IndexEntry, Node};
use thintools::thin::{SUPERBLOCK, Superblock};
use thintools::tools::check::fix;
use thintools::tools::repair::{Options, recover};
use thintools::units::{BLOCK_SIZE, ENTRIES_PER_BITMAP, MetadataBlock};
use thintools_fuzz::{Input, assert_clean, check_all, dump, is_clean, small, unshared};

static SMALL: LazyLock<Vec<u8>> = LazyLock::new(small);
/// Every block of both space maps.
static PLACES: LazyLock<Vec<(MetadataBlock, BlockKind)>> = LazyLock::new(|| {
    let (superblock, _) = Superblock::verify(&SMALL[..BLOCK_SIZE], SUPERBLOCK, 64);
    let superblock = superblock.expect("a good superblock");
    let (data, metadata) = (superblock.data_space_map, superblock.metadata_space_map);
    let index = Node::parse(block(&SMALL, data.bitmap_root), data.bitmap_root, 16);
    let index = index.expect("a good node");
    let bitmaps = index.values().map(|v| IndexEntry::unpack(v).block);
    let own = IndexEntry::unpack(&block(&SMALL, metadata.bitmap_root)[16..]).block;
    let others = [
        (SUPERBLOCK, BlockKind::Superblock),
        (data.bitmap_root, BlockKind::Node),
        (data.ref_count_root, BlockKind::Node),
        (metadata.bitmap_root, BlockKind::Index),
        (metadata.ref_count_root, BlockKind::Node),
        (own, BlockKind::Bitmap),
    ];
    let bitmaps = bitmaps.map(|b| (b, BlockKind::Bitmap));
    others.into_iter().chain(bitmaps).collect()
});

fn block(image: &[u8], number: MetadataBlock) -> &[u8] {
    &image[number.0 as usize * BLOCK_SIZE..][..BLOCK_SIZE]
}

fn use_bitmap(block: &[u8]) {
    let bitmap = Bitmap::from_block(block);
    let counts: Vec<u32> = (0..ENTRIES_PER_BITMAP).map(|e| bitmap.get(e)).collect();
    let number = |wanted: u32| counts.iter().filter(|&&c| c == wanted).count();
    assert_eq!(bitmap.nr_free() as usize, number(0));
    assert_eq!(bitmap.nr_many() as usize, number(3));
    let first_free = counts.iter().position(|&c| c == 0);
    assert_eq!(
        bitmap.first_free() as usize,
        first_free.unwrap_or(counts.len())
    );
    let tail = counts[1000..].iter().filter(|&&c| c != 0).count();
    assert_eq!(bitmap.nr_used_from(1000) as usize, tail);
    let mut again = block.to_vec();
    bitmap.write_to(&mut again);
    assert_eq!(again, block);
    let mut map = CountMap::new(ENTRIES_PER_BITMAP);
    let counted = (0..).zip(&counts).filter(|&(_, &count)| count > 0);
    counted.for_each(|(block, &count)| map.add(block, count));
    let (words, many) = map.bitmap(0);
    assert!(bitmap.equals(&words) && many.len() == number(3));
    assert_eq!(bitmap.differences(0, &many, &words, &many), []);
    let nothing = vec![0; words.len()];
    let differences = bitmap.differences(0, &many, &nothing, &[]);
    assert_eq!(
        differences.iter().map(|d| d.length).sum::<u64>() as usize,
        counts.len() - number(0)
    );
    for entry in block.chunks_exact(INDEX_ENTRY_SIZE) {
        let mut packed = [0; INDEX_ENTRY_SIZE];
        IndexEntry::unpack(entry).pack(&mut packed);
        assert_eq!(packed, entry);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut image = SMALL.clone();
    while !input.0.is_empty() {
        let how = usize::from(input.u8());
        let (place, kind) = PLACES[how % 16 % PLACES.len()];
        let offset = usize::from(input.u16()) % BLOCK_SIZE;
        let len = usize::from(input.u16()).min(BLOCK_SIZE - offset);
        let contents = input.bytes(len);
        let block = &mut image[place.0 as usize * BLOCK_SIZE..][..BLOCK_SIZE];
        block[offset..][..contents.len()].copy_from_slice(contents);
        if kind == BlockKind::Bitmap {
            use_bitmap(block);
        }
        if how < 0xf0 {
            seal(block, kind, place);
        }
    }
    let before = image.clone();
    let engine = RamEngine::from_bytes(image);
    let checked = check_all(&engine);
    let mappings = dump(&engine, unshared());
    if is_clean(&checked) {
        mappings.as_ref().expect("clean metadata can be dumped");
    }
    // A repair uses the space maps to tell what is in use.
    if let Ok(recovery) = recover(&engine, &Options::default(), &Silent) {
        let _ = thintools_fuzz::told(&recovery.source(unshared(), &Silent));
    }
    match fix(&engine, &checked) {
        Ok(_) => {
            assert_clean(&engine);
            if let Ok(mappings) = mappings {
                let after = dump(&engine, unshared()).expect("clean metadata can be dumped");
                let rest = |xml: &[u8]| {
                    String::from_utf8_lossy(xml)
                        .split_once('>')
                        .map(|r| r.1.to_owned())
                };
                assert_eq!(rest(&after), rest(&mappings));
            }
        }
        Err(_) => assert!(
            engine.into_bytes() == before,
            "a refused repair in place changed something"
        ),
    }
});
