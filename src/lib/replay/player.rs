//! Plays a trace through the engine in virtual time: the same trace, the same result.
//!
//! The clock stands at the time of the next thing that happens: a request of the trace, the end of something on the modelled data
//! device, or a deadline of the worker. Before a control event everything ends that is under way, as a suspended device's I/O does.

use super::books::{Books, MOST_TOLD, Mark, Sample};
use super::clock::Clock;
use super::control::Control;
use super::counts::{InputCounts, Moments, WorkCounts};
use super::device::DeviceModel;
use super::devices::{Active, Devices, Place};
use super::event::{ControlEvent, TraceIo, TraceOp};
use super::heat::HeatMap;
use super::latencies::LatencyClasses;
use super::requests::{Cut, Ended, Request, Requests};
use super::verify::{Verified, Watch};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::txn::{LockScheme, WouldBlock};
use crate::pool::{
    Bio, BioResult, Effect, Event, JobId, Line, MapCounts, Mapped, Mapper, Message, Op, Pool,
    Reason, Settings, Thin, Worker,
};
use crate::thin::PoolMetadata;
use crate::units::ThinId;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// How a trace is played.
#[derive(Clone, Debug)]
pub struct PlayOptions {
    /// How the pool is set up.
    pub settings: Settings,
    /// Blocks of the data device.
    pub data_blocks: u64,
    /// Largest read or write that reaches a thin device at once, in sectors of 512 bytes.
    pub max_sectors: Option<u64>,
    /// Threads that submit: a request goes by its processor to one of them.
    pub cpus: usize,
    /// How long the data device takes.
    pub device: DeviceModel,
    /// Which thin device a device of the trace is, and its size, until a control event says something else.
    pub devices: BTreeMap<String, (ThinId, Option<u64>)>,
    /// Devices of the trace that are none of these become new thin devices.
    pub makes_devices: bool,
    /// Varies how long the data device takes, and so in which order requests end; 0 does not.
    pub seed: u64,
}

/// Something that ends on the data device.
#[derive(Debug)]
enum Io {
    Bio(Box<Bio>),
    Job(JobId),
    /// A bio that the worker has ended.
    Ended(Box<Bio>, BioResult),
    /// A bio whose submitter slept, and its processor.
    Map(Arc<Thin>, Box<Bio>, u16),
    /// The worker has time again.
    Worker,
}

/// When it ends. The number keeps things of one time in order.
#[derive(Debug)]
struct End {
    at: Duration,
    number: u64,
    io: Io,
}

impl End {
    fn key(&self) -> (Duration, u64) {
        (self.at, self.number)
    }
}

impl PartialEq for End {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for End {}

impl PartialOrd for End {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for End {
    /// The first to end is the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}

/// A trace that is being played.
#[derive(Debug)]
pub struct Player {
    pub(super) options: PlayOptions,
    pub(super) worker: Worker,
    pub(super) pool: Arc<Pool>,
    pub(super) mappers: Vec<Mapper>,
    now: Duration,
    ends: BinaryHeap<End>,
    requests: Requests,
    pub(super) devices: Devices,
    /// What the worker said last.
    deadline: Option<Duration>,
    /// The worker is busy until then, with what it was told last.
    free_at: Duration,
    /// A commit holds the root until then.
    root_until: Duration,
    /// What the worker is told when it has time.
    told: VecDeque<Event>,
    /// It will be looked after when it has.
    is_awaited: bool,
    /// Memory for the next bios.
    #[expect(clippy::vec_box, reason = "they come and go in boxes")]
    spare: Vec<Box<Bio>>,
    parts: Vec<(u64, u64)>,
    next: u64,
    effects: Vec<Effect>,
    answers: HashMap<u64, Result<()>>,
    pub(super) books: Books,
    clock: Clock,
    watch: Watch,
    /// Bios that ended and that others submitted.
    pub(super) of_others: Vec<(Box<Bio>, BioResult)>,
}

/// Rounds after which a pool that never comes to rest is an error.
const MOST_ROUNDS: u32 = 100_000_000;

impl Player {
    /// Starts a pool on its metadata.
    ///
    /// # Errors
    /// Those of [`Worker::start`].
    pub fn new(metadata: PoolMetadata, options: PlayOptions) -> Result<Self> {
        let worker = Worker::start(metadata, options.settings.clone())?;
        let pool = Arc::clone(worker.pool());
        let mappers = (0..options.cpus.max(1)).map(|_| Mapper::new(&pool, true));
        let devices = options.devices.iter();
        let active =
            devices.map(|(name, &(id, sectors))| (name.clone(), Active::new(id, sectors, None)));
        Ok(Self {
            mappers: mappers.collect(),
            devices: Devices::new(active.collect()),
            worker,
            pool,
            now: Duration::ZERO,
            ends: BinaryHeap::new(),
            requests: Requests::default(),
            deadline: None,
            free_at: Duration::ZERO,
            root_until: Duration::ZERO,
            told: VecDeque::new(),
            is_awaited: false,
            spare: Vec::new(),
            parts: Vec::new(),
            next: 0,
            effects: Vec::new(),
            answers: HashMap::new(),
            books: Books::default(),
            clock: Clock::default(),
            watch: Watch::default(),
            of_others: Vec::new(),
            options,
        })
    }

    /// What the trace asked for so far.
    pub fn input(&self) -> &InputCounts {
        &self.books.input
    }

    /// What the pool did for it so far.
    pub fn work(&self) -> &WorkCounts {
        &self.books.work
    }

    /// What the map half did, of all processors.
    pub fn mappers(&self) -> &[Mapper] {
        &self.mappers
    }

    /// How long requests took.
    pub fn latencies(&self) -> &LatencyClasses {
        &self.books.latencies
    }

    /// When the pool first ran low, and out, of space.
    pub fn moments(&self) -> Moments {
        self.books.moments
    }

    /// Where requests went, and when.
    pub fn heat(&self) -> &HeatMap {
        &self.books.heat
    }

    /// What the worker did.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// What the pool reported, and when.
    pub fn notices(&self) -> &[(Duration, String)] {
        &self.books.notices
    }

    /// How things were at the marks.
    pub fn marks(&self) -> &[Mark] {
        &self.books.marks
    }

    /// Ids of the thin devices that the trace's devices are now.
    pub fn ids(&self) -> Vec<ThinId> {
        self.devices.ids()
    }

    /// How it went on.
    pub fn timeline(&self) -> &[Sample] {
        &self.books.timeline
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The time by its clock, since the start.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Whose time that is.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// From here on the time is what the caller says, and the data device takes none.
    pub(super) fn leave_time(&mut self) {
        self.clock = Clock::Threads;
        self.options.device = DeviceModel::NULL;
    }

    /// From here on it is verified that reads find what was written, in one virtual block of `one_of`. To be called before anything is
    /// played, and by the virtual clock.
    ///
    /// # Errors
    /// `Io`, `Damaged`: the metadata cannot be read.
    pub fn verify(&mut self, one_of: u64) -> Result<()> {
        let size = self.pool.block_sectors();
        let is_unzeroed = self.options.settings.table.features.skip_block_zeroing;
        let begin = |pool: &PoolMetadata| Watch::begin_with(pool, size, is_unzeroed, one_of);
        self.watch = self.pool.inspect(begin)?;
        Ok(())
    }

    /// What was verified, if anything was to be.
    pub fn verified(&self) -> Option<&Verified> {
        self.watch.found()
    }

    /// How it is played.
    pub fn options(&self) -> &PlayOptions {
        &self.options
    }

    /// It is `now`, and others told the worker something meanwhile.
    pub(super) fn set_now(&mut self, now: Duration) {
        self.now = self.now.max(now);
        self.deadline = self.worker.deadline();
    }

    /// The pool's metadata, at the end.
    ///
    /// # Errors
    /// `Busy` if somebody else still has the pool.
    pub fn into_metadata(self) -> Result<PoolMetadata> {
        let Self {
            worker,
            pool,
            mappers,
            ..
        } = self;
        drop((mappers, pool));
        worker.into_metadata()
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Plays a request.
    ///
    /// # Errors
    /// `Io`, `Damaged`: the pool cannot be used.
    pub fn io(&mut self, device: &str, io: TraceIo) -> Result<()> {
        self.run_until(Duration::from_nanos(io.time_ns));
        self.sample(false);
        self.books.input.count(&io);
        let Some(thin) = self.target_of(device, &io)? else {
            self.books.input.out_of_range += 1;
            return Ok(());
        };
        self.books.heat.record(&io);
        if io.op == TraceOp::Discard {
            self.let_end(&thin, &io)?;
        }
        let is_flush = io.op == TraceOp::Flush || io.is_preflush;
        if !is_flush {
            self.submit(&thin, io, Some(self.now), None);
            return Ok(());
        }
        self.books.input.count_flush();
        let then = (io.op != TraceOp::Flush && io.sectors > 0).then(|| {
            let io = TraceIo {
                is_preflush: false,
                ..io
            };
            (Arc::clone(&thin), io)
        });
        let request = self.requests.begin(Request {
            thin: thin.number(),
            sector: io.sector,
            sectors: io.sectors,
            submitted: Some(self.now),
            left: 1,
            then,
            deferred: Some(Reason::Flush),
            is_zero: false,
        });
        self.map(&thin, Bio::flush(request.into()), io.cpu);
        Ok(())
    }

    /// Lets requests end that a discard overlaps. Whoever discards blocks has nothing under way there, but the modelled device may be
    /// slower than the one of the trace; and a block that somebody works on is not discarded.
    fn let_end(&mut self, thin: &Thin, io: &TraceIo) -> Result<()> {
        let end = io.sector.saturating_add(io.sectors);
        for _ in 0..MOST_ROUNDS {
            let overlaps = |request: &Request| {
                request.thin == thin.number()
                    && request.sector < end
                    && io.sector < request.sector.saturating_add(request.sectors)
            };
            if !self.requests.iter().any(overlaps) {
                return Ok(());
            }
            // What waits for space has no end.
            let Some(next) = self.next_end() else {
                return Ok(());
            };
            self.happen(next, Some(next));
        }
        Err(self.restless())
    }

    fn restless(&self) -> Error {
        let message = format!("the pool did not come to rest: {:?}", self.worker);
        Error::new(ErrorKind::Io, message)
    }

    /// Notes how much is in use, if it is time to.
    fn sample(&mut self, always: bool) {
        if !always && self.now < self.books.next_sample() {
            return;
        }
        let mut counts = MapCounts::default();
        for mapper in &self.mappers {
            counts.add(mapper.counts());
        }
        let worker = self.worker.counts();
        self.books.sample(self.now, &self.pool, &counts, worker);
    }

    /// Ends the replay: everything ends, and is committed.
    ///
    /// # Errors
    /// `Io` when the pool does not come to rest.
    pub fn finish(&mut self) -> Result<()> {
        self.settle()?;
        // A pool that must not commit has said so.
        self.commit().ok();
        self.sample(true);
        self.pool.inspect(|pool| self.watch.sweep(pool))
    }

    /// The thin device that a request goes to; none if it goes nowhere.
    fn target_of(&mut self, device: &str, io: &TraceIo) -> Result<Option<Arc<Thin>>> {
        if matches!(self.devices.find(io), Place::Unknown) {
            self.resolve(device, io.device)?;
        }
        Ok(match self.devices.find(io) {
            Place::Thin(thin, end) => {
                let thin = Arc::clone(thin);
                self.devices.note(io.device, end);
                Some(thin)
            }
            Place::Nowhere | Place::Unknown => None,
        })
    }

    /// Finds out which thin device a device of the trace is; makes it, if it is to be made.
    pub(super) fn resolve(&mut self, device: &str, number: u32) -> Result<()> {
        if !self.devices.active.contains_key(device) && self.options.makes_devices {
            self.make_device(device)?;
        }
        self.devices.resolve(device, number, &mut self.worker)
    }

    /// Makes a thin device, of the first id that is free, for a device of the trace.
    fn make_device(&mut self, device: &str) -> Result<()> {
        let taken = self.pool.inspect(PoolMetadata::devices)?;
        let used: Vec<ThinId> = taken.into_iter().chain(self.ids()).collect();
        let id = (0..).map(ThinId).find(|id| !used.contains(id));
        let id = id.unwrap_or_default();
        self.ask(|tag| Event::Message {
            tag,
            message: Message::CreateThin(id),
        })?;
        self.devices
            .active
            .insert(device.into(), Active::new(id, None, None));
        Ok(())
    }

    /// Makes the thin devices that the trace's devices are to be, where they do not exist.
    ///
    /// # Errors
    /// Those of the pool.
    pub fn make_mapped_devices(&mut self) -> Result<()> {
        for id in self.ids() {
            if self.pool.inspect(|pool| pool.details(id).is_err()) {
                let message = Message::CreateThin(id);
                self.ask(|tag| Event::Message { tag, message })?;
            }
        }
        Ok(())
    }

    /// Submits a request without its flush, cut into bios.
    fn submit(
        &mut self,
        thin: &Arc<Thin>,
        io: TraceIo,
        submitted: Option<Duration>,
        deferred: Option<Reason>,
    ) {
        let size = self.pool.block_sectors();
        let parts = std::mem::take(&mut self.parts);
        let cut = Cut::new(&io, self.options.max_sectors, size, parts);
        self.books.input.count_bios(&io, &cut, size);
        if !cut.parts.is_empty() {
            let request = self.requests.begin(Request {
                submitted,
                thin: thin.number(),
                sector: io.sector,
                sectors: io.sectors,
                left: cut.parts.len() as u32,
                then: None,
                deferred,
                is_zero: false,
            });
            for &part in &cut.parts {
                self.map(thin, cut.bio(request.into(), part), io.cpu);
            }
        }
        self.parts = cut.parts;
    }

    fn map(&mut self, thin: &Arc<Thin>, bio: Bio, cpu: u16) {
        self.watch.begin(thin.id(), &bio);
        let bio = match self.spare.pop() {
            Some(mut memory) => {
                *memory = bio;
                memory
            }
            None => Box::new(bio),
        };
        self.map_boxed(thin, bio, cpu);
    }

    fn map_boxed(&mut self, thin: &Arc<Thin>, bio: Box<Bio>, cpu: u16) {
        let id = bio.id;
        let mapper = usize::from(cpu) % self.mappers.len();
        let mut busy = None;
        if self.now < self.root_until {
            // What else there is goes to the worker in any case.
            let is_looked_up = matches!(bio.op, Op::Read | Op::Write) && !bio.is_fua;
            match self.options.settings.scheme {
                LockScheme::Kernel if is_looked_up => {
                    self.books.work.root_waits += 1;
                    let sleeps = self.root_until - self.now;
                    self.books.work.root_wait_ns += sleeps.as_nanos() as u64;
                    return self.start(Io::Map(Arc::clone(thin), bio, cpu), sleeps);
                }
                LockScheme::V2013 | LockScheme::B => busy = Some(WouldBlock::Root),
                _ => {}
            }
        }
        let mapped = self.mappers[mapper].map_beside(thin, bio, busy);
        self.watch.mapped(&mapped);
        match mapped {
            Mapped::Remapped { bio, .. } => self.issue(bio),
            Mapped::Zero(bio) => {
                self.requests.note_zero(id as u32);
                self.end(bio, Ok(()));
            }
            Mapped::Failed(bio, error) => self.end(bio, Err(error)),
            Mapped::Deferred(reason) => self.requests.defer(id as u32, reason),
        }
        if self.pool.has_work() {
            self.tell(Event::Work);
        }
    }

    fn issue(&mut self, bio: Box<Bio>) {
        let takes = self.options.device.bio(bio.op, bio.sectors, bio.is_fua);
        self.start(Io::Bio(bio), takes);
    }

    fn start(&mut self, io: Io, takes: Duration) {
        let number = self.number();
        let varies = match io {
            Io::Bio(_) | Io::Job(_) => self.options.device.variation(self.options.seed, number),
            Io::Ended(..) | Io::Map(..) | Io::Worker => Duration::ZERO,
        };
        let at = self.now + takes + varies;
        self.ends.push(End { at, number, io });
    }

    /// Begins what the worker wants done, once it is through with wanting it.
    fn start_at_free(&mut self, io: Io, takes: Duration) {
        let waits = self.free_at.saturating_sub(self.now);
        self.start(io, waits + takes);
    }

    /// A bio is done; so may be its request.
    fn end(&mut self, bio: Box<Bio>, result: BioResult) {
        let Ok(number) = u32::try_from(bio.id) else {
            return self.of_others.push((bio, result));
        };
        self.watch.end(&bio, result);
        self.books.count_end(result);
        self.spare.push(bio);
        let Ended::All(request) = self.requests.end(number) else {
            return;
        };
        if let Some((thin, io)) = request.then
            && result.is_ok()
        {
            return self.submit(&thin, io, request.submitted, request.deferred);
        }
        if let Some(submitted) = request.submitted {
            let nanos = (self.now - submitted).as_nanos() as u64;
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
        let mut event = Some(event);
        while let Some(told) = event.take() {
            let has_more = self.work_on(told);
            if has_more || !self.told.is_empty() {
                if self.now < self.free_at {
                    self.look_after_worker();
                    break;
                }
                event = Some(self.told.pop_front().unwrap_or(Event::Work));
            }
        }
        // Only the worker changes what it goes by.
        self.deadline = self.worker.deadline();
    }

    fn look_after_worker(&mut self) {
        if !std::mem::replace(&mut self.is_awaited, true) {
            self.start(Io::Worker, self.free_at - self.now);
        }
    }

    /// The worker takes an event, and the time for it; then begins what it wants done. True if it has more to do.
    fn work_on(&mut self, event: Event) -> bool {
        let mut effects = std::mem::take(&mut self.effects);
        let counts = |pool: &Pool| (pool.inspect(PoolMetadata::block_io), pool.commits());
        let (io, commits) = counts(&self.pool);
        let has_more = self.worker.apply(self.now, event, &mut effects);
        let (io_after, commits_after) = counts(&self.pool);
        let device = &self.options.device;
        let steps = u32::try_from(effects.len()).unwrap_or(u32::MAX);
        let commit = match commits_after - commits {
            0 => Duration::ZERO,
            n => device.commits(n, io_after.written - io.written),
        };
        let reads = device.metadata_reads(io_after.read - io.read);
        self.free_at = self.now + reads + commit + device.worker_step * steps;
        if !commit.is_zero() {
            self.root_until = self.now + commit;
        }
        for effect in effects.drain(..) {
            self.carry_out(effect);
        }
        self.effects = effects;
        has_more
    }

    fn carry_out(&mut self, effect: Effect) {
        let device = self.options.device;
        self.books.count_effect(&effect, self.pool.block_sectors());
        self.watch.effect(&effect);
        match effect {
            Effect::Issue { bio, .. } | Effect::ReadOrigin { bio, .. } => {
                let takes = device.bio(bio.op, bio.sectors, bio.is_fua);
                self.start_at_free(Io::Bio(bio), takes);
            }
            Effect::End { bio, result, .. } => {
                self.start_at_free(Io::Ended(bio, result), Duration::ZERO);
            }
            Effect::Zero { job, sectors, .. } => {
                self.start_at_free(Io::Job(job), device.zero(sectors));
            }
            Effect::Copy { job, sectors, .. } => {
                self.start_at_free(Io::Job(job), device.copy(sectors));
            }
            Effect::Discard { job, .. } => self.start_at_free(Io::Job(job), device.discard),
            Effect::Flush { job } => self.start_at_free(Io::Job(job), device.flush),
            Effect::Answer { tag, result } => {
                self.answers.insert(tag, result);
            }
            Effect::Notice(notice) => self.books.notice(self.now, notice),
        }
    }

    /// When the next thing happens by itself.
    fn next_end(&self) -> Option<Duration> {
        self.ends.peek().map(|end| end.at)
    }

    /// Lets everything happen that happens until `time`.
    fn run_until(&mut self, time: Duration) {
        loop {
            let end = self.next_end();
            let deadline = self.deadline.map(|at| at.max(self.free_at));
            let next = end.into_iter().chain(deadline).min();
            let Some(next) = next.filter(|&next| next <= time) else {
                break;
            };
            self.happen(next, end);
        }
        self.now = self.now.max(time);
    }

    fn happen(&mut self, next: Duration, end: Option<Duration>) {
        self.now = self.now.max(next);
        if end != Some(next) {
            return self.tell(Event::Work);
        }
        match self.ends.pop().map(|end| end.io) {
            Some(Io::Bio(bio)) => {
                self.watch.landed(&bio);
                if let Some((bio, result)) = self.pool.end_io(bio, Ok(())) {
                    self.end(bio, result);
                }
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
            Some(Io::Map(thin, bio, cpu)) => self.map_boxed(&thin, bio, cpu),
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
    pub fn settle(&mut self) -> Result<()> {
        for _ in 0..MOST_ROUNDS {
            let Some(end) = self.next_end() else {
                return Ok(());
            };
            self.happen(end, Some(end));
        }
        Err(self.restless())
    }

    /// Lets the worker do what it has to do, and everything end.
    pub(super) fn catch_up(&mut self) -> Result<()> {
        self.tell(Event::Work);
        self.settle()
    }

    /// Sends the worker something that is answered, and lets everything end.
    fn ask(&mut self, event: impl FnOnce(u64) -> Event) -> Result<()> {
        let tag = self.number();
        self.tell(event(tag));
        self.settle()?;
        self.answers.remove(&tag).unwrap_or(Ok(()))
    }

    /// Commits.
    ///
    /// # Errors
    /// Those of the commit.
    pub fn commit(&mut self) -> Result<()> {
        self.ask(|tag| Event::Commit { tag })
    }

    /// Carries out a control event. Refusals of the pool are counted.
    ///
    /// # Errors
    /// `InvalidDescription` if its arguments are wrong; `Io` when the pool does not come to rest.
    pub fn control(&mut self, event: &ControlEvent) -> Result<()> {
        if self.clock == Clock::Virtual {
            self.run_until(Duration::from_nanos(event.time_ns));
        }
        self.settle()?;
        self.devices.forget_targets();
        self.books.input.controls += 1;
        let refused = match event.text.parse::<Control>()? {
            Control::Message(message) => {
                let watch = &mut self.watch;
                let before = |pool: &PoolMetadata| watch.before_message(message, pool);
                self.pool.inspect(before)?;
                let done = self.ask(|tag| Event::Message { tag, message });
                if done.is_ok() {
                    self.watch.message(message);
                    self.books.input.count_message(message);
                }
                done
            }
            Control::Activate {
                device,
                id,
                sectors,
                origin_sectors,
            } => {
                self.deactivate(&device);
                self.watch.opened(id, origin_sectors);
                let active = Active::new(id, Some(sectors), origin_sectors);
                self.devices.active.insert(device, active);
                Ok(())
            }
            Control::Deactivate { device } => {
                self.deactivate(&device);
                Ok(())
            }
            Control::Resize { sectors } => {
                self.options.data_blocks = sectors / self.pool.block_sectors();
                Ok(())
            }
            Control::Suspend => self.ask(|tag| Event::Suspend {
                tag,
                is_noflush: false,
            }),
            Control::Resume => {
                let data_blocks = self.options.data_blocks;
                self.ask(|tag| Event::Resume {
                    tag,
                    table: None,
                    data_blocks,
                })
            }
            Control::Mark(name) => {
                self.mark(name)?;
                Ok(())
            }
            Control::Refused(reason) => Err(Error::new(ErrorKind::InvalidArgument, reason)),
            Control::Unknown(text) => {
                self.books.input.unknown_controls += 1;
                if self.books.input.unknown_controls <= MOST_TOLD {
                    let text = format!("{text:?} is no event that is known; it was left out");
                    self.books.notices.push((self.now, text));
                }
                Ok(())
            }
        };
        if let Err(e) = refused {
            self.books.input.refused_controls += 1;
            if self.books.input.refused_controls > MOST_TOLD {
                return Ok(());
            }
            let text = format!("{:?} was refused: {e}", event.text);
            self.books.notices.push((self.now, text));
        }
        Ok(())
    }

    fn deactivate(&mut self, device: &str) {
        if let Some(thin) = self
            .devices
            .active
            .remove(device)
            .and_then(|active| active.thin)
        {
            self.worker.close_thin(&thin);
        }
    }

    /// Notes how things are, after a commit.
    ///
    /// # Errors
    /// `Io` when the pool does not come to rest.
    pub fn mark(&mut self, name: String) -> Result<()> {
        // A pool that must not commit says how it is all the same.
        self.commit().ok();
        let size = self.pool.block_sectors();
        let sectors = self.options.data_blocks * size;
        let words = self.worker.pool_status();
        self.devices.forget_targets();
        for active in self.devices.active.values_mut() {
            // In a pool that has failed none can be opened.
            active.open(&mut self.worker).ok();
        }
        let thins = self.devices.active.iter().filter_map(|(device, active)| {
            let thin = active.thin.as_ref()?;
            let words = self.worker.thin_status(thin);
            let sectors = active.sectors.unwrap_or(active.seen);
            Some((device.clone(), Line { sectors, words }.to_string()))
        });
        let thins = thins.collect();
        let status = self.pool.inspect(PoolMetadata::status)?;
        self.books.marks.push(Mark {
            source: None,
            name,
            time_ns: self.now.as_nanos() as u64,
            pool: Line { sectors, words }.to_string(),
            thins,
            allocated_metadata_blocks: status.allocated_metadata_blocks,
        });
        Ok(())
    }
}
