//! A whole trace through a player, with what happens beside it.

use super::event::{Batch, ControlEvent, TraceIo, TraceReader};
use super::player::Player;
use super::trace::control_words;
use crate::error::{Error, ErrorKind, Result};
use crate::observer::Observer;
use std::collections::VecDeque;
use std::iter::Peekable;
use std::time::Duration;

/// Snapshots that are taken whatever the trace says.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotSchedule {
    /// How much virtual time lies between them.
    pub every: Duration,
    /// How many of each device are kept.
    pub keep: usize,
}

/// Reads control events from a side file: on each line a time in seconds from the start of the trace, and the words, with or without the
/// `ctl` that they have in a blktrace.
///
/// # Errors
/// `InvalidDescription` with the line.
pub fn side_events(text: &str) -> Result<Vec<ControlEvent>> {
    let mut events = Vec::new();
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let event = line
            .split_once(char::is_whitespace)
            .and_then(|(time, text)| {
                let seconds: f64 = time.parse().ok()?;
                let time = Duration::try_from_secs_f64(seconds).ok()?;
                Some(ControlEvent {
                    time_ns: u64::try_from(time.as_nanos()).ok()?,
                    text: control_words(text.as_bytes()).unwrap_or_else(|| text.trim().into()),
                })
            });
        events.push(event.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidDescription,
                format!(
                    "line {}: {line:?} is not a time in seconds and an event",
                    number + 1
                ),
            )
        })?);
    }
    events.sort_by_key(|event| event.time_ns);
    Ok(events)
}

/// Snapshots that are due, and those that are there already.
pub(super) struct Snapshots {
    schedule: SnapshotSchedule,
    due: Duration,
    kept: VecDeque<Vec<u64>>,
    next_id: u64,
}

/// The first id of a scheduled snapshot: behind those that people give.
const FIRST_SNAPSHOT: u64 = 8_000_000;

impl Snapshots {
    pub(super) fn new(schedule: SnapshotSchedule) -> Self {
        Self {
            schedule,
            due: schedule.every,
            kept: VecDeque::new(),
            next_id: FIRST_SNAPSHOT,
        }
    }

    /// When the next are due.
    pub(super) fn due(&self) -> Duration {
        self.due
    }

    /// Takes those that are due before `time`.
    pub(super) fn take(&mut self, player: &mut Player, time: Duration) -> Result<()> {
        while self.due <= time && !self.schedule.every.is_zero() {
            let at = |text| ControlEvent {
                time_ns: self.due.as_nanos() as u64,
                text,
            };
            let mut taken = Vec::new();
            for origin in player.ids() {
                player.control(&at(format!("create_snap {} {origin}", self.next_id)))?;
                taken.push(self.next_id);
                self.next_id += 1;
            }
            self.kept.push_back(taken);
            if self.kept.len() > self.schedule.keep {
                for id in self.kept.pop_front().unwrap_or_default() {
                    player.control(&at(format!("delete {id}")))?;
                }
            }
            self.due += self.schedule.every;
        }
        Ok(())
    }
}

/// After so many requests the next ones are told of, twice as many.
pub(super) const SOON: usize = 16;

/// What comes next.
pub(super) enum Happening<'a> {
    /// A request, to the trace's device of this name.
    Io(&'a str, &'a TraceIo),
    /// A control event, of the trace or beside it.
    Control(&'a ControlEvent),
    /// These requests come next.
    Soon(&'a [TraceIo]),
}

/// The first control event up to a time: one of the trace before one beside it of the same time.
fn next_control(
    of_trace: &mut Peekable<impl Iterator<Item = ControlEvent>>,
    beside: &mut VecDeque<ControlEvent>,
    until: u64,
) -> Option<ControlEvent> {
    let next = of_trace.peek().map_or(u64::MAX, |event| event.time_ns);
    match beside.front() {
        Some(event) if event.time_ns <= until && event.time_ns < next => beside.pop_front(),
        _ => of_trace.next_if(|event| event.time_ns <= until),
    }
}

/// Tells `each` everything that `reader` has and what happens beside it, in order of time. False if the observer wished to stop.
///
/// # Errors
/// Those of the reader and of `each`.
pub(super) fn follow(
    reader: &mut dyn TraceReader,
    beside: Vec<ControlEvent>,
    observer: &dyn Observer,
    mut each: impl FnMut(Happening<'_>) -> Result<()>,
) -> Result<bool> {
    let mut beside = VecDeque::from(beside);
    let mut batch = Batch::default();
    while reader.read(&mut batch)? {
        let last_control = batch.controls.last().map(|control| control.time_ns);
        let mut controls = std::mem::take(&mut batch.controls).into_iter().peekable();
        let devices = reader.devices();
        for (at, io) in batch.ios.iter().enumerate() {
            if at % SOON == 0 {
                let end = batch.ios.len().min(at + 2 * SOON);
                each(Happening::Soon(&batch.ios[at..end]))?;
            }
            while let Some(event) = next_control(&mut controls, &mut beside, io.time_ns) {
                each(Happening::Control(&event))?;
            }
            let device = devices.get(io.device as usize);
            each(Happening::Io(device.map_or("", |name| name), io))?;
        }
        if let Some(last) = last_control {
            while let Some(event) = next_control(&mut controls, &mut beside, last) {
                each(Happening::Control(&event))?;
            }
        }
        if let Some((done, total)) = reader.progress() {
            observer.progress("", done, total);
        }
        if observer.is_cancelled() {
            return Ok(false);
        }
    }
    for event in &beside {
        each(Happening::Control(event))?;
    }
    Ok(true)
}

/// Plays everything that `reader` has, and ends it. `at_control` is told of each control event after it was carried out. False if
/// the observer wished to stop.
///
/// # Errors
/// Those of the reader and of the player.
pub fn play(
    player: &mut Player,
    reader: &mut dyn TraceReader,
    beside: Vec<ControlEvent>,
    schedule: Option<SnapshotSchedule>,
    at_control: &mut dyn FnMut(&Player) -> Result<()>,
    observer: &dyn Observer,
) -> Result<bool> {
    let mut snapshots = schedule.map(Snapshots::new);
    let is_complete = follow(reader, beside, observer, |happening| match happening {
        Happening::Io(device, io) => {
            if let Some(snapshots) = &mut snapshots {
                snapshots.take(player, Duration::from_nanos(io.time_ns))?;
            }
            player.io(device, io)
        }
        Happening::Control(event) => {
            player.control(event)?;
            at_control(player)
        }
        Happening::Soon(ios) => {
            player.prepare(ios);
            Ok(())
        }
    })?;
    player.finish()?;
    Ok(is_complete)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn side_events_come_in_order_of_time() {
        let events =
            side_events("\u{feff}# snapshots\n\n2.5 delete 1\n 1  create_snap 1 0 \n").unwrap();
        let found: Vec<(u64, &str)> = events.iter().map(|e| (e.time_ns, &*e.text)).collect();
        assert_eq!(
            found,
            [
                (1_000_000_000, "create_snap 1 0"),
                (2_500_000_000, "delete 1")
            ]
        );
        for bad in ["soon delete 1", "1", "-1 delete 1", "1e300 delete 1"] {
            let error = side_events(bad).unwrap_err().to_string();
            assert!(error.starts_with("line 1:"), "{error}");
        }
    }
}
