//! Reads arbitrary bytes as a trace, in each format and told from the contents, as one file, two that are merged, or those of two
//! processors: nothing may panic, what comes out is in order and has bounds, and lenient reading changes nothing of what is sound.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use thintools::replay::{Batch, ControlEvent, Format, TraceIo, TraceNotes, open};

/// The first one is told from the contents.
const FORMATS: [&str; 18] = [
    "",
    "blktrace",
    "blkparse",
    "iolog",
    "msr",
    "alibaba",
    "tencent",
    "spc",
    "load",
    "disksim",
    "ftrace",
    "biosnoop",
    "vscsi",
    "log-writes",
    "csv:op=0,off=1,len=2,ts=3:s,read=R",
    "csv:dev=1-2,op=3,off=4:kib,len=5:sectors,write=W,discard=D,flush=F",
    "csv:dev=0,op=1,off=2,len=3,ts=4:filetime,read=R,write=W",
    "events",
];
/// A thousand bytes can expand to tens of megabytes.
const MAX_PACKED: usize = 1000;

static FOLDER: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));

type Trace = (Vec<TraceIo>, Vec<ControlEvent>, Vec<String>, TraceNotes);

/// Reads it all; none if it is no trace.
fn read(paths: &[PathBuf], format: &str, is_lenient: bool) -> Option<Trace> {
    let format = (!format.is_empty()).then(|| format.parse::<Format>().expect("a name"));
    let (_, mut reader) = open(paths, format, is_lenient).ok()?;
    let (mut ios, mut controls, mut batch) = (Vec::new(), Vec::new(), Batch::default());
    while reader.read(&mut batch).ok()? {
        assert!(batch.ios.len() < 200_000 && batch.controls.len() < 20_000);
        ios.append(&mut batch.ios);
        controls.append(&mut batch.controls);
    }
    let notes = reader.notes().clone();
    assert!(ios.is_sorted_by_key(|io| io.time_ns));
    assert!(controls.is_sorted_by_key(|control| control.time_ns));
    assert!(notes.warnings.len() < 100);
    for io in &ios {
        assert!((io.device as usize) < reader.devices().len());
        assert!(
            io.sector
                .checked_add(io.sectors)
                .is_some_and(|end| end <= u64::MAX / 512)
        );
    }
    assert_eq!(notes.events, ios.len() as u64);
    Some((ios, controls, reader.devices().to_vec(), notes))
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&how, bytes)) = bytes.split_first() else {
        return;
    };
    let is_packed = matches!(bytes, [0x1f | 0x28 | 0xfd | b'B', ..]);
    let bytes = &bytes[..bytes
        .len()
        .min(if is_packed { MAX_PACKED } else { usize::MAX })];
    let format = FORMATS[usize::from(how & 0x3f) % FORMATS.len()];
    let half = bytes.len() / 2;
    let files: &[(&str, &[u8])] = match how >> 6 {
        0 | 1 => &[("trace", bytes)],
        2 => &[("a", &bytes[..half]), ("b", &bytes[half..])],
        _ => &[
            ("t.blktrace.0", &bytes[..half]),
            ("t.blktrace.1", &bytes[half..]),
        ],
    };
    let mut paths = Vec::new();
    for (name, contents) in files {
        paths.push(FOLDER.path().join(name));
        fs::write(&paths[paths.len() - 1], contents).expect("there is room");
    }
    let strict = read(&paths, format, false);
    let lenient = read(&paths, format, true);
    if strict.is_some() {
        assert!(strict == lenient, "lenient reading differs");
    }
});
