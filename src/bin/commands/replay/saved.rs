//! Reports that `--json` wrote, read again, each with a name to tell it by.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::Context;
use thintools::replay::Report;

/// Reads the reports of all files, `-` being standard input. Those of a file with several get the words that tell them apart.
pub(super) fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<(String, Report)>> {
    let mut all = Vec::new();
    for path in paths {
        let shown = path.display().to_string();
        let reports = read_file(path).with_context(|| shown.clone())?;
        let is_one = reports.len() == 1;
        for (number, report) in reports.into_iter().enumerate() {
            let name = match is_one {
                true => shown.clone(),
                false => format!("{shown}[{number}] ({})", report.name()),
            };
            all.push((name, report));
        }
    }
    Ok(all)
}

fn read_file(path: &Path) -> anyhow::Result<Vec<Report>> {
    let mut from: Box<dyn Read> = match path.as_os_str() == "-" {
        true => Box::new(io::stdin().lock()),
        false => Box::new(File::open(path).context("cannot open")?),
    };
    Ok(Report::read_all(&mut *from)?)
}
