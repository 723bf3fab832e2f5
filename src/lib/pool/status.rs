//! The status of a pool and of a thin device, as `dmsetup status` prints it.

use super::line::Words;
use super::message::{number, refused};
use super::mode::PoolMode;
use super::table::Features;
use crate::error::Error;
use crate::thin::PoolStatus;
use crate::units::MetadataBlock;
use std::fmt;
use std::str::FromStr;

/// The status of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolStatusLine {
    /// The pool has failed.
    Fail,
    /// The metadata could not be asked.
    Error,
    /// What the pool is.
    Pool(PoolState),
}

/// What the status of a pool says while it has not failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolState {
    /// The transaction id of whoever manages the pool.
    pub transaction_id: u64,
    /// Metadata blocks in use, those included that are kept back for commits.
    pub used_metadata_blocks: u64,
    /// Metadata blocks.
    pub metadata_blocks: u64,
    /// Data blocks in use.
    pub used_data_blocks: u64,
    /// Data blocks.
    pub data_blocks: u64,
    /// Block of the metadata snapshot.
    pub held_root: Option<MetadataBlock>,
    /// The mode.
    pub mode: PoolMode,
    /// What becomes of discards.
    pub discards: Discards,
    /// Writes that need a block when there is none fail at once.
    pub error_if_no_space: bool,
    /// An aborted transaction left the flag behind.
    pub needs_check: bool,
    /// Free metadata blocks at which the pool is called low.
    pub metadata_threshold: u64,
}

/// What becomes of discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// They are not supported.
    Ignored,
    /// They unmap.
    NotPassedDown,
    /// They unmap, and go on to the data device.
    PassedDown,
}

impl Discards {
    const ALL: [Self; 3] = [Self::Ignored, Self::NotPassedDown, Self::PassedDown];

    fn word(self) -> &'static str {
        match self {
            Self::Ignored => "ignore_discard",
            Self::NotPassedDown => "no_discard_passdown",
            Self::PassedDown => "discard_passdown",
        }
    }
}

impl PoolState {
    /// That of a pool with these features in force.
    pub fn new(status: &PoolStatus, mode: PoolMode, features: &Features) -> Self {
        Self {
            transaction_id: status.transaction_id,
            used_metadata_blocks: status.used_metadata_blocks,
            metadata_blocks: status.metadata_blocks,
            used_data_blocks: status.used_data_blocks,
            data_blocks: status.data_blocks,
            held_root: status.held_root,
            mode,
            discards: match (features.ignore_discard, features.no_discard_passdown) {
                (true, _) => Discards::Ignored,
                (false, true) => Discards::NotPassedDown,
                (false, false) => Discards::PassedDown,
            },
            error_if_no_space: features.error_if_no_space,
            needs_check: status.needs_check,
            metadata_threshold: status.metadata_threshold,
        }
    }

    fn parse(words: &[&str]) -> Option<Self> {
        let &[
            trans,
            metadata,
            data,
            held,
            mode,
            discard,
            no_space,
            check,
            low,
        ] = words
        else {
            return None;
        };
        let pair = |word: &str| {
            let (used, all) = word.split_once('/')?;
            number(used).ok().zip(number(all).ok())
        };
        let ((used_metadata_blocks, metadata_blocks), (used_data_blocks, data_blocks)) =
            (pair(metadata)?, pair(data)?);
        Some(Self {
            transaction_id: number(trans).ok()?,
            used_metadata_blocks,
            metadata_blocks,
            used_data_blocks,
            data_blocks,
            held_root: match held {
                "-" => None,
                block => Some(MetadataBlock(number(block).ok()?)),
            },
            mode: match mode {
                "rw" => PoolMode::Write,
                "ro" => PoolMode::ReadOnly,
                "out_of_data_space" => PoolMode::OutOfDataSpace,
                _ => return None,
            },
            discards: Discards::ALL.into_iter().find(|d| d.word() == discard)?,
            error_if_no_space: match no_space {
                "error_if_no_space" => true,
                "queue_if_no_space" => false,
                _ => return None,
            },
            needs_check: match check {
                "needs_check" => true,
                "-" => false,
                _ => return None,
            },
            metadata_threshold: number(low).ok()?,
        })
    }
}

/// With a blank behind the last word, as the kernel has it.
impl fmt::Display for PoolState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}/{} {}/{} ",
            self.transaction_id,
            self.used_metadata_blocks,
            self.metadata_blocks,
            self.used_data_blocks,
            self.data_blocks,
        )?;
        match self.held_root {
            Some(block) => write!(f, "{block} ")?,
            None => f.write_str("- ")?,
        }
        let no_space = match self.error_if_no_space {
            true => "error_if_no_space",
            false => "queue_if_no_space",
        };
        let check = if self.needs_check { "needs_check" } else { "-" };
        write!(
            f,
            "{} {} {no_space} {check} {} ",
            self.mode,
            self.discards.word(),
            self.metadata_threshold
        )
    }
}

impl Words for PoolStatusLine {
    const TARGET: &'static str = "thin-pool";
}

impl fmt::Display for PoolStatusLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fail => f.write_str("Fail"),
            Self::Error => f.write_str("Error"),
            Self::Pool(state) => state.fmt(f),
        }
    }
}

impl FromStr for PoolStatusLine {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        match words[..] {
            ["Fail"] => Ok(Self::Fail),
            ["Error"] => Ok(Self::Error),
            _ => PoolState::parse(&words)
                .map(Self::Pool)
                .ok_or_else(|| refused(format!("{text:?} is no status of a pool"))),
        }
    }
}

/// The status of a thin device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThinStatus {
    /// The pool has failed.
    Fail,
    /// The device's mappings cannot be read.
    Error,
    /// What is mapped, in sectors of 512 bytes.
    Mapped {
        /// How many.
        sectors: u64,
        /// The last one.
        highest: Option<u64>,
    },
}

impl Words for ThinStatus {
    const TARGET: &'static str = "thin";
}

impl fmt::Display for ThinStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fail => f.write_str("Fail"),
            Self::Error => f.write_str("Error"),
            Self::Mapped {
                sectors,
                highest: Some(highest),
            } => write!(f, "{sectors} {highest}"),
            Self::Mapped {
                sectors,
                highest: None,
            } => write!(f, "{sectors} -"),
        }
    }
}

impl FromStr for ThinStatus {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        Ok(match words[..] {
            ["Fail"] => Self::Fail,
            ["Error"] => Self::Error,
            [sectors, highest] => Self::Mapped {
                sectors: number(sectors)?,
                highest: match highest {
                    "-" => None,
                    sector => Some(number(sector)?),
                },
            },
            _ => return Err(refused(format!("{text:?} is no status of a thin device"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::line::Line;
    use super::*;

    #[test]
    fn lines_come_back_as_they_were() {
        for line in [
            "0 2097152 thin-pool 7 221/2048 0/16384 37 rw no_discard_passdown queue_if_no_space - 512 ",
            "0 1024 thin-pool 0 214/2048 8/8 - out_of_data_space ignore_discard error_if_no_space - 512 ",
            "0 33554432 thin-pool 0 62/64 6576/262144 - ro discard_passdown queue_if_no_space needs_check 16 ",
            "0 2097152 thin-pool Fail",
            "0 2097152 thin-pool Error",
        ] {
            assert_eq!(
                line.parse::<Line<PoolStatusLine>>().unwrap().to_string(),
                line
            );
        }
        for line in [
            "0 65536 thin 7680 12159",
            "0 65536 thin 0 -",
            "0 28160 thin Error",
            "0 8388608 thin Fail",
        ] {
            assert_eq!(line.parse::<Line<ThinStatus>>().unwrap().to_string(), line);
        }
    }

    #[test]
    fn other_lines_are_refused() {
        let good = "7 221/2048 0/16384 37 rw no_discard_passdown queue_if_no_space - 512";
        assert!(good.parse::<PoolStatusLine>().is_ok());
        for (from, to) in [
            ("7 ", ""),
            ("221/2048", "221"),
            ("221/2048", "x/2048"),
            ("37", "x"),
            ("rw", "w"),
            ("no_discard_passdown", "discard"),
            ("queue_if_no_space", "-"),
            (" - ", " check "),
            ("512", "512 1"),
        ] {
            let bad = good.replacen(from, to, 1);
            assert!(bad.parse::<PoolStatusLine>().is_err(), "{bad}");
        }
        for bad in ["", "1", "1 x", "- 1", "1 2 3"] {
            assert!(bad.parse::<ThinStatus>().is_err(), "{bad}");
        }
    }
}
