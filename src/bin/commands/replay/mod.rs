//! `thin_replay`: recorded block I/O through the pool engine.

mod args;
mod compare;
mod dry_run;
mod expect;
mod fleet;
mod merge_reports;
mod outputs;
mod play;
mod saved;
mod split;
mod start;
mod trace;
mod values;
mod ways;

use clap::parser::ValueSource;
use clap::{ArgMatches, FromArgMatches};

use super::Page;
use crate::exit::Exit;

pub(super) use values::sectors;

/// The name of the command.
pub(crate) const NAME: &str = "thin_replay";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Play recorded block I/O through a thin pool in memory";

/// The text of the manual page.
pub(crate) const PAGE: Page = Page {
    description: &[
        "thin_replay plays a trace of block I/O through the thin pool engine and reports what \
         became of it: how full the pool gets, what snapshots and discards do, how many requests \
         leave the fast path and why, what the locks cost. The engine does what dm-thin does; no \
         data is moved and no device is needed. Time is virtual: the data device is modelled, \
         and the same trace gives the same report. Without --metadata the pool is a new one in memory. \
         Metadata that is given is only read, as it is needed; what changes is in memory, and with -o in a new file.",
        "With --clock threads the trace is played as fast as it goes instead, by a thread for each \
         of --cpus and one that is the worker, on a data device that takes no time: what the \
         locks cost when somebody else wants them, too, and how many requests a second there \
         are. No two runs are alike then, but the mappings at the end are the same, unless the pool has no space left: \
         who comes first gets the last blocks, and the minute after which writes stop waiting does not pass. \
         A discard keeps its place among the writes; beyond that only requests of one processor \
         keep their order. Of 64 requests one is timed.",
        "Traces are read as they were recorded, compressed with gzip, zstd, xz or bzip2 or not; \
         the format is told from the contents: blktrace's files for each processor, or a dump \
         that blkparse -d made of them; blkparse's text; fio's logs; CSV (msr, alibaba, tencent, \
         spc, or columns that are described); block events of tracefs and perf; biosnoop; \
         vscsiStats; blkreplay's loads; DiskSim; dm-log-writes; the event files of split. Of a blktrace one file is \
         enough, the others are found beside it. - is standard input.",
        "Memory does not grow with the length of a trace: beside what the pool takes it is less than \
         64 MiB, for a trace in one compressed file. Each further one that is compressed adds as much \
         as it refers back, 2 to 8 MiB by default, up to 64 MiB with xz -9. What refers back by more than 32 MiB, \
         of xz 64 MiB, as zstd --ultra and zstd --long make it, is refused: zstd --long=31 -dc or xz -dc \
         expands it in front of a thin_replay that reads standard input. Of a compressed file that ends too early \
         what there is is played, with a warning. The format of a text is that of most of its first 200 lines; a line that \
         is not of it is an error with its number, or counted with --lenient.",
        "Control events change the pool on the way. They are messages in a blktrace that begin \
         with ctl, or lines of the file of --events, with a time in seconds in front, and with ctl or without: create_thin \
         ID, create_snap ID ORIGIN, delete ID, set_transaction_id OLD NEW, reserve_metadata_snap, \
         release_metadata_snap, activate MAJ:MIN ID SECTORS [ORIGIN_SECTORS], deactivate MAJ:MIN, \
         resize SECTORS, which counts from the next resume on, suspend, resume, and phase-end NAME, a mark at which the report has the \
         kernel's status lines. A device may be activated before the message that makes it. What \
         is not known, or has wrong arguments, is left out, counted and told, and so is what the pool refuses.",
    ],
    sections: &[
        (
            "RECORDING",
            &[
                "blktrace records no request beyond the size that a device had when it began: begin again, or make the \
                 device as large as it will be before, if a thin device grows or becomes a larger one. What blkparse makes, \
                 text or dump, has times that count from the first record it was made of: of several devices that were \
                 recorded at the same time make one, with an -i for each, or give their files for each processor.",
                "A thin device of the kernel cuts reads and writes at its block boundaries and at its \
                 max_sectors: a request that is cut does not fill a block, which then is zeroed or copied. \
                 --max-sectors is twice what /sys/block/dm-N/queue/max_sectors_kb says of the thin device. \
                 Where a block is larger than the data device's max_sectors, the kernel makes it a power \
                 of 2 that divides the block.",
            ],
        ),
        (
            "COLUMNS",
            &[
                "--format csv: describes any text of columns with commas between them, as in \
             csv:dev=0,op=1,off=2:bytes,len=3:bytes,ts=4:us,read=R,write=W, which is alibaba. Columns count from 0. op, off and len \
             have to be named, and the words of the operations.",
                "dev is the column of the device, or several that are next to each other, as dev=1-2, which then are the name together; \
             without it there is one device. off and len are where a request begins and how long it is, in bytes, sectors of 512 bytes, or kib; \
             ts is its time in ns, us, ms, s (which may all have a fraction), filetime (100 ns since 1601) or whole-s \
             (seconds, over which the requests of each are spread). Bytes, and ns, if no unit is named.",
                "read, write, discard and flush are the words of the column op for these, as read=R or discard=4; capital letters and \
             small ones are the same. Other words are errors, or counted with --lenient.",
            ],
        ),
        (
            "VERIFYING",
            &[
                "With --verify there is a model of the data beside the pool. The data device begins full of somebody \
         else's data. Every read has to find what was written last, or either of what is under way at once; what was never written \
         is zeros, or what the external origin has, and with skip_block_zeroing anything once it is mapped; \
         a discard of a whole block is a hint. Every device is looked at as a whole in the end and before it is deleted. \
         What is wrong is told with device, sector, what was found and what was expected, and the exit status is 6. \
         Where the metadata failed, what was not committed is lost, and nothing is looked at any more.",
            ],
        ),
        (
            "REPORTS",
            &[
                "A report says what became of the trace in verdicts, each with the clock that its numbers are \
             of: virtual, the time of the trace on a modelled device, or threads, that of this machine. None of \
             the files exists before; - is standard output, for one of them.",
                "JSON has everything, with the schema thintools-replay/1; histograms are those of HdrHistogram \
             (V2, compressed, base64) beside their percentiles, so that reports merge without loss. CSV has a row for \
             each sample of the timeline, counts being those since the start. JSON lines have the \
             field kind: sample, mark, notice, or summary for all the rest. The HTML page needs nothing \
             else, no script and no network. If there are several devices, JSON and HTML have heat maps of each: of the \
             8 with most requests among the first 16, or, merged, among all.",
                "A report names the trace, the thin devices that its devices were, the seed and the modelled device. Bios that still wait \
             when all is over, and those that failed, are told first among the failures; they count neither as written nor in latencies. \
             Nothing is forecast of a trace without times, by the clock of threads, or once the metadata failed.",
                "compare sets reports of the same trace side by side, as several ways to play it are. What did not do all that was asked \
             for, since it failed, waits to the end, or was interrupted, is told and not compared: who stops writing writes least. merge-reports makes one report of those of \
             parts, each of which had a pool of its own: counts add up, timelines are laid over each other, \
             and the forecast is that of the first pool to fill.",
                "When it is interrupted, thin_replay reports how far it came, marked as incomplete; a second signal \
             ends it at once.",
            ],
        ),
        (
            "FLEETS",
            &[
                "split makes an event file for each volume of a trace, however many take turns in it, with \
                 bounded memory and open files; last comes manifest.jsonl, a volume on each line. Event files are traces \
                 like any other. Control events are in a file of their own, which the manifest names with \
                 each volume. Times are those of the whole trace.",
                "With --manifest each volume is played in a pool of its own, with the other options \
                 given, and has a report of its own in the folder of --reports; those of --pools share \
                 pools. A report is there when it is complete, so that --resume goes on \
                 wherever the replay was interrupted, unless there is a report that was made with other options. --shard I/N plays a part; all N parts are the whole fleet, \
                 on as many machines. Each of the pools that are played at once, --jobs of them, takes memory as large as \
                 --metadata-size says. A volume that cannot be read spares the others; the exit status tells. \
                 The folder recipes of the sources has ways to do this with GNU parallel, SLURM, \
                 Kubernetes and Spark.",
            ],
        ),
        (
            "SIZES AND TIMES",
            &[
                "Sizes are numbers with s for sectors of 512 bytes, k, m, g or t; without a letter, \
             bytes. Times are numbers, 1.5 for example, with s, m, h or d; without a letter, seconds.",
            ],
        ),
    ],
    examples: &[
        (
            "Which locking scheme would hand the fewest requests to the worker?",
            &["thin_replay --locks 2013,kernel,a,b,optimistic thin.blktrace.0"],
        ),
        (
            "What do the locks of each cost two threads that submit?",
            &[
                "thin_replay --clock threads --cpus 2 --locks 2013,kernel,a,b,optimistic thin.blktrace.0",
            ],
        ),
        (
            "How many cells does it take until nobody waits for one in a cycle, if they are taken one by one?",
            &["thin_replay --clock threads --cell-pool 2,4,8,16 thin.blktrace.0"],
        ),
        (
            "What would hourly snapshots cost, of which a day's worth is kept?",
            &[
                "thin_replay --snap-every 1h --snap-keep 24 --data-size 1t --format msr web_0.csv.gz",
            ],
        ),
        (
            "Which block size?",
            &[
                "thin_replay --block-size 64k --json 64k.json thin.blktrace.0",
                "thin_replay --block-size 256k --json 256k.json thin.blktrace.0",
                "thin_replay compare 64k.json 256k.json",
            ],
        ),
        (
            "What do a thousand volumes come to together?",
            &[
                "thin_replay split --output fleet io_traces.csv",
                "thin_replay --manifest fleet/manifest.jsonl --reports reports --metadata-size 16m",
                "thin_replay merge-reports --json all.json --html all.html reports/*.json",
            ],
        ),
        (
            "What do these hours of load do to the pool that is there?",
            &[
                "thin_replay --metadata meta.img --map 252:2=0:100g --json report.json thin.blktrace.0",
            ],
        ),
    ],
    files: &[],
    see_also: &[("blktrace", "8"), ("blkparse", "1"), ("fio", "1")],
};

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = <Args as clap::Args>::augment_args(clap::Command::new(NAME));
    // A manifest stands for its traces.
    let cmd = cmd.mut_arg("traces", |arg| {
        arg.required(false).required_unless_present("manifest")
    });
    // What tools share is not given to subcommands.
    super::tool(cmd, TITLE, &PAGE)
        .disable_help_subcommand(true)
        .mut_arg("help", |help| help.global(true))
}

/// The command line.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    beside: Option<Beside>,

    #[command(flatten)]
    fleet: fleet::Args,

    #[command(flatten)]
    play: args::Args,
}

impl Args {
    /// Why options do not go together, if they do not.
    fn contradiction(&self) -> Option<String> {
        self.fleet
            .contradiction()
            .or_else(|| self.play.contradiction())
    }
}

/// What it does beside playing a trace.
#[derive(Debug, clap::Subcommand)]
enum Beside {
    /// Compare reports of the same trace: what differs, and which is better by what
    Compare(compare::Args),
    /// Merge reports of parts that each had a pool of its own, without loss
    MergeReports(merge_reports::Args),
    /// Split a trace of many volumes into a file for each, and a manifest
    Split(split::Args),
}

/// Options that no report depends on.
const BESIDE_THE_POINT: [&str; 13] = [
    "manifest",
    "jobs",
    "reports",
    "resume",
    "shard",
    "dry_run",
    "output",
    "dump_at_marks",
    "json",
    "jsonl",
    "csv",
    "html",
    "quiet",
];

/// All other options that were given.
fn given(matches: &ArgMatches) -> Vec<String> {
    let mut words = Vec::new();
    for option in build().get_opts() {
        let id = option.get_id().as_str();
        let is_given = matches.value_source(id) == Some(ValueSource::CommandLine);
        if !is_given || BESIDE_THE_POINT.contains(&id) {
            continue;
        }
        let name = option.get_long().unwrap_or(id);
        match option.get_action().takes_values() {
            true => words.extend(
                (matches.get_raw(id).into_iter().flatten())
                    .map(|value| format!("--{name}={}", value.display())),
            ),
            false => words.push(format!("--{name}")),
        }
    }
    words
}

/// Says what is wrong with the command line.
fn usage(wrong: String) -> Exit {
    let error = build().error(clap::error::ErrorKind::ArgumentConflict, wrong);
    // If standard error is closed the exit status still tells.
    let _ = error.print();
    Exit::Usage
}

/// Plays a trace, or does what was asked for beside.
pub(crate) fn run(matches: &ArgMatches) -> anyhow::Result<Exit> {
    let mut args = Args::from_arg_matches(matches)?;
    args.play.given = given(matches);
    match &args.beside {
        Some(Beside::Compare(args)) => compare::run(args),
        Some(Beside::MergeReports(args)) => merge_reports::run(args),
        Some(Beside::Split(args)) => split::run(args),
        None if let Some(wrong) = args.contradiction() => Ok(usage(wrong)),
        None => match &args.fleet.manifest {
            Some(manifest) => fleet::run(&args.fleet, manifest, &args.play),
            None => play::run(args.play),
        },
    }
}
