//! First in, first out, without ever allocating: what is put in brings its own link.
//!
//! The prison and the deferred sets put things into lists while they hold a lock, which must not wait for memory.

use std::mem::{ManuallyDrop, swap};

/// Something with a link to the one that was put in before it.
pub(super) trait Linked: Sized {
    fn link(&mut self) -> &mut Option<Box<Self>>;
}

/// The list; its chain is kept newest first.
#[derive(Debug)]
pub(super) struct List<T: Linked> {
    newest: Chain<T>,
    len: usize,
}

/// Its owner drops it item by item, for recursion could run out of stack in a long one; the compiler need not drop it once more.
type Chain<T> = ManuallyDrop<Option<Box<T>>>;

impl<T: Linked> Default for List<T> {
    fn default() -> Self {
        Self {
            newest: Chain::default(),
            len: 0,
        }
    }
}

impl<T: Linked> List<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, mut item: Box<T>) {
        debug_assert!(item.link().is_none(), "it is in a list");
        swap(item.link(), &mut self.newest);
        self.newest = Chain::new(Some(item));
        self.len += 1;
    }

    /// Takes everything out, oldest first.
    pub(super) fn take(&mut self) -> Taken<T> {
        let mut oldest = None;
        let mut rest = self.newest.take();
        self.len = 0;
        while let Some(mut item) = rest {
            rest = std::mem::replace(item.link(), oldest);
            oldest = Some(item);
        }
        Taken {
            oldest: Chain::new(oldest),
        }
    }
}

impl<T: Linked> Drop for List<T> {
    #[inline]
    fn drop(&mut self) {
        self.take().for_each(drop);
    }
}

/// What was in a list, oldest first.
#[derive(Debug)]
pub(super) struct Taken<T: Linked> {
    oldest: Chain<T>,
}

impl<T: Linked> Iterator for Taken<T> {
    type Item = Box<T>;

    fn next(&mut self) -> Option<Box<T>> {
        let mut item = self.oldest.take()?;
        swap(item.link(), &mut self.oldest);
        Some(item)
    }
}

impl<T: Linked> Drop for Taken<T> {
    #[inline]
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    struct Item(u32, Option<Box<Item>>);

    impl Linked for Item {
        fn link(&mut self) -> &mut Option<Box<Self>> {
            &mut self.1
        }
    }

    #[test]
    fn comes_out_as_it_went_in() {
        let mut list = List::default();
        (0..5).for_each(|n| list.push(Box::new(Item(n, None))));
        assert_eq!(
            list.take().map(|i| i.0).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4]
        );
        assert_eq!(list.take().count(), 0);
    }

    #[test]
    fn all_of_a_long_list_is_dropped_without_recursion() {
        struct Counted(#[expect(dead_code)] Rc<()>, Option<Box<Counted>>);
        impl Linked for Counted {
            fn link(&mut self) -> &mut Option<Box<Self>> {
                &mut self.1
            }
        }
        let count = Rc::new(());
        let fill = |list: &mut List<_>| {
            (0..1_000_000).for_each(|_| list.push(Box::new(Counted(Rc::clone(&count), None))));
        };
        let mut list = List::default();
        fill(&mut list);
        assert_eq!(Rc::strong_count(&count), 1_000_001);
        drop(list);
        assert_eq!(Rc::strong_count(&count), 1);
        let mut list = List::default();
        fill(&mut list);
        let mut taken = list.take();
        assert!(taken.next().is_some());
        drop(taken);
        assert_eq!(Rc::strong_count(&count), 1);
    }
}
