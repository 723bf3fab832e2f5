//! `thintools completions`: completion scripts for shells.

use std::io::{self, Write};

use anyhow::Context;
use clap::ValueEnum;
use clap_complete::Shell;

use super::PROGRAM;
use crate::exit::Exit;

/// The name of the command.
pub(crate) const NAME: &str = "completions";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Write a shell completion script to standard output";

/// Shells there are scripts for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Target {
    /// bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell to write the script for.
    #[arg(value_name = "SHELL")]
    shell: Target,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = clap::Command::new(NAME).bin_name(format!("{PROGRAM} {NAME}"));
    <Args as clap::Args>::augment_args(cmd)
        .about(TITLE)
        .long_about(
            "Write a completion script for thintools and the thin_* commands to standard output. \
             With bash and zsh, make it take effect in the running shell by \
             'source <(thintools completions bash)' or 'source <(thintools completions zsh)'; to \
             keep it, store it where the shell looks for completions (zsh: as _thintools).",
        )
}

/// Writes the script.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let mut out = io::stdout().lock();
    out.write_all(&script(args.shell))
        .and_then(|()| out.flush())
        .context("cannot write to standard output")?;
    Ok(Exit::Ok)
}

/// The script for one shell, which serves all names the binary has.
fn script(target: Target) -> Vec<u8> {
    let shell = match target {
        Target::Bash => Shell::Bash,
        Target::Zsh => Shell::Zsh,
        Target::Fish => Shell::Fish,
    };
    let mut text = Vec::new();
    if matches!(target, Target::Zsh) {
        // Only the first line of a file tells zsh which commands the file is for.
        let mut line = format!("#compdef {PROGRAM}");
        for (spec, _) in super::tools() {
            line.push(' ');
            line.push_str(spec.name);
        }
        text.extend_from_slice(line.as_bytes());
        text.extend_from_slice(b"\n\n");
    }
    for (spec, _) in super::tools() {
        clap_complete::generate(shell, &mut (spec.build)(), spec.name, &mut text);
        text.push(b'\n');
    }
    if matches!(target, Target::Zsh) {
        // When zsh loads the file for another name, the functions defined so far are enough.
        text.extend_from_slice(
            b"if [ \"$funcstack[1]\" = \"_thintools\" ] && [ \"$service\" != \"thintools\" ]; then\n\
              \x20   \"_$service\" \"$@\"\n\
              \x20   return\n\
              fi\n\n",
        );
    }
    clap_complete::generate(shell, &mut super::general(), PROGRAM, &mut text);
    text
}
