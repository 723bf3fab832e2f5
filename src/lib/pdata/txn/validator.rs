//! What a metadata block is wanted as, as the kernel's block validators: verified when it is read, sealed when it is written.

use crate::checksum::{self, BlockKind};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::forest::TreeKind;
use crate::pdata::node::Node;
use crate::units::MetadataBlock;

/// What a block is wanted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Validator {
    /// A node with values of 4 bytes.
    Node4,
    /// A node with values of 8 bytes; inner nodes of all trees pass for every kind of node.
    Node8,
    /// A node with values of 16 bytes.
    Node16,
    /// A node with values of 24 bytes.
    Node24,
    /// A bitmap.
    Bitmap,
    /// The metadata space map's index.
    Index,
}

impl Validator {
    pub(super) fn of(kind: TreeKind) -> Self {
        match kind.value_size() {
            4 => Self::Node4,
            16 => Self::Node16,
            24 => Self::Node24,
            _ => Self::Node8,
        }
    }

    pub(super) fn kind(self) -> BlockKind {
        match self {
            Self::Bitmap => BlockKind::Bitmap,
            Self::Index => BlockKind::Index,
            _ => BlockKind::Node,
        }
    }

    fn value_size(self) -> Option<usize> {
        match self {
            Self::Node4 => Some(4),
            Self::Node8 => Some(8),
            Self::Node16 => Some(16),
            Self::Node24 => Some(24),
            _ => None,
        }
    }

    pub(super) fn check(self, block: &[u8], location: MetadataBlock) -> Result<()> {
        let fault = match self.value_size() {
            Some(size) => match Node::parse(block, location, size) {
                Ok(_) => return Ok(()),
                Err(fault) => fault.to_string(),
            },
            None => match checksum::verify(block, self.kind(), location) {
                Ok(()) => return Ok(()),
                Err(fault) => fault.to_string(),
            },
        };
        Err(Error::new(
            ErrorKind::Damaged,
            format!("metadata block {location}: {fault}; run thin_check"),
        ))
    }
}
