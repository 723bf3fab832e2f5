//! Requests of a trace that are under way, and the bios that they are cut into.

use super::event::{TraceIo, TraceOp};
use crate::pool::{Bio, BlockSize, Op, Reason, Thin, pieces};
use std::sync::Arc;

/// A request, whose bios have not all ended.
#[derive(Debug)]
pub(super) struct Request {
    /// Number of the open device.
    pub(super) thin: u32,
    pub(super) sector: u64,
    pub(super) sectors: u64,
    /// When it was submitted, in nanoseconds; none if nobody wants to know.
    pub(super) submitted: Option<u64>,
    pub(super) left: u32,
    /// The write that its flush is in front of.
    pub(super) then: Option<Box<(Arc<Thin>, TraceIo)>>,
    /// Why the map half left it, or its flush, to the worker first.
    pub(super) deferred: Option<Reason>,
    /// A part of it was read as zeros at once.
    pub(super) is_zero: bool,
}

/// Requests by the number that their bios have.
#[derive(Debug, Default)]
pub(super) struct Requests {
    slots: Vec<Option<Request>>,
    free: Vec<u32>,
}

/// What became of a request with the end of one of its bios.
pub(super) enum Ended {
    /// Others have not ended.
    NotYet,
    /// All have.
    All(Request),
    /// There is no such request.
    Unknown,
}

impl Requests {
    pub(super) fn begin(&mut self, request: Request) -> u32 {
        let number = self.free.pop().unwrap_or(self.slots.len() as u32);
        match self.slots.get_mut(number as usize) {
            Some(slot) => *slot = Some(request),
            None => self.slots.push(Some(request)),
        }
        number
    }

    /// The map half left one of its bios to the worker.
    pub(super) fn defer(&mut self, number: u32, reason: Reason) {
        if let Some(Some(request)) = self.slots.get_mut(number as usize) {
            request.deferred.get_or_insert(reason);
        }
    }

    /// One of its bios was read as zeros at once.
    pub(super) fn note_zero(&mut self, number: u32) {
        if let Some(Some(request)) = self.slots.get_mut(number as usize) {
            request.is_zero = true;
        }
    }

    /// Those under way.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Request> {
        self.slots.iter().flatten()
    }

    pub(super) fn end(&mut self, number: u32) -> Ended {
        let Some(slot) = self.slots.get_mut(number as usize) else {
            return Ended::Unknown;
        };
        match slot {
            Some(request) if request.left > 1 => {
                request.left -= 1;
                Ended::NotYet
            }
            Some(_) => {
                self.free.push(number);
                slot.take().map_or(Ended::Unknown, Ended::All)
            }
            None => Ended::Unknown,
        }
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

/// The bios that a request is, without its flush.
#[derive(Debug)]
pub(super) struct Cut {
    op: Op,
    is_fua: bool,
    /// First sector and sectors of the first.
    first: (u64, u64),
    /// Those of the others.
    others: Vec<(u64, u64)>,
}

impl Cut {
    /// Cuts at what reaches a thin device at once, `max` sectors, and at the edges of blocks. `others` is memory for it.
    #[inline]
    pub(super) fn new(
        io: &TraceIo,
        max: Option<u64>,
        block: BlockSize,
        mut others: Vec<(u64, u64)>,
    ) -> Self {
        let op = match io.op {
            TraceOp::Read => Op::Read,
            TraceOp::Discard => Op::Discard,
            _ => Op::Write,
        };
        let sectors = block.sectors();
        let most = sectors.min(max.unwrap_or(sectors));
        let is_one =
            op != Op::Discard && block.split(io.sector).1.saturating_add(io.sectors) <= most;
        others.clear();
        let mut first = (io.sector, io.sectors);
        if !is_one {
            let mut parts = pieces(op, io.sector, io.sectors, sectors, max);
            first = parts.next().unwrap_or(first);
            others.extend(parts);
        }
        Self {
            op,
            is_fua: io.is_fua && op == Op::Write,
            first,
            others,
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> u32 {
        match self.first.1 {
            0 => 0,
            _ => 1 + self.others.len() as u32,
        }
    }

    /// First sector and sectors of each.
    pub(super) fn parts(&self) -> impl Iterator<Item = (u64, u64)> {
        let parts = std::iter::once(self.first).chain(self.others.iter().copied());
        parts.take(self.len() as usize)
    }

    /// Calls of the kernel's map function that this makes.
    pub(super) fn map_calls(&self) -> u64 {
        match self.op {
            Op::Discard => 1,
            _ => self.len().into(),
        }
    }

    /// Its memory.
    pub(super) fn into_memory(self) -> Vec<(u64, u64)> {
        self.others
    }
}
