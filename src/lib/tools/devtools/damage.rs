//! Damages metadata the way disks, cables and crashes do: blocks of a chosen kind, in a chosen manner, the same for the same seed.

use super::inventory::{Freed, Inventory, Kind, NodeFacts, Target};
use super::random::Random;
use crate::checksum;
use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::Node;
use crate::thin::read_block;
use crate::units::{BLOCK_SIZE, MetadataBlock};
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

const SECTOR: usize = 512;
/// Bytes of checksum, flags and block number, in which two blocks with the same contents may differ.
const HEADER: usize = 16;

/// What happens to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Damage {
    /// All zeros.
    Zero,
    /// One bit is another.
    BitFlip,
    /// Random bytes.
    Junk,
    /// The first sectors are as they should be, the rest is what an earlier write left there: part of a freed block, or zeros.
    Torn,
    /// The last write is lost: an older block of the same kind, sealed for this place; zeros if there is none. Of the freed
    /// blocks, the one that has most in common with what should be here.
    Stale,
    /// A copy of another block in use lies here.
    Misdirected,
    /// Two blocks hold each other's contents.
    Swapped,
    /// One sector is zeros.
    Sector,
}

impl Damage {
    /// All of them, with their names.
    pub const ALL: [(Self, &'static str); 8] = [
        (Self::Zero, "zero"),
        (Self::BitFlip, "bit-flip"),
        (Self::Junk, "junk"),
        (Self::Torn, "torn"),
        (Self::Stale, "stale"),
        (Self::Misdirected, "misdirected"),
        (Self::Swapped, "swapped"),
        (Self::Sector, "sector"),
    ];
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(damage, _)| damage == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

impl FromStr for Damage {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        found.map(|&(damage, _)| damage).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(_, name)| *name).collect();
            format!(
                "'{text}' is no type of damage; there are {}",
                names.join(", ")
            )
        })
    }
}

/// How many blocks are damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// This many, or as many as there are.
    Number(usize),
    /// All, also if there are none.
    All,
    /// A fraction of them, rounded up.
    Fraction(usize, usize),
}

impl Amount {
    fn of(self, blocks: usize) -> usize {
        match self {
            Self::Number(n) => n.min(blocks),
            Self::All => blocks,
            Self::Fraction(n, d) => blocks.saturating_mul(n).div_ceil(d).min(blocks),
        }
    }
}

impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|&n: &usize| n > 0);
        let found = match text.split_once('/') {
            _ if text == "all" => Some(Self::All),
            Some((n, d)) => number(n)
                .zip(number(d))
                .filter(|(n, d)| n <= d)
                .map(|(n, d)| Self::Fraction(n, d)),
            None => number(text).map(Self::Number),
        };
        found.ok_or_else(|| {
            format!("'{text}' is no number of blocks; give 'all', a number from 1, or a fraction such as 1/4")
        })
    }
}

/// Damage of one type to blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Which blocks.
    pub target: Target,
    /// What happens to them.
    pub damage: Damage,
    /// To how many; with [`Damage::Swapped`] one more if that is odd.
    pub amount: Amount,
}

impl FromStr for Spec {
    type Err = String;

    /// `KIND:TYPE` or `KIND:TYPE:COUNT`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut parts = text.splitn(3, ':');
        let (Some(target), Some(damage)) = (parts.next(), parts.next()) else {
            return Err(format!(
                "'{text}' names no type of damage; give KIND:TYPE or KIND:TYPE:COUNT"
            ));
        };
        Ok(Self {
            target: target.parse()?,
            damage: damage.parse()?,
            amount: parts.next().map_or(Ok(Amount::Number(1)), str::parse)?,
        })
    }
}

/// A block that was damaged.
#[derive(Clone, Debug, Serialize)]
pub struct Damaged {
    /// Where.
    pub block: MetadataBlock,
    /// What it was.
    pub kind: Kind,
    /// What happened to it.
    #[serde(rename = "type")]
    pub damage: Damage,
    /// The block that its contents, or a part of them, came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<MetadataBlock>,
    /// What it holds now.
    #[serde(skip)]
    pub contents: Vec<u8>,
}

/// Decides which blocks of the metadata on `engine` are damaged, and what they hold then, ascending by block. Nothing is
/// written. No block is damaged twice, and every one changes.
///
/// # Errors
/// `Unsuitable` when there is no block of a kind that was asked for; `Io`, `Interrupted`.
pub fn damage(
    engine: &dyn BlockEngine,
    inventory: &Inventory,
    specs: &[Spec],
    seed: u64,
    observer: &dyn Observer,
) -> Result<Vec<Damaged>> {
    let needs_freed = |spec: &Spec| matches!(spec.damage, Damage::Torn | Damage::Stale);
    let mut damager = Damager {
        engine,
        inventory,
        freed: match specs.iter().any(needs_freed) {
            true => inventory.freed(engine, observer)?,
            false => Vec::new(),
        },
        random: Random::new(seed),
        done: BTreeMap::new(),
    };
    for spec in specs {
        observer.check_cancelled()?;
        damager.apply(spec)?;
    }
    if damager.done.is_empty() {
        return Err(Error::new(
            ErrorKind::Unsuitable,
            "there are no blocks of the kinds asked for; give another kind",
        ));
    }
    Ok(damager.done.into_values().collect())
}

struct Damager<'a> {
    engine: &'a dyn BlockEngine,
    inventory: &'a Inventory,
    freed: Vec<Freed>,
    random: Random,
    done: BTreeMap<MetadataBlock, Damaged>,
}

impl Damager<'_> {
    fn apply(&mut self, spec: &Spec) -> Result<()> {
        let Spec {
            target,
            damage,
            amount,
        } = *spec;
        let mut left = self.inventory.of(target);
        if left.is_empty() && amount != Amount::All {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!(
                    "no block of the kind {target} is in use; give another kind, or 'all' as number"
                ),
            ));
        }
        let wanted = amount.of(left.len());
        left.retain(|block| !self.done.contains_key(block));
        let chosen = self.random.take(&mut left, wanted);
        if damage == Damage::Swapped {
            return self.swap(chosen, left);
        }
        for block in chosen {
            let (contents, source) = self.damaged(block, damage)?;
            self.put(block, damage, contents, source);
        }
        Ok(())
    }

    fn put(
        &mut self,
        block: MetadataBlock,
        damage: Damage,
        contents: Vec<u8>,
        source: Option<MetadataBlock>,
    ) {
        if let Some(kind) = self.inventory.kind(block) {
            let damaged = Damaged {
                block,
                kind,
                damage,
                source,
                contents,
            };
            self.done.insert(block, damaged);
        }
    }

    /// Swaps the chosen blocks in pairs; the last one, if it is alone, with one of `left` or any other.
    fn swap(&mut self, chosen: Vec<MetadataBlock>, left: Vec<MetadataBlock>) -> Result<()> {
        for pair in chosen.chunks(2) {
            let first = pair[0];
            let second = match pair.get(1) {
                Some(&second) => second,
                None => match self.random.pick(&left) {
                    Some(other) => other,
                    None => self.other(first)?,
                },
            };
            let contents = self.read(second)?;
            self.put(first, Damage::Swapped, contents, Some(second));
            let contents = self.read(first)?;
            self.put(second, Damage::Swapped, contents, Some(first));
        }
        Ok(())
    }

    /// Any block in use but this one, and none that is damaged already.
    fn other(&mut self, than: MetadataBlock) -> Result<MetadataBlock> {
        let mut others = self.inventory.of(Target::Any);
        others.retain(|block| *block != than && !self.done.contains_key(block));
        self.random.pick(&others).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsuitable,
                format!("there is no whole block left beside block {than}; damage fewer blocks"),
            )
        })
    }

    fn read(&self, block: MetadataBlock) -> Result<Vec<u8>> {
        Ok(read_block(self.engine, block)?.blocks(1).to_vec())
    }

    /// What `block` holds after this happened to it alone, and the block that came from.
    fn damaged(
        &mut self,
        block: MetadataBlock,
        damage: Damage,
    ) -> Result<(Vec<u8>, Option<MetadataBlock>)> {
        let mut contents = self.read(block)?;
        match damage {
            Damage::Zero => contents.fill(0),
            Damage::BitFlip => {
                let bit = self.random.below(8 * BLOCK_SIZE as u64) as usize;
                contents[bit / 8] ^= 1 << (bit % 8);
            }
            Damage::Junk => {
                for bytes in contents.chunks_exact_mut(8) {
                    bytes.copy_from_slice(&self.random.next().to_le_bytes());
                }
            }
            Damage::Torn => return self.torn(contents),
            Damage::Stale => return self.stale(block, contents),
            Damage::Misdirected | Damage::Swapped => {
                let other = self.other(block)?;
                return Ok((self.read(other)?, Some(other)));
            }
            Damage::Sector => {
                let used = |i: &usize| contents[i * SECTOR..][..SECTOR].iter().any(|&b| b != 0);
                let used: Vec<usize> = (0..BLOCK_SIZE / SECTOR).filter(used).collect();
                let sector = self.random.pick(&used).unwrap_or(0);
                contents[sector * SECTOR..][..SECTOR].fill(0);
            }
        }
        Ok((contents, None))
    }

    fn torn(&mut self, mut contents: Vec<u8>) -> Result<(Vec<u8>, Option<MetadataBlock>)> {
        let source = self.random.pick(&self.freed).map(|freed| freed.block);
        let before = match source {
            Some(block) => self.read(block)?,
            None => vec![0; BLOCK_SIZE],
        };
        // Where nothing changes any more, no write can have been torn.
        let changes = |i: &usize| contents[i * SECTOR..] != before[i * SECTOR..];
        let places: Vec<usize> = (1..BLOCK_SIZE / SECTOR).filter(changes).collect();
        match self.random.pick(&places) {
            Some(sectors) => {
                contents[sectors * SECTOR..].copy_from_slice(&before[sectors * SECTOR..])
            }
            // All that was to be written is in the first sector, and that did not arrive.
            None => contents[..SECTOR].copy_from_slice(&before[..SECTOR]),
        }
        Ok((contents, source))
    }

    fn stale(
        &self,
        block: MetadataBlock,
        contents: Vec<u8>,
    ) -> Result<(Vec<u8>, Option<MetadataBlock>)> {
        let limit = self.inventory.superblock.metadata_space_map.nr_blocks;
        let kind = checksum::identify(&contents);
        let facts = NodeFacts::of(&contents, block, limit);
        let alike = self.freed.iter().filter(|freed| {
            Some(freed.kind) == kind
                && match (&facts, &freed.node) {
                    (Some(a), Some(b)) => a.is_like(b),
                    (a, b) => a.is_none() && b.is_none(),
                }
        });
        let mut best: Option<(_, Vec<u8>)> = None;
        for freed in alike {
            let overlap = facts.zip(freed.node).map(|(a, b)| a.overlap(&b));
            if overlap == Some(0) && best.is_some() {
                // It has nothing in common, and ranks below what was found.
                continue;
            }
            let older = self.read(freed.block)?;
            if older[HEADER..] == contents[HEADER..] {
                continue;
            }
            let same = match facts {
                Some(facts) => common_entries(&contents, &older, facts.value_size),
                None => common_words(&contents, &older),
            };
            let rank = (same, overlap, Reverse(freed.block));
            if best.as_ref().is_none_or(|(found, _)| rank > *found) {
                best = Some((rank, older));
            }
        }
        Ok(match (best, kind) {
            (Some(((_, _, Reverse(source)), mut older)), Some(kind)) => {
                checksum::seal(&mut older, kind, block);
                (older, Some(source))
            }
            _ => (vec![0; BLOCK_SIZE], None),
        })
    }
}

/// Entries that two nodes with values of this size have in common.
fn common_entries(a: &[u8], b: &[u8], value_size: usize) -> usize {
    let node = |block| Node::parse(block, checksum::claimed_location(block), value_size);
    let (Ok(a), Ok(b)) = (node(a), node(b)) else {
        return 0;
    };
    let mut entries = b.keys().zip(b.values()).peekable();
    let is_common = |&(key, value): &(u64, &[u8])| {
        while entries.next_if(|other| other.0 < key).is_some() {}
        entries
            .next_if(|other| other.0 == key)
            .is_some_and(|other| other.1 == value)
    };
    a.keys().zip(a.values()).filter(is_common).count()
}

/// Words that two blocks have in common, place by place.
fn common_words(a: &[u8], b: &[u8]) -> usize {
    let pairs = a.chunks_exact(8).zip(b.chunks_exact(8));
    pairs.filter(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_say_what_is_wrong_with_them() {
        let spec = |text: &str| text.parse::<Spec>();
        assert_eq!(
            spec("top-level-root:bit-flip"),
            Ok(Spec {
                target: Target::Of(Kind::TopLevelRoot),
                damage: Damage::BitFlip,
                amount: Amount::Number(1),
            })
        );
        assert_eq!(
            spec("any:zero:1/4").map(|s| s.amount),
            Ok(Amount::Fraction(1, 4))
        );
        assert_eq!(spec("any:zero:all").map(|s| s.amount), Ok(Amount::All));
        for wrong in [
            "leaf",
            "leave:zero",
            "leaf:zeros",
            "leaf:zero:0",
            "leaf:zero:5/4",
            "leaf:zero:1/0",
        ] {
            assert!(spec(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn fractions_are_rounded_up_and_never_nothing() {
        let quarter = Amount::Fraction(1, 4);
        assert_eq!([1, 4, 5, 8].map(|n| quarter.of(n)), [1, 1, 2, 2]);
        assert_eq!(Amount::Number(9).of(4), 4);
        assert_eq!(Amount::All.of(0), 0);
    }
}
