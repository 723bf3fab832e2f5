//! How `thin_serve` begins: what it makes, what it refuses, and how it tells that it is ready.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::serve::{BLOCK, Scene};
use crate::support::{BINARY, Finished, expand, get_u32, get_u64, program, thintools};

/// What cannot be served leaves no file behind, and what was there as it was.
#[test]
fn a_pool_that_cannot_be_made_leaves_nothing() {
    let scene = Scene::new(1, 1 << 20);
    let (meta, data) = (scene.path("meta"), scene.path("data"));
    let huge = |size: &str| {
        let more = ["--create", "--data-size", size, "--thin", "0:1m"];
        scene.run(&[&more[..], &["--run", "true"]].concat())
    };
    for file in [&meta, &data] {
        fs::remove_file(file).expect("removed");
    }
    // More blocks than mappings can name.
    huge("100000t").expect(1).expect_stderr(&["1099511627776"]);
    assert!(!meta.exists() && !data.exists());
    // Nowhere to serve.
    let nowhere = scene.run(&["--create", "--data-size", "1m"]).expect(1);
    nowhere.expect_stderr(&["nowhere to serve"]);
    assert!(!meta.exists() && !data.exists());
    // Files that were there: neither may be flagged for a check.
    File::create(&meta)
        .expect("made")
        .set_len(1 << 20)
        .expect("long");
    huge("100000t").expect(1);
    assert!(!data.exists());
    // More blocks than the metadata has room to count.
    huge("1t").expect(1);
    assert!(!data.exists());
    assert!(
        fs::read(&meta).expect("read")[..4096]
            .iter()
            .all(|&b| b == 0)
    );
    huge("1m").expect(0);
    scene.assert_sound();
}

/// A pool that exists has its blocks for good; a file that exists keeps its size, and that is told.
#[test]
fn what_exists_is_not_made_in_another_way() {
    let scene = Scene::new(1, 1 << 20);
    fs::remove_file(scene.path("data")).expect("removed");
    let create = |more: &[&str]| {
        scene.run(&[&["--create", "--thin", "0:1m", "--run", "true"], more].concat())
    };
    let silent = create(&["--data-size", "1m"]).expect(0);
    assert_eq!(silent.stderr, "");
    let told = create(&["--data-size", "2m"]).expect(0);
    told.expect_stderr(&["stays 1048576 bytes", "--data-size"]);
    assert_eq!(
        fs::metadata(scene.path("data")).expect("there").len(),
        16 * BLOCK as u64
    );
    create(&["--block-size", "64k"]).expect(0);
    let refused = create(&["--block-size", "128k"]).expect(1);
    refused.expect_stderr(&["65536 bytes for good", "131072"]);
    scene.assert_sound();
}

/// Over a pool that has lost no more than its superblock none is made: it can still be saved.
#[test]
fn a_pool_without_its_superblock_is_not_overwritten() {
    let scene = Scene::of_kernel();
    let meta = File::options().write(true).open(scene.path("meta"));
    let meta = meta.expect("opened");
    meta.write_all_at(&[0; 4096], 0).expect("written");
    let before = fs::read(scene.path("meta")).expect("read");
    let create = ["--create", "--run", "true"];
    let refused = scene.run(&create).expect(1);
    refused.expect_stderr(&["begins with zeros", "--read-only", "thin_repair", "4194304"]);
    assert!(fs::read(scene.path("meta")).expect("read") == before);
    // Without knowing how large data blocks are nothing can be served, and the option for that is our own.
    let lost = scene.run(&["--read-only", "--run", "true"]).expect(5);
    lost.expect_stderr(&["thin_serve --block-size"]);
    scene
        .run(&["--read-only", "--block-size", "64k", "--run", "true"])
        .expect(0);
    meta.write_all_at(&vec![0; 4 << 20], 0).expect("written");
    scene.run(&create).expect(0);
}

/// The blocks of the space maps of a pool of one bitmap of data: index and bitmap of both.
fn space_map_blocks(meta: &[u8]) -> [u64; 4] {
    let fields = thintools::thin::Fields::unpack(&meta[..4096]);
    let (index, tree) = (
        fields.metadata_space_map.bitmap_root.0,
        fields.data_space_map.bitmap_root.0,
    );
    let at = |block: u64, byte: usize| block as usize * 4096 + byte;
    let values = 32 + 8 * get_u32(meta, at(tree, 20)) as usize;
    let bitmaps = [
        get_u64(meta, at(index, 16)),
        get_u64(meta, at(tree, values)),
    ];
    [index, tree, bitmaps[0], bitmaps[1]]
}

/// A write would fail, and have the pool flagged; whoever reads needs none of them.
#[test]
fn space_maps_that_cannot_be_read_are_refused_at_the_start() {
    let scene = Scene::of_kernel();
    let whole = fs::read(scene.path("meta")).expect("read");
    let mut expected = expand("seq-1thin/data.raw");
    expected[900 * BLOCK..].fill(0);
    for block in space_map_blocks(&whole) {
        let mut meta = whole.clone();
        meta[block as usize * 4096 + 40..][..8].fill(0xa5);
        fs::write(scene.path("meta"), &meta).expect("written");
        let refused = scene.run(&["--run", "true"]).expect(5);
        let named = format!("metadata block {block}: ");
        let file = scene.path("meta").display().to_string();
        refused.expect_stderr(&[&named, &file, "--read-only", "thin_check"]);
        let copy = format!("nbdcopy \"$uri\" {}", scene.path("copy").display());
        scene
            .run(&["--read-only", "--thin", "0:64m", "--run", &copy])
            .expect(0);
        assert!(
            fs::read(scene.path("copy")).expect("copied") == expected,
            "{block}"
        );
        fs::remove_file(scene.path("copy")).expect("removed");
        assert!(
            fs::read(scene.path("meta")).expect("read") == meta,
            "{block}"
        );
    }
}

/// Runs a script of sh in which `serve` serves a pool until it is ready, and tells descriptor 5.
fn told(scene: &Scene, script: &str) -> Finished {
    let script = format!("serve() {{ \"$@\" --ready-fd 5 --run true; }}; {script}");
    let mut call = program("sh", ["-c", &script, "sh", BINARY]);
    for argument in scene.arguments(&[]) {
        call = call.arg(argument);
    }
    call.run()
}

/// What is told goes where whoever handed the descriptor down would have written.
#[test]
fn the_ready_line_goes_to_the_descriptor_itself() {
    let scene = Scene::of_kernel();
    let file = scene.path("told");
    let shown = file.display();
    for how in [">", ">>"] {
        fs::write(&file, "").expect("written");
        let script = format!("exec 5{how}'{shown}'; echo a >&5; serve \"$@\"; echo b >&5");
        told(&scene, &script).expect(0);
        assert_eq!(
            fs::read_to_string(&file).expect("read"),
            "a\nready\nb\n",
            "{how}"
        );
    }
    told(&scene, &format!("exec 5<'{shown}'; serve \"$@\""))
        .expect(1)
        .expect_stderr(&["descriptor 5", "not open to be written to"]);
    told(&scene, "exec 5>&-; serve \"$@\"")
        .expect(1)
        .expect_stderr(&["descriptor 5", "Bad file descriptor"]);
    // A socket cannot be opened anew.
    let (mut ours, theirs) = UnixStream::pair().expect("made");
    let ended = tell(&scene, theirs.into());
    let mut line = String::new();
    ours.read_to_string(&mut line).expect("read");
    assert_eq!((ended, &*line), ((Some(0), String::new()), "ready\n"));
    // Somebody who does not wait any more.
    let (reader, writer) = std::io::pipe().expect("made");
    drop(reader);
    let (status, stderr) = tell(&scene, writer.into());
    assert_eq!(status, Some(1));
    assert!(
        stderr.contains("descriptor 1") && stderr.contains("Broken pipe"),
        "{stderr}"
    );
}

/// Has it tell its standard output; its status and what it says.
fn tell(scene: &Scene, output: OwnedFd) -> (Option<i32>, String) {
    let mut command = Command::new(BINARY);
    command.args(scene.arguments(&["--ready-fd", "1", "--run", "true"]));
    let server = command
        .stdout(Stdio::from(output))
        .stderr(Stdio::piped())
        .spawn();
    // What is kept of the command has the descriptor, too.
    drop(command);
    let ended = server.expect("started").wait_with_output().expect("ended");
    let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
    (ended.status.code(), stderr)
}

#[test]
fn the_uri_of_a_socket_takes_any_path() {
    let scene = Scene::of_kernel();
    let socket = format!("unix:{}", scene.path("a b&c=%41?#é").display());
    let size = scene.run(&[
        "--nbd",
        &socket,
        "--thin",
        "0:64m",
        "--run",
        "nbdinfo --size \"$uri\"",
    ]);
    assert_eq!(size.expect(0).out(), "67108864\n");
}

/// A client may write faster than files grow: then it waits.
#[test]
fn a_pool_that_grows_by_itself_does_not_fail_a_fast_writer() {
    let mut scene = Scene::new(16, 2 << 20);
    scene.serve(&["--create", "--thin", "0:256m", "--autoextend", "80:50"]);
    let mut client = scene.connect("0");
    for at in 0..32 {
        client.write(at << 22, &vec![7; 4 << 20]).expect("written");
    }
    drop(client);
    scene.stop();
    assert!(fs::metadata(scene.path("data")).expect("there").len() >= 128 << 20);
}

/// Refusals name what was given, and options that the command has.
#[test]
fn refusals_are_about_what_was_given() {
    let scene = Scene::of_kernel();
    let meta = scene.path("meta");
    let both = ["thin_serve", "--run", "true", "--metadata"].map(Into::into);
    let both = both
        .into_iter()
        .chain([meta.clone(), "--data".into(), meta]);
    thintools(both)
        .run()
        .expect(1)
        .expect_stderr(&["is given as the metadata and as the data"]);
    let refused = scene.run(&["--read-only", "--thin", "5:1m", "--run", "true"]);
    let refused = refused.expect(1).expect_stderr(&["no thin device 5"]);
    assert!(!refused.stderr.contains("--create"), "{}", refused.stderr);
}

/// `thin_ctl --socket`: wrong words have the status of a wrong command line, sizes have letters, and a path is the caller's.
#[test]
fn words_for_a_running_pool_are_those_of_a_command_line() {
    let mut scene = Scene::new(16, 1 << 20);
    scene.serve(&["--create", "--thin", "1:1m"]);
    for id in ["0", "2"] {
        scene.asked(&["create_thin", id]);
    }
    for wrong in [
        &["bogus"][..],
        &["resize", "10"],
        &["activate"],
        &["activate", "0", "16e"],
        &["activate", "0", "1k1"],
        &["activate", "16777216"],
        &["status", "x"],
        &["status", "1", "2"],
    ] {
        scene.ctl(wrong).expect(2);
    }
    scene.asked(&["activate", "0", "1g"]);
    assert_eq!(scene.connect("0").size, 1 << 30);
    let origin = Path::new(&scene.path("data")).with_file_name("origin");
    fs::write(&origin, vec![9; BLOCK]).expect("written");
    let script = "cd \"$1\" && exec \"$0\" thin_ctl --socket control activate 2 64k origin";
    let folder = origin.parent().expect("a folder");
    let ids = [BINARY.as_ref(), folder.as_os_str()];
    let mut call = program("sh", ["-c", script]);
    for word in ids {
        call = call.arg(word);
    }
    call.run().expect(0);
    let mut client = scene.connect("2");
    assert_eq!(client.read(0, 9).expect("read"), [9; 9]);
    drop(client);
    scene.stop();
}
