//! The program that did the I/O: it reads a list, keeps some requests under way, and counts what fails.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use thintools::pool::{BioError, BioResult, Op, pieces};

use super::Player;
use crate::pool::disk::{CHUNK, Tag};

/// What a chunk holds that a list wrote with `tag`: its place is part of it.
pub(crate) fn content(tag: u64, chunk: u64) -> Tag {
    assert!(tag < 1 << 24 && chunk < 1 << 40);
    match tag {
        0 => 0,
        tag => tag << 40 | chunk,
    }
}

/// What thinio counts.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) writes: u64,
    reads: u64,
    discards: u64,
    mismatches: u64,
    pub(crate) errors: u64,
    first: Option<BioError>,
}

impl Tally {
    fn note(&mut self, result: BioResult) {
        if let Err(e) = result {
            self.errors += 1;
            self.first.get_or_insert(e);
        }
    }

    /// The line that thinio prints at its end.
    pub(super) fn line(&self) -> String {
        let first = match self.first {
            None => "",
            Some(BioError::NoSpace) => " first: No space left on device",
            Some(_) => " first: Input/output error",
        };
        format!(
            "thinio: writes={} reads={} discards={} mismatches={} errors={}{first}",
            self.writes, self.reads, self.discards, self.mismatches, self.errors
        )
    }
}

/// Requests of thinio are of up to 1 MiB.
const MOST_CHUNKS: u64 = 256;

impl Player {
    /// Carries out a list. `waiting` is called when I/O has made no progress for a second.
    pub(crate) fn thinio(
        &mut self,
        device: &str,
        list: &str,
        depth: usize,
        waiting: &mut dyn FnMut(&mut Self),
    ) -> Tally {
        let text = self.lists[list].clone();
        let mut tally = Tally::default();
        let mut under_way: VecDeque<Vec<u64>> = VecDeque::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let mut words = line.split(' ');
            let op = words.next().expect("an operation");
            let mut number = || {
                words
                    .next()
                    .map_or(0, |word| word.parse().expect("a number"))
            };
            let (mut chunk, mut count, tag): (u64, u64, u64) = (number(), number(), number());
            if op != "w" {
                while let Some(bios) = under_way.pop_front() {
                    tally.note(self.wait(&bios, waiting));
                }
            }
            match op {
                "f" => {
                    let bios = self.submit(device, Op::Flush, 0, 0, 0);
                    tally.note(self.wait(&bios, waiting));
                }
                "d" => {
                    tally.discards += 1;
                    let bios = self.submit(device, Op::Discard, chunk, count, 0);
                    tally.note(self.wait(&bios, waiting));
                }
                "w" | "r" => {
                    while count > 0 {
                        let now = count.min(MOST_CHUNKS);
                        if op == "w" {
                            tally.writes += 1;
                            if under_way.len() == depth {
                                let bios = under_way.pop_front().expect("one");
                                tally.note(self.wait(&bios, waiting));
                            }
                            under_way.push_back(self.submit(device, Op::Write, chunk, now, tag));
                        } else {
                            tally.reads += 1;
                            let bios = self.submit(device, Op::Read, chunk, now, 0);
                            let result = self.wait(&bios, waiting);
                            tally.note(result);
                            let rig = self.rig();
                            let found = bios.iter().flat_map(|bio| rig.done[bio].content.clone());
                            let want = (chunk..chunk + now).map(|chunk| content(tag, chunk));
                            tally.mismatches += u64::from(result.is_ok() && !found.eq(want));
                        }
                        (chunk, count) = (chunk + now, count - now);
                    }
                }
                other => panic!("{list}: {other}"),
            }
        }
        while let Some(bios) = under_way.pop_front() {
            tally.note(self.wait(&bios, waiting));
        }
        // Programs take their time: what changed is committed meanwhile.
        if let Some(pool) = &mut self.pool {
            pool.rig.pass(Duration::from_secs(1));
        }
        tally
    }

    /// Submits a request to a thin device, in as many bios as it takes, or writes to the external origin.
    fn submit(&mut self, device: &str, op: Op, chunk: u64, count: u64, tag: u64) -> Vec<u64> {
        let name = device.strip_prefix("/dev/mapper/").expect("a dm device");
        let Some(open) = self.thins.get(name) else {
            if op == Op::Write {
                let tags: Vec<Tag> = (chunk..chunk + count).map(|c| content(tag, c)).collect();
                self.origin.1.write(chunk * CHUNK, &tags, true);
            }
            return Vec::new();
        };
        let thin = Arc::clone(&open.thin);
        let size = u64::from(self.pool.as_ref().expect("active").line.words.block_sectors);
        let rig = self.rig();
        if op == Op::Flush {
            return vec![rig.submit_flush(&thin)];
        }
        pieces(op, chunk * CHUNK, count * CHUNK, size, None)
            .map(|(sector, sectors)| match op {
                Op::Write => {
                    rig.submit_tagged(&thin, sector, sectors, content(tag, sector / CHUNK))
                }
                _ => rig.submit(&thin, op, sector, sectors),
            })
            .collect()
    }

    /// Carries out I/O until a request has ended.
    fn wait(&mut self, bios: &[u64], waiting: &mut dyn FnMut(&mut Self)) -> BioResult {
        for _ in 0..1_000_000 {
            let rig = self.rig();
            if bios.iter().all(|bio| rig.done.contains_key(bio)) {
                let mut results = bios.iter().map(|bio| rig.done[bio].result);
                return results.find(Result::is_err).unwrap_or(Ok(()));
            }
            if rig.pending.is_empty() {
                rig.pass(Duration::from_secs(1));
                waiting(self);
            } else {
                rig.carry_out(0, Ok(()));
            }
        }
        panic!("I/O without an end");
    }
}
