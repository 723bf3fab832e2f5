//! `thintools man`: the manual pages, made from the command line parsers and the page texts.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use thintools::tools::check::Code;

use super::{COMMANDS, DEVTOOLS, PROGRAM, Page, TITLE as PROGRAM_TITLE, VERSION};
use crate::exit::{self, Exit};
use crate::output;

/// The name of the command.
pub(crate) const NAME: &str = "man";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Write the manual pages to a directory";

/// The section of the manual all pages belong to: system administration.
const SECTION: &str = "8";

/// What the one environment variable does.
const TMPDIR: &str = "Where temporary files go, /tmp if it is not set: a compressed image is expanded there, XML \
                      from a pipe is copied there because it is read twice, and thin_restore and thin_repair keep \
                      there what devices share while they work out the size, and thin_repair --in-place what it is \
                      going to write. They have no names and vanish with \
                      the process. A folder in memory counts against the memory.";

/// The page of `thintools` itself.
const PAGE: Page = Page {
    description: &[
        "thintools reads and writes the metadata of thin pools, the on-disk data structures in \
         which the dm-thin target of the Linux kernel records the thin devices of a pool and the \
         data blocks they use. One binary contains all of the commands.",
        "When the program is called by the name of a thin_* command, usually through a symbolic \
         link, it is that command. Called by any other name, it takes the name of a command, in \
         its long form (thin_check) or its short form (check), as the first argument.",
        "Never change the metadata of a pool that is active. The commands that write ask the \
         kernel for exclusive access and refuse to work on a device that is in use.",
    ],
    sections: &[],
    examples: &[
        (
            "Make the commands available under their own names:",
            &["thintools install-links /usr/sbin"],
        ),
        (
            "Check the metadata of a pool without any links:",
            &["thintools check /dev/mapper/vg-pool_tmeta"],
        ),
        (
            "Have bash complete options in this session:",
            &["source <(thintools completions bash)"],
        ),
    ],
    files: &[(
        "/etc/lvm/lvm.conf",
        "Tells LVM, in the section global, where the thin_* commands are and which options to \
         give them.",
    )],
    see_also: &[("lvmthin", "7"), ("dmsetup", "8"), ("lvm.conf", "5")],
};

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory to write the pages to; it is made if there is none.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> Command {
    let cmd = Command::new(NAME).bin_name(format!("{PROGRAM} {NAME}"));
    <Args as clap::Args>::augment_args(cmd)
        .about(TITLE)
        .long_about(None)
}

/// Writes the pages.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    fs::create_dir_all(&args.dir)
        .with_context(|| format!("cannot make the directory {}", args.dir.display()))?;
    let mut pages = vec![(
        PROGRAM,
        render(super::general(), PROGRAM_TITLE, &PAGE, true),
    )];
    for (spec, page) in super::tools() {
        let cmd = (spec.build)();
        pages.push((spec.name, render(cmd, spec.title, page, false)));
    }
    for (name, text) in pages {
        let path = args.dir.join(format!("{name}.{SECTION}"));
        text.and_then(|text| fs::write(&path, text))
            .with_context(|| format!("cannot write {}", path.display()))?;
        output::stdout_line(&path.display().to_string())
            .context("cannot write to standard output")?;
    }
    Ok(Exit::Ok)
}

/// Renders one page.
fn render(
    mut cmd: Command,
    title: &'static str,
    page: &Page,
    with_commands: bool,
) -> std::io::Result<Vec<u8>> {
    let name = cmd.get_name().to_owned();
    let usage = cmd.render_usage().to_string();
    let usage = usage.strip_prefix("Usage: ").unwrap_or(&usage).to_owned();
    let cmd = cmd.override_usage(usage).about(lower_first(title));
    let cmd = cmd.mut_args(|arg| match arg.get_help_heading() {
        Some(DEVTOOLS) => arg.hide(true),
        _ => arg,
    });
    let subcommands: Vec<Command> = match with_commands {
        true => Vec::new(),
        false => cmd.get_subcommands().cloned().collect(),
    };
    let man = Man::new(cmd);
    let mut out = Vec::new();
    // clap_mangen leaves out an empty date, so that all that follows is in the wrong place.
    out.extend_from_slice(
        format!(".TH {name} {SECTION} \"\" \"{PROGRAM} {VERSION}\" {PROGRAM}\n").as_bytes(),
    );
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    section(&mut out, "DESCRIPTION", |roff| {
        paragraphs(roff, page.description);
    })?;
    if with_commands {
        section(&mut out, "COMMANDS", command_list)?;
    }
    man.render_options_section(&mut out)?;
    if !subcommands.is_empty() {
        section(&mut out, "SUBCOMMANDS", |roff| {
            for sub in subcommands {
                subcommand(roff, &name, sub);
            }
        })?;
    }
    for (heading, text) in page.sections {
        section(&mut out, heading, |roff| paragraphs(roff, text))?;
    }
    if name == super::check::NAME {
        section(&mut out, "DAMAGE CODES", |roff| {
            for code in Code::ALL {
                let meaning = format!("{}: {}.", code.severity(), code.meaning());
                item(roff, code.name(), &meaning);
            }
        })?;
    }
    section(&mut out, "EXIT STATUS", |roff| {
        for (exit, meaning) in exit::TABLE {
            item(roff, &exit.code().to_string(), meaning);
        }
    })?;
    section(&mut out, "EXAMPLES", |roff| {
        for (at, (purpose, lines)) in page.examples.iter().enumerate() {
            if at > 0 {
                roff.control("PP", []);
            }
            paragraphs(roff, &[purpose]);
            roff.control("PP", []);
            roff.control("RS", ["4"]);
            roff.control("nf", []);
            for line in *lines {
                roff.text([roman(*line)]);
            }
            roff.control("fi", []);
            roff.control("RE", []);
        }
    })?;
    section(&mut out, "ENVIRONMENT", |roff| item(roff, "TMPDIR", TMPDIR))?;
    if !page.files.is_empty() {
        section(&mut out, "FILES", |roff| {
            for (path, meaning) in page.files {
                item(roff, path, meaning);
            }
        })?;
    }
    section(&mut out, "SEE ALSO", |roff| see_also(roff, &name, page))?;
    Ok(out)
}

/// Appends a section with the content `fill` puts in it.
fn section(out: &mut Vec<u8>, heading: &str, fill: impl FnOnce(&mut Roff)) -> std::io::Result<()> {
    let mut roff = Roff::default();
    roff.control("SH", [heading]);
    fill(&mut roff);
    // The preamble of the page is there already; a section needs none of its own.
    out.extend_from_slice(roff.to_roff().as_bytes());
    Ok(())
}

/// Appends paragraphs.
fn paragraphs(roff: &mut Roff, text: &[&str]) {
    for (at, paragraph) in text.iter().enumerate() {
        if at > 0 {
            roff.control("PP", []);
        }
        roff.text([roman(*paragraph)]);
    }
}

/// Appends an item of a list: a term in bold, and what it means.
fn item(roff: &mut Roff, term: &str, meaning: &str) {
    roff.control("TP", []);
    roff.text([bold(term)]);
    roff.text([roman(meaning)]);
}

/// Appends the list of commands.
fn command_list(roff: &mut Roff) {
    for spec in COMMANDS {
        if spec.is_tool() {
            let meaning = format!("{}. See {}({SECTION}).", spec.title, spec.name);
            item(roff, &format!("{}, {}", spec.short, spec.name), &meaning);
            continue;
        }
        let usage = (spec.build)().render_usage().to_string();
        let usage = usage
            .strip_prefix("Usage: thintools ")
            .unwrap_or(spec.name)
            .to_owned();
        let meaning = match (spec.build)().get_long_about() {
            Some(long) => long.to_string(),
            None => format!("{}.", spec.title),
        };
        item(roff, &usage, &meaning);
    }
}

/// Appends a subcommand of `name` with its options.
fn subcommand(roff: &mut Roff, name: &str, sub: Command) {
    let called = format!("{name} {}", sub.get_name());
    let mut sub = sub.bin_name(called);
    let usage = sub.render_usage().to_string();
    let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
    item(
        roff,
        usage.trim_start_matches("Usage: "),
        &format!("{about}."),
    );
    roff.control("RS", []);
    for arg in sub.get_arguments().filter(|arg| arg.get_id() != "help") {
        let names = arg.get_value_names().unwrap_or_default();
        let is_flag = !arg.get_action().takes_values();
        let value = names.first().filter(|_| !is_flag);
        let value = value.map(|value| format!("<{value}>"));
        let short = arg.get_short().map(|short| format!("-{short}"));
        let long = arg.get_long().map(|long| format!("--{long}"));
        let called: Vec<String> = short.into_iter().chain(long).collect();
        let words = [called.join(", "), value.unwrap_or_default()];
        let term = words.join(" ").trim().to_owned();
        let help = arg.get_long_help().or(arg.get_help());
        item(
            roff,
            term.trim_end(),
            &help.map(ToString::to_string).unwrap_or_default(),
        );
    }
    roff.control("RE", []);
}

/// Appends references to the other pages, ours first.
fn see_also(roff: &mut Roff, name: &str, page: &Page) {
    let mut pages = vec![(PROGRAM, SECTION)];
    pages.extend(super::tools().map(|(spec, _)| (spec.name, SECTION)));
    pages.retain(|(other, _)| *other != name);
    pages.extend_from_slice(page.see_also);
    let mut line = Vec::new();
    for (at, (other, number)) in pages.iter().enumerate() {
        if at > 0 {
            line.push(roman(", "));
        }
        line.push(bold(*other));
        line.push(roman(format!("({number})")));
    }
    roff.text(line);
}

/// `text` with its first letter in lower case, as titles in NAME sections are.
fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every page has the sections readers look for, and comes out the same each time.
    #[test]
    fn pages_are_complete() -> std::io::Result<()> {
        for (spec, page) in super::super::tools() {
            let text = render((spec.build)(), spec.title, page, false)?;
            assert_eq!(text, render((spec.build)(), spec.title, page, false)?);
            let text = String::from_utf8_lossy(&text).into_owned();
            for heading in [
                "NAME",
                "SYNOPSIS",
                "DESCRIPTION",
                "OPTIONS",
                "\"EXIT STATUS\"",
                "EXAMPLES",
                "\"SEE ALSO\"",
            ] {
                assert!(text.contains(&format!(".SH {heading}\n")), "{heading}");
            }
            assert!((2..=6).contains(&page.description.len()), "{}", spec.name);
        }
        Ok(())
    }
}
