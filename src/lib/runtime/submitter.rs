//! A connection's way into the pool: cuts requests into bios, moves what is mapped itself, and leaves the rest to the worker.

use super::buffers;
use super::cut::cut;
use super::data_device::SECTOR;
use super::driver::Driver;
use super::export::{Extent, add_extent};
use super::thin_contexts::{ALLOCATED, HOLE};
use super::thin_export::ThinExport;
use super::transfer::{Part, Payload, Told, Transfer, bio_error};
use super::turn::before_a_turn;
use crate::pool::{
    Bio, BioError, BioResult, DISCARD_BLOCKS, Event, Mapped, Mapper, Op, Passed, pieces,
};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bios that are started together.
const MOST_TOGETHER: usize = 64;

/// Blocks that are looked up for holes at once.
const MOST_LOOKUPS: usize = 4096;

/// One for each thread that submits.
pub(super) struct Submitter {
    thin: Arc<ThinExport>,
    mapper: Mapper,
    /// It may be held up while the worker is behind.
    is_client: bool,
    /// The last bio was left to the worker.
    was_deferred: bool,
    /// Something was left to the worker, which this thread takes a turn for.
    owes_turn: bool,
    /// Mapped bios of a device that is used directly, with their sectors: they are started together.
    batch: Vec<(Box<Bio>, u64)>,
    /// Those that were started and have not ended.
    under_way: Arc<AtomicUsize>,
}

impl Drop for Submitter {
    fn drop(&mut self) {
        self.start();
    }
}

/// A request as its bios are submitted. Nothing is shared before the first of them is left to the worker.
struct Request {
    told: Option<Told>,
    buffer: Vec<u8>,
    data: Vec<u8>,
    transfer: Option<Arc<Transfer>>,
    result: BioResult,
}

impl Request {
    fn new(buffer: Vec<u8>, data: Vec<u8>, told: Told) -> Self {
        Self {
            told: Some(told),
            buffer,
            data,
            transfer: None,
            result: Ok(()),
        }
    }

    /// The request, to be shared with whoever carries its parts out.
    fn share(&mut self, thin: &Arc<ThinExport>) -> &Arc<Transfer> {
        self.transfer.get_or_insert_with(|| {
            let told = self.told.take().unwrap_or_else(|| Box::new(|_| {}));
            let (buffer, data) = (
                std::mem::take(&mut self.buffer),
                std::mem::take(&mut self.data),
            );
            Transfer::new(thin, buffer, data, told)
        })
    }

    fn data(&self) -> &[u8] {
        self.transfer
            .as_ref()
            .map_or(&self.data, |transfer| transfer.data())
    }

    fn fill<T>(&mut self, fill: impl FnOnce(&mut [u8]) -> T) -> T {
        match &self.transfer {
            Some(transfer) => transfer.fill(fill),
            None => fill(&mut self.buffer),
        }
    }

    fn has_failed(&self) -> bool {
        let transfer = self.transfer.as_ref();
        self.result.is_err() || transfer.is_some_and(|transfer| transfer.has_failed())
    }

    /// All its bios are submitted.
    fn submitted(self) {
        match (self.transfer, self.told) {
            (Some(transfer), _) => transfer.end(self.result),
            (None, Some(told)) => {
                buffers::give(self.data);
                told(self.result.map(|()| self.buffer));
            }
            (None, None) => {}
        }
    }
}

impl Submitter {
    /// Of a connection, which is held up while the worker is behind.
    pub(super) fn new(thin: Arc<ThinExport>) -> Self {
        let mut this = Self::of_carrier(thin);
        this.is_client = true;
        this
    }

    /// Of a thread that the worker may depend on.
    fn of_carrier(thin: Arc<ThinExport>) -> Self {
        Self {
            mapper: Mapper::new(&thin.driver.pool, false).passing_shared_reads(),
            thin,
            is_client: false,
            was_deferred: false,
            owes_turn: false,
            batch: Vec::new(),
            under_way: Arc::default(),
        }
    }

    pub(super) fn thin(&self) -> &Arc<ThinExport> {
        &self.thin
    }

    /// Reads `len` bytes.
    pub(super) fn read(&mut self, byte: u64, len: usize, told: Told) {
        let mut request = Request::new(buffers::take(len), Vec::new(), told);
        for cut in cut(byte, len as u64, self.thin.block_sectors()) {
            let range = cut.range.start as usize..cut.range.end as usize;
            let payload = Payload::Buffer(range.clone());
            let bio = self.bio(Op::Read, cut.sector, cut.sectors);
            self.submit(
                &mut request,
                bio,
                payload,
                cut.skip,
                |driver, request, byte| {
                    request.fill(|buffer| driver.data.read(&mut buffer[range], byte))
                },
            );
        }
        request.submitted();
    }

    /// Writes bytes.
    pub(super) fn write(&mut self, byte: u64, data: Vec<u8>, is_fua: bool, told: Told) {
        let len = data.len() as u64;
        let mut request = Request::new(Vec::new(), data, told);
        for cut in cut(byte, len, self.thin.block_sectors()) {
            let range = cut.range.start as usize..cut.range.end as usize;
            let payload = Payload::Buffer(range.clone());
            let mut bio = self.bio(Op::Write, cut.sector, cut.sectors);
            bio.is_fua = is_fua;
            self.submit(
                &mut request,
                bio,
                payload,
                cut.skip,
                |driver, request, byte| driver.data.write(&request.data()[range], byte),
            );
        }
        request.submitted();
    }

    /// Makes durable what was written.
    pub(super) fn flush(&mut self, told: Told) {
        let thin = Arc::clone(&self.thin);
        if thin.driver.pool.is_committed() {
            // Only the data: that is what the worker would have a carrier do.
            let flush = move || {
                let flushed = thin.driver.data.flush().map_err(|e| bio_error(&e));
                told(flushed.map(|()| Vec::new()));
            };
            self.start();
            return match self.thin.driver.data.flushes_quickly() {
                true => flush(),
                false => self.thin.driver.run(flush),
            };
        }
        let bio = self.bio(Op::Flush, 0, 0);
        self.submit_one(bio, told);
    }

    /// Unmaps the whole blocks of a range.
    pub(super) fn trim(&mut self, byte: u64, len: u64, is_fua: bool, told: Told) {
        let told = self.durably(is_fua, told);
        let (first, end) = (byte.div_ceil(SECTOR), (byte + len) / SECTOR);
        self.discard(first..end.max(first), told);
    }

    fn discard(&mut self, sectors: Range<u64>, told: Told) {
        let mut request = Request::new(Vec::new(), Vec::new(), told);
        let (mut at, end) = (sectors.start, sectors.end);
        let size = self.thin.block_sectors();
        let is_long = end - at > size * DISCARD_BLOCKS;
        // A pool that is being stopped holds back what comes, without end.
        while at < end && !request.has_failed() {
            if is_long {
                // A device of exbibytes may have a block here and there: what lies between takes no time.
                let Some(next) = self.thin.mapped(at * SECTOR..end * SECTOR).next() else {
                    break;
                };
                at = next.start / SECTOR;
            }
            let Some((_, sectors)) = pieces(Op::Discard, at, end - at, size, None).next() else {
                break;
            };
            let bio = self.bio(Op::Discard, at, sectors);
            self.submit(&mut request, bio, Payload::Nothing, 0, |_, _, _| Ok(()));
            at += sectors;
        }
        request.submitted();
    }

    /// Makes a range read as zeros, also after other parts of its blocks are written. Whole blocks are unmapped unless `keeps_blocks`, and
    /// what is not mapped is left alone, as far as the pool's features and the device's origin allow.
    pub(super) fn write_zeroes(
        &mut self,
        byte: u64,
        len: u64,
        (is_fua, keeps_blocks): (bool, bool),
        told: Told,
    ) {
        let told = self.durably(is_fua, told);
        let end = byte + len;
        let thin = Arc::clone(&self.thin);
        if keeps_blocks || !thin.is_unmapped_zero() {
            return self.zero_ranges(std::iter::once(byte..end), told);
        }
        if !thin.frees_zeros() {
            return self.zero_ranges(thin.mapped(byte..end), told);
        }
        let size = thin.block_sectors() * SECTOR;
        let (head, tail) = (byte.next_multiple_of(size).min(end), end - end % size);
        let tail = tail.max(head);
        // What is mapped of the partial blocks is zeroed in place.
        let edges: Vec<_> = [byte..head, tail..end]
            .into_iter()
            .flat_map(|edge| thin.mapped(edge))
            .collect();
        if thin.mapped(head..tail).next().is_none() {
            return self.zero_ranges(edges.into_iter(), told);
        }
        // A discard is a hint: what is still mapped afterwards is zeroed in place, too.
        let told: Told = Box::new(move |unmapped| match unmapped {
            Err(e) => told(Err(e)),
            Ok(_) => thin.clone().driver.run(move || {
                let left = edges.into_iter().chain(thin.mapped(head..tail));
                Submitter::of_carrier(Arc::clone(&thin)).zero_ranges(left, told);
            }),
        });
        self.discard(head / SECTOR..tail / SECTOR, told);
    }

    /// Writes zeros to ranges of bytes.
    fn zero_ranges(&mut self, ranges: impl Iterator<Item = Range<u64>>, told: Told) {
        let mut request = Request::new(Vec::new(), Vec::new(), told);
        for range in ranges {
            for cut in cut(
                range.start,
                range.end - range.start,
                self.thin.block_sectors(),
            ) {
                // The pool is full, most likely: nobody tries each block of an exbibyte.
                if request.has_failed() {
                    break;
                }
                let len = cut.range.end - cut.range.start;
                let bio = self.bio(Op::Write, cut.sector, cut.sectors);
                self.submit(
                    &mut request,
                    bio,
                    Payload::Zeros(len),
                    cut.skip,
                    |driver, _, byte| driver.data.write_zeros(byte, len),
                );
            }
        }
        request.submitted();
    }

    /// Has a flush follow before the answer, if what was asked for is to be durable.
    fn durably(&self, is_fua: bool, told: Told) -> Told {
        if !is_fua {
            return told;
        }
        let thin = Arc::clone(&self.thin);
        Box::new(move |done| match done {
            Ok(_) => thin
                .clone()
                .driver
                .run(move || Submitter::of_carrier(thin).flush(told)),
            Err(e) => told(Err(e)),
        })
    }

    /// What of a range of bytes is a hole, as far as it is looked: the blocks are looked up as those of a read that is mapped. So what
    /// is told is true at this moment, and neither a commit nor a disk is waited for.
    pub(super) fn holes(&mut self, bytes: Range<u64>) -> Vec<Extent> {
        let size = self.thin.block_sectors() * SECTOR;
        let (mut extents, mut at) = (Vec::new(), bytes.start);
        for _ in 0..MOST_LOOKUPS {
            if at >= bytes.end {
                break;
            }
            let end = (at - at % size).saturating_add(size).min(bytes.end);
            let status = match self.mapper.pass(&self.thin.thin, Op::Read, at / SECTOR) {
                Passed::Zero => HOLE,
                Passed::Left(_) => ALLOCATED,
                Passed::Remapped { passage, .. } => {
                    self.thin.driver.pool.end_passage(passage);
                    ALLOCATED
                }
            };
            add_extent(&mut extents, end - at, status);
            at = end;
        }
        extents
    }

    fn bio(&self, op: Op, sector: u64, sectors: u64) -> Box<Bio> {
        Box::new(Bio::new(
            self.thin.driver.parts.number(),
            op,
            sector,
            sectors,
        ))
    }

    /// Starts what was held back to be started together. One alone is waited for here, which costs the least.
    pub(super) fn start(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        let driver = &self.thin.driver;
        let is_alone = batch.len() == 1 && self.under_way.load(Ordering::Acquire) == 0;
        if is_alone {
            batch
                .drain(..)
                .for_each(|(bio, sector)| driver.issue(bio, sector));
        } else if !batch.is_empty() {
            self.under_way.fetch_add(batch.len(), Ordering::AcqRel);
            driver.issue_all(batch, &self.under_way);
        }
        if std::mem::take(&mut self.owes_turn) {
            self.thin.driver.take_turn(vec![Event::Work]);
        }
    }

    fn submit_one(&mut self, bio: Box<Bio>, told: Told) {
        let mut request = Request::new(Vec::new(), Vec::new(), told);
        self.submit(&mut request, bio, Payload::Nothing, 0, |_, _, _| Ok(()));
        request.submitted();
    }

    /// Submits a bio of a request; `carry_out` moves its data to or from a byte of the data device if it is mapped.
    fn submit(
        &mut self,
        request: &mut Request,
        bio: Box<Bio>,
        payload: Payload,
        skip: u64,
        carry_out: impl FnOnce(&Driver, &mut Request, u64) -> std::io::Result<()>,
    ) {
        if std::mem::take(&mut self.was_deferred) && self.is_client {
            let transfer = request.transfer.as_ref();
            let is_full = transfer.is_some_and(|transfer| transfer.is_full());
            if is_full || self.thin.driver.pool.is_throttled() {
                self.start();
                self.thin.driver.pool.throttle();
                if let Some(transfer) = &request.transfer {
                    transfer.wait_for_room();
                }
            }
        }
        let driver = &*self.thin.driver;
        let id = bio.id;
        let is_in_ranks = driver.data.is_direct() && matches!(payload, Payload::Buffer(_));
        let mut table = driver.parts.table(id);
        // Whoever waits for a commit waits for the worker's thread in any case.
        let takes_turn = self.is_client && bio.op != Op::Flush && !bio.is_fua;
        let map = || self.mapper.map(&self.thin.thin, bio);
        let mapped = match takes_turn {
            true => before_a_turn(&mut self.owes_turn, map),
            false => map(),
        };
        match mapped {
            Mapped::Deferred(reason) => {
                // Somebody else may be on the way to it, but this thread is here.
                self.owes_turn |= takes_turn;
                self.thin.counts.count_deferred(reason);
                if driver.parts.is_closed() {
                    request.result = Err(BioError::Io);
                    return;
                }
                let transfer = Arc::clone(request.share(&self.thin));
                transfer.begin();
                table.insert(
                    id,
                    Part {
                        transfer,
                        payload,
                        skip,
                    },
                );
                self.was_deferred = true;
            }
            Mapped::Zero(_) => {}
            Mapped::Failed(_, error) => request.result = request.result.and(Err(error)),
            Mapped::Remapped { bio, sector } if is_in_ranks => {
                let transfer = Arc::clone(request.share(&self.thin));
                transfer.begin();
                let part = Part {
                    transfer,
                    payload,
                    skip,
                };
                table.insert(id, part);
                drop(table);
                self.batch.push((bio, sector));
                if self.batch.len() == MOST_TOGETHER {
                    self.start();
                }
            }
            Mapped::Remapped { bio, sector } => {
                drop(table);
                let done = carry_out(driver, request, sector * SECTOR + skip);
                let done = done.map_err(|e| bio_error(&e));
                if let Some((_, result)) = driver.pool.end_io(bio, done) {
                    request.result = request.result.and(result);
                }
            }
        }
    }
}

/// What an error means to a client of the system.
pub(super) fn errno(error: BioError) -> rustix::io::Errno {
    use rustix::io::Errno;
    match error {
        BioError::Io | BioError::Requeue => Errno::IO,
        BioError::NoSpace => Errno::NOSPC,
        BioError::Unsupported => Errno::OPNOTSUPP,
        BioError::Invalid => Errno::INVAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Passed;
    use crate::runtime::{Activation, Options, Runtime};
    use crate::units::ThinId;
    use std::fs::File;
    use std::sync::mpsc;
    use std::time::Duration;

    const BLOCK: usize = 65536;

    struct Scene {
        folder: tempfile::TempDir,
        runtime: Arc<Runtime>,
    }

    fn options(folder: &tempfile::TempDir) -> Options {
        Options::new(&folder.path().join("meta"), &folder.path().join("data"))
    }

    impl Scene {
        /// A new pool of so many data blocks with thin device 0.
        fn new(data_blocks: u64) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (name, len) in [("meta", 1 << 20), ("data", data_blocks * BLOCK as u64)] {
                File::create(folder.path().join(name))
                    .unwrap()
                    .set_len(len)
                    .unwrap();
            }
            let options = Options {
                create: Some(128),
                ..options(&folder)
            };
            let runtime = Arc::new(Runtime::open(&options).unwrap());
            runtime.message("create_thin 0".parse().unwrap()).unwrap();
            Self { folder, runtime }
        }

        fn open(&self, id: u64) -> Submitter {
            let size = Some(64 * BLOCK as u64);
            let activation = Activation { size, origin: None };
            // Whoever opens it again shares it.
            self.runtime.activate(ThinId(id), activation).ok();
            Submitter::new(self.runtime.export(ThinId(id)).unwrap())
        }

        /// Stops the pool, and starts it again.
        fn restart(self) -> Self {
            let Self { folder, runtime } = self;
            runtime.stop().unwrap();
            assert_eq!(Arc::strong_count(&runtime), 1, "somebody still has it");
            drop(runtime);
            let runtime = Arc::new(Runtime::open(&options(&folder)).unwrap());
            Self { folder, runtime }
        }
    }

    fn wait(
        thin: &mut Submitter,
        ask: impl FnOnce(&mut Submitter, Told),
    ) -> Result<Vec<u8>, BioError> {
        let (sender, receiver) = mpsc::channel();
        ask(thin, Box::new(move |done| sender.send(done).unwrap()));
        thin.start();
        receiver
            .recv_timeout(Duration::from_secs(60))
            .expect("it ends")
    }

    impl Submitter {
        fn write_now(&mut self, byte: u64, data: &[u8]) -> Result<Vec<u8>, BioError> {
            wait(self, |thin, told| {
                thin.write(byte, data.to_vec(), false, told)
            })
        }

        fn read_now(&mut self, byte: u64, len: usize) -> Vec<u8> {
            wait(self, |thin, told| thin.read(byte, len, told)).unwrap()
        }

        fn zero_now(&mut self, byte: u64, len: u64, keeps_blocks: bool) {
            wait(self, |thin, told| {
                thin.write_zeroes(byte, len, (true, keeps_blocks), told)
            })
            .unwrap();
        }

        fn mapped_blocks(&self) -> u64 {
            let id = self.thin.thin.id();
            self.thin
                .driver
                .pool
                .inspect(|pool| pool.details(id))
                .unwrap()
                .mapped_blocks
        }
    }

    #[test]
    fn what_was_written_is_there_after_a_restart() {
        let scene = Scene::new(32);
        let mut thin = scene.open(0);
        assert_eq!(thin.read_now(0, 3 * BLOCK), vec![0; 3 * BLOCK]);
        let data: Vec<u8> = (0..2 * BLOCK + 777).map(|i| (i % 251) as u8 + 1).collect();
        thin.write_now(1001, &data).unwrap();
        thin.write_now(1001, &data).unwrap();
        wait(&mut thin, |thin, told| {
            thin.write(5 * BLOCK as u64, vec![9; BLOCK], true, told)
        })
        .unwrap();
        wait(&mut thin, |thin, told| thin.flush(told)).unwrap();
        drop(thin);
        let scene = scene.restart();
        let mut thin = scene.open(0);
        let found = thin.read_now(0, 3 * BLOCK);
        assert_eq!(found[1001..1001 + data.len()], data);
        assert!(
            found[..1001]
                .iter()
                .chain(&found[1001 + data.len()..])
                .all(|&b| b == 0)
        );
        assert_eq!(thin.read_now(5 * BLOCK as u64, BLOCK), vec![9; BLOCK]);
        assert_eq!(thin.mapped_blocks(), 4);
    }

    #[test]
    fn a_snapshot_keeps_what_its_origin_had() {
        let scene = Scene::new(32);
        let mut origin = scene.open(0);
        origin.write_now(0, &vec![1; 2 * BLOCK]).unwrap();
        scene
            .runtime
            .message("create_snap 1 0".parse().unwrap())
            .unwrap();
        origin.write_now(100, &[2; 50]).unwrap();
        let mut snapshot = scene.open(1);
        assert_eq!(snapshot.read_now(0, 2 * BLOCK), vec![1; 2 * BLOCK]);
        snapshot.write_now(BLOCK as u64, &vec![3; BLOCK]).unwrap();
        let found = origin.read_now(0, 2 * BLOCK);
        assert!(found[100..150].iter().all(|&b| b == 2));
        assert!(found[..100].iter().chain(&found[150..]).all(|&b| b == 1));
        drop((origin, snapshot));
        scene.restart();
    }

    #[test]
    fn zeros_are_written_where_something_is_and_whole_blocks_are_unmapped() {
        let scene = Scene::new(32);
        let mut thin = scene.open(0);
        thin.write_now(0, &vec![7; 4 * BLOCK]).unwrap();
        thin.zero_now(BLOCK as u64 - 100, BLOCK as u64 + 200, false);
        assert_eq!(thin.mapped_blocks(), 3);
        let found = thin.read_now(0, 4 * BLOCK);
        let zeros = BLOCK - 100..2 * BLOCK + 100;
        assert!(found[zeros.clone()].iter().all(|&b| b == 0));
        assert!(
            found[..zeros.start]
                .iter()
                .chain(&found[zeros.end..])
                .all(|&b| b == 7)
        );
        thin.zero_now(0, 64 * BLOCK as u64, false);
        assert_eq!(thin.mapped_blocks(), 0);
        thin.zero_now(10, 2 * BLOCK as u64, true);
        assert_eq!(
            thin.mapped_blocks(),
            3,
            "blocks are there if they are asked for"
        );
        wait(&mut thin, |thin, told| {
            thin.trim(5, 64 * BLOCK as u64 - 5, true, told)
        })
        .unwrap();
        assert_eq!(
            thin.mapped_blocks(),
            1,
            "a trim leaves what it covers in part"
        );
        drop(thin);
        scene.restart();
    }

    #[test]
    fn what_reads_as_zeros_takes_no_space_though_discards_are_ignored() {
        let Scene { folder, runtime } = Scene::new(32);
        runtime.stop().unwrap();
        drop(runtime);
        let mut options = options(&folder);
        options.features.ignore_discard = true;
        let runtime = Arc::new(Runtime::open(&options).unwrap());
        let scene = Scene { folder, runtime };
        let mut thin = scene.open(0);
        thin.write_now(BLOCK as u64, &vec![7; 3 * BLOCK]).unwrap();
        thin.zero_now(0, 64 * BLOCK as u64 - 5, false);
        assert_eq!(thin.mapped_blocks(), 3);
        assert_eq!(thin.read_now(0, 5 * BLOCK), vec![0; 5 * BLOCK]);
    }

    #[test]
    fn whoever_returns_the_last_ticket_owes_the_turn_of_those_who_waited_for_it() {
        let scene = Scene::new(32);
        let mut thin = scene.open(0);
        thin.write_now(0, &vec![7; 2 * BLOCK]).unwrap();
        // With nothing to commit nobody looks around by and by.
        wait(&mut thin, |thin, told| thin.flush(told)).unwrap();
        let mut reader = scene.open(0);
        let passed = reader.mapper.pass(&reader.thin.thin, Op::Read, 0);
        let Passed::Remapped { passage, .. } = passed else {
            panic!("it is mapped: {passed:?}");
        };
        let (sender, receiver) = mpsc::channel();
        thin.trim(
            BLOCK as u64,
            BLOCK as u64,
            false,
            Box::new(move |done| sender.send(done).unwrap()),
        );
        thin.start();
        let driver = Arc::clone(&thin.thin.driver);
        driver.call(|_| ()).unwrap();
        let mut owes = false;
        before_a_turn(&mut owes, || driver.pool.end_passage(passage));
        assert!(owes);
        assert!(receiver.try_recv().is_err(), "nobody else knows of it");
        driver.take_turn(vec![Event::Work]);
        let trimmed = receiver.recv_timeout(Duration::from_secs(60));
        trimmed.expect("it ends").unwrap();
    }

    #[test]
    fn contexts_tell_what_is_mapped_shared_and_different() {
        let scene = Scene::new(32);
        let mut origin = scene.open(0);
        origin.write_now(BLOCK as u64, &vec![1; 3 * BLOCK]).unwrap();
        let message = |text: &str| scene.runtime.message(text.parse().unwrap()).unwrap();
        message("create_snap 1 0");
        origin.write_now(2 * BLOCK as u64, &[2; 512]).unwrap();
        origin.write_now(9 * BLOCK as u64, &[2; 512]).unwrap();
        let thin = Arc::clone(origin.thin());
        let statuses = |context: &str, range: Range<u64>, most: usize| {
            let found = thin.statuses(context, &range, most).unwrap();
            found.map(|all| all.iter().map(|e| (e.len, e.status)).collect::<Vec<_>>())
        };
        let block = BLOCK as u64;
        let all = |context: &str| {
            let found = statuses(context, 0..12 * block, 100).expect("it is known");
            assert_eq!(found.iter().map(|(len, _)| len).sum::<u64>(), 12 * block);
            found
                .iter()
                .map(|(len, status)| (len / block, *status))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            all("base:allocation"),
            [(1, 3), (3, 0), (5, 3), (1, 0), (2, 3)]
        );
        let depth = [(1, 0), (1, 2), (1, 1), (1, 2), (5, 0), (1, 1), (2, 0)];
        assert_eq!(all("qemu:allocation-depth"), depth);
        let since = [(2, 0), (1, 1), (6, 0), (1, 1), (2, 0)];
        assert_eq!(all("qemu:dirty-bitmap:since-1"), since);
        assert_eq!(
            all("dm-thin:shared"),
            [(1, 0), (1, 1), (1, 0), (1, 1), (8, 0)]
        );
        let (no, new) = (u32::MAX, 1);
        let time = [
            (1, no),
            (1, 0),
            (1, new),
            (1, 0),
            (5, no),
            (1, new),
            (2, no),
        ];
        assert_eq!(all("dm-thin:time"), time);
        assert_eq!(
            statuses("base:allocation", 100..block + 7, 9),
            Some(vec![(block - 100, 3), (7, 0)])
        );
        assert_eq!(
            statuses("base:allocation", 0..12 * block, 2).map(|all| all.len()),
            Some(2)
        );
        assert_eq!(statuses("base:nothing", 0..block, 9), None);
        assert!(
            thin.statuses("qemu:dirty-bitmap:since-7", &(0..block), 9)
                .is_err()
        );
    }

    #[test]
    fn a_full_pool_says_so_and_goes_on_once_it_has_grown() {
        let scene = Scene::new(2);
        let mut thin = scene.open(0);
        thin.write_now(0, &vec![1; 2 * BLOCK]).unwrap();
        assert_eq!(
            thin.write_now(2 * BLOCK as u64, &[1; 512]),
            Err(BioError::NoSpace)
        );
        scene.runtime.grow(Some(4), Some(512)).unwrap();
        thin.write_now(2 * BLOCK as u64, &[1; 512]).unwrap();
        let status = scene.runtime.status().unwrap().to_string();
        assert!(status.contains("/512 3/4 - rw "), "{status}");
        drop(thin);
        scene.restart();
    }

    /// Turns that a connection takes leave the flush to the worker's thread, which has not been woken for anything else.
    #[test]
    fn what_connections_change_is_committed_before_long() {
        let scene = Scene::new(32);
        let mut thin = scene.open(0);
        let pool = Arc::clone(&thin.thin.driver.pool);
        let wait_for_commit = || {
            let is_committed = (0..3000).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                pool.is_committed()
            });
            assert!(is_committed, "nothing is committed in half a minute");
        };
        wait_for_commit();
        let commits = pool.commits();
        // The first has waited for long enough, the second is yet to wait.
        for _ in 0..2 {
            for block in 0..4 {
                thin.write_now(block * BLOCK as u64, &[1; 512]).unwrap();
            }
            wait_for_commit();
            wait(&mut thin, |thin, told| {
                thin.trim(0, 4 * BLOCK as u64, false, told)
            })
            .unwrap();
        }
        wait_for_commit();
        assert!(pool.commits() > commits);
        assert_eq!(thin.mapped_blocks(), 0);
    }

    #[test]
    fn what_is_deferred_waits_for_the_turn_of_its_connection() {
        let scene = Scene::new(32);
        let mut thin = scene.open(0);
        let (sender, ended) = mpsc::channel();
        for block in 0..4 {
            let sender = sender.clone();
            let told = move |done: Result<_, _>| sender.send(done).unwrap();
            thin.write(block * BLOCK as u64, vec![1; 512], false, Box::new(told));
        }
        assert!(ended.try_recv().is_err(), "nobody was woken for them");
        thin.start();
        for _ in 0..4 {
            let done = ended.recv_timeout(Duration::from_secs(60));
            done.expect("it ends").unwrap();
        }
        assert_eq!(thin.mapped_blocks(), 4);
    }

    #[test]
    fn turns_of_many_connections_lose_nothing() {
        let scene = Scene::new(64);
        let message = |text: &str| scene.runtime.message(text.parse().unwrap());
        for round in 0..8 {
            std::thread::scope(|threads| {
                for client in 0..4_u64 {
                    let mut thin = scene.open(0);
                    threads.spawn(move || {
                        let own = |n: u64| (client * 8 + n) * BLOCK as u64;
                        let data = [client as u8 + 1; 512];
                        for n in 0..8 {
                            thin.write_now(own(n) + 512, &data).unwrap();
                        }
                        for n in 0..4 {
                            wait(&mut thin, |thin, told| {
                                thin.trim(own(2 * n), BLOCK as u64, n % 2 == 0, told);
                            })
                            .unwrap();
                        }
                        for n in 0..8 {
                            let found = thin.read_now(own(n), 1024);
                            let expected = [[0; 512], [data[0] * u8::from(n % 2 == 1); 512]];
                            assert_eq!(found, expected.concat());
                        }
                    });
                }
                message("create_snap 1 0").unwrap();
            });
            message("delete 1").unwrap();
            assert_eq!(scene.open(0).mapped_blocks(), 16, "round {round}");
        }
        scene.restart();
    }

    #[test]
    fn only_whole_pools_are_opened() {
        let scene = Scene::new(8);
        let refused = |options: &Options, text: &str| {
            let refusal = Runtime::open(options).err().expect("refused");
            assert!(refusal.to_string().contains(text), "{refusal}");
        };
        let good = options(&scene.folder);
        refused(&good, "in use");
        scene.runtime.stop().unwrap();
        let Scene { folder, runtime } = scene;
        drop(runtime);
        // A pool that is there is not made again.
        let again = Runtime::open(&Options {
            create: Some(256),
            ..good.clone()
        });
        assert!(
            again
                .unwrap()
                .table()
                .unwrap()
                .to_string()
                .contains(" 128 0 ")
        );
        refused(&Options::new(&good.data, &good.metadata), "wrong way round");
        File::options()
            .write(true)
            .open(&good.data)
            .unwrap()
            .set_len(7 * BLOCK as u64)
            .unwrap();
        refused(&good, "--read-only");
        Runtime::open(&Options {
            is_read_only: true,
            ..good
        })
        .unwrap();
        drop(folder);
    }

    /// What was read is what the snapshot had, and nobody but the reader had to do with it.
    #[test]
    fn a_read_of_a_shared_block_is_not_left_to_the_worker() {
        let scene = Scene::new(8);
        let mut origin = scene.open(0);
        origin.write_now(0, &[7; BLOCK]).unwrap();
        scene
            .runtime
            .message("create_snap 1 0".parse().unwrap())
            .unwrap();
        let mut snapshot = scene.open(1);
        let shared = |submitter: &Submitter| {
            let deferred = submitter.thin().counts.totals().deferred;
            deferred.get("shared").copied().unwrap_or(0)
        };
        for submitter in [&mut origin, &mut snapshot] {
            let before = shared(submitter);
            let found = submitter.read_now(4096, 4096);
            assert_eq!(found, [7; 4096]);
            assert_eq!(shared(submitter), before);
        }
        let before = shared(&origin);
        origin.write_now(0, &[8; 4096]).unwrap();
        assert_eq!(shared(&origin), before + 1, "a write breaks the sharing");
        let found = snapshot.read_now(0, 4096);
        assert_eq!(found, [7; 4096]);
    }
}
