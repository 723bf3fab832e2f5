//! Crashes and failing devices under metadata that changes: whatever a crash leaves is the last transaction or the next, whole and
//! sound; whatever fails is reported, and what was committed stays.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::thin::{DeviceDetail, Fields, PoolMetadata};
use thintools::tools::check::{CheckOptions, Code, check};
use thintools::units::{BLOCK_SIZE, DataBlock, MetadataBlock, ThinBlock, ThinId};
use thintools::{ErrorKind, Result};

use crate::crash::{Fault, Lands, Recorder, Request, Step};

/// The least cache there is: 64 blocks.
const SMALL: usize = 0;
const LARGE: usize = 4 << 20;
const SUPERBLOCK: MetadataBlock = MetadataBlock(0);

#[derive(Clone, Debug, Default, PartialEq)]
struct Device {
    detail: DeviceDetail,
    /// By virtual block: data block and the time of mapping.
    mappings: BTreeMap<u64, (u64, u32)>,
}

/// What a metadata snapshot holds.
#[derive(Clone, Debug, Default, PartialEq)]
struct Held {
    devices: BTreeMap<u64, Device>,
    time: u32,
    transaction_id: u64,
}

/// What a pool holds.
#[derive(Clone, Debug, Default, PartialEq)]
struct Contents {
    current: Held,
    held: Option<Held>,
    nr_data_blocks: u64,
    nr_metadata_blocks: u64,
    /// Data blocks that are counted though nothing leads to them.
    reserved: BTreeMap<u64, u32>,
    needs_check: bool,
}

impl Contents {
    /// Data blocks that are counted.
    fn data_blocks(&self) -> BTreeSet<u64> {
        let mut blocks = self.mapped_blocks();
        blocks.extend(self.reserved.keys());
        blocks
    }

    /// Data blocks that anything leads to.
    fn mapped_blocks(&self) -> BTreeSet<u64> {
        let held = self.held.iter().flat_map(|h| h.devices.values());
        let devices = self.current.devices.values().chain(held);
        devices
            .flat_map(|d| d.mappings.values().map(|m| m.0))
            .collect()
    }
}

fn superblock_of(engine: &dyn BlockEngine, location: MetadataBlock) -> Fields {
    let mut block = vec![0; BLOCK_SIZE];
    engine.read(location, &mut block).expect("memory");
    Fields::unpack(&block)
}

fn devices_of(pool: &PoolMetadata) -> Result<BTreeMap<u64, Device>> {
    let mut devices = BTreeMap::new();
    for id in pool.devices()? {
        let mut device = Device {
            detail: pool.details(id)?,
            mappings: BTreeMap::new(),
        };
        let mut from = 0;
        while let Some((block, at)) = pool.next_block(id, ThinBlock(from))? {
            device.mappings.insert(block.0, (at.block.0, at.time));
            from = block.0 + 1;
        }
        devices.insert(id.0, device);
    }
    Ok(devices)
}

/// What a pool says that it holds, but for the metadata snapshot and data blocks without a mapping.
fn current_of(pool: &PoolMetadata) -> Result<Contents> {
    let status = pool.status()?;
    let current = Held {
        devices: devices_of(pool)?,
        time: status.time,
        transaction_id: status.transaction_id,
    };
    Ok(Contents {
        current,
        nr_data_blocks: status.data_blocks,
        nr_metadata_blocks: status.metadata_blocks,
        needs_check: status.needs_check,
        ..Contents::default()
    })
}

/// An image with some blocks replaced: thousands of states that a crash may leave differ in a few blocks only.
#[derive(Clone)]
struct Layered {
    base: Arc<Vec<u8>>,
    replaced: BTreeMap<u64, Vec<u8>>,
}

impl Layered {
    fn new(base: &Arc<Vec<u8>>) -> Self {
        Self {
            base: Arc::clone(base),
            replaced: BTreeMap::new(),
        }
    }

    fn apply(&mut self, writes: &[Write<'_>]) {
        let writes = writes.iter();
        self.replaced
            .extend(writes.map(|(block, data)| (*block, data.to_vec())));
    }

    fn block(&self, number: u64) -> &[u8] {
        match self.replaced.get(&number) {
            Some(block) => block,
            None => &self.base[number as usize * BLOCK_SIZE..][..BLOCK_SIZE],
        }
    }
}

impl BlockEngine for Layered {
    fn nr_blocks(&self) -> u64 {
        (self.base.len() / BLOCK_SIZE) as u64
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        for (number, bytes) in (start.0..).zip(buf.chunks_exact_mut(BLOCK_SIZE)) {
            if number >= self.nr_blocks() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes.copy_from_slice(self.block(number));
        }
        Ok(())
    }

    fn write(&self, _: MetadataBlock, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn depth(&self) -> usize {
        1
    }
}

/// What is on an image, which has to be sound.
#[track_caller]
fn contents_of(image: &[u8], case: &str) -> Contents {
    contents(&Layered::new(&Arc::new(image.to_vec())), case)
}

/// What is on an image, which has to be sound. The metadata snapshot is read as a pool of its own.
#[track_caller]
fn contents(image: &Layered, case: &str) -> Contents {
    let engine = Arc::new(image.clone());
    let checked = check(&*engine, &CheckOptions::default(), &Silent).expect("memory");
    let open = |engine: &Arc<Layered>| PoolMetadata::open(Arc::clone(engine) as _, SMALL);
    let pool = open(&engine).unwrap_or_else(|e| panic!("{case}: {e}"));
    let read = |pool: &PoolMetadata| current_of(pool).unwrap_or_else(|e| panic!("{case}: {e}"));
    let mut found = read(&pool);
    assert_eq!(found.needs_check, checked.report.needs_check, "{case}");
    let superblock = superblock_of(&*engine, SUPERBLOCK);
    let held = (superblock.held_root != SUPERBLOCK).then(|| {
        let copy = superblock_of(&*engine, superblock.held_root);
        let as_pool = Fields {
            mapping_root: copy.mapping_root,
            details_root: copy.details_root,
            time: copy.time,
            transaction_id: copy.transaction_id,
            ..superblock
        };
        let mut image = image.clone();
        image.apply(&[(SUPERBLOCK.0, &as_pool.pack())]);
        let pool =
            open(&Arc::new(image)).unwrap_or_else(|e| panic!("{case}, metadata snapshot: {e}"));
        read(&pool).current
    });
    found.held = held;
    let mapped = found.mapped_blocks();
    for block in (0..found.nr_data_blocks).filter(|b| !mapped.contains(b)) {
        let count = pool.data_count(DataBlock(block));
        match count.unwrap_or_else(|e| panic!("{case}: {e}")) {
            0 => {}
            count => drop(found.reserved.insert(block, count)),
        }
    }
    let is_expected = |code: Code| match code {
        Code::NeedsCheck => true,
        Code::DataLeak => !found.reserved.is_empty(),
        _ => false,
    };
    let mut damages = checked.report.damages;
    damages.retain(|d| !is_expected(d.code));
    assert!(damages.is_empty(), "{case}: {damages:?}");
    found
}

/// A moment when something was acknowledged: steps done by then, and what must be there from then on.
type Acknowledged = (usize, Contents);

/// A pool on a recorder, and what it should hold.
struct Pool {
    recorder: Arc<Recorder>,
    before: Vec<u8>,
    pool: PoolMetadata,
    model: Contents,
    committed: Contents,
    /// Data blocks of what is committed: they must not be handed out.
    taken: BTreeSet<u64>,
    acknowledged: Vec<Acknowledged>,
}

impl Pool {
    /// On what `before` has.
    fn open(before: Vec<u8>, cache: usize) -> Self {
        let committed = contents_of(&before, "before");
        let recorder = Arc::new(Recorder::new(&before));
        Self {
            pool: PoolMetadata::open(Arc::clone(&recorder) as _, cache).expect("opened"),
            recorder,
            before,
            model: committed.clone(),
            taken: committed.data_blocks(),
            acknowledged: vec![(0, committed.clone())],
            committed,
        }
    }

    fn format(metadata_blocks: usize, data_blocks: u64, cache: usize) -> Self {
        let engine = Arc::new(RamEngine::new(metadata_blocks));
        let mut pool =
            PoolMetadata::format(Arc::clone(&engine) as _, 128, cache).expect("formatted");
        pool.resize_data(data_blocks).expect("resized");
        pool.commit().expect("committed");
        drop(pool);
        let engine = Arc::into_inner(engine).expect("nobody else has it");
        Self::open(engine.into_bytes(), cache)
    }

    /// On a device that has `more` blocks than its metadata.
    fn format_on_larger(metadata_blocks: usize, more: usize, cache: usize) -> Self {
        let mut image = Self::format(metadata_blocks, 700, cache).before;
        image.resize(image.len() + more * BLOCK_SIZE, 0);
        Self::open(image, cache)
    }

    fn acknowledge(&mut self, contents: Contents) {
        self.taken = contents.data_blocks();
        self.committed = contents.clone();
        self.acknowledged.push((self.recorder.nr_steps(), contents));
    }

    fn commit(&mut self) -> Result<()> {
        self.pool.commit()?;
        self.acknowledge(self.model.clone());
        Ok(())
    }

    fn abort(&mut self) -> Result<()> {
        self.pool.abort()?;
        self.model = self.committed.clone();
        Ok(())
    }

    fn create_thin(&mut self, id: u64) -> Result<()> {
        self.pool.create_thin(ThinId(id))?;
        let current = &mut self.model.current;
        let detail = DeviceDetail {
            mapped_blocks: 0,
            transaction_id: current.transaction_id,
            creation_time: current.time,
            snapshotted_time: current.time,
        };
        let device = Device {
            detail,
            ..Device::default()
        };
        current.devices.insert(id, device);
        Ok(())
    }

    fn create_snap(&mut self, id: u64, origin: u64) -> Result<()> {
        self.pool.create_snap(ThinId(id), ThinId(origin))?;
        let current = &mut self.model.current;
        current.time += 1;
        let of_origin = current.devices.get_mut(&origin).expect("there");
        of_origin.detail.snapshotted_time = current.time;
        let mut copy = of_origin.clone();
        copy.detail.creation_time = current.time;
        copy.detail.transaction_id = current.transaction_id;
        current.devices.insert(id, copy);
        Ok(())
    }

    fn delete(&mut self, id: u64) -> Result<()> {
        self.pool.delete_device(ThinId(id))?;
        self.model.current.devices.remove(&id);
        Ok(())
    }

    /// Maps virtual blocks from `block` on, `step` apart, as long as there are data blocks.
    fn map(&mut self, id: u64, block: u64, n: u64, step: u64) -> Result<()> {
        for i in 0..n {
            let Some(data) = self.pool.alloc_data_block()? else {
                return Ok(());
            };
            assert!(
                !self.taken.contains(&data.0),
                "data block {data} is part of what is committed"
            );
            self.point(id, block + i * step, data)?;
        }
        Ok(())
    }

    fn point(&mut self, id: u64, block: u64, data: DataBlock) -> Result<()> {
        self.pool.insert_block(ThinId(id), ThinBlock(block), data)?;
        let time = self.model.current.time;
        let device = self.model.current.devices.get_mut(&id).expect("there");
        device.mappings.insert(block, (data.0, time));
        device.detail.mapped_blocks = device.mappings.len() as u64;
        Ok(())
    }

    fn unmap(&mut self, id: u64, begin: u64, end: u64) -> Result<()> {
        self.pool
            .remove_range(ThinId(id), ThinBlock(begin), ThinBlock(end))?;
        let device = self.model.current.devices.get_mut(&id).expect("there");
        device.mappings.retain(|b, _| !(begin..end).contains(b));
        device.detail.mapped_blocks = device.mappings.len() as u64;
        Ok(())
    }

    fn resize_data(&mut self, nr_blocks: u64) -> Result<()> {
        self.pool.resize_data(nr_blocks)?;
        self.model.nr_data_blocks = nr_blocks;
        Ok(())
    }

    fn resize_metadata(&mut self, nr_blocks: u64) -> Result<()> {
        self.pool.resize_metadata(nr_blocks)?;
        self.model.nr_metadata_blocks = nr_blocks;
        Ok(())
    }

    /// Counts data blocks from `begin` on that nothing leads to, `n` at most, once more.
    fn inc_data(&mut self, begin: u64, n: u64) -> Result<()> {
        let mapped = self.model.mapped_blocks();
        let end = (begin + n).min(self.model.nr_data_blocks);
        let end = mapped.range(begin..end).next().map_or(end, |first| *first);
        self.pool.inc_data_range(DataBlock(begin), DataBlock(end))?;
        for block in begin..end {
            *self.model.reserved.entry(block).or_default() += 1;
        }
        Ok(())
    }

    /// Takes that back for some that follow on each other.
    fn dec_data(&mut self, begin: u64, n: u64) -> Result<()> {
        let mut end = begin;
        while end < begin + n && self.model.reserved.contains_key(&end) {
            end += 1;
        }
        self.pool.dec_data_range(DataBlock(begin), DataBlock(end))?;
        self.model.reserved.retain(|block, count| {
            *count -= u32::from((begin..end).contains(block));
            *count > 0
        });
        Ok(())
    }

    fn set_transaction_id(&mut self, id: u64) -> Result<()> {
        let old = self.model.current.transaction_id;
        self.pool.set_transaction_id(old, id)?;
        self.model.current.transaction_id = id;
        Ok(())
    }

    fn reserve(&mut self) -> Result<()> {
        // It commits itself; here, so that the model knows.
        self.commit()?;
        self.pool.reserve_metadata_snap()?;
        self.model.held = Some(self.model.current.clone());
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        self.pool.release_metadata_snap()?;
        self.model.held = None;
        Ok(())
    }

    /// What the pool in memory says is what `expected` has.
    #[track_caller]
    fn says(&self, expected: &Contents, case: &str) {
        let found = current_of(&self.pool).unwrap_or_else(|e| panic!("{case}: {e}"));
        let expected_current = Contents {
            held: None,
            reserved: BTreeMap::new(),
            ..expected.clone()
        };
        assert!(found == expected_current, "{case}: {found:?}");
        let has_held = self.pool.status().expect("read").held_root.is_some();
        assert_eq!(has_held, expected.held.is_some(), "{case}");
    }

    /// One operation drawn from `rng`.
    fn step(&mut self, rng: &mut SmallRng) -> Result<()> {
        let ids: Vec<u64> = self.model.current.devices.keys().copied().collect();
        let new = rng.random_range(0..8);
        let is_new = !ids.contains(&new);
        let any = (!ids.is_empty()).then(|| ids[rng.random_range(0..ids.len())]);
        match (rng.random_range(0..100), any) {
            (0..6, _) | (_, None) if is_new => self.create_thin(new),
            (6..14, Some(origin)) if is_new => self.create_snap(new, origin),
            (14..18, Some(id)) => self.delete(id),
            (18..55, Some(id)) => {
                let (block, n) = (rng.random_range(0..500), rng.random_range(1..40));
                self.map(id, block, n, rng.random_range(1..4))
            }
            (55..78, Some(id)) => {
                let begin = rng.random_range(0..600);
                self.unmap(id, begin, begin + rng.random_range(0..60))
            }
            (78..80, _) => self.resize_data(self.model.nr_data_blocks + rng.random_range(0..300)),
            (80..82, _) => {
                self.set_transaction_id(self.model.current.transaction_id + rng.random_range(1..4))
            }
            (82..86, _) => match self.model.held.is_some() {
                false => self.reserve(),
                true => self.release(),
            },
            (86, _) => self.abort(),
            (87, _) => {
                let most = self.recorder.nr_blocks();
                let blocks = self.model.nr_metadata_blocks + rng.random_range(0..20);
                self.resize_metadata(blocks.min(most))
            }
            (88..90, _) => {
                let begin = rng.random_range(0..self.model.nr_data_blocks);
                self.inc_data(begin, rng.random_range(0..20))
            }
            (90..92, _) => {
                let keys = self.model.reserved.keys();
                let begin = keys.copied().nth(rng.random_range(0..40)).unwrap_or(0);
                self.dec_data(begin, rng.random_range(0..20))
            }
            (92.., _) => self.commit(),
            _ => Ok(()),
        }
    }

    /// Operations drawn from `rng`, with an abort where there is no room.
    fn run(&mut self, rng: &mut SmallRng, steps: usize) {
        for _ in 0..steps {
            if let Err(e) = self.step(rng) {
                assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
                self.abort().expect("aborted");
            }
        }
    }
}

type Write<'a> = (u64, &'a [u8]);

fn apply(state: &mut [u8], writes: &[Write<'_>]) {
    for (block, data) in writes {
        state[*block as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(data);
    }
}

/// Some of the writes, in some order.
fn some_of<'a>(writes: &[Write<'a>], rng: &mut SmallRng) -> Vec<Write<'a>> {
    let mut some: Vec<_> = writes
        .iter()
        .filter(|_| rng.random_range(0..2) == 0)
        .copied()
        .collect();
    for i in (1..some.len()).rev() {
        some.swap(i, rng.random_range(0..=i));
    }
    some
}

/// Looks at what a crash may leave at every moment: everything written so far, and some of what was not flushed. `lossy` are steps at which a flush failed: what was not flushed then may be lost in spite of a later flush.
/// Returns how many states were looked at.
fn crash_everywhere(
    before: &[u8],
    steps: &[Step],
    acknowledged: &[Acknowledged],
    lossy: &[usize],
    rng: &mut SmallRng,
    case: &str,
) -> usize {
    let mut durable = Arc::new(before.to_vec());
    // Written since the last flush, and what a flush that failed has left in doubt.
    let mut pending: Vec<Write<'_>> = Vec::new();
    let mut doubtful: Vec<Write<'_>> = Vec::new();
    let mut upcoming = acknowledged.iter().peekable();
    let mut old = &acknowledged[0].1;
    let mut old_superblock = before[..BLOCK_SIZE].to_vec();
    let mut judged = 0;
    for at in 0..=steps.len() {
        while let Some((_, contents)) = upcoming.next_if(|a| a.0 <= at) {
            old = contents;
            let mut state = Layered::new(&durable);
            state.apply(&doubtful);
            old_superblock = state.block(0).to_vec();
        }
        let next = upcoming.peek().map(|a| &a.1);
        let mut judge = |state: Layered, how: &str| {
            let case = format!("{case}, step {at} of {}, {how}", steps.len());
            let found = contents(&state, &case);
            let expected = match *state.block(0) == old_superblock {
                true => old,
                false => next.unwrap_or_else(|| panic!("{case}: not what was acknowledged")),
            };
            assert!(
                found == *expected,
                "{case}: {found:#?} instead of {expected:#?}"
            );
            judged += 1;
        };
        let mut all = Layered::new(&durable);
        all.apply(&doubtful);
        all.apply(&pending);
        judge(all, "everything");
        if !pending.is_empty() || !doubtful.is_empty() {
            for _ in 0..2 {
                let mut some = Layered::new(&durable);
                some.apply(&some_of(&doubtful, rng));
                some.apply(&some_of(&pending, rng));
                judge(some, "some of what is not flushed");
            }
        }
        if lossy.contains(&at) {
            doubtful.append(&mut pending);
        }
        match steps.get(at) {
            Some(Step::Write(block, data)) => {
                // Written again, it is no longer in doubt once that is flushed.
                pending.push((*block, data));
            }
            Some(Step::Sync) => {
                doubtful.retain(|d| pending.iter().all(|p| p.0 != d.0));
                apply(Arc::make_mut(&mut durable).as_mut_slice(), &pending);
                pending.clear();
            }
            None => {}
        }
    }
    judged
}

fn crash_pool(pool: &Pool, rng: &mut SmallRng, case: &str) -> usize {
    crash_everywhere(
        &pool.before,
        &pool.recorder.steps(),
        &pool.acknowledged,
        &pool.recorder.failed_syncs(),
        rng,
        case,
    )
}

/// Random histories, with a crash at every moment.
#[test]
fn a_crash_leaves_the_last_transaction_or_the_next() {
    let (mut judged, mut grown, mut reserved) = (0, 0, 0);
    for (seed, blocks, cache) in [
        (1, 256, LARGE),
        (2, 256, SMALL),
        (3, 512, SMALL),
        (4, 1024, SMALL),
        (5, 48, SMALL),
        (6, 300, LARGE),
    ] {
        let case = format!("seed {seed}, {blocks} blocks");
        println!("{case}");
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut pool = Pool::format_on_larger(blocks, blocks / 4, cache);
        pool.run(&mut rng, 500);
        let transactions = pool.acknowledged.len();
        assert!(transactions > 20, "{case}: {transactions} transactions");
        let of_seed = pool.acknowledged.iter().map(|a| &a.1);
        grown += pool.committed.nr_metadata_blocks - blocks as u64;
        reserved += of_seed.filter(|c| !c.reserved.is_empty()).count();
        judged += crash_pool(&pool, &mut rng, &case);
    }
    println!("{judged} states, {grown} blocks grown, {reserved} with data blocks reserved");
    assert!(judged >= 2000, "only {judged} states");
    assert!(grown > 50 && reserved > 50, "{grown}, {reserved}");
}

/// A superblock of which the first part is new and the rest is as it was: what is opened is the last transaction or the next, or it is
/// said to be damaged and what to do. All fields are in the first sector, so it is torn in there, too.
#[test]
fn a_torn_superblock_is_the_old_one_or_the_new_or_refused() {
    let cuts = (0..512).step_by(8).chain((512..=BLOCK_SIZE).step_by(512));
    let (mut whole, mut refused) = (0, 0);
    let mut open_torn = |mut state: Layered, new: &[u8], cut: usize, either: &[&Contents]| {
        let torn = [&new[..cut], &state.block(0)[cut..]].concat();
        state.apply(&[(0, &torn)]);
        let case = format!("{cut} bytes of the superblock are new");
        match PoolMetadata::open(Arc::new(state.clone()), SMALL) {
            Ok(_) => {
                let found = contents(&state, &case);
                assert!(either.contains(&&found), "{case}: {found:#?}");
                whole += 1;
            }
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Damaged, "{case}");
                let text = e.to_string();
                assert!(text.contains("checksum"), "{case}: {text}");
                assert!(text.contains("thin_repair"), "{case}: {text}");
                refused += 1;
            }
        }
    };
    for (_, prepare, script) in SCRIPTS {
        let mut pool = Pool::open(prepare(256), LARGE);
        script(&mut pool).expect("done");
        let mut state = Layered::new(&Arc::new(pool.before.clone()));
        for (at, step) in pool.recorder.steps().iter().enumerate() {
            let Step::Write(block, data) = step else {
                continue;
            };
            let later = pool.acknowledged.partition_point(|a| a.0 <= at);
            for cut in cuts.clone().filter(|_| *block == 0) {
                let either = [later - 1, later].map(|i| &pool.acknowledged[i].1);
                open_torn(state.clone(), data, cut, &either);
            }
            state.apply(&[(*block, data)]);
        }
    }
    // A new pool on what was something else: no sector is as it was.
    let recorder = Arc::new(Recorder::new(&vec![0xe9; 64 * BLOCK_SIZE]));
    drop(PoolMetadata::format(Arc::clone(&recorder) as _, 128, SMALL).expect("formatted"));
    let new = recorder.contents();
    let mut state = Layered::new(&Arc::new(new.clone()));
    state.apply(&[(0, &[0xe9; BLOCK_SIZE])]);
    let empty = contents_of(&new, "formatted");
    for cut in cuts {
        open_torn(state.clone(), &new[..BLOCK_SIZE], cut, &[&empty]);
    }
    println!("{whole} whole, {refused} refused");
    assert!(whole > 20 && refused > 100, "{whole}, {refused}");
}

/// While a device is formatted there is no superblock, or there is all of an empty pool.
#[test]
fn a_crash_while_formatting_leaves_nothing_or_an_empty_pool() {
    let recorder = Arc::new(Recorder::new(&vec![0; 64 * BLOCK_SIZE]));
    drop(PoolMetadata::format(Arc::clone(&recorder) as _, 128, SMALL).expect("formatted"));
    let steps = recorder.steps();
    let mut durable = vec![0; 64 * BLOCK_SIZE];
    let mut pending: Vec<Write<'_>> = Vec::new();
    let mut rng = SmallRng::seed_from_u64(1);
    let mut made = 0;
    for at in 0..=steps.len() {
        for round in 0..10 {
            let mut state = durable.clone();
            let writes = match round {
                0 => pending.clone(),
                _ => some_of(&pending, &mut rng),
            };
            apply(&mut state, &writes);
            if state[..BLOCK_SIZE].iter().any(|&b| b != 0) {
                let empty = Contents {
                    nr_metadata_blocks: 64,
                    ..Contents::default()
                };
                assert_eq!(contents_of(&state, "formatting"), empty);
                made += 1;
            } else {
                assert!(at < steps.len(), "formatted, and then not");
            }
        }
        match steps.get(at) {
            Some(Step::Write(block, data)) => pending.push((*block, data)),
            Some(Step::Sync) => {
                apply(&mut durable, &pending);
                pending.clear();
            }
            None => {}
        }
    }
    assert!(made > 0);
}

/// An image with devices, snapshots of them and trees of several levels.
fn base(blocks: usize) -> Vec<u8> {
    let mut pool = Pool::format(blocks, 3000, LARGE);
    let mut make = || -> Result<()> {
        for id in 0..4 {
            pool.create_thin(id)?;
            pool.map(id, id, 300, 2)?;
        }
        pool.commit()?;
        pool.create_snap(4, 0)?;
        pool.create_snap(5, 1)?;
        pool.map(4, 100, 30, 1)?;
        pool.commit()
    };
    make().expect("made");
    pool.recorder.contents()
}

type Script = fn(&mut Pool) -> Result<()>;

/// A transaction that changes everything there is.
fn change(pool: &mut Pool) -> Result<()> {
    pool.map(0, 50, 40, 3)?;
    pool.unmap(1, 100, 400)?;
    pool.create_snap(6, 2)?;
    pool.map(2, 0, 20, 7)?;
    pool.delete(4)?;
    pool.create_thin(7)?;
    pool.map(7, 0, 10, 1)?;
    pool.resize_data(3500)?;
    pool.set_transaction_id(pool.model.current.transaction_id + 1)?;
    pool.commit()
}

fn reserve(pool: &mut Pool) -> Result<()> {
    pool.map(0, 50, 10, 3)?;
    pool.reserve()?;
    pool.commit()
}

fn release(pool: &mut Pool) -> Result<()> {
    pool.map(3, 50, 10, 3)?;
    pool.release()?;
    pool.map(2, 50, 10, 3)?;
    pool.commit()
}

/// An image with a metadata snapshot, much of which was changed since.
fn held(blocks: usize) -> Vec<u8> {
    let mut pool = Pool::open(base(blocks), LARGE);
    reserve(&mut pool).expect("reserved");
    change(&mut pool).expect("changed");
    pool.recorder.contents()
}

/// Makes an image of so many blocks.
type Prepare = fn(usize) -> Vec<u8>;

const SCRIPTS: [(&str, Prepare, Script); 3] = [
    ("change", base, change),
    ("reserve", base, reserve),
    ("release", held, release),
];

/// Everything done again that follows a failure: the pool goes on with what is committed, or with what was being committed if that
/// is what the superblock says. Then there may be a crash at any time.
fn goes_on_after_failure(pool: &mut Pool, rng: &mut SmallRng, case: &str) -> usize {
    let tried = pool.model.clone();
    let on_device = pool.recorder.contents();
    let found = contents_of(&on_device, case);
    let is_new = found != pool.committed;
    if is_new {
        assert!(found == tried, "{case}: {found:#?}");
    }
    pool.says_nothing_else_after_abort(&found, case);
    // From here on, what is there is what was found.
    pool.model = found;
    pool.model.needs_check = true;
    pool.pool
        .set_needs_check()
        .unwrap_or_else(|e| panic!("{case}: {e}"));
    pool.says(&pool.model, case);
    if is_new {
        // A crash before the flag may have left either.
        let at = pool.recorder.nr_steps();
        pool.acknowledged.push((at, pool.model.clone()));
        pool.committed = pool.model.clone();
        pool.taken = pool.model.data_blocks();
    } else {
        pool.acknowledge(pool.model.clone());
    }
    let reopened = contents_of(&pool.recorder.contents(), case);
    assert!(reopened == pool.model, "{case}: {reopened:#?}");
    let first = pool.acknowledged.len() - 1;
    pool.map(3, 7, 12, 5).expect("room");
    pool.delete(1).expect("deleted");
    pool.map(0, 7, 12, 5).expect("room");
    pool.commit().unwrap_or_else(|e| panic!("{case}: {e}"));
    pool.map(0, 300, 12, 5).expect("room");
    pool.commit().unwrap_or_else(|e| panic!("{case}: {e}"));
    // Crashes from the flag on; before, there were two possibilities.
    let (flagged, _) = pool.acknowledged[first];
    let steps = pool.recorder.steps();
    let lossy = pool.recorder.failed_syncs();
    let (state, doubtful) = replay(&pool.before, &steps[..flagged], &lossy);
    let later: Vec<Acknowledged> = pool.acknowledged[first..]
        .iter()
        .map(|(at, contents)| (at - flagged, contents.clone()))
        .collect();
    let mut judged = 0;
    for is_lost in [false, true] {
        if is_lost && doubtful.is_empty() {
            continue;
        }
        let mut before = state.clone();
        if !is_lost {
            apply(&mut before, &doubtful);
        }
        judged += crash_everywhere(&before, &steps[flagged..], &later, &[], rng, case);
    }
    judged
}

/// What is durable after these steps, and what is in doubt because a flush failed.
fn replay<'a>(before: &[u8], steps: &'a [Step], lossy: &[usize]) -> (Vec<u8>, Vec<Write<'a>>) {
    let mut state = before.to_vec();
    let (mut pending, mut doubtful): (Vec<Write<'_>>, Vec<Write<'_>>) = Default::default();
    for (at, step) in steps.iter().enumerate() {
        if lossy.contains(&at) {
            doubtful.append(&mut pending);
        }
        match step {
            Step::Write(block, data) => pending.push((*block, data)),
            Step::Sync => {
                doubtful.retain(|d| pending.iter().all(|p| p.0 != d.0));
                apply(&mut state, &pending);
                pending.clear();
            }
        }
    }
    (state, doubtful)
}

impl Pool {
    /// Aborts; after that the pool in memory says what the device has.
    #[track_caller]
    fn says_nothing_else_after_abort(&mut self, found: &Contents, case: &str) {
        self.pool
            .abort()
            .unwrap_or_else(|e| panic!("{case}: abort: {e}"));
        self.says(found, case);
        assert!(!self.pool.is_changed(), "{case}");
    }
}

/// How many requests of each kind a script makes when nothing fails: reads, writes, flushes.
fn requests_of(before: &[u8], cache: usize, script: Script) -> [u64; 3] {
    let kinds = [Request::Read, Request::Write, Request::Sync];
    let mut pool = Pool::open(before.to_vec(), cache);
    let start = kinds.map(|k| pool.recorder.count(k));
    script(&mut pool).expect("done");
    let end = kinds.map(|k| pool.recorder.count(k));
    [end[0] - start[0], end[1] - start[1], end[2] - start[2]]
}

/// Every write and every flush of transactions fails in turn, once or from then on, with nothing, half or all of it done.
#[test]
fn a_commit_that_fails_leaves_the_last_one() {
    let mut rng = SmallRng::seed_from_u64(1);
    let (mut failures, mut judged) = (0, 0);
    for (name, prepare, script) in SCRIPTS {
        let before = prepare(256);
        let [_, writes, syncs] = requests_of(&before, LARGE, script);
        assert!(writes >= 2 && syncs >= 2, "{name}: {writes}, {syncs}");
        let writes = (0..writes).map(|n| (Request::Write, n));
        for (request, after) in writes.chain((0..syncs).map(|n| (Request::Sync, n))) {
            for lands in [Lands::Nothing, Lands::Half, Lands::All] {
                if request == Request::Sync && lands != Lands::Nothing {
                    continue;
                }
                for is_lasting in [false, true] {
                    let fault = Fault {
                        request,
                        after,
                        is_lasting,
                        lands,
                    };
                    let case = format!("{name}, {fault:?}");
                    let mut pool = Pool::open(before.clone(), LARGE);
                    pool.recorder.set_faults(&[fault]);
                    let failed = script(&mut pool).expect_err(&case);
                    assert_eq!(failed.kind(), ErrorKind::Io, "{case}: {failed}");
                    if is_lasting {
                        let failed = pool.pool.set_needs_check().expect_err(&case);
                        assert_eq!(failed.kind(), ErrorKind::Io, "{case}: {failed}");
                        pool.pool.abort().expect("reads do not fail");
                    }
                    pool.recorder.set_faults(&[]);
                    if is_lasting && lands != Lands::Nothing {
                        // The flag may have reached the device.
                        let found = contents_of(&pool.recorder.contents(), &case);
                        let without_flag = |c: &Contents| Contents {
                            needs_check: false,
                            ..c.clone()
                        };
                        let found = without_flag(&found);
                        assert!(found == pool.committed || found == pool.model, "{case}");
                    } else if is_lasting && request == Request::Sync {
                        let found = contents_of(&pool.recorder.contents(), &case);
                        assert!(found.needs_check, "{case}: written, if not flushed");
                    } else {
                        judged += goes_on_after_failure(&mut pool, &mut rng, &case);
                    }
                    failures += 1;
                }
            }
        }
    }
    println!("{failures} failures, {judged} states");
    assert!(failures >= 50 && judged >= 2000, "{failures}, {judged}");
}

/// Every read of transactions fails in turn, in a cold cache and in one that is too small.
#[test]
fn a_read_that_fails_costs_the_transaction() {
    let mut failures = 0;
    for (name, prepare, script) in SCRIPTS {
        let before = prepare(512);
        for cache in [LARGE, SMALL] {
            let [reads, ..] = requests_of(&before, cache, script);
            assert!(reads > 5, "{name}: {reads}");
            for after in 0..reads {
                let case = format!("{name}, read {after} of {reads}, cache {cache}");
                let mut pool = Pool::open(before.clone(), cache);
                pool.recorder
                    .set_faults(&[Fault::once(Request::Read, after)]);
                let failed = script(&mut pool).expect_err(&case);
                assert_eq!(failed.kind(), ErrorKind::Io, "{case}: {failed}");
                let committed = pool.committed.clone();
                pool.says_nothing_else_after_abort(&committed, &case);
                pool.model = committed;
                assert!(
                    contents_of(&pool.recorder.contents(), &case) == pool.committed,
                    "{case}"
                );
                failures += 1;
                if after % 8 == 0 {
                    // As good as new.
                    script(&mut pool).unwrap_or_else(|e| panic!("{case}: {e}"));
                    let found = contents_of(&pool.recorder.contents(), &case);
                    assert!(found == pool.committed, "{case}");
                }
            }
        }
    }
    println!("{failures} failures");
    assert!(failures > 50);
}

/// If even what is committed cannot be read, everything is an error, until it is opened again.
#[test]
fn an_abort_that_fails_leaves_only_errors() {
    let before = held(256);
    for after in 0..2 {
        let case = format!("read {after} of the abort");
        let mut pool = Pool::open(before.clone(), LARGE);
        pool.map(0, 3, 20, 2).expect("room");
        let committed = pool.committed.clone();
        pool.recorder
            .set_faults(&[Fault::lasting(Request::Read, after)]);
        let failed = pool.pool.abort().expect_err(&case);
        assert_eq!(failed.kind(), ErrorKind::Io, "{case}: {failed}");
        for is_back in [false, true] {
            if is_back {
                pool.recorder.set_faults(&[]);
            }
            let case = format!("{case}, reads work: {is_back}");
            let all = pool.recorder.nr_steps();
            let it = &mut pool.pool;
            let (id, block) = (ThinId(0), ThinBlock(0));
            let id_now = committed.current.transaction_id;
            let answers = [
                it.details(id).err(),
                it.details(ThinId(99)).err(),
                it.devices().err(),
                it.create_thin(ThinId(99)).err(),
                it.create_snap(ThinId(99), id).err(),
                it.delete_device(id).err(),
                it.find_block(id, block).err(),
                it.next_block(id, block).err(),
                it.highest_block(id).err(),
                it.insert_block(id, block, DataBlock(0)).err(),
                it.remove_range(id, block, ThinBlock(9)).err(),
                it.alloc_data_block().err(),
                it.inc_data_range(DataBlock(0), DataBlock(1)).err(),
                it.dec_data_range(DataBlock(0), DataBlock(1)).err(),
                it.block_is_shared(DataBlock(0)).err(),
                it.commit().err(),
                it.resize_data(9999).err(),
                it.resize_metadata(256).err(),
                it.set_transaction_id(id_now, id_now + 1).err(),
                it.reserve_metadata_snap().err(),
                it.release_metadata_snap().err(),
                it.status().err(),
            ];
            for (number, answer) in answers.iter().enumerate() {
                let answer = answer
                    .as_ref()
                    .unwrap_or_else(|| panic!("{case}: {number}"));
                let is_busy = answer.kind() == ErrorKind::Busy;
                assert!(
                    answer.kind() == ErrorKind::Io || is_busy,
                    "{case}: {answer}"
                );
            }
            assert_eq!(
                pool.recorder.nr_steps(),
                all,
                "{case}: something is written"
            );
        }
        let found = contents_of(&pool.recorder.contents(), &case);
        assert!(found == committed, "{case}");
    }
}

/// More than the cache holds.
fn change_much(pool: &mut Pool) -> Result<()> {
    for id in 10..26 {
        pool.create_thin(id)?;
        pool.map(id, 0, 1300, 1)?;
        if id % 4 == 0 {
            pool.unmap(id - 1, 200, 900)?;
        }
    }
    for id in 10..18 {
        pool.create_snap(id + 20, id)?;
        pool.map(id, 400, 40, 9)?;
    }
    pool.commit()
}

/// Changed blocks that a small cache has to give up cannot be written: the transaction fails, or all of it is there.
#[test]
fn changes_that_cannot_be_written_early_are_not_lost() {
    let before = {
        let mut pool = Pool::open(base(1024), LARGE);
        pool.resize_data(40_000).expect("room");
        pool.commit().expect("committed");
        pool.recorder.contents()
    };
    let [_, writes, _] = requests_of(&before, SMALL, change_much);
    assert!(
        writes > 80,
        "{writes} writes: a cache of 64 blocks writes that many at the end"
    );
    let (mut whole, mut failed) = (0, 0);
    for after in (0..writes).step_by(5) {
        for (is_lasting, lands) in [
            (false, Lands::Nothing),
            (false, Lands::All),
            (true, Lands::Nothing),
        ] {
            let fault = Fault {
                is_lasting,
                lands,
                ..Fault::once(Request::Write, after)
            };
            let case = format!("{fault:?} of {writes}");
            let mut pool = Pool::open(before.clone(), SMALL);
            pool.recorder.set_faults(&[fault]);
            let done = change_much(&mut pool);
            assert!(pool.recorder.failed() > 0, "{case}");
            pool.recorder.set_faults(&[]);
            match done {
                Ok(()) => {
                    assert!(!is_lasting, "{case}: nothing can have been written");
                    whole += 1;
                }
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Io, "{case}: {e}");
                    // If it was the superblock that arrived and was reported as failed, all of it is there.
                    let found = contents_of(&pool.recorder.contents(), &case);
                    let is_last = after + 1 == writes && lands == Lands::All;
                    let expected = if is_last {
                        &pool.model
                    } else {
                        &pool.committed
                    };
                    assert!(found == *expected, "{case}");
                    pool.says_nothing_else_after_abort(&found, &case);
                    failed += 1;
                    continue;
                }
            }
            let found = contents_of(&pool.recorder.contents(), &case);
            assert!(found == pool.committed, "{case}");
        }
    }
    println!("{whole} whole, {failed} failed");
    assert!(whole > 0 && failed > 0, "{whole}, {failed}");
}

/// A metadata snapshot made, left alone while much changes, and released, with a crash at every moment: superblock, copy and counts
/// appear together and go together.
#[test]
fn a_crash_leaves_a_whole_metadata_snapshot_or_none() {
    let mut judged = 0;
    for (seed, cache) in [(1, SMALL), (2, LARGE)] {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut pool = Pool::open(base(256), cache);
        let mut script = || -> Result<()> {
            reserve(&mut pool)?;
            change(&mut pool)?;
            release(&mut pool)?;
            // In one transaction: made, given up and made again.
            pool.reserve()?;
            pool.release()?;
            pool.commit()?;
            pool.reserve()?;
            pool.commit()?;
            pool.delete(0)?;
            pool.release()?;
            pool.commit()
        };
        script().expect("done");
        let case = format!("seed {seed}");
        for _ in 0..3 {
            judged += crash_pool(&pool, &mut rng, &case);
        }
    }
    println!("{judged} states");
    assert!(judged >= 500, "only {judged} states");
}

/// A superblock whose flush failed may be lost although it can be read. A pool that goes on without setting the flag, which writes
/// the superblock again, must not write over what the old one leads to.
#[test]
fn a_superblock_in_doubt_is_settled_before_anything_is_written_over() {
    let before = base(64);
    let [_, _, syncs] = requests_of(&before, LARGE, change);
    let mut pool = Pool::open(before, LARGE);
    pool.recorder
        .set_faults(&[Fault::once(Request::Sync, syncs - 1)]);
    change(&mut pool).expect_err("the last flush");
    pool.recorder.set_faults(&[]);
    pool.pool.abort().expect("aborted");
    let on_device = pool.recorder.contents();
    pool.model = contents_of(&on_device, "aborted");
    pool.taken = pool.model.data_blocks();
    for block in 0..20 {
        pool.map(3, 700 + 40 * block, 10, 1).expect("room");
        pool.commit().expect("committed");
    }
    // The flushes that follow do not bring back what the failed one lost.
    let steps = pool.recorder.steps();
    let lossy = pool.recorder.failed_syncs();
    let mut judged = 0;
    for end in lossy[0]..=steps.len() {
        let (lost, _) = replay(&pool.before, &steps[..end], &lossy);
        contents_of(&lost, &format!("step {end} of {}", steps.len()));
        judged += 1;
    }
    assert!(judged > 10);
}
