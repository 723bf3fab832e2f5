//! What `thin_serve` stands on: block devices, external origins, file systems that are full, and files that grow.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::fuse::{LOOP, Loop, can};
use crate::serve::client::{Client, FUA, READ, TRIM, WRITE};
use crate::serve::{BLOCK, Scene};
use crate::support::{BINARY, check, folder, program, thintools};

/// Bytes of a block, as offsets are counted.
const SIZE: u64 = BLOCK as u64;

/// Loop devices in the places of both files.
fn on_devices(scene: &Scene) -> [Loop; 2] {
    ["meta", "data"].map(|name| {
        let image = scene.path(&format!("{name}.img"));
        fs::rename(scene.path(name), &image).expect("moved");
        let device = Loop::on(&image);
        symlink(&device.0, scene.path(name)).expect("linked");
        device
    })
}

#[test]
fn block_devices_are_used_as_files_are_and_by_one_server_only() {
    if !can(&[LOOP]) {
        return;
    }
    let mut scene = Scene::new(192, 1 << 20);
    let devices = on_devices(&scene);
    scene.serve(&["--create", "--thin", "0:8m", "--thin", "1:8m"]);
    for more in [&["--run", "true"][..], &["--read-only", "--run", "true"]] {
        scene.run(more).expect(1).expect_stderr(&["in use"]);
    }
    let mut client = scene.connect("0");
    let mut model = vec![0; 8 << 20];
    let mut rng = SmallRng::seed_from_u64(3);
    for n in 0..200 {
        let at = rng.random_range(0..model.len() - 200_000);
        let len = rng.random_range(1..200_000);
        match n % 10 {
            // With every flag that there is.
            0 => drop(
                client
                    .ask(6, n as u16 / 10 % 4, at as u64, len as u32, &[])
                    .expect("zeroed"),
            ),
            1 => drop(
                client
                    .ask(TRIM, 0, at as u64, len as u32, &[])
                    .expect("trimmed"),
            ),
            _ => drop(
                client
                    .write(at as u64, &vec![n as u8; len])
                    .expect("written"),
            ),
        }
        match n % 10 {
            0 => model[at..at + len].fill(0),
            1 => {
                let blocks = at.next_multiple_of(BLOCK)..(at + len) / BLOCK * BLOCK;
                model[blocks.start..blocks.end.max(blocks.start)].fill(0);
            }
            _ => model[at..at + len].fill(n as u8),
        }
    }
    client.flush().expect("flushed");
    scene.kill();
    scene.assert_sound();
    scene.serve(&["--thin", "0:8m", "--thin", "1:8m"]);
    let mut client = scene.connect("0");
    assert!(
        client.read(0, 8 << 20).expect("read") == model,
        "after the crash"
    );
    // What is discarded comes back to the file below.
    let room = || {
        fs::metadata(scene.path("data.img"))
            .expect("there")
            .blocks()
    };
    let before = room();
    client.ask(TRIM, FUA, 0, 8 << 20, &[]).expect("trimmed");
    assert!(room() < before, "{} of {before}", room());
    // A device grows by other means, and is then used.
    let image = File::options()
        .write(true)
        .open(scene.path("data.img"))
        .expect("opened");
    image.set_len(256 * SIZE).expect("longer");
    program("losetup", ["-c".as_ref(), devices[1].0.as_os_str()])
        .run()
        .expect(0);
    scene.asked(&["resize"]);
    assert!(scene.asked(&["status"]).contains("/256 "));
    scene
        .ctl(&["resize", "--data", "512"])
        .expect(1)
        .expect_stderr(&["block device"]);
    let mut other = scene.connect("1");
    other.write(0, &vec![7; 100 * BLOCK]).expect("written");
    drop((client, other));
    scene.stop();
    // Given the wrong way round.
    let (meta, data) = (scene.path("meta"), scene.path("data"));
    fs::rename(&meta, scene.path("x")).expect("moved");
    fs::rename(&data, &meta).expect("moved");
    fs::rename(scene.path("x"), &data).expect("moved");
    for more in [
        &["--run", "true"][..],
        &["--read-only", "--run", "true"],
        &["--create", "--run", "true"],
    ] {
        scene
            .run(more)
            .expect(1)
            .expect_stderr(&["wrong way round"]);
    }
}

/// Writes to a device and to what it should hold.
fn put(client: &mut Client, model: &mut [u8], at: usize, data: &[u8]) {
    client.write(at as u64, data).expect("written");
    model[at..at + data.len()].copy_from_slice(data);
}

/// What was never written is the origin's, as far as it goes, and zeros behind its end.
#[track_caller]
fn expect(client: &mut Client, model: &[u8], what: &str) {
    let found = client.read(0, model.len()).expect("read");
    let wrong = found.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{what}: the first wrong byte");
    // The same in pieces that keep to no edge.
    let mut rng = SmallRng::seed_from_u64(5);
    for _ in 0..100 {
        let at = rng.random_range(0..model.len());
        let len = rng.random_range(1..=(model.len() - at).min(3 * BLOCK));
        assert!(
            client.read(at as u64, len).expect("read") == model[at..at + len],
            "{what}: {len} at {at}"
        );
    }
}

fn lives_on_an_origin(origin: &Path, content: &[u8]) {
    let mut scene = Scene::new(256, 1 << 20);
    let given = format!("0={}", origin.display());
    let snapshots = format!("1={}", origin.display());
    let size = 20 * BLOCK;
    let mut model = vec![0; size];
    let whole_sectors = content.len() / 512 * 512;
    model[..content.len()].copy_from_slice(content);
    let of = ["--create", "--thin", "0:1280k", "--origin", &given];
    scene.serve(&of);
    let mut client = scene.connect("0");
    expect(&mut client, &model, "nothing is written");
    assert!(scene.asked(&["status"]).contains(" 0/256 "));
    // In the middle of a block, over an edge, a whole one, at the end of the origin, behind it, and a byte.
    for (at, len) in [
        (1000, 3000),
        (3 * BLOCK - 700, 1400),
        (5 * BLOCK, BLOCK),
        (whole_sectors - 100, 150),
        (15 * BLOCK + 17, 33),
        (8 * BLOCK + 1, 1),
    ] {
        put(&mut client, &mut model, at, &vec![at as u8 | 1; len]);
    }
    client.flush().expect("flushed");
    expect(&mut client, &model, "some is written");
    // A snapshot of the device, while it is used; it has the same origin.
    let old = model.clone();
    scene.asked(&["create_snap", "1", "0"]);
    scene.asked(&[
        "activate",
        "1",
        &size.to_string(),
        &origin.display().to_string(),
    ]);
    put(&mut client, &mut model, 100, &[0xcc; 70_000]);
    put(&mut client, &mut model, 5 * BLOCK + 5, &[0xdd; 5]);
    // Zeros are what they say, whatever the origin has.
    client
        .ask(6, 0, 2 * SIZE, 3 * BLOCK as u32, &[])
        .expect("zeroed");
    model[2 * BLOCK..5 * BLOCK].fill(0);
    let mut snapshot = scene.connect("1");
    expect(&mut snapshot, &old, "the snapshot");
    let mut changed = old.clone();
    put(&mut snapshot, &mut changed, 9 * BLOCK + 9, &[0xee; 99]);
    expect(&mut client, &model, "beside its snapshot");
    drop((client, snapshot));
    scene.stop();
    scene.serve(&[
        "--read-only",
        "--thin",
        "0:1280k",
        "--origin",
        &given,
        "--thin",
        "1:1280k",
        "--origin",
        &snapshots,
    ]);
    expect(&mut scene.connect("0"), &model, "after a restart");
    expect(
        &mut scene.connect("1"),
        &changed,
        "the snapshot after a restart",
    );
    scene.stop();
}

#[test]
fn a_device_with_an_origin_that_is_shorter_reads_it_and_zeros_behind_it() {
    let folder = folder();
    let origin = folder.path().join("origin");
    // Ends in the middle of a block, and of a sector.
    let mut content = vec![0; 10 * BLOCK + 7 * 512 + 100];
    SmallRng::seed_from_u64(1).fill(&mut content[..]);
    fs::write(&origin, &content).expect("written");
    lives_on_an_origin(&origin, &content);
    assert!(
        fs::read(&origin).expect("read") == content,
        "the origin was written to"
    );
    if can(&[LOOP]) {
        let device = Loop::on(&origin);
        // It has whole sectors only.
        lives_on_an_origin(&device.0, &content[..content.len() / 512 * 512]);
        assert!(
            fs::read(&origin).expect("read") == content,
            "the origin was written to"
        );
    }
    let scene = Scene::new(4, 1 << 20);
    let nowhere = format!("0={}", folder.path().join("none").display());
    let refused = scene.run(&[
        "--create", "--thin", "0:1m", "--origin", &nowhere, "--run", "true",
    ]);
    refused.expect(1).expect_stderr(&["/none"]);
}

/// A file system of so many bytes, unmounted at the end.
struct Small(tempfile::TempDir);

impl Small {
    fn of(size: &str) -> Option<Self> {
        let at = folder();
        let option = format!("size={size}");
        let mounted = program(
            "mount",
            [
                "-t".as_ref(),
                "tmpfs".as_ref(),
                "-o".as_ref(),
                option.as_ref(),
                "none".as_ref(),
                at.path().as_os_str(),
            ],
        )
        .run();
        (mounted.code == Some(0)).then(|| Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        std::process::Command::new("umount")
            .arg("-l")
            .arg(self.0.path())
            .status()
            .ok();
    }
}

#[test]
fn a_pool_that_does_not_fit_its_file_system_is_refused_with_the_cause() {
    let Some(small) = Small::of("16k") else {
        use std::io::Write;
        std::io::stderr()
            .write_all(b"\n*** NOT TESTED: nothing can be mounted here ***\n")
            .ok();
        return;
    };
    let (meta, data) = (small.0.path().join("meta"), small.0.path().join("data"));
    let words = |before: &[&str]| {
        let words = before.iter().map(OsString::from).chain([
            meta.clone().into_os_string(),
            "--data".into(),
            data.clone().into_os_string(),
        ]);
        let more = [
            "--create",
            "--data-size",
            "1m",
            "--thin",
            "0:1m",
            "--run",
            "true",
        ];
        words.chain(more.map(OsString::from)).collect::<Vec<_>>()
    };
    let create = || thintools(words(&["thin_serve", "--metadata"])).run();
    create().expect(1).expect_stderr(&[
        "No space left on device",
        "the file system of this file",
        "--create",
    ]);
    // A limit of the shell is no other thing, and does not end it without a word.
    assert!(!meta.exists(), "half of it is left behind");
    let limited = [
        "-c",
        "ulimit -f 2000; exec \"$0\" \"$@\"",
        BINARY,
        "thin_serve",
        "--metadata",
    ];
    let refused = program("sh", words(&limited)).run().expect(1);
    refused.expect_stderr(&["File too large", "make room"]);
    assert!(!meta.exists(), "half of it is left behind");
    // Once there is room, the same command goes on.
    let remount = [
        "-o".as_ref(),
        "remount,size=16m".as_ref(),
        small.0.path().as_os_str(),
    ];
    program("mount", remount).run().expect(0);
    create().expect(0);
    check(&["-q"], &meta).expect(0);
}

/// Clients write to three devices of a pool that is too small for them; all of it is there in the end.
fn grows(more: &[&str], resize: bool) {
    const BLOCKS: u64 = 600;
    let mut scene = Scene::new(8, 512 << 10);
    let mut arguments = vec![
        "--create",
        "--queue-when-full",
        "0",
        "--thin",
        "0:64m",
        "--thin",
        "1:64m",
        "--thin",
        "2:64m",
    ];
    arguments.extend(more);
    scene.serve(&arguments);
    let is_over = AtomicBool::new(false);
    let written: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let (scene, is_over) = (&scene, &is_over);
        let clients: Vec<_> = (0..3_u64)
            .map(|id| {
                scope.spawn(move || {
                    let mut client = scene.connect(&id.to_string());
                    let mut rng = SmallRng::seed_from_u64(id);
                    // Where each block was last told who wrote it.
                    let mut tags = vec![0; 1024];
                    for n in 1..=BLOCKS {
                        let block = rng.random_range(0..1024_u64);
                        let mut data = [0; 4096];
                        data[..8].copy_from_slice(&(n << 8 | id).to_le_bytes());
                        let flags = if n % 50 == 0 { FUA } else { 0 };
                        client
                            .ask(WRITE, flags, block * SIZE + 8192, 4096, &data)
                            .expect("written");
                        tags[block as usize] = n << 8 | id;
                    }
                    client.flush().expect("flushed");
                    tags
                })
            })
            .collect();
        let grower = scope.spawn(move || {
            let (mut data, mut metadata) = (8, 128);
            while resize && !is_over.load(Ordering::Acquire) {
                (data, metadata) = (data + 40, metadata + 64);
                scene.asked(&[
                    "resize",
                    "--data",
                    &data.to_string(),
                    "--metadata",
                    &metadata.to_string(),
                ]);
            }
        });
        let written = clients
            .into_iter()
            .map(|client| client.join().expect("no panic"))
            .collect();
        is_over.store(true, Ordering::Release);
        grower.join().expect("no panic");
        written
    });
    let check = |scene: &Scene| {
        for (id, tags) in written.iter().enumerate() {
            let mut client = scene.connect(&id.to_string());
            for (block, tag) in tags.iter().enumerate() {
                let found = client
                    .ask(READ, 0, block as u64 * SIZE + 8192, 8, &[])
                    .expect("read");
                assert_eq!(found, tag.to_le_bytes(), "device {id}, block {block}");
            }
        }
    };
    check(&scene);
    scene.stop();
    let grown = fs::metadata(scene.path("data")).expect("there").len() / SIZE;
    assert!(grown > 900, "{grown} blocks");
    scene.serve(&arguments[3..9]);
    check(&scene);
    scene.stop();
}

#[test]
fn both_files_grow_by_messages_while_clients_write() {
    grows(&[], true);
}

#[test]
fn both_files_grow_by_themselves_while_clients_write() {
    grows(&["--autoextend", "70:20"], false);
}
