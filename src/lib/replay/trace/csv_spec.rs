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
    /// As it was given.
    text: String,
    pub(super) preset: Option<Preset>,
    pub(super) columns: Columns,
    /// The words for read, write, discard and flush; empty if there is none.
    pub(super) words: [String; 4],
}

/// What columns there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    /// The first and the last.
    pub(super) device: Option<(usize, usize)>,
    pub(super) op: usize,
    pub(super) offset: (usize, Unit),
    pub(super) length: (usize, Unit),
    pub(super) time: Option<(usize, TimeUnit)>,
}

/// Columns that are known by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::replay) enum Preset {
    Msr,
    Alibaba,
    Tencent,
    Spc,
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

impl Columns {
    /// The last that is looked at.
    #[inline(always)]
    pub(super) fn last(&self) -> usize {
        let mut last = self.op.max(self.offset.0).max(self.length.0);
        if let Some((_, device)) = self.device {
            last = last.max(device);
        }
        if let Some((time, _)) = self.time {
            last = last.max(time);
        }
        last
    }
}

impl Preset {
    pub(super) const fn columns(self) -> Columns {
        match self {
            Self::Msr => Columns {
                device: Some((1, 2)),
                op: 3,
                offset: (4, 1),
                length: (5, 1),
                time: Some((0, TimeUnit::Filetime)),
            },
            Self::Alibaba => Columns {
                device: Some((0, 0)),
                op: 1,
                offset: (2, 1),
                length: (3, 1),
                time: Some((4, TimeUnit::Of(1_000))),
            },
            Self::Tencent => Columns {
                device: Some((4, 4)),
                op: 3,
                offset: (1, 512),
                length: (2, 512),
                time: Some((0, TimeUnit::WholeSeconds)),
            },
            Self::Spc => Columns {
                device: Some((0, 0)),
                op: 3,
                offset: (1, 512),
                length: (2, 1),
                time: Some((4, TimeUnit::Of(1_000_000_000))),
            },
        }
    }
}

impl From<Preset> for CsvSpec {
    fn from(preset: Preset) -> Self {
        let (text, read, write) = match preset {
            Preset::Msr => ("msr", "Read", "Write"),
            Preset::Alibaba => ("alibaba", "R", "W"),
            Preset::Tencent => ("tencent", "0", "1"),
            Preset::Spc => ("spc", "r", "w"),
        };
        Self {
            text: text.into(),
            preset: Some(preset),
            columns: preset.columns(),
            words: [read.into(), write.into(), String::new(), String::new()],
        }
    }
}

impl CsvSpec {
    /// Many requests have the same time.
    pub(super) fn is_whole_seconds(&self) -> bool {
        matches!(self.columns.time, Some((_, TimeUnit::WholeSeconds)))
    }
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
        let mut columns = Columns {
            device: None,
            op: usize::MAX,
            offset: (usize::MAX, 1),
            length: (usize::MAX, 1),
            time: None,
        };
        let mut words: [String; 4] = Default::default();
        for item in text.split(',') {
            let (name, value) = item
                .split_once('=')
                .ok_or_else(|| wrong(format!("{item} is no NAME=VALUE")))?;
            let (place, unit) = value.split_once(':').unwrap_or((value, ""));
            match name {
                "dev" => {
                    let (first, last) = value.split_once('-').unwrap_or((value, value));
                    columns.device = Some((column(first)?, column(last)?));
                }
                "op" => columns.op = column(value)?,
                "off" | "len" => {
                    let unit = match unit {
                        "bytes" | "" => 1,
                        "sectors" => 512,
                        "kib" => 1024,
                        _ => return Err(wrong(format!("{unit} is none of bytes, sectors, kib"))),
                    };
                    let field = if name == "off" {
                        &mut columns.offset
                    } else {
                        &mut columns.length
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
                    columns.time = Some((column(place)?, unit));
                }
                "read" => words[0] = value.into(),
                "write" => words[1] = value.into(),
                "discard" => words[2] = value.into(),
                "flush" => words[3] = value.into(),
                _ => {
                    return Err(wrong(format!(
                        "{name} is none of dev, op, off, len, ts, read, write, discard, flush"
                    )));
                }
            }
        }
        for (name, column) in [
            ("op", columns.op),
            ("off", columns.offset.0),
            ("len", columns.length.0),
        ] {
            if column == usize::MAX {
                return Err(wrong(format!("{name} is missing")));
            }
        }
        let (first, last) = columns.device.unwrap_or((usize::MAX, usize::MAX));
        let mut used = vec![columns.op, columns.offset.0, columns.length.0];
        used.extend(columns.time.map(|(column, _)| column));
        let is_twice = (1..used.len()).any(|i| used[..i].contains(&used[i]));
        let is_device = |column: &usize| (first..=last).contains(column);
        if first > last || is_twice || used.iter().any(is_device) {
            return Err(wrong("a column has one meaning".into()));
        }
        Ok(Self {
            text: text.into(),
            preset: None,
            columns,
            words,
        })
    }
}
