//! Plays a trace through the engine: the same trace in virtual time, the same result.
//!
//! Requests go to the thin devices that the trace's devices are at that time. Before a control event everything ends that is under way,
//! as a suspended device's I/O does.

use super::books::{MOST_TOLD, Mark, Sample};
use super::clock::Clock;
use super::control::Control;
use super::counts::{InputCounts, Moments, WorkCounts};
use super::device::DeviceModel;
use super::device_heat::DeviceHeat;
use super::devices::{Active, Devices, PlayedDevice};
use super::engine::Engine;
use super::event::{ControlEvent, TraceIo};
use super::heat::HeatMap;
use super::latencies::LatencyClasses;
use super::run::SOON;
use super::verify::{Verified, Watch};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{Event, Line, Mapper, Message, Pool, Settings, Worker};
use crate::thin::PoolMetadata;
use crate::units::ThinId;
use std::collections::BTreeMap;
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

/// A trace that is being played.
#[derive(Debug)]
pub struct Player {
    pub(super) options: PlayOptions,
    pub(super) engine: Engine,
    pub(super) devices: Devices,
    clock: Clock,
    /// Blocks of the data device by the table: a new size counts from the next resumption on.
    table_blocks: u64,
}

impl Player {
    /// Starts a pool on its metadata.
    ///
    /// # Errors
    /// Those of [`Worker::start`].
    pub fn new(metadata: PoolMetadata, options: PlayOptions) -> Result<Self> {
        let devices = options.devices.iter();
        // Where devices are made, these are what was made before the trace began.
        let is_made = options.makes_devices;
        let active = devices.map(|(name, &(id, sectors))| {
            let active = Active::new(id, sectors, None);
            (name.clone(), Active { is_made, ..active })
        });
        Ok(Self {
            devices: Devices::new(active.collect()),
            engine: Engine::new(metadata, &options)?,
            clock: Clock::default(),
            table_blocks: options.data_blocks,
            options,
        })
    }

    /// What the trace asked for so far.
    pub fn input(&self) -> &InputCounts {
        &self.engine.books.input
    }

    /// What the pool did for it so far.
    pub fn work(&self) -> &WorkCounts {
        &self.engine.books.work
    }

    /// What the map half did, of all processors.
    pub fn mappers(&self) -> &[Mapper] {
        &self.engine.mappers
    }

    /// How long requests took.
    pub fn latencies(&self) -> &LatencyClasses {
        &self.engine.books.latencies
    }

    /// When the pool first ran low, and out, of space.
    pub fn moments(&self) -> Moments {
        self.engine.books.moments
    }

    /// Bytes that were written, and acknowledged.
    pub(super) fn bytes_written(&self) -> u64 {
        self.engine.books.bytes_written
    }

    /// When the last request came, by the trace, in nanoseconds; under the virtual clock.
    pub(super) fn last_io_ns(&self) -> u64 {
        self.engine.books.last_io_ns
    }

    /// Where requests went, and when.
    pub fn heat(&self) -> HeatMap {
        self.engine.books.heat.sum()
    }

    /// The same of each of up to 8 devices, of the first 16 that the trace names; none unless there are several.
    pub fn heat_by_device(&self, names: &[String]) -> Vec<DeviceHeat> {
        self.engine.books.heat.busiest(names)
    }

    /// What the worker did.
    pub fn worker(&self) -> &Worker {
        &self.engine.worker
    }

    /// What the pool reported, and when.
    pub fn notices(&self) -> &[(Duration, String)] {
        &self.engine.books.notices
    }

    /// How things were at the marks.
    pub fn marks(&self) -> &[Mark] {
        &self.engine.books.marks
    }

    /// Ids of the thin devices that the trace's devices are now.
    pub fn ids(&self) -> Vec<ThinId> {
        self.devices.ids()
    }

    /// Which thin devices the trace's devices are, or were until a control event said otherwise. What is known of sizes that nobody gave is
    /// as of the last control event, or the end.
    pub fn played_devices(&self) -> Vec<PlayedDevice> {
        self.devices.played()
    }

    /// How it went on.
    pub fn timeline(&self) -> &[Sample] {
        &self.engine.books.timeline
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.engine.pool
    }

    /// The time by its clock, since the start.
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.engine.now())
    }

    /// Whose time that is.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// From here on the time is what the caller says, and the data device takes none.
    pub(super) fn leave_time(&mut self) {
        self.clock = Clock::Threads;
        self.options.device = DeviceModel::NULL;
        self.engine.device = DeviceModel::NULL;
    }

    /// From here on it is verified that reads find what was written, in one virtual block of `one_of`. To be called before anything is
    /// played, and by the virtual clock.
    ///
    /// # Errors
    /// `Io`, `Damaged`: the metadata cannot be read.
    pub fn verify(&mut self, one_of: u64) -> Result<()> {
        let size = self.engine.pool.block_sectors();
        let is_unzeroed = self.options.settings.table.features.skip_block_zeroing;
        let begin = |pool: &PoolMetadata| Watch::begin_with(pool, size, is_unzeroed, one_of);
        self.engine.watch = self.engine.pool.inspect(begin)?;
        Ok(())
    }

    /// What was verified, if anything was to be.
    pub fn verified(&self) -> Option<&Verified> {
        self.engine.watch.found()
    }

    /// How it is played.
    pub fn options(&self) -> &PlayOptions {
        &self.options
    }

    /// The pool's metadata, at the end.
    ///
    /// # Errors
    /// `Busy` if somebody else still has the pool.
    pub fn into_metadata(self) -> Result<PoolMetadata> {
        self.engine.into_metadata()
    }

    /// Prepares for [`SOON`] requests that come next and as many after them: asks for the memory that they would wait for.
    pub(super) fn prepare(&self, ios: &[TraceIo]) {
        let (next, then) = ios.split_at(ios.len().min(SOON));
        for io in then {
            if let Some((thin, _)) = self.devices.find(io) {
                self.engine.prefetch_recent(thin, io);
            }
        }
        let mut end = None;
        for io in next {
            // What goes on where the one before it ended is mostly in the same leaf.
            let goes_on = end == Some((io.device, io.sector));
            end = Some((io.device, io.sector.wrapping_add(io.sectors)));
            if !goes_on && let Some((thin, _)) = self.devices.find(io) {
                self.engine.prefetch_leaf(thin, io);
            }
        }
    }

    /// Plays a request.
    ///
    /// # Errors
    /// `Io`, `Damaged`: the pool cannot be used.
    pub fn io(&mut self, device: &str, io: &TraceIo) -> Result<()> {
        self.engine.run_until(io.time_ns);
        self.engine.sample(false);
        self.engine.books.input.count(io);
        self.engine.books.last_io_ns = io.time_ns;
        if self.devices.is_unknown(io.device) {
            self.resolve(device, io.device)?;
        }
        let Some(thin) = self.devices.target(io) else {
            self.engine.books.input.leave_out(io);
            return Ok(());
        };
        self.engine.books.heat.record(io);
        self.engine.play(thin, io)
    }

    /// Lets everything end that is under way, but for what waits for space.
    ///
    /// # Errors
    /// `Io` if it never does.
    pub fn settle(&mut self) -> Result<()> {
        self.engine.settle()
    }

    /// Ends the replay: everything ends, and is committed.
    ///
    /// # Errors
    /// `Io` when the pool does not come to rest.
    pub fn finish(&mut self) -> Result<()> {
        self.engine.settle()?;
        // A pool that must not commit has said so.
        self.engine.commit().ok();
        self.engine.sample(true);
        self.devices.forget_targets();
        self.engine
            .pool
            .inspect(|pool| self.engine.watch.sweep(pool))
    }

    /// Finds out which thin device a device of the trace is; makes it, if it is to be made.
    pub(super) fn resolve(&mut self, device: &str, number: u32) -> Result<()> {
        if !self.devices.active.contains_key(device) && self.options.makes_devices {
            self.make_device(device)?;
        }
        self.devices
            .resolve(device, number, &mut self.engine.worker)
    }

    /// Makes a thin device, of the first id that is free, for a device of the trace.
    fn make_device(&mut self, device: &str) -> Result<()> {
        let taken = self.engine.pool.inspect(PoolMetadata::devices)?;
        let used: Vec<ThinId> = taken.into_iter().chain(self.ids()).collect();
        let id = (0..).map(ThinId).find(|id| !used.contains(id));
        let id = id.unwrap_or_default();
        self.engine.ask(|tag| Event::Message {
            tag,
            message: Message::CreateThin(id),
        })?;
        let active = Active {
            is_made: true,
            ..Active::new(id, None, None)
        };
        self.devices.active.insert(device.into(), active);
        Ok(())
    }

    /// Makes the thin devices that the trace's devices are to be, where they do not exist.
    ///
    /// # Errors
    /// Those of the pool.
    pub fn make_mapped_devices(&mut self) -> Result<()> {
        for id in self.ids() {
            if self.engine.pool.inspect(|pool| pool.details(id).is_err()) {
                let message = Message::CreateThin(id);
                self.engine.ask(|tag| Event::Message { tag, message })?;
            }
        }
        Ok(())
    }

    /// Carries out a control event. What is refused, be it by the pool or because its arguments are wrong, is counted.
    ///
    /// # Errors
    /// `Io` when the pool does not come to rest.
    pub fn control(&mut self, event: &ControlEvent) -> Result<()> {
        if self.clock == Clock::Virtual {
            self.engine.run_until(event.time_ns);
        }
        self.engine.settle()?;
        self.devices.forget_targets();
        self.engine.books.input.controls += 1;
        let refused = match Control::of(&event.text) {
            Control::Message(message) => {
                let watch = &mut self.engine.watch;
                let before = |pool: &PoolMetadata| watch.before_message(message, pool);
                self.engine.pool.inspect(before)?;
                let done = self.engine.ask(|tag| Event::Message { tag, message });
                if done.is_ok() {
                    self.engine.watch.message(message);
                    self.engine.books.input.count_message(message);
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
                self.engine.watch.opened(id, origin_sectors);
                let active = Active::new(id, Some(sectors), origin_sectors);
                self.devices.active.insert(device, active);
                Ok(())
            }
            Control::Deactivate { device } => {
                self.deactivate(&device);
                Ok(())
            }
            Control::Resize { sectors } => {
                self.options.data_blocks = sectors / self.engine.pool.block_sectors();
                Ok(())
            }
            Control::Suspend => self.engine.ask(|tag| Event::Suspend {
                tag,
                is_noflush: false,
            }),
            Control::Resume => {
                let data_blocks = self.options.data_blocks;
                self.engine.ask(|tag| Event::Resume {
                    tag,
                    table: None,
                    data_blocks,
                })?;
                self.table_blocks = data_blocks;
                Ok(())
            }
            Control::Mark(name) => {
                self.mark(name)?;
                Ok(())
            }
            Control::Refused(reason) => Err(Error::new(ErrorKind::InvalidArgument, reason)),
            Control::Unknown(text) => {
                self.engine.books.input.unknown_controls += 1;
                if self.engine.books.input.unknown_controls <= MOST_TOLD {
                    let text = format!("{text:?} is no event that is known; it was left out");
                    let now = self.engine.now();
                    self.engine.books.tell(now, text);
                }
                Ok(())
            }
        };
        if let Err(e) = refused {
            self.engine.books.input.refused_controls += 1;
            if self.engine.books.input.refused_controls > MOST_TOLD {
                return Ok(());
            }
            let text = format!("{:?} was refused: {e}", event.text);
            let now = self.engine.now();
            self.engine.books.tell(now, text);
        }
        Ok(())
    }

    fn deactivate(&mut self, device: &str) {
        if let Some(thin) = self.devices.remove(device).and_then(|active| active.thin) {
            self.engine.worker.close_thin(&thin);
        }
    }

    /// Notes how things are, after a commit.
    ///
    /// # Errors
    /// `Io` when the pool does not come to rest.
    pub fn mark(&mut self, name: String) -> Result<()> {
        // A pool that must not commit says how it is all the same.
        self.engine.commit().ok();
        let size = self.engine.pool.block_sectors();
        let sectors = self.table_blocks * size;
        let words = self.engine.worker.pool_status();
        self.devices.forget_targets();
        for active in self.devices.active.values_mut() {
            // In a pool that has failed none can be opened.
            active.open(&mut self.engine.worker).ok();
        }
        let thins = self.devices.active.iter().filter_map(|(device, active)| {
            let thin = active.thin.as_ref()?;
            let words = self.engine.worker.thin_status(thin);
            let sectors = active.sectors.unwrap_or(active.seen);
            Some((device.clone(), Line { sectors, words }.to_string()))
        });
        let thins = thins.collect();
        let status = self.engine.pool.inspect(PoolMetadata::status)?;
        self.engine.books.marks.push(Mark {
            source: None,
            name,
            time_ns: self.engine.now(),
            pool: Line { sectors, words }.to_string(),
            thins,
            allocated_metadata_blocks: status.allocated_metadata_blocks,
        });
        self.engine.sample(true);
        Ok(())
    }
}
