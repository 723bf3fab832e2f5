//! `thin_restore`: metadata made from its description in XML.

use std::path::{Path, PathBuf};

use thintools::io::open_output;
use thintools::tools::{Overridden, XmlSource, restore};

use super::{Compat, Overrides, Page};
use crate::exit::Exit;
use crate::session::Session;

/// The name of the command.
pub(crate) const NAME: &str = "thin_restore";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Write thin pool metadata from an XML description";

/// The text of the manual page.
pub(crate) const PAGE: Page = Page {
    description: &[
        "thin_restore reads a description of thin pool metadata in XML, as thin_dump writes it, \
         and writes that metadata to a device or file. Everything that was on the output before \
         is lost.",
        "The whole XML is validated before the output is touched. If it is not valid, thin_restore \
         names the line, leaves the output as it was and exits with status 5.",
        "Then the blocks of the metadata are written and flushed to the disk, and at the very end \
         the superblock is written and flushed. While this goes on a marker takes the place of \
         the superblock, so that neither the kernel nor these tools take an output that was left \
         half-written for metadata; run thin_restore again in that case.",
        "Take care that the description matches the data device. With metadata that is older than \
         the data, blocks that have been reused since show the data of another device.",
    ],
    sections: &[],
    examples: &[
        (
            "Restore a backup to a new metadata device, and check it:",
            &[
                "thin_restore -i pool.xml -o /dev/vg/newmeta",
                "thin_check /dev/vg/newmeta",
            ],
        ),
        (
            "Copy metadata to a larger device without an intermediate file:",
            &["thin_dump /dev/vg/oldmeta | thin_restore -i - -o /dev/vg/newmeta"],
        ),
        (
            "Restore with the transaction id LVM expects:",
            &["thin_restore -i pool.xml -o /dev/vg/newmeta --transaction-id 42"],
        ),
    ],
    files: &[(
        "/etc/lvm/lvm.conf",
        "The setting global/thin_restore_executable says which thin_restore LVM runs.",
    )],
    see_also: &[("lvmthin", "7"), ("lvconvert", "8"), ("lvm.conf", "5")],
};

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The XML to read; - is standard input.
    #[arg(short, long, value_name = "FILE", required = true)]
    pub(crate) input: PathBuf,

    /// The device or file to write the metadata to.
    #[arg(short, long, value_name = "DEV", required = true)]
    pub(crate) output: PathBuf,

    /// Do not show progress.
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// Values that take the place of those in the XML.
    #[command(flatten)]
    pub(crate) overrides: Overrides,

    /// Options that are ignored.
    #[command(flatten)]
    pub(crate) compat: Compat,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = <Args as clap::Args>::augment_args(clap::Command::new(NAME));
    super::tool(cmd, TITLE, &PAGE)
}

/// Restores the metadata.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let session = Session::new("Restoring", args.quiet)?;
    let source = XmlSource::open(&args.input, &session)?;
    // Standard input may be the very file that is to be written.
    let input = match args.input.as_os_str() {
        name if name == "-" => Path::new("/dev/stdin"),
        _ => &args.input,
    };
    let output = open_output(&args.output, Some(input))?;
    let source = Overridden {
        source: &source,
        overrides: (&args.overrides).into(),
        observer: &session,
        heard: Default::default(),
    };
    restore(&source, &*output, &session)?;
    Ok(Exit::Ok)
}
