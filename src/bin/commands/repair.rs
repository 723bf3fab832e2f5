//! `thin_repair`: what can be recovered of damaged metadata, written to a fresh device.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context;
use thintools::io::{Access, open_output, open_read};
use thintools::tools::repair::{RepairReport, recover};
use thintools::tools::{Overridden, Selection, restore};

use super::repair_in_place::{self, InPlace};
use super::{Compat, Overrides, Page};
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// The name of the command.
pub(crate) const NAME: &str = "thin_repair";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Recover damaged thin pool metadata to another device";

/// The text of the manual page.
pub(crate) const PAGE: Page = Page {
    description: &[
        "thin_repair reads damaged metadata of a thin pool, recovers the tree of device details \
         and the mapping trees as far as they can be read, and writes them, with space maps \
         counted anew, to another device or file. The input is never changed; keep it until the \
         recovered pool has proved to be good.",
        "If the superblock or a root it names cannot be used, thin_repair searches all blocks for \
         roots that can, and says which ones it chose and which others there were. Trees that a \
         readable space map says have been freed are not used: they bring deleted devices back \
         and lead to blocks that may belong to others by now. If only such trees are left, nothing \
         is written and the exit status is 5.",
        "It also says which devices were lost, in whole or in part, with the ranges of their \
         blocks. When something is missing from the output, or had to be guessed, the exit status \
         is 4; it is 0 only if the output is complete. lvconvert --repair takes any status but 0 \
         for a failure: in the case of 4, look at the report, and swap the metadata volumes by \
         hand with lvconvert --thinpool POOL --poolmetadata NEWMETA.",
        "A superblock that is lost takes the transaction id, the data block size and the size of \
         the data device with it. Those values can be given as options. The data block size must \
         be the one the pool was made with: with another, every device shows the wrong data.",
        "Everything on the output is overwritten. It needs to be large enough for the recovered \
         metadata, and is best as large as the input. As with thin_restore, its superblock is \
         written last. After a repair, check the output with thin_check and the file systems on \
         the thin devices with their own tools before they are used.",
    ],
    sections: &[
        (
            "JSON OUTPUT",
            &[
                "With --json standard output is one JSON object: report has mapping_root, details_root, \
             why they were chosen, the other candidates, devices (each with dev_id, mappings, \
             expected and the lost ranges), lost_ids, notes and is_complete; mappings is the number \
             of mappings written; exit_status is the exit status. Programs should ignore members \
             they do not know; later versions may add some.",
            ],
        ),
        repair_in_place::SECTION,
    ],
    examples: &[
        (
            "Let LVM repair a pool; it runs thin_repair and swaps the metadata volumes:",
            &["lvconvert --repair vg/pool"],
        ),
        (
            "Repair by hand, and check the result:",
            &[
                "thin_repair -i /dev/vg/damaged -o /dev/vg/newmeta",
                "thin_check /dev/vg/newmeta",
            ],
        ),
        (
            "Repair metadata whose superblock is lost:",
            &[
                "thin_repair -i damaged.img -o /dev/vg/newmeta --transaction-id 42 \\",
                "    --data-block-size 128 --nr-data-blocks 1638400",
            ],
        ),
        repair_in_place::EXAMPLE,
    ],
    files: &[(
        "/etc/lvm/lvm.conf",
        "The settings global/thin_repair_executable and global/thin_repair_options say how \
         lvconvert --repair runs thin_repair.",
    )],
    see_also: &[("lvmthin", "7"), ("lvconvert", "8"), ("lvm.conf", "5")],
};

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Say what --in-place would do, and write nothing.
    #[arg(long, requires = "in_place", conflicts_with_all = ["input", "output"])]
    pub(crate) dry_run: bool,

    /// Repair in place, and undoing it.
    #[command(flatten)]
    pub(crate) in_place: InPlace,

    /// The damaged metadata device or image. It is only read.
    #[arg(short, long, value_name = "FILE", required_unless_present = "in_place")]
    pub(crate) input: Option<PathBuf>,

    /// Print the report on standard output as JSON.
    #[arg(long)]
    pub(crate) json: bool,

    /// The device or file to write the recovered metadata to.
    #[arg(short, long, value_name = "DEV", required_unless_present = "in_place")]
    pub(crate) output: Option<PathBuf>,

    /// Do not show progress.
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// Values that take the place of those in the superblock.
    #[command(flatten)]
    pub(crate) overrides: Overrides,

    /// Options that are ignored.
    #[command(flatten)]
    pub(crate) compat: Compat,

    /// Ignored: older versions of lvconvert pass an argument that is empty.
    #[arg(hide = true, value_name = "IGNORED")]
    ignored: Option<OsString>,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = <Args as clap::Args>::augment_args(clap::Command::new(NAME));
    super::tool(cmd.override_usage(repair_in_place::USAGE), TITLE, &PAGE)
}

/// Repairs the metadata.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let session = Session::new("Repairing", args.quiet)?;
    if let Some(device) = &args.in_place.in_place {
        return repair_in_place::run(device, &args, &session);
    }
    // The parser has seen to both.
    let path = args.input.as_deref().context("no input is given")?;
    let output = args.output.as_deref().context("no output is given")?;
    let input = open_read(path, Access::Exclusive)?;
    let output = open_output(output, Some(path))?;
    let overrides = (&args.overrides).into();
    let recovery =
        recover(&*input, &overrides, &session).with_context(|| path.display().to_string())?;
    let source = recovery.source(&*input, Selection::default(), &session);
    let source = Overridden {
        source: &source,
        overrides,
        observer: &session,
        heard: Default::default(),
    };
    let restored = restore(&source, &*output, &session)?;
    let exit = if recovery.report.is_complete {
        Exit::Ok
    } else {
        Exit::Repairable
    };
    if args.json {
        let all = serde_json::json!({
            "report": recovery.report,
            "mappings": restored.mappings,
            "exit_status": exit.code(),
        });
        output::stdout_line(&serde_json::to_string_pretty(&all)?)
            .context("cannot write to standard output")?;
    } else {
        say_report(&recovery.report, &session);
        session.say(&format!(
            "wrote {} mappings in {} of {} metadata blocks",
            restored.mappings, restored.used_blocks, restored.nr_blocks
        ));
    }
    Ok(exit)
}

/// Says on standard error what was chosen, and everything that is lost.
pub(crate) fn say_report(report: &RepairReport, session: &Session) {
    let details = match report.details_root {
        Some(root) => format!("block {root}"),
        None => String::from("none"),
    };
    session.say(&format!(
        "roots: mappings block {}, details {details}: {}",
        report.mapping_root, report.why
    ));
    for candidate in &report.candidates {
        session.say(&format!("considered: {candidate}"));
    }
    if report.more_candidates > 0 {
        session.say(&format!("considered: {} more", report.more_candidates));
    }
    for note in &report.notes {
        session.say(&format!("note: {note}"));
    }
    for lost in &report.lost_ids {
        session.say(&format!("lost: {lost}"));
    }
    for device in &report.devices {
        let is_whole = device.lost.is_empty() && device.expected == Some(device.mappings);
        if is_whole {
            continue;
        }
        let expected = device
            .expected
            .map_or(String::new(), |n| format!(" of {n}"));
        session.say(&format!(
            "device {}: {}{expected} mappings recovered",
            device.dev_id, device.mappings
        ));
        for lost in &device.lost {
            session.say(&format!("lost: mappings of {lost}"));
        }
    }
    let whole = report.devices.iter();
    let whole = whole.filter(|d| d.lost.is_empty() && d.expected == Some(d.mappings));
    session.say(&format!(
        "{} devices recovered, {} of them whole",
        report.devices.len(),
        whole.count()
    ));
}
