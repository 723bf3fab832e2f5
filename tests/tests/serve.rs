//! `thin_serve`: pools on real files, as NBD clients, managers and whoever pulls the plug see them.

pub(crate) mod client;
pub(crate) mod load;
mod soak;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    BINARY, Finished, check, expand, folder, get_u32, peer, program, restore, thintools,
};
use client::{Client, FUA, TRIM, WRITE, request};

pub(crate) const BLOCK: usize = 65536;
const ENOSPC: Option<u32> = Some(28);
pub(crate) const EIO: Option<u32> = Some(5);
const EINVAL: Option<u32> = Some(22);

/// A pool in files of a folder, and the server that may run on it.
pub(crate) struct Scene {
    folder: TempDir,
    pub(crate) server: Option<Child>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().ok();
            server.wait().ok();
        }
    }
}

impl Scene {
    /// A new pool of so many data blocks and so many bytes of metadata, not served yet.
    pub(crate) fn new(data_blocks: u64, metadata: u64) -> Self {
        let folder = folder();
        for (name, len) in [("meta", metadata), ("data", data_blocks * BLOCK as u64)] {
            File::create(folder.path().join(name))
                .expect("made")
                .set_len(len)
                .expect("long");
        }
        Self {
            folder,
            server: None,
        }
    }

    /// The pool that the kernel made, with its data.
    pub(crate) fn of_kernel() -> Self {
        let folder = folder();
        fs::write(folder.path().join("meta"), expand("seq-1thin/meta.img")).expect("written");
        fs::write(folder.path().join("data"), expand("seq-1thin/data.raw")).expect("written");
        Self {
            folder,
            server: None,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn arguments(&self, more: &[&str]) -> Vec<std::ffi::OsString> {
        let mut all = vec![
            "thin_serve".into(),
            "--metadata".into(),
            self.path("meta").into(),
        ];
        all.extend(["--data".into(), self.path("data").into()]);
        all.extend(more.iter().map(Into::into));
        all
    }

    /// Serves it until [`stop`](Self::stop), once clients can connect.
    pub(crate) fn serve(&mut self, more: &[&str]) {
        let sockets = [
            ("--nbd", format!("unix:{}", self.path("nbd").display())),
            ("--control", self.path("control").display().to_string()),
        ];
        let mut command = Command::new(BINARY);
        command.args(self.arguments(more)).args(["--ready-fd", "1"]);
        command.args(sockets.iter().flat_map(|(option, value)| [*option, value]));
        let mut server = command
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("started");
        let mut line = String::new();
        BufReader::new(server.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("read");
        assert_eq!(line, "ready\n", "it ended before it was ready");
        self.server = Some(server);
    }

    /// Runs it with a command line that ends by itself.
    pub(crate) fn run(&self, more: &[&str]) -> Finished {
        thintools(self.arguments(more)).run()
    }

    /// Pulls the plug.
    pub(crate) fn kill(&mut self) {
        let mut server = self.server.take().expect("it is served");
        server.kill().expect("killed");
        server.wait().expect("gone");
    }

    /// Stops it as a service manager does.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        self.stop_with(0);
    }

    /// The same, to end with this status.
    #[track_caller]
    pub(crate) fn stop_with(&mut self, code: i32) {
        let mut server = self.server.take().expect("it is served");
        program("kill", [server.id().to_string()]).run().expect(0);
        let end = Instant::now() + Duration::from_secs(60);
        let status = loop {
            if let Some(status) = server.try_wait().expect("waiting works") {
                break status;
            }
            if Instant::now() > end {
                server.kill().ok();
                server.wait().ok();
                panic!("it did not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.code(), Some(code));
        for name in ["nbd", "control"] {
            assert!(!self.path(name).exists(), "{name} is left behind");
        }
        self.assert_sound();
    }

    /// Our check and Debian's find nothing wrong, not even a leak.
    #[track_caller]
    pub(crate) fn assert_sound(&self) {
        check(&["-q"], &self.path("meta")).expect(0);
        peer(
            "thin_check",
            &[OsStr::new("-q"), self.path("meta").as_os_str()],
        )
        .expect(0);
    }

    /// The most memory that the server has had, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        let id = self.server.as_ref().expect("it is served").id();
        let status = fs::read_to_string(format!("/proc/{id}/status")).expect("read");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        number.expect("a number of KiB") << 10
    }

    pub(crate) fn connect(&self, export: &str) -> Client {
        Client::connect(&self.path("nbd"), export).expect("connected")
    }

    pub(crate) fn ctl(&self, words: &[&str]) -> Finished {
        let mut all = vec![
            "thin_ctl".into(),
            "--socket".into(),
            self.path("control").into_os_string(),
        ];
        all.extend(words.iter().map(Into::into));
        thintools(all).run()
    }

    /// Sends something that must succeed; what is printed comes back.
    #[track_caller]
    pub(crate) fn asked(&self, words: &[&str]) -> String {
        self.ctl(words)
            .expect(0)
            .out()
            .trim_end_matches('\n')
            .to_owned()
    }
}

#[test]
fn what_the_kernel_wrote_is_served_as_it_is() {
    let mut scene = Scene::of_kernel();
    let mut expected = expand("seq-1thin/data.raw");
    expected[900 * BLOCK..].fill(0);
    let before = (
        fs::read(scene.path("meta")).expect("read"),
        fs::read(scene.path("data")).expect("read"),
    );
    let copy = format!("nbdcopy \"$uri\" {}", scene.path("copy").display());
    scene
        .run(&["--read-only", "--thin", "0:64m", "--run", &copy])
        .expect(0);
    assert!(fs::read(scene.path("copy")).expect("copied") == expected);
    let after = (
        fs::read(scene.path("meta")).expect("read"),
        fs::read(scene.path("data")).expect("read"),
    );
    assert!(before == after, "something was written");
    // Without a size it ends with the last mapped block, and it may be written.
    scene.serve(&[]);
    let mut client = scene.connect("");
    assert_eq!(client.size, 900 * BLOCK as u64);
    // Has flags; not read-only; flush, FUA, trim, zeroes, several connections.
    assert_eq!(client.flags & 0b1_0110_1111, 0b1_0110_1101);
    client
        .write(5 * BLOCK as u64 + 512, &[0xee; 1024])
        .expect("written");
    client.flush().expect("flushed");
    let status = scene.asked(&["status"]);
    let known = " 900/1024 - rw discard_passdown error_if_no_space - 128";
    assert!(
        status.starts_with("0 131072 thin-pool 0 ") && status.contains(known),
        "{status}"
    );
    assert_eq!(scene.asked(&["status", "0"]), "0 115200 thin 115200 115199");
    drop(client);
    scene.stop();
    expected[5 * BLOCK + 512..][..1024].fill(0xee);
    scene
        .run(&["--thin", "0:64m", "--run", &copy.replace("/copy", "/copy2")])
        .expect(0);
    assert!(fs::read(scene.path("copy2")).expect("copied") == expected);
}

/// The clients that people have, against a model: they come to the same content.
#[test]
fn qemu_and_libnbd_find_what_they_wrote_after_a_restart() {
    let scene = Scene::new(256, 1 << 20);
    let write = "qemu-io -f raw -c 'write -P 0xaa 1M 1M' -c 'write -z -u 8M 1M' -c 'write -f -P 3 4M 64k' -c 'write -P 9 12M 300k' \
                 -c 'write -z 12100k 100k' -c 'discard 1M 64k' -c flush \"$uri\"";
    let created = scene
        .run(&["--create", "--thin", "0:32m", "--run", write])
        .expect(0);
    assert!(!created.out().contains("failed"), "{}", created.out());
    scene.assert_sound();
    let read = "qemu-io -f raw -c 'read -P 0 0 1M' -c 'read -P 0 1M 64k' -c 'read -P 0xaa 1088k 960k' -c 'read -P 3 4M 64k' \
                -c 'read -P 0 8M 1M' -c 'read -P 9 12388k 200k' -c 'read -P 0 12588k 1M' \"$uri\" | tee /dev/stderr | grep -q failed && exit 9; nbdinfo --size \"$uri\"";
    let found = scene.run(&["--thin", "0:32m", "--run", read]).expect(0);
    assert_eq!(found.out().trim(), "33554432", "{}", found.stderr);
}

/// What people do with the tools that they have, one after the other, on one pool.
#[test]
fn clients_that_people_have_work_on_a_pool() {
    let mut scene = Scene::new(512, 1 << 20);
    scene.serve(&["--create", "--thin", "0:16m", "--thin", "1:16m"]);
    let uri = |export: &str| {
        format!(
            "nbd+unix:///{export}?socket={}",
            scene.path("nbd").display()
        )
    };
    let (first, second) = (uri("0"), uri("1"));
    let file = |name: &str| scene.path(name).display().to_string();
    let run = |command: &str, args: &[&str]| program(command, args).run().expect(0).out();
    let data: Vec<u8> = (0..16 << 20)
        .map(|i: u32| (i / 7 % 251) as u8 * u8::from(i < 5 << 20))
        .collect();
    fs::write(file("in"), &data).expect("written");
    run("nbdcopy", &["--flush", &file("in"), &first]);
    run("nbdcopy", &[&first, &second]);
    // Holes are told in replies to reads when nobody asks for them before.
    for (n, more) in ["--no-extents", "--synchronous"].into_iter().enumerate() {
        let out = file(&format!("out{n}"));
        run("nbdcopy", &[more, &second, &out]);
        assert!(fs::read(out).expect("copied") == data, "{more}");
    }
    let list = run("nbdinfo", &["--list", "--json", &uri("")]);
    let list: Value = serde_json::from_str(&list).expect("JSON");
    let names = list["exports"].as_array().expect("a list").iter();
    let names: Vec<_> = names.map(|export| export["export-name"].as_str()).collect();
    assert_eq!(names, [Some("0"), Some("1")], "{list}");
    assert!(run("qemu-img", &["info", "-f", "raw", &first]).contains("virtual size: 16 MiB"));
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &first, &file("out")],
    );
    assert!(fs::read(file("out")).expect("converted") == data);
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &first, &file("in")],
    );
    let bench = ["bench", "-f", "raw", "-c", "1000", "-d", "32", "-s", "4096"];
    run("qemu-img", &[&bench[..], &[&second]].concat());
    run(
        "qemu-img",
        &[
            &bench[..],
            &["-w", "--flush-interval=100", "--no-drain", &second],
        ]
        .concat(),
    );
    let given = format!("--uri={first}");
    let fio = [
        "--name=verify",
        "--ioengine=nbd",
        &given,
        "--rw=randrw",
        "--bs=4k-64k",
        "--iodepth=32",
        "--size=16M",
    ];
    run(
        "fio",
        &[
            &fio[..],
            &["--verify=crc32c", "--do_verify=1", "--verify_state_save=0"],
        ]
        .concat(),
    );
    assert!(
        !run(
            "qemu-io",
            &[
                "-f",
                "raw",
                "-c",
                "discard 0 16M",
                "-c",
                "read -P 0 0 16M",
                &second
            ]
        )
        .contains("failed")
    );
    assert_eq!(scene.asked(&["status", "1"]), "0 32768 thin 0 -");
    scene.stop();
}

/// nbdfuse makes a file of an export, for whoever speaks no NBD.
#[test]
fn nbdfuse_shows_an_export_as_a_file() {
    let mut scene = Scene::new(512, 1 << 20);
    scene.serve(&["--create", "--thin", "0:16m"]);
    fs::create_dir(scene.path("mnt")).expect("made");
    let mut nbdfuse = Command::new("nbdfuse");
    nbdfuse.arg(scene.path("mnt").join("disk"));
    nbdfuse.arg(format!(
        "nbd+unix:///0?socket={}",
        scene.path("nbd").display()
    ));
    let mut mounted = nbdfuse.spawn().expect("started");
    let disk = scene.path("mnt").join("disk");
    let end = Instant::now() + Duration::from_secs(60);
    while !disk.exists() {
        assert!(Instant::now() < end, "nothing is mounted");
        std::thread::sleep(Duration::from_millis(5));
    }
    let wrote = (|| {
        let file = File::options().read(true).write(true).open(&disk)?;
        file.write_all_at(&[7; 3 * BLOCK], 1000)?;
        file.sync_all()?;
        let mut found = vec![0; 4 * BLOCK];
        file.read_exact_at(&mut found, 0)?;
        std::io::Result::Ok((file.metadata()?.len(), found))
    })();
    let unmounted = program("fusermount3", ["-u".into(), scene.path("mnt")]).run();
    if unmounted.code != Some(0) {
        mounted.kill().ok();
    }
    mounted.wait().expect("gone");
    let (len, found) = wrote.expect("a file like others");
    assert_eq!(len, 16 << 20);
    let mut expected = vec![0; 4 * BLOCK];
    expected[1000..][..3 * BLOCK].fill(7);
    assert!(found == expected);
    assert!(scene.connect("0").read(0, 4 * BLOCK) == Ok(expected));
    scene.stop();
}

#[test]
fn random_requests_find_what_a_model_has_across_restarts_and_snapshots() {
    random_requests(&["--create"]);
}

#[test]
fn random_requests_find_what_a_model_has_past_the_page_cache() {
    if takes_direct_io() {
        random_requests(&["--create", "--direct"]);
    }
}

/// Not every file system takes direct I/O; of one that does not the server says so.
fn takes_direct_io() -> bool {
    let scene = Scene::new(8, 1 << 20);
    let tried = scene.run(&["--create", "--direct", "--run", "true"]);
    if tried.code != Some(0) {
        assert!(
            tried.stderr.contains("takes no direct I/O"),
            "{}",
            tried.stderr
        );
        eprintln!("direct I/O is not tested: {}", tried.stderr);
    }
    tried.code == Some(0)
}

/// Many requests at once, of every size and place, are carried out as one by one; qemu-img and fio have them under way.
#[test]
fn requests_at_depth_past_the_page_cache_come_to_the_same_content() {
    if !takes_direct_io() {
        return;
    }
    let scene = Scene::new(1024, 1 << 20);
    let job = "fio --name=j --ioengine=nbd --uri=\"$uri\" --size=24m --iodepth=24 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=/dev/stderr";
    let write = format!("{job} --rw=randwrite --bsrange=512-96k --fsync=50 --do_verify=1");
    let direct = ["--create", "--direct", "--thin", "0:64m", "--run"];
    scene.run(&[&direct[..], &[&write]].concat()).expect(0);
    scene.assert_sound();
    // In place, and once more after a restart, through the page cache.
    let again = format!("{job} --rw=randwrite --bs=4k --do_verify=1");
    scene.run(&[&direct[..], &[&again]].concat()).expect(0);
    let read = format!("{job} --rw=randwrite --bs=4k --verify_only=1");
    scene.run(&["--thin", "0:64m", "--run", &read]).expect(0);
    scene.assert_sound();
}

/// What is opened is not read: with a hundred times the mappings the start takes the same few blocks, and the bitmaps of the space maps.
#[test]
fn start_up_reads_the_roots_and_not_the_pool() {
    let read = |mappings: u64| {
        let mut scene = Scene::new(mappings, 16 << 20);
        let mut xml = format!(
            "<superblock uuid=\"\" time=\"0\" transaction=\"0\" version=\"2\" data_block_size=\"128\" nr_data_blocks=\"{mappings}\">\n\
             <device dev_id=\"0\" mapped_blocks=\"{mappings}\" transaction=\"0\" creation_time=\"0\" snap_time=\"0\">\n"
        );
        for block in 0..mappings {
            // No two follow on each other.
            let data = block ^ 1;
            xml += &format!(
                "<single_mapping origin_block=\"{block}\" data_block=\"{data}\" time=\"0\"/>\n"
            );
        }
        xml += "</device>\n</superblock>\n";
        fs::write(scene.path("xml"), xml).expect("written");
        restore(&scene.path("xml"), &scene.path("meta")).expect(0);
        scene.serve(&["--thin", "0:64g"]);
        let process = scene.server.as_ref().expect("it is served").id();
        let io = fs::read_to_string(format!("/proc/{process}/io")).expect("read");
        let bytes = io.lines().find_map(|line| line.strip_prefix("rchar: "));
        let bytes: u64 = bytes.expect("a number").parse().expect("a number");
        let stats: Value = serde_json::from_str(&scene.asked(&["stats"])).expect("JSON");
        scene.stop();
        (
            bytes,
            stats["metadata_blocks_read"].as_u64().expect("a number"),
        )
    };
    let (few, few_blocks) = read(2_000);
    let (many, many_blocks) = read(200_000);
    assert!(
        many_blocks <= few_blocks + 8 && many <= few + 64 * 4096,
        "{few_blocks} blocks and {few} bytes; {many_blocks} and {many} of a hundred times the mappings"
    );
}

/// One look at a pool, where there is no terminal.
#[test]
fn top_tells_what_a_pool_does() {
    let mut scene = Scene::new(64, 1 << 20);
    scene.serve(&["--create", "--thin", "3:64m", "--thin", "4:1g"]);
    let mut client = scene.connect("3");
    client.write(0, &[1; 2 * BLOCK]).expect("written");
    client.flush().expect("flushed");
    // Nothing is left to the worker: the blocks are mapped, and nothing is to be committed.
    client.write(0, &[2; BLOCK]).expect("written");
    client.flush().expect("flushed");
    let stats: Value = serde_json::from_str(&scene.asked(&["stats"])).expect("JSON");
    let thin = &stats["thins"][0];
    let io = &thin["io"];
    assert_eq!(
        (&thin["id"], &thin["mapped_blocks"], &thin["is_open"]),
        (&3.into(), &2.into(), &true.into())
    );
    assert_eq!(
        (&io["writes"], &io["written_bytes"], &io["flushes"]),
        (&2.into(), &(3 * BLOCK).into(), &2.into())
    );
    assert_eq!(
        io["deferred"],
        serde_json::json!({ "flush": 1, "unprovisioned": 2 })
    );
    let metrics = scene.asked(&["metrics"]);
    assert!(
        metrics.contains("\nthin_written_bytes_total{thin=\"3\"} 196608\n"),
        "{metrics}"
    );
    let top = scene.asked(&["top"]);
    let lines: Vec<Vec<&str>> = top
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[0][1..],
        ["mode", "rw", "transaction", "0", "2", "thin", "devices"]
    );
    let bar = format!("[#{}]", ".".repeat(29));
    assert_eq!(lines[1][..3], ["data", &bar, "3.1%"]);
    assert!(lines[4].starts_with(&["deferred", "0/s"]), "{top}");
    assert_eq!(lines[6][0], "ID");
    assert_eq!(
        lines[7][..6],
        ["3", "64.00", "MiB", "128.00", "KiB", "0.2%"]
    );
    assert_eq!(lines[8][..5], ["4", "1.00", "GiB", "0", "B"]);
    assert!(!top.contains('\x1b'), "it is plain");
    let refused = scene.ctl(&["top", "3"]);
    assert!(
        refused.code == Some(2) && refused.stderr.contains("top"),
        "{}",
        refused.stderr
    );
    drop(client);
    scene.stop();
}

fn random_requests(options: &[&str]) {
    let mut scene = Scene::new(512, 1 << 20);
    let mut rng = SmallRng::seed_from_u64(7);
    let len = 40 * BLOCK;
    let mut models = vec![vec![0_u8; len]];
    for round in 0..4 {
        scene.serve(options);
        if round == 0 {
            scene.asked(&["message", "create_thin", "0"]);
        }
        for id in 0..models.len() {
            scene.asked(&["activate", &id.to_string(), &len.to_string()]);
        }
        let mut clients: Vec<Client> = (0..models.len())
            .map(|id| scene.connect(&id.to_string()))
            .collect();
        for n in 0..400 {
            let id = rng.random_range(0..models.len());
            let at = rng.random_range(0..len - 1);
            let size = rng.random_range(1..=(len - at).min(3 * BLOCK));
            let (client, model) = (&mut clients[id], &mut models[id]);
            match rng.random_range(0..10) {
                0..4 => {
                    let data = vec![rng.random_range(1..=255); size];
                    client.write(at as u64, &data).expect("written");
                    model[at..at + size].copy_from_slice(&data);
                }
                4 => {
                    // WRITE_ZEROES, with every flag that there is.
                    let flags = rng.random_range(0..2) | rng.random_range(0..2) << 1;
                    client
                        .ask(6, flags, at as u64, size as u32, &[])
                        .expect("zeroed");
                    model[at..at + size].fill(0);
                }
                5 if n % 4 == 0 => drop(client.flush().expect("flushed")),
                6 => {
                    let blocks = at.div_ceil(BLOCK)..(at + size) / BLOCK;
                    client
                        .ask(TRIM, 0, at as u64, size as u32, &[])
                        .expect("trimmed");
                    if blocks.start < blocks.end {
                        model[blocks.start * BLOCK..blocks.end * BLOCK].fill(0);
                    }
                }
                _ => {
                    let found = client.read(at as u64, size).expect("read");
                    assert!(
                        found == model[at..at + size],
                        "round {round}, request {n}, device {id}, {size} at {at}"
                    );
                }
            }
        }
        if round < 3 {
            // Of a device that is in use.
            let (new, of) = (models.len(), rng.random_range(0..models.len()));
            scene.asked(&["create_snap", &new.to_string(), &of.to_string()]);
            models.push(models[of].clone());
        }
        drop(clients);
        scene.stop();
    }
}

/// What a flush, or a write with FUA, has acknowledged is there after a crash; the metadata is whole.
#[test]
fn after_kill_9_under_load_everything_flushed_is_there() {
    let mut scene = Scene::new(2048, 2 << 20);
    let mut rng = SmallRng::seed_from_u64(9);
    const CHUNKS: usize = 4096;
    // By chunk of 4 KiB: the last durable tag, and those that were written since.
    let mut durable = vec![0_u8; CHUNKS];
    let mut since: Vec<Vec<u8>> = vec![Vec::new(); CHUNKS];
    let mut seen = 0;
    for round in 0..50_u64 {
        scene.serve(&[
            "--create", "--thin", "0:16m", "--thin", "1:16m", "--thin", "2:16m",
        ]);
        seen += u64::from(assert_in_order(&mut scene.connect("1"), round) && round > 0);
        let mut client = scene.connect("0");
        let all = client.read(0, CHUNKS * 4096).expect("read");
        for (chunk, (was, may)) in durable.iter_mut().zip(&mut since).enumerate() {
            let found = &all[chunk * 4096..][..4096];
            let is_known = found[0] == *was || may.contains(&found[0]);
            assert!(
                is_known,
                "round {round}, chunk {chunk}: {} after {was} and {may:?}",
                found[0]
            );
            assert!(found.iter().all(|byte| *byte == found[0]), "torn");
            // What is there now may be lost, as long as it was not flushed.
            may.retain(|tag| tag == &found[0]);
            if found[0] != *was && may.is_empty() {
                may.push(found[0]);
            }
        }
        client.flush().expect("flushed");
        for (chunk, (was, may)) in durable.iter_mut().zip(&mut since).enumerate() {
            *was = all[chunk * 4096];
            may.clear();
        }
        let mut fio = fio(&scene, round + 1);
        let mut of_fio = scene.connect("1");
        let end = Instant::now() + Duration::from_secs(60);
        while of_fio.read(0, 1).expect("read") != [round as u8 + 1] {
            assert!(Instant::now() < end, "round {round}: fio does not write");
        }
        let patience = Duration::from_millis(rng.random_range(100..700));
        let scene_ref = &mut scene;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(patience);
                scene_ref.kill();
            });
            loop {
                let chunk = rng.random_range(0..CHUNKS);
                let tag = rng.random_range(1..=255);
                let flags = if rng.random_ratio(1, 8) { FUA } else { 0 };
                since[chunk].push(tag);
                match client.ask(WRITE, flags, chunk as u64 * 4096, 4096, &[tag; 4096]) {
                    Err(None) => break,
                    Ok(_) if flags == FUA => {
                        durable[chunk] = tag;
                        since[chunk].clear();
                    }
                    other => drop(other.expect("written")),
                }
                if rng.random_ratio(1, 20) {
                    match client.flush() {
                        Err(None) => break,
                        other => drop(other.expect("flushed")),
                    }
                    for (was, may) in durable.iter_mut().zip(&mut since) {
                        if let Some(last) = may.last() {
                            *was = *last;
                        }
                        may.clear();
                    }
                }
            }
        });
        // It may have noticed by itself.
        fio.kill().ok();
        fio.wait().expect("gone");
        // A crash of the kernel may leak blocks that no mapping got, this one does not.
        scene.assert_sound();
    }
    assert!(seen > 10, "fio wrote in {seen} rounds only");
}

/// Chunks that fio writes before it flushes.
const FLUSHED: usize = 8;

/// Starts fio, which fills device 1 with a number, chunk by chunk, with flushes in between, and device 2 at random.
fn fio(scene: &Scene, number: u64) -> Child {
    let uri = |id| {
        format!(
            "--uri=nbd+unix:///{id}?socket={}",
            scene.path("nbd").display()
        )
    };
    let both = ["--ioengine=nbd", "--bs=4k", "--size=16m", "--loops=1000"];
    // Should this process be killed, fio must not go on for ever, nor those that it would make if its jobs were no threads.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "fio", "--thread"])
        .args(both)
        .args(["--name=order", "--rw=write", &uri(1)]);
    command.args([
        format!("--fsync={FLUSHED}"),
        format!("--buffer_pattern=0x{number:02x}"),
    ]);
    command.args([
        "--name=noise",
        "--rw=randwrite",
        "--iodepth=16",
        "--fsync=32",
        &uri(2),
    ]);
    command.args(both).current_dir(scene.folder.path());
    let started = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    started.expect("fio is installed")
}

/// What fio has sent after a flush tells that it was answered: all that it had written before is there. True if it came to write.
fn assert_in_order(client: &mut Client, number: u64) -> bool {
    let found = client.read(0, 16 << 20).expect("read");
    let chunks = found.chunks(4096).collect::<Vec<_>>();
    let is_new = |chunk: &&[u8]| chunk.iter().all(|byte| u64::from(*byte) == number);
    for (n, chunk) in chunks.iter().enumerate() {
        let is_whole = chunk
            .iter()
            .all(|byte| *byte == chunk[0] && u64::from(*byte) <= number);
        assert!(is_whole, "round {number}, chunk {n} of fio");
    }
    let last = chunks.iter().rposition(is_new);
    let flushed = last.map_or(0, |last| last / FLUSHED * FLUSHED);
    assert!(
        chunks[..flushed].iter().all(is_new),
        "round {number}: fio's flushed chunks are lost"
    );
    last.is_some()
}

#[test]
fn a_full_pool_fails_writes_and_goes_on_once_it_has_grown() {
    let mut scene = Scene::new(4, 512 << 10);
    scene.serve(&["--create", "--thin", "0:1g"]);
    let mut client = scene.connect("0");
    client.write(0, &vec![1; 4 * BLOCK]).expect("written");
    assert_eq!(client.write(4 * BLOCK as u64, &[1; 512]), Err(ENOSPC));
    client
        .write(100, &[2; 512])
        .expect("what is mapped can be written");
    client.flush().expect("flushed");
    assert!(
        scene
            .asked(&["status"])
            .contains(" 4/4 - out_of_data_space "),
        "{}",
        scene.asked(&["status"])
    );
    scene.asked(&["resize", "--data", "6"]);
    assert!(scene.asked(&["status"]).contains(" 4/6 - rw "));
    client.write(4 * BLOCK as u64, &[1; 512]).expect("written");
    assert_eq!(
        fs::metadata(scene.path("data")).expect("there").len(),
        6 * BLOCK as u64
    );
    let events = scene.asked(&["stats"]);
    assert!(serde_json::from_str::<Value>(&events).expect("JSON")["events"].as_u64() >= Some(3));
    drop(client);
    scene.stop();
}

#[test]
fn a_write_that_may_wait_gets_its_space() {
    let mut scene = Scene::new(1, 512 << 10);
    scene.serve(&["--create", "--thin", "0:1m", "--queue-when-full", "0"]);
    let mut client = scene.connect("0");
    client.write(0, &vec![1; BLOCK]).expect("written");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.write(BLOCK as u64, &[2; 512]));
        let end = Instant::now() + Duration::from_secs(60);
        while !scene.asked(&["status"]).contains("out_of_data_space") {
            assert!(Instant::now() < end, "it is never full");
        }
        assert!(!waiting.is_finished());
        // What does not need space does not wait for what does, and a flush has nothing to do with what is not answered.
        let told = r#"
h.connect_uri(uri)
w = h.aio_pwrite(b"x" * 512, 3 * 65536)
assert h.pread(9, 0) == b"\x01" * 9 and not h.aio_command_completed(w)
h.flush()
"#;
        nbdsh(&scene, told).expect(0);
        scene.asked(&["resize", "--data", "3"]);
        waiting.join().expect("no panic").expect("written");
    });
    drop(client);
    scene.stop();
}

/// What was acknowledged stays, and whoever waits for space, with or without an end, is told that there is none.
#[test]
fn a_server_whose_writes_wait_for_space_stops() {
    for patience in ["0", "3600"] {
        let mut scene = Scene::new(2, 512 << 10);
        scene.serve(&["--create", "--thin", "0:1m", "--queue-when-full", patience]);
        let mut client = scene.connect("0");
        client.write(0, &vec![1; 2 * BLOCK]).expect("written");
        client.flush().expect("flushed");
        let mut gone = scene.connect("0");
        gone.send(&request(WRITE, 5 * BLOCK as u64, 512));
        gone.send(&[3; 512]);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| client.write(3 * BLOCK as u64, &[2; 512]));
            wait_until(|| deferred(&scene, "unprovisioned") >= 4);
            wait_until(|| scene.asked(&["status"]).contains("out_of_data_space"));
            drop(gone);
            scene.stop();
            assert_eq!(waiting.join().expect("no panic"), Err(ENOSPC));
        });
        scene.serve(&["--thin", "0:1m"]);
        let mut client = scene.connect("0");
        let found = client.read(0, 6 * BLOCK).expect("read");
        assert_eq!(found[..2 * BLOCK], vec![1; 2 * BLOCK]);
        assert!(found[2 * BLOCK..].iter().all(|&byte| byte == 0));
        drop(client);
        scene.stop();
    }
}

/// What was held back is not done after all: the files may have been copied since.
#[test]
fn a_server_that_is_suspended_stops_and_fails_what_it_has_held_back() {
    let mut scene = Scene::new(8, 512 << 10);
    scene.serve(&["--create", "--thin", "0:1m"]);
    let mut client = scene.connect("0");
    client.write(0, &vec![1; BLOCK]).expect("written");
    scene.asked(&["suspend"]);
    let metadata = fs::read(scene.path("meta")).expect("read");
    std::thread::scope(|scope| {
        let mut other = scene.connect("0");
        let writes = scope.spawn(|| client.write(100, &[2; 512]));
        let trims = scope.spawn(move || other.ask(TRIM, 0, 0, BLOCK as u32, &[]));
        wait_until(|| deferred(&scene, "suspended") + deferred(&scene, "discard") >= 2);
        scene.stop();
        assert_eq!(writes.join().expect("no panic"), Err(EIO));
        assert_eq!(trims.join().expect("no panic"), Err(EIO));
    });
    assert_eq!(fs::read(scene.path("meta")).expect("read"), metadata);
    scene.serve(&["--thin", "0:1m"]);
    let mut client = scene.connect("0");
    assert_eq!(client.read(0, BLOCK).expect("read"), vec![1; BLOCK]);
    drop(client);
    scene.stop();
}

#[test]
fn the_command_that_was_run_leaves_no_write_that_waits() {
    let scene = Scene::new(1, 512 << 10);
    let mut all = scene.arguments(&["--create", "--thin", "0:1m", "--queue-when-full", "0"]);
    let script = r#"
import nbd, os
h = nbd.NBD()
h.connect_uri(os.environ["uri"])
h.pwrite(b"\x01" * 65536, 0)
w = h.aio_pwrite(b"x" * 512, 3 * 65536)
h.flush()
os._exit(7)
"#;
    fs::write(scene.path("script"), script).expect("written");
    let run = format!("/usr/bin/python3 {}", scene.path("script").display());
    all.extend(["--run".into(), run.into()]);
    thintools(all).run().expect(7);
    scene.assert_sound();
}

/// Waits for what has to come.
#[track_caller]
fn wait_until(is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end, "it does not come to it");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bios of the first device that were left to the worker for a reason.
fn deferred(scene: &Scene, reason: &str) -> u64 {
    let stats: Value = serde_json::from_str(&scene.asked(&["stats"])).expect("JSON");
    let deferred = &stats["thins"][0]["io"]["deferred"];
    deferred[reason].as_u64().unwrap_or(0)
}

#[test]
fn full_metadata_grows_while_it_is_served() {
    let mut scene = Scene::new(1 << 15, 512 << 10);
    scene.serve(&["--create", "--thin", "0:2g"]);
    let mut client = scene.connect("0");
    let mut full = None;
    for block in 0..1_u64 << 15 {
        if let Err(error) = client.ask(WRITE, 0, block * BLOCK as u64, 512, &[7; 512]) {
            full = Some((block, error));
            break;
        }
    }
    let (block, error) = full.expect("128 blocks of metadata are not enough");
    assert_eq!(error, EIO);
    assert!(scene.asked(&["status"]).contains(" ro "));
    scene.asked(&["resize", "--metadata", "512"]);
    assert!(scene.asked(&["status"]).contains("/512 "));
    client
        .ask(WRITE, FUA, block * BLOCK as u64, 512, &[7; 512])
        .expect("written");
    assert_eq!(client.read(0, 512).expect("read"), [7; 512]);
    drop(client);
    scene.stop();
}

#[test]
fn files_grow_before_the_pool_is_full() {
    let mut scene = Scene::new(8, 512 << 10);
    scene.serve(&[
        "--create",
        "--thin",
        "0:64m",
        "--autoextend",
        "50:100",
        "--queue-when-full",
        "0",
    ]);
    let mut client = scene.connect("0");
    for block in 0..200 {
        client
            .write(block * BLOCK as u64, &[1; 512])
            .expect("written");
    }
    drop(client);
    scene.stop();
    assert!(fs::metadata(scene.path("data")).expect("there").len() >= 200 * BLOCK as u64);
}

#[test]
fn lost_data_is_an_error_and_nothing_else_is() {
    let mut scene = Scene::of_kernel();
    scene.serve(&["--thin", "0:64m"]);
    // The device breaks off behind block 100.
    File::options()
        .write(true)
        .open(scene.path("data"))
        .expect("opened")
        .set_len(100 * BLOCK as u64)
        .expect("cut");
    let mut client = scene.connect("0");
    assert_eq!(client.read(100 * BLOCK as u64, 4096), Err(EIO));
    assert!(client.read(99 * BLOCK as u64, BLOCK).is_ok());
    assert_eq!(client.read(1 << 30, 512), Err(EINVAL));
    assert_eq!(client.write((64 << 20) - 512, &[0; 1024]), Err(ENOSPC));
    assert_eq!(client.ask(99, 0, 0, 512, &[]), Err(EINVAL));
    assert!(client.read(0, 512).is_ok(), "the connection goes on");
    drop(client);
    scene.stop();
    // A device that is too small is refused from then on, but for reading.
    scene.run(&["--run", "true"]).expect(1).expect_stderr(&[
        "100 blocks of 128 sectors, and the pool 1024",
        "--read-only",
    ]);
    let first = "test $(nbdcopy \"$uri\" - 2>/dev/null | head -c 6553600 | wc -c) -gt 0";
    scene.run(&["--read-only", "--run", first]).expect(0);
}

#[test]
fn what_cannot_be_a_whole_pool_is_refused_with_what_to_do() {
    let scene = Scene::of_kernel();
    let (meta, data) = (scene.path("meta"), scene.path("data"));
    let swapped = [
        "thin_serve".as_ref(),
        "--metadata".as_ref(),
        data.as_os_str(),
        "--data".as_ref(),
        meta.as_os_str(),
        "--run".as_ref(),
        "true".as_ref(),
    ];
    thintools(swapped)
        .run()
        .expect(1)
        .expect_stderr(&["wrong way round"]);
    scene
        .run(&[])
        .expect(1)
        .expect_stderr(&["nowhere to serve"]);
    scene
        .run(&["--thin", "7", "--run", "true"])
        .expect(1)
        .expect_stderr(&["no thin device 7", "--create"]);
    scene
        .run(&["--feature", "fast", "--run", "true"])
        .expect(1)
        .expect_stderr(&["\"fast\""]);
    scene.run(&["--nbd", "unix"]).expect(2);
    fs::write(&meta, expand("needs-check-set/meta.img")).expect("written");
    scene
        .run(&["--run", "true"])
        .expect(1)
        .expect_stderr(&["needs_check", "--clear-needs-check-flag"]);
    let empty = Scene::new(4, 1 << 20);
    empty
        .run(&["--run", "true"])
        .expect(5)
        .expect_stderr(&["--create"]);
    File::options()
        .write(true)
        .open(empty.path("meta"))
        .expect("opened")
        .write_at(b"x", 9)
        .expect("written");
    empty
        .run(&["--create", "--run", "true"])
        .expect(1)
        .expect_stderr(&["not overwritten"]);
}

#[test]
fn a_check_comes_first_if_it_is_asked_for() {
    let mut scene = Scene::of_kernel();
    scene.serve(&["--check"]);
    scene.stop();
    // A leaf of mappings, which nobody looks at before somebody reads there.
    let meta = fs::read(scene.path("meta")).expect("read");
    let is_mappings = |block: &usize| {
        let field = |at| get_u32(&meta, block * 4096 + at);
        // Of all leaves those with values of eight bytes, and more of them than there are devices.
        field(4) == 2 && field(24) == 8 && field(16) > 64
    };
    let leaf = (1..512_usize).rfind(is_mappings);
    let at = leaf.expect("there is one") as u64 * 4096 + 2000;
    let file = File::options().write(true).open(scene.path("meta"));
    file.expect("opened")
        .write_at(b"spoilt", at)
        .expect("written");
    scene.run(&["--run", "true"]).expect(0);
    let refused = scene.run(&["--check", "--run", "true"]).expect(5);
    refused.expect_stderr(&["damaged", "run thin_check"]);
    // What is made needs no check.
    let scene = Scene::new(4, 1 << 20);
    let more = ["--create", "--check", "--thin", "0:1m", "--run", "true"];
    scene.run(&more).expect(0);
    scene.run(&more).expect(0);
    fs::remove_file(scene.path("meta")).expect("removed");
    scene.run(&more).expect(0);
}

#[test]
fn a_pool_has_one_user() {
    let mut scene = Scene::of_kernel();
    scene.serve(&[]);
    scene
        .run(&["--run", "true"])
        .expect(1)
        .expect_stderr(&["in use"]);
    scene
        .run(&["--read-only", "--run", "true"])
        .expect(1)
        .expect_stderr(&["in use"]);
    thintools([
        "thin_ctl".as_ref(),
        scene.path("meta").as_os_str(),
        "delete".as_ref(),
        "0".as_ref(),
    ])
    .run()
    .expect(1);
    scene.stop();
}

#[test]
fn the_status_of_the_command_that_was_run_is_its_own() {
    let scene = Scene::of_kernel();
    scene
        .run(&["--run", "test -S \"$unixsocket\" && exit 7"])
        .expect(7);
    scene.run(&["--run", "kill -9 $$"]).expect(137);
    scene.assert_sound();
}

#[test]
fn libnbd_starts_the_server_itself() {
    let scene = Scene::of_kernel();
    let copy = scene.path("copy");
    let mut command = program("nbdcopy", ["--", "[", BINARY]);
    for argument in scene.arguments(&["--thin", "0"]) {
        command = command.arg(argument);
    }
    command.arg("]").arg(&copy).run().expect(0);
    assert!(fs::read(copy).expect("copied") == expand("seq-1thin/data.raw")[..900 * BLOCK]);
}

#[test]
fn the_service_manager_is_told_when_clients_can_connect() {
    let mut scene = Scene::of_kernel();
    let manager = UnixDatagram::bind(scene.path("notify")).expect("bound");
    let mut command = Command::new(BINARY);
    command.args(scene.arguments(&["--nbd", &format!("unix:{}", scene.path("nbd").display())]));
    scene.server = Some(
        command
            .env("NOTIFY_SOCKET", scene.path("notify"))
            .spawn()
            .expect("started"),
    );
    manager
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("set");
    let mut told = [0; 64];
    let len = manager.recv(&mut told).expect("told");
    assert!(told[..len].starts_with(b"READY=1"));
    assert_eq!(scene.connect("0").size, 900 * BLOCK as u64);
    scene.stop();
}

#[test]
fn managers_get_the_errors_of_the_kernel() {
    let mut scene = Scene::new(64, 1 << 20);
    scene.serve(&["--create", "--low-water", "64"]);
    let refused = |words: &[&str], errno: &str| {
        scene.ctl(words).expect(1).expect_stderr(&[errno]);
    };
    scene.asked(&["message", "create_thin", "0"]);
    refused(&["message", "create_thin", "0"], "EEXIST");
    refused(&["create_thin", "16777216"], "EINVAL");
    refused(&["create-snap", "1", "5"], "ENODATA");
    refused(&["delete", "5"], "ENODATA");
    refused(&["set_transaction_id", "1", "2"], "EINVAL");
    refused(&["release_metadata_snap"], "EINVAL");
    scene.asked(&["set_transaction_id", "0", "5"]);
    scene.asked(&["reserve_metadata_snap"]);
    refused(&["reserve_metadata_snap"], "EBUSY");
    scene.asked(&["release_metadata_snap"]);
    scene.asked(&["create-snap", "1", "0"]);
    refused(&["activate", "9"], "ENODATA");
    refused(&["activate", "0", "100"], "EINVAL");
    scene.asked(&["activate", "0", "1048576"]);
    refused(&["activate", "0"], "EEXIST");
    refused(&["delete", "0"], "EBUSY");
    let mut client = scene.connect("0");
    assert_eq!(client.size, 1 << 20);
    refused(&["deactivate", "0"], "EBUSY");
    let mut events = Command::new(BINARY);
    events.args([
        "thin_ctl".into(),
        "--socket".into(),
        scene.path("control").into_os_string(),
        "events".into(),
        "0".into(),
    ]);
    let mut events = events.stdout(Stdio::piped()).spawn().expect("started");
    client.ask(WRITE, FUA, 0, 512, &[1; 512]).expect("written");
    let mut line = String::new();
    BufReader::new(events.stdout.take().expect("piped"))
        .read_line(&mut line)
        .expect("an event");
    events.kill().expect("killed");
    events.wait().expect("gone");
    assert_eq!(
        serde_json::from_str::<Value>(&line).expect("JSON")["event"],
        "low_water"
    );
    assert!(scene.asked(&["status"]).contains(" thin-pool 5 "));
    assert_eq!(scene.asked(&["status", "0"]), "0 2048 thin 128 127");
    assert!(
        scene.asked(&["table"]).contains(" thin-pool ")
            && scene
                .asked(&["table"])
                .contains(" 128 64 1 error_if_no_space")
    );
    assert!(
        scene
            .asked(&["metrics"])
            .contains("\nthin_pool_data_blocks_used 1\n")
    );
    assert_eq!(scene.asked(&["exported"]), "[0,1]");
    // Writes are held back while it is suspended.
    scene.asked(&["suspend"]);
    refused(&["suspend"], "EINVAL");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| client.write(0, &[2; 512]));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        scene.asked(&["resume"]);
        waiting.join().expect("no panic").expect("written");
    });
    drop(client);
    let end = Instant::now() + Duration::from_secs(60);
    while scene.ctl(&["deactivate", "0"]).code != Some(0) {
        assert!(Instant::now() < end, "clients have gone");
    }
    scene.asked(&["delete", "0"]);
    assert_eq!(scene.asked(&["exported"]), "[1]");
    scene.stop();
}

/// Requests that are none, and clients that hang up in the middle, do no harm.
#[test]
fn sizes_that_cannot_be_served_are_refused_when_they_are_given() {
    let mut scene = Scene::new(8, 1 << 20);
    let refused = scene.run(&["--create", "--thin", "0:8388608t", "--run", "true"]);
    assert!(refused.stderr.contains("up to"), "{}", refused.stderr);
    refused.expect(1);
    scene.serve(&["--create", "--thin", "0:1m"]);
    scene.asked(&["create_thin", "1"]);
    let activate = |size: u64| {
        use std::io::Write;
        let socket = scene.path("control");
        let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("connected");
        let line = format!("{{\"command\":\"activate\",\"thin\":1,\"size\":{size}}}\n");
        stream.write_all(line.as_bytes()).expect("sent");
        let mut said = String::new();
        BufReader::new(stream).read_line(&mut said).expect("read");
        said
    };
    for size in [1 << 63, u64::MAX - 511, 511] {
        assert!(activate(size).contains("EINVAL"), "{size}");
    }
    assert_eq!(scene.asked(&["exported"]), "[0]");
    let most = (1 << 63) - 512;
    assert_eq!(activate(most), "{\"ok\":null}\n");
    assert_eq!(scene.connect("1").size, most);
    scene.asked(&["table", "1"]);
    scene.stop();
}

#[test]
fn hostile_lines_on_the_control_socket_are_answered_with_errors() {
    use std::io::Write;
    let mut scene = Scene::of_kernel();
    scene.serve(&[]);
    let answer = |line: &[u8]| {
        let mut stream =
            std::os::unix::net::UnixStream::connect(scene.path("control")).expect("connected");
        // Whoever is refused early hangs up.
        let _ = stream.write_all(line);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut said = String::new();
        let _ = stream.read_to_string(&mut said);
        said
    };
    let missing = answer(b"{\"command\":\"message\"}\n");
    assert_eq!(missing.matches("missing field").count(), 1, "{missing}");
    for line in [
        &b"x\n"[..],
        b"{}\n",
        b"{\"command\":\"explode\"}\n",
        b"{\"command\":\"status\",\"more\":1}\n",
        b"\xff\n",
        b"{\"command\":\"status\"",
    ] {
        assert!(answer(line).contains("EINVAL"), "{line:?}");
    }
    for what in ["data", "metadata"] {
        for blocks in [1_u64 << 62, u64::MAX] {
            let line = format!("{{\"command\":\"resize\",\"{what}\":{blocks}}}\n");
            let said = answer(line.as_bytes());
            assert!(said.contains("EINVAL") && said.contains("up to"), "{said}");
        }
    }
    let deep = [vec![b'['; 60_000], vec![b'\n']].concat();
    assert!(answer(&deep).contains("EINVAL"));
    answer(&vec![b'x'; 200_000]);
    assert!(scene.asked(&["status"]).contains("thin-pool"));
    scene.stop();
}

#[test]
fn a_flush_makes_durable_what_other_connections_wrote() {
    let mut scene = Scene::new(64, 1 << 20);
    let more = ["--create", "--thin", "0:4m"];
    scene.serve(&more);
    for round in 0..8_u64 {
        let (mut writes, mut flushes) = (scene.connect("0"), scene.connect("0"));
        let data = vec![round as u8 + 1; BLOCK];
        writes
            .ask(WRITE, 0, round * BLOCK as u64, BLOCK as u32, &data)
            .expect("written");
        flushes.ask(client::FLUSH, 0, 0, 0, &[]).expect("flushed");
        scene.kill();
        scene.assert_sound();
        scene.serve(&more[1..]);
        let found =
            scene
                .connect("0")
                .ask(client::READ, 0, round * BLOCK as u64, BLOCK as u32, &[]);
        assert!(found.expect("read") == data, "round {round}");
    }
    scene.stop();
}

#[test]
fn nbdsh_gets_the_usual_errors() {
    let mut scene = Scene::new(64, 1 << 20);
    scene.serve(&["--create", "--thin", "0:4m"]);
    let script = r#"
h.set_strict_mode(0)
h.connect_uri(uri)
size = h.get_size()
def refused(error, ask):
    try:
        ask()
    except nbd.Error as e:
        assert e.errno == error, (e.errno, error)
    else:
        raise AssertionError(error)
refused("EINVAL", lambda: h.pread(512, size))
refused("EINVAL", lambda: h.pread(512, 1 << 62))
refused("EINVAL", lambda: h.pread(0, 0))
refused("ENOSPC", lambda: h.pwrite(b"x" * 512, size))
refused("ENOSPC", lambda: h.zero(512, size))
refused("EINVAL", lambda: h.trim(512, size))
refused("ENOTSUP", lambda: (h.pwrite(b"x", 0), h.zero(1, 0, nbd.CMD_FLAG_FAST_ZERO)))
assert h.can_multi_conn() and h.can_fua() and h.can_df() and h.get_structured_replies_negotiated()
def chunks(flags):
    found = []
    h.pread_structured(1 << 20, 0, lambda data, at, status, error: found.append((at, len(data), status)) or 0, flags)
    return found
assert chunks(0) == [(0, 65536, nbd.READ_DATA), (65536, (1 << 20) - 65536, nbd.READ_HOLE)], chunks(0)
assert chunks(nbd.CMD_FLAG_DF) == [(0, 1 << 20, nbd.READ_DATA)]
h.pwrite(b"after all that", 4096, nbd.CMD_FLAG_FUA)
assert h.pread(14, 4096) == b"after all that"
h.shutdown()
"#;
    nbdsh(&scene, script).expect(0);
    scene.stop();
    // Writes to what is served to be read.
    scene.serve(&["--read-only", "--thin", "0:4m"]);
    let script = r#"
h.set_strict_mode(0)
h.connect_uri(uri)
assert h.is_read_only()
for change in (lambda: h.pwrite(b"x", 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)):
    try:
        change()
    except nbd.Error as e:
        assert e.errno == "EPERM", e.errno
    else:
        raise AssertionError("changed")
assert h.pread(14, 4096) == b"after all that"
h.shutdown()
"#;
    nbdsh(&scene, script).expect(0);
    scene.stop();
}

/// Has Debian's Python, which has the module whatever comes first in the search path, run a script with a handle that is not connected.
fn nbdsh(scene: &Scene, script: &str) -> Finished {
    let uri = format!("nbd+unix:///0?socket={}", scene.path("nbd").display());
    let set = format!("import nbd\nh = nbd.NBD()\nuri = {uri:?}\n{script}");
    program("/usr/bin/python3", ["-c", &set]).run()
}
