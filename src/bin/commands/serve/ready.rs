//! Tells whoever waits for it that clients can connect.

use std::fs::File;
use std::io::Write;

use anyhow::Context;

/// Tells the service manager, and whoever reads from the descriptor `fd`.
pub(super) fn tell(fd: Option<u32>) -> anyhow::Result<()> {
    if let Some(fd) = fd {
        let path = format!("/proc/self/fd/{fd}");
        let opened = File::options().write(true).open(&path);
        let mut file = opened.with_context(|| format!("cannot write to descriptor {fd}"))?;
        file.write_all(b"ready\n")
            .with_context(|| format!("cannot write to descriptor {fd}"))?;
    }
    sd_notify::notify(&[sd_notify::NotifyState::Ready])
        .context("cannot tell the service manager that it is ready")
}
