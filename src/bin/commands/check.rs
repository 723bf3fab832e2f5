//! `thin_check`: is the metadata of a pool sound, and can it be made so in place?

use std::path::PathBuf;

use anyhow::Context;
use thintools::ErrorKind;
use thintools::io::{Access, open_read, open_write};
use thintools::tools::check::{CheckOptions, Code, Report, Scope, Severity, check, fix};
use thintools::units::MetadataBlock;

use super::{Compat, Page};
use crate::exit::Exit;
use crate::output;
use crate::session::{Session, exit_for};

/// The name of the command.
pub(crate) const NAME: &str = "thin_check";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Check the metadata of a thin pool";

/// The text of the manual page.
pub(crate) const PAGE: Page = Page {
    description: &[
        "thin_check checks the metadata of a thin pool. It reads the superblock, the tree of \
         device details and the mapping trees, counts how often each metadata block and each data \
         block is used, and compares the counts with the two space maps. It writes nothing unless \
         --auto-repair or --clear-needs-check-flag is given.",
        "Lines TRANSACTION_ID=N and METADATA_FREE_BLOCKS=N are printed on standard output. Every \
         damage found is a line on standard error, in the order of the blocks, with a code that \
         stays the same from version to version. At the end thin_check says what the kernel would \
         do with the pool in this state, and which command to run next. The needs_check flag, \
         which the kernel sets after a failed metadata operation and which keeps a pool from \
         being used for writing, is reported whenever it is set.",
        "Damage is of three kinds, and the exit status tells them apart. Leaked blocks are counted \
         more often than they are used: space is lost, nothing else; a crash of a healthy pool \
         leaves such leaks. Repairable damage is a wrong counter of a space map, or a snapshot \
         clock behind its mappings. --auto-repair corrects both in place. Everything else is \
         fatal, blocks that are counted too low among it, because their data may be overwritten \
         already: thin_repair writes what can be recovered to another device.",
        "Changes are safe against a crash or a loss of power at any moment: new copies of what \
         changes go to blocks that are not in use and are flushed to the disk, and only then the \
         superblock is written to refer to them, and flushed. To check a pool that is active, \
         reserve a metadata snapshot and give -m. The input of a check that writes nothing may \
         also be a regular file, and an image compressed with zstd, gzip or xz (as of xz -9 at most).",
    ],
    sections: &[
        (
            "OUTPUT",
            &[
                "A line on standard error begins with the severity (note, leak, repairable, fatal) \
                 and the code of the damage (see DAMAGE CODES), followed by the metadata block at \
                 fault, the device if it is one device's own record, the values that are wrong, \
                 and which virtual blocks of which devices are out of reach because of it. Ranges \
                 are written BEGIN..END, END not included; without END there is no upper bound.",
                "With --json standard output is one JSON object instead of the lines for humans: \
                 report has transaction_id, metadata_free_blocks, needs_check, data_sectors, \
                 devices, mappings, damages (each with code, severity, effect, block, device, \
                 affected, more_affected and message) and verdict (severity, activation, kernel, \
                 next); left_out says what was not checked, if something was not; repaired lists \
                 what was changed; exit_status is the exit status. An error before the check (no \
                 such device, not metadata) is a line on standard error only. Programs \
                 should ignore members they do not know; later versions may add some. With \
                 --quiet nothing is printed, --json or not.",
            ],
        ),
        (
            "LVM",
            &[
                "LVM runs thin_check -q --clear-needs-check-flag when it activates a pool and \
                 stops at any exit status but 0. With these options leaks and wrong counters are \
                 corrected, and needs_check is cleared, if nothing else is wrong. If the metadata \
                 device is too full for corrected space maps beside the old ones, nothing is \
                 changed and the status tells of the leaks: extend the metadata device.",
                "With --skip-mappings or --super-block-only as well, a needs_check flag that is \
                 set stays set, and the exit status is 4: the flag is there to have everything \
                 checked. thin_check 1.3.3 cleared it unseen.",
            ],
        ),
    ],
    examples: &[
        (
            "Check the metadata of an inactive LVM pool, which LVM lets be activated for reading:",
            &[
                "lvchange -ay -y vg/pool_tmeta",
                "thin_check /dev/vg/pool_tmeta",
                "lvchange -an vg/pool_tmeta",
            ],
        ),
        (
            "Free leaked blocks and correct wrong counters:",
            &["thin_check --auto-repair /dev/mapper/pool_metadata"],
        ),
        (
            "Check a live pool by means of a metadata snapshot:",
            &[
                "dmsetup message vg-pool-tpool 0 reserve_metadata_snap",
                "thin_check -m /dev/mapper/vg-pool_tmeta",
                "dmsetup message vg-pool-tpool 0 release_metadata_snap",
            ],
        ),
    ],
    files: &[(
        "/etc/lvm/lvm.conf",
        "The settings global/thin_check_executable and global/thin_check_options say how LVM runs \
         thin_check when it activates and deactivates a pool.",
    )],
    see_also: &[("lvmthin", "7"), ("dmsetup", "8"), ("lvm.conf", "5")],
};

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The metadata device or image to check.
    #[arg(value_name = "INPUT")]
    pub(crate) input: PathBuf,

    /// Free leaked blocks, correct counters of the space maps and a snapshot clock behind its
    /// mappings, and clear needs_check. Does nothing if there is fatal damage.
    #[arg(
        long,
        conflicts_with_all = [
            "ignore_non_fatal_errors",
            "metadata_snap",
            "override_mapping_root",
            "override_details_root",
            "super_block_only",
            "skip_mappings",
        ],
    )]
    pub(crate) auto_repair: bool,

    /// Clear the needs_check flag once the check has passed. A check that left something out, by
    /// --super-block-only or --skip-mappings, does not clear it.
    #[arg(
        long,
        conflicts_with_all = [
            "metadata_snap",
            "override_mapping_root",
            "override_details_root",
        ],
    )]
    pub(crate) clear_needs_check_flag: bool,

    /// Do not fail because of leaked blocks and wrong counters; they are still reported.
    #[arg(long)]
    pub(crate) ignore_non_fatal_errors: bool,

    /// Print the result on standard output as JSON.
    #[arg(long)]
    pub(crate) json: bool,

    /// Check the metadata snapshot of a pool, which may be active. Nothing is written.
    #[arg(short, long)]
    pub(crate) metadata_snap: bool,

    /// Use the tree of device details with its root in this block, not the one the superblock
    /// names.
    #[arg(long, value_name = "BLOCKNR")]
    pub(crate) override_details_root: Option<u64>,

    /// Use the mapping tree with its root in this block, not the one the superblock names.
    #[arg(long, value_name = "BLOCKNR")]
    pub(crate) override_mapping_root: Option<u64>,

    /// Print nothing; only the exit status tells the result.
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// Leave out the mapping trees of the devices, which take most of the time, and the space
    /// maps, which cannot be compared without them.
    #[arg(long)]
    pub(crate) skip_mappings: bool,

    /// Check the superblock and nothing else.
    #[arg(long)]
    pub(crate) super_block_only: bool,

    /// Options that are ignored.
    #[command(flatten)]
    pub(crate) compat: Compat,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = <Args as clap::Args>::augment_args(clap::Command::new(NAME));
    super::tool(cmd, TITLE, &PAGE)
}

/// Checks the metadata.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let session = Session::new("Checking", args.quiet)?;
    let result = check_and_fix(&args, &session);
    match result {
        // Quiet means quiet: only the exit status tells.
        Err(e) if args.quiet => Ok(e.downcast_ref().map_or(Exit::Failure, exit_for)),
        other => other,
    }
}

/// Checks the metadata, and corrects it if asked to.
fn check_and_fix(args: &Args, session: &Session) -> anyhow::Result<Exit> {
    let wants_fix = args.auto_repair || args.clear_needs_check_flag;
    let engine = if wants_fix {
        open_write(&args.input)?
    } else if args.metadata_snap {
        open_read(&args.input, Access::Live)?
    } else {
        open_read(&args.input, Access::Exclusive)?
    };
    let options = CheckOptions {
        scope: if args.super_block_only {
            Scope::SuperblockOnly
        } else if args.skip_mappings {
            Scope::SkipMappings
        } else {
            Scope::All
        },
        metadata_snap: args.metadata_snap,
        mapping_root: args.override_mapping_root.map(MetadataBlock),
        details_root: args.override_details_root.map(MetadataBlock),
    };
    let checked = check(&*engine, &options, session)?;
    let report = &checked.report;
    if !args.json && !args.quiet {
        print_ids(report)?;
        for damage in &report.damages {
            session.say(&damage.to_string());
        }
    }
    let needs_fix = report.needs_check || report.verdict.severity >= Some(Severity::Leak);
    let mut done = Vec::new();
    let mut exit = exit_of(report, args.ignore_non_fatal_errors);
    if wants_fix && needs_fix && exit != Exit::Fatal && exit != Exit::Failure {
        if options.scope == Scope::All {
            match fix(&*engine, &checked) {
                Ok(actions) => {
                    done = actions;
                    exit = exit_of(&check(&*engine, &options, session)?.report, false);
                }
                Err(e) if e.kind() == ErrorKind::OutputTooSmall => {
                    session.say(&format!("{}: {e}", output::program()));
                }
                Err(e) => return Err(e.into()),
            }
        } else {
            session.say(
                "the needs_check flag stays: it is cleared only when everything was checked; \
                 run again without --skip-mappings and --super-block-only",
            );
            exit = Exit::Repairable;
        }
    }
    if args.json && !args.quiet {
        let all = serde_json::json!({
            "report": report,
            "left_out": left_out(args),
            "repaired": done,
            "exit_status": exit.code(),
        });
        output::stdout_line(&serde_json::to_string_pretty(&all)?).context(STDOUT)?;
    } else {
        print_verdict(report, &done, left_out(args), session);
    }
    Ok(exit)
}

/// The two lines that scripts read.
fn print_ids(report: &Report) -> anyhow::Result<()> {
    if let Some(id) = report.transaction_id {
        output::stdout_line(&format!("TRANSACTION_ID={id}")).context(STDOUT)?;
    }
    if let Some(free) = report.metadata_free_blocks {
        output::stdout_line(&format!("METADATA_FREE_BLOCKS={free}")).context(STDOUT)?;
    }
    Ok(())
}

/// What is said when the two lines cannot be printed.
const STDOUT: &str = "cannot write to standard output";

/// What was left out of a check as asked, so that its result is no verdict on the pool.
fn left_out(args: &Args) -> Option<&'static str> {
    if args.super_block_only {
        Some("only the superblock was checked")
    } else if args.skip_mappings {
        Some("mappings and space maps were not checked")
    } else if args.metadata_snap {
        Some("only the metadata snapshot was checked")
    } else if args.override_mapping_root.is_some() || args.override_details_root.is_some() {
        Some("other roots than the superblock's were checked; the kernel does not use them")
    } else {
        None
    }
}

/// What it all comes to, on standard error.
fn print_verdict(report: &Report, done: &[String], left_out: Option<&str>, session: &Session) {
    let verdict = &report.verdict;
    let found = report
        .damages
        .iter()
        .filter(|d| d.severity > Severity::Note)
        .count();
    let what = match found {
        0 => String::from("no damage"),
        1 => String::from("1 damage"),
        n => format!("{n} damages"),
    };
    if let Some(left_out) = left_out {
        session.say(&format!("{what}; {left_out}"));
        return;
    }
    session.say(&format!(
        "{} devices, {} mappings: {what}",
        report.devices, report.mappings
    ));
    session.say(&format!("kernel: {}", verdict.kernel));
    if let Some(sectors) = report.data_sectors {
        session.say(&format!(
            "kernel: it needs a data device of at least {sectors} sectors"
        ));
    }
    for action in done {
        session.say(&format!("repaired: {action}"));
    }
    if done.is_empty() && !verdict.next.is_empty() {
        session.say(&format!("next: {}", verdict.next));
    }
}

/// The exit status that a report deserves.
fn exit_of(report: &Report, ignore_non_fatal: bool) -> Exit {
    if report.damages.iter().any(|d| d.code == Code::ReadError) {
        return Exit::Failure;
    }
    match report.verdict.severity {
        Some(Severity::Fatal) => Exit::Fatal,
        Some(Severity::Repairable) if !ignore_non_fatal => Exit::Repairable,
        Some(Severity::Leak) if !ignore_non_fatal => Exit::Leaks,
        _ => Exit::Ok,
    }
}
