//! The commands for developers: damage hits what it says and nothing else, comparisons count right, and metadata that was
//! generated is whole.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;
use thintools::checksum::{self, BlockKind};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

use crate::support::{
    Finished, Image, check, expand, get_u32, get_u64, peer, program, put_u64, thintools,
};

const SECTOR: usize = 512;
const TYPES: [&str; 8] = [
    "zero",
    "bit-flip",
    "junk",
    "torn",
    "stale",
    "misdirected",
    "swapped",
    "sector",
];

fn inventory(image: &Path) -> BTreeMap<String, u64> {
    let call = ["thin_generate_damage", "--inventory", "-i"].map(OsStr::new);
    let out = thintools(call.into_iter().chain([image.as_os_str()]));
    let stock: Value = serde_json::from_str(&out.run().expect(0).out()).expect("JSON");
    serde_json::from_value(stock["kinds"].clone()).expect("numbers by kind")
}

fn damage(image: &Image, output: &Path, args: &[&str]) -> Finished {
    let call = ["thin_generate_damage", "--json", "-i"].map(OsStr::new);
    let files = [
        image.path().as_os_str(),
        OsStr::new("-o"),
        output.as_os_str(),
    ];
    thintools(
        call.into_iter()
            .chain(files)
            .chain(args.iter().map(OsStr::new)),
    )
    .run()
}

/// Damages a copy: the copy, and kind, type and block of all damage.
#[track_caller]
fn damaged(image: &Image, args: &[&str]) -> (Image, Vec<(String, String, u64)>) {
    let copy = Image::empty(0);
    let output = copy.beside("damaged.img");
    let out = damage(image, &output, args).expect(0).out();
    let report: Value = serde_json::from_str(&out).expect("JSON");
    let list = report["damaged"].as_array().expect("a list").iter();
    let found = list
        .map(|one| {
            let text = |name: &str| one[name].as_str().expect("text").to_owned();
            (
                text("kind"),
                text("type"),
                one["block"].as_u64().expect("a number"),
            )
        })
        .collect();
    let bytes = std::fs::read(output).expect("written");
    (Image::from_bytes(&bytes), found)
}

fn compare(truth: &Image, damaged: &str, result: &Path) -> Value {
    let call = ["thin_compare_mappings", "--truth"].map(OsStr::new);
    let files = [
        truth.path().as_os_str(),
        OsStr::new("--damaged-blocks"),
        OsStr::new(damaged),
        OsStr::new("--result"),
        result.as_os_str(),
    ];
    let out = thintools(call.into_iter().chain(files))
        .run()
        .expect(0)
        .out();
    serde_json::from_str(&out).expect("JSON")
}

/// The numbers of a comparison: truth, held, recovered, recovered in all, wrong.
fn numbers(compared: &Value) -> [u64; 5] {
    ["truth", "held", "recovered", "recovered_all", "wrong"]
        .map(|name| compared[name].as_u64().expect("a number"))
}

fn differing(a: &Image, b: &Image) -> BTreeSet<u64> {
    let (a, b) = (a.bytes(), b.bytes());
    assert_eq!(a.len(), b.len());
    let pairs = a.chunks(BLOCK_SIZE).zip(b.chunks(BLOCK_SIZE)).enumerate();
    pairs
        .filter(|(_, (a, b))| a != b)
        .map(|(i, _)| i as u64)
        .collect()
}

/// Checks that a block looks like it should after this happened to it.
#[track_caller]
fn judge(damage: &str, before: &[u8], after: &[u8], block: u64) {
    let is_zero = |bytes: &[u8]| bytes.iter().all(|&b| b == 0);
    let differs = |i: &usize| before[i * SECTOR..][..SECTOR] != after[i * SECTOR..][..SECTOR];
    let sectors: Vec<usize> = (0..8).filter(differs).collect();
    let bits = before.iter().zip(after).map(|(a, b)| (a ^ b).count_ones());
    let sealed = checksum::identify(after);
    let claimed = checksum::claimed_location(after).0;
    match damage {
        "zero" => assert!(is_zero(after)),
        "bit-flip" => assert_eq!(bits.sum::<u32>(), 1),
        "junk" => assert!(sealed.is_none() && bits.sum::<u32>() > 8000),
        "torn" => {
            assert_eq!(sealed, None);
            assert!(sectors[0] > 0 || sectors == [0], "{sectors:?}");
        }
        "stale" if is_zero(after) => {}
        "stale" => {
            assert_eq!((sealed, claimed), (checksum::identify(before), block));
            if sealed == Some(BlockKind::Node) {
                let facts = |block: &[u8]| [4, 20, 24].map(|at| get_u32(block, at));
                assert_eq!(facts(after), facts(before));
            }
        }
        "misdirected" | "swapped" => assert!(sealed.is_some() && claimed != block),
        "sector" => {
            assert_eq!(sectors.len(), 1);
            assert!(is_zero(&after[sectors[0] * SECTOR..][..SECTOR]));
        }
        other => panic!("{other}"),
    }
}

/// Every type of damage to every kind of block changes just the blocks that are listed, each as its type says.
#[test]
fn damage_is_what_it_says() {
    for name in ["held-root/meta", "rand-600thins-5/meta"] {
        let image = Image::of(name);
        let before = image.bytes();
        for (kind, count) in inventory(image.path()) {
            for damage in TYPES {
                let spec = format!("{kind}:{damage}");
                if count == 0 {
                    let refused = self::damage(&image, &image.beside("x"), &["--damage", &spec]);
                    refused
                        .expect(1)
                        .expect_stderr(&[&kind, "give another kind"]);
                    continue;
                }
                let (copy, list) = damaged(&image, &["--damage", &spec, "--seed", "3"]);
                let blocks: BTreeSet<u64> = list.iter().map(|one| one.2).collect();
                assert_eq!(blocks, differing(&image, &copy), "{name} {spec}");
                assert_eq!(blocks.len(), if damage == "swapped" { 2 } else { 1 });
                assert!(list.iter().any(|one| one.0 == kind), "{list:?}");
                for (_, damage, block) in list {
                    judge(&damage, &image.block(block), &copy.block(block), block);
                }
            }
        }
        assert!(image.bytes() == before, "the input is as it was");
    }
}

#[test]
fn numbers_fractions_and_combinations() {
    let image = Image::of("snap-fan-60/meta");
    let kinds = inventory(image.path());
    let count = |args: &[&str]| damaged(&image, args).1.len() as u64;
    let leaves = ["--kind", "leaf", "--type", "zero"];
    let with = |more: &[&'static str]| count(&[&leaves[..], more].concat());
    assert_eq!(with(&[]), 1);
    assert_eq!(with(&["--count", "7"]), 7);
    assert_eq!(with(&["--count", "1/4"]), kinds["leaf"].div_ceil(4));
    assert_eq!(with(&["--fraction", "1/4"]), kinds["leaf"].div_ceil(4));
    assert_eq!(with(&["--count", "all"]), kinds["leaf"]);
    // No block is damaged twice, and kinds without a block are no obstacle to damaging all of them.
    let all = ["--damage", "top-level:zero:all", "--damage", "any:zero:all"];
    assert_eq!(count(&all), kinds.values().sum::<u64>());
    let (_, list) = damaged(
        &image,
        &[
            "--damage",
            "leaf:swapped:3",
            "--damage",
            "details:junk",
            "--damage",
            "any:torn:5",
        ],
    );
    let of = |damage: &str| list.iter().filter(|one| one.1 == damage).count();
    assert_eq!([of("swapped"), of("junk"), of("torn")], [4, 1, 5]);
}

#[test]
fn the_same_seed_makes_the_same_damage() {
    let image = Image::of("crash-a/meta");
    let args = |seed| {
        [
            "--damage",
            "any:torn:5",
            "--damage",
            "inner:stale",
            "--seed",
            seed,
        ]
    };
    let one = damaged(&image, &args("1")).0.bytes();
    assert!(one == damaged(&image, &args("1")).0.bytes());
    assert!(one != damaged(&image, &args("2")).0.bytes());
}

#[test]
fn wrong_command_lines_leave_nothing_behind() {
    let image = Image::of("snap-mix-a/meta");
    let output = image.beside("new.img");
    damage(&image, &output, &[])
        .expect(1)
        .expect_stderr(&["nothing to damage"]);
    damage(&image, &output, &["--damage", "leaf:rust"])
        .expect(2)
        .expect_stderr(&["bit-flip"]);
    damage(&image, &output, &["--damage", "leave:zero"])
        .expect(2)
        .expect_stderr(&["top-level-root"]);
    damage(&image, &output, &["--damage", "leaf:zero:0"])
        .expect(2)
        .expect_stderr(&["1/4"]);
    assert!(!output.exists());
    let before = image.bytes();
    damage(&image, image.path(), &["--damage", "leaf:zero"])
        .expect(1)
        .expect_stderr(&["does not exist"]);
    assert!(image.bytes() == before);
    let (bad, _) = damaged(&image, &["--damage", "top-level-root:zero"]);
    damage(&bad, &output, &["--damage", "leaf:zero"]).expect(5);
    assert!(!output.exists());
}

/// An inventory can come with a plain copy.
#[test]
fn a_copy_is_the_image_expanded() {
    let image = Image::empty(0);
    let copy = image.beside("copy.img");
    let compressed = crate::support::testdata().join("bs-512/meta.img.zst");
    let call = [
        OsStr::new("thin_generate_damage"),
        OsStr::new("--inventory"),
        OsStr::new("-i"),
        compressed.as_os_str(),
        OsStr::new("-o"),
        copy.as_os_str(),
    ];
    thintools(call).run().expect(0);
    assert!(std::fs::read(copy).expect("written") == expand("bs-512/meta.img"));
}

/// What a repair recovers of an image that lost leaves is what is held, counted for each device that shares a leaf.
#[test]
fn a_repair_is_measured() {
    let image = Image::of("snap-fan-60/meta");
    let whole = compare(&image, "0", image.path());
    let [truth, ..] = numbers(&whole);
    assert_eq!(numbers(&whole), [truth, truth, truth, truth, 0]);
    let (copy, list) = damaged(&image, &["--damage", "leaf:zero:1/4"]);
    let blocks: Vec<String> = list.iter().map(|one| one.2.to_string()).collect();
    let result = Image::empty(image.bytes().len() as u64 / BLOCK_SIZE as u64);
    let call = ["thin_repair", "-q", "-i"].map(OsStr::new);
    let files = [
        copy.path().as_os_str(),
        OsStr::new("-o"),
        result.path().as_os_str(),
    ];
    thintools(call.into_iter().chain(files)).run().expect(4);
    let compared = compare(&image, &blocks.join(","), result.path());
    let [_, held, recovered, all, wrong] = numbers(&compared);
    assert!(0 < held && held < truth);
    assert_eq!([recovered, all, wrong], [held, held, 0]);
    let counted: usize = result
        .dumped()
        .devices
        .values()
        .flat_map(|d| &d.1)
        .map(|r| r.2 as usize)
        .sum();
    assert_eq!(held, counted as u64);
}

#[test]
fn what_a_result_makes_up_is_wrong() {
    let image = Image::of("bs-512/meta");
    let result = Image::from_bytes(&image.bytes());
    let [truth, ..] = numbers(&compare(&image, "0", image.path()));
    let device = *image.dumped().devices.keys().next().expect("a device");
    let leaf = image.first_leaf(image.device_root(device));
    let value = get_u64(&image.block(leaf), 32 + 8 * 252);
    result.edit_block(leaf, |node| put_u64(node, 32 + 8 * 252, value + (1 << 24)));
    let compared = compare(&image, "0", result.path());
    assert_eq!(numbers(&compared), [truth, truth, truth - 1, truth - 1, 1]);
    let wrong = &compared["wrong_examples"][0];
    assert_eq!(wrong["device"], device);
    assert_eq!(wrong["truth"], value >> 24);
    assert_eq!(wrong["data"], (value >> 24) + 1);
}

#[test]
fn a_result_that_is_no_metadata_recovers_nothing() {
    let image = Image::of("snap-mix-a/meta");
    for blocks in [0, 1, 64] {
        let compared = compare(&image, "7", Image::empty(blocks).path());
        assert_eq!(numbers(&compared)[2..], [0, 0, 0]);
        assert!(compared["unreadable"].is_string(), "{compared}");
    }
    let (broken, list) = damaged(&image, &["--damage", "leaf:zero:2"]);
    let report = broken.beside("damaged.json");
    let text = format!(
        r#"{{"damaged":[{{"block":{}}},{{"block":{}}}]}}"#,
        list[0].2, list[1].2
    );
    std::fs::write(&report, text).expect("written");
    let compared = compare(&image, report.to_str().expect("text"), broken.path());
    let [truth, held, recovered, ..] = numbers(&compared);
    assert!(held < truth && recovered == 0, "{compared}");
    std::fs::write(&report, "{}").expect("written");
    let call = [
        "thin_compare_mappings",
        "--truth",
        "x",
        "--result",
        "y",
        "--damaged-blocks",
    ];
    let refused = thintools(call.map(OsStr::new).into_iter().chain([report.as_os_str()])).run();
    refused
        .expect(1)
        .expect_stderr(&["no list of damaged blocks"]);
}

/// Generated metadata is whole by our own judgement and that of 0.9, and has the shape that was asked for.
#[test]
fn generated_metadata_is_whole() {
    let shapes: [(&str, usize); 5] = [
        ("--devices 1 --mappings 0", 1),
        (
            "--devices 3 --mappings 5000 --pattern sequential --snapshots 2",
            5,
        ),
        (
            "--devices 20 --mappings 700 --snapshots 10 --transactions 25",
            30,
        ),
        (
            "--devices 300 --mappings 3 --transactions 6 --data-block-size 1024",
            300,
        ),
        (
            "--devices 2 --mappings 2000 --transactions 60 --metadata-size 1M",
            2,
        ),
    ];
    for (shape, devices) in shapes {
        let image = Image::empty(0);
        let path = image.beside("made.img");
        let args = ["thin_generate_metadata", "-o"].map(OsStr::new).into_iter();
        let args = args
            .chain([path.as_os_str()])
            .chain(shape.split(' ').map(OsStr::new));
        let call: Vec<&OsStr> = args.collect();
        thintools(call.clone()).run().expect(0);
        thintools(call)
            .run()
            .expect(1)
            .expect_stderr(&["does not exist"]);
        check(&["-q"], &path).expect(0).expect_silent();
        peer("thin_check", &[OsStr::new("-q"), path.as_os_str()]).expect(0);
        let made = Image::from_bytes(&std::fs::read(&path).expect("written"));
        assert_eq!(made.dumped().devices.len(), devices, "{shape}");
    }
}

/// Of what a history leaves behind, the node that takes the place of another is an older version of it.
#[test]
fn stale_nodes_are_older_versions() {
    let image = Image::empty(0);
    let path = image.beside("made.img");
    let args = ["thin_generate_metadata", "--transactions", "30", "-o"].map(OsStr::new);
    thintools(args.into_iter().chain([path.as_os_str()]))
        .run()
        .expect(0);
    let made = Image::from_bytes(&std::fs::read(&path).expect("written"));
    let specs = [
        "--damage",
        "top-level-root:stale",
        "--damage",
        "details:stale",
        "--damage",
        "metadata-bitmap:stale",
    ];
    let (copy, list) = damaged(&made, &specs);
    assert_eq!(list.len(), 3);
    for (kind, _, block) in list {
        let (before, after) = (made.block(block), copy.block(block));
        let sealed = checksum::identify(&before).expect("sealed");
        assert_eq!(
            checksum::verify(&after, sealed, MetadataBlock(block)),
            Ok(()),
            "{kind}"
        );
        let same = before.iter().zip(&after).filter(|(a, b)| a == b).count();
        assert!(same > BLOCK_SIZE * 3 / 4, "{kind}: {same}");
    }
}

/// The script that scores repairs works from end to end, where there is Python.
#[test]
fn repairs_are_scored() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/repair-score.py");
    let image = crate::support::testdata().join("bs-384/meta.img.zst");
    let args = [
        script.as_os_str(),
        OsStr::new("--ours"),
        OsStr::new(crate::support::BINARY),
        OsStr::new("--images"),
        image.as_os_str(),
        OsStr::new("--only"),
        OsStr::new("one:(leaf|details):(zero|sector) "),
    ];
    let out = program("python3", args).run().expect(0).out();
    assert!(out.contains("* 4 cases of 4"), "{out}");
    assert!(
        out.contains("| one leaf | 2 |") && out.contains("100.00 %"),
        "{out}"
    );
}
