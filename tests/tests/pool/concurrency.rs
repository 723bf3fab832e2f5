//! The engine on real threads: some that submit, one that is the worker, some that are the data device.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::io::{BlockEngine, RamEngine};
use thintools::pdata::txn::LockScheme;
use thintools::pool::{
    Bio, BioResult, Effect, Event, JobId, Mapped, Mapper, Op, Pool, Settings, Source, Thin, Worker,
};
use thintools::thin::PoolMetadata;
use thintools::units::ThinId;

use super::disk::{CHUNK, Disk, Tag};
use super::model::Model;
use super::rig::{BLOCK, settings};
use super::scene::{assert_sound, image_of};
use super::simulation::ios_of;

/// What the worker's thread is told.
enum Told {
    Event(Event),
    Open(u64, Sender<Arc<Thin>>),
    Close(Arc<Thin>),
    Stop,
}

/// What the device is asked to do.
enum Request {
    Bio(Box<Bio>, u64),
    Zero(JobId, u64, u64),
    Copy(JobId, u64, u64, u64),
    Discard(JobId, u64, u64),
    Flush(JobId),
}

#[derive(Default)]
struct Results {
    done: BTreeMap<u64, (BioResult, Vec<Tag>)>,
    answers: BTreeMap<u64, thintools::Result<()>>,
}

/// A pool and everything around it.
struct Machine {
    pool: Arc<Pool>,
    told: Mutex<Sender<Told>>,
    disk: Mutex<Disk>,
    requests: Mutex<Vec<Request>>,
    has_request: Condvar,
    results: Mutex<Results>,
    has_result: Condvar,
    stops: AtomicBool,
    history: Mutex<History>,
}

/// What was asked for and what came of it, in the order in which it was.
#[derive(Default)]
struct History {
    now: u64,
    next: u64,
    models: BTreeMap<u64, Model>,
}

impl Machine {
    fn tell(&self, told: Told) {
        let sender = self.told.lock().expect("no panic");
        // Who comes last may find the worker gone.
        sender.send(told).ok();
    }

    fn request(&self, request: Request) {
        self.requests.lock().expect("no panic").push(request);
        self.has_request.notify_one();
    }

    fn end(&self, bio: Bio, result: BioResult, content: Vec<Tag>) {
        let mut results = self.results.lock().expect("no panic");
        let before = results.done.insert(bio.id, (result, content));
        assert!(before.is_none(), "bio {} completed twice", bio.id);
        self.has_result.notify_all();
    }

    /// Waits for what `find` finds among the results.
    fn wait<T>(&self, mut find: impl FnMut(&mut Results) -> Option<T>) -> T {
        let mut results = self.results.lock().expect("no panic");
        loop {
            if let Some(found) = find(&mut results) {
                return found;
            }
            let wait = Duration::from_secs(60);
            let (again, timeout) = self
                .has_result
                .wait_timeout(results, wait)
                .expect("no panic");
            assert!(!timeout.timed_out(), "something never ended");
            results = again;
        }
    }

    fn be_worker(&self, mut worker: Worker, inbox: &Receiver<Told>) -> Worker {
        let start = Instant::now();
        let mut effects = Vec::new();
        loop {
            let told = match inbox.recv_timeout(Duration::from_millis(50)) {
                Ok(told) => told,
                Err(RecvTimeoutError::Timeout) => Told::Event(Event::Work),
                Err(RecvTimeoutError::Disconnected) => return worker,
            };
            let event = match told {
                Told::Event(event) => event,
                Told::Open(id, answer) => {
                    answer
                        .send(worker.open_thin(ThinId(id), None).expect("opened"))
                        .ok();
                    continue;
                }
                Told::Close(thin) => {
                    worker.close_thin(&thin);
                    continue;
                }
                Told::Stop => return worker,
            };
            let mut has_more = worker.apply(start.elapsed(), event, &mut effects);
            loop {
                effects.drain(..).for_each(|effect| self.take(effect));
                if !has_more {
                    break;
                }
                has_more = worker.apply(start.elapsed(), Event::Work, &mut effects);
            }
        }
    }

    fn take(&self, effect: Effect) {
        match effect {
            Effect::Issue { bio, sector } => self.request(Request::Bio(bio, sector)),
            Effect::Zero {
                job,
                sector,
                sectors,
            } => self.request(Request::Zero(job, sector, sectors)),
            Effect::Copy {
                job,
                from: Source::Data,
                from_sector,
                sector,
                sectors,
            } => {
                self.request(Request::Copy(job, from_sector, sector, sectors));
            }
            Effect::Discard {
                job,
                sector,
                sectors,
            } => {
                self.request(Request::Discard(job, sector, sectors));
            }
            Effect::Flush { job } => self.request(Request::Flush(job)),
            Effect::End {
                bio,
                result,
                is_zero,
            } => {
                let zeros = if is_zero { bio.sectors / CHUNK } else { 0 };
                self.end(*bio, result, vec![0; zeros as usize]);
            }
            Effect::Answer { tag, result } => {
                self.results
                    .lock()
                    .expect("no panic")
                    .answers
                    .insert(tag, result);
                self.has_result.notify_all();
            }
            Effect::Notice(_) => {}
            other => panic!("{other:?}"),
        }
    }

    /// Carries requests out in any order.
    fn be_device(&self, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        loop {
            let mut requests = self.requests.lock().expect("no panic");
            while requests.is_empty() {
                if self.stops.load(Ordering::Relaxed) {
                    return;
                }
                let wait = Duration::from_millis(20);
                requests = self
                    .has_request
                    .wait_timeout(requests, wait)
                    .expect("no panic")
                    .0;
            }
            let at = rng.random_range(0..requests.len());
            let request = requests.swap_remove(at);
            drop(requests);
            // Others overtake it.
            if rng.random_ratio(1, 8) {
                std::thread::sleep(Duration::from_micros(rng.random_range(0..4000)));
            }
            self.carry_out(request);
        }
    }

    fn carry_out(&self, request: Request) {
        let mut disk = self.disk.lock().expect("no panic");
        let zeros = |sectors: u64| vec![0; (sectors / CHUNK) as usize];
        let job = match request {
            Request::Bio(bio, sector) => {
                let mut content = Vec::new();
                match bio.op {
                    Op::Read => content = disk.read(sector, bio.sectors),
                    Op::Write => {
                        if let Some((first, all)) = bio.zeroes_before() {
                            disk.write(first, &zeros(all), false);
                        }
                        let tags = vec![bio.id; (bio.sectors / CHUNK) as usize];
                        disk.write(sector, &tags, bio.is_fua);
                    }
                    Op::Flush => {}
                    Op::Discard => panic!("a discard bio was issued"),
                }
                drop(disk);
                if let Some((bio, result)) = self.pool.end_io(bio, Ok(())) {
                    self.end(*bio, result, content);
                }
                return;
            }
            Request::Zero(job, sector, sectors) | Request::Discard(job, sector, sectors) => {
                disk.write(sector, &zeros(sectors), false);
                job
            }
            Request::Copy(job, from, to, sectors) => {
                let tags = disk.read(from, sectors);
                disk.write(to, &tags, false);
                job
            }
            Request::Flush(job) => job,
        };
        drop(disk);
        self.tell(Told::Event(Event::Done {
            job,
            result: Ok(()),
        }));
    }

    /// Submits a request and waits until it is done; what a read finds has to be something that it may find.
    fn do_io(&self, mapper: &mut Mapper, thin: &Thin, op: Op, sector: u64, sectors: u64) {
        let device = thin.id().0;
        let chunks = sector / CHUNK..(sector + sectors) / CHUNK;
        let (id, begun) = {
            let mut history = self.history.lock().expect("no panic");
            history.now += 1;
            history.next += 1;
            let (id, now) = (history.next, history.now);
            if matches!(op, Op::Write | Op::Discard) {
                let model = history.models.entry(device).or_default();
                model.begin(id, chunks.clone(), now, op == Op::Discard);
            }
            (id, now)
        };
        match mapper.map(thin, Box::new(Bio::new(id, op, sector, sectors))) {
            Mapped::Remapped { bio, sector } => self.request(Request::Bio(bio, sector)),
            Mapped::Zero(bio) => self.end(*bio, Ok(()), vec![0; (sectors / CHUNK) as usize]),
            Mapped::Deferred(_) => {}
            Mapped::Failed(bio, error) => self.end(*bio, Err(error), Vec::new()),
        }
        let (result, content) = self.wait(|results| results.done.remove(&id));
        assert_eq!(result, Ok(()), "{op:?} of device {device}");
        let mut history = self.history.lock().expect("no panic");
        history.now += 1;
        let now = history.now;
        let model = history.models.entry(device).or_default();
        match op {
            Op::Write | Op::Discard => model.end(id, chunks, now, false),
            Op::Flush => model.flushed(begun, now),
            Op::Read => {
                assert_eq!(content.len() as u64, sectors / CHUNK);
                for (chunk, tag) in chunks.zip(content) {
                    let may_find = model.may_find(chunk, begun);
                    assert!(
                        may_find.contains(&tag),
                        "device {device}, chunk {chunk}: read {tag}, may be {may_find:?}"
                    );
                }
            }
        }
    }

    fn message(&self, message: &str) -> thintools::Result<()> {
        let tag = self.number();
        let message = message.parse().expect("a message");
        self.tell(Told::Event(Event::Message { tag, message }));
        self.wait(|results| results.answers.remove(&tag))
    }

    fn commit(&self) {
        let tag = self.number();
        self.tell(Told::Event(Event::Commit { tag }));
        self.wait(|results| results.answers.remove(&tag))
            .expect("committed");
    }

    fn number(&self) -> u64 {
        let mut history = self.history.lock().expect("no panic");
        history.next += 1;
        history.next
    }

    fn open(&self, id: u64) -> Arc<Thin> {
        let (answer, opened) = mpsc::channel();
        self.tell(Told::Open(id, answer));
        opened.recv().expect("opened")
    }
}

/// Starts a pool, has `manage` and `threads` times `submit` run, lets everything end, and looks at what is left.
fn run(
    settings: Settings,
    metadata_blocks: usize,
    data_blocks: u64,
    threads: u64,
    manage: impl Fn(&Machine) + Sync,
    submit: impl Fn(&Machine, &mut Mapper, &mut SmallRng) + Sync,
) {
    let image = image_of(metadata_blocks, data_blocks);
    let engine = Arc::new(RamEngine::from_bytes(image));
    let metadata = PoolMetadata::open(Arc::clone(&engine) as _, 1 << 20).expect("opened");
    let worker = Worker::start(metadata, settings).expect("started");
    let (told, inbox) = mpsc::channel();
    let pool = Arc::clone(worker.pool());
    let waker = told.clone();
    pool.set_waker(move || waker.send(Told::Event(Event::Work)).is_ok());
    let machine = Machine {
        pool,
        told: Mutex::new(told),
        disk: Mutex::new(Disk::used()),
        requests: Mutex::default(),
        has_request: Condvar::new(),
        results: Mutex::default(),
        has_result: Condvar::new(),
        stops: AtomicBool::new(false),
        history: Mutex::default(),
    };
    std::thread::scope(|scope| {
        let machine = &machine;
        let worker = scope.spawn(move || machine.be_worker(worker, &inbox));
        let devices = [1, 2, 3].map(|seed| scope.spawn(move || machine.be_device(seed)));
        // Who fails must not leave the others waiting.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            manage_and_submit(machine, threads, &manage, &submit);
            machine.commit();
            assert!(machine.pool.is_idle(), "something is held or in flight");
        }));
        machine.stops.store(true, Ordering::Relaxed);
        machine.tell(Told::Stop);
        drop(worker.join().expect("no panic"));
        for device in devices {
            device.join().expect("no panic");
        }
        outcome.unwrap_or_else(|panic| resume_unwind(panic));
    });
    drop(machine);
    let mut image = thintools::io::AlignedBuffer::new(metadata_blocks);
    let bytes = image.blocks_mut(metadata_blocks);
    engine.read(Default::default(), bytes).expect("memory");
    assert_sound(bytes.to_vec());
}

fn manage_and_submit(
    machine: &Machine,
    threads: u64,
    manage: &(impl Fn(&Machine) + Sync),
    submit: &(impl Fn(&Machine, &mut Mapper, &mut SmallRng) + Sync),
) {
    machine.message("create_thin 0").expect("made");
    machine.message("create_thin 1").expect("made");
    std::thread::scope(|scope| {
        for seed in 0..threads {
            scope.spawn(move || {
                let mapper = Mapper::new(&machine.pool, false);
                let mut mapper = match seed % 2 {
                    0 => mapper.passing_shared_reads(),
                    _ => mapper,
                };
                submit(machine, &mut mapper, &mut SmallRng::seed_from_u64(seed));
            });
        }
        scope.spawn(move || manage(machine));
    });
}

/// Writes, reads and discards of the same few blocks by several threads.
#[test]
fn t01_threads_that_write_and_discard_the_same_blocks_find_the_last_write_or_zeros() {
    for scheme in [LockScheme::Kernel, LockScheme::Optimistic] {
        let settings = Settings {
            scheme,
            joins_discards: scheme == LockScheme::Optimistic,
            zeroes_with_write: scheme == LockScheme::Optimistic,
            ..settings()
        };
        let submit = |machine: &Machine, mapper: &mut Mapper, rng: &mut SmallRng| {
            let thins = [machine.open(0), machine.open(1)];
            for _ in 0..600 {
                let thin = &thins[rng.random_range(0..2)];
                let block = rng.random_range(0..3) * BLOCK;
                match rng.random_range(0..8) {
                    0..2 => machine.do_io(mapper, thin, Op::Discard, block, BLOCK),
                    2..4 => machine.do_io(mapper, thin, Op::Write, block, BLOCK),
                    4 => machine.do_io(mapper, thin, Op::Write, block + CHUNK, CHUNK),
                    5..7 => machine.do_io(mapper, thin, Op::Read, block, BLOCK),
                    _ => machine.do_io(mapper, thin, Op::Flush, 0, 0),
                }
            }
            thins
                .into_iter()
                .for_each(|thin| machine.tell(Told::Close(thin)));
        };
        // Both devices together have six blocks, so every block has another owner soon.
        run(settings, 128, 7, 3, |_| {}, submit);
    }
}

/// The I/O of the random histories, taken by three threads as they come to it, while transactions end all the time.
#[test]
fn random_histories_on_threads_find_what_they_may_find() {
    for seed in 0..30 {
        let (scheme, ios) = ios_of(seed);
        let settings = Settings {
            scheme,
            // Now and then there is no cell to spare.
            cells: if seed % 4 == 0 { 0 } else { 64 },
            joins_discards: seed % 3 > 0,
            zeroes_with_write: seed % 3 < 2,
            ..settings()
        };
        let next = AtomicUsize::new(0);
        let submit = |machine: &Machine, mapper: &mut Mapper, _: &mut SmallRng| {
            let thins = [machine.open(0), machine.open(1)];
            while let Some(&(op, device, sector, sectors)) =
                ios.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let thin = &thins[device as usize % 2];
                machine.do_io(mapper, thin, op, sector, sectors);
            }
            thins
                .into_iter()
                .for_each(|thin| machine.tell(Told::Close(thin)));
        };
        let manage = |machine: &Machine| {
            while next.load(Ordering::Relaxed) < ios.len() {
                machine.commit();
            }
        };
        run(settings, 128, 64, 3, manage, submit);
    }
}

/// Lookups while snapshots come and go, blocks are provisioned and discarded and transactions end all the time, on so few metadata
/// blocks that they are used again and again.
#[test]
fn t26_lookups_across_commits_find_what_is_mapped_while_blocks_are_reused() {
    const SPREAD: u64 = 60;
    for scheme in [LockScheme::A, LockScheme::Optimistic] {
        let settings = Settings {
            scheme,
            ..settings()
        };
        let is_over = AtomicBool::new(false);
        let manage = |machine: &Machine| {
            let mut mapper = Mapper::new(&machine.pool, false);
            for round in 0..40 {
                let (id, origin) = (2 + round % 2, round / 2 % 2);
                let before = {
                    let mut history = machine.history.lock().expect("no panic");
                    history.now += 1;
                    history.now
                };
                machine
                    .message(&format!("create_snap {id} {origin}"))
                    .expect("made");
                let mut history = machine.history.lock().expect("no panic");
                let model = history.models.entry(origin).or_default().snapshot(before);
                history.models.insert(id, model);
                drop(history);
                let thin = machine.open(id);
                for n in 0..20 {
                    let sector = (n * 7 + round) % SPREAD * BLOCK * 40;
                    machine.do_io(&mut mapper, &thin, Op::Read, sector, CHUNK);
                    if n % 5 == 0 {
                        machine.do_io(&mut mapper, &thin, Op::Write, sector, CHUNK);
                        machine.commit();
                    }
                }
                machine.tell(Told::Close(thin));
                machine.message(&format!("delete {id}")).expect("deleted");
            }
            is_over.store(true, Ordering::Relaxed);
        };
        let submit = |machine: &Machine, mapper: &mut Mapper, rng: &mut SmallRng| {
            let thins = [machine.open(0), machine.open(1)];
            let mut rounds = 0;
            while !is_over.load(Ordering::Relaxed) && rounds < 20_000 {
                rounds += 1;
                let thin = &thins[rng.random_range(0..2)];
                // Far apart, so that the trees have several leaves.
                let sector = rng.random_range(0..SPREAD) * BLOCK * 40;
                match rng.random_range(0..20) {
                    0 => machine.do_io(mapper, thin, Op::Discard, sector, BLOCK),
                    1..4 => machine.do_io(mapper, thin, Op::Write, sector, BLOCK),
                    _ => machine.do_io(mapper, thin, Op::Read, sector, CHUNK),
                }
            }
            thins
                .into_iter()
                .for_each(|thin| machine.tell(Told::Close(thin)));
        };
        run(settings, 160, 4 * SPREAD, 2, manage, submit);
    }
}

#[test]
fn whoever_outruns_a_worker_that_is_behind_waits_for_it() {
    let engine = Arc::new(RamEngine::new(128));
    let mut metadata = PoolMetadata::format(engine, BLOCK as u32, 1 << 20).expect("room");
    metadata.resize_data(16).expect("room");
    metadata.create_thin(ThinId(0)).expect("it is new");
    metadata.commit().expect("memory");
    let mut worker = Worker::start(metadata, settings()).expect("started");
    let pool = Arc::clone(worker.pool());
    let thin = worker.open_thin(ThinId(0), None).expect("it is there");
    let mut mapper = Mapper::new(&pool, false);
    // More than the worker looks at in two turns.
    for id in 0..20_000 {
        mapper.map(&thin, Box::new(Bio::flush(id)));
    }
    let mut effects = Vec::new();
    let mut at = |seconds| {
        effects.clear();
        worker.apply(Duration::from_secs(seconds), Event::Work, &mut effects)
    };
    assert!(at(0) && !pool.is_throttled());
    pool.throttle();
    assert!(at(2) && pool.is_throttled());
    let is_through = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            pool.throttle();
            is_through.store(true, Ordering::SeqCst);
        });
        assert!(!is_through.load(Ordering::SeqCst) && pool.is_throttled());
        assert!(!at(2));
        waiting.join().expect("it goes on");
    });
    assert!(is_through.into_inner() && !pool.is_throttled());
}
