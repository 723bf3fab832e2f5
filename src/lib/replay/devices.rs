//! Which thin device a device of the trace is.

use super::event::TraceIo;
use crate::error::{ErrorKind, Result};
use crate::pool::{Thin, Worker};
use crate::units::ThinId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A device of the trace that is a thin device now.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) thin: Option<Arc<Thin>>,
    pub(super) id: ThinId,
    pub(super) sectors: Option<u64>,
    pub(super) origin_sectors: Option<u64>,
    /// The end of what was asked for until the last control event.
    pub(super) seen: u64,
    /// Nobody said which thin device it is: it became a new one.
    pub(super) is_made: bool,
}

/// Which thin device a device of the trace was.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PlayedDevice {
    /// The trace's name for it.
    pub device: String,
    /// The thin device.
    pub id: u64,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Nobody said how large it is: that is where the furthest request ended.
    pub is_size_seen: bool,
    /// Nobody said which thin device it is: it became a new one, which was empty.
    pub is_made: bool,
}

impl Active {
    pub(super) fn new(id: ThinId, sectors: Option<u64>, origin_sectors: Option<u64>) -> Self {
        Self {
            thin: None,
            id,
            sectors,
            origin_sectors,
            seen: 0,
            is_made: false,
        }
    }

    /// What it was, by its name.
    fn played(&self, device: &str) -> PlayedDevice {
        PlayedDevice {
            device: device.into(),
            id: self.id.0,
            // A trace may say anything; reports have no larger numbers.
            sectors: self.sectors.unwrap_or(self.seen).min(1 << 60),
            is_size_seen: self.sectors.is_none(),
            is_made: self.is_made,
        }
    }

    /// Opens the device if it exists by now.
    pub(super) fn open(&mut self, worker: &mut Worker) -> Result<()> {
        if self.thin.is_none() {
            match worker.open_thin(self.id, self.origin_sectors) {
                Ok(thin) => self.thin = Some(thin),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// What requests to a device of the trace need to know of it, until the next control event.
#[derive(Debug, Default)]
enum Target {
    /// Nobody asked yet.
    #[default]
    Unknown,
    /// It is no thin device.
    Nowhere,
    Thin {
        thin: Arc<Thin>,
        sectors: u64,
    },
}

/// The end of what was asked for, by the trace's number for the device.
#[derive(Debug, Default)]
pub(super) struct Seen(Vec<u64>);

impl Seen {
    pub(super) fn note(&mut self, device: u32, end: u64) {
        let number = device as usize;
        match self.0.get_mut(number) {
            Some(seen) => *seen = end.max(*seen),
            None => self.note_first(number, end),
        }
    }

    #[cold]
    fn note_first(&mut self, number: usize, end: u64) {
        self.0.resize(number, 0);
        self.0.push(end);
    }
}

#[inline]
fn find<'a>(targets: &'a [Target], io: &TraceIo) -> Option<(&'a Arc<Thin>, u64)> {
    let Some(Target::Thin { thin, sectors }) = targets.get(io.device as usize) else {
        return None;
    };
    let end = io.sector.checked_add(io.sectors)?;
    (end <= *sectors).then_some((thin, end))
}

/// Devices that are none any more and are told of; a trace may activate any number.
const MOST_PAST: usize = 1000;

/// All devices of the trace that are thin devices.
#[derive(Debug, Default)]
pub(super) struct Devices {
    pub(super) active: BTreeMap<String, Active>,
    /// Those that were, and are not any more.
    past: Vec<PlayedDevice>,
    /// By the trace's number for them.
    targets: Vec<Target>,
    seen: Seen,
}

impl Devices {
    pub(super) fn new(active: BTreeMap<String, Active>) -> Self {
        Self {
            active,
            ..Self::default()
        }
    }

    /// The thin device that a request goes to, and where the request ends, which is not noted; none if it goes nowhere, or its device has
    /// to be [resolved](Self::resolve) first.
    #[inline]
    pub(super) fn find(&self, io: &TraceIo) -> Option<(&Arc<Thin>, u64)> {
        find(&self.targets, io)
    }

    /// True if it has to be [resolved](Self::resolve) where requests to this device go.
    pub(super) fn is_unknown(&self, device: u32) -> bool {
        let target = self.targets.get(device as usize);
        matches!(target, None | Some(Target::Unknown))
    }

    /// The thin device that a request goes to; none if it goes nowhere. Its end is noted.
    #[inline]
    pub(super) fn target(&mut self, io: &TraceIo) -> Option<&Arc<Thin>> {
        let (thin, end) = find(&self.targets, io)?;
        self.seen.note(io.device, end);
        Some(thin)
    }

    /// Finds out what a device of the trace is; it is made already if it is to be.
    pub(super) fn resolve(&mut self, name: &str, number: u32, worker: &mut Worker) -> Result<()> {
        let mut target = Target::Nowhere;
        if let Some(active) = self.active.get_mut(name) {
            active.open(worker)?;
            if let Some(thin) = &active.thin {
                target = Target::Thin {
                    thin: Arc::clone(thin),
                    sectors: active.sectors.unwrap_or(u64::MAX),
                };
            }
        }
        let number = number as usize;
        if self.targets.len() <= number {
            self.targets.resize_with(number + 1, Target::default);
        }
        self.targets[number] = target;
        Ok(())
    }

    /// Forgets what the requests so far were to, which may change, but not how far they went.
    pub(super) fn forget_targets(&mut self) {
        let seen = std::mem::take(&mut self.seen);
        self.note_all(&seen);
        self.targets.clear();
    }

    /// Notes how far requests went.
    pub(super) fn note_all(&mut self, seen: &Seen) {
        for (target, &seen) in self.targets.iter().zip(&seen.0) {
            let Target::Thin { thin, .. } = target else {
                continue;
            };
            let is_it =
                |of: &Option<Arc<Thin>>| of.as_ref().is_some_and(|of| of.number() == thin.number());
            for active in self.active.values_mut() {
                if is_it(&active.thin) {
                    active.seen = active.seen.max(seen);
                }
            }
        }
    }

    /// From here on it is no thin device, or another one.
    pub(super) fn remove(&mut self, device: &str) -> Option<Active> {
        let active = self.active.remove(device)?;
        let played = active.played(device);
        let is_it = |past: &PlayedDevice| past.device == device && past.id == played.id;
        match self.past.iter().position(is_it) {
            Some(at) => self.past[at].sectors = self.past[at].sectors.max(played.sectors),
            None if active.thin.is_some() && self.past.len() < MOST_PAST => self.past.push(played),
            None => {}
        }
        Some(active)
    }

    /// Which thin devices the trace's devices were, as far as requests before the last control event, or the end, tell.
    pub(super) fn played(&self) -> Vec<PlayedDevice> {
        let active = self.active.iter();
        let mut all: Vec<PlayedDevice> = active.map(|(name, active)| active.played(name)).collect();
        for past in &self.past {
            let is_it = |of: &&mut PlayedDevice| of.device == past.device && of.id == past.id;
            match all.iter_mut().find(is_it) {
                Some(of) => of.sectors = of.sectors.max(past.sectors),
                None => all.push(past.clone()),
            }
        }
        all.sort_by(|a, b| (&a.device, a.id).cmp(&(&b.device, b.id)));
        all
    }

    /// Ids of the thin devices.
    pub(super) fn ids(&self) -> Vec<ThinId> {
        let mut ids: Vec<ThinId> = self.active.values().map(|active| active.id).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}
