//! Persistent data that changes: block manager, transaction manager, space maps and btrees, as the kernel's persistent-data library
//! has them.

mod block_manager;
mod block_set;
mod btree;
mod cursor;
mod epoch;
mod map_blocks;
mod maps;
mod open_leaf;
mod prefetch_leaf;
mod schemes;
mod transaction;
mod validator;
mod version_lock;
mod view;

pub use block_manager::{BlockIo, BlockManager, CacheUse};
pub(crate) use epoch::Place;
pub(crate) use prefetch_leaf::prefetch_leaf;
pub(crate) use schemes::{A, B, Found, Kernel, NoTally, Optimistic, Roots, V2013, lookup};
pub use schemes::{LockScheme, LookupCounts, WouldBlock};
pub(crate) use transaction::LowSpace;
pub use transaction::Transaction;
pub(crate) use view::{Cell, cell};
