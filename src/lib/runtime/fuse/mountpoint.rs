//! The folder that is mounted on: what may be there, and what a server that died has left.

use crate::error::{Error, ErrorKind, Result};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::{fs, io};

/// Sees to it that a folder can be mounted on.
///
/// # Errors
/// `Unsuitable` for what is no folder or not empty, `Busy` if something is mounted on it, `Io`.
pub(super) fn prepare(folder: &Path) -> Result<()> {
    let shown = folder.display();
    if is_dead(folder) {
        let stale = format!(
            "{shown} is still mounted though its server has died, and cannot be unmounted; do it with: fusermount3 -u {shown}"
        );
        detach(folder).map_err(|e| Error::io(stale, e))?;
    }
    let failed = |e| Error::io(format!("cannot mount on {shown}"), e);
    let itself = fs::metadata(folder).map_err(failed)?;
    let unsuitable = |what: &str| Error::new(ErrorKind::Unsuitable, format!("{shown} {what}"));
    if !itself.is_dir() {
        return Err(unsuitable("is no folder; give an empty one"));
    }
    let above = fs::metadata(folder.join("..")).map_err(failed)?;
    if itself.dev() != above.dev() {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("something is mounted on {shown} already; unmount it, or give another folder"),
        ));
    }
    match fs::read_dir(folder).map_err(failed)?.next() {
        None => Ok(()),
        Some(_) => Err(unsuitable(
            "is not empty, and what is in it would be hidden; give another folder",
        )),
    }
}

/// True if the server of what is mounted there has died.
fn is_dead(folder: &Path) -> bool {
    let code = |e: io::Error| e.raw_os_error();
    let dead = [Errno::NOTCONN, Errno::CONNABORTED].map(|e| Some(e.raw_os_error()));
    fs::metadata(folder).is_err_and(|e| dead.contains(&code(e)))
}

/// Unmounts what is mounted on a folder, also while it is used.
///
/// # Errors
/// Of `umount2`, or that of fusermount3, which does it for those who are not root.
pub(super) fn detach(folder: &Path) -> io::Result<()> {
    match unmount(folder, UnmountFlags::DETACH) {
        Err(Errno::PERM) => {}
        done => return Ok(done?),
    }
    let mut command = Command::new("fusermount3");
    command.args(["-u", "-z", "-q", "--"]).arg(folder);
    let status = command.stdin(Stdio::null()).status()?;
    match status.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("fusermount3 ended with {status}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_empty_folder_of_its_own_is_mounted_on() {
        let folder = tempfile::tempdir().unwrap();
        assert!(prepare(folder.path()).is_ok());
        let kind = |path: &Path| prepare(path).unwrap_err().kind();
        assert_eq!(kind(&folder.path().join("none")), ErrorKind::Io);
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(kind(&file), ErrorKind::Unsuitable);
        assert_eq!(kind(folder.path()), ErrorKind::Unsuitable);
        assert_eq!(kind(Path::new("/proc")), ErrorKind::Busy);
    }
}
