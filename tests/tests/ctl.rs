//! `thin_ctl`: every message against metadata that the kernel made, every error as the kernel has it, and that nothing is written
//! that should not be.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use thintools::units::MAX_TIME;

use crate::support::{
    BINARY, Finished, Image, Pool, check, dump, expand, get_u64, peer, testdata, thintools,
};

/// `thin_ctl FILE ARGUMENTS`.
fn ctl(file: &Path, args: &[&str]) -> Finished {
    let mut all = vec![OsString::from("thin_ctl"), file.into()];
    all.extend(args.iter().map(OsString::from));
    thintools(all).run()
}

/// Sends a message that must succeed without a word.
#[track_caller]
fn sent(image: &Image, args: &[&str]) {
    ctl(image.path(), args).expect(0).expect_silent();
}

/// Sends a message that must fail, with these texts on standard error, and change nothing.
#[track_caller]
fn refused(image: &Image, args: &[&str], status: i32, texts: &[&str]) {
    let before = image.bytes();
    let finished = ctl(image.path(), args).expect(status);
    assert_eq!(finished.out(), "");
    finished.expect_stderr(texts);
    assert!(image.bytes() == before, "{args:?} wrote");
}

/// Fails unless our check and that of Debian find nothing wrong, not even a leak.
#[track_caller]
fn is_sound(image: &Image) {
    check(&["-q"], image.path()).expect(0);
    peer("thin_check", &[OsStr::new("-q"), image.path().as_os_str()]).expect(0);
}

/// The first line of the status: what the kernel has behind `thin-pool`.
#[track_caller]
fn line(image: &Image) -> String {
    let out = ctl(image.path(), &["status"]).expect(0).out();
    out.lines().next().expect("a line").to_owned()
}

#[track_caller]
fn json(image: &Image) -> Value {
    let out = ctl(image.path(), &["status", "--json"]).expect(0).stdout;
    serde_json::from_slice(&out).expect("JSON")
}

/// What the kernel's status line was, under each heading of a fixture.
fn kernel_lines(folder: &str) -> Vec<(String, String)> {
    let log = fs::read_to_string(testdata().join(folder).join("status.log")).expect("a log");
    let (mut heading, mut is_status, mut lines) = (String::new(), false, Vec::new());
    for line in log.lines() {
        if let Some(text) = line.strip_prefix("## ") {
            heading = text.to_owned();
        } else if line.starts_with("# ") {
            is_status = line == "# status";
        } else if is_status && let Some((_, fields)) = line.split_once(" thin-pool ") {
            lines.push((heading.clone(), fields.to_owned()));
        }
    }
    lines
}

/// A status line with the options of the pool's table set to the defaults.
fn with_defaults(line: &str) -> String {
    let mut fields: Vec<&str> = line.split(' ').collect();
    fields[5] = "discard_passdown";
    fields[6] = "queue_if_no_space";
    if fields[4] == "out_of_data_space" {
        // The kernel finds out anew when a write needs a block.
        fields[4] = "rw";
    }
    fields.join(" ")
}

#[test]
fn the_status_is_that_of_the_kernel() {
    // The image of a folder without a heading is that of the last status.
    let images = [
        ("bs-1gib/meta", ""),
        ("bs-384/meta", ""),
        ("bs-512/meta", ""),
        ("discard-no-passdown/meta", ""),
        ("discard-passdown/meta", ""),
        ("empty-2m/meta", ""),
        ("extorigin/meta", ""),
        ("features/meta", ""),
        ("held-root/meta-just-reserved", "reserved"),
        ("held-root/meta", ""),
        ("ids-limits/meta", ""),
        ("needs-check-error/meta", ""),
        ("needs-check-set/meta", ""),
        ("out-of-data-queue/meta", ""),
        ("out-of-metadata-512k/meta", ""),
        ("rand-1thin-70k/meta", ""),
        ("rand-20thins-10k/meta", ""),
        ("rand-600thins-5/meta", ""),
        ("resize/meta-before", "before"),
        (
            "resize/meta-metadata-grown",
            "metadata grown, same pool table reloaded",
        ),
        ("resize/meta", ""),
        ("restored/meta-repair-1.3.3", "repair 1.3.3"),
        ("seq-1thin/meta", ""),
        ("snap-chain-20/meta", ""),
        ("snap-fan-60/meta", ""),
        ("snap-mix-a/meta", ""),
        ("snap-mix-b/meta", ""),
        ("transaction-id-5/meta", ""),
    ];
    let mut wrong = Vec::new();
    for (name, heading) in images {
        let image = Image::of(name);
        let before = image.bytes();
        let lines = kernel_lines(name.split('/').next().expect("a folder"));
        let kept = lines
            .iter()
            .rfind(|l| heading.is_empty() || l.0 == heading)
            .unwrap_or_else(|| panic!("{name}: no {heading}"));
        let (ours, theirs) = (line(&image), with_defaults(&kept.1));
        if ours != theirs {
            wrong.push(format!("{name}:\n  {ours}\n  {theirs}"));
        }
        assert_eq!(json(&image)["kernel"], ours);
        assert!(image.bytes() == before, "{name} was written to");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_status_says_in_words_what_the_line_has() {
    let image = Image::of("held-root/meta");
    assert_eq!(
        ctl(image.path(), &["status"]).expect(0).out(),
        "10 219/1024 13950/65536 173 rw discard_passdown queue_if_no_space - 256 \n\
         transaction id: 10\n\
         metadata: 117 of 1024 blocks of 4 KiB in use (11.4 %), 907 free, 805 of them not kept back for commits\n\
         data: 13950 of 65536 blocks of 128 sectors (64 KiB) in use (21.3 %), 51586 free\n\
         devices: 5\n\
         snapshot clock: 1\n\
         metadata snapshot: in block 173\n\
         needs check: no\n"
    );
    let status = json(&image);
    for (pointer, value) in [
        ("/status/transaction_id", 10),
        ("/status/used_metadata_blocks", 219),
        ("/status/allocated_metadata_blocks", 117),
        ("/status/metadata_blocks", 1024),
        ("/status/held_root", 173),
        ("/status/devices", 5),
        ("/free_metadata_blocks", 907),
        ("/usable_metadata_blocks", 805),
        ("/free_data_blocks", 51586),
        ("/exit_status", 0),
    ] {
        assert_eq!(status.pointer(pointer), Some(&value.into()), "{pointer}");
    }
    let flagged = Image::of("needs-check-set/meta");
    let status = json(&flagged);
    assert_eq!(
        (&status["mode"], &status["status"]["needs_check"]),
        (&"ro".into(), &true.into())
    );
    let words = ctl(flagged.path(), &["STATUS"]).expect(0).out();
    assert!(words.contains("--clear-needs-check-flag"), "{words}");
}

#[test]
fn a_device_is_made_and_deleted() {
    let image = Image::of("discard-passdown/meta");
    let mut wanted = image.dumped();
    for id in ["900", "0", "16777215"] {
        assert!(!wanted.devices.contains_key(&id.parse().expect("a number")));
        sent(&image, &["create-thin", id]);
        is_sound(&image);
    }
    let now = image.dumped();
    let time = &now.superblock["time"];
    for id in [900, 0, 16_777_215] {
        let (attributes, runs) = &now.devices[&id];
        assert!(runs.is_empty());
        assert_eq!(attributes["mapped_blocks"], "0");
        assert_eq!(&attributes["transaction"], &now.superblock["transaction"]);
        assert_eq!(
            (&attributes["creation_time"], &attributes["snap_time"]),
            (time, time)
        );
    }
    for id in ["0", "900", "16777215"] {
        sent(&image, &["delete", id]);
    }
    is_sound(&image);
    assert!(image.dumped() == wanted);
    let id = *wanted.devices.keys().next().expect("a device");
    sent(&image, &["delete", &id.to_string()]);
    is_sound(&image);
    wanted.devices.remove(&id);
    assert!(image.dumped() == wanted);
}

#[test]
fn a_snapshot_has_what_its_origin_has() {
    let image = Image::of("snap-mix-a/meta");
    let before = image.dumped();
    let (&origin, (attributes, runs)) = before
        .devices
        .iter()
        .max_by_key(|device| device.1.1.len())
        .expect("a device");
    sent(&image, &["create-snap", "900", &origin.to_string()]);
    is_sound(&image);
    let mut now = image.dumped();
    let time = before.superblock["time"].parse::<u32>().expect("a number") + 1;
    assert_eq!(now.superblock["time"], time.to_string());
    let (snapshot, snapshot_runs) = now.devices.remove(&900).expect("the snapshot");
    assert!(&snapshot_runs == runs);
    assert_eq!(snapshot["mapped_blocks"], attributes["mapped_blocks"]);
    for key in ["creation_time", "snap_time"] {
        assert_eq!(snapshot[key], time.to_string());
    }
    // The origin took part; nothing else has changed.
    let mut wanted = before.clone();
    wanted.superblock.insert("time".into(), time.to_string());
    let of_origin = &mut wanted.devices.get_mut(&origin).expect("there").0;
    of_origin.insert("snap_time".into(), time.to_string());
    assert!(now == wanted);
    // The snapshot stands alone when the origin is gone.
    sent(&image, &["delete", &origin.to_string()]);
    is_sound(&image);
    assert!(&image.dumped().devices[&900].1 == runs);
}

#[test]
fn words_are_accepted_as_the_kernel_spells_them() {
    let image = Image::of("transaction-id-5/meta");
    for args in [
        &["CREATE_THIN", "50"][..],
        &["create_thin", "51"],
        &["Create-Thin", "52"],
        &["create_snap", "53", "50"],
        &["CREATE-SNAP", "54", "51"],
        &["Delete", "54"],
        &["set_transaction_id", "5", "6"],
        &["reserve_metadata_snap"],
        &["RELEASE_METADATA_SNAP"],
    ] {
        sent(&image, args);
    }
    is_sound(&image);
    for id in [50, 51, 52, 53] {
        assert!(image.dumped().devices.contains_key(&id));
    }
    assert_eq!(image.superblock().transaction_id, 6);
}

#[test]
fn the_transaction_id_is_set_if_the_old_one_is_right() {
    let image = Image::of("transaction-id-5/meta");
    let mut wanted = image.dumped();
    for (old, new) in [
        ("5", "18446744073709551615"),
        ("18446744073709551615", "3"),
        ("3", "3"),
        ("3", "0"),
    ] {
        sent(&image, &["set-transaction-id", old, new]);
        wanted.superblock.insert("transaction".into(), new.into());
        assert!(image.dumped() == wanted);
    }
    is_sound(&image);
    let texts = ["set-transaction-id 5 6: EINVAL: Invalid argument: mismatched transaction id"];
    refused(&image, &["set-transaction-id", "5", "6"], 1, &texts);
}

#[test]
fn a_metadata_snapshot_is_kept_until_it_is_released() {
    let image = Image::of("snap-mix-a/meta");
    let before = image.dumped();
    let allocated = image.superblock().metadata_space_map.nr_allocated;
    sent(&image, &["reserve-metadata-snap"]);
    is_sound(&image);
    let held = image.superblock().held_root.0;
    assert_eq!(json(&image)["status"]["held_root"], held);
    refused(
        &image,
        &["reserve-metadata-snap"],
        1,
        &[
            "EBUSY: Device or resource busy",
            "metadata snapshot already exists",
        ],
    );
    for id in before.devices.keys().take(5) {
        sent(&image, &["delete", &id.to_string()]);
    }
    sent(&image, &["create-thin", "900"]);
    is_sound(&image);
    check(&["-q", "-m"], image.path()).expect(0);
    assert!(Pool::read(&dump(&["-m"], image.path()).expect(0).out()).devices == before.devices);
    sent(&image, &["release-metadata-snap"]);
    is_sound(&image);
    assert_eq!(image.superblock().held_root.0, 0);
    let texts = ["EINVAL: Invalid argument", "nothing to release"];
    refused(&image, &["release-metadata-snap"], 1, &texts);

    // Nothing is left of one that is given up at once.
    let image = Image::of("snap-mix-a/meta");
    sent(&image, &["reserve-metadata-snap"]);
    sent(&image, &["release-metadata-snap"]);
    assert_eq!(
        image.superblock().metadata_space_map.nr_allocated,
        allocated
    );
    assert!(image.dumped() == before);
}

#[test]
fn a_metadata_snapshot_of_the_kernel_is_released() {
    for name in ["held-root/meta", "held-root/meta-just-reserved"] {
        let image = Image::of(name);
        let before = image.dumped();
        sent(&image, &["release-metadata-snap"]);
        is_sound(&image);
        assert!(image.dumped() == before);
    }
}

#[test]
fn a_pool_without_its_devices_is_empty() {
    for name in ["snap-mix-a/meta", "snap-chain-20/meta", "held-root/meta"] {
        let image = Image::of(name);
        let ids: Vec<u64> = image.dumped().devices.into_keys().collect();
        if image.superblock().held_root.0 != 0 {
            sent(&image, &["release-metadata-snap"]);
        }
        sent(&image, &["create-snap", "900", &ids[0].to_string()]);
        for id in ids.iter().chain([&900]) {
            sent(&image, &["delete", &id.to_string()]);
        }
        is_sound(&image);
        assert!(image.dumped().devices.is_empty());
        let status = json(&image);
        assert_eq!(status["status"]["devices"], 0);
        assert_eq!(status["status"]["used_data_blocks"], 0);
        // Superblock, both space maps with their bitmaps, three empty trees: few, whatever there was.
        let left = status["status"]["allocated_metadata_blocks"].as_u64();
        assert!(left.is_some_and(|n| n < 30), "{name}: {left:?}");
    }
}

#[test]
fn a_pool_grows_as_the_kernel_grows_it() {
    let lines = kernel_lines("resize");
    let of_kernel = |heading: &str| {
        let found = lines.iter().find(|l| l.0 == heading).expect("a status");
        with_defaults(&found.1)
    };
    let image = Image::of("resize/meta-before");
    let before = image.dumped();
    assert_eq!(line(&image), of_kernel("before"));
    image.resize(1024);
    ctl(image.path(), &["resize"]).expect(0).expect_stderr(&[
        "data: 16384 blocks; nothing to do",
        "metadata: 256 blocks before, 1024 blocks now",
    ]);
    is_sound(&image);
    assert!(image.dumped() == before);
    assert_eq!(
        line(&image),
        of_kernel("metadata grown, pool suspended and resumed")
    );
    ctl(image.path(), &["resize", "--data", "49152"])
        .expect(0)
        .expect_stderr(&[
            "data: 16384 blocks before, 49152 blocks now",
            "metadata: 1024 blocks; nothing to do",
        ]);
    is_sound(&image);
    assert_eq!(line(&image), of_kernel("data grown"));
    assert!(image.dumped().devices == before.devices);
}

#[test]
fn a_pool_grows_by_as_much_as_is_asked_for() {
    let image = Image::of("snap-mix-a/meta");
    let untouched = image.bytes();
    let finished = ctl(image.path(), &["resize"]).expect(0);
    assert_eq!(finished.out(), "");
    finished.expect_stderr(&[
        "data: 3072 blocks; nothing to do",
        "metadata: 1024 blocks; nothing to do",
    ]);
    assert!(image.bytes() == untouched);
    let impossible: [&[&str]; 6] = [
        &["--data", "3071"],
        &["--data", "0"],
        &["--data", "18446744073709551615"],
        &["--metadata", "1023"],
        &["--metadata", "1025"],
        &["--data", "5000", "--metadata", "4161601"],
    ];
    for options in impossible {
        let args = [&["resize"], options].concat();
        refused(
            &image,
            &args,
            1,
            &["resize: EINVAL: Invalid argument", "blocks"],
        );
    }
    let devices = image.dumped().devices;
    image.resize(40_000);
    let args = ["resize", "-q", "--metadata", "2000", "--data", "5000000"];
    sent(&image, &args);
    is_sound(&image);
    assert_eq!(image.superblock().metadata_space_map.nr_blocks, 2000);
    assert_eq!(image.superblock().data_space_map.nr_blocks, 5_000_000);
    // More than one bitmap of metadata, and nothing said about the data.
    sent(&image, &["resize", "--quiet"]);
    is_sound(&image);
    assert_eq!(image.superblock().metadata_space_map.nr_blocks, 40_000);
    assert_eq!(image.superblock().data_space_map.nr_blocks, 5_000_000);
    assert!(image.dumped().devices == devices);
}

#[test]
fn errors_are_those_of_the_kernel() {
    let image = Image::of("snap-mix-a/meta");
    let id = *image.dumped().devices.keys().next().expect("a device");
    let id = id.to_string();
    let exists = format!("create-thin {id}: EEXIST: File exists: thin device {id} exists already");
    refused(&image, &["create-thin", &id], 1, &[&exists]);
    let cases: [(&[&str], &str); 5] = [
        (&["create-snap", &id, &id], "EEXIST: File exists"),
        (&["create-snap", &id, "999"], "EEXIST: File exists"),
        (
            &["create-snap", "900", "999"],
            "create-snap 900 999: ENODATA: No data available",
        ),
        (&["create-snap", "900", "900"], "ENODATA: No data available"),
        (
            &["delete", "999"],
            "delete 999: ENODATA: No data available: there is no thin device 999",
        ),
    ];
    for (args, text) in cases {
        refused(&image, args, 1, &[text]);
    }
    for wrong in [
        "16777216",
        "-1",
        "x",
        "",
        "0x10",
        "1 ",
        "18446744073709551616",
    ] {
        for args in [
            &["create-thin", wrong][..],
            &["delete", wrong],
            &["create-snap", wrong, &id],
            &["create-snap", "900", wrong],
        ] {
            refused(&image, args, 2, &["EINVAL", "0 to 16777215"]);
        }
    }
    image.edit_superblock(|fields| fields.time = MAX_TIME);
    let texts = ["EINVAL: Invalid argument", "clock"];
    refused(&image, &["create-snap", "900", &id], 1, &texts);
}

#[test]
fn no_room_leaves_the_pool_as_it_was() {
    let xml = "<superblock uuid=\"\" time=\"0\" transaction=\"0\" version=\"2\" data_block_size=\"128\" \
               nr_data_blocks=\"1024\">\n</superblock>\n";
    let image = Image::restored(xml, 24);
    let mut made = 0;
    let said = loop {
        let before = (image.block(0), image.dumped());
        let finished = ctl(image.path(), &["create-thin", &made.to_string()]);
        if finished.code == Some(0) {
            made += 1;
            assert!(made < 24, "there is room without an end");
            continue;
        }
        assert!(before == (image.block(0), image.dumped()));
        break finished.expect(1).stderr;
    };
    assert!(made > 2, "{made}: {said}");
    assert!(said.contains("ENOSPC: No space left on device"), "{said}");
    is_sound(&image);
    // What made it full can be taken away again, or room be made.
    image.resize(48);
    ctl(image.path(), &["resize"]).expect(0);
    sent(&image, &["create-thin", &made.to_string()]);
    is_sound(&image);
}

#[test]
fn devices_of_a_pool_that_is_full_can_be_deleted() {
    let image = Image::of("out-of-metadata-512k/meta");
    assert!(line(&image).contains(" ro "));
    sent(&image, &["delete", "1"]);
    // The leak of the image is left, and nothing else.
    check(&["-q"], image.path()).expect(3);
    assert!(line(&image).contains(" rw "));
}

#[test]
fn needs_check_forbids_everything_but_the_status() {
    let image = Image::of("needs-check-set/meta");
    let messages: [&[&str]; 7] = [
        &["create-thin", "900"],
        &["create-snap", "900", "1"],
        &["delete", "1"],
        &["set-transaction-id", "9", "10"],
        &["reserve-metadata-snap"],
        &["release-metadata-snap"],
        &["resize"],
    ];
    for args in messages {
        let texts = [
            args[0],
            "EOPNOTSUPP: Operation not supported",
            "needs_check",
            "thin_check --clear-needs-check-flag",
        ];
        refused(&image, args, 1, &texts);
    }
    assert!(line(&image).contains(" ro ") && line(&image).contains(" needs_check "));
    check(&["-q", "--clear-needs-check-flag"], image.path()).expect(0);
    sent(&image, &["create-thin", "900"]);
    is_sound(&image);
}

#[test]
fn leaks_are_no_obstacle() {
    let image = Image::of("crash-a/meta");
    check(&["-q"], image.path()).expect(3);
    sent(&image, &["create-thin", "900"]);
    check(&["-q"], image.path()).expect(3);
    check(&["-q", "--auto-repair"], image.path()).expect(0);
    is_sound(&image);
}

#[test]
fn damaged_metadata_is_not_changed() {
    let mut names: Vec<String> = fs::read_dir(testdata().join("damaged"))
        .expect("fixtures")
        .map(|entry| {
            entry
                .expect("readable")
                .file_name()
                .into_string()
                .expect("plain")
        })
        .filter_map(|name| Some(name.strip_suffix(".img.zst")?.to_owned()))
        .collect();
    names.sort();
    assert!(names.len() > 30);
    let (mut refusals, mut changes) = (0, 0);
    for name in names {
        let image = Image::from_bytes(&expand(&format!("damaged/{name}.img")));
        let checked = check(&["-q"], image.path()).code;
        if matches!(checked, Some(4 | 5)) {
            for args in [
                &["create-thin", "900"][..],
                &["resize", "--data", "9000000"],
            ] {
                refused(&image, args, 5, &["thin_check"]);
            }
            refusals += 1;
        } else {
            sent(&image, &["create-thin", "900"]);
            assert_eq!(check(&["-q"], image.path()).code, checked, "{name}");
            changes += 1;
        }
    }
    assert!(refusals > 20, "{refusals} refused, {changes} changed");

    // The message names the damage.
    let image = Image::of("snap-mix-a/meta");
    let root = image.superblock().mapping_root.0;
    let id = get_u64(&image.block(root), 32).to_string();
    let leaf = image.first_leaf(image.device_root(id.parse().expect("a number")));
    image.spoil_block(leaf, |block| block[100] ^= 1);
    let texts = [
        &*format!("delete {id}: "),
        "nothing was written",
        "fatal node-checksum",
        "run thin_check",
    ];
    refused(&image, &["delete", &id], 5, &texts);
    // Nothing of that keeps the status from being shown.
    assert!(line(&image).ends_with(" - 256 "));
}

#[test]
fn compressed_images_have_a_status_and_are_not_changed() {
    let image = Image::of("snap-mix-a/meta");
    let wanted = ctl(image.path(), &["status"]).expect(0).out();
    let path = testdata().join("snap-mix-a/meta.img.zst");
    assert_eq!(ctl(&path, &["status"]).expect(0).out(), wanted);
    let copy = image.beside("copy.zst");
    fs::copy(&path, &copy).expect("copied");
    ctl(&copy, &["create-thin", "900"])
        .expect(1)
        .expect_stderr(&["compressed"]);
    assert!(fs::read(&copy).expect("readable") == fs::read(&path).expect("readable"));
}

#[test]
fn a_signal_leaves_the_old_state_or_the_new() {
    let bytes = expand("rand-1thin-70k/meta.img");
    for delay in [0, 2, 4, 6, 8, 10, 15, 20, 30] {
        let image = Image::from_bytes(&bytes);
        let mut child = Command::new(BINARY)
            .arg("thin_ctl")
            .arg(image.path())
            .args(["delete", "1"])
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        thread::sleep(Duration::from_millis(delay));
        // It may have ended by itself; then there is nothing to signal, which is no failure.
        let id = child.id().to_string();
        let _ = Command::new("kill")
            .args(["-INT", &id])
            .stderr(Stdio::null())
            .status()
            .expect("kill");
        let status = child.wait().expect("it ends");
        is_sound(&image);
        let is_there = image.dumped().devices.contains_key(&1);
        if status.success() {
            assert!(!is_there, "{delay} ms");
        }
    }
}
