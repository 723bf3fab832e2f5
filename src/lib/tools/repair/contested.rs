//! Holds the mappings against the data space map: a leaf that is older than it should be, though sealed, maps data blocks more often
//! than they are counted, and others less often.
//!
//! Counts that are merely too low, as old kernels left them, are no reason to doubt a mapping: only together with others that are too
//! high, or with a device that has another number of mappings than its details say, is a leaf believed to be older.

use crate::checksum::{self, BlockKind};
use crate::error::Result;
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{Bitmap, CountMap, IndexEntry, Node, TreeKind};
use crate::thin::read_block;
use crate::tools::repair::doubt::MOST_OLDER;
use crate::tools::repair::liveness::Liveness;
use crate::tools::repair::small::SmallTrees;
use crate::units::{ENTRIES_PER_BITMAP, MetadataBlock};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Data blocks looked at one by one; a space map that contradicts more mappings is not believed.
const MOST_CONTESTED: usize = 100_000;

/// Mappings that are left out: keys by leaf, ascending.
pub(super) type Omitted = BTreeMap<MetadataBlock, Vec<u64>>;

/// How the data space map differs from the mappings.
#[derive(Debug, Default)]
pub(super) struct Differences {
    /// Data blocks that are mapped more often than they are counted, and how often they are counted.
    pub(super) over: HashMap<u64, u32>,
    /// Data blocks that are counted once or twice, and mapped less often.
    pub(super) under: u64,
    /// Data blocks that are mapped more often than a count of 3 or more says, though none is mapped too seldom: if it is not the
    /// counts that are older, mappings were removed.
    pub(super) over_many: u64,
    /// Not a single bitmap could be held against the mappings.
    pub(super) nothing_compared: bool,
    /// Counts of 3 and more are not known.
    many_is_unknown: bool,
}

/// Mappings that contradict the data space map.
pub(super) struct Contested {
    /// Those that are not to be believed.
    pub(super) omitted: Omitted,
    /// Leaves that are too old.
    pub(super) older: HashSet<MetadataBlock>,
    /// Nothing in these leaves is to be believed: large counts are not known, or other leaves are lost, so that a count may be right by
    /// coincidence.
    pub(super) is_all_doubtful: bool,
}

/// A data space map on disk.
#[derive(Debug)]
pub(super) struct DataMap {
    pub(super) index_root: MetadataBlock,
    /// The tree of large counts, if it is known.
    pub(super) counts_root: Option<MetadataBlock>,
    /// Data blocks in use, if it is known: a space map that has another number is not the last one.
    pub(super) nr_allocated: Option<u64>,
}

impl DataMap {
    /// Compares it with `mapped`, as far as it can be read and believed.
    pub(super) fn compare(
        &self,
        engine: &dyn BlockEngine,
        mapped: &CountMap,
        metadata: Option<&Liveness>,
        observer: &dyn Observer,
    ) -> Result<Differences> {
        let mut found = Differences {
            nothing_compared: true,
            ..Differences::default()
        };
        let mut over_many = Vec::new();
        let index = SmallTrees::<IndexEntry>::read(
            engine,
            TreeKind::DataIndex,
            &[self.index_root],
            observer,
        )?;
        let index = index.tree(self.index_root);
        let in_use = |e: &IndexEntry| ENTRIES_PER_BITMAP.saturating_sub(u64::from(e.nr_free));
        let nr_allocated: u64 = index.entries.values().map(in_use).sum();
        if index.damaged.is_empty() && self.nr_allocated.is_some_and(|n| n != nr_allocated) {
            return Ok(found);
        }
        let many = match self.counts_root {
            Some(root) => {
                let trees =
                    SmallTrees::<u32>::read(engine, TreeKind::DataCounts, &[root], observer)?;
                let tree = trees.tree(root);
                tree.damaged.is_empty().then_some(tree.entries)
            }
            None => None,
        };
        for (number, entry) in index.entries {
            observer.check_cancelled()?;
            let Ok(data) = read_block(engine, entry.block) else {
                continue;
            };
            // A bitmap that was freed is that of an older transaction, and so is the index.
            let is_freed = metadata.is_some_and(|m| m.is_used(entry.block) == Some(false));
            if is_freed || checksum::verify(data.blocks(1), BlockKind::Bitmap, entry.block).is_err()
            {
                continue;
            }
            let bitmap = Bitmap::from_block(data.blocks(1));
            if bitmap.nr_free() != entry.nr_free || number > u64::MAX / ENTRIES_PER_BITMAP - 1 {
                continue;
            }
            found.nothing_compared = false;
            let (words, _) = mapped.bitmap(number);
            if bitmap.equals(&words) && many.as_ref().is_none_or(|m| m.is_empty()) {
                continue;
            }
            let base = number * ENTRIES_PER_BITMAP;
            let in_range = |m: &&BTreeMap<u64, u32>| {
                let many = m.range(base..base + ENTRIES_PER_BITMAP);
                let fitting = many
                    .clone()
                    .filter(|(b, _)| bitmap.get(**b - base) == 3)
                    .count();
                fitting == many.count() && fitting as u64 == bitmap.nr_many()
            };
            // A tree of large counts that does not go with the bitmap says nothing.
            let many = many.as_ref().filter(in_range);
            for at in 0..ENTRIES_PER_BITMAP {
                let block = base + at;
                if block >= mapped.nr_blocks() {
                    break;
                }
                let claims = mapped.get(block);
                match (bitmap.get(at), many.and_then(|m| m.get(&block))) {
                    (3, Some(&stored)) if claims > stored => over_many.push((block, stored)),
                    (3, Some(_)) => {}
                    (3, None) => found.many_is_unknown = true,
                    (few, _) if claims > few => {
                        found.over.insert(block, few);
                    }
                    (few, _) => found.under += u64::from(claims < few),
                }
            }
            if found.over.len() > MOST_CONTESTED {
                return Ok(Differences::default());
            }
        }
        // Mappings that are too many here are too few elsewhere, or else the counts are the older ones.
        if over_many.len() as u64 <= 2 * found.under {
            found.over.extend(over_many);
        } else {
            found.over_many = over_many.len() as u64;
            found.many_is_unknown = true;
        }
        Ok(found)
    }
}

impl Differences {
    /// The mappings, in the leaves at `leaves`, that are not to be believed. `is_all_there` if no leaves are lost.
    pub(super) fn contested(
        &self,
        engine: &dyn BlockEngine,
        leaves: &[u64],
        is_all_there: bool,
        observer: &dyn Observer,
    ) -> Result<Contested> {
        let stop = || observer.is_cancelled();
        let parts = sweep(
            engine,
            leaves,
            &stop,
            Vec::new,
            |seen: &mut Vec<_>, block, data| {
                let node = data.ok().and_then(|data| Node::parse(data, block, 8).ok());
                let Some(node) = node.filter(Node::is_leaf) else {
                    return;
                };
                let over = node.keys().zip(node.values_u64());
                let over = over.filter(|(_, value)| self.over.contains_key(&(value >> 24)));
                seen.extend(over.map(|(key, value)| (block, key, value >> 24)));
            },
        );
        observer.check_cancelled()?;
        let mut claims: BTreeMap<u64, Vec<(MetadataBlock, u64)>> = BTreeMap::new();
        for (leaf, key, data_block) in parts.into_iter().flatten() {
            claims.entry(data_block).or_default().push((leaf, key));
        }
        let mut omitted = Omitted::new();
        let mut older = HashSet::new();
        let mut tied = Vec::new();
        loop {
            claims.retain(|data_block, claimants| claimants.len() > self.over[data_block] as usize);
            let mut per_leaf: BTreeMap<MetadataBlock, usize> = BTreeMap::new();
            for (leaf, _) in claims.values().flatten() {
                *per_leaf.entry(*leaf).or_default() += 1;
            }
            // The leaf with most contradictions is the one that is older; of equals none is believed.
            let Some(&most) = per_leaf.values().max() else {
                break;
            };
            let mut with_most = per_leaf
                .iter()
                .filter(|(_, n)| **n == most)
                .map(|(leaf, _)| *leaf);
            match (with_most.next(), with_most.next()) {
                (Some(only), None) => drop(older.insert(only)),
                _ => tied.extend(
                    per_leaf
                        .iter()
                        .filter(|(_, n)| **n == most)
                        .map(|(leaf, _)| *leaf),
                ),
            }
            for claimants in claims.values_mut() {
                let (out, kept) = claimants
                    .iter()
                    .partition(|(leaf, _)| per_leaf[leaf] == most);
                *claimants = kept;
                for (leaf, key) in out as Vec<(MetadataBlock, u64)> {
                    omitted.entry(leaf).or_default().push(key);
                }
            }
        }
        omitted.values_mut().for_each(|keys| keys.sort_unstable());
        let is_all_doubtful = self.many_is_unknown || older.len() > 1 || !is_all_there;
        if self.many_is_unknown || older.len() > MOST_OLDER {
            older.extend(tied);
        }
        Ok(Contested {
            omitted,
            older,
            is_all_doubtful,
        })
    }
}
