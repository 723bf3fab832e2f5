//! What fuzzing has found, each made small.

use std::time::{Duration, Instant};
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::tools::repair::{Options, recover};
use thintools::units::MetadataBlock;

use crate::support::expand;

/// No input may take longer.
const LIMIT: Duration = Duration::from_secs(5);

/// Each of 600 trees could be each of 600 devices then.
#[test]
fn roots_that_lead_nowhere_are_soon_dealt_with() {
    let engine = RamEngine::from_bytes(expand("rand-600thins-5/meta.img"));
    let nowhere = MetadataBlock(2047);
    for include_ambiguous in [false, true] {
        let options = Options {
            roots: Some((nowhere, nowhere)),
            include_ambiguous,
            ..Options::default()
        };
        let start = Instant::now();
        let _ = recover(&engine, &options, &Silent);
        assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
    }
}
