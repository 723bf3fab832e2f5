//! Builds btrees from ascending entries, front to back, in memory that does not depend on their number.
//!
//! Invariants:
//! 1. Every node but the root holds at least a third of its capacity, the kernel's own bound.
//! 2. A node is complete when it is written, and written once.
//! 3. At each level fewer than two nodes' worth of entries wait, so that the last ones can be divided evenly.
//! 4. Subtrees of a [`SharedTree`] are attached whole wherever invariant 1 allows it; where a neighbour is too small, the
//!    subtree at that edge is opened and its parts are attached or, at the leaf, copied.

use super::counts::CountMap;
use super::node::{FLAG_INTERNAL, FLAG_LEAF, NODE_HEADER, max_entries};
use super::space_map::{INDEX_ENTRY_SIZE, IndexEntry};
use crate::bytes::{get_u64, put_u32, put_u64};
use crate::checksum::BlockKind;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::ops::Range;

/// A value that a leaf can hold.
pub trait Value: Copy + Default {
    /// Bytes on disk.
    const SIZE: usize;
    /// Writes [`SIZE`](Self::SIZE) bytes.
    fn pack(&self, bytes: &mut [u8]);
    /// Reads [`SIZE`](Self::SIZE) bytes.
    fn unpack(bytes: &[u8]) -> Self;
}

impl Value for u64 {
    const SIZE: usize = 8;

    fn pack(&self, bytes: &mut [u8]) {
        put_u64(bytes, 0, *self);
    }

    fn unpack(bytes: &[u8]) -> Self {
        get_u64(bytes, 0)
    }
}

impl Value for u32 {
    const SIZE: usize = 4;

    fn pack(&self, bytes: &mut [u8]) {
        put_u32(bytes, 0, *self);
    }

    fn unpack(bytes: &[u8]) -> Self {
        crate::bytes::get_u32(bytes, 0)
    }
}

impl Value for IndexEntry {
    const SIZE: usize = INDEX_ENTRY_SIZE;

    fn pack(&self, bytes: &mut [u8]) {
        IndexEntry::pack(self, bytes);
    }

    fn unpack(bytes: &[u8]) -> Self {
        IndexEntry::unpack(bytes)
    }
}

/// Where built blocks go.
pub trait BlockSink {
    /// A block that nothing else uses.
    fn allocate(&mut self) -> Result<MetadataBlock>;

    /// Takes the contents (4096 bytes, not sealed) of an allocated block.
    fn write(&mut self, block: MetadataBlock, kind: BlockKind, contents: &[u8]) -> Result<()>;

    /// Takes note of the contents of a leaf that may be read back, before it is written.
    fn keep(&mut self, block: MetadataBlock, contents: &[u8]) -> Result<()>;

    /// The contents of a leaf that was kept.
    fn read_back(&mut self, block: MetadataBlock) -> Result<Vec<u8>>;

    /// References to metadata blocks; every allocated block has one until somebody says otherwise.
    fn counts(&mut self) -> &mut CountMap;
}

#[derive(Clone, Debug)]
struct SharedNode {
    key: u64,
    block: MetadataBlock,
    entries: u16,
    height: u8,
    children: Range<u32>,
    /// Pointers to it from outside the shared trees.
    references: u32,
}

/// Finished trees that others may attach, whole or in parts.
#[derive(Debug, Default)]
pub struct SharedTree {
    nodes: Vec<SharedNode>,
    children: Vec<u32>,
}

impl SharedTree {
    /// Counts a reference to `node` as the root of a whole tree and returns its block.
    pub fn refer(&mut self, node: u32) -> MetadataBlock {
        let node = &mut self.nodes[node as usize];
        node.references = node.references.saturating_add(1);
        node.block
    }

    /// References of every block of the shared trees, and whether it is a leaf. A node that nothing attached has none,
    /// and does not count as a reference to its children.
    pub fn references(&self) -> Vec<(MetadataBlock, u32, bool)> {
        let mut counts: Vec<u32> = self.nodes.iter().map(|n| n.references).collect();
        // Children were finished before their parents, so they stand before them.
        for (i, node) in self.nodes.iter().enumerate().rev() {
            if counts[i] > 0 {
                for &child in
                    &self.children[node.children.start as usize..node.children.end as usize]
                {
                    counts[child as usize] = counts[child as usize].saturating_add(1);
                }
            }
        }
        let nodes = self.nodes.iter().zip(counts);
        nodes
            .map(|(n, count)| (n.block, count, n.height == 0))
            .collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Item {
    key: u64,
    block: MetadataBlock,
    shared: Option<u32>,
}

/// A finished tree.
#[derive(Clone, Copy, Debug)]
pub struct BuiltTree {
    /// Its root.
    pub root: MetadataBlock,
    /// Its root's number among the shared trees: when it was recorded there, or is itself a shared tree.
    pub shared: Option<u32>,
}

/// Builds one tree.
#[derive(Debug)]
pub struct TreeBuilder<V> {
    entries: Vec<(u64, V)>,
    /// `levels[h]` are the finished nodes of height h that wait for a parent.
    levels: Vec<Vec<Item>>,
    /// Record every node in the shared trees, for others to attach.
    record: bool,
    /// Values that were copied out of shared leaves; whoever counts references drains them.
    pub copied: Vec<V>,
}

impl<V: Value> TreeBuilder<V> {
    const LEAF_MAX: usize = max_entries(V::SIZE);
    const INNER_MAX: usize = max_entries(8);

    /// A tree of its own.
    pub fn new() -> Self {
        Self {
            entries: Vec::new(),
            levels: Vec::new(),
            record: false,
            copied: Vec::new(),
        }
    }

    /// A tree for others to attach.
    pub fn recorded() -> Self {
        Self {
            record: true,
            ..Self::new()
        }
    }

    /// True while nothing was pushed or attached.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.levels.iter().all(Vec::is_empty)
    }

    /// Adds an entry; keys must ascend.
    pub fn push(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
        key: u64,
        value: V,
    ) -> Result<()> {
        self.entries.push((key, value));
        if self.entries.len() >= 2 * Self::LEAF_MAX {
            self.write_leaf(sink, trees, Self::LEAF_MAX)?;
        }
        Ok(())
    }

    /// Attaches the shared tree `node`; its keys must follow those before.
    pub fn attach(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
        node: u32,
    ) -> Result<()> {
        let SharedNode {
            key,
            block,
            entries,
            height,
            children,
            ..
        } = trees.nodes[node as usize].clone();
        let height = usize::from(height);
        if usize::from(entries) >= Self::min(height) && self.can_close_up_to(height) {
            for h in 0..=height {
                self.close(sink, trees, h)?;
            }
            let shared = Some(node);
            return self.add_item(sink, trees, height, Item { key, block, shared });
        }
        if height == 0 {
            for (key, value) in self.copy_leaf(sink, block, entries)? {
                self.push(sink, trees, key, value)?;
            }
            return Ok(());
        }
        for i in children {
            let child = trees.children[i as usize];
            self.attach(sink, trees, child)?;
        }
        Ok(())
    }

    /// Finishes the tree: its root, a lone empty leaf if nothing was pushed.
    pub fn finish(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
    ) -> Result<BuiltTree> {
        for height in 0.. {
            let waiting = self.waiting(height);
            if !self.is_top(height) && waiting > 0 && waiting < Self::min(height) {
                self.open_previous(sink, trees, height)?;
            }
            if self.is_top(height) {
                if height > 0
                    && let [root] = self.levels[height - 1][..]
                {
                    return Ok(BuiltTree {
                        root: root.block,
                        shared: root.shared,
                    });
                }
                if height == 0 && self.entries.is_empty() {
                    self.write_leaf(sink, trees, 0)?;
                    continue;
                }
            }
            self.close(sink, trees, height)?;
        }
        Err(internal("a tree without a root"))
    }

    fn max(height: usize) -> usize {
        if height == 0 {
            Self::LEAF_MAX
        } else {
            Self::INNER_MAX
        }
    }

    fn min(height: usize) -> usize {
        Self::max(height) / 3
    }

    /// Entries that wait to become nodes of `height`.
    fn waiting(&self, height: usize) -> usize {
        match height {
            0 => self.entries.len(),
            h => self.levels.get(h - 1).map_or(0, Vec::len),
        }
    }

    /// True when nothing waits above the entries of nodes of `height`.
    fn is_top(&self, height: usize) -> bool {
        self.levels.iter().skip(height).all(Vec::is_empty)
    }

    /// True when all that waits up to `height` can become nodes without one being too small.
    fn can_close_up_to(&self, height: usize) -> bool {
        let mut from_below = 0;
        (0..=height).all(|h| {
            let n = self.waiting(h) + from_below;
            from_below = n.div_ceil(Self::max(h));
            n == 0 || n >= Self::min(h)
        })
    }

    /// Makes nodes of `height` of all that waits for it, evenly filled.
    fn close(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
        height: usize,
    ) -> Result<()> {
        let mut nodes = self.waiting(height).div_ceil(Self::max(height));
        while nodes > 0 {
            let n = self.waiting(height).div_ceil(nodes);
            if height == 0 {
                self.write_leaf(sink, trees, n)?;
            } else {
                self.write_inner(sink, trees, height, n)?;
            }
            nodes -= 1;
        }
        Ok(())
    }

    fn add_item(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
        height: usize,
        item: Item,
    ) -> Result<()> {
        while self.levels.len() <= height {
            self.levels.push(Vec::new());
        }
        self.levels[height].push(item);
        if self.levels[height].len() >= 2 * Self::INNER_MAX {
            self.write_inner(sink, trees, height + 1, Self::INNER_MAX)?;
        }
        Ok(())
    }

    /// Writes the first `n` waiting entries as a leaf.
    fn write_leaf(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
        n: usize,
    ) -> Result<()> {
        let mut contents = [0; BLOCK_SIZE];
        put_header(&mut contents, FLAG_LEAF, n, V::SIZE);
        let (keys, values) = contents[NODE_HEADER..].split_at_mut(8 * Self::LEAF_MAX);
        let slots = keys
            .chunks_exact_mut(8)
            .zip(values.chunks_exact_mut(V::SIZE));
        for ((key, value), (key_slot, value_slot)) in self.entries.drain(..n).zip(slots) {
            key_slot.copy_from_slice(&key.to_le_bytes());
            value.pack(value_slot);
        }
        self.write_node(sink, trees, 0, &contents, n, Vec::new())
    }

    /// Writes the first `n` waiting nodes below `height` as an inner node of that height.
    fn write_inner(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
        height: usize,
        n: usize,
    ) -> Result<()> {
        let items: Vec<Item> = self.levels[height - 1].drain(..n).collect();
        let contents = inner_node(items.iter().map(|item| (item.key, item.block)));
        let mut children = Vec::new();
        for item in items {
            match item.shared {
                Some(node) if self.record => children.push(node),
                Some(node) => {
                    trees.refer(node);
                }
                None => {}
            }
        }
        self.write_node(sink, trees, height, &contents, n, children)
    }

    fn write_node(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
        height: usize,
        contents: &[u8],
        entries: usize,
        children: Vec<u32>,
    ) -> Result<()> {
        let block = sink.allocate()?;
        if self.record && height == 0 {
            sink.keep(block, contents)?;
        }
        sink.write(block, BlockKind::Node, contents)?;
        let key = get_u64(contents, NODE_HEADER);
        let shared = self.record.then(|| {
            let start = trees.children.len() as u32;
            trees.children.extend(children);
            trees.nodes.push(SharedNode {
                key,
                block,
                entries: entries as u16,
                height: height as u8,
                children: start..trees.children.len() as u32,
                references: 0,
            });
            trees.nodes.len() as u32 - 1
        });
        self.add_item(sink, trees, height, Item { key, block, shared })
    }

    /// Opens the node of `height` that was attached last, so that what waits for that height has company. Own nodes are
    /// never too small for their neighbours (invariant 3), so the node is a shared one.
    fn open_previous(
        &mut self,
        sink: &mut dyn BlockSink,
        trees: &mut SharedTree,
        height: usize,
    ) -> Result<()> {
        if self.levels[height].is_empty() {
            self.open_previous(sink, trees, height + 1)?;
        }
        let node = self.levels[height].pop().and_then(|item| item.shared);
        let node = node.ok_or_else(|| internal("a small node without a shared neighbour"))?;
        let node = trees.nodes[node as usize].clone();
        if height == 0 {
            let entries = self.copy_leaf(sink, node.block, node.entries)?;
            self.entries.splice(..0, entries);
            return Ok(());
        }
        let children = &trees.children[node.children.start as usize..node.children.end as usize];
        let items = children.iter().map(|&child| Item {
            key: trees.nodes[child as usize].key,
            block: trees.nodes[child as usize].block,
            shared: Some(child),
        });
        self.levels[height - 1].splice(..0, items);
        Ok(())
    }

    /// The entries of a shared leaf.
    fn copy_leaf(
        &mut self,
        sink: &mut dyn BlockSink,
        block: MetadataBlock,
        entries: u16,
    ) -> Result<Vec<(u64, V)>> {
        let contents = sink.read_back(block)?;
        let (keys, values) = contents[NODE_HEADER..].split_at(8 * Self::LEAF_MAX);
        let keys = keys.chunks_exact(8).map(|k| get_u64(k, 0));
        let values = values.chunks_exact(V::SIZE).map(V::unpack);
        let copied: Vec<_> = keys.zip(values).take(usize::from(entries)).collect();
        self.copied.extend(copied.iter().map(|e| e.1));
        Ok(copied)
    }
}

impl<V: Value> Default for TreeBuilder<V> {
    fn default() -> Self {
        Self::new()
    }
}

/// The contents, not sealed, of an inner node with these children, ascending by key; with the first ones if there are more than it
/// has room for.
pub fn inner_node(children: impl IntoIterator<Item = (u64, MetadataBlock)>) -> [u8; BLOCK_SIZE] {
    const MAX: usize = max_entries(8);
    let mut contents = [0; BLOCK_SIZE];
    let mut entries = 0;
    for (key, block) in children.into_iter().take(MAX) {
        put_u64(&mut contents, NODE_HEADER + 8 * entries, key);
        put_u64(&mut contents, NODE_HEADER + 8 * (MAX + entries), block.0);
        entries += 1;
    }
    put_header(&mut contents, FLAG_INTERNAL, entries, 8);
    contents
}

fn put_header(contents: &mut [u8], flag: u32, entries: usize, value_size: usize) {
    put_u32(contents, 4, flag);
    put_u32(contents, 16, entries as u32);
    put_u32(contents, 20, max_entries(value_size) as u32);
    put_u32(contents, 24, value_size as u32);
}

fn internal(what: &str) -> Error {
    Error::new(
        ErrorKind::Unsuitable,
        format!("internal error while building a tree: {what}; please report it"),
    )
}
