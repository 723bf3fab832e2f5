//! Metadata that the kernel made is read as both peers read it, and what is restored from it is as good as the original.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;

use crate::support::{
    Fixture, Image, Pool, check, damage_lines, dump, expand, expand_text, fixtures, json, peer,
    restore, testdata,
};

/// Blocks of the images that dumps are restored to: room for every fixture.
const ROOMY: u64 = 4096;

/// Every image that has a dump of both peers.
fn dumped() -> impl Iterator<Item = Fixture> {
    fixtures()
        .into_iter()
        .filter(|f| f.kept("dump-0.9").is_some())
}

/// The exit status that a check of an image must have. Where the peers disagree with each other or with us, we say why.
fn expected_exit(fixture: &Fixture) -> i32 {
    match fixture.name().as_str() {
        // A commit between allocation and mapping leaves one data block counted that nothing maps; 1.3.3 objects too.
        "crash-a/meta" | "out-of-metadata-512k/meta" => 3,
        // The restorer of 0.9 counts free entries only up to the end of the device.
        "restored/meta-repair-0.9" => 4,
        // 0.9 gave up and left zeros in the superblock.
        "restored/meta-restore-0.9-of-dump-1.3.3" => 5,
        name => {
            let facts = fixture.facts();
            assert_eq!(
                (
                    facts["thin_check_0.9"].as_i64(),
                    facts["thin_check_1.3.3"].as_i64()
                ),
                (Some(0), Some(0)),
                "{name}: the peers object, so it needs a line here"
            );
            0
        }
    }
}

/// Text without what may differ between two dumps of the same pool: the flags, and the names of shared parts.
fn without_names(text: &str) -> String {
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    let mut result = String::new();
    for line in text.lines() {
        let line = line.replace(" flags=\"0\"", "").replace(" flags=\"1\"", "");
        match line.split_once(" name=\"") {
            Some((before, after)) => {
                let (name, after) = after.split_once('"').expect("a value ends");
                let count = names.len();
                let number = *names.entry(name.to_owned()).or_insert(count);
                result += &format!("{before} name=\"shared {number}\"{after}\n");
            }
            None => result += &format!("{line}\n"),
        }
    }
    result
}

#[test]
fn dumps_equal_those_of_1_3_3_byte_for_byte() {
    let mut compared = 0;
    for fixture in dumped() {
        let image = Image::of(&fixture.name());
        let ours = dump(&[], image.path()).expect(0);
        let theirs = fixture.kept("dump-1.3.3").expect("both dumps are kept");
        assert_eq!(ours.stderr, "", "{}", fixture.name());
        assert!(
            ours.out().trim_end() == theirs.trim_end(),
            "{}: the dumps differ",
            fixture.name()
        );
        compared += 1;
    }
    assert!(compared >= 40, "{compared} dumps compared");
}

#[test]
fn dumps_mean_the_same_as_those_of_0_9() {
    for fixture in dumped() {
        let ours = Image::of(&fixture.name()).dumped();
        let theirs = Pool::read(&fixture.kept("dump-0.9").expect("kept"));
        assert!(
            ours == theirs,
            "{}: the dumps differ in meaning",
            fixture.name()
        );
    }
}

#[test]
fn unshared_dumps_equal_those_of_0_9_but_for_the_flags() {
    for fixture in dumped() {
        let image = Image::of(&fixture.name());
        let ours = dump(&["--no-shared"], image.path()).expect(0).out();
        let theirs = fixture.kept("dump-0.9").expect("kept");
        assert!(
            without_names(&ours).trim_end() == without_names(&theirs).trim_end(),
            "{}: the dumps differ",
            fixture.name()
        );
    }
}

#[test]
fn dumps_of_metadata_snapshots_equal_those_of_both_peers() {
    let mut compared = 0;
    for fixture in fixtures() {
        let (Some(new), Some(old)) = (
            fixture.kept("dump-held-1.3.3"),
            fixture.kept("dump-held-0.9"),
        ) else {
            continue;
        };
        let image = Image::of(&fixture.name());
        let ours = dump(&["-m"], image.path()).expect(0).out();
        // A snapshot has no space maps. The peers say that the pool has 0 data blocks, we look it up in the pool.
        let zero = "nr_data_blocks=\"0\"";
        let size = format!(
            "nr_data_blocks=\"{}\"",
            image.superblock().data_space_map.nr_blocks
        );
        assert!(new.contains(zero), "{}", fixture.name());
        assert!(
            ours.trim_end() == new.replace(zero, &size).trim_end(),
            "{}: the dumps differ",
            fixture.name()
        );
        assert!(
            Pool::read(&ours) == Pool::read(&old.replace(zero, &size)),
            "{}",
            fixture.name()
        );
        compared += 1;
    }
    assert_eq!(compared, 2);
}

#[test]
fn metadata_snapshots_pass_their_check() {
    for name in ["held-root/meta", "held-root/meta-just-reserved"] {
        let image = Image::of(name);
        let checked = check(&["-m"], image.path()).expect(0);
        assert_eq!(damage_lines(&checked.stderr), [], "{name}");
        check(&["-m", "-q"], image.path()).expect(0).expect_silent();
    }
}

#[test]
fn a_metadata_snapshot_that_does_not_exist_is_an_error() {
    let image = Image::of("snap-mix-a/meta");
    assert_ne!(check(&["-m"], image.path()).code, Some(0));
    assert_ne!(dump(&["-m"], image.path()).code, Some(0));
}

#[test]
fn dumps_hold_what_the_devices_were_known_to_hold() {
    let mut compared = 0;
    for fixture in fixtures()
        .iter()
        .filter(|f| f.facts()["truth_matches_dump"] == true)
    {
        let truth: serde_json::Value =
            serde_json::from_slice(&expand(&format!("{}/truth.json", fixture.folder)))
                .expect("JSON");
        let found = Image::of(&fixture.name()).dumped().virtual_ranges();
        let thins = truth["thins"].as_object().expect("devices");
        let known: BTreeMap<u64, Vec<(u64, u64)>> = thins
            .iter()
            .map(|(id, thin)| {
                let runs = serde_json::from_value(thin["runs"].clone()).expect("runs");
                (id.parse().expect("an id"), runs)
            })
            .collect();
        assert!(
            found == known,
            "{}: other ranges are mapped than were written",
            fixture.name()
        );
        compared += 1;
    }
    assert!(compared >= 15, "{compared} truths compared");
}

#[test]
fn checks_agree_with_both_peers_but_where_those_are_known_to_err() {
    for fixture in fixtures() {
        let image = Image::of(&fixture.name());
        let before = image.bytes();
        let checked = check(&[], image.path());
        let wanted = expected_exit(&fixture);
        assert_eq!(
            checked.code,
            Some(wanted),
            "{}: {}",
            fixture.name(),
            checked.stderr
        );
        assert!(
            image.bytes() == before,
            "{}: a check wrote to the image",
            fixture.name()
        );
        let worse: Vec<_> = damage_lines(&checked.stderr)
            .into_iter()
            .filter(|d| d.0 != "note")
            .collect();
        assert_eq!(
            worse.is_empty(),
            wanted == 0,
            "{}: {}",
            fixture.name(),
            checked.stderr
        );
    }
}

#[test]
fn the_leaks_of_crashes_are_single_data_blocks() {
    for name in ["crash-a/meta", "out-of-metadata-512k/meta"] {
        let checked = check(&[], Image::of(name).path())
            .expect(3)
            .expect_stderr(&["1 data blocks leaked"]);
        let found: Vec<_> = damage_lines(&checked.stderr)
            .into_iter()
            .filter(|d| d.0 != "note")
            .collect();
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        assert_eq!(
            (found[0].0.as_str(), found[0].1.as_str()),
            ("leak", "data-leak"),
            "{name}"
        );
    }
}

#[test]
fn a_zeroed_superblock_is_said_to_be_formatted_anew() {
    let image = Image::of("restored/meta-restore-0.9-of-dump-1.3.3");
    let checked = check(&[], image.path())
        .expect(5)
        .expect_stderr(&["fatal superblock-zeroed: block 0", "format"]);
    assert_eq!(checked.out(), "");
}

#[test]
fn transaction_id_and_free_blocks_are_those_of_1_3_3() {
    let mut compared = 0;
    for fixture in fixtures() {
        let log = fs::read_to_string(testdata().join(format!("{}.tools.txt", fixture.name())))
            .expect("a log");
        let command = log.split("\n$ ").find(|part| {
            let line = part
                .trim_start_matches("$ ")
                .lines()
                .next()
                .unwrap_or_default();
            line.starts_with("thin_check ") && line.ends_with("# 1.3.3") && !line.contains(" -m")
        });
        let command =
            command.unwrap_or_else(|| panic!("{}: no check by 1.3.3 is kept", fixture.name()));
        let lines = |text: &str| -> Vec<String> {
            let wanted = |line: &&str| {
                line.starts_with("TRANSACTION_ID=") || line.starts_with("METADATA_FREE_BLOCKS=")
            };
            text.lines().filter(wanted).map(str::to_owned).collect()
        };
        let theirs = lines(command);
        let image = Image::of(&fixture.name());
        assert_eq!(
            lines(&check(&[], image.path()).out()),
            theirs,
            "{}",
            fixture.name()
        );
        compared += theirs.len();
    }
    assert!(compared >= 80, "{compared} lines compared");
}

#[test]
fn dump_restore_dump_gives_the_same_text_and_sound_metadata() {
    for fixture in dumped() {
        let name = fixture.name();
        let image = Image::of(&name);
        let first = dump(&[], image.path()).expect(0).out();
        let copy = Image::restored(&first, ROOMY);
        let second = dump(&[], copy.path()).expect(0).out();
        assert!(
            without_names(&first) == without_names(&second),
            "{name}: the dumps differ"
        );
        let checked = check(&[], copy.path()).expect(0);
        let worse: Vec<_> = damage_lines(&checked.stderr)
            .into_iter()
            .filter(|d| d.0 != "note")
            .collect();
        assert_eq!(worse, [], "{name}");
        assert!(
            !copy.superblock().needs_check(),
            "{name}: needs_check was restored"
        );
        assert_eq!(
            copy.superblock().metadata_space_map.nr_blocks,
            ROOMY,
            "{name}"
        );
    }
}

#[test]
fn restored_metadata_passes_the_check_of_0_9_and_is_dumped_by_it() {
    for fixture in dumped() {
        let name = fixture.name();
        let copy = Image::restored(&fixture.kept("dump-1.3.3").expect("kept"), ROOMY);
        peer("thin_check", &[copy.path().as_os_str()]).expect(0);
        let theirs = peer("thin_dump", &[copy.path().as_os_str()])
            .expect(0)
            .out();
        let kept = Pool::read(&fixture.kept("dump-0.9").expect("kept"));
        assert!(
            Pool::read(&theirs) == kept,
            "{name}: 0.9 reads something else"
        );
    }
}

#[test]
fn unshared_dumps_can_be_restored_by_0_9() {
    for fixture in dumped() {
        let name = fixture.name();
        let image = Image::of(&name);
        let text = dump(&["--no-shared"], image.path()).expect(0).out();
        let xml = image.beside("dump.xml");
        fs::write(&xml, &text).expect("written");
        let copy = Image::empty(ROOMY);
        let arguments = [
            OsStr::new("-i"),
            xml.as_os_str(),
            OsStr::new("-o"),
            copy.path().as_os_str(),
        ];
        peer("thin_restore", &arguments).expect(0);
        assert!(
            copy.dumped() == Pool::read(&text),
            "{name}: 0.9 restored something else"
        );
    }
}

#[test]
fn both_peers_dumps_are_restored_to_the_same_pool() {
    for fixture in dumped() {
        let name = fixture.name();
        let pools = ["dump-0.9", "dump-1.3.3"].map(|kind| {
            let xml = fixture.kept(kind).expect("kept");
            let copy = Image::restored(&xml, ROOMY);
            check(&[], copy.path()).expect(0);
            let pool = copy.dumped();
            assert!(
                pool == Pool::read(&xml),
                "{name}: {kind} restores to something else"
            );
            pool
        });
        assert!(pools[0] == pools[1], "{name}");
    }
}

#[test]
fn restored_snapshots_of_metadata_pass_their_check() {
    for kind in ["dump-held-0.9", "dump-held-1.3.3"] {
        let image = Image::of("held-root/meta");
        let size = image.superblock().data_space_map.nr_blocks;
        let xml = expand_text(&format!("held-root/meta.{kind}.xml"));
        let input = image.beside("held.xml");
        fs::write(
            &input,
            xml.replace(
                "nr_data_blocks=\"0\"",
                &format!("nr_data_blocks=\"{size}\""),
            ),
        )
        .expect("written");
        let copy = Image::empty(ROOMY);
        restore(&input, copy.path()).expect(0);
        check(&[], copy.path()).expect(0);
        let ours = Pool::read(&dump(&["-m"], image.path()).expect(0).out());
        assert!(copy.dumped() == ours, "{kind}");
    }
}

#[test]
fn compressed_images_are_read_as_they_are() {
    let zstd = testdata().join("snap-mix-a/meta.img.zst");
    let image = Image::of("snap-mix-a/meta");
    assert_eq!(
        dump(&[], &zstd).expect(0).stdout,
        dump(&[], image.path()).expect(0).stdout
    );
    check(&[], &zstd).expect(0);
}

#[test]
fn fixtures_are_the_images_that_their_records_name() {
    // Without this a fixture that lost its record would be left out of the tests above unnoticed.
    for fixture in fixtures() {
        let facts = json(&format!("{}/fixture.json", fixture.folder));
        let known = facts["images"].as_object().expect("images");
        assert!(
            known.contains_key(&format!("{}.img", fixture.image)),
            "{}",
            fixture.name()
        );
    }
}
