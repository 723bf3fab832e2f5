//! Where cells come from: everything that an operation may need is reserved before it starts.
//!
//! Whoever starts an operation has two cells in hand, for the virtual and the data block. If somebody else has to finish it, the
//! cells go along. So nobody waits for a cell while holding one, and a pool of two is enough for everything to go on, one operation
//! at a time.

use super::prison::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};

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

    pub(super) fn give(&self, cell: Box<Cell>) {
        let mut stock = self.stock();
        match stock.surplus {
            0 => stock.free.push(cell),
            _ => stock.surplus -= 1,
        }
    }
}
