//! Mappings that a reader looked up lately, so that it need not walk down a tree for a block that is used again and again.
//!
//! Each is good as long as nothing has been changed: [`Changes`] says so without a lock.

use crate::prefetch::prefetch;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

/// How often the metadata was changed.
#[derive(Debug)]
pub(crate) struct Changes(AtomicU64);

/// Two for each change, so that an odd number says that one is under way. No mapping is of the time 0.
const FIRST: u64 = 2;

impl Changes {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(FIRST))
    }

    /// What is looked up from here on may be half of a change. One thread at a time changes things.
    pub(crate) fn begin(&self) {
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now | 1, Ordering::Relaxed);
        // Nothing of the change may be seen before this.
        fence(Ordering::Release);
    }

    pub(crate) fn end(&self) {
        let now = self.0.load(Ordering::Relaxed);
        self.0.store((now | 1) + 1, Ordering::Release);
    }

    /// The time by which mappings are known, unless something is being changed.
    #[inline]
    pub(crate) fn time(&self) -> Option<u64> {
        let now = self.0.load(Ordering::Acquire);
        (now & 1 == 0).then_some(now)
    }

    /// True if what was looked up since `time` is of that time.
    #[inline]
    fn is_still(&self, time: u64) -> bool {
        fence(Ordering::Acquire);
        self.0.load(Ordering::Relaxed) == time
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    time: u64,
    device: u64,
    block: u64,
    value: u64,
}

impl Entry {
    fn is(&self, time: u64, device: u64, block: u64) -> bool {
        (self.time, self.device, self.block) == (time, device, block)
    }
}

/// Two mappings, in a line of the processor's cache: the first was used last.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
struct Pair([Entry; 2]);

/// Pairs of mappings that a reader has room for at first, 32 KiB; and at most, 1 MiB.
const LEAST: usize = 1 << 9;
const MOST: usize = 1 << 14;
/// Of so many that have room, one can be lost before there is to be more: a walk down the trees takes longer than to make room.
const FEW: usize = 4;

/// More room, for whichever readers need it: 2 MiB, however many there are.
#[derive(Debug)]
pub(super) struct Room(AtomicUsize);

impl Room {
    pub(super) fn new() -> Self {
        Self(AtomicUsize::new(2 * MOST))
    }

    /// True if there is so much, which is taken.
    fn take(&self, pairs: usize) -> bool {
        let rest = |left: usize| left.checked_sub(pairs);
        let taken = (self.0).fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest);
        taken.is_ok()
    }
}

/// The mappings.
#[derive(Debug)]
pub(super) struct RecentMappings {
    pairs: Box<[Pair]>,
    /// Mappings that were good and had to make room, since there was as much room as now.
    lost: usize,
}

impl RecentMappings {
    pub(super) fn new() -> Self {
        Self {
            pairs: vec![Pair::default(); LEAST].into(),
            lost: 0,
        }
    }

    /// The pair of a block; eight neighbouring blocks are in neighbouring pairs.
    #[inline(always)]
    fn pair(&self, device: u64, block: u64) -> usize {
        let place = (block / 8).wrapping_add(device << 40);
        let place = (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) ^ (block % 8);
        place as usize & (self.pairs.len() - 1)
    }

    /// Puts a mapping in its place. The one that has to go, if any.
    #[inline]
    fn keep(&mut self, new: Entry) -> Option<Entry> {
        let pair = self.pair(new.device, new.block);
        let [first, second] = &mut self.pairs[pair].0;
        let before = std::mem::replace(first, new);
        (before.time == new.time).then(|| std::mem::replace(second, before))
    }

    /// Takes more of `room`, if mappings would be found in it.
    #[inline]
    pub(super) fn grow(&mut self, room: &Room) {
        let len = self.pairs.len();
        if self.lost > 2 * len / FEW && len < MOST {
            self.lost = 0;
            if room.take(len) {
                let old = std::mem::take(&mut self.pairs);
                self.pairs = vec![Pair::default(); 2 * len].into();
                for entry in old.into_iter().flat_map(|pair| pair.0.into_iter().rev()) {
                    if entry.time > 0 {
                        self.keep(entry);
                    }
                }
            }
        }
    }

    /// Gives back what was taken of `room`.
    pub(super) fn give_back(&self, room: &Room) {
        let taken = self.pairs.len() - LEAST;
        room.0.fetch_add(taken, Ordering::Relaxed);
    }

    /// Asks for the memory where the mapping of a block would be.
    #[inline]
    pub(super) fn prefetch(&self, device: u64, block: u64) {
        prefetch(&self.pairs[self.pair(device, block)]);
    }

    /// The mapping of a block as it is at `time`, if it was looked up.
    #[inline]
    pub(super) fn get(&mut self, time: u64, device: u64, block: u64) -> Option<u64> {
        let pair = self.pair(device, block);
        let [first, second] = &mut self.pairs[pair].0;
        if second.is(time, device, block) {
            std::mem::swap(first, second);
        }
        first.is(time, device, block).then_some(first.value)
    }

    /// True if it was, at `time`.
    #[inline]
    pub(super) fn has(&self, time: u64, device: u64, block: u64) -> bool {
        let pair = &self.pairs[self.pair(device, block)].0;
        pair.iter().any(|entry| entry.is(time, device, block))
    }

    /// Keeps what was looked up since `time`, if it is of that time.
    #[inline]
    pub(super) fn put(
        &mut self,
        changes: &Changes,
        time: u64,
        (device, block): (u64, u64),
        value: u64,
    ) {
        if changes.is_still(time) {
            let new = Entry {
                time,
                device,
                block,
                value,
            };
            let gone = self.keep(new);
            self.lost += usize::from(gone.is_some_and(|gone| gone.time == time));
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_good_until_something_changes() {
        let (changes, mut recent) = (Changes::new(), RecentMappings::new());
        let time = changes.time().expect("nothing is being changed");
        assert_eq!(recent.get(time, 0, 0), None);
        recent.put(&changes, time, (0, 0), 7);
        recent.put(&changes, time, (1, 0), 8);
        recent.put(&changes, time, (0, 1 << 20), 9);
        assert_eq!(recent.get(time, 0, 0), Some(7));
        assert_eq!(recent.get(time, 1, 0), Some(8));
        assert_eq!(recent.get(time, 0, 1), None);
        changes.begin();
        assert_eq!(changes.time(), None);
        // What was looked up meanwhile is of no time.
        recent.put(&changes, time, (0, 5), 7);
        assert_eq!(recent.get(time, 0, 5), None);
        changes.end();
        let later = changes.time().expect("it is over");
        assert_eq!(recent.get(later, 0, 0), None);
        recent.put(&changes, time, (0, 5), 7);
        assert_eq!(recent.get(time, 0, 5), None);
        assert!(later > time);
    }

    #[test]
    fn neighbours_stay_in_a_table_that_is_full_of_others() {
        let (changes, mut recent) = (Changes::new(), RecentMappings::new());
        let time = changes.time().expect("nothing is being changed");
        for block in 0..8 * LEAST as u64 {
            recent.put(&changes, time, (3, (1 << 30) + block * 100), 1);
        }
        let mut missed = 0;
        for block in (0..LEAST as u64 / 4).cycle().take(2 * LEAST) {
            if recent.get(time, 3, block).is_none() {
                recent.put(&changes, time, (3, block), 2);
                missed += 1;
            }
        }
        assert!(missed < LEAST / 2, "{missed}");
    }

    #[test]
    fn of_two_mappings_the_one_that_was_used_last_stays() {
        let (changes, mut recent) = (Changes::new(), RecentMappings::new());
        let time = changes.time().expect("nothing is being changed");
        let pair = recent.pair(3, 0);
        let mut alike = (1..).filter(|&block| recent.pair(3, block) == pair);
        let [old, new] = [(); 2].map(|()| alike.next().expect("there are more blocks than pairs"));
        drop(alike);
        for block in [0, old] {
            recent.put(&changes, time, (3, block), block + 1);
        }
        assert_eq!(recent.get(time, 3, 0), Some(1));
        recent.put(&changes, time, (3, new), new + 1);
        let has = [0, old, new].map(|block| recent.has(time, 3, block));
        assert_eq!(has, [true, false, true]);
    }

    #[test]
    fn who_uses_more_mappings_gets_more_room_while_there_is_some() {
        let (changes, room) = (Changes::new(), Room::new());
        let time = changes.time().expect("nothing is being changed");
        let mut readers: Vec<_> = (0..16).map(|_| RecentMappings::new()).collect();
        let blocks = MOST as u64;
        for recent in &mut readers {
            // Also where only every hundredth is used.
            let used = || (0..blocks).map(|n| n * 100);
            for block in used().cycle().take(32 * MOST) {
                if recent.get(time, 3, block).is_none() {
                    recent.put(&changes, time, (3, block), block + 1);
                    recent.grow(&room);
                }
            }
            let found = used().filter(|&block| recent.get(time, 3, block) == Some(block + 1));
            let found = found.count();
            assert!(found > recent.pairs.len() * 4 / 5, "{found}");
        }
        let sizes: Vec<_> = readers.iter().map(|recent| recent.pairs.len()).collect();
        assert_eq!((sizes[0], sizes[15]), (MOST, LEAST));
        readers.iter().for_each(|recent| recent.give_back(&room));
        assert_eq!(room.0.into_inner(), 2 * MOST);
    }
}

/// Run with `RUSTFLAGS="--cfg loom"`.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn a_recent_mapping_is_never_older_than_the_last_change() {
        loom::model(|| {
            let changes = Arc::new(Changes::new());
            let mapping = Arc::new(AtomicU64::new(1));
            let writer = {
                let (changes, mapping) = (changes.clone(), mapping.clone());
                thread::spawn(move || {
                    changes.begin();
                    mapping.store(2, Ordering::Relaxed);
                    changes.end();
                })
            };
            let mut recent = RecentMappings::new();
            if let Some(time) = changes.time() {
                let value = mapping.load(Ordering::Relaxed);
                recent.put(&changes, time, (0, 0), value);
            }
            writer.join().expect("no panic");
            let kept = changes.time().and_then(|time| recent.get(time, 0, 0));
            assert!(kept.is_none_or(|value| value == 2), "an old mapping");
        });
    }
}
