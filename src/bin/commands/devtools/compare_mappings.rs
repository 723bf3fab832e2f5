//! `thin_compare_mappings`: what a repair kept of the mappings that were not damaged.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use serde_json::Value;
use thintools::io::{Access, open_read};
use thintools::tools::devtools::{Comparison, compare};
use thintools::units::MetadataBlock;

use super::output::print_json;
use crate::commands::PROGRAM;
use crate::exit::Exit;
use crate::session::Session;

/// The name of the command.
pub(crate) const NAME: &str = "thin_compare_mappings";

/// What the command does, in one line.
pub(crate) const TITLE: &str =
    "Compare repaired thin pool metadata with what it was before the damage";

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The metadata before the damage; an image may be compressed.
    #[arg(long, value_name = "IMAGE", required = true)]
    truth: PathBuf,

    /// Which blocks were damaged: the JSON that thin_generate_damage prints, in a file, or numbers
    /// separated by commas.
    #[arg(long, value_name = "FILE|LIST", required = true)]
    damaged_blocks: String,

    /// What a repair made of the damaged metadata.
    #[arg(long, value_name = "IMAGE", required = true)]
    result: PathBuf,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = clap::Command::new(NAME).bin_name(format!("{PROGRAM} {NAME}"));
    <Args as clap::Args>::augment_args(cmd).about(TITLE).long_about(
        "Compare the mappings of repaired metadata with those from before the damage, and print the \
         numbers as JSON: mappings before (truth), those of them in leaves that were not damaged \
         (held), those of them that the result has (recovered), mappings before that the result \
         has, damaged leaves included (recovered_all), and mappings of the result that there were \
         none of before (wrong). A result that cannot be read has no mappings; 'unreadable' says why.",
    )
}

/// Compares.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let session = Session::new("Comparing", true)?;
    let damaged = damaged_blocks(&args.damaged_blocks)?;
    let truth = open_read(&args.truth, Access::Exclusive)?;
    let comparison = match open_read(&args.result, Access::Exclusive) {
        Ok(result) => compare(&*truth, &damaged, &*result, &session)?,
        // Not even the beginnings of metadata: as good as an empty result.
        Err(err) if err.kind() == thintools::ErrorKind::NotMetadata => {
            let empty = thintools::io::RamEngine::new(1);
            Comparison {
                unreadable: Some(err.to_string()),
                ..compare(&*truth, &damaged, &empty, &session)?
            }
        }
        Err(err) => return Err(err.into()),
    };
    print_json(&comparison)?;
    Ok(Exit::Ok)
}

/// The blocks of a list of numbers, or of a file.
fn damaged_blocks(given: &str) -> anyhow::Result<BTreeSet<MetadataBlock>> {
    let numbers: Result<BTreeSet<MetadataBlock>, _> = given
        .split(',')
        .map(|number| number.trim().parse().map(MetadataBlock))
        .collect();
    if let Ok(numbers) = numbers {
        return Ok(numbers);
    }
    let text = fs::read_to_string(Path::new(given)).with_context(|| {
        format!("cannot read {given}; give a file, or numbers of blocks separated by commas")
    })?;
    let json: Value =
        serde_json::from_str(&text).with_context(|| format!("{given} is not JSON"))?;
    let list = json.get("damaged").unwrap_or(&json).as_array();
    list.and_then(|list| {
        let number = |one: &Value| one.get("block").unwrap_or(one).as_u64().map(MetadataBlock);
        list.iter().map(number).collect()
    })
    .ok_or_else(|| {
        anyhow!(
            "{given} has no list of damaged blocks; give what thin_generate_damage --json printed"
        )
    })
}
