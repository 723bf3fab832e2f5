//! Puts the events of a trace in order that are out of place by no more than a window.

use std::collections::VecDeque;
use std::mem;

use crate::Result;
use crate::replay::event::{Batch, ControlEvent, TraceIo, TraceNotes, TraceReader};

/// Requests that are held back at least. blkparse writes 512 of each processor at a time.
const WINDOW: usize = 16 << 10;
/// Control events that are held back.
const CONTROLS: usize = 4096;

/// A reader whose batches are in order.
pub(super) struct Resort<R> {
    from: R,
    fresh: Batch,
    is_ended: bool,
    /// Requests that are held back, as they were read, and how many.
    held: VecDeque<Vec<TraceIo>>,
    count: usize,
    /// They are in order, all of them.
    is_in_order: bool,
    /// When the last of them was, if so.
    last: u64,
    controls: Vec<ControlEvent>,
    /// Vectors that go round.
    spare: Vec<Vec<TraceIo>>,
}

impl<R: TraceReader> Resort<R> {
    pub(super) fn new(from: R) -> Self {
        Self {
            from,
            fresh: Batch::default(),
            is_ended: false,
            held: VecDeque::new(),
            count: 0,
            is_in_order: true,
            last: 0,
            controls: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// Reads on until enough is held back.
    fn read_ahead(&mut self) -> Result<()> {
        while !self.is_ended && self.count < 2 * WINDOW && self.controls.len() < CONTROLS {
            self.fresh.ios = self.spare.pop().unwrap_or_default();
            self.is_ended = !self.from.read(&mut self.fresh)?;
            self.controls.append(&mut self.fresh.controls);
            let ios = mem::take(&mut self.fresh.ios);
            let (Some(first), Some(last)) = (ios.first(), ios.last()) else {
                self.spare.push(ios);
                continue;
            };
            self.count += ios.len();
            self.is_in_order &= self.last <= first.time_ns && ios.is_sorted_by_key(|io| io.time_ns);
            self.last = last.time_ns;
            self.held.push_back(ios);
        }
        Ok(())
    }

    /// Puts in order what is held back, as one vector.
    fn sort(&mut self) {
        let mut all = self.held.pop_front().unwrap_or_default();
        for mut ios in self.held.drain(..) {
            all.append(&mut ios);
            self.spare.push(ios);
        }
        all.sort_by_key(|io| io.time_ns);
        self.last = all.last().map_or(self.last, |io| io.time_ns);
        self.held.push_back(all);
        self.is_in_order = true;
    }

    /// How many of the requests nothing can come before any more, and up to which time that is so.
    fn settled(&self) -> (usize, u64) {
        match self.count {
            _ if self.is_ended => (self.count, u64::MAX),
            count if count >= 2 * WINDOW => (count - WINDOW, u64::MAX),
            _ => {
                let until = self.controls[CONTROLS / 2].time_ns;
                let ios = self.held.iter().flatten();
                (ios.take_while(|io| io.time_ns < until).count(), until)
            }
        }
    }

    /// Hands over the first of the requests that are held back, as many as were read at once and `most` of them at most.
    fn hand_over(&mut self, most: usize, ios: &mut Vec<TraceIo>) {
        let mut first = self.held.pop_front().unwrap_or_default();
        if first.len() > most {
            // What is held back is copied to another vector, and what is handed over is not.
            let mut rest = self.spare.pop().unwrap_or_default();
            rest.clear();
            rest.extend_from_slice(&first[most..]);
            first.truncate(most);
            self.held.push_front(rest);
        }
        self.count -= first.len();
        self.spare.push(mem::replace(ios, first));
    }
}

impl<R: TraceReader> TraceReader for Resort<R> {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        self.read_ahead()?;
        if !self.is_in_order {
            self.sort();
        }
        self.controls.sort_by_key(|control| control.time_ns);
        let (most, until) = self.settled();
        self.hand_over(most, &mut batch.ios);
        // A control event comes before the requests of its time.
        let next = self.held.front().and_then(|ios| ios.first());
        let until = next.map_or(until, |io| until.min(io.time_ns));
        let taken = self
            .controls
            .partition_point(|control| control.time_ns <= until);
        batch.controls.clear();
        batch.controls.extend(self.controls.drain(..taken));
        Ok(!(batch.ios.is_empty() && batch.controls.is_empty()))
    }

    fn devices(&self) -> &[String] {
        self.from.devices()
    }

    fn notes(&self) -> &TraceNotes {
        self.from.notes()
    }
}
