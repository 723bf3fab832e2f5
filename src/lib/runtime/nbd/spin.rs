//! A short spin before a wait, as long as it pays: a client that waits for each reply has its next request soon, and to sleep and be
//! woken takes longer than that.

use std::time::{Duration, Instant};

/// For so long at most. A client that needs longer is slept for.
const MOST: Duration = Duration::from_micros(20);
/// What a spin in vain costs, in spins that paid.
const IN_VAIN: u32 = 4;
/// Spins that paid, which are remembered.
const MOST_CREDIT: u32 = 16;
/// Waits without a spin once the credit is used up.
const REST: u32 = 1000;

/// Whether it pays to spin on one connection.
pub(super) struct Spin {
    credit: u32,
    /// Waits that are left until it is tried again.
    rest: u32,
}

impl Spin {
    pub(super) fn new() -> Self {
        Self {
            credit: IN_VAIN,
            rest: 0,
        }
    }

    /// Spins until it is ready, if that is likely to be soon.
    pub(super) fn wait(&mut self, is_ready: impl Fn() -> bool) {
        if self.rest > 0 {
            self.rest -= 1;
            return;
        }
        let begin = Instant::now();
        let mut has_paid = is_ready();
        while !has_paid && begin.elapsed() < MOST {
            std::hint::spin_loop();
            has_paid = is_ready();
        }
        if has_paid {
            self.credit = (self.credit + 1).min(MOST_CREDIT);
        } else if self.credit >= IN_VAIN {
            self.credit -= IN_VAIN;
        } else {
            (self.credit, self.rest) = (IN_VAIN, REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn it_rests_when_it_does_not_pay_and_is_tried_again() {
        let mut spin = Spin::new();
        let looks = Cell::new(0);
        let in_vain = || {
            looks.set(looks.get() + 1);
            false
        };
        for _ in 0..2 {
            spin.wait(in_vain);
        }
        let before = looks.replace(0);
        assert!(before >= 2);
        for _ in 0..REST {
            spin.wait(in_vain);
        }
        assert_eq!(looks.get(), 0, "it rests");
        spin.wait(in_vain);
        assert!(looks.get() > 0, "it is tried again");
        for _ in 0..1000 {
            spin.wait(|| true);
        }
        assert_eq!((spin.credit, spin.rest), (MOST_CREDIT, 0));
    }
}
