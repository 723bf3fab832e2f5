//! What every trace comes down to.

use crate::error::{Error, ErrorKind};
use std::fmt;
use std::str::FromStr;

/// What a recorded request asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TraceOp {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Discard.
    Discard,
    /// Write zeros; a thin device has no such request, it is written.
    WriteZeroes,
    /// A flush without data.
    Flush,
}

impl TraceOp {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Read,
        Self::Write,
        Self::Discard,
        Self::WriteZeroes,
        Self::Flush,
    ];
}

impl fmt::Display for TraceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
            Self::Flush => "flush",
        })
    }
}

impl FromStr for TraceOp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let named = Self::ALL.into_iter().find(|op| op.to_string() == text);
        named.ok_or_else(|| {
            let names = Self::ALL.map(|op| op.to_string()).join(", ");
            Error::new(
                ErrorKind::InvalidArgument,
                format!("{text:?} is none of {names}"),
            )
        })
    }
}

/// One recorded request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceIo {
    /// Nanoseconds since the start of the trace.
    pub time_ns: u64,
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Sectors of 512 bytes; 0 for a flush.
    pub sectors: u64,
    /// Which of the trace's devices, by [`TraceReader::devices`].
    pub device: u32,
    /// The processor, or the stream, that it was submitted on.
    pub cpu: u16,
    /// What it asked for.
    pub op: TraceOp,
    /// What was acknowledged before it had to become durable first.
    pub is_preflush: bool,
    /// It had to be durable when it completed.
    pub is_fua: bool,
}

/// Something in a trace that is no request, in its words: `ctl create_snap 1 0`, without the `ctl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlEvent {
    /// Nanoseconds since the start of the trace.
    pub time_ns: u64,
    /// The words.
    pub text: String,
}

/// What was read in one go: requests and control events, each in order of time. A control event comes before the requests of its
/// time and after those before.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Requests.
    pub ios: Vec<TraceIo>,
    /// Control events.
    pub controls: Vec<ControlEvent>,
}

/// What a reader noticed that is no error.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TraceNotes {
    /// Requests.
    pub events: u64,
    /// Requests that are in the trace but were not asked for.
    pub left_out: u64,
    /// Records of other kinds, which say nothing that a replay needs.
    pub skipped: u64,
    /// Lines or records that could not be read, with lenient reading.
    pub malformed: u64,
    /// Records that the recorder lost, by gaps in its numbers.
    pub lost: u64,
    /// Times that went back; such an event counts as simultaneous with the one before.
    pub regressed: u64,
    /// The last record is cut off.
    pub is_truncated: bool,
    /// The format has no times: those of the events say in which order they came, and nothing else.
    #[serde(default)]
    pub has_no_times: bool,
    /// What a reader of the report should know.
    pub warnings: Vec<String>,
}

/// A trace that is being read, in bounded memory.
pub trait TraceReader: Send {
    /// Replaces the contents of `batch` by what comes next, some thousands of events; fewer or none if a pipe has no more at the moment.
    /// False at the end of the trace.
    ///
    /// # Errors
    /// `Io`; `InvalidDescription` with file, line and text of what cannot be read.
    fn read(&mut self, batch: &mut Batch) -> crate::Result<bool>;

    /// Names of the devices met so far, as the trace has them: `252:0`, or whatever the format calls a volume.
    fn devices(&self) -> &[String];

    /// What was noticed so far.
    fn notes(&self) -> &TraceNotes;

    /// How many bytes of the input were read, and how many there are, compressed as they are; none if that is not known, as of a pipe.
    fn progress(&self) -> Option<(u64, u64)> {
        None
    }
}
