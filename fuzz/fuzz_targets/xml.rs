//! Restores arbitrary text: nothing may panic, and what is accepted must pass the check.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thintools::io::RamEngine;
use thintools_fuzz::{assert_clean, restore_text};

fuzz_target!(|text: &[u8]| {
    let output = RamEngine::new(256);
    if restore_text(text, &output).is_ok() {
        assert_clean(&output);
    }
});
