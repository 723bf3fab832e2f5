//! One I/O request to a thin device, as the kernel's struct bio. It says what is wanted and where; its data stays with whoever
//! submitted it, who knows it by its number.

use super::block_size::BlockSize;
use super::deferred_set::Ticket;
use super::list::Linked;
use super::prison::{Cell, Held};
use super::worker::JobId;
use crate::units::ThinBlock;

/// What a bio asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Unmap whole blocks; what is there afterwards is undefined, in practice zeros.
    Discard,
    /// Make every write that was acknowledged before durable.
    Flush,
}

/// Why a bio failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum BioError {
    /// EIO.
    #[error("input/output error")]
    Io,
    /// ENOSPC: no data block is left, and the pool does not wait for one.
    #[error("no space left in the pool")]
    NoSpace,
    /// Given back untouched by a suspension that does not wait (noflush): submit it again later.
    #[error("given back, submit it again after the resumption")]
    Requeue,
    /// EOPNOTSUPP: a discard, and the pool ignores them.
    #[error("discards are not supported")]
    Unsupported,
    /// EINVAL: a read or write across the edge of a data block, or a discard that the engine would have to split.
    #[error("the request crosses a boundary that it must be split at")]
    Invalid,
}

/// How a bio went.
pub type BioResult = Result<(), BioError>;

/// A request. Reads and writes lie within one data block; discards within [`DISCARD_BLOCKS`] aligned ones.
#[derive(Debug)]
pub struct Bio {
    /// The submitter's number for it.
    pub id: u64,
    /// What it asks for.
    pub op: Op,
    /// First sector of 512 bytes on the thin device.
    pub sector: u64,
    /// How many; 0 for a flush.
    pub sectors: u64,
    /// A write that is durable when it completes.
    pub is_fua: bool,
    pub(super) thin: u32,
    pub(super) all_io: Option<Ticket>,
    pub(super) shared_read: Option<Ticket>,
    /// The new mapping whose block this write fills, which completes it.
    pub(super) fills: Option<JobId>,
    /// What became of that write.
    pub(super) filled: BioResult,
    /// Of that block: where it begins and its sectors, if it is to be zeros but for the write.
    pub(super) zeroes: Option<(u64, u64)>,
    /// The virtual cell that the map half took for it, and one to spare.
    pub(super) reserved: Option<(Held, Option<Box<Cell>>)>,
    /// Its block was not mapped, by the changes until then.
    pub(super) unmapped_at: Option<u64>,
    next: Option<Box<Bio>>,
}

impl Linked for Bio {
    fn link(&mut self) -> &mut Option<Box<Self>> {
        &mut self.next
    }
}

/// Blocks that one cell may cover, and whose multiples it may not cross.
pub const DISCARD_BLOCKS: u64 = 1024;

impl Bio {
    /// A read, a write or a discard.
    pub fn new(id: u64, op: Op, sector: u64, sectors: u64) -> Self {
        Self {
            id,
            op,
            sector,
            sectors,
            is_fua: false,
            thin: 0,
            all_io: None,
            shared_read: None,
            fills: None,
            filled: Ok(()),
            zeroes: None,
            reserved: None,
            unmapped_at: None,
            next: None,
        }
    }

    /// Another request in the memory of one that has ended.
    #[inline]
    pub(crate) fn renew(&mut self, id: u64, op: Op, (sector, sectors): (u64, u64), is_fua: bool) {
        debug_assert!(
            self.all_io.is_none() && self.shared_read.is_none() && self.reserved.is_none()
        );
        (self.id, self.op, self.sector, self.sectors) = (id, op, sector, sectors);
        self.is_fua = is_fua;
        (self.fills, self.zeroes, self.unmapped_at) = (None, None, None);
    }

    /// A flush.
    pub fn flush(id: u64) -> Self {
        Self::new(id, Op::Flush, 0, 0)
    }

    /// The same write, to be durable when it completes.
    #[must_use]
    pub fn with_fua(self) -> Self {
        Self {
            is_fua: true,
            ..self
        }
    }

    /// Number of the open device that it was submitted to ([`Thin::number`](super::Thin::number)).
    pub fn thin_number(&self) -> u32 {
        self.thin
    }

    /// True if it is the write that fills a new block, rather than zeros or a copy.
    pub fn fills_a_new_block(&self) -> bool {
        self.fills.is_some()
    }

    /// First sector and sectors of the data device that are to be zeroed before it is written there, see [`Settings::zeroes_with_write`].
    ///
    /// [`Settings::zeroes_with_write`]: super::Settings::zeroes_with_write
    pub fn zeroes_before(&self) -> Option<(u64, u64)> {
        self.zeroes
    }

    #[inline]
    pub(super) fn block(&self, size: BlockSize) -> ThinBlock {
        ThinBlock(size.split(self.sector).0)
    }

    pub(super) fn end(&self) -> u64 {
        self.sector.saturating_add(self.sectors)
    }

    /// The whole blocks that a discard covers, `begin..end`.
    pub(super) fn whole_blocks(&self, block_sectors: u64) -> (u64, u64) {
        let begin = self.sector.div_ceil(block_sectors);
        (begin, (self.end() / block_sectors).max(begin))
    }

    /// True if it lies within what one cell may cover.
    #[inline]
    pub(super) fn is_within_bounds(&self, size: BlockSize) -> bool {
        match self.op {
            Op::Flush => true,
            Op::Read | Op::Write => {
                self.sectors > 0
                    && self.sector.checked_add(self.sectors).is_some()
                    && size.split(self.sector).1 + self.sectors <= size.sectors()
            }
            Op::Discard => {
                let (begin, end) = self.whole_blocks(size.sectors());
                begin == end || begin / DISCARD_BLOCKS == (end - 1) / DISCARD_BLOCKS
            }
        }
    }
}

/// Cuts a request at what one bio may cover: first sector and sectors of each piece. A read or write of a device that takes no more
/// than `max_sectors` at once is cut there, too, counted from where the piece before ended, as the kernel does; so a block is written
/// as a whole whatever the request began with, unless it is larger than that.
pub fn pieces(
    op: Op,
    sector: u64,
    sectors: u64,
    block_sectors: u64,
    max_sectors: Option<u64>,
) -> impl Iterator<Item = (u64, u64)> {
    let step = match op {
        Op::Discard => block_sectors * DISCARD_BLOCKS,
        _ => block_sectors,
    };
    let most = max_sectors.filter(|_| op != Op::Discard);
    let most = most.unwrap_or(u64::MAX).max(1);
    let end = sector.saturating_add(sectors);
    let mut at = sector;
    std::iter::from_fn(move || {
        let begin = at;
        let boundary = (begin - begin % step).saturating_add(step);
        at = boundary.min(begin.saturating_add(most)).min(end);
        (begin < end).then_some((begin, at - begin))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_block_boundaries() {
        let cut = |op, sector, sectors| pieces(op, sector, sectors, 128, None).collect::<Vec<_>>();
        assert_eq!(
            cut(Op::Read, 100, 300),
            [(100, 28), (128, 128), (256, 128), (384, 16)]
        );
        assert_eq!(cut(Op::Write, 128, 128), [(128, 128)]);
        assert_eq!(cut(Op::Read, 7, 0), []);
        let far = 128 * DISCARD_BLOCKS;
        assert_eq!(cut(Op::Discard, far - 1, 130), [(far - 1, 1), (far, 129)]);
        assert_eq!(cut(Op::Write, u64::MAX - 1, 9), [(u64::MAX - 1, 1)]);
        let cut = |op, sector, most| {
            let pieces = pieces(op, sector, 768, 384, Some(most));
            pieces.collect::<Vec<_>>()
        };
        assert_eq!(cut(Op::Write, 0, 512), [(0, 384), (384, 384)]);
        assert_eq!(
            cut(Op::Write, 100, 256),
            [(100, 256), (356, 28), (384, 256), (640, 128), (768, 100)]
        );
        assert_eq!(cut(Op::Discard, 100, 256), [(100, 768)]);
    }

    #[test]
    fn a_discard_covers_whole_blocks_only() {
        let blocks = |sector, sectors| Bio::new(0, Op::Discard, sector, sectors).whole_blocks(128);
        assert_eq!(blocks(64, 384), (1, 3));
        assert_eq!(blocks(1, 126), (1, 1));
        assert_eq!(blocks(0, 128), (0, 1));
        assert_eq!(blocks(130, 100), (2, 2));
    }
}
