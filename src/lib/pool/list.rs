//! First in, first out, without ever allocating: what is put in brings its own link.
//!
//! The prison and the deferred sets put things into lists while they hold a lock, which must not wait for memory.

/// Something with a link to the one that was put in before it.
pub(super) trait Linked: Sized {
    fn link(&mut self) -> &mut Option<Box<Self>>;
}

/// The list; its chain is kept newest first.
#[derive(Debug)]
pub(super) struct List<T: Linked> {
    newest: Option<Box<T>>,
    len: usize,
}

impl<T: Linked> Default for List<T> {
    fn default() -> Self {
        Self {
            newest: None,
            len: 0,
        }
    }
}

impl<T: Linked> List<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, mut item: Box<T>) {
        *item.link() = self.newest.take();
        self.newest = Some(item);
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
        Taken { oldest }
    }
}

/// A long chain is not dropped by recursion.
impl<T: Linked> Drop for List<T> {
    fn drop(&mut self) {
        self.take().for_each(drop);
    }
}

/// What was in a list, oldest first.
#[derive(Debug)]
pub(super) struct Taken<T: Linked> {
    oldest: Option<Box<T>>,
}

impl<T: Linked> Iterator for Taken<T> {
    type Item = Box<T>;

    fn next(&mut self) -> Option<Box<T>> {
        let mut item = self.oldest.take()?;
        self.oldest = item.link().take();
        Some(item)
    }
}

impl<T: Linked> Drop for Taken<T> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_long_list_is_dropped_without_recursion() {
        let mut list = List::default();
        (0..1_000_000).for_each(|n| list.push(Box::new(Item(n, None))));
        drop(list);
        let mut list = List::default();
        (0..1_000_000).for_each(|n| list.push(Box::new(Item(n, None))));
        drop(list.take());
    }
}
