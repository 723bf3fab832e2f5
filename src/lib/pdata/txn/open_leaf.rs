//! The leaf that the last insertion went to. Virtual blocks come to be mapped one after the other, and most of what an insertion costs
//! is to find out that every node on the way down may stay as it is.

use crate::pdata::forest::TreeKind;
use crate::units::MetadataBlock;

/// A leaf that may be changed, as may all nodes above it, which lead there for keys from `first` to `last`: until one of them
/// changes or is counted once more, or the transaction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OpenLeaf {
    pub(super) kind: TreeKind,
    pub(super) root: MetadataBlock,
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) block: MetadataBlock,
}

impl OpenLeaf {
    pub(super) fn is_for(&self, kind: TreeKind, root: MetadataBlock, key: u64) -> bool {
        (self.kind, self.root) == (kind, root) && (self.first..=self.last).contains(&key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RamEngine;
    use crate::pdata::txn::{BlockManager, Transaction, cell};
    use std::sync::Arc;

    struct Tree(Transaction, MetadataBlock);

    impl Tree {
        /// With every tenth key below `end`.
        fn new(end: u64) -> Self {
            let blocks = BlockManager::new(Arc::new(RamEngine::new(2048)), 1 << 20);
            let (mut txn, ..) = Transaction::format(Arc::new(blocks)).unwrap();
            // All of them lead to this one block.
            txn.extend_data(1).unwrap();
            let root = txn.new_tree(TreeKind::Mappings).unwrap();
            let mut tree = Self(txn, root);
            (0..end).step_by(10).for_each(|key| tree.insert(key));
            tree
        }

        fn insert(&mut self, key: u64) {
            let changed = self.0.insert(TreeKind::Mappings, self.1, key, cell(key));
            self.1 = changed.unwrap().root;
        }

        fn remove(&mut self, key: u64) {
            let removed = self.0.remove(TreeKind::Mappings, self.1, key);
            self.1 = removed.unwrap().unwrap().root;
        }

        fn has(&self, root: MetadataBlock, key: u64) -> bool {
            let found = self.0.lookup(TreeKind::Mappings, root, key);
            found.unwrap().is_some()
        }

        fn leaf(&self) -> OpenLeaf {
            self.0.last_leaf.unwrap()
        }
    }

    #[test]
    fn it_is_left_when_entries_move_to_its_neighbour() {
        // The right one of two leaves is full, the left one is not: nothing is allocated.
        let mut tree = Tree::new(3780);
        let OpenLeaf { first, last, .. } = tree.leaf();
        assert_eq!((first, last), (1260, u64::MAX));
        tree.insert(1265);
        tree.insert(1266);
        assert!(tree.has(tree.1, 1265) && tree.has(tree.1, 1266));
        assert!(tree.leaf().last < u64::MAX);
    }

    #[test]
    fn it_is_left_when_a_removal_moves_entries() {
        let mut tree = Tree::new(3300);
        let (root, first) = (tree.1, tree.leaf().first);
        tree.remove(1270);
        assert!(tree.0.last_leaf.is_none());
        tree.insert(1265);
        assert_eq!((tree.1, first), (root, 1260));
        assert!(tree.has(root, 1265) && tree.leaf().last < u64::MAX);
    }

    #[test]
    fn it_is_left_when_its_tree_becomes_somebody_elses_too() {
        let mut tree = Tree::new(100);
        let root = tree.1;
        tree.0.increment_metadata(root.0).unwrap();
        tree.insert(55);
        assert!(tree.1 != root && tree.has(tree.1, 55));
        assert!(!tree.has(root, 55), "the other one has it, too");
    }

    #[test]
    fn it_is_left_at_the_end_of_the_transaction() {
        let mut tree = Tree::new(100);
        let root = tree.1;
        tree.0.next();
        tree.insert(55);
        assert!(tree.1 != root && !tree.has(root, 55));
    }

    #[test]
    fn other_trees_and_other_keys_are_not_its_own() {
        let mut tree = Tree::new(3300);
        let leaf = tree.leaf();
        assert!(leaf.is_for(TreeKind::Mappings, tree.1, 1260));
        assert!(!leaf.is_for(TreeKind::Mappings, tree.1, 1259));
        assert!(!leaf.is_for(TreeKind::Details, tree.1, 1260));
        assert!(!leaf.is_for(TreeKind::Mappings, leaf.block, 1260));
        tree.insert(5);
        assert_eq!((tree.leaf().first, tree.leaf().last), (0, 1259));
        assert!(tree.has(tree.1, 5));
    }
}
