//! What a running command shares with the library: progress, warnings, and the wish of the user to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use thintools::io::remove_temporary_files;
use thintools::observer::Observer;
use thintools::tools::Overrides;
use thintools::{Error, ErrorKind};

use crate::commands;
use crate::exit::Exit;
use crate::output;
use crate::progress::Bar;

/// How long a command may take to end in an orderly way after a signal. Blocked in a read or write it would not end at all.
const GRACE: Duration = Duration::from_millis(800);

/// Watches over one command.
pub(crate) struct Session {
    /// Where progress is shown.
    bar: Bar,
    /// Whether warnings are dropped.
    quiet: bool,
    /// Set by SIGINT, SIGTERM and SIGHUP.
    stop: Arc<AtomicBool>,
    /// It has something to say at the end that is worth waiting for, once it knows of the signal.
    is_heard_out: bool,
    /// It knows, and is about to end.
    is_ending: Arc<AtomicBool>,
    /// Ends the watch.
    signals: Handle,
}

impl Drop for Session {
    fn drop(&mut self) {
        // A command that serves after it has checked heeds signals in its own way.
        self.signals.close();
    }
}

impl Session {
    /// Begins to watch; `title` stands before the progress bar.
    pub(crate) fn new(title: &'static str, quiet: bool) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let heeded = [SIGINT, SIGTERM, SIGHUP]
            .into_iter()
            .filter(|&s| !is_ignored(s));
        let mut signals = Signals::new(heeded)?;
        let handle = signals.handle();
        let flag = Arc::clone(&stop);
        let is_ending = Arc::new(AtomicBool::new(false));
        let ending = Arc::clone(&is_ending);
        std::thread::Builder::new().spawn(move || {
            if signals.forever().next().is_none() {
                return;
            }
            flag.store(true, Ordering::Relaxed);
            let deadline = Instant::now() + GRACE;
            while (Instant::now() < deadline || ending.load(Ordering::Relaxed))
                && signals.pending().next().is_none()
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            remove_temporary_files();
            std::process::exit(Exit::Interrupted.code().into());
        })?;
        Ok(Self {
            bar: Bar::new(title, quiet),
            quiet,
            stop,
            is_heard_out: false,
            is_ending,
            signals: handle,
        })
    }

    /// Lets the command end in its own time once it knows of the first signal. A second one ends it all the same.
    pub(crate) fn heard_out(mut self) -> Self {
        self.is_heard_out = true;
        self
    }

    /// Prints a line on standard error, unless the user asked for quiet.
    pub(crate) fn say(&self, line: &str) {
        if !self.quiet {
            self.bar.suspend(|| output::stderr_line(line));
        }
    }
}

impl Observer for Session {
    fn progress(&self, phase: &'static str, done: u64, total: u64) {
        self.bar.phase(phase);
        if let Some(permille) = (done.min(total) * 1000).checked_div(total) {
            self.bar.set(u16::try_from(permille).unwrap_or(1000));
        }
    }

    fn warning(&self, message: &str) {
        self.say(&format!("{}: warning: {message}", output::program()));
    }

    fn is_cancelled(&self) -> bool {
        let is_cancelled = self.stop.load(Ordering::Relaxed);
        if is_cancelled && self.is_heard_out {
            self.is_ending.store(true, Ordering::Relaxed);
        }
        is_cancelled
    }
}

/// Whether whoever started the process wants it to ignore a signal, as nohup and background jobs of shells do.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok());
    mask.unwrap_or(0) >> (signal - 1) & 1 != 0
}

/// The exit status for an error of the library.
pub(crate) fn exit_for(error: &Error) -> Exit {
    match error.kind() {
        ErrorKind::Io
        | ErrorKind::Busy
        | ErrorKind::OutputTooSmall
        | ErrorKind::BrokenPipe
        | ErrorKind::Unsuitable
        | ErrorKind::NoSpace
        | ErrorKind::Exists
        | ErrorKind::NotFound
        | ErrorKind::InvalidArgument
        | ErrorKind::ReadOnly => Exit::Failure,
        ErrorKind::NotMetadata | ErrorKind::Damaged | ErrorKind::InvalidDescription => Exit::Fatal,
        ErrorKind::Interrupted => Exit::Interrupted,
    }
}

impl From<&commands::Overrides> for Overrides {
    fn from(from: &commands::Overrides) -> Self {
        Self {
            transaction_id: from.transaction_id,
            data_block_size: from.data_block_size,
            nr_data_blocks: from.nr_data_blocks,
        }
    }
}
