//! The whole screen of a terminal, for as long as something is shown on it. However the command ends, the terminal is as it was before.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};

/// Another screen, without a cursor; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// What Ctrl-C sends where it is no signal.
const CTRL_C: u8 = 3;

/// A terminal that shows a screen of ours.
pub(crate) struct Terminal {
    /// How its keyboard was, if it is one.
    before: Option<Termios>,
    is_over: Arc<AtomicBool>,
    was_resized: Arc<AtomicBool>,
}

impl Terminal {
    /// Takes the terminal on standard output; none if that is something else.
    pub(crate) fn open() -> io::Result<Option<Self>> {
        if !io::stdout().is_terminal() {
            return Ok(None);
        }
        let this = Self {
            before: tcgetattr(io::stdin()).ok(),
            is_over: Arc::default(),
            was_resized: Arc::default(),
        };
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&this.is_over))?;
        }
        signal_hook::flag::register(SIGWINCH, Arc::clone(&this.was_resized))?;
        if let Some(before) = &this.before {
            let mut keys = before.clone();
            // Each key at once, unseen, those included that would otherwise be signals.
            keys.local_modes &= !(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
            tcsetattr(io::stdin(), OptionalActions::Now, &keys)?;
        }
        write_all(ENTER)?;
        Ok(Some(this))
    }

    /// Columns and rows.
    pub(crate) fn size(&self) -> (usize, usize) {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                (size.ws_col.into(), size.ws_row.into())
            }
            _ => (80, 24),
        }
    }

    /// Shows lines, as much of them as there is room for; the first `bold` in bold.
    pub(crate) fn show(&self, lines: &[String], bold: impl Fn(usize) -> bool) -> io::Result<()> {
        let (columns, rows) = self.size();
        let mut screen = String::from("\x1b[H");
        for (at, line) in lines.iter().take(rows).enumerate() {
            if at > 0 {
                screen.push_str("\r\n");
            }
            let is_bold = bold(at);
            screen.push_str(if is_bold { "\x1b[1m" } else { "" });
            screen.extend(line.chars().take(columns));
            screen.push_str(if is_bold { "\x1b[0m\x1b[K" } else { "\x1b[K" });
        }
        screen.push_str("\x1b[J");
        write_all(&screen)
    }

    /// Waits for so long, or until the size changes; false once the user wants to leave.
    pub(crate) fn wait(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if self.is_over.load(Ordering::Relaxed) {
                return false;
            }
            if left.is_zero() || self.was_resized.swap(false, Ordering::Relaxed) {
                return true;
            }
            let stdin = io::stdin();
            let mut keyboard = [PollFd::new(&stdin, PollFlags::IN)];
            // Without a keyboard there is nothing to watch, but time.
            let watched = if self.before.is_some() {
                &mut keyboard[..]
            } else {
                &mut []
            };
            let left = Timespec::try_from(left).ok();
            let mut key = [0];
            match poll(watched, left.as_ref()) {
                Ok(n) if n > 0 => match io::stdin().read(&mut key) {
                    Ok(1) if matches!(key[0], b'q' | b'Q' | CTRL_C) => return false,
                    Ok(1) => {}
                    // The terminal has gone.
                    _ => return false,
                },
                _ => {}
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Where the terminal has gone there is nothing to put back.
        let _ = write_all(LEAVE);
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

fn write_all(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
