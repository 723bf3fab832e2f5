//! The one error type of the library: what class of failure, which values, and the cause below it.
//!
//! Callers match on [`ErrorKind`]; the binary prints the chain of messages once and turns the kind into an exit code.
//! Every message carries the offending value, the bound it broke, and what to do next where there is something to do.

use std::error::Error as StdError;

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

/// What class of failure an [`Error`] is; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The operating system refused or failed an operation (open, read, write, sync).
    Io,
    /// The device is in use by somebody else, most often an active pool.
    Busy,
    /// The input is not thin metadata at all: too small, a directory, text.
    NotMetadata,
    /// The metadata is damaged where it was needed.
    Damaged,
    /// The XML (or the event stream) describes something that is not valid metadata.
    InvalidDescription,
    /// The output cannot take what has to be written.
    OutputTooSmall,
    /// What was asked for contradicts itself or the metadata (output is the input, unknown device).
    Unsuitable,
    /// A device has no room left for what has to be written, the metadata device or the data device.
    NoSpace,
    /// What is to be made exists already.
    Exists,
    /// What was named is not there.
    NotFound,
    /// An argument that is out of range or does not go with the state.
    InvalidArgument,
    /// The metadata must not be changed now.
    ReadOnly,
    /// The reader of our output went away.
    BrokenPipe,
    /// The user asked to stop.
    Interrupted,
}

impl ErrorKind {
    /// The name of the kernel's error, and what programs print for it; none for what never comes from the state of a pool.
    pub fn errno(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Self::Exists => ("EEXIST", "File exists"),
            Self::NotFound => ("ENODATA", "No data available"),
            Self::InvalidArgument => ("EINVAL", "Invalid argument"),
            Self::Busy => ("EBUSY", "Device or resource busy"),
            Self::NoSpace => ("ENOSPC", "No space left on device"),
            Self::ReadOnly => ("EOPNOTSUPP", "Operation not supported"),
            _ => return None,
        })
    }
}

/// An error with its class, a message for people, and its cause.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    #[source]
    source: Option<Box<dyn StdError + Send + Sync>>,
    event: Option<EventFault>,
}

/// Which part of an event was refused, so that a source that knows positions can add them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventFault {
    /// Index in the batch of mapping runs; 0 for other events.
    pub index: usize,
    /// The field at fault, by its XML attribute name.
    pub attribute: &'static str,
}

impl Error {
    /// An error without a cause below it.
    #[cold]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
            event: None,
        }
    }

    /// An error caused by `source`.
    #[cold]
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self {
            source: Some(source.into()),
            ..Self::new(kind, message)
        }
    }

    /// A failed system call; a closed pipe keeps a kind of its own.
    #[cold]
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::BrokenPipe => ErrorKind::BrokenPipe,
            std::io::ErrorKind::ResourceBusy => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        Self::with_source(kind, message, source)
    }

    /// A refused event: `attribute` of the event at `index` of its batch.
    pub fn event(index: usize, attribute: &'static str, message: impl Into<String>) -> Self {
        Self {
            event: Some(EventFault { index, attribute }),
            ..Self::new(ErrorKind::InvalidDescription, message)
        }
    }

    /// The same error as another class of failure.
    #[must_use]
    pub fn with_kind(self, kind: ErrorKind) -> Self {
        Self { kind, ..self }
    }

    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Which part of an event was refused, if this error says so.
    pub fn event_fault(&self) -> Option<EventFault> {
        self.event
    }

    /// The same error with its message changed.
    #[must_use]
    pub fn relabel(self, change: impl FnOnce(&str) -> String) -> Self {
        Self {
            message: change(&self.message),
            event: None,
            ..self
        }
    }

    /// The same failure, one level further out.
    #[must_use]
    pub fn context(self, message: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            message: message.into(),
            event: self.event,
            source: Some(Box::new(self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_the_kind_and_the_cause() {
        let e = Error::io(
            "read block 7",
            std::io::Error::from(std::io::ErrorKind::BrokenPipe),
        )
        .context("dump");
        assert_eq!(e.kind(), ErrorKind::BrokenPipe);
        assert_eq!(e.to_string(), "dump");
        assert_eq!(
            e.source().map(ToString::to_string).as_deref(),
            Some("read block 7")
        );
    }
}
