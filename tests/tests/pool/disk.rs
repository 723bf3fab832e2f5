//! A data device in memory that remembers who wrote each 4 KiB, and has a cache that a crash may lose.

use std::collections::BTreeMap;

/// Sectors of 512 bytes that have one tag.
pub(crate) const CHUNK: u64 = 8;

/// Who wrote a chunk; 0 is nobody: it is zeros.
pub(crate) type Tag = u64;

/// The device. A chunk that is in none of the maps is zeros, but for a device that was used before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disk {
    live: BTreeMap<u64, Tag>,
    durable: BTreeMap<u64, Tag>,
    /// Written and not flushed, in order: number, chunk, tag.
    volatile: Vec<(u64, u64, Tag)>,
    next: u64,
    /// What is there where nothing was written yet.
    ground: Tag,
    /// Nothing that is written stays.
    is_null: bool,
}

impl Disk {
    /// A device that reads as zeros whatever is written to it, as dm-zero.
    pub(crate) fn null() -> Self {
        Self {
            is_null: true,
            ..Self::default()
        }
    }

    /// A device that is full of what somebody else left there.
    pub(crate) fn used() -> Self {
        Self {
            ground: Tag::MAX,
            ..Self::default()
        }
    }

    pub(crate) fn read(&self, sector: u64, sectors: u64) -> Vec<Tag> {
        assert!(sector.is_multiple_of(CHUNK) && sectors.is_multiple_of(CHUNK));
        let first = sector / CHUNK;
        let tag = |chunk| *self.live.get(&chunk).unwrap_or(&self.ground);
        (first..first + sectors / CHUNK).map(tag).collect()
    }

    pub(crate) fn write(&mut self, sector: u64, tags: &[Tag], is_fua: bool) {
        assert!(sector.is_multiple_of(CHUNK));
        if self.is_null {
            return;
        }
        for (chunk, &tag) in (sector / CHUNK..).zip(tags) {
            self.live.insert(chunk, tag);
            if is_fua {
                self.volatile.retain(|w| w.1 != chunk);
                self.durable.insert(chunk, tag);
            } else {
                self.volatile.push((self.next, chunk, tag));
                self.next += 1;
            }
        }
    }

    /// What a flush that begins now makes durable when it ends.
    pub(crate) fn mark(&self) -> u64 {
        self.next
    }

    pub(crate) fn flush(&mut self, mark: u64) {
        let durable = &mut self.durable;
        self.volatile.retain(|&(number, chunk, tag)| {
            if number < mark {
                durable.insert(chunk, tag);
            }
            number >= mark
        });
    }

    /// What is there after a crash: of what was not flushed, what `keeps` says.
    pub(crate) fn crash(mut self, mut keeps: impl FnMut() -> bool) -> Self {
        for (_, chunk, tag) in std::mem::take(&mut self.volatile) {
            if keeps() {
                self.durable.insert(chunk, tag);
            }
        }
        self.live = self.durable.clone();
        self
    }
}
