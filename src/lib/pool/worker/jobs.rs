//! Operations under way: a bounded number, each known by where it is kept.

use super::discard::{Discard, Run};
use super::messages::Snapshot;
use super::provision::NewMapping;
use crate::units::DataBlock;

/// Which operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(u32);

#[cfg(test)]
impl JobId {
    pub(crate) fn of_model() -> Self {
        Self(0)
    }
}

/// An operation.
#[derive(Debug)]
pub(super) enum Job {
    Mapping(NewMapping),
    Discard(Discard),
    Run(Run),
    Snapshot(Snapshot),
    Commit,
    Drain,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Jobs {
    slots: Vec<Option<Job>>,
    free: Vec<u32>,
    /// Slots that bios may use; commit, snapshot and suspension have one more each at any time.
    most: usize,
}

impl Jobs {
    pub(super) fn new(most: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            most,
        }
    }

    /// True if `n` more operations on bios may start.
    pub(super) fn has_room(&self, n: usize) -> bool {
        self.len() + n <= self.most
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn add(&mut self, job: Job) -> JobId {
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = Some(job);
                JobId(slot)
            }
            None => {
                self.slots.push(Some(job));
                JobId(self.slots.len() as u32 - 1)
            }
        }
    }

    pub(super) fn get_mut(&mut self, id: JobId) -> Option<&mut Job> {
        self.slots.get_mut(id.0 as usize)?.as_mut()
    }

    pub(super) fn remove(&mut self, id: JobId) -> Option<Job> {
        let job = self.slots.get_mut(id.0 as usize)?.take();
        if job.is_some() {
            self.free.push(id.0);
        }
        job
    }

    /// Has all new mappings fail. Returns the blocks that they would have been to.
    pub(super) fn give_up_mappings(&mut self) -> Vec<DataBlock> {
        let jobs = self.slots.iter_mut().flatten();
        jobs.filter_map(|job| match job {
            Job::Mapping(mapping) => mapping.data.take(),
            _ => None,
        })
        .collect()
    }

    /// The data blocks that operations keep though no mapping leads there: first block and end.
    pub(super) fn kept_blocks(&self) -> Vec<(DataBlock, DataBlock)> {
        let kept = self.slots.iter().flatten().filter_map(|job| match job {
            Job::Mapping(mapping) => mapping.data.map(|block| block.0..block.0 + 1),
            Job::Run(run) => run.kept(),
            _ => None,
        });
        kept.map(|blocks| (DataBlock(blocks.start), DataBlock(blocks.end)))
            .collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (JobId, &Job)> {
        let named = |(n, job): (usize, _)| Some((JobId(n as u32), Option::as_ref(job)?));
        self.slots.iter().enumerate().filter_map(named)
    }
}
