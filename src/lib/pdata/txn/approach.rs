//! Has the leaf of a block that is looked up soon come closer, so that the lookup need not wait for memory.
//!
//! Inner nodes are at hand: there are few. They are looked at here; of the leaf memory is only asked for. Nothing is locked, read or
//! noted, and what was torn leads nowhere.

use super::block_manager::BlockManager;
use super::btree::MOST_LEVELS;
use super::schemes::Roots;

/// Does so for a block of a device.
pub(crate) fn approach(blocks: &BlockManager, roots: &Roots, (device, block): (u64, u64)) {
    let Some(root) = roots.root() else { return };
    let (mut node, mut key, mut is_top) = (root, device, true);
    for _ in 0..MOST_LEVELS {
        let Ok(peek) = blocks.glance(node) else {
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
                let first = blocks.glance(view.child(0));
                if first.is_ok_and(|first| first.view().is_leaf()) {
                    if let Ok(leaf) = blocks.glance(child) {
                        leaf.view().prefetch_leaf(view, at, key);
                    }
                    return;
                }
            }
        }
        node = child;
    }
}
