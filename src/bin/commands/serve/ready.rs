//! Tells whoever waits for it that clients can connect.
#![allow(
    unsafe_code,
    reason = "a descriptor that was handed down is known by its number only"
)]

use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, RawFd};

use anyhow::Context;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use thintools::{Error, ErrorKind};

/// The first descriptor that is no standard stream.
const FIRST: RawFd = 3;

/// Who is to be told.
pub(super) struct Ready {
    /// What --ready-fd names, with its number.
    file: Option<(File, RawFd)>,
}

impl Ready {
    /// Takes the descriptor of the command line, before any other is opened: one that is not open would be somebody else's later.
    pub(super) fn take(fd: Option<RawFd>) -> anyhow::Result<Self> {
        let Some(fd) = fd else {
            return Ok(Self { file: None });
        };
        // SAFETY: numbers below zero are refused by the parser of the command line, and this borrow ends with the function, in which nothing
        // is closed. A descriptor that is not open makes the first call fail.
        let given = unsafe { BorrowedFd::borrow_raw(fd) };
        let shown = || format!("cannot write to descriptor {fd} (--ready-fd)");
        // What is written goes where whoever handed it down would write: at its place, to its end of a socket.
        let own = fcntl_dupfd_cloexec(given, FIRST).with_context(shown)?;
        let access = fcntl_getfl(&own).with_context(shown)? & OFlags::ACCMODE;
        if access != OFlags::WRONLY && access != OFlags::RDWR {
            let what = format!("descriptor {fd} (--ready-fd) is not open to be written to");
            return Err(Error::new(ErrorKind::Unsuitable, what).into());
        }
        if fd >= FIRST {
            // The command of --run would keep the other end from seeing the end.
            fcntl_setfd(given, FdFlags::CLOEXEC).with_context(shown)?;
        }
        Ok(Self {
            file: Some((own.into(), fd)),
        })
    }

    /// Tells the service manager, and whoever reads from the descriptor.
    pub(super) fn tell(self) -> anyhow::Result<()> {
        if let Some((mut file, fd)) = self.file {
            file.write_all(b"ready\n").map_err(|e| {
                let what = format!("cannot write to descriptor {fd} (--ready-fd)");
                // Of a reader of our output that went away nobody would be told.
                Error::with_source(ErrorKind::Io, format!("{what}: {e}"), e.to_string())
            })?;
        }
        sd_notify::notify(&[sd_notify::NotifyState::Ready])
            .context("cannot tell the service manager that it is ready")
    }
}
