//! The same trace in three forms is the same trace; and so are others.

use std::fs;
use std::path::PathBuf;
use std::slice::from_ref;

use thintools::replay::{TraceIo, TraceOp};

use super::{Trace, read, read_all, recorded};
use crate::support::{folder, untar};

const CONTROLS: [&str; 7] = [
    "phase-end 1-provision",
    "phase-end 2-mixed",
    "create_snap 1 0",
    "phase-end 3-breaksharing",
    "phase-end 4-discard",
    "delete 1",
    "phase-end 5-ext4",
];

/// blkparse's text has processors, but no order between those of a moment.
fn sorted(trace: &Trace) -> Vec<TraceIo> {
    let mut ios = trace.ios.clone();
    ios.sort_by_key(|io| (io.time_ns, io.cpu, io.sector));
    ios
}

#[test]
fn the_three_forms_of_one_trace_agree() {
    let files = read("oracle/thin.blktrace.0.zst");
    let dump = read("oracle/thin.blkparse-d.bin.gz");
    let text = read("oracle/thin.blkparse.txt.zst");
    assert_eq!(
        (
            files.format.as_str(),
            dump.format.as_str(),
            text.format.as_str()
        ),
        ("blktrace", "blktrace", "blkparse")
    );
    assert_eq!(files.ios.len(), 6677);
    assert_eq!(files.count(TraceOp::Flush), 35);
    assert_eq!(files.count(TraceOp::Discard), 15);
    let preflush = |io: &&TraceIo| io.is_preflush && io.op == TraceOp::Write;
    assert_eq!(files.ios.iter().filter(preflush).count(), 10);
    assert_eq!(files.devices, ["254:1"]);
    assert_eq!(files.texts(), CONTROLS);
    assert_eq!(dump.texts(), CONTROLS);
    assert!(text.texts().is_empty(), "blkparse leaves them out");
    assert_eq!(sorted(&files), sorted(&dump));
    assert_eq!(sorted(&files), sorted(&text));
    assert_eq!(files.devices, dump.devices);
    assert_eq!(files.devices, text.devices);
    for trace in [&files, &dump, &text] {
        assert_eq!(
            trace.notes.lost + trace.notes.malformed + trace.notes.regressed,
            0
        );
        assert!(trace.notes.warnings.is_empty() && !trace.notes.is_truncated);
    }
    // 14 138 records, of which 7 are control events.
    assert_eq!(files.notes.skipped, 14_138 - 6677 - 7);
    // A message of the dump is where it was, to the microseconds between a process being noticed and its request.
    for (here, there) in files.controls.iter().zip(&dump.controls) {
        assert!(
            here.time_ns.abs_diff(there.time_ns) < 10_000,
            "{here:?} {there:?}"
        );
    }
    let before = |trace: &Trace, index: usize| {
        let time = trace.controls[index].time_ns;
        trace.ios.partition_point(|io| io.time_ns < time)
    };
    for (index, text) in CONTROLS.iter().enumerate() {
        assert_eq!(before(&files, index), before(&dump, index), "{text}");
    }
}

#[test]
fn any_file_or_the_base_name_stands_for_all_processors() {
    let one = read("oracle/thin.blktrace.1.zst");
    let paths = [
        "oracle/thin",
        "oracle/thin.blktrace",
        "oracle/thin.blktrace.0",
    ]
    .map(recorded);
    for path in &paths {
        assert_eq!(read_all(from_ref(path), None, false).expect("found"), one);
    }
    assert_eq!(
        read_all(&paths, None, false).expect("found"),
        one,
        "each is taken once"
    );
}

#[test]
fn what_fio_logged_is_what_the_device_got() {
    let log = read("oracle/fio-v3.iolog");
    assert_eq!(log.format, "iolog");
    assert_eq!(log.devices, ["/dev/mapper/thin"]);
    let phase = read("oracle/thin.blktrace.0.zst");
    let end = phase.controls[0].time_ns;
    let of = |trace: &Trace| {
        let ios = trace
            .ios
            .iter()
            .filter(|io| io.time_ns < end && io.sectors > 0);
        let mut ranges: Vec<_> = ios.map(|io| (io.sector, io.sectors, io.op)).collect();
        ranges.sort_by_key(|&(sector, sectors, op)| (sector, sectors, op == TraceOp::Read));
        ranges
    };
    let (logged, traced) = (of(&log), of(&phase));
    let missing = logged.iter().filter(|io| !traced.contains(io)).count();
    assert_eq!((missing, logged.len()), (0, log.ios.len()));
}

/// The binary files of the workload, unpacked.
fn workload() -> (tempfile::TempDir, Vec<String>) {
    let folder = folder();
    let tar = fs::read(recorded("pool/blktrace-binary.tar.zst")).expect("it is there");
    let files = untar(&zstd::decode_all(tar.as_slice()).expect("sound"));
    let mut names = Vec::new();
    for (name, contents) in files {
        if name.contains("blktrace") {
            let name = name.trim_start_matches("./");
            fs::write(folder.path().join(name), contents).expect("there is room");
            names.push(name.to_owned());
        }
    }
    assert_eq!(names.len(), 8);
    (folder, names)
}

#[test]
fn files_dumps_and_text_of_a_workload_agree() {
    let (folder, _) = workload();
    for (device, name) in [
        ("dm-1", "thin1"),
        ("dm-0", "pool"),
        ("vda", "vda-metadata"),
        ("vdb", "vdb-data"),
    ] {
        let files = read_all(&[folder.path().join(device)], None, false).expect("sound");
        let dump = read(&format!("pool/merged-{name}.blktrace-dump.zst"));
        let text = read(&format!("pool/blkparse-{name}.txt.zst"));
        assert!(files.ios.len() > 100, "{device}: {}", files.ios.len());
        assert_eq!(sorted(&files), sorted(&dump), "{device}");
        assert_eq!(sorted(&files), sorted(&text), "{device}");
        assert_eq!(files.notes.lost, 0, "{device}");
    }
}

#[test]
fn several_devices_are_merged_into_one_trace() {
    let (folder, _) = workload();
    let paths: Vec<PathBuf> = ["dm-0.blktrace.1", "dm-1.blktrace.0"]
        .map(|name| folder.path().join(name))
        .into();
    let both = read_all(&paths, None, false).expect("sound");
    let mut devices = both.devices.clone();
    devices.sort();
    assert_eq!(devices, ["253:0", "253:1"]);
    let alone = paths.iter().map(|path| {
        read_all(from_ref(path), None, false)
            .expect("sound")
            .ios
            .len()
    });
    assert_eq!(both.ios.len(), alone.sum::<usize>());
    assert!(
        both.notes
            .warnings
            .iter()
            .any(|w| w.contains("253:0 got requests that were made to 253:1")),
        "{:?}",
        both.notes
    );
}
