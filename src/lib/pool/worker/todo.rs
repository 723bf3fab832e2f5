//! Bios that the worker has to look at, in the order in which it does: those that hold a cell come first, then by device and sector.
//!
//! A tree, since a worker that is behind has many of them and gets a few more again and again; one that is not has one at a time.

use crate::pool::bio::Bio;
use std::collections::BTreeMap;

/// Without a cell, device, sector; what is alike is in the order of its numbers.
type Place = (bool, u32, u64, i64);

/// The bios.
#[derive(Debug, Default)]
pub(super) struct Todo {
    /// If there is one only.
    alone: Option<(Place, Box<Bio>)>,
    bios: BTreeMap<Place, Box<Bio>>,
    first: i64,
    last: i64,
}

impl Todo {
    fn place(bio: &Bio, number: i64) -> Place {
        (bio.reserved.is_none(), bio.thin, bio.sector, number)
    }

    pub(super) fn len(&self) -> usize {
        usize::from(self.alone.is_some()) + self.bios.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next.
    pub(super) fn pop(&mut self) -> Option<Box<Bio>> {
        let next = self.alone.take().or_else(|| self.bios.pop_first());
        next.map(|(_, bio)| bio)
    }

    /// The next, if it is one that is wanted.
    pub(super) fn pop_if(&mut self, is_wanted: impl FnOnce(&Bio) -> bool) -> Option<Box<Bio>> {
        let next = match &self.alone {
            Some((_, bio)) => bio,
            None => self.bios.first_key_value()?.1,
        };
        is_wanted(next).then(|| self.pop()).flatten()
    }

    /// Behind those that are like it.
    pub(super) fn push(&mut self, bio: Box<Bio>) {
        self.last += 1;
        self.add(self.last, bio);
    }

    /// Puts one back, in front of those that are like it.
    pub(super) fn put_back(&mut self, bio: Box<Bio>) {
        self.first -= 1;
        self.add(self.first, bio);
    }

    fn add(&mut self, number: i64, bio: Box<Bio>) {
        let one = (Self::place(&bio, number), bio);
        match self.is_empty() {
            true => self.alone = Some(one),
            false => self.bios.extend(self.alone.take().into_iter().chain([one])),
        }
    }

    /// Takes all of them.
    pub(super) fn take(&mut self) -> impl Iterator<Item = Box<Bio>> + use<> {
        self.bios.extend(self.alone.take());
        std::mem::take(&mut self.bios).into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Op;

    #[test]
    fn bios_come_by_device_and_sector_and_then_as_they_came() {
        let mut todo = Todo::default();
        for (id, (thin, sector)) in [(1, 8), (0, 16), (1, 0), (0, 16), (1, 8)]
            .into_iter()
            .enumerate()
        {
            let mut bio = Box::new(Bio::new(id as u64, Op::Read, sector, 8));
            bio.thin = thin;
            todo.push(bio);
        }
        let first = todo.pop().expect("there are five");
        assert_eq!(first.id, 1);
        todo.put_back(first);
        assert_eq!(todo.len(), 5);
        let order: Vec<u64> = std::iter::from_fn(|| todo.pop())
            .map(|bio| bio.id)
            .collect();
        assert_eq!(order, [1, 3, 2, 0, 4]);
        assert!(todo.is_empty());
        // One is alone, and is not any more.
        let bio = |id, sector| Box::new(Bio::new(id, Op::Read, sector, 8));
        todo.push(bio(5, 8));
        assert_eq!((todo.len(), todo.is_empty()), (1, false));
        assert!(todo.pop_if(|bio| bio.id != 5).is_none());
        todo.push(bio(6, 0));
        assert_eq!(todo.len(), 2);
        assert_eq!(todo.pop_if(|bio| bio.id == 6).map(|bio| bio.id), Some(6));
        assert_eq!(todo.take().map(|bio| bio.id).collect::<Vec<_>>(), [5]);
        todo.put_back(bio(7, 0));
        assert_eq!(todo.take().map(|bio| bio.id).collect::<Vec<_>>(), [7]);
        assert!(todo.is_empty());
    }
}
