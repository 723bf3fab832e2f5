//! What the pool engine costs: `cargo bench --bench pool`, two minutes.
//!
//! Everything is in memory and no data is moved: what is measured is the map half and the worker. Locality is that of a real trace of
//! a database server (testdata/traces), laid over a device of a million mapped blocks. The cost of an operation's metadata alone is in
//! the bench `metadata`.

use std::hint::black_box;
use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use flate2::read::GzDecoder;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::io::RamEngine;
use thintools::pdata::txn::LockScheme;
use thintools::pool::{
    Bio, Cell, Detained, Effect, Event, Features, Key, Mapped, Mapper, Message, Op, Pool,
    PoolTable, Prison, Settings, Thin, Worker,
};
use thintools::thin::PoolMetadata;
use thintools::units::{BLOCK_SIZE, ThinBlock, ThinId};

const BLOCK: u64 = 128;
const MAPPED: u64 = 1_000_000;
/// For how long two threads map beside each other for one sample.
const TIME: Duration = Duration::from_millis(100);
/// Bios on their way to the worker at once.
const DEPTH: u64 = 64;

/// A pool with a device of `mapped` blocks in order, and room for as many again.
fn pool(mapped: u64, scheme: LockScheme) -> (Worker, Arc<Thin>) {
    let engine = Arc::new(RamEngine::new((256 << 20) / BLOCK_SIZE));
    let mut metadata =
        PoolMetadata::format(engine, BLOCK as u32, 256 << 20).expect("there is room");
    metadata.resize_data(4 * MAPPED).expect("there is room");
    metadata.create_thin(ThinId(0)).expect("there is room");
    for block in 0..mapped {
        let data = metadata.alloc_data_block().expect("room").expect("room");
        let inserted = metadata.insert_block(ThinId(0), ThinBlock(block), data);
        inserted.expect("there is room");
    }
    metadata.commit().expect("memory");
    let table = PoolTable {
        metadata_device: "252:0".into(),
        data_device: "252:1".into(),
        block_sectors: BLOCK as u32,
        low_water_blocks: 0,
        features: Features::default(),
    };
    let settings = Settings {
        scheme,
        ..Settings::new(table)
    };
    let mut worker = Worker::start(metadata, settings).expect("a sound pool");
    let thin = worker.open_thin(ThinId(0), None).expect("it is there");
    (worker, thin)
}

/// Blocks in the order of the trace, which is 43 000 requests long.
fn blocks_of_trace() -> Vec<u64> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/testdata/traces/blkreplay-windows-mssql.load.gz"
    );
    let file = std::fs::File::open(path).expect("the trace is there");
    let lines = BufReader::new(GzDecoder::new(file)).lines();
    let block = |line: std::io::Result<String>| {
        let line = line.ok()?;
        let sector: u64 = line.split(';').nth(1)?.trim().parse().ok()?;
        Some(sector / BLOCK % MAPPED)
    };
    let blocks: Vec<u64> = lines.filter_map(block).collect();
    assert!(blocks.len() > 40_000, "the trace is whole");
    blocks
}

/// Where the next bio goes.
enum Blocks<'a> {
    Random(SmallRng),
    Trace(std::iter::Cycle<std::slice::Iter<'a, u64>>),
}

impl<'a> Blocks<'a> {
    fn of(trace: Option<&'a [u64]>, seed: u64) -> Self {
        match trace {
            None => Self::Random(SmallRng::seed_from_u64(seed)),
            Some(trace) => Self::Trace(trace.iter().cycle()),
        }
    }

    fn next(&mut self) -> u64 {
        match self {
            Self::Random(rng) => rng.random_range(0..MAPPED),
            Self::Trace(trace) => trace.next().copied().unwrap_or(0),
        }
    }
}

/// Maps one bio and ends it. False if it was not mapped at once.
fn map(
    pool: &Pool,
    mapper: &mut Mapper,
    thin: &Thin,
    bio: &mut Option<Box<Bio>>,
    block: u64,
) -> bool {
    let mut this = bio
        .take()
        .unwrap_or_else(|| Box::new(Bio::new(0, Op::Read, 0, 8)));
    this.sector = block * BLOCK;
    match mapper.map(thin, this) {
        Mapped::Remapped {
            bio: mapped,
            sector,
        } => {
            black_box(sector);
            *bio = pool.end_io(mapped, Ok(())).map(|ended| ended.0);
            true
        }
        _ => false,
    }
}

fn fast_path(c: &mut Criterion, trace: &[u64]) {
    let mut group = c.benchmark_group("map");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(1));
    group.warm_up_time(Duration::from_millis(300));
    group.throughput(Throughput::Elements(1));
    for scheme in LockScheme::ALL {
        let (worker, thin) = pool(MAPPED, scheme);
        let pool = worker.pool();
        for (locality, trace) in [("random", None), ("trace", Some(trace))] {
            let mut mapper = Mapper::new(pool, false);
            let (mut blocks, mut bio) = (Blocks::of(trace, 1), None);
            let name = format!("{scheme}/{locality}");
            group.bench_function(BenchmarkId::new(name, "1 thread"), |b| {
                b.iter(|| assert!(map(pool, &mut mapper, &thin, &mut bio, blocks.next())));
            });
            let name = format!("{scheme}/{locality}");
            group.bench_function(BenchmarkId::new(name, "2 threads"), |b| {
                b.iter_custom(|iters| {
                    Duration::from_secs_f64(iters as f64 * two(pool, &thin, trace))
                });
            });
        }
    }
    group.finish();
}

/// Seconds for each bio while two threads map.
fn two(pool: &Arc<Pool>, thin: &Thin, trace: Option<&[u64]>) -> f64 {
    let stop = AtomicBool::new(false);
    let work = |seed| {
        let mut mapper = Mapper::new(pool, false);
        let (mut blocks, mut bio) = (Blocks::of(trace, seed), None);
        // Two who follow the same trace are at different places of it.
        for _ in 0..seed * 10_000 {
            blocks.next();
        }
        let mut mapped = 0u64;
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..256 {
                mapped += u64::from(map(pool, &mut mapper, thin, &mut bio, blocks.next()));
            }
        }
        mapped
    };
    std::thread::scope(|scope| {
        let since = Instant::now();
        let threads = [0, 1].map(|seed| scope.spawn(move || work(seed)));
        std::thread::sleep(TIME);
        stop.store(true, Ordering::Relaxed);
        let mapped = threads.map(|t| t.join().expect("no panic"));
        since.elapsed().as_secs_f64() / mapped.iter().sum::<u64>().max(1) as f64
    })
}

fn prison(c: &mut Criterion) {
    let mut group = c.benchmark_group("prison");
    group.throughput(Throughput::Elements(1));
    let prison = Prison::default();
    let mut rng = SmallRng::seed_from_u64(2);
    let (mut cell, mut bio) = (Some(Cell::spare()), Some(Box::new(Bio::flush(0))));
    group.bench_function("a cell held and released", |b| {
        b.iter(|| {
            let block = rng.random_range(0..MAPPED);
            let key = Key::of_virtual(ThinId(0), ThinBlock(block), ThinBlock(block + 1));
            let (Some(spare), Some(of)) = (cell.take(), bio.take()) else {
                return;
            };
            if let Detained::Free(held, of) = prison.detain(key, of, spare) {
                cell = Some(prison.release(held).0);
                bio = Some(of);
            }
        });
    });
    group.finish();
}

/// Runs the worker until it waits for nothing: every effect is done at once. Returns how many bios ended.
fn settle(worker: &mut Worker, pool: &Pool, effects: &mut Vec<Effect>, event: Event) -> u64 {
    let (mut ended, mut events) = (0, vec![event]);
    while let Some(event) = events.pop() {
        let has_more = worker.apply(Duration::ZERO, event, effects);
        for effect in effects.drain(..) {
            match effect {
                Effect::Issue { bio, .. } | Effect::ReadOrigin { bio, .. } => {
                    ended += u64::from(pool.end_io(bio, Ok(())).is_some());
                }
                Effect::End { result, .. } => {
                    assert_eq!(result, Ok(()));
                    ended += 1;
                }
                Effect::Zero { job, .. }
                | Effect::Copy { job, .. }
                | Effect::Discard { job, .. }
                | Effect::Flush { job } => events.push(Event::Done {
                    job,
                    result: Ok(()),
                }),
                Effect::Answer { result, .. } => result.expect("done"),
                Effect::Notice(_) => {}
            }
        }
        if has_more || events.is_empty() && pool.has_work() {
            events.push(Event::Work);
        }
    }
    ended
}

/// Writes of 4 KiB to these blocks, each of which the worker has to find room for; a flush after every thousand.
fn writes(worker: &mut Worker, thin: &Thin, blocks: impl Iterator<Item = u64>) -> u64 {
    let pool = Arc::clone(worker.pool());
    let mut mapper = Mapper::new(&pool, false);
    let (mut effects, mut ended, mut submitted) = (Vec::new(), 0, 0);
    for block in blocks {
        let bio = Box::new(Bio::new(submitted, Op::Write, block * BLOCK, 8));
        if let Mapped::Remapped { bio, .. } = mapper.map(thin, bio) {
            ended += u64::from(pool.end_io(bio, Ok(())).is_some());
        }
        submitted += 1;
        if submitted % 1000 == 0 {
            mapper.map(thin, Box::new(Bio::flush(submitted)));
            ended -= 1;
            ended += settle(worker, &pool, &mut effects, Event::Work);
        } else if submitted % DEPTH == 0 {
            ended += settle(worker, &pool, &mut effects, Event::Work);
        }
    }
    ended + settle(worker, &pool, &mut effects, Event::Work)
}

fn new_blocks(c: &mut Criterion) {
    const STEPS: u64 = 50_000;
    let mut group = c.benchmark_group("worker");
    group.sample_size(10).warm_up_time(Duration::from_millis(1));
    group.throughput(Throughput::Elements(STEPS));
    // The order is that of a multiplication, which comes to every block once.
    let shuffled = |n: u64| n * 611_953 % MAPPED;
    for (name, mapped, order) in [
        ("provision, in order", 0, (|n| n) as fn(u64) -> u64),
        ("provision, at random", 0, shuffled),
        ("break sharing, in order", MAPPED, |n| n),
        ("break sharing, at random", MAPPED, shuffled),
    ] {
        let fresh = || {
            let (mut worker, thin) = pool(mapped, LockScheme::Kernel);
            if mapped > 0 {
                let (id, origin) = (ThinId(1), ThinId(0));
                let message = Message::CreateSnap { id, origin };
                let pool = Arc::clone(worker.pool());
                let event = Event::Message { tag: 0, message };
                settle(&mut worker, &pool, &mut Vec::new(), event);
            }
            (worker, thin, 0)
        };
        let mut state = fresh();
        group.bench_function(name, |b| {
            b.iter_custom(|iters| {
                let mut spent = Duration::ZERO;
                for _ in 0..iters {
                    if state.2 + STEPS > MAPPED {
                        state = fresh();
                    }
                    let (worker, thin, done) = &mut state;
                    let since = Instant::now();
                    let ended = writes(worker, thin, (*done..*done + STEPS).map(order));
                    spent += since.elapsed();
                    assert_eq!(ended, STEPS, "{name}");
                    *done += STEPS;
                }
                spent
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().without_plots().configure_from_args();
    let trace = blocks_of_trace();
    prison(&mut criterion);
    fast_path(&mut criterion, &trace);
    new_blocks(&mut criterion);
}
