//! Which column of a CSV means what, in which units.

use std::fmt;
use std::str::FromStr;

use super::scan;
use crate::error::{Error, ErrorKind, Result};

/// More columns than any trace has.
const MAX_COLUMNS: usize = 256;

/// The columns of a CSV: `dev=0,op=1,off=2:bytes,len=3:bytes,ts=4:us,read=R,write=W`.
///
/// Columns count from 0. `dev` may be a range, `1-2`, or be left out, as may `ts`. Offsets and lengths are in `bytes`, `sectors` of
/// 512 bytes, or `kib`; times in `ns`, `us`, `ms`, `s`, `filetime` (100 ns since 1601), or `whole-s`: seconds without a fraction, over
/// which their requests are spread. `read`, `write`, `discard` and `flush` are the words of the operations, in either case of letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CsvSpec {
    text: String,
    /// The first and the last.
    pub(super) device: Option<(usize, usize)>,
    pub(super) op: usize,
    pub(super) offset: (usize, Unit),
    pub(super) length: (usize, Unit),
    pub(super) time: Option<(usize, TimeUnit)>,
    /// The words for read, write, discard and flush; empty if there is none.
    pub(super) words: [String; 4],
}

/// Bytes of one unit.
pub(super) type Unit = u64;

/// What a time counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimeUnit {
    /// So many nanoseconds.
    Of(u64),
    /// 100 ns since 1601.
    Filetime,
    /// Seconds without a fraction.
    WholeSeconds,
}

impl TimeUnit {
    /// The time that is so many units.
    #[inline]
    pub(super) fn whole(self, count: u64) -> Option<u64> {
        /// 1970 in units of 100 ns since 1601.
        const UNIX: u64 = 116_444_736_000_000_000;
        match self {
            Self::Of(unit) => count.checked_mul(unit),
            Self::WholeSeconds => count.checked_mul(1_000_000_000),
            Self::Filetime => count.checked_sub(UNIX)?.checked_mul(100),
        }
    }

    /// The same of a number that may have a fraction.
    pub(super) fn read(self, text: &[u8]) -> Option<u64> {
        match self {
            Self::Of(unit) => scan::time(text, unit),
            _ => self.whole(scan::number(text)?),
        }
    }
}

impl CsvSpec {
    pub(super) fn msr() -> Self {
        preset("dev=1-2,op=3,off=4:bytes,len=5:bytes,ts=0:filetime,read=Read,write=Write")
    }

    pub(super) fn alibaba() -> Self {
        preset("dev=0,op=1,off=2:bytes,len=3:bytes,ts=4:us,read=R,write=W")
    }

    pub(super) fn tencent() -> Self {
        preset("dev=4,op=3,off=1:sectors,len=2:sectors,ts=0:whole-s,read=0,write=1")
    }

    pub(super) fn spc() -> Self {
        preset("dev=0,op=3,off=1:sectors,len=2:bytes,ts=4:s,read=r,write=w")
    }

    /// Many requests have the same time.
    pub(super) fn is_whole_seconds(&self) -> bool {
        matches!(self.time, Some((_, TimeUnit::WholeSeconds)))
    }
}

fn preset(text: &str) -> CsvSpec {
    text.parse().expect("a preset names columns that there are")
}

impl fmt::Display for CsvSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for CsvSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |what: String| {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("columns {text}: {what}"),
            )
        };
        let column = |value: &str| {
            let column = value.parse().ok().filter(|&column| column < MAX_COLUMNS);
            column.ok_or_else(|| {
                wrong(format!(
                    "{value} is no column from 0 to {}",
                    MAX_COLUMNS - 1
                ))
            })
        };
        let mut spec = Self {
            text: text.into(),
            device: None,
            op: usize::MAX,
            offset: (usize::MAX, 1),
            length: (usize::MAX, 1),
            time: None,
            words: Default::default(),
        };
        for item in text.split(',') {
            let (name, value) = item
                .split_once('=')
                .ok_or_else(|| wrong(format!("{item} is no NAME=VALUE")))?;
            let (place, unit) = value.split_once(':').unwrap_or((value, ""));
            match name {
                "dev" => {
                    let (first, last) = value.split_once('-').unwrap_or((value, value));
                    spec.device = Some((column(first)?, column(last)?));
                }
                "op" => spec.op = column(value)?,
                "off" | "len" => {
                    let unit = match unit {
                        "bytes" | "" => 1,
                        "sectors" => 512,
                        "kib" => 1024,
                        _ => return Err(wrong(format!("{unit} is none of bytes, sectors, kib"))),
                    };
                    let field = if name == "off" {
                        &mut spec.offset
                    } else {
                        &mut spec.length
                    };
                    *field = (column(place)?, unit);
                }
                "ts" => {
                    let unit = match unit {
                        "ns" | "" => TimeUnit::Of(1),
                        "us" => TimeUnit::Of(1_000),
                        "ms" => TimeUnit::Of(1_000_000),
                        "s" => TimeUnit::Of(1_000_000_000),
                        "filetime" => TimeUnit::Filetime,
                        "whole-s" => TimeUnit::WholeSeconds,
                        _ => {
                            return Err(wrong(format!(
                                "{unit} is none of ns, us, ms, s, filetime, whole-s"
                            )));
                        }
                    };
                    spec.time = Some((column(place)?, unit));
                }
                "read" => spec.words[0] = value.into(),
                "write" => spec.words[1] = value.into(),
                "discard" => spec.words[2] = value.into(),
                "flush" => spec.words[3] = value.into(),
                _ => {
                    return Err(wrong(format!(
                        "{name} is none of dev, op, off, len, ts, read, write, discard, flush"
                    )));
                }
            }
        }
        for (name, column) in [
            ("op", spec.op),
            ("off", spec.offset.0),
            ("len", spec.length.0),
        ] {
            if column == usize::MAX {
                return Err(wrong(format!("{name} is missing")));
            }
        }
        let (first, last) = spec.device.unwrap_or((usize::MAX, usize::MAX));
        let mut used = vec![spec.op, spec.offset.0, spec.length.0];
        used.extend(spec.time.map(|(column, _)| column));
        let is_twice = (1..used.len()).any(|i| used[..i].contains(&used[i]));
        let is_device = |column: &usize| (first..=last).contains(column);
        if first > last || is_twice || used.iter().any(is_device) {
            return Err(wrong("a column has one meaning".into()));
        }
        Ok(spec)
    }
}
