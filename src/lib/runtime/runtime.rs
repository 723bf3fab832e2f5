//! A pool on real devices: opened, managed by the kernel's messages, and stopped with everything committed.

use super::control::ThinStats;
use super::data_device::{DataDevice, SECTOR, not_grown};
use super::driver::{Driver, Threads, gone};
use super::event_log::EventLog;
use super::opening::{LOOKED_AT, Options, open_data, open_metadata, refuse_same, refuse_too_many};
#[cfg(feature = "devtools")]
use super::seam::{PassedEngine, PoolDevice, Seam};
use super::thin_export::{MOST_BYTES, ThinExport, check_size};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Access, AlignedBuffer, BlockEngine, FileEngine, open_pool, open_read};
use crate::pdata::txn::LockScheme;
use crate::pool::{
    BioError, Event, Features, Line, Message, PoolMode, PoolStatusLine, PoolTable, Settings,
    ThinStatus, ThinTable, Worker,
};
use crate::thin::PoolMetadata;
use crate::units::{BLOCK_SIZE, MetadataBlock, ThinId};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// How a thin device is exported.
#[derive(Clone, Debug, Default)]
pub struct Activation {
    /// Its size in bytes; if none is given it ends with the last mapped block, or with its origin.
    pub size: Option<u64>,
    /// The read-only device that has what was never written.
    pub origin: Option<Arc<DataDevice>>,
}

#[derive(Default)]
struct Thins {
    /// Every device of the pool is exported, whether active or not.
    is_all: bool,
    active: BTreeMap<u64, Arc<Activation>>,
    open: HashMap<u64, Weak<ThinExport>>,
}

impl Thins {
    /// How a device is exported, which has to be; none is as it is.
    fn activation(&self, id: ThinId) -> Result<Option<Arc<Activation>>> {
        match self.active.get(&id.0) {
            None if !self.is_all => Err(not_active(id)),
            found => Ok(found.cloned()),
        }
    }
}

fn not_active(id: ThinId) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("thin device {id} is not active"),
    )
}

/// A running pool. All methods may be called from any thread.
pub struct Runtime {
    pub(super) driver: Arc<Driver>,
    threads: Mutex<Option<Threads>>,
    /// None of a pool that is only read, which does not grow.
    metadata: Option<Arc<FileEngine>>,
    is_read_only: bool,
    thins: Mutex<Thins>,
    /// Held while the pool is suspended or resumed. Once it is suspended for good: whether all was committed.
    finished: Mutex<Option<bool>>,
}

impl Runtime {
    /// Opens a pool and starts it. A data or metadata device that has grown is used at once.
    ///
    /// # Errors
    /// `Busy`, `Io`; `NotMetadata`, `Damaged` and `Unsuitable`, each with what to do.
    pub fn open(options: &Options) -> Result<Self> {
        if options.is_read_only {
            let engine = open_read(&options.metadata, Access::Exclusive)?;
            return Self::open_to_read(Arc::from(engine), options);
        }
        refuse_same(options)?;
        let data = open_data(options)?;
        let engine = Arc::new(open_pool(&options.metadata)?);
        Self::start(Arc::clone(&engine) as _, Some(engine), data, options)
    }

    /// Starts a pool that is only read, on metadata that was opened already.
    ///
    /// # Errors
    /// The same; `Damaged` only if the superblock or the top-level tree cannot be used.
    pub fn open_to_read(engine: Arc<dyn BlockEngine>, options: &Options) -> Result<Self> {
        let options = Options {
            is_read_only: true,
            ..options.clone()
        };
        refuse_same(&options)?;
        let data = open_data(&options)?;
        Self::start(engine, None, data, &options)
    }

    fn start(
        engine: Arc<dyn BlockEngine>,
        metadata: Option<Arc<FileEngine>>,
        data: DataDevice,
        options: &Options,
    ) -> Result<Self> {
        #[cfg(feature = "devtools")]
        let (engine, data) = (
            Arc::new(PassedEngine {
                engine,
                seam: Seam::new(PoolDevice::Metadata, options.interceptor.as_ref()),
            }),
            data.behind(Seam::new(PoolDevice::Data, options.interceptor.as_ref())),
        );
        let data = Arc::new(data);
        // Whoever only reads can go without what cannot be read, too.
        let lost = |e: Error| match options.is_read_only && e.kind() == ErrorKind::Io {
            true => e.with_kind(ErrorKind::Damaged),
            false => e,
        };
        let (pool, is_new) = open_metadata(engine.clone(), &data, options).map_err(lost)?;
        let started = Self::start_pool(pool, metadata, data, options, lost);
        if is_new && started.is_err() {
            // The next try shall find no remains either. Should that not be possible, it finds a pool without blocks.
            let blocks = engine.nr_blocks().min(LOOKED_AT);
            let blank = AlignedBuffer::new(blocks as usize);
            let _ = engine
                .write(MetadataBlock(0), blank.blocks(blocks as usize))
                .and_then(|()| engine.sync());
        }
        started.map_err(|e| match is_new {
            true => e.context(format!(
                "cannot make a pool of {}",
                options.metadata.display()
            )),
            false => e,
        })
    }

    fn start_pool(
        pool: PoolMetadata,
        metadata: Option<Arc<FileEngine>>,
        data: Arc<DataDevice>,
        options: &Options,
        lost: impl Fn(Error) -> Error,
    ) -> Result<Self> {
        let status = pool.status().map_err(lost)?;
        let table = PoolTable {
            metadata_device: options.metadata.display().to_string(),
            data_device: options.data.display().to_string(),
            block_sectors: status.data_block_size,
            low_water_blocks: options.low_water_blocks,
            features: Features {
                read_only: options.is_read_only || options.features.read_only,
                ..options.features
            },
        };
        let data_blocks = data.sectors()? / u64::from(status.data_block_size);
        if !options.is_read_only {
            refuse_too_many(&data, status.data_block_size)?;
        }
        let is_short = data_blocks < status.data_blocks;
        let short = format!(
            "{} has {data_blocks} blocks of {} sectors, and the pool {}: this is not all of its data",
            options.data.display(),
            status.data_block_size,
            status.data_blocks
        );
        if is_short && !options.is_read_only {
            let next = "give the right device, or serve what there is with --read-only";
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!("{short}; {next}"),
            ));
        }
        let settings = Settings {
            // Lookups go on while a commit waits for the disk.
            scheme: LockScheme::Optimistic,
            joins_discards: true,
            // Past the page cache writes go side by side, and zeros exclude them.
            zeroes_with_write: !data.is_direct(),
            no_space_timeout: options.no_space_timeout,
            ..Settings::new(table.clone())
        };
        let worker = Worker::start(pool, settings)?;
        let (driver, threads) = Driver::start(worker, table, data)?;
        if is_short {
            driver.events.add("data_short", short);
        }
        let runtime = Self {
            driver,
            threads: Mutex::new(Some(threads)),
            metadata,
            is_read_only: options.is_read_only,
            thins: Mutex::default(),
            finished: Mutex::default(),
        };
        if !runtime.is_read_only {
            runtime.resume(None)?;
        }
        Ok(runtime)
    }

    /// What happened.
    pub fn events(&self) -> &EventLog {
        &self.driver.events
    }

    /// The mode that the pool is in.
    pub fn mode(&self) -> PoolMode {
        self.driver.pool.mode()
    }

    /// Sends a message, and waits until what it changed is committed.
    ///
    /// # Errors
    /// Those of the kernel, by kind.
    pub fn message(&self, message: Message) -> Result<()> {
        if let Message::Delete(id) = message {
            let mut thins = self.thins();
            if thins.active.contains_key(&id.0) {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("thin device {id} is active; deactivate it first"),
                ));
            }
            thins.open.retain(|_, export| export.strong_count() > 0);
        }
        self.driver
            .ask(move |tag| Event::Message { tag, message })?;
        if let Message::Delete(id) = message {
            self.driver.forget_io(id);
        }
        Ok(())
    }

    /// Commits what has changed.
    ///
    /// # Errors
    /// `Io`, `ReadOnly`.
    pub fn commit(&self) -> Result<()> {
        self.driver.ask(|tag| Event::Commit { tag })
    }

    /// Finishes what was accepted, commits, and holds back what comes then.
    ///
    /// # Errors
    /// `InvalidArgument` if it is suspended already.
    pub fn suspend(&self) -> Result<()> {
        let _running = self.running()?;
        self.ask_to_suspend()
    }

    fn ask_to_suspend(&self) -> Result<()> {
        self.driver.ask(|tag| Event::Suspend {
            tag,
            is_noflush: false,
        })
    }

    /// Goes on, with other features if any are given, and with devices of the size that they have now.
    ///
    /// # Errors
    /// `InvalidArgument` for a device that has become smaller; `Io`, `NoSpace`.
    pub fn resume(&self, features: Option<Features>) -> Result<()> {
        let _running = self.running()?;
        if let Some(metadata) = &self.metadata {
            let measured = metadata.measure();
            measured.map_err(|e| Error::io("cannot measure the metadata device", e))?;
        }
        let mut table = self.driver.table();
        let data_blocks = match self.is_read_only {
            // Of what is not all of its data the rest is served.
            true => self.driver.pool.inspect(PoolMetadata::status)?.data_blocks,
            false => self.driver.data.sectors()? / u64::from(table.block_sectors),
        };
        let new = features.map(|features| {
            table.features = Features {
                // Nothing was opened to be written.
                read_only: features.read_only || self.is_read_only,
                ..features
            };
            table
        });
        let given = new.clone();
        self.driver.ask(move |tag| Event::Resume {
            tag,
            table: given,
            data_blocks,
        })?;
        if let Some(table) = new {
            self.driver.set_table(table);
        }
        Ok(())
    }

    /// Makes backing files larger, to so many data blocks and metadata blocks, and uses what is there. Devices are looked at only.
    ///
    /// # Errors
    /// `ReadOnly`, `Unsuitable`, `InvalidArgument` for more than a file can have, `Io`, `NoSpace`.
    pub fn grow(&self, data_blocks: Option<u64>, metadata_blocks: Option<u64>) -> Result<()> {
        if self.is_read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "the pool is served to be read only, and does not grow",
            ));
        }
        let most = MOST_BYTES / SECTOR / self.driver.pool.block_sectors();
        for (device, wanted, most) in [
            ("data", data_blocks, most),
            ("metadata", metadata_blocks, MOST_BYTES / BLOCK_SIZE as u64),
        ] {
            if let Some(blocks) = wanted
                && blocks > most
            {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!("{blocks} {device} blocks: up to {most} are possible"),
                ));
            }
        }
        if let Some(blocks) = data_blocks {
            let sectors = blocks.saturating_mul(self.driver.pool.block_sectors());
            if sectors > self.driver.data.sectors()? {
                self.driver.data.grow(sectors)?;
            }
        }
        if let (Some(blocks), Some(metadata)) = (metadata_blocks, &self.metadata) {
            let grown = metadata.grow(blocks);
            grown.map_err(|e| not_grown("the metadata file", e))?;
        }
        self.resume(None)
    }

    /// The status line of the pool.
    ///
    /// # Errors
    /// `Io` if the pool is being stopped.
    pub fn status(&self) -> Result<Line<PoolStatusLine>> {
        Ok(Line {
            sectors: self.driver.data.sectors()?,
            words: self.driver.call(|worker| worker.pool_status())?,
        })
    }

    /// The table line of the pool.
    ///
    /// # Errors
    /// `Io`.
    pub fn table(&self) -> Result<Line<PoolTable>> {
        Ok(Line {
            sectors: self.driver.data.sectors()?,
            words: self.driver.table(),
        })
    }

    /// The status line of a thin device.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Damaged`.
    pub fn thin_status(&self, id: ThinId) -> Result<Line<ThinStatus>> {
        let export = self.export(id)?;
        let thin = Arc::clone(&export.thin);
        Ok(Line {
            sectors: export.size / SECTOR,
            words: self.driver.call(move |worker| worker.thin_status(&thin))?,
        })
    }

    /// The table line of a thin device.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Damaged`.
    pub fn thin_table(&self, id: ThinId) -> Result<Line<ThinTable>> {
        let export = self.export(id)?;
        Ok(Line {
            sectors: export.size / SECTOR,
            words: ThinTable {
                pool: self.driver.table().metadata_device,
                id,
                origin: export
                    .origin()
                    .map(|origin| origin.path().display().to_string()),
            },
        })
    }

    /// Exports every thin device of the pool, those included that are yet to be made.
    pub fn export_all(&self) {
        self.thins().is_all = true;
    }

    /// Exports a thin device.
    ///
    /// # Errors
    /// `NotFound`; `Exists` if it is active already; `InvalidArgument` for a size that is no multiple of 512, or past 2^63 - 512.
    pub fn activate(&self, id: ThinId, activation: Activation) -> Result<()> {
        if let Some(size) = activation.size {
            check_size(id, size)?;
        }
        self.driver.pool.inspect(|pool| pool.details(id))?;
        let mut thins = self.thins();
        if thins.active.contains_key(&id.0) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("thin device {id} is active already"),
            ));
        }
        thins.active.insert(id.0, Arc::new(activation));
        Ok(())
    }

    /// No longer exports a thin device.
    ///
    /// # Errors
    /// `NotFound` if it is not active; `Busy` while clients use it.
    pub fn deactivate(&self, id: ThinId) -> Result<()> {
        let mut thins = self.thins();
        let activation = thins.active.get(&id.0).ok_or_else(|| not_active(id))?;
        // Whoever opens it, has it open or is still closing it holds its activation, but for who opened it before it was active.
        let is_open = |export: &Weak<ThinExport>| export.strong_count() > 0;
        if Arc::strong_count(activation) > 1 || thins.open.get(&id.0).is_some_and(is_open) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("thin device {id} is in use by clients"),
            ));
        }
        thins.active.remove(&id.0);
        Ok(())
    }

    /// The thin devices that are exported.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn exported(&self) -> Result<Vec<ThinId>> {
        let thins = self.thins();
        if !thins.is_all {
            return Ok(thins.active.keys().map(|&id| ThinId(id)).collect());
        }
        drop(thins);
        self.driver.pool.inspect(PoolMetadata::devices)
    }

    /// Opens a thin device that is exported, or shares it with those who have it open.
    pub(super) fn export(&self, id: ThinId) -> Result<Arc<ThinExport>> {
        let as_ptr = |activation: &Option<Arc<_>>| activation.as_ref().map(Arc::as_ptr);
        let mut opened: Option<Arc<ThinExport>> = None;
        loop {
            let mut thins = self.thins();
            if let Some(open) = thins.open.get(&id.0).and_then(Weak::upgrade) {
                return Ok(open);
            }
            let activation = thins.activation(id)?;
            match opened.take() {
                // It may have been deactivated meanwhile, and activated in another way.
                Some(export) if as_ptr(&export.activation) == as_ptr(&activation) => {
                    thins.open.retain(|_, export| export.strong_count() > 0);
                    thins.open.insert(id.0, Arc::downgrade(&export));
                    return Ok(export);
                }
                _ => drop(thins),
            }
            // This waits for the end of a commit, as it does in the kernel. Whoever has to do with other devices does not.
            opened = Some(ThinExport::open(
                &self.driver,
                id,
                activation,
                self.is_read_only,
            )?);
        }
    }

    /// The thin devices that are exported, with what clients asked of them.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub(super) fn thin_stats(&self) -> Result<Vec<ThinStats>> {
        let ids = self.exported()?;
        let sizes: Vec<_> = {
            let thins = self.thins();
            let size = |id: &ThinId| {
                let open = thins.open.get(&id.0).and_then(Weak::upgrade);
                let active = || thins.active.get(&id.0)?.size;
                (
                    open.as_ref().map(|export| export.size).or_else(active),
                    open.is_some(),
                )
            };
            ids.iter().map(size).collect()
        };
        let mut all = Vec::with_capacity(ids.len());
        for (id, (size, is_open)) in ids.into_iter().zip(sizes) {
            // It may have been deleted meanwhile.
            let Ok(details) = self.driver.pool.inspect(|pool| pool.details(id)) else {
                continue;
            };
            all.push(ThinStats {
                id: id.0,
                size,
                mapped_blocks: details.mapped_blocks,
                is_open,
                io: self.driver.io_totals(id),
            });
        }
        Ok(all)
    }

    fn thins(&self) -> MutexGuard<'_, Thins> {
        self.thins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the pool from being suspended or resumed by others.
    fn suspension(&self) -> MutexGuard<'_, Option<bool>> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same of a pool that is not suspended for good.
    fn running(&self) -> Result<MutexGuard<'_, Option<bool>>> {
        let suspension = self.suspension();
        match *suspension {
            Some(_) => Err(gone()),
            None => Ok(suspension),
        }
    }

    /// Finishes what was accepted and commits, for good. What waits for space or for a resumption fails, and so does what comes later.
    ///
    /// # Errors
    /// `Io` if something could not be committed, also when it is asked again.
    pub(super) fn finish(&self) -> Result<()> {
        let mut finished = self.suspension();
        let is_committed = *finished.get_or_insert_with(|| self.suspend_for_good());
        is_committed.then_some(()).ok_or_else(|| {
            let what = format!(
                "a commit failed, which left the pool in mode {}; thin_check tells what it needs",
                self.mode()
            );
            Error::new(ErrorKind::Io, what)
        })
    }

    /// True if all was committed.
    fn suspend_for_good(&self) -> bool {
        let suspended = self.ask_to_suspend();
        // A pool that is suspended already has committed everything, or tried to.
        let is_suspended =
            suspended.map_or_else(|e| e.kind() == ErrorKind::InvalidArgument, |()| true);
        // Where a commit fails nothing can be changed any more.
        let is_read_only = self.is_read_only || self.driver.table().features.read_only;
        let is_committed = is_suspended && (is_read_only || self.mode().is_writable());
        // What ended in the last turn is told first.
        self.driver.call(|_| ()).ok();
        let error = match self.mode() {
            PoolMode::OutOfDataSpace => BioError::NoSpace,
            _ => BioError::Io,
        };
        self.driver.parts.close(error);
        is_committed
    }

    /// Finishes what was accepted, commits, and ends the threads. What waits for space or for a resumption fails.
    ///
    /// # Errors
    /// `Io` if something could not be committed.
    pub fn stop(&self) -> Result<()> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(threads) = threads.take() else {
            return Ok(());
        };
        let committed = self.finish();
        self.driver.events.end();
        self.driver.stop(threads);
        committed
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // Whoever wants to know how it went has called it before.
        self.stop().ok();
    }
}
