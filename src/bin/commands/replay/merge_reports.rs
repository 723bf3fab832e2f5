//! `thin_replay merge-reports`: reports of parts as one.

use std::collections::HashSet;
use std::path::PathBuf;

use thintools::replay::merge;

use super::outputs::Outputs;
use super::saved;
use crate::exit::Exit;

/// The command line.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// Reports of --json, of replays that each had a pool of its own. A file may have several, also on lines. - is standard input.
    #[arg(value_name = "REPORT", required = true)]
    reports: Vec<PathBuf>,

    #[command(flatten)]
    outputs: Outputs,
}

/// Writes what the reports are together.
pub(crate) fn run(args: &Args) -> anyhow::Result<Exit> {
    if let Some(wrong) = args.outputs.contradiction() {
        return Ok(super::usage(wrong));
    }
    let mut named = HashSet::new();
    if let Some(twice) = args.reports.iter().find(|&path| !named.insert(path)) {
        let wrong = format!("{} is named twice, and would count twice", twice.display());
        return Ok(super::usage(wrong));
    }
    args.outputs.refuse_early()?;
    let merged = merge(&saved::read(&args.reports)?)?;
    let text = merged.to_string();
    args.outputs.write(&[merged], &text)?;
    Ok(Exit::Ok)
}
