//! `thin_repair --undelete`: devices come back as they were, and never with blocks that others have.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;
use thintools::checksum::{self, BlockKind};
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::tools::check::{CheckOptions, check as check_engine};
use thintools::tools::repair::{Deletions, Wanted};
use thintools::tools::{Selection, restore};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

use crate::support::{
    Finished, Image, Map, Pool, check, dump, entries, expand, fixtures, get_u32, get_u64, peer,
    put_u64, thintools,
};

/// A device whose 40 own mappings nobody else has, and the root of its mapping tree.
const FAN: (&str, u64) = ("snap-fan-60/meta", 58);

fn undelete(image: &Image, args: &[&str], output: &Path) -> Finished {
    let path = image.path().as_os_str();
    let mut all = vec![OsStr::new("thin_repair"), OsStr::new("-i"), path];
    all.extend(args.iter().map(OsStr::new));
    if !args.contains(&"--dry-run") && args.iter().any(|a| a.parse::<u64>().is_ok()) {
        all.extend([OsStr::new("-o"), output.as_os_str()]);
    }
    thintools(all).run()
}

/// The list of deleted devices.
fn list(image: &Image) -> Vec<Value> {
    let finished = undelete(image, &["--undelete", "--json"], Path::new("")).expect(0);
    let list: Value = serde_json::from_str(&finished.out()).expect("JSON");
    list["deleted"]["devices"]
        .as_array()
        .expect("a list")
        .clone()
}

/// Mappings by virtual block: data block and time.
fn mappings(pool: &Pool, device: u64) -> BTreeMap<u64, (u64, u64)> {
    let runs = pool.devices[&device].1.iter();
    runs.flat_map(|&(thin, data, length, time)| {
        (0..length).map(move |i| (thin + i, (data + i, time)))
    })
    .collect()
}

/// Fails unless all devices that have a data block have it at the same virtual block since the same time.
#[track_caller]
fn expect_consistent(pool: &Pool) {
    let mut owners: HashMap<u64, (u64, u64)> = HashMap::new();
    for &device in pool.devices.keys() {
        for (thin, (data, time)) in mappings(pool, device) {
            let owner = *owners.entry(data).or_insert((thin, time));
            assert_eq!(owner, (thin, time), "data block {data} of device {device}");
        }
    }
}

/// Brings a device back with this exit status, has the result checked, and reads it.
#[track_caller]
fn brought_back(image: &Image, args: &[&str], code: i32) -> (Pool, Finished) {
    let before = image.bytes();
    let output = Image::empty(before.len() as u64 / BLOCK_SIZE as u64);
    let finished = undelete(image, args, output.path()).expect(code);
    assert!(image.bytes() == before, "the input is as it was");
    check(&[], output.path()).expect(0);
    peer("thin_check", &["-q".as_ref(), output.path().as_os_str()]).expect(0);
    let pool = Pool::read(&dump(&["--no-shared"], output.path()).expect(0).out());
    expect_consistent(&pool);
    (pool, finished)
}

#[test]
fn devices_come_back_as_they_were() {
    let rows: &[(&str, &str, u64)] = &[
        (
            "snap-fan-60/meta",
            "snap-fan-60/meta-before-origin-delete",
            0,
        ),
        ("held-root/meta", "held-root/meta-just-reserved", 3),
        ("crash-log/meta", "crash-log/meta-cut-185", 2),
        ("crash-log/meta", "crash-log/meta-cut-247", 4),
        ("crash-log/meta", "crash-log/meta-cut-446", 5),
        ("crash-log/meta", "crash-log/meta-torn-476", 7),
    ];
    for &(name, earlier, id) in rows {
        println!("device {id} of {name}");
        let image = Image::of(name);
        let truth = Pool::read(
            &dump(&["--no-shared"], Image::of(earlier).path())
                .expect(0)
                .out(),
        );
        let current = Pool::read(&dump(&["--no-shared"], image.path()).expect(0).out());
        let (mut pool, _) = brought_back(&image, &["--undelete", &id.to_string()], 0);
        assert_eq!(mappings(&pool, id), mappings(&truth, id));
        let (attributes, _) = pool.devices.remove(&id).expect("it is back");
        for name in ["transaction", "creation_time", "mapped_blocks"] {
            assert_eq!(attributes[name], truth.devices[&id].0[name], "{name}");
        }
        assert_eq!(attributes["snap_time"], current.superblock["time"]);
        assert_eq!(pool, current, "all others are as they were");
    }
}

#[test]
fn every_device_that_is_listed_comes_back() {
    let mut all = 0;
    for fixture in fixtures() {
        let image = Image::of(&fixture.name());
        let listed = undelete(&image, &["--undelete", "--json"], Path::new(""));
        if listed.code == Some(5) {
            listed.expect_stderr(&["repair it first"]);
            continue;
        }
        let current = image.dumped();
        for device in list(&image).iter().filter(|d| d["is_whole"] == true) {
            all += 1;
            let id = device["dev_id"].to_string();
            let root = device["mapping_root"].to_string();
            println!("{}: device {id} of mapping root {root}", fixture.name());
            let remains = &device["remains"];
            let number = |value: &Value| value.as_u64().expect("a number");
            let left_out = number(&remains["reused"]) + number(&remains["doubtful"]);
            let args = ["--undelete", &id, "--as", "16000000", "--from", &root];
            let code = if left_out == 0 { 0 } else { 4 };
            let (pool, _) = brought_back(&image, &args, code);
            let kept = mappings(&pool, 16_000_000);
            let mapped = number(&device["mapped_blocks"]);
            assert_eq!(kept.len() as u64, mapped - left_out);
            assert_eq!(pool.devices.len(), current.devices.len() + 1);
            // The kernel's own counts say the same of every block that nobody else is said to have.
            let others = pool.devices.keys().filter(|&&id| id != 16_000_000);
            let others: Vec<u64> = others
                .flat_map(|&id| mappings(&pool, id))
                .map(|m| m.1.0)
                .collect();
            let others: std::collections::HashSet<u64> = others.into_iter().collect();
            let is_free = |data: &&u64| !others.contains(*data);
            let data: Vec<u64> = kept.values().map(|m| m.0).collect();
            let free: Vec<&u64> = data.iter().filter(is_free).collect();
            assert_eq!(remains["free"], free.len());
            if fixture.folder.starts_with("snap-") {
                free.iter()
                    .for_each(|b| assert_eq!(image.count(Map::Data, **b), 0));
            }
        }
    }
    assert!(all > 40, "only {all} devices were listed");
}

/// The root of a device's tree in an older state.
fn old_root(image: &Image, state: u64, device: u64) -> u64 {
    let top = entries(&image.block(state), 8);
    let entry = top
        .iter()
        .find(|e| e.0 == device)
        .expect("the state has it");
    get_u64(&entry.1, 0)
}

/// The first leaf below `root` with a mapping of a time of `since` or later; that mapping's virtual block, data block and time.
fn own(image: &Image, root: u64, since: u64) -> (u64, (u64, u64, u64)) {
    let mut leaves: Vec<u64> = vec![root];
    while get_u32(&image.block(leaves[0]), 4) & 2 == 0 {
        let children = leaves.iter().flat_map(|&n| entries(&image.block(n), 8));
        leaves = children.map(|e| get_u64(&e.1, 0)).collect();
    }
    let found = leaves.iter().find_map(|&leaf| {
        let all = entries(&image.block(leaf), 8);
        let mut all = all.iter().map(|(key, value)| (*key, get_u64(value, 0)));
        let own = all.find(|(_, value)| value & 0xff_ffff >= since)?;
        Some((leaf, (own.0, own.1 >> 24, own.1 & 0xff_ffff)))
    });
    found.expect("it has mappings of its own")
}

/// Has a mapping of a leaf lead elsewhere, with the data space map put right.
fn redirect(image: &Image, leaf: u64, key: u64, data: u64, time: u64) {
    let at = entries(&image.block(leaf), 8)
        .iter()
        .position(|e| e.0 == key);
    let at = 32 + 8 * 252 + 8 * at.expect("the key is there");
    let old = get_u64(&image.block(leaf), at) >> 24;
    image.edit_block(leaf, |b| put_u64(b, at, data << 24 | time));
    assert_eq!(
        (image.count(Map::Data, old), image.count(Map::Data, data)),
        (1, 0)
    );
    image.set_count(Map::Data, old, 0);
    image.set_count(Map::Data, data, 1);
}

/// What became of a device's mappings: shared, free, reused, doubtful.
fn remains(image: &Image, device: u64) -> [u64; 4] {
    let list = list(image);
    let device = list.iter().find(|d| d["dev_id"] == device).expect("listed");
    ["shared", "free", "reused", "doubtful"]
        .map(|n| device["remains"][n].as_u64().expect("a number"))
}

/// The image of [`FAN`], the deleted device's first leaf of its own with a mapping in it, and the same of a current device.
#[expect(clippy::type_complexity, reason = "two of the same kind")]
fn fan() -> (Image, (u64, (u64, u64, u64)), (u64, (u64, u64, u64))) {
    let image = Image::of(FAN.0);
    let list = list(&image);
    let device = list.iter().find(|d| d["dev_id"] == FAN.1).expect("listed");
    let state = device["mapping_root"].as_u64().expect("a block");
    let old = own(&image, old_root(&image, state, FAN.1), 58);
    let current = own(&image, image.device_root(60), 60);
    (image, old, current)
}

#[test]
fn blocks_that_others_have_by_now_are_left_out() {
    let (image, (_, (thin, data, _)), (leaf, (key, _, time))) = fan();
    assert_eq!(remains(&image, 58), [2960, 40, 0, 0]);
    assert_ne!(thin, key);
    redirect(&image, leaf, key, data, time);
    assert_eq!(remains(&image, 58), [2960, 39, 1, 0]);
    let (pool, finished) = brought_back(&image, &["--undelete", "58"], 4);
    finished.expect_stderr(&[
        &format!(
            "left out: mappings of device 58 blocks {thin}..{}",
            thin + 1
        ),
        "2999 of 3000 mappings",
        "39 blocks are not guaranteed",
    ]);
    let kept = mappings(&pool, 58);
    assert!(kept.len() == 2999 && !kept.contains_key(&thin));
    assert_eq!(pool.devices[&58].0["mapped_blocks"], "2999");
    assert!(mappings(&pool, 60).values().any(|m| m.0 == data));
    let dry = undelete(
        &image,
        &["--undelete", "58", "--dry-run", "--json"],
        Path::new(""),
    );
    let dry: Value = serde_json::from_str(&dry.expect(4).out()).expect("JSON");
    assert_eq!(dry["left_out"][0]["begin"], thin);
    assert_eq!(
        (&dry["mappings"], &dry["exit_status"]),
        (&Value::Null, &4.into())
    );
}

/// The leaf of the tree at `root`, which is one or two levels high, that has this key, and the key's data block and time.
fn leaf_with(image: &Image, root: u64, key: u64) -> Option<(u64, (u64, u64))> {
    let children = entries(&image.block(root), 8);
    let child = children.iter().rfind(|e| e.0 <= key)?;
    let leaf = get_u64(&child.1, 0);
    let entries = entries(&image.block(leaf), 8);
    let value = get_u64(&entries.iter().find(|e| e.0 == key)?.1, 0);
    Some((leaf, (value >> 24, value & 0xff_ffff)))
}

#[test]
fn blocks_that_others_use_at_the_same_place_are_not_taken_for_shared() {
    let (image, ..) = fan();
    let (pool, _) = brought_back(&image, &["--undelete", "58"], 0);
    let own = mappings(&pool, 58);
    let own = own.iter().filter(|(_, m)| m.1 >= 58);
    // A block that another device has of its own where the deleted device has one too.
    let found = own.flat_map(|(&thin, &m)| (1..=60).map(move |id| (id, thin, m)));
    let found = found.filter(|(id, ..)| *id != 58 && pool.devices.contains_key(id));
    let mut both = found.filter(|(id, thin, _)| mappings(&pool, *id)[thin].1 == *id);
    let (id, thin, (data, time)) = both.next().expect("they meet somewhere");
    let (leaf, _) = leaf_with(&image, image.device_root(id), thin).expect("mapped");
    // As if the block had been freed, and given out anew to the same place at the same time.
    redirect(&image, leaf, thin, data, time);
    let list = list(&image);
    let device = list.iter().find(|d| d["dev_id"] == 58).expect("listed");
    let state = device["mapping_root"].as_u64().expect("a block");
    let (old, _) = leaf_with(&image, old_root(&image, state, 58), thin).expect("mapped");
    let doubtful = entries(&image.block(old), 8).len() as u64;
    assert_eq!(remains(&image, 58)[2..], [0, doubtful]);
    let (pool, _) = brought_back(&image, &["--undelete", "58"], 4);
    assert!(!mappings(&pool, 58).contains_key(&thin));
}

#[test]
fn leaves_that_were_written_later_are_not_believed() {
    let (image, (leaf, (thin, ..)), _) = fan();
    let state = list(&image);
    let state = state.iter().find(|d| d["dev_id"] == FAN.1).expect("listed");
    let root = old_root(
        &image,
        state["mapping_root"].as_u64().expect("a block"),
        FAN.1,
    );
    // The place of the old leaf was given to a current device, which has as many mappings in the same range.
    let current = entries(&image.block(image.device_root(60)), 8);
    let (begin, heir) = current
        .iter()
        .map(|e| (e.0, get_u64(&e.1, 0)))
        .rfind(|e| e.0 <= thin)
        .expect("a leaf");
    let heir_entries = entries(&image.block(heir), 8).len() as u64;
    assert_eq!(heir_entries, entries(&image.block(leaf), 8).len() as u64);
    let at = entries(&image.block(root), 8)
        .iter()
        .position(|e| e.0 == begin);
    let at = 32 + 8 * 252 + 8 * at.expect("the same ranges");
    image.edit_block(root, |b| put_u64(b, at, heir));
    let [shared, free, reused, doubtful] = remains(&image, 58);
    assert_eq!(
        (shared + free + reused + doubtful, doubtful),
        (3000, heir_entries)
    );
    let (pool, _) = brought_back(&image, &["--undelete", "58"], 4);
    assert_eq!(mappings(&pool, 58).len() as u64, 3000 - heir_entries);
    assert_eq!(mappings(&pool, 60).len(), 3000);
}

#[test]
fn a_device_whose_tree_is_overwritten_is_listed_but_does_not_come_back() {
    let (image, (leaf, _), _) = fan();
    image.spoil_block(leaf, |b| b.fill(7));
    let found = list(&image);
    let device = found.iter().find(|d| d["dev_id"] == FAN.1).expect("listed");
    assert_eq!(
        (&device["is_whole"], &device["is_latest"]),
        (&true.into(), &false.into())
    );
    // An older version is whole; it is another one, and the status says so, unless it was asked for.
    let root = device["mapping_root"].to_string();
    let (_, finished) = brought_back(&image, &["--undelete", "58"], 4);
    finished.expect_stderr(&["a later version of it existed"]);
    brought_back(&image, &["--undelete", "58", "--from", &root], 0);
    let (image, ..) = fan();
    let device = &list(&image)[0];
    let root = old_root(&image, device["mapping_root"].as_u64().expect("a block"), 0);
    image.spoil_block(root, |b| b.fill(7));
    let device = &list(&image)[0];
    assert_eq!(
        (&device["is_whole"], &device["remains"]),
        (&false.into(), &Value::Null)
    );
    let output = Image::empty(2048);
    let before = output.bytes();
    undelete(&image, &["--undelete", "0"], output.path())
        .expect(1)
        .expect_stderr(&["part of the tree of device 0 is overwritten"]);
    assert!(output.bytes() == before, "nothing was written");
}

#[test]
fn ids_have_to_be_free_and_known() {
    let image = Image::of("snap-mix-a/meta");
    let output = Image::empty(2048);
    let rows: &[(&[&str], &str)] = &[
        (&["--undelete", "18"], "another device has id 18"),
        (
            &["--undelete", "18", "--as", "18"],
            "another device has id 18",
        ),
        (
            &["--undelete", "18", "--as", "16777216"],
            "the kernel takes ids up to",
        ),
        (
            &["--undelete", "5"],
            "no state of the pool on this device has a device 5",
        ),
        (
            &["--undelete", "18", "--as", "99", "--from", "1"],
            "mapping root 1 has no device 18",
        ),
    ];
    for (args, words) in rows {
        undelete(&image, args, output.path())
            .expect(1)
            .expect_stderr(&[words]);
    }
    let usage: &[&[&str]] = &[
        &["--as", "5"],
        &["--from", "5"],
        &["--undelete", "5", "--roots", "1,2"],
        &["--undelete", "5", "--data-block-size", "128"],
    ];
    for args in usage {
        undelete(&image, args, output.path()).expect(2);
    }
    undelete(
        &image,
        &["--undelete", "5", "--list-candidates"],
        Path::new(""),
    )
    .expect(2);
}

#[test]
fn older_versions_can_be_chosen() {
    let image = Image::of("snap-mix-a/meta");
    let list = list(&image);
    let device = list.iter().find(|d| d["dev_id"] == 18).expect("listed");
    assert_eq!(device["mapped_blocks"], 30);
    let versions = device["other_versions"].as_array().expect("a list");
    let root = versions.last().expect("another version").to_string();
    let args = ["--undelete", "18", "--as", "99", "--from", &root];
    let (pool, _) = brought_back(&image, &args, 0);
    assert_eq!(mappings(&pool, 99).len(), 11);
}

#[test]
fn a_damaged_pool_is_repaired_first() {
    let image = Image::of(FAN.0);
    let leaf = image.first_leaf(image.device_root(60));
    // One wrong bit can be put right on the way.
    image.spoil_block(leaf, |b| b[100] ^= 1);
    brought_back(&image, &["--undelete", "58"], 0);
    image.spoil_block(leaf, |b| b.fill(7));
    undelete(&image, &["--undelete"], Path::new(""))
        .expect(5)
        .expect_stderr(&[
            "the current state of the pool is damaged",
            "repair it first",
        ]);
    let image = Image::of(FAN.0);
    image.put_block(0, &[0; BLOCK_SIZE]);
    undelete(&image, &["--undelete", "58"], Image::empty(2048).path()).expect(5);
}

/// Numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}

/// Old nodes are overwritten at random with others, changed or not, and sealed; whatever comes back, the result is sound.
#[test]
fn nodes_changed_at_random_never_make_devices_contradict_each_other() {
    let mut brought = 0;
    for name in [
        "snap-mix-a/meta",
        "snap-mix-b/meta",
        "crash-log/meta",
        "snap-fan-60/meta",
    ] {
        let sound = expand(&format!("{name}.img"));
        let is_node = |b: &usize| {
            checksum::identify(&sound[b * BLOCK_SIZE..][..BLOCK_SIZE]) == Some(BlockKind::Node)
        };
        let nodes: Vec<usize> = (1..sound.len() / BLOCK_SIZE).filter(is_node).collect();
        let image = Image::from_bytes(&sound);
        let is_old = |b: &&usize| image.count(Map::Metadata, **b as u64) == 0;
        let old: Vec<usize> = nodes.iter().filter(is_old).copied().collect();
        for seed in 1..=5 {
            let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
            let mut bytes = sound.clone();
            for _ in 0..numbers.below(60) {
                let pick = |from: &[usize], n: u64| from[n as usize % from.len()];
                let to = pick(&old, numbers.below(1 << 32));
                let from = pick(&nodes, numbers.below(1 << 32));
                let mut block = bytes[from * BLOCK_SIZE..][..BLOCK_SIZE].to_vec();
                if numbers.below(2) == 0 {
                    let entry = 32 + 8 * numbers.below(504) as usize;
                    let value = get_u64(&block, entry);
                    put_u64(&mut block, entry, value ^ 1 << numbers.below(40));
                }
                checksum::seal(&mut block, BlockKind::Node, MetadataBlock(to as u64));
                bytes[to * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(&block);
            }
            brought += bring_all_back(bytes);
        }
    }
    assert!(brought > 20, "only {brought} devices were brought back");
}

/// Brings back each device in turn; how many there were.
fn bring_all_back(bytes: Vec<u8>) -> u64 {
    let engine = RamEngine::from_bytes(bytes);
    let Ok(found) = Deletions::find(&engine, &Silent) else {
        return 0;
    };
    let list = found.list().expect("listed");
    let mut brought = 0;
    for device in list.devices.iter().filter(|d| d.is_whole).take(3) {
        let wanted = Wanted {
            dev_id: device.dev_id,
            new_id: Some(thintools::units::ThinId(16_000_000)),
            from: Some(device.mapping_root),
        };
        let found = Deletions::find(&engine, &Silent).expect("found again");
        let undeleted = found.bring_back(&wanted).expect("it is whole");
        let output = RamEngine::new(2048);
        let source = undeleted.recovery.source(Selection::default(), &Silent);
        restore(&source, &output, &Silent).expect("it can be written");
        let checked = check_engine(&output, &CheckOptions::default(), &Silent).expect("checked");
        assert!(
            checked.report.damages.is_empty(),
            "{:?}",
            checked.report.damages
        );
        let image = Image::from_bytes(&output.into_bytes());
        let pool = Pool::read(&dump(&["--no-shared"], image.path()).expect(0).out());
        let mut owners: HashMap<u64, (u64, u64)> = HashMap::new();
        for &id in pool.devices.keys().filter(|&&id| id != 16_000_000) {
            owners.extend(
                mappings(&pool, id)
                    .iter()
                    .map(|(thin, m)| (m.0, (*thin, m.1))),
            );
        }
        for (thin, (data, time)) in mappings(&pool, 16_000_000) {
            let owner = *owners.entry(data).or_insert((thin, time));
            assert_eq!(owner, (thin, time), "data block {data}");
        }
        brought += 1;
    }
    brought
}
