//! Exports as files of a folder: a FUSE file system with one sparse file per export.
//!
//! 1. The kernel caches nothing of a file: each is opened for direct I/O, and names and attributes are asked for each time. So what
//!    is written elsewhere, over NBD for example, is read at once, and direct writes go on side by side.
//! 2. A request is answered by whoever ends it. The threads of the session (`filesystem`) do not wait for the pool; what would block
//!    them is the throttle alone, which is there for that.
//! 3. A file that is open holds its export, and an export that is held is in use.
//!
//! A folder on which a server died is "not connected" to everybody; mounting clears that away (`mountpoint`).

mod directory;
mod file;
mod filesystem;
mod mountpoint;

use self::filesystem::Folder;
use super::export::Exports;
use crate::error::{Error, Result};
use fuser::{Config, MountOption, Session, SessionUnmounter};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// The file system's type, after `fuse.`, and its source.
const NAME: &str = "thin_serve";
/// Threads that take requests. Each waits for the disk when what it reads is mapped.
const THREADS: usize = 4;
/// Users of open files have this time when the server stops.
const LAST_USERS: Duration = Duration::from_secs(5);
/// Where something waits for what may never come they have this, as clients of NBD have: they could not go on.
const LAST_WAITS: Duration = Duration::from_secs(1);

/// A folder in which exports are files, until it is [stopped](Self::stop).
pub struct Fuse {
    folder: PathBuf,
    exports: Arc<dyn Exports>,
    unmounter: SessionUnmounter,
    /// Held to read while requests are submitted; true when no more are taken.
    is_over: Arc<RwLock<bool>>,
    /// Disconnected when the session has ended.
    ended: Receiver<()>,
    is_unmounted: bool,
}

impl Fuse {
    /// Mounts on `folder`, an empty one; what a server that died has left mounted there is unmounted first. When this returns, files
    /// can be opened. `at_end` is called when the folder is no longer mounted, whoever unmounted it.
    ///
    /// # Errors
    /// `Unsuitable` for what is no folder or not empty, `Busy` if something is mounted on it, `Io`.
    pub fn mount(
        folder: &Path,
        exports: Arc<dyn Exports>,
        at_end: impl FnOnce() + Send + 'static,
    ) -> Result<Self> {
        mountpoint::prepare(folder)?;
        let failed = |e| {
            let what = format!(
                "cannot mount on {}; it takes /dev/fuse, and without root fusermount3, which is in the package fuse3",
                folder.display()
            );
            Error::io(what, e)
        };
        let is_over = Arc::new(RwLock::new(false));
        let files = Folder::new(Arc::clone(&exports), Arc::clone(&is_over));
        let mut session = Session::new(files, folder, &config()).map_err(failed)?;
        let unmounter = session.unmount_callable();
        let (ends, ended) = mpsc::channel();
        let run = move || {
            let _ends: mpsc::Sender<()> = ends;
            // It ends when it is unmounted; a session that breaks off has nobody left to tell.
            let _ = session.run();
            at_end();
        };
        let thread = std::thread::Builder::new().name("fuse".into());
        let mut this = Self {
            folder: folder.to_owned(),
            exports,
            unmounter,
            is_over,
            ended,
            is_unmounted: false,
        };
        match thread.spawn(run) {
            Ok(_) => Ok(this),
            Err(e) => {
                this.unmount();
                Err(Error::io("cannot start the thread of the file system", e))
            }
        }
    }

    /// Unmounts, gives those who have files open a few seconds, or one if something [waits](Exports::waits), and takes no more requests then:
    /// they are answered with `EIO`, and the exports are told to [end waits](Exports::end_waits).
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.unmount();
        // Nothing is sent: this waits for the session to end, or until time is up.
        let is_used_for = |time| self.ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
        if is_used_for(LAST_WAITS) && (self.exports.waits() || is_used_for(LAST_USERS - LAST_WAITS))
        {
            // Their threads may wait, too.
            self.exports.end_waits();
        }
        *self.is_over.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    fn unmount(&mut self) {
        if std::mem::replace(&mut self.is_unmounted, true) {
            return;
        }
        // Somebody may have files open, a loop device for example: then the folder goes now, and the rest with the last of them.
        if self.unmounter.unmount().is_err() {
            mountpoint::detach(&self.folder).ok();
        }
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        if !self.is_unmounted {
            self.end();
        }
    }
}

fn config() -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(NAME.into()),
        MountOption::Subtype(NAME.into()),
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    config
}
