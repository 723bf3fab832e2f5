//! The records of thin metadata: superblock, device details, mapping values.

mod block_time;
mod device_detail;
mod pool_metadata;
mod recent_mappings;
mod shared_metadata;
mod superblock;

pub use block_time::BlockTime;
pub use device_detail::DeviceDetail;
pub use pool_metadata::{DEFAULT_CACHE, Lookup, PoolMetadata, PoolStatus};
pub use shared_metadata::{OpenThin, Reader, SharedMetadata, TryLookup};
pub(crate) use superblock::read_block;
pub use superblock::{
    Fields, MARKER, NEEDS_CHECK, SUPERBLOCK, Superblock, SuperblockFault, VERSION,
};
