//! Traces played on real threads: whatever the order in which threads come, the pool ends as it has to.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use thintools::io::RamEngine;
use thintools::observer::{Observer, Silent};
use thintools::pdata::txn::LockScheme;
use thintools::pool::{AllocationOrder, Settings};
use thintools::replay::{
    Clock, PlayOptions, Player, Report, SnapshotSchedule, TraceNotes, open, play_on_threads,
};
use thintools::thin::PoolMetadata;
use thintools::tools::check::{CheckOptions, check};

use crate::replay::{ORACLE, PHASES, Sets, file, options, sets, sets_of_dump};
use crate::support::{testdata, thintools};

/// Metadata blocks in use that may be more or fewer than the kernel's: the order of inserts, which is chance, decides where nodes
/// split.
const TOLERANCE: u64 = 3;

struct Played {
    report: Report,
    found: Vec<Sets>,
    is_complete: bool,
}

/// Plays what was recorded of the kernel's pool, or another trace, on threads; the metadata is sound afterwards.
fn played(
    trace: &Path,
    options: PlayOptions,
    schedule: Option<SnapshotSchedule>,
    observer: &dyn Observer,
) -> Played {
    let (_, mut reader) = open(&[trace.to_path_buf()], None, false).expect("a trace");
    let engine = Arc::new(RamEngine::new(4096));
    let mut metadata = PoolMetadata::format(Arc::clone(&engine) as _, 128, 16 << 20).expect("room");
    metadata.resize_data(options.data_blocks).expect("room");
    metadata.commit().expect("memory");
    let mut player = Player::new(metadata, options.clone()).expect("started");
    player.make_mapped_devices().expect("made");
    let mut found: Vec<Sets> = Vec::new();
    let mut at_control = |player: &Player| {
        if player.marks().len() > found.len() {
            found.push(player.pool().inspect(sets));
        }
        Ok(())
    };
    let is_complete = play_on_threads(
        &mut player,
        &mut *reader,
        Vec::new(),
        schedule,
        &mut at_control,
        observer,
    )
    .expect("played");
    let notes: &TraceNotes = reader.notes();
    let report = Report::new(&player, &options, notes, is_complete).expect("a report");
    drop(player);
    let checked = check(&*engine, &CheckOptions::default(), &Silent).expect("memory");
    assert!(checked.report.damages.is_empty(), "{:?}", checked.report);
    Played {
        report,
        found,
        is_complete,
    }
}

/// Every bio ended, and each once.
fn assert_all_ended(report: &Report, case: &str) {
    let map = &report.map;
    let told = map.remapped + map.zero + map.failed + map.deferred.total();
    assert_eq!(map.bios, told, "{case}");
    assert_eq!(map.bios, report.work.completed, "{case}");
}

/// A status line of a pool, and the metadata blocks in use that were in it.
fn without_metadata(line: &str) -> (String, u64) {
    let mut words: Vec<&str> = line.split_ascii_whitespace().collect();
    let used = words.remove(4);
    let used = used.split('/').next().and_then(|n| n.parse().ok());
    (words.join(" "), used.expect("a number"))
}

fn plays_as_the_kernel(scheme: LockScheme, cpus: usize) {
    let case = format!("{scheme}, {cpus} threads");
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let options = PlayOptions {
        cpus,
        ..options(scheme)
    };
    let Played { report, found, .. } = played(&trace, options, None, &Silent);
    assert_eq!(report.marks.len(), PHASES.len(), "{case}");
    for ((mark, phase), found) in report.marks.iter().zip(PHASES).zip(&found) {
        let case = format!("{case}, {phase}");
        let expected = String::from_utf8(file(&format!("status-{phase}.txt"))).expect("text");
        let mut lines = expected.lines();
        let (pool, used) = without_metadata(&mark.pool);
        let (expected, kernels) = without_metadata(lines.next().expect("a line"));
        assert_eq!(pool, expected, "{case}");
        assert!(
            used.abs_diff(kernels) <= TOLERANCE,
            "{case}: {used}, not {kernels}"
        );
        let thin = mark.thins.values().next().map(String::as_str);
        assert_eq!(thin, lines.next(), "{case}");
        let expected = sets_of_dump(phase);
        assert!(*found == expected, "{case}: other mappings");
    }
    assert_eq!(report.setup.clock, Clock::Threads);
    assert_eq!(
        (report.input.requests, report.input.map_calls),
        (6677, 7411),
        "{case}"
    );
    assert_eq!(report.work.copies, 871, "{case}");
    assert_eq!(report.work.zeroed + report.work.overwritten, 2515, "{case}");
    assert_all_ended(&report, &case);
}

#[test]
fn on_threads_a_recorded_pool_ends_where_the_kernel_ended_in_every_scheme() {
    for scheme in LockScheme::ALL {
        plays_as_the_kernel(scheme, 2);
    }
    plays_as_the_kernel(LockScheme::Optimistic, 5);
    plays_as_the_kernel(LockScheme::Kernel, 1);
}

/// Wishes to stop after some questions.
struct Impatient(AtomicU32);

impl Observer for Impatient {
    fn is_cancelled(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed) >= 1
    }
}

#[test]
fn on_threads_writes_that_wait_for_space_hold_nobody_up() {
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let few = PlayOptions {
        data_blocks: 300,
        cpus: 3,
        ..options(LockScheme::Kernel)
    };
    let few = PlayOptions {
        settings: Settings {
            no_space_timeout: Some(std::time::Duration::from_millis(50)),
            ..few.settings.clone()
        },
        ..few
    };
    let Played { report, .. } = played(&trace, few, None, &Silent);
    assert!(report.forecast.moments.out_of_space_ns.is_some());
    assert!(report.work.no_space > 0, "{:?}", report.work);
    assert_eq!(report.input.requests, 6677);
}

#[test]
fn on_threads_scheduled_snapshots_are_taken_and_deleted() {
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let schedule = SnapshotSchedule {
        every: std::time::Duration::from_secs(3),
        keep: 2,
    };
    let Played { report, .. } = played(&trace, options(LockScheme::A), Some(schedule), &Silent);
    // One each 3 s while there are requests, and one that the trace takes: as in virtual time.
    assert_eq!(report.input.snapshots, 7);
    assert_eq!(report.input.deletions, 5);
    assert_all_ended(&report, "snapshots");
}

#[test]
fn on_threads_who_wishes_to_stop_gets_a_report_of_how_far_it_came() {
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let impatient = Impatient(AtomicU32::new(0));
    let all = played(&trace, options(LockScheme::Kernel), None, &impatient);
    assert!(!all.is_complete && !all.report.is_complete);
    assert!(all.report.to_string().starts_with("INCOMPLETE"));
    assert_all_ended(&all.report, "stopped");
}

#[test]
fn cells_taken_one_by_one_are_waited_for_in_a_cycle_if_they_are_few() {
    let trace = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let few = |cells| {
        let options = options(LockScheme::V2013);
        PlayOptions {
            settings: Settings {
                cells,
                allocation_order: AllocationOrder::OneByOne,
                ..options.settings.clone()
            },
            ..options
        }
    };
    for cells in [2, 1024] {
        let case = format!("{cells} cells");
        let Played { report, found, .. } = played(&trace, few(cells), None, &Silent);
        assert_all_ended(&report, &case);
        assert!(
            found[4] == sets_of_dump(PHASES[4]),
            "{case}: other mappings"
        );
        if cells == 1024 {
            assert_eq!(report.work.deadlocks, 0, "{case}");
        }
    }
}

#[test]
fn one_table_compares_schemes_and_pools_of_cells() {
    let oracle = testdata().join(ORACLE).join("thin.blktrace.0.zst");
    let run = |args: &[&str]| {
        let mut all: Vec<&OsStr> = vec!["thin_replay".as_ref(), "-q".as_ref()];
        all.extend(args.iter().map(OsStr::new));
        all.push(oracle.as_ref());
        thintools(all).run()
    };
    let all = "2013,kernel,a,b,optimistic";
    for clock in ["virtual", "threads"] {
        let out = run(&["--clock", clock, "--locks", all]).expect(0).out();
        for row in [
            "locks  ",
            "prison: acquisitions",
            "read-modify-writes a bio",
            "that waited for lookups",
        ] {
            let line = out.lines().rfind(|line| line.trim_start().starts_with(row));
            let columns = line
                .unwrap_or("")
                .split("  ")
                .filter(|c| !c.trim().is_empty())
                .count();
            assert_eq!(columns, 6, "{clock}, {row}: {out}");
        }
        assert_eq!(
            out.contains("requests a second"),
            clock == "threads",
            "{out}"
        );
    }
    let pools = ["--cell-pool", "2,4,1024"];
    let first = run(&pools).expect(0).out();
    assert_eq!(first, run(&pools).expect(0).out());
    assert!(first.contains("taken one by one: "), "{first}");
    assert!(
        first.contains("reserved before an operation starts: no cycles"),
        "{first}"
    );
    run(&["--cell-pool", "1"])
        .expect(2)
        .expect_stderr(&["2..=1048576"]);
    run(&["--clock", "wall"])
        .expect(2)
        .expect_stderr(&["virtual and threads are"]);
}
