//! Every table and status line that the kernel printed for a pool or a thin device is read, and printed as it was.

use std::fs;
use std::str::FromStr;

use thintools::pool::{Line, PoolStatusLine, PoolTable, ThinStatus, ThinTable, Words};

use crate::support::testdata;

#[track_caller]
fn comes_back<W: Words>(line: &str) {
    let read = Line::<W>::from_str(line).unwrap_or_else(|e| panic!("{line:?}: {e}"));
    assert_eq!(read.to_string(), line);
}

#[test]
fn the_kernels_lines_come_back_as_they_were() {
    let mut seen = [0; 4];
    for folder in fs::read_dir(testdata()).expect("fixtures") {
        let path = folder.expect("readable").path().join("status.log");
        let Ok(text) = fs::read_to_string(path) else {
            continue;
        };
        let mut is_table = false;
        for line in text.lines() {
            is_table = match line {
                "# status" => false,
                "# table" => true,
                _ => is_table,
            };
            let Some((_, line)) = line.split_once(": ") else {
                continue;
            };
            // The table of a thin device says Fail, too, when its pool has failed.
            let kind = match line.split(' ').nth(2) {
                Some("thin-pool") => 2 * usize::from(is_table),
                Some("thin") => 2 * usize::from(is_table && !line.ends_with("Fail")) + 1,
                _ => continue,
            };
            seen[kind] += 1;
            match kind {
                0 => comes_back::<PoolStatusLine>(line),
                1 => comes_back::<ThinStatus>(line),
                2 => comes_back::<PoolTable>(line),
                _ => comes_back::<ThinTable>(line),
            }
        }
    }
    assert!(seen.iter().all(|&n| n > 80), "{seen:?}");
}
