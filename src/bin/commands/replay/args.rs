//! The command line of `thin_replay TRACE`.

use std::path::{Path, PathBuf};

use thintools::pdata::txn::LockScheme;
use thintools::replay::Clock;
use thintools::units::ThinId;

use super::expect;
use super::outputs::Outputs;
use super::trace::TraceArgs;
use super::values::{Schedule, data_block, feature, mapping, schedule, sectors};

/// Ways to play a trace at once: a thread and a pool each.
const MOST_WAYS: usize = 256;

/// The command line.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) trace: TraceArgs,

    /// Read the trace, say what is in it, and play nothing.
    #[arg(long, conflicts_with_all = ["json", "output", "dump_at_marks"])]
    pub(super) dry_run: bool,

    /// Begin with the pool that this metadata is of.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["block_size", "metadata_size"])]
    pub(super) metadata: Option<PathBuf>,

    /// Begin with a new pool, as without --metadata.
    #[arg(long, conflicts_with = "metadata")]
    create: bool,

    /// Size of a data block of a new pool. With commas several: each is tried.
    #[arg(long, value_name = "SIZES", default_value = "64k", value_parser = data_block, value_delimiter = ',')]
    pub(super) block_size: Vec<u64>,

    /// Memory for blocks of metadata. With commas several: each is tried.
    #[arg(long, value_name = "SIZES", default_value = "32m", value_parser = sectors, value_delimiter = ',')]
    pub(super) cache: Vec<u64>,

    /// Size of the data device; without it, that of the metadata given, or 1 TiB. The pool of metadata that is given grows to it; one that
    /// is larger is refused.
    #[arg(long, value_name = "SIZE", value_parser = sectors)]
    pub(super) data_size: Option<u64>,

    /// Size of the metadata device of a new pool.
    #[arg(long, value_name = "SIZE", default_value = "128m", value_parser = sectors)]
    pub(super) metadata_size: u64,

    /// Free data blocks at which the pool reports that it is low.
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    pub(super) low_water: u64,

    /// A feature of the pool, by the kernel's word; may be repeated.
    #[arg(long, value_name = "WORD", value_parser = feature)]
    pub(super) feature: Vec<String>,

    /// Which thin device a device of the trace is, and how large: 252:3=0, or 252:3=0:10g; may be repeated. Without it every device of
    /// the trace becomes a new, empty one, in order, also in the pool of --metadata, unless control events say what they are.
    #[arg(long, value_name = "DEV=ID[:SIZE]", value_parser = mapping)]
    pub(super) map: Vec<(String, ThinId, Option<u64>)>,

    /// Which blocks are mapped before the trace begins: none, or read-before-write, those that it reads before it writes them. For that
    /// the trace is read twice.
    #[arg(long, value_name = "BLOCKS", value_enum, default_value_t)]
    pub(super) prefill: Fill,

    /// Largest read or write that the thin device gets at once.
    #[arg(long, value_name = "SECTORS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) max_sectors: Option<u64>,

    /// Control events: on each line a time in seconds and the event. Without --map, and without activate and create_thin among them, the
    /// devices of the trace become thin devices all the same.
    #[arg(long, value_name = "FILE")]
    pub(super) events: Option<PathBuf>,

    /// Snapshot every device so often. With commas several, or never: each is tried.
    #[arg(long, value_name = "TIMES", value_parser = schedule, value_delimiter = ',')]
    pub(super) snap_every: Vec<Schedule>,

    /// Keep so many snapshots of each device.
    #[arg(long, value_name = "N", default_value_t = 24, requires = "snap_every")]
    pub(super) snap_keep: usize,

    /// Locking schemes: 2013, kernel, a, b, optimistic. With commas several: each is tried. Of whatever is given several of, each goes
    /// with each of the others: the trace is read once and played by all of them at the same time (by the clock of threads one after the other), and a table
    /// compares them.
    #[arg(
        long,
        value_name = "SCHEMES",
        default_value = "kernel",
        value_delimiter = ','
    )]
    pub(super) locks: Vec<LockScheme>,

    /// Whose time it is: virtual, in which one thread plays and the same trace gives the same report; or threads, in which the trace is
    /// played as fast as it goes, on real threads and with real locks, and the data device takes no time.
    #[arg(long, value_name = "CLOCK", default_value = "virtual")]
    pub(super) clock: Clock,

    /// Take cells one by one, each when it is needed, of a pool of so many, as in 2013: the report says whether they were waited for
    /// in a cycle. With several numbers, and commas, the trace is played with each, and then with cells that are reserved.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    pub(super) cell_pool: Vec<u32>,

    /// Processors that submit, a thread each by the clock of threads.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) cpus: u16,

    /// Verify that every read finds what was written before, and at the end that every thin device has what it has to have. Beside the
    /// pool there is a model of its data, which takes 8 bytes of memory for each sector of a block that is written in parts; with N it
    /// is of one virtual block in N. By the virtual clock.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) verify: Option<u32>,

    /// Vary how long the modelled data device takes, by up to an eighth and not on average, and so in which order requests end. The same
    /// number gives the same report.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) seed: u64,

    /// Keep the metadata of the pool at the end in this file, which must not exist.
    #[arg(short, long, value_name = "FILE")]
    pub(super) output: Option<PathBuf>,

    /// At each mark, dump the metadata as NAME.xml into this folder, NAME.2.xml and so on if there are several of a name. It is made if
    /// there is none, and must be empty.
    #[arg(long, value_name = "DIR")]
    pub(super) dump_at_marks: Option<PathBuf>,

    #[command(flatten)]
    pub(super) expect: expect::Args,

    #[command(flatten)]
    pub(super) outputs: Outputs,

    /// Print no progress and no warnings; errors and the report are printed.
    #[arg(short, long)]
    pub(super) quiet: bool,

    /// What of all this was given that a report depends on.
    #[arg(skip)]
    pub(super) given: Vec<String>,
}

/// What is mapped before a trace begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Fill {
    /// Nothing.
    #[default]
    None,
    /// What the trace reads before it writes it.
    ReadBeforeWrite,
}

impl Args {
    /// Why options do not go together, if they do not.
    pub(super) fn contradiction(&self) -> Option<String> {
        if let Some(wrong) = self.outputs.contradiction() {
            return Some(wrong);
        }
        let is_also = |path: &&PathBuf| self.outputs.files().any(|file| file == path.as_path());
        if let Some(path) = self.output.as_ref().filter(is_also) {
            let path = path.display();
            return Some(format!(
                "{path} is named for the metadata and for the report"
            ));
        }
        if self.output.as_deref() == Some(Path::new("-")) {
            return Some("-o: the metadata is kept in a file, not on standard output".into());
        }
        if let Some(wrong) = self.trace.contradiction() {
            return Some(wrong);
        }
        if self.clock == Clock::Threads && (self.verify.is_some() || self.seed != 0) {
            return Some("--verify and --seed are for the virtual clock".into());
        }
        let one = self.output.is_some() || self.dump_at_marks.is_some();
        match self.ways().len() {
            2.. if one => {
                return Some("-o and --dump-at-marks are for one way of playing the trace".into());
            }
            ways if ways > MOST_WAYS => {
                let most = format!("{MOST_WAYS} are possible");
                return Some(format!("{ways} ways to play the trace at once; {most}"));
            }
            _ => {}
        }
        let data_size = self.data_size.filter(|_| self.metadata.is_none())?;
        let small = self.block_size.iter().find(|&&size| data_size < size);
        small.map(|block_size| {
            format!("--data-size of {data_size} sectors has no room for a block of {block_size}")
        })
    }
}
