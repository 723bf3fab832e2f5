//! Wakes that are put off: whoever ends many requests in a row wakes a sleeper once, and a connection sends many replies in one call.

use std::cell::RefCell;
use std::sync::Arc;

/// Sleeps until there is something for it to do.
pub(super) trait Sleeper: Send + Sync {
    /// It has something to do. Told more often than is needed, it does no harm.
    fn wake(&self);
}

thread_local! {
    /// Who is to be woken, while this thread gathers.
    static PUT_OFF: RefCell<Option<Vec<Arc<dyn Sleeper>>>> = const { RefCell::new(None) };
}

/// Puts off the wakes of this thread until `end_all` has returned.
pub(super) fn gather<T>(end_all: impl FnOnce() -> T) -> T {
    let outer = PUT_OFF.replace(Some(Vec::new()));
    let ended = end_all();
    let sleepers = PUT_OFF.replace(outer);
    sleepers.into_iter().flatten().for_each(|s| s.wake());
    ended
}

/// Wakes a sleeper: now, or once when this thread has gathered.
pub(super) fn wake<S: Sleeper + 'static>(sleeper: &Arc<S>) {
    let is_put_off = PUT_OFF.with_borrow_mut(|put_off| {
        let Some(sleepers) = put_off else {
            return false;
        };
        let own = Arc::as_ptr(sleeper).cast::<()>();
        if !sleepers.iter().any(|s| Arc::as_ptr(s).cast::<()>() == own) {
            sleepers.push(Arc::clone(sleeper) as Arc<dyn Sleeper>);
        }
        true
    });
    if !is_put_off {
        sleeper.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    impl Sleeper for AtomicUsize {
        fn wake(&self) {
            self.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn sleepers_are_woken_at_once_or_when_all_is_gathered() {
        let woken = Arc::new(AtomicUsize::new(0));
        let times = || woken.load(Ordering::Relaxed);
        wake(&woken);
        assert_eq!(times(), 1);
        gather(|| {
            (0..3).for_each(|_| wake(&woken));
            gather(|| wake(&woken));
            assert_eq!(times(), 2, "the inner one is over");
        });
        assert_eq!(times(), 3, "once for all");
    }
}
