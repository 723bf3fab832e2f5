//! What a running command shares with the library: progress, warnings, and the wish of the user to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use thintools::observer::Observer;
use thintools::tools::Overrides;
use thintools::{Error, ErrorKind};

use crate::commands;
use crate::exit::Exit;
use crate::output;
use crate::progress::Bar;

/// Watches over one command.
pub(crate) struct Session {
    /// Where progress is shown.
    bar: Bar,
    /// Whether warnings are dropped.
    quiet: bool,
    /// Set by SIGINT, SIGTERM and SIGHUP; a second signal ends the process at once.
    stop: Arc<AtomicBool>,
}

impl Session {
    /// Begins to watch; `title` stands before the progress bar.
    pub(crate) fn new(title: &'static str, quiet: bool) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [
            signal_hook::consts::SIGINT,
            signal_hook::consts::SIGTERM,
            signal_hook::consts::SIGHUP,
        ] {
            let code = i32::from(Exit::Interrupted.code());
            signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&stop))?;
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        Ok(Self {
            bar: Bar::new(title, quiet),
            quiet,
            stop,
        })
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
        self.stop.load(Ordering::Relaxed)
    }
}

/// The exit status for an error of the library.
pub(crate) fn exit_for(error: &Error) -> Exit {
    match error.kind() {
        ErrorKind::Io
        | ErrorKind::Busy
        | ErrorKind::OutputTooSmall
        | ErrorKind::BrokenPipe
        | ErrorKind::Unsuitable => Exit::Failure,
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
