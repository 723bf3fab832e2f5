//! `thin_generate_metadata`: metadata of a given shape and history.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;
use thintools::io::BlockEngine;
use thintools::tools::devtools::{Pattern, Recipe, generate};
use thintools::units::BLOCK_SIZE;

use super::output::copy;
use crate::commands::{PROGRAM, data_block_size};
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// The name of the command.
pub(crate) const NAME: &str = "thin_generate_metadata";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Make thin pool metadata with a history";

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The image to make; it must not exist.
    #[arg(short, long, value_name = "FILE", required = true)]
    output: PathBuf,

    /// Devices that are no snapshots.
    #[arg(long, value_name = "N", default_value_t = 10)]
    devices: u64,

    /// Mappings of each device.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    mappings: u64,

    /// How mappings are laid out.
    #[arg(long, value_name = "PATTERN", default_value = "random")]
    pattern: Layout,

    /// Snapshots, of one device after the other.
    #[arg(long, value_name = "N", default_value_t = 0)]
    snapshots: u64,

    /// Transactions that follow the one that makes the devices. Each changes mappings of a quarter
    /// of the devices in copies of the blocks concerned; now and then one takes a snapshot that a
    /// later one deletes. Freed blocks keep what they held.
    #[arg(long, value_name = "N", default_value_t = 0)]
    transactions: u64,

    /// Select everything that is random; the same number makes the same metadata.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,

    /// Size of data blocks in sectors of 512 bytes.
    #[arg(long, value_name = "SECTORS", default_value_t = 128, value_parser = data_block_size)]
    data_block_size: u32,

    /// Size of the metadata in bytes, or with one of the suffixes K, M and G [default: four times
    /// what is needed].
    #[arg(long, value_name = "SIZE", value_parser = blocks)]
    metadata_size: Option<u64>,
}

/// How mappings are laid out.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Layout {
    /// All virtual blocks from 0, data blocks one after the other
    Sequential,
    /// Every fourth virtual block or so, data blocks in a random order
    Random,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = clap::Command::new(NAME).bin_name(format!("{PROGRAM} {NAME}"));
    <Args as clap::Args>::augment_args(cmd).about(TITLE)
}

/// Makes the metadata.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let session = Session::new("Generating", true)?;
    let recipe = Recipe {
        devices: args.devices,
        mappings: args.mappings,
        pattern: match args.pattern {
            Layout::Sequential => Pattern::Sequential,
            Layout::Random => Pattern::Random,
        },
        snapshots: args.snapshots,
        transactions: args.transactions,
        seed: args.seed,
        data_block_size: args.data_block_size,
        metadata_blocks: args.metadata_size,
    };
    let engine = generate(&recipe, &session)?;
    copy(&args.output, &engine, &[], &session)?;
    output::stdout_line(&format!(
        "wrote {} metadata blocks to {}",
        engine.nr_blocks(),
        args.output.display()
    ))
    .context("cannot write to standard output")?;
    Ok(Exit::Ok)
}

/// Parses a size in bytes into whole metadata blocks.
fn blocks(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 1 << 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1 << 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1_u64),
    };
    let number: Option<u64> = digits.parse().ok();
    match number.and_then(|number| number.checked_mul(factor)) {
        Some(bytes) if bytes > 0 && bytes.is_multiple_of(BLOCK_SIZE as u64) => {
            Ok(bytes / BLOCK_SIZE as u64)
        }
        _ => Err(format!(
            "'{text}' is no multiple of {BLOCK_SIZE} bytes; give a number such as 16M"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes are whole blocks.
    #[test]
    fn sizes() {
        assert_eq!(blocks("4096"), Ok(1));
        assert_eq!(blocks("16M"), Ok(4096));
        assert_eq!(blocks("8k"), Ok(2));
        for wrong in ["", "0", "M", "4095", "1K", "-1M", "99999999999G", "1Mé"] {
            assert!(blocks(wrong).is_err(), "{wrong}");
        }
    }
}
