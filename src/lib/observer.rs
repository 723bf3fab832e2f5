//! Where long work reports how far it is, and asks whether it should stop.

use crate::error::{Error, ErrorKind, Result};

/// Receives progress and warnings of long work. All methods may be called from several threads at once.
pub trait Observer: Sync {
    /// `done` of `total` units of `phase` are finished; the unit is the phase's own.
    fn progress(&self, _phase: &'static str, _done: u64, _total: u64) {}

    /// Something the user should know that does not end the work.
    fn warning(&self, _message: &str) {}

    /// True once the user wants the work to end early.
    fn is_cancelled(&self) -> bool {
        false
    }

    /// An [`ErrorKind::Interrupted`] error once the user wants the work to end.
    fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(ErrorKind::Interrupted, "interrupted"));
        }
        Ok(())
    }
}

/// An observer that looks away.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
