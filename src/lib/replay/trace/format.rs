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
}

/// All names that stand for themselves.
pub(super) const NAMED: [(&str, Format); 13] = [
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
