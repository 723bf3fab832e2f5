//! What came of verifying, as a report has it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What came of looking.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// One virtual block of so many was looked at.
    pub one_of: u64,
    /// Reads, cut at the edges of blocks.
    pub reads: u64,
    /// Sectors of 512 bytes that they read.
    pub sectors: u64,
    /// Blocks looked at as a whole, of devices about to be deleted and of all that there are in the end.
    pub blocks: u64,
    /// Reads and blocks that held something else than they had to.
    pub wrong: u64,
    /// The first of them, a sentence each.
    pub first: Vec<String>,
    /// The metadata failed, what was not committed was lost, and nothing was looked at from then on.
    pub is_cut_short: bool,
}

/// Wrong reads and blocks that are told one by one.
pub(super) const MOST_TOLD: usize = 20;

impl Verified {
    /// Both together.
    pub(in crate::replay) fn with(mut self, other: Self) -> Self {
        self.one_of = self.one_of.max(other.one_of);
        self.reads = self.reads.saturating_add(other.reads);
        self.sectors = self.sectors.saturating_add(other.sectors);
        self.blocks = self.blocks.saturating_add(other.blocks);
        self.wrong = self.wrong.saturating_add(other.wrong);
        self.first.extend(other.first);
        self.first.truncate(MOST_TOLD);
        self.is_cut_short |= other.is_cut_short;
        self
    }

    pub(super) fn add_wrong(&mut self, text: impl FnOnce() -> String) {
        self.wrong += 1;
        if self.first.len() < MOST_TOLD {
            self.first.push(text());
        }
    }
}

/// As the report has it.
impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "verify    {} reads of {} sectors, {} blocks as a whole, one virtual block of {}: ",
            self.reads, self.sectors, self.blocks, self.one_of
        )?;
        match self.wrong {
            0 => write!(f, "all as written")?,
            n => write!(f, "WRONG: {n}")?,
        }
        match self.is_cut_short {
            true => writeln!(f, ", until the metadata failed")?,
            false => writeln!(f)?,
        }
        for wrong in &self.first {
            writeln!(f, "wrong     {wrong}")?;
        }
        Ok(())
    }
}
