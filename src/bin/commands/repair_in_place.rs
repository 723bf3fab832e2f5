//! `thin_repair --in-place`: damage that spares the mapping trees, put right on the device itself; and how to undo it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};
use thintools::io::{Access, BlockEngine, open_read, open_write};
use thintools::tools::repair::{InPlaceReport, plan_in_place, undo};

use super::repair::{Args, say_report};
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// The forms of the command line.
pub(crate) const USAGE: &str = "thin_repair [OPTIONS] --input <FILE> --output <DEV>
       thin_repair [OPTIONS] --in-place <DEV> --undo-file <FILE>
       thin_repair [OPTIONS] --in-place <DEV> --undo <FILE>";

/// The section of the manual page about repairs in place.
pub(crate) const SECTION: (&str, &[&str]) = (
    "REPAIR IN PLACE",
    &[
        "Where no other device is at hand, --in-place repairs damage that spares the mappings: of \
         either space map, of the device details, and of the superblock. Every node of the \
         mapping trees, and of the tree that leads to them, must be whole; otherwise nothing is \
         written and the exit status is 5. A metadata snapshot is kept if it is whole, and dropped \
         if it is damaged or the superblock was lost. needs_check is cleared. If nothing is wrong, \
         nothing is written, and the exit status is 0. It is 4 if something had to be guessed or \
         made up, as with another device.",
        "What is new is written to blocks that neither the kept trees nor the old superblock lead \
         to, and flushed; then block 0 is written, and flushed. A crash or a loss of power at any \
         moment leaves the old metadata or the new. If block 0 was lost, it gets the roots that \
         were chosen first of all; a repair that was cut short is then run again, with another \
         undo file. If there is no room, nothing is written: extend the metadata device. Before \
         anything is written, the result is checked as thin_check would.",
        "Before that, what is going to be overwritten is saved to the file given with --undo-file, \
         and flushed to the disk. If that fails, the device is left as it was. --undo puts \
         everything back from that file, to the byte. It refuses to if a block has been written to \
         since, by a pool that was activated for instance, and if the file is damaged. An undo \
         that was cut short is run again.",
        "If the superblock is lost, the roots may have to be guessed: have a look with --dry-run \
         first, and rather repair to another device. The values that were lost with it are given \
         as options; they are not used if the superblock can be read.",
        "With --json the object has report (damages as thin_check has them, recovery as above or \
         null, actions in words, blocks written, is_complete), or null if nothing is wrong; \
         undo_file; dry_run; exit_status. With --undo it has undone: the number of blocks in the \
         file, and of those that were not as before.",
    ],
);

/// How a repair in place is done and undone.
pub(crate) const EXAMPLE: (&str, &[&str]) = (
    "Repair space maps in place, having seen what would be done; and undo it:",
    &[
        "thin_repair --in-place /dev/vg/damaged --dry-run",
        "thin_repair --in-place /dev/vg/damaged --undo-file /root/damaged.undo",
        "thin_repair --in-place /dev/vg/damaged --undo /root/damaged.undo",
    ],
);

/// The part of the command line that is about repairs in place.
#[derive(Debug, clap::Args)]
pub(crate) struct InPlace {
    /// Repair the metadata on this device itself, as far as mappings are not damaged. What is
    /// overwritten is saved to the undo file.
    #[arg(long, value_name = "DEV", conflicts_with_all = ["input", "output", "list_candidates", "include_ambiguous", "roots"])]
    pub(crate) in_place: Option<PathBuf>,

    /// Put back what a repair in place has overwritten, from the file that it saved it to.
    #[arg(
        long,
        value_name = "FILE",
        requires = "in_place",
        conflicts_with_all = [
            "input",
            "output",
            "undo_file",
            "transaction_id",
            "data_block_size",
            "nr_data_blocks",
        ],
    )]
    undo: Option<PathBuf>,

    /// The file to save what --in-place overwrites to. There must be none of this name; keep it on
    /// another disk until the pool has proved to be good.
    #[arg(
        long,
        value_name = "FILE",
        requires = "in_place",
        conflicts_with_all = ["input", "output"],
    )]
    undo_file: Option<PathBuf>,
}

/// Why there is no name for the undo file unless one is given.
const NO_UNDO_FILE: &str = "--in-place overwrites parts of the device and saves them first, so that it can be undone: give the \
                            name of a new file on another disk with --undo-file (or --dry-run, to only see what would be done)";

/// Repairs in place, or undoes a repair in place.
pub(crate) fn run(device: &Path, args: &Args, session: &Session) -> anyhow::Result<Exit> {
    match (&args.in_place.undo, &args.in_place.undo_file) {
        (Some(file), _) => put_back(device, file, args, session),
        (None, None) if !args.dry_run => {
            output::stderr_line(&format!("{}: {NO_UNDO_FILE}", output::program()));
            Ok(Exit::Usage)
        }
        (None, file) => repair(device, file.as_deref(), args, session),
    }
}

/// Opens the device, for reading only if nothing shall be written.
fn open(device: &Path, args: &Args) -> thintools::Result<Box<dyn BlockEngine>> {
    if args.dry_run {
        open_read(device, Access::Exclusive)
    } else {
        open_write(device)
    }
}

/// Repairs in place.
fn repair(
    device: &Path,
    undo_file: Option<&Path>,
    args: &Args,
    session: &Session,
) -> anyhow::Result<Exit> {
    let engine = open(device, args)?;
    let shown = || device.display().to_string();
    let plan = plan_in_place(&*engine, &(&args.overrides).into(), session).with_context(shown)?;
    let undo_file = undo_file.filter(|_| !args.dry_run);
    let Some(plan) = plan else {
        session.say("nothing needs to be repaired; nothing was written");
        return finish(args, json!({ "report": null, "undo_file": null }), Exit::Ok);
    };
    say_plan(&plan.report, args, session);
    if let Some(file) = undo_file {
        plan.write(file, session).with_context(shown)?;
        session.say(&format!(
            "wrote {} metadata blocks; to undo it: thin_repair --in-place {} --undo {}",
            plan.report.blocks,
            device.display(),
            file.display()
        ));
    }
    let exit = if plan.report.is_complete {
        Exit::Ok
    } else {
        Exit::Repairable
    };
    let report = json!({
        "report": plan.report,
        "undo_file": undo_file.map(Path::to_string_lossy),
    });
    finish(args, report, exit)
}

/// Says on standard error what is wrong, and what is done about it.
fn say_plan(report: &InPlaceReport, args: &Args, session: &Session) {
    if args.json {
        return;
    }
    for damage in &report.damages {
        session.say(&damage.to_string());
    }
    if let Some(recovery) = &report.recovery {
        say_report(recovery, session);
    }
    let what = if args.dry_run { "dry run" } else { "in place" };
    for action in &report.actions {
        session.say(&format!("{what}: {action}"));
    }
    if args.dry_run {
        session.say(&format!(
            "nothing was written; {} metadata blocks would be",
            report.blocks
        ));
    }
}

/// Undoes a repair in place.
fn put_back(device: &Path, file: &Path, args: &Args, session: &Session) -> anyhow::Result<Exit> {
    let engine = open(device, args)?;
    let undone = undo(&*engine, file, !args.dry_run, session)
        .with_context(|| device.display().to_string())?;
    session.say(&match (undone.changed, args.dry_run) {
        (0, _) => format!(
            "all {} blocks are as they were before the repair; nothing was written",
            undone.blocks
        ),
        (changed, false) => format!(
            "put back {changed} of {} blocks; the metadata is as it was before the repair",
            undone.blocks
        ),
        (changed, true) => format!(
            "nothing was written; {changed} of {} blocks would be put back",
            undone.blocks
        ),
    });
    finish(args, json!({ "undone": undone }), Exit::Ok)
}

/// Prints the report as JSON, if it was asked for.
fn finish(args: &Args, mut report: Value, exit: Exit) -> anyhow::Result<Exit> {
    if args.json {
        report["dry_run"] = args.dry_run.into();
        report["exit_status"] = exit.code().into();
        output::stdout_line(&serde_json::to_string_pretty(&report)?)
            .context("cannot write to standard output")?;
    }
    Ok(exit)
}
