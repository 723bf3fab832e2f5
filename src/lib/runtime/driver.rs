//! Drives the pool engine: one thread is the worker, some carry its effects out.
//!
//! Whatever waits for the disk on behalf of the data device is done by the latter, but for the flush that begins a commit: the worker
//! would do nothing meanwhile. The metadata is read and written by the worker itself.
//!
//! Writes, zeros and discards of a regular file exclude each other in the kernel: more threads would only wait for each other there. So
//! one carrier at a time does them, all that wait in one go, while the others read and copy.
//!
//! To wake a thread costs as much as what it then does. So the worker is told of many effects at once, takes all that it was told
//! before it looks around, and whoever ends requests wakes those who send replies when it has ended all of them.

use super::data_device::DataDevice;
use super::event_log::EventLog;
use super::gathering::gather;
use super::io_counts::{IoCounts, IoTotals};
use super::ring::Flight;
use super::transfer::{Parts, bio_error};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{
    Bio, BioError, BioResult, Effect, Event, JobId, Op, Pool, PoolTable, Source, Worker,
};
use crate::units::ThinId;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Threads that carry effects out: enough to keep a disk busy.
const CARRIERS: usize = 8;
/// The same where each read or write of the data needs one.
const CARRIERS_OF_ALL: usize = 32;
/// The worker looks around no more often than this while nothing happens.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);
/// For so long a carrier goes on before it tells of what it has done.
const UNTOLD: Duration = Duration::from_micros(200);

type Answer = Sender<Result<()>>;

/// What the worker's thread is told.
enum Told {
    Event(Event),
    /// Effects were carried out.
    Done(Vec<Event>),
    /// An event that is answered.
    Ask(Box<dyn FnOnce(u64) -> Event + Send>, Answer),
    /// Something to be done with the worker itself.
    Call(Box<dyn FnOnce(&mut Worker) + Send>),
    Stop,
}

/// What the carriers do.
enum Task {
    Effect(Effect),
    Run(Box<dyn FnOnce() + Send>),
}

/// Tasks that wait for a thread.
#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// Those that exclude each other.
    exclusive: VecDeque<Effect>,
    /// A carrier does what was exclusive, and will look again.
    has_excluder: bool,
    /// Carriers that wait for a task.
    idle: usize,
    is_over: bool,
}

/// What all threads of a running pool share.
pub(super) struct Driver {
    pub(super) pool: Arc<Pool>,
    pub(super) data: Arc<DataDevice>,
    pub(super) parts: Parts,
    pub(super) events: EventLog,
    /// External origins of open thin devices, by the devices' numbers.
    pub(super) origins: RwLock<HashMap<u32, Arc<DataDevice>>>,
    /// What clients asked of thin devices, by their ids.
    counts: Mutex<HashMap<u64, Arc<IoCounts>>>,
    table: RwLock<PoolTable>,
    told: Sender<Told>,
    queue: Mutex<Queue>,
    has_task: Condvar,
}

/// The threads of a pool.
pub(super) struct Threads {
    worker: Option<JoinHandle<()>>,
    carriers: Vec<JoinHandle<()>>,
}

fn done(job: JobId, result: std::io::Result<()>) -> Event {
    let result = result.map_err(|e| bio_error(&e));
    Event::Done { job, result }
}

fn gone() -> Error {
    Error::new(ErrorKind::Io, "the pool is being stopped")
}

impl Driver {
    /// Starts the threads.
    ///
    /// # Errors
    /// `Io` if there are none to be had.
    pub(super) fn start(
        worker: Worker,
        table: PoolTable,
        data: Arc<DataDevice>,
    ) -> Result<(Arc<Self>, Threads)> {
        let (told, inbox) = mpsc::channel();
        let pool = Arc::clone(worker.pool());
        let waker = told.clone();
        pool.set_waker(move || drop(waker.send(Told::Event(Event::Work))));
        let driver = Arc::new(Self {
            pool,
            data,
            parts: Parts::default(),
            events: EventLog::default(),
            origins: RwLock::default(),
            counts: Mutex::default(),
            table: RwLock::new(table),
            told,
            queue: Mutex::default(),
            has_task: Condvar::new(),
        });
        let mut threads = Threads {
            worker: None,
            carriers: Vec::new(),
        };
        let started = driver.start_threads(worker, inbox, &mut threads);
        if let Err(e) = started {
            driver.stop(threads);
            return Err(Error::io("cannot start the threads of the pool", e));
        }
        Ok((driver, threads))
    }

    fn start_threads(
        self: &Arc<Self>,
        worker: Worker,
        inbox: Receiver<Told>,
        threads: &mut Threads,
    ) -> std::io::Result<()> {
        let carriers = match self.data.is_direct() && !self.data.has_ring() {
            true => CARRIERS_OF_ALL,
            false => CARRIERS,
        };
        for _ in 0..carriers {
            let driver = Arc::clone(self);
            let builder = std::thread::Builder::new().name("carrier".into());
            threads
                .carriers
                .push(builder.spawn(move || driver.be_carrier())?);
        }
        let driver = Arc::clone(self);
        let builder = std::thread::Builder::new().name("worker".into());
        threads.worker = Some(builder.spawn(move || driver.be_worker(worker, &inbox))?);
        Ok(())
    }

    /// Counts what clients ask of a thin device.
    pub(super) fn io_counts(&self, id: ThinId) -> Arc<IoCounts> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(counts.entry(id.0).or_default())
    }

    /// Forgets what was asked of a thin device that is no more.
    pub(super) fn forget_io(&self, id: ThinId) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.remove(&id.0);
    }

    /// What clients asked of a thin device so far.
    pub(super) fn io_totals(&self, id: ThinId) -> IoTotals {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        (counts.get(&id.0)).map_or_else(IoTotals::default, |counts| counts.totals())
    }

    /// The pool's table.
    pub(super) fn table(&self) -> PoolTable {
        self.table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Notes the table that the pool was resumed with.
    pub(super) fn set_table(&self, table: PoolTable) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    /// Ends the threads. Nothing is under way any more.
    pub(super) fn stop(&self, threads: Threads) {
        self.tell(Told::Stop);
        if let Some(worker) = threads.worker {
            // A panic was printed when it happened; there is nobody else to tell.
            worker.join().ok();
        }
        self.queue().is_over = true;
        self.has_task.notify_all();
        for carrier in threads.carriers {
            carrier.join().ok();
        }
    }

    fn tell(&self, told: Told) {
        // Who comes last may find the worker gone.
        self.told.send(told).ok();
    }

    /// Has the worker take an event that it answers, and waits for the answer.
    ///
    /// # Errors
    /// The answer's.
    pub(super) fn ask(&self, event: impl FnOnce(u64) -> Event + Send + 'static) -> Result<()> {
        let (answer, answered) = mpsc::channel();
        self.tell(Told::Ask(Box::new(event), answer));
        answered.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Has the worker's thread do something with the worker, and waits for what comes of it.
    ///
    /// # Errors
    /// `Io` if the pool is being stopped.
    pub(super) fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = mpsc::channel();
        self.tell(Told::Call(Box::new(move |worker| {
            answer.send(call(worker)).ok();
        })));
        answered.recv().map_err(|_| gone())
    }

    /// The same, without waiting.
    pub(super) fn call_later(&self, call: impl FnOnce(&mut Worker) + Send + 'static) {
        self.tell(Told::Call(Box::new(call)));
    }

    fn be_worker(&self, mut worker: Worker, inbox: &Receiver<Told>) {
        let start = Instant::now();
        let mut effects = Vec::new();
        let mut answers: HashMap<u64, Answer> = HashMap::new();
        let mut next_tag = 0;
        let mut events = Vec::new();
        loop {
            let mut told = match worker.deadline() {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => {
                    let wait = at.saturating_sub(start.elapsed()).max(SHORTEST_WAIT);
                    inbox.recv_timeout(wait)
                }
            };
            loop {
                match told {
                    Ok(Told::Event(event)) => events.push(event),
                    Ok(Told::Done(all)) => events.extend(all),
                    Ok(Told::Ask(event, answer)) => {
                        next_tag += 1;
                        answers.insert(next_tag, answer);
                        events.push(event(next_tag));
                    }
                    Ok(Told::Call(call)) => {
                        // What came before is done before.
                        let before = std::mem::take(&mut events);
                        self.apply(&mut worker, (start, before), &mut effects, &mut answers);
                        call(&mut worker);
                    }
                    Err(RecvTimeoutError::Timeout) => events.push(Event::Work),
                    Ok(Told::Stop) | Err(RecvTimeoutError::Disconnected) => {
                        return self.apply(
                            &mut worker,
                            (start, events),
                            &mut effects,
                            &mut answers,
                        );
                    }
                }
                match inbox.try_recv() {
                    Ok(next) => told = Ok(next),
                    Err(_) => break,
                }
            }
            let all = std::mem::take(&mut events);
            self.apply(&mut worker, (start, all), &mut effects, &mut answers);
        }
    }

    /// Has the worker take events, and whatever follows from them at once.
    fn apply(
        &self,
        worker: &mut Worker,
        (start, mut events): (Instant, Vec<Event>),
        effects: &mut Vec<Effect>,
        answers: &mut HashMap<u64, Answer>,
    ) {
        while !events.is_empty() {
            let has_more = worker.apply_all(start.elapsed(), events.drain(..), effects);
            let mut flush = None;
            let (mut tasks, mut ends) = (Vec::new(), Vec::new());
            for effect in effects.drain(..) {
                match effect {
                    Effect::End { bio, result, .. } => ends.push((bio.id, result)),
                    Effect::Answer { tag, result } => {
                        if let Some(answer) = answers.remove(&tag) {
                            // Whoever asked may have given up.
                            answer.send(result).ok();
                        }
                    }
                    Effect::Notice(notice) => self.events.add_notice(&notice),
                    Effect::Flush { job } => flush = Some(job),
                    other => tasks.push(Task::Effect(other)),
                }
            }
            self.hand_out(tasks);
            // Whoever is told may have something more for the carriers.
            gather(|| {
                for (id, result) in ends {
                    self.parts.end(id, result);
                }
            });
            match flush {
                Some(job) => events.push(done(job, self.data.flush())),
                None => events.extend(has_more.then_some(Event::Work)),
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True for what keeps others from changing the file meanwhile. What a durable write waits for does not.
    fn is_exclusive(&self, effect: &Effect) -> bool {
        self.data.is_file()
            && match effect {
                Effect::Issue { bio, .. } => {
                    bio.op == Op::Write && !bio.is_fua && !self.data.is_direct()
                }
                Effect::Zero { .. } | Effect::Discard { .. } => true,
                _ => false,
            }
    }

    /// Leaves tasks to the carriers.
    fn hand_out(&self, tasks: Vec<Task>) {
        if tasks.is_empty() {
            return;
        }
        let mut queue = self.queue();
        let had_any = queue.has_excluder || !queue.exclusive.is_empty();
        let before = queue.tasks.len();
        for task in tasks {
            match task {
                Task::Effect(effect) if self.is_exclusive(&effect) => {
                    queue.exclusive.push_back(effect);
                }
                task => queue.tasks.push_back(task),
            }
        }
        // Whoever does what was exclusive before, or is about to, does all of it.
        let new = queue.tasks.len() - before;
        let wanted = new + usize::from(!had_any && !queue.exclusive.is_empty());
        // Whoever does something looks for more afterwards.
        let wanted = wanted.min(queue.idle);
        drop(queue);
        (0..wanted).for_each(|_| self.has_task.notify_one());
    }

    /// Has a carrier do something that may take a while.
    pub(super) fn run(&self, run: impl FnOnce() + Send + 'static) {
        self.hand_out(vec![Task::Run(Box::new(run))]);
    }

    fn be_carrier(&self) {
        let mut queue = self.queue();
        loop {
            if !queue.has_excluder && !queue.exclusive.is_empty() {
                queue.has_excluder = true;
                let effects = std::mem::take(&mut queue.exclusive);
                drop(queue);
                self.carry_out_all(effects);
                queue = self.queue();
                queue.has_excluder = false;
                continue;
            }
            if let Some(task) = queue.tasks.pop_front() {
                drop(queue);
                match task {
                    Task::Effect(effect) => self.tell_done(self.carry_out(effect)),
                    Task::Run(run) => run(),
                }
                queue = self.queue();
                continue;
            }
            if queue.is_over {
                return;
            }
            queue.idle += 1;
            queue = self
                .has_task
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    /// Moves the data of bios that are mapped, on this thread.
    pub(super) fn issue(&self, bio: Box<Bio>, sector: u64) {
        let zeroed = match bio.zeroes_before() {
            Some((sector, sectors)) => self.data.zero(sector, sectors),
            None => Ok(()),
        };
        let done = zeroed.map_err(|e| bio_error(&e)).and_then(|()| {
            let part = self.parts.get(bio.id);
            part.map_or(Ok(()), |part| part.carry_out(&bio, &self.data, sector))
        });
        self.end_io(bio, done);
    }

    /// Moves the data of bios that are mapped to a device that is used directly, all at once, without waiting. Each is taken off
    /// `under_way` when it ends.
    pub(super) fn issue_all(
        self: &Arc<Self>,
        bios: Vec<(Box<Bio>, u64)>,
        under_way: &Arc<AtomicUsize>,
    ) {
        let mut flights = Vec::with_capacity(bios.len());
        for (bio, sector) in bios {
            let (driver, under_way) = (Arc::clone(self), Arc::clone(under_way));
            let over = move || under_way.fetch_sub(1, Ordering::AcqRel);
            let part = self.parts.get(bio.id).filter(|_| self.data.has_ring());
            let flight = part.and_then(|part| Some((part.flight(&bio, &self.data, sector)?, part)));
            let Some(((is_write, buffer, len, byte), part)) = flight else {
                self.run(move || {
                    driver.issue(bio, sector);
                    over();
                });
                continue;
            };
            flights.push(Flight {
                is_write,
                buffer,
                len,
                byte,
                ended: Box::new(move |done, buffer| {
                    let done = done.map_err(|e| bio_error(&e));
                    if done.is_ok() && !is_write {
                        part.land(buffer);
                    }
                    driver.end_io(bio, done);
                    over();
                }),
            });
        }
        if !flights.is_empty() {
            self.data.start_all(flights);
        }
    }

    /// The external origin of the open device of this number.
    fn origin(&self, number: u32) -> Option<Arc<DataDevice>> {
        let origins = self.origins.read().unwrap_or_else(PoisonError::into_inner);
        origins.get(&number).cloned()
    }

    fn tell_done(&self, events: impl IntoIterator<Item = Event>) {
        let events: Vec<_> = events.into_iter().collect();
        if !events.is_empty() {
            self.tell(Told::Done(events));
        }
    }

    /// Carries out one after the other, and tells of several at once.
    fn carry_out_all(&self, effects: VecDeque<Effect>) {
        let mut effects = effects.into_iter();
        let mut is_over = false;
        while !is_over {
            let since = Instant::now();
            let mut events = Vec::new();
            gather(|| {
                while since.elapsed() < UNTOLD && !is_over {
                    let effect = effects.next();
                    is_over = effect.is_none();
                    events.extend(effect.and_then(|effect| self.carry_out(effect)));
                }
            });
            self.tell_done(events);
        }
    }

    /// Carries an effect out; what the worker is to be told.
    fn carry_out(&self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Issue { bio, sector } => {
                self.issue(bio, sector);
                None
            }
            Effect::ReadOrigin { bio, sectors } => {
                let part = self.parts.get(bio.id).zip(self.origin(bio.thin_number()));
                let done = part.map_or(Err(BioError::Io), |(part, origin)| {
                    part.read_origin(&bio, &origin, sectors)
                });
                self.end_io(bio, done);
                None
            }
            Effect::Zero {
                job,
                sector,
                sectors,
            } => Some(done(job, self.data.zero(sector, sectors))),
            Effect::Copy {
                job,
                from,
                from_sector,
                sector,
                sectors,
            } => {
                let from = match from {
                    Source::Data => Some(Arc::clone(&self.data)),
                    Source::Origin(number) => self.origin(number),
                };
                let lost = || std::io::Error::other("the external origin is closed");
                let copied = from
                    .ok_or_else(lost)
                    .and_then(|from| self.data.copy(&from, from_sector, sector, sectors));
                Some(done(job, copied))
            }
            Effect::Discard {
                job,
                sector,
                sectors,
            } => Some(done(job, self.data.discard(sector, sectors))),
            // These are the worker's thread's own.
            Effect::Flush { .. }
            | Effect::End { .. }
            | Effect::Answer { .. }
            | Effect::Notice(_) => None,
        }
    }

    fn end_io(&self, bio: Box<Bio>, result: BioResult) {
        if let Some((bio, result)) = self.pool.end_io(bio, result) {
            self.parts.end(bio.id, result);
        }
    }
}
