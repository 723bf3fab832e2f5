//! Devices that fail under `thin_serve`: the pool goes into the mode that the kernel's would, clients get the right error, and what was
//! flushed is there.

use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::serve::client::{Client, FUA, Reply, TRIM, WRITE, ZEROES};
use crate::serve::{BLOCK, Scene};
use crate::support::{check, thintools};

const B: u64 = BLOCK as u64;
const ENOSPC: Reply = Err(Some(28));
const EIO: Reply = Err(Some(5));

/// A pool whose devices fail while they are told to.
struct Failing {
    scene: Scene,
}

impl Failing {
    /// A new pool with devices 0 and 1 of 1 GiB, and these faults, none of which happens yet.
    fn new(faults: &[&str], more: &[&str]) -> Self {
        let mut this = Self {
            scene: Scene::new(64, 1 << 20),
        };
        let faults: Vec<String> = (0..)
            .zip(faults)
            .map(|(n, fault)| format!("--fault={fault},while={}", this.switch(n).display()))
            .collect();
        let mut all = vec!["--create", "--thin", "0:1g", "--thin", "1:1g"];
        all.extend(faults.iter().map(String::as_str));
        all.extend(more);
        this.scene.serve(&all);
        this
    }

    fn switch(&self, fault: usize) -> std::path::PathBuf {
        self.scene.path(&format!("fault-{fault}"))
    }

    /// The fault happens from now on.
    fn begin(&self, fault: usize) {
        File::create(self.switch(fault)).expect("made");
    }

    fn end(&self, fault: usize) {
        fs::remove_file(self.switch(fault)).expect("removed");
    }

    fn connect(&self, export: &str) -> Client {
        self.scene.connect(export)
    }

    /// What the pool's status says of blocks and mode.
    #[track_caller]
    fn expect_status(&self, texts: &[&str]) {
        let status = self.scene.asked(&["status"]);
        for text in texts {
            assert!(status.contains(text), "no {text:?} in {status:?}");
        }
    }

    /// Ends the server, and starts it again with devices that work.
    fn restart(&mut self, needs_check: bool) {
        self.scene.kill();
        if needs_check {
            self.scene
                .run(&["--run", "true"])
                .expect(1)
                .expect_stderr(&["needs_check"]);
            check(&["--clear-needs-check-flag"], &self.scene.path("meta")).expect(0);
        }
        self.scene.assert_sound();
        self.scene.serve(&["--thin", "0:1g", "--thin", "1:1g"]);
    }
}

#[track_caller]
fn holds(client: &mut Client, block: u64, byte: u8) {
    let found = client.read(block * B, BLOCK).expect("read");
    assert!(
        found.iter().all(|&found| found == byte),
        "block {block}: {} instead of {byte}",
        found[0]
    );
}

#[test]
fn the_help_of_a_build_for_developers_has_the_words_of_faults() {
    let help = thintools(["thin_serve", "--help"]).run().expect(0).out();
    let (_, fault) = help.split_once("--fault <FAULT>").expect("there");
    for word in [
        "DEVICE:REQUEST:ACTION",
        "metadata",
        "zero",
        "enospc",
        "delay=MS",
        "off",
        "kill",
        "from=N",
        "at=BYTE+LEN",
        "while=PATH",
        "chance=PERCENT",
        "seed=N",
    ] {
        assert!(fault.contains(word), "no {word} in {fault}");
    }
}

#[test]
fn what_the_data_device_refuses_fails_alone() {
    let faults = [
        "data:write:eio:at=0+18446744073709551615",
        "data:write:enospc:at=0+18446744073709551615",
        "data:zero:eio:at=0+18446744073709551615",
        "data:read:eio:at=0+18446744073709551615",
        "data:discard:eio:at=0+18446744073709551615",
    ];
    let pool = Failing::new(&faults, &[]);
    let [write_eio, write_enospc, zero, read, discard] = [0, 1, 2, 3, 4];
    let mut client = pool.connect("0");
    client.write(0, &vec![1; 4 * BLOCK]).expect("written");
    client.flush().expect("flushed");
    pool.scene.asked(&["create_snap", "2", "0"]);
    pool.scene.asked(&["activate", "2", "1073741824"]);
    client.write(B, &vec![2; BLOCK]).expect("written");
    let with = |fault, request: &mut dyn FnMut() -> Reply| {
        pool.begin(fault);
        let reply = request();
        pool.end(fault);
        pool.expect_status(&[" 5/64 - rw "]);
        reply
    };
    // In place, a new block filled by its write, a new block that is zeroed, and a shared one that is copied.
    for (fault, error) in [(write_eio, EIO), (write_enospc, ENOSPC)] {
        assert_eq!(with(fault, &mut || client.write(B, &[3; 512])), error);
        assert_eq!(
            with(fault, &mut || client.ask(WRITE, FUA, B, 512, &[3; 512])),
            error
        );
        assert_eq!(
            with(fault, &mut || client.write(9 * B, &vec![3; BLOCK])),
            error
        );
        assert_eq!(with(fault, &mut || client.write(2 * B, &[3; 512])), error);
    }
    assert_eq!(with(zero, &mut || client.write(9 * B, &[3; 512])), EIO);
    assert_eq!(with(zero, &mut || client.ask(ZEROES, 2, B, 512, &[])), EIO);
    assert_eq!(with(read, &mut || client.write(2 * B, &[3; 512])), EIO);
    assert_eq!(with(read, &mut || client.read(0, 512)), EIO);
    assert_eq!(
        with(read, &mut || client.read(9 * B, 512)),
        Ok(vec![0; 512])
    );
    // Whatever was not done left nothing behind.
    client.flush().expect("flushed");
    holds(&mut client, 1, 2);
    holds(&mut client, 2, 1);
    holds(&mut client, 9, 0);
    let mut snapshot = pool.connect("2");
    (0..4).for_each(|block| holds(&mut snapshot, block, 1));
    // That a block was not discarded on the data device is not the client's concern.
    pool.begin(discard);
    assert_eq!(client.ask(TRIM, FUA, B, BLOCK as u32, &[]), Ok(Vec::new()));
    pool.end(discard);
    pool.expect_status(&[" 4/64 - rw "]);
    holds(&mut client, 1, 0);
    client.write(2 * B, &[4; 512]).expect("written");
    drop((client, snapshot));
    let mut scene = pool.scene;
    scene.stop();
}

#[test]
fn a_data_flush_that_fails_undoes_the_transaction_and_is_not_forgotten() {
    let mut pool = Failing::new(&["data:flush:eio:from=1"], &[]);
    let (mut client, mut other) = (pool.connect("0"), pool.connect("1"));
    client.write(0, &vec![1; BLOCK]).expect("written");
    other.write(0, &vec![1; BLOCK]).expect("written");
    client.flush().expect("flushed");
    client.write(B, &vec![2; BLOCK]).expect("written");
    pool.begin(0);
    assert_eq!(client.flush(), EIO);
    pool.end(0);
    pool.expect_status(&[" 2/64 - ro ", " needs_check "]);
    // What the kernel's pools do: reads, and writes in place; no new blocks, no messages; discards do nothing.
    holds(&mut client, 0, 1);
    holds(&mut client, 1, 0);
    client.write(0, &vec![3; BLOCK]).expect("in place");
    assert_eq!(client.write(B, &[2; 512]), EIO);
    assert_eq!(client.ask(TRIM, 0, 0, BLOCK as u32, &[]), Ok(Vec::new()));
    holds(&mut client, 0, 3);
    pool.scene
        .ctl(&["create_snap", "2", "0"])
        .expect(1)
        .expect_stderr(&["EOPNOTSUPP"]);
    // The system tells a failure once; whoever asks again is told all the same.
    assert_eq!(client.flush(), EIO);
    assert_eq!(other.flush(), EIO);
    assert_eq!(client.ask(WRITE, FUA, B, 512, &[2; 512]), EIO);
    drop((client, other));
    pool.restart(true);
    let mut client = pool.connect("0");
    holds(&mut client, 1, 0);
    client.write(B, &vec![4; BLOCK]).expect("written");
    client.flush().expect("flushed");
    holds(&mut client, 1, 4);
    drop(client);
    pool.scene.stop();
}

#[test]
fn a_flush_that_fails_without_changed_mappings_leaves_the_pool_as_it_is() {
    let pool = Failing::new(&["data:flush:enospc:from=1"], &[]);
    let mut client = pool.connect("0");
    client.write(0, &vec![1; BLOCK]).expect("written");
    client.flush().expect("flushed");
    client.write(0, &[2; 512]).expect("written");
    pool.begin(0);
    assert_eq!(client.flush(), ENOSPC);
    pool.end(0);
    assert_eq!(client.flush(), ENOSPC);
    pool.expect_status(&[" 1/64 - rw "]);
}

#[test]
fn a_commit_that_fails_leaves_the_last_transaction() {
    // Whether the flag gets to the device, and whether the superblock was written already.
    for (fault, needs_check, is_written) in [
        ("metadata:write:eio:from=1", false, false),
        ("metadata:write:enospc:nth=1", true, false),
        ("metadata:flush:eio:from=1", true, false),
        ("metadata:flush:eio:nth=1", true, false),
        ("metadata:write:eio:nth=1,at=0+4096", true, false),
        ("metadata:flush:eio:nth=2", true, true),
    ] {
        let mut pool = Failing::new(&[fault], &[]);
        let mut client = pool.connect("0");
        client.write(0, &vec![1; 2 * BLOCK]).expect("written");
        client.flush().expect("flushed");
        client.write(2 * B, &vec![2; BLOCK]).expect("written");
        pool.begin(0);
        assert_eq!(client.flush(), EIO, "{fault}");
        pool.expect_status(&[" - ro ", " needs_check "]);
        holds(&mut client, 1, 1);
        // One transaction or the other.
        holds(&mut client, 2, if is_written { 2 } else { 0 });
        client.write(B, &[1; 512]).expect("in place");
        assert_eq!(client.write(5 * B, &[1; 512]), EIO, "{fault}");
        pool.end(0);
        pool.expect_status(&[" - ro ", " needs_check "]);
        drop(client);
        pool.restart(needs_check);
        let mut client = pool.connect("0");
        holds(&mut client, 0, 1);
        holds(&mut client, 1, 1);
        client
            .ask(WRITE, FUA, 2 * B, 512, &[3; 512])
            .expect("written");
        drop(client);
        pool.scene.stop();
    }
}

#[test]
fn a_server_whose_last_commit_failed_does_not_end_as_if_all_were_well() {
    let mut pool = Failing::new(&["metadata:flush:eio:from=1"], &[]);
    let mut client = pool.connect("0");
    client.write(0, &vec![1; BLOCK]).expect("written");
    client.flush().expect("flushed");
    client.write(B, &vec![2; BLOCK]).expect("written");
    pool.begin(0);
    drop(client);
    pool.scene.stop_with(1);
    pool.end(0);
    pool.scene.assert_sound();
}

#[test]
fn metadata_that_cannot_be_read_back_fails_the_pool_until_it_is_started_anew() {
    let mut pool = Failing::new(&["metadata:any:eio:from=1"], &[]);
    let mut client = pool.connect("0");
    client.write(0, &vec![1; BLOCK]).expect("written");
    client.flush().expect("flushed");
    client.write(B, &vec![2; BLOCK]).expect("written");
    pool.begin(0);
    assert_eq!(client.flush(), EIO);
    let status = pool.scene.asked(&["status"]);
    assert!(status.ends_with(" thin-pool Fail"), "{status}");
    assert!(pool.scene.asked(&["status", "0"]).ends_with(" thin Fail"));
    assert_eq!(client.read(0, 512), EIO);
    assert_eq!(client.write(0, &[1; 512]), EIO);
    assert_eq!(client.ask(TRIM, 0, 0, BLOCK as u32, &[]), EIO);
    pool.end(0);
    assert_eq!(client.read(0, 512), EIO, "only a new start helps");
    pool.scene
        .ctl(&["create_thin", "7"])
        .expect(1)
        .expect_stderr(&["EOPNOTSUPP"]);
    drop(client);
    pool.restart(false);
    let mut client = pool.connect("0");
    holds(&mut client, 0, 1);
    holds(&mut client, 1, 0);
    drop(client);
    pool.scene.stop();
}

/// What qemu's tools make of the errors.
#[test]
fn qemu_io_tells_no_space_from_a_broken_disk() {
    let scene = Scene::new(4, 1 << 20);
    let write = "qemu-io -f raw -c 'write 0 64k' -c 'write 1M 64k' -c 'write 2M 1M' -c 'read 0 64k' -c flush \"$uri\" 2>&1; true";
    let fault = "--fault=data:write:eio:nth=2";
    let found = scene
        .run(&["--create", "--thin", "0:32m", fault, "--run", write])
        .expect(0);
    let lines: Vec<String> = found.out().lines().map(str::to_owned).collect();
    let said = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
    assert_eq!(said("write failed: Input/output error"), 1, "{lines:?}");
    assert_eq!(
        said("write failed: No space left on device"),
        1,
        "{lines:?}"
    );
    assert_eq!(said("read 65536/65536 bytes"), 1, "{lines:?}");
    scene.assert_sound();
}

#[test]
fn after_the_power_went_nothing_is_written_and_nothing_flushed_is_lost() {
    let mut pool = Failing::new(&["any:any:off:nth=1"], &[]);
    let mut client = pool.connect("0");
    client.write(0, &vec![1; 4 * BLOCK]).expect("written");
    client.flush().expect("flushed");
    client.write(4 * B, &vec![2; BLOCK]).expect("written");
    pool.begin(0);
    assert_eq!(client.read(0, 512), EIO);
    pool.end(0);
    assert_eq!(client.write(0, &[9; 512]), EIO);
    assert_eq!(client.flush(), EIO);
    drop(client);
    pool.restart(false);
    let mut client = pool.connect("0");
    (0..4).for_each(|block| holds(&mut client, block, 1));
    drop(client);
    pool.scene.stop();
}

#[test]
fn a_process_that_kills_itself_in_a_commit_leaves_the_last_transaction_or_the_next() {
    let mut scene = Scene::new(64, 1 << 20);
    let mut written = 0;
    for (round, fault) in [
        "data:flush:kill:nth=1",
        "metadata:write:kill:nth=1",
        "metadata:write:kill:nth=2",
        "metadata:flush:kill:nth=1",
        "metadata:write:kill:nth=1,at=0+4096",
        "metadata:flush:kill:nth=2",
    ]
    .into_iter()
    .enumerate()
    {
        let switch = scene.path("on");
        let fault = format!("--fault={fault},while={}", switch.display());
        scene.serve(&["--create", "--thin", "0:1g", &fault]);
        let mut client = scene.connect("0");
        (0..written).for_each(|block| holds(&mut client, block, 1 + block as u8));
        let found = client.read(written * B, BLOCK).expect("read");
        assert!(
            found.iter().all(|byte| *byte == found[0]),
            "round {round}: torn"
        );
        assert!([0, 1 + written as u8].contains(&found[0]), "round {round}");
        client
            .write(written * B, &vec![1 + written as u8; BLOCK])
            .expect("written");
        client.flush().expect("flushed");
        written += 1;
        client
            .write(written * B, &vec![1 + written as u8; BLOCK])
            .expect("written");
        File::create(&switch).expect("made");
        assert_eq!(client.flush(), Err(None), "round {round}: it goes on");
        fs::remove_file(&switch).expect("removed");
        scene.kill();
        scene.assert_sound();
    }
}

/// Both files grow several times while clients write, who wait for space and notice nothing else.
#[test]
fn both_files_grow_under_load_and_a_crash_finds_them_grown() {
    let mut scene = Scene::new(4, 512 << 10);
    scene.serve(&[
        "--create",
        "--thin",
        "0:64m",
        "--thin",
        "1:64m",
        "--queue-when-full",
        "0",
    ]);
    const BLOCKS: u64 = 300;
    let written = AtomicU64::new(0);
    let is_over = AtomicBool::new(false);
    let scene_ref = &scene;
    std::thread::scope(|scope| {
        let (written, is_over) = (&written, &is_over);
        let writers: Vec<_> = ["0", "1"]
            .map(|export| {
                scope.spawn(move || {
                    let mut client = scene_ref.connect(export);
                    let mut rng = SmallRng::seed_from_u64(1);
                    for block in 0..BLOCKS {
                        let fua = if rng.random_ratio(1, 8) { FUA } else { 0 };
                        let tag = 1 + (block % 255) as u8;
                        let reply = client.ask(WRITE, fua, block * B, 4096, &[tag; 4096]);
                        reply.expect("it waits for space");
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                    client.flush().expect("flushed");
                })
            })
            .into_iter()
            .collect();
        let grower = scope.spawn(move || {
            let (mut data, mut metadata) = (4, 128);
            while !is_over.load(Ordering::Relaxed) && data < 2 * BLOCKS + 64 {
                data += 8;
                metadata += 4;
                let sizes = [data.to_string(), metadata.to_string()];
                scene_ref.asked(&["resize", "--data", &sizes[0], "--metadata", &sizes[1]]);
            }
        });
        for writer in writers {
            writer.join().expect("no panic");
        }
        is_over.store(true, Ordering::Relaxed);
        grower.join().expect("no panic");
    });
    assert_eq!(written.load(Ordering::Relaxed), 2 * BLOCKS);
    scene.kill();
    scene.assert_sound();
    scene.serve(&["--thin", "0:64m", "--thin", "1:64m"]);
    for export in ["0", "1"] {
        let mut client = scene.connect(export);
        for block in 0..BLOCKS {
            let found = client.read(block * B, 4096).expect("read");
            assert!(
                found.iter().all(|byte| *byte == 1 + (block % 255) as u8),
                "block {block}"
            );
        }
    }
    scene.stop();
}
