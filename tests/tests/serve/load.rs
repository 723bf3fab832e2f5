//! Clients that write, trim, zero and flush thin devices while snapshots of them are taken, written, and deleted; and what each sector
//! may hold then, at any time.
//!
//! Every sector of a device has one client that writes to it, one request at a time, so that it is known in which order its contents
//! followed each other. Clients share blocks all the same.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::client::{Client, FUA, Reply, TRIM, WRITE, ZEROES};

pub(crate) const SECTOR: usize = 512;
const BLOCK: usize = 65536;
/// Clients that write to the first devices.
const CLIENTS: usize = 4;
/// Blocks in a row that belong to one client, or in which all have a slice of each block.
const GROUP: usize = 2;
/// Thin devices that are there from the start: 0 and 1.
const FIRST: u64 = 2;
/// Snapshots at once.
const MOST_SNAPSHOTS: usize = 3;
const ENOSPC: u32 = 28;

/// What a sector holds, as a number; 0 is zeros.
pub(crate) fn value(sector: &[u8]) -> u64 {
    let words = sector
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("8")));
    let mix =
        |hash: u64, word: u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    words.fold(0, mix)
}

/// Something that was done to a sector, and when. Whoever was not answered has not ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    value: u64,
    began: u64,
    ended: u64,
    /// It is durable once it has ended.
    is_durable: bool,
}

/// What was done to a device.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    /// By sector, in the order in which they were done.
    sectors: Vec<Vec<Change>>,
    /// When flushes began and ended.
    flushes: Vec<(u64, u64)>,
    /// When it was asked for, and when that was answered.
    made: (u64, u64),
    /// The same of its end.
    deleted: Option<(u64, u64)>,
    /// What it is a snapshot of.
    of: Option<u64>,
}

impl History {
    fn new(content: &[u8], made: (u64, u64), of: Option<u64>) -> Self {
        let first = |sector| Change {
            value: value(sector),
            began: made.0,
            ended: made.1,
            is_durable: true,
        };
        Self {
            sectors: content
                .chunks(SECTOR)
                .map(|sector| vec![first(sector)])
                .collect(),
            made,
            of,
            ..Self::default()
        }
    }

    /// Whether it may, and whether it must be there at this time.
    pub(crate) fn may_and_must_exist(&self, at: u64) -> (bool, bool) {
        let deleted = self.deleted.unwrap_or((u64::MAX, u64::MAX));
        (
            self.made.0 < at && deleted.1 > at,
            self.made.1 <= at && deleted.0 >= at,
        )
    }

    /// Fails unless each sector of `content` is what it may be after the power was cut at this time: what was flushed last, or anything
    /// that came after it.
    pub(crate) fn assert_survived(&self, content: &[u8], at: u64, case: &str) {
        let flushed = self
            .flushes
            .iter()
            .filter(|(_, ended)| *ended <= at)
            .map(|(began, _)| *began)
            .max();
        let is_durable = |change: &Change| {
            change.ended <= flushed.unwrap_or(0) || change.is_durable && change.ended <= at
        };
        self.assert_each(content, case, |changes| {
            let first = changes.iter().rposition(is_durable).unwrap_or(0);
            first..changes.partition_point(|change| change.began < at)
        });
    }

    /// Fails unless each sector of `content` is what was last written to it.
    pub(crate) fn assert_current(&self, content: &[u8], case: &str) {
        self.assert_each(content, case, |changes| changes.len() - 1..changes.len());
    }

    fn assert_each(&self, content: &[u8], case: &str, allowed: impl Fn(&[Change]) -> Range<usize>) {
        assert_eq!(content.len(), self.sectors.len() * SECTOR, "{case}");
        for (number, (sector, changes)) in content.chunks(SECTOR).zip(&self.sectors).enumerate() {
            let found = value(sector);
            let range = allowed(changes);
            let is_allowed = changes[range.clone()]
                .iter()
                .any(|change| change.value == found);
            assert!(
                is_allowed,
                "{case}, sector {number}: {found:x} of {:?}, allowed is {range:?} of {:x?}",
                changes.iter().position(|change| change.value == found),
                changes
            );
        }
    }
}

/// Fails unless each snapshot has of each sector what its origin had at some time while it was taken.
pub(crate) fn assert_snapshots(histories: &BTreeMap<u64, History>, case: &str) {
    for (id, snapshot) in histories {
        let Some(of) = snapshot.of else { continue };
        let (began, ended) = snapshot.made;
        for (number, (own, origins)) in snapshot
            .sectors
            .iter()
            .zip(&histories[&of].sectors)
            .enumerate()
        {
            let before = origins.partition_point(|change| change.ended <= began);
            let end = origins.partition_point(|change| change.began < ended);
            // What a device begins with is older than all that is done to it.
            let may = &origins[before.saturating_sub(1)..end];
            assert!(
                may.iter().any(|change| change.value == own[0].value),
                "{case}: sector {number} of snapshot {id} of {of} has {:x?}, and {origins:x?} were written",
                own[0]
            );
        }
    }
}

/// What clients do, and whom they do it to.
pub(crate) struct Load<'a> {
    /// Of the NBD server.
    pub(crate) socket: &'a Path,
    /// The time.
    pub(crate) clock: &'a (dyn Fn() -> u64 + Sync),
    /// Sends a message to the pool, or `activate` and `deactivate`; true if it succeeded.
    pub(crate) control: &'a (dyn Fn(&str) -> bool + Sync),
    /// Requests of each client.
    pub(crate) requests: usize,
    /// Snapshots that are taken meanwhile.
    pub(crate) snapshots: u64,
    /// The first snapshot's id.
    pub(crate) first_snapshot: u64,
}

/// A client's device: its connection, what it should read as, and what was done.
struct Device {
    client: Client,
    content: Vec<u8>,
    done: Vec<(usize, Change)>,
    flushes: Vec<(u64, u64)>,
}

impl Load<'_> {
    /// Puts the load on devices 0 and 1, which have this content. What was done to each device comes back.
    pub(crate) fn run(&self, first: &[Vec<u8>], seed: u64) -> BTreeMap<u64, History> {
        let start = (self.clock)();
        let mut histories: BTreeMap<u64, History> = (0..)
            .zip(first)
            .map(|(id, content)| (id, History::new(content, (start, start), None)))
            .collect();
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|number| scope.spawn(move || self.be_client(number, first, seed)))
                .collect();
            let manager = scope.spawn(|| self.be_manager(first, seed));
            for client in clients {
                for (id, device) in (0..).zip(client.join().expect("no panic")) {
                    let history = histories.get_mut(&id).expect("it is one of the first");
                    for (sector, change) in device.done {
                        history.sectors[sector].push(change);
                    }
                    history.flushes.extend(device.flushes);
                }
            }
            histories.extend(manager.join().expect("no panic"));
        });
        histories
    }

    fn open(&self, id: u64, content: Vec<u8>) -> Device {
        Device {
            client: Client::connect(self.socket, &id.to_string()).expect("connected"),
            content,
            done: Vec::new(),
            flushes: Vec::new(),
        }
    }

    fn be_client(&self, number: usize, first: &[Vec<u8>], seed: u64) -> Vec<Device> {
        let mut rng = SmallRng::seed_from_u64(seed ^ (number as u64 + 1) << 32);
        let mut devices: Vec<Device> = (0..)
            .zip(first)
            .map(|(id, content)| self.open(id, content.clone()))
            .collect();
        for _ in 0..self.requests {
            let device = &mut devices[rng.random_range(0..FIRST as usize)];
            let within = own_run(&mut rng, number, device.content.len());
            self.request(device, within, &mut rng);
        }
        devices
    }

    /// Does something within a range of bytes that nobody else writes to.
    fn request(&self, device: &mut Device, within: Range<usize>, rng: &mut SmallRng) {
        let at = rng.random_range(within.clone());
        let most = (within.end - at).min(if rng.random_ratio(1, 4) {
            3 * BLOCK
        } else {
            8192
        });
        let mut range = at..at + rng.random_range(1..=most);
        if rng.random_ratio(1, 2) {
            let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
            range = sectors.start * SECTOR..(sectors.end * SECTOR).min(within.end);
        }
        let (offset, len) = (range.start as u64, range.len() as u32);
        let fua = if rng.random_ratio(1, 8) { FUA } else { 0 };
        let client = &mut device.client;
        let began = (self.clock)();
        match rng.random_range(0..20) {
            0..9 => {
                let mut data = vec![0; range.len()];
                rng.fill(&mut data[..]);
                let reply = client.ask(WRITE, fua, offset, len, &data);
                device.content[range.clone()].copy_from_slice(&data);
                self.done(device, reply, range, began, fua == FUA);
            }
            9..11 => {
                // NO_HOLE, or blocks may be unmapped.
                let flags = fua | if rng.random_ratio(1, 3) { 2 } else { 0 };
                let reply = client.ask(ZEROES, flags, offset, len, &[]);
                device.content[range.clone()].fill(0);
                self.done(device, reply, range, began, fua == FUA);
            }
            11..13 => {
                let reply = client.ask(TRIM, fua, offset, len, &[]);
                // A part of a block is left alone.
                let blocks = range.start.next_multiple_of(BLOCK)..range.end / BLOCK * BLOCK;
                if blocks.start < blocks.end {
                    device.content[blocks.clone()].fill(0);
                    self.done(device, reply, blocks, began, fua == FUA);
                } else {
                    reply.expect("trimmed");
                }
            }
            13..15 => {
                client.flush().expect("flushed");
                device.flushes.push((began, (self.clock)()));
            }
            _ => {
                let found = client.read(offset, range.len()).expect("read");
                assert!(
                    found == device.content[range.clone()],
                    "{range:?} is not what was written"
                );
            }
        }
    }

    /// Notes what was done to a range of bytes. A write that found no space may have been done in part.
    fn done(
        &self,
        device: &mut Device,
        reply: Reply,
        range: Range<usize>,
        began: u64,
        is_durable: bool,
    ) {
        let is_failed = match reply {
            Ok(_) => false,
            Err(Some(ENOSPC)) => true,
            Err(other) => panic!("{range:?}: {other:?}"),
        };
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        if is_failed {
            let bytes = sectors.start * SECTOR..sectors.end * SECTOR;
            let found = device
                .client
                .read(bytes.start as u64, bytes.len())
                .expect("read");
            device.content[bytes].copy_from_slice(&found);
        }
        let ended = (self.clock)();
        for sector in sectors {
            let change = Change {
                value: value(&device.content[sector * SECTOR..][..SECTOR]),
                began,
                ended,
                is_durable: is_durable && !is_failed,
            };
            device.done.push((sector, change));
        }
    }

    /// Takes snapshots, writes to them, and deletes them.
    fn be_manager(&self, first: &[Vec<u8>], seed: u64) -> BTreeMap<u64, History> {
        let mut rng = SmallRng::seed_from_u64(!seed);
        let mut all = BTreeMap::new();
        let mut living: Vec<(u64, Device)> = Vec::new();
        for id in (self.first_snapshot..).take(self.snapshots as usize) {
            let of = match rng.random_range(0..6) {
                0 if !living.is_empty() => living[rng.random_range(0..living.len())].0,
                n => n % FIRST,
            };
            let size = first[0].len();
            let began = (self.clock)();
            assert!(
                (self.control)(&format!("create_snap {id} {of}")),
                "snapshot {id} of {of}"
            );
            let made = (began, (self.clock)());
            assert!(
                (self.control)(&format!("activate {id} {size}")),
                "snapshot {id}"
            );
            let mut snapshot = self.open(id, Vec::new());
            snapshot.content = snapshot.client.read(0, size).expect("read");
            all.insert(id, History::new(&snapshot.content, made, Some(of)));
            living.push((id, snapshot));
            for _ in 0..rng.random_range(0..40) {
                let which = rng.random_range(0..living.len());
                let (_, device) = &mut living[which];
                self.request(device, 0..size, &mut rng);
                std::thread::yield_now();
            }
            if living.len() >= MOST_SNAPSHOTS {
                let (id, device) = living.swap_remove(rng.random_range(0..living.len()));
                close(&mut all, id, device);
                assert!((self.control)(&format!("deactivate {id}")), "snapshot {id}");
                let began = (self.clock)();
                assert!((self.control)(&format!("delete {id}")), "snapshot {id}");
                all.get_mut(&id).expect("it was made").deleted = Some((began, (self.clock)()));
            }
        }
        for (id, device) in living {
            close(&mut all, id, device);
        }
        all
    }
}

/// Hangs up, and adds what was done to a snapshot to its history. What was in a snapshot of it when that was taken is there already.
fn close(all: &mut BTreeMap<u64, History>, id: u64, device: Device) {
    let history = all.get_mut(&id).expect("it was made");
    for (sector, change) in device.done {
        history.sectors[sector].push(change);
    }
    history.flushes = device.flushes;
}

/// A range of bytes that belongs to a client: blocks of its own, or a slice of one that it shares.
fn own_run(rng: &mut SmallRng, client: usize, len: usize) -> Range<usize> {
    let groups = len / (GROUP * BLOCK);
    loop {
        let group = rng.random_range(0..groups);
        let start = group * GROUP * BLOCK;
        if group % (CLIENTS + 1) == client {
            return start..start + GROUP * BLOCK;
        }
        if group % (CLIENTS + 1) == CLIENTS {
            let slice = BLOCK / CLIENTS;
            let start = start + rng.random_range(0..GROUP) * BLOCK + client * slice;
            return start..start + slice;
        }
    }
}
