//! `thin_repair --undelete`: devices that were deleted, and that older states of the pool still hold.

use anyhow::Context;
use thintools::io::BlockEngine;
use thintools::tools::repair::{DeletedDevice, Deletions, Undeleted, Wanted};
use thintools::tools::{Restored, Selection, restore};
use thintools::units::{MetadataBlock, ThinId};

use super::repair::{SHOWN, say_more};
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// The part of the command line.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct UndeleteArgs {
    /// List the devices that were deleted and that older states of the pool, still on the device, hold. With an id, write the
    /// current state with that device brought back, without the mappings whose data blocks others have by now; the current
    /// state must be whole.
    #[arg(
        long,
        value_name = "ID",
        num_args = 0..=1,
        conflicts_with_all = ["data_block_size", "include_ambiguous", "list_candidates", "nr_data_blocks", "roots", "transaction_id"]
    )]
    undelete: Option<Option<u64>>,

    /// The id to give to the device that is brought back, if not the one that it had.
    #[arg(long = "as", value_name = "NEWID", requires = "undelete")]
    new_id: Option<u64>,

    /// Bring the device back from the state with this mapping root, instead of the latest one in which it is whole.
    #[arg(long, value_name = "BLOCK", requires = "undelete")]
    from: Option<u64>,
}

impl UndeleteArgs {
    /// True if deleted devices are to be listed.
    pub(crate) fn is_listing(&self) -> bool {
        self.undelete == Some(None)
    }

    /// The device to bring back, if one is.
    pub(crate) fn wanted(&self) -> Option<Wanted> {
        Some(Wanted {
            dev_id: ThinId(self.undelete??),
            new_id: self.new_id.map(ThinId),
            from: self.from.map(MetadataBlock),
        })
    }
}

/// Lists the deleted devices.
pub(crate) fn list(input: &dyn BlockEngine, json: bool, session: &Session) -> anyhow::Result<Exit> {
    let list = Deletions::find(input, session)?.list()?;
    let text = match json {
        true => serde_json::to_string_pretty(&serde_json::json!({
            "deleted": list,
            "exit_status": Exit::Ok.code(),
        }))?,
        false => {
            let mut lines: Vec<String> = list.devices.iter().map(ToString::to_string).collect();
            if list.more_devices > 0 {
                lines.push(format!("{} more", list.more_devices));
            }
            if lines.is_empty() {
                lines.push(String::from(
                    "no device that was deleted is left on this metadata device",
                ));
            }
            if list.older_versions > 0 {
                lines.push(format!(
                    "and {} older versions of devices that still exist",
                    list.older_versions
                ));
            }
            lines.join("\n")
        }
    };
    output::stdout_line(&text).context("cannot write to standard output")?;
    Ok(Exit::Ok)
}

/// Brings a device back, and writes all to `output`; without one, only says what would be written.
pub(crate) fn bring_back(
    input: &dyn BlockEngine,
    output: Option<&dyn BlockEngine>,
    wanted: &Wanted,
    json: bool,
    session: &Session,
) -> anyhow::Result<Exit> {
    let undeleted = Deletions::find(input, session)?.bring_back(wanted)?;
    let source = undeleted.recovery.source(Selection::default(), session);
    let restored = match output {
        Some(output) => Some(restore(&source, output, session)?),
        None => None,
    };
    let left_out = undeleted.device.remains.map_or(0, |r| r.left_out());
    let is_latest = undeleted.device.is_latest || wanted.from.is_some();
    let exit = if left_out == 0 && is_latest {
        Exit::Ok
    } else {
        Exit::Repairable
    };
    if json {
        let all = serde_json::json!({
            "undeleted": undeleted.device,
            "new_id": undeleted.new_id,
            "left_out": undeleted.left_out,
            "mappings": restored.map(|r| r.mappings),
            "exit_status": exit.code(),
        });
        output::stdout_line(&serde_json::to_string_pretty(&all)?)
            .context("cannot write to standard output")?;
        return Ok(exit);
    }
    say(&undeleted, restored, session);
    Ok(exit)
}

/// Says what of the device is back and what is not.
fn say(undeleted: &Undeleted<'_>, restored: Option<Restored>, session: &Session) {
    let Undeleted {
        recovery,
        device,
        new_id,
        left_out,
    } = undeleted;
    session.say(&device.to_string());
    for range in left_out.iter().take(SHOWN) {
        session.say(&format!("left out: mappings of {range}"));
    }
    say_more(left_out.len(), "ranges left out", session);
    say_remains(device, *new_id, session);
    session.say(&format!(
        "its size is not in the metadata: with {} sectors or more all its mapped blocks can be reached",
        (device.end).saturating_mul(u64::from(recovery.pool().data_block_size))
    ));
    session.say(&match restored {
        Some(restored) => format!(
            "wrote {} mappings in {} of {} metadata blocks",
            restored.mappings, restored.used_blocks, restored.nr_blocks
        ),
        None => String::from("nothing was written"),
    });
}

/// Says how many mappings are back, and how far they can be trusted.
fn say_remains(device: &DeletedDevice, new_id: ThinId, session: &Session) {
    let Some(remains) = device.remains else {
        return;
    };
    session.say(&format!(
        "device {} brought back as device {new_id}: {} of {} mappings",
        device.dev_id,
        remains.kept(),
        device.mapped_blocks
    ));
    if remains.free > 0 {
        session.say(&format!(
            "the contents of {} blocks are not guaranteed: they were free, so they may have been discarded, or used by others and \
             freed again",
            remains.free
        ));
    }
}
