//! What lookups and changes of metadata cost: `cargo bench --bench metadata [-- 64k 1m 16m]` prints the tables of ARCHITECTURE.md.
//!
//! Everything is in memory. The rate of a bare tree of 4 KiB nodes, without a cache or a lock, is measured in the same run; it is what
//! lookups can at best be.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::io::RamEngine;
use thintools::pdata::txn::{LockScheme, LookupCounts};
use thintools::thin::{PoolMetadata, SharedMetadata, TryLookup};
use thintools::units::{BLOCK_SIZE, DataBlock, ThinBlock, ThinId};

type Error = Box<dyn std::error::Error>;

/// For how long a rate is measured.
const TIME: Duration = Duration::from_millis(700);
const DEVICE: ThinId = ThinId(0);

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

/// How often a second `work` can be done.
fn rate(mut work: impl FnMut()) -> f64 {
    let since = Instant::now();
    let mut done = 0u64;
    while since.elapsed() < TIME {
        for _ in 0..1024 {
            work();
        }
        done += 1024;
    }
    done as f64 / since.elapsed().as_secs_f64()
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

/// A pool with one device of `entries` mappings; and inserts a second, in order.
fn build(entries: u64) -> Result<(PoolMetadata, f64), Error> {
    let blocks = (entries / 100 + 4096) as usize;
    let engine = Arc::new(RamEngine::new(blocks));
    let mut pool = PoolMetadata::format(engine, 128, blocks * (BLOCK_SIZE + 16))?;
    pool.resize_data(4 * entries)?;
    pool.create_thin(DEVICE)?;
    let since = Instant::now();
    for key in 0..entries {
        let data = pool.alloc_data_block()?.ok_or("no data block")?;
        pool.insert_block(DEVICE, ThinBlock(key), data)?;
        if key % 1000 == 999 {
            pool.commit()?;
        }
    }
    pool.commit()?;
    Ok((pool, entries as f64 / since.elapsed().as_secs_f64()))
}

fn millions(rate: f64) -> String {
    format!("{:.2}", rate / 1e6)
}

/// Lookups of one thread under every scheme.
fn lookups(entries: u64, mut pool: PoolMetadata) -> Result<PoolMetadata, Error> {
    let bare = BareTree::of(entries);
    let mut rng = SmallRng::seed_from_u64(1);
    let at_best = rate(|| {
        black_box(bare.lookup(rng.random_range(0..entries)));
    });
    drop(bare);
    println!(
        "| {entries} mappings, bare tree | {} | | | |",
        millions(at_best)
    );
    for scheme in LockScheme::ALL {
        let shared = SharedMetadata::new(pool, scheme);
        let thin = shared.open_thin(DEVICE)?;
        let mut reader = shared.reader(false);
        // Warm.
        for key in 0..entries {
            reader.find_block(&thin, ThinBlock(key))?;
        }
        let mut found = true;
        let random = rate(|| {
            let key = ThinBlock(rng.random_range(0..entries));
            found &= matches!(reader.try_find_block(&thin, key), Ok(TryLookup::Mapped(_)));
        });
        let mut keys = Local {
            rng: SmallRng::seed_from_u64(2),
            at: 0,
            entries,
        };
        let local = rate(|| {
            let key = ThinBlock(keys.next());
            found &= matches!(reader.try_find_block(&thin, key), Ok(TryLookup::Mapped(_)));
        });
        if !found {
            return Err("a mapping was not found".into());
        }
        let mut counting = shared.reader(true);
        for _ in 0..1000 {
            counting.find_block(&thin, ThinBlock(rng.random_range(0..entries)))?;
        }
        let counts = counting.counts().unwrap_or_default();
        println!(
            "| {entries} mappings, {scheme} | {} | {:.2} | {} | {:.1} |",
            millions(random),
            random / at_best,
            millions(local),
            counts.atomic_rmws as f64 / counts.lookups as f64
        );
        drop((reader, counting, thin));
        pool = shared.into_pool();
    }
    Ok(pool)
}

/// Changes a second by one thread, with a commit after every thousand.
fn changes(entries: u64, in_order: f64, pool: &mut PoolMetadata) -> Result<(), Error> {
    let mut rng = SmallRng::seed_from_u64(3);
    let n = 200_000.min(entries);
    let mut timed = |what: &mut dyn FnMut(&mut PoolMetadata, u64) -> Result<(), Error>| {
        let since = Instant::now();
        for i in 0..n {
            what(pool, rng.random_range(0..entries))?;
            if i % 1000 == 999 {
                pool.commit()?;
            }
        }
        pool.commit()?;
        Ok::<f64, Error>(n as f64 / since.elapsed().as_secs_f64())
    };
    let insert = |pool: &mut PoolMetadata, id: ThinId, key| {
        let data = pool.alloc_data_block()?.ok_or("no data block")?;
        Ok::<(), Error>(pool.insert_block(id, ThinBlock(key), data)?)
    };
    let random = timed(&mut |pool, key| insert(pool, DEVICE, key + entries))?;
    timed(&mut |pool, key| match key {
        // One snapshot; every insert into it breaks sharing.
        _ if pool.details(ThinId(1)).is_err() => Ok(pool.create_snap(ThinId(1), DEVICE)?),
        _ => Ok(()),
    })?;
    let breaks = timed(&mut |pool, key| insert(pool, ThinId(1), key))?;
    let removals = timed(&mut |pool, key| {
        pool.remove_range(DEVICE, ThinBlock(key), ThinBlock(key + 1))?;
        Ok(())
    })?;
    println!(
        "| {entries} | {} | {} | {} | {} |",
        millions(in_order),
        millions(random),
        millions(breaks),
        millions(removals)
    );
    Ok(())
}

/// Answered lookups a second of one thread, alone and while another thread overwrites and commits.
fn under_a_writer(entries: u64, mut pool: PoolMetadata) -> Result<(), Error> {
    for scheme in LockScheme::ALL {
        let shared = SharedMetadata::new(pool, scheme);
        let alone = read_for(&shared, entries)?.0;
        let (stop, before) = (AtomicBool::new(false), shared.barrier_waits());
        let (under, counts, written) = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut rng = SmallRng::seed_from_u64(5);
                let mut written = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let key = rng.random_range(0..entries);
                    let changed = shared.change(|pool| {
                        let data = pool.alloc_data_block()?.unwrap_or(DataBlock(0));
                        pool.insert_block(DEVICE, ThinBlock(key), data)
                    });
                    changed.map_err(|e| e.to_string())?;
                    written += 1;
                    if written.is_multiple_of(1000) {
                        shared.commit().map_err(|e| e.to_string())?;
                    }
                }
                Ok::<u64, String>(written)
            });
            let read = read_for(&shared, entries).map_err(|e| e.to_string());
            stop.store(true, Ordering::Relaxed);
            let written = writer.join().map_err(|_| "the writer failed")??;
            let (rate, counts) = read?;
            Ok::<_, String>((rate, counts, written))
        })?;
        let after = shared.barrier_waits();
        let commits = (after.0 - before.0).max(1);
        let share = |n: u64| 100.0 * n as f64 / counts.lookups.max(1) as f64;
        println!(
            "| {scheme} | {} | {} | {:.0} % | {} | {:.2} % | {:.2} % | {:.2} % | {:.1} | {:.2} |",
            millions(alone),
            millions(under),
            100.0 * under / alone,
            millions(written as f64 / TIME.as_secs_f64()),
            share(counts.would_block_root),
            share(counts.would_block_block),
            share(counts.retries),
            counts.atomic_rmws as f64 / counts.lookups.max(1) as f64,
            (after.1 - before.1) as f64 / commits as f64 / 1000.0
        );
        shared.commit()?;
        pool = shared.into_pool();
    }
    Ok(())
}

fn read_for(shared: &SharedMetadata, entries: u64) -> Result<(f64, LookupCounts), Error> {
    let thin = shared.open_thin(DEVICE)?;
    let mut reader = shared.reader(true);
    let mut rng = SmallRng::seed_from_u64(6);
    let rate = rate(|| {
        black_box(reader.try_find_block(&thin, ThinBlock(rng.random_range(0..entries)))).ok();
    });
    // Those that gave up are no answers.
    let counts = reader.counts().unwrap_or_default();
    let gave_up = counts.would_block_root + counts.would_block_block + counts.would_block_cache;
    let answered = 1.0 - gave_up as f64 / counts.lookups.max(1) as f64;
    Ok((rate * answered, counts))
}

fn main() -> Result<(), Error> {
    let given: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let sizes = [("64k", 65_536), ("1m", 1_000_000), ("16m", 16_000_000)];
    let wanted = |name: &str| given.is_empty() || given.iter().any(|g| g == name);
    let mut built = Vec::new();
    println!("| lookups, one thread | random, M/s | of bare | local, M/s | read-modify-writes |");
    println!("|---|--:|--:|--:|--:|");
    for (_, entries) in sizes.into_iter().filter(|s| wanted(s.0)) {
        let (pool, in_order) = build(entries)?;
        built.push((entries, in_order, lookups(entries, pool)?));
    }
    println!(
        "\n| mappings | inserts in order, M/s | at random, M/s | snapshot breaks, M/s | removals, M/s |"
    );
    println!("|--:|--:|--:|--:|--:|");
    for (entries, in_order, pool) in &mut built {
        changes(*entries, *in_order, pool)?;
    }
    println!(
        "\n| scheme | alone, M/s | under a writer, M/s | kept | writes, M/s | would block: root | block | began again | read-modify-writes | barrier, µs a commit |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    let (pool, _) = build(1_000_000)?;
    under_a_writer(1_000_000, pool)
}
