//! The table of commands, and what all of their command lines have in common.

pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod ctl;
mod ctl_socket;
mod ctl_top;
#[cfg(feature = "devtools")]
pub(crate) mod devtools;
pub(crate) mod dump;
pub(crate) mod install_links;
pub(crate) mod man;
pub(crate) mod repair;
pub(crate) mod repair_in_place;
mod repair_undelete;
pub(crate) mod replay;
pub(crate) mod restore;
pub(crate) mod serve;

use std::ffi::OsStr;

use clap::builder::PossibleValuesParser;
use thintools::units::is_legal_data_block_size;

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};

use crate::exit::{self, Exit};

/// The name of the binary.
pub(crate) const PROGRAM: &str = "thintools";

/// The version number, alone.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The heading of options for developers, which are in builds with the feature `devtools`; the manual is that of the others.
pub(crate) const DEVTOOLS: &str = "Options for developers";

/// What `thintools` is, in one line.
pub(crate) const TITLE: &str = "Tools for the metadata of device-mapper thin pools";

/// What the name of the program has to do with what it does.
const LINKS: &str = "Called by the name of a thin_* command, for example through a symbolic link \
                     made by 'thintools install-links', the program is that command.";

/// One command.
pub(crate) struct Spec {
    /// The full name: `thin_check`, `install-links`.
    pub(crate) name: &'static str,
    /// The name after `thintools`: `check`, `install-links`.
    pub(crate) short: &'static str,
    /// What the command does, in one line.
    pub(crate) title: &'static str,
    /// Whether lists of commands leave this one out.
    pub(crate) hidden: bool,
    /// The text of the command's manual page; only commands with one can be called by name.
    pub(crate) page: Option<&'static Page>,
    /// Makes the parser of the command line.
    pub(crate) build: fn() -> Command,
    /// Runs the command.
    pub(crate) run: fn(&ArgMatches) -> anyhow::Result<Exit>,
}

impl Spec {
    /// Whether this is one of the `thin_*` commands.
    pub(crate) fn is_tool(&self) -> bool {
        self.page.is_some()
    }

    /// The name to report errors under.
    pub(crate) fn program(&self) -> &'static str {
        if self.is_tool() { self.name } else { PROGRAM }
    }
}

/// The parts of a manual page that do not follow from the command line parser.
pub(crate) struct Page {
    /// What the command does, in paragraphs.
    pub(crate) description: &'static [&'static str],
    /// Further sections: a heading, and paragraphs.
    pub(crate) sections: &'static [(&'static str, &'static [&'static str])],
    /// Examples: what one does, and the lines that do it.
    pub(crate) examples: &'static [(&'static str, &'static [&'static str])],
    /// Files the command or its callers use: the path, and what it is for.
    pub(crate) files: &'static [(&'static str, &'static str)],
    /// Related pages of other packages: name and section.
    pub(crate) see_also: &'static [(&'static str, &'static str)],
}

/// The commands of every build, in the order in which they are listed.
pub(crate) static COMMANDS: &[Spec] = &[
    Spec {
        name: check::NAME,
        short: "check",
        title: check::TITLE,
        hidden: false,
        page: Some(&check::PAGE),
        build: check::build,
        run: |m| parsed(m, check::run),
    },
    Spec {
        name: ctl::NAME,
        short: "ctl",
        title: ctl::TITLE,
        hidden: false,
        page: Some(&ctl::PAGE),
        build: ctl::build,
        run: |m| parsed(m, ctl::run),
    },
    Spec {
        name: dump::NAME,
        short: "dump",
        title: dump::TITLE,
        hidden: false,
        page: Some(&dump::PAGE),
        build: dump::build,
        run: |m| parsed(m, dump::run),
    },
    Spec {
        name: repair::NAME,
        short: "repair",
        title: repair::TITLE,
        hidden: false,
        page: Some(&repair::PAGE),
        build: repair::build,
        run: |m| parsed(m, repair::run),
    },
    Spec {
        name: replay::NAME,
        short: "replay",
        title: replay::TITLE,
        hidden: false,
        page: Some(&replay::PAGE),
        build: replay::build,
        run: replay::run,
    },
    Spec {
        name: restore::NAME,
        short: "restore",
        title: restore::TITLE,
        hidden: false,
        page: Some(&restore::PAGE),
        build: restore::build,
        run: |m| parsed(m, restore::run),
    },
    Spec {
        name: serve::NAME,
        short: "serve",
        title: serve::TITLE,
        hidden: false,
        page: Some(&serve::PAGE),
        build: serve::build,
        run: |m| parsed(m, serve::run),
    },
    Spec {
        name: install_links::NAME,
        short: install_links::NAME,
        title: install_links::TITLE,
        hidden: false,
        page: None,
        build: install_links::build,
        run: |m| parsed(m, install_links::run),
    },
    Spec {
        name: completions::NAME,
        short: completions::NAME,
        title: completions::TITLE,
        hidden: false,
        page: None,
        build: completions::build,
        run: |m| parsed(m, completions::run),
    },
    Spec {
        name: man::NAME,
        short: man::NAME,
        title: man::TITLE,
        hidden: true,
        page: None,
        build: man::build,
        run: |m| parsed(m, man::run),
    },
];

/// The commands for those who develop repairs: none without the feature `devtools`.
static DEVELOPER_COMMANDS: &[Spec] = {
    #[cfg(feature = "devtools")]
    let commands = devtools::COMMANDS;
    #[cfg(not(feature = "devtools"))]
    let commands = &[];
    commands
};

/// All commands, those for developers last.
fn all() -> impl Iterator<Item = &'static Spec> {
    COMMANDS.iter().chain(DEVELOPER_COMMANDS)
}

/// The `thin_*` commands with their manual page texts.
pub(crate) fn tools() -> impl Iterator<Item = (&'static Spec, &'static Page)> {
    COMMANDS
        .iter()
        .filter_map(|spec| spec.page.map(|page| (spec, page)))
}

/// The command that is run when the binary is called `name`.
pub(crate) fn find_linked(name: &OsStr) -> Option<&'static Spec> {
    COMMANDS
        .iter()
        .find(|spec| spec.is_tool() && name == spec.name)
}

/// The command with the long or short name `name`.
pub(crate) fn find(name: &OsStr) -> Option<&'static Spec> {
    all().find(|spec| name == spec.name || name == spec.short)
}

/// How to use `thintools`, with the list of commands.
pub(crate) fn list() -> String {
    let mut text = format!("Usage: {PROGRAM} <COMMAND> [ARGUMENTS]\n\nCommands:\n");
    for spec in all().filter(|spec| !spec.hidden) {
        let long = if spec.name == spec.short {
            ""
        } else {
            spec.name
        };
        text.push_str(&format!("  {:<14} {long:<13} {}\n", spec.short, spec.title));
    }
    text.push_str(&format!(
        "\nTry '{PROGRAM} COMMAND --help' for the options of a command."
    ));
    text
}

/// The command line of `thintools` itself, with every command below it.
pub(crate) fn general() -> Command {
    let mut root = Command::new(PROGRAM)
        .version(VERSION)
        .about(TITLE)
        .override_usage(format!("{PROGRAM} <COMMAND> [ARGUMENTS]"))
        .after_help(LINKS)
        .after_long_help(format!("{LINKS}\n\n{}", exit::help_text()));
    for spec in all() {
        let mut cmd = (spec.build)().name(spec.short).hide(spec.hidden);
        if spec.name != spec.short {
            cmd = cmd.visible_alias(spec.name);
        }
        root = root.subcommand(cmd);
    }
    root
}

/// Completes the parser of a `thin_*` command with what all of them share.
///
/// Adds `--help` and `--version`, puts the options in the alphabetical order of their long names,
/// and lets flags be repeated, as the scripts and the LVM configurations there are may do.
fn tool(cmd: Command, title: &'static str, page: &'static Page) -> Command {
    let mut cmd = cmd
        .version(VERSION)
        .about(title)
        .long_about(page.description.first().copied().unwrap_or(title))
        .after_long_help(exit::help_text())
        .disable_help_flag(true)
        .disable_version_flag(true)
        .arg(
            Arg::new("help")
                .short('h')
                .long("help")
                .action(ArgAction::Help)
                .help("Print help and exit; --help says more than -h"),
        )
        .arg(
            Arg::new("version")
                .short('V')
                .long("version")
                .action(ArgAction::Version)
                .help("Print the version number and exit"),
        );
    let mut longs: Vec<String> = cmd
        .get_arguments()
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .collect();
    longs.sort_unstable();
    cmd = cmd.mut_args(|arg| {
        let place = arg
            .get_long()
            .and_then(|long| longs.iter().position(|other| other == long));
        let arg = match place {
            Some(place) => arg.display_order(place),
            None => arg,
        };
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            let id = arg.get_id().clone();
            arg.overrides_with(id)
        } else {
            arg
        }
    });
    cmd
}

/// Turns matches into the arguments of a command, and runs it.
fn parsed<A: FromArgMatches>(
    matches: &ArgMatches,
    run: fn(A) -> anyhow::Result<Exit>,
) -> anyhow::Result<Exit> {
    run(A::from_arg_matches(matches)?)
}

/// Options other implementations have; accepted so that existing scripts keep working, and ignored.
#[derive(Debug, clap::Args)]
pub(crate) struct Compat {
    /// Ignored.
    #[arg(short, long, hide = true, action = ArgAction::Count)]
    verbose: u8,

    /// Ignored.
    #[arg(
        long,
        hide = true,
        value_name = "NAME",
        value_parser = PossibleValuesParser::new(["sync", "async", "spindle"]),
    )]
    io_engine: Option<String>,
}

/// Values that take the place of those in the superblock or the XML.
#[derive(Debug, clap::Args)]
pub(crate) struct Overrides {
    /// Use this size of data blocks, in sectors of 512 bytes: a multiple of 128 from 128 (64 KiB)
    /// to 2097152 (1 GiB).
    #[arg(long, value_name = "SECTORS", value_parser = data_block_size)]
    pub(crate) data_block_size: Option<u32>,

    /// Use at least this size of the data device, in data blocks; it is never made smaller.
    #[arg(long, value_name = "N")]
    pub(crate) nr_data_blocks: Option<u64>,

    /// Use at least this transaction id; it is never lowered. It must be the one the volume manager
    /// has on record for the pool; LVM does not activate a pool that has another.
    #[arg(long, value_name = "N")]
    pub(crate) transaction_id: Option<u64>,
}

/// Parses a data block size the kernel would accept.
fn data_block_size(text: &str) -> Result<u32, String> {
    let sectors: u32 = text
        .parse()
        .map_err(|_| String::from("not a number of sectors"))?;
    if is_legal_data_block_size(sectors) {
        Ok(sectors)
    } else {
        Err(String::from(
            "the kernel takes multiples of 128 from 128 to 2097152 only",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The arguments of every command pass clap's own checks.
    #[test]
    fn parsers_are_sound() {
        general().debug_assert();
        for spec in all() {
            (spec.build)().debug_assert();
        }
    }

    /// Long and short names lead to the same command.
    #[test]
    fn names_are_found() {
        for spec in all() {
            for name in [spec.name, spec.short] {
                assert!(find(OsStr::new(name)).is_some_and(|s| s.name == spec.name));
            }
            assert_eq!(find_linked(OsStr::new(spec.name)).is_some(), spec.is_tool());
        }
        assert!(find_linked(OsStr::new("check")).is_none());
    }

    /// Help lists options in the alphabetical order of their long names.
    #[test]
    fn options_are_sorted() {
        for (spec, _) in tools() {
            let help = (spec.build)().render_help().to_string();
            // Those for developers follow, under a heading of their own.
            let longs: Vec<&str> = help
                .lines()
                .take_while(|line| !line.starts_with(DEVTOOLS))
                .filter_map(|line| {
                    let line = line.trim_start();
                    let line = line.split_once(", ").map_or(line, |(_, rest)| rest);
                    line.strip_prefix("--")
                        .and_then(|rest| rest.split([' ', '[', '=']).next())
                })
                .collect();
            assert!(longs.is_sorted(), "{}: {longs:?}", spec.name);
            assert!(longs.contains(&"version"), "{}: {help}", spec.name);
        }
    }

    /// Block sizes the kernel refuses are refused.
    #[test]
    fn block_sizes() {
        assert_eq!(data_block_size("128"), Ok(128));
        assert_eq!(data_block_size("2097152"), Ok(2_097_152));
        for wrong in ["0", "64", "129", "2097280", "x", "-128", ""] {
            assert!(data_block_size(wrong).is_err(), "{wrong}");
        }
    }
}
