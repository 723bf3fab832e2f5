//! The last step of every reader: time starts at the first event, unless the trace says where it starts, and never goes back.

use super::input::Progress;
use crate::Result;
use crate::replay::event::{Batch, TraceNotes, TraceReader};

/// A reader whose times are those that the trace has.
pub(super) struct Clock {
    from: Box<dyn TraceReader>,
    inputs: Vec<Option<Progress>>,
    notes: TraceNotes,
    events: u64,
    regressed: u64,
    base: Option<u64>,
    now: u64,
}

impl Clock {
    /// With a `base`, time starts there.
    pub(super) fn new(
        from: Box<dyn TraceReader>,
        inputs: Vec<Option<Progress>>,
        base: Option<u64>,
    ) -> Self {
        Self {
            from,
            inputs,
            notes: TraceNotes::default(),
            events: 0,
            regressed: 0,
            base,
            now: base.unwrap_or(0),
        }
    }
}

impl TraceReader for Clock {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        let is_more = self.from.read(batch)?;
        let first = [
            batch.ios.first().map(|io| io.time_ns),
            batch.controls.first().map(|c| c.time_ns),
        ];
        if self.base.is_none() {
            self.base = first.into_iter().flatten().min();
            self.now = self.base.unwrap_or(0);
        }
        let base = self.base.unwrap_or(0);
        let started = self.now;
        for io in &mut batch.ios {
            self.regressed += u64::from(io.time_ns < self.now);
            self.now = self.now.max(io.time_ns);
            io.time_ns = self.now - base;
        }
        let mut now = started;
        for control in &mut batch.controls {
            self.regressed += u64::from(control.time_ns < now);
            now = now.max(control.time_ns);
            control.time_ns = now - base;
        }
        self.now = self.now.max(now);
        self.events += batch.ios.len() as u64;
        self.notes.clone_from(self.from.notes());
        self.notes.events = self.events;
        self.notes.regressed += self.regressed;
        Ok(is_more)
    }

    fn devices(&self) -> &[String] {
        self.from.devices()
    }

    fn notes(&self) -> &TraceNotes {
        &self.notes
    }

    fn progress(&self) -> Option<(u64, u64)> {
        Progress::sum(&self.inputs)
    }
}
