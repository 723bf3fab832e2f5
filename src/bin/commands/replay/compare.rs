//! `thin_replay compare`: reports of the same trace beside each other.

use std::path::PathBuf;

use anyhow::{Context, bail};
use thintools::replay::compare;

use super::saved;
use crate::exit::Exit;
use crate::output;

/// The command line.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// Reports of --json; the others are compared with the first. A file may have several.
    #[arg(value_name = "REPORT", required = true)]
    reports: Vec<PathBuf>,
}

/// Prints the comparison.
pub(crate) fn run(args: &Args) -> anyhow::Result<Exit> {
    let reports = saved::read(&args.reports)?;
    if reports.len() < 2 {
        bail!("there is one report only, and nothing to compare it with");
    }
    output::stdout_line(compare(&reports).trim_end()).context("cannot write to standard output")?;
    Ok(Exit::Ok)
}
