//! `thin_repair`: what can be recovered of damaged metadata, written to a fresh device.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context;
use thintools::io::{Access, open_output, open_read};
use thintools::tools::repair::{
    Candidate, Evidence, Options, RecoveredDevice, RepairReport, list_candidates, recover,
};
use thintools::tools::{Overridden, Selection, restore};
use thintools::units::MetadataBlock;

use super::repair_in_place::{self, InPlace};
use super::repair_undelete::{self, UndeleteArgs};
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
            "DELETED DEVICES",
            &[
                "The blocks of a deleted device's trees stay on the metadata device until others take \
                 their place. --undelete without an id lists every device that an older state of the pool has \
                 and the current one has not, from the latest state in which its tree is whole, with \
                 what became of its mappings. Shared: a current device has the same data block in the \
                 same place, as snapshots do, so it was never freed. Free: nobody maps the data block \
                 now; what it holds is not guaranteed, since it may have been discarded, or used by \
                 others and freed again. Reused: others have the data block by now. Doubtful: a leaf of \
                 the tree may have been written after the device was deleted. A device that is listed \
                 with a later version was written to after that state.",
                "--undelete ID writes the current state with that device added, under its old id or \
                 under the one that --as gives; without the mappings that are reused or doubtful, for \
                 they would show the data of other devices. --from takes another state than the latest; \
                 --dry-run writes nothing. All blocks of the device count as shared with snapshots, and \
                 a metadata snapshot is not kept. The exit status is 0 if all mappings are back, and 4 \
                 if some are left out, or if only an older version of the device is left and --from did \
                 not ask for it. The current state has to be whole.",
                "Deactivate the pool as soon as the loss is noticed: each transaction may overwrite what \
                 is left, and with discards passed down the data is gone at once. LVM does not know of a \
                 device that comes back; vgcfgrestore has older versions of its records, or it is \
                 activated by hand, with its size from there: dmsetup create NAME --table '0 SECTORS \
                 thin POOL ID'. Where another pool's metadata lay on the same device before, its devices \
                 may be listed too.",
            ],
        ),
        (
            "JSON OUTPUT",
            &[
                "With --json standard output is one JSON object: report has mapping_root, details_root, \
                 why they were chosen, the other candidates, devices (each with dev_id, mappings, \
                 expected and the lost ranges), lost_ids, notes and is_complete; mappings is the number \
                 of mappings written; exit_status is the exit status. Programs should ignore members \
                 they do not know; later versions may add some.",
                "With --undelete and no id it has deleted, with devices (dev_id, transaction, creation_time, \
                 mapping_root, mapped_blocks, is_whole, is_latest, end, remains with free, shared, reused \
                 and doubtful, id_is_taken, other_versions), more_devices and older_versions; with \
                 an id it has undeleted, one such device, new_id, left_out, the ranges of virtual \
                 blocks, and mappings.",
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
            "See what is left of deleted devices, and brings one back:",
            &[
                "thin_repair --undelete -i /dev/vg/meta",
                "thin_repair --undelete 7 -i /dev/vg/meta -o /dev/vg/newmeta",
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
    /// Write nothing: only report what would be recovered.
    #[arg(long, conflicts_with = "output")]
    pub(crate) dry_run: bool,

    /// Take in what is in doubt, where it is likeliest to belong. Without it, that is left out and listed.
    #[arg(long)]
    include_ambiguous: bool,

    /// Repair in place, and undoing it.
    #[command(flatten)]
    pub(crate) in_place: InPlace,

    /// The damaged metadata device or image. It is only read.
    #[arg(short, long, value_name = "FILE", required_unless_present = "in_place")]
    pub(crate) input: Option<PathBuf>,

    /// Print the report on standard output as JSON.
    #[arg(long)]
    pub(crate) json: bool,

    /// List the states of the pool that the device still holds, the likeliest last one first, and write nothing.
    #[arg(long, conflicts_with_all = ["output", "dry_run", "include_ambiguous", "roots"])]
    list_candidates: bool,

    /// The device or file to write the recovered metadata to.
    #[arg(short, long, value_name = "DEV", required_unless_present_any = ["dry_run", "list_candidates", "in_place", "undelete"])]
    pub(crate) output: Option<PathBuf>,

    /// Do not show progress.
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// Use the trees with these roots (block numbers of the top-level tree and of the details tree), whatever the superblock
    /// says.
    #[arg(long, value_name = "MAPPING,DETAILS", value_parser = roots)]
    roots: Option<(MetadataBlock, MetadataBlock)>,

    /// Devices that were deleted.
    #[command(flatten)]
    undelete: UndeleteArgs,

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

fn roots(text: &str) -> Result<(MetadataBlock, MetadataBlock), String> {
    let number = |text: &str| text.trim().parse().map(MetadataBlock).ok();
    let pair = text
        .split_once(',')
        .and_then(|(m, d)| number(m).zip(number(d)));
    pair.ok_or_else(|| String::from("two block numbers with a comma between them are needed, as --list-candidates shows them"))
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
    // The parser has seen to it.
    let path = args.input.as_deref().context("no input is given")?;
    let input = open_read(path, Access::Exclusive)?;
    let name = || path.display().to_string();
    if args.undelete.is_listing() {
        return repair_undelete::list(&*input, args.json, &session).with_context(name);
    }
    if args.list_candidates {
        let report = list_candidates(&*input, &session).with_context(name)?;
        return print_candidates(&report, args.json);
    }
    let output = match &args.output {
        Some(output) => Some(open_output(output, Some(path))?),
        None if !args.dry_run => {
            session.say("--output is needed; --dry-run does without it, and writes nothing");
            return Ok(Exit::Usage);
        }
        None => None,
    };
    if let Some(wanted) = args.undelete.wanted() {
        let output = output.as_deref();
        return repair_undelete::bring_back(&*input, output, &wanted, args.json, &session)
            .with_context(name);
    }
    let overrides = (&args.overrides).into();
    let options = Options {
        overrides,
        roots: args.roots,
        include_ambiguous: args.include_ambiguous,
    };
    let recovery = recover(&*input, &options, &session).with_context(name)?;
    let source = recovery.source(Selection::default(), &session);
    let source = Overridden {
        source: &source,
        overrides,
        observer: &session,
        heard: Default::default(),
    };
    let restored = match &output {
        Some(output) => Some(restore(&source, &**output, &session)?),
        None => None,
    };
    let exit = if recovery.report.is_complete {
        Exit::Ok
    } else {
        Exit::Repairable
    };
    if args.json {
        let all = serde_json::json!({
            "report": recovery.report,
            "mappings": restored.map(|r| r.mappings),
            "exit_status": exit.code(),
        });
        output::stdout_line(&serde_json::to_string_pretty(&all)?)
            .context("cannot write to standard output")?;
        return Ok(exit);
    }
    say_report(&recovery.report, &session);
    session.say(&match restored {
        Some(restored) => format!(
            "wrote {} mappings in {} of {} metadata blocks",
            restored.mappings, restored.used_blocks, restored.nr_blocks
        ),
        None => String::from("nothing was written"),
    });
    Ok(exit)
}

fn print_candidates(report: &RepairReport, json: bool) -> anyhow::Result<Exit> {
    let text = match json {
        true => serde_json::to_string_pretty(&serde_json::json!({
            "candidates": report.candidates,
            "more_candidates": report.more_candidates,
            "exit_status": Exit::Ok.code(),
        }))?,
        false => {
            let mut lines: Vec<String> =
                report.candidates.iter().map(ToString::to_string).collect();
            if report.more_candidates > 0 {
                lines.push(format!("{} more", report.more_candidates));
            }
            if lines.is_empty() {
                lines.push(String::from("no state of a pool was found"));
            }
            lines.join("\n")
        }
    };
    output::stdout_line(&text).context("cannot write to standard output")?;
    Ok(Exit::Ok)
}

/// Ranges of a device that are told one by one.
pub(crate) const SHOWN: usize = 20;

/// Says on standard error what was chosen, and everything that is lost.
pub(crate) fn say_report(report: &RepairReport, session: &Session) {
    let block = |root: Option<MetadataBlock>| {
        root.map_or(String::from("rebuilt"), |r| format!("block {r}"))
    };
    session.say(&format!(
        "roots: mappings {}, details {}: {}",
        block(report.mapping_root),
        block(report.details_root),
        report.why
    ));
    let is_chosen = |c: &&Candidate| Some(c.mapping_root) == report.mapping_root;
    for candidate in report.candidates.iter().filter(|c| !is_chosen(c)).take(3) {
        session.say(&format!("also on the device: {candidate}"));
    }
    if report.candidates.len() > 4 {
        session.say("--list-candidates shows more states that are on the device");
    }
    for mended in report.mended.iter().take(SHOWN) {
        session.say(&format!("mended: block {}: {}", mended.block, mended.mend));
    }
    say_more(report.mended.len(), "mended blocks", session);
    for note in report.notes.iter().take(SHOWN) {
        session.say(&format!("note: {note}"));
    }
    say_more(report.notes.len(), "notes", session);
    for lost in &report.lost_ids {
        session.say(&format!("damaged in the top-level tree: {lost}"));
    }
    report
        .devices
        .iter()
        .for_each(|device| say_device(device, session));
    for ambiguous in report.ambiguous.iter().take(SHOWN) {
        session.say(&format!("left out: {ambiguous}"));
    }
    say_more(report.ambiguous.len(), "subtrees left out", session);
    let whole = report.devices.iter().filter(|d| d.is_whole());
    session.say(&format!(
        "{} devices recovered, {} of them whole",
        report.devices.len(),
        whole.count()
    ));
}

fn say_device(device: &RecoveredDevice, session: &Session) {
    let id = device.dev_id;
    let mut evidence: BTreeMap<Evidence, (u64, u64)> = BTreeMap::new();
    for subtree in &device.reattached {
        let (subtrees, mappings) = evidence.entry(subtree.evidence).or_default();
        *subtrees += 1;
        *mappings += subtree.mappings;
    }
    for (why, (subtrees, mappings)) in evidence {
        session.say(&format!(
            "device {id}: {mappings} mappings in {subtrees} subtrees put back: {why}"
        ));
    }
    if device.is_whole() {
        return;
    }
    let expected = device
        .expected
        .map_or(String::new(), |n| format!(" of {n}"));
    session.say(&format!(
        "device {id}: {}{expected} mappings recovered",
        device.mappings
    ));
    for lost in device.lost.iter().take(SHOWN) {
        session.say(&format!("lost: mappings of {lost}"));
    }
    say_more(device.lost.len(), "lost ranges", session);
    if let (Some(first), Some(last)) = (device.contested.first(), device.contested.last()) {
        session.say(&format!(
            "left out: {} mappings of device {id}, of blocks {first} to {last}: they contradict the data space map",
            device.contested.len()
        ));
    }
}

/// Says how many there are beyond those that were told.
pub(crate) fn say_more(all: usize, what: &str, session: &Session) {
    if all > SHOWN {
        session.say(&format!("and {} more {what}; --json has all", all - SHOWN));
    }
}
