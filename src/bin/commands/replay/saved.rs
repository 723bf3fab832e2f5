//! Reports that `--json` wrote, read again, each with a name to tell it by.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::Context;
use thintools::replay::Report;

/// Reads the reports of all files, `-` being standard input. Those of a fleet have the names of
/// their volumes; others of a file with several get the words that tell them apart.
pub(super) fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<(String, Report)>> {
    let mut all = Vec::new();
    for path in paths {
        let shown = path.display().to_string();
        let reports = read_file(path).with_context(|| shown.clone())?;
        let is_one = reports.len() == 1;
        // Each of another volume, not of the same in several ways.
        let volumes: HashSet<_> = reports.iter().filter_map(|r| r.volume.as_ref()).collect();
        let is_fleet = volumes.len() == reports.len();
        for (number, report) in reports.into_iter().enumerate() {
            let name = match &report.volume {
                Some(volume) if is_one || is_fleet => volume.clone(),
                _ if is_one => shown.clone(),
                volume => {
                    let of = volume.as_ref().map(|volume| format!("{volume}, "));
                    let of = of.unwrap_or_default();
                    format!("{shown}[{number}] ({of}{})", report.name())
                }
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
