//! The lines that dmsetup loads a pool with.

/// The optional words of a pool's table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// New blocks are not zeroed.
    pub skip_block_zeroing: bool,
    /// Discards are not supported.
    pub ignore_discard: bool,
    /// Discards unmap, but are not passed down to the data device.
    pub no_discard_passdown: bool,
    /// The metadata is not changed.
    pub read_only: bool,
    /// Writes that need a block when there is none fail at once.
    pub error_if_no_space: bool,
}

/// A pool's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolTable {
    /// The metadata device, as it was named.
    pub metadata_device: String,
    /// The data device, as it was named.
    pub data_device: String,
    /// Sectors of 512 bytes in a data block.
    pub block_sectors: u32,
    /// Free data blocks at which the manager is told.
    pub low_water_blocks: u64,
    /// What was asked for.
    pub features: Features,
}
