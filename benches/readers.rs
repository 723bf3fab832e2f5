//! How fast traces are read: `cargo bench --bench readers`, half a minute.
//!
//! The traces are made here, in a temporary folder whose files are in memory by then: two million requests as a CSV of a thousand
//! volumes, as blkparse's text, and as blktrace's files of one, two and eight processors.

use std::fs::{File, write};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use criterion::{BenchmarkId, Criterion, Throughput};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::replay::{Batch, Format, open};

const EVENTS: u64 = 2_000_000;

fn csv(path: &Path) {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut out = BufWriter::new(File::create(path).expect("there is room"));
    let mut time = 1_577_808_000_000_046u64;
    for _ in 0..EVENTS {
        time += rng.random_range(0..100);
        let (device, op) = (
            rng.random_range(0..1000),
            ["R", "W"][rng.random_range(0..2)],
        );
        let (offset, length) = (
            rng.random_range(0..10_000_000u64) * 4096,
            4096 * rng.random_range(1..32),
        );
        writeln!(out, "{device},{op},{offset},{length},{time}").expect("there is room");
    }
}

fn blkparse(path: &Path) {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut out = BufWriter::new(File::create(path).expect("there is room"));
    for i in 0..EVENTS {
        let (sector, op) = (
            rng.random_range(0..10_000_000u64) * 8,
            ["R", "WS"][rng.random_range(0..2)],
        );
        let (seconds, rest) = (i / 100_000, i % 100_000 * 10_000);
        writeln!(
            out,
            "254,1    0 {i:8} {seconds:5}.{rest:09}   161  Q {op:>3} {sector} + 8 [fio]"
        )
        .expect("there is room");
    }
}

fn blktrace(base: &Path, cpus: u64) -> PathBuf {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut files = vec![Vec::new(); cpus as usize];
    for time in 0..EVENTS {
        let cpu = rng.random_range(0..cpus);
        let file = &mut files[cpu as usize];
        let sequence = file.len() as u32 / 48 + 1;
        file.extend(0x6561_7407u32.to_le_bytes());
        file.extend(sequence.to_le_bytes());
        file.extend((time * 1000).to_le_bytes());
        file.extend((rng.random_range(0..10_000_000u64) * 8).to_le_bytes());
        let action = 1 | 1u32 << 16 << rng.random_range(0..2);
        let fields = [4096, action, 161, 254 << 20 | 1, cpu as u32, 0];
        file.extend(fields.map(u32::to_le_bytes).concat());
    }
    for (cpu, file) in files.into_iter().enumerate() {
        write(base.with_extension(format!("blktrace.{cpu}")), file).expect("there is room");
    }
    base.with_extension("blktrace.0")
}

/// Reads a trace to its end; how many requests it has.
fn read(path: &Path, format: &str) -> u64 {
    let format: Format = format.parse().expect("a format");
    let (_, mut reader) = open(&[path.into()], Some(format), false).expect("it is there");
    let mut batch = Batch::default();
    while reader.read(&mut batch).expect("it is sound") {}
    reader.notes().events
}

fn main() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    csv(&path("csv"));
    blkparse(&path("blkparse"));
    let mut traces = vec![
        ("alibaba", String::new(), path("csv")),
        ("blkparse", String::new(), path("blkparse")),
    ];
    for cpus in [1, 2, 8] {
        let file = blktrace(&path(&format!("of-{cpus}")), cpus);
        traces.push(("blktrace", format!("{cpus} processors"), file));
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("read");
    group
        .sample_size(10)
        .throughput(Throughput::Elements(EVENTS));
    for (format, name, path) in &traces {
        group.bench_function(BenchmarkId::new(*format, name), |bencher| {
            bencher.iter(|| assert_eq!(read(path, format), EVENTS));
        });
    }
    group.finish();
    criterion.final_summary();
}
