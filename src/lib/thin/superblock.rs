//! Block 0: where everything else is. Facts: `FORMAT.md`, "Superblock".
//!
//! [`Fields`] are whatever the block says; a [`Superblock`] has been verified against its seal, its magic and the device, so
//! that its roots can be followed.

use crate::bytes::{get_u32, get_u64, put_u32, put_u64};
use crate::checksum::{self, BlockKind, SealFault};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine};
use crate::pdata::SpaceMapRoot;
use crate::units::{
    BLOCK_SIZE, MAGIC, MAX_METADATA_BLOCKS, MAX_TIME, MetadataBlock, is_legal_data_block_size,
};
use std::fmt;
use std::ops::Deref;

/// Where the superblock lies.
pub const SUPERBLOCK: MetadataBlock = MetadataBlock(0);
/// The version that the kernel writes.
pub const VERSION: u32 = 2;
/// The flag that an aborted transaction leaves behind.
pub const NEEDS_CHECK: u32 = 1;
/// What block 0 holds while a device is being written. Not zeros: of those the kernel would make a new, empty pool.
pub const MARKER: &[u8] =
    b"thintools: writing metadata to this device has not finished; run the command again\n";
const METADATA_BLOCK_SECTORS: u32 = 8;

/// The fields of a superblock, not judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// [`NEEDS_CHECK`], and bits without a meaning.
    pub flags: u32,
    /// Zeros from the kernel.
    pub uuid: [u8; 16],
    /// [`MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// The snapshot clock.
    pub time: u32,
    /// The transaction id of whoever manages the pool (LVM, Stratis).
    pub transaction_id: u64,
    /// Block of the metadata snapshot; 0 is none.
    pub held_root: MetadataBlock,
    /// Root of the data space map.
    pub data_space_map: SpaceMapRoot,
    /// Root of the metadata space map.
    pub metadata_space_map: SpaceMapRoot,
    /// Root of the top-level tree.
    pub mapping_root: MetadataBlock,
    /// Root of the device details tree.
    pub details_root: MetadataBlock,
    /// Sectors of 512 bytes in a data block.
    pub data_block_size: u32,
    /// Sectors in a metadata block: 8.
    pub metadata_block_size: u32,
    /// Size of the metadata device when it was formatted, in blocks; not kept up to date.
    pub metadata_nr_blocks: u64,
    /// Feature bits that any reader may ignore.
    pub compat_flags: u32,
    /// Feature bits that forbid writing to those who do not know them.
    pub compat_ro_flags: u32,
    /// Feature bits that forbid any use to those who do not know them.
    pub incompat_flags: u32,
}

impl Fields {
    /// Reads the fields of a block of 4096 bytes.
    pub fn unpack(block: &[u8]) -> Self {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&block[16..32]);
        Self {
            flags: get_u32(block, 4),
            uuid,
            magic: get_u64(block, 32),
            version: get_u32(block, 40),
            time: get_u32(block, 44),
            transaction_id: get_u64(block, 48),
            held_root: MetadataBlock(get_u64(block, 56)),
            data_space_map: SpaceMapRoot::unpack(&block[64..]),
            metadata_space_map: SpaceMapRoot::unpack(&block[192..]),
            mapping_root: MetadataBlock(get_u64(block, 320)),
            details_root: MetadataBlock(get_u64(block, 328)),
            data_block_size: get_u32(block, 336),
            metadata_block_size: get_u32(block, 340),
            metadata_nr_blocks: get_u64(block, 344),
            compat_flags: get_u32(block, 352),
            compat_ro_flags: get_u32(block, 356),
            incompat_flags: get_u32(block, 360),
        }
    }

    /// The sealed block 0 with these fields and zeros elsewhere.
    pub fn pack(&self) -> [u8; BLOCK_SIZE] {
        let mut block = [0; BLOCK_SIZE];
        put_u32(&mut block, 4, self.flags);
        block[16..32].copy_from_slice(&self.uuid);
        put_u64(&mut block, 32, self.magic);
        put_u32(&mut block, 40, self.version);
        put_u32(&mut block, 44, self.time);
        put_u64(&mut block, 48, self.transaction_id);
        put_u64(&mut block, 56, self.held_root.0);
        self.data_space_map.pack(&mut block[64..]);
        self.metadata_space_map.pack(&mut block[192..]);
        put_u64(&mut block, 320, self.mapping_root.0);
        put_u64(&mut block, 328, self.details_root.0);
        put_u32(&mut block, 336, self.data_block_size);
        put_u32(&mut block, 340, self.metadata_block_size);
        put_u64(&mut block, 344, self.metadata_nr_blocks);
        put_u32(&mut block, 352, self.compat_flags);
        put_u32(&mut block, 356, self.compat_ro_flags);
        put_u32(&mut block, 360, self.incompat_flags);
        checksum::seal(&mut block, BlockKind::Superblock, SUPERBLOCK);
        block
    }

    /// True when an aborted transaction left the needs_check flag behind.
    pub fn needs_check(&self) -> bool {
        self.flags & NEEDS_CHECK != 0
    }

    /// The fields that a fresh pool's superblock has whatever its contents.
    pub fn fresh(metadata_nr_blocks: u64) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION,
            metadata_block_size: METADATA_BLOCK_SECTORS,
            metadata_nr_blocks,
            ..Self::default()
        }
    }

    /// Everything in these fields that is wrong or unusual, on a device of `device_blocks` blocks.
    pub fn faults(&self, device_blocks: u64) -> Vec<SuperblockFault> {
        use SuperblockFault as F;
        if self.magic != MAGIC {
            return vec![F::Magic(self.magic)];
        }
        let nr_blocks = self.metadata_space_map.nr_blocks;
        let usable = nr_blocks.min(device_blocks);
        let roots = [
            ("mapping root", self.mapping_root),
            ("device details root", self.details_root),
            (
                "data space map's index root",
                self.data_space_map.bitmap_root,
            ),
            (
                "data space map's count root",
                self.data_space_map.ref_count_root,
            ),
            (
                "metadata space map's index",
                self.metadata_space_map.bitmap_root,
            ),
            (
                "metadata space map's count root",
                self.metadata_space_map.ref_count_root,
            ),
        ];
        let lost = |&&(_, block): &&(&str, MetadataBlock)| block == SUPERBLOCK || block.0 >= usable;
        let flagged = |bits: u32, fault: fn(u32) -> F| (bits != 0).then(|| fault(bits));
        let mut faults: Vec<F> = [
            flagged(self.incompat_flags, F::IncompatFlags),
            flagged(self.compat_ro_flags, F::CompatRoFlags),
            flagged(self.compat_flags, F::CompatFlags),
            flagged(self.flags & !NEEDS_CHECK, F::UnknownFlags),
            (self.version != VERSION).then_some(F::Version(self.version)),
            (!is_legal_data_block_size(self.data_block_size))
                .then_some(F::DataBlockSize(self.data_block_size)),
            (self.metadata_block_size != METADATA_BLOCK_SECTORS)
                .then_some(F::MetadataBlockSize(self.metadata_block_size)),
            (self.time > MAX_TIME).then_some(F::Time(self.time)),
            (self.time == MAX_TIME).then_some(F::LastTime),
            (nr_blocks > MAX_METADATA_BLOCKS).then_some(F::TooLarge { nr_blocks }),
            (nr_blocks > device_blocks).then_some(F::DeviceTooSmall {
                nr_blocks,
                device_blocks,
            }),
        ]
        .into_iter()
        .flatten()
        .collect();
        faults.extend(roots.iter().filter(lost).map(|&(name, block)| F::Root {
            name,
            block,
            limit: usable,
        }));
        faults
    }
}

/// Something wrong or unusual about a superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuperblockFault {
    /// [`MARKER`] stands in its place: a restore or repair to this device did not finish.
    Unfinished,
    /// Checksum or place.
    Seal(SealFault),
    /// Not the number that thin metadata begins with.
    Magic(u64),
    /// Unknown incompatible features: the kernel refuses the pool.
    IncompatFlags(u32),
    /// Unknown features that forbid writing: the kernel refuses to activate the pool read-write.
    CompatRoFlags(u32),
    /// Unknown features that may be ignored.
    CompatFlags(u32),
    /// Bits without a meaning in the flags.
    UnknownFlags(u32),
    /// Not version 2; the kernel does not look.
    Version(u32),
    /// No table can have this block size, so no pool can be activated with it.
    DataBlockSize(u32),
    /// Not 8 sectors; the kernel does not look.
    MetadataBlockSize(u32),
    /// The clock does not fit a mapping's 24 bits any more: the kernel would write wrong data blocks.
    Time(u32),
    /// The clock cannot advance any more.
    LastTime,
    /// More metadata blocks than the format can index.
    TooLarge {
        /// Blocks, as the space map says.
        nr_blocks: u64,
    },
    /// The device is smaller than its metadata.
    DeviceTooSmall {
        /// Blocks, as the space map says.
        nr_blocks: u64,
        /// Blocks of the device.
        device_blocks: u64,
    },
    /// A root that cannot be followed.
    Root {
        /// Which root.
        name: &'static str,
        /// Where it points.
        block: MetadataBlock,
        /// The first block that does not exist.
        limit: u64,
    },
}

impl SuperblockFault {
    /// True when the metadata behind this superblock cannot be read because of it.
    pub fn forbids_reading(&self) -> bool {
        matches!(
            self,
            Self::Unfinished
                | Self::Seal(_)
                | Self::Magic(_)
                | Self::IncompatFlags(_)
                | Self::TooLarge { .. }
        )
    }
}

impl fmt::Display for SuperblockFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unfinished => f.write_str("writing metadata to this device has not finished"),
            Self::Seal(fault) => fault.fmt(f),
            Self::Magic(magic) => write!(f, "the magic is {magic}, thin metadata has {MAGIC}"),
            Self::IncompatFlags(bits) => write!(f, "unknown incompatible feature bits {bits:#x}"),
            Self::CompatRoFlags(bits) => {
                write!(f, "unknown feature bits {bits:#x} that forbid writing")
            }
            Self::CompatFlags(bits) => write!(f, "unknown compatible feature bits {bits:#x}"),
            Self::UnknownFlags(bits) => write!(f, "flag bits {bits:#x} have no meaning"),
            Self::Version(version) => {
                write!(f, "version is {version}, the kernel writes {VERSION}")
            }
            Self::DataBlockSize(sectors) => write!(
                f,
                "data block size is {sectors} sectors; legal are 128 to 2097152 in steps of 128"
            ),
            Self::MetadataBlockSize(sectors) => {
                write!(f, "metadata block size is {sectors} sectors, always 8")
            }
            Self::Time(time) => write!(
                f,
                "the snapshot clock is {time}; mappings hold at most {MAX_TIME}"
            ),
            Self::LastTime => write!(
                f,
                "the snapshot clock is {MAX_TIME}: there is no time for another snapshot"
            ),
            Self::TooLarge { nr_blocks } => write!(
                f,
                "the metadata space map counts {nr_blocks} blocks; the format holds {MAX_METADATA_BLOCKS}"
            ),
            Self::DeviceTooSmall {
                nr_blocks,
                device_blocks,
            } => write!(
                f,
                "the metadata has {nr_blocks} blocks, the device only {device_blocks}"
            ),
            Self::Root { name, block, limit } => {
                write!(
                    f,
                    "the {name} is block {block}; blocks 1 to {} exist",
                    limit.saturating_sub(1)
                )
            }
        }
    }
}

/// A superblock whose seal and magic are right and whose metadata can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    fields: Fields,
}

impl Deref for Superblock {
    type Target = Fields;

    fn deref(&self) -> &Fields {
        &self.fields
    }
}

impl Superblock {
    /// Verifies a block read from `location`; every fault comes back, and a superblock unless one forbids reading.
    pub fn verify(
        block: &[u8],
        location: MetadataBlock,
        device_blocks: u64,
    ) -> (Option<Self>, Vec<SuperblockFault>) {
        if block.starts_with(MARKER) {
            return (None, vec![SuperblockFault::Unfinished]);
        }
        if let Err(fault) = checksum::verify(block, BlockKind::Superblock, location) {
            return (None, vec![SuperblockFault::Seal(fault)]);
        }
        let fields = Fields::unpack(block);
        let faults = fields.faults(device_blocks);
        let readable = !faults.iter().any(SuperblockFault::forbids_reading);
        (readable.then_some(Self { fields }), faults)
    }

    /// Reads and verifies block 0.
    ///
    /// # Errors
    /// `Io` when it cannot be read, `Damaged` when it cannot be used.
    pub fn read(engine: &dyn BlockEngine) -> Result<Self> {
        Self::read_at(engine, SUPERBLOCK)
    }

    /// Reads and verifies the superblock at `location`: block 0, or the copy that a metadata snapshot holds.
    pub fn read_at(engine: &dyn BlockEngine, location: MetadataBlock) -> Result<Self> {
        let block = read_block(engine, location)?;
        let (superblock, faults) = Self::verify(block.blocks(1), location, engine.nr_blocks());
        superblock.ok_or_else(|| {
            let fault = faults.iter().find(|f| f.forbids_reading());
            let fault = fault.map_or_else(String::new, ToString::to_string);
            let next = if faults.contains(&SuperblockFault::Unfinished) {
                "; run the thin_restore or thin_repair that was to fill it again"
            } else if location == SUPERBLOCK {
                "; thin_check says what the kernel would do, thin_repair can rebuild it on another device"
            } else {
                ""
            };
            Error::new(
                ErrorKind::Damaged,
                format!("bad superblock in block {location}: {fault}{next}"),
            )
        })
    }
}

/// One block, read into memory of its own.
pub(crate) fn read_block(
    engine: &dyn BlockEngine,
    location: MetadataBlock,
) -> Result<AlignedBuffer> {
    let mut buffer = AlignedBuffer::new(1);
    engine
        .read(location, buffer.blocks_mut(1))
        .map_err(|e| Error::io(format!("cannot read metadata block {location}"), e))?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable() -> Fields {
        let root = |nr_blocks, at| SpaceMapRoot {
            nr_blocks,
            nr_allocated: 3,
            bitmap_root: MetadataBlock(at),
            ref_count_root: MetadataBlock(at + 1),
        };
        Fields {
            mapping_root: MetadataBlock(6),
            details_root: MetadataBlock(7),
            data_space_map: root(1024, 4),
            metadata_space_map: root(64, 1),
            data_block_size: 128,
            ..Fields::fresh(64)
        }
    }

    #[test]
    fn fields_survive_packing_and_one_flipped_byte_does_not() {
        let fields = Fields {
            uuid: *b"0123456789abcdef",
            time: 3,
            transaction_id: 4,
            held_root: MetadataBlock(9),
            flags: NEEDS_CHECK,
            ..usable()
        };
        let mut block = fields.pack();
        assert_eq!(Fields::unpack(&block), fields);
        assert_eq!(Superblock::verify(&block, SUPERBLOCK, 64).1, []);
        block[45] ^= 1;
        assert!(Superblock::verify(&block, SUPERBLOCK, 64).0.is_none());
    }

    #[test]
    fn each_bound_at_its_edge_and_past_it() {
        use SuperblockFault as F;
        let with = |change: fn(&mut Fields)| {
            let mut fields = usable();
            change(&mut fields);
            fields.faults(64)
        };
        assert_eq!(with(|_| ()), []);
        assert_eq!(with(|f| f.time = MAX_TIME), [F::LastTime]);
        assert_eq!(with(|f| f.time = MAX_TIME + 1), [F::Time(MAX_TIME + 1)]);
        assert_eq!(with(|f| f.incompat_flags = 1), [F::IncompatFlags(1)]);
        assert_eq!(with(|f| f.magic += 1), [F::Magic(MAGIC + 1)]);
        assert_eq!(
            with(|f| f.metadata_space_map.nr_blocks = 65),
            [F::DeviceTooSmall {
                nr_blocks: 65,
                device_blocks: 64
            }]
        );
        assert!(matches!(
            with(|f| f.mapping_root.0 = 64)[..],
            [F::Root { .. }]
        ));
        assert!(matches!(
            with(|f| f.mapping_root.0 = 0)[..],
            [F::Root { .. }]
        ));
        assert_eq!(with(|f| f.mapping_root.0 = 63), []);
    }
}
