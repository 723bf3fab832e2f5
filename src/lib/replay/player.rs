//! Plays a trace through the engine in virtual time: the same trace, the same result.
//!
//! The clock stands at the time of the next thing that happens: a request of the trace, the end of something on the modelled data
//! device, or a deadline of the worker. Before a control event everything ends that is under way, as a suspended device's I/O does.

use super::control::Control;
use super::counts::{ByReason, InputCounts, Moments, WorkCounts};
use super::device::DeviceModel;
use super::event::{ControlEvent, TraceIo, TraceOp};
use super::heat::HeatMap;
use super::latencies::LatencyClasses;
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::txn::{LockScheme, WouldBlock};
use crate::pool::{
    Bio, BioError, BioResult, Effect, Event, JobId, Line, MapCounts, Mapped, Mapper, Message,
    Notice, Op, Pool, PoolMode, Reason, Settings, Source, Thin, Worker, pieces,
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
}

/// How things were at a mark.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Mark {
    /// Which of the reports it is of, in one that was merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Its name.
    pub name: String,
    /// Nanoseconds of virtual time.
    pub time_ns: u64,
    /// The pool's status line.
    pub pool: String,
    /// The status lines of the thin devices that are active, by the name of the trace's device.
    pub thins: BTreeMap<String, String>,
    /// Metadata blocks in use, without those kept back.
    pub allocated_metadata_blocks: u64,
}

/// How much was in use at a time, and what was counted until then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Sample {
    /// Nanoseconds of virtual time.
    pub time_ns: u64,
    /// Data blocks in use.
    pub used_data_blocks: u64,
    /// Metadata blocks in use, those included that are kept back.
    pub used_metadata_blocks: u64,
    /// Bios.
    pub bios: u64,
    /// Bios that the map half left to the worker, by reason.
    pub deferred: ByReason,
    /// Blocks copied because sharing was broken.
    pub copies: u64,
    /// Mappings that discards removed.
    pub unmapped: u64,
    /// Commits that wrote something.
    pub commits: u64,
    /// Metadata blocks read, and written.
    pub metadata_blocks_read: u64,
    /// Metadata blocks written.
    pub metadata_blocks_written: u64,
}

/// Samples that a timeline has, at most; then every second one goes.
const MOST_SAMPLES: usize = 400;

/// A device of the trace that is a thin device now.
#[derive(Debug)]
struct Active {
    thin: Option<Arc<Thin>>,
    id: ThinId,
    sectors: Option<u64>,
    origin_sectors: Option<u64>,
    /// The end of what was asked for so far.
    seen: u64,
}

impl Active {
    /// Opens the device if it exists by now.
    fn open(&mut self, worker: &mut Worker) -> Result<()> {
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

/// A request of the trace, whose bios have not all ended.
#[derive(Debug)]
struct Request {
    submitted: Duration,
    left: u32,
    /// The write that its flush is in front of.
    then: Option<TraceIo>,
    /// Why the map half left it, or its flush, to the worker first.
    deferred: Option<Reason>,
    is_zero: bool,
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

/// A device of the trace as the requests to it need it; until the next control event.
#[derive(Debug)]
struct Target {
    thin: Arc<Thin>,
    sectors: u64,
    /// The end of what was asked for so far.
    seen: u64,
}

/// A trace that is being played.
#[derive(Debug)]
pub struct Player {
    options: PlayOptions,
    worker: Worker,
    pool: Arc<Pool>,
    mappers: Vec<Mapper>,
    now: Duration,
    ends: BinaryHeap<End>,
    /// By the number that their bios have, and numbers that are free.
    requests: (Vec<Option<Request>>, Vec<u64>),
    active: BTreeMap<String, Active>,
    /// Those of them that were asked for something, by the trace's number for them.
    targets: Vec<Option<Target>>,
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
    input: InputCounts,
    work: WorkCounts,
    latencies: LatencyClasses,
    moments: Moments,
    heat: HeatMap,
    notices: Vec<(Duration, String)>,
    marks: Vec<Mark>,
    timeline: Vec<Sample>,
    /// Time between samples.
    step: Duration,
}

/// Control events of a kind that are told one by one; the others are counted.
const MOST_TOLD: u64 = 100;

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
        let active = devices.map(|(name, &(id, sectors))| {
            let active = Active {
                thin: None,
                id,
                sectors,
                origin_sectors: None,
                seen: 0,
            };
            (name.clone(), active)
        });
        Ok(Self {
            mappers: mappers.collect(),
            active: active.collect(),
            worker,
            pool,
            now: Duration::ZERO,
            ends: BinaryHeap::new(),
            requests: Default::default(),
            targets: Vec::new(),
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
            input: InputCounts::default(),
            work: WorkCounts::default(),
            latencies: LatencyClasses::default(),
            moments: Moments::default(),
            heat: HeatMap::default(),
            notices: Vec::new(),
            marks: Vec::new(),
            timeline: Vec::new(),
            step: Duration::from_millis(1),
            options,
        })
    }

    /// What the trace asked for so far.
    pub fn input(&self) -> &InputCounts {
        &self.input
    }

    /// What the pool did for it so far.
    pub fn work(&self) -> &WorkCounts {
        &self.work
    }

    /// What the map half did, of all processors.
    pub fn mappers(&self) -> &[Mapper] {
        &self.mappers
    }

    /// How long requests took.
    pub fn latencies(&self) -> &LatencyClasses {
        &self.latencies
    }

    /// When the pool first ran low, and out, of space.
    pub fn moments(&self) -> Moments {
        self.moments
    }

    /// Where requests went, and when.
    pub fn heat(&self) -> &HeatMap {
        &self.heat
    }

    /// What the worker did.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// What the pool reported, and when.
    pub fn notices(&self) -> &[(Duration, String)] {
        &self.notices
    }

    /// How things were at the marks.
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// Ids of the thin devices that the trace's devices are now.
    pub fn ids(&self) -> Vec<ThinId> {
        let mut ids: Vec<ThinId> = self.active.values().map(|active| active.id).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// How it went on.
    pub fn timeline(&self) -> &[Sample] {
        &self.timeline
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The virtual time.
    pub fn now(&self) -> Duration {
        self.now
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
        self.input.requests += 1;
        let size = io.sectors.saturating_mul(512);
        match io.op {
            TraceOp::Read => {
                self.input.reads += 1;
                self.input.bytes_read += size;
            }
            TraceOp::Write | TraceOp::WriteZeroes => {
                self.input.writes += 1;
                self.input.bytes_written += size;
            }
            TraceOp::Discard => self.input.discards += 1,
            TraceOp::Flush => {}
        }
        let Some(thin) = self.target_of(device, &io)? else {
            self.input.out_of_range += 1;
            return Ok(());
        };
        self.heat.record(&io);
        let is_flush = io.op == TraceOp::Flush || io.is_preflush;
        if !is_flush {
            self.submit(&thin, io, self.now, None);
            return Ok(());
        }
        self.input.flushes += 1;
        self.input.map_calls += 1;
        let then = (io.op != TraceOp::Flush && io.sectors > 0).then_some(TraceIo {
            is_preflush: false,
            ..io
        });
        let request = self.begin(Request {
            submitted: self.now,
            left: 1,
            then,
            deferred: Some(Reason::Flush),
            is_zero: false,
        });
        self.map(&thin, Bio::flush(request), io.cpu);
        Ok(())
    }

    /// Notes how much is in use, if it is time to.
    fn sample(&mut self, always: bool) {
        let now = self.now.as_nanos() as u64;
        let last = self.timeline.last().map(|s| s.time_ns);
        if !always && last.is_some_and(|last| now < last + self.step.as_nanos() as u64) {
            return;
        }
        let (used_data_blocks, used_metadata_blocks) = self.pool.inspect(PoolMetadata::used_blocks);
        let metadata = self.pool.inspect(PoolMetadata::block_io);
        let mut counts = MapCounts::default();
        for mapper in &self.mappers {
            counts.add(mapper.counts());
        }
        let worker = self.worker.counts();
        self.timeline.push(Sample {
            time_ns: now,
            used_data_blocks,
            used_metadata_blocks,
            bios: counts.bios,
            deferred: ByReason(counts.deferred),
            copies: self.work.copies,
            unmapped: worker.unmapped,
            commits: worker.commits.total(),
            metadata_blocks_read: metadata.read,
            metadata_blocks_written: metadata.written,
        });
        if self.timeline.len() > MOST_SAMPLES {
            let mut keep = false;
            self.timeline.retain(|_| {
                keep = !keep;
                keep
            });
            self.step *= 2;
        }
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
        Ok(())
    }

    fn begin(&mut self, request: Request) -> u64 {
        let (requests, free) = &mut self.requests;
        let number = free.pop().unwrap_or(requests.len() as u64);
        match requests.get_mut(number as usize) {
            Some(slot) => *slot = Some(request),
            None => requests.push(Some(request)),
        }
        number
    }

    fn request(&mut self, number: u64) -> Option<&mut Request> {
        self.requests.0.get_mut(number as usize)?.as_mut()
    }

    /// The thin device that a request goes to; none if it goes nowhere.
    fn target_of(&mut self, device: &str, io: &TraceIo) -> Result<Option<Arc<Thin>>> {
        let number = io.device as usize;
        if let Some(Some(target)) = self.targets.get_mut(number) {
            let end = io.sector.checked_add(io.sectors);
            let Some(end) = end.filter(|&end| end <= target.sectors) else {
                return Ok(None);
            };
            target.seen = target.seen.max(end);
            return Ok(Some(Arc::clone(&target.thin)));
        }
        let thin = self.thin_of(device, io)?;
        if let (Some(thin), Some(active)) = (&thin, self.active.get(device)) {
            if self.targets.len() <= number {
                self.targets.resize_with(number + 1, || None);
            }
            self.targets[number] = Some(Target {
                thin: Arc::clone(thin),
                sectors: active.sectors.unwrap_or(u64::MAX),
                seen: active.seen,
            });
        }
        Ok(thin)
    }

    /// Forgets what the requests so far were to: that may change.
    fn forget_targets(&mut self) {
        for target in self.targets.drain(..).flatten() {
            let number = target.thin.number();
            let is_it = |active: &&mut Active| {
                active
                    .thin
                    .as_ref()
                    .is_some_and(|thin| thin.number() == number)
            };
            for active in self
                .active
                .values_mut()
                .filter_map(|a| Some(a).filter(is_it))
            {
                active.seen = active.seen.max(target.seen);
            }
        }
    }

    /// The thin device that a device of the trace is; none if a request to it goes nowhere.
    fn thin_of(&mut self, device: &str, io: &TraceIo) -> Result<Option<Arc<Thin>>> {
        if !self.active.contains_key(device) && self.options.makes_devices {
            self.make_device(device)?;
        }
        let Some(active) = self.active.get_mut(device) else {
            return Ok(None);
        };
        let end = io.sector.checked_add(io.sectors);
        let size = active.sectors.unwrap_or(u64::MAX);
        if end.is_none_or(|end| end > size) {
            return Ok(None);
        }
        active.seen = active.seen.max(end.unwrap_or(0));
        active.open(&mut self.worker)?;
        Ok(active.thin.clone())
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
        let active = Active {
            thin: None,
            id,
            sectors: None,
            origin_sectors: None,
            seen: 0,
        };
        self.active.insert(device.into(), active);
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
        submitted: Duration,
        deferred: Option<Reason>,
    ) {
        let op = match io.op {
            TraceOp::Read => Op::Read,
            TraceOp::Discard => Op::Discard,
            _ => Op::Write,
        };
        let size = self.pool.block_sectors();
        if op == Op::Discard {
            self.input.count_discard(&io, size);
        }
        let max = self.options.max_sectors.filter(|_| op != Op::Discard);
        let max = max.unwrap_or(u64::MAX).max(1);
        let mut bios = std::mem::take(&mut self.parts);
        let (mut at, end) = (io.sector, io.sector + io.sectors);
        while at < end {
            let part = max.min(end - at);
            bios.extend(pieces(op, at, part, size));
            at += part;
        }
        self.input.map_calls += match op {
            Op::Discard => 1,
            _ => bios.len() as u64,
        };
        let left = bios.len() as u32;
        if left == 0 {
            self.parts = bios;
            return;
        }
        let request = self.begin(Request {
            submitted,
            left,
            then: None,
            deferred,
            is_zero: false,
        });
        for (sector, sectors) in bios.drain(..) {
            let bio = Bio::new(request, op, sector, sectors);
            let bio = if io.is_fua && op == Op::Write {
                bio.with_fua()
            } else {
                bio
            };
            self.map(thin, bio, io.cpu);
        }
        self.parts = bios;
    }

    fn map(&mut self, thin: &Arc<Thin>, bio: Bio, cpu: u16) {
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
            match self.options.settings.scheme {
                LockScheme::Kernel if bio.op != Op::Flush => {
                    self.work.root_waits += 1;
                    let sleeps = self.root_until - self.now;
                    self.work.root_wait_ns += sleeps.as_nanos() as u64;
                    return self.start(Io::Map(Arc::clone(thin), bio, cpu), sleeps);
                }
                LockScheme::V2013 | LockScheme::B => busy = Some(WouldBlock::Root),
                _ => {}
            }
        }
        match self.mappers[mapper].map_beside(thin, bio, busy) {
            Mapped::Remapped { bio, .. } => self.issue(bio),
            Mapped::Zero(bio) => {
                if let Some(request) = self.request(id) {
                    request.is_zero = true;
                }
                self.end(bio, Ok(()));
            }
            Mapped::Failed(bio, error) => self.end(bio, Err(error)),
            Mapped::Deferred(reason) => {
                if let Some(request) = self.request(id) {
                    request.deferred.get_or_insert(reason);
                }
            }
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
        let at = self.now + takes;
        self.ends.push(End { at, number, io });
    }

    /// Begins what the worker wants done, once it is through with wanting it.
    fn start_at_free(&mut self, io: Io, takes: Duration) {
        let waits = self.free_at.saturating_sub(self.now);
        self.start(io, waits + takes);
    }

    /// A bio is done; so may be its request.
    fn end(&mut self, bio: Box<Bio>, result: BioResult) {
        if let Err(error) = result {
            self.work.failed += 1;
            self.work.no_space += u64::from(error == BioError::NoSpace);
        }
        let (number, thin) = (bio.id, bio.thin_number());
        self.spare.push(bio);
        match self.request(number) {
            Some(request) if request.left > 1 => return request.left -= 1,
            _ => {}
        }
        let ended = self.requests.0.get_mut(number as usize);
        let Some(request) = ended.and_then(Option::take) else {
            return;
        };
        self.requests.1.push(number);
        if let Some(io) = request.then
            && result.is_ok()
            && let Some(thin) = self.worker.thin(thin)
        {
            return self.submit(&thin, io, request.submitted, request.deferred);
        }
        let nanos = (self.now - request.submitted).as_nanos() as u64;
        self.latencies
            .record(request.deferred, request.is_zero, nanos);
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
        match effect {
            Effect::Issue { bio, .. } => {
                self.work.overwritten += u64::from(bio.fills_a_new_block());
                let takes = device.bio(bio.op, bio.sectors, bio.is_fua);
                self.start_at_free(Io::Bio(bio), takes);
            }
            Effect::ReadOrigin { bio, .. } => {
                let takes = device.bio(bio.op, bio.sectors, bio.is_fua);
                self.start_at_free(Io::Bio(bio), takes);
            }
            Effect::End { bio, result, .. } => {
                self.start_at_free(Io::Ended(bio, result), Duration::ZERO)
            }
            Effect::Zero { job, sectors, .. } => {
                // Behind what was copied it is no block of its own.
                self.work.zeroed += u64::from(sectors == self.pool.block_sectors());
                self.work.bytes_zeroed += sectors * 512;
                self.start_at_free(Io::Job(job), device.zero(sectors));
            }
            Effect::Copy {
                job, from, sectors, ..
            } => {
                match from {
                    Source::Data => self.work.copies += 1,
                    Source::Origin(_) => self.work.origin_copies += 1,
                }
                self.work.bytes_copied += sectors * 512;
                self.start_at_free(Io::Job(job), device.copy(sectors));
            }
            Effect::Discard { job, sectors, .. } => {
                self.work.passed_down += 1;
                self.work.bytes_passed_down += sectors * 512;
                self.start_at_free(Io::Job(job), device.discard);
            }
            Effect::Flush { job } => {
                self.work.data_flushes += 1;
                self.start_at_free(Io::Job(job), device.flush);
            }
            Effect::Answer { tag, result } => {
                self.answers.insert(tag, result);
            }
            Effect::Notice(notice) => {
                let now = self.now.as_nanos() as u64;
                let text = match notice {
                    Notice::Mode(mode) => {
                        if mode == PoolMode::OutOfDataSpace {
                            self.moments.out_of_space_ns.get_or_insert(now);
                        }
                        format!("the pool is in mode {mode}")
                    }
                    Notice::LowWater => {
                        self.moments.low_water_ns.get_or_insert(now);
                        "free data blocks are down to the low-water mark".into()
                    }
                    // It comes again and again while metadata is low.
                    Notice::MetadataThreshold => return,
                    Notice::Deadlock(waits) => {
                        self.work.deadlocks += 1;
                        let waits: Vec<String> = waits.iter().map(ToString::to_string).collect();
                        format!("a deadlock of cells: {}", waits.join("; "))
                    }
                    Notice::NoSpaceTimeout => "writes waited for space too long and fail".into(),
                    Notice::MetadataFailed(e) => format!("the metadata failed: {e}"),
                };
                self.notices.push((self.now, text));
            }
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
                if let Some((bio, result)) = self.pool.end_io(bio, Ok(())) {
                    self.end(bio, result);
                }
                if self.pool.has_work() {
                    self.tell(Event::Work);
                }
            }
            Some(Io::Job(job)) => self.tell(Event::Done {
                job,
                result: Ok(()),
            }),
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
        Err(Error::new(
            ErrorKind::Io,
            format!("the pool did not come to rest: {:?}", self.worker),
        ))
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
        self.run_until(Duration::from_nanos(event.time_ns));
        self.settle()?;
        self.forget_targets();
        self.input.controls += 1;
        let refused = match event.text.parse::<Control>()? {
            Control::Message(message) => {
                let done = self.ask(|tag| Event::Message { tag, message });
                if done.is_ok() {
                    self.input.count_message(message);
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
                let active = Active {
                    thin: None,
                    id,
                    sectors: Some(sectors),
                    origin_sectors,
                    seen: 0,
                };
                self.active.insert(device, active);
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
                self.input.unknown_controls += 1;
                if self.input.unknown_controls <= MOST_TOLD {
                    let text = format!("{text:?} is no event that is known; it was left out");
                    self.notices.push((self.now, text));
                }
                Ok(())
            }
        };
        if let Err(e) = refused {
            self.input.refused_controls += 1;
            if self.input.refused_controls > MOST_TOLD {
                return Ok(());
            }
            let text = format!("{:?} was refused: {e}", event.text);
            self.notices.push((self.now, text));
        }
        Ok(())
    }

    fn deactivate(&mut self, device: &str) {
        if let Some(thin) = self.active.remove(device).and_then(|active| active.thin) {
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
        self.forget_targets();
        for active in self.active.values_mut() {
            // In a pool that has failed none can be opened.
            active.open(&mut self.worker).ok();
        }
        let thins = self.active.iter().filter_map(|(device, active)| {
            let thin = active.thin.as_ref()?;
            let words = self.worker.thin_status(thin);
            let sectors = active.sectors.unwrap_or(active.seen);
            Some((device.clone(), Line { sectors, words }.to_string()))
        });
        let thins = thins.collect();
        let status = self.pool.inspect(PoolMetadata::status)?;
        self.marks.push(Mark {
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
