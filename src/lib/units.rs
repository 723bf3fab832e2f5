//! Numbers that must not be mixed, and the limits of the format.

use serde::Serialize;
use std::fmt;

/// Bytes in a metadata block.
pub const BLOCK_SIZE: usize = 4096;
/// The number at offset 32 of every superblock.
pub const MAGIC: u64 = 27_022_010;
/// Entries (2-bit counts) in one space-map bitmap block.
pub const ENTRIES_PER_BITMAP: u64 = 16_320;
/// Bitmaps that a metadata space map can have: the slots of its index block.
pub const MAX_METADATA_BITMAPS: u64 = 255;
/// Metadata blocks that a pool can use: 255 bitmaps of 16 320 entries, 15.875 GiB.
pub const MAX_METADATA_BLOCKS: u64 = MAX_METADATA_BITMAPS * ENTRIES_PER_BITMAP;
/// Largest time that fits beside a data block in a mapping: 24 bits.
pub const MAX_TIME: u32 = (1 << 24) - 1;
/// Largest device id that the kernel's messages accept: 24 bits.
pub const MAX_THIN_ID: u64 = (1 << 24) - 1;
/// Data blocks that a mapping can name: 40 bits.
pub const MAX_DATA_BLOCKS: u64 = 1 << 40;
/// Smallest data block, and the step between sizes, in sectors of 512 bytes: 64 KiB.
pub const DATA_BLOCK_SIZE_STEP: u32 = 128;
/// Largest data block in sectors of 512 bytes: 1 GiB.
pub const MAX_DATA_BLOCK_SIZE: u32 = 2_097_152;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// A 4 KiB block of the metadata device, counted from 0 (the superblock).
    MetadataBlock
);
number!(
    /// A block of the data device, in units of the pool's data block size.
    DataBlock
);
number!(
    /// A block of a thin device's own address space, in units of the pool's data block size.
    ThinBlock
);
number!(
    /// The number of a thin device in its pool; 0 to 2^24 - 1 from the kernel.
    ThinId
);

/// Says whether the kernel accepts `sectors` as a pool's data block size: 64 KiB to 1 GiB in steps of 64 KiB.
pub fn is_legal_data_block_size(sectors: u32) -> bool {
    (DATA_BLOCK_SIZE_STEP..=MAX_DATA_BLOCK_SIZE).contains(&sectors)
        && sectors.is_multiple_of(DATA_BLOCK_SIZE_STEP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_block_sizes_at_their_edges() {
        for good in [128, 384, 896, 2_097_152] {
            assert!(is_legal_data_block_size(good), "{good}");
        }
        for bad in [0, 7, 64, 127, 192, 2_097_152 + 128, u32::MAX] {
            assert!(!is_legal_data_block_size(bad), "{bad}");
        }
    }
}
