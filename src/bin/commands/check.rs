//! `thin_check`: is the metadata of a pool sound, and can it be made so in place?

use std::path::PathBuf;

use anyhow::anyhow;

use super::{Compat, Page};
use crate::exit::Exit;

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
        "Damage is of three kinds. Leaked blocks are marked as used but used by nothing. Other \
         wrong counters in the space maps can lead to data being overwritten and must be \
         corrected before the pool is used; --auto-repair corrects both kinds in place. Damaged \
         trees cannot be corrected in place: thin_repair writes what can be recovered to another \
         device.",
        "Changes are safe against a crash or a loss of power at any moment: new copies of what \
         changes go to blocks that are not in use and are flushed to the disk, and only then the \
         superblock is written to refer to them, and flushed. To check a pool that is active, \
         reserve a metadata snapshot and give -m. The input of a check that writes nothing may \
         also be a regular file, and an image compressed with zstd or gzip.",
    ],
    sections: &[(
        "JSON OUTPUT",
        &[
            "With --json standard output is one JSON object that has the transaction id, the \
             number of free metadata blocks, whether needs_check is set, every damage with its \
             code, and the verdict, in place of the lines for humans. The exit status is the same \
             with and without --json. Programs should ignore members they do not know; later \
             versions may add some.",
        ],
    )],
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

    /// Correct wrong counters in the space maps and free leaked blocks. Does nothing if there is
    /// damage of any other kind.
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
pub(crate) fn run(_args: Args) -> anyhow::Result<Exit> {
    Err(anyhow!("not wired yet"))
}
