//! The trace, read ahead by a thread of its own.

use super::BATCH;
use crate::error::{Error, ErrorKind, Result};
use crate::observer::Observer;
use crate::replay::event::{ControlEvent, TraceIo, TraceReader};
use crate::replay::run::{Happening, follow};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender};

/// What is read in one go: requests, and the control event behind them.
#[derive(Debug, Default)]
pub(super) struct Parcel {
    /// Devices that were not met before.
    names: Vec<(u32, String)>,
    ios: Vec<TraceIo>,
    control: Option<ControlEvent>,
}

/// Reads a trace to its end. False if the observer wished to stop.
pub(super) fn read(
    reader: &mut dyn TraceReader,
    beside: Vec<ControlEvent>,
    observer: &dyn Observer,
    out: &SyncSender<Parcel>,
) -> Result<bool> {
    let mut parcel = Parcel::default();
    let mut is_named = Vec::new();
    let send = |parcel: &mut Parcel| {
        let gone = |_| Error::new(ErrorKind::Interrupted, "the replay has ended");
        out.send(std::mem::take(parcel)).map_err(gone)
    };
    let is_complete = follow(reader, beside, observer, |happening| {
        match happening {
            Happening::Io(name, io) => {
                let number = io.device as usize;
                if is_named.len() <= number {
                    is_named.resize(number + 1, false);
                }
                if !std::mem::replace(&mut is_named[number], true) {
                    parcel.names.push((io.device, name.into()));
                }
                parcel.ios.push(*io);
                if parcel.ios.len() < BATCH {
                    return Ok(());
                }
            }
            Happening::Control(event) => parcel.control = Some(event.clone()),
            Happening::Soon(_) => return Ok(()),
        }
        send(&mut parcel)
    })?;
    send(&mut parcel)?;
    Ok(is_complete)
}

/// What comes next.
pub(super) enum Next {
    Io(TraceIo),
    Control,
    End,
}

/// The other end of it.
pub(super) struct Feed {
    parcels: Receiver<Parcel>,
    names: HashMap<u32, String>,
    parcel: Parcel,
    at: usize,
}

impl Feed {
    pub(super) fn new(parcels: Receiver<Parcel>) -> Self {
        Self {
            parcels,
            names: HashMap::new(),
            parcel: Parcel::default(),
            at: 0,
        }
    }

    pub(super) fn peek(&mut self) -> Next {
        loop {
            if let Some(io) = self.parcel.ios.get(self.at) {
                return Next::Io(*io);
            }
            if self.parcel.control.is_some() {
                return Next::Control;
            }
            let Ok(mut parcel) = self.parcels.recv() else {
                return Next::End;
            };
            self.names.extend(parcel.names.drain(..));
            (self.parcel, self.at) = (parcel, 0);
        }
    }

    /// The request that [`peek`](Self::peek) told is dealt with.
    pub(super) fn advance(&mut self) {
        self.at += 1;
    }

    pub(super) fn take_control(&mut self) -> Option<ControlEvent> {
        self.parcel.control.take()
    }

    /// The name of a device of the trace.
    pub(super) fn name(&self, device: u32) -> &str {
        self.names.get(&device).map_or("", |name| name)
    }
}
