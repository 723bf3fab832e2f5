//! Everything that is known to go wrong with traces.
//!
//! | trap | test |
//! |---|---|
//! | bit 0x100 of an action | [`bit_0x100_of_an_action_is_no_part_of_it`] |
//! | FUA is bit 15 | [`fua_is_bit_15_of_the_categories`] |
//! | texts of blkparse joined, with summaries between | [`texts_of_blkparse_that_were_joined_are_read_to_the_end`] |
//! | text of an empty flush | [`an_empty_flush_has_fewer_fields_in_text`] |
//! | ends of messages | [`a_control_event_may_end_in_anything_and_begin_with_the_name_of_the_program`] |
//! | messages of a dump out of order | [`messages_out_of_order_in_a_dump_are_put_in_order`] |
//! | equal times | [`equal_times_are_ordered_by_processor_and_number`] |
//! | many processors, times that go back | [`any_number_of_processors_is_merged_as_one_by_one`] |
//! | stamps of whole seconds | [`whole_seconds_are_spread_the_same_way_every_time`] |
//! | times since 1601 | [`filetimes_count_from_1601`] |
//! | SPC: blocks and bytes | [`spc_has_addresses_in_blocks_and_sizes_in_bytes`] |
//! | discards beyond a block and 4 GiB | [`discards_may_be_larger_than_any_block_or_4_gib`] |
//! | sectors beyond the device | [`sectors_beyond_what_a_device_can_have_are_errors`] |
//! | a last record cut off | [`a_last_record_that_is_cut_off_is_told`] |
//! | the file of a processor is missing | [`the_file_of_a_processor_is_missing`] |
//! | lost events | [`lost_events_are_gaps_in_the_numbers_of_a_processor`] |
//! | several devices in a trace | [`devices_of_one_trace_keep_their_names`] |
//! | minors above 255 | [`minors_go_beyond_255`] |
//! | big-endian, version 8 | [`both_versions_and_byte_orders_say_the_same`] |
//! | recorded below the thin device | [`what_is_below_the_thin_device_is_warned_of`] |
//! | CRLF | [`lines_may_end_as_in_dos`] |
//! | joined members of gzip and others | [`compressed_files_may_be_joined_and_cut_off`] |
//! | windows of 128 MiB | [`what_refers_back_further_than_memory_may_go_is_refused`] |
//! | CSV with a heading and without | [`a_heading_of_a_csv_is_no_fault_but_only_at_its_beginning`] |
//! | lines and records of nonsense | [`lenient_reading_counts_and_goes_on`] |

use std::fs;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use thintools::replay::{TraceIo, TraceOp};

use super::{Trace, contents, fault, read_all, recorded, text};
use crate::support::folder;

/// A record of blktrace as it may be wished for.
#[derive(Clone)]
struct Rec {
    sequence: u32,
    time: u64,
    sector: u64,
    bytes: u32,
    action: u64,
    pid: u32,
    device: u32,
    cpu: u32,
    payload: Vec<u8>,
}

const Q: u64 = 1;
const WRITE: u64 = 1 << 17;
const FLUSH: u64 = 1 << 18;
const NOTIFY: u64 = 1 << 26;
const DISCARD: u64 = 1 << 29;
const FUA: u64 = 1 << 31;

impl Rec {
    fn new(time: u64, action: u64) -> Self {
        Self {
            sequence: 0,
            time,
            sector: 8,
            bytes: 4096,
            action,
            pid: 7,
            device: 254 << 20 | 1,
            cpu: 0,
            payload: Vec::new(),
        }
    }

    fn message(time: u64, text: &str) -> Self {
        Self {
            payload: text.into(),
            ..Self::new(time, NOTIFY | 2)
        }
    }

    fn bytes(&self, version: u32, is_big: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |value: u64, len: usize| {
            if is_big {
                bytes.extend(&value.to_be_bytes()[8 - len..]);
            } else {
                bytes.extend(&value.to_le_bytes()[..len]);
            }
        };
        put((0x6561_7400 | version).into(), 4);
        put(self.sequence.into(), 4);
        put(self.time, 8);
        put(self.sector, 8);
        put(self.bytes.into(), 4);
        if version == 7 {
            put(self.action, 4);
            put(self.pid.into(), 4);
        } else {
            put(self.pid.into(), 4);
            put(self.action, 8);
        }
        put(self.device.into(), 4);
        put(self.cpu.into(), 4);
        put(0, 2);
        put(self.payload.len() as u64, 2);
        if version == 8 {
            bytes.extend([0; 12]);
        }
        bytes.extend(&self.payload);
        bytes
    }
}

fn trace(records: &[Rec]) -> Vec<u8> {
    records
        .iter()
        .flat_map(|record| record.bytes(7, false))
        .collect()
}

fn sound(records: &[Rec]) -> Trace {
    contents(&trace(records), None, false).expect("sound")
}

#[test]
fn both_versions_and_byte_orders_say_the_same() {
    let mut cgroup = Rec::message(30, "");
    cgroup.action |= 0x100;
    cgroup.payload = [&[9; 8], "ctl create_snap 1 0\n".as_bytes()].concat();
    let mut records = vec![
        Rec::new(10, Q | WRITE | FUA),
        Rec::new(20, Q | 0x100),
        cgroup,
        Rec::new(40, Q | DISCARD | WRITE),
    ];
    records[1].payload = vec![0; 8];
    let expected = sound(&records);
    assert_eq!(expected.ios.len(), 3);
    assert_eq!(expected.texts(), ["create_snap 1 0"]);
    for (version, is_big) in [(7, true), (8, false), (8, true)] {
        let bytes: Vec<u8> = records
            .iter()
            .flat_map(|record| record.bytes(version, is_big))
            .collect();
        assert_eq!(
            contents(&bytes, None, false).expect("sound"),
            expected,
            "{version} {is_big}"
        );
    }
    let mixed: Vec<u8> = records
        .iter()
        .zip([7, 8, 8, 7])
        .flat_map(|(record, version)| record.bytes(version, false))
        .collect();
    assert_eq!(
        contents(&mixed, None, false).expect("sound"),
        expected,
        "a version for each record"
    );
}

#[test]
fn bit_0x100_of_an_action_is_no_part_of_it() {
    let mut record = Rec::new(0, Q | WRITE | 0x100);
    record.payload = vec![1; 8];
    assert_eq!(sound(&[record]).count(TraceOp::Write), 1);
}

#[test]
fn fua_is_bit_15_of_the_categories() {
    let io = sound(&[Rec::new(0, Q | WRITE | FUA)]).ios[0];
    assert!(io.is_fua && !io.is_preflush);
    let io = sound(&[Rec::new(0, Q | WRITE | FLUSH)]).ios[0];
    assert!(!io.is_fua && io.is_preflush && io.op == TraceOp::Write);
}

#[test]
fn an_empty_flush_has_fewer_fields_in_text() {
    let trace = text(
        "253,1    1        1     0.000000000   152  Q FWS [mkfs.ext4]\n\
         253,1    0        1     0.018712000     0  C FWS 0 [0]\n\
         253,1    1        2     0.046693290   152  Q  DS 0 + 8 [my (odd) [job] 1 + 2]\n\
         253,1    1        3     0.046700000   152  Q FWFSM 16 + 8 [a b]\n\
         253,1    1        4     0.046700000   152  Q   R 36 (12 00 00) [a b]\n\
         253,1    1        4     0.046700000   152  m   N ctl delete 1\n\
         253,1    1        5     0.046800000   152  P   N [a b]\n\
         253,1    1        6     0.046800000   152  U   N [a b] 1\n\
         CPU0 (thin):\n Reads Queued:        1069,    10384KiB\n",
        None,
    );
    assert_eq!(trace.format, "blkparse");
    let ops: Vec<_> = trace
        .ios
        .iter()
        .map(|io| (io.op, io.sectors, io.is_preflush, io.is_fua, io.cpu))
        .collect();
    assert_eq!(
        ops,
        [
            (TraceOp::Flush, 0, true, false, 1),
            (TraceOp::Discard, 8, false, false, 1),
            (TraceOp::Write, 8, true, true, 1)
        ]
    );
    assert_eq!(trace.texts(), ["delete 1"]);
    assert_eq!(trace.notes.skipped, 6, "of the summary, too");
}

#[test]
fn texts_of_blkparse_that_were_joined_are_read_to_the_end() {
    let run = |name: &str, lost: &str| {
        format!(
            "Input file {name}.blktrace.0 added\n\
             254,1    0        1     0.000001000   161  Q   R 8 + 8 [fio]\n\
             254,1    0        2     0.500000000   161  Q   W 16 + 8 [fio]\n\
             fio (161)\n Reads Queued:           1,        4KiB\t Writes Queued:           1,        4KiB\n\n\
             CPU0 ({name}):\n Reads Queued:           1,        4KiB\t Writes Queued:           1,        4KiB\n \
             Read depth:             0        \t Write depth:             0\n\n\
             Total ({name}):\n IO unplugs:             0        \t Timer unplugs:           0\n\n\
             Throughput (R/W): 0KiB/s / 0KiB/s\nEvents ({name}): 2 entries\nSkips: {lost}\n"
        )
    };
    let one = text(&run("a", "0 forward (0 -   0.0%)"), None);
    assert_eq!((one.ios.len(), one.notes.lost), (2, 0));
    assert!(one.notes.warnings.is_empty() && !one.notes.is_truncated);
    let joined = [
        run("a", "3 forward (1,500 -  99.9%)"),
        run("b", "1 forward (7 -  70.0%)"),
    ];
    let joined = text(&joined.concat(), None);
    assert_eq!(joined.format, "blkparse");
    assert_eq!(joined.times(), [0, 499_999_000, 500_000_000, 999_999_000]);
    assert_eq!((joined.notes.lost, joined.notes.regressed), (1507, 0));
    assert!(joined.notes.warnings[0].contains("several runs of blkparse"));

    let blktrace = "=== dm-1 ===\n  CPU  0:                    2 events,        1 KiB data\n  \
                    Total:                     2 events (dropped 12),        1 KiB data\n";
    let later = "254,1    0        3     0.600000000   161  Q   R 8 + 8 [fio]\n";
    let both = text(
        &[&run("a", "0 forward (0 -   0.0%)"), blktrace, later].concat(),
        None,
    );
    assert_eq!((both.ios.len(), both.notes.lost), (3, 12));
    assert_eq!(both.times()[2], 599_999_000, "time goes on where it can");
    assert!(both.notes.warnings.is_empty());
    assert!(fault(&format!("{later}hello\n"), Some("blkparse")).contains("line 2: no line of"));
}

#[test]
fn a_control_event_may_end_in_anything_and_begin_with_the_name_of_the_program() {
    for words in [
        "ctl delete 1",
        "ctl delete 1\n",
        "ctl delete 1\0",
        "ctl  delete 1 \n\0\0",
        "thinreplay: delete 1\n",
        "thinreplay:delete 1",
    ] {
        let trace = sound(&[Rec::new(0, Q), Rec::message(5, words)]);
        assert_eq!(trace.texts(), ["delete 1"], "{words:?}");
    }
    for other in ["ctl", "control delete 1", "\0", "", "thinreplay delete 1"] {
        let trace = sound(&[Rec::new(0, Q), Rec::message(5, other)]);
        assert!(trace.texts().is_empty(), "{other:?}");
    }
}

#[test]
fn messages_out_of_order_in_a_dump_are_put_in_order() {
    const START: u64 = 5_000_000_000;
    let process = Rec::new(START - 100, NOTIFY);
    let mut records = vec![
        process,
        Rec::message(START + 2500, "ctl delete 1"),
        Rec::message(START + 1500, "ctl create_snap 1 0\n"),
    ];
    records.extend((0..4).map(|i| Rec::new(i * 1000, Q | WRITE)));
    let trace = sound(&records);
    assert_eq!(trace.texts(), ["create_snap 1 0", "delete 1"]);
    let times: Vec<u64> = trace
        .controls
        .iter()
        .map(|control| control.time_ns)
        .collect();
    assert_eq!(
        (times, trace.times()),
        (vec![1600, 2600], vec![0, 1000, 2000, 3000])
    );
    assert_eq!(trace.notes.regressed, 0);
}

/// Against a merge that takes the least of the next records again and again.
#[test]
fn any_number_of_processors_is_merged_as_one_by_one() {
    for processors in [1, 2, 7, 40] {
        let folder = folder();
        let (mut paths, mut files) = (Vec::new(), Vec::new());
        for cpu in 0..processors {
            let mut records = Vec::new();
            let mut time: u64 = 1000;
            for sequence in 1..2000u32 {
                let random =
                    (u64::from(sequence) * 0x9e37_79b9 + u64::from(cpu) * 0x85eb_ca6b) >> 7;
                // Steps of different lengths, mostly forward; and a rest in which others go on.
                time = (time + random % 50).saturating_sub(random / 64 % 3 * 8);
                time += u64::from(sequence % 700 == 0) * 40_000;
                let record = match random % 37 {
                    0 => Rec::message(time, &format!("ctl phase-end {cpu}-{sequence}")),
                    1 => Rec::new(time, 8),
                    _ => Rec::new(time, Q | WRITE),
                };
                let sector = u64::from(sequence) << 8 | u64::from(cpu);
                records.push(Rec {
                    sequence,
                    cpu,
                    sector,
                    ..record
                });
            }
            let path = folder.path().join(format!("t.blktrace.{cpu}"));
            fs::write(&path, trace(&records)).expect("there is room");
            paths.push(path);
            records.retain(|record| record.action != 8);
            files.push(records.into_iter().peekable());
        }
        let (mut sectors, mut texts) = (Vec::new(), Vec::new());
        let next = |files: &mut Vec<std::iter::Peekable<std::vec::IntoIter<Rec>>>| {
            let heads = files.iter_mut().enumerate();
            let heads = heads.filter_map(|(file, records)| Some((records.peek()?.time, file)));
            heads.min()
        };
        while let Some((_, file)) = next(&mut files) {
            let record = files[file].next().expect("it was looked at");
            if record.action & NOTIFY == 0 {
                sectors.push(record.sector);
            } else {
                texts.push(String::from_utf8(record.payload[4..].to_vec()).expect("a text"));
            }
        }
        let read = read_all(&paths, None, false).expect("sound");
        let found: Vec<u64> = read.ios.iter().map(|io| io.sector).collect();
        assert!(found == sectors, "{processors} processors");
        assert_eq!(read.texts(), texts, "{processors} processors");
        assert!(read.notes.regressed > 0 && read.notes.skipped > 0);
    }
}

#[test]
fn equal_times_are_ordered_by_processor_and_number() {
    let folder = folder();
    for cpu in [0u32, 1] {
        let records = [1u32, 2].map(|sequence| Rec {
            sequence,
            cpu,
            sector: u64::from(10 * cpu + sequence),
            ..Rec::new(5, Q | WRITE)
        });
        fs::write(
            folder.path().join(format!("t.blktrace.{cpu}")),
            trace(&records),
        )
        .expect("room");
    }
    let trace = read_all(&[folder.path().join("t")], None, false).expect("sound");
    let sectors: Vec<u64> = trace.ios.iter().map(|io| io.sector).collect();
    assert_eq!(sectors, [1, 2, 11, 12]);
}

#[test]
fn whole_seconds_are_spread_the_same_way_every_time() {
    let csv = "1538323200,0,8,0,1283\n1538323200,8,8,1,1283\n1538323200,16,8,1,7\n1538323200,24,8,1,7\n1538323202,0,8,0,7\n";
    let trace = text(csv, None);
    assert_eq!(trace.format, "tencent");
    assert_eq!(
        trace.times(),
        [0, 250_000_000, 500_000_000, 750_000_000, 2_000_000_000]
    );
    assert_eq!(trace.ios[1].op, TraceOp::Write);
    assert_eq!(trace.devices, ["1283", "7"]);
    let many: String = (0..200_000)
        .map(|i| format!("1538323200,{i},8,0,1\n"))
        .collect();
    let trace = text(&many, None);
    assert!(trace.ios.is_sorted_by(|a, b| a.time_ns < b.time_ns));
    assert!(trace.ios.last().expect("some").time_ns < 1_000_000_000);
}

#[test]
fn filetimes_count_from_1601() {
    let spec = "csv:op=0,off=1,len=2,ts=3:filetime,write=W";
    assert!(fault("W,0,512,116444735999999999\n", Some(spec)).contains("no time"));
    let trace = text(
        "W,0,512,116444736000000000\nW,0,512,128166372003061629\n",
        Some(spec),
    );
    assert_eq!(trace.times()[1], 1_172_163_600_306_162_900);
}

#[test]
fn spc_has_addresses_in_blocks_and_sizes_in_bytes() {
    let trace = text(
        "0,20941264,8192,W,0.551706\n0, 20939840, 8192, r, 0.554041, x\n1,3,100,W,0.6\n",
        None,
    );
    assert_eq!(trace.format, "spc");
    let io = trace.ios[0];
    assert_eq!(
        (io.sector, io.sectors, io.op),
        (20_941_264, 16, TraceOp::Write)
    );
    assert_eq!(trace.times()[1], 2_335_000);
    assert_eq!((trace.ios[2].sectors, trace.ios[2].device), (1, 1));
}

#[test]
fn discards_may_be_larger_than_any_block_or_4_gib() {
    let record = Rec {
        bytes: !511,
        ..Rec::new(0, Q | WRITE | DISCARD)
    };
    assert_eq!(sound(&[record]).ios[0].sectors, u64::from(u32::MAX >> 9));
    let trace = text("fio version 2 iolog\nf trim 0 1099511627776\n", None);
    assert_eq!(trace.ios[0].sectors, 1 << 31);
    let trace = text("253,1 1 1 0.0 152 Q D 0 + 8589934592 [x]\n", None);
    assert_eq!(trace.ios[0].sectors, 1 << 33);
}

#[test]
fn sectors_beyond_what_a_device_can_have_are_errors() {
    let end = u64::MAX / 512;
    let record = Rec {
        sector: end - 7,
        ..Rec::new(0, Q | WRITE)
    };
    let error = contents(&trace(&[record]), None, false)
        .expect_err("too far")
        .to_string();
    assert!(
        error.contains("record at byte 0: it ends beyond"),
        "{error}"
    );
    assert_eq!(
        text(
            &format!("253,1 1 1 0.0 152 Q W {} + 8 [x]\n", end - 8),
            None
        )
        .ios
        .len(),
        1
    );
    assert!(
        fault(
            &format!("253,1 1 1 0.0 152 Q W {end} + 8 [x]\n"),
            Some("blkparse")
        )
        .contains("line 1: it ends beyond")
    );
    assert!(
        fault(
            &format!("fio version 2 iolog\nf read {} 512\n", u64::MAX),
            Some("iolog")
        )
        .contains("line 2: it ends beyond")
    );
    assert!(
        fault("0,R,99999999999999999999,512,0\n", Some("alibaba")).contains("line 1: no offset")
    );
}

#[test]
fn a_last_record_that_is_cut_off_is_told() {
    let bytes = trace(&[Rec::new(0, Q), Rec::message(5, "ctl delete 1")]);
    for len in 49..bytes.len() {
        let cut = contents(&bytes[..len], None, false).expect("the rest is sound");
        assert_eq!((cut.ios.len(), cut.notes.is_truncated), (1, true), "{len}");
    }
    let cut = text("0,R,0,512,7\n0,R,0,5", Some("alibaba"));
    assert_eq!((cut.ios.len(), cut.notes.is_truncated), (1, true));
    let whole = text("0,R,0,512,7\n0,R,0,512,8", Some("alibaba"));
    assert_eq!((whole.ios.len(), whole.notes.is_truncated), (2, false));
}

#[test]
fn the_file_of_a_processor_is_missing() {
    let folder = folder();
    for cpu in [0, 2] {
        fs::write(
            folder.path().join(format!("t.blktrace.{cpu}")),
            trace(&[Rec::new(0, Q)]),
        )
        .expect("room");
    }
    fs::write(folder.path().join("t.blktrace.3"), "").expect("room");
    let trace = read_all(&[folder.path().join("t.blktrace.2")], None, false).expect("sound");
    assert_eq!(trace.ios.len(), 2);
    assert!(
        trace.notes.warnings[0].contains("t.blktrace.1: what processor 1 did is missing"),
        "{:?}",
        trace.notes
    );
}

#[test]
fn runs_of_one_processor_are_merged_with_the_others() {
    let record = |time: u64, cpu: u32| {
        let mut record = Rec::new(time, Q);
        record.cpu = cpu;
        record
    };
    let folder = crate::support::folder();
    let mut expected = Vec::new();
    // Runs of 1 to 50 requests, and every seventh time is on all processors.
    for cpu in 0..5u32 {
        let times = (0..20_000u64).filter(|time| {
            time % 7 == 0 || (time / u64::from(1 + (time >> 9) as u32 % 50)) % 5 == u64::from(cpu)
        });
        let times: Vec<u64> = times.collect();
        expected.extend(times.iter().map(|&time| (time, cpu as u16)));
        let records: Vec<Rec> = times.iter().map(|&time| record(time, cpu)).collect();
        std::fs::write(
            folder.path().join(format!("t.blktrace.{cpu}")),
            trace(&records),
        )
        .expect("there is room");
    }
    expected.sort();
    let trace = read_all(&[folder.path().join("t.blktrace.0")], None, false).expect("sound");
    let found: Vec<_> = trace.ios.iter().map(|io| (io.time_ns, io.cpu)).collect();
    assert!(found == expected, "they are in order of time and processor");
}

#[test]
fn lost_events_are_gaps_in_the_numbers_of_a_processor() {
    let at = |sequence, cpu| Rec {
        sequence,
        cpu,
        ..Rec::new(sequence.into(), Q)
    };
    let records = [
        at(1, 0),
        at(1, 1),
        Rec::message(1, "x"),
        at(2, 0),
        at(5, 0),
        at(6, 0),
        at(7, 1),
    ];
    assert_eq!(sound(&records).notes.lost, 2 + 5);
}

#[test]
fn devices_of_one_trace_keep_their_names() {
    let on = |device, time| Rec {
        device,
        ..Rec::new(time, Q)
    };
    let trace = sound(&[on(254 << 20 | 1, 0), on(8 << 20, 1), on(254 << 20 | 1, 2)]);
    assert_eq!(trace.devices, ["254:1", "8:0"]);
    assert_eq!(
        trace.ios.iter().map(|io| io.device).collect::<Vec<_>>(),
        [0, 1, 0]
    );
}

#[test]
fn minors_go_beyond_255() {
    let record = Rec {
        device: 253 << 20 | 70_000,
        ..Rec::new(0, Q)
    };
    assert_eq!(sound(&[record]).devices, ["253:70000"]);
    assert_eq!(
        text("253,70000 1 1 0.0 152 Q W 0 + 8 [x]\n", None).devices,
        ["253:70000"]
    );
}

#[test]
fn what_is_below_the_thin_device_is_warned_of() {
    let mut record = Rec::new(0, 15 | WRITE);
    record.payload = [(254u32 << 20 | 3).to_be_bytes(), [0; 4], [0; 4], [0; 4]].concat();
    let trace = sound(&[record, Rec::new(1, Q | WRITE)]);
    assert!(
        trace.notes.warnings[0].starts_with("254:1 got requests that were made to 254:3"),
        "{:?}",
        trace.notes
    );
    let line = "8,0 1 1 0.0 152 A W 100 + 8 <- (8,1) 60\n8,0 1 1 0.0 152 Q W 100 + 8 [x]\n";
    assert!(
        text(line, None).notes.warnings[0].starts_with("8:0 got requests that were made to 8:1")
    );
}

#[test]
fn lines_may_end_as_in_dos() {
    let csv = "device_id,opcode,offset,length,timestamp\r\n419,W,8792731648,16384,1577808000000046\r\n725,R,59110326272,360448,1577808000000360\r\n";
    let trace = text(csv, None);
    assert_eq!(
        (trace.format.as_str(), trace.ios.len(), trace.times()[1]),
        ("alibaba", 2, 314_000)
    );
}

#[test]
fn a_heading_of_a_csv_is_no_fault_but_only_at_its_beginning() {
    let line = "419,W,8192,16384,1577808000000046\n";
    let heading = "device_id,opcode,offset,length,timestamp\n";
    assert_eq!(text(line, None).ios.len(), 1);
    assert_eq!(text(&format!("{heading}{line}"), None).notes.skipped, 1);
    assert!(fault(&format!("{line}{heading}"), Some("alibaba")).contains("line 2: "));
}

#[test]
fn compressed_files_may_be_joined_and_cut_off() {
    let csv = |range: std::ops::Range<u64>| -> Vec<u8> {
        range
            .flat_map(|i| format!("1,W,{},4096,{i}\n", i * 4096).into_bytes())
            .collect()
    };
    let gz = |bytes: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    };
    let zst = |bytes: &[u8]| zstd::encode_all(bytes, 1).expect("memory");
    let xz = |bytes: &[u8]| {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    };
    let bz2 = |bytes: &[u8]| {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    };
    let plain = contents(&csv(0..50_000), None, false).expect("sound");
    let parts = [csv(0..100), csv(100..50_000)];
    let joined = [
        parts.each_ref().map(|part| gz(part)),
        parts.each_ref().map(|part| zst(part)),
        parts.each_ref().map(|part| xz(part)),
        parts.each_ref().map(|part| bz2(part)),
    ];
    for (index, joined) in joined.into_iter().enumerate() {
        let joined = joined.concat();
        assert_eq!(
            contents(&joined, None, false).expect("sound"),
            plain,
            "{index}"
        );
        let cut = contents(&joined[..joined.len() - 9], None, false).expect("the rest is sound");
        assert!(
            cut.notes.is_truncated && cut.ios.len() <= plain.ios.len(),
            "{index}"
        );
        assert!(
            cut.notes.warnings[0].contains("the compressed file ends too early, after "),
            "{index}: {:?}",
            cut.notes.warnings
        );
        let nothing = contents(&joined[..if index == 0 { 16 } else { 20 }], None, false);
        let nothing = nothing.expect_err("nothing").to_string();
        assert!(nothing.contains("ends too early"), "{index}: {nothing}");
        let mut broken = joined.clone();
        let middle = broken.len() / 2;
        broken[middle..middle + 64].fill(0xa5);
        let _ = contents(&broken, Some("alibaba"), false);
    }
}

#[test]
fn zeros_behind_a_gzip_file_are_no_part_of_it() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder
        .write_all(b"419,W,8192,16384,1577808000000046\n")
        .expect("memory");
    let packed = encoder.finish().expect("memory");
    let padded = [&packed[..], &[0; 100_000]].concat();
    let trace = contents(&padded, None, false).expect("sound");
    assert_eq!((trace.ios.len(), trace.notes.is_truncated), (1, false));
    assert!(trace.notes.warnings.is_empty());
    for behind in [&b"\0\0garbage, which is no gzip"[..], b"\n"] {
        let trace = contents(&[&packed[..], behind].concat(), None, false).expect("sound");
        assert_eq!((trace.ios.len(), trace.notes.is_truncated), (1, true));
        let warning = &trace.notes.warnings[0];
        assert!(
            warning.contains("goes on with something else, after 34 bytes of what it held"),
            "{warning}"
        );
    }
}

#[test]
fn a_byte_order_mark_in_front_of_a_text_is_no_part_of_it() {
    let line = "419,W,8192,16384,1577808000000046\n";
    let blkparse = "254,1 1 1 0.5 152 Q W 8 + 8 [x]\n";
    for (format, plain) in [("alibaba", line), ("blkparse", blkparse)] {
        let marked = format!("\u{feff}{plain}");
        for asked in [None, Some(format)] {
            assert_eq!(text(&marked, asked), text(plain, asked), "{format}");
        }
    }
}

#[test]
fn a_bad_line_near_the_start_is_that_and_not_another_format() {
    let csv = |i: u64| {
        format!(
            "{},W,{},4096,{}\n",
            i % 3,
            i * 4096,
            1_577_808_000_000_000 + i
        )
    };
    let blkparse = |i: u64| {
        format!(
            "252,{:<3} 0 {i:8} {:5}.000000000  1234  Q   W {} + 8 [fio]\n",
            3,
            i,
            i * 8
        )
    };
    let msr = |i: u64| {
        format!(
            "{},usr,0,Read,{},4096,41286\n",
            128_166_372_003_061_629 + i,
            i * 4096
        )
    };
    let formats: [(&str, &dyn Fn(u64) -> String); 3] =
        [("alibaba", &csv), ("blkparse", &blkparse), ("msr", &msr)];
    for (format, line) in formats {
        for bad in [1, 2, 5, 8, 17, 40, 2000] {
            let trace: String = (1..=3000)
                .map(|i| match i == bad {
                    true => "this, is no line\n".into(),
                    false => line(i),
                })
                .collect();
            // The first line of a CSV may be a heading.
            if (bad, format) != (1, "alibaba") && (bad, format) != (1, "msr") {
                let fault = fault(&trace, None);
                assert!(
                    fault.contains(&format!("line {bad}: ")) && fault.contains("this, is no line"),
                    "{format}: {fault}"
                );
            }
            let trace = contents(trace.as_bytes(), None, true).expect("lenient");
            assert_eq!((trace.format.as_str(), trace.ios.len()), (format, 2999));
        }
    }
}

#[test]
fn what_refers_back_further_than_memory_may_go_is_refused() {
    // One line of a CSV, as zstd --long=27 and xz with dictionaries of 64 and 128 MiB compress it.
    let zstd = b"\x28\xb5\x2f\xfd\x04\x88\x69\x00\x00\x31\x2c\x57\x2c\x30\x2c\x34\x30\x39\x36\x2c\x31\x0a\xd1\xc9\xb5\x64";
    let xz = |dictionary: &[u8]| {
        let (header, rest) = (
            b"\xfd7zXZ\0\x00\x04\xe6\xd6\xb4\x46\x02\x00\x21\x01",
            b"\x01\x00\x0c\x31\x2c\x57\x2c\x30\x2c\x34\x30\x39\x36\x2c\x31\x0a\x00\x00\x00\x00\x0f\xbc\xca\xf7\xc6\x44\xca\xd8\
              \x00\x01\x25\x0d\x71\x19\xc4\xb6\x1f\xb6\xf3\x7d\x01\x00\x00\x00\x00\x04\x59\x5a",
        );
        [&header[..], dictionary, rest].concat()
    };
    let huge = xz(b"\x1e\0\0\0\x9b\x07\x51\x66");
    for (packed, window, most) in [
        (&zstd[..], "128 MiB", "32 MiB"),
        (&huge, "128 MiB", "64 MiB"),
    ] {
        let error = contents(packed, Some("alibaba"), true).expect_err("too far");
        let reason = std::error::Error::source(&error)
            .expect("a reason")
            .to_string();
        assert!(
            reason.contains(&format!("it refers back by {window}"))
                && reason.contains(&format!("{most} is the most"))
                && reason.contains("zstd -19 or xz -9"),
            "{reason}"
        );
    }
    let large = xz(b"\x1c\0\0\0\x10\xcf\x58\xcc");
    assert_eq!(contents(&large, None, false).expect("64 MiB").ios.len(), 1);
}

#[test]
fn lines_are_read_alike_wherever_they_end_and_whatever_ends_them() {
    // The window of the reader ends anywhere in these; columns are behind the last one that counts or not.
    for (end, extra) in [("\n", ""), ("\r\n", ""), ("\n", ",7,\"x\""), ("\r\n", ",7")] {
        let line = |i: u64| {
            format!(
                "{},{},{},4096,{}{extra}{end}",
                i % 7,
                ["R", "w"][i as usize % 2],
                i * 4096,
                1000 * i
            )
        };
        let lines: String = (0..20_000).map(line).collect();
        for text in [lines.as_str(), lines.trim_end()] {
            let trace = contents(text.as_bytes(), Some("alibaba"), false).expect("sound");
            assert_eq!(trace.ios.len(), 20_000);
            assert_eq!(trace.devices, ["0", "1", "2", "3", "4", "5", "6"]);
            let is_right =
                |(io, i): (&TraceIo, u64)| io.sector == 8 * i && io.time_ns == 1_000_000 * i;
            assert!(trace.ios.iter().zip(0..).all(is_right));
            assert_eq!(trace.count(TraceOp::Write), 10_000);
        }
    }
    // The device, which comes last, is the same with either end.
    let tencent = text(
        "1538323200,0,8,0,12\r\n1538323200,0,8,1,12\n",
        Some("tencent"),
    );
    assert_eq!(tencent.devices, ["12"]);
    let short = fault("0,R,0,512,1\n0,R,0\n0,R,0,512,2\n", Some("alibaba"));
    assert!(
        short.contains("line 2: too few columns: \"0,R,0\""),
        "{short}"
    );
}

#[test]
fn what_is_no_trace_is_refused_with_a_reason() {
    let mut archive = vec![b'x'; 300];
    archive[257..262].copy_from_slice(b"ustar");
    for (bytes, reason) in [
        (&b"hello\n"[..], "is no trace that is recognised"),
        (b"", "is empty"),
        (&archive, "is an archive: unpack it first"),
    ] {
        let error = contents(bytes, None, false)
            .expect_err("no trace")
            .to_string();
        assert!(error.contains(reason), "{error}");
    }
    let error = read_all(&[recorded("no/such/file")], None, false)
        .expect_err("no file")
        .to_string();
    assert!(error.contains("no/such"), "{error}");
}

#[test]
fn lenient_reading_counts_and_goes_on() {
    let mut bytes = trace(&[Rec::new(0, Q), Rec::new(1, Q)]);
    bytes.extend([0xee; 1000]);
    bytes.extend(trace(&[Rec::new(2, Q), Rec::new(3, Q)]));
    let error = contents(&bytes, None, false)
        .expect_err("nonsense")
        .to_string();
    assert!(
        error.contains("record at byte 96: no record of a blktrace"),
        "{error}"
    );
    let lenient = contents(&bytes, None, true).expect("lenient");
    assert_eq!((lenient.ios.len(), lenient.notes.malformed), (4, 1));
    let long = [vec![b'x'; 200_000], b"\n0,R,0,512,7\n".to_vec()].concat();
    assert!(
        contents(&long, Some("alibaba"), false)
            .expect_err("long")
            .to_string()
            .contains("line 1: it is longer")
    );
    assert_eq!(
        contents(&long, Some("alibaba"), true)
            .expect("lenient")
            .ios
            .len(),
        1
    );
}
