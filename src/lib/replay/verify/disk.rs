//! The data device: whose data each of its sectors holds.

use super::content::{Content, Tag};
use crate::pool::{JobId, Source};
use std::collections::HashMap;

/// A device that was used before. What is not among its blocks is as it was.
#[derive(Debug)]
pub(super) struct Disk {
    /// Sectors in a block.
    size: u64,
    blocks: HashMap<u64, Content>,
    jobs: HashMap<JobId, Job>,
}

/// What a job of the worker writes, once all of it is done.
#[derive(Debug, Default)]
struct Job {
    parts: Vec<Part>,
    done: usize,
}

/// One thing that it writes.
#[derive(Debug)]
struct Part {
    sector: u64,
    sectors: u64,
    content: Content,
    /// Where it was read.
    from: Option<u64>,
}

impl Disk {
    pub(super) fn new(size: u64) -> Self {
        Self {
            size,
            blocks: HashMap::new(),
            jobs: HashMap::new(),
        }
    }

    /// Blocks that something is known of.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    fn at(&self, sector: u64) -> Tag {
        match self.blocks.get(&(sector / self.size)) {
            Some(content) => content.at(sector % self.size),
            None => Tag::prior(sector),
        }
    }

    /// What sectors hold.
    pub(super) fn read(&self, sector: u64, sectors: u64) -> Content {
        if sector % self.size + sectors > self.size {
            return Content::Each((0..sectors).map(|n| self.at(sector + n)).collect());
        }
        match self.blocks.get(&(sector / self.size)) {
            Some(content) => content.part(sector % self.size, sectors),
            None => Content::Run(Tag::prior(sector)),
        }
    }

    /// Sectors hold this from now on.
    pub(super) fn write(&mut self, sector: u64, sectors: u64, content: &Content) {
        let end = sector + sectors;
        let mut at = sector;
        while at < end {
            let block = at / self.size;
            let next = ((block + 1) * self.size).min(end);
            let before = Content::Run(Tag::prior(block * self.size));
            let part = content.part(at - sector, next - at);
            let place = self.blocks.entry(block).or_insert(before);
            place.set(at % self.size, next - at, &part, self.size);
            at = next;
        }
    }

    /// Nobody looks at what is written at `sector` by now.
    pub(super) fn forget(&mut self, sector: u64) {
        self.blocks.remove(&(sector / self.size));
    }

    /// A job begins to write.
    pub(super) fn begin(&mut self, job: JobId, sector: u64, sectors: u64, tag: Tag) {
        self.part(job, sector, sectors, Content::Same(tag), None);
    }

    /// A job begins to copy.
    pub(super) fn begin_copy(
        &mut self,
        job: JobId,
        source: Source,
        from: u64,
        to: u64,
        sectors: u64,
    ) {
        match source {
            Source::Data => self.part(job, to, sectors, self.read(from, sectors), Some(from)),
            Source::Origin(_) => {
                self.part(job, to, sectors, Content::Run(Tag::origin(from)), None);
            }
        }
    }

    fn part(&mut self, job: JobId, sector: u64, sectors: u64, content: Content, from: Option<u64>) {
        self.jobs.entry(job).or_default().parts.push(Part {
            sector,
            sectors,
            content,
            from,
        });
    }

    /// Something that a job began is done. It is not said what, but nobody looks before all is.
    pub(super) fn done(&mut self, job: JobId) {
        let Some(of) = self.jobs.get_mut(&job) else {
            return;
        };
        of.done += 1;
        if of.done < of.parts.len() {
            return;
        }
        for part in self.jobs.remove(&job).into_iter().flat_map(|job| job.parts) {
            let now = part.from.map(|from| self.read(from, part.sectors));
            let is_torn = now.is_some_and(|now| !now.is_same(&part.content, part.sectors));
            let torn = Content::Same(Tag::TORN);
            let content = if is_torn { &torn } else { &part.content };
            self.write(part.sector, part.sectors, content);
        }
    }
}
