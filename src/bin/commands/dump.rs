//! `thin_dump`: the metadata of a pool as text.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;

use thintools::io::{Access, BlockEngine, open_read, write_replacing};
use thintools::thin::Superblock;
use thintools::tools::event::Source;
use thintools::tools::repair::{Options, recover};
use thintools::tools::{
    MetadataSource, Overridden, Overrides, Selection, TextSink, Trees, held_root, text,
};
use thintools::units::{MetadataBlock, ThinId};

use super::{Compat, Page};
use crate::exit::Exit;
use crate::session::Session;

/// The name of the command.
pub(crate) const NAME: &str = "thin_dump";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Write the metadata of a thin pool as text";

/// The text of the manual page.
pub(crate) const PAGE: Page = Page {
    description: &[
        "thin_dump writes the metadata of a thin pool as text: the devices with their details, \
         and for each device which of its blocks are mapped to which blocks of the data device. \
         The XML it writes by default is what thin_restore reads. The metadata is never changed.",
        "Ranges of mappings that several devices share, as snapshots do, are written once, as def \
         elements, and referred to by ref elements. This keeps the output small and lets \
         thin_restore make the devices share their trees again. With --no-shared every device has \
         all of its mappings written out, which is larger but can be restored by version 0.9 of \
         thin-provisioning-tools, too.",
        "The metadata has to be sound; otherwise thin_dump fails with a message that names the \
         damage. With --repair it reads around damage as thin_repair does, and its exit status is \
         4 if something could not be recovered. To dump a pool that is active, reserve a metadata \
         snapshot and give -m.",
        "With -o the output goes to a temporary file in the same directory, which gets its name \
         when it is complete: the file of that name is either the whole dump or what was there \
         before. The input may be a device or a regular file, and an image compressed with zstd, \
         gzip or xz.",
    ],
    sections: &[(
        "JSON OUTPUT",
        &[
            "With --format json each line is one JSON object, told apart by its member type: \
             superblock, def, end_def, device, mapping, ref, end_device, end_superblock, in the \
             order of the XML and with its values under the same names, but for mapping, which has \
             thin_begin, data_begin, length and time. thin_restore does not read this form. \
             Programs should ignore members and types they do not know; later versions may add \
             some.",
        ],
    )],
    examples: &[
        (
            "Back up the metadata of a live pool:",
            &[
                "dmsetup message vg-pool-tpool 0 reserve_metadata_snap",
                "thin_dump -m -o pool.xml /dev/mapper/vg-pool_tmeta",
                "dmsetup message vg-pool-tpool 0 release_metadata_snap",
            ],
        ),
        (
            "Look at the mappings of the devices 1 and 5:",
            &["thin_dump --format human_readable --dev-id 1 --dev-id 5 metadata.img"],
        ),
        (
            "See what can be recovered from damaged metadata before running thin_repair:",
            &["thin_dump --repair -o recovered.xml metadata.img.zst"],
        ),
    ],
    files: &[(
        "/etc/lvm/lvm.conf",
        "The setting global/thin_dump_executable says which thin_dump LVM runs.",
    )],
    see_also: &[("lvmthin", "7"), ("dmsetup", "8"), ("lvm.conf", "5")],
};

/// Forms of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// XML, which thin_restore reads
    #[value(name = "xml")]
    Xml,
    /// Lines for reading
    #[value(name = "human_readable")]
    HumanReadable,
    /// JSON, an object a line, for programs
    #[value(name = "json")]
    Json,
}

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The metadata device or image to dump.
    #[arg(value_name = "INPUT")]
    pub(crate) input: PathBuf,

    /// Dump this device only. May be given several times, for several devices.
    #[arg(long, value_name = "N")]
    pub(crate) dev_id: Vec<u64>,

    /// The form of the output.
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value = "xml")]
    pub(crate) format: Format,

    /// Dump the metadata snapshot of a pool, which may be active; with BLOCKNR, the one with its
    /// superblock in that block.
    #[arg(short, long, value_name = "BLOCKNR", num_args = 0..=1, require_equals = true)]
    pub(crate) metadata_snap: Option<Option<u64>>,

    /// Write out all mappings of each device instead of referring to shared ones.
    #[arg(long)]
    pub(crate) no_shared: bool,

    /// Write to this file instead of standard output (-). It appears when it is complete.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    /// Do not show progress.
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// Dump what can be recovered from damaged metadata.
    #[arg(short, long, conflicts_with = "metadata_snap")]
    pub(crate) repair: bool,

    /// Leave out the mappings: only the superblock and the device details are written.
    #[arg(long)]
    pub(crate) skip_mappings: bool,

    /// Values that take the place of those in the superblock.
    #[command(flatten)]
    pub(crate) overrides: super::Overrides,

    /// Options that are ignored.
    #[command(flatten)]
    pub(crate) compat: Compat,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = <Args as clap::Args>::augment_args(clap::Command::new(NAME));
    super::tool(cmd, TITLE, &PAGE)
}

/// Dumps the metadata.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let session = Session::new("Dumping", args.quiet)?;
    let access = match args.metadata_snap {
        Some(_) => Access::Live,
        None => Access::Exclusive,
    };
    let engine = open_read(&args.input, access)?;
    let selection = Selection {
        devices: args.dev_id.iter().copied().map(ThinId).collect(),
        skip_mappings: args.skip_mappings,
        no_shared: args.no_shared,
    };
    let overrides = Overrides::from(&args.overrides);
    let name = || args.input.display().to_string();
    let recovery;
    let mut exit = Exit::Ok;
    let source = if args.repair {
        let options = Options {
            overrides,
            ..Options::default()
        };
        recovery = recover(&*engine, &options, &session).with_context(name)?;
        if !recovery.report.is_complete {
            exit = Exit::Repairable;
        }
        super::repair::say_report(&recovery.report, &session);
        recovery.source(selection, &session)
    } else {
        MetadataSource {
            engine: &*engine,
            trees: trees(&args, &*engine, &session).with_context(name)?,
            selection,
            recovered: None,
            observer: &session,
        }
    };
    let source = Overridden {
        source: &source,
        overrides,
        observer: &session,
        heard: Default::default(),
    };
    let format: &dyn text::Format = match args.format {
        Format::Xml => &text::Xml,
        Format::HumanReadable => &text::HumanReadable,
        Format::Json => &text::JsonLines,
    };
    let mut fill = |out: &mut dyn Write| source.emit(&mut TextSink::new(out, format));
    match &args.output {
        Some(path) if path.as_os_str() != "-" => write_replacing(path, &args.input, &mut fill)?,
        _ => fill(&mut std::io::stdout().lock())?,
    }
    Ok(exit)
}

/// The trees to dump: the superblock's, or the metadata snapshot's.
fn trees(args: &Args, engine: &dyn BlockEngine, session: &Session) -> anyhow::Result<Trees> {
    let superblock = Superblock::read(engine)?;
    let nr_data_blocks = superblock.data_space_map.nr_blocks;
    let told = match args.metadata_snap {
        Some(wanted) => held_root(engine, &superblock, wanted.map(MetadataBlock))?,
        None => superblock,
    };
    Ok(Trees::read(engine, &told, nr_data_blocks, session)?)
}
