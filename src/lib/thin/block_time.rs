//! The value of a mapping: which data block, and when it was mapped. Facts: `FORMAT.md`, "Mapping tree".

use crate::units::{DataBlock, MAX_TIME};

const TIME_BITS: u32 = 24;

/// A data block (40 bits) and the superblock's time when it was mapped (24 bits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockTime {
    /// The data block.
    pub block: DataBlock,
    /// The snapshot clock at the time of mapping, at most 2^24 - 1.
    pub time: u32,
}

impl BlockTime {
    /// Reads the packed value.
    pub fn unpack(value: u64) -> Self {
        Self {
            block: DataBlock(value >> TIME_BITS),
            time: value as u32 & MAX_TIME,
        }
    }

    /// The packed value. A time past 24 bits or a block past 40 cannot be packed; callers refuse them first.
    pub fn pack(self) -> u64 {
        self.block.0 << TIME_BITS | u64::from(self.time & MAX_TIME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_as_documented() {
        let value = BlockTime {
            block: DataBlock(5),
            time: 1,
        };
        assert_eq!(value.pack(), 0x0500_0001);
        let largest = BlockTime {
            block: DataBlock((1 << 40) - 1),
            time: MAX_TIME,
        };
        assert_eq!(BlockTime::unpack(largest.pack()), largest);
        assert_eq!(largest.pack(), u64::MAX);
    }
}
