//! `thin_replay split`: a trace of many volumes as an event file for each.

use std::path::PathBuf;

use anyhow::Context;
use thintools::replay::{MANIFEST, bytes, split};

use super::trace::TraceArgs;
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// The command line.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    #[command(flatten)]
    trace: TraceArgs,

    /// The folder for the files and the manifest; it is made if there is none, and must be empty.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,

    /// Print no progress and no warnings; errors and the result are printed.
    #[arg(short, long)]
    quiet: bool,
}

/// Splits the trace.
pub(crate) fn run(args: &Args) -> anyhow::Result<Exit> {
    if let Some(wrong) = args.trace.contradiction() {
        return Ok(super::usage(wrong));
    }
    let session = Session::new("Splitting", args.quiet)?;
    let (_, mut reader) = args.trace.open(&session)?;
    let volumes = split(&mut *reader, &args.output, &session)?;
    let notes = reader.notes();
    let noticed = [
        (notes.lost, "records were lost when the trace was recorded"),
        (
            notes.malformed,
            "lines or records cannot be read and are left out",
        ),
        (
            notes.regressed,
            "times go back and are taken for those before",
        ),
        (notes.is_truncated.into(), "file is cut off"),
    ];
    for (count, what) in noticed.iter().filter(|(count, _)| *count > 0) {
        session.say(&format!("warning: {count} {what}"));
    }
    for warning in &notes.warnings {
        session.say(&format!("warning: {warning}"));
    }
    let size = volumes.iter().map(|volume| volume.file_bytes).sum();
    let path = args.output.join(MANIFEST);
    output::stdout_line(&format!(
        "{} requests of {} volumes in {}: {}",
        notes.events,
        volumes.len(),
        bytes(size),
        path.display()
    ))
    .context("cannot write to standard output")?;
    Ok(Exit::Ok)
}
