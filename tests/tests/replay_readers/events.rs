//! Event files, byte by byte as they are documented.

use thintools::replay::{ControlEvent, TraceIo, TraceOp};

use super::{contents, read_all};
use crate::support::folder;

/// A record: time, two numbers, and the bytes from 24 on.
fn record(time: u64, a: u64, b: u64, last: [u8; 8]) -> Vec<u8> {
    let mut bytes = [time, a, b].map(u64::to_le_bytes).concat();
    bytes.extend(last);
    bytes
}

fn padded(text: &[u8]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    bytes.resize(text.len().next_multiple_of(32), 0);
    bytes
}

fn header(version: u32, len: u32, name: &[u8]) -> Vec<u8> {
    let mut bytes = b"thinevts".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(padded(name));
    bytes
}

/// A file with a write, a message of 33 bytes, a discard of 4 TiB, and a flush.
pub(super) fn event_file(name: &str) -> Vec<u8> {
    let text = b"create_snap 1000001 1000000 33 by";
    [
        header(1, name.len() as u32, name.as_bytes()),
        record(5_000, 8, 16, [0, 0, 0, 0, 1, 3, 0x34, 0x12]),
        record(6_000, 0, 33, [0, 0, 0, 0, 0xfe, 0, 0, 0]),
        padded(text),
        record(7_000, 0, 1 << 33, [0, 0, 0, 0, 2, 0, 0, 0]),
        record(7_000, 0, 0, [0, 0, 0, 0, 4, 1, 0, 0]),
        record(0, 4, 0, [0, 0, 0, 0, 0xff, 0, 0, 0]),
    ]
    .concat()
}

#[test]
fn event_files_are_as_documented() {
    let file = event_file("web/0");
    let trace = contents(&file, None, false).expect("sound");
    assert_eq!(trace.format, "events");
    assert_eq!(trace.devices, ["web/0"]);
    let io = |time_ns, op, sector, sectors, is_preflush| TraceIo {
        time_ns,
        sector,
        sectors,
        device: 0,
        cpu: 0,
        op,
        is_preflush,
        is_fua: false,
    };
    let first = TraceIo {
        cpu: 0x1234,
        is_fua: true,
        ..io(5_000, TraceOp::Write, 8, 16, true)
    };
    let expected = [
        first,
        io(7_000, TraceOp::Discard, 0, 1 << 33, false),
        io(7_000, TraceOp::Flush, 0, 0, true),
    ];
    assert_eq!(trace.ios, expected);
    let text = "create_snap 1000001 1000000 33 by".into();
    assert_eq!(
        trace.controls,
        [ControlEvent {
            time_ns: 6_000,
            text
        }]
    );
    assert!(!trace.notes.is_truncated);
    // Compressed in pieces, it is the same.
    let (a, b) = file.split_at(77);
    let pieces = [a, b].map(|piece| zstd::encode_all(piece, 1).expect("memory"));
    let again = contents(&pieces.concat(), None, false).expect("sound");
    assert_eq!(again, trace);
}

#[test]
fn an_event_file_that_is_cut_off_anywhere_says_so() {
    let file = event_file("a");
    for len in 0..file.len() {
        let trace = contents(&file[..len], Some("events"), false).expect("what is there");
        assert!(trace.notes.is_truncated, "{len}");
        assert!(trace.ios.len() <= 3);
    }
    // Also where a piece of the compression ends.
    let piece = zstd::encode_all(&file[..96], 1).expect("memory");
    assert!(
        contents(&piece, None, false)
            .expect("sound")
            .notes
            .is_truncated
    );
}

#[test]
fn hostile_event_files_are_errors() {
    let end = |events| record(0, events, 0, [0, 0, 0, 0, 0xff, 0, 0, 0]);
    let write = |at: usize, value: u8| {
        let mut last = [0, 0, 0, 0, 1, 0, 0, 0];
        last[at] = value;
        [header(1, 1, b"a"), record(1, 8, 8, last), end(1)].concat()
    };
    let mut reserved = header(1, 1, b"a");
    reserved[31] = 1;
    for (file, fault) in [
        (header(2, 1, b"a"), "version 2"),
        (header(1, u32::MAX, b"a"), "a name of 4294967295 bytes"),
        (header(1, 1025, &[b'a'; 1025]), "a name of 1025 bytes"),
        (header(1, 2, &[0xc3, 0x28]), "not UTF-8"),
        (vec![b'x'; 32], "no header"),
        (reserved, "reserved bytes of the header"),
        (write(0, 1), "byte 64: reserved bytes"),
        (write(4, 5), "no operation"),
        (write(5, 4), "flags that are not known"),
        (
            [header(1, 0, b""), record(1, 8, 8, [0, 0, 0, 0, 1, 0, 0, 0])].concat(),
            "names no device",
        ),
        (
            [header(1, 1, b"a"), record(1, u64::MAX, 8, [0; 8])].concat(),
            "beyond what a device can have",
        ),
        (
            [
                header(1, 1, b"a"),
                record(1, 0, 1 << 40, [0, 0, 0, 0, 0xfe, 0, 0, 0]),
            ]
            .concat(),
            "longer than 64 KiB",
        ),
        ([header(1, 1, b"a"), end(1)].concat(), "not as many events"),
        (
            [write(7, 0), end(1)].concat(),
            "more behind the last record",
        ),
    ] {
        let error = contents(&file, Some("events"), false).expect_err(fault);
        assert!(error.to_string().contains(fault), "{fault}: {error}");
    }
}

#[test]
fn event_files_of_one_trace_stay_in_step() {
    let place = folder();
    let paths = ["a", "b"].map(|name| {
        let path = place.path().join(name);
        std::fs::write(&path, event_file(name)).expect("written");
        path
    });
    let trace = read_all(&paths, None, false).expect("sound");
    assert_eq!(trace.devices, ["a", "b"]);
    assert_eq!(trace.times(), [5_000, 5_000, 7_000, 7_000, 7_000, 7_000]);
}
