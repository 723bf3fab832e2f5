//! `thin_replay`: recorded block I/O through the pool engine.

mod compare;
mod dry_run;
mod merge_reports;
mod outputs;
mod play;
mod saved;
mod trace;

use super::Page;
use crate::exit::Exit;

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
         and the same trace gives the same report.",
        "With --clock threads the trace is played as fast as it goes instead, by a thread for each \
         of --cpus and one that is the worker, on a data device that takes no time: what the \
         locks cost when somebody else wants them, too, and how many requests a second there \
         are. No two runs are alike then, but the mappings at the end are the same. \
         A discard keeps its place among the writes; beyond that only requests of one processor \
         keep their order. Of 64 requests one is timed.",
        "Traces are read as they were recorded, compressed with gzip, zstd, xz or bzip2 or not; \
         the format is told from the contents: blktrace's files for each processor, or a dump \
         that blkparse -d made of them; blkparse's text; fio's logs; CSV (msr, alibaba, tencent, \
         spc, or columns that are described); block events of tracefs and perf; biosnoop; \
         vscsiStats; blkreplay's loads; DiskSim; dm-log-writes. Of a blktrace one file is \
         enough, the others are found beside it. - is standard input.",
        "Control events change the pool on the way. They are messages in a blktrace that begin \
         with ctl, or lines of the file of --events, with a time in seconds in front: create_thin \
         ID, create_snap ID ORIGIN, delete ID, set_transaction_id OLD NEW, reserve_metadata_snap, \
         release_metadata_snap, activate MAJ:MIN ID SECTORS ORIGIN_SECTORS, deactivate MAJ:MIN, \
         resize SECTORS, suspend, resume, and phase-end NAME, a mark at which the report has the \
         kernel's status lines. What is not known is counted.",
        "Without --metadata the pool is a new one in memory. Metadata that is given is read into \
         memory, as much as it takes, and the file is never changed.",
    ],
    sections: &[(
        "SIZES AND TIMES",
        &[
            "Sizes are numbers with s for sectors of 512 bytes, k, m, g or t; without a letter, \
             bytes. Times are numbers with s, m, h or d; without a letter, seconds.",
        ],
    )],
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
    super::tool(cmd, TITLE, &PAGE).disable_help_subcommand(true)
}

/// The command line.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    beside: Option<Beside>,

    #[command(flatten)]
    play: play::Args,
}

/// What it does beside playing a trace.
#[derive(Debug, clap::Subcommand)]
enum Beside {
    /// Compare reports of the same trace: what differs, and which is better by what
    Compare(compare::Args),
    /// Merge reports of parts that each had a pool of its own, without loss
    MergeReports(merge_reports::Args),
}

/// Plays a trace, or does what was asked for beside.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    match &args.beside {
        Some(Beside::Compare(args)) => compare::run(args),
        Some(Beside::MergeReports(args)) => merge_reports::run(args),
        None => play::run(args.play),
    }
}
