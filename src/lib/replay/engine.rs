//! The pool in virtual time: what is issued takes as long as the modelled data device says, and the worker takes time, too.
//!
//! The clock, in nanoseconds, stands at the time of the next thing that happens: what the caller says, the end of something on the data
//! device, or a deadline of the worker.

use super::books::Books;
use super::device::{DeviceModel, varied};
use super::ends::Ends;
use super::event::{TraceIo, TraceOp};
use super::player::PlayOptions;
use super::requests::{About, Cut, Request, Requests, SpareBios, plain_op};
use super::verify::Watch;
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::txn::{LockScheme, WouldBlock};
use crate::pool::{
    Bio, BioResult, Effect, Event, JobId, Left, MapCounts, Mapped, Mapper, Op, Passage, Passed,
    Pool, Reason, Thin, Worker,
};
use crate::thin::PoolMetadata;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Something that ends.
#[derive(Debug)]
enum Io {
    Bio(Box<Bio>),
    Plain(Plain),
    Job(JobId),
    /// A bio that the worker has ended.
    Ended(Box<Bio>, BioResult),
    /// A bio whose submitter slept.
    Map(Box<Sleeper>),
    /// The worker has time again.
    Worker,
}

/// A request that is one read or write of a mapped block, and has no bio.
#[derive(Debug)]
struct Plain {
    passage: Passage,
    /// Number of the open device.
    thin: u32,
    sector: u64,
    sectors: u64,
    submitted: u64,
}

/// A bio that is to be mapped.
#[derive(Debug)]
struct Sleeper {
    thin: Arc<Thin>,
    bio: Box<Bio>,
}

/// A pool, and what is under way.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) worker: Worker,
    pub(super) pool: Arc<Pool>,
    pub(super) mappers: Vec<Mapper>,
    pub(super) books: Books,
    pub(super) watch: Watch,
    /// How long the data device takes.
    pub(super) device: DeviceModel,
    seed: u64,
    scheme: LockScheme,
    max_sectors: Option<u64>,
    now: u64,
    ends: Ends<Io>,
    requests: Requests,
    /// When the worker wants to be told something, and has time; the end of time if it waits for nothing.
    deadline: u64,
    /// The worker is busy until then, with what it was told last.
    free_at: u64,
    /// A commit holds the root until then.
    root_until: u64,
    /// What the worker is told when it has time.
    told: VecDeque<Event>,
    /// It will be looked after when it has.
    is_awaited: bool,
    spare: SpareBios,
    parts: Vec<(u64, u64)>,
    numbers: u64,
    effects: Vec<Effect>,
    answers: HashMap<u64, Result<()>>,
    /// Bios that ended and that others submitted.
    pub(super) of_others: Vec<(Box<Bio>, BioResult)>,
}

/// Rounds after which a pool that never comes to rest is an error.
const MOST_ROUNDS: u32 = 100_000_000;

impl Engine {
    /// Starts a pool on its metadata.
    ///
    /// # Errors
    /// Those of [`Worker::start`].
    pub(super) fn new(metadata: PoolMetadata, options: &PlayOptions) -> Result<Self> {
        let worker = Worker::start(metadata, options.settings.clone())?;
        let pool = Arc::clone(worker.pool());
        let mappers = (0..options.cpus.max(1)).map(|_| Mapper::new(&pool, true));
        Ok(Self {
            mappers: mappers.collect(),
            worker,
            pool,
            books: Books::default(),
            watch: Watch::default(),
            device: options.device,
            seed: options.seed,
            scheme: options.settings.scheme,
            max_sectors: options.max_sectors,
            now: 0,
            ends: Ends::default(),
            requests: Requests::default(),
            deadline: u64::MAX,
            free_at: 0,
            root_until: 0,
            told: VecDeque::new(),
            is_awaited: false,
            spare: SpareBios::default(),
            parts: Vec::new(),
            numbers: 0,
            effects: Vec::new(),
            answers: HashMap::new(),
            of_others: Vec::new(),
        })
    }

    /// Nanoseconds since the start, by its clock.
    pub(super) fn now(&self) -> u64 {
        self.now
    }

    /// It is `now`, and others told the worker something meanwhile.
    pub(super) fn set_now(&mut self, now: u64) {
        self.now = self.now.max(now);
        self.note_deadline();
    }

    /// The pool's metadata, at the end.
    ///
    /// # Errors
    /// `Busy` if somebody else still has the pool.
    pub(super) fn into_metadata(self) -> Result<PoolMetadata> {
        let Self {
            worker,
            pool,
            mappers,
            ..
        } = self;
        drop((mappers, pool));
        worker.into_metadata()
    }

    fn note_deadline(&mut self) {
        let deadline = self.worker.deadline();
        self.deadline = deadline.map_or(u64::MAX, |at| self.free_at.max(at.as_nanos() as u64));
    }

    /// Submits a request at this time; a flush in front of it comes first.
    #[inline]
    pub(super) fn play(&mut self, thin: &Arc<Thin>, io: &TraceIo) -> Result<()> {
        if io.op == TraceOp::Discard {
            self.let_end(thin, io)?;
        }
        if io.op == TraceOp::Flush || io.is_preflush {
            self.flush(thin, io);
        } else if let Some(op) = plain_op(io, self.max_sectors, self.pool.block_size())
            && self.scheme == LockScheme::Optimistic
            && !self.watch.is_on()
        {
            self.submit_plain(thin, io, op);
        } else {
            self.submit(thin, io, Some(self.now), None, None);
        }
        Ok(())
    }

    /// Asks for the memory where the mapping for a request may be remembered.
    #[inline]
    pub(super) fn prefetch_recent(&self, thin: &Thin, io: &TraceIo) {
        self.mappers[0].prefetch_recent(thin, io.sector);
    }

    /// Prefetches the leaf that a walk to the block of a request will end in, unless its mapping is remembered.
    pub(super) fn prefetch_leaf(&self, thin: &Thin, io: &TraceIo) {
        self.mappers[0].prefetch_leaf(thin, io.sector);
    }

    /// Submits a request that is one read or write of a block.
    #[inline]
    fn submit_plain(&mut self, thin: &Arc<Thin>, io: &TraceIo, op: Op) {
        match self.mapper().pass(thin, op, io.sector) {
            Passed::Remapped { passage, .. } => {
                // Reads and writes take turns at random, so there is no branch between them.
                self.books.bytes_written += u64::from(op == Op::Write) * io.sectors * 512;
                let takes = self.device.bio(op, io.sectors, false);
                let plain = Plain {
                    passage,
                    thin: thin.number(),
                    sector: io.sector,
                    sectors: io.sectors,
                    submitted: self.now,
                };
                self.start(Io::Plain(plain), takes);
            }
            Passed::Zero => self.books.count_plain(true, 0),
            // Its bio is not tried again.
            Passed::Left(left) => {
                return self.submit(thin, io, Some(self.now), None, Some(left));
            }
        }
        self.books.input.map_calls += 1;
        if self.pool.has_work() {
            self.tell(Event::Work);
        }
    }

    #[inline(never)]
    fn flush(&mut self, thin: &Arc<Thin>, io: &TraceIo) {
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
            sector: io.sector,
            sectors: io.sectors,
            about: About {
                submitted: Some(self.now),
                then,
                deferred: Some(Reason::Flush),
                ..About::default()
            },
        });
        let bio = self.spare.flush(request.into());
        self.watch.begin(thin.id(), &bio);
        self.map(thin, bio);
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Lets requests end that a discard overlaps. Whoever discards blocks has nothing under way there, but the modelled device may be
    /// slower than the one of the trace; and a block that somebody works on is not discarded.
    fn let_end(&mut self, thin: &Thin, io: &TraceIo) -> Result<()> {
        let end = io.sector.saturating_add(io.sectors);
        for _ in 0..MOST_ROUNDS {
            let overlaps = |of: u32, sector: u64, sectors: u64| {
                of == thin.number() && sector < end && io.sector < sector.saturating_add(sectors)
            };
            let is_plain = |thing: &Io| match thing {
                Io::Plain(plain) => overlaps(plain.thin, plain.sector, plain.sectors),
                _ => false,
            };
            let is_other = |other: &Request| overlaps(other.thin, other.sector, other.sectors);
            if !self.requests.iter().any(is_other) && !self.ends.iter().any(is_plain) {
                return Ok(());
            }
            // What waits for space has no end.
            let next = self.ends.first();
            if next == u64::MAX {
                return Ok(());
            }
            self.now = self.now.max(next);
            self.one_ends();
        }
        Err(self.restless())
    }

    fn restless(&self) -> Error {
        let message = format!("the pool did not come to rest: {:?}", self.worker);
        Error::new(ErrorKind::Io, message)
    }

    /// Notes how much is in use, if it is time to.
    #[inline]
    pub(super) fn sample(&mut self, always: bool) {
        if always || self.now >= self.books.next_sample() {
            self.take_sample();
        }
    }

    #[cold]
    fn take_sample(&mut self) {
        let mut counts = MapCounts::default();
        for mapper in &self.mappers {
            counts.add(mapper.counts());
        }
        let worker = self.worker.counts();
        self.books.sample(self.now, &self.pool, &counts, worker);
    }

    /// Submits a request without its flush, cut into bios. If it was `left`, it was tried without one.
    fn submit(
        &mut self,
        thin: &Arc<Thin>,
        io: &TraceIo,
        submitted: Option<u64>,
        deferred: Option<Reason>,
        left: Option<Left>,
    ) {
        let size = self.pool.block_size();
        let parts = std::mem::take(&mut self.parts);
        let cut = Cut::new(io, self.max_sectors, size, parts);
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
                let bio = self.spare.bio(request.into(), &cut, part);
                self.watch.begin(thin.id(), &bio);
                match left {
                    Some(left) => {
                        let mapped = self.mapper().map_left(thin, bio, left);
                        self.go_on(request, mapped);
                    }
                    None => self.map(thin, bio),
                }
            }
        }
        self.parts = cut.into_memory();
    }

    /// What looks blocks up: in virtual time one thread plays, for all processors.
    #[inline]
    fn mapper(&mut self) -> &mut Mapper {
        &mut self.mappers[0]
    }

    fn map(&mut self, thin: &Arc<Thin>, bio: Box<Bio>) {
        let request = bio.id as u32;
        let mut busy = None;
        if self.now < self.root_until {
            // What else there is goes to the worker in any case.
            let is_looked_up = matches!(bio.op, Op::Read | Op::Write) && !bio.is_fua;
            match self.scheme {
                LockScheme::Kernel if is_looked_up => {
                    self.books.work.root_waits += 1;
                    let sleeps = self.root_until - self.now;
                    self.books.work.root_wait_ns += sleeps;
                    let thin = Arc::clone(thin);
                    return self.start(Io::Map(Box::new(Sleeper { thin, bio })), sleeps);
                }
                LockScheme::V2013 | LockScheme::B => busy = Some(WouldBlock::Root),
                _ => {}
            }
        }
        let mapped = self.mapper().map_beside(thin, bio, busy);
        self.go_on(request, mapped);
    }

    /// Goes on with what was decided about a bio of a request.
    fn go_on(&mut self, request: u32, mapped: Mapped) {
        self.watch.mapped(&mapped);
        match mapped {
            Mapped::Remapped { bio, .. } => {
                let takes = self.device.bio(bio.op, bio.sectors, bio.is_fua);
                self.start(Io::Bio(bio), takes);
            }
            Mapped::Zero(bio) => {
                self.requests.note_zero(request);
                self.end(bio, Ok(()));
            }
            Mapped::Failed(bio, error) => self.end(bio, Err(error)),
            Mapped::Deferred(reason) => self.requests.defer(request, reason),
        }
        if self.pool.has_work() {
            self.tell(Event::Work);
        }
    }

    fn start(&mut self, io: Io, takes: u64) {
        let number = self.number();
        let takes = match io {
            Io::Bio(_) | Io::Plain(_) | Io::Job(_) => varied(takes, self.seed, number),
            Io::Ended(..) | Io::Map(..) | Io::Worker => takes,
        };
        self.ends.push(self.now, takes, number, io);
    }

    /// Begins what the worker wants done, once it is through with wanting it.
    fn start_at_free(&mut self, io: Io, takes: u64) {
        let waits = self.free_at.saturating_sub(self.now);
        self.start(io, waits.saturating_add(takes));
    }

    /// A bio is done; so may be its request.
    fn end(&mut self, bio: Box<Bio>, result: BioResult) {
        let Ok(number) = u32::try_from(bio.id) else {
            return self.of_others.push((bio, result));
        };
        self.watch.end(&bio, result);
        self.books.count_end(&bio, result);
        self.spare.keep(bio);
        if result.is_err() {
            self.requests.note_failed(number);
        }
        let Some(request) = self.requests.end(number) else {
            return;
        };
        if let Some(then) = request.then
            && result.is_ok()
        {
            let (thin, io) = &*then;
            return self.submit(thin, io, request.submitted, request.deferred, None);
        }
        if let Some(submitted) = request.submitted
            && !request.has_failed
        {
            let nanos = self.now - submitted;
            self.books
                .latencies
                .record(request.deferred, request.is_zero, nanos);
        }
    }

    /// Tells the worker, as soon as it has time.
    fn tell(&mut self, event: Event) {
        if self.now < self.free_at {
            // It looks at its inbox whatever it is told.
            if !matches!(event, Event::Work) {
                self.told.push_back(event);
            }
            return self.look_after_worker();
        }
        let mut has_more = self.work_on(event);
        while has_more || !self.told.is_empty() {
            if self.now < self.free_at {
                self.look_after_worker();
                break;
            }
            let next = self.told.pop_front().unwrap_or(Event::Work);
            has_more = self.work_on(next);
        }
        // Only the worker changes what it goes by.
        self.note_deadline();
    }

    fn look_after_worker(&mut self) {
        if !std::mem::replace(&mut self.is_awaited, true) {
            self.start(Io::Worker, self.free_at - self.now);
        }
    }

    /// The worker takes an event, and the time for it; then begins what it wants done. True if it has more to do.
    fn work_on(&mut self, event: Event) -> bool {
        let mut effects = std::mem::take(&mut self.effects);
        let counts = |pool: &Pool| (pool.block_io(), pool.commits());
        let (io, commits) = counts(&self.pool);
        let now = Duration::from_nanos(self.now);
        let has_more = self.worker.apply(now, event, &mut effects);
        let (io_after, commits_after) = counts(&self.pool);
        let device = &self.device;
        let commit = match commits_after - commits {
            0 => 0,
            n => device.commits(n, io_after.written - io.written),
        };
        let reads = device.metadata_reads(io_after.read - io.read);
        let steps = device.worker_steps(effects.len() as u64);
        let takes = reads.saturating_add(commit).saturating_add(steps);
        self.free_at = self.now.saturating_add(takes);
        if commit > 0 {
            self.root_until = self.now.saturating_add(commit);
        }
        for effect in effects.drain(..) {
            self.carry_out(effect);
        }
        self.effects = effects;
        has_more
    }

    fn carry_out(&mut self, effect: Effect) {
        let device = self.device;
        self.books.count_effect(&effect, self.pool.block_sectors());
        self.watch.effect(&effect);
        match effect {
            Effect::Issue { bio, .. } | Effect::ReadOrigin { bio, .. } => {
                let takes = device.bio(bio.op, bio.sectors, bio.is_fua);
                self.start_at_free(Io::Bio(bio), takes);
            }
            Effect::End { bio, result, .. } => {
                self.start_at_free(Io::Ended(bio, result), 0);
            }
            Effect::Zero { job, sectors, .. } => {
                self.start_at_free(Io::Job(job), device.zero(sectors));
            }
            Effect::Copy { job, sectors, .. } => {
                self.start_at_free(Io::Job(job), device.copy(sectors));
            }
            Effect::Discard { job, .. } => {
                self.start_at_free(Io::Job(job), device.bio(Op::Discard, 0, false))
            }
            Effect::Flush { job } => {
                self.start_at_free(Io::Job(job), device.bio(Op::Flush, 0, false))
            }
            Effect::Answer { tag, result } => {
                self.answers.insert(tag, result);
            }
            Effect::Notice(notice) => self.books.notice(self.now, notice),
        }
    }

    /// Lets everything happen that happens until `time`.
    #[inline]
    pub(super) fn run_until(&mut self, time: u64) {
        // Nothing happens at the end of time.
        while self.next() <= time.min(u64::MAX - 1) {
            self.happen();
        }
        self.now = self.now.max(time);
    }

    /// When something happens.
    #[inline]
    fn next(&self) -> u64 {
        self.ends.first().min(self.deadline)
    }

    /// What happens next does: the first end, or a deadline of the worker before it.
    fn happen(&mut self) {
        self.now = self.now.max(self.next());
        if self.deadline < self.ends.first() {
            return self.tell(Event::Work);
        }
        self.one_ends();
    }

    /// The first end comes, by now at the latest.
    #[inline]
    fn one_ends(&mut self) {
        match self.ends.pop() {
            Some(Io::Bio(bio)) => {
                self.watch.landed(&bio);
                if let Some((bio, result)) = self.pool.end_io(bio, Ok(())) {
                    self.end(bio, result);
                }
                if self.pool.has_work() {
                    self.tell(Event::Work);
                }
            }
            Some(Io::Plain(plain)) => {
                self.pool.end_passage(plain.passage);
                self.books.count_plain(false, self.now - plain.submitted);
                if self.pool.has_work() {
                    self.tell(Event::Work);
                }
            }
            Some(Io::Job(job)) => {
                self.watch.done(job);
                self.tell(Event::Done {
                    job,
                    result: Ok(()),
                });
            }
            Some(Io::Ended(bio, result)) => self.end(bio, result),
            Some(Io::Map(one)) => self.map(&one.thin, one.bio),
            Some(Io::Worker) => {
                self.is_awaited = false;
                let event = self.told.pop_front().unwrap_or(Event::Work);
                self.tell(event);
            }
            None => {}
        }
    }

    /// Lets everything end that is under way, but for what waits for space.
    ///
    /// # Errors
    /// `Io` if it never does.
    pub(super) fn settle(&mut self) -> Result<()> {
        for _ in 0..MOST_ROUNDS {
            let end = self.ends.first();
            if end == u64::MAX {
                return Ok(());
            }
            self.now = self.now.max(end);
            self.one_ends();
        }
        Err(self.restless())
    }

    /// Lets the worker do what it has to do, and everything end.
    pub(super) fn catch_up(&mut self) -> Result<()> {
        self.tell(Event::Work);
        self.settle()
    }

    /// Sends the worker something that is answered, and lets everything end.
    pub(super) fn ask(&mut self, event: impl FnOnce(u64) -> Event) -> Result<()> {
        let tag = self.number();
        self.tell(event(tag));
        self.settle()?;
        self.answers.remove(&tag).unwrap_or(Ok(()))
    }

    /// Commits.
    ///
    /// # Errors
    /// Those of the commit.
    pub(super) fn commit(&mut self) -> Result<()> {
        self.ask(|tag| Event::Commit { tag })
    }
}
