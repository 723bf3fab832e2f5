//! `thin_repair --in-place` and `--undo`: what is put right, what is refused, that a crash at any moment does no harm, and that
//! undoing brings back every byte.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use thintools::ErrorKind;
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::thin::Fields;
use thintools::tools::repair::{plan_in_place, undo};
use thintools::tools::{
    MetadataSource, Overrides, Selection, TextSink, Trees, event::Source, text,
};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

use crate::crash::{Recorder, Step, after_crashes, codes_of};
use crate::failures::SmallDisk;
use crate::repair_in_place::full;
use crate::support::{
    Finished, Image, Map, check, damage_lines, dump, fixtures, folder, get_u64, peer, program,
    put_u32, put_u64, thintools,
};

/// Damage that a repair in place puts right: a name, what is done to an image, and the exit status of the repair.
type Row = (&'static str, fn(&Image), i32);

const SUPERBLOCK_LOST: &str = "superblock zeroed";

const DAMAGES: &[Row] = &[
    (
        "metadata bitmap zeroed",
        |i| zero(i, i.bitmap(Map::Metadata, 0)),
        0,
    ),
    (
        "metadata index zeroed",
        |i| zero(i, i.superblock().metadata_space_map.bitmap_root.0),
        0,
    ),
    ("data bitmap zeroed", |i| zero(i, data_bitmap(i)), 0),
    (
        "data bitmap that says free",
        |i| i.edit_block(data_bitmap(i), |b| b[16..].fill(0)),
        0,
    ),
    (
        "data index zeroed",
        |i| zero(i, i.superblock().data_space_map.bitmap_root.0),
        0,
    ),
    (
        "data counts junk",
        |i| junk(i, i.superblock().data_space_map.ref_count_root.0),
        0,
    ),
    (
        "metadata counts junk",
        |i| junk(i, i.superblock().metadata_space_map.ref_count_root.0),
        0,
    ),
    (
        "all of both space maps junk",
        |i| space_maps(i).into_iter().for_each(|b| junk(i, b)),
        0,
    ),
    (
        "wrong counters and roots",
        |i| {
            i.edit_superblock(|f| {
                f.data_space_map.nr_allocated = 1;
                f.metadata_space_map.nr_allocated += 77;
                f.metadata_space_map.ref_count_root.0 = u64::MAX;
                f.metadata_space_map.nr_blocks *= 3;
            })
        },
        0,
    ),
    (
        "details root junk",
        |i| junk(i, i.superblock().details_root.0),
        4,
    ),
    (SUPERBLOCK_LOST, |i| zero(i, 0), 4),
    (
        "superblock with a wrong checksum",
        |i| i.spoil_block(0, |b| b[70..90].fill(0xa5)),
        4,
    ),
];

/// The damages that are tried on every image.
const HARDEST: [&str; 3] = [
    "all of both space maps junk",
    "details root junk",
    SUPERBLOCK_LOST,
];

/// Images on which the slower tests try the damages.
const IMAGES: &[&str] = &[
    "transaction-id-5/meta",
    "discard-no-passdown/meta",
    "held-root/meta",
];

fn zero(image: &Image, block: u64) {
    image.put_block(block, &[0; BLOCK_SIZE]);
}

fn junk(image: &Image, block: u64) {
    let mut random = 0x1234_5678_9abc_def1_u64 ^ block;
    let mut bytes = vec![0; BLOCK_SIZE];
    for word in bytes.chunks_exact_mut(8) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        word.copy_from_slice(&random.to_le_bytes());
    }
    image.put_block(block, &bytes);
}

/// The first bitmap of the data space map.
fn data_bitmap(image: &Image) -> u64 {
    let leaf = image.first_leaf(image.superblock().data_space_map.bitmap_root.0);
    get_u64(&image.block(leaf), 32 + 8 * 168)
}

/// The roots and first bitmaps of both space maps.
fn space_maps(image: &Image) -> Vec<u64> {
    let superblock = image.superblock();
    let maps = [superblock.data_space_map, superblock.metadata_space_map];
    let roots = maps
        .iter()
        .flat_map(|m| [m.bitmap_root.0, m.ref_count_root.0]);
    roots
        .chain([data_bitmap(image), image.bitmap(Map::Metadata, 0)])
        .collect()
}

/// Where a metadata snapshot has its details, if not where the pool has them.
fn snapshot_details(image: &Image) -> u64 {
    let superblock = image.superblock();
    let copy = Fields::unpack(&image.block(superblock.held_root.0));
    assert_ne!(copy.details_root, superblock.details_root);
    copy.details_root.0
}

/// What has to be given when the superblock is lost: what it said.
fn overrides_of(image: &Image) -> Overrides {
    let superblock = image.superblock();
    Overrides {
        transaction_id: Some(superblock.transaction_id),
        data_block_size: Some(superblock.data_block_size),
        nr_data_blocks: Some(superblock.data_space_map.nr_blocks),
    }
}

fn options_of(image: &Image) -> Vec<String> {
    let superblock = image.superblock();
    let option = |name: &str, value: u64| format!("--{name}={value}");
    vec![
        option("transaction-id", superblock.transaction_id),
        option("data-block-size", superblock.data_block_size.into()),
        option("nr-data-blocks", superblock.data_space_map.nr_blocks),
    ]
}

/// `thin_repair --in-place IMAGE ARGUMENTS`.
fn in_place<S: AsRef<OsStr>>(image: &Image, args: &[S]) -> Finished {
    let mut all = vec![
        OsStr::new("thin_repair"),
        OsStr::new("--in-place"),
        image.path().as_os_str(),
    ];
    all.extend(args.iter().map(AsRef::as_ref));
    thintools(all).run()
}

fn save_to(image: &Image, file: &Path, more: &[String]) -> Finished {
    let mut args: Vec<&OsStr> = vec!["--undo-file".as_ref(), file.as_os_str()];
    args.extend(more.iter().map(AsRef::<OsStr>::as_ref));
    in_place(image, &args)
}

fn undo_from(image: &Image, file: &Path) -> Finished {
    in_place(image, &["--undo".as_ref(), file.as_os_str()])
}

/// Fails unless the metadata is sound to us and to version 0.9.
#[track_caller]
fn sound(image: &Image, what: &str) {
    let finished = check(&[], image.path());
    assert_eq!(finished.code, Some(0), "{what}: {}", finished.stderr);
    let worse = damage_lines(&finished.stderr)
        .into_iter()
        .find(|d| d.0 != "note");
    assert_eq!(worse, None, "{what}");
    assert!(!image.superblock().needs_check(), "{what}");
    peer("thin_check", &[image.path().as_os_str()]).expect(0);
}

#[test]
fn what_spares_the_mappings_is_repaired_in_place_and_undone_to_the_byte() {
    let (mut tried, mut refused) = (0, 0);
    for fixture in fixtures() {
        let name = fixture.name();
        let is_thorough = name == "snap-mix-a/meta" || IMAGES.contains(&&*name);
        let hardest = |d: &&Row| is_thorough || HARDEST.contains(&d.0);
        for &(damage, spoil, exit) in DAMAGES.iter().filter(hardest) {
            let what = format!("{name}, {damage}");
            let image = Image::of(&name);
            if dump(&["--skip-mappings"], image.path()).code != Some(0) {
                // What 0.9 left of a restore that failed.
                continue;
            }
            let whole = image.dumped();
            let held = image.superblock().held_root;
            let options = options_of(&image);
            spoil(&image);
            let before = image.bytes();
            // What a repair to another device makes of it is what has to come out.
            let other = Image::empty(before.len() as u64 / BLOCK_SIZE as u64);
            let mut args: Vec<&OsStr> = vec!["thin_repair".as_ref(), "-qi".as_ref()];
            args.extend([
                image.path().as_os_str(),
                "-o".as_ref(),
                other.path().as_os_str(),
            ]);
            args.extend(options.iter().map(OsStr::new));
            let reference = thintools(args).run();
            let undo_file = image.beside("undo");
            let done = save_to(&image, &undo_file, &options);
            let may_refuse = exit == 4 || reference.code == Some(5);
            if done.code == Some(1) || done.code == Some(5) && may_refuse {
                let room = done.stderr.contains("extend the metadata device");
                assert!(room || done.code == Some(5), "{what}: {}", done.stderr);
                assert!(image.bytes() == before && !undo_file.exists(), "{what}");
                println!("{what}: {}", done.stderr);
                refused += 1;
                continue;
            }
            if done.stderr.contains("nothing needs to be repaired") {
                // Where nothing is mapped, a bitmap that says "free" is right.
                assert!(image.bytes() == before && !undo_file.exists(), "{what}");
                continue;
            }
            assert_eq!(done.code, Some(exit), "{what}: {}", done.stderr);
            sound(&image, &what);
            let after = image.dumped();
            assert!(after == other.dumped(), "{what}: not as on another device");
            if exit == 0 {
                assert!(after == whole, "{what}: not as before the damage");
                assert_eq!(image.superblock().held_root, held, "{what}");
            }
            let repaired = image.bytes();
            save_to(&image, &image.beside("second"), &options)
                .expect(0)
                .expect_stderr(&["nothing needs to be repaired"]);
            assert!(
                image.bytes() == repaired && !image.beside("second").exists(),
                "{what}"
            );
            undo_from(&image, &undo_file)
                .expect(0)
                .expect_stderr(&["put back"]);
            assert!(image.bytes() == before, "{what}: not undone");
            undo_from(&image, &undo_file)
                .expect(0)
                .expect_stderr(&["nothing was written"]);
            tried += 1;
        }
    }
    assert!(
        tried > 150 && refused < 10,
        "{tried} tried, {refused} refused"
    );
}

#[test]
fn damaged_details_are_written_anew() {
    for (name, exit) in [
        ("dmg-details-wrong-count", 0),
        ("dmg-details-device-missing", 4),
    ] {
        let image = Image::of(&format!("damaged/{name}"));
        save_to(&image, &image.beside("undo"), &[])
            .expect(exit)
            .expect_stderr(&["in place: wrote the device details anew"]);
        sound(&image, name);
        let sound = Image::of("snap-mix-a/meta").dumped();
        let runs = |pool: crate::support::Pool| {
            pool.devices.into_values().map(|d| d.1).collect::<Vec<_>>()
        };
        assert!(runs(image.dumped()) == runs(sound), "{name}");
    }
}

#[test]
fn what_a_check_repairs_is_repaired_too() {
    for name in [
        "crash-a/meta",
        "needs-check-set/meta",
        "restored/meta-repair-0.9",
    ] {
        let image = Image::of(name);
        let before = image.bytes();
        save_to(&image, &image.beside("undo"), &[]).expect(0);
        sound(&image, name);
        undo_from(&image, &image.beside("undo")).expect(0);
        assert!(image.bytes() == before, "{name}");
    }
}

#[test]
fn nothing_is_written_where_nothing_is_wrong() {
    for name in IMAGES {
        let image = Image::of(name);
        let before = image.bytes();
        let undo_file = image.beside("undo");
        save_to(&image, &undo_file, &[])
            .expect(0)
            .expect_stderr(&["nothing needs to be repaired"]);
        assert!(image.bytes() == before && !undo_file.exists(), "{name}");
    }
}

#[test]
fn a_metadata_snapshot_is_kept_if_it_is_whole_and_dropped_if_not() {
    let image = Image::of("held-root/meta");
    let held = image.superblock().held_root;
    let snapshot = dump(&["-m"], image.path()).expect(0).out();
    space_maps(&image).into_iter().for_each(|b| junk(&image, b));
    save_to(&image, &image.beside("undo"), &[]).expect(0);
    assert_eq!(image.superblock().held_root, held);
    assert!(dump(&["-m"], image.path()).expect(0).out() == snapshot);
    check(&["-m"], image.path()).expect(0);

    type Spoil = fn(&Image);
    let spoils: [Spoil; 3] = [
        |i| junk(i, snapshot_details(i)),
        |i| junk(i, i.superblock().held_root.0),
        |i| i.edit_superblock(|f| f.held_root = MetadataBlock(u64::MAX)),
    ];
    for spoil in spoils {
        let image = Image::of("held-root/meta");
        let whole = image.dumped();
        spoil(&image);
        let before = image.bytes();
        save_to(&image, &image.beside("undo"), &[])
            .expect(0)
            .expect_stderr(&["dropped the metadata snapshot"]);
        sound(&image, "without its snapshot");
        assert_eq!(image.superblock().held_root, MetadataBlock(0));
        assert!(image.dumped() == whole);
        undo_from(&image, &image.beside("undo")).expect(0);
        assert!(image.bytes() == before);
    }
}

#[test]
fn damage_to_mappings_is_refused_and_leaves_every_byte() {
    type Spoil = fn(&Image);
    let spoils: [(&str, Spoil); 6] = [
        ("a leaf", |i| {
            i.spoil_block(i.first_leaf(i.device_root(2)), |b| b[2000] ^= 1)
        }),
        ("the top-level tree", |i| {
            junk(i, i.superblock().mapping_root.0)
        }),
        ("the top-level root", |i| {
            i.edit_superblock(|f| f.mapping_root.0 = u64::MAX)
        }),
        ("a device's root", |i| i.point_device(2, 1_000_000)),
        ("a mapping past the end", |i| {
            i.edit_block(i.first_leaf(i.device_root(2)), |b| {
                put_u64(b, 2048, 1 << 62)
            });
        }),
        ("unknown features", |i| {
            i.edit_superblock(|f| f.incompat_flags = 2)
        }),
    ];
    for (what, spoil) in spoils {
        for with_map in [false, true] {
            let image = Image::of("snap-mix-a/meta");
            spoil(&image);
            if with_map {
                zero(&image, image.bitmap(Map::Metadata, 0));
            }
            let before = image.bytes();
            let undo_file = image.beside("undo");
            println!("{what}");
            save_to(&image, &undo_file, &[])
                .expect(5)
                .expect_stderr(&["nothing was written", "thin_repair -i DEV -o NEWDEV"]);
            assert!(image.bytes() == before, "{what}");
            assert!(!undo_file.exists(), "{what}");
        }
    }
    for name in [
        "dmg-mapping-device-missing",
        "dmg-data-block-out-of-bounds",
        "dmg-mapping-root-loop",
    ] {
        let image = Image::of(&format!("damaged/{name}"));
        let before = image.bytes();
        let undo_file = image.beside("undo");
        save_to(&image, &undo_file, &[])
            .expect(5)
            .expect_stderr(&["nothing was written"]);
        assert!(image.bytes() == before && !undo_file.exists(), "{name}");
    }
}

#[test]
fn every_damaged_image_is_repaired_to_a_sound_one_or_left_alone() {
    let mut repaired = 0;
    for file in fs::read_dir(crate::support::testdata().join("damaged")).expect("fixtures") {
        let file = file
            .expect("readable")
            .file_name()
            .into_string()
            .expect("plain name");
        let Some(name) = file.strip_suffix(".img.zst") else {
            continue;
        };
        let image = Image::of(&format!("damaged/{name}"));
        let before = image.bytes();
        let undo_file = image.beside("undo");
        let done = save_to(&image, &undo_file, &[]);
        if done.code == Some(5) {
            assert!(image.bytes() == before && !undo_file.exists(), "{name}");
            continue;
        }
        assert!(matches!(done.code, Some(0 | 4)), "{name}: {}", done.stderr);
        sound(&image, name);
        if undo_file.exists() {
            undo_from(&image, &undo_file).expect(0);
            repaired += 1;
        }
        assert!(image.bytes() == before, "{name}");
    }
    assert!(repaired > 8, "{repaired} repaired");
}

#[test]
fn without_room_beside_what_is_in_use_nothing_is_written() {
    let spoils: [fn(&Image); 3] = [
        |i| zero(i, i.bitmap(Map::Metadata, 0)),
        |i| junk(i, i.superblock().details_root.0),
        |i| i.edit_superblock(|f| f.data_space_map.nr_blocks = u64::MAX),
    ];
    for spoil in spoils {
        let image = full();
        spoil(&image);
        let before = image.bytes();
        let undo_file = image.beside("undo");
        save_to(&image, &undo_file, &[])
            .expect(1)
            .expect_stderr(&["nothing was written"]);
        assert!(image.bytes() == before && !undo_file.exists());
    }
    // Extended, as the message says, there is room.
    let image = full();
    zero(&image, image.bitmap(Map::Metadata, 0));
    image.resize(64);
    save_to(&image, &image.beside("undo"), &[]).expect(0);
    sound(&image, "extended");
}

#[test]
fn a_dry_run_says_what_would_be_done_and_writes_nothing() {
    for &(what, spoil, exit) in DAMAGES {
        let image = Image::of("snap-mix-a/meta");
        let mut args = options_of(&image);
        spoil(&image);
        let before = image.bytes();
        args.push("--dry-run".to_owned());
        in_place(&image, &args)
            .expect(exit)
            .expect_stderr(&["dry run: wrote both space maps anew", "nothing was written"]);
        args.push(format!("--undo-file={}", image.beside("undo").display()));
        let json = in_place(&image, &[&args[..], &["--json".to_owned()]].concat())
            .expect(exit)
            .out();
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(json["exit_status"], exit, "{what}");
        assert_eq!(json["dry_run"], true, "{what}");
        assert_eq!(json["undo_file"], serde_json::Value::Null, "{what}");
        assert!(json["report"]["blocks"].as_u64() > Some(4), "{what}");
        assert!(
            !json["report"]["damages"]
                .as_array()
                .expect("a list")
                .is_empty(),
            "{what}"
        );
        assert!(
            image.bytes() == before && !image.beside("undo").exists(),
            "{what}"
        );
    }
}

#[test]
fn the_json_of_a_repair_and_of_its_undoing() {
    let image = Image::of("snap-mix-a/meta");
    zero(&image, image.bitmap(Map::Metadata, 0));
    let file = image.beside("undo").display().to_string();
    let read = |finished: Finished| -> serde_json::Value {
        let finished = finished.expect(0);
        assert!(!finished.stderr.contains("fatal"), "{}", finished.stderr);
        serde_json::from_str(&finished.out()).expect("JSON")
    };
    let done = read(in_place(&image, &["--json", "--undo-file", &file]));
    assert_eq!(done["undo_file"], *file);
    assert_eq!(done["report"]["is_complete"], true);
    let blocks = done["report"]["blocks"].as_u64().expect("a number");
    let again = read(in_place(&image, &["--json", "--undo-file", &file]));
    assert_eq!(again["report"], serde_json::Value::Null);
    let dry = read(in_place(&image, &["--json", "--undo", &file, "--dry-run"]));
    assert_eq!(
        dry["undone"],
        serde_json::json!({ "blocks": blocks, "changed": blocks })
    );
    let undone = read(in_place(&image, &["--json", "--undo", &file]));
    assert_eq!(undone["undone"], dry["undone"]);
    assert_eq!(undone["exit_status"], 0);
    let again = read(in_place(&image, &["--json", "--undo", &file]));
    assert_eq!(
        again["undone"],
        serde_json::json!({ "blocks": blocks, "changed": 0 })
    );
}

#[test]
fn command_lines_that_make_no_sense_are_refused_before_anything_is_opened() {
    let refused = |args: &[&str]| {
        let all = [&["thin_repair"], args].concat();
        thintools(all).run().expect(2)
    };
    refused(&["--in-place", "/no/such"]).expect_stderr(&["--undo-file", "can be undone"]);
    refused(&["--in-place", "/no/such", "--undo", "a", "--undo-file", "b"]);
    refused(&[
        "--in-place",
        "/no/such",
        "--undo",
        "a",
        "--transaction-id",
        "3",
    ]);
    refused(&["--in-place", "/no/such", "--undo-file", "a", "-i", "b"]);
    refused(&["--in-place", "/no/such", "--undo-file", "a", "-o", "b"]);
    refused(&["--undo-file", "a", "-i", "a", "-o", "b"]);
    refused(&["--undo", "a", "-i", "a", "-o", "b"]);
    refused(&["--dry-run", "-i", "a", "-o", "b"]);
    refused(&["--undo", "a"]);
}

#[test]
fn values_given_for_a_superblock_that_can_be_read_are_not_used() {
    let image = Image::of("snap-mix-a/meta");
    let whole = image.dumped();
    zero(&image, image.bitmap(Map::Metadata, 0));
    let options = ["--data-block-size=256", "--nr-data-blocks=99999"].map(String::from);
    save_to(&image, &image.beside("undo"), &options)
        .expect(0)
        .expect_stderr(&["are not used"]);
    assert!(image.dumped() == whole);
}

#[test]
fn a_lost_superblock_needs_the_data_block_size() {
    let image = Image::of("snap-mix-a/meta");
    zero(&image, 0);
    let before = image.bytes();
    save_to(&image, &image.beside("undo"), &[])
        .expect(5)
        .expect_stderr(&["nothing was written", "--data-block-size"]);
    assert!(image.bytes() == before && !image.beside("undo").exists());
}

#[test]
fn an_undo_file_is_never_written_over_and_never_left_in_part() {
    let image = Image::of("snap-mix-a/meta");
    zero(&image, image.bitmap(Map::Metadata, 0));
    let before = image.bytes();
    let undo_file = image.beside("undo");
    fs::write(&undo_file, "mine").expect("written");
    save_to(&image, &undo_file, &[])
        .expect(1)
        .expect_stderr(&["exists", "nothing was changed"]);
    assert_eq!(fs::read(&undo_file).expect("readable"), b"mine");
    for taken in [
        image.path().to_owned(),
        image.beside(""),
        image.beside("missing/undo"),
    ] {
        save_to(&image, &taken, &[])
            .expect(1)
            .expect_stderr(&["nothing was changed"]);
    }
    assert!(image.bytes() == before);
    let Some(disk) = SmallDisk::new("16k") else {
        return;
    };
    save_to(&image, &disk.path().join("undo"), &[])
        .expect(1)
        .expect_stderr(&["nothing was changed", "No space left"]);
    assert_eq!(fs::read_dir(disk.path()).expect("readable").count(), 0);
    // Nor is there room for what is to be written, before that.
    let args: [&OsStr; 5] = [
        "repair".as_ref(),
        "--in-place".as_ref(),
        image.path().as_os_str(),
        "--undo-file".as_ref(),
        OsStr::new("/no/such/folder/undo"),
    ];
    thintools(args)
        .env("TMPDIR", disk.path())
        .run()
        .expect(1)
        .expect_stderr(&["nothing was written", "No space left"]);
    assert!(image.bytes() == before);
}

#[test]
fn the_undo_file_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let repaired = Repaired::new();
    let mode = fs::metadata(&repaired.file)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// A repaired image and its undo file.
struct Repaired {
    image: Image,
    before: Vec<u8>,
    file: PathBuf,
}

impl Repaired {
    fn new() -> Self {
        let image = Image::of("snap-mix-a/meta");
        zero(&image, image.bitmap(Map::Metadata, 0));
        let before = image.bytes();
        let file = image.beside("undo");
        save_to(&image, &file, &[]).expect(0);
        Self {
            image,
            before,
            file,
        }
    }

    /// Fails unless an undo from a file of these bytes is refused with this status and writes nothing.
    #[track_caller]
    fn refuse(&self, bytes: &[u8], code: i32) -> Finished {
        let file = self.image.beside("changed");
        fs::write(&file, bytes).expect("written");
        let now = self.image.bytes();
        let finished = undo_from(&self.image, &file).expect(code);
        assert!(self.image.bytes() == now, "it wrote");
        finished
    }
}

#[test]
fn damaged_undo_files_are_refused() {
    let repaired = Repaired::new();
    let whole = fs::read(&repaired.file).expect("readable");
    for at in (0..whole.len())
        .step_by(97)
        .chain([256, 264, 272, 280, 508, 511, 512, 520, 528])
    {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x20;
        repaired.refuse(&bytes, 5);
    }
    for length in [0, 1, 19, 20, 255, 511, 512, 513, 600, 4656, whole.len() - 1] {
        repaired.refuse(&whole[..length], 5);
    }
    repaired.refuse(&[&whole[..], &[0]].concat(), 5);
    repaired.refuse(&[&whole[..], &whole[512..]].concat(), 5);
    // Records in another order, or twice.
    let (header, records) = whole.split_at(512);
    let mut swapped: Vec<&[u8]> = records.chunks(4144).collect();
    swapped.swap(1, 2);
    repaired.refuse(&[header, &swapped.concat()].concat(), 5);
    swapped[2] = swapped[1];
    repaired.refuse(&[header, &swapped.concat()].concat(), 5);
    // Promises that the checksum of the header vouches for.
    for (at, value, code) in [
        (256, 2, 5),
        (264, 1025, 1),
        (272, u64::MAX, 5),
        (272, u64::MAX / 4144 + 1, 5),
        (272, 1 << 40, 5),
        (272, 0, 5),
    ] {
        let mut bytes = whole.clone();
        put_u64(&mut bytes, at, value);
        let sum = crc32c(&bytes[..508]);
        put_u32(&mut bytes, 508, sum);
        repaired.refuse(&bytes, code);
    }
    assert!(!repaired.refuse(b"some text", 5).stderr.contains("panick"));
    undo_from(&repaired.image, &repaired.file).expect(0);
    assert!(repaired.image.bytes() == repaired.before);
}

/// CRC-32C, a bit at a time.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| {
        if crc & 1 == 1 {
            crc >> 1 ^ 0x82f6_3b78
        } else {
            crc >> 1
        }
    };
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc))
    })
}

#[test]
fn what_is_no_regular_file_is_no_undo_file() {
    let repaired = Repaired::new();
    let pipe = repaired.image.beside("pipe");
    program("mkfifo", [&pipe]).run().expect(0);
    let now = repaired.image.bytes();
    for file in [
        &*pipe,
        Path::new("/dev/zero"),
        Path::new("/"),
        repaired.image.path(),
    ] {
        undo_from(&repaired.image, file)
            .expect(5)
            .expect_stderr(&["no undo file"]);
    }
    undo_from(&repaired.image, &repaired.image.beside("none")).expect(1);
    assert!(repaired.image.bytes() == now);
}

#[test]
fn an_undo_of_another_repair_is_not_mixed_in() {
    let repaired = Repaired::new();
    let other = Image::of("snap-mix-b/meta");
    zero(&other, other.bitmap(Map::Metadata, 0));
    save_to(&other, &other.beside("undo"), &[]).expect(0);
    let now = repaired.image.bytes();
    undo_from(&repaired.image, &other.beside("undo")).expect(1);
    assert!(repaired.image.bytes() == now);
}

#[test]
fn metadata_that_is_newer_than_the_repair_is_not_undone() {
    let repaired = Repaired::new();
    let whole = repaired.image.bytes();
    let file = fs::read(&repaired.file).expect("readable");
    for record in file[512..].chunks(4144) {
        let block = get_u64(record, 8);
        for at in [8, 700, 4095] {
            repaired.image.spoil_block(block, |b| b[at] ^= 1);
            let finished = repaired.refuse(&file, 1);
            let message = format!("block {block} has changed since");
            assert!(finished.stderr.contains(&message), "{}", finished.stderr);
            fs::write(repaired.image.path(), &whole).expect("written");
        }
    }
    repaired
        .image
        .resize(whole.len() as u64 / BLOCK_SIZE as u64 + 1);
    repaired.refuse(&file, 1);
}

/// A dump of the metadata in these bytes.
fn text_of(bytes: &[u8]) -> String {
    let engine = RamEngine::from_bytes(bytes.to_vec());
    let superblock = thintools::thin::Superblock::read(&engine).expect("a superblock");
    let blocks = superblock.data_space_map.nr_blocks;
    let source = MetadataSource {
        engine: &engine,
        trees: Trees::read(&engine, &superblock, blocks, &Silent).expect("trees"),
        selection: Selection::default(),
        recovered: None,
        observer: &Silent,
    };
    let mut out = Vec::new();
    source
        .emit(&mut TextSink::new(&mut out, &text::Xml))
        .expect("a dump");
    String::from_utf8(out).expect("text")
}

/// Repairs `before` in memory; what was written, and the undo file.
fn record(before: &[u8], overrides: &Overrides, folder: &TempDir) -> (Vec<Step>, PathBuf) {
    let engine = Recorder::new(before);
    let plan = plan_in_place(&engine, overrides, &Silent)
        .expect("a plan")
        .expect("damage");
    let file = folder.path().join("undo");
    plan.write(&file, &Silent).expect("written");
    drop(plan);
    (engine.into_steps(), file)
}

/// Runs the repair again on what a crash left, and returns what comes out.
fn go_on(state: &[u8], overrides: &Overrides, folder: &TempDir) -> Vec<u8> {
    let engine = RamEngine::from_bytes(state.to_vec());
    let file = folder.path().join("again");
    let plan = plan_in_place(&engine, overrides, &Silent).expect("a plan");
    if let Some(plan) = plan {
        plan.write(&file, &Silent).expect("written");
        fs::remove_file(&file).expect("it is there");
    }
    engine.into_bytes()
}

#[test]
fn a_crash_at_any_moment_leaves_the_old_state_or_the_new_one_and_can_be_undone() {
    for name in IMAGES {
        for (damage, spoil, _) in DAMAGES {
            let image = Image::of(name);
            let overrides = overrides_of(&image);
            spoil(&image);
            let before = image.bytes();
            let old = codes_of(before.clone());
            let is_lost = old
                .iter()
                .any(|code| code.starts_with("superblock-zero") || *code == "superblock-checksum");
            let folder = folder();
            let (steps, file) = record(&before, &overrides, &folder);
            let mut wanted = None;
            let mut states = Vec::new();
            let after = after_crashes(&before, &steps, &mut |state, how| {
                states.push((state.to_vec(), how.to_owned()));
            });
            states.push((after, "everything written".to_owned()));
            for (state, how) in states.iter().rev() {
                let what = format!("{name}, {damage}: {how}");
                let codes = codes_of(state.clone());
                let is_old = codes == old;
                // With the roots but without space maps: only where block 0 was lost, and never to be activated.
                let is_interim = is_lost && codes.contains("superblock-index-root");
                assert!(
                    codes.is_empty() || is_old || is_interim,
                    "{what}: {codes:?}"
                );
                let end = go_on(state, &overrides, &folder);
                assert!(codes_of(end.clone()).is_empty(), "{what}");
                let text = text_of(&end);
                let wanted = wanted.get_or_insert_with(|| text.clone());
                assert!(text == *wanted, "{what}: it went on to something else");
                let engine = RamEngine::from_bytes(state.clone());
                undo(&engine, &file, true, &Silent).expect("it can be undone");
                assert!(engine.into_bytes() == before, "{what}: not undone");
            }
        }
    }
}

#[test]
fn blocks_that_were_written_in_part_are_undone() {
    let image = Image::of("snap-mix-a/meta");
    let overrides = overrides_of(&image);
    zero(&image, 0);
    let before = image.bytes();
    let folder = folder();
    let (steps, file) = record(&before, &overrides, &folder);
    for cut in [512, 1024, 2048, 3584] {
        let mut state = before.clone();
        for step in &steps {
            if let Step::Write(block, data) = step {
                state[*block as usize * BLOCK_SIZE..][..cut].copy_from_slice(&data[..cut]);
            }
        }
        let engine = RamEngine::from_bytes(state);
        undo(&engine, &file, true, &Silent).expect("it can be undone");
        assert!(engine.into_bytes() == before, "{cut}");
    }
}

#[test]
fn an_undo_that_is_cut_short_leaves_the_new_state_or_the_old_one_and_can_be_run_again() {
    for (damage, spoil, _) in DAMAGES {
        let image = Image::of("snap-mix-a/meta");
        let overrides = overrides_of(&image);
        spoil(&image);
        let before = image.bytes();
        let old = codes_of(before.clone());
        let folder = folder();
        let (steps, file) = record(&before, &overrides, &folder);
        let repaired = after_crashes(&before, &steps, &mut |_, _| ());
        let engine = Recorder::new(&repaired);
        undo(&engine, &file, true, &Silent).expect("undone");
        let end = after_crashes(&repaired, &engine.into_steps(), &mut |state, how| {
            let codes = codes_of(state.to_vec());
            assert!(
                codes.is_empty() || codes == old,
                "{damage}: {how}: {codes:?}"
            );
            let engine = RamEngine::from_bytes(state.to_vec());
            undo(&engine, &file, true, &Silent).expect("undone");
            assert!(engine.into_bytes() == before, "{damage}: {how}");
        });
        assert!(end == before, "{damage}");
    }
}

#[test]
fn block_0_is_written_last_and_nothing_that_is_kept_is_written_over() {
    for name in IMAGES {
        for (damage, spoil, _) in DAMAGES {
            let image = Image::of(name);
            let overrides = overrides_of(&image);
            // Whatever the sound space map has in use is a tree, a snapshot or the old space maps.
            let used: Vec<bool> = (0..image.superblock().metadata_space_map.nr_blocks)
                .map(|b| image.count(Map::Metadata, b) > 0)
                .collect();
            spoil(&image);
            let before = image.bytes();
            let is_lost = *damage == SUPERBLOCK_LOST || damage.ends_with("checksum");
            let (steps, _) = record(&before, &overrides, &folder());
            let zeros: Vec<usize> = (0..steps.len())
                .filter(|&i| matches!(&steps[i], Step::Write(0, _)))
                .collect();
            assert_eq!(zeros.len(), if is_lost { 2 } else { 1 }, "{name}, {damage}");
            assert_eq!(zeros.last(), Some(&(steps.len() - 2)), "{name}, {damage}");
            assert!(
                matches!(steps[steps.len() - 3], Step::Sync),
                "{name}, {damage}"
            );
            if is_lost {
                assert_eq!(zeros[0], 0, "{name}, {damage}");
                assert!(matches!(steps[1], Step::Sync), "{name}, {damage}");
                continue;
            }
            for step in &steps {
                if let Step::Write(block @ 1.., _) = step {
                    // What a damaged index or root led to may go.
                    let is_unreachable = ["index", "all of", "roots"]
                        .iter()
                        .any(|what| damage.contains(what));
                    assert!(
                        !used[*block as usize] || is_unreachable,
                        "{name}, {damage}: block {block}"
                    );
                }
            }
        }
    }
}

#[test]
fn edited_metadata_is_repaired_to_a_sound_one_or_refused() {
    let image = Image::of("held-root/meta");
    let overrides = overrides_of(&image);
    let used: Vec<u64> = (0..image.superblock().metadata_space_map.nr_blocks)
        .filter(|&b| image.count(Map::Metadata, b) > 0)
        .collect();
    let base = image.bytes();
    let folder = folder();
    let file = folder.path().join("undo");
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |limit: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 11) as usize % limit
    };
    let mut repaired = 0;
    for _ in 0..400 {
        let mut bytes = base.clone();
        for _ in 0..=next(3) {
            let number = used[next(used.len())];
            let block = &mut bytes[number as usize * BLOCK_SIZE..][..BLOCK_SIZE];
            let kind = thintools::checksum::identify(block);
            // Mostly where the fields of headers and superblocks are.
            let words = if next(2) == 0 { BLOCK_SIZE / 4 } else { 48 };
            let at = next(words) * 4;
            let value = [0, 1, next(600) as u32, next(1 << 30) as u32, u32::MAX][next(5)];
            put_u32(block, at % (BLOCK_SIZE - 4), value);
            if let (Some(kind), true) = (kind, next(4) > 0) {
                thintools::checksum::seal(block, kind, MetadataBlock(number));
            }
        }
        let engine = RamEngine::from_bytes(bytes.clone());
        let plan = match plan_in_place(&engine, &overrides, &Silent) {
            Ok(Some(plan)) => plan,
            Ok(None) => {
                assert!(codes_of(bytes).is_empty(), "damage was overlooked");
                continue;
            }
            Err(e) => {
                let kinds = [ErrorKind::Damaged, ErrorKind::OutputTooSmall];
                assert!(kinds.contains(&e.kind()), "{e:?}");
                continue;
            }
        };
        plan.write(&file, &Silent).expect("written");
        let again = plan_in_place(&engine, &overrides, &Silent).expect("a plan");
        assert!(again.is_none(), "{:?}", again.map(|p| p.report));
        undo(&engine, &file, true, &Silent).expect("undone");
        fs::remove_file(&file).expect("it is there");
        drop(plan);
        assert!(engine.into_bytes() == bytes, "not undone");
        repaired += 1;
    }
    assert!(repaired > 40, "{repaired} repaired");
}

/// Memory with one block that cannot be read, which refuses every write.
struct BadBlock(RamEngine, u64);

impl BlockEngine for BadBlock {
    fn nr_blocks(&self) -> u64 {
        self.0.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        let end = start.0 + (buf.len() / BLOCK_SIZE) as u64;
        if (start.0..end).contains(&self.1) {
            return Err(io::Error::other("a bad sector"));
        }
        self.0.read(start, buf)
    }

    fn write(&self, _: MetadataBlock, _: &[u8]) -> io::Result<()> {
        Err(io::Error::other("a write"))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn depth(&self) -> usize {
        1
    }
}

#[test]
fn a_device_with_blocks_that_cannot_be_read_is_left_alone() {
    let image = Image::of("snap-mix-a/meta");
    let superblock = image.superblock();
    let blocks = [
        0,
        data_bitmap(&image),
        superblock.mapping_root.0,
        image.device_root(2),
    ];
    for lost in [false, true] {
        for block in blocks {
            let broken = Image::from_bytes(&image.bytes());
            if lost {
                zero(&broken, 0);
            }
            let engine = BadBlock(RamEngine::from_bytes(broken.bytes()), block);
            let plan = plan_in_place(&engine, &overrides_of(&image), &Silent);
            let e = plan.expect_err("it cannot be read");
            assert_eq!(e.kind(), ErrorKind::Io, "{block}: {e}");
        }
    }
}
