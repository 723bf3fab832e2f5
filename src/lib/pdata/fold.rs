//! Judges the structure of a forest from the leaves up: key ranges, equal depth, cycles, entries per tree.
//!
//! Each node is judged once, however many parents share it: its summary says all that a parent needs, so the work is
//! proportional to the distinct edges.

use super::forest::{Forest, NodeInfo, Shape, TreeKind};
use super::node::max_entries;
use crate::units::MetadataBlock;
use std::collections::HashSet;
use std::fmt;
use std::mem::{Discriminant, discriminant};

/// What a parent needs to know of a subtree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Levels below this node: 0 for a leaf.
    pub height: u8,
    /// Smallest key at or below; none when empty or unknown.
    pub first: Option<u64>,
    /// Largest key at or below.
    pub last: Option<u64>,
    /// Entries in the leaves below, each shared leaf counted as often as it is reached.
    pub entries: u64,
    /// Something at or below this node is damaged, so the rest of the summary covers only what is whole.
    pub damaged: bool,
}

/// What can be wrong between whole nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StructureFault {
    /// The child's keys leave the range that its parent gives it.
    ChildKeys {
        /// The parent.
        parent: MetadataBlock,
        /// Smallest key allowed.
        low: u64,
        /// First key not allowed; none for the last child.
        high: Option<u64>,
        /// Smallest key found.
        first: u64,
        /// Largest key found.
        last: u64,
    },
    /// The child is not as high as its elder siblings.
    Depth {
        /// The parent.
        parent: MetadataBlock,
        /// Levels below this child.
        found: u8,
        /// Levels below its siblings.
        expected: u8,
    },
    /// The node is its own ancestor.
    Cycle {
        /// The node that points back to it.
        parent: MetadataBlock,
    },
    /// The parent points to the node twice, with different keys.
    Repeated {
        /// The parent.
        parent: MetadataBlock,
    },
    /// A leaf without entries below a parent.
    EmptyLeaf {
        /// The parent.
        parent: MetadataBlock,
    },
    /// Fewer entries than a third of the capacity in a node that is no root.
    UnderFull {
        /// Entries.
        entries: u16,
        /// The least it should hold.
        min: u16,
    },
}

impl fmt::Display for StructureFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ChildKeys {
                parent,
                low,
                high,
                first,
                last,
            } => {
                write!(f, "keys {first} to {last} are not within {low}..")?;
                if let Some(high) = high {
                    write!(f, "{high}")?;
                }
                write!(f, ", which parent block {parent} gives")
            }
            Self::Depth {
                parent,
                found,
                expected,
            } => write!(
                f,
                "{found} levels below this child of block {parent}, {expected} below its siblings"
            ),
            Self::Cycle { parent } => write!(f, "block {parent}, below it, points back to it"),
            Self::Repeated { parent } => write!(f, "block {parent} points to it twice"),
            Self::EmptyLeaf { parent } => write!(f, "an empty leaf below block {parent}"),
            Self::UnderFull { entries, min } => {
                write!(
                    f,
                    "{entries} entries in a node that is no root; {min} is the least usual"
                )
            }
        }
    }
}

/// The judged structure of one kind of tree in a forest.
#[derive(Debug)]
pub struct Structure {
    summaries: Vec<Option<Summary>>,
    /// Everything wrong between nodes, with the block at fault; each kind once a block, however many parents see it.
    pub faults: Vec<(MetadataBlock, StructureFault)>,
    known: HashSet<(MetadataBlock, Discriminant<StructureFault>)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Visit {
    Not,
    Open,
    Done,
}

impl Structure {
    /// Judges all trees of `tree`'s kind below `roots`.
    pub fn of(forest: &Forest, tree: TreeKind, roots: &[MetadataBlock]) -> Self {
        let mut structure = Self {
            summaries: vec![None; forest.nodes().len()],
            faults: Vec::new(),
            known: HashSet::new(),
        };
        let mut visits = vec![Visit::Not; forest.nodes().len()];
        let mut stack: Vec<(usize, usize)> = Vec::new();
        for number in roots.iter().filter_map(|&root| forest.number(root)) {
            if visits[number] == Visit::Not {
                visits[number] = Visit::Open;
                stack.push((number, 0));
            }
            while let Some((number, next)) = stack.pop() {
                let node = &forest.nodes()[number];
                let edges = forest.edges(node);
                if node.tree == tree && next < edges.len() {
                    stack.push((number, next + 1));
                    let child = forest.child(&edges[next]).and_then(|b| forest.number(b));
                    if let Some(child) = child {
                        match visits[child] {
                            Visit::Not => {
                                visits[child] = Visit::Open;
                                stack.push((child, 0));
                            }
                            Visit::Open => structure.note(
                                forest.nodes()[child].block,
                                StructureFault::Cycle { parent: node.block },
                            ),
                            Visit::Done => {}
                        }
                    }
                    continue;
                }
                visits[number] = Visit::Done;
                let summary = structure.summarise(forest, tree, node);
                structure.summaries[number] = Some(summary);
            }
        }
        structure
    }

    /// The summary of the node at `block`, if it is part of a judged tree.
    pub fn summary(&self, forest: &Forest, block: MetadataBlock) -> Option<Summary> {
        self.summaries[forest.number(block)?]
    }

    fn note(&mut self, block: MetadataBlock, fault: StructureFault) {
        if self.known.insert((block, discriminant(&fault))) {
            self.faults.push((block, fault));
        }
    }

    fn summarise(&mut self, forest: &Forest, tree: TreeKind, node: &NodeInfo) -> Summary {
        let damaged = Summary {
            damaged: true,
            ..Summary::default()
        };
        if node.tree != tree {
            return damaged;
        }
        match node.shape {
            Shape::Bad => damaged,
            Shape::UnreadLeaf => Summary::default(),
            Shape::Leaf {
                first,
                last,
                entries,
            } => Summary {
                height: 0,
                first: (entries > 0).then_some(first),
                last: (entries > 0).then_some(last),
                entries: u64::from(entries),
                damaged: false,
            },
            Shape::Internal { .. } => {
                let mut sum = Summary::default();
                let mut height = None;
                let mut unread = HashSet::new();
                let edges = forest.edges(node);
                for (i, edge) in edges.iter().enumerate() {
                    let child = forest.child(edge).and_then(|block| forest.number(block));
                    // A child that is still open is an ancestor: the cycle is on record.
                    let Some((number, below)) =
                        child.and_then(|number| Some((number, self.summaries[number]?)))
                    else {
                        sum.damaged = true;
                        continue;
                    };
                    let child = &forest.nodes()[number];
                    sum.entries = sum.entries.saturating_add(below.entries);
                    sum.damaged |= below.damaged;
                    if child.tree != tree || child.shape == Shape::Bad {
                        continue;
                    }
                    let expected = *height.get_or_insert(below.height);
                    let high = edges.get(i + 1).map(|e| e.key);
                    let mut fault = |fault| {
                        self.note(child.block, fault);
                        sum.damaged = true;
                    };
                    if below.height != expected {
                        fault(StructureFault::Depth {
                            parent: node.block,
                            found: below.height,
                            expected,
                        });
                    }
                    if child.shape == Shape::UnreadLeaf {
                        // Its keys are not known, but where they begin is.
                        if !unread.insert(number) {
                            fault(StructureFault::Repeated { parent: node.block });
                        }
                        sum.first = sum.first.or(Some(edge.key));
                        sum.last = Some(edge.key);
                        continue;
                    }
                    match (below.first, below.last) {
                        (Some(first), Some(last)) => {
                            if first < edge.key || high.is_some_and(|high| last >= high) {
                                fault(StructureFault::ChildKeys {
                                    parent: node.block,
                                    low: edge.key,
                                    high,
                                    first,
                                    last,
                                });
                            }
                            sum.first = sum.first.or(Some(first));
                            sum.last = Some(last);
                        }
                        _ if matches!(child.shape, Shape::Leaf { .. }) => {
                            fault(StructureFault::EmptyLeaf { parent: node.block });
                        }
                        _ => {}
                    }
                    self.note_under_full(tree, child);
                }
                sum.height = height.map_or(0, |h| h.saturating_add(1));
                sum
            }
        }
    }

    fn note_under_full(&mut self, tree: TreeKind, node: &NodeInfo) {
        let (entries, capacity) = match node.shape {
            Shape::Leaf { entries, .. } if entries > 0 => (entries, max_entries(tree.value_size())),
            Shape::Internal { entries, .. } => (entries, max_entries(8)),
            _ => return,
        };
        let min = (capacity / 3) as u16;
        if entries < min {
            self.note(node.block, StructureFault::UnderFull { entries, min });
        }
    }
}
