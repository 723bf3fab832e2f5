//! A metadata device whose table changes under the pool.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use thintools::io::{BlockEngine, RamEngine};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

use crate::pool::disk::CHUNK;

/// How a part of the metadata device behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Fine,
    /// dm-flakey with error_writes.
    FailsWrites,
    /// dm-error.
    Fails,
}

/// A metadata device: as long as its table says, and as healthy. Flushes always work.
pub(crate) struct Meta {
    memory: RamEngine,
    parts: Mutex<Vec<(Range<u64>, Health)>>,
}

impl Meta {
    pub(super) fn new(blocks: u64) -> Arc<Self> {
        Arc::new(Self {
            memory: RamEngine::new(blocks as usize),
            parts: Mutex::new(vec![(0..blocks, Health::Fine)]),
        })
    }

    pub(super) fn load(&self, table: &str) {
        let part = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words[at].parse::<u64>().expect("sectors") / CHUNK;
            let health = match words[2] {
                "linear" | "log-writes" => Health::Fine,
                "flakey" if line.ends_with("error_writes") => Health::FailsWrites,
                "error" => Health::Fails,
                other => panic!("a metadata device of {other}"),
            };
            (number(0)..number(0) + number(1), health)
        };
        *self.parts.lock().expect("no panic") = table.lines().map(part).collect();
    }

    /// All of it, healthy or not.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut contents = vec![0; self.memory.nr_blocks() as usize * BLOCK_SIZE];
        self.memory
            .read(MetadataBlock(0), &mut contents)
            .expect("memory");
        contents
    }

    /// Puts something at its beginning.
    pub(super) fn put(&self, bytes: &[u8]) {
        self.memory.write(MetadataBlock(0), bytes).expect("memory");
    }

    fn refuse(
        &self,
        start: MetadataBlock,
        buf: &[u8],
        is_bad: fn(Health) -> bool,
    ) -> io::Result<()> {
        let range = start.0..start.0 + (buf.len() / BLOCK_SIZE) as u64;
        let parts = self.parts.lock().expect("no panic");
        let hits = |part: &Range<u64>| part.start < range.end && range.start < part.end;
        match parts
            .iter()
            .any(|(part, health)| hits(part) && is_bad(*health))
        {
            true => Err(io::Error::other("the device fails")),
            false => Ok(()),
        }
    }
}

impl BlockEngine for Meta {
    fn nr_blocks(&self) -> u64 {
        let parts = self.parts.lock().expect("no panic");
        parts.last().map_or(0, |(part, _)| part.end)
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        self.refuse(start, buf, |health| health == Health::Fails)?;
        self.memory.read(start, buf)
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        self.refuse(start, buf, |health| health != Health::Fine)?;
        self.memory.write(start, buf)
    }

    fn sync(&self) -> io::Result<()> {
        self.memory.sync()
    }

    fn depth(&self) -> usize {
        self.memory.depth()
    }
}
