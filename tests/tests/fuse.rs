//! `thin_serve --fuse`: thin devices as files, under programs, loop devices and file systems.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek};

use crate::serve::client::{FUA, TRIM};
use crate::serve::{BLOCK, Scene};
use crate::support::{BINARY, Finished, folder, peer, program};

const ENOSPC: i32 = 28;
const EROFS: i32 = 30;
const EPERM: i32 = 1;

/// True if this machine can do what the test needs; says so where it cannot.
pub(crate) fn can(devices: &[&str]) -> bool {
    let missing: Vec<_> = devices
        .iter()
        .filter(|device| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(device)
                .is_err()
        })
        .collect();
    if !missing.is_empty() {
        say_not_tested(&format!("this machine has no {missing:?}"));
    }
    missing.is_empty()
}

fn say_not_tested(why: &str) {
    // Past the harness, which hides what a test prints that passes.
    let said = format!("\n*** NOT TESTED: {why} ***\n");
    std::io::stderr().write_all(said.as_bytes()).ok();
}

const FUSE: &str = "/dev/fuse";
pub(crate) const LOOP: &str = "/dev/loop-control";

/// A pool whose devices are files; nothing is left mounted behind it.
struct Served(Scene);

impl Drop for Served {
    fn drop(&mut self) {
        if is_mounted(&self.folder()) {
            quietly("umount", &["-l".as_ref(), self.folder().as_os_str()]);
        }
    }
}

fn is_mounted(folder: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/mounts").expect("readable");
    mounts.contains(&format!(" {} ", folder.display()))
}

/// Tears something down, also after a failure.
fn quietly(name: &str, args: &[&OsStr]) {
    std::process::Command::new(name).args(args).status().ok();
}

impl Served {
    fn new(data_blocks: u64) -> Self {
        let scene = Scene::new(data_blocks, 4 << 20);
        fs::create_dir(scene.path("fuse")).expect("made");
        Self(scene)
    }

    fn folder(&self) -> PathBuf {
        self.0.path("fuse")
    }

    fn serve(&mut self, more: &[&str]) {
        let folder = self.folder().display().to_string();
        let mut all = vec!["--fuse", &folder];
        all.extend(more);
        self.0.serve(&all);
    }

    fn stop(&mut self) {
        self.0.stop();
        assert!(!is_mounted(&self.folder()), "it is mounted still");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    fn open(&self, name: &str, flags: OFlags) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(flags.bits() as i32);
        options.open(self.file(name)).expect("opened")
    }

    fn used_blocks(&self) -> u64 {
        let status = self.0.asked(&["status"]);
        let used = status.split_whitespace().nth(5).expect("has it");
        used.split('/')
            .next()
            .and_then(|n| n.parse().ok())
            .expect("a number")
    }
}

/// A loop device, detached at the end.
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    pub(crate) fn on(file: &Path) -> Self {
        let args: [&OsStr; 4] = [
            "-f".as_ref(),
            "--show".as_ref(),
            "--direct-io=on".as_ref(),
            file.as_ref(),
        ];
        let made = program("losetup", args).run().expect(0);
        Self(made.out().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        quietly("losetup", &["-d".as_ref(), self.0.as_os_str()]);
    }
}

/// A mounted file system, unmounted at the end.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn on(device: &Path, options: &str) -> Self {
        let at = folder();
        let args: [&OsStr; 4] = [
            "-o".as_ref(),
            options.as_ref(),
            device.as_ref(),
            at.path().as_ref(),
        ];
        program("mount", args).run().expect(0);
        Self(at)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        quietly("umount", &[self.0.path().as_os_str()]);
    }
}

fn on<const N: usize>(name: &str, args: [&str; N], path: &Path) -> Finished {
    let args = args.into_iter().map(OsStr::new);
    program(name, args.chain([path.as_os_str()]))
        .run()
        .expect(0)
}

fn errno<T: std::fmt::Debug>(done: std::io::Result<T>) -> i32 {
    done.expect_err("refused")
        .raw_os_error()
        .expect("of the system")
}

/// Waits for what the kernel tells a little later.
fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    file.read_exact_at(&mut data, at).expect("read");
    data
}

#[test]
fn files_and_nbd_see_each_others_writes_at_once() {
    if !can(&[FUSE]) {
        return;
    }
    let mut served = Served::new(256);
    served.serve(&["--create", "--thin", "0:8m", "--thin", "7:1m"]);
    let mut names: Vec<_> = fs::read_dir(served.folder())
        .expect("listed")
        .map(|entry| entry.expect("one").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["0", "7"]);
    let meta = fs::metadata(served.file("0")).expect("there");
    assert_eq!(
        (meta.size(), meta.blocks(), meta.mode() & 0o777),
        (8 << 20, 0, 0o600)
    );
    let file = served.open("0", OFlags::empty());
    let mut client = served.0.connect("0");
    for round in 0..20_u64 {
        let (at, len) = (round * 30_001, 70_000 + round as usize);
        file.write_all_at(&vec![round as u8 + 1; len], at)
            .expect("written");
        assert_eq!(
            client.read(at, len).expect("read"),
            vec![round as u8 + 1; len]
        );
        client.write(at + 5, &[0xee; 100]).expect("written");
        assert_eq!(read(&file, at + 5, 100), [0xee; 100]);
    }
    // Zeros that free their blocks, and zeros that keep them.
    let block = BLOCK as u64;
    let before = fs::metadata(served.file("0")).expect("there").blocks();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, block - 7, 2 * block + 9).expect("punched");
    assert_eq!(
        client.read(block - 7, 2 * BLOCK + 9).expect("read"),
        vec![0; 2 * BLOCK + 9]
    );
    assert_eq!(
        before - fs::metadata(served.file("0")).expect("there").blocks(),
        2 * 128
    );
    fallocate(&file, FallocateFlags::ZERO_RANGE, 5 * block, block).expect("zeroed");
    assert_eq!(
        before - fs::metadata(served.file("0")).expect("there").blocks(),
        2 * 128
    );
    // What is mapped is what NBD says is mapped.
    let uri = format!("nbd+unix:///0?socket={}", served.0.path("nbd").display());
    let map = program("nbdinfo", ["--map", &uri]).run().expect(0).out();
    let mut at = 0;
    for line in map.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let (offset, len): (u64, u64) = (words[0].parse().unwrap(), words[1].parse().unwrap());
        assert_eq!(offset, at);
        let is_hole = words[2] == "3";
        let here = if is_hole {
            SeekFrom::Hole(at)
        } else {
            SeekFrom::Data(at)
        };
        assert_eq!(seek(&file, here), Ok(at), "{map}");
        let past = if is_hole {
            SeekFrom::Data(at)
        } else {
            SeekFrom::Hole(at)
        };
        let end = at + len;
        match is_hole && end == 8 << 20 {
            true => assert_eq!(seek(&file, past), Err(rustix::io::Errno::NXIO)),
            false => assert_eq!(seek(&file, past), Ok(end), "{map}"),
        }
        at = end;
    }
    assert_eq!(at, 8 << 20);
    drop((file, client));
    served.stop();
}

/// What df tells of the folder, in these columns.
fn df(folder: &Path, columns: &str) -> Vec<u64> {
    let done = on("df", ["-B", "1", &format!("--output={columns}")], folder).out();
    let last = done.lines().last().expect("a line");
    let numbers = last.split_whitespace().map(str::parse);
    numbers.map(|number| number.expect("a number")).collect()
}

#[test]
fn df_tells_the_data_blocks_of_the_pool_and_how_many_devices_there_can_be() {
    if !can(&[FUSE]) {
        return;
    }
    let mut served = Served::new(256);
    served.serve(&["--create", "--thin", "0:1t", "--thin", "7:1m"]);
    let (all, block) = (256 * BLOCK as u64, BLOCK as u64);
    let space = |served: &Served| df(&served.folder(), "size,used,avail");
    assert_eq!(space(&served), [all, 0, all]);
    assert_eq!(
        df(&served.folder(), "itotal,iused,iavail"),
        [1 << 24, 2, (1 << 24) - 2]
    );
    assert_eq!(
        on("stat", ["-f", "-c", "%s %S %b %f"], &served.file("0")).out(),
        "65536 65536 256 256\n"
    );
    let file = served.open("0", OFlags::empty());
    file.write_all_at(&[1; 3 * BLOCK], 5 << 30)
        .expect("written");
    assert_eq!(space(&served), [all, 3 * block, all - 3 * block]);
    served.0.asked(&["message", "create_snap", "1", "0"]);
    file.write_all_at(&[2; 512], 5 << 30).expect("written");
    assert_eq!(space(&served), [all, 4 * block, all - 4 * block]);
    served.0.asked(&["resize", "--data", "512"]);
    assert_eq!(space(&served), [2 * all, 4 * block, 2 * all - 4 * block]);
    drop(file);
    served.stop();
}

#[test]
fn space_that_is_asked_for_beforehand_is_had_by_writing() {
    if !can(&[FUSE]) {
        return;
    }
    let mut served = Served::new(16);
    served.serve(&["--create", "--thin", "0:2m"]);
    let file = served.open("0", OFlags::empty());
    file.write_all_at(&[7; 100], 70_000).expect("written");
    for mode in [FallocateFlags::empty(), FallocateFlags::KEEP_SIZE] {
        let refused = fallocate(&file, mode, 0, 1 << 20);
        assert_eq!(refused, Err(rustix::io::Errno::OPNOTSUPP));
    }
    assert_eq!(served.used_blocks(), 1);
    on("fallocate", ["--posix", "-l", "1m"], &served.file("0"));
    assert_eq!(served.used_blocks(), 16);
    assert_eq!(read(&file, 70_000, 101), [&[7; 100][..], &[0]].concat());
    drop(file);
    served.stop();
}

/// Where zeros would fill the pool a hole is refused, and zeros are zeros all the same, whatever is written beside them.
#[test]
fn holes_are_refused_where_they_would_take_space() {
    if !can(&[FUSE, LOOP]) {
        return;
    }
    let block = BLOCK as u64;
    let place = folder();
    let origin = place.path().join("origin");
    fs::write(&origin, vec![9; 16 * BLOCK]).expect("written");
    let origin = format!("0={}", origin.display());
    for feature in [
        ["--feature", "skip_block_zeroing"],
        ["--feature", "ignore_discard"],
        ["--origin", &origin],
    ] {
        let mut served = Served::new(64);
        let devices = ["--create", "--thin", "0:1m", "--thin", "1:4m"];
        served.serve(&[&devices[..], &feature].concat());
        if feature[1] == "skip_block_zeroing" {
            // What new blocks are going to have.
            let mut client = served.0.connect("1");
            let blocks = 64 * BLOCK;
            client.write(0, &vec![5; blocks]).expect("written");
            client
                .ask(TRIM, FUA, 0, blocks as u32, &[])
                .expect("trimmed");
        }
        let file = served.open("0", OFlags::empty());
        file.write_all_at(&[7; BLOCK], block).expect("written");
        let attached = Loop::on(&served.file("0"));
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let refused = fallocate(&file, punch, 0, 1 << 20);
        assert_eq!(refused, Err(rustix::io::Errno::OPNOTSUPP), "{feature:?}");
        quietly("blkdiscard", &["-f".as_ref(), attached.0.as_os_str()]);
        assert_eq!(served.used_blocks(), 1, "{feature:?}: a discard allocates");
        assert_eq!(read(&file, block, BLOCK), [7; BLOCK], "{feature:?}");
        // Both ways to zeros, and then something in the middle of them.
        fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 4 * block).expect("zeroed");
        on(
            "blkdiscard",
            ["-f", "-z", "-o", "256k", "-l", "256k"],
            &attached.0,
        );
        for n in 0..8 {
            file.write_all_at(&[3; 512], n * block + 4096)
                .expect("written");
        }
        for n in 0..8 {
            let found = read(&file, n * block, BLOCK);
            let is_right = (0..).zip(&found).all(|(at, byte)| {
                let is_written = (4096..4608).contains(&at);
                *byte == if is_written { 3 } else { 0 }
            });
            assert!(is_right, "{feature:?}: block {n}");
        }
        drop((file, attached));
        served.stop();
    }
}

#[test]
fn a_file_is_as_long_as_its_device_and_comes_and_goes_with_it() {
    if !can(&[FUSE]) {
        return;
    }
    let mut served = Served::new(4);
    served.serve(&["--create", "--thin", "0:1m"]);
    let file = served.open("0", OFlags::empty());
    assert_eq!(errno(file.set_len(5)), EPERM);
    file.set_len(1 << 20).expect("as it is");
    assert_eq!(errno(file.write_at(&[1], 1 << 20)), ENOSPC);
    assert_eq!(file.read_at(&mut [0; 9], (1 << 20) - 4).expect("read"), 4);
    file.write_all_at(&[3; 4 * BLOCK], 0).expect("fits");
    // As a block device, it stays what it is when it is opened to be truncated.
    fs::write(served.file("0"), [4; 3]).expect("written");
    assert_eq!(read(&file, 0, 5), [4, 4, 4, 3, 3]);
    assert_eq!(
        fs::metadata(served.file("0")).expect("there").len(),
        1 << 20
    );
    // The pool is full.
    assert_eq!(errno(file.write_at(&[1; 512], 9 * BLOCK as u64)), ENOSPC);
    assert_eq!(errno(File::create(served.file("new"))), EPERM);
    assert_eq!(errno(fs::remove_file(served.file("0"))), EPERM);
    assert_eq!(errno(fs::create_dir(served.file("new"))), EPERM);
    let renamed = fs::rename(served.file("0"), served.file("new"));
    assert_eq!(errno(renamed), EPERM);
    // Devices come and go, but not those that somebody has open.
    assert!(fs::metadata(served.file("1")).is_err());
    served.0.asked(&["message", "create_thin", "1"]);
    served.0.asked(&["activate", "1", "65536"]);
    let other = served.open("1", OFlags::empty());
    let refused = served.0.ctl(&["deactivate", "1"]);
    assert!(refused.stderr.contains("in use"), "{}", refused.stderr);
    drop(other);
    soon("the end of its use", || {
        served.0.ctl(&["deactivate", "1"]).stderr.is_empty()
    });
    assert!(fs::metadata(served.file("1")).is_err());
    assert!(fs::metadata(served.file("01")).is_err());
    file.sync_all().expect("flushed");
    drop(file);
    served.stop();
    served.serve(&["--read-only", "--thin", "0:1m"]);
    let refused = OpenOptions::new().write(true).open(served.file("0"));
    assert_eq!(errno(refused), EROFS);
    assert_eq!(
        fs::metadata(served.file("0")).expect("there").mode() & 0o777,
        0o400
    );
    assert_eq!(
        read(&File::open(served.file("0")).expect("opened"), 0, 4),
        [4, 4, 4, 3]
    );
    served.stop();
}

/// A buffer that direct I/O takes.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + 4096];
        let skip = memory.as_ptr().align_offset(4096);
        Self(memory, skip)
    }

    fn bytes(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[self.1..self.1 + len]
    }
}

/// Servers of this kind have lost the first part of large writes that the kernel split.
#[test]
fn direct_writes_at_the_same_time_lose_nothing() {
    if !can(&[FUSE, LOOP]) {
        return;
    }
    const REGION: usize = 4 << 20;
    let mut served = Served::new(1024);
    served.serve(&["--create", "--thin", "0:32m"]);
    let attached = Loop::on(&served.file("0"));
    let torture = |path: &Path, first: u64| {
        let of = |thread: u64| {
            let mut rng = SmallRng::seed_from_u64(thread);
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .custom_flags(OFlags::DIRECT.bits() as i32);
            let file = options.open(path).expect("opened");
            let through = File::open(served.file("0")).expect("opened");
            let (mut data, mut found) = (Aligned::new(REGION), Aligned::new(REGION));
            for round in 0..12 {
                for len in [64, 128, 256, 512, 768, 1024, 2048, 3072].map(|k| k << 10) {
                    rng.fill(data.bytes(len));
                    let at = thread * REGION as u64
                        + rng.random_range(0..=(REGION - len) / 4096) as u64 * 4096;
                    file.write_all_at(data.bytes(len), at).expect("written");
                    file.read_exact_at(found.bytes(len), at).expect("read");
                    assert!(
                        found.bytes(len) == data.bytes(len),
                        "round {round}: {len} bytes at {at}"
                    );
                    through.read_exact_at(found.bytes(len), at).expect("read");
                    assert!(
                        found.bytes(len) == data.bytes(len),
                        "through the file: {len} bytes at {at}"
                    );
                }
            }
        };
        std::thread::scope(|scope| {
            for thread in first..first + 4 {
                scope.spawn(move || of(thread));
            }
        });
    };
    std::thread::scope(|scope| {
        scope.spawn(|| torture(&attached.0, 0));
        // Snapshots come and go meanwhile, and have their blocks broken out.
        scope.spawn(|| {
            for id in 1..8_u8 {
                let id = id.to_string();
                served.0.asked(&["message", "create_snap", &id, "0"]);
                std::thread::sleep(Duration::from_millis(50));
                served.0.asked(&["message", "delete", &id]);
            }
        });
        torture(&served.file("0"), 4);
    });
    drop(attached);
    served.stop();
}

/// Creates, overwrites and deletes files; what there should be afterwards comes back.
fn churn(mounted: &Mounted, seed: u64) -> Vec<(PathBuf, Vec<u8>)> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut files: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for n in 0..120 {
        match rng.random_range(0..4) {
            0 if !files.is_empty() => {
                let (path, _) = files.swap_remove(rng.random_range(0..files.len()));
                fs::remove_file(path).expect("removed");
            }
            1 if !files.is_empty() => {
                let at = rng.random_range(0..files.len());
                let (path, data) = &mut files[at];
                rng.fill(&mut data[..]);
                fs::write(path, &data).expect("written");
            }
            _ => {
                let mut data = vec![0; rng.random_range(1..600_000)];
                rng.fill(&mut data[..]);
                let path = mounted.path(&format!("{seed}-{n}"));
                fs::write(&path, &data).expect("written");
                files.push((path, data));
            }
        }
    }
    files
}

/// A file system on a loop device lives as on a disk; a snapshot taken meanwhile has that moment.
fn live(make: &str, options: &str, snapshot_options: &str, check: (&str, &[&str])) {
    if !can(&[FUSE, LOOP]) {
        return;
    }
    let mut served = Served::new(8192);
    served.serve(&["--create", "--thin", "0:512m"]);
    let attached = Loop::on(&served.file("0"));
    on(make, ["-q"], &attached.0);
    let mounted = Mounted::on(&attached.0, options);
    let before = churn(&mounted, 1);
    on("sync", ["-f"], mounted.0.path());
    served.0.asked(&["message", "create_snap", "1", "0"]);
    served.0.asked(&["activate", "1", &(512 << 20).to_string()]);
    let after = churn(&mounted, 2);
    let ballast = mounted.path("ballast");
    fs::write(&ballast, vec![7; 60 << 20]).expect("written");
    on("sync", ["-f"], mounted.0.path());
    let full = served.used_blocks();
    {
        let snapshot = Loop::on(&served.file("1"));
        let beside = Mounted::on(&snapshot.0, snapshot_options);
        for (path, data) in &before {
            let path = beside.path(path.file_name().expect("named").to_str().expect("text"));
            assert!(fs::read(&path).expect("read") == *data, "{path:?}");
        }
        let of_later = after.iter().filter_map(|(path, _)| path.file_name());
        for name in of_later.map(|name| beside.0.path().join(name)) {
            assert!(!name.exists(), "{name:?} is of later");
        }
        // It takes writes of its own.
        fs::write(beside.path("own"), [1; 99_999]).expect("written");
    }
    fs::remove_file(&ballast).expect("removed");
    // XFS frees what was deleted in the background.
    soon("space by fstrim", || {
        on("sync", ["-f"], mounted.0.path());
        on("fstrim", [], mounted.0.path());
        served.used_blocks() + 900 < full
    });
    drop(mounted);
    let again = Mounted::on(&attached.0, options);
    for (path, data) in before
        .iter()
        .filter(|b| !after.iter().any(|a| a.0 == b.0))
        .chain(&after)
    {
        let path = again.path(path.file_name().expect("named").to_str().expect("text"));
        assert!(fs::read(&path).expect("read") == *data, "{path:?}");
    }
    drop(again);
    let (checker, how) = check;
    let args = how.iter().map(OsStr::new).chain([attached.0.as_os_str()]);
    program(checker, args).run().expect(0);
    drop(attached);
    served.stop();
}

#[test]
fn ext4_on_a_loop_device_lives_as_on_a_disk() {
    live("mkfs.ext4", "rw", "rw", ("e2fsck", &["-fn"]));
}

#[test]
fn xfs_on_a_loop_device_lives_as_on_a_disk() {
    live("mkfs.xfs", "defaults", "nouuid", ("xfs_repair", &["-n"]));
}

/// What was written with `O_DSYNC`, or synced, survives; the next server clears away the folder of the one that died.
#[test]
fn after_kill_9_the_folder_is_mounted_again_and_has_what_was_durable() {
    if !can(&[FUSE]) {
        return;
    }
    let mut served = Served::new(1024);
    for round in 1..=3_u8 {
        served.serve(&["--create", "--thin", "0:32m"]);
        let durable = served.open("0", OFlags::DSYNC);
        let synced = served.open("0", OFlags::empty());
        if round > 1 {
            assert_eq!(read(&durable, 0, 4096), [round - 1; 4096]);
            assert_eq!(read(&durable, 1 << 20, 4096), [round - 1; 4096]);
        }
        durable.write_all_at(&[round; 4096], 0).expect("written");
        synced
            .write_all_at(&[round; 4096], 1 << 20)
            .expect("written");
        synced.sync_data().expect("synced");
        let is_over = AtomicBool::new(false);
        let progress = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 2..5_u64 {
                let (file, is_over, progress) =
                    (served.open("0", OFlags::empty()), &is_over, &progress);
                scope.spawn(move || {
                    for n in 0.. {
                        let at = (thread << 22) + n % 500 * 8192;
                        if is_over.load(Ordering::Relaxed)
                            || file.write_all_at(&[9; 8192], at).is_err()
                        {
                            return;
                        }
                        progress.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            soon("load", || progress.load(Ordering::Relaxed) > 300);
            served.0.kill();
            is_over.store(true, Ordering::Relaxed);
        });
        served.0.assert_sound();
        let dead = fs::metadata(served.folder()).expect_err("its server has died");
        assert_eq!(dead.kind(), std::io::ErrorKind::NotConnected);
    }
    served.serve(&["--thin", "0:32m"]);
    assert_eq!(read(&served.open("0", OFlags::empty()), 0, 4096), [3; 4096]);
    // A folder that is served is not taken away from its server.
    let folder = served.folder().display().to_string();
    let other = Scene::new(8, 1 << 20);
    let refused = other.run(&["--create", "--fuse", &folder]).expect(1);
    assert!(refused.stderr.contains("mounted on"), "{}", refused.stderr);
    served.stop();
}

#[test]
fn a_server_stops_while_a_write_to_a_file_waits_for_space() {
    if !can(&[FUSE]) {
        return;
    }
    let mut served = Served::new(2);
    served.serve(&["--create", "--thin", "0:1m", "--queue-when-full", "0"]);
    let file = served.open("0", OFlags::empty());
    file.write_all_at(&vec![1; 2 * BLOCK], 0).expect("written");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| file.write_all_at(&[2; 512], 5 * BLOCK as u64));
        let end = Instant::now() + Duration::from_secs(60);
        while !served.0.asked(&["status"]).contains("out_of_data_space") {
            assert!(Instant::now() < end, "it is never full");
        }
        served.stop();
        let told = waiting.join().expect("no panic").expect_err("no space");
        assert_eq!(told.raw_os_error(), Some(ENOSPC));
    });
}

/// A file system that somebody forgot to unmount does not keep the server; what was synced is there.
#[test]
fn a_server_that_is_told_to_stop_stops_while_its_files_are_in_use() {
    if !can(&[FUSE, LOOP]) {
        return;
    }
    let mut served = Served::new(1024);
    // It takes a few seconds, which it has although a check came first that would have ended at once.
    served.serve(&["--create", "--check", "--thin", "0:32m"]);
    let attached = Loop::on(&served.file("0"));
    on("mkfs.ext4", ["-q"], &attached.0);
    let mounted = Mounted::on(&attached.0, "rw");
    fs::write(mounted.path("kept"), [5; 70_000]).expect("written");
    on("sync", ["-f"], mounted.0.path());
    served.stop();
    fs::read(mounted.path("lost")).expect_err("there is no disk any more");
    drop((mounted, attached));
    served.serve(&["--thin", "0:32m"]);
    let attached = Loop::on(&served.file("0"));
    let mounted = Mounted::on(&attached.0, "rw");
    assert!(fs::read(mounted.path("kept")).expect("read") == [5; 70_000]);
    drop((mounted, attached));
    served.stop();
}

/// Whoever unmounts the folder of a server that serves nothing else wants it to end.
#[test]
fn unmounting_the_folder_ends_a_server_without_sockets() {
    if !can(&[FUSE]) {
        return;
    }
    let served = Served::new(64);
    let folder = served.folder().display().to_string();
    let mut server = std::process::Command::new(BINARY);
    server.args(
        served
            .0
            .arguments(&["--create", "--thin", "0:1m", "--fuse", &folder]),
    );
    let mut server = server.spawn().expect("started");
    soon("the mount", || is_mounted(&served.folder()));
    soon("the file", || fs::write(served.file("0"), [1; 512]).is_ok());
    on("fusermount3", ["-u"], &served.folder());
    soon("its end", || {
        server.try_wait().expect("waiting works").is_some()
    });
    assert_eq!(server.wait().expect("ended").code(), Some(0));
    served.0.assert_sound();
}

/// Who is not root mounts with fusermount3, and has file systems on files without mounting those.
#[test]
fn whoever_is_not_root_has_files_too() {
    // The second only root has.
    if !can(&[FUSE, LOOP]) {
        return;
    }
    // udev does so, which not every machine has.
    let is_for_all = fs::metadata(FUSE).is_ok_and(|fuse| fuse.mode() & 0o006 == 0o006);
    if !is_for_all {
        return say_not_tested("/dev/fuse of this machine is root's only");
    }
    let own = folder();
    fs::set_permissions(own.path(), fs::Permissions::from_mode(0o777)).expect("opened up");
    let program_copy = own.path().join("thintools");
    // Not by this process, whose children would keep it open to write while it is to be run.
    on("cp", [BINARY], &program_copy);
    let script = format!(
        "cd {} && mkdir fuse && ./thintools thin_serve --create --metadata meta --data data --data-size 64m --thin 0:32m --fuse fuse \
         --run '/usr/sbin/mkfs.ext4 -q $fuse/0 && echo words > words && /usr/sbin/debugfs -w -R \"write words there\" $fuse/0 && \
         /usr/sbin/e2fsck -fn $fuse/0 && /usr/sbin/debugfs -R \"cat there\" $fuse/0' && rmdir fuse",
        own.path().display()
    );
    let as_nobody = [
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "sh",
        "-c",
        &script,
    ];
    let done = program("setpriv", as_nobody).run();
    assert!(!is_mounted(&own.path().join("fuse")));
    assert!(done.expect(0).out().ends_with("words\n"));
    let meta = own.path().join("meta");
    peer("thin_check", &["-q".as_ref(), meta.as_os_str()]).expect(0);
}
