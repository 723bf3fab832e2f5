//! Holds mappings of deleted devices against those of the current devices: which of their data blocks others have by now.
//!
//! Leaves are judged some thousands at a time, so that memory does not follow the size of the pool; each time the leaves of the
//! current devices are read once.

use crate::error::{Error, ErrorKind, Result};
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{CountBatch, CountMap, Forest, Node, Shape};
use crate::thin::{BlockTime, DeviceDetail};
use crate::units::MetadataBlock;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Leaves that are judged together: about 100 MiB of mappings.
const LEAVES_AT_ONCE: usize = 8192;

/// How the current devices have a data block.
#[derive(Clone, Copy, Debug)]
enum Held {
    /// At one virtual block, mapped at one time; by some device as its own alone.
    Alike { key: u64, time: u32, is_own: bool },
    /// At several virtual blocks or of several times, which no pool should have.
    Apart,
}

impl Held {
    fn join(self, key: u64, time: u32, is_own: bool) -> Self {
        match self {
            Self::Alike {
                key: k,
                time: t,
                is_own: other,
            } if (k, t) == (key, time) => Self::Alike {
                key,
                time,
                is_own: is_own || other,
            },
            _ => Self::Apart,
        }
    }
}

/// The mappings of the current devices.
pub(super) struct Current<'a> {
    engine: &'a dyn BlockEngine,
    observer: &'a dyn Observer,
    /// Every leaf with the earliest time at which one of its devices last took part in a snapshot.
    leaves: BTreeMap<u64, u32>,
    /// The snapshot clock.
    clock: u32,
    /// Data blocks of the pool.
    nr_data_blocks: u64,
}

/// What can be said of a leaf that no current device has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Judgement {
    /// Mappings.
    pub(super) entries: u64,
    /// Mappings that a current device has too, unchanged since before its last snapshot.
    pub(super) same: u64,
    /// The latest time of those.
    pub(super) same_until: Option<u32>,
    /// Mappings whose data blocks a current device has otherwise.
    pub(super) reused: u64,
    /// Some mapping in it cannot be the deleted device's.
    pub(super) is_foreign: bool,
}

/// A mapping of a leaf that is judged.
struct Claim {
    data_block: u64,
    key: u64,
    time: u32,
    leaf: u32,
}

/// Who has data blocks, of those that are asked for.
struct Holders {
    /// The data blocks, ascending.
    blocks: Vec<u64>,
    by_block: Vec<Mutex<Option<Held>>>,
}

impl Holders {
    fn add(&self, data_block: u64, key: u64, time: u32, is_own: bool) {
        if let Ok(at) = self.blocks.binary_search(&data_block) {
            let mut held = self.by_block[at]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *held = Some(match *held {
                Some(known) => known.join(key, time, is_own),
                None => Held::Alike { key, time, is_own },
            });
        }
    }

    fn get(&self, data_block: u64) -> Option<Held> {
        let at = self.blocks.binary_search(&data_block).ok()?;
        *self.by_block[at]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> Current<'a> {
    /// The mappings of `devices` in `forest`, all of whose trees are whole. Of data blocks there are `nr_data_blocks`.
    pub(super) fn of(
        engine: &'a dyn BlockEngine,
        observer: &'a dyn Observer,
        forest: &Forest,
        devices: &BTreeMap<u64, (MetadataBlock, DeviceDetail)>,
        clock: u32,
        nr_data_blocks: u64,
    ) -> Self {
        let mut snapped: HashMap<usize, u32> = HashMap::new();
        let mut lower = |node: usize, time: u32| {
            let known = snapped.entry(node).or_insert(time);
            *known = time.min(*known);
            *known
        };
        let mut roots = Vec::new();
        for (root, detail) in devices.values() {
            if let Some(root) = forest.number(*root) {
                lower(root, detail.snapshotted_time);
                roots.push(root);
            }
        }
        let mut leaves = BTreeMap::new();
        for &n in forest.children_first(&roots).iter().rev() {
            let node = &forest.nodes()[n];
            let time = lower(n, u32::MAX);
            if matches!(node.shape, Shape::Leaf { .. }) {
                leaves.insert(node.block.0, time);
            }
            let children = forest.edges(node).iter();
            for child in children.filter_map(|e| forest.number(forest.child(e)?)) {
                lower(child, time);
            }
        }
        Self {
            engine,
            observer,
            leaves,
            clock,
            nr_data_blocks,
        }
    }

    /// If the leaf at `block` is part of a current device: the earliest time at which one of its devices last took part in a
    /// snapshot.
    pub(super) fn snapped(&self, block: MetadataBlock) -> Option<u32> {
        self.leaves.get(&block.0).copied()
    }

    /// Judges `leaves` (ascending, none of them part of a current device), and hands over each with what was found and the
    /// virtual blocks, ascending, whose data blocks a current device has otherwise.
    pub(super) fn judge(
        &self,
        leaves: &[u64],
        mut tell: impl FnMut(MetadataBlock, Judgement, Vec<u64>),
    ) -> Result<()> {
        for leaves in leaves.chunks(LEAVES_AT_ONCE) {
            let (claims, mut judgements) = self.claims(leaves)?;
            let held = self.held(&claims)?;
            let mut reused = vec![Vec::new(); leaves.len()];
            for claim in &claims {
                let judgement = &mut judgements[claim.leaf as usize];
                match held.get(claim.data_block) {
                    None => {}
                    Some(Held::Alike { key, time, is_own })
                        if (key, time) == (claim.key, claim.time) =>
                    {
                        judgement.same += 1;
                        judgement.same_until = judgement.same_until.max(Some(time));
                        judgement.is_foreign |= is_own;
                    }
                    Some(_) => {
                        judgement.reused += 1;
                        reused[claim.leaf as usize].push(claim.key);
                    }
                }
            }
            for ((&leaf, judgement), mut keys) in leaves.iter().zip(judgements).zip(reused) {
                keys.sort_unstable();
                tell(MetadataBlock(leaf), judgement, keys);
            }
        }
        Ok(())
    }

    /// The mappings in `leaves`, ascending by data block, and what the leaves by themselves tell.
    fn claims(&self, leaves: &[u64]) -> Result<(Vec<Claim>, Vec<Judgement>)> {
        let parts = self.read(leaves, Vec::new, |claims, node| {
            let leaf = leaves.partition_point(|&l| l < node.location().0) as u32;
            let mappings = node.keys().zip(node.values_u64().map(BlockTime::unpack));
            claims.extend(mappings.map(|(key, to)| Claim {
                data_block: to.block.0,
                key,
                time: to.time,
                leaf,
            }));
        })?;
        let mut claims: Vec<Claim> = parts.into_iter().flatten().collect();
        claims.sort_unstable_by_key(|c| (c.data_block, c.leaf, c.key));
        let mut judgements = vec![Judgement::default(); leaves.len()];
        for claim in &claims {
            let judgement = &mut judgements[claim.leaf as usize];
            judgement.entries += 1;
            judgement.is_foreign |=
                claim.time > self.clock || claim.data_block >= self.nr_data_blocks;
        }
        Ok((claims, judgements))
    }

    /// How the current devices have the data blocks of `claims`.
    fn held(&self, claims: &[Claim]) -> Result<Holders> {
        let mut blocks: Vec<u64> = claims.iter().map(|c| c.data_block).collect();
        blocks.dedup();
        let mut by_block = Vec::new();
        by_block.resize_with(blocks.len(), Mutex::default);
        let holders = Holders { blocks, by_block };
        let leaves: Vec<u64> = self.leaves.keys().copied().collect();
        self.read(
            &leaves,
            || (),
            |(), node| {
                let snapped = self.snapped(node.location()).unwrap_or(0);
                for (key, to) in node.keys().zip(node.values_u64().map(BlockTime::unpack)) {
                    holders.add(to.block.0, key, to.time, to.time >= snapped);
                }
            },
        )?;
        Ok(holders)
    }

    /// Those of `leaves` (ascending, of one device) that map a data block which another mapping of them has too.
    pub(super) fn repeated(&self, leaves: &[u64]) -> Result<HashSet<MetadataBlock>> {
        let counts = CountMap::new(self.nr_data_blocks);
        let state = || CountBatch::new(&counts);
        let parts = self.read(leaves, state, |batch, node| {
            node.values_u64()
                .for_each(|value| batch.add(&counts, value >> 24));
        })?;
        parts.into_iter().for_each(|mut batch| batch.flush(&counts));
        let is_repeated =
            |value: u64| value >> 24 < counts.nr_blocks() && counts.get(value >> 24) > 1;
        let parts = self.read(leaves, Vec::new, |repeated, node| {
            if node.values_u64().any(is_repeated) {
                repeated.push(node.location());
            }
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    /// Reads `leaves`, ascending, all of which were read before.
    fn read<S: Send>(
        &self,
        leaves: &[u64],
        state: impl Fn() -> S + Sync,
        visit: impl Fn(&mut S, &Node<'_>) + Sync,
    ) -> Result<Vec<S>> {
        let stop = || self.observer.is_cancelled();
        let failed = AtomicBool::new(false);
        let parts = sweep(self.engine, leaves, &stop, state, |state, block, data| {
            let node = data.ok().and_then(|data| Node::parse(data, block, 8).ok());
            match node.filter(Node::is_leaf) {
                Some(node) => visit(state, &node),
                None => failed.store(true, Ordering::Relaxed),
            }
        });
        self.observer.check_cancelled()?;
        if failed.into_inner() {
            return Err(Error::new(
                ErrorKind::Io,
                "a leaf of the mapping trees cannot be read a second time",
            ));
        }
        Ok(parts)
    }
}
