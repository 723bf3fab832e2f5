//! What happens when things go wrong: outputs that are inputs or too small, full disks, cut-off devices, blocks that cannot be
//! read or written, signals, numbers that nobody can allocate, devices in use, and random damage.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use thintools::ErrorKind;
use thintools::checksum;
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::thin::MARKER;
use thintools::thin::Superblock;
use thintools::tools::check::{self as checking, CheckOptions, Code, Severity};
use thintools::tools::event::Source;
use thintools::tools::repair::{Options, recover};
use thintools::tools::{
    MetadataSource, Selection, TextSink, Trees, XmlSource, restore as restoring, text,
};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

use crate::support::{
    BINARY, Finished, Image, Pool, check, damage_lines, dump, expand, expand_text, folder, program,
    put_u64, restore, thintools, thintools_within,
};

/// A pool of 23 devices with snapshots, 4 MiB.
const SMALL: &str = "snap-mix-a/meta";

/// `thin_repair -i INPUT -o OUTPUT`.
fn repair(input: &Path, output: &Path) -> Finished {
    let args = ["thin_repair".as_ref(), "-i".as_ref(), input.as_os_str()];
    thintools(args.into_iter().chain(["-o".as_ref(), output.as_os_str()])).run()
}

/// A dump in a file beside its image.
fn dump_file(image: &Image) -> PathBuf {
    let path = image.beside("dump.xml");
    fs::write(&path, dump(&[], image.path()).expect(0).stdout).expect("written");
    path
}

fn begins_with_marker(bytes: &[u8]) -> bool {
    bytes.starts_with(MARKER)
}

/// Fails unless block 0 is the marker of a write that was not finished, and a check says that this is no metadata.
#[track_caller]
fn is_marked(path: &Path) {
    assert!(begins_with_marker(&fs::read(path).expect("readable")));
    let finished = check(&[], path).expect(5);
    assert!(
        !finished.stderr.contains("superblock-zeroed"),
        "{}",
        finished.stderr
    );
    dump(&[], path).expect(5);
}

/// Names of files that a command must not leave behind.
fn left_over(place: &Path) -> Vec<OsString> {
    let names = fs::read_dir(place)
        .expect("readable")
        .map(|e| e.expect("readable").file_name());
    names
        .filter(|name| name.as_encoded_bytes().starts_with(b".thintools-"))
        .collect()
}

#[test]
fn an_output_that_is_the_input_is_refused() {
    let image = Image::of(SMALL);
    let xml = dump_file(&image);
    // Large enough that its size is no reason to refuse it.
    let mut text = fs::read(&xml).expect("readable");
    text.resize(8 << 20, b' ');
    fs::write(&xml, &text).expect("written");
    for (tool, input) in [
        ("restore", &xml),
        ("repair", &image.path().to_owned()),
        ("dump", &image.path().to_owned()),
    ] {
        let before = fs::read(input).expect("readable");
        let name = input.file_name().expect("a name");
        let (soft, hard) = (image.beside("soft"), image.beside("hard"));
        symlink(name, &soft).expect("linked");
        fs::hard_link(input, &hard).expect("linked");
        let roundabout = input.parent().expect("a folder").join(".").join(name);
        let relative = Path::new(name);
        for (from, to) in [
            (&**input, &**input),
            (input, &soft),
            (input, &hard),
            (&soft, input),
            (&hard, &soft),
            (input, &roundabout),
            (input, relative),
            (relative, input),
            (relative, relative),
        ] {
            let script = match tool {
                "dump" => "cd \"$1\" && exec \"$0\" \"$2\" -o \"$4\" \"$3\"",
                _ => "cd \"$1\" && exec \"$0\" \"$2\" -i \"$3\" -o \"$4\"",
            };
            let place = input.parent().expect("a folder");
            let args = [
                "-c".as_ref(),
                script.as_ref(),
                BINARY.as_ref(),
                place.as_os_str(),
            ];
            let args = args
                .into_iter()
                .chain([tool.as_ref(), from.as_os_str(), to.as_os_str()]);
            let finished = program("sh", args).run();
            assert_eq!(
                finished.code,
                Some(1),
                "{tool} {from:?} {to:?}: {finished:?}"
            );
            assert_eq!(finished.stdout, b"");
            finished.expect_stderr(&["is the input"]);
            assert!(
                fs::read(input).expect("readable") == before,
                "{tool} {from:?} {to:?}"
            );
        }
        assert!(soft.is_symlink());
        fs::remove_file(soft).expect("removed");
        fs::remove_file(hard).expect("removed");
    }
    assert_eq!(
        left_over(xml.parent().expect("a folder")),
        [] as [OsString; 0]
    );
}

#[test]
fn an_output_that_is_standard_input_is_refused() {
    let image = Image::of(SMALL);
    let xml = dump_file(&image);
    let mut text = fs::read(&xml).expect("readable");
    text.resize(8 << 20, b' ');
    fs::write(&xml, &text).expect("written");
    for input in ["/dev/stdin", "/proc/self/fd/0", "-"] {
        let script = "exec \"$0\" restore -i \"$1\" -o \"$2\" < \"$2\"";
        let args = [
            "-c".as_ref(),
            script.as_ref(),
            BINARY.as_ref(),
            input.as_ref(),
            xml.as_os_str(),
        ];
        let finished = program("sh", args).run();
        let is_same = fs::read(&xml).expect("readable") == text;
        assert!(
            is_same,
            "-i {input}: the input was overwritten: {finished:?}"
        );
        assert_eq!(finished.code, Some(1), "-i {input}: {finished:?}");
    }
}

/// The number of blocks that the message of an output too small says are needed.
#[track_caller]
fn needed(finished: &Finished) -> u64 {
    let (_, rest) = finished
        .stderr
        .split_once("needs ")
        .unwrap_or_else(|| panic!("{finished:?}"));
    rest.split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| panic!("{finished:?}"))
}

#[test]
fn an_output_too_small_is_refused_before_anything_is_written() {
    for name in [SMALL, "rand-1thin-70k/meta"] {
        let image = Image::of(name);
        let xml = dump_file(&image);
        for (tool, input) in [("restore", &*xml), ("repair", image.path())] {
            let run = |output: &Path| match tool {
                "restore" => restore(input, output),
                _ => repair(input, output),
            };
            let mut needs = 0;
            for bytes in [0, 1, 4096, 40_960, 40_960 + 4095] {
                let output = Image::from_bytes(&vec![0x5a; bytes]);
                let before = output.bytes();
                let finished = run(output.path());
                assert_eq!(
                    finished.code,
                    Some(1),
                    "{tool} {name} {bytes}: {finished:?}"
                );
                assert_eq!(finished.stdout, b"");
                let has = format!("{} blocks", bytes / BLOCK_SIZE);
                needs = needed(&finished);
                let bytes_needed = format!("{} bytes", needs * BLOCK_SIZE as u64);
                finished.expect_stderr(&[&has, &bytes_needed]);
                assert!(
                    output.bytes() == before,
                    "{tool} {name} {bytes}: it was written to"
                );
            }
            let length = usize::try_from(needs).expect("small") * BLOCK_SIZE;
            let output = Image::from_bytes(&vec![0x5a; length - 1]);
            let before = output.bytes();
            run(output.path()).expect(1).expect_stderr(&["blocks"]);
            assert!(
                output.bytes() == before,
                "{tool} {name}: one block too few was written to"
            );
            let output = Image::from_bytes(&vec![0x5a; length]);
            run(output.path()).expect(0);
            check(&["-q"], output.path()).expect(0);
            assert!(output.dumped() == image.dumped(), "{tool} {name}");
        }
    }
}

#[test]
fn bytes_past_the_last_whole_block_are_left_alone() {
    let image = Image::of(SMALL);
    let output = Image::from_bytes(&vec![0x5a; (4 << 20) + 100]);
    restore(&dump_file(&image), output.path()).expect(0);
    let bytes = output.bytes();
    assert_eq!(bytes.len(), (4 << 20) + 100);
    assert!(bytes[4 << 20..].iter().all(|&b| b == 0x5a));
    check(&["-q"], output.path()).expect(0);
}

/// A small file system of its own, gone with the value.
pub(crate) struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// None, with the reason printed, if none can be mounted here.
    pub(crate) fn new(size: &str) -> Option<Self> {
        let folder = folder();
        let options = format!("size={size},mode=1777");
        let args = ["-t", "tmpfs", "-o", &options, "thintools-test"];
        let mounted = Command::new("mount").args(args).arg(folder.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self { folder }),
            other => {
                println!("left out: no small file system can be mounted here: {other:?}");
                None
            }
        }
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(self.folder.path()).status();
        if !done.is_ok_and(|status| status.success()) {
            println!("cannot unmount {}", self.folder.path().display());
        }
    }
}

#[test]
fn a_dump_to_a_full_disk_leaves_the_old_file() {
    let Some(disk) = SmallDisk::new("64k") else {
        return;
    };
    let image = Image::of("rand-20thins-10k/meta");
    let target = disk.path().join("dump.xml");
    let option = ["-o", target.to_str().expect("plain")];
    for old in [None, Some("the old dump")] {
        if let Some(old) = old {
            fs::write(&target, old).expect("written");
        }
        let finished = dump(&option, image.path()).expect(1);
        finished.expect_stderr(&["No space left", "thin_dump"]);
        assert_eq!(fs::read_to_string(&target).ok().as_deref(), old);
        assert_eq!(left_over(disk.path()), [] as [OsString; 0]);
    }
}

#[test]
fn a_restore_to_a_full_disk_is_never_taken_for_metadata() {
    let image = Image::of("rand-20thins-10k/meta");
    let xml = dump_file(&image);
    for (size, tool) in [("512k", "restore"), ("64k", "restore"), ("512k", "repair")] {
        let Some(disk) = SmallDisk::new(size) else {
            return;
        };
        let output = disk.path().join("meta.img");
        File::create(&output)
            .and_then(|f| f.set_len(16 << 20))
            .expect("made");
        let finished = match tool {
            "restore" => restore(&xml, &output),
            _ => repair(image.path(), &output),
        };
        assert_eq!(finished.code, Some(1), "{finished:?}");
        assert_eq!(finished.stdout, b"");
        finished.expect_stderr(&["No space left"]);
        is_marked(&output);
    }
}

#[test]
fn a_restore_that_cannot_even_write_block_0_changes_nothing() {
    let Some(disk) = SmallDisk::new("64k") else {
        return;
    };
    let image = Image::of(SMALL);
    let xml = dump_file(&image);
    fs::write(disk.path().join("filler"), vec![1; 64 << 10]).expect("filled");
    let output = disk.path().join("meta.img");
    File::create(&output)
        .and_then(|f| f.set_len(16 << 20))
        .expect("made");
    restore(&xml, &output)
        .expect(1)
        .expect_stderr(&["No space left"]);
    assert!(fs::read(&output).expect("readable").iter().all(|&b| b == 0));
}

#[test]
fn a_full_folder_for_temporary_files_is_told() {
    let Some(disk) = SmallDisk::new("64k") else {
        return;
    };
    let image = Image::of("rand-20thins-10k/meta");
    let compressed = image.beside("meta.img.zst");
    fs::write(
        &compressed,
        zstd::encode_all(&*image.bytes(), 1).expect("compressed"),
    )
    .expect("written");
    for tool in ["check", "dump"] {
        let args = [OsStr::new(tool), compressed.as_os_str()];
        let finished = thintools(args).env("TMPDIR", disk.path()).run().expect(1);
        assert_eq!(finished.stdout, b"");
        finished.expect_stderr(&["TMPDIR", "No space left"]);
    }
    let output = Image::from_bytes(&vec![0x5a; 16 << 20]);
    let args = [
        "restore",
        "-i",
        "-",
        "-o",
        output.path().to_str().expect("plain"),
    ];
    let text = dump(&[], image.path()).expect(0).stdout;
    thintools(args)
        .env("TMPDIR", disk.path())
        .stdin(text)
        .run()
        .expect(1)
        .expect_stderr(&["TMPDIR", "No space left"]);
    assert!(output.bytes().iter().all(|&b| b == 0x5a));
    assert_eq!(fs::read_dir(disk.path()).expect("readable").count(), 0);
}

#[test]
fn a_limit_of_file_sizes_is_an_error_like_any_other() {
    let image = Image::of("rand-20thins-10k/meta");
    let target = image.beside("dump.xml");
    fs::write(&target, "the old dump").expect("written");
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" dump -o \"$1\" \"$2\"";
    let args = [
        "-c".as_ref(),
        script.as_ref(),
        BINARY.as_ref(),
        target.as_os_str(),
        image.path().as_os_str(),
    ];
    program("sh", args)
        .run()
        .expect(1)
        .expect_stderr(&["File too large"]);
    assert_eq!(fs::read(&target).expect("readable"), b"the old dump");
    assert_eq!(
        left_over(target.parent().expect("a folder")),
        [] as [OsString; 0]
    );
}

#[test]
fn metadata_cut_short_is_never_dumped_as_if_it_were_whole() {
    for name in [SMALL, "rand-1thin-70k/meta"] {
        let image = Image::of(name);
        let whole = dump(&[], image.path()).expect(0).stdout;
        let blocks = image.bytes().len() as u64 / BLOCK_SIZE as u64;
        let cuts = [
            1,
            2,
            3,
            7,
            8,
            12,
            16,
            20,
            24,
            28,
            32,
            64,
            100,
            blocks / 2,
            blocks - 1,
        ];
        for cut in cuts.into_iter().rev() {
            image.resize(cut);
            let checked = check(&[], image.path());
            assert_eq!(checked.code, Some(5), "{name} {cut}: {checked:?}");
            assert!(!checked.stderr.contains("panicked"), "{checked:?}");
            let lines = damage_lines(&checked.stderr);
            assert!(
                lines.iter().any(|l| l.1 == "device-too-small" && l.2 == 0),
                "{name} {cut}: {lines:?}"
            );
            let dumped = dump(&[], image.path());
            assert!(
                !dumped.stderr.contains("panicked") && dumped.signal.is_none(),
                "{dumped:?}"
            );
            if dumped.code == Some(0) {
                // Nothing that is in use was cut off.
                assert!(
                    cut > 16 && dumped.stdout == whole,
                    "{name} {cut}: an incomplete dump"
                );
                continue;
            }
            assert!(
                matches!(dumped.code, Some(1 | 5)),
                "{name} {cut}: {dumped:?}"
            );
            assert!(!dumped.out().contains("</superblock>"), "{name} {cut}");
            assert!(!dumped.stderr.is_empty());
            let target = image.beside("dump.xml");
            let option = ["-o", target.to_str().expect("plain")];
            assert_eq!(dump(&option, image.path()).code, dumped.code);
            assert!(!target.exists());
            let output = Image::from_bytes(&vec![0x5a; 16 << 20]);
            let repaired = repair(image.path(), output.path());
            assert!(
                matches!(repaired.code, Some(4 | 5)),
                "{name} {cut}: {repaired:?}"
            );
            if repaired.code == Some(5) {
                assert!(output.bytes().iter().all(|&b| b == 0x5a), "{name} {cut}");
            } else {
                check(&["-q"], output.path()).expect(0);
            }
        }
    }
}

/// Metadata in memory that remembers which blocks were read, and fails where it is told to.
struct Faulty {
    inner: RamEngine,
    /// Blocks that cannot be read.
    unreadable: BTreeSet<u64>,
    /// Blocks read so far.
    read: Mutex<BTreeSet<u64>>,
    /// Writes and flushes so far.
    changes: AtomicU64,
    /// The first write or flush that fails; those after it fail too.
    fails_from: u64,
}

impl Faulty {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            inner: RamEngine::from_bytes(bytes),
            unreadable: BTreeSet::new(),
            read: Mutex::default(),
            changes: AtomicU64::new(0),
            fails_from: u64::MAX,
        }
    }

    fn change(&self) -> io::Result<()> {
        if self.changes.fetch_add(1, Ordering::SeqCst) >= self.fails_from {
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }
}

impl BlockEngine for Faulty {
    fn nr_blocks(&self) -> u64 {
        self.inner.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        let blocks = start.0..start.0 + (buf.len() / BLOCK_SIZE) as u64;
        if self.unreadable.range(blocks.clone()).next().is_some() {
            return Err(io::Error::from_raw_os_error(5));
        }
        self.inner.read(start, buf)?;
        self.read.lock().expect("no panic").extend(blocks);
        Ok(())
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        self.change()?;
        self.inner.write(start, buf)
    }

    fn sync(&self) -> io::Result<()> {
        self.change()
    }

    fn depth(&self) -> usize {
        2
    }
}

/// The whole dump, by the library.
fn dumped(engine: &dyn BlockEngine) -> thintools::Result<Vec<u8>> {
    let superblock = Superblock::read(engine)?;
    let nr_data_blocks = superblock.data_space_map.nr_blocks;
    let source = MetadataSource {
        engine,
        trees: Trees::read(engine, &superblock, nr_data_blocks, &Silent)?,
        selection: Selection::default(),
        recovered: None,
        observer: &Silent,
    };
    let mut out = Vec::new();
    source.emit(&mut TextSink::new(&mut out, &text::Xml))?;
    Ok(out)
}

/// What can be recovered, dumped by the library.
fn recovered(engine: &dyn BlockEngine) -> thintools::Result<Vec<u8>> {
    let recovery = recover(engine, &Options::default(), &Silent)?;
    let mut out = Vec::new();
    let source = recovery.source(Selection::default(), &Silent);
    source.emit(&mut TextSink::new(&mut out, &text::Xml))?;
    Ok(out)
}

/// The blocks in use: those that have a seal.
fn sealed_blocks(bytes: &[u8]) -> Vec<u64> {
    let blocks = bytes.chunks_exact(BLOCK_SIZE).enumerate();
    blocks
        .filter(|(_, block)| checksum::identify(block).is_some())
        .map(|(at, _)| at as u64)
        .collect()
}

#[test]
fn a_block_that_cannot_be_read_is_reported_and_the_check_goes_on() {
    let bytes = expand("snap-mix-a/meta.img");
    let options = CheckOptions::default();
    let sound =
        checking::check(&RamEngine::from_bytes(bytes.clone()), &options, &Silent).expect("checked");
    assert!(
        sound
            .report
            .damages
            .iter()
            .all(|d| d.severity == Severity::Note)
    );
    let mut noticed = 0;
    let mut invented: Vec<String> = Vec::new();
    for block in sealed_blocks(&bytes) {
        let engine = Faulty {
            unreadable: BTreeSet::from([block]),
            ..Faulty::new(bytes.clone())
        };
        let checked = checking::check(&engine, &options, &Silent);
        if block == 0 {
            let kind = checked.map(|_| ()).map_err(|e| e.kind());
            assert_eq!(kind, Err(ErrorKind::Io));
            continue;
        }
        let report = checked.expect("a report").report;
        let failed: Vec<u64> = report
            .damages
            .iter()
            .filter(|d| d.code == Code::ReadError)
            .map(|d| d.block.0)
            .collect();
        if failed.is_empty() {
            // An old copy that nothing refers to any more.
            assert!(
                report.damages.iter().all(|d| d.severity == Severity::Note),
                "{block}: {report:?}"
            );
            continue;
        }
        noticed += 1;
        assert_eq!(failed, [block], "{report:?}");
        assert_eq!(report.verdict.severity, Some(Severity::Fatal));
        assert!(
            report.verdict.next.contains("ddrescue"),
            "{}",
            report.verdict.next
        );
        // What is behind the block is out of reach; nothing else is damaged.
        let others = report.damages.iter().filter(|d| d.code != Code::ReadError);
        for other in others {
            let is_consequence =
                other.severity == Severity::Note || other.message.contains("out of reach");
            if !is_consequence {
                invented.push(format!("block {block} cannot be read: {other}"));
            }
        }
    }
    assert!(noticed >= 28, "{noticed} blocks are needed");
    assert!(invented.is_empty(), "{}", invented.join("\n"));
}

#[test]
fn several_blocks_that_cannot_be_read_are_all_reported() {
    let image = Image::of("rand-20thins-10k/meta");
    let bytes = image.bytes();
    let roots: BTreeSet<u64> = (0..20)
        .filter_map(|id| catch_unwind(AssertUnwindSafe(|| image.device_root(id))).ok())
        .collect();
    let leaves: BTreeSet<u64> = roots.iter().map(|&root| image.first_leaf(root)).collect();
    assert!(leaves.len() >= 10, "{leaves:?}");
    let engine = Faulty {
        unreadable: leaves.clone(),
        ..Faulty::new(bytes)
    };
    let report = checking::check(&engine, &CheckOptions::default(), &Silent)
        .expect("a report")
        .report;
    let failed: BTreeSet<u64> = report
        .damages
        .iter()
        .filter(|d| d.code == Code::ReadError)
        .map(|d| d.block.0)
        .collect();
    assert_eq!(failed, leaves);
}

#[test]
fn a_block_that_cannot_be_read_ends_a_dump_with_an_io_error() {
    let bytes = expand("snap-mix-a/meta.img");
    let sound = Faulty::new(bytes.clone());
    let whole = dumped(&sound).expect("dumped");
    let read = sound.read.into_inner().expect("no panic");
    let mut failures = 0;
    for block in sealed_blocks(&bytes)
        .into_iter()
        .filter(|block| read.contains(block))
    {
        let engine = Faulty {
            unreadable: BTreeSet::from([block]),
            ..Faulty::new(bytes.clone())
        };
        match dumped(&engine) {
            // Read on the way to other blocks only.
            Ok(text) => assert!(text == whole, "block {block}"),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Io, "block {block}: {e}");
                assert!(e.to_string().contains(&format!("block {block}")), "{e}");
                failures += 1;
            }
        }
    }
    assert!(failures >= 20, "{failures} blocks are needed");
}

#[test]
fn a_repair_reads_around_blocks_that_cannot_be_read() {
    let bytes = expand("snap-mix-a/meta.img");
    let top = Image::of(SMALL).superblock().mapping_root.0;
    for block in sealed_blocks(&bytes) {
        let engine = Faulty {
            unreadable: BTreeSet::from([block]),
            ..Faulty::new(bytes.clone())
        };
        if let Err(e) = recovered(&engine) {
            // Which older top-level tree to take, if any, is for the user to say.
            assert_eq!(e.kind(), ErrorKind::Damaged, "block {block}: {e}");
            assert!([0, top].contains(&block), "block {block}: {e}");
        }
    }
}

#[test]
fn a_restore_that_fails_at_any_write_leaves_no_superblock() {
    let image = Image::of(SMALL);
    let xml = dump_file(&image);
    let restored = |engine: &Faulty| {
        let source = XmlSource::open(&xml, &Silent).expect("opened");
        restoring(&source, engine, &Silent).map(|_| ())
    };
    let old = image.bytes();
    let engine = Faulty::new(old.clone());
    restored(&engine).expect("restored");
    let changes = engine.changes.into_inner();
    assert!(changes >= 5, "{changes} writes and flushes");
    for fails_from in 0..changes {
        let engine = Faulty {
            fails_from,
            ..Faulty::new(old.clone())
        };
        let error = restored(&engine).expect_err("it failed");
        assert_eq!(error.kind(), ErrorKind::Io, "change {fails_from}: {error}");
        let bytes = engine.inner.into_bytes();
        if fails_from == 0 {
            assert!(bytes == old);
        } else if fails_from == changes - 1 {
            // Only the last flush failed: everything is written, and the user knows that it may not last.
            continue;
        } else {
            assert!(begins_with_marker(&bytes), "change {fails_from}");
        }
    }
}

/// A command under way.
struct Running(Child);

impl Running {
    fn start(args: &[&OsStr], stdin: Stdio, stdout: Stdio) -> Self {
        let child = Command::new(BINARY)
            .args(args)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        Self(child)
    }

    fn signal(&self, signal: &str) {
        let script = format!("kill -s {signal} {}", self.0.id());
        let sent = Command::new("sh").args(["-c", &script]).status();
        assert!(sent.expect("sh").success(), "{script}");
    }

    fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("waiting works").is_none()
    }

    /// Waits for the end, which must come within `limit`; returns status and standard error.
    #[track_caller]
    fn ends_within(mut self, limit: Duration) -> (Option<i32>, String) {
        let end = Instant::now() + limit;
        while self.is_running() {
            assert!(
                Instant::now() < end,
                "it goes on {limit:?} after the signal"
            );
            thread::sleep(Duration::from_millis(2));
        }
        let status = self.0.wait().expect("ended");
        let mut stderr = String::new();
        if let Some(mut from) = self.0.stderr.take() {
            io::Read::read_to_string(&mut from, &mut stderr).expect("text");
        }
        assert!(!stderr.contains("panicked"), "{stderr}");
        (status.code().or(status.signal().map(|s| -s)), stderr)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended in most cases.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How long a command may go on after a signal.
const PROMPT: Duration = Duration::from_secs(30);

/// Metadata whose dump without sharing has millions of lines: devices that share 70000 mappings.
fn much_shared(devices: u32) -> Image {
    let text = expand_text("rand-1thin-70k/meta.dump-1.3.3.xml");
    let (head, rest) = text.split_once("  <device ").expect("a device");
    let (_, rest) = rest.split_once('\n').expect("a line");
    let (mappings, _) = rest.split_once("  </device>").expect("an end");
    let count: u64 = mappings
        .lines()
        .map(|line| match line.split_once("length=\"") {
            Some((_, rest)) => rest
                .split('"')
                .next()
                .and_then(|n| n.parse().ok())
                .expect("a number"),
            None => 1,
        })
        .sum();
    let mut xml = format!("{head}  <def name=\"all\">\n{mappings}  </def>\n");
    for id in 1..=devices {
        xml += &format!(
            "  <device dev_id=\"{id}\" mapped_blocks=\"{count}\" transaction=\"0\" creation_time=\"0\" \
             snap_time=\"0\">\n    <ref name=\"all\"/>\n  </device>\n"
        );
    }
    xml += "</superblock>\n";
    Image::restored(&xml, 4096)
}

#[test]
fn an_interrupted_dump_to_a_slow_reader_ends_promptly() {
    let mut stuck: Vec<(&str, bool)> = Vec::new();
    let image = Image::of("rand-20thins-10k/meta");
    for (signal, is_stalled) in [("INT", false), ("INT", true), ("TERM", true), ("HUP", true)] {
        let args = ["dump".as_ref(), image.path().as_os_str()];
        let mut running = Running::start(&args, Stdio::null(), Stdio::piped());
        let mut out = running.0.stdout.take().expect("piped");
        let mut chunk = vec![0; 4096];
        io::Read::read_exact(&mut out, &mut chunk).expect("output");
        thread::sleep(Duration::from_millis(300));
        assert!(running.is_running());
        running.signal(signal);
        // Keep the pipe open; a slow reader goes on, a stalled one does nothing at all.
        let (stop, stopped) = channel::<()>();
        let reader = thread::spawn(move || {
            while stopped.recv_timeout(Duration::from_millis(20))
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                if !is_stalled {
                    let _ = io::Read::read(&mut out, &mut chunk);
                }
            }
        });
        let end = Instant::now() + PROMPT;
        while running.is_running() && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        if running.is_running() {
            stuck.push((signal, is_stalled));
        } else {
            let (code, stderr) = running.ends_within(PROMPT);
            assert_eq!(code, Some(130), "{signal}, stalled: {is_stalled}: {stderr}");
        }
        drop(stop);
        reader.join().expect("no panic");
    }
    assert_eq!(
        stuck,
        [],
        "these go on after the signal (the flag is: nobody reads)"
    );
}

#[test]
fn an_interrupted_dump_to_a_file_leaves_the_old_file() {
    let image = much_shared(200);
    let place = folder();
    let target = place.path().join("dump.xml");
    fs::write(&target, "the old dump").expect("written");
    for signal in ["INT", "TERM", "HUP"] {
        let args = [
            "dump".as_ref(),
            "--no-shared".as_ref(),
            "-o".as_ref(),
            target.as_os_str(),
            image.path().as_os_str(),
        ];
        let mut running = Running::start(&args, Stdio::null(), Stdio::null());
        let end = Instant::now() + Duration::from_secs(60);
        while left_over(place.path()).is_empty() {
            assert!(
                running.is_running() && Instant::now() < end,
                "no temporary file was seen"
            );
            thread::sleep(Duration::from_millis(1));
        }
        running.signal(signal);
        let (code, stderr) = running.ends_within(PROMPT);
        assert_eq!(code, Some(130), "{stderr}");
        assert_eq!(left_over(place.path()), [] as [OsString; 0]);
        assert_eq!(fs::read(&target).expect("readable"), b"the old dump");
    }
}

#[test]
fn an_interrupted_restore_leaves_the_old_metadata_the_marker_or_the_result() {
    let image = much_shared(20);
    let xml = image.beside("big.xml");
    let option = ["--no-shared", "-o", xml.to_str().expect("plain")];
    dump(&option, image.path()).expect(0);
    let old = expand("snap-mix-a/meta.img");
    let mut marked = 0;
    for (signal, at_marker) in [
        ("INT", true),
        ("TERM", true),
        ("KILL", true),
        ("INT", false),
    ] {
        let output = Image::from_bytes(&old);
        output.resize(32_768);
        let before = output.block(0);
        let args = [
            "restore".as_ref(),
            "-i".as_ref(),
            xml.as_os_str(),
            "-o".as_ref(),
            output.path().as_os_str(),
        ];
        let mut running = Running::start(&args, Stdio::null(), Stdio::null());
        if at_marker {
            while running.is_running() && output.block(0) == before {
                thread::sleep(Duration::from_micros(200));
            }
        } else {
            thread::sleep(Duration::from_millis(20));
        }
        if running.is_running() {
            running.signal(signal);
        }
        let (code, stderr) = running.ends_within(PROMPT);
        let head = output.block(0);
        if begins_with_marker(&head) {
            assert!(
                matches!(code, Some(130 | -9)),
                "{signal}: {code:?} {stderr}"
            );
            is_marked(output.path());
            marked += 1;
        } else if head == before {
            assert!(
                matches!(code, Some(130 | -9)),
                "{signal}: {code:?} {stderr}"
            );
            assert!(!at_marker);
            assert!(
                output.bytes()[..old.len()] == old,
                "the old metadata was changed"
            );
        } else {
            check(&["-q"], output.path()).expect(0);
        }
    }
    assert!(marked > 0, "no restore was interrupted while it wrote");
}

#[test]
fn commands_that_wait_for_a_pipe_can_be_interrupted() {
    let image = Image::of(SMALL);
    let fifo = image.beside("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .expect("mkfifo")
            .success()
    );
    let output = Image::from_bytes(&vec![0x5a; 4 << 20]);
    let restored = |input: &'static str| {
        [
            "restore".as_ref(),
            "-i".as_ref(),
            OsStr::new(input),
            "-o".as_ref(),
            output.path().as_os_str(),
        ]
    };
    let calls: [(&str, Vec<&OsStr>); 3] = [
        ("input piped in", restored("-").to_vec()),
        (
            "input of a named pipe",
            vec![
                "restore".as_ref(),
                "-i".as_ref(),
                fifo.as_os_str(),
                "-o".as_ref(),
                output.path().as_os_str(),
            ],
        ),
        (
            "output to a named pipe",
            vec![
                "dump".as_ref(),
                "-o".as_ref(),
                fifo.as_os_str(),
                image.path().as_os_str(),
            ],
        ),
    ];
    let mut stuck = Vec::new();
    for (what, args) in calls {
        let mut running = Running::start(&args, Stdio::piped(), Stdio::null());
        let _stdin = running.0.stdin.take();
        thread::sleep(Duration::from_millis(300));
        assert!(running.is_running(), "{what}");
        running.signal("INT");
        let end = Instant::now() + PROMPT;
        while running.is_running() && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        if running.is_running() {
            stuck.push(what);
        } else {
            assert_eq!(running.ends_within(PROMPT).0, Some(130), "{what}");
        }
    }
    assert_eq!(stuck, [] as [&str; 0], "these go on after SIGINT");
    assert!(output.bytes().iter().all(|&b| b == 0x5a));
}

#[test]
fn the_expansion_of_a_compressed_image_can_be_interrupted() {
    // 128 KiB of zeros in 4 bytes, 32 GiB in all: seconds of work.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    for _ in 0..260_000 {
        let header: u32 = 1 << 1 | 131_072 << 3;
        bomb.extend_from_slice(&header.to_le_bytes()[..3]);
        bomb.push(0);
    }
    let image = Image::from_bytes(&bomb);
    let args = ["check".as_ref(), image.path().as_os_str()];
    let mut running = Running::start(&args, Stdio::null(), Stdio::null());
    thread::sleep(Duration::from_millis(300));
    assert!(running.is_running());
    running.signal("INT");
    assert_eq!(running.ends_within(PROMPT).0, Some(130));
}

/// Limit of the address space for hostile numbers, in MiB.
const MEMORY: u64 = 512;
const HOSTILE_TIME: Duration = Duration::from_secs(60);

#[track_caller]
fn bounded(args: &[&OsStr], allowed: &[i32]) -> Finished {
    let finished = thintools_within(MEMORY, args).timeout(HOSTILE_TIME).run();
    assert!(
        finished.signal.is_none() && !finished.stderr.contains("panicked"),
        "{args:?}: {finished:?}"
    );
    assert!(
        finished.code.is_some_and(|code| allowed.contains(&code)),
        "{args:?}: {finished:?}"
    );
    finished
}

const HOSTILE: [u64; 6] = [
    1 << 32,
    1 << 40,
    (1 << 40) + 1,
    1 << 60,
    u64::MAX - 1,
    u64::MAX,
];

#[test]
fn space_maps_of_impossible_sizes_need_no_memory() {
    for number in HOSTILE {
        for is_data in [true, false] {
            let image = Image::of(SMALL);
            image.edit_superblock(|s| {
                let map = if is_data {
                    &mut s.data_space_map
                } else {
                    &mut s.metadata_space_map
                };
                map.nr_blocks = number;
            });
            let before = image.bytes();
            let path = image.path().as_os_str();
            let output = Image::from_bytes(&vec![0x5a; 4 << 20]);
            bounded(&["check".as_ref(), path], &[5]);
            bounded(&["check".as_ref(), "--json".as_ref(), path], &[5]);
            bounded(&["check".as_ref(), "--auto-repair".as_ref(), path], &[5]);
            bounded(
                &["check".as_ref(), "--skip-mappings".as_ref(), path],
                &[0, 5],
            );
            bounded(&["dump".as_ref(), path], &[0, 5]);
            bounded(&["dump".as_ref(), "--repair".as_ref(), path], &[0, 4, 5]);
            let args = [
                "repair".as_ref(),
                "-i".as_ref(),
                path,
                "-o".as_ref(),
                output.path().as_os_str(),
            ];
            let repaired = bounded(&args, &[0, 1, 4, 5]);
            if matches!(repaired.code, Some(0 | 4)) {
                check(&["-q"], output.path()).expect(0);
            } else {
                assert!(output.bytes().iter().all(|&b| b == 0x5a));
            }
            assert!(image.bytes() == before);
        }
    }
}

#[test]
fn counters_and_roots_of_impossible_sizes_are_damage() {
    for number in HOSTILE {
        for field in 0..9 {
            let image = Image::of(SMALL);
            image.edit_superblock(|s| match field {
                0 => s.data_space_map.nr_allocated = number,
                1 => s.metadata_space_map.nr_allocated = number,
                2 => s.data_space_map.bitmap_root.0 = number,
                3 => s.data_space_map.ref_count_root.0 = number,
                4 => s.metadata_space_map.bitmap_root.0 = number,
                5 => s.metadata_space_map.ref_count_root.0 = number,
                6 => s.mapping_root.0 = number,
                7 => s.details_root.0 = number,
                _ => s.held_root.0 = number,
            });
            let path = image.path().as_os_str();
            bounded(
                &["check".as_ref(), path],
                if field < 2 { &[4] } else { &[4, 5] },
            );
            bounded(&["check".as_ref(), "-m".as_ref(), path], &[1, 5]);
            bounded(&["dump".as_ref(), path], &[0, 5]);
            bounded(&["dump".as_ref(), "-m".as_ref(), path], &[1, 5]);
            bounded(&["dump".as_ref(), "--repair".as_ref(), path], &[0, 4, 5]);
        }
    }
}

#[test]
fn options_of_impossible_sizes_are_errors() {
    let image = Image::of(SMALL);
    let xml = dump_file(&image);
    let path = image.path().as_os_str();
    let output = Image::from_bytes(&vec![0x5a; 4 << 20]);
    for number in HOSTILE {
        let option = |name: &str| OsString::from(format!("{name}={number}"));
        bounded(
            &["check".as_ref(), &option("--override-mapping-root"), path],
            &[5],
        );
        bounded(
            &["check".as_ref(), &option("--override-details-root"), path],
            &[5],
        );
        bounded(
            &["dump".as_ref(), &option("--metadata-snap"), path],
            &[1, 5],
        );
        bounded(&["dump".as_ref(), &option("--dev-id"), path], &[1]);
        bounded(
            &["dump".as_ref(), &option("--nr-data-blocks"), path],
            &[0, 1, 5],
        );
        bounded(&["dump".as_ref(), &option("--transaction-id"), path], &[0]);
        let size = option("--nr-data-blocks");
        let args = [
            "restore".as_ref(),
            "-i".as_ref(),
            xml.as_os_str(),
            "-o".as_ref(),
            output.path().as_os_str(),
            &size,
        ];
        bounded(&args, &[1, 5]);
        let args = [
            "repair".as_ref(),
            "-i".as_ref(),
            path,
            "-o".as_ref(),
            output.path().as_os_str(),
            &size,
        ];
        bounded(&args, &[1, 5]);
    }
    assert!(output.bytes().iter().all(|&b| b == 0x5a));
}

#[test]
fn xml_with_impossible_numbers_is_refused() {
    let head = |size: &str| {
        format!(
            "<superblock uuid=\"\" time=\"1\" transaction=\"1\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"{size}\">\n"
        )
    };
    let device = "<device dev_id=\"1\" mapped_blocks=\"1\" transaction=\"1\" creation_time=\"0\" snap_time=\"0\">\n";
    let with_mapping = |mapping: &str| {
        format!(
            "{}{device}{mapping}</device></superblock>",
            head("1099511627776").replace("1099511627776", "100000")
        )
    };
    let range = |thin: u64, data: u64, length: u64| {
        with_mapping(&format!(
            "<range_mapping origin_begin=\"{thin}\" data_begin=\"{data}\" length=\"{length}\" time=\"0\"/>"
        ))
    };
    let mut texts = Vec::new();
    for number in HOSTILE {
        texts.push(format!("{}</superblock>", head(&number.to_string())));
        texts.push(range(0, 0, number));
        texts.push(range(number, number, number));
        texts.push(range(0, number, 1));
        texts.push(range(0, number, 2));
    }
    texts.push(range(u64::MAX, 0, 2));
    texts.push(range(0, 0, 0));
    texts.push(format!("{}</superblock>", head("18446744073709551616")));
    texts.push(format!("{}</superblock>", head("-1")));
    texts.push(format!("{}</superblock>", head(&"9".repeat(10_000))));
    let output = Image::from_bytes(&vec![0x5a; 4 << 20]);
    let xml = output.beside("hostile.xml");
    for text in texts {
        fs::write(&xml, &text).expect("written");
        let args = [
            "restore".as_ref(),
            "-i".as_ref(),
            xml.as_os_str(),
            "-o".as_ref(),
            output.path().as_os_str(),
        ];
        let finished = bounded(&args, &[1, 5]);
        if finished.code == Some(1) {
            // A pool that the format allows and this output cannot hold.
            needed(&finished);
        }
        assert!(output.bytes().iter().all(|&b| b == 0x5a), "{text}");
    }
}

#[test]
fn files_that_never_end_are_refused_in_little_memory() {
    let image = Image::empty(0);
    let sparse = image.beside("sparse");
    File::create(&sparse)
        .and_then(|f| f.set_len(64 << 30))
        .expect("made");
    let output = Image::from_bytes(&vec![0x5a; 1 << 20]);
    let args = [
        "restore".as_ref(),
        "-i".as_ref(),
        sparse.as_os_str(),
        "-o".as_ref(),
        output.path().as_os_str(),
    ];
    bounded(&args, &[5]);
    bounded(&["check".as_ref(), sparse.as_os_str()], &[5]);
    bounded(&["dump".as_ref(), sparse.as_os_str()], &[5]);
    assert!(output.bytes().iter().all(|&b| b == 0x5a));
}

/// A loop device over a file, detached with the value.
struct Loop {
    path: PathBuf,
}

impl Loop {
    /// None, with the reason printed, if there are none here.
    fn over(file: &Path) -> Option<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        match made {
            Ok(output) if output.status.success() => {
                let path =
                    PathBuf::from(String::from_utf8(output.stdout).expect("text").trim_end());
                assert!(
                    fs::metadata(&path)
                        .expect("there")
                        .file_type()
                        .is_block_device()
                );
                Some(Self { path })
            }
            other => {
                println!("left out: no loop device can be made here: {other:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
        if !done.is_ok_and(|status| status.success()) {
            println!("cannot detach {}", self.path.display());
        }
    }
}

#[test]
fn block_devices_are_read_and_written() {
    let image = Image::of(SMALL);
    let whole = dump(&[], image.path()).expect(0).stdout;
    let xml = dump_file(&image);
    let Some(input) = Loop::over(image.path()) else {
        return;
    };
    let target = Image::empty(1024);
    let Some(output) = Loop::over(target.path()) else {
        return;
    };
    let checked = check(&[], &input.path).expect(0);
    assert_eq!(checked.stdout, check(&[], image.path()).stdout);
    assert!(dump(&[], &input.path).expect(0).stdout == whole);
    restore(&xml, &output.path).expect(0);
    check(&["-q"], &output.path).expect(0);
    let pool = Pool::read(&dump(&[], &output.path).expect(0).out());
    assert!(pool == image.dumped());
    repair(&input.path, &output.path).expect(0);
    check(&["-q", "--auto-repair"], &output.path).expect(0);
    let written = File::open(&output.path).expect("opened");
    let mut marker = vec![0; 16];
    written.read_exact_at(&mut marker, 0).expect("read");
    assert!(!MARKER.starts_with(&marker));
    drop(written);

    // The same device by another name is the same device.
    let alias = image.beside("alias");
    symlink(&output.path, &alias).expect("linked");
    repair(&output.path, &alias)
        .expect(1)
        .expect_stderr(&["is the input"]);
    let option = ["-o", alias.to_str().expect("plain")];
    dump(&option, &output.path).expect(1);
    check(&["-q"], &output.path).expect(0);

    // Compressed images and XML on a device are not what the commands read.
    File::options()
        .write(true)
        .open(&output.path)
        .and_then(|f| f.write_all_at(&whole, 0))
        .expect("written");
    check(&[], &output.path).expect(5);
    dump(&[], &output.path).expect(5);
}

#[test]
fn a_block_device_in_use_is_busy_unless_its_snapshot_is_read() {
    let image = Image::of("held-root/meta");
    let xml = dump_file(&image);
    let wanted = dump(&["-m"], image.path()).expect(0).stdout;
    let Some(device) = Loop::over(image.path()) else {
        return;
    };
    // As an active pool does.
    let holder = File::options()
        .read(true)
        .custom_flags(i32::try_from(rustix::fs::OFlags::EXCL.bits()).expect("a flag"))
        .open(&device.path)
        .expect("not in use yet");
    let name = device.path.to_str().expect("plain").to_owned();
    let output = Image::empty(1024);
    for finished in [
        check(&[], &device.path),
        check(&["--auto-repair"], &device.path),
        check(&["--clear-needs-check-flag"], &device.path),
        dump(&[], &device.path),
        repair(&device.path, output.path()),
    ] {
        assert_eq!(finished.code, Some(1), "{finished:?}");
        assert_eq!(finished.stdout, b"");
        finished.expect_stderr(&[&name, "in use", "live metadata"]);
    }
    check(&["-q"], &device.path).expect(1).expect_silent();
    for finished in [
        restore(&xml, &device.path),
        repair(image.path(), &device.path),
    ] {
        assert_eq!(finished.code, Some(1), "{finished:?}");
        finished.expect_stderr(&[&name, "in use"]);
    }
    check(&["-m"], &device.path).expect(0);
    assert!(dump(&["-m"], &device.path).expect(0).stdout == wanted);
    drop(holder);
    check(&["-q"], &device.path).expect(0);
}

/// Numbers that are the same each time.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 16).expect("48 bits") % end
    }
}

/// Damages up to three blocks; those of even rounds are sealed again, so that what is in them is believed.
fn damage(bytes: &mut [u8], round: u64) {
    let mut dice = Dice(round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for _ in 0..4 {
        dice.next();
    }
    let blocks = sealed_blocks(bytes);
    for _ in 0..=dice.below(3) {
        let number = blocks[dice.below(blocks.len())];
        let start = number as usize * BLOCK_SIZE;
        let kind = checksum::identify(&bytes[start..start + BLOCK_SIZE]);
        match dice.below(8) {
            0 => {
                // Another block's contents.
                let other = blocks[dice.below(blocks.len())] as usize * BLOCK_SIZE;
                bytes.copy_within(other..other + BLOCK_SIZE, start);
            }
            1 => bytes[start + 4..start + BLOCK_SIZE].fill(0),
            2 | 3 => {
                // A number that somebody could trust, in a header or anywhere.
                let end = if dice.below(2) == 0 { 64 } else { BLOCK_SIZE };
                let at = start + dice.below(end / 4 - 1) * 4;
                let numbers = [
                    0,
                    1,
                    2,
                    3,
                    252,
                    255,
                    1 << 24,
                    1 << 31,
                    1 << 40,
                    1 << 60,
                    u64::MAX,
                    dice.next() % 1100,
                ];
                let value = numbers[dice.below(numbers.len())];
                let at = at.min(start + BLOCK_SIZE - 8);
                put_u64(bytes, at, value);
            }
            _ => {
                let end = if dice.below(2) == 0 { 400 } else { BLOCK_SIZE };
                for _ in 0..=dice.below(8) {
                    let at = start + dice.below(end);
                    bytes[at] = dice.next() as u8;
                }
            }
        }
        let block = &mut bytes[start..start + BLOCK_SIZE];
        if round.is_multiple_of(2)
            && let Some(kind) = kind
        {
            checksum::seal(block, kind, MetadataBlock(number));
        }
    }
}

/// Checks, dumps, recovers, repairs and corrects damaged metadata, and fails where the results contradict each other.
fn survive(bytes: &[u8], xml_needs: usize) {
    let engine = RamEngine::from_bytes(bytes.to_vec());
    let options = CheckOptions::default();
    let checked = checking::check(&engine, &options, &Silent).expect("memory can be read");
    let severity = checked.report.verdict.severity;
    let is_sound = severity <= Some(Severity::Note);
    for line in checked.report.damages.iter().map(ToString::to_string) {
        assert!(!line.is_empty());
    }
    serde_json::to_string(&checked.report).expect("JSON");
    let dump = dumped(&engine);
    if is_sound {
        assert!(dump.is_ok(), "a clean check, but {:?}", dump.err());
    }
    if let Ok(text) = &dump {
        assert!(text.ends_with(b"</superblock>\n"));
    }
    let whole = recovered(&engine);
    if is_sound {
        assert!(
            whole.as_ref().ok() == dump.as_ref().ok(),
            "a repair of sound metadata changes it"
        );
    }
    if let Ok(recovery) = recover(&engine, &Options::default(), &Silent) {
        let output = RamEngine::new(xml_needs);
        let source = recovery.source(Selection::default(), &Silent);
        restoring(&source, &output, &Silent).expect("what was recovered can be written");
        let again = checking::check(&output, &options, &Silent).expect("memory can be read");
        assert!(
            again.report.verdict.severity <= Some(Severity::Note),
            "the repaired metadata is damaged: {:?}",
            again.report.damages
        );
    }
    if !is_sound && severity < Some(Severity::Fatal) {
        match checking::fix(&engine, &checked) {
            Ok(_) => {
                let again =
                    checking::check(&engine, &options, &Silent).expect("memory can be read");
                assert!(
                    again.report.verdict.severity <= Some(Severity::Note),
                    "damaged after --auto-repair: {:?}\nbefore: {:?}",
                    again.report.damages,
                    checked.report.damages
                );
                // The first line has the clock and the flags, which may be what was wrong.
                let mappings = |text: Vec<u8>| {
                    let line = text.iter().position(|&b| b == b'\n').expect("a line");
                    text[line..].to_vec()
                };
                assert!(
                    dumped(&engine).ok().map(mappings) == dump.ok().map(mappings),
                    "--auto-repair changed mappings"
                );
            }
            Err(e) => assert_eq!(e.kind(), ErrorKind::OutputTooSmall, "{e}"),
        }
    }
}

#[test]
fn random_damage_causes_neither_panics_nor_hangs_nor_contradictions() {
    let sound = expand("snap-mix-a/meta.img");
    let mut broken = Vec::new();
    for round in 0..300 {
        let mut bytes = sound.clone();
        damage(&mut bytes, round);
        let (done, result) = channel();
        thread::spawn(move || {
            let survived = catch_unwind(AssertUnwindSafe(|| survive(&bytes, 4096)));
            let message = survived.err().map(|e| match e.downcast_ref::<String>() {
                Some(text) => text.clone(),
                None => format!("{:?}", e.downcast_ref::<&str>()),
            });
            // Nobody listens any more if it took too long.
            let _ = done.send(message);
        });
        match result.recv_timeout(Duration::from_secs(60)) {
            Ok(None) => {}
            Ok(Some(message)) => broken.push(format!("round {round}: {message}")),
            Err(_) => broken.push(format!("round {round}: it took more than 5 s")),
        }
    }
    assert!(
        broken.is_empty(),
        "{} rounds:\n{}",
        broken.len(),
        broken.join("\n")
    );
}

#[test]
fn random_damage_of_images_ends_commands_in_order() {
    let sound = expand("snap-mix-a/meta.img");
    for round in (1000..1040).chain(2001..2011) {
        let mut bytes = sound.clone();
        damage(&mut bytes, round);
        let image = Image::from_bytes(&bytes);
        let path = image.path().as_os_str();
        let output = Image::empty(2048);
        let out = output.path().as_os_str();
        let checked = bounded(&["check".as_ref(), path], &[0, 3, 4, 5]);
        let dumped = bounded(&["dump".as_ref(), path], &[0, 5]);
        assert!(
            checked.code != Some(0) || dumped.code == Some(0),
            "round {round}: {dumped:?}"
        );
        bounded(&["dump".as_ref(), "--repair".as_ref(), path], &[0, 4, 5]);
        let repaired = bounded(
            &["repair".as_ref(), "-i".as_ref(), path, "-o".as_ref(), out],
            &[0, 4, 5],
        );
        if repaired.code != Some(5) {
            check(&["-q"], output.path()).expect(0);
        }
        assert!(image.bytes() == bytes);
    }
}
