//! `--expect`: what the kernel had at the marks of a trace, from files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use flate2::read::MultiGzDecoder;
use thintools::observer::Observer;
use thintools::replay::{
    Compared, Difference, METADATA_TOLERANCE, MappedRun, Mappings, Mark, Player, compare_mappings,
    compare_status,
};
use thintools::tools::XmlSource;
use thintools::tools::event::{Device, PoolInfo, Run, Sink, Source};
use thintools::units::ThinId;
use thintools::{Error, ErrorKind};

use super::play::file_name;

/// The command line.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// What the kernel had at the mark NAME: a file with what dmsetup status printed of the pool and its thin devices, or thin_dump's
    /// XML, compressed with gzip or zstd or not; or a folder that has status-NAME.txt and phase-NAME.xml, phase-NAME.xml.gz or
    /// phase-NAME.xml.zst for each mark. May be repeated. Status lines, mapped blocks and which of them are shared are compared; what
    /// differs is reported, and the exit status is 6.
    #[arg(long, value_name = "NAME=FILE|DIR", value_parser = expected)]
    expect: Vec<String>,

    /// By how many metadata blocks in use a status may differ from the one expected: the order of requests that were under way at once
    /// decides where nodes split.
    #[arg(long, value_name = "BLOCKS", default_value_t = METADATA_TOLERANCE, requires = "expect")]
    metadata_tolerance: u64,

    /// Compare data blocks and snapshot times, too, which are the same only if requests came one by one.
    #[arg(long, requires = "expect")]
    strict_physical: bool,
}

/// What is expected at which mark, and what came of it.
pub(crate) struct Expectations<'a> {
    args: &'a Args,
    /// By a mark's name as that of a file.
    files: BTreeMap<String, Vec<PathBuf>>,
    met: BTreeSet<String>,
    compared: Compared,
}

impl Args {
    /// None if nothing is expected.
    pub(crate) fn expectations(&self) -> anyhow::Result<Option<Expectations<'_>>> {
        let mut files: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
        for expected in &self.expect {
            let path = Path::new(expected);
            if path.is_dir() {
                for (mark, path) in of_folder(path)? {
                    files.entry(mark).or_default().push(path);
                }
                continue;
            }
            let Some((mark, path)) = expected.split_once('=') else {
                bail!("--expect {expected}: it is neither a folder nor NAME=FILE");
            };
            let path = PathBuf::from(path);
            // Better now than when everything is done.
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
            files.entry(file_name(mark)).or_default().push(path);
        }
        Ok((!self.expect.is_empty()).then(|| Expectations {
            args: self,
            files,
            met: BTreeSet::new(),
            compared: Compared::default(),
        }))
    }
}

fn expected(text: &str) -> Result<String, String> {
    let has_name = text.find('=').is_some_and(|end| end > 0);
    match has_name || Path::new(text).is_dir() {
        true => Ok(text.into()),
        false => Err("it is neither a folder nor NAME=FILE".into()),
    }
}

/// Marks and files of a folder.
fn of_folder(folder: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let shown = || format!("cannot read the folder {}", folder.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(shown)? {
        let path = entry.with_context(shown)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.unwrap_or_default();
        let status = name.strip_prefix("status-");
        let status = status.and_then(|name| name.strip_suffix(".txt"));
        let dump = name.strip_prefix("phase-").and_then(|name| {
            let endings = [".xml", ".xml.gz", ".xml.zst"];
            endings.iter().find_map(|end| name.strip_suffix(end))
        });
        if let Some(mark) = status.or(dump) {
            found.push((mark.to_owned(), path));
        }
    }
    if found.is_empty() {
        bail!(
            "the folder {} has no status-NAME.txt and no phase-NAME.xml",
            folder.display()
        );
    }
    found.sort();
    Ok(found)
}

impl Expectations<'_> {
    /// Compares with what the replay has at a mark.
    pub(crate) fn at_mark(
        &mut self,
        player: &Player,
        mark: &Mark,
        observer: &dyn Observer,
    ) -> thintools::Result<()> {
        let name = file_name(&mark.name);
        for path in self.files.get(&name).into_iter().flatten() {
            let (mut file, is_xml) = open_plain(path)?;
            let differences = match is_xml {
                true => {
                    let expected = read_dump(file, path, player.pool().block_sectors(), observer)?;
                    let found = player.pool().inspect(Mappings::of)?;
                    compare_mappings(&expected, &found, self.args.strict_physical)
                }
                false => {
                    let mut text = Vec::new();
                    let cannot = |e| Error::io(format!("cannot read {}", path.display()), e);
                    file.read_to_end(&mut text).map_err(cannot)?;
                    let text = String::from_utf8_lossy(&text);
                    let differences = compare_status(mark, &text, self.args.metadata_tolerance);
                    differences.ok_or_else(|| {
                        let what = "has no line of dmsetup status for a thin-pool or a thin target";
                        let message = format!("{} {what}", path.display());
                        Error::new(ErrorKind::InvalidDescription, message)
                    })?
                }
            };
            self.compared.add(&mark.name, differences);
        }
        self.met.insert(name);
        Ok(())
    }

    /// What came of it, marks included that the trace does not have.
    pub(crate) fn end(mut self) -> Compared {
        for mark in self.files.keys().filter(|mark| !self.met.contains(*mark)) {
            let missing = Difference {
                device: "trace".into(),
                what: "mark".into(),
                expected: "such a mark".into(),
                found: "none".into(),
            };
            self.compared.add(mark, vec![missing]);
        }
        self.compared
    }
}

/// A file as it was before it was compressed, and whether it is XML.
fn open_plain(path: &Path) -> thintools::Result<(File, bool)> {
    let cannot = |e| Error::io(format!("cannot read {}", path.display()), e);
    let mut file = File::open(path).map_err(cannot)?;
    let mut head = [0; 4];
    let len = file.read(&mut head).map_err(cannot)?;
    file.rewind().map_err(cannot)?;
    let mut packed: Box<dyn Read> = match &head[..len] {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::new(file).map_err(cannot)?),
        _ => Box::new(file),
    };
    let mut plain = tempfile::tempfile().map_err(cannot)?;
    std::io::copy(&mut packed, &mut plain).map_err(cannot)?;
    plain.rewind().map_err(cannot)?;
    let mut head = [0; 1024];
    let len = plain.read(&mut head).map_err(cannot)?;
    plain.rewind().map_err(cannot)?;
    let is_xml = head[..len].trim_ascii_start().first() == Some(&b'<');
    Ok((plain, is_xml))
}

/// The mappings of a dump.
fn read_dump(
    file: File,
    path: &Path,
    block_sectors: u64,
    observer: &dyn Observer,
) -> thintools::Result<Mappings> {
    let mut dump = Dump {
        block_sectors,
        ..Dump::default()
    };
    XmlSource::from_file(file, &path.display().to_string(), observer).emit(&mut dump)?;
    Ok(dump.mappings)
}

/// Runs that a dump may have once its references are replaced by what they refer to: 3 GiB of them.
const MOST_RUNS: usize = 100_000_000;

/// Takes the mappings out of a dump.
#[derive(Default)]
struct Dump {
    block_sectors: u64,
    mappings: Mappings,
    definitions: HashMap<String, Vec<Run>>,
    defining: Option<String>,
    device: ThinId,
    runs: usize,
}

impl Dump {
    fn add(&mut self, runs: &[Run]) -> thintools::Result<()> {
        self.runs += runs.len();
        if self.runs > MOST_RUNS {
            let message = format!("more than {MOST_RUNS} runs of mappings");
            return Err(Error::event(0, "", message));
        }
        for run in runs {
            let run = MappedRun {
                begin: run.thin_begin.0,
                data: run.data_begin.0,
                len: run.length,
                time: run.time,
            };
            self.mappings.add(self.device, run);
        }
        Ok(())
    }
}

impl Sink for Dump {
    fn pool(&mut self, pool: &PoolInfo) -> thintools::Result<()> {
        if u64::from(pool.data_block_size) == self.block_sectors {
            return Ok(());
        }
        let message = format!(
            "data blocks of {} sectors, but those of the replayed pool have {}",
            pool.data_block_size, self.block_sectors
        );
        Err(Error::event(0, "data_block_size", message))
    }

    fn define(&mut self, name: &str) -> thintools::Result<()> {
        self.defining = Some(name.to_owned());
        Ok(())
    }

    fn end_define(&mut self) -> thintools::Result<()> {
        self.defining = None;
        Ok(())
    }

    fn device(&mut self, device: &Device) -> thintools::Result<()> {
        self.device = device.dev_id;
        self.mappings.add_device(device.dev_id);
        Ok(())
    }

    fn end_device(&mut self) -> thintools::Result<()> {
        Ok(())
    }

    fn mappings(&mut self, runs: &[Run]) -> thintools::Result<()> {
        match &self.defining {
            None => self.add(runs),
            Some(name) => {
                let definition = self.definitions.entry(name.clone()).or_default();
                definition.extend_from_slice(runs);
                Ok(())
            }
        }
    }

    fn reference(&mut self, name: &str) -> thintools::Result<()> {
        let Some(runs) = self.definitions.remove(name) else {
            return Err(Error::event(0, "name", format!("{name:?} is not defined")));
        };
        let added = self.add(&runs);
        self.definitions.insert(name.to_owned(), runs);
        added
    }

    fn end(&mut self) -> thintools::Result<()> {
        Ok(())
    }
}
