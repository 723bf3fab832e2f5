//! Devices that fail by chance under `thin_serve`, and clients that know what each sector may have: who is told of no failure has what he
//! wrote, and after a crash and a repair what he flushed. `FAULT_SEEDS` has it try more seeds than a few.

use std::env;
use std::fs::{self, File};
use std::ops::Range;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::serve::client::{Client, FUA, Reply, TRIM, WRITE, ZEROES};
use crate::serve::load::SECTOR;
use crate::serve::{BLOCK, EIO, Scene};
use crate::support::{check, get_u32};

/// Sectors of a block.
const PER_BLOCK: usize = BLOCK / SECTOR;
/// Blocks of a device, of which there are two, and of the snapshots of one that are there at once: up to two.
const THIN_BLOCKS: usize = 32;
const DATA_BLOCKS: u64 = 160;
const SECTORS: usize = THIN_BLOCKS * PER_BLOCK;
/// Of a client, while devices fail.
const REQUESTS: usize = 500;
/// Unless more are asked for.
const SEEDS: u64 = 3;

/// What a sector may have: if it is read, and if the transaction is undone or the server killed.
#[derive(Clone)]
struct Sector {
    now: Vec<u64>,
    after: Vec<u64>,
}

fn may(values: &mut Vec<u64>, value: u64) {
    if !values.contains(&value) {
        values.push(value);
    }
}

/// A device as its client knows it.
struct Device {
    export: &'static str,
    sectors: Vec<Sector>,
    /// The last number that was written.
    last: u64,
    /// Requests that failed, and of those the flushes.
    failures: usize,
    failed_flushes: usize,
    /// The pool is not writable any more: what was not flushed may be gone.
    is_undone: bool,
    /// For messages.
    case: String,
}

/// Sectors are full of one number; 0 was never written, or is zeroed.
fn numbers(data: &[u8], case: &str) -> Vec<u64> {
    let of_sector = |sector: &[u8]| {
        let number = &sector[..8];
        assert!(sector.chunks(8).all(|word| word == number), "{case}: torn");
        u64::from_le_bytes(number.try_into().expect("8"))
    };
    data.chunks(SECTOR).map(of_sector).collect()
}

fn bytes(sectors: &Range<usize>) -> (u64, u32) {
    (
        (sectors.start * SECTOR) as u64,
        (sectors.len() * SECTOR) as u32,
    )
}

impl Device {
    fn new(number: u64, export: &'static str) -> Self {
        let zero = Sector {
            now: vec![0],
            after: vec![0],
        };
        Self {
            export,
            sectors: vec![zero; SECTORS],
            // Nothing of one device is in the other.
            last: number << 32,
            failures: 0,
            failed_flushes: 0,
            is_undone: false,
            case: String::new(),
        }
    }

    /// The server was started anew. What is there now is there.
    fn settle(&mut self, scene: &Scene, case: String) {
        self.case = case;
        (self.failures, self.failed_flushes, self.is_undone) = (0, 0, false);
        let found = scene.connect(self.export).read(0, SECTORS * SECTOR);
        let found = numbers(&found.expect("read"), &self.case);
        for (at, (sector, found)) in self.sectors.iter_mut().zip(found).enumerate() {
            assert!(
                sector.after.contains(&found),
                "{}, device {}, sector {at}: {found:x} instead of {:x?}",
                self.case,
                self.export,
                sector.after
            );
            (sector.now, sector.after) = (vec![found], vec![found]);
        }
    }

    /// True if it was done; if not, the device is what failed.
    fn is_done(&mut self, reply: &Reply) -> bool {
        match *reply {
            Ok(_) => return true,
            Err(EIO) => self.failures += 1,
            Err(other) => panic!("{}, device {}: {other:?}", self.case, self.export),
        }
        false
    }

    /// Something made sectors be `value`, or failed and may have done so to any of them.
    fn change(&mut self, sectors: Range<usize>, value: u64, reply: &Reply, is_fua: bool) {
        let is_done = self.is_done(reply);
        for sector in &mut self.sectors[sectors] {
            if is_done {
                sector.now.clear();
            }
            if is_done && is_fua {
                sector.after.clear();
            }
            may(&mut sector.now, value);
            may(&mut sector.after, value);
        }
    }

    fn flushed(&mut self) {
        for sector in &mut self.sectors {
            sector.after.clone_from(&sector.now);
        }
    }

    /// Sectors from `first` on were read.
    fn found(&mut self, first: usize, found: &[u64], scene: &Scene) {
        for (at, found) in (first..).zip(found) {
            if !self.sectors[at].now.contains(found) && !self.is_undone {
                self.is_undone = !scene.asked(&["status"]).contains(" - rw ");
                for sector in self.sectors.iter_mut().filter(|_| self.is_undone) {
                    let after = sector.after.clone();
                    after
                        .into_iter()
                        .for_each(|value| may(&mut sector.now, value));
                }
            }
            let sector = &mut self.sectors[at];
            assert!(
                sector.now.contains(found),
                "{}, device {}, sector {at}: {found:x} is read instead of {:x?}",
                self.case,
                self.export,
                sector.now
            );
            sector.now = vec![*found];
        }
    }

    fn request(&mut self, client: &mut Client, rng: &mut SmallRng, scene: &Scene) {
        let first = rng.random_range(0..SECTORS);
        let most = if rng.random_ratio(1, 4) {
            3 * PER_BLOCK
        } else {
            16
        };
        let sectors = first..first + rng.random_range(1..=most.min(SECTORS - first));
        let (offset, len) = bytes(&sectors);
        let fua = if rng.random_ratio(1, 8) { FUA } else { 0 };
        match rng.random_range(0..20) {
            0..9 => {
                self.last += 1;
                let data = self.last.to_le_bytes().repeat(len as usize / 8);
                let reply = client.ask(WRITE, fua, offset, len, &data);
                self.change(sectors, self.last, &reply, fua == FUA);
            }
            9..11 => {
                // NO_HOLE, or blocks may be unmapped.
                let flags = fua | if rng.random_ratio(1, 3) { 2 } else { 0 };
                let reply = client.ask(ZEROES, flags, offset, len, &[]);
                self.change(sectors, 0, &reply, fua == FUA);
            }
            11..13 => {
                let reply = client.ask(TRIM, fua, offset, len, &[]);
                self.is_done(&reply);
                let blocks = sectors.start.div_ceil(PER_BLOCK)..sectors.end / PER_BLOCK;
                // A pool that is read-only does nothing, and says so to nobody.
                for sector in blocks.flat_map(|block| block * PER_BLOCK..(block + 1) * PER_BLOCK) {
                    may(&mut self.sectors[sector].now, 0);
                    may(&mut self.sectors[sector].after, 0);
                }
            }
            13..15 => {
                let reply = client.flush();
                let is_done = self.is_done(&reply);
                assert!(
                    !is_done || self.failed_flushes == 0,
                    "{}: a loss is forgotten",
                    self.case
                );
                match is_done {
                    true => self.flushed(),
                    false => self.failed_flushes += 1,
                }
            }
            _ => {
                let reply = client.read(offset, len as usize);
                if self.is_done(&reply) {
                    let found = numbers(&reply.expect("done"), &self.case);
                    self.found(first, &found, scene);
                }
            }
        }
    }
}

fn needs_check(scene: &Scene) -> bool {
    let meta = fs::read(scene.path("meta")).expect("read");
    get_u32(&meta, 4) & 1 == 1
}

/// The server was killed: thin_check tells whether the pool has failed, and all but that is as it should be.
fn repair(scene: &Scene, may_need_check: bool, case: &str) {
    let is_flagged = needs_check(scene);
    assert!(may_need_check || !is_flagged, "{case}");
    let told = check(&[], &scene.path("meta")).expect(0);
    let told = told.out() + &told.stderr;
    assert_eq!(told.contains("needs-check"), is_flagged, "{case}: {told}");
    if is_flagged {
        scene
            .run(&["--run", "true"])
            .expect(1)
            .expect_stderr(&["needs_check"]);
        check(&["-q", "--clear-needs-check-flag"], &scene.path("meta")).expect(0);
    }
    scene.assert_sound();
}

/// Has the faults happen under load, again and again on the same pool. `judge` is told the last status, and how it went for each device.
fn run(faults: &[&str], judge: impl Fn(&str, &[Device; 2])) {
    let seeds = env::var("FAULT_SEEDS").map_or(SEEDS, |n| n.parse().expect("a number"));
    let mut scene = Scene::new(DATA_BLOCKS, 1 << 20);
    let switch = scene.path("switch");
    let size = SECTORS * SECTOR;
    let sizes = [0, 1].map(|id| format!("{id}:{size}"));
    let mut devices = [Device::new(1, "0"), Device::new(2, "1")];
    let mut failures = 0;
    // What the last snapshot of device 0 has.
    let mut snapshot: Vec<u64> = Vec::new();
    // After the last crash nothing fails.
    for seed in 1..=seeds + 1 {
        let case = format!("{faults:?}, seed {seed}");
        let faults = faults.iter().filter(|_| seed <= seeds);
        let while_on =
            |fault: &&str| format!("--fault={fault},seed={seed},while={}", switch.display());
        let faults: Vec<String> = faults.map(while_on).collect();
        let mut all = vec![
            "--create", "--quiet", "--thin", &sizes[0], "--thin", &sizes[1],
        ];
        all.extend(faults.iter().map(String::as_str));
        scene.serve(&all);
        for device in &mut devices {
            device.settle(&scene, case.clone());
        }
        if seed > 1 {
            let id = seed.to_string();
            scene.asked(&["activate", &id, &size.to_string()]);
            let found = scene.connect(&id).read(0, size).expect("read");
            assert!(numbers(&found, &case) == snapshot, "{case}: the snapshot");
        }
        if seed > seeds {
            break;
        }
        if seed > 2 {
            scene.asked(&["delete", &(seed - 1).to_string()]);
        }
        scene.asked(&["create_snap", &(seed + 1).to_string(), "0"]);
        snapshot = devices[0]
            .sectors
            .iter()
            .map(|sector| sector.now[0])
            .collect();
        File::create(&switch).expect("made");
        std::thread::scope(|scope| {
            for device in &mut devices {
                let scene = &scene;
                scope.spawn(move || {
                    let mut client = scene.connect(device.export);
                    let mut rng = SmallRng::seed_from_u64(seed ^ device.last);
                    (0..REQUESTS).for_each(|_| device.request(&mut client, &mut rng, scene));
                });
            }
        });
        fs::remove_file(&switch).expect("removed");
        let status = scene.asked(&["status"]);
        judge(&status, &devices);
        failures += devices.iter().map(|device| device.failures).sum::<usize>();
        let is_writable = status.contains(" - rw ");
        let has_failed = devices.iter().any(|device| device.failed_flushes > 0);
        if is_writable && !has_failed && seed % 2 == 0 {
            scene.stop();
            devices.iter_mut().for_each(Device::flushed);
        } else {
            scene.kill();
        }
        repair(&scene, !is_writable, &case);
    }
    scene.stop();
    assert!(failures > 0, "{faults:?}: nothing fails");
}

#[test]
fn who_is_told_of_no_failure_of_the_data_has_what_he_wrote() {
    let faults = [
        "data:read:eio:chance=3",
        "data:write:eio:chance=3",
        "data:zero:eio:chance=10",
        "data:discard:eio:chance=10",
    ];
    run(&faults, |status, devices| {
        assert!(
            status.contains(" - rw ") && !status.contains("needs_check"),
            "{status}"
        );
        assert!(devices.iter().all(|device| device.failed_flushes == 0));
    });
}

#[test]
fn what_was_flushed_outlives_data_that_cannot_be_flushed() {
    run(
        &["data:any:eio:chance=1", "data:flush:eio:chance=4"],
        |status, _| {
            let is_failed = status.contains(" - ro ") && status.contains(" needs_check ");
            assert!(is_failed || status.contains(" - rw "), "{status}");
        },
    );
}

#[test]
fn what_was_flushed_outlives_metadata_that_fails() {
    run(&["metadata:any:eio:chance=1"], |status, devices| {
        let is_failed = status.contains(" - ro ") && status.contains(" needs_check ");
        let is_writable = status.contains(" - rw ");
        assert!(
            is_failed || is_writable || status.ends_with(" Fail"),
            "{status}"
        );
        let has_failed = devices.iter().any(|device| device.failures > 0);
        assert!(!is_writable || !has_failed, "{status}: there was a failure");
    });
}
