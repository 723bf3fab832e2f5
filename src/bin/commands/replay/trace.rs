//! The trace that the command line names, and which part of it.

use std::fs::{self, FileType};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use thintools::replay::{Format, PlayedTrace, TraceOp, TraceReader, Window, open};

use super::values::time;
use crate::session::Session;

/// Which trace, and what of it.
#[derive(Debug, clap::Args)]
pub(super) struct TraceArgs {
    /// The trace: a file, or several that were recorded at the same time.
    #[arg(value_name = "TRACE", required = true)]
    traces: Vec<PathBuf>,

    /// The format of the trace, if it is not to be told from the contents: events, blktrace, blkparse, iolog, msr, alibaba, tencent, spc, load,
    /// disksim, ftrace, biosnoop, vscsi, log-writes, or csv: and a description of the columns such as
    /// csv:dev=0,op=1,off=2:bytes,len=3:bytes,ts=4:us,read=R,write=W, which the manual page explains.
    #[arg(long, value_name = "FORMAT", default_value = "auto", value_parser = named)]
    format: Named,

    /// Count what cannot be read instead of giving up.
    #[arg(long)]
    lenient: bool,

    /// Leave out the requests before this time of the trace. Control events before it happen at the beginning.
    #[arg(long, value_name = "TIME", value_parser = time)]
    start: Option<Duration>,

    /// Leave out what happened from this time of the trace on.
    #[arg(long, value_name = "TIME", value_parser = time)]
    end: Option<Duration>,

    /// End after so many requests.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,

    /// Only these operations, with commas: read, write, discard, write-zeroes, flush.
    #[arg(long, value_name = "OPS", value_delimiter = ',')]
    only: Option<Vec<TraceOp>>,

    /// All operations but these.
    #[arg(
        long,
        value_name = "OPS",
        value_delimiter = ',',
        conflicts_with = "only"
    )]
    skip: Vec<TraceOp>,
}

/// A format; none is that which the contents are of.
#[derive(Clone, Debug)]
struct Named(Option<Format>);

fn named(text: &str) -> Result<Named, thintools::Error> {
    let format = (text != "auto").then(|| text.parse()).transpose()?;
    Ok(Named(format))
}

impl TraceArgs {
    /// Why options do not go together, if they do not.
    pub(super) fn contradiction(&self) -> Option<String> {
        let (start, end) = (self.start.unwrap_or_default(), self.end?);
        (start >= end).then(|| "--end is not after --start: there is nothing in between".into())
    }

    /// Opens it for another reading.
    pub(super) fn open_again(&self) -> anyhow::Result<Box<dyn TraceReader>> {
        Ok(self.open_part()?.1)
    }

    /// Its files, as a report has them.
    pub(super) fn played(&self, format: &Format) -> PlayedTrace {
        played(&self.traces, format)
    }

    /// Refuses what can be read once only.
    pub(super) fn refuse_streams(&self) -> anyhow::Result<()> {
        for path in &self.traces {
            let kind = fs::metadata(path).map(|m| m.file_type());
            let is_stream =
                |kind: FileType| kind.is_fifo() || kind.is_char_device() || kind.is_socket();
            if path.as_os_str() == "-" || kind.is_ok_and(is_stream) {
                bail!(
                    "{} cannot be read twice, as --prefill and several ways by the clock of threads need it; write the trace to a file and give that",
                    path.display()
                );
            }
        }
        Ok(())
    }

    /// Opens it, and says what it was recognised as.
    pub(super) fn open(&self, session: &Session) -> anyhow::Result<(Format, Box<dyn TraceReader>)> {
        let (format, reader) = self.open_part()?;
        if self.format.0.is_none() {
            session.say(&format!("{format}: {}", format.evidence()));
        }
        Ok((format, reader))
    }

    fn open_part(&self) -> anyhow::Result<(Format, Box<dyn TraceReader>)> {
        self.part_of(&self.traces, self.format.0.clone())
    }

    /// Opens other files with the same part of them left out.
    pub(super) fn part_of(
        &self,
        paths: &[PathBuf],
        format: Option<Format>,
    ) -> anyhow::Result<(Format, Box<dyn TraceReader>)> {
        let (format, reader) = open(paths, format, self.lenient)?;
        let without = match &self.only {
            Some(only) => {
                let all = TraceOp::ALL.into_iter();
                all.filter(|op| !only.contains(op)).collect()
            }
            None => self.skip.clone(),
        };
        let window = Window {
            start: self.start.unwrap_or_default(),
            end: self.end,
            limit: self.limit,
            without,
        };
        Ok((format, window.of(reader)))
    }
}

/// A trace of these files.
pub(super) fn played(files: &[PathBuf], format: &Format) -> PlayedTrace {
    PlayedTrace {
        files: files
            .iter()
            .map(|path| path.display().to_string())
            .collect(),
        format: format.to_string(),
    }
}
