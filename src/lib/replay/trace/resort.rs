//! Puts the events of a trace in order that are out of place by no more than a window.

use crate::Result;
use crate::replay::event::{Batch, TraceNotes, TraceReader};

/// Requests that are held back. blkparse writes 512 of each processor at a time.
const WINDOW: usize = 16 << 10;
/// Control events that are held back.
const CONTROLS: usize = 4096;

/// A reader whose batches are in order.
pub(super) struct Resort<R> {
    from: R,
    held: Batch,
    fresh: Batch,
    is_ended: bool,
}

impl<R: TraceReader> Resort<R> {
    pub(super) fn new(from: R) -> Self {
        Self {
            from,
            held: Batch::default(),
            fresh: Batch::default(),
            is_ended: false,
        }
    }
}

impl<R> Resort<R> {
    /// How many requests and control events nothing can come before any more.
    fn settled(&self) -> (usize, usize) {
        let Batch { ios, controls } = &self.held;
        if self.is_ended {
            return (ios.len(), controls.len());
        }
        let (until, least) = if ios.len() >= 2 * WINDOW {
            (ios[WINDOW].time_ns, WINDOW)
        } else {
            (controls[CONTROLS / 2].time_ns, 0)
        };
        let earlier = ios.partition_point(|io| io.time_ns < until);
        let until = controls.partition_point(|control| control.time_ns <= until);
        (earlier.max(least), until)
    }
}

impl<R: TraceReader> TraceReader for Resort<R> {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        while !self.is_ended
            && self.held.ios.len() < 2 * WINDOW
            && self.held.controls.len() < CONTROLS
        {
            self.is_ended = !self.from.read(&mut self.fresh)?;
            self.held.ios.append(&mut self.fresh.ios);
            self.held.controls.append(&mut self.fresh.controls);
        }
        self.held.ios.sort_by_key(|io| io.time_ns);
        self.held.controls.sort_by_key(|control| control.time_ns);
        let (ios, controls) = self.settled();
        // What is held back is copied to the other vector, and what is handed over is not.
        batch.ios.clear();
        batch.ios.extend_from_slice(&self.held.ios[ios..]);
        self.held.ios.truncate(ios);
        std::mem::swap(&mut batch.ios, &mut self.held.ios);
        batch.controls.clear();
        batch.controls.extend(self.held.controls.drain(..controls));
        Ok(!(batch.ios.is_empty() && batch.controls.is_empty()))
    }

    fn devices(&self) -> &[String] {
        self.from.devices()
    }

    fn notes(&self) -> &TraceNotes {
        self.from.notes()
    }
}
