//! Reads what may keep one waiting on a thread of its own, so that whoever replays it looks up now and then.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use crate::replay::event::{Batch, TraceNotes, TraceReader};
use crate::{Error, Result};

/// Batches that are read ahead.
const QUEUE: usize = 4;
/// For how long nothing may come before that is said.
const PATIENCE: Duration = Duration::from_millis(50);

/// A reader that never waits for long. Its thread ends with the process at the latest: a read cannot be broken off.
pub(super) struct Ahead {
    parts: Receiver<Result<Part>>,
    devices: Vec<String>,
    notes: TraceNotes,
}

/// A batch with what was found out on the way.
struct Part {
    batch: Batch,
    devices: Vec<String>,
    notes: TraceNotes,
}

impl Ahead {
    pub(super) fn new(from: Box<dyn TraceReader>) -> Result<Self> {
        let (to, parts) = sync_channel(QUEUE);
        thread::Builder::new()
            .name("read".into())
            .spawn(move || read_all(from, &to))
            .map_err(|e| Error::io("cannot start a thread to read the trace", e))?;
        Ok(Self {
            parts,
            devices: Vec::new(),
            notes: TraceNotes::default(),
        })
    }
}

/// Reads until the end, or until nobody takes it. The last batch is empty.
fn read_all(mut from: Box<dyn TraceReader>, to: &SyncSender<Result<Part>>) {
    let mut known = 0;
    loop {
        let mut batch = Batch::default();
        let read = from.read(&mut batch);
        let is_last = !matches!(read, Ok(true));
        let part = read.map(|_| Part {
            batch,
            devices: from.devices()[known..].to_vec(),
            notes: from.notes().clone(),
        });
        known = from.devices().len();
        if to.send(part).is_err() || is_last {
            return;
        }
    }
}

impl TraceReader for Ahead {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        *batch = Batch::default();
        match self.parts.recv_timeout(PATIENCE) {
            Ok(part) => {
                let part = part?;
                self.devices.extend(part.devices);
                self.notes = part.notes;
                *batch = part.batch;
                Ok(true)
            }
            Err(RecvTimeoutError::Timeout) => Ok(true),
            Err(RecvTimeoutError::Disconnected) => Ok(false),
        }
    }

    fn devices(&self) -> &[String] {
        &self.devices
    }

    fn notes(&self) -> &TraceNotes {
        &self.notes
    }
}
