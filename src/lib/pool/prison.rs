//! The bio prison: who is working on which blocks, and who waits for them to finish.
//!
//! A cell covers a range of virtual or of data blocks of one device. Whoever holds it works on them; bios that want a block of it
//! meanwhile are its inmates, and come out in order when it is released. As in the kernel, keys of data blocks carry the device,
//! too: devices that share a block do not exclude each other here.
//!
//! To be sure of a mapping, its block need not be held: take a ticket of the deferred set, see that no cell is near, and look the
//! mapping up. Whoever takes a cell later, and then the block away, waits for the ticket in between.
//!
//! Cells are brought by the caller and moved in and out, so nothing is allocated while a lock is held. A range lies within
//! [`DISCARD_BLOCKS`] aligned blocks, so that one shard knows everything that may overlap it.

use super::bio::{Bio, DISCARD_BLOCKS};
use super::contention::{LockCounts, Watch};
use super::list::{List, Taken};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::units::{DataBlock, ThinBlock, ThinId};
use std::fmt;
use std::sync::PoisonError;

/// Which blocks of which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    is_virtual: bool,
    device: u64,
    begin: u64,
    end: u64,
}

impl Key {
    /// A range of a thin device's own blocks.
    pub fn of_virtual(device: ThinId, begin: ThinBlock, end: ThinBlock) -> Self {
        Self::new(true, device, begin.0, end.0)
    }

    /// A range of the blocks of the data device, as this thin device has them.
    pub fn of_data(device: ThinId, begin: DataBlock, end: DataBlock) -> Self {
        Self::new(false, device, begin.0, end.0)
    }

    fn new(is_virtual: bool, device: ThinId, begin: u64, end: u64) -> Self {
        debug_assert!(begin < end && begin / DISCARD_BLOCKS == (end - 1) / DISCARD_BLOCKS);
        Self {
            is_virtual,
            device: device.0,
            begin,
            end,
        }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.begin < other.end
            && other.begin < self.end
            && self.device == other.device
            && self.is_virtual == other.is_virtual
    }

    fn shard(&self) -> usize {
        let mixed = (self.begin / DISCARD_BLOCKS)
            .wrapping_add(self.device << 40)
            .wrapping_add(u64::from(self.is_virtual) << 39)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 56) as usize
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_virtual { "virtual" } else { "data" };
        write!(f, "{kind} block {} of device {}", self.begin, self.device)?;
        match self.end - self.begin {
            1 => Ok(()),
            n => write!(f, " and {} behind it", n - 1),
        }
    }
}

const SHARDS: usize = 256;

/// The memory of a cell. Cells are made side by side and then belong to different threads.
#[derive(Debug)]
#[repr(align(128))]
pub struct Cell {
    key: Key,
    inmates: List<Bio>,
    next: Option<Box<Cell>>,
}

impl Cell {
    /// One that holds nothing.
    pub fn spare() -> Box<Self> {
        Box::new(Self {
            key: Key {
                is_virtual: false,
                device: 0,
                begin: 0,
                end: 0,
            },
            inmates: List::default(),
            next: None,
        })
    }
}

/// The right to work on the blocks of a cell. It has to be released.
#[derive(Debug)]
#[must_use]
pub struct Held(Key);

impl Held {
    pub(super) fn key(&self) -> Key {
        self.0
    }
}

/// What came of the wish to hold a cell.
#[derive(Debug)]
pub enum Detained {
    /// It is held now.
    Free(Held, Box<Bio>),
    /// Somebody holds an overlapping one: the bio is an inmate of it. The spare cell comes back.
    Busy(Box<Cell>),
}

/// A line of cache for each lock.
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    /// There are cells. Changes under the lock.
    has_cells: AtomicBool,
    cells: Mutex<Cells>,
}

impl Shard {
    fn new() -> Self {
        Self {
            has_cells: AtomicBool::new(false),
            cells: Mutex::new(Cells::default()),
        }
    }
}

/// Runs that the blocks of a shard are in: who provisions holds hundreds of neighbours.
const RUNS: usize = 32;
const RUN_BLOCKS: u64 = DISCARD_BLOCKS / RUNS as u64;

#[derive(Debug, Default)]
struct Cells {
    /// Those within a run of blocks.
    within: [Option<Box<Cell>>; RUNS],
    /// Those that are in more than one.
    across: Option<Box<Cell>>,
    count: usize,
    /// Times that the lock was taken.
    taken: u64,
}

impl Cells {
    /// The first and the last run that has blocks of a key.
    fn runs(key: &Key) -> (usize, usize) {
        let run = |block: u64| (block / RUN_BLOCKS) as usize % RUNS;
        (run(key.begin), run(key.end - 1))
    }

    /// Where the cell of a key is.
    fn list(&mut self, key: &Key) -> &mut Option<Box<Cell>> {
        match Self::runs(key) {
            (first, last) if first == last => &mut self.within[first],
            _ => &mut self.across,
        }
    }

    fn lists(&self) -> impl Iterator<Item = &Option<Box<Cell>>> {
        self.within.iter().chain([&self.across])
    }

    fn put(&mut self, key: Key, mut cell: Box<Cell>) {
        self.count += 1;
        let list = self.list(&key);
        cell.key = key;
        cell.next = list.take();
        *list = Some(cell);
    }

    fn take(&mut self, key: &Key) -> Option<Box<Cell>> {
        let mut link = self.list(key);
        while link.as_ref().is_some_and(|cell| cell.key != *key) {
            link = &mut link.as_mut()?.next;
        }
        let mut cell = link.take()?;
        *link = cell.next.take();
        self.count -= 1;
        Some(cell)
    }

    fn overlapping(&mut self, key: &Key) -> Option<&mut Box<Cell>> {
        if self.count == 0 {
            return None;
        }
        let (first, last) = Self::runs(key);
        let within = self.within[first..=last].iter_mut();
        let lists = within.chain([&mut self.across]);
        lists.filter_map(|list| overlapping(list, key)).next()
    }
}

/// All cells.
#[derive(Debug)]
pub struct Prison {
    shards: Box<[Shard]>,
    watch: Watch,
}

impl Default for Prison {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::new()).collect(),
            watch: Watch::default(),
        }
    }
}

impl Prison {
    fn shard(&self, key: &Key) -> &Shard {
        // There are a power of two.
        &self.shards[key.shard() & (self.shards.len() - 1)]
    }

    fn lock<'a>(&self, shard: &'a Shard) -> MutexGuard<'a, Cells> {
        let mut cells = self.watch.lock(&shard.cells);
        cells.taken += 1;
        cells
    }

    /// True if somebody may hold a block of `key`. If not, somebody may the moment after: for those who hold a ticket.
    #[inline(always)]
    pub(super) fn may_be_held(&self, key: &Key) -> bool {
        self.shard(key).has_cells.load(Ordering::SeqCst)
    }

    /// Has waits for its locks counted from here on.
    pub(super) fn watch(&self) {
        self.watch.begin();
    }

    /// What its locks cost.
    pub(super) fn lock_counts(&self) -> LockCounts {
        let taken = |shard: &Shard| lock(shard).taken;
        self.watch.counts(self.shards.iter().map(taken).sum())
    }

    /// Loom could not follow 256 locks.
    #[cfg(all(test, loom))]
    pub(super) fn with_one_shard() -> Self {
        Self {
            shards: Box::new([Shard::new()]),
            watch: Watch::default(),
        }
    }

    /// Holds the cell of `key`, or makes `bio` an inmate of the one that is in the way.
    pub fn detain(&self, key: Key, bio: Box<Bio>, spare: Box<Cell>) -> Detained {
        let shard = self.shard(&key);
        let mut cells = self.lock(shard);
        match cells.overlapping(&key) {
            Some(cell) => {
                cell.inmates.push(bio);
                Detained::Busy(spare)
            }
            None => {
                cells.put(key, spare);
                shard.has_cells.store(true, Ordering::Release);
                Detained::Free(Held(key), bio)
            }
        }
    }

    /// Holds the cell of `key` for nobody in particular, if none is in the way.
    ///
    /// # Errors
    /// The spare cell, if there is.
    pub fn try_hold(&self, key: Key, spare: Box<Cell>) -> Result<Held, Box<Cell>> {
        let shard = self.shard(&key);
        let mut cells = self.lock(shard);
        match cells.overlapping(&key) {
            Some(_) => Err(spare),
            None => {
                cells.put(key, spare);
                shard.has_cells.store(true, Ordering::Release);
                Ok(Held(key))
            }
        }
    }

    /// Gives the blocks up. `visit` sees the inmates, oldest first, before anybody else can hold a block of them; no lock may be taken
    /// in it but that of a deferred set.
    pub fn visit_release(&self, held: Held, visit: impl FnOnce(Inmates)) -> Box<Cell> {
        let key = held.0;
        let shard = self.shard(&key);
        let mut cells = self.lock(shard);
        match cells.take(&key) {
            Some(mut cell) => {
                shard.has_cells.store(cells.count > 0, Ordering::Release);
                visit(Inmates(cell.inmates.take()));
                cell
            }
            // Whoever has the right to it put it there.
            None => Cell::spare(),
        }
    }

    /// Gives the blocks up. Returns the inmates, oldest first.
    pub fn release(&self, held: Held) -> (Box<Cell>, Inmates) {
        let mut inmates = None;
        let cell = self.visit_release(held, |found| inmates = Some(found));
        (cell, inmates.unwrap_or_default())
    }

    /// How many bios wait in cells.
    pub(super) fn count_inmates(&self) -> usize {
        let of_shard = |shard: &Shard| {
            let shard = lock(shard);
            let cells = |list| std::iter::successors(list, |cell: &&Cell| cell.next.as_deref());
            let cells = shard.lists().flat_map(|list| cells(list.as_deref()));
            cells.map(|cell| cell.inmates.len()).sum::<usize>()
        };
        self.shards.iter().map(of_shard).sum()
    }

    /// True if nobody holds a cell. Without others at work: they may take one the moment after.
    pub fn is_quiet(&self) -> bool {
        let is_empty = |shard: &Shard| lock(shard).count == 0;
        self.shards.iter().all(is_empty)
    }
}

/// Bios that waited in a cell.
#[derive(Debug)]
pub struct Inmates(Taken<Bio>);

impl Default for Inmates {
    fn default() -> Self {
        Self(List::default().take())
    }
}

impl Iterator for Inmates {
    type Item = Box<Bio>;

    fn next(&mut self) -> Option<Box<Bio>> {
        self.0.next()
    }
}

fn lock(shard: &Shard) -> MutexGuard<'_, Cells> {
    shard.cells.lock().unwrap_or_else(PoisonError::into_inner)
}

fn overlapping<'a>(list: &'a mut Option<Box<Cell>>, key: &Key) -> Option<&'a mut Box<Cell>> {
    let mut at = list.as_mut();
    while let Some(cell) = at {
        if cell.key.overlaps(key) {
            return Some(cell);
        }
        at = cell.next.as_mut();
    }
    None
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::pool::Op;

    fn bio(id: u64) -> Box<Bio> {
        Box::new(Bio::new(id, Op::Read, 0, 8))
    }

    fn virt(begin: u64, end: u64) -> Key {
        Key::of_virtual(ThinId(1), ThinBlock(begin), ThinBlock(end))
    }

    fn hold(prison: &Prison, key: Key) -> Held {
        prison.try_hold(key, Cell::spare()).expect("it is free")
    }

    #[test]
    fn inmates_come_out_in_order() {
        let prison = Prison::default();
        let held = hold(&prison, virt(5, 6));
        for id in 0..4 {
            let detained = prison.detain(virt(5, 6), bio(id), Cell::spare());
            assert!(matches!(detained, Detained::Busy(_)));
        }
        let (_, inmates) = prison.release(held);
        assert_eq!(inmates.map(|b| b.id).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(prison.is_quiet());
    }

    #[test]
    fn ranges_conflict_where_they_overlap() {
        let prison = Prison::default();
        let held = hold(&prison, virt(10, 20));
        for (begin, end, is_free) in [
            (9, 10, true),
            (20, 21, true),
            (9, 11, false),
            (19, 20, false),
            (0, 1024, false),
            (12, 13, false),
        ] {
            let tried = prison.try_hold(virt(begin, end), Cell::spare());
            assert_eq!(tried.is_ok(), is_free, "{begin}..{end}");
            tried
                .into_iter()
                .for_each(|held| drop(prison.release(held)));
        }
        for key in [
            Key::of_virtual(ThinId(2), ThinBlock(10), ThinBlock(20)),
            Key::of_data(ThinId(1), DataBlock(10), DataBlock(20)),
        ] {
            drop(prison.release(hold(&prison, key)));
        }
        drop(prison.release(held));
    }

    #[test]
    fn ranges_conflict_across_the_runs_of_a_shard() {
        let prison = Prison::default();
        let keys = [
            (1024, 1025),
            (1054, 1057),
            (1055, 1056),
            (1056, 1088),
            (1024, 2048),
            (1087, 1089),
            (2047, 2048),
        ];
        for held in keys {
            let cell = hold(&prison, virt(held.0, held.1));
            for other in keys {
                let is_free = held.1 <= other.0 || other.1 <= held.0;
                let tried = prison.try_hold(virt(other.0, other.1), Cell::spare());
                assert_eq!(tried.is_ok(), is_free, "{held:?} and {other:?}");
                tried
                    .into_iter()
                    .for_each(|held| drop(prison.release(held)));
            }
            drop(prison.release(cell));
        }
        assert!(prison.is_quiet());
    }

    #[test]
    fn a_cell_can_be_taken_from_the_middle_of_a_shard() {
        let prison = Prison::default();
        let mut held: Vec<Held> = (0..8).map(|n| hold(&prison, virt(n, n + 1))).collect();
        for at in [3, 0, 5, 0, 3, 1, 0, 0] {
            drop(prison.release(held.remove(at)));
        }
        assert!(prison.is_quiet());
    }
}

/// Run with `RUSTFLAGS="--cfg loom"`.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::pool::Op;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::thread;

    #[test]
    fn one_works_at_a_time_and_no_inmate_is_forgotten() {
        loom::model(|| {
            let prison = Arc::new(Prison::with_one_shard());
            let inside = Arc::new(AtomicU32::new(0));
            let done = Arc::new(AtomicU32::new(0));
            let work = move |prison: &Prison, inside: &AtomicU32, done: &AtomicU32, id| {
                let key = Key::of_virtual(ThinId(0), ThinBlock(0), ThinBlock(1));
                let bio = Box::new(Bio::new(id, Op::Read, 0, 8));
                if let Detained::Free(held, _) = prison.detain(key, bio, Cell::spare()) {
                    assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                    inside.fetch_sub(1, Ordering::Relaxed);
                    let inmates = prison.release(held).1.count() as u32;
                    done.fetch_add(1 + inmates, Ordering::Relaxed);
                }
            };
            let other = {
                let (prison, inside, done) = (prison.clone(), inside.clone(), done.clone());
                thread::spawn(move || work(&prison, &inside, &done, 1))
            };
            work(&prison, &inside, &done, 2);
            other.join().expect("no panic");
            assert_eq!(done.load(Ordering::Relaxed), 2, "a bio was forgotten");
        });
    }
}
