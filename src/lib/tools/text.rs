//! Sinks that print: XML, the human readable form, and JSON lines. Large batches are formatted on all cores.

use super::event::{Device, PoolInfo, Run, Sink};
use crate::error::{Error, Result};
use rayon::prelude::*;
use serde_json::json;
use std::io::Write;
use std::sync::OnceLock;

/// Runs formatted by one core at a time.
const PARALLEL: usize = 4096;

/// How events look. Each method appends to `out`.
pub trait Format: Sync {
    /// The pool.
    fn pool(&self, out: &mut Vec<u8>, pool: &PoolInfo);
    /// The beginning of a definition.
    fn define(&self, out: &mut Vec<u8>, name: &str);
    /// Its end.
    fn end_define(&self, out: &mut Vec<u8>);
    /// The beginning of a device.
    fn device(&self, out: &mut Vec<u8>, device: &Device);
    /// Its end.
    fn end_device(&self, out: &mut Vec<u8>);
    /// A mapping run.
    fn run(&self, out: &mut Vec<u8>, run: &Run);
    /// A reference to a definition.
    fn reference(&self, out: &mut Vec<u8>, name: &str);
    /// The end of the pool.
    fn end(&self, out: &mut Vec<u8>);
}

/// A sink that prints events in a [`Format`].
pub struct TextSink<'a> {
    out: &'a mut dyn Write,
    format: &'a dyn Format,
    pending: Vec<u8>,
    /// Text of a large batch, one part per core's share; kept because fresh memory costs more than the formatting.
    parts: Vec<Vec<u8>>,
}

impl std::fmt::Debug for TextSink<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TextSink")
    }
}

/// Bytes gathered before they are written.
const PENDING: usize = 256 * 1024;

impl<'a> TextSink<'a> {
    /// A sink that prints to `out`.
    pub fn new(out: &'a mut dyn Write, format: &'a dyn Format) -> Self {
        Self {
            out,
            format,
            pending: Vec::new(),
            parts: Vec::new(),
        }
    }

    fn write_full(&mut self) -> Result<()> {
        if self.pending.len() >= PENDING {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        let written = self.out.write_all(&self.pending);
        self.pending.clear();
        written.map_err(|e| Error::io("cannot write the output", e))
    }
}

/// False when rayon's threads cannot be started; text is then formatted by the calling thread.
fn has_threads() -> bool {
    static STARTED: OnceLock<bool> = OnceLock::new();
    *STARTED.get_or_init(|| rayon::ThreadPoolBuilder::new().build_global().is_ok())
}

impl Sink for TextSink<'_> {
    fn pool(&mut self, pool: &PoolInfo) -> Result<()> {
        self.format.pool(&mut self.pending, pool);
        // The first line at once: LVM reads just this one.
        self.write()
    }

    fn define(&mut self, name: &str) -> Result<()> {
        self.format.define(&mut self.pending, name);
        Ok(())
    }

    fn end_define(&mut self) -> Result<()> {
        self.format.end_define(&mut self.pending);
        self.write_full()
    }

    fn device(&mut self, device: &Device) -> Result<()> {
        self.format.device(&mut self.pending, device);
        Ok(())
    }

    fn end_device(&mut self) -> Result<()> {
        self.format.end_device(&mut self.pending);
        self.write_full()
    }

    fn mappings(&mut self, runs: &[Run]) -> Result<()> {
        if runs.len() < 2 * PARALLEL || !has_threads() {
            for run in runs {
                self.format.run(&mut self.pending, run);
            }
            return self.write_full();
        }
        self.write()?;
        let format = self.format;
        let shares = runs.len().div_ceil(PARALLEL);
        self.parts
            .resize_with(shares.max(self.parts.len()), Vec::new);
        runs.par_chunks(PARALLEL)
            .zip(&mut self.parts)
            .for_each(|(runs, part)| {
                part.clear();
                for run in runs {
                    format.run(part, run);
                }
            });
        for part in &self.parts[..shares] {
            self.out
                .write_all(part)
                .map_err(|e| Error::io("cannot write the output", e))?;
        }
        Ok(())
    }

    fn reference(&mut self, name: &str) -> Result<()> {
        self.format.reference(&mut self.pending, name);
        self.write_full()
    }

    fn end(&mut self) -> Result<()> {
        self.format.end(&mut self.pending);
        self.write()?;
        self.out
            .flush()
            .map_err(|e| Error::io("cannot write the output", e))
    }
}

fn put(out: &mut Vec<u8>, parts: &[(&str, u64)], end: &str) {
    let mut digits = itoa::Buffer::new();
    for (text, number) in parts {
        out.extend_from_slice(text.as_bytes());
        out.extend_from_slice(digits.format(*number).as_bytes());
    }
    out.extend_from_slice(end.as_bytes());
}

/// The XML that `thin_restore` of any version reads, as far as it knows `def` and `ref`.
#[derive(Clone, Copy, Debug)]
pub struct Xml;

impl Format for Xml {
    fn pool(&self, out: &mut Vec<u8>, pool: &PoolInfo) {
        out.extend_from_slice(b"<superblock uuid=\"");
        out.extend_from_slice(quick_xml::escape::escape(pool.uuid.as_str()).as_bytes());
        put(
            out,
            &[
                ("\" time=\"", pool.time.into()),
                ("\" transaction=\"", pool.transaction),
            ],
            "\"",
        );
        if pool.flags != 0 {
            put(out, &[(" flags=\"", pool.flags.into())], "\"");
        }
        put(
            out,
            &[
                (" version=\"", pool.version.into()),
                ("\" data_block_size=\"", pool.data_block_size.into()),
                ("\" nr_data_blocks=\"", pool.nr_data_blocks),
            ],
            "\">\n",
        );
    }

    fn define(&self, out: &mut Vec<u8>, name: &str) {
        out.extend_from_slice(b"  <def name=\"");
        out.extend_from_slice(quick_xml::escape::escape(name).as_bytes());
        out.extend_from_slice(b"\">\n");
    }

    fn end_define(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"  </def>\n");
    }

    fn device(&self, out: &mut Vec<u8>, device: &Device) {
        put(
            out,
            &[
                ("  <device dev_id=\"", device.dev_id.0),
                ("\" mapped_blocks=\"", device.mapped_blocks),
                ("\" transaction=\"", device.transaction),
                ("\" creation_time=\"", device.creation_time.into()),
                ("\" snap_time=\"", device.snap_time.into()),
            ],
            "\">\n",
        );
    }

    fn end_device(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"  </device>\n");
    }

    fn run(&self, out: &mut Vec<u8>, run: &Run) {
        // The one hot place: texts of known length are copied without a call.
        let mut digits = itoa::Buffer::new();
        macro_rules! put {
            ($text:literal, $number:expr) => {
                out.extend_from_slice($text);
                out.extend_from_slice(digits.format($number).as_bytes());
            };
        }
        if run.length == 1 {
            put!(b"    <single_mapping origin_block=\"", run.thin_begin.0);
            put!(b"\" data_block=\"", run.data_begin.0);
        } else {
            put!(b"    <range_mapping origin_begin=\"", run.thin_begin.0);
            put!(b"\" data_begin=\"", run.data_begin.0);
            put!(b"\" length=\"", run.length);
        }
        put!(b"\" time=\"", run.time);
        out.extend_from_slice(b"\"/>\n");
    }

    fn reference(&self, out: &mut Vec<u8>, name: &str) {
        out.extend_from_slice(b"    <ref name=\"");
        out.extend_from_slice(quick_xml::escape::escape(name).as_bytes());
        out.extend_from_slice(b"\"/>\n");
    }

    fn end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"</superblock>\n");
    }
}

/// A form to read, not to restore.
#[derive(Clone, Copy, Debug)]
pub struct HumanReadable;

impl Format for HumanReadable {
    fn pool(&self, out: &mut Vec<u8>, pool: &PoolInfo) {
        out.extend_from_slice(format!("begin superblock: {:?}", pool.uuid).as_bytes());
        put(
            out,
            &[
                (", ", pool.time.into()),
                (", ", pool.transaction),
                (", ", pool.flags.into()),
                (", ", pool.version.into()),
                (", ", pool.data_block_size.into()),
                (", ", pool.nr_data_blocks),
            ],
            "\n",
        );
    }

    fn define(&self, out: &mut Vec<u8>, name: &str) {
        out.extend_from_slice(format!("def: {name}\n").as_bytes());
    }

    fn end_define(&self, out: &mut Vec<u8>) {
        out.push(b'\n');
    }

    fn device(&self, out: &mut Vec<u8>, device: &Device) {
        put(
            out,
            &[
                ("device: ", device.dev_id.0),
                ("\nmapped_blocks: ", device.mapped_blocks),
                ("\ntransaction: ", device.transaction),
                ("\ncreation time: ", device.creation_time.into()),
                ("\nsnap time: ", device.snap_time.into()),
            ],
            "\n",
        );
    }

    fn end_device(&self, out: &mut Vec<u8>) {
        out.push(b'\n');
    }

    fn run(&self, out: &mut Vec<u8>, run: &Run) {
        let last = run.length - 1;
        put(
            out,
            &[
                ("    (", run.thin_begin.0),
                ("..", run.thin_begin.0.saturating_add(last)),
                (") -> (", run.data_begin.0),
                ("..", run.data_begin.0.saturating_add(last)),
                ("), ", run.time.into()),
            ],
            "\n",
        );
    }

    fn reference(&self, out: &mut Vec<u8>, name: &str) {
        out.extend_from_slice(format!("    ref: {name}\n").as_bytes());
    }

    fn end(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"end superblock\n");
    }
}

/// One JSON object a line, told apart by `type`.
#[derive(Clone, Copy, Debug)]
pub struct JsonLines;

fn tagged(out: &mut Vec<u8>, kind: &str, fields: &impl serde::Serialize) {
    let mut object = json!({ "type": kind });
    if let (Some(object), Ok(serde_json::Value::Object(fields))) =
        (object.as_object_mut(), serde_json::to_value(fields))
    {
        object.extend(fields);
    }
    out.extend_from_slice(object.to_string().as_bytes());
    out.push(b'\n');
}

impl Format for JsonLines {
    fn pool(&self, out: &mut Vec<u8>, pool: &PoolInfo) {
        tagged(out, "superblock", pool);
    }

    fn define(&self, out: &mut Vec<u8>, name: &str) {
        tagged(out, "def", &json!({ "name": name }));
    }

    fn end_define(&self, out: &mut Vec<u8>) {
        tagged(out, "end_def", &json!({}));
    }

    fn device(&self, out: &mut Vec<u8>, device: &Device) {
        tagged(out, "device", device);
    }

    fn end_device(&self, out: &mut Vec<u8>) {
        tagged(out, "end_device", &json!({}));
    }

    fn run(&self, out: &mut Vec<u8>, run: &Run) {
        put(
            out,
            &[
                ("{\"type\":\"mapping\",\"thin_begin\":", run.thin_begin.0),
                (",\"data_begin\":", run.data_begin.0),
                (",\"length\":", run.length),
                (",\"time\":", run.time.into()),
            ],
            "}\n",
        );
    }

    fn reference(&self, out: &mut Vec<u8>, name: &str) {
        tagged(out, "ref", &json!({ "name": name }));
    }

    fn end(&self, out: &mut Vec<u8>) {
        tagged(out, "end_superblock", &json!({}));
    }
}
