//! Where reports go: the text to standard output, other forms to files that must not exist.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use thintools::io::write_new;
use thintools::replay::{Report, csv, html, jsonl};

use crate::output;

/// The options.
#[derive(Debug, clap::Args)]
pub(super) struct Outputs {
    /// Write the reports to this file as JSON, a list of one or more; - is standard output, as for the other forms.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Write them to this file as JSON lines: one for each sample of the timeline, mark and notice, and a summary.
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,

    /// Write the timelines to this file as CSV.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Write a page with charts to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Something that writes reports in one form.
type Form = fn(&[Report], &mut dyn Write) -> thintools::Result<()>;

impl Outputs {
    fn all(&self) -> impl Iterator<Item = (&Path, Form)> {
        let forms: [(&Option<PathBuf>, Form); 4] = [
            (&self.json, json),
            (&self.jsonl, jsonl),
            (&self.csv, csv),
            (&self.html, html),
        ];
        forms
            .into_iter()
            .filter_map(|(path, form)| Some((path.as_deref()?, form)))
    }

    /// Files that the reports go to.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.all()
            .map(|(path, _)| path)
            .filter(|path| !is_stdout(path))
    }

    /// Why these options do not go together, if they do not.
    pub(super) fn contradiction(&self) -> Option<String> {
        if self.all().filter(|(path, _)| is_stdout(path)).count() > 1 {
            let only = "standard output takes one form of the report; name a file for the others";
            return Some(only.into());
        }
        let files: Vec<&Path> = self.files().collect();
        let twice = files
            .iter()
            .enumerate()
            .find(|(at, path)| files[..*at].contains(path));
        twice.map(|(_, path)| format!("{} is named for two forms of the report", path.display()))
    }

    /// Refuses what could not be written, better now than when everything is done.
    pub(super) fn refuse_early(&self) -> anyhow::Result<()> {
        self.files().try_for_each(refuse_existing)
    }

    /// Writes the reports. Unless a form goes to standard output, `text` does; and that comes first, since a file may have no room.
    pub(super) fn write(&self, reports: &[Report], text: &str) -> anyhow::Result<()> {
        match self.all().find(|(path, _)| is_stdout(path)) {
            Some((_, form)) => {
                let mut out = std::io::BufWriter::new(std::io::stdout().lock());
                let written = form(reports, &mut out).map_err(anyhow::Error::from);
                let written = written.and_then(|()| Ok(out.flush()?));
                written.context("cannot write to standard output")?;
            }
            None => {
                output::stdout_line(text.trim_end()).context("cannot write to standard output")?
            }
        }
        for (path, form) in self.all().filter(|(path, _)| !is_stdout(path)) {
            write_new(path, &mut |out| form(reports, out))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Refuses to overwrite a file.
pub(super) fn refuse_existing(path: &Path) -> anyhow::Result<()> {
    if path.symlink_metadata().is_ok() {
        bail!(
            "{} exists, and is not overwritten; give another name",
            path.display()
        );
    }
    Ok(())
}

fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Writes them as JSON, a list.
pub(super) fn json(reports: &[Report], out: &mut dyn Write) -> thintools::Result<()> {
    let cannot = |e| thintools::Error::io("cannot write the report", e);
    serde_json::to_writer_pretty(&mut *out, reports).map_err(|e| cannot(e.into()))?;
    writeln!(out).map_err(cannot)
}
