//! A thin device that is open: its number in the pool, and what I/O to it needs to know.

use crate::thin::OpenThin;
use crate::units::ThinId;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An open thin device. Two of them may have the same id.
#[derive(Debug)]
pub struct Thin {
    pub(super) number: u32,
    pub(super) metadata: Arc<OpenThin>,
    /// Sectors of the read-only device that has what was never written.
    pub(super) origin_sectors: Option<u64>,
    /// No new bio may be issued: the device is about to be snapshotted.
    is_gated: AtomicBool,
}

impl Thin {
    pub(super) fn new(number: u32, metadata: Arc<OpenThin>, origin_sectors: Option<u64>) -> Self {
        Self {
            number,
            metadata,
            origin_sectors,
            is_gated: AtomicBool::new(false),
        }
    }

    /// Its id in the pool.
    pub fn id(&self) -> ThinId {
        self.metadata.id()
    }

    /// Tells apart devices of the same id that are open.
    pub fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn is_gated(&self) -> bool {
        self.is_gated.load(Ordering::SeqCst)
    }

    pub(super) fn gate(&self, is_gated: bool) {
        self.is_gated.store(is_gated, Ordering::Release);
    }
}
