//! A progress bar on standard error that stays out of the way of short runs and scripts.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Nothing is drawn before this much time has passed.
const DELAY: Duration = Duration::from_millis(300);

/// The value that stands for the whole of the work.
const FULL: u16 = 1000;

/// A progress bar, shown only when standard error is a terminal and the user did not ask for quiet.
///
/// All methods take `&self` and may be called from several threads.
pub(crate) struct Bar {
    /// The bar proper; absent when it must never be shown.
    live: Option<Live>,
}

/// The state of a bar that may be shown.
struct Live {
    /// The bar as indicatif knows it, without a draw target until the delay has passed.
    bar: ProgressBar,
    /// When the work began.
    start: Instant,
    /// Whether the bar has been given the terminal.
    shown: AtomicBool,
    /// The last value set.
    last: AtomicU16,
}

impl Bar {
    /// Makes a bar with the title `title`; nothing is drawn yet.
    pub(crate) fn new(title: &'static str, quiet: bool) -> Self {
        if quiet || !io::stderr().is_terminal() {
            return Self { live: None };
        }
        let bar =
            ProgressBar::with_draw_target(Some(u64::from(FULL)), ProgressDrawTarget::hidden());
        // The template is a constant; should it ever be wrong, indicatif's default bar serves.
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:40}] ETA {eta} {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(title);
        Self {
            live: Some(Live {
                bar,
                start: Instant::now(),
                shown: AtomicBool::new(false),
                last: AtomicU16::new(0),
            }),
        }
    }

    /// Moves the bar to `permille` thousandths of the work; more than 1000 counts as 1000.
    pub(crate) fn set(&self, permille: u16) {
        let Some(live) = &self.live else { return };
        let value = permille.min(FULL);
        let unchanged = live.last.swap(value, Ordering::Relaxed) == value;
        if unchanged && live.shown.load(Ordering::Relaxed) {
            return;
        }
        live.show_when_due();
        live.bar.set_position(u64::from(value));
    }

    /// Names the part of the work that begins now, to the right of the bar.
    pub(crate) fn phase(&self, name: &str) {
        let Some(live) = &self.live else { return };
        live.show_when_due();
        live.bar.set_message(name.to_owned());
    }

    /// Runs `f` with the bar taken off the terminal, so that `f` can print whole lines.
    pub(crate) fn suspend<R>(&self, f: impl FnOnce() -> R) -> R {
        match &self.live {
            Some(live) => live.bar.suspend(f),
            None => f(),
        }
    }

    /// Removes the bar from the terminal. Dropping the bar does the same.
    pub(crate) fn finish(&self) {
        if let Some(live) = &self.live {
            live.bar.finish_and_clear();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Live {
    /// Gives the bar the terminal once the delay has passed.
    fn show_when_due(&self) {
        if self.shown.load(Ordering::Relaxed) || self.start.elapsed() < DELAY {
            return;
        }
        if !self.shown.swap(true, Ordering::Relaxed) {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}
