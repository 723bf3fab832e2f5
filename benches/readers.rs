//! How fast traces are read: `cargo bench --bench readers`, half a minute.
//!
//! The traces are made here, in a temporary folder whose files are in memory by then: two million requests as a CSV of a thousand
//! volumes, as blkparse's text, and as blktrace's files of one, two and eight processors.

#[path = "trace_shapes.rs"]
mod trace_shapes;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use criterion::{BenchmarkId, Criterion, Throughput};
use thintools::replay::{Batch, Format, open};
use trace_shapes::{Records, Shape};

const EVENTS: u64 = 2_000_000;
const RANDOM: Shape = Shape::Random;

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
    let file = |path: &Path| BufWriter::new(File::create(path).expect("there is room"));
    trace_shapes::alibaba(RANDOM, EVENTS, 1000, &mut file(&path("csv"))).expect("there is room");
    trace_shapes::blkparse(RANDOM, EVENTS, &mut file(&path("blkparse"))).expect("there is room");
    trace_shapes::iolog(RANDOM, EVENTS, &mut file(&path("iolog"))).expect("there is room");
    let mut traces = vec![
        ("iolog", String::new(), path("iolog")),
        ("alibaba", String::new(), path("csv")),
        ("blkparse", String::new(), path("blkparse")),
    ];
    for cpus in [1, 2, 8] {
        let names: Vec<_> = (0..cpus)
            .map(|cpu| path(&format!("of-{cpus}.blktrace.{cpu}")))
            .collect();
        let files = names
            .iter()
            .map(|name| Box::new(file(name)) as Box<dyn Write>);
        trace_shapes::blktrace(RANDOM, EVENTS, Records::All, &mut files.collect::<Vec<_>>())
            .expect("there is room");
        traces.push(("blktrace", format!("{cpus} processors"), names[0].clone()));
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
