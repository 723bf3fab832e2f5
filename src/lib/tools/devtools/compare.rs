//! What a repair made of damaged metadata, held against the metadata before the damage: mapping by mapping, leaf after leaf,
//! in memory that does not depend on their number.

use super::inventory::read_trees;
use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{Forest, Node, TreeKind};
use crate::thin::{BlockTime, Superblock, read_block};
use crate::units::{DataBlock, MetadataBlock, ThinBlock, ThinId};
use serde::Serialize;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use super::super::sharing::leaves;

/// Wrong mappings that are listed one by one.
const EXAMPLES: usize = 10;

/// A mapping that a repair made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WrongMapping {
    /// The thin device.
    pub device: ThinId,
    /// Its block.
    #[serde(rename = "virtual")]
    pub thin: ThinBlock,
    /// Where the repaired metadata has it.
    pub data: DataBlock,
    /// Where it was; none if it was not mapped.
    pub truth: Option<DataBlock>,
}

/// How many mappings a repair kept. A mapping is a virtual block of a device with its data block.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Mappings before the damage.
    pub truth: u64,
    /// Those of them in leaves that were not damaged, once for each device that reaches the leaf.
    pub held: u64,
    /// Those of them that the result has.
    pub recovered: u64,
    /// Mappings before the damage that the result has, damaged leaves included.
    pub recovered_all: u64,
    /// Mappings of the result that were not there before the damage.
    pub wrong: u64,
    /// The first of them.
    pub wrong_examples: Vec<WrongMapping>,
    /// Devices before the damage.
    pub devices: u64,
    /// Those of them that the result has.
    pub devices_recovered: u64,
    /// Why the result cannot be read; nothing is recovered then.
    pub unreadable: Option<String>,
}

/// Compares `result` with `truth`, of which the blocks `damaged` were damaged before the repair.
///
/// # Errors
/// `Damaged` when `truth` is; `Io` when it cannot be read; `Interrupted`.
pub fn compare(
    truth: &dyn BlockEngine,
    damaged: &BTreeSet<MetadataBlock>,
    result: &dyn BlockEngine,
    observer: &dyn Observer,
) -> Result<Comparison> {
    let truth = Pool::read(truth, observer)?;
    let nothing = BTreeSet::new();
    let compared = Pool::read(result, observer)
        .and_then(|result| truth.compare(damaged, Some(&result), &nothing, observer));
    let why = match compared {
        Ok(comparison) => return Ok(comparison),
        Err(e) => e,
    };
    observer.check_cancelled()?;
    // If it was the truth that could not be read, this fails as well.
    let mut comparison = truth.compare(damaged, None, &nothing, observer)?;
    comparison.unreadable = Some(why.to_string());
    Ok(comparison)
}

/// The inner nodes of a pool's mapping trees.
struct Pool<'a> {
    engine: &'a dyn BlockEngine,
    forest: Forest,
    devices: BTreeMap<u64, MetadataBlock>,
}

impl<'a> Pool<'a> {
    fn read(engine: &'a dyn BlockEngine, observer: &dyn Observer) -> Result<Self> {
        let superblock = Superblock::read(engine)?;
        let mut forest = Forest::new(engine.nr_blocks());
        let devices = read_trees(engine, &mut forest, &superblock, observer)?;
        Ok(Self {
            engine,
            forest,
            devices,
        })
    }

    /// The mappings of a device, with whether their leaf is not among `damaged`.
    fn mappings<'s>(&'s self, id: u64, damaged: &'s BTreeSet<MetadataBlock>) -> Mappings<'s> {
        let root = self.devices.get(&id).and_then(|&r| self.forest.number(r));
        let blocks = root.into_iter().flat_map(|root| leaves(&self.forest, root));
        Mappings {
            engine: self.engine,
            leaves: Box::new(blocks.map(|n| self.forest.nodes()[n].block)),
            damaged,
            leaf: Vec::new().into_iter(),
            is_held: false,
            next_key: Some(0),
        }
    }

    fn compare(
        &self,
        damaged: &BTreeSet<MetadataBlock>,
        result: Option<&Pool<'_>>,
        nothing: &BTreeSet<MetadataBlock>,
        observer: &dyn Observer,
    ) -> Result<Comparison> {
        let mut found = Comparison::default();
        let of_result = result.iter().flat_map(|r| r.devices.keys());
        let ids: BTreeSet<u64> = self.devices.keys().chain(of_result).copied().collect();
        for id in ids {
            observer.check_cancelled()?;
            let is_known = self.devices.contains_key(&id);
            let is_found = result.is_some_and(|r| r.devices.contains_key(&id));
            found.devices += u64::from(is_known);
            found.devices_recovered += u64::from(is_known && is_found);
            let mut ours = self.mappings(id, damaged);
            let mut theirs = result.map(|r| r.mappings(id, nothing));
            let mut next = || theirs.as_mut().map_or(Ok(None), Mappings::next);
            let (mut a, mut b) = (ours.next()?, next()?);
            loop {
                let order = match (a, b) {
                    (None, None) => break,
                    (Some(_), None) => Ordering::Less,
                    (None, Some(_)) => Ordering::Greater,
                    (Some((a, ..)), Some((b, ..))) => a.cmp(&b),
                };
                let truth = a.filter(|_| order.is_le());
                let repaired = b.filter(|_| order.is_ge());
                if let Some((_, _, is_held)) = truth {
                    found.truth += 1;
                    found.held += u64::from(is_held);
                    a = ours.next()?;
                }
                if let Some((thin, data, _)) = repaired {
                    match truth {
                        Some((_, right, is_held)) if right == data => {
                            found.recovered_all += 1;
                            found.recovered += u64::from(is_held);
                        }
                        _ => found.add_wrong(WrongMapping {
                            device: ThinId(id),
                            thin,
                            data,
                            truth: truth.map(|(_, data, _)| data),
                        }),
                    }
                    b = next()?;
                }
            }
        }
        Ok(found)
    }
}

impl Comparison {
    fn add_wrong(&mut self, mapping: WrongMapping) {
        self.wrong += 1;
        if self.wrong_examples.len() < EXAMPLES {
            self.wrong_examples.push(mapping);
        }
    }
}

/// Reads the mappings of one device, a leaf at a time.
struct Mappings<'a> {
    engine: &'a dyn BlockEngine,
    leaves: Box<dyn Iterator<Item = MetadataBlock> + 'a>,
    damaged: &'a BTreeSet<MetadataBlock>,
    leaf: std::vec::IntoIter<(u64, u64)>,
    is_held: bool,
    /// The smallest key that may follow; none after the largest there is.
    next_key: Option<u64>,
}

impl Mappings<'_> {
    fn next(&mut self) -> Result<Option<(ThinBlock, DataBlock, bool)>> {
        loop {
            if let Some((key, value)) = self.leaf.next() {
                let data = BlockTime::unpack(value).block;
                return Ok(Some((ThinBlock(key), data, self.is_held)));
            }
            let Some(block) = self.leaves.next() else {
                return Ok(None);
            };
            self.is_held = !self.damaged.contains(&block);
            let buffer = read_block(self.engine, block)?;
            let node = Node::parse(buffer.blocks(1), block, TreeKind::Mappings.value_size())
                .map_err(|fault| bad_leaf(block, &fault.to_string()))?;
            if !node.is_leaf() {
                return Err(bad_leaf(
                    block,
                    "an inner node stands where its siblings are leaves",
                ));
            }
            if let (Some(first), Some(last)) = (node.keys().next(), node.keys().last()) {
                if self.next_key.is_none_or(|least| first < least) {
                    return Err(bad_leaf(
                        block,
                        "its first key is not after the leaf before",
                    ));
                }
                self.next_key = last.checked_add(1);
            }
            let pairs: Vec<(u64, u64)> = node.keys().zip(node.values_u64()).collect();
            self.leaf = pairs.into_iter();
        }
    }
}

fn bad_leaf(block: MetadataBlock, what: &str) -> Error {
    Error::new(
        ErrorKind::Damaged,
        format!("mapping leaf in block {block}: {what}"),
    )
}
