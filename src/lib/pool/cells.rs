//! Where cells come from: everything that an operation may need is reserved before it starts.
//!
//! Whoever starts an operation has two cells in hand, for the virtual and the data block. If somebody else has to finish it, the
//! cells go along. So nobody waits for a cell while holding one, and a pool of two is enough for everything to go on, one operation
//! at a time.
//!
//! In 2013 it was otherwise: a cell was taken from the one pool when it was needed, also while another one was held. That order can be
//! had as an experiment ([`AllocationOrder::OneByOne`]): when every cell is held by somebody who waits for another one, that is told
//! instead of waiting for ever.

use super::bio::Bio;
use super::prison::{Cell, Held, Key};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// When the cells of an operation are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AllocationOrder {
    /// Both before it starts.
    #[default]
    Reserved,
    /// Each when it is needed, from one pool for all: as in 2013. Only [`Settings::cells`](super::Settings) are there.
    OneByOne,
}

/// A bio whose virtual block is held, and which waits for a cell to hold its data block with.
#[derive(Debug)]
pub(super) struct Starved {
    pub(super) bio: Box<Bio>,
    pub(super) held: Held,
    pub(super) wanted: Key,
}

/// Somebody who holds a cell and waits for another one, which only others who wait could give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// The bio.
    pub bio: u64,
    /// What it holds.
    pub holds: Key,
    /// What it needs a cell for.
    pub wants: Key,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "bio {} holds {} and waits for a cell for {}",
            self.bio, self.holds, self.wants
        )
    }
}

impl Starved {
    pub(super) fn wait(&self) -> Wait {
        Wait {
            bio: self.bio.id,
            holds: self.held.key(),
            wants: self.wanted,
        }
    }
}

/// A bounded number of cells.
#[derive(Debug)]
pub(super) struct CellPool(Mutex<Stock>);

#[derive(Debug)]
struct Stock {
    // The order of boxes is of no interest, that they are never allocated here is.
    #[allow(clippy::vec_box)]
    free: Vec<Box<Cell>>,
    total: usize,
    /// Cells that are to be dropped when they come back.
    surplus: usize,
}

impl CellPool {
    pub(super) fn new(cells: usize) -> Self {
        Self(Mutex::new(Stock {
            free: (0..cells).map(|_| Cell::spare()).collect(),
            total: cells,
            surplus: 0,
        }))
    }

    fn stock(&self) -> MutexGuard<'_, Stock> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for two more that somebody brings.
    pub(super) fn grow(&self) {
        let mut stock = self.stock();
        stock.total += 2;
        let missing = stock.total - stock.free.len();
        stock.free.reserve(missing);
    }

    /// The opposite of [`grow`](Self::grow), with those that are at hand.
    pub(super) fn shrink(&self, cells: Option<[Box<Cell>; 2]>) {
        let mut stock = self.stock();
        stock.total -= 2;
        if cells.is_none() {
            stock.surplus += 2;
            while stock.surplus > 0 && stock.free.pop().is_some() {
                stock.surplus -= 1;
            }
        }
    }

    #[inline(never)]
    pub(super) fn take(&self) -> Option<Box<Cell>> {
        self.stock().free.pop()
    }

    /// Two or none.
    pub(super) fn take_two(&self) -> Option<[Box<Cell>; 2]> {
        let free = &mut self.stock().free;
        if free.len() < 2 {
            return None;
        }
        Some([free.pop()?, free.pop()?])
    }

    /// How many nobody has.
    pub(super) fn free(&self) -> usize {
        self.stock().free.len()
    }

    /// How many there are, whoever has them.
    pub(super) fn total(&self) -> usize {
        self.stock().total
    }

    /// One more than there are; it is dropped when it comes back.
    pub(super) fn lend(&self) -> Box<Cell> {
        self.stock().surplus += 1;
        Cell::spare()
    }

    pub(super) fn give(&self, cell: Box<Cell>) {
        let mut stock = self.stock();
        match stock.surplus {
            0 => stock.free.push(cell),
            _ => stock.surplus -= 1,
        }
    }
}
