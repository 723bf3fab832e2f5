//! Names of formats.

use std::fmt;
use std::str::FromStr;

use super::csv_spec::CsvSpec;
use crate::error::{Error, ErrorKind, Result};

/// The form that a trace has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// blktrace's binary files, or a dump that blkparse made of them.
    Blktrace,
    /// blkparse's text.
    Blkparse,
    /// A log of fio, of version 2 or 3.
    Iolog,
    /// Columns with commas between them.
    Csv(Box<CsvSpec>),
    /// The CSV of the MSR Cambridge traces.
    Msr,
    /// The CSV of the Alibaba block traces.
    Alibaba,
    /// The CSV of the Tencent CBS traces.
    Tencent,
    /// The Storage Performance Council's form, as in the UMass traces.
    Spc,
    /// A load of blkreplay.
    Load,
    /// DiskSim's ASCII form: time, device, block, blocks, flags.
    Disksim,
    /// Text of the kernel's block events: tracefs, trace-cmd or perf script.
    Ftrace,
    /// The output of biosnoop.
    Biosnoop,
    /// The binary form of VMware's vscsiStats, of version 1 or 2.
    Vscsi,
    /// A log of dm-log-writes.
    LogWrites,
    /// An event file, as [`crate::replay::split`] writes them: the requests of one device in the form that every trace is brought into.
    /// Integers are little-endian; everything is a multiple of 32 bytes. The file begins with a header:
    ///
    /// | offset | size | field |
    /// |---|---|---|
    /// | 0 | 8 | `thinevts` |
    /// | 8 | 4 | version, 1 |
    /// | 12 | 4 | bytes of the device's name, at most 1024; 0 if the file has control events alone |
    /// | 16 | 16 | zeros |
    /// | 32 | | the name in UTF-8, then zeros up to a multiple of 32 |
    ///
    /// Records follow, in order of their times:
    ///
    /// | offset | size | of a request | of a control event | at the end |
    /// |---|---|---|---|---|
    /// | 0 | 8 | nanoseconds since the trace began that this is a part of | the same | 0 |
    /// | 8 | 8 | first sector of 512 bytes | 0 | requests and control events in the file |
    /// | 16 | 8 | sectors | bytes of its text, at most 65536 | 0 |
    /// | 24 | 4 | 0 | 0 | 0 |
    /// | 28 | 1 | 0 read, 1 write, 2 discard, 3 write zeros, 4 flush | 0xfe | 0xff |
    /// | 29 | 1 | 1 if a flush comes first, 2 for FUA, or both | 0 | 0 |
    /// | 30 | 2 | processor or stream | 0 | 0 |
    /// | 32 | | | the text in UTF-8, then zeros up to a multiple of 32 | |
    ///
    /// The record of the end is always there: without it the file is cut off. Times are not counted from the first event of the file,
    /// so that files of one trace stay in step.
    Events,
}

/// All names that stand for themselves.
pub(super) const NAMED: [(&str, Format); 14] = [
    ("events", Format::Events),
    ("blktrace", Format::Blktrace),
    ("log-writes", Format::LogWrites),
    ("vscsi", Format::Vscsi),
    ("iolog", Format::Iolog),
    ("load", Format::Load),
    ("ftrace", Format::Ftrace),
    ("biosnoop", Format::Biosnoop),
    ("blkparse", Format::Blkparse),
    ("msr", Format::Msr),
    ("alibaba", Format::Alibaba),
    ("tencent", Format::Tencent),
    ("spc", Format::Spc),
    ("disksim", Format::Disksim),
];

impl Format {
    /// By what a trace of this format is recognised.
    pub fn evidence(&self) -> &'static str {
        match self {
            Self::Events => "it begins with the header of an event file",
            Self::Blktrace => "it begins with a record of blktrace",
            Self::LogWrites => "it begins with the superblock of dm-log-writes",
            Self::Vscsi => "its first records have the version of vscsiStats",
            Self::Iolog => "its first line is that of fio's logs",
            Self::Load => "it has the heading of blkreplay's loads",
            Self::Ftrace => "it has the kernel's block events",
            Self::Biosnoop => "it has the heading of biosnoop",
            Self::Blkparse => "its lines are those of blkparse",
            Self::Msr => "its columns are those of the MSR Cambridge traces",
            Self::Alibaba => "its columns are those of the Alibaba traces",
            Self::Tencent => "its columns are those of the Tencent traces",
            Self::Spc => "its columns are those of the Storage Performance Council",
            Self::Disksim => "its columns are those of DiskSim",
            Self::Csv(_) => "its columns were named",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Self::Csv(spec) = self {
            return write!(f, "csv:{spec}");
        }
        let name = NAMED.iter().find(|(_, format)| format == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(spec) = text.strip_prefix("csv:") {
            return spec.parse().map(Box::new).map(Self::Csv);
        }
        let named = NAMED.into_iter().find(|(name, _)| *name == text);
        named.map(|(_, format)| format).ok_or_else(|| {
            let names: Vec<&str> = NAMED.iter().map(|(name, _)| *name).collect();
            let names = names.join(", ");
            Error::new(
                ErrorKind::InvalidArgument,
                format!("{text} is no format of traces; there are {names} and csv:COLUMNS"),
            )
        })
    }
}
