//! Wakes that are put off: whoever ends many requests in a row wakes a sleeper once, and a connection sends many replies in one call.

use std::cell::RefCell;
use std::sync::Arc;

/// Sleeps until there is something for it to do.
pub(super) trait Sleeper: Send + Sync {
    /// It has something to do.
    fn wake(&self);
}

thread_local! {
    /// Who is to be woken, while this thread gathers.
    static PUT_OFF: RefCell<Option<Vec<Arc<dyn Sleeper>>>> = const { RefCell::new(None) };
}

/// Puts off the wakes of this thread until `end_all` has returned. It must not wait for anybody.
pub(super) fn gather<T>(end_all: impl FnOnce() -> T) -> T {
    let outer = PUT_OFF.replace(Some(Vec::new()));
    let ended = end_all();
    let sleepers = PUT_OFF.replace(outer);
    sleepers.into_iter().flatten().for_each(|s| s.wake());
    ended
}

/// Wakes a sleeper, now or when this thread has gathered. It is told once: whoever asks sees to that.
pub(super) fn wake(sleeper: Arc<dyn Sleeper>) {
    let now = PUT_OFF.with_borrow_mut(|put_off| match put_off {
        Some(sleepers) => {
            sleepers.push(sleeper);
            None
        }
        None => Some(sleeper),
    });
    if let Some(sleeper) = now {
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
        wake(woken.clone());
        assert_eq!(times(), 1);
        gather(|| {
            wake(woken.clone());
            gather(|| wake(woken.clone()));
            assert_eq!(times(), 2, "the inner one is over");
        });
        assert_eq!(times(), 3);
    }
}
