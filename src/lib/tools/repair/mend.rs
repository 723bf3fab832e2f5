//! Blocks whose contents can be told in spite of their damage, and an engine that reads them as they should be.
//!
//! Nothing is written: a mend says how to get from what is on the device to what was meant.

use crate::checksum::{self, BlockKind};
use crate::io::{AlignedBuffer, BlockEngine};
use crate::thin::{SUPERBLOCK, Superblock};
use crate::units::{BLOCK_SIZE, MetadataBlock};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::{fmt, io};

/// How the contents of a damaged block are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mend {
    /// One bit is wrong: with it flipped the checksum is right.
    Bit {
        /// Its number, from the beginning of the block.
        bit: u16,
    },
    /// A superblock is right but for what lies behind its fields, which is zeros.
    Tail,
    /// The contents, with the right number and checksum, lie in another block.
    Elsewhere {
        /// That block.
        block: MetadataBlock,
    },
}

impl fmt::Display for Mend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bit { bit } => write!(f, "bit {} of byte {} is flipped", bit % 8, bit / 8),
            Self::Tail => f.write_str("only what lies behind the superblock's fields is damaged"),
            Self::Elsewhere { block } => write!(f, "its contents lie in block {block}"),
        }
    }
}

/// Bytes of a superblock from which on there are zeros: the first sector holds all fields.
pub(super) const SECTOR: usize = 512;

/// Explains a block that is not sealed, if one flipped bit or the end of a superblock does.
pub(super) fn explain(data: &[u8], location: MetadataBlock) -> Option<Mend> {
    let mut mended = [0; BLOCK_SIZE];
    mended.copy_from_slice(data);
    if let Some((kind, bit)) = checksum::flipped_bit(data) {
        mended[bit / 8] ^= 1 << (bit % 8);
        let is_right = checksum::verify(&mended, kind, location).is_ok();
        return is_right.then_some(Mend::Bit { bit: bit as u16 });
    }
    if location == SUPERBLOCK {
        mended[SECTOR..].fill(0);
        let is_right = checksum::verify(&mended, BlockKind::Superblock, location).is_ok();
        return is_right.then_some(Mend::Tail);
    }
    None
}

/// An engine that reads as another one, with the mended blocks as they should be. It cannot be written to.
pub(super) struct MendedEngine<'a> {
    pub(super) engine: &'a dyn BlockEngine,
    pub(super) mends: BTreeMap<MetadataBlock, Mend>,
}

impl fmt::Debug for MendedEngine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.mends.fmt(f)
    }
}

impl MendedEngine<'_> {
    /// The superblock, if its roots can be believed, and whether a restore or repair to this device did not finish.
    pub(super) fn superblock(&self) -> io::Result<(Option<Superblock>, bool)> {
        let mut block = AlignedBuffer::new(1);
        self.read(SUPERBLOCK, block.blocks_mut(1))?;
        let (superblock, faults) =
            Superblock::verify(block.blocks(1), SUPERBLOCK, self.nr_blocks());
        let is_unfinished = faults.contains(&crate::thin::SuperblockFault::Unfinished);
        Ok((superblock, is_unfinished))
    }
}

impl BlockEngine for MendedEngine<'_> {
    fn nr_blocks(&self) -> u64 {
        self.engine.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        self.engine.read(start, buf)?;
        let end = MetadataBlock(start.0 + (buf.len() / BLOCK_SIZE) as u64);
        for (&block, mend) in self.mends.range(start..end) {
            let data = &mut buf[(block.0 - start.0) as usize * BLOCK_SIZE..][..BLOCK_SIZE];
            match *mend {
                Mend::Bit { bit } => data[usize::from(bit / 8)] ^= 1 << (bit % 8),
                Mend::Tail => data[SECTOR..].fill(0),
                Mend::Elsewhere { block } => {
                    let mut other = AlignedBuffer::new(1);
                    self.engine.read(block, other.blocks_mut(1))?;
                    data.copy_from_slice(other.blocks(1));
                }
            }
        }
        Ok(())
    }

    fn write(&self, _: MetadataBlock, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn depth(&self) -> usize {
        self.engine.depth()
    }
}

/// An engine that reads as another one, but for blocks of which a single bit is wrong: these it reads as they were meant. It cannot be
/// written to.
pub struct Mending(pub Arc<dyn BlockEngine>);

impl fmt::Debug for Mending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mending").finish_non_exhaustive()
    }
}

impl BlockEngine for Mending {
    fn nr_blocks(&self) -> u64 {
        self.0.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        self.0.read(start, buf)?;
        for (number, data) in (start.0..).zip(buf.chunks_exact_mut(BLOCK_SIZE)) {
            if checksum::identify(data).is_none()
                && let Some(Mend::Bit { bit }) = explain(data, MetadataBlock(number))
            {
                data[usize::from(bit / 8)] ^= 1 << (bit % 8);
            }
        }
        Ok(())
    }

    fn write(&self, _: MetadataBlock, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn depth(&self) -> usize {
        self.0.depth()
    }
}
