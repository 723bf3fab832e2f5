//! `thin_check --auto-repair` and `--clear-needs-check-flag`: what they put right, what they leave alone, and that a crash at
//! any moment leaves the old state or the new one.

use std::collections::BTreeSet;

use thintools::observer::Silent;
use thintools::tools::check::{CheckOptions, check as check_engine, fix};

use crate::crash::{Recorder, Step, after_crashes, codes_of};
use crate::support::{
    Fixture, Image, Map, check, damage_lines, dump, expand, fixtures, get_u32, put_u32, testdata,
};

/// What LVM runs before it activates a pool, and after it has deactivated one.
const LVM: &[&str] = &["-q", "--clear-needs-check-flag"];

fn base() -> Image {
    Image::of("snap-mix-a/meta")
}

/// A change that makes something wrong.
type Spoil = fn(&Image);

/// Damage that is put right in place: a name, an image, what is done to it.
const REPAIRABLE: &[(&str, &str, Spoil)] = &[
    ("a crash's leak", "crash-a/meta", |_| ()),
    (
        "counts of the 0.9 restorer",
        "restored/meta-repair-0.9",
        |_| (),
    ),
    (
        "leaked metadata, wrong sums",
        "damaged/dmg-meta-bitmap-count2",
        |_| (),
    ),
    (
        "wrong sum of data",
        "damaged/dmg-sb-data-nr-allocated",
        |_| (),
    ),
    (
        "wrong sum of metadata",
        "damaged/dmg-sb-meta-nr-allocated",
        |_| (),
    ),
    ("a leak with right sums", "snap-mix-a/meta", |i| {
        i.allocate(Map::Data, 3000)
    }),
    ("a hundred leaks with right sums", "snap-mix-a/meta", |i| {
        (2000..2100).for_each(|b| i.allocate(Map::Data, b))
    }),
    ("a metadata leak with right sums", "snap-mix-a/meta", |i| {
        i.allocate(Map::Metadata, 1000)
    }),
    ("a count of 2 for 1", "snap-mix-a/meta", |i| {
        i.set_count(Map::Data, 118, 2)
    }),
    ("a count in the tree too high", "snap-mix-a/meta", |i| {
        let tree = i.superblock().data_space_map.ref_count_root.0;
        i.edit_block(tree, |b| {
            let count = get_u32(b, 32 + 8 * 336);
            put_u32(b, 32 + 8 * 336, count + 7);
        });
    }),
    ("a wrong number of free data", "snap-mix-a/meta", |i| {
        i.edit_index(Map::Data, 0, |free, _| *free = 0)
    }),
    ("a wrong number of free metadata", "snap-mix-a/meta", |i| {
        i.edit_index(Map::Metadata, 0, |free, _| *free = 0)
    }),
    ("a hint past free data", "snap-mix-a/meta", |i| {
        i.edit_index(Map::Data, 0, |_, hint| *hint = 16_320)
    }),
    ("a hint past free metadata", "snap-mix-a/meta", |i| {
        i.edit_index(Map::Metadata, 0, |_, hint| *hint = 16_320)
    }),
    ("counts past the end of data", "snap-mix-a/meta", |i| {
        i.set_count(Map::Data, 4000, 1)
    }),
    ("counts past the end of metadata", "snap-mix-a/meta", |i| {
        i.set_count(Map::Metadata, 4000, 1)
    }),
    ("a clock behind its mappings", "snap-mix-a/meta", |i| {
        i.edit_superblock(|f| f.time = 3)
    }),
    ("needs_check", "needs-check-set/meta", |_| ()),
    ("needs_check and a leak", "needs-check-set/meta", |i| {
        let free = (0..)
            .find(|&b| i.count(Map::Data, b) == 0)
            .expect("some block is free");
        i.allocate(Map::Data, free);
    }),
    ("leaks beside a metadata snapshot", "held-root/meta", |i| {
        let free = (0..)
            .find(|&b| i.count(Map::Data, b) == 0)
            .expect("some block is free");
        i.allocate(Map::Data, free);
    }),
    ("leaks of many bitmaps", "rand-600thins-5/meta", |i| {
        let blocks = i.superblock().data_space_map.nr_blocks;
        let free = (0..blocks)
            .rev()
            .find(|&b| i.count(Map::Data, b) == 0)
            .expect("some block is free");
        i.allocate(Map::Data, free);
        i.edit_index(Map::Metadata, 0, |free, _| *free -= 1);
    }),
];

fn spoiled(row: &(&str, &str, Spoil)) -> Image {
    let image = Image::of(row.1);
    (row.2)(&image);
    image
}

/// Codes of damage worse than a note, and needs_check.
fn wrong(stderr: &str) -> BTreeSet<String> {
    let matters = |d: &(String, String, u64)| d.0 != "note" || d.1 == "needs-check";
    damage_lines(stderr)
        .into_iter()
        .filter(matters)
        .map(|d| d.1)
        .collect()
}

#[test]
fn what_is_repairable_is_repaired_and_the_second_check_is_clean() {
    for row in REPAIRABLE {
        for option in ["--auto-repair", "--clear-needs-check-flag"] {
            println!("{}, {option}", row.0);
            let image = spoiled(row);
            // A dump refuses mappings later than the clock, so the sound image tells what must come out.
            let before = dump(&["--no-shared"], Image::of(row.1).path())
                .expect(0)
                .out()
                .replace(" flags=\"1\"", "");
            let first = check(&[option], image.path()).expect(0);
            assert!(
                !wrong(&first.stderr).is_empty(),
                "{}: {}",
                row.0,
                first.stderr
            );
            assert!(
                first.stderr.contains("\nrepaired: "),
                "{}: {}",
                row.0,
                first.stderr
            );
            let bytes = image.bytes();
            let second = check(&[option], image.path()).expect(0);
            assert_eq!(
                wrong(&second.stderr),
                BTreeSet::new(),
                "{}: {}",
                row.0,
                second.stderr
            );
            assert!(
                !second.stderr.contains("repaired:"),
                "{}: {}",
                row.0,
                second.stderr
            );
            assert!(image.bytes() == bytes, "{}: the second repair wrote", row.0);
            assert!(!image.superblock().needs_check(), "{}", row.0);
            let after = dump(&["--no-shared"], image.path()).expect(0).out();
            assert!(
                after.replace(" flags=\"0\"", "") == before.replace(" flags=\"0\"", ""),
                "{}",
                row.0
            );
        }
    }
}

#[test]
fn repaired_metadata_passes_the_check_of_0_9() {
    for row in REPAIRABLE {
        let image = spoiled(row);
        check(&["-q", "--auto-repair"], image.path())
            .expect(0)
            .expect_silent();
        crate::support::peer("thin_check", &[image.path().as_os_str()]).expect(0);
    }
}

#[test]
fn repaired_leaks_are_free_again() {
    // 1.3.3 clears the bits and leaves the sums, so the space stays lost.
    let clean = base().superblock();
    let image = base();
    (2000..2100).for_each(|b| image.allocate(Map::Data, b));
    assert_eq!(
        image.superblock().data_space_map.nr_allocated,
        clean.data_space_map.nr_allocated + 100
    );
    check(&["--auto-repair"], image.path()).expect(0);
    assert_eq!(
        image.superblock().data_space_map.nr_allocated,
        clean.data_space_map.nr_allocated
    );
    assert_eq!(
        image.superblock().metadata_space_map.nr_allocated,
        clean.metadata_space_map.nr_allocated
    );
    assert_eq!(image.count(Map::Data, 2050), 0);
}

#[test]
fn the_json_of_a_repair_says_what_was_done() {
    let image = Image::of("crash-a/meta");
    let out = check(&["--json", "--auto-repair"], image.path())
        .expect(0)
        .out();
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["exit_status"], 0);
    assert!(!json["repaired"].as_array().expect("a list").is_empty());
    let out = check(&["--json", "--auto-repair"], image.path())
        .expect(0)
        .out();
    let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(json["repaired"], serde_json::json!([]));
}

/// Repairs `before`, and returns what was written.
fn record(before: &[u8]) -> Vec<Step> {
    let engine = Recorder::new(before);
    let checked = check_engine(&engine, &CheckOptions::default(), &Silent).expect("a report");
    fix(&engine, &checked).expect("a repair");
    engine.into_steps()
}

#[test]
fn a_crash_at_any_moment_leaves_the_old_state_or_the_new_one() {
    for row in REPAIRABLE {
        let before = spoiled(row).bytes();
        let old = codes_of(before.clone());
        let steps = record(&before);
        assert!(
            matches!(steps.last(), Some(Step::Sync)),
            "{}: the last write is not flushed",
            row.0
        );
        let judge = |state: &[u8], what: &str| {
            let codes = codes_of(state.to_vec());
            assert!(
                codes.is_empty() || codes == old,
                "{}: {what}: {codes:?}, was {old:?}",
                row.0
            );
            codes.is_empty()
        };
        let after = after_crashes(&before, &steps, &mut |state, what| {
            judge(state, what);
        });
        assert!(
            judge(&after, "everything written"),
            "{}: nothing was repaired",
            row.0
        );
    }
}

#[test]
fn the_superblock_is_written_once_alone_and_last() {
    for row in REPAIRABLE {
        let steps = record(&spoiled(row).bytes());
        let zero: Vec<usize> = (0..steps.len())
            .filter(|&i| matches!(&steps[i], Step::Write(0, _)))
            .collect();
        assert_eq!(zero, [steps.len() - 2], "{}", row.0);
        assert!(
            zero[0] == 0 || matches!(steps[zero[0] - 1], Step::Sync),
            "{}: no flush before it",
            row.0
        );
    }
}

#[test]
fn nothing_that_the_old_superblock_leads_to_is_overwritten() {
    for row in REPAIRABLE {
        let image = spoiled(row);
        for step in record(&image.bytes()) {
            if let Step::Write(block, _) = step {
                // Whatever the map says is in use is, or is leaked; either way it is not there to be written to.
                assert!(
                    block == 0 || image.count(Map::Metadata, block) == 0,
                    "{}: block {block}",
                    row.0
                );
            }
        }
    }
}

#[test]
fn fatal_damage_leaves_every_byte_as_it_was() {
    let folder = testdata().join("damaged");
    let mut tried = 0;
    for file in std::fs::read_dir(folder).expect("fixtures") {
        let file = file
            .expect("readable")
            .file_name()
            .into_string()
            .expect("plain name");
        let Some(name) = file.strip_suffix(".img.zst") else {
            continue;
        };
        let image = Image::from_bytes(&expand(&format!("damaged/{name}.img")));
        let before = image.bytes();
        if check(&["-q"], image.path()).code != Some(5) {
            continue;
        }
        for options in [
            &["--auto-repair"][..],
            &["--clear-needs-check-flag"],
            &["--auto-repair", "--clear-needs-check-flag"],
            LVM,
        ] {
            check(options, image.path()).expect(5);
            assert!(image.bytes() == before, "{name}: {options:?} wrote");
        }
        tried += 1;
    }
    assert!(tried > 25, "{tried} images tried");
}

#[test]
fn needs_check_stays_on_fatal_damage() {
    let image = base();
    image.edit_superblock(|f| f.flags = 1);
    image.spoil_block(314, |b| b[2000] ^= 1);
    let before = image.bytes();
    check(LVM, image.path()).expect(5).expect_silent();
    check(&["--auto-repair"], image.path())
        .expect(5)
        .expect_stderr(&["needs-check: block 0", "thin_repair"]);
    assert!(image.bytes() == before);
}

#[test]
fn a_check_that_leaves_something_out_never_changes_a_byte() {
    for scope in ["--skip-mappings", "--super-block-only"] {
        for name in [
            "needs-check-set/meta",
            "crash-a/meta",
            "snap-mix-a/meta",
            "restored/meta-repair-0.9",
        ] {
            let image = Image::of(name);
            let before = image.bytes();
            check(&[scope], image.path()).expect(0);
            check(&[scope, "-q"], image.path())
                .expect(0)
                .expect_silent();
            let cleared = check(&[scope, "--clear-needs-check-flag"], image.path());
            assert!(image.bytes() == before, "{name}: {scope} wrote");
            if image.superblock().needs_check() {
                assert_ne!(cleared.code, Some(0), "{name}: the flag is still set");
                assert!(
                    cleared.stderr.contains("needs_check flag stays"),
                    "{}",
                    cleared.stderr
                );
            } else {
                assert_eq!(cleared.code, Some(0), "{name}: {}", cleared.stderr);
            }
            check(&[scope, "--auto-repair"], image.path()).expect(2);
        }
    }
}

/// A sound pool on the smallest device that holds it, but for one leaked data block.
pub(crate) fn full() -> Image {
    let xml = "<superblock uuid=\"\" time=\"0\" transaction=\"0\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"1000\">\n\
        <device dev_id=\"0\" mapped_blocks=\"900\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\">\n\
        <range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"900\" time=\"0\"/>\n</device>\n</superblock>\n";
    let smallest = (1..64).find(|&blocks| {
        let image = Image::empty(blocks);
        let input = image.beside("input.xml");
        std::fs::write(&input, xml).expect("written");
        crate::support::restore(&input, image.path()).code == Some(0)
    });
    let image = Image::restored(xml, smallest.expect("it fits 63 blocks"));
    let map = image.superblock().metadata_space_map;
    assert_eq!(map.nr_blocks, map.nr_allocated, "no block is free");
    image.allocate(Map::Data, 950);
    image
}

#[test]
fn a_full_metadata_device_is_left_as_it_was_with_advice() {
    for options in [&["--auto-repair"][..], &["--clear-needs-check-flag"]] {
        let image = full();
        let before = image.bytes();
        check(options, image.path())
            .expect(3)
            .expect_stderr(&["extend", "nothing was changed"]);
        assert!(image.bytes() == before, "{options:?}");
        check(&["-q", options[0]], image.path())
            .expect(3)
            .expect_silent();
        assert!(image.bytes() == before, "{options:?}");
    }
}

#[test]
fn a_full_metadata_device_keeps_needs_check_with_its_leaks() {
    let image = full();
    image.edit_superblock(|f| f.flags = 1);
    let before = image.bytes();
    check(&["--clear-needs-check-flag"], image.path())
        .expect(3)
        .expect_stderr(&["nothing was changed"]);
    assert!(image.bytes() == before);
}

#[test]
fn the_kernels_reserve_is_room_enough_for_a_repair() {
    // To the kernel this pool is out of metadata space; 12 blocks are free all the same.
    let image = Image::of("out-of-metadata-512k/meta");
    let before = image.dumped();
    check(&["--auto-repair"], image.path()).expect(0);
    assert_eq!(
        wrong(&check(&[], image.path()).expect(0).stderr),
        BTreeSet::new()
    );
    assert!(image.dumped() == before);
}

#[test]
fn a_full_metadata_device_is_repaired_once_it_was_copied_to_a_larger_one() {
    let image = Image::of("out-of-metadata-512k/meta");
    let copy = Image::restored(&dump(&[], image.path()).expect(0).out(), 512);
    assert_eq!(
        wrong(&check(&[], copy.path()).expect(0).stderr),
        BTreeSet::new()
    );
    assert!(copy.dumped().devices == image.dumped().devices);
}

/// Sound images.
fn clean() -> impl Iterator<Item = Fixture> {
    fixtures()
        .into_iter()
        .filter(|f| check(&["-q"], Image::of(&f.name()).path()).code == Some(0))
}

#[test]
fn what_lvm_runs_is_silent_and_changes_nothing_on_sound_pools() {
    let mut flagged = 0;
    let mut tried = 0;
    for fixture in clean() {
        let image = Image::of(&fixture.name());
        let before = image.bytes();
        let needs_check = image.superblock().needs_check();
        check(LVM, image.path()).expect(0).expect_silent();
        assert!(!image.superblock().needs_check(), "{}", fixture.name());
        if needs_check {
            // Only the flag, and the checksum over it.
            let (was, is) = (&before[..], image.bytes());
            assert!(
                was[8..4096] == is[8..4096] && was[4096..] == is[4096..],
                "{}: more was changed",
                fixture.name()
            );
            flagged += 1;
        } else {
            assert!(
                image.bytes() == before,
                "{}: it was changed",
                fixture.name()
            );
        }
        tried += 1;
    }
    assert!(
        flagged > 0 && tried > 40,
        "{flagged} of {tried} had the flag"
    );
}

#[test]
fn what_lvm_runs_frees_leaks() {
    let image = Image::of("crash-a/meta");
    check(LVM, image.path()).expect(0).expect_silent();
    assert_eq!(
        wrong(&check(&[], image.path()).expect(0).stderr),
        BTreeSet::new()
    );
}

#[test]
fn auto_repair_changes_nothing_on_sound_pools() {
    for fixture in clean() {
        let image = Image::of(&fixture.name());
        if image.superblock().needs_check() {
            continue;
        }
        let before = image.bytes();
        check(&["--auto-repair"], image.path()).expect(0);
        assert!(image.bytes() == before, "{}", fixture.name());
    }
}

#[test]
fn options_that_contradict_a_repair_are_refused_before_anything_is_opened() {
    for other in [
        "--metadata-snap",
        "--skip-mappings",
        "--super-block-only",
        "--ignore-non-fatal-errors",
    ] {
        check(&["--auto-repair", other], "/no/such/file".as_ref()).expect(2);
    }
    check(
        &["--clear-needs-check-flag", "--metadata-snap"],
        "/no/such/file".as_ref(),
    )
    .expect(2);
    check(
        &["--auto-repair", "--override-mapping-root", "5"],
        "/no/such/file".as_ref(),
    )
    .expect(2);
}

#[test]
fn compressed_images_are_not_repaired() {
    let path = testdata().join("crash-a/meta.img.zst");
    check(&[], &path).expect(3);
    let done = check(&["--auto-repair"], &path);
    assert_eq!(done.code, Some(1), "{}", done.stderr);
}
