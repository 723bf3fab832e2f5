//! What each format's records mean.

use std::fs;

use thintools::replay::{Format, TraceIo, TraceOp};

use super::{contents, fault, read, read_all, recorded, text};
use crate::support::{folder, untar};

/// Operation, sector, sectors.
fn ranges(ios: &[TraceIo]) -> Vec<(TraceOp, u64, u64)> {
    ios.iter()
        .map(|io| (io.op, io.sector, io.sectors))
        .collect()
}

#[test]
fn formats_have_names_that_are_read_back() {
    let names = "events blktrace blkparse iolog msr alibaba tencent spc load disksim ftrace biosnoop vscsi log-writes csv:op=0,off=1,len=2,read=R";
    for name in names.split(' ') {
        let format: Format = name.parse().expect("a name");
        assert_eq!(format.to_string(), name);
        assert!(!format.evidence().is_empty());
    }
    let error = "blktrase".parse::<Format>().expect_err("no name");
    assert!(error.to_string().contains("blktrace, "), "{error}");
    for (spec, wrong) in [
        ("csv:op=0,off=1", "len is missing"),
        ("csv:op=0,off=1:feet,len=2", "feet is none of bytes"),
        ("csv:op=0,off=0,len=2", "one meaning"),
        ("csv:op=0,off=1,len=2,dev=1-3", "one meaning"),
        ("csv:op=0,off=1,len=999", "999 is no column"),
        ("csv:op=0,off=1,len=2,ts=3:y", "y is none of ns"),
        ("csv:op", "op is no NAME=VALUE"),
        ("csv:op=0,off=1,len=2,colour=4", "colour is none of"),
    ] {
        let error = spec.parse::<Format>().expect_err(spec).to_string();
        assert!(error.contains(wrong), "{error}");
    }
}

#[test]
fn iolog_version_2_waits() {
    let trace = text(
        "fio version 2 iolog\nf add\nf open\nf write 4096 8192\nf wait 1000\nf read 513 511\nf wait 500\nf sync\nf trim 0 65536\n\
         f datasync 0 0\nf close\n",
        None,
    );
    assert_eq!(trace.format, "iolog");
    assert_eq!(
        trace.times(),
        [0, 1_000_000, 1_500_000, 1_500_000, 1_500_000]
    );
    assert_eq!(
        ranges(&trace.ios),
        [
            (TraceOp::Write, 8, 16),
            (TraceOp::Read, 1, 1),
            (TraceOp::Flush, 0, 0),
            (TraceOp::Discard, 0, 128),
            (TraceOp::Flush, 0, 0)
        ]
    );
    assert!(trace.ios[2].is_preflush);
    assert_eq!(trace.devices, ["f"]);
    let trace = read("misc/fio-v2.synthetic.iolog");
    assert_eq!((trace.format.as_str(), trace.ios.len()), ("iolog", 295));
    assert!(fault("fio version 1 iolog\n", Some("iolog")).contains("line 1: no version"));
    assert!(
        fault("fio version 2 iolog\nf leap 1 2\n", Some("iolog"))
            .contains(r#"line 2: no action of fio's logs: "f leap 1 2""#)
    );
}

#[test]
fn logs_of_several_jobs_in_one_file_follow_each_other() {
    let tar = fs::read(recorded("pool/fio-iologs.tar.zst")).expect("it is there");
    let files = untar(&zstd::decode_all(tar.as_slice()).expect("sound"));
    for (whole, parts) in [("fs", 3), ("raw", 3)] {
        let all =
            contents(&files[&format!("iologs/fio-{whole}.iolog")], None, false).expect("sound");
        let part = |i| {
            contents(&files[&format!("iologs/{whole}-{i}.v3.iolog")], None, false).expect("sound")
        };
        let untimed = |i| {
            contents(&files[&format!("iologs/{whole}-{i}.v2.iolog")], None, false).expect("sound")
        };
        let sum: Vec<_> = (0..parts).flat_map(|i| ranges(&part(i).ios)).collect();
        assert_eq!(ranges(&all.ios), sum);
        assert_eq!(all.notes.regressed, 0);
        assert!(all.notes.warnings[0].contains("several jobs"));
        (0..parts).for_each(|i| assert_eq!(ranges(&part(i).ios), ranges(&untimed(i).ios)));
    }
}

#[test]
fn loads_of_blkreplay() {
    for (name, events, first) in [
        ("mssql", 42_976, (TraceOp::Write, 49_339_162, 3)),
        ("shared-server", 1371, (TraceOp::Write, 6_293_576, 8)),
    ] {
        let trace = read(&format!("blkreplay-windows-{name}.load.gz"));
        assert_eq!((trace.format.as_str(), trace.ios.len()), ("load", events));
        assert_eq!(ranges(&trace.ios[..1]), [first]);
        assert_eq!(trace.notes.malformed, 0);
    }
    let wrong = fault(
        "start ; sector ; …\n0.5 ; 8 ; 8 ; W ; 0 ; 0\n0.6 ; 8 ; 8 ; X ; 0\n",
        Some("load"),
    );
    assert!(
        wrong.contains("line 3: no operation, R or W: \"0.6 ; 8"),
        "{wrong}"
    );
}

#[test]
fn disksim_has_milliseconds_and_mqsim_nanoseconds() {
    let trace = text("0.000000 1 100 8 1\n2.500000 0 200 16 0\n", None);
    assert_eq!(
        (trace.format.as_str(), trace.times()),
        ("disksim", vec![0, 2_500_000])
    );
    assert_eq!(
        ranges(&trace.ios),
        [(TraceOp::Read, 100, 8), (TraceOp::Write, 200, 16)]
    );
    assert_eq!(trace.devices, ["1", "0"]);
    assert_eq!(
        text("0 1 100 8 1\n2500 0 200 16 0\n", None).times(),
        [0, 2500]
    );
}

#[test]
fn block_events_of_the_kernel() {
    let trace = read("misc/ftrace-block.txt.zst");
    assert_eq!((trace.format.as_str(), trace.ios.len()), ("ftrace", 2048));
    assert_eq!(trace.devices, ["254:0", "1:1"]);
    assert_eq!(ranges(&trace.ios[..1]), [(TraceOp::Read, 15_808, 8)]);
    assert!(
        trace.notes.warnings[0].starts_with("1:1 got requests that were made to 254:0"),
        "{:?}",
        trace.notes
    );
    let perf = text(
        "  my [x] job  214 [003]    26.274818: block:block_bio_queue: 254,0 FWFS 8 + 16 [my [x] job]\n\
         job-7 [001] ..... 27.0: block_bio_queue: 254,0 FWS 0 + 0 [job]\n\
         CPU:1 [LOST 17 EVENTS]\n\
         job-7 [001] ..... 27.5: tracing_mark_write: ctl create_snap 1 0\n\
         job-7 [001] ..... 27.6: block_bio_queue: 254,0 DS 0 + 128 [job]\n\
         job-7 [001] ..... 27.6: block_bio_queue: 254,0 N 0 + 128 [job]\n\
         job-7 [001] ..... 27.7: block_bio_complete: 254,0 DS 0 + 128 [0]\n",
        None,
    );
    assert_eq!(
        ranges(&perf.ios),
        [
            (TraceOp::Write, 8, 16),
            (TraceOp::Flush, 0, 0),
            (TraceOp::Discard, 0, 128),
            (TraceOp::WriteZeroes, 0, 128)
        ]
    );
    assert!(perf.ios[0].is_preflush && perf.ios[0].is_fua && perf.ios[0].cpu == 3);
    assert_eq!(perf.times()[1], 725_182_000);
    assert_eq!(
        (perf.texts(), perf.notes.lost),
        (vec!["create_snap 1 0"], 17)
    );
}

#[test]
fn biosnoop_is_read_by_its_heading_from_the_end() {
    let old = text(
        "TIME(s)        COMM           PID    DISK    T  SECTOR    BYTES   LAT(ms)\n\
         0.000010000    kworker/u4:1   25     vda     W  8         4096       0.01\n\
         0.500000000    my job         77             R  100       512      100.00\n\
         0.450000000    jbd2           80     vda     W  18446744073709551615 0    1.00\n",
        None,
    );
    assert_eq!(old.format, "biosnoop");
    assert_eq!(
        ranges(&old.ios),
        [
            (TraceOp::Write, 8, 8),
            (TraceOp::Read, 100, 1),
            (TraceOp::Flush, 0, 0)
        ]
    );
    assert_eq!(
        old.times(),
        [0, 400_000_000, 449_000_000],
        "they begin a latency earlier"
    );
    assert_eq!(old.devices, ["vda", "?"]);
    let new = text(
        "TIME(s)     COMM           PID     DISK      T     SECTOR     BYTES   QUE(ms) LAT(ms)\n\
         0.100000    fio            5       dm-0      FWS   16         8192    0.001   0.500\n",
        None,
    );
    assert_eq!(ranges(&new.ios), [(TraceOp::Write, 16, 16)]);
    assert!(new.ios[0].is_preflush);
}

#[test]
fn biosnoop_is_told_by_its_heading() {
    let queued = text(
        "Tracing block device I/O... Hit Ctrl-C to end.\n\
         TIME(s)     COMM           PID     DISK      T SECTOR     BYTES   QUE(ms) P LAT(ms)\n\
         0.100000    my fio job     5       dm-0      W 16         8192    10.000  S   5.000\n\
         Possibly lost 12 samples\n\
         0.200000    fio            5       dm-0      W 32         8192   -1.000   R   5.000\n",
        None,
    );
    assert_eq!(
        queued.times(),
        [0, 110_000_000],
        "they begin when they are queued"
    );
    assert_eq!(queued.notes.lost, 12);
    let others = text(
        "TIME(ms)     DISK    COMM             PID    T SECTOR     BYTES   LAT(us)\n\
         100          vda     my job           4179   R 100        512     5000\n\
         200          vdb     cksum            4179   W 200        512     10000\n",
        None,
    );
    assert_eq!(
        (others.times(), others.devices.clone()),
        (vec![0, 95_000_000], vec!["vda".into(), "vdb".into()])
    );

    let bpftrace = "Attached 4 probes\n\
                    TIME(ms)     DISK    COMM             PID    LAT(ms)\n\
                    611          vda     bash             4179        10\n";
    let error = fault(bpftrace, None);
    assert!(
        error.contains("line 2: the heading has no T, SECTOR and BYTES")
            && error.contains("bcc's biosnoop")
            && error.contains("TIME(ms)     DISK    COMM"),
        "{error}"
    );
    let heading = "TIME COMM PID DISK T SECTOR BYTES LAT(ms)\n";
    assert!(fault(heading, Some("biosnoop")).contains("no TIME in s, ms, us or ns"));
    let heading = "TIME(s) COMM PID DISK T SECTOR BYTES LAT(days)\n";
    assert!(fault(heading, None).contains("no LAT in s, ms, us or ns"));
}

/// A record of vscsiStats.
fn scsi(version: u16, command: u16, length: u32, sector: u64, micros: u64) -> Vec<u8> {
    let mut record = Vec::new();
    let code = version << 8 | 1;
    if version == 1 {
        record.extend([[0; 4], length.to_le_bytes(), [0; 4]].concat());
        record.extend([command.to_le_bytes(), code.to_le_bytes()].concat());
    } else {
        record.extend([command.to_le_bytes(), code.to_le_bytes()].concat());
        record.extend([[0; 4], length.to_le_bytes(), [0; 4]].concat());
    }
    record.extend([sector.to_le_bytes(), micros.to_le_bytes()].concat());
    if version == 2 {
        record.extend([0; 8]);
    }
    record
}

#[test]
fn vscsi_of_both_versions() {
    for version in [1, 2] {
        let commands = [(0x2a, 4096), (0x88, 513), (0x35, 0), (0x42, 24), (0x12, 36)];
        let records = commands
            .into_iter()
            .zip(5..)
            .map(|((command, len), at)| scsi(version, command, len, 8 * at, 100 * at));
        let mut bytes = records.collect::<Vec<_>>().concat();
        bytes.extend([0; 7]);
        let trace = contents(&bytes, None, false).expect("sound");
        assert_eq!(trace.format, "vscsi");
        assert_eq!(
            ranges(&trace.ios),
            [
                (TraceOp::Write, 40, 8),
                (TraceOp::Read, 48, 2),
                (TraceOp::Flush, 0, 0)
            ]
        );
        assert_eq!(trace.times(), [0, 100_000, 200_000]);
        assert_eq!(trace.notes.skipped, 2);
        assert!(trace.notes.is_truncated);
        let mixed = [
            scsi(version, 0x2a, 512, 0, 0),
            scsi(version, 0x2a, 512, 0, 0),
            scsi(7, 0x2a, 512, 0, 0),
            vec![0; 40],
        ]
        .concat();
        let error = contents(&mixed, Some("vscsi"), false)
            .expect_err("a version that is not")
            .to_string();
        assert!(error.contains("record at byte"), "{error}");
    }
}

#[test]
fn a_log_of_dm_log_writes() {
    let trace = read("misc/log-writes-ext4.img.xz");
    assert_eq!(trace.format, "log-writes");
    assert_eq!(trace.ios.len() as u64 + trace.notes.skipped, 192);
    assert!(trace.notes.skipped >= 1, "marks");
    assert!(!trace.notes.is_truncated && trace.count(TraceOp::Flush) > 0);
    assert!(trace.ios.iter().any(|io| io.is_fua));
    assert!(
        trace.ios.is_sorted_by(|a, b| a.time_ns < b.time_ns),
        "times are numbers"
    );

    let field = |values: [u64; 4]| values.map(u64::to_le_bytes).concat();
    let mut log = field([0x006a_7366_7773_6872, 1, 3, 512]);
    log.resize(512, 0);
    for (values, text, data) in [
        ([8, 2, 3, 0], "", 1024),
        ([0, 0, 8, 20], "ctl create_snap 1 0\n", 0),
        ([0, 99, 4, 0], "", 0),
    ] {
        let start = log.len();
        log.extend(field(values));
        log.extend(text.as_bytes());
        log.resize(start + 512 + data, 0);
    }
    let trace = contents(&log, None, false).expect("sound");
    assert_eq!(
        ranges(&trace.ios),
        [(TraceOp::Write, 8, 2), (TraceOp::Discard, 0, 99)]
    );
    assert!(trace.ios[0].is_fua && trace.ios[0].is_preflush);
    assert_eq!(
        (
            trace.texts(),
            trace.controls[0].time_ns,
            trace.ios[1].time_ns
        ),
        (vec!["create_snap 1 0"], 1, 2)
    );
    let cut = contents(&log[..log.len() - 1], None, false).expect("sound");
    assert!(cut.notes.is_truncated && cut.ios.len() == 1);
}

#[test]
fn a_log_of_dm_log_writes_goes_on_behind_what_is_wrong_if_it_may() {
    let entry = |values: [u64; 4], data: usize| {
        let mut entry = values.map(u64::to_le_bytes).concat();
        entry.resize(512 + data, 0);
        entry
    };
    let log = |entries: &[Vec<u8>], number: u64| {
        [
            entry([0x006a_7366_7773_6872, 1, number, 512], 0),
            entries.concat(),
        ]
        .concat()
    };
    let sound = [entry([8, 2, 0, 0], 1024), entry([16, 1, 0, 0], 512)];
    let wrong = [
        (
            entry([0, 0, 8, 481], 0),
            "the text of the mark is longer than its sector",
        ),
        (
            entry([u64::MAX, 1, 0, 0], 512),
            "it ends beyond what a device can have",
        ),
    ];
    for (wrong, fault) in wrong {
        let [first, last] = sound.clone();
        let log = log(&[first, wrong, last], 3);
        let error = contents(&log, None, false).expect_err(fault).to_string();
        assert!(
            error.contains("record at byte 2048: ") && error.contains(fault),
            "{error}"
        );
        let trace = contents(&log, None, true).expect("lenient");
        assert_eq!(
            ranges(&trace.ios),
            [(TraceOp::Write, 8, 2), (TraceOp::Write, 16, 1)]
        );
        assert_eq!(
            (trace.notes.malformed, trace.notes.is_truncated),
            (1, false)
        );
        assert_eq!(trace.times(), [0, 2], "it has its number all the same");
    }
    let whole = log(&sound, 2);
    for (len, is_cut) in [
        (whole.len(), false),
        (whole.len() - 1, true),
        (2048, true),
        (2049, true),
    ] {
        let trace = contents(&whole[..len], None, false).expect("what is there");
        assert_eq!(trace.notes.is_truncated, is_cut, "{len}");
    }
}

#[test]
fn a_csv_by_its_columns() {
    let spec =
        "csv:dev=0,op=1,off=2:bytes,len=3:kib,ts=4:ms,read=r,write=w,discard=trim,flush=sync";
    let trace = text(
        "a,w,1024,4,0\nb,R,4096,1,1.5\na,Trim,0,64,2\na,sync,0,0,3,more\n",
        Some(spec),
    );
    assert_eq!(trace.format, spec);
    assert_eq!(
        ranges(&trace.ios),
        [
            (TraceOp::Write, 2, 8),
            (TraceOp::Read, 8, 2),
            (TraceOp::Discard, 0, 128),
            (TraceOp::Flush, 0, 0)
        ]
    );
    assert_eq!(trace.times(), [0, 1_500_000, 2_000_000, 3_000_000]);
    assert_eq!(trace.devices, ["a", "b"]);
    let wrong = fault("a,w,1024,4,0\na,w,1024,4\n", Some(spec));
    assert!(
        wrong.contains(r#"line 2: too few columns: "a,w,1024,4""#),
        "{wrong}"
    );
    let lenient = contents(b"a,w,1024,4,0\na,w,x,4,1\n", Some(spec), true).expect("lenient");
    assert_eq!((lenient.notes.malformed, lenient.notes.events), (1, 1));
}

#[test]
fn volumes_of_several_files_are_merged_by_time() {
    let folder = folder();
    let paths = ["usr_0.csv", "src1_2.csv", "again.csv"].map(|name| folder.path().join(name));
    fs::write(&paths[0], "128166372003061629,usr,0,Read,7014609920,24576,41286\n128166372016853991,usr,0,Write,512,512,9\n").expect("room");
    fs::write(&paths[1], "128166372003061630,src1,2,Write,1024,512,1\n").expect("room");
    fs::write(&paths[2], "128166372003061631,usr,0,Write,2048,512,1\n").expect("room");
    let trace = read_all(&paths, None, false).expect("sound");
    assert_eq!(trace.format, "msr");
    assert_eq!(trace.devices, ["usr_0", "src1_2"]);
    assert_eq!(
        trace.ios.iter().map(|io| io.device).collect::<Vec<_>>(),
        [0, 1, 0, 0]
    );
    assert_eq!(trace.times(), [0, 100, 200, 1_379_236_200]);
    assert_eq!(trace.ios[0].sectors, 48);
    fs::write(&paths[2], "fio version 2 iolog\nf write 0 512\n").expect("room");
    let error = read_all(&paths, None, false)
        .expect_err("of two kinds")
        .to_string();
    assert!(
        error.contains("is iolog, but other files of the trace are msr"),
        "{error}"
    );
}
