//! Makes the metadata images that the benchmarks read: `generate-metadata SHAPE OUTPUT [--seed N] [--size BYTES]`.
//!
//! Every shape maps data blocks in a pseudo-random order in which no two neighbours form a run: the worst case for
//! everything that works on runs, and for a dump the largest output. The same seed makes the same image.

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use thintools::io::open_output;
use thintools::observer::Silent;
use thintools::tools::event::{Device, PoolInfo, Run, Sink, Source};
use thintools::tools::{Restored, restore};
use thintools::units::{BLOCK_SIZE, DATA_BLOCK_SIZE_STEP, DataBlock, ThinBlock, ThinId};

/// Mapping runs told at once.
const BATCH: u64 = 4096;
/// Neighbours are mapped at different times, from 0 to one less than this.
const TIMES: u32 = 4;
/// The name of the mappings that all devices share.
const SHARED: &str = "shared";

/// Makes thin pool metadata for benchmarks.
#[derive(Parser)]
#[command(name = "generate-metadata")]
struct Args {
    /// What the pool looks like.
    shape: Shape,
    /// The image to make; it must not exist.
    output: PathBuf,
    /// Selects the order of the data blocks.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Size of the image [default: enough for the shape].
    #[arg(long, value_name = "BYTES")]
    size: Option<u64>,
}

/// The pools that can be made.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shape {
    /// 8 devices with 2 million mappings each, nothing shared.
    Fragmented,
    /// 500 devices that share all of their 2 million mappings.
    Snapshots,
    /// 2 devices with 1000 mappings each.
    Small,
}

impl Shape {
    /// The pool of this shape.
    fn pool(self, seed: u64) -> Pool {
        let (devices, mappings, is_shared, data_bits) = match self {
            Self::Fragmented => (8, 2_000_000, false, 24),
            Self::Snapshots => (500, 2_000_000, true, 21),
            Self::Small => (2, 1_000, false, 12),
        };
        Pool {
            devices,
            mappings,
            is_shared,
            order: Shuffle::new(data_bits, seed),
        }
    }

    /// Bytes of the image unless something else is asked for.
    fn image_size(self) -> u64 {
        match self {
            Self::Fragmented => 512 << 20,
            // Four times what it needs: some tools write shared mappings twice before they drop one.
            Self::Snapshots => 128 << 20,
            Self::Small => 4 << 20,
        }
    }
}

/// A pseudo-random order of the numbers below a power of two, computed number by number.
#[derive(Clone, Copy, Debug)]
struct Shuffle {
    bits: u32,
    keys: [u64; Self::ROUNDS],
}

impl Shuffle {
    const ROUNDS: usize = 4;

    /// An order of the numbers below `1 << bits`; at least 2 bits.
    fn new(bits: u32, seed: u64) -> Self {
        let mut state = seed;
        let keys = [(); Self::ROUNDS].map(|()| {
            // Knuth's linear congruential generator; its high bits are the good ones.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state >> 24
        });
        Self { bits, keys }
    }

    /// How many numbers there are.
    fn len(self) -> u64 {
        1 << self.bits
    }

    /// The number at place `index`. Each step can be undone modulo `1 << bits`, so no number appears twice: a sum, a product
    /// with an odd number, and the exclusive or with the own upper half.
    fn at(self, index: u64) -> u64 {
        let mask = self.len() - 1;
        self.keys.iter().fold(index, |x, key| {
            let x = x.wrapping_add(key >> 8).wrapping_mul(key | 1) & mask;
            x ^ (x >> self.bits.div_ceil(2))
        })
    }
}

/// A pool whose every device maps its first `mappings` blocks.
#[derive(Clone, Copy, Debug)]
struct Pool {
    devices: u64,
    mappings: u64,
    /// All devices have the same mappings.
    is_shared: bool,
    order: Shuffle,
}

impl Pool {
    /// The mapping of virtual block `thin` of device number `nth`. Its neighbours have other times, so that they are no run
    /// even where their data blocks happen to be neighbours, too.
    fn mapping(&self, nth: u64, thin: u64) -> Run {
        Run {
            thin_begin: ThinBlock(thin),
            data_begin: DataBlock(self.order.at(nth * self.mappings + thin)),
            length: 1,
            time: (thin % u64::from(TIMES)) as u32,
        }
    }

    /// Tells all mappings of device number `nth`.
    fn emit_mappings(&self, sink: &mut dyn Sink, nth: u64) -> thintools::Result<()> {
        let mut batch = Vec::with_capacity(BATCH as usize);
        for start in (0..self.mappings).step_by(BATCH as usize) {
            let end = self.mappings.min(start + BATCH);
            batch.clear();
            batch.extend((start..end).map(|thin| self.mapping(nth, thin)));
            sink.mappings(&batch)?;
        }
        Ok(())
    }
}

impl Source for Pool {
    fn emit(&self, sink: &mut dyn Sink) -> thintools::Result<()> {
        sink.pool(&PoolInfo {
            time: TIMES,
            transaction: self.devices,
            version: 2,
            data_block_size: DATA_BLOCK_SIZE_STEP,
            nr_data_blocks: self.order.len(),
            ..PoolInfo::default()
        })?;
        if self.is_shared {
            sink.define(SHARED)?;
            self.emit_mappings(sink, 0)?;
            sink.end_define()?;
        }
        for nth in 0..self.devices {
            sink.device(&Device {
                dev_id: ThinId(nth + 1),
                mapped_blocks: self.mappings,
                transaction: nth,
                creation_time: 0,
                snap_time: TIMES,
            })?;
            if self.is_shared {
                sink.reference(SHARED)?;
            } else {
                self.emit_mappings(sink, nth)?;
            }
            sink.end_device()?;
        }
        sink.end()
    }
}

/// Makes the image.
fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let size = args.size.unwrap_or(args.shape.image_size());
    ensure!(
        size.is_multiple_of(BLOCK_SIZE as u64),
        "--size {size} is no multiple of {BLOCK_SIZE}"
    );
    let shown = args.output.display();
    let file = File::create_new(&args.output).with_context(|| format!("cannot create {shown}"))?;
    let made = file
        .set_len(size)
        .with_context(|| format!("cannot make {shown} {size} bytes long"))
        .and_then(|()| fill(&args.output, &args.shape.pool(args.seed)));
    let Restored {
        mappings,
        used_blocks,
        ..
    } = made.inspect_err(|_| {
        // An image without metadata helps nobody; the error is reported whether or not this succeeds.
        let _ = fs::remove_file(&args.output);
    })?;
    let used = used_blocks * BLOCK_SIZE as u64;
    println!("mappings={mappings} used_bytes={used} image_bytes={size}");
    Ok(())
}

/// Writes `pool` to the file at `path`.
fn fill(path: &Path, pool: &Pool) -> anyhow::Result<Restored> {
    let output = open_output(path, None)?;
    Ok(restore(pool, &*output, &Silent)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No number is missing from an order and none is there twice.
    #[test]
    fn orders_are_permutations() {
        for (bits, seed) in [(2, 0), (3, 7), (12, 1), (13, u64::MAX)] {
            let order = Shuffle::new(bits, seed);
            let mut numbers: Vec<u64> = (0..order.len()).map(|i| order.at(i)).collect();
            numbers.sort_unstable();
            assert!(numbers.into_iter().eq(0..order.len()), "{bits} {seed}");
        }
    }

    /// Neighbours do not form runs, and hardly ever lie side by side.
    #[test]
    fn neighbours_are_apart() {
        let pool = Shape::Fragmented.pool(1);
        let runs: Vec<Run> = (0..100_000).map(|thin| pool.mapping(0, thin)).collect();
        assert!(runs.windows(2).all(|pair| !pair[0].continues(&pair[1])));
        let close = |pair: &&[Run]| pair[0].data_begin.0.abs_diff(pair[1].data_begin.0) < 1000;
        assert!(runs.windows(2).filter(close).count() < 100);
    }

    /// The mappings of all devices fit the data device.
    #[test]
    fn shapes_fit_their_data_device() {
        for shape in Shape::value_variants() {
            let pool = shape.pool(1);
            let kinds = if pool.is_shared { 1 } else { pool.devices };
            assert!(kinds * pool.mappings <= pool.order.len(), "{shape:?}");
        }
    }
}
