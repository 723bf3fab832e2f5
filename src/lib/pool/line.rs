//! The lines of `dmsetup table` and `dmsetup status`: where a device's target begins, how long it is, which it is, and its words.

use super::message::{number, refused};
use crate::error::Error;
use std::fmt;
use std::str::FromStr;

/// The words of a target, in a table or in a status.
pub trait Words: fmt::Display + FromStr<Err = Error> {
    /// The target's name.
    const TARGET: &'static str;
}

/// A device of one target. It begins at sector 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<W> {
    /// Its length in sectors of 512 bytes.
    pub sectors: u64,
    /// What follows the target's name.
    pub words: W,
}

impl<W: Words> fmt::Display for Line<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0 {} {} {}", self.sectors, W::TARGET, self.words)
    }
}

impl<W: Words> FromStr for Line<W> {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut parts = text.trim_start().splitn(4, ' ');
        let (Some(start), Some(sectors), Some(target)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(refused(format!(
                "{text:?} is not START LENGTH {} and its words",
                W::TARGET
            )));
        };
        if number(start)? != 0 {
            return Err(refused(format!("Gap in table: it begins at {start}")));
        }
        if target != W::TARGET {
            return Err(refused(format!(
                "the target is {target:?}, not {:?}",
                W::TARGET
            )));
        }
        Ok(Self {
            sectors: number(sectors)?,
            words: parts.next().unwrap_or("").parse()?,
        })
    }
}
