//! What locking schemes, or pools of cells, made of the same trace: one table.

use super::text::{per, seconds};
use super::{Clock, Report};
use crate::pool::{LockCounts, Reason};
use std::fmt::Write;

/// The locks of one class that a report is about.
fn classes(report: &Report) -> [(&'static str, LockCounts); 4] {
    let all = &report.locks;
    let root = LockCounts {
        acquisitions: all.root_acquisitions,
        contended: all.root_contended,
        wait_ns: all.root_wait_ns,
    };
    let block = LockCounts {
        acquisitions: all.acquisitions.saturating_sub(root.acquisitions),
        contended: all.contended.saturating_sub(root.contended),
        wait_ns: all.wait_ns.saturating_sub(root.wait_ns),
    };
    let others = &report.contention;
    [
        ("root", root),
        ("block", block),
        ("prison", others.prison),
        ("deferred sets", others.deferred_sets),
    ]
}

impl Report {
    /// Atomic read-modify-write operations for each bio: those of the lookups, two for each lock of the prison and of the deferred
    /// sets, the worker's among them, and two for the ticket of each bio that was issued at once.
    pub fn rmws_per_bio(&self) -> f64 {
        let others = &self.contention;
        let taken = others
            .prison
            .acquisitions
            .saturating_add(others.deferred_sets.acquisitions);
        let all = self
            .locks
            .atomic_rmws
            .saturating_add(taken.saturating_add(self.map.remapped).saturating_mul(2));
        per(all, self.map.bios)
    }

    /// What each class of locks cost, a line each.
    pub(super) fn lines_of_locks(&self) -> Vec<String> {
        let clock = self.setup.clock;
        let mut lines: Vec<String> = classes(self)
            .into_iter()
            .map(|(class, n)| {
                format!(
                    "{class}: {} acquisitions, {} contended, waited {} [{clock}]",
                    n.acquisitions,
                    n.contended,
                    seconds(n.wait_ns)
                )
            })
            .collect();
        lines.push(format!(
            "{:.1} read-modify-writes a bio; {} commits waited for lookups, {} [{clock}]",
            self.rmws_per_bio(),
            self.contention.commit_stalls,
            seconds(self.contention.commit_stall_ns)
        ));
        lines
    }
}

/// Requests of a second of this machine's time; none in virtual time.
fn rate(report: &Report) -> Option<f64> {
    let is_real = report.setup.clock == Clock::Threads;
    is_real.then(|| report.input.requests as f64 * 1e9 / report.trace_ns.max(1) as f64)
}

/// A table with a column for each report.
pub fn schemes(reports: &[Report]) -> String {
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    let mut row = |name: &str, of: &dyn Fn(&Report) -> String| {
        rows.push((name.into(), reports.iter().map(of).collect()));
    };
    row("locks", &|r| match r.setup.cell_pool {
        Some(cells) => format!("{}, {cells} cells", r.setup.locks),
        None => r.setup.locks.clone(),
    });
    row("clock", &|r| r.setup.clock.to_string());
    row("bios", &|r| r.map.bios.to_string());
    row("deferred", &|r| r.map.deferred.total().to_string());
    for reason in Reason::ALL {
        if reports.iter().any(|r| r.map.deferred.of(reason) > 0) {
            let name = format!("  {reason}");
            row(&name, &|r| r.map.deferred.of(reason).to_string());
        }
    }
    row("would block: root", &|r| {
        r.locks.would_block_root.to_string()
    });
    row("             block", &|r| {
        r.locks.would_block_block.to_string()
    });
    row("             cache", &|r| {
        r.locks.would_block_cache.to_string()
    });
    for at in 0..4 {
        let name = reports.first().map_or("", |r| classes(r)[at].0);
        row(&format!("{name}: acquisitions"), &|r| {
            classes(r)[at].1.acquisitions.to_string()
        });
        row("  contended", &|r| classes(r)[at].1.contended.to_string());
        row("  waited", &|r| seconds(classes(r)[at].1.wait_ns));
    }
    row("read-modify-writes a bio", &|r| {
        format!("{:.1}", r.rmws_per_bio())
    });
    row("commits", &|r| r.worker.commits.total().to_string());
    row("  that waited for lookups", &|r| {
        r.contention.commit_stalls.to_string()
    });
    row("  waited", &|r| seconds(r.contention.commit_stall_ns));
    if reports.iter().any(|r| rate(r).is_some()) {
        row("requests a second", &|r| {
            rate(r).map_or("-".into(), |rate| format!("{rate:.0}"))
        });
    }
    let widths: Vec<usize> = (0..reports.len())
        .map(|at| {
            rows.iter()
                .map(|(_, cells)| cells[at].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::from("\n");
    for (name, cells) in &rows {
        let mut line = format!("{name:<26}");
        for (cell, width) in cells.iter().zip(&widths) {
            // A string takes whatever is written to it.
            let _ = write!(line, "  {cell:>width$}");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    if reports.iter().any(|r| r.setup.clock == Clock::Virtual) {
        text.push_str(
            "One thread plays the trace in virtual time: commits alone hold locks against lookups there; --clock threads shows who else does.\n",
        );
    }
    text
}

/// What pools of cells that are taken one by one come to, and the order that reserves them, if it was played too.
pub fn cell_pools(reports: &[Report]) -> String {
    let mut text = String::from("\ncells       wait-for cycles\n");
    for report in reports {
        let name = match report.setup.cell_pool {
            Some(cells) => cells.to_string(),
            None => "reserved".into(),
        };
        let _ = writeln!(text, "{name:<11} {:>15}", report.work.deadlocks);
    }
    text
}

/// From how many cells on none is waited for in a cycle, of several numbers.
pub(super) fn cells<'a>(reports: impl Iterator<Item = &'a Report> + Clone) -> Option<String> {
    let mut pools: Vec<(u64, u64)> = (reports.clone())
        .filter_map(|report| Some((report.setup.cell_pool?, report.work.deadlocks)))
        .collect();
    pools.sort_unstable();
    if pools.first()?.0 == pools.last()?.0 {
        return None;
    }
    let free = (pools.iter().rev()).take_while(|(_, deadlocks)| *deadlocks == 0);
    let mut text = match free.last() {
        Some((cells, _)) => format!(
            "cells taken one by one: from {cells} on no cell of these pools was waited for in a cycle"
        ),
        None => {
            "cells taken one by one: in every one of these pools somebody waited in a cycle".into()
        }
    };
    if let Some(reserved) = reports.clone().find(|r| r.setup.cell_pool.is_none()) {
        let cycles = match reserved.work.deadlocks {
            0 => "no".into(),
            n => n.to_string(),
        };
        text.push_str(&format!(
            "; reserved before an operation starts: {cycles} cycles"
        ));
    }
    if reports.clone().any(|r| r.setup.clock == Clock::Threads) {
        text.push_str("; another run may find other cycles");
    }
    Some(text)
}
