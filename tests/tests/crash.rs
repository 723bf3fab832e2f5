//! An engine that records what is written to it, and the states that a crash in between may leave on a disk.

use std::collections::BTreeSet;
use std::io;
use std::sync::Mutex;

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

/// Memory that records what is done to it.
pub(crate) struct Recorder {
    memory: RamEngine,
    steps: Mutex<Vec<Step>>,
}

impl Recorder {
    /// With these contents.
    pub(crate) fn new(contents: &[u8]) -> Self {
        Self {
            memory: RamEngine::from_bytes(contents.to_vec()),
            steps: Mutex::new(Vec::new()),
        }
    }

    /// What was done to it, in order.
    pub(crate) fn into_steps(self) -> Vec<Step> {
        self.steps.into_inner().expect("no panic")
    }
}

impl BlockEngine for Recorder {
    fn nr_blocks(&self) -> u64 {
        self.memory.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        self.memory.read(start, buf)
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        self.memory.write(start, buf)?;
        let blocks = buf.chunks(BLOCK_SIZE).enumerate();
        let mut steps = self.steps.lock().expect("no panic");
        steps.extend(blocks.map(|(i, block)| Step::Write(start.0 + i as u64, block.to_vec())));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.steps.lock().expect("no panic").push(Step::Sync);
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
