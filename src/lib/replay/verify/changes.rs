//! What is under way in a block, and what a reader may find there meanwhile.
//!
//! A change is over once a write of the same sector, begun after it had ended, has ended before the read began. Whatever is not over, a
//! read may find. A discard is a hint: it makes nothing over, and leaves what was there or a hole.

use super::content::{Content, Tag};

/// What changes sectors of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A write, whose first sector gets this tag.
    Write(Tag),
    /// A discard of the whole block.
    Discard,
    /// A write that failed: nobody knows what is there.
    Failed,
}

/// One change. Times are steps of the history, each of which something has to itself.
#[derive(Clone, Debug)]
struct Change {
    what: What,
    /// Sectors of the block.
    begin: u64,
    end: u64,
    begun: u64,
    /// None while it is under way.
    ended: Option<u64>,
}

impl Change {
    fn overlaps(&self, other: &Self) -> bool {
        self.begin < other.end && other.begin < self.end
    }

    fn covers(&self, other: &Self) -> bool {
        self.begin <= other.begin && other.end <= self.end
    }

    /// It ended before something that began then.
    fn is_before(&self, begun: u64) -> bool {
        self.ended.is_some_and(|ended| ended < begun)
    }

    fn tag(&self, at: u64) -> Tag {
        match self.what {
            What::Write(first) => first.plus(at - self.begin),
            What::Discard => Tag::HOLE,
            What::Failed => Tag::ANY,
        }
    }

    fn apply(&self, content: &mut Content, size: u64) {
        let sectors = self.end - self.begin;
        let new = match self.what {
            What::Write(first) => Content::Run(first),
            What::Discard => content.part(self.begin, sectors).or_hole(),
            What::Failed => Content::Same(Tag::ANY),
        };
        content.set(self.begin, sectors, &new, size);
    }
}

/// Changes that are kept of a block on which nothing is under way; if more overlap, it is given up to know what is there.
const MOST_KEPT: usize = 64;

/// What is under way in a block, and what was when that began.
#[derive(Debug, Default)]
pub(super) struct Changes {
    changes: Vec<Change>,
    /// When reads under way began.
    reads: Vec<u64>,
    /// How many changes there are when it is worth to look for those that are over.
    looked_at: usize,
}

impl Changes {
    /// A change of `begin..end` begins at step `begun`.
    pub(super) fn begin(&mut self, what: What, begin: u64, end: u64, begun: u64) {
        self.changes.push(Change {
            what,
            begin,
            end,
            begun,
            ended: None,
        });
    }

    /// The change that began at `begun` ended as `what` at `now`; none if it has changed nothing.
    pub(super) fn end(&mut self, begun: u64, what: Option<What>, now: u64) {
        match what {
            None => self.changes.retain(|change| change.begun != begun),
            Some(what) => {
                let ended = |change: &&mut Change| change.begun == begun;
                for change in self.changes.iter_mut().filter(ended) {
                    (change.what, change.ended) = (what, Some(now));
                }
            }
        }
    }

    /// A read begins.
    pub(super) fn begin_read(&mut self, begun: u64) {
        self.reads.push(begun);
    }

    /// A read has ended.
    pub(super) fn end_read(&mut self, begun: u64) {
        self.reads.retain(|&read| read != begun);
    }

    /// What a read that began at `begun` may find in a sector that held `tag` before.
    pub(super) fn may_find(&self, tag: Tag, at: u64, begun: u64) -> impl Iterator<Item = Tag> {
        let here = |change: &&Change| change.begin <= at && at < change.end;
        let here: Vec<&Change> = self.changes.iter().filter(here).collect();
        let writes = here.iter().filter(|c| matches!(c.what, What::Write(_)));
        // The last to begin of those that are behind everybody.
        let last = writes.filter(|c| c.is_before(begun)).map(|c| c.begun).max();
        let is_over = |change: &&Change| last.is_some_and(|last| change.is_before(last));
        let mut tags: Vec<Tag> = here
            .into_iter()
            .filter(|change| !is_over(change))
            .map(|change| change.tag(at))
            .collect();
        if last.is_none() {
            tags.push(tag);
        }
        tags.into_iter()
    }

    /// True if nothing is under way.
    fn is_quiet(&self) -> bool {
        self.reads.is_empty() && self.changes.iter().all(|change| change.ended.is_some())
    }

    /// True if it is worth to [`settle`](Self::settle).
    pub(super) fn is_due(&self) -> bool {
        self.is_quiet() || self.changes.len() > self.looked_at.max(MOST_KEPT)
    }

    /// There is nothing that the block itself does not say.
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.reads.is_empty()
    }

    /// True if what the block holds may differ from what it held.
    pub(super) fn has_changes(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Takes what every reader finds by now into `content`, the block of `size` sectors, and forgets what is over.
    pub(super) fn settle(&mut self, content: &mut Content, size: u64) {
        let reads = self.reads.iter().copied().min().unwrap_or(u64::MAX);
        let changes = &mut self.changes;
        let writes = changes
            .iter()
            .filter(|change| matches!(change.what, What::Write(_)) && change.is_before(reads));
        let writes: Vec<Change> = writes.cloned().collect();
        changes.retain(|change| {
            let is_over = |write: &Change| write.covers(change) && change.is_before(write.begun);
            !writes.iter().any(is_over)
        });
        let mut at = 0;
        while at < changes.len() {
            let change = &changes[at];
            let is_first = |other: &Change| {
                other.begun == change.begun
                    || !other.overlaps(change)
                    || change.is_before(other.begun)
            };
            if change.is_before(reads) && changes.iter().all(is_first) {
                changes.remove(at).apply(content, size);
                at = 0;
            } else {
                at += 1;
            }
        }
        if self.is_quiet() && self.changes.len() > MOST_KEPT {
            self.give_up(content, size);
        }
        self.looked_at = self.changes.len() * 2;
    }

    /// Whatever may have changed may be anything.
    fn give_up(&mut self, content: &mut Content, size: u64) {
        for mut change in self.changes.drain(..) {
            change.what = What::Failed;
            change.apply(content, size);
        }
    }

    /// What a snapshot has of a block that may be changing: all that, or not.
    pub(super) fn give_up_in_copy(&self, content: &mut Content, size: u64) {
        let mut copy = Self {
            changes: self.changes.clone(),
            ..Self::default()
        };
        copy.give_up(content, size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8;
    const OLD: Tag = Tag::prior(0);

    fn found(changes: &Changes, begun: u64) -> Vec<Tag> {
        let mut tags: Vec<Tag> = changes.may_find(OLD, 1, begun).collect();
        tags.sort_by_key(|tag| format!("{tag}"));
        tags
    }

    fn write(number: u32) -> (What, Tag) {
        let mut next = number;
        let first = Tag::of_write(&mut next, 4);
        (What::Write(first), first.plus(1))
    }

    #[test]
    fn a_read_beside_a_write_finds_either_and_one_behind_it_the_write() {
        let mut changes = Changes::default();
        let (one, tag) = write(1);
        changes.begin(one, 0, 4, 1);
        changes.begin_read(2);
        changes.end(1, Some(one), 3);
        assert_eq!(found(&changes, 2), [tag, OLD]);
        assert_eq!(found(&changes, 4), [tag]);
        let mut content = Content::Same(OLD);
        changes.settle(&mut content, SIZE);
        assert_eq!(content.at(1), OLD, "the read may still find it");
        changes.end_read(2);
        changes.settle(&mut content, SIZE);
        assert!(changes.is_empty());
        assert_eq!((content.at(1), content.at(4)), (tag, OLD));
    }

    #[test]
    fn of_writes_at_once_either_is_last_until_another_write_is_over() {
        let mut changes = Changes::default();
        let mut content = Content::Same(OLD);
        let (one, two, three) = (write(1), write(11), write(21));
        changes.begin(one.0, 0, 4, 1);
        changes.begin(two.0, 0, 4, 2);
        changes.end(1, Some(one.0), 3);
        changes.end(2, Some(two.0), 4);
        changes.settle(&mut content, SIZE);
        assert_eq!(found(&changes, 5), [two.1, one.1]);
        changes.begin(three.0, 0, 4, 6);
        changes.end(6, Some(three.0), 7);
        changes.settle(&mut content, SIZE);
        assert!(changes.is_empty());
        assert_eq!(content.at(1), three.1);
    }

    #[test]
    fn a_discard_leaves_what_was_there_or_a_hole_and_one_that_was_refused_all() {
        let mut changes = Changes::default();
        let mut content = Content::Same(OLD);
        changes.begin(What::Discard, 0, SIZE, 1);
        changes.end(1, None, 2);
        changes.begin(What::Discard, 0, SIZE, 3);
        assert_eq!(found(&changes, 4), [OLD, Tag::HOLE]);
        changes.end(3, Some(What::Discard), 5);
        changes.settle(&mut content, SIZE);
        assert_eq!(content.at(1), OLD.or_hole());
    }

    #[test]
    fn a_write_that_failed_leaves_nobody_knows_what() {
        let mut changes = Changes::default();
        let mut content = Content::Same(OLD);
        changes.begin(write(1).0, 0, 4, 1);
        changes.end(1, Some(What::Failed), 2);
        changes.settle(&mut content, SIZE);
        assert_eq!((content.at(1), content.at(4)), (Tag::ANY, OLD));
    }
}
