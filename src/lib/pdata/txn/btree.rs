//! Btrees that change: lookup, insert with the redistribution that the kernel has had since 5.14, removal, and the deletion of whole
//! trees. Facts: `FORMAT.md` and the kernel's dm-btree.
//!
//! Changes go from the root down and never come back up: a full node is split before, and a node that may become too small is merged
//! before its parent is left. So at most a node, its parent and two siblings are held at once, and a reader that goes down with two
//! locks, or asks a node's version again after it has its child's, never follows a pointer that was moved. An insertion to the leaf of
//! the one before does without the way down ([`OpenLeaf`]).

use super::block_manager::{BlockManager, WriteGuard};
use super::open_leaf::OpenLeaf;
use super::transaction::Transaction;
use super::validator::Validator;
use super::view::{Cell, View, cell};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::forest::TreeKind;
use crate::units::MetadataBlock;
use std::sync::Arc;

/// Levels of a tree, at most; metadata with more has a loop.
pub(super) const MOST_LEVELS: usize = 64;
/// A neighbour takes entries of a full node if it has room for this many.
const ROOM: usize = 8;

/// A changed tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Changed {
    pub(crate) root: MetadataBlock,
    /// The value that the key had before.
    pub(crate) old: Option<Cell>,
}

pub(super) fn too_deep(root: MetadataBlock) -> Error {
    Error::new(
        ErrorKind::Damaged,
        format!("the tree at block {root} has more than {MOST_LEVELS} levels; run thin_check"),
    )
}

/// Where a node leads.
enum Step<D, T> {
    Down(D),
    End(T),
}

/// The lowest node on the way to a key that is to be held exclusively.
enum Lowest {
    Leaf(OpenLeaf),
    /// The next node is to be copied or split, or comes to begin with the key.
    Inner(MetadataBlock),
    /// The root is to be copied or split.
    No,
}

/// True if `key` can be put into the node without splitting it.
fn has_room(node: View<'_>, key: u64) -> bool {
    node.len() < node.max() || node.is_leaf() && node.find(key).is_some()
}

/// Sets the value of `key` in a leaf that has room for it. The value that it had before.
fn put(leaf: View<'_>, key: u64, value: Cell) -> Option<Cell> {
    let above = leaf.upper_of_leaf(key);
    let at = above.checked_sub(1).filter(|&at| leaf.key(at) == key);
    let old = at.map(|at| leaf.value(at));
    match at {
        Some(at) => leaf.set_value(at, value),
        None => leaf.insert(above, key, value),
    }
    old
}

impl Transaction {
    /// The value of `key` in the tree at `root`.
    pub(crate) fn lookup(
        &self,
        kind: TreeKind,
        root: MetadataBlock,
        key: u64,
    ) -> Result<Option<Cell>> {
        let step = |view: View<'_>| match view.is_leaf() {
            true => Step::End(view.find(key).map(|at| view.value(at))),
            false => match view.floor(key) {
                Some(at) => Step::Down(view.child(at)),
                None => Step::End(None),
            },
        };
        let mut block = root;
        for _ in 0..MOST_LEVELS {
            match self.blocks.look(block, Validator::of(kind), step)? {
                Step::Down(child) => block = child,
                Step::End(found) => return Ok(found),
            }
        }
        Err(too_deep(root))
    }

    /// The first entry whose key is at least `key`.
    pub(crate) fn lookup_next(
        &self,
        kind: TreeKind,
        root: MetadataBlock,
        key: u64,
    ) -> Result<Option<(u64, Cell)>> {
        self.cursor(kind, root, key)?.next().transpose()
    }

    /// The largest key of a tree.
    pub(crate) fn last_key(&self, kind: TreeKind, root: MetadataBlock) -> Result<Option<u64>> {
        match self.last_known_key(kind, root)? {
            (key, None) => Ok(key),
            (_, Some(e)) => Err(e),
        }
    }

    /// The same of a tree that may be damaged, with what keeps it from being certain: of a node that cannot be read its parent knows
    /// where it begins.
    pub(crate) fn last_known_key(
        &self,
        kind: TreeKind,
        root: MetadataBlock,
    ) -> Result<(Option<u64>, Option<Error>)> {
        let validator = Validator::of(kind);
        let mut node = self.blocks.read(root, validator)?;
        for _ in 0..MOST_LEVELS {
            let view = node.view();
            let Some(last) = view.len().checked_sub(1) else {
                return Ok((None, None));
            };
            let key = view.key(last);
            if view.is_leaf() {
                return Ok((Some(key), None));
            }
            match self.blocks.read(view.child(last), validator) {
                Ok(child) => node = child,
                Err(e) => return Ok((Some(key), Some(e))),
            }
        }
        Err(too_deep(root))
    }

    /// True if the block is of this transaction and of one tree only, so that it may be changed in place.
    pub(super) fn is_own(&self, block: MetadataBlock) -> Result<bool> {
        Ok(self.is_new(block)
            && (self.is_new_once(block) || !self.metadata_count_is_many(block)?))
    }

    /// The lowest node on the way to `key` that is to be held exclusively: all above it stay as they are, and lookups may go on
    /// through them.
    fn first_to_change(
        &self,
        kind: TreeKind,
        root: MetadataBlock,
        key: u64,
        needs_room: bool,
    ) -> Result<Lowest> {
        let validator = Validator::of(kind);
        // None where the node has no room; a leaf, or a node with no child to go on to, is the end.
        let step = |view: View<'_>| {
            let is_enough = !needs_room || has_room(view, key);
            is_enough.then(|| match view.is_leaf() {
                true => Step::End(true),
                false => match view.floor(key) {
                    Some(at) => {
                        let behind = (at + 1 < view.len()).then(|| view.key(at + 1));
                        Step::Down((view.child(at), view.key(at), behind))
                    }
                    None => Step::End(false),
                },
            })
        };
        let (mut lowest, mut block) = (Lowest::No, root);
        let (mut first, mut last) = (0, u64::MAX);
        for _ in 0..MOST_LEVELS {
            if !self.is_own(block)? {
                break;
            }
            match self.blocks.look(block, validator, step)? {
                None => break,
                Some(Step::End(true)) => {
                    return Ok(Lowest::Leaf(OpenLeaf {
                        kind,
                        root,
                        first,
                        last,
                        block,
                    }));
                }
                Some(Step::End(false)) => return Ok(Lowest::Inner(block)),
                Some(Step::Down((child, begin, behind))) => {
                    (lowest, block) = (Lowest::Inner(block), child);
                    first = first.max(begin);
                    last = behind.map_or(last, |key| last.min(key.saturating_sub(1)));
                }
            }
        }
        Ok(lowest)
    }

    /// False if going down to `key` leads elsewhere.
    fn is_open(&self, leaf: OpenLeaf, key: u64) -> bool {
        let lowest = self.first_to_change(leaf.kind, leaf.root, key, false);
        matches!(lowest, Ok(Lowest::Leaf(found)) if found == leaf) || lowest.is_err()
    }

    /// Makes the path to `key`, which is there, one that may be changed. Returns the root, the leaf, and the entry's place in it.
    pub(crate) fn shadow_path(
        &mut self,
        kind: TreeKind,
        root: MetadataBlock,
        key: u64,
    ) -> Result<(MetadataBlock, MetadataBlock, usize)> {
        let lowest = self.first_to_change(kind, root, key, false)?;
        let blocks = Arc::clone(&self.blocks);
        let (new_root, mut node) = match lowest {
            Lowest::Leaf(OpenLeaf { block, .. }) | Lowest::Inner(block) => {
                (root, blocks.write(block, Validator::of(kind))?)
            }
            Lowest::No => {
                let node = self.shadow(&blocks, kind, root)?;
                (node.location(), node)
            }
        };
        for _ in 0..MOST_LEVELS {
            let view = node.view();
            let at = view.floor(key).ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("the {kind} has no entry {key}"),
                )
            })?;
            if view.is_leaf() {
                return Ok((new_root, node.location(), at));
            }
            node = self.shadow_child(&blocks, kind, &node, at)?;
        }
        Err(too_deep(root))
    }

    /// Sets a value of a leaf that [`shadow_path`](Self::shadow_path) made one that may be changed.
    pub(crate) fn set_value(
        &mut self,
        kind: TreeKind,
        leaf: MetadataBlock,
        at: usize,
        value: Cell,
    ) -> Result<()> {
        let leaf = self.blocks.write(leaf, Validator::of(kind))?;
        leaf.view().set_value(at, value);
        Ok(())
    }

    /// Makes the child at `at` of `parent` one that may be changed.
    fn shadow_child<'a>(
        &mut self,
        blocks: &'a BlockManager,
        kind: TreeKind,
        parent: &WriteGuard<'_>,
        at: usize,
    ) -> Result<WriteGuard<'a>> {
        let child = self.shadow(blocks, kind, parent.view().child(at))?;
        parent.view().set_value(at, cell(child.location().0));
        Ok(child)
    }

    /// Sets the value of `key`. What the old value pointed to is left to the caller.
    pub(crate) fn insert(
        &mut self,
        kind: TreeKind,
        root: MetadataBlock,
        key: u64,
        value: Cell,
    ) -> Result<Changed> {
        if let Some(open) = self.last_leaf.filter(|open| open.is_for(kind, root, key)) {
            debug_assert!(
                self.is_open(open, key),
                "{open:?} is not for {key} any more"
            );
            let leaf = self.blocks.write(open.block, Validator::of(kind))?;
            if has_room(leaf.view(), key) {
                let old = put(leaf.view(), key, value);
                return Ok(Changed { root, old });
            }
        }
        self.last_leaf = None;
        let blocks;
        let (new_root, mut node) = match self.first_to_change(kind, root, key, true)? {
            Lowest::Leaf(open) => {
                let leaf = self.blocks.write(open.block, Validator::of(kind))?;
                let old = put(leaf.view(), key, value);
                drop(leaf);
                self.last_leaf = Some(open);
                return Ok(Changed { root, old });
            }
            Lowest::Inner(block) => {
                blocks = Arc::clone(&self.blocks);
                (root, blocks.write(block, Validator::of(kind))?)
            }
            Lowest::No => {
                blocks = Arc::clone(&self.blocks);
                let node = self.shadow(&blocks, kind, root)?;
                if !has_room(node.view(), key) {
                    self.split_root(&blocks, kind, &node)?;
                }
                (node.location(), node)
            }
        };
        for _ in 0..MOST_LEVELS {
            let view = node.view();
            if view.is_leaf() {
                return Ok(Changed {
                    root: new_root,
                    old: put(view, key, value),
                });
            }
            let at = view.floor(key).unwrap_or_else(|| {
                view.set_key(0, key);
                0
            });
            let child = self.shadow_child(&blocks, kind, &node, at)?;
            node = match has_room(child.view(), key) {
                true => child,
                false => self.make_room(&blocks, kind, &node, at, child, key)?,
            };
        }
        Err(too_deep(root))
    }

    /// The contents of a full root move to two new nodes below it.
    fn split_root(
        &mut self,
        blocks: &BlockManager,
        kind: TreeKind,
        root: &WriteGuard<'_>,
    ) -> Result<()> {
        let view = root.view();
        let left = self.new_node(blocks, kind, view.is_leaf())?;
        let right = self.new_node(blocks, kind, view.is_leaf())?;
        right.view().copy_from(view);
        let half = view.len() / 2;
        left.view().take_first(right.view(), half);
        view.clear();
        view.init_node(false, kind);
        view.insert(0, left.view().key(0), cell(left.location().0));
        view.insert(1, right.view().key(0), cell(right.location().0));
        Ok(())
    }

    /// A full child gets room for one more: its neighbours take entries, or a new node does. Returns the one that `key` belongs to.
    fn make_room<'a>(
        &mut self,
        blocks: &'a BlockManager,
        kind: TreeKind,
        parent: &WriteGuard<'_>,
        at: usize,
        child: WriteGuard<'a>,
        key: u64,
    ) -> Result<WriteGuard<'a>> {
        let of_parent = parent.view();
        let last = of_parent.len() - 1;
        let mut is_sibling_shared = false;
        for sibling in [at.checked_sub(1), (at < last).then_some(at + 1)]
            .into_iter()
            .flatten()
        {
            let block = of_parent.child(sibling);
            if self.metadata_count_is_many(block)? {
                is_sibling_shared = true;
                continue;
            }
            let room = {
                let node = blocks.read(block, Validator::of(kind))?;
                node.view().max().saturating_sub(node.view().len())
            };
            if room >= ROOM {
                let sibling_node = self.shadow_child(blocks, kind, parent, sibling)?;
                let (left, right, at_right) = match sibling < at {
                    true => (sibling_node, child, at),
                    false => (child, sibling_node, sibling),
                };
                refuse_unlike(parent, &[left.view(), right.view()])?;
                let total = left.view().len() + right.view().len();
                left.view().balance(right.view(), total / 2);
                of_parent.set_key(at_right, right.view().key(0));
                return Ok(if key < right.view().key(0) {
                    left
                } else {
                    right
                });
            }
        }
        let is_at_end = at == 0 || at == last;
        if is_sibling_shared || of_parent.len() <= 2 || is_at_end {
            let right = self.new_node(blocks, kind, child.view().is_leaf())?;
            let moved = child.view().len() - child.view().len() / 2;
            child.view().give_last(right.view(), moved);
            of_parent.insert(at + 1, right.view().key(0), cell(right.location().0));
            return Ok(if key < right.view().key(0) {
                child
            } else {
                right
            });
        }
        // Two full nodes become three.
        let left = self.shadow_child(blocks, kind, parent, at - 1)?;
        refuse_unlike(parent, &[left.view(), child.view()])?;
        let centre = self.new_node(blocks, kind, child.view().is_leaf())?;
        let total = left.view().len() + child.view().len();
        let of_left = total / 3;
        let of_centre = (total - of_left) / 2;
        let surplus = left.view().len().saturating_sub(of_left);
        left.view().give_last(centre.view(), surplus);
        centre.view().balance(child.view(), of_centre);
        of_parent.set_key(at, child.view().key(0));
        of_parent.insert(at, centre.view().key(0), cell(centre.location().0));
        Ok(match key {
            _ if key < centre.view().key(0) => left,
            _ if key < child.view().key(0) => centre,
            _ => child,
        })
    }

    /// Takes `key` out. None, and nothing is changed, if it is not there. What the value pointed to is left to the caller.
    pub(crate) fn remove(
        &mut self,
        kind: TreeKind,
        root: MetadataBlock,
        key: u64,
    ) -> Result<Option<Changed>> {
        if self.lookup(kind, root, key)?.is_none() {
            return Ok(None);
        }
        let blocks = Arc::clone(&self.blocks);
        let (root, leaf) = self.shadow_for_removal(&blocks, kind, root, key)?;
        let view = leaf.view();
        let old = view.find(key).map(|at| {
            let old = view.value(at);
            view.remove(at, 1);
            old
        });
        Ok(Some(Changed { root, old }))
    }

    /// Takes out the entries with keys in `begin..end` of the leaf that has the first of them. Returns root and what was taken out.
    pub(crate) fn remove_run(
        &mut self,
        kind: TreeKind,
        root: MetadataBlock,
        begin: u64,
        end: u64,
    ) -> Result<(MetadataBlock, Vec<(u64, Cell)>)> {
        let blocks = Arc::clone(&self.blocks);
        let (root, leaf) = self.shadow_for_removal(&blocks, kind, root, begin)?;
        let view = leaf.view();
        let first = view
            .floor(begin)
            .map_or(0, |at| at + usize::from(view.key(at) < begin));
        let last = end
            .checked_sub(1)
            .map_or(0, |last| view.upper(last))
            .max(first);
        let removed = (first..last)
            .map(|at| (view.key(at), view.value(at)))
            .collect();
        view.remove(first, last - first);
        let is_small = view.len() < view.max() / 3;
        drop(leaf);
        // A leaf that became too small is merged with its neighbours; so is one that became empty.
        let root = match is_small {
            true => self.shadow_for_removal(&blocks, kind, root, begin)?.0,
            false => root,
        };
        Ok((root, removed))
    }

    /// The leaf where `key` is or would be, to be changed. Every node on the way has more than it needs, or got it.
    fn shadow_for_removal<'a>(
        &mut self,
        blocks: &'a BlockManager,
        kind: TreeKind,
        root: MetadataBlock,
        key: u64,
    ) -> Result<(MetadataBlock, WriteGuard<'a>)> {
        self.last_leaf = None;
        let mut node = self.shadow(blocks, kind, root)?;
        let new_root = node.location();
        for _ in 0..2 * MOST_LEVELS {
            let view = node.view();
            if view.is_leaf() {
                return Ok((new_root, node));
            }
            if view.len() == 1 {
                self.become_only_child(blocks, kind, &node)?;
                continue;
            }
            let at = view.floor(key).unwrap_or(0);
            self.rebalance(blocks, kind, &node, at)?;
            if view.len() == 1 {
                continue;
            }
            let at = view.floor(key).unwrap_or(0);
            node = self.shadow_child(blocks, kind, &node, at)?;
        }
        Err(too_deep(root))
    }

    /// A node with one child takes its contents.
    fn become_only_child(
        &mut self,
        blocks: &BlockManager,
        kind: TreeKind,
        node: &WriteGuard<'_>,
    ) -> Result<()> {
        let child = node.view().child(0);
        let is_shared = self.metadata_count_is_many(child)?;
        node.view()
            .copy_from(blocks.read(child, Validator::of(kind))?.view());
        if is_shared {
            self.increment_children(kind, node)?;
        }
        self.decrement_metadata(child.0)
    }

    /// Evens out the child at `at` with its neighbours, or merges them.
    fn rebalance(
        &mut self,
        blocks: &BlockManager,
        kind: TreeKind,
        parent: &WriteGuard<'_>,
        at: usize,
    ) -> Result<()> {
        let last = parent.view().len() - 1;
        match at {
            0 => self.rebalance_two(blocks, kind, parent, 0),
            _ if at == last => self.rebalance_two(blocks, kind, parent, at - 1),
            _ => self.rebalance_three(blocks, kind, parent, at - 1),
        }
    }

    /// Of the children at `at` and behind it: one, if they are small enough; else each gets half.
    fn rebalance_two(
        &mut self,
        blocks: &BlockManager,
        kind: TreeKind,
        parent: &WriteGuard<'_>,
        at: usize,
    ) -> Result<()> {
        let left = self.shadow_child(blocks, kind, parent, at)?;
        let right = self.shadow_child(blocks, kind, parent, at + 1)?;
        let (l, r) = (left.view(), right.view());
        refuse_unlike(parent, &[l, r])?;
        let total = l.len() + r.len();
        if total < 2 * (l.max() / 3 + 1) {
            l.take_first(r, r.len());
            parent.view().remove(at + 1, 1);
            let gone = right.location();
            drop(right);
            return self.decrement_metadata(gone.0);
        }
        l.balance(r, total / 2);
        parent.view().set_key(at + 1, r.key(0));
        Ok(())
    }

    /// Of the child at `at` and the two behind it: two, if they are small enough; else each gets a third.
    fn rebalance_three(
        &mut self,
        blocks: &BlockManager,
        kind: TreeKind,
        parent: &WriteGuard<'_>,
        at: usize,
    ) -> Result<()> {
        let left = self.shadow_child(blocks, kind, parent, at)?;
        let centre = self.shadow_child(blocks, kind, parent, at + 1)?;
        let right = self.shadow_child(blocks, kind, parent, at + 2)?;
        let (l, c, r) = (left.view(), centre.view(), right.view());
        refuse_unlike(parent, &[l, c, r])?;
        let total = l.len() + c.len() + r.len();
        if total < 4 * (l.max() / 3) + 1 {
            let to_left = c.len().min(l.max() - l.len());
            l.take_first(c, to_left);
            c.give_last(r, c.len());
            parent.view().set_key(at + 2, r.key(0));
            parent.view().remove(at + 1, 1);
            let gone = centre.location();
            drop((left, centre, right));
            self.decrement_metadata(gone.0)?;
            return self.rebalance_two(blocks, kind, parent, at);
        }
        let third = total / 3;
        let of_left = third + usize::from(total % 3 != 0);
        let wanted = [of_left, total - of_left - third, third];
        let [of_l, _, of_r] = wanted;
        let given = l.len().saturating_sub(of_l) + r.len().saturating_sub(of_r);
        let taken = of_l.saturating_sub(l.len()) + of_r.saturating_sub(r.len());
        if c.len() + given <= c.max() && c.len() >= taken {
            // Few have to be moved, as a rule, and the one in the middle has room for them and can spare them.
            l.balance(c, of_l);
            let of_c = c.len() + r.len() - of_r;
            c.balance(r, of_c);
        } else {
            let mut entries = Vec::with_capacity(total);
            for node in [l, c, r] {
                entries.extend((0..node.len()).map(|i| (node.key(i), node.value(i))));
                node.set_len(0);
            }
            let mut rest = &entries[..];
            for (node, n) in [l, c, r].into_iter().zip(wanted) {
                let (of_node, others) = rest.split_at(n);
                node.append(of_node);
                rest = others;
            }
        }
        parent.view().set_key(at + 1, c.key(0));
        parent.view().set_key(at + 2, r.key(0));
        Ok(())
    }

    /// Takes back one reference to a tree, and if it was the last, those that it holds itself.
    pub(crate) fn delete_tree(&mut self, kind: TreeKind, root: MetadataBlock) -> Result<()> {
        // For each level the children that are still to be visited.
        let mut levels: Vec<(TreeKind, Vec<MetadataBlock>)> = vec![(kind, vec![root])];
        while let Some((kind, todo)) = levels.last_mut() {
            let kind = *kind;
            let Some(block) = todo.pop() else {
                levels.pop();
                continue;
            };
            if !self.metadata_count_is_many(block)? {
                let blocks = Arc::clone(&self.blocks);
                let node = blocks.read(block, Validator::of(kind))?;
                let view = node.view();
                let is_leaf = view.is_leaf();
                let values = |at: usize| view.value(at)[0];
                let below: Vec<u64> = match (is_leaf, kind) {
                    (false, _) | (true, TreeKind::TopLevel | TreeKind::Mappings) => {
                        (0..view.len()).map(values).collect()
                    }
                    _ => Vec::new(),
                };
                drop(node);
                match (is_leaf, kind) {
                    (true, TreeKind::Mappings) => {
                        for value in below {
                            self.decrement_data(value >> 24)?;
                        }
                    }
                    (true, TreeKind::TopLevel) => {
                        levels.push((
                            TreeKind::Mappings,
                            below.into_iter().map(MetadataBlock).collect(),
                        ));
                    }
                    (true, _) => {}
                    (false, kind) => {
                        levels.push((kind, below.into_iter().map(MetadataBlock).collect()));
                    }
                }
                if levels.len() > 2 * MOST_LEVELS {
                    return Err(too_deep(root));
                }
            }
            self.decrement_metadata(block.0)?;
        }
        Ok(())
    }
}

/// Nodes of different height cannot be evened out.
fn refuse_unlike(parent: &WriteGuard<'_>, nodes: &[View<'_>]) -> Result<()> {
    let is_like = |n: &View<'_>| n.is_leaf() == nodes[0].is_leaf() && n.max() == nodes[0].max();
    match nodes.iter().all(is_like) {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Damaged,
            format!(
                "the children of block {} are leaves and inner nodes; run thin_check",
                parent.location()
            ),
        )),
    }
}
