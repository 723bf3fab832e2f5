//! The answers to what a replay is made for, a sentence each.

use super::text::{bytes, per, percent, seconds};
use super::{Clock, Fill, NoForecast, Report};
use crate::pool::Reason;
use crate::replay::latencies::{Latencies, MAPPED, is_fast};
use crate::replay::verify::Verified;
use serde::Serialize;
use std::fmt;

/// What a verdict is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Topic {
    /// When the data is full.
    Data,
    /// When the metadata is.
    Metadata,
    /// Which block size would be best.
    BlockSize,
    /// What snapshots cost.
    Snapshots,
    /// What discards give back.
    Discards,
    /// What zeroing costs, and all else that is written beside.
    Writes,
    /// What leaves the fast path, and why.
    FastPath,
    /// What locks cost.
    Locks,
    /// What the metadata's cache has to hold.
    Cache,
    /// What commits cost.
    Commits,
    /// Whether cells ran out.
    Cells,
    /// What failed or was left out.
    Failures,
    /// Whether the metadata is sound.
    Check,
    /// Whether reads found what was written.
    Verify,
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Data => "data",
            Self::Metadata => "metadata",
            Self::BlockSize => "block size",
            Self::Snapshots => "snapshots",
            Self::Discards => "discards",
            Self::Writes => "writes",
            Self::FastPath => "fast path",
            Self::Locks => "locks",
            Self::Cache => "cache",
            Self::Commits => "commits",
            Self::Cells => "cells",
            Self::Failures => "failures",
            Self::Check => "check",
            Self::Verify => "verify",
        })
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// What it is about.
    pub topic: Topic,
    /// Whose time its numbers are of.
    pub clock: Clock,
    /// A sentence.
    pub text: String,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<11}{} [{}]", self.topic, self.text, self.clock)
    }
}

impl Report {
    /// Bytes that requests wrote, and that were acknowledged.
    fn bytes_written(&self) -> u64 {
        let asked = self.input.bytes_written;
        asked.saturating_sub(self.work.bytes_not_written)
    }

    /// Comes to verdicts anew.
    pub(super) fn judge(&mut self) {
        let clock = self.setup.clock;
        let said = [
            (Topic::Data, Some(self.on_data())),
            (Topic::Metadata, Some(self.on_metadata())),
            (Topic::Snapshots, Some(self.on_snapshots())),
            (Topic::Discards, Some(self.on_discards())),
            (Topic::Writes, Some(self.on_writes())),
            (Topic::FastPath, Some(self.on_fast_path())),
            (Topic::Locks, Some(self.on_locks())),
            (Topic::Cache, Some(self.on_cache())),
            (Topic::Commits, Some(self.on_commits())),
            (Topic::Cells, self.on_cells()),
            (Topic::Failures, self.on_failures()),
            (Topic::Check, self.on_check()),
            (Topic::Verify, self.on_verify()),
        ];
        self.verdicts = said
            .into_iter()
            .filter_map(|(topic, text)| {
                Some(Verdict {
                    topic,
                    clock,
                    text: text?,
                })
            })
            .collect();
    }

    fn on_data(&self) -> String {
        let fill = &self.forecast.data;
        let size = self.block_bytes();
        let mut text = format!(
            "{} of {} are in use in blocks of {}, {}; {}",
            bytes(fill.used.saturating_mul(size)),
            bytes(fill.total.saturating_mul(size)),
            bytes(size),
            percent(fill.used, fill.total),
            self.when_full(fill)
        );
        if let Some(first) = &self.first_full {
            text.push_str(&format!(", which is {first}"));
        }
        let moments = self.forecast.moments;
        if let Some(low) = moments.low_water_ns {
            text.push_str(&format!(
                "; down to the low-water mark after {}",
                self.moment(low)
            ));
        }
        if let Some(out) = moments.out_of_space_ns {
            text.push_str(&format!("; out of space after {}", self.moment(out)));
        }
        text
    }

    fn on_metadata(&self) -> String {
        let fill = &self.forecast.metadata;
        format!(
            "{} of {} blocks of 4 KiB are in use, {}, and {} more are kept back for commits; {}",
            self.space.allocated_metadata_blocks,
            fill.total,
            percent(self.space.allocated_metadata_blocks, fill.total),
            fill.used
                .saturating_sub(self.space.allocated_metadata_blocks),
            self.when_full(fill)
        )
    }

    /// A time since the start, and what is to be known of it.
    pub(super) fn moment(&self, nanos: u64) -> String {
        match self.forecast.none_because {
            Some(NoForecast::NoTimes) => format!("{} of the modelled device", seconds(nanos)),
            _ => seconds(nanos),
        }
    }

    /// When it is full, if it goes on as it did.
    fn when_full(&self, fill: &Fill) -> String {
        let whose = match self.space.pools {
            0 | 1 => "",
            _ => "the first of the pools ",
        };
        if let Some(at) = fill.full_at_ns {
            return format!("{whose}full after {}", self.moment(at));
        }
        if let Some(why) = self.forecast.none_because {
            return format!("no forecast: {why}");
        }
        let rates = [
            (fill.linear_ns, "the rate of the whole replay"),
            (fill.last_ns, "that of its last quarter"),
            (fill.worst_ns, "that of its steepest tenth"),
        ];
        let at = |(time, rate): (Option<u64>, &str)| Some(format!("{} at {rate}", seconds(time?)));
        let times: Vec<String> = rates.into_iter().filter_map(at).collect();
        match times.is_empty() {
            true => "no fill in sight".into(),
            false => format!("{whose}full after another {}", times.join(", ")),
        }
    }

    fn on_snapshots(&self) -> String {
        let (input, work) = (&self.input, &self.work);
        if input.snapshots == 0 && work.copies == 0 {
            return "none were taken, and nothing was shared".into();
        }
        let held = self
            .space
            .used_data_blocks
            .saturating_sub(self.space.mapped_blocks);
        format!(
            "{} taken, {} devices deleted; {} blocks copied because a snapshot had them ({}{}); {} are in use at the end beyond what the \
             trace's devices map; metadata in use changed by {} blocks in all",
            input.snapshots,
            input.deletions,
            work.copies,
            bytes(work.copies.saturating_mul(self.block_bytes())),
            ratio(
                work.copies.saturating_mul(self.block_bytes()),
                self.bytes_written(),
                "for each byte asked for"
            ),
            bytes(held.saturating_mul(self.block_bytes())),
            signed(self.metadata.grown_blocks)
        )
    }

    fn on_discards(&self) -> String {
        let (input, worker) = (&self.input, &self.worker);
        if input.discards == 0 {
            return "the trace contains no discards: nothing is ever given back".into();
        }
        let size = self.block_bytes();
        let kept = worker.unmapped.saturating_sub(worker.freed);
        let mut text = format!(
            "{} asked for {}, of which {} is no whole block ({} had such edges); {} mapped blocks were unmapped, which freed {} ({}); {} \
             were not freed then because a snapshot had them; {} went on to the data device",
            input.discards,
            bytes(input.bytes_discarded),
            bytes(input.bytes_partly_discarded),
            input.partial_discards,
            worker.unmapped,
            worker.freed,
            bytes(worker.freed.saturating_mul(size)),
            kept,
            bytes(self.work.bytes_passed_down)
        );
        if worker.left_mapped > 0 {
            text.push_str(&format!(
                "; {} were left alone because they were in use at that moment",
                worker.left_mapped
            ));
        }
        if input.bytes_discards_left_out > 0 {
            text.push_str(&format!(
                "; {} of what was asked for were left out: to no thin device of this pool, or past its end",
                bytes(input.bytes_discards_left_out)
            ));
        }
        text
    }

    fn on_writes(&self) -> String {
        let work = &self.work;
        let asked = self.bytes_written();
        let metadata = self.metadata.blocks_written.saturating_mul(4096);
        let beside = [work.bytes_zeroed, work.bytes_copied, metadata];
        let all = beside.iter().fold(asked, |sum, &n| sum.saturating_add(n));
        let of = match self.work.bytes_not_written {
            0 => "asked for".into(),
            left => format!(
                "written of {} asked for, of which {} failed, waited to the end or were left out,",
                bytes(self.input.bytes_written),
                bytes(left)
            ),
        };
        format!(
            "{} {of} became {}{}: {} of zeros for {} new blocks ({} more were filled by one write), {} of copies, {} of \
             metadata",
            bytes(asked),
            bytes(all),
            ratio(all, asked, "times as much"),
            bytes(work.bytes_zeroed),
            work.zeroed,
            work.overwritten,
            bytes(work.bytes_copied),
            bytes(metadata)
        )
    }

    fn on_fast_path(&self) -> String {
        let deferred = &self.map.deferred;
        // Discards are cut up into any number of bios, which all leave it: they say nothing of reads and writes.
        let discards = deferred.of(Reason::Discard);
        let left = deferred.total().saturating_sub(discards);
        let bios = self.map.bios.saturating_sub(discards);
        let mut reasons: Vec<(u64, Reason)> = Reason::ALL
            .into_iter()
            .map(|reason| (deferred.of(reason), reason))
            .filter(|&(n, reason)| n > 0 && reason != Reason::Discard)
            .collect();
        reasons.sort_by_key(|&(n, _)| std::cmp::Reverse(n));
        let reasons: Vec<String> = reasons
            .iter()
            .map(|&(n, reason)| format!("{} {n}", words(reason)))
            .collect();
        let mut text = format!("{left} of {bios} bios left it, {}", percent(left, bios));
        if !reasons.is_empty() {
            text.push_str(&format!(": {}", reasons.join(", ")));
        }
        if discards > 0 {
            text.push_str(&format!("; beside them all {discards} bios of discards"));
        }
        let of_locks = deferred
            .of(Reason::RootBusy)
            .saturating_add(deferred.of(Reason::BlockBusy));
        text.push_str(&format!("; because of a lock {of_locks}"));
        let mut slow = Latencies::default();
        for (_, latencies) in self.latency.iter().filter(|(class, _)| !is_fast(class)) {
            slow.add(latencies);
        }
        if let Some(fast) = self.latency.get(MAPPED)
            && !slow.is_empty()
        {
            text.push_str(&format!(
                "; half of the mapped requests took {} or less, of the others {}, and 99 in 100 {} and {}",
                seconds(fast.percentile(50.0)),
                seconds(slow.percentile(50.0)),
                seconds(fast.percentile(99.0)),
                seconds(slow.percentile(99.0))
            ));
        }
        text
    }

    fn on_locks(&self) -> String {
        let locks = &self.locks;
        let gave_up = locks
            .would_block_root
            .saturating_add(locks.would_block_block)
            .max(self.map.deferred.0[Reason::RootBusy as usize]);
        let waited = match self.setup.clock {
            Clock::Virtual => format!(
                "; {} slept until a commit was over, {} in all",
                self.work.root_waits,
                seconds(self.work.root_wait_ns)
            ),
            Clock::Threads => format!(
                "; {} had to be waited for, {} in all",
                locks.contended,
                seconds(locks.wait_ns)
            ),
        };
        format!(
            "{}: {:.1} acquisitions and {:.1} atomic read-modify-writes a lookup, {gave_up} of {} lookups gave up{waited}",
            self.setup.locks,
            per(locks.acquisitions, locks.lookups),
            per(locks.atomic_rmws, locks.lookups),
            locks.lookups
        )
    }

    fn on_cache(&self) -> String {
        let metadata = &self.metadata;
        format!(
            "{} lookups missed it; {} of metadata is in use, and {} of {} blocks of cache hold some",
            self.locks.would_block_cache,
            bytes(self.space.allocated_metadata_blocks.saturating_mul(4096)),
            metadata.cached_blocks,
            metadata.cache_blocks
        )
    }

    fn on_commits(&self) -> String {
        let commits = &self.worker.commits;
        let total = commits.total();
        let causes = [
            (commits.flush, "for flushes"),
            (commits.space, "for space"),
            (commits.message, "for messages and marks"),
            (commits.discard, "for discards"),
            (commits.suspend, "to suspend"),
            (commits.period, "because a second was over"),
        ];
        let causes: Vec<String> = causes
            .into_iter()
            .filter(|&(n, _)| n > 0)
            .map(|(n, why)| format!("{n} {why}"))
            .collect();
        let why = match causes.is_empty() {
            true => String::new(),
            false => format!(" ({})", causes.join(", ")),
        };
        let flushes = match commits.flush {
            0 => String::new(),
            n => format!(
                "; {:.1} flushes and durable writes to one that is for them",
                per(self.worker.flushes_committed, n)
            ),
        };
        format!(
            "{total}{why}{flushes}; {:.1} metadata blocks written by each",
            per(self.metadata.blocks_written, total)
        )
    }

    fn on_cells(&self) -> Option<String> {
        let deadlocks = self.work.deadlocks;
        match self.setup.cell_pool {
            Some(cells) if deadlocks == 0 => Some(format!(
                "taken one by one of {cells}, none was waited for in a cycle"
            )),
            _ if deadlocks > 0 => Some(format!(
                "{deadlocks} deadlocks: every cell was held by somebody who waited for another one"
            )),
            _ => None,
        }
    }

    pub(super) fn on_failures(&self) -> Option<String> {
        let (work, input) = (&self.work, &self.input);
        let moments = self.forecast.moments;
        let why = match (moments.metadata_full_ns, moments.metadata_failed_ns) {
            (Some(at), _) => format!(
                "bios failed for another reason: the metadata device was full after {}",
                self.moment(at)
            ),
            (None, Some(at)) => format!(
                "bios failed for another reason: the metadata failed after {}",
                self.moment(at)
            ),
            (None, None) => "bios failed for other reasons".into(),
        };
        let known = work.no_space.saturating_add(work.unsupported);
        let counts = [
            (
                work.waiting_for_space,
                "bios still wait for space at the end",
            ),
            (
                work.waiting_for_resume,
                "bios still wait for the pool's resumption at the end",
            ),
            (work.waiting, "bios have not ended at the end"),
            (work.no_space, "bios failed for want of space"),
            (
                work.unsupported,
                "discards failed because the pool ignores them",
            ),
            (work.failed.saturating_sub(known), &*why),
            (
                input.out_of_range,
                "requests were left out: to no thin device of this pool, or past its end",
            ),
            (input.refused_controls, "control events were refused"),
            (input.unknown_controls, "control events are not known"),
            (self.trace.lost, "records were lost by the recorder"),
        ];
        let said: Vec<String> = counts
            .into_iter()
            .filter(|&(n, _)| n > 0)
            .map(|(n, what)| format!("{n} {what}"))
            .collect();
        (!said.is_empty()).then(|| said.join("; "))
    }

    pub(super) fn on_verify(&self) -> Option<String> {
        let verified = self.verify.as_ref()?;
        let Verified {
            one_of,
            reads,
            blocks,
            wrong,
            ..
        } = verified;
        let mut text = match wrong {
            0 => format!("{reads} reads, and {blocks} blocks as a whole, held what was written"),
            _ => format!(
                "{wrong} of {reads} reads, and of {blocks} blocks as a whole, held something else than what was written, which is a defect"
            ),
        };
        if *one_of > 1 {
            text.push_str(&format!("; one virtual block of {one_of} was looked at"));
        }
        if verified.is_cut_short {
            text.push_str("; nothing was looked at from when the metadata failed");
        }
        Some(text)
    }

    fn on_check(&self) -> Option<String> {
        self.is_checked.then(|| {
            format!(
                "the metadata is sound after {} requests",
                self.input.requests
            )
        })
    }
}

/// A reason in words.
pub(super) fn words(reason: Reason) -> &'static str {
    match reason {
        Reason::Flush => "flush",
        Reason::Fua => "durable write",
        Reason::Discard => "discard",
        Reason::Unprovisioned => "unprovisioned block",
        Reason::Shared => "shared block",
        Reason::CellHeld => "block being worked on",
        Reason::NoCells => "no cell left",
        Reason::RootBusy => "root locked",
        Reason::BlockBusy => "metadata block locked",
        Reason::CacheMiss => "metadata not in the cache",
        Reason::Suspended => "snapshot or suspension under way",
    }
}

/// How many times as much, in these words; nothing if that cannot be said.
fn ratio(n: u64, of: u64, words: &str) -> String {
    match of {
        0 => String::new(),
        of => format!(", {:.2} {words}", n as f64 / of as f64),
    }
}

fn signed(n: i64) -> String {
    format!("{n:+}")
}
