//! `thin_ctl`: the messages that the kernel takes for an active pool, for one that is not active.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use serde_json::json;
use thintools::io::{Access, BlockEngine, open_read, open_write};
use thintools::observer::Observer;
use thintools::pool::{Features, Message as PoolMessage, PoolMode, PoolState};
use thintools::thin::{DEFAULT_CACHE, PoolMetadata, PoolStatus, Superblock};
use thintools::tools::check::{CheckOptions, Code, Severity, check};
use thintools::units::{MAX_METADATA_BLOCKS, MAX_THIN_ID, ThinId};
use thintools::{Error, ErrorKind};

use super::{Page, ctl_socket};
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// The name of the command.
pub(crate) const NAME: &str = "thin_ctl";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Change a thin pool that is not active by the kernel's messages";

/// The forms of the command line.
const USAGE: &str = "thin_ctl [OPTIONS] <META> create-thin <ID>
       thin_ctl [OPTIONS] <META> create-snap <ID> <ORIGIN>
       thin_ctl [OPTIONS] <META> delete <ID>
       thin_ctl [OPTIONS] <META> set-transaction-id <OLD> <NEW>
       thin_ctl [OPTIONS] <META> reserve-metadata-snap
       thin_ctl [OPTIONS] <META> release-metadata-snap
       thin_ctl [OPTIONS] <META> resize [--data <BLOCKS>] [--metadata <BLOCKS>]
       thin_ctl [OPTIONS] <META> status [--json]
       thin_ctl --socket <PATH> <WORD>...";

/// The text of the manual page.
pub(crate) const PAGE: Page = Page {
    description: &[
        "thin_ctl makes, snapshots and deletes thin devices, sets the transaction id, reserves and \
         releases a metadata snapshot, grows a pool, and shows its status, on the metadata of a \
         pool that is not active. The messages are those that dmsetup sends to an active pool, \
         their errors are the kernel's, and what is on the device afterwards is what the kernel \
         would have written. The metadata of an active pool is refused.",
        "Words may be written in upper or lower case, and with underscores, as the kernel spells \
         them: CREATE_THIN. A message that succeeds prints nothing, except that resize says how \
         large everything was and is.",
        "Each message is one transaction. What changes goes to blocks that the present superblock \
         does not lead to, and is flushed; then the superblock is written, and flushed. After a \
         crash, a loss of power or a signal at any moment the device holds the old state or the \
         new. A message that fails changes neither the superblock nor anything that it leads to.",
        "Before anything is changed, all of the metadata is checked as thin_check does. If there \
         is damage, other than leaked blocks, nothing is written: run thin_check and put it right \
         first. If the needs_check flag is set, every message but status is refused, as by the \
         kernel: run thin_check --clear-needs-check-flag. status does not check, writes nothing, \
         and takes compressed images, too.",
        "A volume manager keeps records of its own of the devices in a pool and of the transaction \
         id. LVM does not activate a pool that has another transaction id than it has on record.",
    ],
    sections: &[
        (
            "RESIZE",
            &[
                "resize grows the data device of the pool to the number of data blocks given with \
                 --data, and the metadata to the number of blocks of 4 KiB given with --metadata; \
                 without the latter, to all of the metadata device, as the kernel does when it \
                 activates a pool. Neither can be made smaller. The data device itself is not \
                 looked at: the kernel refuses a pool with a data device that is smaller than the \
                 metadata says, and grows one that is larger by itself. The sizes before and \
                 after are told on standard error. If nothing grows, nothing is written.",
            ],
        ),
        (
            "STATUS",
            &[
                "The first line has the fields of the kernel's status line from the transaction id \
                 on: TRANSACTION_ID USED/TOTAL metadata blocks, USED/TOTAL data blocks, the block \
                 of the metadata snapshot or -, mode, discard_passdown, queue_if_no_space, \
                 needs_check or -, and the number of free metadata blocks below which the pool is \
                 called low. Used metadata blocks include those that the kernel keeps back for \
                 commits: a tenth of all, at most 4096. The mode is the one in which the kernel \
                 would bring the pool up: ro if needs_check is set or if no metadata block is free \
                 but those kept back, else rw. How to discard and what to do without space are \
                 options of the pool's table, which is not part of the metadata: the defaults are \
                 shown.",
                "The lines that follow say the same and more in words. With --json standard output \
                 is one JSON object: kernel is the first line, status has the numbers \
                 (transaction_id, used_metadata_blocks, metadata_blocks, used_data_blocks, \
                 data_blocks, held_root, data_block_size in sectors, needs_check, \
                 metadata_threshold, allocated_metadata_blocks, time, devices), mode, \
                 free_metadata_blocks, usable_metadata_blocks (without those kept back), \
                 free_data_blocks, exit_status. Programs should ignore members they do not know; \
                 later versions may add some.",
            ],
        ),
        (
            "RUNNING POOLS",
            &[
                "With --socket the words go to a pool that thin_serve runs with --control: the messages above, \
                 also with message in front, as dmsetup has it; status or table, of the pool, or of the thin \
                 device whose id follows; suspend; resume, with feature words if they change; resize, which \
                 makes backing files larger to --data and --metadata blocks, and uses all of devices that have \
                 grown; activate ID [SIZE [ORIGIN]], with sizes as thin_serve has them, and deactivate ID; exported; stats; metrics; and events, \
                 which prints what happens until it is interrupted. Lines are the kernel's, stats and \
                 events are JSON, metrics are text for Prometheus.",
                "top shows how full data and metadata are, what clients do to each thin device, the busiest first, and why bios were \
                 left to the pool's worker (deferred), anew each second. q and Ctrl-C leave the terminal as it was. Where standard \
                 output is no terminal, it prints what happened in one second, and ends.",
            ],
        ),
        (
            "ERRORS",
            &[
                "What the kernel refuses is told by the name and the text of its error, and ends \
                 with status 1. EEXIST: the device to be made exists. ENODATA: the device to be \
                 deleted or snapshotted does not. EINVAL: the old transaction id is another; there \
                 is no metadata snapshot to release; a size is smaller than the present one or \
                 larger than possible; the snapshot clock is at its end. EBUSY: there is a \
                 metadata snapshot already. ENOSPC: the metadata device has no room for the \
                 change beside the present state. EOPNOTSUPP: needs_check is set. A \
                 pool that is ro for want of metadata blocks only may be changed as far as there \
                 is room, so that devices can be deleted.",
                "A device id that is no number from 0 to 16777215, a size that is none, a word that is nothing to ask, or a wrong \
                 number of arguments, is a wrong command line: status 2. Damage that keeps anything from being changed \
                 has status 5, also if thin_check --auto-repair corrects it.",
            ],
        ),
    ],
    examples: &[
        (
            "Make a snapshot 8 of device 7, and have a look:",
            &[
                "thin_ctl /dev/mapper/pool_metadata create-snap 8 7",
                "thin_ctl /dev/mapper/pool_metadata status",
            ],
        ),
        (
            "Let a pool use a metadata device that has grown, and a data device of 65536 blocks:",
            &["thin_ctl /dev/mapper/pool_metadata resize --data 65536"],
        ),
        (
            "Set the transaction id to the one that the volume manager has on record:",
            &["thin_ctl /dev/mapper/pool_metadata set-transaction-id 4 5"],
        ),
    ],
    files: &[],
    see_also: &[("lvmthin", "7"), ("dmsetup", "8")],
};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Message {
    /// ID: make an empty thin device.
    #[value(alias = "create_thin")]
    CreateThin,
    /// ID ORIGIN: make a thin device that is a snapshot of another one.
    #[value(alias = "create_snap")]
    CreateSnap,
    /// ID: delete a thin device.
    Delete,
    /// OLD NEW: set the transaction id, if it is OLD now.
    #[value(alias = "set_transaction_id")]
    SetTransactionId,
    /// Keep the metadata as it is now for others to read.
    #[value(alias = "reserve_metadata_snap")]
    ReserveMetadataSnap,
    /// Give up the metadata snapshot.
    #[value(alias = "release_metadata_snap")]
    ReleaseMetadataSnap,
    /// Grow the pool.
    Resize,
    /// Show the kernel's status line, and what it means.
    Status,
}

impl Message {
    /// The word for it.
    fn word(self) -> &'static str {
        match self {
            Self::CreateThin => "create-thin",
            Self::CreateSnap => "create-snap",
            Self::Delete => "delete",
            Self::SetTransactionId => "set-transaction-id",
            Self::ReserveMetadataSnap => "reserve-metadata-snap",
            Self::ReleaseMetadataSnap => "release-metadata-snap",
            Self::Resize => "resize",
            Self::Status => "status",
        }
    }

    /// What its arguments are called.
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::CreateThin | Self::Delete => &["ID"],
            Self::CreateSnap => &["ID", "ORIGIN"],
            Self::SetTransactionId => &["OLD", "NEW"],
            _ => &[],
        }
    }
}

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The metadata device or image.
    #[arg(
        value_name = "META",
        required_unless_present = "socket",
        default_value = "-",
        hide_default_value = true
    )]
    input: PathBuf,

    /// What to do.
    #[arg(
        value_name = "MESSAGE",
        value_enum,
        ignore_case = true,
        required_unless_present = "socket",
        default_value = "status",
        hide_default_value = true
    )]
    message: Message,

    /// Device ids or transaction ids.
    #[arg(value_name = "ARGUMENT", allow_negative_numbers = true)]
    arguments: Vec<String>,

    /// For resize: how many data blocks the data device shall have.
    #[arg(long, value_name = "BLOCKS")]
    data: Option<u64>,

    /// For status: print it as JSON.
    #[arg(long)]
    json: bool,

    /// For resize: how many blocks of 4 KiB the metadata shall have, if not all that the device has.
    #[arg(long, value_name = "BLOCKS")]
    metadata: Option<u64>,

    /// Instead of metadata: the control socket of a pool that thin_serve runs, and what to ask of it.
    #[arg(long, value_names = ["PATH", "WORD"], num_args = 2.., conflicts_with = "input")]
    socket: Vec<String>,

    /// Print no progress and nothing about what was done; errors and the status are printed.
    #[arg(short, long)]
    quiet: bool,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = <Args as clap::Args>::augment_args(clap::Command::new(NAME));
    super::tool(cmd.override_usage(USAGE), TITLE, &PAGE)
}

/// A message that changes something, with its arguments.
#[derive(Clone, Copy, Debug)]
enum Change {
    Message(PoolMessage),
    Resize(Option<u64>, Option<u64>),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = match self {
            Self::Message(message) => message,
            Self::Resize(..) => return f.write_str(Message::Resize.word()),
        };
        match message {
            PoolMessage::CreateThin(id) => write!(f, "{} {id}", Message::CreateThin.word()),
            PoolMessage::CreateSnap { id, origin } => {
                write!(f, "{} {id} {origin}", Message::CreateSnap.word())
            }
            PoolMessage::Delete(id) => write!(f, "{} {id}", Message::Delete.word()),
            PoolMessage::SetTransactionId { old, new } => {
                write!(f, "{} {old} {new}", Message::SetTransactionId.word())
            }
            PoolMessage::ReserveMetadataSnap => f.write_str(Message::ReserveMetadataSnap.word()),
            PoolMessage::ReleaseMetadataSnap => f.write_str(Message::ReleaseMetadataSnap.word()),
        }
    }
}

impl Args {
    /// What to change, nothing for the status; or what is wrong with the command line.
    ///
    /// The number of arguments depends on the message, which the parser does not know of.
    fn change(&self) -> Result<Option<Change>, String> {
        let word = self.message.word();
        let wanted = self.message.arguments();
        if self.arguments.len() != wanted.len() {
            return Err(match wanted {
                [] => format!("{word} takes no arguments"),
                [name] => format!("{word} takes one argument: {name}"),
                names => format!(
                    "{word} takes {} arguments: {}",
                    names.len(),
                    names.join(" ")
                ),
            });
        }
        if self.message != Message::Resize && (self.data.is_some() || self.metadata.is_some()) {
            return Err(String::from("--data and --metadata are options of resize"));
        }
        if self.message != Message::Status && self.json {
            return Err(String::from("--json is an option of status"));
        }
        let first = || self.argument(0, u64::MAX);
        let id = |at| self.argument(at, MAX_THIN_ID).map(ThinId);
        Ok(Some(Change::Message(match self.message {
            Message::CreateThin => PoolMessage::CreateThin(id(0)?),
            Message::CreateSnap => PoolMessage::CreateSnap {
                id: id(0)?,
                origin: id(1)?,
            },
            Message::Delete => PoolMessage::Delete(id(0)?),
            Message::SetTransactionId => PoolMessage::SetTransactionId {
                old: first()?,
                new: self.argument(1, u64::MAX)?,
            },
            Message::ReserveMetadataSnap => PoolMessage::ReserveMetadataSnap,
            Message::ReleaseMetadataSnap => PoolMessage::ReleaseMetadataSnap,
            Message::Resize => return Ok(Some(Change::Resize(self.data, self.metadata))),
            Message::Status => return Ok(None),
        })))
    }

    /// The argument at a place, a number up to `most`.
    fn argument(&self, at: usize, most: u64) -> Result<u64, String> {
        let text = self.arguments.get(at).map_or("", String::as_str);
        match text.parse() {
            Ok(number) if number <= most => Ok(number),
            _ => Err(format!(
                "{} {text:?}: EINVAL: Invalid argument: a number from 0 to {most} is possible",
                self.message.arguments().get(at).unwrap_or(&"ARGUMENT"),
            )),
        }
    }
}

/// The error of a message, as the kernel would name it.
fn refused(change: Change, error: Error) -> anyhow::Error {
    let context = match error.kind().errno() {
        Some((name, sentence)) => format!("{change}: {name}: {sentence}"),
        None => change.to_string(),
    };
    anyhow::Error::new(error).context(context)
}

/// Says what is wrong with the command line.
pub(super) fn wrong_usage(wrong: String) -> Exit {
    let error = build().error(clap::error::ErrorKind::ValueValidation, wrong);
    // If standard error is closed the exit status still tells.
    let _ = error.print();
    Exit::Usage
}

/// Sends the message.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    if let [socket, words @ ..] = &args.socket[..] {
        return ctl_socket::run(socket.as_ref(), words, (args.data, args.metadata));
    }
    let change = match args.change() {
        Ok(change) => change,
        Err(wrong) => {
            return Ok(wrong_usage(wrong));
        }
    };
    let session = Session::new("Checking", args.quiet)?;
    match change {
        Some(change) => send(&args.input, change, &session),
        None => status(&args),
    }
}

/// Changes the metadata, if it is fit to be changed.
fn send(input: &Path, change: Change, session: &Session) -> anyhow::Result<Exit> {
    let engine: Arc<dyn BlockEngine> = Arc::from(open_write(input)?);
    let shown = || input.display().to_string();
    if Superblock::read(&*engine)
        .with_context(shown)?
        .needs_check()
    {
        let why = format!(
            "the needs_check flag is set, which makes the pool read-only; \
             thin_check --clear-needs-check-flag {} clears it if the check passes",
            input.display()
        );
        return Err(refused(change, Error::new(ErrorKind::ReadOnly, why)));
    }
    refuse_damage(&*engine, input, session).with_context(|| change.to_string())?;
    let most = engine.nr_blocks();
    let mut pool = PoolMetadata::open(engine, DEFAULT_CACHE).with_context(shown)?;
    let before = pool.status().with_context(shown)?;
    apply(&mut pool, change, most)
        .and_then(|()| pool.commit())
        .map_err(|e| refused(change, e))?;
    if matches!(change, Change::Resize(..)) {
        say_sizes(&before, &pool.status()?, session);
    }
    Ok(Exit::Ok)
}

/// Refuses metadata in which a change could make damage worse. Leaks do no harm.
pub(super) fn refuse_damage(
    engine: &dyn BlockEngine,
    input: &Path,
    session: &Session,
) -> thintools::Result<()> {
    let report = check(engine, &CheckOptions::default(), session)?.report;
    let mut damages = report
        .damages
        .iter()
        .filter(|d| d.severity > Severity::Leak);
    if let Some(first) = damages.next() {
        let kind = match report.damages.iter().any(|d| d.code == Code::ReadError) {
            true => ErrorKind::Io,
            false => ErrorKind::Damaged,
        };
        let more = match damages.count() {
            0 => String::new(),
            n => format!(" (and {n} more)"),
        };
        return Err(Error::new(
            kind,
            format!(
                "the metadata is damaged, and nothing was written: {first}{more}; \
                 run thin_check {} for all of it and what to do",
                input.display()
            ),
        ));
    }
    if session.is_cancelled() {
        return Err(Error::new(
            ErrorKind::Interrupted,
            "interrupted; nothing was written",
        ));
    }
    Ok(())
}

/// Makes one change, on a device of `device_blocks` blocks. Only the commit that follows makes it last.
fn apply(pool: &mut PoolMetadata, change: Change, device_blocks: u64) -> thintools::Result<()> {
    match change {
        Change::Message(message) => message.apply(pool),
        Change::Resize(data, metadata) => {
            // Metadata first: the new bitmaps of the data may need the room.
            pool.resize_metadata(metadata.unwrap_or(device_blocks.min(MAX_METADATA_BLOCKS)))?;
            data.map_or(Ok(()), |blocks| pool.resize_data(blocks))
        }
    }
}

/// Says on standard error how large both devices were, and are.
fn say_sizes(before: &PoolStatus, after: &PoolStatus, session: &Session) {
    let sizes = [
        ("data", before.data_blocks, after.data_blocks),
        ("metadata", before.metadata_blocks, after.metadata_blocks),
    ];
    for (device, before, after) in sizes {
        session.say(&match before == after {
            true => format!("{device}: {before} blocks; nothing to do"),
            false => format!("{device}: {before} blocks before, {after} blocks now"),
        });
    }
}

/// The block of the metadata snapshot.
fn held(status: &PoolStatus) -> Option<String> {
    status.held_root.map(|block| block.to_string())
}

/// Prints the status.
fn status(args: &Args) -> anyhow::Result<Exit> {
    let engine: Arc<dyn BlockEngine> = Arc::from(open_read(&args.input, Access::Exclusive)?);
    let status = PoolMetadata::open(engine, DEFAULT_CACHE)
        .and_then(|pool| pool.status())
        .with_context(|| args.input.display().to_string())?;
    let mode = PoolMode::at_start(&status);
    let kernel = PoolState::new(&status, mode, &Features::default());
    let free = status
        .metadata_blocks
        .saturating_sub(status.allocated_metadata_blocks);
    let usable = status
        .metadata_blocks
        .saturating_sub(status.used_metadata_blocks);
    let free_data = status.data_blocks.saturating_sub(status.used_data_blocks);
    let text = if args.json {
        serde_json::to_string_pretty(&json!({
            "kernel": kernel.to_string(),
            "status": status,
            "mode": mode.to_string(),
            "free_metadata_blocks": free,
            "usable_metadata_blocks": usable,
            "free_data_blocks": free_data,
            "exit_status": Exit::Ok.code(),
        }))?
    } else {
        let sectors = u64::from(status.data_block_size);
        let needs_check = match status.needs_check {
            true => {
                "yes: the pool is read-only until thin_check --clear-needs-check-flag clears it"
            }
            false => "no",
        };
        [
            kernel.to_string(),
            format!("transaction id: {}", status.transaction_id),
            format!(
                "metadata: {} of {} blocks of 4 KiB in use ({}), {free} free, {usable} of them not kept back for commits",
                status.allocated_metadata_blocks,
                status.metadata_blocks,
                percent(status.allocated_metadata_blocks, status.metadata_blocks),
            ),
            format!(
                "data: {} of {} blocks of {sectors} sectors ({}) in use ({}), {free_data} free",
                status.used_data_blocks,
                status.data_blocks,
                size(sectors),
                percent(status.used_data_blocks, status.data_blocks),
            ),
            format!("devices: {}", status.devices),
            format!("snapshot clock: {}", status.time),
            match held(&status) {
                Some(block) => format!("metadata snapshot: in block {block}"),
                None => String::from("metadata snapshot: none"),
            },
            format!("needs check: {needs_check}"),
        ]
        .join("\n")
    };
    output::stdout_line(&text).context("cannot write to standard output")?;
    Ok(Exit::Ok)
}

/// A part of a whole.
fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / whole.max(1) as f64)
}

/// A number of sectors in the largest unit that has no remainder.
fn size(sectors: u64) -> String {
    for (unit, of_unit) in [("GiB", 1 << 21), ("MiB", 1 << 11)] {
        if sectors > 0 && sectors.is_multiple_of(of_unit) {
            return format!("{} {unit}", sectors / of_unit);
        }
    }
    format!("{} KiB", sectors / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    /// The words that errors have are those of the command line, in the kernel's spelling, too.
    #[test]
    fn words_are_those_of_the_command_line() {
        for &message in Message::value_variants() {
            let word = message.word();
            for spelling in [
                String::from(word),
                word.replace('-', "_"),
                word.to_uppercase(),
                word.replace('-', "_").to_uppercase(),
            ] {
                assert_eq!(Message::from_str(&spelling, true), Ok(message));
            }
            assert!(USAGE.contains(&format!("<META> {word}")), "{word}");
        }
    }

    /// Sizes are told without a remainder.
    #[test]
    fn sizes_are_exact() {
        for (sectors, text) in [
            (128, "64 KiB"),
            (384, "192 KiB"),
            (2048, "1 MiB"),
            (2_097_152, "1 GiB"),
        ] {
            assert_eq!(size(sectors), text);
        }
        assert_eq!(percent(0, 0), "0.0 %");
        assert_eq!(percent(1, 8), "12.5 %");
    }
}
