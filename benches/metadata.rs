//! What lookups and changes of metadata cost: `cargo bench --bench metadata` measures 65 536 and 1 000 000 mappings in about two
//! minutes; a filter is a part of a name, and 16 000 000 mappings are measured only if one asks for them: `-- 16m`.
//!
//! Everything is in memory. The rate of a bare tree of 4 KiB nodes, without a cache or a lock, is measured in the same run; it is what
//! lookups can at best be. What criterion does not know of, the counters of lookups and commits, is printed behind each group.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::Result;
use thintools::io::RamEngine;
use thintools::pdata::txn::{LockScheme, LookupCounts};
use thintools::thin::{PoolMetadata, SharedMetadata, TryLookup};
use thintools::units::{BLOCK_SIZE, DataBlock, ThinBlock, ThinId};

/// For how long threads go on beside each other for one sample.
const TIME: Duration = Duration::from_millis(100);
/// Changes in one sample.
const STEPS: u64 = 20_000;
const DEVICE: ThinId = ThinId(0);
const SNAPSHOT: ThinId = ThinId(1);
const SIZES: [(&str, u64); 3] = [("64k", 65_536), ("1m", 1_000_000), ("16m", 16_000_000)];

/// Keys in order, 252 to a node, and nodes in one vector.
struct BareTree {
    nodes: Vec<[u64; 512]>,
    root: usize,
    levels: usize,
}

const FANOUT: usize = 252;

impl BareTree {
    fn of(entries: u64) -> Self {
        let mut nodes: Vec<[u64; 512]> = Vec::new();
        let mut level: Vec<(u64, u64)> = (0..entries).map(|key| (key, key + 1)).collect();
        let mut levels = 0;
        loop {
            let mut above = Vec::new();
            for chunk in level.chunks(FANOUT) {
                let mut node = [0; 512];
                node[0] = chunk.len() as u64;
                for (i, &(key, value)) in chunk.iter().enumerate() {
                    node[4 + i] = key;
                    node[4 + FANOUT + i] = value;
                }
                above.push((chunk[0].0, nodes.len() as u64));
                nodes.push(node);
            }
            levels += 1;
            level = above;
            if level.len() == 1 {
                return Self {
                    root: nodes.len() - 1,
                    nodes,
                    levels,
                };
            }
        }
    }

    fn lookup(&self, key: u64) -> u64 {
        let mut at = self.root as u64;
        for _ in 0..self.levels {
            let node = &self.nodes[at as usize];
            let keys = &node[4..4 + node[0] as usize];
            at = node[4 + FANOUT + keys.partition_point(|k| *k <= key) - 1];
        }
        at
    }
}

/// Keys of one in ten blocks drawn anew, the others behind the one before.
struct Local {
    rng: SmallRng,
    at: u64,
    entries: u64,
}

impl Local {
    fn next(&mut self) -> u64 {
        self.at = match self.rng.random_range(0..10) {
            0 => self.rng.random_range(0..self.entries),
            _ => (self.at + 1) % self.entries,
        };
        self.at
    }
}

/// A pool with one device that has no mappings yet, and room for `entries`.
fn empty(entries: u64) -> Result<PoolMetadata> {
    let blocks = (entries / 100 + 4096) as usize;
    let engine = Arc::new(RamEngine::new(blocks));
    let mut pool = PoolMetadata::format(engine, 128, blocks * (BLOCK_SIZE + 16))?;
    pool.resize_data(4 * entries)?;
    pool.create_thin(DEVICE)?;
    Ok(pool)
}

fn insert(pool: &mut PoolMetadata, id: ThinId, key: u64) -> Result<()> {
    let data = pool.alloc_data_block()?.expect("a free data block");
    pool.insert_block(id, ThinBlock(key), data)
}

/// A pool with one device of `entries` mappings.
fn full(entries: u64) -> Result<PoolMetadata> {
    let mut pool = empty(entries)?;
    for key in 0..entries {
        insert(&mut pool, DEVICE, key)?;
        if key % 1000 == 999 {
            pool.commit()?;
        }
    }
    pool.commit()?;
    Ok(pool)
}

/// A full pool that is made when it is first wanted, and shared by one scheme after the other.
struct Shared {
    entries: u64,
    metadata: Option<SharedMetadata>,
}

impl Shared {
    fn new(entries: u64) -> Self {
        Self {
            entries,
            metadata: None,
        }
    }

    fn by(&mut self, scheme: LockScheme) -> &SharedMetadata {
        let pool = match self.metadata.take() {
            Some(same) if same.scheme() == scheme => return self.metadata.insert(same),
            Some(other) => other.into_pool(),
            None => full(self.entries).expect("memory"),
        };
        let shared = self.metadata.insert(SharedMetadata::new(pool, scheme));
        let thin = shared.open_thin(DEVICE).expect("there");
        let mut reader = shared.reader(false);
        for key in 0..self.entries {
            reader.find_block(&thin, ThinBlock(key)).expect("sound");
        }
        drop(reader);
        shared
    }
}

fn group<'a>(c: &'a mut Criterion, name: String) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .throughput(Throughput::Elements(1));
    group
}

/// Lookups of one thread under every scheme.
fn lookups(c: &mut Criterion, (name, entries): (&str, u64)) {
    let mut group = group(c, format!("lookup {name}"));
    let mut rng = SmallRng::seed_from_u64(1);
    let mut bare = None;
    group.bench_function("bare tree, random", |b| {
        let bare = bare.get_or_insert_with(|| BareTree::of(entries));
        b.iter(|| black_box(bare.lookup(rng.random_range(0..entries))));
    });
    drop(bare);
    let mut local = Local {
        rng: SmallRng::seed_from_u64(2),
        at: 0,
        entries,
    };
    let mut keys: [(&str, &mut dyn FnMut() -> u64); 2] = [
        ("random", &mut || rng.random_range(0..entries)),
        ("local", &mut || local.next()),
    ];
    let mut shared = Shared::new(entries);
    for scheme in LockScheme::ALL {
        for (order, key) in &mut keys {
            group.bench_function(BenchmarkId::new(scheme.to_string(), &order), |b| {
                let shared = shared.by(scheme);
                let thin = shared.open_thin(DEVICE).expect("there");
                let mut reader = shared.reader(false);
                b.iter(|| {
                    let found = reader.try_find_block(&thin, ThinBlock(key()));
                    assert!(matches!(found, Ok(TryLookup::Mapped(_))), "{found:?}");
                });
            });
        }
    }
    group.finish();
    if shared.metadata.is_none() {
        return;
    }
    println!("| {name}, one thread | read-modify-writes a lookup |\n|---|--:|");
    for scheme in LockScheme::ALL {
        let shared = shared.by(scheme);
        let thin = shared.open_thin(DEVICE).expect("there");
        let mut reader = shared.reader(true);
        for key in 0..1000 {
            reader.find_block(&thin, ThinBlock(key)).expect("sound");
        }
        let counts = reader.counts().unwrap_or_default();
        println!(
            "| {scheme} | {:.1} |",
            per(counts.atomic_rmws, counts.lookups)
        );
    }
}

fn per(n: u64, of: u64) -> f64 {
    n as f64 / of.max(1) as f64
}

/// Changes by one thread, [`STEPS`] to a sample, with a commit after every thousand. After `most` of them a new pool takes the place of
/// the one that was changed.
fn change(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    most: u64,
    make: impl Fn() -> Result<PoolMetadata>,
    mut work: impl FnMut(&mut PoolMetadata, u64) -> Result<()>,
) {
    let mut present = None;
    group.bench_function(name, |b| {
        b.iter_custom(|iters| {
            let mut spent = Duration::ZERO;
            for _ in 0..STEPS / 1000 {
                let (pool, done) = present.get_or_insert_with(|| (make().expect("memory"), 0));
                let since = Instant::now();
                for _ in 0..1000 {
                    work(pool, *done).expect("room");
                    *done += 1;
                }
                pool.commit().expect("room");
                spent += since.elapsed();
                if *done + 1000 > most {
                    present = None;
                }
            }
            spent.mul_f64(iters as f64 / STEPS as f64)
        });
    });
}

fn changes(c: &mut Criterion, (name, entries): (&str, u64)) {
    let mut group = group(c, format!("change {name}"));
    // A sample is as long as its steps, whatever criterion plans; this keeps it from worrying.
    group.measurement_time(Duration::from_secs(30));
    let most = 200_000.min(entries);
    let mut rng = SmallRng::seed_from_u64(3);
    let mut random = || rng.random_range(0..entries);
    change(
        &mut group,
        "insert in order",
        entries,
        || empty(entries),
        |pool, i| insert(pool, DEVICE, i),
    );
    change(
        &mut group,
        "insert at random",
        most,
        || full(entries),
        |pool, _| insert(pool, DEVICE, entries + random()),
    );
    let with_snapshot = || {
        let mut pool = full(entries)?;
        pool.create_snap(SNAPSHOT, DEVICE)?;
        pool.commit()?;
        Ok(pool)
    };
    change(
        &mut group,
        "break sharing",
        most,
        with_snapshot,
        |pool, _| insert(pool, SNAPSHOT, random()),
    );
    change(
        &mut group,
        "remove",
        most,
        || full(entries),
        |pool, _| {
            let key = random();
            let removed = pool.remove_range(DEVICE, ThinBlock(key), ThinBlock(key + 1));
            removed.map(|_| ())
        },
    );
    group.finish();
}

/// Who else is at work while a thread looks blocks up.
#[derive(Clone, Copy, PartialEq)]
enum Beside {
    Nobody,
    Reader,
    /// Takes its share of the machine, but none of the locks.
    WriterElsewhere,
    Writer,
}

/// What was counted while a thread looked blocks up, and what the writer beside it did.
#[derive(Default)]
struct Counted {
    spent: Duration,
    answered: u64,
    lookups: LookupCounts,
    written: u64,
}

/// Random lookups by one thread until it is told to stop, or for some time.
fn read(shared: &SharedMetadata, entries: u64, until: impl Fn() -> bool) -> (u64, LookupCounts) {
    let thin = shared.open_thin(DEVICE).expect("there");
    let mut reader = shared.reader(true);
    let mut rng = SmallRng::seed_from_u64(6);
    while !until() {
        for _ in 0..256 {
            let key = ThinBlock(rng.random_range(0..entries));
            black_box(reader.try_find_block(&thin, key)).expect("sound");
        }
    }
    let counts = reader.counts().unwrap_or_default();
    // Those that gave up are no answers.
    let gave_up = counts.would_block_root + counts.would_block_block + counts.would_block_cache;
    (counts.lookups - gave_up, counts)
}

/// Overwrites and commits. Returns how many mappings were written.
fn write(shared: &SharedMetadata, entries: u64, stop: &AtomicBool) -> u64 {
    let mut rng = SmallRng::seed_from_u64(5);
    let mut written = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let key = ThinBlock(rng.random_range(0..entries));
        let changed = shared.change(|pool| {
            let data = pool.alloc_data_block()?.unwrap_or(DataBlock(0));
            pool.insert_block(DEVICE, key, data)
        });
        changed.expect("room");
        written += 1;
        if written.is_multiple_of(1000) {
            shared.commit().expect("room");
        }
    }
    shared.commit().expect("room");
    written
}

/// What one thread finds in [`TIME`], and what another does beside it.
fn beside(
    [shared, elsewhere]: [&SharedMetadata; 2],
    entries: u64,
    other: Beside,
    counted: &mut Counted,
) -> f64 {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| match other {
            Beside::Nobody => 0,
            Beside::Reader => {
                read(shared, entries, || stop.load(Ordering::Relaxed));
                0
            }
            Beside::WriterElsewhere => write(elsewhere, entries, &stop),
            Beside::Writer => write(shared, entries, &stop),
        });
        let since = Instant::now();
        let (answered, counts) = read(shared, entries, || since.elapsed() >= TIME);
        let spent = since.elapsed();
        stop.store(true, Ordering::Relaxed);
        counted.written += other.join().expect("the other thread is done");
        counted.spent += spent;
        counted.answered += answered;
        counted.lookups.add(&counts);
        spent.as_secs_f64() / answered.max(1) as f64
    })
}

/// Answered lookups of one thread, alone, beside another one, and beside one that overwrites and commits: another pool, or this one.
fn two_threads(c: &mut Criterion, (name, entries): (&str, u64)) {
    let mut group = group(c, format!("two threads {name}"));
    let (mut shared, mut elsewhere) = (Shared::new(entries), Shared::new(entries));
    let mut rows = Vec::new();
    for scheme in LockScheme::ALL {
        for (who, other) in [
            ("alone", Beside::Nobody),
            ("beside a reader", Beside::Reader),
            ("beside a writer of another pool", Beside::WriterElsewhere),
            ("beside a writer", Beside::Writer),
        ] {
            let mut counted = Counted::default();
            let mut barriers = (0, 0);
            group.bench_function(BenchmarkId::new(scheme.to_string(), who), |b| {
                let (shared, elsewhere) = (shared.by(scheme), elsewhere.by(scheme));
                b.iter_custom(|iters| {
                    let each = beside([shared, elsewhere], entries, other, &mut counted);
                    Duration::from_secs_f64(iters as f64 * each)
                });
                barriers = shared.barrier_waits();
            });
            let all = &counted.lookups;
            if other != Beside::Writer || all.lookups == 0 {
                continue;
            }
            let share = |n: u64| 100.0 * per(n, all.lookups);
            rows.push(format!(
                "| {scheme} | {:.2} | {:.2} | {:.2} % | {:.2} % | {:.2} % | {:.1} | {:.2} |",
                counted.answered as f64 / counted.spent.as_secs_f64() / 1e6,
                counted.written as f64 / counted.spent.as_secs_f64() / 1e6,
                share(all.would_block_root),
                share(all.would_block_block),
                share(all.retries),
                per(all.atomic_rmws, all.lookups),
                per(barriers.1, barriers.0) / 1000.0
            ));
        }
    }
    group.finish();
    if !rows.is_empty() {
        println!(
            "| {name}, beside a writer | lookups, M/s | writes, M/s | would block: root | block | began again | read-modify-writes | barrier, µs a commit |\n|---|--:|--:|--:|--:|--:|--:|--:|"
        );
        println!("{}", rows.join("\n"));
    }
}

fn main() {
    let mut criterion = Criterion::default().without_plots().configure_from_args();
    let is_asked_for = std::env::args().any(|a| a.contains("16m"));
    let sizes = SIZES.into_iter().filter(|s| s.0 != "16m" || is_asked_for);
    for size in sizes {
        lookups(&mut criterion, size);
        changes(&mut criterion, size);
    }
    two_threads(&mut criterion, SIZES[1]);
}
