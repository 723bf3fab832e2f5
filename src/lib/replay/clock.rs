//! The two clocks of a replay.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Whose time a number is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// The trace's, on a modelled data device: the same trace gives the same report.
    #[default]
    Virtual,
    /// This machine's, with real threads and locks: no two runs are alike.
    Threads,
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Virtual => "virtual",
            Self::Threads => "threads",
        })
    }
}

impl FromStr for Clock {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let clocks = [Self::Virtual, Self::Threads];
        let found = clocks.into_iter().find(|clock| clock.to_string() == text);
        found.ok_or_else(|| format!("no clock is called {text:?}: virtual and threads are"))
    }
}
