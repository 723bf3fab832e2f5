//! Restores arbitrary text: nothing may panic, and what is accepted must pass the check.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io::Write;
use thintools::io::RamEngine;
use thintools::observer::Silent;
use thintools::tools::check::{CheckOptions, Severity, check};
use thintools::tools::{XmlSource, restore};

fuzz_target!(|text: &[u8]| {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(text).expect("a temporary file can be written");
    let output = RamEngine::new(256);
    if restore(&XmlSource::from_file(file, "input", &Silent), &output, &Silent).is_ok() {
        let checked = check(&output, &CheckOptions::default(), &Silent).expect("the output is readable");
        let worst = checked.report.verdict.severity;
        assert!(worst <= Some(Severity::Note), "{:?}", checked.report.damages);
    }
});
