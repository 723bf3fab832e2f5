//! thin_check: reads everything that the superblock leads to, once, and lists all that is wrong.
//!
//! The order of work is that of `ARCHITECTURE.md`, "The life of a thin_check". Nothing here writes; [`fix`] does, from what a
//! whole and clean enough check has found.

mod damage;
mod fix;
mod mappings;
mod space_maps;
mod trees;
mod verdict;

pub use damage::{Code, Damage, KernelEffect, Severity};
pub use fix::fix;
pub use verdict::{Activation, Verdict};

use self::space_maps::Counted;
use crate::checksum::SealFault;
use crate::error::{Error, Result};
use crate::io::{AlignedBuffer, BlockEngine};
use crate::observer::Observer;
use crate::pdata::Forest;
use crate::thin::{SUPERBLOCK, Superblock, SuperblockFault};
use crate::tools::held_root;
use crate::units::MetadataBlock;
use serde::Serialize;

/// How much is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    #[default]
    All,
    /// Not the mappings, nor the space maps, which count them.
    SkipMappings,
    /// Only block 0.
    SuperblockOnly,
}

/// What to check.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// How much is read.
    pub scope: Scope,
    /// Check the metadata snapshot, which an active pool leaves alone, instead of the pool's current state.
    pub metadata_snap: bool,
    /// Take this block for the root of the top-level tree.
    pub mapping_root: Option<MetadataBlock>,
    /// Take this block for the root of the device details tree.
    pub details_root: Option<MetadataBlock>,
}

/// What a check found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The pool's transaction id, if the superblock can be read.
    pub transaction_id: Option<u64>,
    /// Free metadata blocks by the superblock's own counts.
    pub metadata_free_blocks: Option<u64>,
    /// The needs_check flag is set.
    pub needs_check: bool,
    /// Sectors of 512 bytes that the data device must have at least; the kernel refuses a smaller one.
    pub data_sectors: Option<u64>,
    /// Devices in the top-level tree.
    pub devices: u64,
    /// Mappings of all devices; a shared one counts for each.
    pub mappings: u64,
    /// Everything that is wrong, by block.
    pub damages: Vec<Damage>,
    /// The sum of it.
    pub verdict: Verdict,
}

/// A report, and what a repair in place needs to know beside it.
#[derive(Debug)]
pub struct Checked {
    /// What was found.
    pub report: Report,
    /// Set when everything was read and counted.
    ground: Option<Ground>,
}

/// Proof that everything was read, with what was counted.
#[derive(Debug)]
struct Ground {
    superblock: Superblock,
    counted: Counted,
    /// Latest time of any mapping.
    latest: u32,
}

/// One check under way.
struct Checker<'a> {
    engine: &'a dyn BlockEngine,
    observer: &'a dyn Observer,
    superblock: Superblock,
    forest: Forest,
    damages: Vec<Damage>,
    devices: u64,
    mappings: u64,
    latest: u32,
}

/// Checks the metadata on `engine`.
///
/// # Errors
/// `Io` when block 0 cannot be read, `Unsuitable` when there is no metadata snapshot to check, `Interrupted`. Everything else
/// that is wrong is in the report.
pub fn check(
    engine: &dyn BlockEngine,
    options: &CheckOptions,
    observer: &dyn Observer,
) -> Result<Checked> {
    let mut block = AlignedBuffer::new(1);
    engine
        .read(SUPERBLOCK, block.blocks_mut(1))
        .map_err(|e| Error::io("cannot read the superblock", e))?;
    let (superblock, faults) = Superblock::verify(block.blocks(1), SUPERBLOCK, engine.nr_blocks());
    let mut damages: Vec<Damage> = faults.iter().map(superblock_damage).collect();
    let Some(superblock) = superblock else {
        return Ok(Checked {
            report: report(None, 0, 0, damages),
            ground: None,
        });
    };
    if superblock.needs_check() {
        let message = "needs_check is set: a transaction was aborted (an I/O error, or the metadata device was full)";
        damages.push(Damage::new(Code::NeedsCheck, SUPERBLOCK, message));
    }
    damages.extend(metadata_full(&superblock));
    let mut checker = Checker {
        engine,
        observer,
        superblock,
        forest: Forest::new(
            superblock
                .metadata_space_map
                .nr_blocks
                .min(engine.nr_blocks()),
        ),
        damages,
        devices: 0,
        mappings: 0,
        latest: 0,
    };
    let mut counted = None;
    if options.metadata_snap {
        let snapshot = held_root(engine, &superblock, None)?;
        checker.check_snapshot_alone(&snapshot, options)?;
    } else if options.scope != Scope::SuperblockOnly {
        counted = checker.check_pool(options)?;
    }
    let Checker {
        damages,
        devices,
        mappings,
        latest,
        ..
    } = checker;
    Ok(Checked {
        report: report(Some(&superblock), devices, mappings, damages),
        ground: counted.map(|counted| Ground {
            superblock,
            counted,
            latest,
        }),
    })
}

fn report(
    superblock: Option<&Superblock>,
    devices: u64,
    mappings: u64,
    mut damages: Vec<Damage>,
) -> Report {
    damages.sort_by_key(|d| (d.block, d.code, d.device));
    Report {
        transaction_id: superblock.map(|s| s.transaction_id),
        metadata_free_blocks: superblock.map(|s| {
            let map = &s.metadata_space_map;
            map.nr_blocks.saturating_sub(map.nr_allocated)
        }),
        needs_check: superblock.is_some_and(|s| s.needs_check()),
        data_sectors: superblock.map(|s| {
            s.data_space_map
                .nr_blocks
                .saturating_mul(s.data_block_size.into())
        }),
        devices,
        mappings,
        verdict: Verdict::of(&damages),
        damages,
    }
}

/// Blocks that the kernel keeps back of every metadata device.
fn metadata_reserve(nr_blocks: u64) -> u64 {
    (nr_blocks / 10).min(4096)
}

fn metadata_full(superblock: &Superblock) -> Option<Damage> {
    let map = superblock.metadata_space_map;
    let free = map.nr_blocks.saturating_sub(map.nr_allocated);
    let reserve = metadata_reserve(map.nr_blocks);
    (free <= reserve).then(|| {
        let message = format!(
            "{free} metadata blocks of {} are free, the kernel keeps {reserve} back",
            map.nr_blocks
        );
        Damage::new(Code::MetadataFull, SUPERBLOCK, message)
    })
}

fn superblock_damage(fault: &SuperblockFault) -> Damage {
    use SuperblockFault as F;
    let code = match fault {
        F::Unfinished => Code::SuperblockUnfinished,
        F::Seal(SealFault::Zeroed) => Code::SuperblockZeroed,
        F::Seal(SealFault::Location { .. }) => Code::SuperblockLocation,
        F::Seal(_) => Code::SuperblockSeal,
        F::Magic(_) => Code::SuperblockMagic,
        F::IncompatFlags(_) => Code::SuperblockIncompat,
        F::CompatRoFlags(_) => Code::SuperblockCompatRo,
        F::DataBlockSize(_) => Code::SuperblockBlockSize,
        F::Time(_) => Code::SuperblockTime,
        F::LastTime => Code::SuperblockLastTime,
        F::Root { name, .. } if name.ends_with("index") => Code::SuperblockIndexRoot,
        F::Root { .. } => Code::SuperblockRoot,
        F::TooLarge { .. } | F::DeviceTooSmall { .. } => Code::DeviceTooSmall,
        F::CompatFlags(_) | F::UnknownFlags(_) | F::Version(_) | F::MetadataBlockSize(_) => {
            Code::SuperblockOdd
        }
    };
    Damage::new(code, SUPERBLOCK, fault.to_string())
}
