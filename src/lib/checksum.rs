//! CRC-32C with the constant of each block kind: identify, verify, seal.
//!
//! Facts: `FORMAT.md`, "Conventions". The checksum covers bytes 4 to 4095; bytes 8 to 15 hold the block's own number, which
//! catches misdirected writes and stale copies.

use crate::bytes::{get_u32, get_u64, is_zeroed, put_u32, put_u64};
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;

/// The four kinds of metadata block, told apart by the constant in their checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlockKind {
    /// Block 0, and the copy that a metadata snapshot holds.
    Superblock,
    /// A node of any btree.
    Node,
    /// A bitmap of either space map.
    Bitmap,
    /// The metadata space map's index of bitmaps.
    Index,
}

impl BlockKind {
    const ALL: [Self; 4] = [Self::Superblock, Self::Node, Self::Bitmap, Self::Index];

    fn salt(self) -> u32 {
        match self {
            Self::Superblock => 160_774,
            Self::Node => 121_107,
            Self::Bitmap => 240_779,
            Self::Index => 160_478,
        }
    }
}

impl fmt::Display for BlockKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Superblock => "superblock",
            Self::Node => "btree node",
            Self::Bitmap => "space-map bitmap",
            Self::Index => "space-map index",
        })
    }
}

/// Why a block is not a sealed block of the expected kind at the expected place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealFault {
    /// Every byte is zero.
    Zeroed,
    /// The checksum is that of another kind of block.
    WrongKind {
        /// The kind that the checksum proves.
        found: BlockKind,
    },
    /// The checksum fits no kind.
    Checksum {
        /// What bytes 0..4 say.
        stored: u32,
        /// What they would be for the expected kind.
        computed: u32,
    },
    /// The checksum is right but the block was written for another place.
    Location {
        /// The block number found in the block.
        found: u64,
    },
}

impl fmt::Display for SealFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zeroed => f.write_str("the block is all zeros"),
            Self::WrongKind { found } => write!(f, "the block is a {found}"),
            Self::Checksum { stored, computed } => {
                write!(
                    f,
                    "checksum is {stored:#010x}, contents give {computed:#010x}"
                )
            }
            Self::Location { found } => write!(f, "the block says it is block {found}"),
        }
    }
}

/// The checksum of the contents before the kind's constant is mixed in.
fn contents_sum(block: &[u8]) -> u32 {
    !crc32c::crc32c(&block[4..BLOCK_SIZE])
}

/// The kind that the checksum of `block` proves, if any. The block number is not looked at.
pub fn identify(block: &[u8]) -> Option<BlockKind> {
    let salt = contents_sum(block) ^ get_u32(block, 0);
    BlockKind::ALL.into_iter().find(|kind| kind.salt() == salt)
}

/// CRC-32C's polynomial, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// By how much each bit from byte 4 on, if it flips, changes the checksum; to the number of the bit in the block.
static FLIPS: LazyLock<HashMap<u32, u16>> = LazyLock::new(|| {
    // A byte further from the end has its change pass through eight more steps.
    let step = |mut sum: u32| {
        for _ in 0..8 {
            sum = sum >> 1 ^ if sum & 1 == 1 { POLYNOMIAL } else { 0 };
        }
        sum
    };
    let mut flips = HashMap::with_capacity(8 * BLOCK_SIZE);
    let mut changes: [u32; 8] = std::array::from_fn(|bit| 1 << bit);
    for byte in (4..BLOCK_SIZE).rev() {
        for (bit, change) in changes.iter_mut().enumerate() {
            *change = step(*change);
            flips.insert(*change, (8 * byte + bit) as u16);
        }
    }
    flips
});

/// The one bit, counted from the beginning of the block, whose flip would make `block` sealed as one of the kinds. At this
/// length CRC-32C tells all single and double errors apart, so a block with one flipped bit has exactly one answer; bytes that
/// never were a sealed block have one by chance in 30 000.
pub fn flipped_bit(block: &[u8]) -> Option<(BlockKind, usize)> {
    let difference = contents_sum(block) ^ get_u32(block, 0);
    BlockKind::ALL.into_iter().find_map(|kind| {
        let change = difference ^ kind.salt();
        let bit = match change.count_ones() {
            1 => change.trailing_zeros() as u16,
            _ => *FLIPS.get(&change)?,
        };
        Some((kind, usize::from(bit)))
    })
}

/// The block number that a block claims for itself (bytes 8..16).
pub fn claimed_location(block: &[u8]) -> MetadataBlock {
    MetadataBlock(get_u64(block, 8))
}

/// Verifies that `block` (4096 bytes) is a sealed block of `kind`, written for `location`.
///
/// # Errors
/// The first [`SealFault`]: zeroed, wrong kind, wrong checksum, wrong place.
pub fn verify(block: &[u8], kind: BlockKind, location: MetadataBlock) -> Result<(), SealFault> {
    let sum = contents_sum(block);
    let stored = get_u32(block, 0);
    if sum ^ kind.salt() != stored {
        if is_zeroed(block) {
            return Err(SealFault::Zeroed);
        }
        return Err(
            match BlockKind::ALL
                .into_iter()
                .find(|k| k.salt() == sum ^ stored)
            {
                Some(found) => SealFault::WrongKind { found },
                None => SealFault::Checksum {
                    stored,
                    computed: sum ^ kind.salt(),
                },
            },
        );
    }
    match claimed_location(block) {
        found if found == location => Ok(()),
        found => Err(SealFault::Location { found: found.0 }),
    }
}

/// Writes the block number and the checksum into a block that is about to go to disk.
pub fn seal(block: &mut [u8], kind: BlockKind, location: MetadataBlock) {
    put_u64(block, 8, location.0);
    let sum = contents_sum(block) ^ kind.salt();
    put_u32(block, 0, sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_blocks_verify_and_one_flipped_bit_does_not() {
        for kind in BlockKind::ALL {
            let mut block = vec![0x5a; BLOCK_SIZE];
            seal(&mut block, kind, MetadataBlock(77));
            assert_eq!(verify(&block, kind, MetadataBlock(77)), Ok(()));
            assert_eq!(identify(&block), Some(kind));
            assert_eq!(
                verify(&block, kind, MetadataBlock(78)),
                Err(SealFault::Location { found: 77 })
            );
            for byte in [0, 4, 8, 100, 4095] {
                block[byte] ^= 0x10;
                assert!(matches!(
                    verify(&block, kind, MetadataBlock(77)),
                    Err(SealFault::Checksum { .. })
                ));
                block[byte] ^= 0x10;
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut block: Vec<u8> = (0..BLOCK_SIZE).map(|i| (i * 7 + i / 256) as u8).collect();
        seal(&mut block, BlockKind::Index, MetadataBlock(9));
        assert_eq!(flipped_bit(&block), None);
        for bit in (0..8 * BLOCK_SIZE).step_by(13) {
            block[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(flipped_bit(&block), Some((BlockKind::Index, bit)));
            block[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn another_kind_and_zeros_are_named() {
        let mut block = vec![0; BLOCK_SIZE];
        assert_eq!(
            verify(&block, BlockKind::Node, MetadataBlock(1)),
            Err(SealFault::Zeroed)
        );
        seal(&mut block, BlockKind::Bitmap, MetadataBlock(1));
        assert_eq!(
            verify(&block, BlockKind::Node, MetadataBlock(1)),
            Err(SealFault::WrongKind {
                found: BlockKind::Bitmap
            })
        );
    }
}
