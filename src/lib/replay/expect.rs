//! What the kernel had at a mark, held against what the replay has: status lines word by word, and mappings.
//!
//! Two runs of the same I/O need not agree on everything. What is compared here is what does not depend on the order in which requests
//! that were under way at once were looked at: which virtual blocks are mapped, and which of them another device has, too. The data
//! blocks that were allocated do depend on it, and so, by a few, do the metadata blocks in use, since that order decides where nodes
//! split.

use super::books::Mark;
use crate::error::Result;
use crate::thin::PoolMetadata;
use crate::units::{ThinBlock, ThinId};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// By how many metadata blocks in use two runs of the same I/O may differ, unless told otherwise.
pub const METADATA_TOLERANCE: u64 = 4;

/// Something that is not as it was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// `pool`, the trace's name of a device, or `thin device ID`.
    pub device: String,
    /// What differs, in words: `mode`, `blocks 7..9`.
    pub what: String,
    /// What the kernel had.
    pub expected: String,
    /// What the replay has.
    pub found: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {}: {} was expected, {} found",
            self.device, self.what, self.expected, self.found
        )
    }
}

/// What came of comparing.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Compared {
    /// Status files and dumps.
    pub files: u64,
    /// Differences.
    pub differences: u64,
    /// The first of them, a sentence each.
    pub first: Vec<String>,
}

/// Differences that are told one by one.
const MOST_TOLD: usize = 100;

impl Compared {
    /// Both together.
    pub(super) fn with(mut self, other: Self) -> Self {
        self.files = self.files.saturating_add(other.files);
        self.differences = self.differences.saturating_add(other.differences);
        self.first.extend(other.first);
        self.first.truncate(MOST_TOLD);
        self
    }

    /// Adds what a file that was compared at a mark differs in.
    pub fn add(&mut self, mark: &str, differences: Vec<Difference>) {
        self.files += 1;
        self.differences += differences.len() as u64;
        let room = MOST_TOLD.saturating_sub(self.first.len());
        let told = differences.iter().take(room);
        self.first
            .extend(told.map(|difference| format!("{mark}: {difference}")));
    }
}

/// As the report has it.
impl Compared {
    /// What came of it, in a few words.
    pub(super) fn outcome(&self) -> String {
        match (self.differences, self.first.first()) {
            (0, _) => format!("{} files expected, no difference", self.files),
            (n, None) => format!("{} files expected, DIFFERENCES: {n}", self.files),
            (n, Some(first)) => format!(
                "{} files expected, DIFFERENCES: {n}, the first: {first}",
                self.files
            ),
        }
    }
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.differences {
            0 => writeln!(f, "expect    {} files, no difference", self.files)?,
            n => writeln!(f, "expect    {} files, DIFFERENCES: {n}", self.files)?,
        }
        for difference in &self.first {
            writeln!(f, "differs   {difference}")?;
        }
        match self.differences - self.first.len() as u64 {
            0 => Ok(()),
            more => writeln!(f, "differs   and {more} more"),
        }
    }
}

/// The words of a pool's status, in order.
const POOL_WORDS: [&str; 9] = [
    "transaction id",
    "metadata blocks in use",
    "data blocks in use",
    "metadata snapshot",
    "mode",
    "discards",
    "what happens without space",
    "needs_check",
    "metadata low-water mark",
];

/// The words of a thin device's status, in order.
const THIN_WORDS: [&str; 2] = ["mapped sectors", "highest mapped sector"];

/// A line of `dmsetup status`, perhaps with the device's name in front.
struct StatusLine<'a> {
    name: Option<&'a str>,
    length: &'a str,
    target: &'a str,
    words: Vec<&'a str>,
}

impl<'a> StatusLine<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace().peekable();
        let name = words
            .next_if(|word| word.ends_with(':'))
            .map(|word| &word[..word.len() - 1]);
        let _start = words.next()?.parse::<u64>().ok()?;
        Some(Self {
            name,
            length: words.next()?,
            target: words.next()?,
            words: words.collect(),
        })
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.length, &self.words) == (other.length, &other.words)
    }
}

/// Compares what `dmsetup status` printed of a pool and its thin devices with the lines of a mark. Lines of other targets are left
/// out, and so are thin devices that `expected` does not mention. Words that an older kernel does not have are not compared.
///
/// A thin device goes by the name in front of its line, if the trace knows it by that; else by what the line says. None if no line is
/// of a pool or a thin device.
pub fn compare_status(
    mark: &Mark,
    expected: &str,
    metadata_tolerance: u64,
) -> Option<Vec<Difference>> {
    let lines: Vec<StatusLine<'_>> = expected
        .lines()
        .filter_map(StatusLine::parse)
        .filter(|line| ["thin-pool", "thin"].contains(&line.target))
        .collect();
    if lines.is_empty() {
        return None;
    }
    let mut found = Vec::new();
    for expected in lines.iter().filter(|line| line.target == "thin-pool") {
        if let Some(pool) = StatusLine::parse(&mark.pool) {
            found.extend(compare_pool(expected, &pool, metadata_tolerance));
        }
    }
    let mut thins: Vec<(&str, StatusLine<'_>)> = mark
        .thins
        .iter()
        .filter_map(|(device, line)| Some((&**device, StatusLine::parse(line)?)))
        .collect();
    thins.sort_by_key(|(device, _)| numbers(device));
    let mut unmatched = Vec::new();
    for expected in lines.iter().filter(|line| line.target == "thin") {
        let by_name = thins
            .iter()
            .position(|(name, _)| expected.name == Some(name));
        let by_words = || thins.iter().position(|(_, line)| line.is_same(expected));
        match by_name.or_else(by_words) {
            Some(at) => found.extend(compare_thin(expected, Some(&thins.remove(at)))),
            None => unmatched.push(expected),
        }
    }
    let mut rest = thins.iter();
    for expected in unmatched {
        found.extend(compare_thin(expected, rest.next()));
    }
    Some(found)
}

/// A key by which `253:2` comes before `253:10`.
fn numbers(device: &str) -> (Option<u64>, Option<u64>, String) {
    let (major, minor) = device.split_once(':').unwrap_or((device, ""));
    (major.parse().ok(), minor.parse().ok(), device.into())
}

fn compare_pool(
    expected: &StatusLine<'_>,
    found: &StatusLine<'_>,
    metadata_tolerance: u64,
) -> Vec<Difference> {
    let is_same = |at: usize, expected: &str, found: &str| match at {
        1 => is_within(expected, found, metadata_tolerance),
        // Which block it got is chance.
        3 => (expected == "-") == (found == "-"),
        _ => expected == found,
    };
    compare_words("pool", &POOL_WORDS, expected, found, is_same)
}

fn compare_thin(
    expected: &StatusLine<'_>,
    found: Option<&(&str, StatusLine<'_>)>,
) -> Vec<Difference> {
    match found {
        Some((device, found)) => {
            compare_words(device, &THIN_WORDS, expected, found, |_, a, b| a == b)
        }
        None => vec![Difference {
            device: expected.name.unwrap_or("thin").into(),
            what: "status".into(),
            expected: format!("{} sectors: {}", expected.length, expected.words.join(" ")),
            found: "no such device".into(),
        }],
    }
}

fn compare_words(
    device: &str,
    names: &[&str],
    expected: &StatusLine<'_>,
    found: &StatusLine<'_>,
    is_same: impl Fn(usize, &str, &str) -> bool,
) -> Vec<Difference> {
    let difference = |what: &str, expected: &str, found: &str| Difference {
        device: device.into(),
        what: what.into(),
        expected: expected.into(),
        found: found.into(),
    };
    let mut differences = Vec::new();
    if expected.length != found.length {
        differences.push(difference("sectors", expected.length, found.length));
    }
    // Fail and Error are lines of one word.
    if expected.words.len().min(found.words.len()) <= 1 && expected.words != found.words {
        let all = |line: &StatusLine<'_>| line.words.join(" ");
        differences.push(difference("status", &all(expected), &all(found)));
        return differences;
    }
    for (at, name) in names.iter().enumerate() {
        let (Some(expected), Some(found)) = (expected.words.get(at), found.words.get(at)) else {
            break;
        };
        if !is_same(at, expected, found) {
            differences.push(difference(name, expected, found));
        }
    }
    differences
}

/// True if two `USED/TOTAL` have the same total, and differ by no more than `tolerance` in what is used.
fn is_within(expected: &str, found: &str, tolerance: u64) -> bool {
    let pair = |word: &str| {
        let (used, total) = word.split_once('/')?;
        Some((used.parse::<u64>().ok()?, total.parse::<u64>().ok()?))
    };
    match (pair(expected), pair(found)) {
        (Some((a, total)), Some((b, all))) => total == all && a.abs_diff(b) <= tolerance,
        _ => expected == found,
    }
}

/// Virtual blocks that follow on each other and are mapped to data blocks that do, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRun {
    /// First virtual block.
    pub begin: u64,
    /// First data block.
    pub data: u64,
    /// Blocks.
    pub len: u64,
    /// The snapshot clock when they were mapped.
    pub time: u32,
}

/// What is mapped in a pool, device by device in runs of ascending virtual blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mappings(BTreeMap<ThinId, Vec<MappedRun>>);

/// Half-open stretches of blocks that ascend and do not touch.
type Stretches = Vec<(u64, u64)>;

impl Mappings {
    /// Those of a pool.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn of(pool: &PoolMetadata) -> Result<Self> {
        let mut mappings = Self::default();
        for id in pool.devices()? {
            mappings.add_device(id);
            let mut from = 0;
            while let Some((block, at)) = pool.next_block(id, ThinBlock(from))? {
                let run = MappedRun {
                    begin: block.0,
                    data: at.block.0,
                    len: 1,
                    time: at.time,
                };
                mappings.add(id, run);
                from = block.0 + 1;
            }
        }
        Ok(mappings)
    }

    /// A device, which may have no mapping.
    pub fn add_device(&mut self, id: ThinId) {
        self.0.entry(id).or_default();
    }

    /// More mappings of a device, behind those that it has.
    pub fn add(&mut self, id: ThinId, run: MappedRun) {
        let runs = self.0.entry(id).or_default();
        match runs.last_mut() {
            Some(last)
                if last.time == run.time
                    && last.begin.checked_add(last.len) == Some(run.begin)
                    && last.data.checked_add(last.len) == Some(run.data) =>
            {
                last.len = last.len.saturating_add(run.len);
            }
            _ => runs.push(run),
        }
    }

    /// Data blocks that are mapped more than once.
    fn shared_data(&self) -> Stretches {
        let runs = self.0.values().flatten();
        let mut edges: Vec<(u64, i64)> = runs
            .flat_map(|run| [(run.data, 1), (run.data.saturating_add(run.len), -1)])
            .collect();
        // Ends come first, so that neighbours do not overlap.
        edges.sort_unstable();
        let (mut users, mut shared) = (0, Stretches::new());
        let mut since = 0;
        for (at, step) in edges {
            let before = users;
            users += step;
            match (before > 1, users > 1) {
                (false, true) => since = at,
                (true, false) => push(&mut shared, since, at),
                _ => {}
            }
        }
        shared
    }

    /// Virtual blocks of a device that are mapped.
    fn mapped(runs: &[MappedRun]) -> Stretches {
        let mut mapped = Stretches::new();
        for run in runs {
            push(&mut mapped, run.begin, run.begin.saturating_add(run.len));
        }
        mapped
    }

    /// Virtual blocks of a device whose data blocks are in `data`.
    fn mapped_to(runs: &[MappedRun], data: &Stretches) -> Stretches {
        let mut found = Stretches::new();
        for run in runs {
            let end = run.data.saturating_add(run.len);
            let first = data.partition_point(|&(_, to)| to <= run.data);
            for &(from, to) in data[first..].iter().take_while(|(from, _)| *from < end) {
                let (from, to) = (from.max(run.data), to.min(end));
                push(
                    &mut found,
                    run.begin + (from - run.data),
                    run.begin + (to - run.data),
                );
            }
        }
        found
    }
}

fn push(stretches: &mut Stretches, from: u64, to: u64) {
    match stretches.last_mut() {
        Some(last) if last.1 == from => last.1 = to,
        _ if from < to => stretches.push((from, to)),
        _ => {}
    }
}

/// What is in one of two and not in the other: the stretch, and whether it is the first that has it.
fn apart(first: &Stretches, second: &Stretches) -> Vec<(u64, u64, bool)> {
    let edges = |stretches: &Stretches, which| {
        let both = stretches.iter().flat_map(|&(from, to)| [from, to]);
        both.map(|at| (at, which)).collect::<Vec<_>>()
    };
    let mut all = edges(first, true);
    all.extend(edges(second, false));
    all.sort_unstable();
    let (mut in_first, mut in_second, mut since) = (false, false, 0);
    let mut found: Vec<(u64, u64, bool)> = Vec::new();
    for (at, is_first) in all {
        if in_first != in_second && since < at {
            match found.last_mut() {
                Some(last) if last.1 == since && last.2 == in_first => last.1 = at,
                _ => found.push((since, at, in_first)),
            }
        }
        match is_first {
            true => in_first = !in_first,
            false => in_second = !in_second,
        }
        since = at;
    }
    found
}

/// Compares what is mapped, and what is shared; with `is_strict` also to which data blocks, and since which snapshot. That is only the
/// same if requests came one by one.
pub fn compare_mappings(expected: &Mappings, found: &Mappings, is_strict: bool) -> Vec<Difference> {
    let mut differences = Vec::new();
    let shared = [expected, found].map(Mappings::shared_data);
    let ids: BTreeSet<ThinId> = expected.0.keys().chain(found.0.keys()).copied().collect();
    for id in ids {
        let device = format!("thin device {id}");
        let mut differ = |what: String, expected: &str, found: &str| {
            differences.push(Difference {
                device: device.clone(),
                what,
                expected: expected.into(),
                found: found.into(),
            });
        };
        let (old, new) = match (expected.0.get(&id), found.0.get(&id)) {
            (Some(old), Some(new)) => (old, new),
            (old, _) => {
                let said = |is_there| if is_there { "a device" } else { "none" };
                differ("existence".into(), said(old.is_some()), said(old.is_none()));
                continue;
            }
        };
        let mut told = |sets: [Stretches; 2], with: &str, without: &str| {
            let unlike = apart(&sets[0], &sets[1]);
            for (from, to, is_expected) in unlike {
                let said = |is| if is { with } else { without };
                differ(blocks(from, to), said(is_expected), said(!is_expected));
            }
        };
        let mapped = [old, new].map(|runs| Mappings::mapped(runs));
        told(mapped.clone(), "mapped", "unmapped");
        // Where only one has a mapping is told already.
        let of_both = |stretches: &Stretches| {
            let common = common(&mapped[0], &mapped[1]);
            self::common(stretches, &common)
        };
        let sharing = [
            of_both(&Mappings::mapped_to(old, &shared[0])),
            of_both(&Mappings::mapped_to(new, &shared[1])),
        ];
        told(sharing, "shared", "not shared");
        if is_strict {
            for (from, to, a, b) in unlike_places(old, new) {
                differ(blocks(from, to), &place(a), &place(b));
            }
        }
    }
    differences
}

fn blocks(from: u64, to: u64) -> String {
    match to - from {
        1 => format!("block {from}"),
        _ => format!("blocks {from}..{to}"),
    }
}

fn place((data, time): (u64, u32)) -> String {
    format!("data block {data} of time {time}")
}

/// What is in both.
fn common(first: &Stretches, second: &Stretches) -> Stretches {
    let (mut found, mut at) = (Stretches::new(), 0);
    for &(from, to) in first {
        while second.get(at).is_some_and(|&(_, end)| end <= from) {
            at += 1;
        }
        let mut next = at;
        while let Some(&(begin, end)) = second.get(next).filter(|&&(begin, _)| begin < to) {
            push(&mut found, from.max(begin), to.min(end));
            next += 1;
        }
    }
    found
}

/// Data block and time of the first block of a stretch.
type Place = (u64, u32);

/// Stretches that are mapped in both, but elsewhere or at another time.
fn unlike_places(first: &[MappedRun], second: &[MappedRun]) -> Vec<(u64, u64, Place, Place)> {
    let (mut found, mut at) = (Vec::new(), 0);
    for a in first {
        let end = a.begin.saturating_add(a.len);
        let end_of = |run: &MappedRun| run.begin.saturating_add(run.len);
        while second.get(at).is_some_and(|b| end_of(b) <= a.begin) {
            at += 1;
        }
        for b in second[at..].iter().take_while(|b| b.begin < end) {
            let (from, to) = (a.begin.max(b.begin), end.min(end_of(b)));
            let of = |run: &MappedRun| (run.data + (from - run.begin), run.time);
            if of(a) != of(b) {
                found.push((from, to, of(a), of(b)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: &str =
        "0 2097152 thin-pool 0 422/4096 342/16384 - rw discard_passdown queue_if_no_space - 1024 ";

    fn mark(pool: &str, thins: &[(&str, &str)]) -> Mark {
        let thins = thins.iter().map(|&(a, b)| (a.into(), b.into()));
        Mark {
            source: None,
            name: "m".into(),
            time_ns: 0,
            pool: pool.into(),
            thins: thins.collect(),
            allocated_metadata_blocks: 0,
        }
    }

    fn statuses(mark: &Mark, expected: &str, tolerance: u64) -> Vec<Difference> {
        compare_status(mark, expected, tolerance).expect("lines of a pool")
    }

    fn told(differences: &[Difference]) -> Vec<String> {
        differences.iter().map(Difference::to_string).collect()
    }

    #[test]
    fn each_word_of_a_status_that_differs_is_told() {
        let thins = [("253:10", "0 64 thin 128 127"), ("253:2", "0 64 thin 0 -")];
        let mark = mark(POOL, &thins);
        let same = format!("pool: {POOL}\na: 0 64 thin 0 -\nb: 0 64 thin 128 127\nc: 0 8 linear\n");
        assert_eq!(statuses(&mark, &same, 0), []);
        let other = POOL
            .replace("422/", "424/")
            .replace("342/", "340/")
            .replace(" rw ", " ro ");
        let other = format!("{other}\n0 64 thin 0 -\n0 64 thin 256 127\n0 64 thin 1 2\n");
        assert_eq!(
            told(&statuses(&mark, &other, 2)),
            [
                "pool, data blocks in use: 340/16384 was expected, 342/16384 found",
                "pool, mode: ro was expected, rw found",
                "253:10, mapped sectors: 256 was expected, 128 found",
                "thin, status: 64 sectors: 1 2 was expected, no such device found",
            ]
        );
        assert_eq!(statuses(&mark, &other, 1).len(), 5);
        // By name, whatever the words.
        let named = "253:2: 0 64 thin 128 127";
        assert_eq!(statuses(&mark, named, 0).len(), 2);
        // A kernel of 2014 has no needs_check and no mark.
        let old = POOL.rsplit_once(" - 1024").expect("words").0;
        assert_eq!(statuses(&mark, old, 0), []);
        let failed = "0 2097152 thin-pool Fail";
        assert_eq!(statuses(&mark, failed, 0).len(), 1);
        assert_eq!(compare_status(&mark, "0 64 linear 8:0 0\n", 0), None);
    }

    fn mappings(all: &[(u64, u64, u64, u64)]) -> Mappings {
        let mut mappings = Mappings::default();
        for &(id, begin, data, len) in all {
            let run = MappedRun {
                begin,
                data,
                len,
                time: 0,
            };
            mappings.add(ThinId(id), run);
        }
        mappings
    }

    #[test]
    fn mappings_are_compared_block_by_block_wherever_runs_end() {
        let one = mappings(&[(0, 0, 10, 8), (1, 4, 14, 4)]);
        let same = mappings(&[(0, 0, 30, 4), (0, 4, 50, 2), (0, 6, 52, 2), (1, 4, 50, 4)]);
        assert_eq!(compare_mappings(&one, &same, false), []);
        assert_eq!(compare_mappings(&one, &one, true), []);
        assert_eq!(
            told(&compare_mappings(&one, &same, true)),
            [
                "thin device 0, blocks 0..4: data block 10 of time 0 was expected, data block 30 of time 0 found",
                "thin device 0, blocks 4..8: data block 14 of time 0 was expected, data block 50 of time 0 found",
                "thin device 1, blocks 4..8: data block 14 of time 0 was expected, data block 50 of time 0 found",
            ]
        );
        let other = mappings(&[(0, 1, 11, 7), (0, 9, 70, 1), (1, 4, 14, 3), (1, 7, 80, 1)]);
        assert_eq!(
            told(&compare_mappings(&one, &other, false)),
            [
                "thin device 0, block 0: mapped was expected, unmapped found",
                "thin device 0, block 9: unmapped was expected, mapped found",
                "thin device 0, block 7: shared was expected, not shared found",
                "thin device 1, block 7: shared was expected, not shared found",
            ]
        );
        assert_eq!(
            told(&compare_mappings(&one, &mappings(&[(1, 4, 14, 4)]), false)),
            [
                "thin device 0, existence: a device was expected, none found",
                "thin device 1, blocks 4..8: shared was expected, not shared found",
            ]
        );
    }
}
