//! The worker half: the single owner of everything in a pool that changes.
//!
//! 1. [`Worker::apply`] takes an event and appends effects. It touches no clock, no data device and no randomness.
//! 2. A mapping is inserted only after its data is in place, and a bio is completed only after its mapping is inserted.
//! 3. What an operation may need, two cells and a job, is reserved before it starts.
//! 4. Between the flush of the data device that begins a commit and its end, the worker does nothing.

mod commit;
mod committed;
mod counts;
mod discard;
mod invariants;
mod jobs;
mod messages;
mod modes;
mod process;
mod provision;
mod suspend;
mod todo;

use super::bio::{Bio, BioError, BioResult, Op};
use super::cells::{AllocationOrder, Starved};
use super::effect::{Effect, Event, Notice};
use super::list::{List, Taken};
use super::mode::PoolMode;
use super::pool::{Pool, Waiting};
use super::prison::{Cell, Held};
use super::status::{PoolState, PoolStatusLine, ThinStatus};
use super::table::{Features, PoolTable};
use super::thin::Thin;
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::txn::LockScheme;
use crate::thin::{PoolMetadata, Reader, SharedMetadata};
use crate::units::ThinId;
use commit::{Commit, Waiter};
pub use counts::{CommitCounts, WorkerCounts};
use invariants::Before;
pub(super) use invariants::Traffic;
pub use jobs::JobId;
use jobs::{Job, Jobs};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use suspend::Suspension;
use todo::Todo;

/// Bios that one turn looks at, at most.
const BATCH: usize = 8192;
/// What has changed is committed after this time, and a worker busy for longer slows its submitters down.
const SECOND: Duration = Duration::from_secs(1);

/// How a pool is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its table.
    pub table: PoolTable,
    /// How lookups and changes are kept apart.
    pub scheme: LockScheme,
    /// Cells beside the two of each [`Mapper`](super::Mapper) and of the worker.
    pub cells: usize,
    /// When cells are taken.
    pub allocation_order: AllocationOrder,
    /// Operations under way at once, at least 2.
    pub jobs: usize,
    /// For how long writes wait for space before they fail; none is for ever.
    pub no_space_timeout: Option<Duration>,
    /// The data device supports discards.
    pub can_discard_data: bool,
    /// Discards of neighbouring blocks that wait for the worker are done as one; the kernel does one after the other.
    pub joins_discards: bool,
    /// A write to a part of a new block is issued with the zeros around it ([`Bio::zeroes_before`]), and the mapping follows; the kernel
    /// zeroes the block, maps it and then writes.
    pub zeroes_with_write: bool,
}

impl Settings {
    /// The kernel's defaults for a table.
    pub fn new(table: PoolTable) -> Self {
        Self {
            table,
            scheme: LockScheme::Kernel,
            cells: 1024,
            allocation_order: AllocationOrder::Reserved,
            jobs: 1024,
            no_space_timeout: Some(Duration::from_secs(60)),
            can_discard_data: true,
            joins_discards: false,
            zeroes_with_write: false,
        }
    }
}

/// What is known of a device that is open, by its id.
#[derive(Debug, Default)]
struct Device {
    /// Its mappings changed in this transaction.
    is_changed: bool,
    /// Changes of it were lost: what was acknowledged may not be there.
    has_lost: bool,
    /// Handles.
    open: u32,
    /// Operations under way.
    jobs: u32,
}

/// The worker.
#[derive(Debug)]
pub struct Worker {
    pool: Arc<Pool>,
    reader: Reader<Arc<SharedMetadata>>,
    settings: Settings,
    /// What is in force, which may be other than what the table asked for.
    features: Features,
    thins: BTreeMap<u32, Arc<Thin>>,
    /// The one of them that was worked for last.
    last_thin: Option<Arc<Thin>>,
    next_number: u32,
    devices: BTreeMap<u64, Device>,
    jobs: Jobs,
    /// New mappings whose data is in place.
    prepared: VecDeque<JobId>,
    /// What waited in a deferred set and has not to any more.
    ready: VecDeque<JobId>,
    todo: Todo,
    cells: Option<[Box<Cell>; 2]>,
    /// Snapshots whose origins have operations under way.
    snapshots: Vec<JobId>,
    /// Bios that hold a cell and wait for another one.
    starved: VecDeque<Starved>,
    waiters: Vec<Waiter>,
    commit: Option<Commit>,
    /// A commit is due, whoever waits for it.
    wants_commit: bool,
    last_commit: Duration,
    #[expect(clippy::vec_box, reason = "they come and go in boxes")]
    retry: Vec<Box<Bio>>,
    out_of_space_since: Option<Duration>,
    was_low_told: bool,
    is_metadata_low: Arc<AtomicBool>,
    suspension: Suspension,
    before: Before,
    busy_since: Option<Duration>,
    counts: WorkerCounts,
    now: Duration,
}

/// Effects to be appended to.
type Effects = Vec<Effect>;

impl Worker {
    /// Starts a pool on its metadata.
    ///
    /// # Errors
    /// `InvalidArgument` if the table does not go with the metadata.
    pub fn start(mut metadata: PoolMetadata, settings: Settings) -> Result<Self> {
        let status = metadata.status()?;
        let table = &settings.table;
        if table.block_sectors != status.data_block_size {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "changing the data block size (from {} to {}) is not supported",
                    status.data_block_size, table.block_sectors
                ),
            ));
        }
        let features = in_force(&settings);
        let is_metadata_low = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&is_metadata_low);
        metadata.register_metadata_threshold(move || flag.store(true, Ordering::Relaxed));
        let mode = match features.read_only {
            true => PoolMode::ReadOnly,
            false => PoolMode::at_start(&status),
        };
        metadata.set_read_only(!mode.is_writable());
        let shared = SharedMetadata::new(metadata, settings.scheme);
        let block_sectors = u64::from(table.block_sectors);
        let cells = match settings.allocation_order {
            AllocationOrder::Reserved => settings.cells,
            // A discard takes two.
            AllocationOrder::OneByOne => settings.cells.max(2),
        };
        let cells = (cells, settings.allocation_order);
        let pool = Arc::new(Pool::new(shared, block_sectors, cells, mode));
        let is_reserved = settings.allocation_order == AllocationOrder::Reserved;
        if is_reserved {
            pool.cells.grow();
        }
        Ok(Self {
            reader: Reader::new(Arc::clone(&pool.metadata), false),
            pool,
            features,
            thins: BTreeMap::new(),
            last_thin: None,
            next_number: 0,
            devices: BTreeMap::new(),
            jobs: Jobs::new(settings.jobs.max(2)),
            prepared: VecDeque::new(),
            ready: VecDeque::new(),
            todo: Todo::default(),
            cells: is_reserved.then(|| [Cell::spare(), Cell::spare()]),
            snapshots: Vec::new(),
            starved: VecDeque::new(),
            waiters: Vec::new(),
            commit: None,
            wants_commit: false,
            last_commit: Duration::ZERO,
            retry: Vec::new(),
            out_of_space_since: None,
            was_low_told: false,
            is_metadata_low,
            suspension: Suspension::None,
            before: Before::default(),
            busy_since: None,
            counts: WorkerCounts::default(),
            now: Duration::ZERO,
            settings,
        })
    }

    /// What it shares with the map half.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Opens a thin device, which may have an external origin of `origin_sectors`.
    ///
    /// # Errors
    /// `NotFound`; `Io` in mode fail; `Damaged`.
    pub fn open_thin(&mut self, id: ThinId, origin_sectors: Option<u64>) -> Result<Arc<Thin>> {
        if self.pool.mode() == PoolMode::Fail {
            return Err(Error::new(
                ErrorKind::Io,
                format!("cannot open thin device {id}: the pool is in fail mode; start it anew"),
            ));
        }
        let metadata = self.pool.metadata.open_thin(id)?;
        let number = self.next_number;
        self.next_number += 1;
        let thin = Arc::new(Thin::new(number, metadata, origin_sectors));
        self.thins.insert(number, Arc::clone(&thin));
        self.devices.entry(id.0).or_default().open += 1;
        Ok(thin)
    }

    /// The open device of this number.
    pub fn thin(&self, number: u32) -> Option<Arc<Thin>> {
        self.thins.get(&number).cloned()
    }

    /// The metadata alone, when nobody maps any more.
    ///
    /// # Errors
    /// `Busy` if somebody still has the pool.
    pub fn into_metadata(self) -> Result<PoolMetadata> {
        let Self { pool, reader, .. } = self;
        drop(reader);
        let busy = || Error::new(ErrorKind::Busy, "somebody still has the pool");
        let pool = Arc::into_inner(pool).ok_or_else(busy)?;
        let metadata = Arc::into_inner(pool.metadata).ok_or_else(busy)?;
        Ok(metadata.into_pool())
    }

    /// Closes a thin device. All its bios have ended.
    pub fn close_thin(&mut self, thin: &Thin) {
        if self.thins.remove(&thin.number).is_none() {
            return;
        }
        self.last_thin = None;
        if let Some(device) = self.devices.get_mut(&thin.id().0) {
            device.open -= 1;
            // Whether it changed has to be known until the commit.
            if device.open == 0 && !device.is_changed {
                self.devices.remove(&thin.id().0);
            }
        }
    }

    /// What `dmsetup status` says of the pool.
    pub fn pool_status(&self) -> PoolStatusLine {
        let mode = self.pool.mode();
        if mode == PoolMode::Fail {
            return PoolStatusLine::Fail;
        }
        match self.pool.metadata.inspect(PoolMetadata::status) {
            Ok(status) => PoolStatusLine::Pool(PoolState::new(&status, mode, &self.features)),
            Err(_) => PoolStatusLine::Error,
        }
    }

    /// What `dmsetup status` says of a thin device.
    pub fn thin_status(&self, thin: &Thin) -> ThinStatus {
        if self.pool.mode() == PoolMode::Fail {
            return ThinStatus::Fail;
        }
        let size = self.pool.block_sectors();
        let found = self.pool.metadata.inspect(|pool| {
            let details = pool.details(thin.id())?;
            Ok::<_, Error>((details, pool.highest_block(thin.id())?))
        });
        match found {
            Ok((details, highest)) => ThinStatus::Mapped {
                sectors: details.mapped_blocks.saturating_mul(size),
                highest: highest.map(|block| block.0.saturating_add(1).saturating_mul(size) - 1),
            },
            Err(_) => ThinStatus::Error,
        }
    }

    /// When it has to be told [`Event::Work`] even if nothing happens: the time passed to [`apply`](Self::apply) at which there will be
    /// something to do.
    pub fn deadline(&self) -> Option<Duration> {
        let is_changed = self.pool.metadata.is_changed();
        let is_due = is_changed && self.commit.is_none() && self.pool.mode().is_writable();
        let commit = is_due.then(|| self.last_commit.saturating_add(SECOND));
        let timeout = self.out_of_space_since.zip(self.settings.no_space_timeout);
        let timeout = timeout.map(|(since, timeout)| since.saturating_add(timeout));
        commit.into_iter().chain(timeout).min()
    }

    /// Takes an event that happens at `now`, a time that never goes back, and appends what is to be done. True if it has more to do:
    /// then it is to be told [`Event::Work`] again, at once.
    pub fn apply(&mut self, now: Duration, event: Event, effects: &mut Effects) -> bool {
        let old = effects.len();
        self.now = self.now.max(now);
        self.take(event, effects);
        self.look_around(old, effects)
    }

    /// The same with events that happened one after the other; it looks around once.
    pub fn apply_all(
        &mut self,
        now: Duration,
        events: impl IntoIterator<Item = Event>,
        effects: &mut Effects,
    ) -> bool {
        let old = effects.len();
        self.now = self.now.max(now);
        for event in events {
            self.take(event, effects);
        }
        self.look_around(old, effects)
    }

    /// Does what is to be done after events whose effects are those from `old` on.
    fn look_around(&mut self, old: usize, effects: &mut Effects) -> bool {
        let has_more = self.turn(effects);
        let is_low = &self.is_metadata_low;
        if is_low.load(Ordering::Relaxed) && is_low.swap(false, Ordering::Relaxed) {
            effects.push(Effect::Notice(Notice::MetadataThreshold));
        }
        self.check_invariants(&effects[old..]);
        has_more
    }

    fn take(&mut self, event: Event, effects: &mut Effects) {
        match event {
            Event::Work => {}
            Event::Done { job, result } => self.done(job, result, effects),
            Event::Message { tag, message } => self.message(tag, message, effects),
            Event::Commit { tag } => self.waiters.push(Waiter::Answer(tag)),
            Event::Suspend { tag, is_noflush } => self.suspend(tag, is_noflush, effects),
            Event::Resume {
                tag,
                table,
                data_blocks,
            } => self.resume(tag, table, data_blocks, effects),
        }
    }

    fn turn(&mut self, effects: &mut Effects) -> bool {
        if self.commit.is_some() {
            return false;
        }
        self.look_into_inbox(effects);
        self.expire(effects);
        while let Some(job) = self.ready.pop_front() {
            self.done(job, Ok(()), effects);
        }
        while let Some(job) = self.prepared.pop_front() {
            self.insert_prepared(job, effects);
        }
        self.start_snapshots();
        self.feed(effects);
        self.pool.metadata.read_missed();
        let is_stuck = self.process_todo(effects);
        let has_more = !is_stuck && !self.todo.is_empty()
            || self.pool.has_work()
            || self.can_feed()
            || !self.ready.is_empty()
            || !self.prepared.is_empty();
        self.throttle(has_more);
        let has_more = has_more || {
            self.go_on_suspending(effects);
            // What it would have waited for had just ended.
            !self.ready.is_empty()
        };
        if self.wants_commit || !has_more && self.is_commit_due() {
            self.begin_commit(effects);
            // With nothing to write it is over already, and those who waited for it go on.
            return self.commit.is_none()
                && (has_more
                    || self.pool.has_work()
                    || !self.waiters.is_empty()
                    || !self.ready.is_empty()
                    || !self.todo.is_empty() && !is_stuck);
        }
        has_more
    }

    fn look_into_inbox(&mut self, effects: &mut Effects) {
        let Some(mut inbox) = self.pool.open_inbox() else {
            return;
        };
        let (bios, filled) = (inbox.bios.take(), inbox.filled.take());
        let ready = inbox.ready.take();
        if !inbox.starved.is_empty() {
            self.starved.extend(inbox.starved.drain(..));
        }
        drop(inbox);
        ready.for_each(|work| self.ready.push_back(work.job));
        bios.for_each(|bio| self.todo.push(bio));
        filled.for_each(|bio| self.filled(bio, effects));
    }

    /// Submitters are slowed down while one stretch of work takes more than a second.
    fn throttle(&mut self, is_busy: bool) {
        let is_too_long = match is_busy {
            true => self.now - *self.busy_since.get_or_insert(self.now) > SECOND,
            false => {
                self.busy_since = None;
                false
            }
        };
        self.pool.set_throttled(is_too_long);
    }

    #[inline(never)]
    fn device(&mut self, id: ThinId) -> &mut Device {
        self.devices.entry(id.0).or_default()
    }

    /// The open device of this number, to be put back as the last one that was worked for.
    fn take_thin(&mut self, number: u32) -> Option<Arc<Thin>> {
        match self.last_thin.take() {
            Some(thin) if thin.number == number => Some(thin),
            _ => self.thin(number),
        }
    }

    /// Takes back the memory of cells, for its own next operation first.
    fn keep_cells(&mut self, cells: impl IntoIterator<Item = Box<Cell>>) {
        for cell in cells {
            self.pool.cells.give(cell);
        }
        self.reserve_cells();
    }

    fn reserve_cells(&mut self) -> bool {
        if self.cells.is_none() && self.pool.order == AllocationOrder::Reserved {
            self.cells = self.pool.cells.take_two();
        }
        self.cells.is_some()
    }

    /// The cells to begin an operation with: both, or the first where they are taken one by one.
    fn take_cells(&mut self) -> Option<(Box<Cell>, Option<Box<Cell>>)> {
        if self.pool.order == AllocationOrder::OneByOne {
            return Some((self.pool.cells.take()?, None));
        }
        let [first, second] = self.cells.take()?;
        Some((first, Some(second)))
    }

    fn can_feed(&self) -> bool {
        let cells = &self.pool.cells;
        !self.starved.is_empty() && (cells.free() > 0 || self.starved.len() >= cells.total())
    }

    /// Lets bios go on that waited for a second cell. If all cells are held by those that wait, nobody would ever go on: that is told,
    /// and one more cell is lent.
    fn feed(&mut self, effects: &mut Effects) {
        while !self.starved.is_empty() {
            let is_deadlock = self.starved.len() >= self.pool.cells.total();
            let cell = match self.pool.cells.take() {
                Some(cell) => cell,
                None if is_deadlock => {
                    let waits = self.starved.iter().map(Starved::wait).collect();
                    effects.push(Effect::Notice(Notice::Deadlock(waits)));
                    self.pool.cells.lend()
                }
                None => return,
            };
            if let Some(Starved { mut bio, held, .. }) = self.starved.pop_front() {
                bio.reserved = Some((held, Some(cell)));
                self.todo.put_back(bio);
            }
        }
    }

    /// Releases a cell; its inmates are submitted again.
    fn release(&mut self, held: Held) {
        let cell = self.pool.release(held);
        self.keep_cells([cell]);
    }

    /// Ends a bio, and the writes that wait in its cell, with an error.
    fn fail_cell(&mut self, held: Held, bio: Box<Bio>, error: BioError, effects: &mut Effects) {
        end(bio, Err(error), effects);
        for bio in self.release_to_writes(held) {
            end(bio, Err(error), effects);
        }
    }

    /// Releases a cell, and returns the writes that waited in it. What else did is looked at again: the kernel has it share the fate of
    /// the write that held the cell, so that a read finds no space.
    fn release_to_writes(&mut self, held: Held) -> Taken<Bio> {
        let (cell, inmates) = self.pool.prison.release(held);
        let (mut writes, mut others) = (List::default(), List::default());
        for bio in inmates {
            match bio.op {
                Op::Write => writes.push(bio),
                _ => others.push(bio),
            }
        }
        self.pool.submit_all(others.take());
        self.keep_cells([cell]);
        writes.take()
    }

    /// Runs `job` once nothing is in flight that is now; [`done`](Self::done) is told then.
    fn after_all_io(&mut self, job: JobId) {
        let ready = self.pool.all_io.defer(Waiting::new(job));
        self.ready.extend(ready.map(|work| work.job));
    }

    /// An effect of `job` was carried out, or what it waited for is over.
    fn done(&mut self, job: JobId, result: BioResult, effects: &mut Effects) {
        match self.jobs.get_mut(job) {
            Some(Job::Mapping(mapping)) => {
                mapping.result = mapping.result.and(result);
                mapping.waits -= 1;
                if mapping.waits == 0 {
                    self.prepared.push_back(job);
                }
            }
            Some(Job::Run(_)) => self.run_goes_on(job, effects),
            Some(Job::Snapshot(_)) => self.snapshot(job, effects),
            Some(Job::Commit) => {
                self.jobs.remove(job);
                self.data_is_flushed(result, effects);
            }
            Some(Job::Drain) => {
                self.jobs.remove(job);
            }
            Some(Job::Discard(_)) | None => {}
        }
    }
}

/// What of the table's features can be had.
fn in_force(settings: &Settings) -> Features {
    let asked = settings.table.features;
    Features {
        no_discard_passdown: asked.no_discard_passdown || !settings.can_discard_data,
        ..asked
    }
}

fn end(bio: Box<Bio>, result: BioResult, effects: &mut Effects) {
    effects.push(Effect::End {
        bio,
        result,
        is_zero: false,
    });
}
