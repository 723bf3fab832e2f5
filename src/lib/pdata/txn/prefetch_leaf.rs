//! Prefetches the leaf of a block that is looked up soon, so that the lookup need not wait for memory.
//!
//! Inner nodes are at hand: there are few. They are looked at here; of the leaf memory is only asked for. Nothing is locked, read or
//! noted, and what was torn leads nowhere.

use super::block_manager::BlockManager;
use super::btree::MOST_LEVELS;
use super::schemes::Roots;

/// Does so for a block of a device.
pub(crate) fn prefetch_leaf(blocks: &BlockManager, roots: &Roots, (device, block): (u64, u64)) {
    let Some(root) = roots.root() else { return };
    let (mut node, mut key, mut is_top) = (root, device, true);
    for _ in 0..MOST_LEVELS {
        let Ok(peek) = blocks.peek_unmarked(node) else {
            return;
        };
        let view = peek.view();
        let Some(at) = view.floor(key) else { return };
        let child = view.child(at);
        match (view.is_leaf(), is_top) {
            (true, true) => (key, is_top) = (block, false),
            (true, false) => return,
            (false, true) => {}
            (false, false) => {
                let first = blocks.peek_unmarked(view.child(0));
                if first.is_ok_and(|first| first.view().is_leaf()) {
                    if let Ok(leaf) = blocks.peek_unmarked(child) {
                        leaf.view().prefetch(view, at, key);
                    }
                    return;
                }
            }
        }
        node = child;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RamEngine;
    use crate::pdata::forest::TreeKind;
    use crate::pdata::txn::{Transaction, cell};
    use crate::units::MetadataBlock;
    use std::sync::Arc;

    #[test]
    fn nothing_is_read_or_noted_of_any_block_there_is_or_is_not() {
        // The smallest cache there is has a sixth of the leaves.
        let blocks = Arc::new(BlockManager::new(Arc::new(RamEngine::new(2048)), 0));
        let (mut txn, top, _) = Transaction::format(Arc::clone(&blocks)).unwrap();
        let mut root = txn.new_tree(TreeKind::Mappings).unwrap();
        for key in 0..100_000 {
            let inserted = txn.insert(TreeKind::Mappings, root, key, cell(key << 24));
            root = inserted.unwrap().root;
        }
        let top = txn.insert(TreeKind::TopLevel, top, 7, cell(root.0));
        let roots = Roots::new(top.unwrap().root);
        let (before, table) = (blocks.io(), blocks.cache_use());
        assert!(blocks.unmark_all() > 0);
        for block in (0..110_000).chain([1 << 40, u64::MAX]) {
            prefetch_leaf(&blocks, &roots, (7, block));
            prefetch_leaf(&blocks, &roots, (8, block));
        }
        // A root that is no node, and one that is no block.
        for wrong in [1, 1 << 40, u64::MAX] {
            prefetch_leaf(&blocks, &Roots::new(MetadataBlock(wrong)), (7, 0));
        }
        assert_eq!((blocks.io(), blocks.cache_use()), (before, table));
        assert_eq!(blocks.unmark_all(), 0);
        let found = txn.lookup(TreeKind::Mappings, root, 99_999).unwrap();
        assert_eq!(found, Some(cell(99_999 << 24)));
    }
}
