//! A part of a trace: from one time to another, so many requests, of some operations.

use std::time::Duration;

use crate::Result;
use crate::replay::event::{Batch, TraceNotes, TraceOp, TraceReader};

/// What is wanted of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Requests from here on, since the start of the trace; time begins here. Control events before count as at its beginning, since
    /// what they do to the pool lasts.
    pub start: Duration,
    /// Requests and control events before this time, since the start of the trace; to the end without it.
    pub end: Option<Duration>,
    /// No more than so many requests.
    pub limit: Option<u64>,
    /// Operations that are left out.
    pub without: Vec<TraceOp>,
}

impl Window {
    /// A reader of that part of what `from` reads.
    pub fn of(self, from: Box<dyn TraceReader>) -> Box<dyn TraceReader> {
        if self == Self::default() {
            return from;
        }
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Box::new(Windowed {
            from,
            start: nanos(self.start),
            end: self.end.map(nanos),
            left: self.limit.unwrap_or(u64::MAX),
            without: self.without,
            notes: TraceNotes::default(),
            events: 0,
        })
    }
}

struct Windowed {
    from: Box<dyn TraceReader>,
    start: u64,
    end: Option<u64>,
    /// Requests that may follow.
    left: u64,
    without: Vec<TraceOp>,
    notes: TraceNotes,
    events: u64,
}

impl Windowed {
    /// Leaves of a batch what is wanted. True if nothing can follow.
    fn cut(&mut self, batch: &mut Batch) -> bool {
        let ios = &mut batch.ios;
        let is_past = |time: u64| self.end.is_some_and(|end| time >= end);
        let mut is_last = ios.last().is_some_and(|io| is_past(io.time_ns))
            || batch.controls.last().is_some_and(|c| is_past(c.time_ns));
        ios.truncate(ios.partition_point(|io| !is_past(io.time_ns)));
        ios.retain(|io| io.time_ns >= self.start && !self.without.contains(&io.op));
        if ios.len() as u64 >= self.left {
            is_last = true;
            ios.truncate(self.left as usize);
        }
        batch.controls.retain(|control| !is_past(control.time_ns));
        // Where the limit ends the requests it ends the control events.
        if is_last && let Some(last) = ios.get((self.left as usize).wrapping_sub(1)) {
            batch.controls.retain(|c| c.time_ns <= last.time_ns);
        }
        for time in ios.iter_mut().map(|io| &mut io.time_ns) {
            *time -= self.start;
        }
        for time in batch.controls.iter_mut().map(|c| &mut c.time_ns) {
            *time = time.saturating_sub(self.start);
        }
        self.left -= ios.len() as u64;
        is_last
    }
}

impl TraceReader for Windowed {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        let mut is_last = self.left == 0;
        batch.ios.clear();
        batch.controls.clear();
        while !is_last && batch.ios.is_empty() && batch.controls.is_empty() {
            if !self.from.read(batch)? {
                break;
            }
            is_last = self.cut(batch);
            self.notes.clone_from(self.from.notes());
            self.events += batch.ios.len() as u64;
            self.notes.left_out = self.notes.events - self.events;
            self.notes.events = self.events;
        }
        if is_last {
            self.left = 0;
        }
        Ok(!(batch.ios.is_empty() && batch.controls.is_empty()))
    }

    fn devices(&self) -> &[String] {
        self.from.devices()
    }

    fn notes(&self) -> &TraceNotes {
        &self.notes
    }
}
