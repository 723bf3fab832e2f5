//! A pool with a data device in memory: submits bios, keeps what the engine wants done until it is told to do it, and notes what
//! comes of it. A write is known by the number of its bio.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use thintools::ErrorKind;
use thintools::io::BlockEngine;
use thintools::pool::{
    Bio, BioError, BioResult, Effect, Event, Features, JobId, Mapped, Mapper, Message, Notice, Op,
    Pool, PoolTable, Reason, Settings, Source, Thin, Worker,
};
use thintools::thin::PoolMetadata;
use thintools::units::ThinId;

use super::disk::{CHUNK, Disk, Tag};

pub(crate) const BLOCK: u64 = 128;

/// Something that the data device is asked to do.
#[derive(Debug)]
pub(crate) enum Io {
    Bio {
        bio: Box<Bio>,
        sector: u64,
    },
    Origin {
        bio: Box<Bio>,
        sectors: u64,
    },
    Zero {
        job: JobId,
        sector: u64,
        sectors: u64,
    },
    Copy {
        job: JobId,
        from: Source,
        from_sector: u64,
        sector: u64,
        sectors: u64,
    },
    Discard {
        job: JobId,
        sector: u64,
        sectors: u64,
    },
    Flush {
        job: JobId,
    },
}

/// A request, and what a flush among them covers.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) io: Io,
    mark: u64,
}

/// A bio that is done.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    pub(crate) result: BioResult,
    /// What a read found, chunk by chunk.
    pub(crate) content: Vec<Tag>,
}

pub(crate) struct Rig {
    pub(crate) worker: Worker,
    pub(crate) pool: Arc<Pool>,
    pub(crate) mapper: Mapper,
    pub(crate) disk: Disk,
    pub(crate) pending: Vec<Pending>,
    pub(crate) now: Duration,
    pub(crate) done: BTreeMap<u64, Done>,
    pub(crate) answers: BTreeMap<u64, thintools::Result<()>>,
    /// Answered requests, in order.
    pub(crate) answered: Vec<u64>,
    pub(crate) notices: Vec<Notice>,
    /// Why each bio was deferred that was.
    pub(crate) deferred: BTreeMap<u64, Reason>,
    /// What each effect was, in order.
    pub(crate) log: Vec<String>,
    /// Content of external origins, by the number of the open device.
    pub(crate) origins: BTreeMap<u32, Disk>,
    pub(crate) data_blocks: u64,
    /// Writes that have other tags than their number: that of the first chunk; those of the others count up.
    pub(crate) tags: BTreeMap<u64, Tag>,
    next: u64,
}

pub(crate) fn table(features: Features) -> PoolTable {
    PoolTable {
        metadata_device: "252:0".into(),
        data_device: "252:1".into(),
        block_sectors: BLOCK as u32,
        low_water_blocks: 0,
        features,
    }
}

pub(crate) fn settings() -> Settings {
    Settings::new(table(Features::default()))
}

impl Rig {
    /// A new pool with `data_blocks` blocks of 64 KiB on a data device that was used before.
    pub(crate) fn new(engine: Arc<dyn BlockEngine>, data_blocks: u64, settings: Settings) -> Self {
        let block = settings.table.block_sectors;
        let mut metadata = PoolMetadata::format(engine, block, 1 << 20).expect("formatted");
        metadata.resize_data(data_blocks).expect("resized");
        metadata.commit().expect("committed");
        Self::on(metadata, Disk::used(), data_blocks, settings).expect("started")
    }

    /// A pool that is there already.
    pub(crate) fn on(
        metadata: PoolMetadata,
        disk: Disk,
        data_blocks: u64,
        settings: Settings,
    ) -> thintools::Result<Self> {
        let worker = Worker::start(metadata, settings)?;
        let pool = Arc::clone(worker.pool());
        Ok(Self {
            mapper: Mapper::new(&pool, true),
            worker,
            pool,
            disk,
            pending: Vec::new(),
            now: Duration::ZERO,
            done: BTreeMap::new(),
            answers: BTreeMap::new(),
            answered: Vec::new(),
            notices: Vec::new(),
            deferred: BTreeMap::new(),
            log: Vec::new(),
            origins: BTreeMap::new(),
            data_blocks,
            tags: BTreeMap::new(),
            next: 1,
        })
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// Tells the worker, and does all that needs no device.
    pub(crate) fn tell(&mut self, event: Event) {
        let mut effects = Vec::new();
        let mut has_more = self.worker.apply(self.now, event, &mut effects);
        let mut turns = 0;
        loop {
            for effect in std::mem::take(&mut effects) {
                self.take(effect);
            }
            if !has_more {
                break;
            }
            turns += 1;
            assert!(
                turns < 10_000,
                "the worker has always more to do: {:?}",
                self.worker
            );
            has_more = self.worker.apply(self.now, Event::Work, &mut effects);
        }
    }

    fn take(&mut self, effect: Effect) {
        self.log.push(format!("{effect:?}"));
        let io = match effect {
            Effect::Issue { bio, sector } => Io::Bio { bio, sector },
            Effect::ReadOrigin { bio, sectors } => Io::Origin { bio, sectors },
            Effect::Zero {
                job,
                sector,
                sectors,
            } => Io::Zero {
                job,
                sector,
                sectors,
            },
            Effect::Copy {
                job,
                from,
                from_sector,
                sector,
                sectors,
            } => Io::Copy {
                job,
                from,
                from_sector,
                sector,
                sectors,
            },
            Effect::Discard {
                job,
                sector,
                sectors,
            } => Io::Discard {
                job,
                sector,
                sectors,
            },
            Effect::Flush { job } => Io::Flush { job },
            Effect::End {
                bio,
                result,
                is_zero,
            } => {
                assert!(!is_zero || bio.op == Op::Read && result.is_ok());
                let content = match is_zero {
                    true => vec![0; (bio.sectors / CHUNK) as usize],
                    false => Vec::new(),
                };
                return self.finish(*bio, result, content);
            }
            Effect::Answer { tag, result } => {
                let before = self.answers.insert(tag, result);
                assert!(before.is_none(), "request {tag} was answered twice");
                self.answered.push(tag);
                return;
            }
            Effect::Notice(notice) => return self.notices.push(notice),
        };
        self.push(io);
    }

    fn push(&mut self, io: Io) {
        let mark = self.disk.mark();
        self.pending.push(Pending { io, mark });
    }

    fn finish(&mut self, bio: Bio, result: BioResult, content: Vec<Tag>) {
        let before = self.done.insert(bio.id, Done { result, content });
        assert!(before.is_none(), "bio {} completed twice", bio.id);
    }

    /// Submits a bio and wakes the worker if it has to. Returns its number.
    pub(crate) fn submit(&mut self, thin: &Thin, op: Op, sector: u64, sectors: u64) -> u64 {
        let id = self.number();
        self.submit_bio(thin, Bio::new(id, op, sector, sectors))
    }

    pub(crate) fn submit_fua(&mut self, thin: &Thin, sector: u64, sectors: u64) -> u64 {
        let id = self.number();
        self.submit_bio(thin, Bio::new(id, Op::Write, sector, sectors).with_fua())
    }

    /// Submits a write of the tags from `first` on.
    pub(crate) fn submit_tagged(
        &mut self,
        thin: &Thin,
        sector: u64,
        sectors: u64,
        first: Tag,
    ) -> u64 {
        let id = self.number();
        self.tags.insert(id, first);
        self.submit_bio(thin, Bio::new(id, Op::Write, sector, sectors))
    }

    pub(crate) fn submit_flush(&mut self, thin: &Thin) -> u64 {
        let id = self.number();
        self.submit_bio(thin, Bio::flush(id))
    }

    pub(crate) fn submit_bio(&mut self, thin: &Thin, bio: Bio) -> u64 {
        let id = bio.id;
        self.map(thin, bio);
        self.wake();
        id
    }

    /// Submits without letting the worker run.
    pub(crate) fn map(&mut self, thin: &Thin, bio: Bio) {
        let (id, chunks) = (bio.id, bio.sectors / CHUNK);
        match self.mapper.map(thin, Box::new(bio)) {
            Mapped::Remapped { bio, sector } => self.push(Io::Bio { bio, sector }),
            Mapped::Zero(bio) => self.finish(*bio, Ok(()), vec![0; chunks as usize]),
            Mapped::Deferred(reason) => {
                self.deferred.insert(id, reason);
            }
            Mapped::Failed(bio, error) => self.finish(*bio, Err(error), Vec::new()),
        }
    }

    pub(crate) fn wake(&mut self) {
        if self.pool.has_work() {
            self.tell(Event::Work);
        }
    }

    /// Carries out the request at `at` of those that are pending, or lets it fail.
    pub(crate) fn carry_out(&mut self, at: usize, result: BioResult) {
        let Pending { io, mark } = self.pending.remove(at);
        match io {
            Io::Bio { bio, sector } => {
                let mut content = Vec::new();
                match bio.op {
                    _ if result.is_err() => {}
                    Op::Read => content = self.disk.read(sector, bio.sectors),
                    Op::Write => {
                        if let Some((first, all)) = bio.zeroes_before() {
                            let zeros = vec![0; (all / CHUNK) as usize];
                            self.disk.write(first, &zeros, false);
                        }
                        let chunks = bio.sectors / CHUNK;
                        let tags = match self.tags.get(&bio.id) {
                            Some(&first) => (first..first + chunks).collect(),
                            None => vec![bio.id; chunks as usize],
                        };
                        self.disk.write(sector, &tags, bio.is_fua);
                    }
                    Op::Flush => self.disk.flush(mark),
                    Op::Discard => panic!("a discard bio was issued"),
                }
                if let Some((bio, result)) = self.pool.end_io(bio, result) {
                    self.finish(*bio, result, content);
                }
                self.wake();
            }
            Io::Origin { bio, sectors } => {
                let thin = self.origin_of(&bio);
                let mut content = match result {
                    Ok(()) => self.origins[&thin].read(bio.sector, sectors),
                    Err(_) => Vec::new(),
                };
                content.resize((bio.sectors / CHUNK) as usize, 0);
                if let Some((bio, result)) = self.pool.end_io(bio, result) {
                    self.finish(*bio, result, content);
                }
                self.wake();
            }
            Io::Zero {
                job,
                sector,
                sectors,
            } => {
                if result.is_ok() {
                    self.disk
                        .write(sector, &vec![0; (sectors / CHUNK) as usize], false);
                }
                self.tell(Event::Done { job, result });
            }
            Io::Copy {
                job,
                from,
                from_sector,
                sector,
                sectors,
            } => {
                if result.is_ok() {
                    let tags = match from {
                        Source::Data => self.disk.read(from_sector, sectors),
                        Source::Origin(thin) => self.origins[&thin].read(from_sector, sectors),
                    };
                    self.disk.write(sector, &tags, false);
                }
                self.tell(Event::Done { job, result });
            }
            Io::Discard {
                job,
                sector,
                sectors,
            } => {
                self.disk
                    .write(sector, &vec![0; (sectors / CHUNK) as usize], false);
                self.tell(Event::Done { job, result });
            }
            Io::Flush { job } => {
                if result.is_ok() {
                    self.disk.flush(mark);
                }
                self.tell(Event::Done { job, result });
            }
        }
    }

    /// Origins are kept by device; a bio says which it is for.
    fn origin_of(&self, bio: &Bio) -> u32 {
        bio.thin_number()
    }

    /// Carries out everything, oldest first, until nothing is left.
    pub(crate) fn settle(&mut self) {
        for _ in 0..1_000_000 {
            if self.pending.is_empty() {
                return;
            }
            self.carry_out(0, Ok(()));
        }
        panic!("I/O without an end");
    }

    /// Lets time pass, stopping where the worker wants to be woken.
    pub(crate) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.worker.deadline().filter(|&at| at <= end) {
            let before = self.now;
            self.now = self.now.max(at);
            self.tell(Event::Work);
            self.settle();
            if before == self.now && self.worker.deadline() == Some(at) {
                break;
            }
        }
        self.now = end;
        self.tell(Event::Work);
    }

    /// Sends a message and carries out everything; what came of it.
    pub(crate) fn message(&mut self, message: &str) -> thintools::Result<()> {
        let tag = self.send(message);
        self.settle();
        self.answers.remove(&tag).expect("an answer")
    }

    pub(crate) fn send(&mut self, message: &str) -> u64 {
        let tag = self.number();
        match message.parse::<Message>() {
            Ok(message) => self.tell(Event::Message { tag, message }),
            Err(e) => {
                self.answers.insert(tag, Err(e));
                self.answered.push(tag);
            }
        }
        tag
    }

    pub(crate) fn commit(&mut self) -> thintools::Result<()> {
        let tag = self.number();
        self.tell(Event::Commit { tag });
        self.settle();
        self.answers.remove(&tag).expect("an answer")
    }

    pub(crate) fn suspend(&mut self, is_noflush: bool) -> u64 {
        let tag = self.number();
        self.tell(Event::Suspend { tag, is_noflush });
        tag
    }

    /// Resumes and lets the answer come when it comes.
    pub(crate) fn resume_later(&mut self) -> u64 {
        let tag = self.number();
        let data_blocks = self.data_blocks;
        self.tell(Event::Resume {
            tag,
            table: None,
            data_blocks,
        });
        tag
    }

    pub(crate) fn resume(&mut self, table: Option<PoolTable>) -> thintools::Result<()> {
        let tag = self.number();
        let data_blocks = self.data_blocks;
        self.tell(Event::Resume {
            tag,
            table,
            data_blocks,
        });
        self.settle();
        self.answers.remove(&tag).expect("an answer")
    }

    /// Makes a thin device and opens it.
    pub(crate) fn thin(&mut self, id: u64) -> Arc<Thin> {
        self.message(&format!("create_thin {id}")).expect("made");
        self.open(id)
    }

    pub(crate) fn open(&mut self, id: u64) -> Arc<Thin> {
        self.worker.open_thin(ThinId(id), None).expect("opened")
    }

    /// Writes, and waits for it.
    pub(crate) fn write(
        &mut self,
        thin: &Thin,
        sector: u64,
        sectors: u64,
    ) -> Result<Tag, BioError> {
        let id = self.submit(thin, Op::Write, sector, sectors);
        self.settle();
        self.done[&id].result.map(|()| id)
    }

    pub(crate) fn discard(&mut self, thin: &Thin, sector: u64, sectors: u64) -> BioResult {
        let id = self.submit(thin, Op::Discard, sector, sectors);
        self.settle();
        self.done[&id].result
    }

    pub(crate) fn flush(&mut self, thin: &Thin) -> BioResult {
        let id = self.submit_flush(thin);
        self.settle();
        self.done[&id].result
    }

    /// Reads, and waits for it.
    pub(crate) fn read(
        &mut self,
        thin: &Thin,
        sector: u64,
        sectors: u64,
    ) -> Result<Vec<Tag>, BioError> {
        let id = self.submit(thin, Op::Read, sector, sectors);
        self.settle();
        let done = &self.done[&id];
        done.result.map(|()| done.content.clone())
    }

    /// Virtual and data blocks of a device, as the metadata has them now.
    pub(crate) fn mappings(&self, id: u64) -> BTreeMap<u64, u64> {
        self.pool.inspect(|pool| {
            let mut mappings = BTreeMap::new();
            let mut from = 0;
            let next = |from| pool.next_block(ThinId(id), thintools::units::ThinBlock(from));
            while let Some((block, at)) = next(from).expect("read") {
                mappings.insert(block.0, at.block.0);
                from = block.0 + 1;
            }
            mappings
        })
    }

    /// Data blocks that have a reference.
    pub(crate) fn used(&self) -> u64 {
        self.pool
            .inspect(|pool| pool.status().expect("read").used_data_blocks)
    }
}

/// The kind of the refusal.
pub(crate) fn kind(result: thintools::Result<()>) -> Option<ErrorKind> {
    result.err().map(|e| e.kind())
}
