//! Lines on standard output and standard error that never panic when nobody reads them.

use std::error::Error;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, OnceLock};

/// The name errors are reported under, once it is known.
static PROGRAM: OnceLock<&'static str> = OnceLock::new();

/// Sets the name errors are reported under. Only the first call has an effect.
pub(crate) fn set_program(name: &'static str) {
    // A second call is harmless: the first name is the one the user typed.
    let _ = PROGRAM.set(name);
}

/// The name errors are reported under.
pub(crate) fn program() -> &'static str {
    PROGRAM.get().copied().unwrap_or("thintools")
}

/// Writes one line to standard output and hands it over at once.
pub(crate) fn stdout_line(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Writes one line to standard error; when that is closed the line is lost.
pub(crate) fn stderr_line(line: &str) {
    let mut text = String::with_capacity(line.len() + 1);
    text.push_str(line);
    text.push('\n');
    // There is no place left to report a failure to write an error message.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Prints an error with its causes on standard error, as `thin_check: outer: inner`.
///
/// Causes that the text before them ends with already are not repeated.
pub(crate) fn print_error(err: &anyhow::Error) {
    stderr_line(&format!("{}: {}", program(), chain_text(err)));
}

/// The messages of an error and its causes, outermost first, joined by `: `.
fn chain_text(err: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in err.chain() {
        let message = cause.to_string();
        if message.is_empty() || text.ends_with(&message) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&message);
    }
    text
}

/// Whether an error comes down to the reader of our output having gone away.
///
/// That is no failure worth a message: `thin_dump DEV | head` ends this way.
pub(crate) fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.chain()
        .any(|cause| io_kind(cause) == Some(ErrorKind::BrokenPipe))
}

/// The kind of I/O error `cause` is or directly holds, if any.
fn io_kind(cause: &(dyn Error + 'static)) -> Option<ErrorKind> {
    if let Some(err) = cause.downcast_ref::<io::Error>() {
        Some(err.kind())
    } else if let Some(err) = cause.downcast_ref::<Arc<io::Error>>() {
        Some(err.kind())
    } else {
        cause
            .downcast_ref::<serde_json::Error>()
            .and_then(serde_json::Error::io_error_kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    /// Causes follow their effects, each once.
    #[test]
    fn chain_is_printed_once() {
        let err = anyhow!("inner").context("outer: inner").context("top");
        assert_eq!(chain_text(&err), "top: outer: inner");
    }

    /// A broken pipe is recognised below added context.
    #[test]
    fn broken_pipe_is_found() {
        let broken: io::Result<()> = Err(ErrorKind::BrokenPipe.into());
        let full: io::Result<()> = Err(ErrorKind::StorageFull.into());
        assert!(
            broken
                .context("cannot write")
                .is_err_and(|e| is_broken_pipe(&e))
        );
        assert!(
            full.context("cannot write")
                .is_err_and(|e| !is_broken_pipe(&e))
        );
    }
}
