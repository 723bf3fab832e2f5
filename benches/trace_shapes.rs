//! Traces of random requests, the same for the same numbers.

use std::io::{Result, Write};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Where the requests go.
#[derive(Clone, Copy)]
pub(crate) enum Shape {
    /// 4 KiB to 124 KiB anywhere in 40 GB, one request each microsecond.
    Random,
    /// 4 KiB anywhere in [`BLOCKS`] blocks of 64 KiB.
    Uniform,
    /// The same blocks; nine of ten requests go to each hundredth of them, eight one after the other.
    Locality,
    /// A write of each of these blocks, out of order, again and again.
    Provisioning,
    /// The same in order.
    Filling,
}

/// Microseconds between requests of all shapes but [`Shape::Random`], so that the worker of a pool keeps up with them.
const PACE: u64 = 50;

impl Shape {
    /// By its name.
    #[allow(dead_code)]
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "random" => Self::Random,
            "uniform" => Self::Uniform,
            "locality" => Self::Locality,
            "provisioning" => Self::Provisioning,
            "filling" => Self::Filling,
            _ => return None,
        })
    }
}

/// Blocks of 64 KiB that have requests, of all shapes but [`Shape::Random`].
const BLOCKS: u64 = 1 << 20;
/// Units of 4 KiB in a block.
const UNITS: u64 = 16;
/// Requests of a run.
const RUN: u64 = 8;

/// One request.
pub(crate) struct Request {
    pub(crate) micros: u64,
    pub(crate) is_write: bool,
    /// In units of 4 KiB.
    pub(crate) block: u64,
    pub(crate) blocks: u64,
    /// Some number, for whatever else a format has.
    pub(crate) other: u64,
}

/// So many requests.
pub(crate) fn requests(shape: Shape, events: u64) -> impl Iterator<Item = Request> {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut start = 0;
    (0..events).map(move |number| {
        let is_write = rng.random();
        let (is_write, block, blocks) = match shape {
            Shape::Random => {
                let block = rng.random_range(0..10_000_000);
                (is_write, block, rng.random_range(1..32))
            }
            Shape::Uniform => (is_write, rng.random_range(0..BLOCKS * UNITS), 1),
            Shape::Locality => {
                if number % RUN == 0 {
                    let block: u64 = rng.random_range(0..BLOCKS);
                    let is_cold = rng.random_range(0..10) == 0;
                    let block = if is_cold { block } else { block / 100 * 100 };
                    start = block * UNITS + rng.random_range(0..=UNITS - RUN);
                }
                (is_write, start + number % RUN, 1)
            }
            // Odd, so that each block has its turn.
            Shape::Filling => (true, number % BLOCKS * UNITS, UNITS),
            Shape::Provisioning => (
                true,
                number.wrapping_mul(0x9e37_79b1) % BLOCKS * UNITS,
                UNITS,
            ),
        };
        Request {
            micros: match shape {
                Shape::Random => number,
                _ => number * PACE,
            },
            is_write,
            block,
            blocks,
            other: rng.random_range(0..1000),
        }
    })
}

/// The Alibaba CSV, of so many volumes up to 1000.
pub(crate) fn alibaba(shape: Shape, events: u64, volumes: u64, out: &mut dyn Write) -> Result<()> {
    for request in requests(shape, events) {
        writeln!(
            out,
            "{},{},{},{},{}",
            request.other % volumes,
            ["R", "W"][usize::from(request.is_write)],
            request.block * 4096,
            request.blocks * 4096,
            1_577_808_000_000_046 + request.micros,
        )?;
    }
    Ok(())
}

/// blkparse's text.
pub(crate) fn blkparse(shape: Shape, events: u64, out: &mut dyn Write) -> Result<()> {
    for request in requests(shape, events) {
        let (seconds, micros) = (request.micros / 1_000_000, request.micros % 1_000_000);
        writeln!(
            out,
            "254,1    0 {:8} {seconds:5}.{micros:06}000   161  Q {:>3} {} + {} [fio]",
            request.micros + 1,
            ["R", "WS"][usize::from(request.is_write)],
            request.block * 8,
            request.blocks * 8,
        )?;
    }
    Ok(())
}

/// A log of fio, version 3.
pub(crate) fn iolog(shape: Shape, events: u64, out: &mut dyn Write) -> Result<()> {
    writeln!(out, "fio version 3 iolog\n0 disk add\n0 disk open")?;
    for request in requests(shape, events) {
        writeln!(
            out,
            "{} disk {} {} {}",
            request.micros,
            ["read", "write"][usize::from(request.is_write)],
            request.block * 4096,
            request.blocks * 4096,
        )?;
    }
    writeln!(out, "{events} disk close")
}

/// Which records blktrace writes.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Records {
    /// All that a thin device has: each request is queued, and completed.
    All,
    /// Those of `blktrace -a queue`.
    #[allow(dead_code)]
    Queued,
}

/// Nanoseconds from a request to its completion, before the next request.
const COMPLETED_AFTER: u64 = 500;

/// The files of blktrace, of as many processors as there are outputs. A request is completed by the processor that queued it.
pub(crate) fn blktrace(
    shape: Shape,
    events: u64,
    which: Records,
    files: &mut [Box<dyn Write>],
) -> Result<()> {
    let mut numbers = vec![0u32; files.len()];
    for request in requests(shape, events) {
        let cpu = request.other as usize % files.len();
        let mut write = |action: u32, after: u64| {
            numbers[cpu] += 1;
            // Reads have bit 0, writes bits 1 and 3, which says that somebody waits for it.
            let categories = if request.is_write {
                1 << 1 | 1 << 3
            } else {
                1 << 0
            };
            let bytes = request.blocks as u32 * 4096;
            let mut record = [0; 48];
            record[..4].copy_from_slice(&0x6561_7407u32.to_le_bytes());
            record[4..8].copy_from_slice(&numbers[cpu].to_le_bytes());
            record[8..16].copy_from_slice(&(request.micros * 1000 + after).to_le_bytes());
            record[16..24].copy_from_slice(&(request.block * 8).to_le_bytes());
            let fields = [
                bytes,
                action | categories << 16,
                161,
                254 << 20 | 1,
                cpu as u32,
            ];
            record[24..44].copy_from_slice(&fields.map(u32::to_le_bytes).concat());
            files[cpu].write_all(&record)
        };
        write(1 | 1 << 4 << 16, 0)?;
        if which == Records::All {
            write(8 | 1 << 7 << 16, COMPLETED_AFTER)?;
        }
    }
    Ok(())
}
