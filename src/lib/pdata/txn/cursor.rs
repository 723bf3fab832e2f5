//! A cursor: the entries of a tree in ascending order, as the kernel's dm_btree_cursor.
//!
//! It holds only the leaf it is in; of the way down it keeps block numbers and places. It borrows the transaction, so the tree stays as
//! it is. A node with keys that its parent has no place for is an error: else a node that damage hung into a tree many times would
//! be gone through as many times on each level.

use super::block_manager::{BlockManager, ReadGuard};
use super::btree::{MOST_LEVELS, too_deep};
use super::transaction::Transaction;
use super::validator::Validator;
use super::view::{Cell, View};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::forest::TreeKind;
use crate::units::MetadataBlock;

/// An inner node on the way down.
#[derive(Clone, Copy, Debug)]
struct Step {
    block: MetadataBlock,
    at: usize,
    /// No key below the node reaches this one.
    end: Option<u64>,
}

/// A place between two entries.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    blocks: &'a BlockManager,
    kind: TreeKind,
    path: Vec<Step>,
    /// None at the end.
    leaf: Option<ReadGuard<'a>>,
    at: usize,
}

impl Transaction {
    /// The entries of the tree at `root` whose keys are at least `key`.
    pub(crate) fn cursor(
        &self,
        kind: TreeKind,
        root: MetadataBlock,
        key: u64,
    ) -> Result<Cursor<'_>> {
        let mut cursor = Cursor {
            blocks: self.blocks(),
            kind,
            path: Vec::new(),
            leaf: None,
            at: 0,
        };
        cursor.descend(root, 0, None, key)?;
        Ok(cursor)
    }
}

impl Cursor<'_> {
    /// Goes down from `block`, which has its place in `begin..end`, to where `key` is or would be.
    fn descend(
        &mut self,
        mut block: MetadataBlock,
        mut begin: u64,
        mut end: Option<u64>,
        key: u64,
    ) -> Result<()> {
        loop {
            let node = self.blocks.read(block, Validator::of(self.kind))?;
            let view = node.view();
            refuse_misplaced(block, view, begin, end)?;
            let at = view.floor(key);
            if view.is_leaf() {
                self.at = at.map_or(0, |at| at + usize::from(view.key(at) < key));
                self.leaf = Some(node);
                return Ok(());
            }
            if self.path.len() == MOST_LEVELS {
                return Err(too_deep(self.path[0].block));
            }
            let at = at.unwrap_or(0);
            self.path.push(Step { block, at, end });
            (block, begin, end) = child(view, at, end);
        }
    }

    /// Goes to the leaf behind the present one, if there is one.
    fn leave_leaf(&mut self) -> Result<()> {
        self.leaf = None;
        while let Some(mut step) = self.path.pop() {
            let node = self.blocks.read(step.block, Validator::of(self.kind))?;
            step.at += 1;
            if step.at < node.view().len() {
                self.path.push(step);
                let (block, begin, end) = child(node.view(), step.at, step.end);
                drop(node);
                return self.descend(block, begin, end, begin);
            }
        }
        Ok(())
    }
}

impl Iterator for Cursor<'_> {
    type Item = Result<(u64, Cell)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let view = self.leaf.as_ref()?.view();
            if self.at < view.len() {
                let entry = (view.key(self.at), view.value(self.at));
                self.at += 1;
                return Some(Ok(entry));
            }
            if let Err(e) = self.leave_leaf() {
                return Some(Err(e));
            }
        }
    }
}

/// A child, and the keys that it has a place for.
fn child(view: View<'_>, at: usize, end: Option<u64>) -> (MetadataBlock, u64, Option<u64>) {
    let end = match at + 1 < view.len() {
        true => Some(view.key(at + 1)),
        false => end,
    };
    (view.child(at), view.key(at), end)
}

fn refuse_misplaced(
    block: MetadataBlock,
    view: View<'_>,
    begin: u64,
    end: Option<u64>,
) -> Result<()> {
    let Some(last) = view.len().checked_sub(1) else {
        return Ok(());
    };
    let (first, last) = (view.key(0), view.key(last));
    if first >= begin && end.is_none_or(|end| last < end) {
        return Ok(());
    }
    let end = end.map_or_else(|| String::from("the end"), |end| end.to_string());
    Err(Error::new(
        ErrorKind::Damaged,
        format!(
            "block {block} has keys {first} to {last}, its place is from {begin} to {end}; run thin_check"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RamEngine;
    use crate::pdata::txn::cell;
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};
    use std::collections::BTreeMap;
    use std::sync::Arc;

    /// An empty tree, in the smallest cache there is.
    fn empty() -> (Transaction, MetadataBlock) {
        let blocks = BlockManager::new(Arc::new(RamEngine::new(2048)), 0);
        let (mut txn, ..) = Transaction::format(Arc::new(blocks)).unwrap();
        let root = txn.new_tree(TreeKind::Mappings).unwrap();
        (txn, root)
    }

    fn entries(txn: &Transaction, root: MetadataBlock, key: u64) -> Vec<(u64, u64)> {
        let cursor = txn.cursor(TreeKind::Mappings, root, key).unwrap();
        cursor.map(|e| e.map(|e| (e.0, e.1[0])).unwrap()).collect()
    }

    #[test]
    fn an_empty_tree_has_no_entries() {
        let (txn, root) = empty();
        for key in [0, 1, u64::MAX] {
            assert_eq!(entries(&txn, root, key), []);
        }
    }

    #[test]
    fn random_trees_are_gone_through_as_a_map_is() {
        for seed in 0..8 {
            println!("seed {seed}");
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut txn, mut root) = empty();
            let mut map = BTreeMap::from([(u64::MAX, 1)]);
            let most = [200, 254, 2_000, 60_000][seed as usize % 4];
            for _ in 0..most {
                map.insert(rng.random_range(0..4 * most), rng.random_range(0..1 << 40));
            }
            for (&key, &value) in &map {
                let changed = txn.insert(TreeKind::Mappings, root, key, cell(value));
                root = changed.unwrap().root;
            }
            // Leaves of all sizes.
            for _ in 0..20 {
                let begin = rng.random_range(0..4 * most);
                let end = begin + rng.random_range(0..600);
                let removed = txn.remove_run(TreeKind::Mappings, root, begin, end);
                let (new_root, run) = removed.unwrap();
                root = new_root;
                for (key, _) in run {
                    map.remove(&key);
                }
            }
            assert!(entries(&txn, root, 0).into_iter().eq(map.clone()));
            // Around every entry of a small tree and with it each end of a leaf, around some of a large one.
            for &key in map.keys().step_by(map.len() / 300 + 1) {
                for from in [key.saturating_sub(1), key, key.saturating_add(1)] {
                    let mut cursor = txn.cursor(TreeKind::Mappings, root, from).unwrap();
                    let expected = map.range(from..).next();
                    let found = cursor.next().map(|e| e.unwrap()).map(|e| (e.0, e.1[0]));
                    assert_eq!(found, expected.map(|(k, v)| (*k, *v)), "from {from}");
                    let n = rng.random_range(0..400);
                    let expected = map.range(from..).nth(n + 1).map(|e| *e.0);
                    assert_eq!(cursor.nth(n).map(|e| e.unwrap().0), expected);
                }
            }
        }
    }

    #[test]
    fn a_leaf_that_hangs_in_two_places_is_an_error() {
        let (mut txn, mut root) = empty();
        for key in 0..600 {
            let changed = txn.insert(TreeKind::Mappings, root, key, cell(key));
            root = changed.unwrap().root;
        }
        let node = txn.blocks().read(root, Validator::Node8).unwrap();
        let first = node.view().child(0);
        drop(node);
        txn.set_value(TreeKind::Mappings, root, 1, cell(first.0))
            .unwrap();
        let mut cursor = txn.cursor(TreeKind::Mappings, root, 0).unwrap();
        let failed = cursor.find_map(Result::err).unwrap();
        assert_eq!(failed.kind(), ErrorKind::Damaged);
        assert!(cursor.next().is_none(), "nothing comes after an error");
    }
}
