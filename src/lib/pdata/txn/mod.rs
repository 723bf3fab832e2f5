//! Persistent data that changes: block manager, transaction manager, space maps and btrees, as the kernel's persistent-data library
//! has them.

mod block_manager;
mod block_set;
mod btree;
mod maps;
mod transaction;
mod version_lock;
mod view;

pub use block_manager::BlockManager;
pub use transaction::Transaction;
pub(crate) use view::{Cell, cell};
