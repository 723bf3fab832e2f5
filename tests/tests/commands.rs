//! What all commands have in common: names, options, exit statuses, messages, and what other programs expect of them.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{
    BINARY, Finished, Image, Pool, check, dump, expand, folder, program, restore, testdata,
    thintools,
};

/// Every command by its long and its short name.
const TOOLS: [(&str, &str); 5] = [
    ("thin_check", "check"),
    ("thin_ctl", "ctl"),
    ("thin_dump", "dump"),
    ("thin_repair", "repair"),
    ("thin_restore", "restore"),
];

/// Commands that have a manual page and a link: these, `thin_replay`, whose input is no metadata, and `thin_serve`, which does not end.
const LINKED: usize = TOOLS.len() + 2;

/// The version that `-V` prints.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The arguments that make a command read `input`, and write to `output` if it is one that writes.
fn arguments(tool: &str, input: &Path, output: &Path) -> Vec<OsString> {
    match tool {
        "thin_check" | "thin_dump" => vec![tool.into(), input.into()],
        // It opens the device to write to it, and has nothing to do there.
        "thin_ctl" => vec![tool.into(), input.into(), "resize".into()],
        _ => vec![
            tool.into(),
            "-i".into(),
            input.into(),
            "-o".into(),
            output.into(),
        ],
    }
}

/// Copies the binary, by another process: a file that this one has open for writing, if only in a child that is just being started by
/// another test, cannot be executed.
fn copy_binary(to: &Path) {
    program("cp", [OsStr::new(BINARY), to.as_os_str()])
        .run()
        .expect(0);
}

/// A sound image, its dump, and an output with room for either.
struct Bench {
    image: Image,
    xml: PathBuf,
    output: Image,
}

impl Bench {
    fn new() -> Self {
        let image = Image::of("snap-mix-a/meta");
        let xml = image.beside("dump.xml");
        fs::write(&xml, dump(&[], image.path()).expect(0).stdout).expect("written");
        Self {
            image,
            xml,
            output: Image::from_bytes(&vec![0xa5; 4 << 20]),
        }
    }

    /// What a command needs as its input to succeed.
    fn input(&self, tool: &str) -> &Path {
        if tool == "thin_restore" {
            &self.xml
        } else {
            self.image.path()
        }
    }

    /// The arguments with which a command succeeds.
    fn good(&self, tool: &str) -> Vec<OsString> {
        arguments(tool, self.input(tool), self.output.path())
    }
}

/// Runs `thintools ARGUMENTS` below a shell that first redirects as `redirection` says.
fn redirected(redirection: &str, args: &[OsString]) -> Finished {
    let script = format!("exec \"$0\" \"$@\" {redirection}");
    let mut all: Vec<OsString> = vec!["-c".into(), script.into(), BINARY.into()];
    all.extend_from_slice(args);
    program("sh", all).run()
}

/// Fails if a command panicked or was ended by a signal.
#[track_caller]
fn not_broken(finished: &Finished, what: &dyn std::fmt::Debug) {
    assert!(
        finished.signal.is_none() && !finished.stderr.contains("panicked"),
        "{what:?}: {finished:?}"
    );
}

/// Things that were found wrong, so that the first of them does not hide the others.
#[derive(Default)]
struct Complaints(Vec<String>);

impl Complaints {
    /// Notes what `finished` says unless it is right.
    fn unless(&mut self, is_right: bool, what: &dyn std::fmt::Debug, finished: &Finished) {
        if !is_right {
            let (code, said) = (finished.code, &finished.stderr);
            self.0.push(format!("{what:?}: status {code:?}: {said}"));
        }
    }

    /// Fails if there was anything to note.
    #[track_caller]
    fn end(self) {
        assert!(
            self.0.is_empty(),
            "{}:\n{}",
            self.0.len(),
            self.0.join("\n")
        );
    }
}

/// Commands for developers are in builds for developers only.
#[cfg(not(feature = "devtools"))]
#[test]
fn commands_for_developers_are_left_out() {
    for name in [
        "thin_generate_metadata",
        "thin_generate_damage",
        "thin_compare_mappings",
    ] {
        thintools([name, "--help"])
            .run()
            .expect(2)
            .expect_stderr(&["unknown command"]);
    }
    let help = thintools(["--help"]).run().expect(0).out();
    assert!(!help.contains("generate"), "{help}");
}

/// Pseudo-random bytes that are the same each time.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn zstd_of(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).expect("compressed")
}

fn gzip_of(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("compressed");
    encoder.finish().expect("compressed")
}

/// As with xz -9.
fn xz_of(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 9);
    encoder.write_all(bytes).expect("compressed");
    encoder.finish().expect("compressed")
}

fn strings(args: &[&str]) -> Vec<OsString> {
    args.iter().map(OsString::from).collect()
}

#[test]
fn every_name_leads_to_the_command() {
    let links = folder();
    for (long, short) in TOOLS {
        let link = links.path().join(long);
        symlink(BINARY, &link).expect("linked");
        let link = link.to_str().expect("plain name");
        let ways: [(&str, &[&str]); 3] = [(link, &[]), (BINARY, &[long]), (BINARY, &[short])];
        for (binary, first) in ways {
            let call = |last: &[&str]| program(binary, [first, last].concat()).run();
            let version = call(&["-V"]).expect(0);
            assert_eq!(version.out(), format!("{VERSION}\n"), "{binary} {first:?}");
            assert_eq!(version.stderr, "");
            assert_eq!(call(&["--version"]).expect(0).out(), version.out());
            for option in ["-h", "--help"] {
                let help = call(&[option]).expect(0);
                assert_eq!(help.stderr, "");
                assert!(
                    help.out().contains(&format!("Usage: {long}")),
                    "{}",
                    help.out()
                );
                let lines_fit = help.out().lines().all(|line| line.chars().count() <= 100);
                assert!(lines_fit, "{}", help.out());
            }
            assert!(call(&["--help"]).out().contains("Exit status:"));
            let wrong = call(&["--no-such-option"])
                .expect(2)
                .expect_stderr(&["--no-such-option"]);
            assert_eq!(wrong.stdout, b"");
            // The others need more than an input.
            let is_enough = ["thin_check", "thin_dump"].contains(&long);
            call(&["/nonexistent/input"]).expect(if is_enough { 1 } else { 2 });
        }
    }
}

#[test]
fn wrong_command_lines_are_told_on_standard_error_with_status_2() {
    let lines: &[&[&str]] = &[
        &[],
        &["no-such-command"],
        &["--no-such-option"],
        &["check"],
        &["check", ""],
        &["check", "a", "b"],
        &["check", "--auto-repair", "--ignore-non-fatal-errors", "a"],
        &["check", "--auto-repair", "-m", "a"],
        &[
            "check",
            "--auto-repair",
            "--override-mapping-root",
            "1",
            "a",
        ],
        &["check", "--auto-repair", "--override-details-root=1", "a"],
        &["check", "--auto-repair", "--super-block-only", "a"],
        &["check", "--auto-repair", "--skip-mappings", "a"],
        &["check", "--clear-needs-check-flag", "-m", "a"],
        &[
            "check",
            "--clear-needs-check-flag",
            "--override-mapping-root=1",
            "a",
        ],
        &[
            "check",
            "--clear-needs-check-flag",
            "--override-details-root=1",
            "a",
        ],
        &["check", "--override-mapping-root", "x", "a"],
        &["check", "--override-mapping-root=-1", "a"],
        &["check", "--override-mapping-root=18446744073709551616", "a"],
        &["check", "--io-engine", "none", "a"],
        &["check", "-q=yes", "a"],
        &["dump"],
        &["dump", "a", "b"],
        &["dump", "-r", "-m", "a"],
        &["dump", "--repair", "--metadata-snap=3", "a"],
        &["dump", "--format", "pdf", "a"],
        &["dump", "--dev-id", "x", "a"],
        &["dump", "--dev-id=-1", "a"],
        &["dump", "--metadata-snap=x", "a"],
        &["dump", "--data-block-size", "7", "a"],
        &["dump", "--transaction-id", "1.5", "a"],
        &["dump", "-o"],
        &["restore"],
        &["restore", "-i", "a"],
        &["restore", "-o", "a"],
        &["restore", "-i", "a", "-o", "b", "c"],
        &["restore", "-i", "a", "-i", "b", "-o", "c"],
        &["restore", "-i", "a", "-o", "b", "--data-block-size", "0"],
        &[
            "restore",
            "-i",
            "a",
            "-o",
            "b",
            "--data-block-size",
            "4294967424",
        ],
        &["restore", "-i", "a", "-o", "b", "--nr-data-blocks", ""],
        &["ctl"],
        &["ctl", "a"],
        &["ctl", "a", "list"],
        &["ctl", "a", ""],
        &["ctl", "a", "create-thin"],
        &["ctl", "a", "create-thin", "1", "2"],
        &["ctl", "a", "create-thin", "16777216"],
        &["ctl", "a", "create-thin", "-1"],
        &["ctl", "a", "create-thin", "x"],
        &["ctl", "a", "create-thin", ""],
        &["ctl", "a", "create-snap", "1"],
        &["ctl", "a", "create-snap", "1", "2", "3"],
        &["ctl", "a", "create-snap", "1", "16777216"],
        &["ctl", "a", "delete"],
        &["ctl", "a", "delete", "1.5"],
        &["ctl", "a", "set-transaction-id", "1"],
        &[
            "ctl",
            "a",
            "set-transaction-id",
            "0",
            "18446744073709551616",
        ],
        &["ctl", "a", "set-transaction-id", "-1", "0"],
        &["ctl", "a", "reserve-metadata-snap", "1"],
        &["ctl", "a", "release-metadata-snap", "1"],
        &["ctl", "a", "resize", "5"],
        &["ctl", "a", "resize", "--data", "x"],
        &["ctl", "a", "resize", "--metadata=-1"],
        &["ctl", "a", "resize", "--json"],
        &["ctl", "a", "status", "1"],
        &["ctl", "a", "status", "--data", "1"],
        &["ctl", "a", "delete", "1", "--metadata", "1"],
        &["repair"],
        &["repair", "-i", "a"],
        &["repair", "-o", "a"],
        &["repair", "-i", "a", "-o", "b", "c", "d"],
        &["repair", "-i", "a", "-o", "b", "--transaction-id", "-3"],
        &["install-links"],
        &["completions"],
        &["completions", "tcsh"],
        &["man"],
    ];
    for args in lines {
        if *args == ["check", ""] {
            // An empty name is a name, of a file that does not exist.
            continue;
        }
        let finished = thintools(*args).run();
        not_broken(&finished, args);
        assert_eq!(finished.code, Some(2), "{args:?}: {finished:?}");
        assert_eq!(finished.stdout, b"", "{args:?}");
        assert!(!finished.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn flags_may_be_repeated_and_compatible_ones_are_accepted() {
    let bench = Bench::new();
    let image = bench.image.path();
    check(&["-q", "-q", "-v", "-vv", "--io-engine", "async"], image)
        .expect(0)
        .expect_silent();
    let plain = dump(&[], image).expect(0);
    let options = ["-q", "-q", "-v", "--io-engine=sync", "--skip-mappings"];
    assert!(dump(&options, image).expect(0).stdout.len() < plain.stdout.len());
}

#[test]
fn general_options_and_the_list_of_commands() {
    let help = thintools(["--help"]).run().expect(0);
    let list = thintools([] as [&str; 0]).run().expect(2);
    for (long, short) in TOOLS {
        assert!(help.out().contains(short), "{}", help.out());
        assert!(list.stderr.contains(long), "{}", list.stderr);
        let shown = thintools(["help", short]).run().expect(0).out();
        assert!(shown.contains("Usage: "), "{shown}");
    }
    let version = thintools(["--version"]).run().expect(0);
    assert!(version.out().contains(VERSION));
    assert_eq!((help.stderr.as_str(), version.stderr.as_str()), ("", ""));
}

#[test]
fn files_that_are_no_metadata_are_refused_by_every_command() {
    let bench = Bench::new();
    let place = folder();
    let xml = fs::read(&bench.xml).expect("readable");
    let mut spaced = b"\n  ".to_vec();
    spaced.extend_from_slice(&xml);
    spaced.resize(8192, b' ');
    let bad: [(&str, Vec<u8>); 8] = [
        ("empty", Vec::new()),
        ("one-byte", vec![b'x']),
        ("short", noise(4095)),
        ("zeros", vec![0; 4096]),
        ("noise", noise(4 << 20)),
        ("declared.xml", b"<?xml version=\"1.0\"?>\n".repeat(300)),
        ("dump.xml", xml),
        ("spaced.xml", spaced),
    ];
    // What to do instead, or what the file lacks.
    let next = [
        "thin_repair",
        "thin_restore",
        "is this the metadata device",
        "no <superblock>",
        "a tag is expected",
        "no XML",
        "not XML",
    ];
    let mut wrong = Complaints::default();
    for (name, contents) in bad {
        let path = place.path().join(name);
        fs::write(&path, &contents).expect("written");
        for (tool, _) in TOOLS {
            if tool == "thin_restore" && ["dump.xml", "spaced.xml"].contains(&name) {
                continue;
            }
            let before = bench.output.bytes();
            let finished = thintools(arguments(tool, &path, bench.output.path())).run();
            not_broken(&finished, &(tool, name));
            let said = &finished.stderr;
            let place = path.to_str().expect("plain");
            let is_placed = said.contains(place) || said.contains("block 0");
            let has_next = next.iter().any(|word| said.contains(word));
            let is_right = finished.code == Some(5) && finished.stdout.is_empty();
            wrong.unless(is_right && is_placed && has_next, &(tool, name), &finished);
            assert!(
                fs::read(&path).expect("readable") == contents,
                "{tool} changed {name}"
            );
            assert!(
                bench.output.bytes() == before,
                "{tool} {name} wrote to the output"
            );
        }
    }
    wrong.end();
}

#[test]
fn zeros_and_noise_are_told_apart() {
    let zeros = Image::from_bytes(&[0; 8192]);
    check(&[], zeros.path())
        .expect(5)
        .expect_stderr(&["superblock-zeroed", "format"]);
    let noise = Image::from_bytes(&noise(8192));
    check(&[], noise.path())
        .expect(5)
        .expect_stderr(&["superblock-checksum", "refuse"]);
}

#[test]
fn metadata_given_as_xml_is_recognised() {
    let bench = Bench::new();
    let before = bench.output.bytes();
    let compressed = bench.image.beside("dump.xml.zst");
    fs::write(
        &compressed,
        zstd_of(&fs::read(&bench.xml).expect("readable")),
    )
    .expect("written");
    let mut wrong = Complaints::default();
    for (input, words) in [
        (bench.image.path(), &["thin metadata", "binary metadata"]),
        (&compressed, &["compressed", "zstd"]),
    ] {
        let finished = restore(input, bench.output.path()).expect(5);
        finished
            .clone()
            .expect_stderr(&[input.to_str().expect("plain")]);
        assert!(bench.output.bytes() == before);
        let says = words.iter().any(|word| finished.stderr.contains(word));
        wrong.unless(says, &"what the input is", &finished);
    }
    wrong.end();
}

#[test]
fn inputs_that_are_no_regular_files() {
    let bench = Bench::new();
    let place = folder();
    let fifo = place.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo")
            .success()
    );
    let missing = place.path().join("missing");
    let below = bench.xml.join("below-a-file");
    let cases: [(&Path, i32); 5] = [
        (&missing, 1),
        (&below, 1),
        (place.path(), 5),
        (Path::new("/dev/null"), 5),
        (&fifo, 5),
    ];
    let mut wrong = Complaints::default();
    for (path, status) in cases {
        for (tool, _) in TOOLS {
            if tool == "thin_restore" && path == fifo {
                continue;
            }
            let before = bench.output.bytes();
            let finished = thintools(arguments(tool, path, bench.output.path())).run();
            not_broken(&finished, &(tool, path));
            wrong.unless(finished.code == Some(status), &(tool, path), &finished);
            assert_eq!(finished.stdout, b"", "{tool} {path:?}");
            finished.expect_stderr(&[path.to_str().expect("plain"), tool]);
            assert!(bench.output.bytes() == before, "{tool} {path:?}");
        }
    }
    wrong.end();
}

#[test]
fn outputs_that_cannot_hold_metadata_are_system_errors() {
    let bench = Bench::new();
    let place = folder();
    let fifo = place.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo")
            .success()
    );
    let missing = place.path().join("missing");
    let mut wrong = Complaints::default();
    for path in [&*missing, place.path(), Path::new("/dev/null"), &fifo] {
        for tool in ["thin_repair", "thin_restore"] {
            let finished = thintools(arguments(tool, bench.input(tool), path)).run();
            not_broken(&finished, &(tool, path));
            wrong.unless(finished.code == Some(1), &(tool, path), &finished);
            finished.expect_stderr(&[path.to_str().expect("plain"), tool]);
        }
    }
    assert!(!missing.exists());
    let image = bench.image.path();
    let directory = place.path().to_str().expect("plain");
    dump(&["-o", directory], image)
        .expect(1)
        .expect_stderr(&[directory]);
    let nowhere = missing.join("dump.xml");
    let nowhere = nowhere.to_str().expect("plain");
    dump(&["-o", nowhere], image)
        .expect(1)
        .expect_stderr(&[nowhere]);
    wrong.end();
}

#[test]
fn xml_from_pipes_is_restored() {
    let bench = Bench::new();
    let text = fs::read_to_string(&bench.xml).expect("readable");
    for input in ["-", "/dev/stdin"] {
        let output = Image::empty(1024);
        let args = [
            "restore",
            "-i",
            input,
            "-o",
            output.path().to_str().expect("plain"),
        ];
        thintools(args).stdin(text.clone()).run().expect(0);
        assert!(output.dumped() == Pool::read(&text));
    }
    let fifo = bench.image.beside("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo")
            .success()
    );
    let writer = {
        let (fifo, text) = (fifo.clone(), text.clone());
        std::thread::spawn(move || fs::write(fifo, text).expect("written"))
    };
    let output = Image::empty(1024);
    restore(&fifo, output.path()).expect(0);
    writer.join().expect("written");
    assert!(output.dumped() == Pool::read(&text));
}

#[test]
fn the_empty_name_is_the_name_of_no_file() {
    let bench = Bench::new();
    for (tool, _) in TOOLS {
        let output = bench.output.path();
        let finished = thintools(arguments(tool, Path::new(""), output)).run();
        not_broken(&finished, &tool);
        assert!(matches!(finished.code, Some(1 | 2)), "{tool}: {finished:?}");
        assert!(!finished.stderr.is_empty());
    }
}

#[test]
fn compressed_images_are_read_as_what_is_in_them() {
    let image = Image::of("needs-check-set/meta");
    let raw = image.bytes();
    let halves = raw.split_at(raw.len() / 2 + 77);
    let forms: [(&str, Vec<u8>); 5] = [
        ("meta.img.zst", zstd_of(&raw)),
        ("meta.img.gz", gzip_of(&raw)),
        ("meta.img.xz", xz_of(&raw)),
        (
            "frames.zst",
            [zstd_of(halves.0), zstd_of(halves.1)].concat(),
        ),
        ("members", [gzip_of(halves.0), gzip_of(halves.1)].concat()),
    ];
    let checked = check(&[], image.path());
    let json = check(&["--json"], image.path());
    let dumped = dump(&[], image.path());
    for (name, bytes) in forms {
        let path = image.beside(name);
        fs::write(&path, &bytes).expect("written");
        let ours = check(&[], &path);
        assert_eq!(
            (&ours.code, &ours.stdout),
            (&checked.code, &checked.stdout),
            "{name}"
        );
        assert_eq!(ours.stderr, checked.stderr, "{name}");
        assert_eq!(check(&["--json"], &path).stdout, json.stdout, "{name}");
        let ours = dump(&[], &path);
        assert_eq!(
            (&ours.code, &ours.stdout),
            (&dumped.code, &dumped.stdout),
            "{name}"
        );
        for option in ["--clear-needs-check-flag", "--auto-repair"] {
            let refused = check(&[option], &path).expect(1);
            assert_eq!(refused.out(), "");
            refused.expect_stderr(&["compressed", path.to_str().expect("plain")]);
        }
        assert!(
            fs::read(&path).expect("readable") == bytes,
            "{name} was changed"
        );
    }
}

#[test]
fn compressed_images_are_repaired_as_what_is_in_them() {
    let image = Image::of("snap-mix-a/meta");
    let path = image.beside("meta.img.zst");
    fs::write(&path, zstd_of(&image.bytes())).expect("written");
    let dumps = [image.path(), &path].map(|input| {
        let output = Image::empty(1024);
        thintools(arguments("thin_repair", input, output.path()))
            .run()
            .expect(0);
        dump(&[], output.path()).expect(0).stdout
    });
    assert!(dumps[0] == dumps[1]);
}

#[test]
fn broken_compressed_streams_are_errors() {
    let image = Image::of("snap-mix-a/meta");
    let raw = image.bytes();
    let (zstd, gzip) = (zstd_of(&raw), gzip_of(&raw));
    let cut = |bytes: &[u8]| bytes[..bytes.len() / 2].to_vec();
    let flipped = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle..middle + 40]
            .iter_mut()
            .for_each(|b| *b ^= 0x55);
        bytes
    };
    let forms: [(&str, Vec<u8>); 9] = [
        ("cut.zst", cut(&zstd)),
        ("cut.gz", cut(&gzip)),
        ("flipped.gz", flipped(&gzip)),
        ("magic.zst", zstd[..4].to_vec()),
        ("magic.gz", gzip[..2].to_vec()),
        ("garbage.zst", [&zstd[..4], &noise(5000)].concat()),
        ("garbage.gz", [&gzip[..3], &noise(5000)].concat()),
        ("nothing.zst", zstd_of(&[])),
        ("little.gz", gzip_of(&[1; 100])),
    ];
    for (name, bytes) in forms {
        let path = image.beside(name);
        fs::write(&path, &bytes).expect("written");
        for finished in [check(&[], &path), dump(&[], &path)] {
            not_broken(&finished, &name);
            assert!(matches!(finished.code, Some(1 | 5)), "{name}: {finished:?}");
            assert_eq!(finished.stdout, b"", "{name}");
            finished.expect_stderr(&[path.to_str().expect("plain")]);
        }
    }
}

#[test]
fn an_image_of_zeros_that_expands_to_a_gibibyte_needs_neither_memory_nor_disk() {
    // A frame of blocks that repeat one byte: 128 KiB in 4 bytes.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    let blocks = 8192;
    for block in 0..blocks {
        let header = u32::from(block == blocks - 1) | 1 << 1 | 131_072 << 3;
        bomb.extend_from_slice(&header.to_le_bytes()[..3]);
        bomb.push(0);
    }
    let image = Image::from_bytes(&bomb);
    let checked = check(&[], image.path())
        .expect(5)
        .expect_stderr(&["superblock-zeroed"]);
    assert!(checked.peak < 64 << 10, "{} KiB", checked.peak);
}

/// Says whether root runs the tests, by whom a folder it makes belongs to.
fn is_root(place: &Path) -> bool {
    fs::metadata(place).expect("readable").uid() == 0
}

/// Runs the binary as an ordinary user, whoever runs the tests, in a folder that this user can look into.
fn as_ordinary_user(place: &Path, args: &[OsString]) -> Finished {
    if !is_root(place) {
        return thintools(args).run();
    }
    fs::set_permissions(place, fs::Permissions::from_mode(0o755)).expect("opened");
    let binary = place.join("thintools");
    if !binary.exists() {
        copy_binary(&binary);
    }
    let mut all = strings(&["--reuid=65534", "--regid=65534", "--clear-groups"]);
    all.push(binary.into());
    all.extend_from_slice(args);
    program("setpriv", all).run()
}

#[test]
fn permissions_are_respected_and_told() {
    let place = folder();
    let at = |name: &str| place.path().join(name);
    let raw = expand("snap-mix-a/meta.img");
    let owner = is_root(place.path()).then_some(65534);
    for (name, mode) in [
        ("read-only", 0o400),
        ("unreadable", 0o000),
        ("write-only", 0o200),
        ("dump.xml", 0o400),
    ] {
        let path = at(name);
        if name == "dump.xml" {
            fs::write(&path, dump(&[], &at("read-only")).expect(0).stdout).expect("written");
        } else {
            fs::write(&path, &raw).expect("written");
        }
        std::os::unix::fs::chown(&path, owner, owner).expect("given");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("set");
    }
    let run = |args: &[&OsStr]| {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        as_ordinary_user(place.path(), &args)
    };
    let (read_only, unreadable, write_only) = (at("read-only"), at("unreadable"), at("write-only"));
    let word = OsStr::new;
    run(&[word("check"), read_only.as_ref()]).expect(0);
    assert!(
        run(&[word("dump"), read_only.as_ref()]).expect(0).stdout
            == fs::read(at("dump.xml")).expect("readable")
    );
    for option in ["--auto-repair", "--clear-needs-check-flag"] {
        run(&[word("check"), word(option), read_only.as_ref()])
            .expect(1)
            .expect_stderr(&["read-only", "ermission denied"]);
    }
    run(&[word("ctl"), read_only.as_ref(), word("status")]).expect(0);
    run(&[word("ctl"), read_only.as_ref(), word("delete"), word("1")])
        .expect(1)
        .expect_stderr(&["read-only", "ermission denied"]);
    for tool in ["check", "dump"] {
        for path in [&unreadable, &write_only] {
            run(&[word(tool), path.as_ref()])
                .expect(1)
                .expect_stderr(&[path.to_str().expect("plain"), "ermission denied"]);
        }
    }
    let xml = at("dump.xml");
    for output in [&read_only, &unreadable] {
        let finished = run(&[
            word("restore"),
            word("-i"),
            xml.as_ref(),
            word("-o"),
            output.as_ref(),
        ]);
        finished
            .expect(1)
            .expect_stderr(&[output.to_str().expect("plain"), "ermission denied"]);
    }
    // A folder that the user cannot write to.
    let closed = at("closed");
    fs::create_dir(&closed).expect("made");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).expect("set");
    let target = closed.join("dump.xml");
    run(&[
        word("dump"),
        word("-o"),
        target.as_ref(),
        read_only.as_ref(),
    ])
    .expect(1)
    .expect_stderr(&[target.to_str().expect("plain"), "ermission denied"]);
    for path in [&read_only, &unreadable, &write_only] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("set");
        assert!(
            fs::read(path).expect("readable") == raw,
            "{path:?} was changed"
        );
    }
}

#[test]
fn links_and_odd_names_are_followed() {
    let bench = Bench::new();
    let place = folder();
    let odd = place
        .path()
        .join(OsStr::from_bytes(b"odd \xff\xfe\n\"name\".img"));
    fs::copy(bench.image.path(), &odd).expect("copied");
    let link = place.path().join("link");
    symlink(&odd, &link).expect("linked");
    let wanted = fs::read(&bench.xml).expect("readable");
    for path in [&odd, &link] {
        check(&["-q"], path).expect(0).expect_silent();
        assert!(dump(&[], path).expect(0).stdout == wanted);
        let output = place.path().join(OsStr::from_bytes(b"out\xff.img"));
        let file = File::create(&output).expect("made");
        file.set_len(4 << 20).expect("sized");
        thintools(arguments("thin_repair", path, &output))
            .run()
            .expect(0);
        let xml = place.path().join(OsStr::from_bytes(b"dump\xff.xml"));
        let mut args = vec![OsString::from("dump"), path.into(), "-o".into()];
        args.push(xml.clone().into());
        thintools(args).run().expect(0);
        assert!(fs::read(&xml).expect("readable") == wanted);
        restore(&xml, &output).expect(0);
        let read = |text: &[u8]| Pool::read(std::str::from_utf8(text).expect("text"));
        assert!(read(&dump(&[], &output).expect(0).stdout) == read(&wanted));
    }
    // Through a link the file is replaced, not the link.
    let xml = place.path().join("dump.xml");
    fs::write(&xml, "old").expect("written");
    let to_xml = place.path().join("to-xml");
    symlink("dump.xml", &to_xml).expect("linked");
    dump(&["-o", to_xml.to_str().expect("plain")], &odd).expect(0);
    assert!(to_xml.is_symlink() && fs::read(&xml).expect("readable") == wanted);
    // A name like an option is a name behind two dashes.
    let script = "cd \"$1\" && cp \"$2\" ./-V && exec \"$0\" dump -- -V";
    let args = [OsStr::new("-c"), OsStr::new(script), OsStr::new(BINARY)];
    let args = args
        .into_iter()
        .chain([place.path().as_os_str(), odd.as_os_str()]);
    assert!(program("sh", args).run().expect(0).stdout == wanted);
}

#[test]
fn messages_about_odd_names_are_text() {
    let missing = folder().path().join(OsStr::from_bytes(b"\xff\xfe"));
    for (tool, _) in TOOLS {
        let finished = thintools(arguments(tool, &missing, &missing)).run();
        not_broken(&finished, &tool);
        assert_eq!(finished.code, Some(1), "{finished:?}");
    }
}

#[test]
fn a_quiet_check_says_nothing_whatever_it_finds() {
    let place = folder();
    let file = |name: &str, contents: &[u8]| {
        let path = place.path().join(name);
        fs::write(&path, contents).expect("written");
        path
    };
    let sound = expand("snap-mix-a/meta.img");
    let mut damaged = sound.clone();
    damaged[4096 * 7..].fill(0xff);
    let cases = [
        (file("sound", &sound), 0),
        (file("needs-check", &expand("needs-check-set/meta.img")), 0),
        (file("leak", &expand("crash-a/meta.img")), 3),
        (file("damaged", &damaged), 5),
        (file("zeros", &[0; 8192]), 5),
        (file("empty", &[]), 5),
        (file("dump.xml", b"<superblock"), 5),
        (place.path().join("missing"), 1),
        (place.path().to_owned(), 5),
    ];
    for (path, status) in cases {
        for options in [&["-q"][..], &["-q", "--json"], &["--quiet", "-v"]] {
            check(options, &path).expect(status).expect_silent();
        }
    }
}

/// Commands that print something on standard output when all is well.
fn talkative(bench: &Bench) -> Vec<Vec<OsString>> {
    let image = bench.image.path();
    let mut all: Vec<Vec<OsString>> = [
        &["check"][..],
        &["check", "--json"],
        &["dump"],
        &["dump", "-f", "json"],
        &["dump", "-f", "human_readable"],
        &["dump", "--skip-mappings"],
        &["dump", "--repair"],
    ]
    .iter()
    .map(|args| {
        let mut args = strings(args);
        args.push(image.into());
        args
    })
    .collect();
    for options in [&["--dry-run"][..], &[], &["--json", "-"]] {
        let mut args = strings(&["replay"]);
        args.extend(options.iter().map(OsString::from));
        args.push(testdata().join("../traces/oracle/fio-v3.iolog").into());
        all.push(args);
    }
    for option in [None, Some("--json")] {
        let mut args = strings(&["ctl"]);
        args.push(image.into());
        args.extend(["status"].into_iter().chain(option).map(OsString::from));
        all.push(args);
    }
    all.extend([
        strings(&["--help"]),
        strings(&["--version"]),
        strings(&["completions", "bash"]),
    ]);
    for (long, _) in TOOLS {
        all.extend([strings(&[long, "-V"]), strings(&[long, "--help"])]);
    }
    all
}

#[test]
fn output_lost_to_a_full_device_is_an_error() {
    let bench = Bench::new();
    let mut wrong = Complaints::default();
    for args in talkative(&bench) {
        let finished = redirected(">/dev/full", &args);
        not_broken(&finished, &args);
        let says = ["No space left", "output"]
            .iter()
            .all(|text| finished.stderr.contains(text));
        wrong.unless(finished.code == Some(1) && says, &args, &finished);
    }
    wrong.end();
}

/// Before `main` Rust's runtime puts /dev/null in place of a closed descriptor, so the loss cannot be seen.
#[test]
fn a_closed_descriptor_breaks_nothing() {
    let bench = Bench::new();
    for args in talkative(&bench) {
        not_broken(&redirected(">&-", &args), &args);
    }
}

#[test]
fn lost_messages_change_no_exit_status() {
    let bench = Bench::new();
    let empty = bench.image.beside("empty");
    File::create(&empty).expect("made");
    for (tool, _) in TOOLS {
        for redirection in ["2>&-", "2>/dev/full", "2>&- <&-"] {
            let finished = redirected(redirection, &bench.good(tool));
            not_broken(&finished, &(tool, redirection));
            assert_eq!(finished.code, Some(0), "{tool} {redirection}: {finished:?}");
            let wrong = redirected(redirection, &arguments(tool, &empty, bench.output.path()));
            assert_eq!(wrong.code, Some(5), "{tool} {redirection}: {wrong:?}");
            let usage = redirected(redirection, &strings(&[tool]));
            assert_eq!(usage.code, Some(2), "{tool} {redirection}: {usage:?}");
        }
        // Nothing must get into the files that are opened while standard streams are closed.
        let finished = redirected("<&- 2>&- >/dev/null", &bench.good(tool));
        assert_eq!(finished.code, Some(0), "{tool}: {finished:?}");
        check(&["-q"], bench.image.path()).expect(0);
    }
    check(&["-q"], bench.output.path()).expect(0);
}

/// Starts a command, reads `lines` lines of its output, closes the pipe, and returns what was read and how it ended.
fn read_lines(args: &[OsString], lines: usize) -> (String, Finished) {
    let mut child = Command::new(BINARY)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut read = String::new();
    {
        let mut out = BufReader::with_capacity(64, child.stdout.take().expect("piped"));
        for _ in 0..lines {
            out.read_line(&mut read).expect("text");
        }
    }
    let end = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().expect("waiting works") {
            break status;
        }
        if Instant::now() > end {
            child.kill().expect("killed");
            child.wait().expect("waiting works");
            panic!("{args:?} goes on without a reader");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .expect("piped")
        .read_to_string(&mut stderr)
        .expect("text");
    let finished = Finished {
        code: status.code(),
        signal: std::os::unix::process::ExitStatusExt::signal(&status),
        stdout: Vec::new(),
        stderr,
        peak: 0,
    };
    (read, finished)
}

#[test]
fn readers_that_go_away_cause_no_noise() {
    let big = Image::of("rand-20thins-10k/meta");
    for format in ["xml", "human_readable", "json"] {
        let mut args = strings(&["dump", "-f", format]);
        args.push(big.path().into());
        let (line, finished) = read_lines(&args, 1);
        assert!(line.ends_with('\n'), "{line}");
        assert_eq!(finished.stderr, "", "{format}");
        assert!(finished.code != Some(0), "{format}: {finished:?}");
    }
    // The output of these fits a pipe: whether they notice depends on who is faster.
    let bench = Bench::new();
    for args in talkative(&bench) {
        let (_, finished) = read_lines(&args, 0);
        assert!(
            !finished.stderr.contains("panicked"),
            "{args:?}: {finished:?}"
        );
        assert!(
            matches!(finished.code, Some(0 | 1)),
            "{args:?}: {finished:?}"
        );
        assert!(
            !finished.stderr.to_lowercase().contains("pipe"),
            "{args:?}: {finished:?}"
        );
    }
}

#[test]
fn lvm_activates_a_pool_after_its_check() {
    // The default of LVM's thin_check_options; anything but status 0 and LVM keeps the pool inactive.
    let options = ["-q", "--clear-needs-check-flag"];
    let sound = Image::of("snap-mix-a/meta");
    let before = sound.bytes();
    check(&options, sound.path()).expect(0).expect_silent();
    assert!(sound.bytes() == before, "sound metadata was written to");
    let flagged = Image::of("needs-check-set/meta");
    let before = flagged.dumped();
    assert!(flagged.superblock().needs_check());
    check(&options, flagged.path()).expect(0).expect_silent();
    assert!(!flagged.superblock().needs_check());
    assert!(flagged.dumped() == before);
    let damaged = Image::of("snap-mix-a/meta");
    damaged.edit_superblock(|s| s.flags = 1);
    let root = damaged.superblock().mapping_root.0;
    damaged.spoil_block(root, |block| block[100] ^= 1);
    let before = damaged.bytes();
    check(&options, damaged.path()).expect(5).expect_silent();
    assert!(damaged.bytes() == before);
}

#[test]
fn lvm_repairs_a_pool_and_reads_the_transaction_id() {
    let image = Image::of("held-root/meta");
    let output = Image::empty(1024);
    let mut args = arguments("thin_repair", image.path(), output.path());
    // Versions of lvconvert pass an argument that is empty.
    args.push("".into());
    thintools(args).run().expect(0);
    let (line, finished) = read_lines(&[OsString::from("thin_dump"), output.path().into()], 1);
    assert_eq!(finished.stderr, "");
    let id = image.superblock().transaction_id;
    assert!(id > 0);
    assert!(line.starts_with("<superblock "), "{line}");
    assert!(line.ends_with(">\n"), "the tag is not whole: {line}");
    assert!(line.contains(&format!(" transaction=\"{id}\"")), "{line}");
    check(&["-q", "--clear-needs-check-flag"], output.path())
        .expect(0)
        .expect_silent();
}

#[test]
fn lvm_reads_versions() {
    for (tool, _) in TOOLS {
        let out = thintools([tool, "-V"]).run().expect(0).out();
        let numbers: Vec<_> = out.trim_end().split('.').map(str::parse::<u32>).collect();
        assert!(
            numbers.len() == 3 && numbers.iter().all(Result::is_ok),
            "{out}"
        );
    }
}

#[test]
fn lvm_restores_from_a_file_that_is_open_but_deleted() {
    let bench = Bench::new();
    let text = fs::read_to_string(&bench.xml).expect("readable");
    let file = File::open(&bench.xml).expect("opened");
    fs::remove_file(&bench.xml).expect("removed");
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let output = Image::empty(1024);
    restore(Path::new(&path), output.path()).expect(0);
    assert!(output.dumped() == Pool::read(&text));
}

/// The files of a folder with what is in them.
fn files(folder: &Path) -> Vec<(OsString, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| {
            let entry = entry.expect("readable");
            (entry.file_name(), fs::read(entry.path()).expect("readable"))
        })
        .collect();
    files.sort();
    files
}

#[test]
fn manual_pages_are_those_of_the_repository() {
    let place = folder();
    let made = place.path().join("new/man8");
    thintools([OsStr::new("man"), made.as_os_str()])
        .run()
        .expect(0);
    let made = files(&made);
    assert_eq!(made.len(), 1 + LINKED);
    let kept = files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("man"));
    let names =
        |files: &[(OsString, Vec<u8>)]| files.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
    let advice = "run `thintools man man` in the repository";
    assert_eq!(names(&made), names(&kept), "{advice}");
    for (made, kept) in made.iter().zip(&kept) {
        assert!(made == kept, "{:?} is out of date: {advice}", made.0);
    }
}

#[test]
fn completions_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let finished = thintools(["completions", shell]).run().expect(0);
        assert_eq!(finished.stderr, "");
        let script = finished.out();
        for (long, _) in TOOLS {
            assert!(script.contains(long), "{shell}: {long}");
        }
        assert!(script.contains("clear-needs-check-flag"), "{shell}");
        if shell == "bash" {
            let place = folder();
            let path = place.path().join("script");
            fs::write(&path, script).expect("written");
            let parsed = program("bash", [OsStr::new("-n"), path.as_os_str()])
                .run()
                .expect(0);
            assert_eq!(parsed.stderr, "");
        }
    }
}

#[test]
fn links_are_installed_and_foreign_files_kept() {
    let place = folder();
    let bin = place.path().join("bin");
    fs::create_dir(&bin).expect("made");
    let install = |options: &[&str]| {
        let args = [OsStr::new("install-links"), bin.as_os_str()];
        let options = options.iter().map(OsStr::new);
        thintools(args.into_iter().chain(options).collect::<Vec<_>>()).run()
    };
    install(&[]).expect(0);
    let listed = files(&bin);
    assert_eq!(listed.len(), LINKED);
    for (tool, _) in TOOLS {
        let link = bin.join(tool);
        assert!(link.is_symlink());
        let version = program(link.to_str().expect("plain"), ["-V"])
            .run()
            .expect(0);
        assert_eq!(version.out(), format!("{VERSION}\n"));
    }
    // Again: nothing to do.
    install(&[]).expect(0);

    // A foreign file, a foreign link, a link to nowhere and a folder stay; the rest is made.
    for (tool, _) in TOOLS {
        fs::remove_file(bin.join(tool)).expect("removed");
    }
    fs::write(bin.join("thin_check"), "foreign").expect("written");
    symlink("/bin/true", bin.join("thin_dump")).expect("linked");
    symlink("nowhere", bin.join("thin_repair")).expect("linked");
    let finished = install(&[]).expect(1);
    finished.expect_stderr(&["thin_check", "thin_dump", "thin_repair", "--force"]);
    assert_eq!(
        fs::read(bin.join("thin_check")).expect("readable"),
        b"foreign"
    );
    assert_eq!(
        fs::read_link(bin.join("thin_dump")).expect("a link"),
        Path::new("/bin/true")
    );
    assert_eq!(
        fs::read_link(bin.join("thin_repair")).expect("a link"),
        Path::new("nowhere")
    );
    assert!(bin.join("thin_restore").is_symlink());

    fs::remove_file(bin.join("thin_restore")).expect("removed");
    fs::create_dir(bin.join("thin_restore")).expect("made");
    install(&["--force"])
        .expect(1)
        .expect_stderr(&["thin_restore", "directory"]);
    assert!(bin.join("thin_restore").is_dir());
    for tool in ["thin_check", "thin_dump", "thin_repair"] {
        let version = program(bin.join(tool).to_str().expect("plain"), ["-V"])
            .run()
            .expect(0);
        assert_eq!(version.out(), format!("{VERSION}\n"));
    }
    let left = fs::read_dir(&bin).expect("readable").count();
    assert_eq!(left, LINKED, "temporary links are left");

    let missing = place.path().join("missing");
    thintools([OsStr::new("install-links"), missing.as_os_str()])
        .run()
        .expect(1)
        .expect_stderr(&[missing.to_str().expect("plain")]);
}

#[test]
fn links_beside_the_binary_are_relative() {
    let place = folder();
    let binary = place.path().join("thintools");
    copy_binary(&binary);
    let args = [OsStr::new("install-links"), place.path().as_os_str()];
    program(binary.to_str().expect("plain"), args)
        .run()
        .expect(0);
    let target = fs::read_link(place.path().join("thin_check")).expect("a link");
    assert_eq!(target, Path::new("thintools"));
}

#[test]
fn the_readme_shows_what_is_printed() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(root.join("README.md")).expect("the README");
    for image in ["crash-a/meta.img.zst", "damaged/dmg-random-02.img.zst"] {
        let name = format!("testdata/kernel/{image}");
        assert!(readme.contains(&name), "{name}");
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_thintools"))
            .args(["check", &name])
            .current_dir(root)
            .output()
            .expect("runs");
        for text in [output.stdout, output.stderr] {
            let text = String::from_utf8(text).expect("text");
            assert!(readme.contains(text.trim_end()), "{name}: {text}");
        }
    }
    let name = "testdata/kernel/held-root/meta.img.zst";
    assert!(readme.contains(&format!("thintools ctl {name} status")));
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_thintools"))
        .args(["ctl", name, "status"])
        .current_dir(root)
        .output()
        .expect("runs");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(readme.contains(&text), "{name}: {text}");
}
