//! Every kind of damage is found, named by its stable code, and judged by what the kernel makes of it.
//!
//! What the kernel does was seen on Linux 6.1: `FORMAT.md`, "What the kernel does with damage".

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use thintools::checksum::{self, BlockKind};
use thintools::units::MetadataBlock;

use crate::support::{
    Finished, Image, Map, PER_BITMAP, check, damage_lines, dump, entries, expand, get_u32, get_u64,
    json, put_u32, put_u64, testdata, thintools, thintools_within, untar,
};

/// Codes of what is worse than a note.
fn codes(checked: &Finished) -> BTreeSet<String> {
    damage_lines(&checked.stderr)
        .into_iter()
        .filter(|d| d.0 != "note")
        .map(|d| d.1)
        .collect()
}

/// Codes of notes.
fn notes(checked: &Finished) -> BTreeSet<String> {
    damage_lines(&checked.stderr)
        .into_iter()
        .filter(|d| d.0 == "note")
        .map(|d| d.1)
        .collect()
}

fn set(codes: &[&str]) -> BTreeSet<String> {
    codes.iter().map(|&c| c.to_owned()).collect()
}

/// What the kernel would do at activation, by the check's JSON.
fn activation(file: &Path, code: i32) -> String {
    let out = check(&["--json"], file).expect(code).out();
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["exit_status"], code);
    json["report"]["verdict"]["activation"]
        .as_str()
        .expect("a verdict")
        .to_owned()
}

/// Checks `image`, and that there is exactly this damage beside notes, told alike by lines, JSON and in silence.
#[track_caller]
fn found(image: &Image, exit: i32, wanted: &[&str]) -> Finished {
    let checked = check(&[], image.path()).expect(exit);
    assert_eq!(codes(&checked), set(wanted), "{}", checked.stderr);
    in_order(&checked);
    check(&["-q"], image.path()).expect(exit).expect_silent();
    let out = check(&["--json"], image.path()).expect(exit).out();
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    let damages = json["report"]["damages"]
        .as_array()
        .expect("damages")
        .iter();
    let told: Vec<(String, String, u64)> = damages
        .map(|d| {
            let text = |name: &str| d[name].as_str().expect("text").to_owned();
            (
                text("severity"),
                text("code"),
                d["block"].as_u64().expect("a number"),
            )
        })
        .collect();
    assert_eq!(told, damage_lines(&checked.stderr));
    checked
}

/// Checks that this damage is there, beside what may follow from it.
#[track_caller]
fn found_among(image: &Image, exit: i32, wanted: &str, block: u64) -> Finished {
    let checked = check(&[], image.path()).expect(exit);
    let lines = damage_lines(&checked.stderr);
    assert!(
        lines.iter().any(|d| d.1 == wanted && d.2 == block),
        "no {wanted} of block {block}: {}",
        checked.stderr
    );
    in_order(&checked);
    checked
}

/// No damage but these notes.
#[track_caller]
fn only_notes(image: &Image, wanted: &[&str]) {
    let checked = check(&[], image.path()).expect(0);
    assert_eq!(codes(&checked), set(&[]), "{}", checked.stderr);
    assert_eq!(notes(&checked), set(wanted), "{}", checked.stderr);
}

/// Damage lines come by ascending block.
#[track_caller]
fn in_order(checked: &Finished) {
    let blocks: Vec<u64> = damage_lines(&checked.stderr)
        .into_iter()
        .map(|d| d.2)
        .collect();
    assert!(
        blocks.is_sorted(),
        "not in the order of blocks: {}",
        checked.stderr
    );
}

fn base() -> Image {
    Image::of("snap-mix-a/meta")
}

/// A pool with one device of 200 mappings in one leaf, and 64 metadata blocks.
fn small() -> Image {
    let xml = "<superblock uuid=\"\" time=\"5\" transaction=\"3\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"1000\">\n\
        <device dev_id=\"0\" mapped_blocks=\"200\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\">\n\
        <range_mapping origin_begin=\"100\" data_begin=\"0\" length=\"200\" time=\"0\"/>\n\
        </device>\n</superblock>\n";
    let image = Image::restored(xml, 64);
    only_notes(&image, &[]);
    image
}

/// Superblocks and images that the kernel was confronted with.
fn archive() -> BTreeMap<String, Vec<u8>> {
    let files = untar(&expand("damaged/section5-images.tar"));
    assert!(files.len() > 20, "{} files in the archive", files.len());
    files
}

/// Damage done to one image of the folder `damaged`: its name, the words of its record that the expectation is drawn from,
/// the exit status, the codes.
type Row = (&'static str, &'static str, i32, &'static [&'static str]);

/// A device whose tree cannot be read maps less than its details say.
const LOST_NODE: &str = "device-mapped-blocks";

const DAMAGED: &[Row] = &[
    // 0x55 is the pair 1,0: count 2. Of the 32 blocks 26 had 3, two had 1 and two had 0.
    (
        "data-bitmap-count1",
        "data-bitmap 420: bytes 27..34 (entries 108..) set to 55",
        5,
        &[
            "data-count-low",
            "data-leak",
            "count-tree",
            "space-map-allocated",
            "index-free-count",
        ],
    ),
    // None of the 32 was free; five had less than 3 and are not in the tree of counts.
    (
        "data-bitmap-count3",
        "data-bitmap 420: bytes 17..24 (entries 68..) set to ff",
        5,
        &["data-leak", "count-tree"],
    ),
    (
        "data-bitmap-free",
        "data-bitmap 420: bytes 19..26 (entries 76..) set to 00",
        5,
        &[
            "data-count-low",
            "count-tree",
            "space-map-allocated",
            "index-free-count",
        ],
    ),
    (
        "data-block-mapped-twice",
        "second value made equal to the first (data block 0 mapped twice)",
        5,
        &["data-count-low", "data-leak"],
    ),
    // The block that was mapped before is leaked.
    (
        "data-block-out-of-bounds",
        "first value points at data block 2^32",
        5,
        &["mapping-past-end", "data-leak"],
    ),
    (
        "details-device-missing",
        "details leaf 422: last device dropped",
        5,
        &["device-without-details"],
    ),
    (
        "details-wrong-count",
        "mapped_blocks of the first device 185 -> 192",
        5,
        &["device-mapped-blocks"],
    ),
    // Its tree and the data blocks in it are referred to once less.
    (
        "mapping-device-missing",
        "mapping top 417: last device dropped",
        5,
        &["device-without-mappings", "metadata-leak", "data-leak"],
    ),
    // The top-level leaf as a device's mapping tree.
    (
        "mapping-root-loop",
        "mapping root 417: first value points at itself",
        5,
        &["node-used-twice", LOST_NODE],
    ),
    // 0xaa is the pair 0,1: count 1.
    (
        "meta-bitmap-count2",
        "meta-bitmap 418: bytes 38..45 (entries 152..) set to aa",
        4,
        &["metadata-leak", "space-map-allocated", "index-free-count"],
    ),
    (
        "meta-bitmap-free",
        "meta-bitmap 418: bytes 10..17 (entries 40..) set to 00",
        5,
        &[
            "metadata-count-low",
            "space-map-allocated",
            "index-free-count",
        ],
    ),
    (
        "node-blocknr",
        "mapping block 314: blocknr 314 -> 315",
        5,
        &["node-location", LOST_NODE],
    ),
    // Mappings taken for pointers point past the end.
    (
        "node-flags-internal",
        "flags (2 = leaf, 1 = internal) 2 -> 1",
        5,
        &["node-pointer", LOST_NODE],
    ),
    (
        "node-flags-none",
        "flags 2 -> 0",
        5,
        &["node-header", LOST_NODE],
    ),
    (
        "node-keys-out-of-order",
        "first two keys swapped (0, 1)",
        5,
        &["node-key-order", LOST_NODE],
    ),
    (
        "node-max-entries",
        "max_entries 252 -> 249",
        5,
        &["node-header", LOST_NODE],
    ),
    (
        "node-max-entries-huge",
        "max_entries 252 -> 268435456",
        5,
        &["node-header", LOST_NODE],
    ),
    (
        "node-nr-entries-big",
        "nr_entries 190 -> 4000",
        5,
        &["node-header", LOST_NODE],
    ),
    // A shorter leaf is a sound leaf; only the details tell, and the count of what is not mapped any more.
    (
        "node-nr-entries-less",
        "nr_entries 190 -> 189",
        5,
        &["device-mapped-blocks", "data-leak"],
    ),
    (
        "node-nr-entries-zero",
        "nr_entries 190 -> 0",
        5,
        &["device-mapped-blocks", "data-leak"],
    ),
    (
        "node-value-size",
        "value_size 8 -> 16",
        5,
        &["node-header", LOST_NODE],
    ),
    (
        "random-00",
        "meta-bitmap block 418: overwritten with block 230 (mapping)",
        5,
        &["bitmap-block"],
    ),
    (
        "random-01",
        "mapping-top block 417: bit 7 of byte 458 flipped",
        5,
        &["node-checksum"],
    ),
    (
        "random-02",
        "mapping block 314: bit 6 of byte 3768 flipped",
        5,
        &["node-checksum", LOST_NODE],
    ),
    (
        "random-03",
        "mapping block 314: bit 2 of byte 1170 flipped",
        5,
        &["node-checksum", LOST_NODE],
    ),
    (
        "random-04",
        "mapping block 279: bit 6 of byte 1621 flipped",
        5,
        &["node-checksum", LOST_NODE],
    ),
    (
        "random-05",
        "mapping-top block 417: bit 5 of byte 529 flipped",
        5,
        &["node-checksum"],
    ),
    (
        "random-06",
        "mapping block 314: zeroed",
        5,
        &["node-zeroed", LOST_NODE],
    ),
    (
        "random-07",
        "data-index block 423: second half random (torn write)",
        5,
        &["node-checksum"],
    ),
    // The bitmap still says which blocks have 3 and more.
    (
        "random-08",
        "data-refcount block 421: overwritten with block 135 (mapping)",
        5,
        &["node-location"],
    ),
    (
        "random-09",
        "data-bitmap block 420: zeroed",
        5,
        &["bitmap-block"],
    ),
    (
        "random-10",
        "mapping-top block 417: overwritten with block 412 (meta-refcount)",
        5,
        &["node-location"],
    ),
    (
        "random-11",
        "data-index block 423: zeroed",
        5,
        &["node-zeroed"],
    ),
    (
        "sb-data-nr-allocated",
        "data space map nr_allocated 387 -> 398",
        4,
        &["space-map-allocated"],
    ),
    // One bitmap counts 3083 blocks as well as 3072: only the data device's size would tell.
    (
        "sb-data-nr-blocks",
        "data space map nr_blocks 3072 -> 3083",
        0,
        &[],
    ),
    (
        "sb-meta-nr-allocated",
        "metadata space map nr_allocated 30 -> 41",
        4,
        &["space-map-allocated"],
    ),
    (
        "sb-meta-nr-blocks",
        "metadata space map nr_blocks 1024 -> 1035",
        5,
        &["device-too-small"],
    ),
];

#[test]
fn damaged_images_get_the_codes_of_what_was_done_to_them() {
    let record = json("damaged/damage.json");
    let cases = record["cases"].as_object().expect("cases");
    let known: BTreeSet<&str> = DAMAGED.iter().map(|row| row.0).collect();
    let all: BTreeSet<&str> = cases.keys().map(String::as_str).collect();
    assert_eq!(known, all, "every damaged image has a row");
    for &(name, done, exit, wanted) in DAMAGED {
        let told = cases[name]["damage"].as_str().expect("a description");
        assert!(told.contains(done), "{name}: {told}");
        println!("{name}: {told}");
        let image = Image::of(&format!("damaged/dmg-{name}"));
        let before = image.bytes();
        found(&image, exit, wanted);
        assert!(image.bytes() == before, "{name}: a check wrote");
    }
}

#[test]
fn the_block_at_fault_is_the_one_that_was_damaged() {
    let record = json("damaged/damage.json");
    for &(name, _, exit, wanted) in DAMAGED.iter().filter(|row| row.2 != 0) {
        let told = record["cases"][name]["damage"]
            .as_str()
            .expect("a description");
        let number = |text: &str| {
            text.split(|c: char| !c.is_ascii_digit())
                .find(|t| !t.is_empty())
                .map(str::to_owned)
        };
        let block = match told.split_once(':') {
            Some(("superblock", _)) => 0,
            Some((place, _)) => number(place).and_then(|n| n.parse().ok()).expect("a block"),
            None => panic!("{told}"),
        };
        let image = Image::of(&format!("damaged/dmg-{name}"));
        let lines = damage_lines(&check(&[], image.path()).expect(exit).stderr);
        // A device dropped from one tree is missed by the other; a mapping doubled shows in the counts.
        let elsewhere = [
            "details-device-missing",
            "mapping-device-missing",
            "data-block-mapped-twice",
        ];
        let is_there = lines
            .iter()
            .any(|d| d.2 == block && wanted.contains(&d.1.as_str()));
        let in_details =
            name.starts_with("node-nr-entries-") && lines.iter().any(|d| d.1 == LOST_NODE);
        assert!(
            is_there || in_details || elsewhere.contains(&name),
            "{name}: block {block} is not named: {lines:?}"
        );
    }
}

/// What the kernel does at activation with each superblock of the archive.
const SUPERBLOCKS: &[(&str, i32, &[&str], &str)] = &[
    ("sb-blocknr-5.img", 5, &["superblock-location"], "refused"),
    (
        "sb-compat-1.img",
        0,
        &["superblock-odd-field"],
        "read-write",
    ),
    (
        "sb-compat-ro-1.img",
        5,
        &["superblock-compat-ro"],
        "refused",
    ),
    ("sb-flag-2.img", 0, &["superblock-odd-field"], "read-write"),
    ("sb-held-root-999.img", 5, &["snapshot-block"], "read-write"),
    (
        "sb-held-root-9999999.img",
        5,
        &["snapshot-block"],
        "read-write",
    ),
    ("sb-incompat-1.img", 5, &["superblock-incompat"], "refused"),
    ("sb-magic-lsb.img", 5, &["superblock-magic"], "refused"),
    ("sb-maproot-0.img", 5, &["superblock-root"], "read-write"),
    (
        "sb-maproot-900000.img",
        5,
        &["superblock-root"],
        "read-write",
    ),
    (
        "sb-mblocksize-16.img",
        0,
        &["superblock-odd-field"],
        "read-write",
    ),
    ("sb-mnr-2048.img", 0, &[], "read-write"),
    ("sb-mnr-512.img", 0, &[], "read-write"),
    (
        "sb-needs-check.img",
        0,
        &["needs-check"],
        "read-only-needs-check",
    ),
    ("sb-uuid.img", 0, &[], "read-write"),
    (
        "sb-version-1.img",
        0,
        &["superblock-odd-field"],
        "read-write",
    ),
    (
        "sb-version-3.img",
        0,
        &["superblock-odd-field"],
        "read-write",
    ),
];

#[test]
fn superblocks_are_judged_as_the_kernel_did() {
    let files = archive();
    let known: Vec<&str> = SUPERBLOCKS.iter().map(|row| row.0).collect();
    let all: Vec<&str> = files
        .keys()
        .map(String::as_str)
        .filter(|n| n.starts_with("sb-"))
        .collect();
    assert_eq!(known, all, "every superblock has a row");
    for &(name, exit, wanted, kernel) in SUPERBLOCKS {
        println!("{name}");
        let image = base();
        image.put_block(0, &files[name]);
        let checked = check(&[], image.path()).expect(exit);
        let mut codes: BTreeSet<String> = damage_lines(&checked.stderr)
            .into_iter()
            .map(|d| d.1)
            .collect();
        codes.remove("counts-not-compared");
        assert_eq!(codes, set(wanted), "{name}: {}", checked.stderr);
        assert_eq!(activation(image.path(), exit), kernel, "{name}");
    }
}

/// What the kernel does with the images of the archive, and the code of the block that was damaged.
const ACTIVATED: &[(&str, u64, &str, i32, &str)] = &[
    (
        "dmg-data-bitmap-bit.img",
        420,
        "bitmap-block",
        5,
        "read-write",
    ),
    // Not only leaked: whoever edited the bitmap left the counters as they were.
    (
        "dmg-data-bitmap-leak.img",
        420,
        "data-leak",
        4,
        "read-write",
    ),
    (
        "dmg-data-bitmap-says-free.img",
        420,
        "data-count-low",
        5,
        "read-write",
    ),
    (
        "dmg-data-index-bit.img",
        423,
        "node-checksum",
        5,
        "read-write",
    ),
    (
        "dmg-data-refcount-root-bit.img",
        421,
        "node-checksum",
        5,
        "read-write",
    ),
    (
        "dmg-details-root-bit.img",
        422,
        "node-checksum",
        5,
        "read-write",
    ),
    (
        "dmg-details-root-zero.img",
        422,
        "node-zeroed",
        5,
        "read-write",
    ),
    (
        "dmg-dev0-root-bit.img",
        279,
        "node-checksum",
        5,
        "read-write",
    ),
    (
        "dmg-mapping-root-bit.img",
        417,
        "node-checksum",
        5,
        "read-write",
    ),
    (
        "dmg-mapping-root-zero.img",
        417,
        "node-zeroed",
        5,
        "read-write",
    ),
    (
        "dmg-meta-bitmap-bit.img",
        418,
        "bitmap-block",
        5,
        "read-write",
    ),
    ("dmg-meta-index-bit.img", 424, "index-block", 5, "refused"),
];

#[test]
fn damaged_blocks_are_judged_as_the_kernel_did() {
    let files = archive();
    let known: Vec<&str> = ACTIVATED.iter().map(|row| row.0).collect();
    let all: Vec<&str> = files
        .keys()
        .map(String::as_str)
        .filter(|n| n.starts_with("dmg-"))
        .collect();
    assert_eq!(known, all, "every image has a row");
    for &(name, block, code, exit, kernel) in ACTIVATED {
        println!("{name}");
        let image = Image::from_bytes(&files[name]);
        found_among(&image, exit, code, block);
        assert_eq!(activation(image.path(), exit), kernel, "{name}");
    }
}

#[test]
fn bitmaps_that_say_free_are_said_to_endanger_data() {
    let image = Image::from_bytes(&archive()["dmg-data-bitmap-says-free.img"]);
    check(&[], image.path()).expect(5).expect_stderr(&[
        "kernel: ",
        "write over data that is in use",
        "thin_repair",
    ]);
}

#[test]
fn a_zeroed_superblock_is_formatted_anew() {
    let image = base();
    image.put_block(0, &[0; 4096]);
    found(&image, 5, &["superblock-zeroed"]);
    assert_eq!(activation(image.path(), 5), "formatted-anew");
}

#[test]
fn a_superblock_with_a_wrong_checksum_is_refused() {
    let image = base();
    image.spoil_block(0, |b| b[100] ^= 1);
    found(&image, 5, &["superblock-checksum"]);
    assert_eq!(activation(image.path(), 5), "refused");
    let image = base();
    image.spoil_block(0, |b| b[32] ^= 1);
    found(&image, 5, &["superblock-checksum"]);
}

#[test]
fn a_node_in_place_of_the_superblock_is_refused() {
    let image = base();
    image.put_block(0, &image.block(417));
    found(&image, 5, &["superblock-checksum"]);
    assert_eq!(activation(image.path(), 5), "refused");
}

#[test]
fn data_block_sizes_that_no_table_can_have_are_fatal() {
    for size in [0, 7, 64, 127, 192, 2_097_152 + 128, u32::MAX] {
        let image = base();
        image.edit_superblock(|f| f.data_block_size = size);
        found(&image, 5, &["superblock-data-block-size"]);
        assert_eq!(activation(image.path(), 5), "refused", "{size}");
    }
    for size in [128, 384, 2_097_152] {
        let image = base();
        image.edit_superblock(|f| f.data_block_size = size);
        only_notes(&image, &[]);
    }
}

#[test]
fn a_clock_past_24_bits_is_fatal_and_one_at_its_end_is_noted() {
    let image = base();
    image.edit_superblock(|f| f.time = 1 << 24);
    found(&image, 5, &["superblock-time"]);
    let image = base();
    image.edit_superblock(|f| f.time = (1 << 24) - 1);
    only_notes(&image, &["superblock-last-time"]);
}

#[test]
fn a_device_shorter_than_its_metadata_is_refused() {
    for blocks in [1, 2, 16, 500, 1023] {
        let image = base();
        image.resize(blocks);
        let checked = check(&[], image.path())
            .expect(5)
            .expect_stderr(&["device-too-small: block 0"]);
        in_order(&checked);
        assert_eq!(activation(image.path(), 5), "refused", "{blocks} blocks");
        // The tools must get by without the lost blocks, whatever is in them.
        assert_eq!(dump(&[], image.path()).signal, None, "{blocks} blocks");
    }
}

#[test]
fn a_device_larger_than_its_metadata_is_sound() {
    let image = base();
    image.resize(5000);
    only_notes(&image, &[]);
}

#[test]
fn roots_that_point_nowhere_are_fatal() {
    type Change = fn(&mut thintools::thin::Fields, u64);
    let changes: [(Change, &str, &str); 6] = [
        (|f, b| f.mapping_root.0 = b, "superblock-root", "read-write"),
        (|f, b| f.details_root.0 = b, "superblock-root", "read-write"),
        (
            |f, b| f.data_space_map.bitmap_root.0 = b,
            "superblock-root",
            "read-write",
        ),
        (
            |f, b| f.data_space_map.ref_count_root.0 = b,
            "superblock-root",
            "read-write",
        ),
        (
            |f, b| f.metadata_space_map.ref_count_root.0 = b,
            "superblock-root",
            "read-write",
        ),
        (
            |f, b| f.metadata_space_map.bitmap_root.0 = b,
            "superblock-index-root",
            "refused",
        ),
    ];
    for (change, code, kernel) in changes {
        for block in [0, 1024, 1 << 50, u64::MAX] {
            let image = base();
            image.edit_superblock(|f| change(f, block));
            found_among(&image, 5, code, 0);
            assert_eq!(activation(image.path(), 5), kernel, "block {block}");
        }
    }
}

#[test]
fn roots_of_another_kind_are_fatal() {
    let image = base();
    image.edit_superblock(|f| f.details_root.0 = 420);
    found_among(&image, 5, "node-wrong-kind", 420);
    let image = base();
    image.edit_superblock(|f| f.metadata_space_map.bitmap_root.0 = 420);
    found_among(&image, 5, "index-block", 420);
    // The details tree's values are larger than those of the mapping tree.
    let image = base();
    image.edit_superblock(|f| f.mapping_root.0 = 422);
    assert!(
        codes(&check(&[], image.path()).expect(5))
            .iter()
            .any(|c| c.starts_with("node-"))
    );
}

#[test]
fn one_block_in_two_trees_is_fatal() {
    for other in [417, 422, 423, 421, 412] {
        let image = base();
        image.point_device(0, other);
        let checked = check(&[], image.path()).expect(5);
        let named = damage_lines(&checked.stderr);
        assert!(
            named
                .iter()
                .any(|d| d.2 == other && (d.1 == "node-used-twice" || d.1 == "node-header")),
            "{}",
            checked.stderr
        );
    }
}

#[test]
fn a_bitmap_in_both_space_maps_is_fatal() {
    let image = base();
    let (block, offset) = image.index_entry(Map::Data, 0);
    image.edit_block(block, |b| put_u64(b, offset, 418));
    let found = codes(&check(&[], image.path()).expect(5));
    assert!(
        found.contains("metadata-count-low"),
        "418 is used twice: {found:?}"
    );
}

#[test]
fn stale_copies_and_misplaced_nodes_are_fatal() {
    let image = base();
    image.put_block(314, &image.block(279));
    let checked = found_among(&image, 5, "node-location", 314);
    assert!(checked.stderr.contains("device 19"), "{}", checked.stderr);
}

#[test]
fn nodes_that_are_leaf_and_internal_at_once_are_fatal() {
    for flags in [0, 3, 4, 0x102] {
        let image = base();
        image.edit_block(314, |b| put_u32(b, 4, flags));
        found_among(&image, 5, "node-header", 314);
    }
}

#[test]
fn duplicate_keys_in_a_leaf_are_fatal() {
    let image = base();
    image.edit_block(314, |b| {
        let first = get_u64(b, 32);
        put_u64(b, 40, first);
    });
    found(&image, 5, &["node-key-order", LOST_NODE]);
    let refused = dump(&[], image.path());
    assert_ne!(refused.code, Some(0), "a dump of it would lose a mapping");
}

#[test]
fn duplicate_devices_are_fatal() {
    for block in [417, 422] {
        let image = base();
        image.edit_block(block, |b| {
            let first = get_u64(b, 32);
            put_u64(b, 40, first);
        });
        found_among(&image, 5, "node-key-order", block);
    }
}

#[test]
fn trees_of_two_levels_are_sound() {
    let image = small();
    image.split(0, &[(0..100, 100), (100..200, 200)]);
    only_notes(&image, &[]);
    assert_eq!(image.dumped().virtual_ranges()[&0], [(100, 200)]);
}

#[test]
fn under_full_nodes_are_only_noted() {
    let image = small();
    let (_, leaves) = image.split(0, &[(0..190, 100), (190..200, 290)]);
    let checked = check(&[], image.path()).expect(0);
    assert_eq!(
        damage_lines(&checked.stderr),
        [("note".to_owned(), "tree-under-full".to_owned(), leaves[1])]
    );
}

#[test]
fn a_root_with_one_child_is_sound() {
    let image = small();
    image.split(0, &[(0..200, 100)]);
    only_notes(&image, &[]);
}

#[test]
fn a_parents_key_below_its_childs_first_is_sound() {
    let image = small();
    image.split(0, &[(0..100, 3), (100..200, 200)]);
    only_notes(&image, &[]);
    let image = image_with_gap();
    only_notes(&image, &[]);
}

/// A pool like [`small`] whose mappings have a hole, split with a parent key inside of the hole.
fn image_with_gap() -> Image {
    let xml = "<superblock uuid=\"\" time=\"5\" transaction=\"3\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"1000\">\n\
        <device dev_id=\"0\" mapped_blocks=\"200\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\">\n\
        <range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"100\" time=\"0\"/>\n\
        <range_mapping origin_begin=\"500\" data_begin=\"100\" length=\"100\" time=\"0\"/>\n\
        </device>\n</superblock>\n";
    let image = Image::restored(xml, 64);
    image.split(0, &[(0..100, 0), (100..200, 300)]);
    image
}

#[test]
fn a_parents_key_above_its_childs_first_is_fatal() {
    let image = small();
    let (_, leaves) = image.split(0, &[(0..100, 100), (100..200, 201)]);
    found_among(&image, 5, "tree-key-range", leaves[1]);
}

#[test]
fn keys_past_the_parents_bound_are_fatal() {
    let image = small();
    let (_, leaves) = image.split(0, &[(0..100, 100), (100..200, 150)]);
    let checked = check(&[], image.path()).expect(5);
    let lines = damage_lines(&checked.stderr);
    assert!(
        lines
            .iter()
            .any(|d| d.1 == "tree-key-range" && leaves.contains(&d.2)),
        "{}",
        checked.stderr
    );
}

#[test]
fn one_leaf_twice_in_a_tree_is_fatal() {
    let image = small();
    let (root, leaves) = image.split(0, &[(0..100, 100), (100..200, 200)]);
    image.edit_block(root, |b| put_u64(b, 32 + 8 * 252 + 8, leaves[0]));
    assert!(codes(&check(&[], image.path()).expect(5)).contains("tree-key-range"));
}

#[test]
fn leaves_at_different_depths_are_fatal() {
    let image = small();
    let (root, leaves) = image.split(0, &[(0..100, 100), (100..200, 200)]);
    image.allocate(Map::Metadata, 50);
    image.put_node(50, false, &[(200, leaves[1].to_le_bytes().to_vec())], 8);
    image.edit_block(root, |b| put_u64(b, 32 + 8 * 252 + 8, 50));
    assert!(codes(&check(&[], image.path()).expect(5)).contains("tree-depth"));
}

#[test]
fn an_empty_leaf_below_a_root_is_fatal() {
    let image = small();
    let (_, leaves) = image.split(0, &[(0..200, 100), (200..200, 400)]);
    found_among(&image, 5, "tree-empty-leaf", leaves[1]);
}

#[test]
fn an_empty_internal_node_is_fatal_and_nothing_breaks() {
    let image = small();
    let (root, _) = image.split(0, &[(0..100, 100), (100..200, 200)]);
    image.edit_block(root, |b| put_u32(b, 16, 0));
    assert!(!codes(&check(&[], image.path()).expect(5)).is_empty());
    assert_eq!(dump(&[], image.path()).code, Some(5));
}

#[test]
fn a_node_that_is_its_own_child_is_fatal() {
    let image = small();
    let (root, _) = image.split(0, &[(0..100, 100), (100..200, 200)]);
    image.edit_block(root, |b| put_u64(b, 32 + 8 * 252 + 8, root));
    found_among(&image, 5, "tree-cycle", root);
    assert_eq!(dump(&[], image.path()).code, Some(5));
}

#[test]
fn a_cycle_of_two_nodes_is_fatal() {
    let image = small();
    let (root, _) = image.split(0, &[(0..100, 100), (100..200, 200)]);
    image.allocate(Map::Metadata, 50);
    image.put_node(50, false, &[(200, root.to_le_bytes().to_vec())], 8);
    image.edit_block(root, |b| put_u64(b, 32 + 8 * 252 + 8, 50));
    assert!(codes(&check(&[], image.path()).expect(5)).contains("tree-cycle"));
    assert_eq!(dump(&[], image.path()).code, Some(5));
}

#[test]
fn a_child_past_the_end_is_fatal() {
    for child in [0, 64, 1 << 50, u64::MAX] {
        let image = small();
        let (root, _) = image.split(0, &[(0..100, 100), (100..200, 200)]);
        image.edit_block(root, |b| put_u64(b, 32 + 8 * 252 + 8, child));
        let checked = check(&[], image.path()).expect(5);
        assert!(
            codes(&checked)
                .iter()
                .any(|c| c == "node-pointer" || c == "node-wrong-kind"),
            "{child}: {}",
            checked.stderr
        );
        assert_eq!(dump(&[], image.path()).code, Some(5), "{child}");
    }
}

#[test]
fn a_devices_root_past_the_end_is_fatal() {
    for root in [0, 1024, 1 << 50, u64::MAX] {
        let image = base();
        image.point_device(0, root);
        let checked = check(&[], image.path()).expect(5);
        assert!(
            codes(&checked).contains("node-pointer"),
            "{root}: {}",
            checked.stderr
        );
        assert!(checked.stderr.contains("device 0"), "{}", checked.stderr);
    }
}

/// A pool of 2048 blocks with `depth` layers of `width` nodes, each of 252 pointers into the next layer, the last ones
/// pointing at what `end` says; four devices begin in the first layer.
fn hostile(depth: u64, width: u64, end: impl Fn(u64) -> u64) -> Image {
    let image = base();
    image.resize(2048);
    image.edit_superblock(|f| f.metadata_space_map.nr_blocks = 2048);
    let node_at = |layer: u64, i: u64| 1024 + layer * width + i % width;
    for layer in 0..depth {
        for i in 0..width {
            let child = |k: u64| {
                if layer + 1 == depth {
                    end(k)
                } else {
                    node_at(layer + 1, k)
                }
            };
            let pointers: Vec<(u64, Vec<u8>)> = (0..252)
                .map(|k| (k, child(k).to_le_bytes().to_vec()))
                .collect();
            image.put_node(node_at(layer, i), false, &pointers, 8);
        }
    }
    for device in [0, 1, 3, 4] {
        image.point_device(device, node_at(0, device));
    }
    image
}

/// Runs all readers over a hostile image, with 2 GiB of address space and 20 s each. The check fails; a dump must end in
/// one of these ways.
#[track_caller]
fn withstood(image: &Image, dumps: &[i32]) {
    let calls = [
        &["thin_check"][..],
        &["thin_check", "--json"],
        &["thin_check", "-q"],
        &["thin_dump"],
    ];
    for arguments in calls {
        let all = arguments
            .iter()
            .map(OsStr::new)
            .chain([image.path().as_os_str()]);
        let done = thintools_within(2048, all)
            .timeout(Duration::from_secs(60))
            .run();
        let wanted = if arguments[0] == "thin_dump" {
            dumps
        } else {
            &[5]
        };
        let code = done.code.unwrap_or(-1);
        let told = done.stderr.get(..2000).unwrap_or(&done.stderr);
        assert!(
            wanted.contains(&code),
            "{arguments:?} ended with {code}: {told}"
        );
        assert!(
            done.peak < 400_000,
            "{arguments:?}: {} KiB of memory",
            done.peak
        );
        assert!(
            done.stderr.len() < 2 << 20,
            "{arguments:?}: {} bytes of messages",
            done.stderr.len()
        );
        assert!(
            done.stdout.len() < 64 << 20,
            "{arguments:?}: {} bytes of output",
            done.stdout.len()
        );
    }
}

#[test]
fn a_chain_that_shares_without_end_is_refused_in_bounded_time_and_memory() {
    // 252 to the power of 12 paths, and valid checksums all over.
    withstood(&hostile(12, 1, |_| 314), &[5]);
}

#[test]
fn a_web_that_shares_without_end_is_refused_in_bounded_time_and_memory() {
    withstood(&hostile(40, 20, |_| 314), &[5]);
}

#[test]
fn a_web_that_leads_back_to_its_beginning_is_refused_in_bounded_time_and_memory() {
    withstood(&hostile(40, 20, |k| 1024 + k % 20), &[5]);
}

#[test]
fn a_tree_of_thousands_of_levels_is_refused_in_bounded_time_and_memory() {
    let image = base();
    image.resize(16_000);
    image.edit_superblock(|f| f.metadata_space_map.nr_blocks = 16_000);
    for block in 1024..15_999 {
        let child: u64 = if block == 15_998 { 314 } else { block + 1 };
        image.put_node(block, false, &[(0, child.to_le_bytes().to_vec())], 8);
    }
    image.point_device(0, 1024);
    // Every mapping can be read.
    withstood(&image, &[0, 5]);
}

#[test]
fn a_block_is_named_once_for_one_kind_of_damage() {
    let image = hostile(3, 4, |_| 314);
    let lines = damage_lines(&check(&[], image.path()).expect(5).stderr);
    let distinct: BTreeSet<&(String, String, u64)> =
        lines.iter().filter(|d| d.1.starts_with("tree-")).collect();
    let told = lines.iter().filter(|d| d.1.starts_with("tree-")).count();
    assert_eq!(
        told,
        distinct.len(),
        "the same damage of the same block is told many times"
    );
}

#[test]
fn a_device_of_the_same_tree_as_another_is_sound() {
    // Devices 2, 6 and 14 share a root since one was made a snapshot of the other.
    let image = base();
    assert_eq!(image.device_root(2), image.device_root(14));
    only_notes(&image, &[]);
}

#[test]
fn a_data_block_mapped_twice_and_counted_twice_is_sound() {
    let xml = "<superblock uuid=\"\" time=\"0\" transaction=\"0\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"100\">\n\
        <device dev_id=\"0\" mapped_blocks=\"2\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\">\n\
        <single_mapping origin_block=\"0\" data_block=\"7\" time=\"0\"/>\n\
        <single_mapping origin_block=\"9\" data_block=\"7\" time=\"0\"/>\n</device>\n</superblock>\n";
    let image = Image::restored(xml, 64);
    assert_eq!(image.count(Map::Data, 7), 2);
    only_notes(&image, &[]);
}

#[test]
fn mappings_past_the_clock_are_repairable() {
    let image = base();
    image.edit_superblock(|f| f.time = 3);
    let checked = check(&[], image.path()).expect(4);
    assert_eq!(
        codes(&checked),
        set(&["mapping-time"]),
        "{}",
        checked.stderr
    );
}

#[test]
fn odd_times_and_transactions_of_devices_are_noted() {
    // Details of the first device: transaction at 1048, creation time at 1056, snapshot time at 1060.
    for (at, value) in [(1048, 99), (1056, 7), (1060, 4000)] {
        let image = base();
        image.edit_block(422, |b| put_u32(b, at, value));
        only_notes(&image, &["device-odd-field"]);
    }
}

#[test]
fn device_ids_past_24_bits_are_noted() {
    let image = base();
    for block in [417, 422] {
        image.edit_block(block, |b| {
            let last = get_u32(b, 16) as usize - 1;
            put_u64(b, 32 + 8 * last, 99_999_999);
        });
    }
    only_notes(&image, &["device-odd-field"]);
}

#[test]
fn wrong_numbers_of_blocks_in_use_are_repairable() {
    type Change = fn(&mut thintools::thin::Fields);
    let changes: [Change; 6] = [
        |f| f.data_space_map.nr_allocated += 1,
        |f| f.data_space_map.nr_allocated = 0,
        |f| f.data_space_map.nr_allocated = u64::MAX,
        |f| f.metadata_space_map.nr_allocated -= 1,
        |f| f.metadata_space_map.nr_allocated = 0,
        |f| f.metadata_space_map.nr_allocated = u64::MAX,
    ];
    for change in changes {
        let image = base();
        image.edit_superblock(change);
        found(&image, 4, &["space-map-allocated"]);
    }
}

#[test]
fn wrong_numbers_of_free_entries_are_repairable() {
    for map in [Map::Data, Map::Metadata] {
        for wrong in [0, 1, 16_320, u32::MAX] {
            let image = base();
            image.edit_index(map, 0, |free, _| *free = wrong);
            found(&image, 4, &["index-free-count"]);
        }
    }
}

#[test]
fn free_entries_counted_only_to_the_end_of_the_device_are_repairable() {
    // What the restorer of 0.9 writes: the pool runs out of space when it grows within the bitmap.
    for (map, nr_blocks) in [(Map::Data, 3072), (Map::Metadata, 1024)] {
        let image = base();
        image.edit_index(map, 0, |free, _| *free -= (PER_BITMAP - nr_blocks) as u32);
        found(&image, 4, &["index-free-count"]);
    }
}

#[test]
fn hints_past_a_free_entry_are_repairable_and_cautious_hints_are_sound() {
    for map in [Map::Data, Map::Metadata] {
        let image = base();
        let free = (0..)
            .find(|&b| image.count(map, b) == 0)
            .expect("some block is free") as u32;
        image.edit_index(map, 0, |_, hint| *hint = free + 1);
        found(&image, 4, &["index-free-hint"]);
        image.edit_index(map, 0, |_, hint| *hint = free);
        only_notes(&image, &[]);
        image.edit_index(map, 0, |_, hint| *hint = 0);
        only_notes(&image, &[]);
    }
}

#[test]
fn free_bits_of_mapped_blocks_are_fatal_even_with_matching_sums() {
    let image = base();
    assert_eq!(image.count(Map::Data, 118), 1);
    image.set_count(Map::Data, 118, 0);
    image.edit_index(Map::Data, 0, |free, _| *free += 1);
    image.edit_superblock(|f| f.data_space_map.nr_allocated -= 1);
    found(&image, 5, &["data-count-low"]);
    check(&[], image.path()).expect_stderr(&["write over data that is in use"]);
}

#[test]
fn shared_blocks_counted_once_are_fatal() {
    let image = base();
    assert_eq!(image.count(Map::Data, 0), 2);
    image.set_count(Map::Data, 0, 1);
    found(&image, 5, &["data-count-low"]);
}

#[test]
fn blocks_counted_too_often_are_leaks() {
    // From 1 to 2: nothing is at risk, though both peers call it fatal or miss it.
    let image = base();
    image.set_count(Map::Data, 118, 2);
    found(&image, 3, &["data-leak"]);
    let image = base();
    image.allocate(Map::Data, 3000);
    found(&image, 3, &["data-leak"]);
    let image = base();
    image.allocate(Map::Metadata, 1000);
    found(&image, 3, &["metadata-leak"]);
}

#[test]
fn leaks_do_not_fail_when_they_are_to_be_ignored() {
    let image = base();
    image.allocate(Map::Data, 3000);
    let checked = check(&["--ignore-non-fatal-errors"], image.path()).expect(0);
    assert_eq!(
        codes(&checked),
        set(&["data-leak"]),
        "they are still reported"
    );
    let image = base();
    image.edit_superblock(|f| f.data_space_map.nr_allocated += 1);
    check(&["--ignore-non-fatal-errors"], image.path()).expect(0);
    image.set_count(Map::Data, 118, 0);
    check(&["--ignore-non-fatal-errors"], image.path()).expect(5);
}

#[test]
fn metadata_blocks_counted_too_low_are_fatal() {
    let image = base();
    image.set_count(Map::Metadata, 279, 0);
    image.edit_index(Map::Metadata, 0, |free, hint| {
        *free += 1;
        *hint = 0;
    });
    image.edit_superblock(|f| f.metadata_space_map.nr_allocated -= 1);
    found(&image, 5, &["metadata-count-low"]);
}

#[test]
fn counts_past_the_end_of_the_device_are_repairable() {
    for (map, block) in [
        (Map::Data, 3072),
        (Map::Data, 16_319),
        (Map::Metadata, 1024),
    ] {
        let image = base();
        image.set_count(map, block, 1);
        image.edit_index(map, 0, |free, _| *free -= 1);
        let checked = check(&[], image.path()).expect(4);
        assert!(
            codes(&checked).contains("bitmap-tail"),
            "{}",
            checked.stderr
        );
    }
}

#[test]
fn wrong_entries_in_the_trees_of_counts_are_found() {
    let counts = base().superblock().data_space_map.ref_count_root.0;
    let value = 32 + 8 * 336;
    // Too high is a leak, too low is fatal.
    let image = base();
    image.edit_block(counts, |b| {
        let count = get_u32(b, value);
        put_u32(b, value, count + 1);
    });
    found(&image, 3, &["data-leak"]);
    let image = base();
    image.edit_block(counts, |b| {
        let more = (0..get_u32(b, 16) as usize).find(|i| get_u32(b, value + 4 * i) > 3);
        let at = value + 4 * more.expect("some block has 4 references");
        let count = get_u32(b, at);
        put_u32(b, at, count - 1);
    });
    found(&image, 5, &["data-count-low"]);
    // A count of 2 does not belong there.
    let image = base();
    image.edit_block(counts, |b| put_u32(b, value, 2));
    assert!(codes(&check(&[], image.path()).expect(5)).contains("count-tree"));
    // An entry of a block whose bits say less than 3.
    let image = base();
    image.set_count(Map::Data, 1, 2);
    assert!(codes(&check(&[], image.path()).expect(5)).contains("count-tree"));
    // An entry that is missing.
    let image = base();
    image.edit_block(counts, |b| {
        let count = get_u32(b, 16);
        put_u32(b, 16, count - 1);
    });
    assert!(codes(&check(&[], image.path()).expect(5)).contains("count-tree"));
    // The metadata's tree has one entry: the root that three devices share.
    let image = base();
    image.edit_block(412, |b| put_u32(b, 16, 0));
    assert!(codes(&check(&[], image.path()).expect(5)).contains("count-tree"));
}

#[test]
fn bitmaps_missing_in_the_data_index_are_fatal() {
    // More data blocks than the only bitmap counts: a restore with a larger pool by 1.3.3 leaves such metadata.
    let image = base();
    image.edit_superblock(|f| f.data_space_map.nr_blocks = 3 * PER_BITMAP);
    let checked = check(&[], image.path()).expect(5);
    assert!(
        codes(&checked).contains("index-entries"),
        "{}",
        checked.stderr
    );
    // None at all.
    let image = base();
    let (index, _) = image.index_entry(Map::Data, 0);
    image.edit_block(index, |b| put_u32(b, 16, 0));
    found_among(&image, 5, "index-entries", index);
    // A number that is not asked for, in place of the one that is.
    let image = base();
    image.edit_block(index, |b| put_u64(b, 32, 7));
    found_among(&image, 5, "index-entries", index);
}

#[test]
fn bitmaps_past_the_end_are_fatal() {
    for map in [Map::Data, Map::Metadata] {
        for block in [0, 1024, 1 << 50, u64::MAX] {
            let image = base();
            let (index, offset) = image.index_entry(map, 0);
            image.edit_block(index, |b| put_u64(b, offset, block));
            let checked = check(&[], image.path()).expect(5);
            assert!(
                codes(&checked).contains("bitmap-block"),
                "{}",
                checked.stderr
            );
        }
    }
}

#[test]
fn huge_sizes_of_either_space_map_cost_neither_memory_nor_time() {
    for size in [1 << 40, 1 << 60, u64::MAX] {
        for map in [Map::Data, Map::Metadata] {
            let image = base();
            image.edit_superblock(|f| match map {
                Map::Data => f.data_space_map.nr_blocks = size,
                Map::Metadata => f.metadata_space_map.nr_blocks = size,
            });
            for command in ["thin_check", "thin_dump"] {
                let call = thintools([command.as_ref(), image.path().as_os_str()]);
                let done = call.timeout(Duration::from_secs(60)).run();
                assert!(
                    done.code.is_some(),
                    "{command}, {size}, {map:?}: a signal ended it: {}",
                    done.stderr
                );
                assert!(
                    done.peak < 200_000,
                    "{command}, {size}, {map:?}: {} KiB of memory",
                    done.peak
                );
                if command == "thin_check" {
                    assert_eq!(done.code, Some(5), "{size}, {map:?}: {}", done.stderr);
                }
            }
        }
    }
}

#[test]
fn more_metadata_than_the_format_has_bitmaps_for_is_fatal() {
    let image = base();
    image.edit_superblock(|f| f.metadata_space_map.nr_blocks = 255 * PER_BITMAP + 1);
    found(&image, 5, &["device-too-small"]);
}

/// The pool with a metadata snapshot, and where the snapshot's superblock is.
fn held() -> (Image, u64) {
    let image = Image::of("held-root/meta");
    let held = image.superblock().held_root.0;
    assert_ne!(held, 0);
    (image, held)
}

#[test]
fn a_metadata_snapshot_with_a_wrong_checksum_or_place_is_fatal() {
    let (image, held) = held();
    image.spoil_block(held, |b| b[100] ^= 1);
    found_among(&image, 5, "snapshot-block", held);
    assert_eq!(activation(image.path(), 5), "read-write");
    let (image, held) = self::held();
    image.edit_block_as(held, held + 1, |_| ());
    found_among(&image, 5, "snapshot-block", held);
    let (image, held) = self::held();
    image.put_block(held, &[0; 4096]);
    found_among(&image, 5, "snapshot-block", held);
    assert_ne!(check(&["-m"], image.path()).code, Some(0));
}

#[test]
fn a_metadata_snapshot_with_space_maps_or_a_snapshot_of_its_own_is_fatal() {
    for at in [56, 64, 80, 192, 216] {
        let (image, held) = held();
        image.edit_block(held, |b| put_u64(b, at, 5));
        found_among(&image, 5, "snapshot-fields", held);
    }
}

#[test]
fn damage_that_only_a_metadata_snapshot_reaches_is_found() {
    let (image, held) = held();
    let root = get_u64(&image.block(held), 320);
    assert_ne!(root, image.superblock().mapping_root.0);
    image.spoil_block(root, |b| b[2000] ^= 1);
    found_among(&image, 5, "node-checksum", root);
    check(&["-m"], image.path()).expect(5);
    // The pool itself is still dumped.
    dump(&[], image.path()).expect(0);
}

#[test]
fn what_a_forgotten_metadata_snapshot_held_is_leaked() {
    let (image, _) = held();
    image.edit_superblock(|f| f.held_root.0 = 0);
    let checked = check(&[], image.path());
    assert!(
        codes(&checked).contains("metadata-leak"),
        "{}",
        checked.stderr
    );
    assert_eq!(checked.code, Some(3), "{}", checked.stderr);
}

#[test]
fn needs_check_is_always_reported() {
    let image = Image::of("needs-check-set/meta");
    assert!(image.superblock().needs_check());
    for scope in [
        &[][..],
        &["--skip-mappings"],
        &["--super-block-only"],
        &["--ignore-non-fatal-errors"],
    ] {
        let checked = check(scope, image.path()).expect(0);
        assert!(
            notes(&checked).contains("needs-check"),
            "{scope:?}: {}",
            checked.stderr
        );
    }
    check(&["-q"], image.path()).expect(0).expect_silent();
    let out = check(&["--json"], image.path()).expect(0).out();
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["report"]["needs_check"], true);
    assert_eq!(
        json["report"]["verdict"]["activation"],
        "read-only-needs-check"
    );
}

#[test]
fn scopes_leave_out_what_they_say() {
    let image = base();
    image.spoil_block(314, |b| b[2000] ^= 1);
    check(&["--skip-mappings"], image.path()).expect(0);
    check(&["--super-block-only"], image.path()).expect(0);
    image.spoil_block(422, |b| b[2000] ^= 1);
    check(&["--skip-mappings"], image.path()).expect(5);
    check(&["--super-block-only"], image.path()).expect(0);
    image.spoil_block(0, |b| b[2000] ^= 1);
    check(&["--super-block-only"], image.path()).expect(5);
}

/// The leaves of a tree with the key that their parents have for each, in order.
fn leaves(image: &Image, root: u64) -> Vec<(u64, u64)> {
    let node = image.block(root);
    if get_u32(&node, 4) == 2 {
        return vec![(get_u64(&node, 32), root)];
    }
    let child = |value: &[u8]| u64::from_le_bytes(value.try_into().expect("8 bytes"));
    entries(&node, 8)
        .iter()
        .flat_map(|(_, value)| leaves(image, child(value)))
        .collect()
}

#[test]
fn damage_of_many_blocks_is_one_line_each_in_order() {
    let image = Image::of("rand-1thin-70k/meta");
    let all = leaves(&image, image.device_root(0));
    let mut spoiled: Vec<u64> = all.iter().step_by(7).map(|leaf| leaf.1).collect();
    assert!(spoiled.len() > 30);
    for &block in &spoiled {
        image.spoil_block(block, |b| b[4000] ^= 1);
    }
    spoiled.sort_unstable();
    let checked = check(&[], image.path()).expect(5);
    in_order(&checked);
    let lines = damage_lines(&checked.stderr);
    let named: Vec<u64> = lines
        .iter()
        .filter(|d| d.1 == "node-checksum")
        .map(|d| d.2)
        .collect();
    assert_eq!(named, spoiled);
}

#[test]
fn affected_ranges_are_those_of_the_damaged_leaf() {
    let image = Image::of("rand-1thin-70k/meta");
    let all = leaves(&image, image.device_root(0));
    for i in [0, 3, all.len() - 1] {
        let image = Image::of("rand-1thin-70k/meta");
        image.spoil_block(all[i].1, |b| b[4000] ^= 1);
        let end = all
            .get(i + 1)
            .map_or(String::new(), |next| next.0.to_string());
        // Keys below the first leaf's would be looked for in it.
        let begin = if i == 0 { 0 } else { all[i].0 };
        let range = format!("affects device 0 blocks {begin}..{end}\n");
        check(&[], image.path()).expect(5).expect_stderr(&[&range]);
    }
}

#[test]
fn random_bytes_and_odd_files_are_refused_with_words() {
    let mut noise = vec![0; 1 << 20];
    std::fs::File::open("/dev/urandom")
        .expect("opened")
        .read_exact(&mut noise)
        .expect("read");
    for bytes in [&noise[..], &noise[..4096], &noise[..100], &[][..]] {
        let image = Image::from_bytes(bytes);
        let done = check(&[], image.path()).expect(5);
        assert!(!done.stderr.is_empty());
    }
    for path in ["/", "/dev/null"] {
        assert_eq!(check(&[], Path::new(path)).code, Some(5), "{path}");
    }
    check(&[], Path::new("/no/such/file")).expect(1);
    check(&[], &testdata().join("README.md")).expect(5);
}

#[test]
fn sealed_nonsense_never_ends_in_a_signal() {
    // Every field of every block in use, one at a time, with the checksum right: no crash, no hang, no sound verdict that a
    // dump then contradicts.
    let image = base();
    let pristine = image.bytes();
    let mut tried = 0;
    for block in 0..1024_u64 {
        let original = &pristine[block as usize * 4096..][..4096];
        let Some(kind) = checksum::identify(original) else {
            continue;
        };
        if image.count(Map::Metadata, block) == 0 {
            continue;
        }
        let fields: &[usize] = match kind {
            BlockKind::Superblock => &[56, 64, 72, 80, 88, 192, 200, 208, 216, 320, 328, 336],
            BlockKind::Node => &[4, 16, 20, 24, 32, 2048, 1376, 2720, 1040],
            BlockKind::Bitmap => &[16, 2000],
            BlockKind::Index => &[16, 24, 28, 32],
        };
        // The nodes of mapping trees are all alike.
        let is_sampled = block >= 410 || block.is_multiple_of(5) || kind != BlockKind::Node;
        for &at in fields.iter().filter(|_| is_sampled) {
            let mut changed = original.to_vec();
            put_u32(&mut changed, at, [u32::MAX, 0x8000_0001][tried % 2]);
            checksum::seal(&mut changed, kind, MetadataBlock(block));
            image.put_block(block, &changed);
            let checked = check(&["-q"], image.path());
            assert!(
                matches!(checked.code, Some(0 | 3 | 4 | 5)),
                "block {block}, byte {at}: {checked:?}"
            );
            let dumped = dump(&["-q"], image.path());
            assert!(
                matches!(dumped.code, Some(0 | 5)),
                "block {block}, byte {at}: {:?}",
                dumped.stderr
            );
            assert!(
                checked.code == Some(5) || dumped.code == Some(0),
                "block {block}, byte {at}: {}",
                dumped.stderr
            );
            tried += 1;
        }
        image.put_block(block, original);
    }
    assert!(tried > 80, "{tried} fields tried");
}
