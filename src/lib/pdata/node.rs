//! A btree node, verified before any of its entries can be reached.
//!
//! Facts: `FORMAT.md`, "Btree node". Everything that an entry access relies on (counts, sizes, key order) is proved by
//! [`Node::parse`]; after that no access can leave the block.

use crate::bytes::{get_u32, get_u64};
use crate::checksum::{self, BlockKind, SealFault};
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::fmt;

/// Bytes before the keys.
pub const NODE_HEADER: usize = 32;
pub(super) const FLAG_INTERNAL: u32 = 1;
pub(super) const FLAG_LEAF: u32 = 2;

/// Entries that fit a node with values of `value_size` bytes: a multiple of three, as the kernel lays nodes out.
pub const fn max_entries(value_size: usize) -> usize {
    (BLOCK_SIZE - NODE_HEADER) / (8 + value_size) / 3 * 3
}

/// Why a block is not the node that its parent promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeFault {
    /// Checksum, kind or place.
    Seal(SealFault),
    /// Neither leaf nor internal, or both.
    Flags(u32),
    /// Values of another size than this tree's.
    ValueSize {
        /// Bytes, as the node says.
        found: u32,
        /// Bytes, as the tree needs.
        expected: u32,
    },
    /// Not the capacity that follows from the value size; keys and values would be read from the wrong places.
    MaxEntries {
        /// As the node says.
        found: u32,
        /// As the value size gives.
        expected: u32,
    },
    /// More entries than capacity.
    TooManyEntries {
        /// Entries, as the node says.
        found: u32,
        /// Its capacity.
        max: u32,
    },
    /// An internal node without a child.
    NoChildren,
    /// A key is not larger than the one before it.
    KeyOrder {
        /// Index of the later key.
        index: usize,
        /// The key before it.
        previous: u64,
        /// The key itself.
        key: u64,
    },
}

impl fmt::Display for NodeFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seal(fault) => fault.fmt(f),
            Self::Flags(flags) => {
                write!(f, "flags are {flags:#x}, neither 1 (internal) nor 2 (leaf)")
            }
            Self::ValueSize { found, expected } => {
                write!(f, "values are {found} bytes, this tree's are {expected}")
            }
            Self::MaxEntries { found, expected } => {
                write!(
                    f,
                    "capacity is {found} entries, the layout gives {expected}"
                )
            }
            Self::TooManyEntries { found, max } => {
                write!(f, "{found} entries in a node that holds {max}")
            }
            Self::NoChildren => f.write_str("an internal node without children"),
            Self::KeyOrder {
                index,
                previous,
                key,
            } => write!(f, "key {index} is {key}, not above {previous} before it"),
        }
    }
}

/// A verified node, borrowed from the block that holds it.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    block: &'a [u8],
    location: MetadataBlock,
    is_leaf: bool,
    entries: usize,
    value_size: usize,
}

impl<'a> Node<'a> {
    /// Verifies `block` (4096 bytes, read from `location`) as a node of a tree whose leaves hold values of `value_size`.
    pub fn parse(
        block: &'a [u8],
        location: MetadataBlock,
        value_size: usize,
    ) -> Result<Self, NodeFault> {
        checksum::verify(block, BlockKind::Node, location).map_err(NodeFault::Seal)?;
        let is_leaf = match get_u32(block, 4) {
            FLAG_LEAF => true,
            FLAG_INTERNAL => false,
            flags => return Err(NodeFault::Flags(flags)),
        };
        let value_size = if is_leaf { value_size } else { 8 };
        let found = get_u32(block, 24);
        if found as usize != value_size {
            return Err(NodeFault::ValueSize {
                found,
                expected: value_size as u32,
            });
        }
        let max = max_entries(value_size);
        let found = get_u32(block, 20);
        if found as usize != max {
            return Err(NodeFault::MaxEntries {
                found,
                expected: max as u32,
            });
        }
        let entries = get_u32(block, 16);
        if entries as usize > max {
            return Err(NodeFault::TooManyEntries {
                found: entries,
                max: max as u32,
            });
        }
        let node = Self {
            block,
            location,
            is_leaf,
            entries: entries as usize,
            value_size,
        };
        if !is_leaf && entries == 0 {
            return Err(NodeFault::NoChildren);
        }
        let mut keys = node.keys();
        if let Some(mut previous) = keys.next() {
            for (index, key) in keys.enumerate() {
                if key <= previous {
                    return Err(NodeFault::KeyOrder {
                        index: index + 1,
                        previous,
                        key,
                    });
                }
                previous = key;
            }
        }
        Ok(node)
    }

    /// Where the node lies.
    pub fn location(&self) -> MetadataBlock {
        self.location
    }

    /// True for a leaf, false for a node whose values are block numbers of children.
    pub fn is_leaf(&self) -> bool {
        self.is_leaf
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// True for the empty leaf that an empty tree is.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// The key of entry `index`, which must be below [`len`](Self::len).
    pub fn key(&self, index: usize) -> u64 {
        get_u64(self.block, NODE_HEADER + 8 * index)
    }

    /// The keys, strictly ascending.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = u64> + use<'a> {
        self.block[NODE_HEADER..NODE_HEADER + 8 * self.entries]
            .chunks_exact(8)
            .map(|bytes| get_u64(bytes, 0))
    }

    /// The values as bytes, in key order.
    pub fn values(&self) -> impl ExactSizeIterator<Item = &'a [u8]> + use<'a> {
        let start = NODE_HEADER + 8 * max_entries(self.value_size);
        self.block[start..start + self.value_size * self.entries].chunks_exact(self.value_size)
    }

    /// The values of a tree that holds `u64` (mappings, device roots, children), in key order.
    pub fn values_u64(&self) -> impl ExactSizeIterator<Item = u64> + use<'a> {
        self.values().map(|bytes| get_u64(bytes, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::{put_u32, put_u64};

    fn leaf(keys: &[u64], value_size: usize) -> Vec<u8> {
        let mut block = vec![0; BLOCK_SIZE];
        put_u32(&mut block, 4, FLAG_LEAF);
        put_u32(&mut block, 16, keys.len() as u32);
        put_u32(&mut block, 20, max_entries(value_size) as u32);
        put_u32(&mut block, 24, value_size as u32);
        for (i, &key) in keys.iter().enumerate() {
            put_u64(&mut block, NODE_HEADER + 8 * i, key);
        }
        checksum::seal(&mut block, BlockKind::Node, MetadataBlock(9));
        block
    }

    fn reseal(block: &mut [u8], offset: usize, value: u32) -> Result<(), NodeFault> {
        put_u32(block, offset, value);
        checksum::seal(block, BlockKind::Node, MetadataBlock(9));
        Node::parse(block, MetadataBlock(9), 8).map(|_| ())
    }

    #[test]
    fn capacities_are_the_kernels() {
        assert_eq!([8, 24, 16, 4].map(max_entries), [252, 126, 168, 336]);
    }

    #[test]
    fn entries_come_back() {
        let block = leaf(&[3, 5, 9], 8);
        let node = Node::parse(&block, MetadataBlock(9), 8).unwrap();
        assert_eq!(node.keys().collect::<Vec<_>>(), [3, 5, 9]);
        assert_eq!(node.values_u64().len(), 3);
        assert!(node.is_leaf());
    }

    #[test]
    fn each_header_field_at_and_past_its_bound() {
        let good = leaf(&[1, 2], 8);
        assert_eq!(reseal(&mut good.clone(), 16, 0), Ok(()));
        assert!(matches!(
            reseal(&mut good.clone(), 16, 253),
            Err(NodeFault::TooManyEntries { .. })
        ));
        assert!(matches!(
            reseal(&mut good.clone(), 16, u32::MAX),
            Err(NodeFault::TooManyEntries { .. })
        ));
        assert!(matches!(
            reseal(&mut good.clone(), 20, 251),
            Err(NodeFault::MaxEntries { .. })
        ));
        assert!(matches!(
            reseal(&mut good.clone(), 24, 24),
            Err(NodeFault::ValueSize { .. })
        ));
        assert!(matches!(
            reseal(&mut good.clone(), 4, 0),
            Err(NodeFault::Flags(0))
        ));
        assert!(matches!(
            reseal(&mut good.clone(), 4, 3),
            Err(NodeFault::Flags(3))
        ));
        assert!(matches!(
            reseal(&mut leaf(&[], 8), 4, 1),
            Err(NodeFault::NoChildren)
        ));
    }

    #[test]
    fn equal_or_descending_keys_are_refused() {
        for keys in [[4, 4], [4, 3]] {
            let block = leaf(&keys, 8);
            assert!(matches!(
                Node::parse(&block, MetadataBlock(9), 8),
                Err(NodeFault::KeyOrder {
                    index: 1,
                    previous: 4,
                    ..
                })
            ));
        }
    }
}
