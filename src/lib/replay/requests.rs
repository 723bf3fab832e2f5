//! Requests of a trace that are under way, and the bios that they are cut into.

use super::event::{TraceIo, TraceOp};
use crate::pool::{Bio, BlockSize, Op, Reason, Thin, pieces};
use std::sync::Arc;

/// What is to be known of a request when it ends.
#[derive(Debug, Default)]
pub(super) struct About {
    /// When it was submitted, in nanoseconds; none if nobody wants to know.
    pub(super) submitted: Option<u64>,
    /// The write that its flush is in front of.
    pub(super) then: Option<Box<(Arc<Thin>, TraceIo)>>,
    /// Why the map half left it, or its flush, to the worker first.
    pub(super) deferred: Option<Reason>,
    /// A part of it was read as zeros at once.
    pub(super) is_zero: bool,
    /// A part of it failed: how long that took says nothing.
    pub(super) has_failed: bool,
}

/// A request, whose bios have not all ended.
#[derive(Debug)]
pub(super) struct Request {
    /// Number of the open device.
    pub(super) thin: u32,
    /// Bios that have not ended.
    pub(super) left: u32,
    pub(super) sector: u64,
    pub(super) sectors: u64,
    pub(super) about: About,
}

/// Requests by the number that their bios have.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// Those of which no bio is left are over.
    slots: Vec<Request>,
    free: Vec<u32>,
}

impl Requests {
    #[inline(always)]
    pub(super) fn begin(&mut self, request: Request) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = request;
                number
            }
            None => {
                self.slots.push(request);
                self.slots.len() as u32 - 1
            }
        }
    }

    /// The map half left one of its bios to the worker.
    pub(super) fn defer(&mut self, number: u32, reason: Reason) {
        if let Some(request) = self.slots.get_mut(number as usize) {
            request.about.deferred.get_or_insert(reason);
        }
    }

    /// One of its bios was read as zeros at once.
    pub(super) fn note_zero(&mut self, number: u32) {
        if let Some(request) = self.slots.get_mut(number as usize) {
            request.about.is_zero = true;
        }
    }

    /// One of its bios failed.
    #[cold]
    pub(super) fn note_failed(&mut self, number: u32) {
        if let Some(request) = self.slots.get_mut(number as usize) {
            request.about.has_failed = true;
        }
    }

    /// Those under way.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Request> {
        self.slots.iter().filter(|request| request.left > 0)
    }

    /// One of its bios has ended. Tells about the request if it was the last one.
    #[inline(always)]
    pub(super) fn end(&mut self, number: u32) -> Option<About> {
        let request = self.slots.get_mut(number as usize)?;
        request.left = request.left.checked_sub(1)?;
        if request.left > 0 {
            return None;
        }
        self.free.push(number);
        Some(About {
            then: request.about.then.take(),
            ..request.about
        })
    }

    /// How many are under way.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// Bios that ended, whose memory is for the next ones.
#[derive(Debug, Default)]
#[expect(clippy::vec_box, reason = "they come and go in boxes")]
pub(super) struct SpareBios(Vec<Box<Bio>>);

impl SpareBios {
    /// A bio of `cut`; its first sector and sectors are `part`.
    #[inline]
    pub(super) fn bio(&mut self, id: u64, cut: &Cut, part: (u64, u64)) -> Box<Bio> {
        self.renew(id, cut.op, part, cut.is_fua)
    }

    /// A flush.
    pub(super) fn flush(&mut self, id: u64) -> Box<Bio> {
        self.renew(id, Op::Flush, (0, 0), false)
    }

    #[inline]
    fn renew(&mut self, id: u64, op: Op, part: (u64, u64), is_fua: bool) -> Box<Bio> {
        let mut bio = (self.0.pop()).unwrap_or_else(|| Box::new(Bio::flush(id)));
        bio.renew(id, op, part, is_fua);
        bio
    }

    #[inline]
    pub(super) fn keep(&mut self, bio: Box<Bio>) {
        self.0.push(bio);
    }
}

/// What a request with sectors asks of a thin device.
#[inline(always)]
fn op(io: &TraceIo) -> Op {
    match io.op {
        TraceOp::Read => Op::Read,
        TraceOp::Discard => Op::Discard,
        _ => Op::Write,
    }
}

/// True if nothing cuts a read or write.
#[inline(always)]
fn is_one_piece(io: &TraceIo, max: Option<u64>, block: BlockSize) -> bool {
    let sectors = block.sectors();
    let most = sectors.min(max.unwrap_or(sectors));
    block.split(io.sector).1.saturating_add(io.sectors) <= most
}

/// What a request asks for that is one read or write of a block, and no more than that.
#[inline(always)]
pub(super) fn plain_op(io: &TraceIo, max: Option<u64>, block: BlockSize) -> Option<Op> {
    let is_plain = !(matches!(io.op, TraceOp::Discard | TraceOp::Flush)
        || io.is_preflush
        || io.is_fua
        || io.sectors == 0);
    (is_plain && is_one_piece(io, max, block)).then(|| op(io))
}

/// The bios that a request is, without its flush.
#[derive(Debug)]
pub(super) struct Cut {
    op: Op,
    is_fua: bool,
    /// How many there are.
    len: usize,
    /// First sector and sectors of the first.
    first: (u64, u64),
    /// Those of the others.
    others: Vec<(u64, u64)>,
}

impl Cut {
    /// Cuts at what reaches a thin device at once, `max` sectors, and at the edges of blocks. `others` is memory for it.
    #[inline(always)]
    pub(super) fn new(
        io: &TraceIo,
        max: Option<u64>,
        block: BlockSize,
        others: Vec<(u64, u64)>,
    ) -> Self {
        let op = op(io);
        let sectors = block.sectors();
        let is_one = op != Op::Discard && is_one_piece(io, max, block);
        let mut cut = Self {
            op,
            is_fua: io.is_fua && op == Op::Write,
            len: usize::from(io.sectors > 0),
            first: (io.sector, io.sectors),
            others,
        };
        if !is_one {
            cut.in_pieces(pieces(op, io.sector, io.sectors, sectors, max));
        }
        cut
    }

    #[cold]
    fn in_pieces(&mut self, mut pieces: impl Iterator<Item = (u64, u64)>) {
        let first = pieces.next();
        self.first = first.unwrap_or_default();
        self.others.clear();
        self.others.extend(pieces);
        self.len = usize::from(first.is_some()) + self.others.len();
    }

    /// How many there are.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// First sector and sectors of each.
    #[inline]
    pub(super) fn parts(&self) -> impl Iterator<Item = (u64, u64)> {
        (0..self.len).map(|at| match at {
            0 => self.first,
            _ => self.others[at - 1],
        })
    }

    /// Calls of the kernel's map function that this makes.
    #[inline]
    pub(super) fn map_calls(&self) -> u64 {
        match self.op {
            Op::Discard => 1,
            _ => self.len as u64,
        }
    }

    /// Its memory.
    pub(super) fn into_memory(self) -> Vec<(u64, u64)> {
        self.others
    }
}
