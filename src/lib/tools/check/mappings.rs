//! The hot loop: every leaf of every mapping tree, each entry judged and its data block counted.

use super::damage::{Code, Damage, Severity};
use crate::pdata::{CountBatch, CountMap, Node};
use crate::thin::Superblock;
use crate::units::{MAX_TIME, MetadataBlock};

/// Snapshots that a clock may be behind its mappings and still be set forward.
const PLAUSIBLE_LAG: u64 = 65_536;

/// A leaf with entries that are wrong.
#[derive(Debug)]
pub(super) struct Leaf {
    block: MetadataBlock,
    past_end: Wrong,
    late: Wrong,
}

/// How many entries are wrong in one way, and the furthest of them.
#[derive(Clone, Copy, Debug, Default)]
struct Wrong {
    count: u32,
    thin: u64,
    value: u64,
}

impl Wrong {
    fn add(&mut self, thin: u64, value: u64) {
        if self.count == 0 || value > self.value {
            (self.thin, self.value) = (thin, value);
        }
        self.count += 1;
    }
}

/// One thread's view of the leaves.
pub(super) struct MappingVisitor<'a> {
    counts: &'a CountMap,
    batch: CountBatch,
    nr_data_blocks: u64,
    clock: u32,
    latest: u32,
    wrong: Vec<Leaf>,
}

impl<'a> MappingVisitor<'a> {
    pub(super) fn new(counts: &'a CountMap, nr_data_blocks: u64, clock: u32) -> Self {
        Self {
            counts,
            batch: CountBatch::new(counts),
            nr_data_blocks,
            clock,
            latest: 0,
            wrong: Vec::new(),
        }
    }

    pub(super) fn visit(&mut self, node: &Node<'_>) {
        let mut latest = 0;
        let mut furthest = 0;
        for value in node.values_u64() {
            self.batch.add(self.counts, value >> 24);
            latest = latest.max(value as u32 & MAX_TIME);
            furthest = furthest.max(value >> 24);
        }
        self.latest = self.latest.max(latest);
        if latest > self.clock || furthest >= self.nr_data_blocks && !node.is_empty() {
            self.wrong.push(self.judge(node));
        }
    }

    fn judge(&self, node: &Node<'_>) -> Leaf {
        let mut leaf = Leaf {
            block: node.location(),
            past_end: Wrong::default(),
            late: Wrong::default(),
        };
        for (thin, value) in node.keys().zip(node.values_u64()) {
            if value >> 24 >= self.nr_data_blocks {
                leaf.past_end.add(thin, value >> 24);
            }
            if value as u32 & MAX_TIME > self.clock {
                leaf.late.add(thin, value & u64::from(MAX_TIME));
            }
        }
        leaf
    }

    /// The leaves with wrong entries, and the latest time of any entry.
    pub(super) fn finish(mut self) -> (Vec<Leaf>, u32) {
        self.batch.flush(self.counts);
        (self.wrong, self.latest)
    }
}

impl Leaf {
    pub(super) fn damages(&self, superblock: &Superblock) -> impl Iterator<Item = Damage> + use<> {
        let Wrong { count, thin, value } = self.past_end;
        let past_end = (count > 0).then(|| {
            let limit = superblock.data_space_map.nr_blocks;
            let message = format!(
                "{count} mappings to data blocks that do not exist; the furthest, of virtual block {thin}, is to data block \
                 {value} of {limit}"
            );
            Damage::new(Code::MappingPastEnd, self.block, message)
        });
        let Wrong { count, thin, value } = self.late;
        let late = (count > 0).then(|| {
            let clock = superblock.time;
            let message = format!(
                "{count} mappings later than the snapshot clock {clock}; the latest, of virtual block {thin}, has time {value}"
            );
            let damage = Damage::new(Code::MappingTime, self.block, message);
            // Of a clock a little behind, the clock is wrong; of a time from nowhere, the mapping is.
            match value > u64::from(clock) + PLAUSIBLE_LAG {
                true => damage.with_severity(Severity::Fatal),
                false => damage,
            }
        });
        past_end.into_iter().chain(late)
    }
}
