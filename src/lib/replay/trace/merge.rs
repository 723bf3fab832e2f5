//! Several traces that are replayed as one, in order of their times.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::lines::{BATCH, CONTROLS};
use crate::Result;
use crate::replay::event::{Batch, TraceNotes, TraceReader};

/// Readers side by side; devices of the same name are the same.
pub(super) struct Merge {
    parts: Vec<Part>,
    /// The next event of each part.
    heads: BinaryHeap<Reverse<Head>>,
    is_primed: bool,
    devices: Vec<String>,
    by_name: HashMap<String, u32>,
    notes: TraceNotes,
}

/// Time, whether it is a request, and of which part.
type Head = (u64, bool, usize);

struct Part {
    from: Box<dyn TraceReader>,
    batch: Batch,
    io: usize,
    control: usize,
    /// Our index of each of its devices.
    devices: Vec<u32>,
}

impl Part {
    /// The time of the next event, and whether it is a request: a control event comes before the requests of its time.
    fn next(&self) -> Option<(u64, bool)> {
        let control = self.batch.controls.get(self.control);
        let io = self.batch.ios.get(self.io);
        let control = control.map(|control| (control.time_ns, false));
        let io = io.map(|io| (io.time_ns, true));
        [control, io].into_iter().flatten().min()
    }
}

impl Merge {
    pub(super) fn new(readers: Vec<Box<dyn TraceReader>>) -> Self {
        let part = |from| Part {
            from,
            batch: Batch::default(),
            io: 0,
            control: 0,
            devices: Vec::new(),
        };
        Self {
            parts: readers.into_iter().map(part).collect(),
            heads: BinaryHeap::new(),
            is_primed: false,
            devices: Vec::new(),
            by_name: HashMap::new(),
            notes: TraceNotes::default(),
        }
    }

    /// The next event of a part, from a new batch if the last one is used up.
    fn head(&mut self, index: usize) -> Result<Option<Head>> {
        let part = &mut self.parts[index];
        if part.next().is_none() {
            (part.io, part.control) = (0, 0);
            part.from.read(&mut part.batch)?;
            for name in &part.from.devices()[part.devices.len()..] {
                let new = self.devices.len() as u32;
                let device = *self.by_name.entry(name.clone()).or_insert(new);
                if device == new {
                    self.devices.push(name.clone());
                }
                part.devices.push(device);
            }
        }
        Ok(part.next().map(|(time, is_io)| (time, is_io, index)))
    }

    fn sum_notes(&mut self) {
        let mut sum = TraceNotes::default();
        for part in &self.parts {
            let notes = part.from.notes();
            sum.skipped += notes.skipped;
            sum.malformed += notes.malformed;
            sum.lost = sum.lost.saturating_add(notes.lost);
            sum.is_truncated |= notes.is_truncated;
            sum.has_no_times |= notes.has_no_times;
            for warning in &notes.warnings {
                if !sum.warnings.contains(warning) {
                    sum.warnings.push(warning.clone());
                }
            }
        }
        self.notes = sum;
    }
}

impl TraceReader for Merge {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        batch.ios.clear();
        batch.controls.clear();
        if !self.is_primed {
            self.is_primed = true;
            for index in 0..self.parts.len() {
                let head = self.head(index)?;
                self.heads.extend(head.map(Reverse));
            }
        }
        while batch.ios.len() < BATCH && batch.controls.len() < CONTROLS {
            let Some(Reverse((_, is_io, index))) = self.heads.pop() else {
                break;
            };
            let part = &mut self.parts[index];
            if is_io {
                let mut io = part.batch.ios[part.io];
                io.device = part.devices[io.device as usize];
                batch.ios.push(io);
                part.io += 1;
            } else {
                batch
                    .controls
                    .push(part.batch.controls[part.control].clone());
                part.control += 1;
            }
            let head = self.head(index)?;
            self.heads.extend(head.map(Reverse));
        }
        self.sum_notes();
        Ok(!(batch.ios.is_empty() && batch.controls.is_empty()))
    }

    fn devices(&self) -> &[String] {
        &self.devices
    }

    fn notes(&self) -> &TraceNotes {
        &self.notes
    }
}
