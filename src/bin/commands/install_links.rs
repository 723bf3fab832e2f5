//! `thintools install-links`: symbolic links that give the binary its other names.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};

use super::PROGRAM;
use crate::exit::Exit;
use crate::output;

/// The name of the command.
pub(crate) const NAME: &str = "install-links";

/// What the command does, in one line.
pub(crate) const TITLE: &str = "Make symbolic links for the thin_* commands";

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory to make the links in, for example /usr/sbin.
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Replace files of these names that are not links to this program.
    #[arg(long)]
    force: bool,
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    let cmd = clap::Command::new(NAME).bin_name(format!("{PROGRAM} {NAME}"));
    <Args as clap::Args>::augment_args(cmd)
        .about(TITLE)
        .long_about(
            "Make the symbolic links thin_check, thin_ctl, thin_dump, thin_repair and thin_restore \
             in DIR, pointing to this program. A file that already has one of these names is left alone \
             unless --force is given; then the link takes its place in one step, so that the name \
             is there at any moment.",
        )
}

/// What became of one link.
enum Made {
    /// The link is new.
    New,
    /// The link was there already.
    Kept,
    /// The link took the place of another file.
    Replaced,
}

/// Makes the links; goes on after a failure so that one odd file does not hide the others.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let exe = std::env::current_exe()
        .and_then(|path| path.canonicalize())
        .context("cannot find the file of the running program; start it again by its full path")?;
    let dir = args.dir.canonicalize().with_context(|| {
        format!(
            "cannot use {}; give a directory that exists",
            args.dir.display()
        )
    })?;
    if !dir.is_dir() {
        bail!(
            "{} is not a directory; give a directory that exists",
            args.dir.display()
        );
    }
    let target = match exe.file_name() {
        Some(name) if exe.parent() == Some(dir.as_path()) => PathBuf::from(name),
        _ => exe.clone(),
    };
    let mut exit = Exit::Ok;
    for (spec, _) in super::tools() {
        let shown = args.dir.join(spec.name);
        match make_link(&exe, &target, &dir.join(spec.name), args.force) {
            Ok(made) => {
                let note = match made {
                    Made::New => "",
                    Made::Kept => " (was there already)",
                    Made::Replaced => " (replaced another file)",
                };
                output::stdout_line(&format!(
                    "{} -> {}{note}",
                    shown.display(),
                    target.display()
                ))
                .context("cannot write to standard output")?;
            }
            Err(err) => {
                output::print_error(&err.context(format!("cannot make {}", shown.display())));
                exit = Exit::Failure;
            }
        }
    }
    Ok(exit)
}

/// Makes `link` a symbolic link to `target`, which is how the links name the program `exe`.
fn make_link(exe: &Path, target: &Path, link: &Path, force: bool) -> anyhow::Result<Made> {
    match symlink(target, link) {
        Ok(()) => return Ok(Made::New),
        Err(err) if err.kind() == ErrorKind::AlreadyExists => {}
        Err(err) => {
            return Err(anyhow!(err).context("check that you may write to the directory"));
        }
    }
    if link == exe {
        bail!("this is the running program itself; rename it to {PROGRAM} and start it again");
    }
    let metadata =
        fs::symlink_metadata(link).context("cannot look at the file of that name; try again")?;
    if metadata.is_symlink() && link.canonicalize().is_ok_and(|path| path == exe) {
        return Ok(Made::Kept);
    }
    if metadata.is_dir() {
        bail!("a directory has that name; remove it first");
    }
    if !force {
        bail!("another file has that name; remove it, or give --force to replace it");
    }
    let temporary = temporary_link(target, link)?;
    if let Err(err) = fs::rename(&temporary, link) {
        // The error to report is that of the rename.
        let _ = fs::remove_file(&temporary);
        return Err(anyhow!(err).context("cannot replace the file of that name; remove it first"));
    }
    Ok(Made::Replaced)
}

/// Makes a symbolic link to `target` under an unused name next to `link`.
fn temporary_link(target: &Path, link: &Path) -> anyhow::Result<PathBuf> {
    let base = link.file_name().unwrap_or_default();
    for attempt in 0..100_u32 {
        let mut name = OsString::from(".");
        name.push(base);
        name.push(format!(".{}-{attempt}", std::process::id()));
        let path = link.with_file_name(name);
        match symlink(target, &path) {
            Ok(()) => return Ok(path),
            Err(err) if err.kind() == ErrorKind::AlreadyExists => {}
            Err(err) => {
                return Err(anyhow!(err).context("check that you may write to the directory"));
            }
        }
    }
    bail!(
        "left-over links {}.* are in the way; remove them",
        link.with_file_name(format!(".{}", base.to_string_lossy()))
            .display()
    )
}
