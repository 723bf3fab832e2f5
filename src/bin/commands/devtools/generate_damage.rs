//! `thin_generate_damage`: a damaged copy of whole metadata.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde::Serialize;
use thintools::io::{Access, open_read};
use thintools::tools::devtools::{Amount, Damage, Damaged, Inventory, Kind, Spec, Target, damage};

use super::output::{copy, print_json};
use crate::commands::PROGRAM;
use crate::exit::Exit;
use crate::session::Session;

/// The name of the command.
pub(crate) const NAME: &str = "thin_generate_damage";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Damage a copy of thin pool metadata";

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The metadata, which must be whole; an image may be compressed. It is only read.
    #[arg(short, long, value_name = "IMAGE", required = true)]
    input: PathBuf,

    /// The damaged copy to make; it must not exist.
    #[arg(
        short,
        long,
        value_name = "FILE",
        required_unless_present = "inventory"
    )]
    output: Option<PathBuf>,

    /// Damage blocks of this kind: any, superblock, top-level-root, top-level (other nodes of the
    /// top-level tree), details, inner, leaf, metadata-index, metadata-bitmap, metadata-counts,
    /// data-index, data-bitmap, data-counts, held (only the metadata snapshot has them).
    #[arg(long, value_name = "KIND", requires = "damage_type")]
    kind: Option<Target>,

    /// What happens to them: zero, bit-flip, junk, torn, stale, misdirected, swapped, sector.
    #[arg(
        long = "type",
        id = "damage_type",
        value_name = "TYPE",
        requires = "kind"
    )]
    damage_type: Option<Damage>,

    /// To how many of them: a number, a fraction such as 1/4, or all [default: 1].
    #[arg(long, visible_alias = "fraction", value_name = "N", requires = "kind")]
    count: Option<Amount>,

    /// All three in one, as KIND:TYPE or KIND:TYPE:N; may be given more than once.
    #[arg(long, value_name = "KIND:TYPE:N")]
    damage: Vec<Spec>,

    /// Select the blocks and what they hold then; the same number makes the same damage.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,

    /// Print the list of damaged blocks as JSON.
    #[arg(long)]
    json: bool,

    /// Damage nothing; print as JSON how many blocks there are of each kind, and the values that a
    /// repair without a superblock needs. An output is a plain copy, expanded if need be.
    #[arg(long, conflicts_with_all = ["kind", "damage"])]
    inventory: bool,
}

/// What there is to damage.
#[derive(Serialize)]
struct Stock {
    /// Metadata blocks of the image.
    nr_blocks: u64,
    /// In sectors of 512 bytes.
    data_block_size: u32,
    /// Size of the data device.
    nr_data_blocks: u64,
    /// The transaction id of whoever manages the pool.
    transaction_id: u64,
    /// Blocks in use, by kind.
    kinds: BTreeMap<Kind, usize>,
}

/// What was damaged.
#[derive(Serialize)]
struct Report<'a> {
    /// The number that selected the blocks.
    seed: u64,
    /// Block by block.
    damaged: &'a [Damaged],
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = clap::Command::new(NAME).bin_name(format!("{PROGRAM} {NAME}"));
    <Args as clap::Args>::augment_args(cmd).about(TITLE)
}

/// Damages a copy.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let session = Session::new("Damaging", true)?;
    let engine = open_read(&args.input, Access::Exclusive)?;
    let inventory = Inventory::read(&*engine, &session)?;
    if args.inventory {
        if let Some(output) = &args.output {
            copy(output, &*engine, &[], &session)?;
        }
        print_json(&Stock {
            nr_blocks: engine.nr_blocks(),
            data_block_size: inventory.superblock.data_block_size,
            nr_data_blocks: inventory.superblock.data_space_map.nr_blocks,
            transaction_id: inventory.superblock.transaction_id,
            kinds: inventory.counts(),
        })?;
        return Ok(Exit::Ok);
    }
    let mut specs = args.damage;
    if let (Some(target), Some(damage)) = (args.kind, args.damage_type) {
        let amount = args.count.unwrap_or(Amount::Number(1));
        specs.push(Spec {
            target,
            damage,
            amount,
        });
    }
    let (Some(output), false) = (&args.output, specs.is_empty()) else {
        bail!("nothing to damage; give --kind and --type, or --damage KIND:TYPE:N");
    };
    let damaged = damage(&*engine, &inventory, &specs, args.seed, &session)?;
    copy(output, &*engine, &damaged, &session)?;
    if args.json {
        print_json(&Report {
            seed: args.seed,
            damaged: &damaged,
        })?;
    } else {
        print_lines(&damaged)?;
    }
    Ok(Exit::Ok)
}

/// Prints a line for each damaged block.
fn print_lines(damaged: &[Damaged]) -> anyhow::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for one in damaged {
        let source = one
            .source
            .map_or_else(String::new, |source| format!(" from block {source}"));
        writeln!(
            out,
            "block {}: {}: {}{source}",
            one.block, one.kind, one.damage
        )
        .context("cannot write to standard output")?;
    }
    out.flush().context("cannot write to standard output")
}
