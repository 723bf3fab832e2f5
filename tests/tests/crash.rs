//! An engine that records what is written to it and can be made to fail, and the states that a crash in between may leave on a disk.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, MutexGuard};

use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::tools::check::{CheckOptions, Severity, check};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

/// What happened to an engine.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// A block, and what was written to it.
    Write(u64, Vec<u8>),
    /// A flush.
    Sync,
}

/// What an engine is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read,
    Write,
    Sync,
}

/// What of a write reaches the memory although it is reported as failed. A device that fails may have done some of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lands {
    Nothing,
    /// The first half of its blocks.
    Half,
    All,
}

/// Requests that fail.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) request: Request,
    /// How many requests of this kind succeed before.
    pub(crate) after: u64,
    /// All that follow fail, too.
    pub(crate) is_lasting: bool,
    pub(crate) lands: Lands,
}

impl Fault {
    /// One request fails and does nothing.
    pub(crate) fn once(request: Request, after: u64) -> Self {
        Self {
            request,
            after,
            is_lasting: false,
            lands: Lands::Nothing,
        }
    }

    /// This request and all that follow fail and do nothing.
    pub(crate) fn lasting(request: Request, after: u64) -> Self {
        Self {
            is_lasting: true,
            ..Self::once(request, after)
        }
    }
}

#[derive(Default)]
struct Record {
    steps: Vec<Step>,
    faults: Vec<Fault>,
    /// Requests since the start: reads, writes, flushes.
    counts: [u64; 3],
    /// Requests that were made to fail.
    failed: u64,
    /// How many steps there were when a flush failed.
    failed_syncs: Vec<usize>,
}

impl Record {
    /// What of this request is done if it is to fail.
    fn strike(&mut self, request: Request) -> Option<Lands> {
        self.counts[request as usize] += 1;
        let mut lands = None;
        self.faults.retain_mut(|fault| {
            if fault.request != request {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            lands = Some(fault.lands);
            fault.is_lasting
        });
        self.failed += u64::from(lands.is_some());
        lands
    }

    fn note(&mut self, start: MetadataBlock, buf: &[u8]) {
        let blocks = buf.chunks(BLOCK_SIZE).enumerate();
        self.steps
            .extend(blocks.map(|(i, block)| Step::Write(start.0 + i as u64, block.to_vec())));
    }
}

/// What a failed device answers.
fn failure() -> io::Error {
    const EIO: i32 = 5;
    io::Error::from_raw_os_error(EIO)
}

/// Memory that records what is done to it, and fails where it is told to.
pub(crate) struct Recorder {
    before: Vec<u8>,
    memory: RamEngine,
    record: Mutex<Record>,
}

impl Recorder {
    /// With these contents.
    pub(crate) fn new(contents: &[u8]) -> Self {
        Self {
            before: contents.to_vec(),
            memory: RamEngine::from_bytes(contents.to_vec()),
            record: Mutex::default(),
        }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().expect("no panic")
    }

    /// What it held at first.
    pub(crate) fn before(&self) -> Vec<u8> {
        self.before.clone()
    }

    /// What was done to it, in order.
    pub(crate) fn into_steps(self) -> Vec<Step> {
        self.record.into_inner().expect("no panic").steps
    }

    /// What was done to it so far, in order.
    pub(crate) fn steps(&self) -> Vec<Step> {
        self.record().steps.clone()
    }

    /// How much was done to it so far.
    pub(crate) fn nr_steps(&self) -> usize {
        self.record().steps.len()
    }

    /// How many requests of a kind there were so far, failed ones included.
    pub(crate) fn count(&self, request: Request) -> u64 {
        self.record().counts[request as usize]
    }

    /// How many requests were made to fail so far.
    pub(crate) fn failed(&self) -> u64 {
        self.record().failed
    }

    /// How many steps there were each time a flush failed.
    pub(crate) fn failed_syncs(&self) -> Vec<usize> {
        self.record().failed_syncs.clone()
    }

    /// From here on these requests fail, and no others.
    pub(crate) fn set_faults(&self, faults: &[Fault]) {
        self.record().faults = faults.to_vec();
    }

    /// What a reader finds now.
    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut contents = vec![0; self.memory.nr_blocks() as usize * BLOCK_SIZE];
        self.memory
            .read(MetadataBlock(0), &mut contents)
            .expect("memory");
        contents
    }
}

impl BlockEngine for Recorder {
    fn nr_blocks(&self) -> u64 {
        self.memory.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        match self.record().strike(Request::Read) {
            None => self.memory.read(start, buf),
            Some(_) => {
                // Whoever uses what a failed read left behind is found out.
                buf.fill(0xee);
                Err(failure())
            }
        }
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        let mut record = self.record();
        let lands = record.strike(Request::Write);
        let done = match lands {
            None | Some(Lands::All) => buf,
            Some(Lands::Half) => &buf[..buf.len() / BLOCK_SIZE / 2 * BLOCK_SIZE],
            Some(Lands::Nothing) => &[],
        };
        self.memory.write(start, done)?;
        record.note(start, done);
        lands.map_or(Ok(()), |_| Err(failure()))
    }

    fn sync(&self) -> io::Result<()> {
        let mut record = self.record();
        if record.strike(Request::Sync).is_some() {
            let now = record.steps.len();
            record.failed_syncs.push(now);
            return Err(failure());
        }
        record.steps.push(Step::Sync);
        Ok(())
    }

    fn depth(&self) -> usize {
        self.memory.depth()
    }
}

/// Codes that a check of these bytes finds, without notes but needs_check.
pub(crate) fn codes_of(bytes: Vec<u8>) -> BTreeSet<&'static str> {
    let engine = RamEngine::from_bytes(bytes);
    let checked = check(&engine, &CheckOptions::default(), &Silent).expect("a report");
    let damages = checked.report.damages.iter();
    let matters = damages.filter(|d| d.severity > Severity::Note || d.code.name() == "needs-check");
    matters.map(|d| d.code.name()).collect()
}

fn apply<'a>(state: &mut [u8], writes: impl IntoIterator<Item = &'a (u64, Vec<u8>)>) {
    for (block, data) in writes {
        state[*block as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(data);
    }
}

/// Hands states that a crash may leave to `judge`, each with how it came about: writes between two flushes may reach the disk
/// in any order, or not at all. Fails if the last write is not flushed. Returns the state when everything is written.
pub(crate) fn after_crashes(
    before: &[u8],
    steps: &[Step],
    judge: &mut dyn FnMut(&[u8], &str),
) -> Vec<u8> {
    assert!(
        matches!(steps.last(), Some(Step::Sync)),
        "the last write is not flushed"
    );
    let mut epochs: Vec<Vec<(u64, Vec<u8>)>> = vec![Vec::new()];
    for step in steps {
        match step {
            Step::Sync => epochs.push(Vec::new()),
            Step::Write(block, data) => {
                epochs.last_mut().expect("one").push((*block, data.clone()))
            }
        }
    }
    let mut state = before.to_vec();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for epoch in &epochs {
        for i in 0..epoch.len() {
            let mut prefix = state.clone();
            apply(&mut prefix, &epoch[..=i]);
            judge(&prefix, "a prefix of the writes");
            let mut dropped = state.clone();
            let others = epoch.iter().enumerate().filter(|(k, _)| *k != i);
            apply(&mut dropped, others.map(|(_, write)| write));
            judge(&dropped, "one write lost");
            let mut alone = state.clone();
            apply(&mut alone, [&epoch[i]]);
            judge(&alone, "one write alone");
            let mut some = state.clone();
            let chosen = epoch.iter().filter(|_| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random & 1 == 0
            });
            apply(&mut some, chosen);
            judge(&some, "some of the writes");
        }
        apply(&mut state, epoch);
    }
    state
}
