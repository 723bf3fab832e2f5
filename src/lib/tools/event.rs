//! The event stream that joins sources of pool metadata (btrees, XML) with sinks (XML, text, JSON, the restorer).
//!
//! Order: superblock; definitions of shared mappings; devices, each with mappings and references to definitions; end.
//! Within a device (its references opened) and within a definition, virtual blocks ascend.

use crate::error::Result;
use crate::units::{DataBlock, ThinBlock, ThinId};
use serde::Serialize;

/// What a dump says of the pool as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PoolInfo {
    /// Text of the uuid field; empty when it is zeros.
    pub uuid: String,
    /// The snapshot clock.
    pub time: u32,
    /// The transaction id of whoever manages the pool.
    pub transaction: u64,
    /// Superblock flags; 1 is needs_check.
    pub flags: u32,
    /// Superblock version.
    pub version: u32,
    /// Sectors of 512 bytes in a data block.
    pub data_block_size: u32,
    /// Size of the data device in data blocks.
    pub nr_data_blocks: u64,
}

/// A thin device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its number in the pool.
    pub dev_id: ThinId,
    /// Virtual blocks that are mapped.
    pub mapped_blocks: u64,
    /// The pool's transaction id when it was created.
    pub transaction: u64,
    /// The snapshot clock when it was created.
    pub creation_time: u32,
    /// The snapshot clock when it last took part in a snapshot.
    pub snap_time: u32,
}

/// Consecutive virtual blocks mapped to consecutive data blocks at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Run {
    /// First virtual block.
    pub thin_begin: ThinBlock,
    /// First data block.
    pub data_begin: DataBlock,
    /// Number of blocks, at least 1.
    pub length: u64,
    /// The snapshot clock when they were mapped.
    pub time: u32,
}

impl Run {
    /// True when `next` goes on where this run ends, with the same time.
    pub fn continues(&self, next: &Self) -> bool {
        self.time == next.time
            && self.thin_begin.0.checked_add(self.length) == Some(next.thin_begin.0)
            && self.data_begin.0.checked_add(self.length) == Some(next.data_begin.0)
    }
}

/// Receives the events of one pool, in order.
pub trait Sink {
    /// The pool; first of all.
    fn pool(&mut self, pool: &PoolInfo) -> Result<()>;
    /// Mappings that several devices share follow, under this name.
    fn define(&mut self, name: &str) -> Result<()>;
    /// The definition is complete.
    fn end_define(&mut self) -> Result<()>;
    /// A device follows.
    fn device(&mut self, device: &Device) -> Result<()>;
    /// The device is complete.
    fn end_device(&mut self) -> Result<()>;
    /// Mappings of the open definition or device; a batch as large as the source finds handy.
    fn mappings(&mut self, runs: &[Run]) -> Result<()>;
    /// The open device has the mappings of this definition here.
    fn reference(&mut self, name: &str) -> Result<()>;
    /// Everything was told.
    fn end(&mut self) -> Result<()>;
}

/// Can tell a pool's events, as often as asked.
pub trait Source {
    /// Tells everything to `sink`.
    fn emit(&self, sink: &mut dyn Sink) -> Result<()>;
}
