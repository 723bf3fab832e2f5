//! The inner structure of a set of btrees, read level by level, every block once, whatever shares or misuses it.
//!
//! Invariants:
//! 1. A block is read at most once per forest; a second way to it only adds an edge. Cycles and shared subtrees cost nothing.
//! 2. A block belongs to the kind of tree that reached it first; another kind that reaches it later is a problem on record.
//! 3. Memory is proportional to the blocks reached (about 40 bytes a node and 16 an edge), never to a number on disk.

use super::node::{Node, NodeFault};
use crate::error::Result;
use crate::io::{BlockEngine, sweep};
use crate::observer::Observer;
use crate::units::{MAX_METADATA_BLOCKS, MetadataBlock};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

/// The trees of a pool; each has values of its own size and meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TreeKind {
    /// Device id to root of that device's mapping tree.
    TopLevel,
    /// Device id to device details.
    Details,
    /// Virtual block to data block and time; one tree per device.
    Mappings,
    /// Bitmap number to index entry, of the data space map.
    DataIndex,
    /// Data block to count, for counts of 3 and more.
    DataCounts,
    /// Metadata block to count, for counts of 3 and more.
    MetadataCounts,
}

impl TreeKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::TopLevel,
        Self::Details,
        Self::Mappings,
        Self::DataIndex,
        Self::DataCounts,
        Self::MetadataCounts,
    ];

    /// Bytes of a value in this tree's leaves.
    pub fn value_size(self) -> usize {
        match self {
            Self::TopLevel | Self::Mappings => 8,
            Self::Details => 24,
            Self::DataIndex => 16,
            Self::DataCounts | Self::MetadataCounts => 4,
        }
    }
}

impl fmt::Display for TreeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TopLevel => "top-level tree",
            Self::Details => "device details tree",
            Self::Mappings => "mapping tree",
            Self::DataIndex => "data space map's index tree",
            Self::DataCounts => "data space map's count tree",
            Self::MetadataCounts => "metadata space map's count tree",
        })
    }
}

/// Whether a walk reads the leaves or only finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// Read and verify every leaf, and hand it to the visitor.
    Read,
    /// Read one leaf per lowest inner node to learn the height, and leave its siblings alone.
    Find,
}

/// How trees are read.
#[derive(Clone, Copy)]
pub struct Walk<'a> {
    /// From where.
    pub engine: &'a dyn BlockEngine,
    /// Asked whether to stop.
    pub observer: &'a dyn Observer,
    /// What kind of trees they are.
    pub tree: TreeKind,
    /// How far down.
    pub leaves: Leaves,
}

impl fmt::Debug for Walk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Walk({:?}, {:?})", self.tree, self.leaves)
    }
}

/// A pointer from an inner node to a child.
#[derive(Clone, Copy, Debug)]
pub struct Edge {
    /// Lower bound of the child's keys.
    pub key: u64,
    child: u32,
}

/// What a block reached as a node turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A leaf that was read.
    Leaf {
        /// Smallest key; 0 when empty.
        first: u64,
        /// Largest key; 0 when empty.
        last: u64,
        /// Number of entries.
        entries: u16,
    },
    /// A leaf that was found but not read.
    UnreadLeaf,
    /// An inner node with this many children.
    Internal {
        /// Where its edges begin.
        start: u32,
        /// How many there are.
        entries: u32,
    },
    /// Damaged: there is a problem on record for this block.
    Bad,
}

/// One block of the forest.
#[derive(Clone, Copy, Debug)]
pub struct NodeInfo {
    /// Where it lies.
    pub block: MetadataBlock,
    /// The tree that reached it first.
    pub tree: TreeKind,
    /// What it is.
    pub shape: Shape,
}

/// Something wrong that was found on the way, by block.
#[derive(Debug)]
pub enum NodeProblem {
    /// The block cannot be read.
    Unreadable(std::io::Error),
    /// The block is no node of this tree.
    Fault(NodeFault),
    /// An inner node points past the end of the metadata.
    Pointers {
        /// How many of its pointers do.
        count: usize,
        /// The key of the first of them.
        key: u64,
        /// Where it points.
        child: u64,
        /// The first block that does not exist.
        limit: u64,
    },
    /// The block is already part of another kind of tree.
    UsedTwice {
        /// That tree.
        first: TreeKind,
    },
}

const NOWHERE: u32 = u32::MAX;

/// The nodes of any number of trees, with the edges between them.
#[derive(Debug)]
pub struct Forest {
    /// Node number + 1 by block; zero pages cost no memory.
    index: Vec<u32>,
    nodes: Vec<NodeInfo>,
    edges: Vec<Edge>,
    changed: BTreeSet<MetadataBlock>,
    /// Everything wrong with single blocks: where, in which tree, what.
    pub problems: Vec<(MetadataBlock, TreeKind, NodeProblem)>,
}

/// What one thread found while it read a level.
struct Found<S> {
    visitor: S,
    nodes: Vec<(MetadataBlock, Seen)>,
}

enum Seen {
    Leaf { first: u64, last: u64, entries: u16 },
    Internal(Vec<(u64, u64)>),
    Problem(NodeProblem),
}

fn look<S>(node: &Node<'_>, visitor: &mut S, visit: &impl Fn(&mut S, &Node<'_>)) -> Seen {
    if !node.is_leaf() {
        return Seen::Internal(node.keys().zip(node.values_u64()).collect());
    }
    visit(visitor, node);
    let last = node.len().checked_sub(1);
    Seen::Leaf {
        first: last.map_or(0, |_| node.key(0)),
        last: last.map_or(0, |i| node.key(i)),
        entries: node.len() as u16,
    }
}

impl Forest {
    /// An empty forest over a metadata device of `nr_blocks` blocks, of which the format can use the first 4 161 600.
    pub fn new(nr_blocks: u64) -> Self {
        Self {
            index: vec![0; nr_blocks.min(MAX_METADATA_BLOCKS) as usize],
            nodes: Vec::new(),
            edges: Vec::new(),
            changed: BTreeSet::new(),
            problems: Vec::new(),
        }
    }

    /// Blocks of the metadata device, and behind them the nodes that no block holds.
    pub fn nr_blocks(&self) -> u64 {
        self.index.len() as u64
    }

    /// Nodes that are not, or not any more, what their blocks hold, ascending: taken out, put in, or with pointers taken out.
    pub fn changed(&self) -> &BTreeSet<MetadataBlock> {
        &self.changed
    }

    /// All nodes, in the order they were reached; the position is the node's number.
    pub fn nodes(&self) -> &[NodeInfo] {
        &self.nodes
    }

    /// The number of the node at `block`, if it was reached.
    pub fn number(&self, block: MetadataBlock) -> Option<usize> {
        let number = *self.index.get(usize::try_from(block.0).ok()?)?;
        number.checked_sub(1).map(|n| n as usize)
    }

    /// Takes the pointers from `parent` to `child` out; others may still lead to it.
    pub fn cut(&mut self, parent: MetadataBlock, child: MetadataBlock) {
        let Some(Shape::Internal { start, entries }) =
            self.number(parent).map(|n| self.nodes[n].shape)
        else {
            return;
        };
        for edge in &mut self.edges[start as usize..][..entries as usize] {
            if u64::from(edge.child) == child.0 {
                edge.child = NOWHERE;
            }
        }
        self.changed.insert(parent);
    }

    /// Takes the node at `block` out: it counts as damaged from here on.
    pub fn exclude(&mut self, block: MetadataBlock) {
        if let Some(number) = self.number(block) {
            self.nodes[number].shape = Shape::Bad;
            self.changed.insert(block);
        }
    }

    /// Puts an inner node with these children, ascending by key, in the place of the node at `block`, which was lost. No child
    /// stands for one that may have been there.
    pub fn mend(&mut self, block: MetadataBlock, children: &[(u64, Option<MetadataBlock>)]) {
        let Some(number) = self.number(block) else {
            return;
        };
        self.changed.insert(block);
        let start = self.edges.len() as u32;
        self.edges.extend(children.iter().map(|&(key, child)| Edge {
            key,
            child: child.map_or(NOWHERE, |block| block.0 as u32),
        }));
        self.nodes[number].shape = Shape::Internal {
            start,
            entries: children.len() as u32,
        };
    }

    /// Adds an inner node of `tree` that no block holds; it gets a number past the last block.
    pub fn invent(
        &mut self,
        tree: TreeKind,
        children: &[(u64, Option<MetadataBlock>)],
    ) -> MetadataBlock {
        let block = MetadataBlock(self.index.len() as u64);
        self.index.push(0);
        self.add(block.0, tree, Shape::Bad);
        self.mend(block, children);
        block
    }

    /// The edges of an inner node, ascending by key; nothing for other nodes.
    pub fn edges(&self, node: &NodeInfo) -> &[Edge] {
        match node.shape {
            Shape::Internal { start, entries } => &self.edges[start as usize..][..entries as usize],
            _ => &[],
        }
    }

    /// The child that an edge leads to; none if it points past the end of the metadata, or to what is not known.
    pub fn child(&self, edge: &Edge) -> Option<MetadataBlock> {
        (edge.child != NOWHERE).then(|| MetadataBlock(u64::from(edge.child)))
    }

    /// Every node below the roots once, children before their parents.
    pub fn children_first(&self, roots: &[usize]) -> Vec<usize> {
        let mut order = Vec::new();
        let mut seen = vec![false; self.nodes.len()];
        let mut stack = Vec::new();
        for &root in roots {
            if !std::mem::replace(&mut seen[root], true) {
                stack.push((root, 0));
            }
            while let Some((node, next)) = stack.pop() {
                let edges = self.edges(&self.nodes[node]);
                let Some(edge) = edges.get(next) else {
                    order.push(node);
                    continue;
                };
                stack.push((node, next + 1));
                if let Some(child) = self.child(edge).and_then(|b| self.number(b))
                    && !std::mem::replace(&mut seen[child], true)
                {
                    stack.push((child, 0));
                }
            }
        }
        order
    }

    fn add(&mut self, block: u64, tree: TreeKind, shape: Shape) -> usize {
        self.nodes.push(NodeInfo {
            block: MetadataBlock(block),
            tree,
            shape,
        });
        self.index[block as usize] = self.nodes.len() as u32;
        self.nodes.len() - 1
    }

    /// Puts `block` on record as reached: true if it has to be read, false if it was reached before.
    fn reach(&mut self, block: u64, tree: TreeKind) -> bool {
        match self.number(MetadataBlock(block)) {
            None => {
                self.add(block, tree, Shape::UnreadLeaf);
                true
            }
            Some(number) => {
                let first = self.nodes[number].tree;
                if first != tree {
                    let problem = NodeProblem::UsedTwice { first };
                    self.problems.push((MetadataBlock(block), tree, problem));
                }
                false
            }
        }
    }

    /// Reads the trees that begin at `roots` (which must lie on the device) and everything below, level by level. `visit`
    /// gets every leaf that is read, on any thread, with that thread's state; the states come back.
    ///
    /// # Errors
    /// Only when `observer` cancels: damage goes to [`problems`](Self::problems).
    pub fn walk<S: Send>(
        &mut self,
        walk: &Walk<'_>,
        roots: impl IntoIterator<Item = MetadataBlock>,
        state: impl Fn() -> S + Sync,
        visit: impl Fn(&mut S, &Node<'_>) + Sync,
    ) -> Result<Vec<S>> {
        let Walk {
            engine,
            observer,
            tree,
            leaves,
        } = *walk;
        let mut states = Vec::new();
        let mut level: Vec<u64> = Vec::new();
        for root in roots {
            if self.reach(root.0, tree) {
                level.push(root.0);
            }
        }
        // Children that are read only if their eldest sibling turns out to be an inner node: (eldest, the rest).
        let mut waiting: Vec<(u64, Range<u32>)> = Vec::new();
        // Siblings may wait for an eldest that an earlier walk or a shallower tree has read: then there is nothing to read.
        while !level.is_empty() || !waiting.is_empty() {
            observer.check_cancelled()?;
            level.sort_unstable();
            let found = sweep(
                engine,
                &level,
                &|| observer.is_cancelled(),
                || Found {
                    visitor: state(),
                    nodes: Vec::new(),
                },
                |found, block, data| {
                    let seen = match data {
                        Err(e) => Seen::Problem(NodeProblem::Unreadable(e)),
                        Ok(data) => match Node::parse(data, block, tree.value_size()) {
                            Err(fault) => Seen::Problem(NodeProblem::Fault(fault)),
                            Ok(node) => look(&node, &mut found.visitor, &visit),
                        },
                    };
                    found.nodes.push((block, seen));
                },
            );
            observer.check_cancelled()?;
            level.clear();
            let elders = std::mem::take(&mut waiting);
            for found in found {
                states.push(found.visitor);
                for (block, seen) in found.nodes {
                    if let Some(edges) = self.record(block, tree, seen) {
                        match leaves {
                            Leaves::Read => self.reach_children(edges, tree, &mut level),
                            Leaves::Find => {
                                self.reach_eldest(edges, tree, &mut level, &mut waiting)
                            }
                        }
                    }
                }
            }
            for (eldest, rest) in elders {
                let is_inner = self.number(MetadataBlock(eldest)).is_some_and(|n| {
                    matches!(self.nodes[n].shape, Shape::Internal { .. } | Shape::Bad)
                });
                if is_inner {
                    self.reach_children(rest, tree, &mut level);
                } else {
                    self.reach_leaves(rest, tree);
                }
            }
        }
        Ok(states)
    }

    /// Puts a node that was read on record; for an inner node returns where its edges are.
    fn record(&mut self, block: MetadataBlock, tree: TreeKind, seen: Seen) -> Option<Range<u32>> {
        let number = self.number(block)?;
        match seen {
            Seen::Leaf {
                first,
                last,
                entries,
            } => {
                self.nodes[number].shape = Shape::Leaf {
                    first,
                    last,
                    entries,
                };
                None
            }
            Seen::Problem(problem) => {
                self.nodes[number].shape = Shape::Bad;
                self.problems.push((block, tree, problem));
                None
            }
            Seen::Internal(pairs) => {
                let start = self.edges.len() as u32;
                let limit = self.nr_blocks();
                let lost = |pair: &&(u64, u64)| pair.1 >= limit;
                if let Some(&(key, child)) = pairs.iter().find(lost) {
                    let count = pairs.iter().filter(lost).count();
                    let problem = NodeProblem::Pointers {
                        count,
                        key,
                        child,
                        limit,
                    };
                    self.problems.push((block, tree, problem));
                }
                self.edges.extend(pairs.iter().map(|&(key, child)| Edge {
                    key,
                    child: if child < limit { child as u32 } else { NOWHERE },
                }));
                self.nodes[number].shape = Shape::Internal {
                    start,
                    entries: pairs.len() as u32,
                };
                Some(start..start + pairs.len() as u32)
            }
        }
    }

    fn reach_children(&mut self, edges: Range<u32>, tree: TreeKind, level: &mut Vec<u64>) {
        for i in edges {
            let child = self.edges[i as usize].child;
            if child != NOWHERE && self.reach(u64::from(child), tree) {
                level.push(u64::from(child));
            }
        }
    }

    fn reach_leaves(&mut self, edges: Range<u32>, tree: TreeKind) {
        for i in edges {
            let child = self.edges[i as usize].child;
            if child != NOWHERE {
                self.reach(u64::from(child), tree);
            }
        }
    }

    fn reach_eldest(
        &mut self,
        edges: Range<u32>,
        tree: TreeKind,
        level: &mut Vec<u64>,
        waiting: &mut Vec<(u64, Range<u32>)>,
    ) {
        let eldest = edges
            .clone()
            .find(|&i| self.edges[i as usize].child != NOWHERE);
        if let Some(i) = eldest {
            let child = u64::from(self.edges[i as usize].child);
            if self.reach(child, tree) {
                level.push(child);
            }
            waiting.push((child, i + 1..edges.end));
        }
    }
}
