//! What the metadata knows of the bytes of a thin device, in the contexts in which NBD clients ask for it.
//!
//! | context | status |
//! |---|---|
//! | `base:allocation` | 3 (a hole, reads as zeros) if not mapped, 0 if mapped, read from an external origin, or lost |
//! | `qemu:allocation-depth` | 0 not mapped, 1 mapped and nobody else's, 2 shared, or read from an external origin |
//! | `qemu:dirty-bitmap:since-ID` | 1 if mapped otherwise than in thin device ID of the same pool, else 0 |
//! | `dm-thin:time` | the snapshot clock when the block was mapped; 4294967295 if it is not |
//! | `dm-thin:shared` | 1 if somebody else has the block, too |

use super::data_device::SECTOR;
use super::export::{Extent, add_extent};
use super::thin_export::ThinExport;
use crate::error::Result;
use crate::thin::{BlockTime, PoolMetadata};
use crate::units::{ThinBlock, ThinId};
use std::ops::Range;

/// Mappings that one answer looks at.
const MOST_MAPPINGS: usize = 4096;

/// Contexts that every device has.
pub(super) const ALWAYS: [&str; 4] = [
    "base:allocation",
    "qemu:allocation-depth",
    "dm-thin:time",
    "dm-thin:shared",
];

/// The statuses of `base:allocation`.
pub(super) const HOLE: u32 = 3;
pub(super) const ALLOCATED: u32 = 0;

/// A context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Context {
    Allocation,
    Depth,
    Since(ThinId),
    Time,
    Shared,
}

const SINCE: &str = "qemu:dirty-bitmap:since-";

impl Context {
    fn find(name: &str) -> Option<Self> {
        Some(match name {
            "base:allocation" => Self::Allocation,
            "qemu:allocation-depth" => Self::Depth,
            "dm-thin:time" => Self::Time,
            "dm-thin:shared" => Self::Shared,
            name => Self::Since(ThinId(name.strip_prefix(SINCE)?.parse().ok()?)),
        })
    }
}

/// A run of blocks with the same mapping as far as the context tells.
struct Run {
    begin: u64,
    end: u64,
    /// None if it is not mapped.
    mapping: Option<BlockTime>,
    /// Somebody else has the block, too.
    is_shared: bool,
    differs: bool,
    /// What it is mapped to cannot be read.
    is_lost: bool,
}

impl Run {
    fn status(&self, context: Context) -> u32 {
        match (context, self.mapping) {
            (Context::Allocation, None) if self.is_lost => ALLOCATED,
            (Context::Allocation, None) => HOLE,
            (Context::Allocation, Some(_)) => ALLOCATED,
            (Context::Depth | Context::Shared, None) => 0,
            (Context::Depth, Some(_)) => 1 + u32::from(self.is_shared),
            (Context::Shared, Some(_)) => self.is_shared.into(),
            (Context::Since(_), _) => self.differs.into(),
            (Context::Time, mapping) => mapping.map_or(u32::MAX, |mapping| mapping.time),
        }
    }
}

/// Names of the contexts of a device.
pub(super) fn names(pool: &PoolMetadata, id: ThinId) -> Vec<String> {
    let others = pool.devices().unwrap_or_default();
    let since = others.into_iter().filter(|other| *other != id);
    ALWAYS
        .map(String::from)
        .into_iter()
        .chain(since.map(|other| format!("{SINCE}{other}")))
        .collect()
}

/// Goes through the blocks of `range` from the first: each mapping is a run, and each stretch without any. It ends early where mappings
/// cannot be read; in the context of allocation, which is what copying goes by, each block there is a run: whoever reads it is told.
fn runs(pool: &PoolMetadata, id: ThinId, context: Context, range: Range<u64>) -> Result<Vec<Run>> {
    let other = match context {
        Context::Since(other) => Some(other),
        _ => None,
    };
    let asks_who_shares = matches!(context, Context::Depth | Context::Shared);
    let is_shared = |own: Option<(_, BlockTime)>| match own {
        Some((_, mapping)) if asks_who_shares => pool.block_is_shared(mapping.block),
        _ => Ok(false),
    };
    let mut runs = Vec::new();
    let mut at = range.start;
    while at < range.end && runs.len() < MOST_MAPPINGS {
        let next = |id| {
            let next = pool.next_block(id, ThinBlock(at))?;
            Ok(next.filter(|(block, _)| block.0 < range.end))
        };
        let found =
            next(id).and_then(|own| Ok((own, other.map_or(Ok(None), next)?, is_shared(own)?)));
        let (own, others, is_shared) = match found {
            Ok(found) => found,
            Err(_) if context == Context::Allocation => {
                runs.push(Run {
                    begin: at,
                    end: at + 1,
                    mapping: None,
                    is_shared: false,
                    differs: false,
                    is_lost: true,
                });
                at += 1;
                continue;
            }
            Err(e) if runs.is_empty() => return Err(e),
            Err(_) => break,
        };
        let begin = own
            .into_iter()
            .chain(others)
            .map(|(block, _)| block.0)
            .min();
        let begin = begin.unwrap_or(range.end);
        if at < begin {
            runs.push(Run {
                begin: at,
                end: begin,
                mapping: None,
                is_shared: false,
                differs: false,
                is_lost: false,
            });
        }
        if begin < range.end {
            let of = |found: Option<(ThinBlock, BlockTime)>| {
                found.filter(|f| f.0.0 == begin).map(|f| f.1)
            };
            let mapping = of(own);
            let differs = mapping.map(|m| m.block) != of(others).map(|m| m.block);
            runs.push(Run {
                begin,
                end: begin + 1,
                mapping,
                is_shared,
                differs,
                is_lost: false,
            });
        }
        at = begin + 1;
    }
    Ok(runs)
}

impl ThinExport {
    /// The status of bytes; none if there is no such context.
    pub(super) fn statuses(
        &self,
        context: &str,
        range: &Range<u64>,
        most: usize,
    ) -> Result<Option<Vec<Extent>>> {
        let Some(context) = Context::find(context) else {
            return Ok(None);
        };
        let (id, blocks) = (self.thin.id(), self.blocks(range));
        let pool = &self.driver.pool;
        let runs = pool.inspect(|pool| runs(pool, id, context, blocks))?;
        self.extents_of(context, runs, range, most).map(Some)
    }

    /// The status of bytes in the context of allocation; none if somebody changes or commits the metadata now.
    pub(super) fn try_allocation(
        &self,
        range: &Range<u64>,
        most: usize,
    ) -> Option<Result<Vec<Extent>>> {
        let (id, blocks) = (self.thin.id(), self.blocks(range));
        let context = Context::Allocation;
        let pool = &self.driver.pool;
        let runs = pool.try_inspect(|pool| runs(pool, id, context, blocks))?;
        Some(runs.and_then(|runs| self.extents_of(context, runs, range, most)))
    }

    /// The blocks that a range of bytes touches.
    fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        let size = self.block_sectors() * SECTOR;
        range.start / size..range.end.div_ceil(size)
    }

    /// What a context says of runs of blocks, cut to a range of bytes.
    fn extents_of(
        &self,
        context: Context,
        runs: Vec<Run>,
        range: &Range<u64>,
        most: usize,
    ) -> Result<Vec<Extent>> {
        let size = self.block_sectors() * SECTOR;
        let of_origin = match self.origin() {
            Some(origin) => origin.sectors()? * SECTOR,
            None => 0,
        };
        let mut extents = Vec::new();
        for run in runs {
            let (begin, end) = (run.begin.saturating_mul(size), run.end.saturating_mul(size));
            let (begin, end) = (begin.max(range.start), end.min(range.end));
            let status = run.status(context);
            // What is not mapped is in the origin as far as that goes.
            let middle = match run.mapping {
                None => of_origin.clamp(begin, end),
                Some(_) => begin,
            };
            let in_origin = match context {
                Context::Allocation => ALLOCATED,
                Context::Depth => 2,
                _ => status,
            };
            add_extent(&mut extents, middle - begin, in_origin);
            add_extent(&mut extents, end - middle, status);
            if extents.len() > most {
                extents.truncate(most);
                break;
            }
        }
        Ok(extents)
    }
}
