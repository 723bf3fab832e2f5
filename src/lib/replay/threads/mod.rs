//! Plays a trace as fast as it goes, on real threads and with real locks: what they cost is what this is for.
//!
//! One thread reads the trace and one hands the requests out, in batches, by the processor that they were submitted on; each of the
//! others submits those of some processors; one has the [worker](crate::pool::Worker). Every queue between them is bounded. The data device does
//! at once what it is asked for.
//!
//! 1. A control event is a barrier: the threads end, what is in flight ends, and then the [`Player`] carries the event out as it
//!    always does. So it is when a device of the trace is met for the first time.
//! 2. What a discard is about is decided by its order among the writes. So the threads wait for each other before discards that
//!    follow writes, and before writes that follow discards. Requests of different processors have no order otherwise.
//! 3. A thread that waits always waits for the worker, or for threads that wait for the worker. The exceptions are writes that wait
//!    for space and whatever waits for the resumption: nobody waits for these.

mod feed;
mod submitter;
mod worker;

use super::engine::Engine;
use super::event::{ControlEvent, TraceOp, TraceReader};
use super::player::Player;
use super::run::{SnapshotSchedule, Snapshots};
use crate::error::{Error, Result};
use crate::observer::Observer;
use feed::{Feed, Next, read};
use std::panic::resume_unwind;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Barrier};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};
use submitter::{Desk, Step, Submitter};
use worker::{Bell, work};

/// Requests in one batch.
const BATCH: usize = 1024;
/// Batches that wait in a queue.
const BATCHES: usize = 4;

/// What all threads of a stretch share.
struct Yard<'a> {
    player: Shared<'a>,
    bell: &'a Bell,
    desks: &'a [Desk],
    /// Where those who submit wait for each other.
    meeting: Barrier,
    start: Instant,
}

/// What they share of the player.
struct Shared<'a> {
    pool: &'a crate::pool::Pool,
    devices: &'a super::devices::Devices,
}

/// Whoever waits for this one.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Plays everything that `reader` has on threads, as many that submit as the player has processors, and ends it. `at_control` is told
/// of each control event after it was carried out. False if the observer wished to stop. From here on the player's time is that of
/// this machine.
///
/// # Errors
/// Those of the reader and of the player; `Io` if there are not enough threads.
pub fn play_on_threads(
    player: &mut Player,
    reader: &mut dyn TraceReader,
    beside: Vec<ControlEvent>,
    schedule: Option<SnapshotSchedule>,
    at_control: &mut dyn FnMut(&Player) -> Result<()>,
    observer: &dyn Observer,
) -> Result<bool> {
    let mut conductor = Conductor::new(player);
    let mut snapshots = schedule.map(Snapshots::new);
    thread::scope(|scope| {
        let (out, parcels) = sync_channel(BATCHES);
        let reading = thread::Builder::new()
            .spawn_scoped(scope, move || read(reader, beside, observer, &out))
            .map_err(no_thread)?;
        let played = conductor.conduct(Feed::new(parcels), &mut snapshots, at_control);
        let read = join(reading);
        played?;
        read
    })
}

fn no_thread(e: std::io::Error) -> Error {
    Error::io("cannot start a thread; submit with fewer", e)
}

/// The thread that hands requests out.
struct Conductor<'a> {
    player: &'a mut Player,
    start: Instant,
    submitters: Vec<Submitter>,
    desks: Vec<Desk>,
    bell: Arc<Bell>,
}

impl<'a> Conductor<'a> {
    fn new(player: &'a mut Player) -> Self {
        player.leave_time();
        player.engine.pool.watch_locks();
        let bell = Arc::new(Bell::default());
        let rung = Arc::clone(&bell);
        player.engine.pool.set_waker(move || {
            rung.ring();
            true
        });
        let numbers = 0..player.engine.mappers.len();
        let max_sectors = player.options.max_sectors;
        Self {
            start: Instant::now(),
            submitters: numbers
                .clone()
                .map(|n| Submitter::new(n, max_sectors))
                .collect(),
            desks: numbers.map(|_| Desk::default()).collect(),
            bell,
            player,
        }
    }

    fn conduct(
        &mut self,
        mut feed: Feed,
        snapshots: &mut Option<Snapshots>,
        at_control: &mut dyn FnMut(&Player) -> Result<()>,
    ) -> Result<()> {
        loop {
            let due = snapshots.as_ref().map_or(Duration::MAX, Snapshots::due);
            match feed.peek() {
                Next::End => break,
                Next::Control => {
                    if let Some(event) = feed.take_control() {
                        self.player
                            .engine
                            .set_now(self.start.elapsed().as_nanos() as u64);
                        self.player.control(&event)?;
                        self.settle()?;
                        at_control(self.player)?;
                    }
                }
                Next::Io(io) => {
                    let time = Duration::from_nanos(io.time_ns);
                    if let Some(snapshots) = snapshots
                        && due <= time
                    {
                        self.player
                            .engine
                            .set_now(self.start.elapsed().as_nanos() as u64);
                        snapshots.take(self.player, time)?;
                        self.settle()?;
                    }
                    let device = io.device;
                    if self.player.devices.is_unknown(device) {
                        self.player.resolve(feed.name(device), device)?;
                    }
                    let due = snapshots.as_ref().map_or(Duration::MAX, Snapshots::due);
                    self.stretch(&mut feed, due)?;
                    self.settle()?;
                }
            }
        }
        self.player.finish()?;
        self.settle()?;
        for submitter in &self.submitters {
            self.player.engine.books.add(submitter.books());
        }
        Ok(())
    }

    /// Plays requests until something else comes, or the time `due`.
    fn stretch(&mut self, feed: &mut Feed, due: Duration) -> Result<()> {
        let player = &mut *self.player;
        let yard = Yard {
            player: Shared {
                pool: &player.engine.pool,
                devices: &player.devices,
            },
            bell: &self.bell,
            desks: &self.desks,
            meeting: Barrier::new(self.submitters.len()),
            start: self.start,
        };
        let yard = &yard;
        let (worker, books) = (&mut player.engine.worker, &mut player.engine.books);
        self.bell.open();
        thread::scope(|scope| -> Result<()> {
            let mut routes = Vec::new();
            let mut submitting = Vec::new();
            for (submitter, mapper) in self.submitters.iter_mut().zip(&mut player.engine.mappers) {
                let (route, steps) = sync_channel(BATCHES);
                let thread = thread::Builder::new()
                    .spawn_scoped(scope, move || submitter.run(mapper, &steps, yard))
                    .map_err(no_thread)?;
                routes.push(route);
                submitting.push(thread);
            }
            let working = thread::Builder::new()
                .spawn_scoped(scope, move || work(worker, books, yard))
                .map_err(no_thread)?;
            hand_out(feed, due, routes, yard);
            let ended: Vec<_> = submitting.into_iter().map(ScopedJoinHandle::join).collect();
            self.bell.stop();
            join(working);
            for end in ended {
                end.unwrap_or_else(|panic| resume_unwind(panic));
            }
            Ok(())
        })?;
        for submitter in &mut self.submitters {
            self.player.devices.note_all(&submitter.take_seen());
        }
        Ok(())
    }

    /// Lets everything end that is under way, but for what waits for space or for the resumption.
    fn settle(&mut self) -> Result<()> {
        loop {
            self.player
                .engine
                .set_now(self.start.elapsed().as_nanos() as u64);
            self.player.engine.catch_up()?;
            let mut ended = std::mem::take(&mut self.player.engine.of_others);
            for desk in &self.desks {
                desk.take(&mut ended);
            }
            if ended.is_empty() {
                return Ok(());
            }
            let Engine { mappers, pool, .. } = &mut self.player.engine;
            for (bio, result) in ended {
                let n = Submitter::of(&bio);
                if let (Some(submitter), Some(mapper)) =
                    (self.submitters.get_mut(n), mappers.get_mut(n))
                {
                    submitter.end(mapper, pool, bio, result);
                }
            }
        }
    }
}

/// Hands requests out until something else comes, or the time `due`.
fn hand_out(feed: &mut Feed, due: Duration, routes: Vec<SyncSender<Step>>, yard: &Yard<'_>) {
    let mut batches = vec![Vec::new(); routes.len()];
    let mut is_discarding = false;
    // Who is gone has panicked, which is found out soon.
    let send = |to: &SyncSender<Step>, step| drop(to.send(step));
    while let Next::Io(io) = feed.peek() {
        if Duration::from_nanos(io.time_ns) >= due || yard.player.devices.is_unknown(io.device) {
            break;
        }
        let discards = match io.op {
            TraceOp::Discard => true,
            TraceOp::Read => is_discarding,
            TraceOp::Write | TraceOp::WriteZeroes | TraceOp::Flush => false,
        };
        if discards != is_discarding {
            is_discarding = discards;
            for (route, batch) in routes.iter().zip(&mut batches) {
                send(route, Step::Play(std::mem::take(batch)));
                send(route, Step::Meet);
            }
        }
        let to = usize::from(io.cpu) % routes.len();
        batches[to].push(io);
        if batches[to].len() >= BATCH {
            let batch = std::mem::replace(&mut batches[to], Vec::with_capacity(BATCH));
            send(&routes[to], Step::Play(batch));
        }
        feed.advance();
    }
    for (route, batch) in routes.iter().zip(batches) {
        send(route, Step::Play(batch));
    }
}
