//! Readers of traces, against recordings of the real programs and everything that can be wrong with one.

mod events;
mod formats;
mod kernel;
mod nonsense;
mod traps;
mod window;

use std::fs;
use std::path::PathBuf;

use thintools::Result;
use thintools::replay::{Batch, ControlEvent, Format, TraceIo, TraceNotes, TraceOp, open};

/// A whole trace.
#[derive(Debug, PartialEq)]
struct Trace {
    format: String,
    ios: Vec<TraceIo>,
    controls: Vec<ControlEvent>,
    devices: Vec<String>,
    notes: TraceNotes,
}

impl Trace {
    fn count(&self, op: TraceOp) -> usize {
        self.ios.iter().filter(|io| io.op == op).count()
    }

    fn texts(&self) -> Vec<&str> {
        self.controls
            .iter()
            .map(|control| control.text.as_str())
            .collect()
    }

    /// Times of the requests.
    fn times(&self) -> Vec<u64> {
        self.ios.iter().map(|io| io.time_ns).collect()
    }
}

/// A recording, by its name in `testdata/traces`.
fn recorded(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/traces")
        .join(name)
}

fn read_all(paths: &[PathBuf], format: Option<&str>, lenient: bool) -> Result<Trace> {
    let format = format.map(str::parse::<Format>).transpose()?;
    let (format, mut reader) = open(paths, format, lenient)?;
    let mut batch = Batch::default();
    let (mut ios, mut controls) = (Vec::new(), Vec::new());
    while reader.read(&mut batch)? {
        assert!(batch.ios.len() < 200_000, "batches are bounded");
        ios.append(&mut batch.ios);
        controls.append(&mut batch.controls);
    }
    assert!(ios.is_sorted_by_key(|io| io.time_ns));
    assert!(controls.is_sorted_by_key(|control| control.time_ns));
    assert_eq!(reader.notes().events, ios.len() as u64);
    Ok(Trace {
        format: format.to_string(),
        ios,
        controls,
        devices: reader.devices().to_vec(),
        notes: reader.notes().clone(),
    })
}

fn read(name: &str) -> Trace {
    read_all(&[recorded(name)], None, false).expect("the trace is sound")
}

/// Reads a file with this contents.
fn contents(contents: &[u8], format: Option<&str>, lenient: bool) -> Result<Trace> {
    let folder = crate::support::folder();
    let path = folder.path().join("trace");
    fs::write(&path, contents).expect("there is room");
    read_all(&[path], format, lenient)
}

/// Reads a sound text.
fn text(text: &str, format: Option<&str>) -> Trace {
    contents(text.as_bytes(), format, false).expect("the text is sound")
}

/// What is wrong with a text.
fn fault(text: &str, format: Option<&str>) -> String {
    contents(text.as_bytes(), format, false)
        .expect_err("the text is wrong")
        .to_string()
}
