//! The floor for a checker: reads metadata once with all cores and checksums each block, nothing else.
//!
//! `read-limit FILE [BYTES]` reads the first BYTES (rounded down to whole blocks) of FILE, or all of it.

use anyhow::Context;
use clap::Parser;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;
use thintools::units::BLOCK_SIZE;

/// Bytes in one request: 1 MiB.
const REQUEST: u64 = 1 << 20;

/// Reads metadata and checksums its blocks, as fast as this machine can.
#[derive(Parser)]
#[command(name = "read-limit")]
struct Args {
    /// The metadata image to read.
    file: PathBuf,
    /// How much of it to read, from its beginning [default: all of it].
    bytes: Option<u64>,
}

/// Reads the file and prints how long that took.
fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let shown = args.file.display();
    let start = Instant::now();
    let file = File::open(&args.file).with_context(|| format!("cannot open {shown}"))?;
    let size = file
        .metadata()
        .with_context(|| format!("cannot look at {shown}"))?
        .len();
    let size = size.min(args.bytes.unwrap_or(u64::MAX));
    let size = size - size % BLOCK_SIZE as u64;
    read_all(&file, size).with_context(|| format!("cannot read {shown}"))?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{:.1} ms, {:.0} MB/s",
        1e3 * seconds,
        size as f64 / 1e6 / seconds
    );
    Ok(())
}

/// Reads the first `size` bytes of `file`, each core taking the next request whenever it has finished one.
fn read_all(file: &File, size: u64) -> std::io::Result<()> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = size.div_ceil(REQUEST).min(cores as u64);
    let next = AtomicU64::new(0);
    let work = || {
        let mut buffer = vec![0; REQUEST.min(size) as usize];
        loop {
            let offset = next.fetch_add(REQUEST, Ordering::Relaxed);
            if offset >= size {
                return Ok(());
            }
            let piece = &mut buffer[..REQUEST.min(size - offset) as usize];
            file.read_exact_at(piece, offset)?;
            for block in piece.chunks_exact(BLOCK_SIZE) {
                black_box(crc32c::crc32c(block));
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        // A worker that panicked has found a defect of this program.
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}
