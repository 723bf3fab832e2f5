//! Drives the pool engine: who is the worker, and who carries its effects out.
//!
//! Whoever has something for the worker takes a turn of it (`turn`): a connection with bios that were deferred, a carrier with what it has
//! carried out. The worker's thread takes those turns that nobody else takes. It waits for the disk on behalf of the data device only in the
//! flush that begins a commit, as the worker would do nothing meanwhile. The metadata is read and written by whoever takes the turn, and
//! by the worker's thread as long as that takes a while.
//!
//! Writes, zeros and discards of a regular file exclude each other in the kernel: more threads would only wait for each other there. So
//! one thread at a time does them, all that wait in one go, while carriers read and copy: whoever took the turn, as long as that takes no
//! longer than through the page cache, otherwise a carrier.
//!
//! To wake a thread costs as much as what it then does. So bios that come together are one turn, the worker's thread takes all that it was
//! told before it looks around, and whoever ends requests wakes those who send replies when it has ended all of them.

use super::data_device::DataDevice;
use super::event_log::EventLog;
use super::gathering::gather;
use super::io_counts::{IoCounts, IoTotals};
use super::ring::Flight;
use super::transfer::{Parts, bio_error};
use super::turn::{self, Shared, Turn, Turns, before_a_turn};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{
    Bio, BioError, BioResult, Effect, Event, JobId, Op, Pool, PoolTable, Source, Worker,
};
use crate::units::ThinId;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
/// For so long a thread that has something else to do does what carriers would.
const AWAY: Duration = Duration::from_millis(1);
/// Turns that whoever has something for the worker takes before the worker's thread goes on.
const MOST_TURNS: usize = 8;

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
    turns: Turns,
    /// Who asked, by the tag of the event.
    answers: Mutex<HashMap<u64, Answer>>,
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
    /// What was exclusive took long when it was last carried out: the file waits for a device.
    is_slow: AtomicBool,
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

pub(super) fn gone() -> Error {
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
        // Once it is over there is nobody to be woken.
        pool.set_waker(move || !turn::comes() && waker.send(Told::Event(Event::Work)).is_ok());
        let driver = Arc::new(Self {
            pool,
            turns: Turns::of(worker),
            answers: Mutex::default(),
            data,
            parts: Parts::default(),
            events: EventLog::default(),
            origins: RwLock::default(),
            counts: Mutex::default(),
            table: RwLock::new(table),
            told,
            queue: Mutex::default(),
            is_slow: AtomicBool::new(false),
            has_task: Condvar::new(),
        });
        let mut threads = Threads {
            worker: None,
            carriers: Vec::new(),
        };
        let started = driver.start_threads(inbox, &mut threads);
        if let Err(e) = started {
            driver.stop(threads);
            return Err(Error::io("cannot start the threads of the pool", e));
        }
        Ok((driver, threads))
    }

    fn start_threads(
        self: &Arc<Self>,
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
        threads.worker = Some(builder.spawn(move || driver.be_worker(&inbox))?);
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

    fn be_worker(&self, inbox: &Receiver<Told>) {
        self.serve(inbox);
        self.turns.end();
        self.answers().clear();
    }

    /// Takes the turns that nobody else takes, until it is told to stop.
    fn serve(&self, inbox: &Receiver<Told>) {
        let mut last_tag = 0;
        let mut events = Vec::new();
        while let Some(mut shared) = self.settle(std::mem::take(&mut events)) {
            let rest = shared.rest();
            drop(shared);
            let mut told = match rest {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(rest) => inbox.recv_timeout(rest.max(SHORTEST_WAIT)),
            };
            loop {
                match told {
                    Ok(Told::Event(event)) => events.push(event),
                    Ok(Told::Done(all)) => events.extend(all),
                    Ok(Told::Ask(event, answer)) => {
                        last_tag += 1;
                        self.answers().insert(last_tag, answer);
                        events.push(event(last_tag));
                    }
                    Ok(Told::Call(call)) => {
                        // What came before is done before.
                        let Some(mut shared) = self.settle(std::mem::take(&mut events)) else {
                            return;
                        };
                        call(&mut shared.worker);
                    }
                    Err(RecvTimeoutError::Timeout) => events.push(Event::Work),
                    Ok(Told::Stop) | Err(RecvTimeoutError::Disconnected) => {
                        return drop(self.settle(events));
                    }
                }
                match inbox.try_recv() {
                    Ok(next) => told = Ok(next),
                    Err(_) => break,
                }
            }
        }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<u64, Answer>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On the worker's thread: has the worker take events and whatever follows from them at once, and does the flush that is due. The
    /// worker, with which nobody else has begun anything since; none if it is over.
    fn settle(&self, mut events: Vec<Event>) -> Option<MutexGuard<'_, Shared>> {
        loop {
            let mut shared = self.turns.wait()?;
            if let Some(job) = shared.flush {
                events.insert(0, done(job, self.data.flush()));
                shared.flush = None;
            }
            if events.is_empty() {
                return Some(shared);
            }
            let turn = shared.turn(events, &self.events);
            drop(shared);
            events = self.pass_on(turn);
        }
    }

    /// Has the worker take events on this thread, and carries out what is exclusive of what they come to; where somebody else is at it, or
    /// has to wait for a device, it is left to the worker's thread and the carriers.
    pub(super) fn take_turn(&self, events: Vec<Event>) {
        let is_slow = self.is_slow.load(Ordering::Relaxed);
        let excludes = !is_slow && !self.data.is_direct() && self.begin_to_exclude();
        self.take_turns(events);
        if excludes {
            self.exclude(AWAY);
        }
    }

    fn take_turns(&self, mut events: Vec<Event>) {
        for _ in 0..MOST_TURNS {
            if events.is_empty() {
                return;
            }
            let Some(mut shared) = self.turns.try_take() else {
                break;
            };
            let turn = shared.turn(events, &self.events);
            drop(shared);
            if turn.is_for_thread {
                self.tell(Told::Done(Vec::new()));
            }
            events = self.pass_on(turn);
        }
        self.tell(Told::Done(events));
    }

    /// Passes on what came of a turn; what is to be taken next.
    fn pass_on(&self, turn: Turn) -> Vec<Event> {
        for (tag, result) in turn.answers {
            let answer = self.answers().remove(&tag);
            if let Some(answer) = answer {
                // Whoever asked may have given up.
                answer.send(result).ok();
            }
        }
        self.hand_out(turn.effects.into_iter().map(Task::Effect).collect());
        // Whoever is told may have something more for the carriers.
        gather(|| {
            for (id, result) in turn.ends {
                self.parts.end(id, result);
            }
        });
        turn.has_more.then_some(Event::Work).into_iter().collect()
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
                drop(queue);
                self.exclude(Duration::MAX);
                queue = self.queue();
                continue;
            }
            if let Some(task) = queue.tasks.pop_front() {
                drop(queue);
                match task {
                    Task::Effect(effect) => {
                        // It takes the turn in any case.
                        let event = before_a_turn(&mut false, || self.carry_out(effect));
                        self.take_turn(vec![event.unwrap_or(Event::Work)]);
                    }
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

    /// True if nobody does what is exclusive: then this thread is to [do it](Self::exclude).
    fn begin_to_exclude(&self) -> bool {
        let mut queue = self.queue();
        !std::mem::replace(&mut queue.has_excluder, true)
    }

    /// Carries out what is exclusive, one after the other, until there is no more, or for so long.
    fn exclude(&self, most: Duration) {
        let begin = Instant::now();
        loop {
            let mut queue = self.queue();
            let is_over = queue.exclusive.is_empty();
            if is_over || begin.elapsed() > most {
                queue.has_excluder = false;
                drop(queue);
                if !is_over {
                    self.has_task.notify_one();
                }
                return;
            }
            drop(queue);
            let since = Instant::now();
            let mut events = vec![Event::Work];
            before_a_turn(&mut false, || {
                gather(|| {
                    while since.elapsed() < UNTOLD
                        && let Some(effect) = self.next_exclusive()
                    {
                        events.extend(self.carry_out(effect));
                    }
                });
            });
            self.is_slow
                .store(since.elapsed() > AWAY, Ordering::Relaxed);
            self.take_turns(events);
        }
    }

    fn next_exclusive(&self) -> Option<Effect> {
        self.queue().exclusive.pop_front()
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
