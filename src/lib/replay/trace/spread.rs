//! Spreads requests over the second that is all their trace says, always in the same way.

use crate::Result;
use crate::replay::event::{Batch, TraceIo, TraceNotes, TraceReader};

const SECOND: u64 = 1_000_000_000;
/// Requests of one second that are held.
const MAX_HELD: usize = 64 << 10;

/// A reader whose requests are evenly apart within each second. If there are more than can be held, these take half of what is left of
/// the second, the next ones half of the rest.
pub(super) struct Spread<R> {
    from: R,
    fresh: Batch,
    held: Vec<TraceIo>,
    second: u64,
    /// How much of the second is taken.
    taken: u64,
    is_ended: bool,
}

impl<R: TraceReader> Spread<R> {
    pub(super) fn new(from: R) -> Self {
        Self {
            from,
            fresh: Batch::default(),
            held: Vec::new(),
            second: 0,
            taken: 0,
            is_ended: false,
        }
    }

    /// Lets go what is held, from what is taken of the second up to `until`.
    fn place(&mut self, until: u64, ios: &mut Vec<TraceIo>) {
        let count = self.held.len() as u64;
        let span = until - self.taken;
        for (index, mut io) in self.held.drain(..).enumerate() {
            let after = self.taken + span * index as u64 / count;
            io.time_ns = self.second.saturating_add(after);
            ios.push(io);
        }
        self.taken = until;
    }
}

impl<R: TraceReader> TraceReader for Spread<R> {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        batch.ios.clear();
        batch.controls.clear();
        while batch.ios.is_empty() && !self.is_ended {
            self.is_ended = !self.from.read(&mut self.fresh)?;
            for io in std::mem::take(&mut self.fresh.ios) {
                if io.time_ns != self.second {
                    self.place(SECOND, &mut batch.ios);
                    (self.second, self.taken) = (io.time_ns, 0);
                }
                self.held.push(io);
                if self.held.len() == MAX_HELD {
                    self.place(self.taken.midpoint(SECOND), &mut batch.ios);
                }
            }
        }
        if self.is_ended {
            self.place(SECOND, &mut batch.ios);
        }
        Ok(!batch.ios.is_empty())
    }

    fn devices(&self) -> &[String] {
        self.from.devices()
    }

    fn notes(&self) -> &TraceNotes {
        self.from.notes()
    }
}
