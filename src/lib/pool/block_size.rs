//! Sectors of a data block, and where a sector is in its block.

/// Sectors of 512 bytes of a data block: any multiple of 64 KiB, most often a power of two, by which division is quicker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockSize {
    sectors: u64,
    is_power: bool,
}

impl BlockSize {
    /// `sectors` is not 0.
    pub(crate) fn new(sectors: u64) -> Self {
        Self {
            sectors,
            is_power: sectors.is_power_of_two(),
        }
    }

    #[inline]
    pub(crate) fn sectors(self) -> u64 {
        self.sectors
    }

    /// The block of a sector, and how many sectors of the block come before it.
    #[inline]
    pub(crate) fn split(self, sector: u64) -> (u64, u64) {
        match self.is_power {
            true => (
                sector >> self.sectors.trailing_zeros(),
                sector & (self.sectors - 1),
            ),
            false => (sector / self.sectors, sector % self.sectors),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_is_in_one_block() {
        for sectors in [1, 128, 384, 1 << 21] {
            for sector in [0, 1, 127, 128, 383, 384, 1 << 40, u64::MAX] {
                let (block, within) = BlockSize::new(sectors).split(sector);
                assert!(within < sectors);
                assert_eq!(block * sectors + within, sector);
            }
        }
    }
}
