//! Judges the structure of a forest from the leaves up: key ranges, equal depth, cycles, entries per tree.
//!
//! Each node is judged once, however many parents share it: its summary says all that a parent needs, so the work is
//! proportional to the distinct edges.

use super::forest::{Forest, NodeInfo, Shape, TreeKind};
use super::node::max_entries;
use crate::units::MetadataBlock;
use std::collections::HashSet;
use std::fmt;

/// What a parent needs to know of a subtree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Levels below this node: 0 for a leaf; none if nothing below it can be read.
    pub height: Option<u8>,
    /// Smallest key at or below; none when empty or unknown.
    pub first: Option<u64>,
    /// Largest key at or below.
    pub last: Option<u64>,
    /// Entries in the leaves below, each shared leaf counted as often as it is reached.
    pub entries: u64,
    /// Something at or below this node is damaged, so the rest of the summary covers only what is whole.
    pub damaged: bool,
}

impl Summary {
    const DAMAGED: Self = Self {
        height: None,
        first: None,
        last: None,
        entries: 0,
        damaged: true,
    };
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

impl StructureFault {
    /// The parent whose pointer to the node is at fault; none if the node itself is.
    pub fn parent(&self) -> Option<MetadataBlock> {
        match *self {
            Self::ChildKeys { parent, .. }
            | Self::Depth { parent, .. }
            | Self::Cycle { parent }
            | Self::Repeated { parent }
            | Self::EmptyLeaf { parent } => Some(parent),
            Self::UnderFull { .. } => None,
        }
    }
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
    /// Everything wrong between nodes, with the block at fault; once for each parent that sees it.
    pub faults: Vec<(MetadataBlock, StructureFault)>,
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
                            Visit::Open => structure.faults.push((
                                forest.nodes()[child].block,
                                StructureFault::Cycle { parent: node.block },
                            )),
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

    fn summarise(&mut self, forest: &Forest, tree: TreeKind, node: &NodeInfo) -> Summary {
        match node.shape {
            _ if node.tree != tree => Summary::DAMAGED,
            Shape::Bad => Summary::DAMAGED,
            Shape::UnreadLeaf => Summary {
                height: Some(0),
                ..Summary::default()
            },
            Shape::Leaf {
                first,
                last,
                entries,
            } => Summary {
                height: Some(0),
                first: (entries > 0).then_some(first),
                last: (entries > 0).then_some(last),
                entries: u64::from(entries),
                damaged: false,
            },
            Shape::Internal { .. } => self.summarise_inner(forest, tree, node),
        }
    }

    /// Sums up the children of an inner node. What a faulty child holds is not part of the sum.
    fn summarise_inner(&mut self, forest: &Forest, tree: TreeKind, node: &NodeInfo) -> Summary {
        let mut sum = Summary::default();
        let mut seen = HashSet::new();
        let edges = forest.edges(node);
        let below = |structure: &Self, i: usize| {
            let number = forest
                .child(&edges[i])
                .and_then(|block| forest.number(block))?;
            // A child without a summary is still open, so an ancestor: the cycle is on record.
            Some((number, structure.summaries[number]?))
        };
        let heights = (0..edges.len()).filter_map(|i| below(self, i)?.1.height);
        let expected = most_common(heights);
        for (i, edge) in edges.iter().enumerate() {
            let Some((number, mut below)) = below(self, i) else {
                sum.damaged = true;
                continue;
            };
            let child = &forest.nodes()[number];
            if child.shape == Shape::UnreadLeaf {
                // Its keys are not known, but where they begin is.
                (below.first, below.last) = (Some(edge.key), Some(edge.key));
            }
            let place = Place {
                parent: node.block,
                low: edge.key,
                high: edges.get(i + 1).map(|e| e.key),
                expected,
                is_first: seen.insert(number),
            };
            sum.damaged |= below.damaged;
            if child.tree != tree || child.shape == Shape::Bad {
                continue;
            }
            if let Some(fault) = place.judge(child, &below) {
                self.faults.push((child.block, fault));
                sum.damaged = true;
                continue;
            }
            sum.entries = sum.entries.saturating_add(below.entries);
            sum.first = sum.first.or(below.first);
            sum.last = below.last.or(sum.last);
            self.note_under_full(tree, child);
        }
        sum.height = expected.map(|h| h.saturating_add(1));
        sum
    }

    fn note_under_full(&mut self, tree: TreeKind, node: &NodeInfo) {
        let (entries, capacity) = match node.shape {
            Shape::Leaf { entries, .. } if entries > 0 => (entries, max_entries(tree.value_size())),
            Shape::Internal { entries, .. } => (entries as u16, max_entries(8)),
            _ => return,
        };
        let min = (capacity / 3) as u16;
        if entries < min {
            self.faults
                .push((node.block, StructureFault::UnderFull { entries, min }));
        }
    }
}

/// What a parent expects of one of its children.
struct Place {
    parent: MetadataBlock,
    low: u64,
    high: Option<u64>,
    expected: Option<u8>,
    /// The parent has not pointed to this child before.
    is_first: bool,
}

impl Place {
    fn judge(&self, child: &NodeInfo, below: &Summary) -> Option<StructureFault> {
        let parent = self.parent;
        if !self.is_first {
            return Some(StructureFault::Repeated { parent });
        }
        if let (Some(found), Some(expected)) = (below.height, self.expected)
            && found != expected
        {
            return Some(StructureFault::Depth {
                parent,
                found,
                expected,
            });
        }
        match (below.first, below.last) {
            (Some(first), Some(last))
                if first < self.low || self.high.is_some_and(|high| last >= high) =>
            {
                Some(StructureFault::ChildKeys {
                    parent,
                    low: self.low,
                    high: self.high,
                    first,
                    last,
                })
            }
            (None, _) if matches!(child.shape, Shape::Leaf { .. }) => {
                Some(StructureFault::EmptyLeaf { parent })
            }
            _ => None,
        }
    }
}

/// The height that most children have: one that differs is at fault, whichever of them comes first.
fn most_common(heights: impl Iterator<Item = u8>) -> Option<u8> {
    let mut counts = [0_u32; 256];
    heights.for_each(|h| counts[usize::from(h)] += 1);
    let (height, count) = (0..=u8::MAX).zip(counts).max_by_key(|(_, count)| *count)?;
    (count > 0).then_some(height)
}
