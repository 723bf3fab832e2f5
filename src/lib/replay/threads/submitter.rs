//! A thread that submits requests, and is told when the worker ended a bio of them.

use super::Yard;
use crate::pool::{Bio, BioResult, MapCounts, Mapped, Mapper, Pool, Reason, Thin};
use crate::replay::books::Books;
use crate::replay::devices::Seen;
use crate::replay::event::{TraceIo, TraceOp};
use crate::replay::requests::{About, Cut, Request, Requests, SpareBios};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Requests that one thread has under way at once.
const MOST_IN_FLIGHT: usize = 256;
/// One request of so many is timed.
const TIMED: u32 = 64;
/// Who waits looks around so often, at least.
const LOOK_AROUND: Duration = Duration::from_millis(1);

/// What a thread that submits is to do.
#[derive(Debug)]
pub(super) enum Step {
    /// Submit these.
    Play(Vec<TraceIo>),
    /// Wait until all others are here, and everything has ended that was submitted.
    Meet,
}

/// A bio that ended, and how.
type EndOfBio = (Box<Bio>, BioResult);

/// Where the worker puts what it ended of a thread's bios.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Desk {
    has_any: AtomicBool,
    ended: Mutex<Vec<EndOfBio>>,
    arrival: Condvar,
    /// What its map half did until lately.
    counts: Mutex<MapCounts>,
}

impl Desk {
    fn ended(&self) -> MutexGuard<'_, Vec<EndOfBio>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> MutexGuard<'_, MapCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_counts(&self, sum: &mut MapCounts) {
        sum.add(&self.counts());
    }

    pub(super) fn put(&self, bio: Box<Bio>, result: BioResult) {
        self.ended().push((bio, result));
        self.has_any.store(true, Ordering::Release);
        self.arrival.notify_one();
    }

    pub(super) fn take(&self, into: &mut Vec<EndOfBio>) {
        if self.has_any.load(Ordering::Acquire) {
            let mut ended = self.ended();
            self.has_any.store(false, Ordering::Release);
            into.append(&mut ended);
        }
    }

    fn wait(&self) {
        let ended = self.ended();
        if ended.is_empty() {
            // Whatever the outcome, who waits looks around.
            drop(self.arrival.wait_timeout(ended, LOOK_AROUND));
        }
    }
}

/// What a thread has of its own, also between two stretches.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Submitter {
    number: usize,
    max_sectors: Option<u64>,
    requests: Requests,
    spare: SpareBios,
    parts: Vec<(u64, u64)>,
    ended: Vec<EndOfBio>,
    seen: Seen,
    books: Books,
    /// The time that timed requests count from.
    start: Instant,
    untimed: u32,
    /// A bio was left to the worker since it was last asked whether it is behind.
    has_deferred: bool,
}

impl Submitter {
    pub(super) fn new(number: usize, max_sectors: Option<u64>) -> Self {
        Self {
            number,
            max_sectors,
            requests: Requests::default(),
            spare: SpareBios::default(),
            parts: Vec::new(),
            ended: Vec::new(),
            seen: Seen::default(),
            books: Books::default(),
            start: Instant::now(),
            untimed: 0,
            has_deferred: false,
        }
    }

    /// The number of the thread that submitted a bio.
    pub(super) fn of(bio: &Bio) -> usize {
        (bio.id >> 32) as usize - 1
    }

    pub(super) fn books(&self) -> &Books {
        &self.books
    }

    /// How far its requests went since it was asked.
    pub(super) fn take_seen(&mut self) -> Seen {
        std::mem::take(&mut self.seen)
    }

    /// Does what it is told, until nobody tells it any more and everything has ended.
    pub(super) fn run(&mut self, mapper: &mut Mapper, steps: &Receiver<Step>, yard: &Yard<'_>) {
        loop {
            let step = match self.requests.len() {
                0 => steps.recv().map_err(|_| RecvTimeoutError::Disconnected),
                _ => steps.recv_timeout(LOOK_AROUND),
            };
            match step {
                Ok(Step::Play(ios)) => {
                    for io in &ios {
                        self.play(mapper, io, yard);
                    }
                    self.desk(yard).counts().clone_from(mapper.counts());
                }
                Ok(Step::Meet) => {
                    self.drain(mapper, yard);
                    yard.meeting.wait();
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.take_ended(mapper, yard);
                }
                Err(RecvTimeoutError::Disconnected) => return self.drain(mapper, yard),
            }
        }
    }

    fn desk<'a>(&self, yard: &Yard<'a>) -> &'a Desk {
        &yard.desks[self.number]
    }

    fn play(&mut self, mapper: &mut Mapper, io: &TraceIo, yard: &Yard<'_>) {
        self.books.input.count(io);
        let Some((thin, end)) = yard.player.devices.find(io) else {
            self.books.input.leave_out(io);
            return;
        };
        self.seen.note(io.device, end);
        self.books.heat.record(io);
        self.make_room(mapper, yard);
        self.untimed += 1;
        let submitted = self.untimed.is_multiple_of(TIMED);
        let submitted = submitted.then(|| self.start.elapsed().as_nanos() as u64);
        let pool = yard.player.pool;
        if io.op != TraceOp::Flush && !io.is_preflush {
            return self.submit(mapper, pool, thin, io, submitted, None);
        }
        self.books.input.count_flush();
        let then = (io.op != TraceOp::Flush && io.sectors > 0).then(|| {
            let io = TraceIo {
                is_preflush: false,
                ..*io
            };
            Box::new((Arc::clone(thin), io))
        });
        let request = self.requests.begin(Request {
            thin: thin.number(),
            left: 1,
            sector: 0,
            sectors: 0,
            about: About {
                submitted,
                then,
                deferred: Some(Reason::Flush),
                ..About::default()
            },
        });
        let bio = self.spare.flush(self.id(request));
        self.map(mapper, pool, thin, bio);
    }

    /// Waits while too much is under way, or the worker is behind with what it was left.
    fn make_room(&mut self, mapper: &mut Mapper, yard: &Yard<'_>) {
        self.take_ended(mapper, yard);
        if std::mem::take(&mut self.has_deferred) {
            yard.player.pool.throttle();
        }
        while self.requests.len() >= MOST_IN_FLIGHT && self.wait(mapper, yard) {}
    }

    /// Waits until everything has ended.
    fn drain(&mut self, mapper: &mut Mapper, yard: &Yard<'_>) {
        while self.requests.len() > 0 && self.wait(mapper, yard) {}
        self.desk(yard).counts().clone_from(mapper.counts());
    }

    /// Waits for the end of bios. False if none will end before something else happens.
    fn wait(&mut self, mapper: &mut Mapper, yard: &Yard<'_>) -> bool {
        let is_stuck = yard.is_stuck();
        if self.take_ended(mapper, yard) {
            return true;
        }
        if !is_stuck {
            self.desk(yard).wait();
        }
        !is_stuck
    }

    /// Goes on with what the worker ended. False if that is nothing.
    fn take_ended(&mut self, mapper: &mut Mapper, yard: &Yard<'_>) -> bool {
        let mut ended = std::mem::take(&mut self.ended);
        self.desk(yard).take(&mut ended);
        let is_any = !ended.is_empty();
        for (bio, result) in ended.drain(..) {
            self.end(mapper, yard.player.pool, bio, result);
        }
        self.ended = ended;
        is_any
    }

    fn id(&self, request: u32) -> u64 {
        (self.number as u64 + 1) << 32 | u64::from(request)
    }

    fn submit(
        &mut self,
        mapper: &mut Mapper,
        pool: &Pool,
        thin: &Thin,
        io: &TraceIo,
        submitted: Option<u64>,
        deferred: Option<Reason>,
    ) {
        let size = pool.block_size();
        let cut = Cut::new(io, self.max_sectors, size, std::mem::take(&mut self.parts));
        self.books.input.count_bios(io, &cut, size.sectors());
        if cut.len() > 0 {
            let request = self.requests.begin(Request {
                thin: thin.number(),
                left: cut.len() as u32,
                sector: io.sector,
                sectors: io.sectors,
                about: About {
                    submitted,
                    deferred,
                    ..About::default()
                },
            });
            for part in cut.parts() {
                let bio = self.spare.bio(self.id(request), &cut, part);
                self.map(mapper, pool, thin, bio);
            }
        }
        self.parts = cut.into_memory();
    }

    fn map(&mut self, mapper: &mut Mapper, pool: &Pool, thin: &Thin, bio: Box<Bio>) {
        let id = bio.id;
        match mapper.map(thin, bio) {
            Mapped::Remapped { bio, .. } => {
                if let Some((bio, result)) = pool.end_io(bio, Ok(())) {
                    self.end(mapper, pool, bio, result);
                }
            }
            Mapped::Zero(bio) => {
                self.requests.note_zero(id as u32);
                self.end(mapper, pool, bio, Ok(()));
            }
            Mapped::Failed(bio, error) => self.end(mapper, pool, bio, Err(error)),
            Mapped::Deferred(reason) => {
                self.requests.defer(id as u32, reason);
                self.has_deferred = true;
            }
        }
    }

    /// A bio is done; so may be its request.
    pub(super) fn end(
        &mut self,
        mapper: &mut Mapper,
        pool: &Pool,
        bio: Box<Bio>,
        result: BioResult,
    ) {
        self.books.count_end(&bio, result);
        if result.is_err() {
            self.requests.note_failed(bio.id as u32);
        }
        let ended = self.requests.end(bio.id as u32);
        self.spare.keep(bio);
        let Some(request) = ended else {
            return;
        };
        if let Some(then) = request.then
            && result.is_ok()
        {
            let (thin, io) = &*then;
            return self.submit(mapper, pool, thin, io, request.submitted, request.deferred);
        }
        if let Some(submitted) = request.submitted
            && !request.has_failed
        {
            let nanos = (self.start.elapsed().as_nanos() as u64).saturating_sub(submitted);
            self.books
                .latencies
                .record(request.deferred, request.is_zero, nanos);
        }
    }
}
