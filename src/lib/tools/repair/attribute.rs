//! Finds out which hole each orphan belongs to.
//!
//! Evidence, the strongest first:
//! 1. What is left of the lost node itself names the orphan, with its first key.
//! 2. An older top-level tree has the orphan as a device's root.
//! 3. There is as much room as there are parents missing.
//! 4. Older trees rule out all other devices ([`super::lineage`]).
//! 5. The kernel writes a node's new children after the node: the orphan has mappings that are no older than the device, and lies
//!    behind the lost node, no other inner node between them. That is believed only of a pool in which it holds for every such
//!    child whose parent is known.
//!
//! An orphan that none of these decides stays an orphan, and is reported.

use super::basis::Basis;
use super::lineage::{Lineage, Sources};
use super::orphans::Orphans;
use super::position::{KnownChildren, is_own};
use super::scan::{Class, Scan};
use super::states::{Sighted, State};
use crate::bytes::get_u64;
use crate::error::Result;
use crate::io::{AlignedBuffer, BlockEngine};
use crate::observer::Observer;
use crate::pdata::{Forest, NODE_HEADER, Shape, max_entries};
use crate::units::{MetadataBlock, ThinId};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// Why an orphan was put where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// What is left of the lost node names it.
    Remnant,
    /// An older top-level tree has it as the device's root.
    OlderRoot,
    /// There is no other place for it.
    OnlyPlace,
    /// Older trees rule out every other device.
    OlderMappings,
    /// It was written right after the lost node.
    Position,
    /// None that would do: the user asked for it.
    Likeliest,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Remnant => "what is left of the lost node names it",
            Self::OlderRoot => "an older top-level tree has it as the device's root",
            Self::OnlyPlace => "there is no other place for it",
            Self::OlderMappings => "older trees rule out every other device",
            Self::Position => {
                "it was written right after the lost node, as all others in this pool"
            }
            Self::Likeliest => "nothing decides; it is the likeliest place",
        })
    }
}

/// A place found for an orphan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub(super) orphan: usize,
    pub(super) hole: usize,
    pub(super) evidence: Evidence,
}

/// Puts orphans into holes.
pub(super) struct Attribution<'a> {
    pub(super) engine: &'a dyn BlockEngine,
    pub(super) scan: &'a Scan,
    pub(super) basis: &'a Basis,
    pub(super) history: &'a [&'a State],
    pub(super) sighted: &'a Sighted,
    pub(super) observer: &'a dyn Observer,
    pub(super) orphans: &'a mut Orphans,
    /// Orphans may belong to a metadata snapshot that is lost, so that there is always another place for them.
    pub(super) has_other_place: bool,
    pub(super) placed: Vec<Placed>,
}

impl Attribution<'_> {
    /// Goes through the evidence until nothing more is decided; with `take_all`, puts the rest where it is likeliest.
    pub(super) fn run(&mut self, forest: &Forest, take_all: bool) -> Result<()> {
        if self.orphans.holes.is_empty() || self.orphans.orphans.is_empty() {
            return Ok(());
        }
        self.observer.progress("finding parents of orphans", 0, 1);
        let lost = self.orphans.holes.iter().filter_map(|h| h.block);
        let stale = self
            .scan
            .nodes()
            .iter()
            .filter(|n| matches!(n.class, Class::Inner(_)))
            .map(|n| n.block());
        let known = KnownChildren::of(forest, self.basis, self.scan, lost.chain(stale));
        self.remnants();
        self.older_roots();
        self.only_places(Evidence::OnlyPlace);
        let lineage = self.lineage(forest)?;
        lineage.refute(self.orphans, self.basis);
        self.only_places(Evidence::OlderMappings);
        if known.is_reliable() {
            self.decide(
                |this, o, holes| this.by_position(&known, o, holes),
                Evidence::Position,
            );
            self.only_places(Evidence::OnlyPlace);
        }
        // What is placed leaves fewer places for the rest.
        let mut before = None;
        while take_all && before != Some(self.placed.len()) {
            before = Some(self.placed.len());
            self.decide(
                |this, o, holes| this.likeliest(&lineage, o, holes),
                Evidence::Likeliest,
            );
        }
        Ok(())
    }

    fn place(&mut self, orphan: usize, hole: usize, evidence: Evidence) {
        self.orphans.fill(orphan, hole);
        self.placed.push(Placed {
            orphan,
            hole,
            evidence,
        });
    }

    /// The orphans that something is missing of, with the holes that they fit.
    fn open(&self) -> Vec<(usize, Vec<usize>)> {
        let missing =
            (0..self.orphans.orphans.len()).filter(|&o| self.orphans.orphans[o].missing > 0);
        missing
            .map(|o| (o, self.orphans.candidates(o)))
            .filter(|(_, holes)| !holes.is_empty())
            .collect()
    }

    /// Evidence 1. The block must not be one that was meant for another place, or an older node that is whole.
    fn remnants(&mut self) {
        let at: HashMap<MetadataBlock, usize> = self
            .orphans
            .orphans
            .iter()
            .enumerate()
            .map(|(i, o)| (o.block, i))
            .collect();
        let mut block = AlignedBuffer::new(1);
        let mut named: Vec<(usize, usize)> = Vec::new();
        for (h, hole) in self.orphans.holes.iter().enumerate() {
            let Some(place) = hole.block else { continue };
            if self.engine.read(place, block.blocks_mut(1)).is_err()
                || self.scan.is_misplaced(place)
                || self.scan.is_sealed(place)
            {
                continue;
            }
            let data = block.blocks(1);
            for i in 0..max_entries(8) {
                let key = get_u64(data, NODE_HEADER + 8 * i);
                let child = get_u64(data, NODE_HEADER + 8 * (max_entries(8) + i));
                let orphan = at.get(&MetadataBlock(child)).copied();
                let begins = |o: &usize| self.orphans.orphans[*o].keys.is_some_and(|k| k.0 == key);
                named.extend(orphan.filter(begins).map(|o| (o, h)));
            }
        }
        for (orphan, hole) in named {
            if self.orphans.fits(orphan, hole) {
                self.place(orphan, hole, Evidence::Remnant);
            }
        }
    }

    /// Evidence 2, for devices whose root is not known: what the latest state that knows the device has; then what any leaf that
    /// is left of a top-level tree has.
    fn older_roots(&mut self) {
        let history = self.history;
        self.claim_roots(|device| {
            history
                .iter()
                .find_map(|s| s.roots.get(&device.0))
                .into_iter()
                .copied()
                .collect()
        });
        let sighted = self.sighted;
        self.claim_roots(|device| {
            sighted
                .get(&device.0)
                .into_iter()
                .flatten()
                .copied()
                .collect()
        });
    }

    /// Places orphans that `roots` names for devices. If it names one for more devices than parents are missing, one of them was
    /// changed since, and none gets it.
    fn claim_roots(&mut self, roots: impl Fn(ThinId) -> Vec<MetadataBlock>) {
        let at: HashMap<MetadataBlock, usize> = self
            .orphans
            .orphans
            .iter()
            .enumerate()
            .map(|(i, o)| (o.block, i))
            .collect();
        let mut claims: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (h, hole) in self.orphans.holes.iter().enumerate() {
            let (None, Some(&device), true) =
                (hole.block, hole.devices.first(), hole.filled.is_empty())
            else {
                continue;
            };
            let roots = roots(device);
            let orphans = roots.iter().filter_map(|root| at.get(root).copied());
            let orphans: Vec<usize> = orphans
                .filter(|&o| self.orphans.orphans[o].missing > 0)
                .collect();
            if let [orphan] = orphans[..] {
                claims.entry(orphan).or_default().push(h);
            }
        }
        for (orphan, holes) in claims {
            let holes: Vec<usize> = holes
                .into_iter()
                .filter(|&h| self.orphans.fits(orphan, h))
                .collect();
            if holes.len() <= self.orphans.orphans[orphan].missing as usize {
                for hole in holes {
                    self.place(orphan, hole, Evidence::OlderRoot);
                }
            }
        }
    }

    /// Evidence 3.
    fn only_places(&mut self, evidence: Evidence) {
        while !self.has_other_place {
            // Orphans that have no more holes than parents are missing, and all of these that claim a hole.
            let mut stuck = self.open();
            stuck.retain(|(o, holes)| holes.len() <= self.orphans.orphans[*o].missing as usize);
            let mut claims: HashMap<usize, Vec<usize>> = HashMap::new();
            for (orphan, holes) in &stuck {
                let of = |hole: &usize| claims.entry(*hole).or_default().push(*orphan);
                holes.iter().for_each(of);
            }
            let has_rival = |(o, holes): &(usize, Vec<usize>)| {
                holes.iter().any(|&h| self.has_rival(*o, h, &claims[&h]))
            };
            let decided: Vec<(usize, Vec<usize>)> =
                stuck.into_iter().filter(|s| !has_rival(s)).collect();
            let before = self.placed.len();
            for (orphan, holes) in decided {
                for hole in holes {
                    if self.orphans.fits(orphan, hole) {
                        self.place(orphan, hole, evidence);
                    }
                }
            }
            if self.placed.len() == before {
                return;
            }
        }
    }

    /// True if another of the orphans that claim the hole claims the same keys, or the same device's root.
    fn has_rival(&self, orphan: usize, hole: usize, claims: &[usize]) -> bool {
        let orphans = &self.orphans.orphans;
        let Some((first, last)) = orphans[orphan].keys else {
            return false;
        };
        let is_root = self.orphans.holes[hole].block.is_none();
        let overlaps =
            |o: usize| is_root || orphans[o].keys.is_some_and(|k| k.0 <= last && k.1 >= first);
        claims.iter().any(|&o| o != orphan && overlaps(o))
    }

    /// What older trees tell of the orphans that are not placed yet.
    fn lineage(&self, forest: &Forest) -> Result<Lineage> {
        let open: Vec<usize> = self.open().into_iter().map(|o| o.0).collect();
        let leaves = open.iter().flat_map(|&orphan| {
            let number = forest.number(self.orphans.orphans[orphan].block);
            let nodes = forest
                .children_first(number.as_slice())
                .into_iter()
                .map(|n| forest.nodes()[n]);
            let leaves = nodes.filter(|n| matches!(n.shape, Shape::Leaf { .. }));
            leaves.map(move |n| (orphan, n.block)).collect::<Vec<_>>()
        });
        let sources = Sources {
            engine: self.engine,
            history: self.history,
            basis: self.basis,
            observer: self.observer,
        };
        Lineage::of(&sources, self.orphans, leaves.collect())
    }

    /// Places every orphan that `choose` decides: it gets the orphan and the holes that it fits, more than are missing.
    fn decide(
        &mut self,
        choose: impl Fn(&Self, usize, &[usize]) -> Vec<usize>,
        evidence: Evidence,
    ) {
        for (orphan, holes) in self.open() {
            let chosen = choose(self, orphan, &holes);
            for hole in chosen {
                if self.orphans.fits(orphan, hole) {
                    self.place(orphan, hole, evidence);
                }
            }
        }
    }

    fn by_position(&self, known: &KnownChildren, orphan: usize, holes: &[usize]) -> Vec<usize> {
        let orphan = &self.orphans.orphans[orphan];
        let before = known.inner_before(orphan.block);
        let time = self.scan.time(orphan.block);
        let is_it = |h: &&usize| {
            let hole = &self.orphans.holes[**h];
            let details = hole
                .devices
                .iter()
                .filter_map(|d| self.basis.details.get(&d.0));
            let created = details.map(|d| d.creation_time).min();
            before.is_some() && hole.block == before && is_own(time, created)
        };
        match orphan.missing {
            1 => holes.iter().find(is_it).copied().into_iter().collect(),
            _ => Vec::new(),
        }
    }

    fn likeliest(&self, lineage: &Lineage, orphan: usize, holes: &[usize]) -> Vec<usize> {
        let place = self.orphans.orphans[orphan].block;
        let score = |h: &usize| {
            let hole = &self.orphans.holes[*h];
            let mappings = lineage.nr_known(orphan, &hole.devices);
            (mappings, hole.block.filter(|b| *b < place))
        };
        let mut order = holes.to_vec();
        order.sort_by_key(|h| std::cmp::Reverse(score(h)));
        order.truncate(self.orphans.orphans[orphan].missing as usize);
        order
    }
}
