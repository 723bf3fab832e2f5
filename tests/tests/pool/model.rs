//! What a reader may find: every write, discard and snapshot with when it began and ended, and what was made durable when.
//!
//! A write is over once another one, begun after it had ended, has ended before the read began. Whatever is not over, a read may
//! find. Writes that failed, or that a crash cut off, may have happened or not.

use std::collections::BTreeMap;

use super::disk::Tag;

/// One thing that changed a chunk. Times are steps of the history.
#[derive(Clone, Debug)]
struct Change {
    tag: Tag,
    begun: u64,
    /// None while it is under way, and for ever if it failed.
    ended: Option<u64>,
    /// When it was sure to survive a crash.
    durable: Option<u64>,
    /// A discard may leave what was there.
    is_discard: bool,
    bio: u64,
}

/// What a thin device may hold, by chunk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    chunks: BTreeMap<u64, Vec<Change>>,
}

impl Model {
    pub(crate) fn begin(
        &mut self,
        bio: u64,
        chunks: std::ops::Range<u64>,
        now: u64,
        is_discard: bool,
    ) {
        for chunk in chunks {
            self.chunks.entry(chunk).or_default().push(Change {
                tag: if is_discard { 0 } else { bio },
                begun: now,
                ended: None,
                durable: None,
                is_discard,
                bio,
            });
        }
    }

    pub(crate) fn end(
        &mut self,
        bio: u64,
        chunks: std::ops::Range<u64>,
        now: u64,
        is_durable: bool,
    ) {
        for change in self
            .chunks
            .range_mut(chunks)
            .flat_map(|(_, changes)| changes)
        {
            if change.bio == bio {
                change.ended = Some(now);
                change.durable = is_durable.then_some(now);
            }
        }
    }

    /// A bio that was given back untouched.
    pub(crate) fn forget(&mut self, bio: u64) {
        let changes = self.chunks.values_mut();
        changes.for_each(|changes| changes.retain(|c| c.bio != bio));
    }

    /// What is not durable may be lost, now or already.
    pub(crate) fn doubt(&mut self) {
        for change in self.chunks.values_mut().flatten() {
            if change.durable.is_none() {
                change.ended = None;
            }
        }
    }

    /// A flush that began at `begun` has ended: what had ended before is durable.
    pub(crate) fn flushed(&mut self, begun: u64, now: u64) {
        for change in self.chunks.values_mut().flatten() {
            if change.ended.is_some_and(|ended| ended <= begun) {
                change.durable.get_or_insert(now);
            }
        }
    }

    /// What a read that began at `begun` may find in a chunk now.
    pub(crate) fn may_find(&self, chunk: u64, begun: u64) -> Vec<Tag> {
        let over_by = |c: &Change| c.ended.filter(|&ended| ended < begun);
        self.not_over(chunk, over_by)
    }

    fn not_over(&self, chunk: u64, over_by: impl Fn(&Change) -> Option<u64>) -> Vec<Tag> {
        let changes = self.chunks.get(&chunk).map_or(&[][..], |c| c);
        // A write that ended before something began which has ended itself.
        let last_begun = changes
            .iter()
            .filter(|c| !c.is_discard && over_by(c).is_some())
            .map(|c| c.begun)
            .max();
        let is_over = |c: &Change| {
            c.ended
                .zip(last_begun)
                .is_some_and(|(ended, begun)| ended < begun)
        };
        let mut tags: Vec<Tag> = changes
            .iter()
            .filter(|c| !is_over(c))
            .map(|c| c.tag)
            .collect();
        if last_begun.is_none() {
            tags.push(0);
        }
        tags
    }

    /// What a crash may leave in a chunk.
    pub(crate) fn may_survive(&self, chunk: u64) -> Vec<Tag> {
        self.not_over(chunk, |c| c.durable)
    }

    /// A snapshot, asked for at `begun`: what had not ended then may be in it or not.
    pub(crate) fn snapshot(&self, begun: u64) -> Self {
        let mut copy = self.clone();
        for change in copy.chunks.values_mut().flatten() {
            if change.ended.is_none_or(|ended| ended > begun) {
                change.ended = None;
                change.durable = None;
            }
        }
        copy
    }

    /// What was found after a crash is what there is.
    pub(crate) fn is(&mut self, chunk: u64, tag: Tag) {
        let change = Change {
            tag,
            begun: 0,
            ended: Some(0),
            durable: Some(0),
            is_discard: false,
            bio: u64::MAX,
        };
        self.chunks.insert(chunk, vec![change]);
    }
}
