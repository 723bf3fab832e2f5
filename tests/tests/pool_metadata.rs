//! Metadata that changes, held against a plain model: after every commit the check is clean and the contents are the model's; after
//! every abort and reopening they are those of the last commit.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::ErrorKind;
use thintools::io::{AlignedBuffer, BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::pdata::txn::{LockScheme, WouldBlock};
use thintools::thin::{Fields, PoolMetadata, SharedMetadata, TryLookup};
use thintools::tools::check::{CheckOptions, Code, check};
use thintools::units::{DataBlock, ThinBlock, ThinId};

use crate::crash::{Fault, Recorder, Request};
use crate::support::{Image, fixtures};

/// Mappings by virtual block: data block and the time of mapping.
type Mappings = BTreeMap<u64, (u64, u32)>;

#[derive(Clone, Debug, Default, PartialEq)]
struct ModelThin {
    mappings: Mappings,
    snapshotted_time: u32,
}

/// What the pool should hold.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    thins: BTreeMap<u64, ModelThin>,
    held: Option<BTreeMap<u64, ModelThin>>,
    time: u32,
    transaction_id: u64,
    nr_data_blocks: u64,
    nr_metadata_blocks: u64,
}

/// What random operations are about.
#[derive(Clone, Copy)]
struct Mix {
    /// Devices, at most.
    ids: u64,
    /// Blocks below twice this number are mapped.
    blocks: u64,
    /// Blocks mapped in a row, at most.
    row: u64,
}

/// Hardly two changes after each other are to the same leaf.
const SCATTERED: Mix = Mix {
    ids: 40,
    blocks: 3000,
    row: 1,
};
/// Most are.
const IN_ROWS: Mix = Mix {
    ids: 3,
    blocks: 1000,
    row: 60,
};

/// A pool, its model, and the model of the last commit.
struct Pair {
    engine: Arc<RamEngine>,
    pool: PoolMetadata,
    model: Model,
    committed: Model,
    cache: usize,
    mix: Mix,
}

impl Pair {
    fn format(metadata_blocks: usize, data_blocks: u64, cache: usize) -> Self {
        let engine = Arc::new(RamEngine::new(metadata_blocks));
        let mut pool =
            PoolMetadata::format(Arc::clone(&engine) as _, 128, cache).expect("formatted");
        pool.resize_data(data_blocks).expect("resized");
        pool.commit().expect("committed");
        let model = Model {
            nr_data_blocks: data_blocks,
            nr_metadata_blocks: metadata_blocks as u64,
            ..Model::default()
        };
        Self {
            engine,
            pool,
            committed: model.clone(),
            model,
            cache,
            mix: SCATTERED,
        }
    }

    fn commit(&mut self) -> thintools::Result<()> {
        self.pool.commit()?;
        self.committed = self.model.clone();
        Ok(())
    }

    /// True if it was done; false if there was no room for it, and so the transaction was aborted.
    fn or_abort(&mut self, done: thintools::Result<()>) -> bool {
        let Err(e) = done else { return true };
        assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
        self.pool.abort().expect("aborted");
        self.model = self.committed.clone();
        false
    }

    /// The check of what is on the device.
    fn check(&self, case: &str) {
        let found = check(&*self.engine, &CheckOptions::default(), &Silent).expect("memory");
        // A device that is full is no damage.
        let mut damages = found.report.damages;
        damages.retain(|d| d.code != Code::MetadataFull);
        assert!(damages.is_empty(), "{case}: {damages:?}");
    }

    /// What the pool says is what the model has.
    fn compare(&mut self, case: &str) {
        let ids: Vec<u64> = self
            .pool
            .devices()
            .expect("read")
            .iter()
            .map(|id| id.0)
            .collect();
        assert!(ids.iter().eq(self.model.thins.keys()), "{case}: {ids:?}");
        for (&id, thin) in &self.model.thins {
            let id = ThinId(id);
            let details = self.pool.details(id).expect("there");
            assert_eq!(
                details.mapped_blocks,
                thin.mappings.len() as u64,
                "{case}: device {id}"
            );
            assert_eq!(
                details.snapshotted_time, thin.snapshotted_time,
                "{case}: device {id}"
            );
            let mut found = Mappings::new();
            let mut from = 0;
            while let Some((block, at)) = self.pool.next_block(id, ThinBlock(from)).expect("read") {
                found.insert(block.0, (at.block.0, at.time));
                from = block.0 + 1;
            }
            assert!(
                found == thin.mappings,
                "{case}: device {id}: {found:?}, {:?}",
                thin.mappings
            );
            let last = self.pool.highest_block(id).expect("read").map(|b| b.0);
            assert_eq!(last, thin.mappings.keys().next_back().copied());
        }
        let status = self.pool.status().expect("read");
        assert_eq!(status.transaction_id, self.model.transaction_id);
        assert_eq!(status.time, self.model.time);
        assert_eq!(status.data_blocks, self.model.nr_data_blocks);
        assert_eq!(status.held_root.is_some(), self.model.held.is_some());
    }

    fn reopen(&mut self) {
        self.pool = PoolMetadata::open(Arc::clone(&self.engine) as _, self.cache).expect("opened");
        self.model = self.committed.clone();
    }

    /// One operation drawn from `rng`. True if it was done, false if there was no room for it, and so the transaction was aborted.
    fn step(&mut self, rng: &mut SmallRng) -> bool {
        let done = self.try_step(rng);
        self.or_abort(done)
    }

    fn any(&self, rng: &mut SmallRng) -> Option<u64> {
        let n = self.model.thins.len();
        (n > 0).then(|| {
            *self
                .model
                .thins
                .keys()
                .nth(rng.random_range(0..n))
                .expect("there")
        })
    }

    fn try_step(&mut self, rng: &mut SmallRng) -> thintools::Result<()> {
        let any = self.any(rng);
        match (rng.random_range(0..1000), any) {
            (0..12, _) | (_, None) => {
                let id = rng.random_range(0..self.mix.ids);
                let made = self.pool.create_thin(ThinId(id));
                if self.model.thins.contains_key(&id) {
                    assert_eq!(made.expect_err("taken").kind(), ErrorKind::Exists);
                    return Ok(());
                }
                made?;
                let thin = ModelThin {
                    snapshotted_time: self.model.time,
                    ..ModelThin::default()
                };
                self.model.thins.insert(id, thin);
            }
            (12..30, Some(origin)) => {
                let id = rng.random_range(0..self.mix.ids);
                let made = self.pool.create_snap(ThinId(id), ThinId(origin));
                if self.model.thins.contains_key(&id) {
                    assert_eq!(made.expect_err("taken").kind(), ErrorKind::Exists);
                    return Ok(());
                }
                made?;
                self.model.time += 1;
                let thin = self.model.thins.get_mut(&origin).expect("there");
                thin.snapshotted_time = self.model.time;
                let copy = thin.clone();
                self.model.thins.insert(id, copy);
            }
            (30..44, Some(id)) => {
                self.pool.delete_device(ThinId(id))?;
                self.model.thins.remove(&id);
                let missing = self.pool.delete_device(ThinId(id)).expect_err("gone");
                assert_eq!(missing.kind(), ErrorKind::NotFound);
            }
            (44..640, Some(id)) => {
                let first = rng.random_range(0..self.mix.blocks) * rng.random_range(1..3);
                let end = first + rng.random_range(0..self.mix.row) + 1;
                for block in first..end {
                    let Some(data) = self.pool.alloc_data_block()? else {
                        return self.commit();
                    };
                    self.pool.insert_block(ThinId(id), ThinBlock(block), data)?;
                    let time = self.model.time;
                    let thin = self.model.thins.get_mut(&id).expect("there");
                    thin.mappings.insert(block, (data.0, time));
                }
            }
            (640..900, Some(id)) => {
                let begin = rng.random_range(0..2 * self.mix.blocks);
                let length = match rng.random_range(0..10) {
                    0 => rng.random_range(0..self.mix.blocks),
                    _ => rng.random_range(0..12),
                };
                let removed = self.pool.remove_range(
                    ThinId(id),
                    ThinBlock(begin),
                    ThinBlock(begin + length),
                )?;
                let thin = self.model.thins.get_mut(&id).expect("there");
                let before = thin.mappings.len();
                thin.mappings
                    .retain(|b, _| !(begin..begin + length).contains(b));
                assert_eq!(removed, (before - thin.mappings.len()) as u64);
            }
            (900..985, Some(id)) => {
                let block = rng.random_range(0..2 * self.mix.blocks);
                let found = self.pool.find_block(ThinId(id), ThinBlock(block))?;
                let thin = &self.model.thins[&id];
                let expected = thin.mappings.get(&block);
                assert_eq!(found.map(|f| f.block.0), expected.map(|e| e.0));
                if let (Some(found), Some(expected)) = (found, expected) {
                    assert_eq!(found.is_shared, thin.snapshotted_time > expected.1);
                    // A metadata snapshot counts what it leads to, too.
                    if !found.is_shared && self.model.held.is_none() {
                        assert!(!self.pool.block_is_shared(found.block)?);
                    }
                }
            }
            (985..988, _) => {
                let old = self.model.transaction_id;
                let wrong = self
                    .pool
                    .set_transaction_id(old + 1, 9)
                    .expect_err("mismatch");
                assert_eq!(wrong.kind(), ErrorKind::InvalidArgument);
                let new = old + rng.random_range(0..5);
                self.pool.set_transaction_id(old, new)?;
                self.model.transaction_id = new;
            }
            (988..992, _) => match self.model.held.is_some() {
                false => {
                    // Commits first.
                    self.commit()?;
                    self.pool.reserve_metadata_snap()?;
                    let twice = self.pool.reserve_metadata_snap().expect_err("there is one");
                    assert_eq!(twice.kind(), ErrorKind::Busy);
                    self.model.held = Some(self.model.thins.clone());
                }
                true => {
                    self.pool.release_metadata_snap()?;
                    let twice = self
                        .pool
                        .release_metadata_snap()
                        .expect_err("there is none");
                    assert_eq!(twice.kind(), ErrorKind::InvalidArgument);
                    self.model.held = None;
                }
            },
            (992..994, _) => {
                let blocks = self.model.nr_data_blocks + rng.random_range(0..20_000);
                self.pool.resize_data(blocks)?;
                self.model.nr_data_blocks = blocks;
            }
            (994..996, _) => {
                self.pool.abort()?;
                self.model = self.committed.clone();
            }
            (996..997, _) => self.reopen(),
            _ => self.commit()?,
        }
        Ok(())
    }
}

/// Random operations on a pool of the given size, with a commit, a check and a comparison every so often.
fn run(seed: u64, steps: u64, metadata_blocks: usize, data_blocks: u64, cache: usize) -> u64 {
    let pair = Pair::format(metadata_blocks, data_blocks, cache);
    run_pair(pair, seed, steps)
}

fn run_pair(mut pair: Pair, seed: u64, steps: u64) -> u64 {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut done = 0;
    for step in 0..steps {
        done += u64::from(pair.step(&mut rng));
        if step % 500 == 499 {
            let case = format!("seed {seed}, step {step}");
            pair.compare(&case);
            let committed = pair.commit();
            pair.or_abort(committed);
            pair.check(&case);
            pair.reopen();
            pair.compare(&case);
        }
    }
    done
}

/// A hundred thousand operations.
#[test]
fn random_operations_do_what_a_model_does() {
    for seed in 0..10 {
        println!("seed {seed}");
        let cache = if seed % 2 == 0 { 64 << 20 } else { 64 * 4096 };
        let done = run(seed, 10_000, 4096, 30_000, cache);
        assert!(done > 9900, "seed {seed}: only {done} were done");
    }
}

/// Changes of the same few leaves, with snapshots, removals, commits and aborts in between.
#[test]
fn rows_of_insertions_do_what_a_model_does() {
    for seed in 0..10 {
        println!("seed {seed}");
        let pair = Pair {
            mix: IN_ROWS,
            ..Pair::format(4096, 30_000, 64 << 20)
        };
        let done = run_pair(pair, seed, 5000);
        assert!(done > 4900, "seed {seed}: only {done} were done");
    }
}

/// However much metadata there is, the cache holds as many blocks as its bytes allow, with 16 bytes beside each.
#[test]
fn the_cache_stays_within_its_bytes() {
    let bytes = 1 << 20;
    let mut rng = SmallRng::seed_from_u64(1);
    let mut pair = Pair::format(8192, 120_000, bytes);
    for block in 0..40 * 2000 {
        let (id, block) = (ThinId(block % 40), ThinBlock(block / 40 * 3));
        if block.0 == 0 {
            pair.pool.create_thin(id).expect("made");
            pair.model.thins.insert(id.0, ModelThin::default());
        }
        let data = pair.pool.alloc_data_block().expect("room");
        let data = data.expect("a block");
        pair.pool.insert_block(id, block, data).expect("mapped");
        let thin = pair.model.thins.get_mut(&id.0).expect("there");
        thin.mappings.insert(block.0, (data.0, 0));
    }
    pair.commit().expect("room");
    let (mut most, mut largest) = (0, 0);
    for step in 0..4000 {
        pair.step(&mut rng);
        if step % 100 == 99 {
            let committed = pair.commit();
            pair.or_abort(committed);
        }
        let cache = pair.pool.cache_use();
        let taken = cache.capacity * 4096 + cache.table_bytes;
        assert!(taken <= bytes, "{cache:?}");
        assert!(cache.table_bytes <= 16 * cache.capacity, "{cache:?}");
        assert!(cache.blocks <= cache.capacity, "{cache:?}");
        most = most.max(cache.blocks);
        let status = pair.pool.status().expect("read");
        largest = largest.max(status.allocated_metadata_blocks);
    }
    let capacity = pair.pool.cache_use().capacity;
    println!("{most} of {largest} blocks cached");
    assert_eq!(most, capacity);
    assert!(largest as usize > 2 * capacity, "{largest}");
    pair.compare("afterwards");
}

/// Both devices full at every size: what does not fit is an error, and the last commit stays.
#[test]
fn full_devices_are_errors() {
    for (seed, blocks) in [16, 17, 18, 20, 24, 32, 48, 64, 80, 100, 128, 200]
        .into_iter()
        .enumerate()
    {
        println!("{blocks} blocks");
        let done = run(seed as u64, 1500, blocks, 64, 64 * 4096);
        assert!(done > 100, "{blocks} blocks: only {done} were done");
    }
}

/// The clock does not go past what a mapping can hold.
#[test]
fn the_clock_has_an_end() {
    let engine = Arc::new(RamEngine::new(64));
    let mut pool = PoolMetadata::format(Arc::clone(&engine) as _, 128, 0).expect("formatted");
    pool.create_thin(ThinId(0)).expect("made");
    pool.commit().expect("committed");
    drop(pool);
    let mut block = AlignedBuffer::new(1);
    engine
        .read(Default::default(), block.blocks_mut(1))
        .expect("read");
    let mut fields = Fields::unpack(block.blocks(1));
    fields.time = (1 << 24) - 1;
    engine
        .write(Default::default(), &fields.pack())
        .expect("written");
    let mut pool = PoolMetadata::open(engine, 0).expect("opened");
    let refused = pool
        .create_snap(ThinId(1), ThinId(0))
        .expect_err("the clock is at its end");
    assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
    assert!(!pool.is_changed());
    pool.resize_data(10).expect("resized");
    let data = pool.alloc_data_block().expect("room").expect("a block");
    assert_eq!(data, DataBlock(0));
}

/// Lookups by two threads while a third changes everything they look at, under every scheme, with so few metadata blocks that they
/// are used again and again: what is found is what was mapped, of the right device and the right block.
#[test]
fn lookups_are_right_while_blocks_are_reused() {
    for scheme in LockScheme::ALL {
        println!("{scheme}");
        let engine = Arc::new(RamEngine::new(160));
        let mut pool = PoolMetadata::format(engine, 128, 64 * 4112).expect("formatted");
        pool.resize_data(100_000).expect("resized");
        for id in 0..2 {
            pool.create_thin(ThinId(id)).expect("made");
        }
        pool.commit().expect("committed");
        let shared = SharedMetadata::new(pool, scheme);
        let stop = AtomicBool::new(false);
        let looked = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for seed in 0..2 {
                let (shared, stop, looked) = (&shared, &stop, &looked);
                scope.spawn(move || {
                    let mut rng = SmallRng::seed_from_u64(seed);
                    let mut reader = shared.reader(true);
                    let thins = [0, 1].map(|id| shared.open_thin(ThinId(id)).expect("there"));
                    while !stop.load(Ordering::Relaxed) {
                        let id = rng.random_range(0..2);
                        let block = rng.random_range(0..4000);
                        let at = match rng.random_range(0..3) {
                            0 => reader
                                .find_block(&thins[id], ThinBlock(block))
                                .expect("sound"),
                            _ => match reader
                                .try_find_block(&thins[id], ThinBlock(block))
                                .expect("sound")
                            {
                                TryLookup::Mapped(at) => Some(at),
                                TryLookup::Unmapped => None,
                                TryLookup::WouldBlock(WouldBlock::Cache) => {
                                    shared.read_missed();
                                    None
                                }
                                TryLookup::WouldBlock(_) => None,
                            },
                        };
                        if let Some(at) = at {
                            assert_eq!(at.block.0 % 8000, block * 2 + id as u64, "{scheme}");
                            looked.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    let counts = reader.counts().expect("they are counted");
                    assert!(counts.lookups > 0, "{counts:?}");
                    if scheme == LockScheme::Optimistic {
                        assert_eq!((counts.atomic_rmws, counts.acquisitions), (0, 0));
                    }
                });
            }
            let mut rng = SmallRng::seed_from_u64(7);
            // Schemes that give way to whoever changes things find little while others want the processors, too.
            for round in 0..50_000 {
                if round >= 600 && looked.load(Ordering::Relaxed) > 1000 {
                    break;
                }
                for _ in 0..20 {
                    let id = rng.random_range(0..2);
                    let begin = rng.random_range(0..4000);
                    let changed = shared.change(|pool| {
                        if rng.random_range(0..4) == 0 {
                            return pool
                                .remove_range(ThinId(id), ThinBlock(begin), ThinBlock(begin + 200))
                                .map(|_| ());
                        }
                        for block in begin..(begin + 10).min(4000) {
                            let data = block * 2 + id + 8000 * rng.random_range(0..12);
                            if pool.data_count(DataBlock(data))? == 0 {
                                pool.inc_data_range(DataBlock(data), DataBlock(data + 1))?;
                                pool.insert_block(ThinId(id), ThinBlock(block), DataBlock(data))?;
                            }
                        }
                        Ok(())
                    });
                    if let Err(e) = changed {
                        assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
                        shared.abort().expect("aborted");
                    }
                }
                let ended = match round % 50 {
                    49 => shared.abort(),
                    _ => shared.commit(),
                };
                if let Err(e) = ended {
                    assert_eq!(e.kind(), ErrorKind::NoSpace, "{e}");
                    shared.abort().expect("aborted");
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(looked.into_inner() > 1000, "{scheme}");
        assert!(shared.barrier_waits().0 > 500);
    }
}

impl Pair {
    /// An image, with the model that is read from it.
    fn of(bytes: Vec<u8>, cache: usize) -> Self {
        let engine = Arc::new(RamEngine::from_bytes(bytes));
        let pool = PoolMetadata::open(Arc::clone(&engine) as _, cache).expect("opened");
        let status = pool.status().expect("read");
        let mut model = Model {
            time: status.time,
            transaction_id: status.transaction_id,
            nr_data_blocks: status.data_blocks,
            nr_metadata_blocks: status.metadata_blocks,
            held: status.held_root.map(|_| BTreeMap::new()),
            ..Model::default()
        };
        for id in pool.devices().expect("read") {
            let mut thin = ModelThin {
                snapshotted_time: pool.details(id).expect("there").snapshotted_time,
                ..ModelThin::default()
            };
            let mut from = Some(0);
            while let Some(block) = from
                && let Some((block, at)) = pool.next_block(id, ThinBlock(block)).expect("read")
            {
                thin.mappings.insert(block.0, (at.block.0, at.time));
                from = block.0.checked_add(1);
            }
            model.thins.insert(id.0, thin);
        }
        Self {
            engine,
            pool,
            committed: model.clone(),
            model,
            cache,
            mix: SCATTERED,
        }
    }
}

/// Every image that the kernel left whole can be changed: after each commit our check and Debian's find nothing wrong with it.
#[test]
fn images_of_the_kernel_can_be_changed() {
    let mut changed = 0;
    for (seed, fixture) in fixtures().into_iter().enumerate() {
        let bytes = crate::support::expand(&format!("{}.img", fixture.name()));
        let engine = RamEngine::from_bytes(bytes.clone());
        let found = check(&engine, &CheckOptions::default(), &Silent).expect("memory");
        if !found.report.damages.is_empty() {
            continue;
        }
        let case = fixture.name();
        println!("{case}");
        let mut rng = SmallRng::seed_from_u64(seed as u64);
        let mut pair = Pair::of(bytes, 64 * 4112);
        pair.compare(&case);
        for _ in 0..4 {
            for _ in 0..100 {
                pair.step(&mut rng);
            }
            let committed = pair.commit();
            pair.or_abort(committed);
            pair.compare(&case);
            pair.check(&case);
        }
        let Pair { engine, pool, .. } = pair;
        drop(pool);
        let engine = Arc::into_inner(engine).expect("the only one");
        let image = Image::from_bytes(&engine.into_bytes());
        let args = [OsStr::new("-q"), image.path().as_os_str()];
        crate::support::peer("thin_check", &args).expect(0);
        changed += 1;
    }
    assert!(changed >= 30, "only {changed} images");
}

/// What the kernel makes of a zeroed device of 4 MiB: the same blocks for the same things, and as many of them.
#[test]
fn a_new_pool_is_laid_out_as_the_kernel_does() {
    let image = Image::of("empty-2m/meta");
    let theirs = Fields::unpack(&image.block(0));
    let blocks = theirs.metadata_space_map.nr_blocks as usize;
    let engine = Arc::new(RamEngine::new(blocks));
    let mut pool =
        PoolMetadata::format(Arc::clone(&engine) as _, theirs.data_block_size, 0).expect("made");
    pool.resize_data(theirs.data_space_map.nr_blocks)
        .expect("resized");
    pool.commit().expect("committed");
    let mut block = AlignedBuffer::new(1);
    engine
        .read(Default::default(), block.blocks_mut(1))
        .expect("read");
    let ours = Fields::unpack(block.blocks(1));
    let counts = |fields: &Fields| {
        (
            fields.metadata_space_map.nr_allocated,
            fields.data_space_map.nr_allocated,
            fields.data_space_map.nr_blocks,
            fields.metadata_nr_blocks,
            (fields.mapping_root, fields.details_root),
            fields.metadata_space_map.ref_count_root,
            fields.data_space_map.ref_count_root,
        )
    };
    assert_eq!(counts(&ours), counts(&theirs));
}

/// A chain of a thousand snapshots, each with a write of its own, made and deleted again.
#[test]
fn a_thousand_snapshots_deep() {
    let mut pair = Pair::format(8192, 100_000, 64 << 20);
    let told = Arc::new(AtomicU64::new(0));
    let tell = Arc::clone(&told);
    pair.pool.register_metadata_threshold(move || {
        tell.fetch_add(1, Ordering::Relaxed);
    });
    pair.pool.create_thin(ThinId(0)).expect("made");
    for block in 0..1000 {
        let data = pair
            .pool
            .alloc_data_block()
            .expect("room")
            .expect("a block");
        pair.pool
            .insert_block(ThinId(0), ThinBlock(block), data)
            .expect("mapped");
    }
    for id in 1..1000 {
        pair.pool
            .create_snap(ThinId(id), ThinId(id - 1))
            .expect("made");
        let data = pair
            .pool
            .alloc_data_block()
            .expect("room")
            .expect("a block");
        pair.pool
            .insert_block(ThinId(id), ThinBlock(id), data)
            .expect("mapped");
        if id % 50 == 0 {
            pair.pool.commit().expect("committed");
        }
    }
    pair.pool.commit().expect("committed");
    pair.check("made");
    assert_eq!(pair.pool.status().expect("read").devices, 1000);
    for id in 0..1000 {
        pair.pool
            .delete_device(ThinId((id * 7) % 1000))
            .expect("deleted");
    }
    pair.pool.commit().expect("committed");
    pair.check("deleted");
    assert_eq!(pair.pool.status().expect("read").used_data_blocks, 0);
    assert_eq!(
        told.load(Ordering::Relaxed),
        0,
        "most of the device was free all the time"
    );
}

/// Somebody is told once when metadata becomes scarce.
#[test]
fn scarce_metadata_is_told_once() {
    let mut pair = Pair::format(100, 1000, 0);
    let told = Arc::new(AtomicU64::new(0));
    let tell = Arc::clone(&told);
    pair.pool.register_metadata_threshold(move || {
        tell.fetch_add(1, Ordering::Relaxed);
    });
    let mut id = 0;
    let full = loop {
        if let Err(e) = pair.pool.create_thin(ThinId(id)) {
            break e;
        }
        id += 1;
    };
    assert_eq!(full.kind(), ErrorKind::NoSpace);
    assert_eq!(told.load(Ordering::Relaxed), 1);
    assert!(id > 50, "{id}");
    pair.pool.abort().expect("aborted");
    assert_eq!(pair.pool.status().expect("read").devices, 0);
    pair.check("aborted");
}

/// A full metadata device goes on when it has grown, within a bitmap and past several.
#[test]
fn a_full_device_goes_on_when_it_has_grown() {
    for blocks in [81, 200, 16_320, 16_321, 40_000] {
        let mut pair = Pair::format(80, 1000, 0);
        let mut id = 0;
        loop {
            let made = pair
                .pool
                .create_thin(ThinId(id))
                .and_then(|()| pair.pool.commit());
            if let Err(e) = made {
                assert_eq!(e.kind(), ErrorKind::NoSpace);
                break;
            }
            pair.model.thins.insert(id, ModelThin::default());
            id += 1;
        }
        assert!(id > 50, "{id}");
        pair.committed = pair.model.clone();
        let mut bytes = vec![0; blocks * 4096];
        let mut block = AlignedBuffer::new(80);
        pair.engine
            .read(Default::default(), block.blocks_mut(80))
            .expect("read");
        bytes[..80 * 4096].copy_from_slice(block.blocks(80));
        pair.engine = Arc::new(RamEngine::from_bytes(bytes));
        pair.reopen();
        let refused = pair
            .pool
            .resize_metadata(blocks as u64 + 1)
            .expect_err("past the device");
        assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
        let grown = pair
            .pool
            .resize_metadata(blocks as u64)
            .and_then(|()| pair.pool.commit());
        if blocks == 81 {
            // One block more is less than a commit needs, or just enough.
            pair.or_abort(grown);
        } else {
            grown.expect("grown");
            assert_eq!(
                pair.pool.status().expect("read").metadata_blocks,
                blocks as u64
            );
            pair.pool.create_thin(ThinId(5000)).expect("there is room");
            pair.model.thins.insert(5000, ModelThin::default());
            pair.commit().expect("committed");
        }
        let case = format!("{blocks} blocks");
        pair.compare(&case);
        pair.check(&case);
    }
}

/// Where the last commit cannot be read again, lookups are errors; also those that would wait.
#[test]
fn lookups_after_a_failed_abort_are_errors() {
    for scheme in LockScheme::ALL {
        let pair = Pair::format(64, 100, 0);
        let mut bytes = AlignedBuffer::new(64);
        pair.engine
            .read(Default::default(), bytes.blocks_mut(64))
            .expect("read");
        let engine = Arc::new(Recorder::new(bytes.blocks(64)));
        let mut pool = PoolMetadata::open(Arc::clone(&engine) as _, 0).expect("opened");
        pool.create_thin(ThinId(0)).expect("made");
        pool.commit().expect("committed");
        let shared = SharedMetadata::new(pool, scheme);
        let thin = shared.open_thin(ThinId(0)).expect("there");
        let mut reader = shared.reader(false);
        assert_eq!(reader.find_block(&thin, ThinBlock(5)).expect("sound"), None);
        engine.set_faults(&[Fault::lasting(Request::Read, 0)]);
        shared.abort().expect_err("nothing can be read");
        for found in [
            reader.find_block(&thin, ThinBlock(5)).map(|_| ()),
            reader.try_find_block(&thin, ThinBlock(5)).map(|_| ()),
        ] {
            assert_eq!(found.expect_err("failed").kind(), ErrorKind::Io, "{scheme}");
        }
    }
}
