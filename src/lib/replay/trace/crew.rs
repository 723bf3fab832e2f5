//! Threads that read parts of a trace before anybody needs them.

use std::num::NonZero;
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::error::{Error, ErrorKind, Result};

/// Threads that do the same work on whatever they are given: with whoever waits for it, who helps, as many as there are processors. They
/// end when the crew is gone, but one that waits for its input ends with the process at the latest: a read cannot be broken off.
pub(super) struct Crew<T> {
    to: Sender<T>,
    given: Arc<Mutex<Receiver<T>>>,
    work: fn(&mut T),
    /// Nothing comes of what a thread panicked over.
    from: Receiver<Option<T>>,
}

impl<T: Send + 'static> Crew<T> {
    /// A crew for so many parts. None where it would be no gain, with one processor, or where no thread can be started.
    pub(super) fn new(parts: usize, work: fn(&mut T)) -> Option<Self> {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let (to, given) = channel();
        let (done, from) = channel();
        let given = Arc::new(Mutex::new(given));
        let mut started = 0;
        for _ in 1..processors.min(parts + 1) {
            let (given, done) = (Arc::clone(&given), done.clone());
            let thread = thread::Builder::new().name("read".into());
            started += u32::from(thread.spawn(move || run(&given, &done, work)).is_ok());
        }
        (started > 0).then_some(Self {
            to,
            given,
            work,
            from,
        })
    }

    /// Gives the crew something to do.
    pub(super) fn give(&self, part: T) {
        // There is somebody who takes it: it is here.
        let _ = self.to.send(part);
    }

    /// Something that is done, whichever it is; does something itself rather than wait.
    ///
    /// # Errors
    /// `Io` if a thread panicked.
    pub(super) fn take(&self) -> Result<T> {
        let mut done = self.from.try_recv().ok();
        if done.is_none() {
            // Whoever holds it waits for something to do.
            let given = self.given.try_lock();
            let part = given.ok().and_then(|given| given.try_recv().ok());
            done = match part {
                Some(part) => Some(after(self.work, part)),
                None => self.from.recv().ok(),
            };
        }
        let done = done.flatten();
        done.ok_or_else(|| Error::new(ErrorKind::Io, "a thread that read the trace panicked"))
    }
}

/// The part after the work on it; none if that panicked.
fn after<T>(work: fn(&mut T), mut part: T) -> Option<T> {
    // What is half done is gone afterwards.
    let worked = panic::catch_unwind(AssertUnwindSafe(|| work(&mut part)));
    worked.is_ok().then_some(part)
}

fn run<T>(given: &Mutex<Receiver<T>>, done: &Sender<Option<T>>, work: fn(&mut T)) {
    loop {
        let part = given.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(part) = part else { return };
        if done.send(after(work, part)).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_given_is_done_and_a_panic_is_an_error() {
        let work = |part: &mut u32| *part = 100_u32.checked_div(*part).expect("no zero");
        let Some(crew) = Crew::new(3, work) else {
            return;
        };
        (1..=50).for_each(|part| crew.give(part));
        let mut done: Vec<u32> = (1..=50).map(|_| crew.take().expect("a part")).collect();
        done.sort_unstable();
        let mut expected: Vec<u32> = (1..=50).map(|part| 100 / part).collect();
        expected.sort_unstable();
        assert_eq!(done, expected);
        crew.give(0);
        assert!(crew.take().is_err());
    }
}
