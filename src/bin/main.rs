//! `thintools`: one binary that is thin_check, thin_ctl, thin_dump, thin_restore and thin_repair.
//!
//! The name the binary is called by selects the command; called by any other name, the first
//! argument does.

mod commands;
mod exit;
mod output;
mod progress;
mod session;
mod terminal;

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::iter;
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;

use crate::commands::{PROGRAM, Spec, VERSION};
use crate::exit::Exit;

/// Parses the command line, runs the command and reports how it went.
fn main() -> ExitCode {
    dispatch(std::env::args_os()).into()
}

/// Selects the command by the name the program was called by, or else by its first argument.
fn dispatch(mut args: impl Iterator<Item = OsString>) -> Exit {
    let called = args.next().unwrap_or_default();
    let linked = Path::new(&called)
        .file_name()
        .and_then(commands::find_linked);
    if let Some(spec) = linked {
        return run(spec, args);
    }
    let Some(first) = args.next() else {
        return no_command(None);
    };
    if let Some(spec) = commands::find(&first) {
        run(spec, args)
    } else if first == "help" || first.as_encoded_bytes().starts_with(b"-") {
        run_general(iter::once(first).chain(args))
    } else {
        no_command(Some(&first))
    }
}

/// Runs one command with the arguments that follow its name.
fn run(spec: &'static Spec, args: impl Iterator<Item = OsString>) -> Exit {
    output::set_program(spec.program());
    let argv = iter::once(OsString::from(spec.name)).chain(args);
    match (spec.build)().try_get_matches_from(argv) {
        Ok(matches) => run_parsed(spec, &matches),
        Err(err) => report_parse(&err, spec.is_tool()),
    }
}

/// Runs one command with its parsed arguments.
fn run_parsed(spec: &Spec, matches: &clap::ArgMatches) -> Exit {
    match (spec.run)(matches) {
        Ok(exit) => exit,
        Err(err) => {
            if !output::is_broken_pipe(&err) {
                output::print_error(&err);
            }
            let cause = err.downcast_ref::<thintools::Error>();
            cause.map_or(Exit::Failure, session::exit_for)
        }
    }
}

/// Handles a command line that begins with an option of `thintools` itself, or with `help`.
fn run_general(args: impl Iterator<Item = OsString>) -> Exit {
    let argv = iter::once(OsString::from(PROGRAM)).chain(args);
    match commands::general().try_get_matches_from(argv) {
        Ok(matches) => match matches.subcommand() {
            Some((name, inner)) => match commands::find(OsStr::new(name)) {
                Some(spec) => {
                    output::set_program(spec.program());
                    run_parsed(spec, inner)
                }
                None => no_command(Some(OsStr::new(name))),
            },
            None => no_command(None),
        },
        Err(err) => report_parse(&err, false),
    }
}

/// Prints what clap has to say: help and version to standard output, the rest to standard error.
///
/// With `bare_version` the version is a line with the number alone, which is what LVM parses.
fn report_parse(err: &clap::Error, bare_version: bool) -> Exit {
    let printed = match err.kind() {
        ErrorKind::DisplayVersion if bare_version => output::stdout_line(VERSION),
        ErrorKind::DisplayVersion | ErrorKind::DisplayHelp => {
            err.print().and_then(|()| io::stdout().flush())
        }
        _ => {
            // If standard error is closed the exit status still tells.
            let _ = err.print();
            return Exit::Usage;
        }
    };
    match printed {
        Ok(()) => Exit::Ok,
        Err(err) => {
            if err.kind() != io::ErrorKind::BrokenPipe {
                let err = anyhow::Error::new(err).context("cannot write to standard output");
                output::print_error(&err);
            }
            Exit::Failure
        }
    }
}

/// Complains about a missing or unknown command and lists those there are.
fn no_command(given: Option<&OsStr>) -> Exit {
    let complaint = match given {
        Some(name) => format!("unknown command {name:?}"),
        None => String::from("no command given"),
    };
    output::stderr_line(&format!("{PROGRAM}: {complaint}\n\n{}", commands::list()));
    Exit::Usage
}
