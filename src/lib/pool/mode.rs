//! What a pool may do, from everything to nothing.

use crate::thin::PoolStatus;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// The modes, in the order of degradation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PoolMode {
    /// Everything.
    Write,
    /// No data block is left: what needs one waits, or fails.
    OutOfDataSpace,
    /// No metadata block is left: the metadata does not change until its device has grown.
    OutOfMetadataSpace,
    /// The metadata does not change.
    ReadOnly,
    /// Nothing.
    Fail,
}

impl PoolMode {
    const ALL: [Self; 5] = [
        Self::Write,
        Self::OutOfDataSpace,
        Self::OutOfMetadataSpace,
        Self::ReadOnly,
        Self::Fail,
    ];

    /// The mode in which a pool whose table does not say `read_only` comes up.
    pub fn at_start(status: &PoolStatus) -> Self {
        match status.needs_check {
            true => Self::ReadOnly,
            false if status.used_metadata_blocks >= status.metadata_blocks => {
                Self::OutOfMetadataSpace
            }
            false => Self::Write,
        }
    }

    /// True if the metadata may be changed.
    pub fn is_writable(self) -> bool {
        self < Self::OutOfMetadataSpace
    }
}

/// As the status line says it.
impl fmt::Display for PoolMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "rw",
            Self::OutOfDataSpace => "out_of_data_space",
            Self::OutOfMetadataSpace | Self::ReadOnly => "ro",
            Self::Fail => "Fail",
        })
    }
}

/// The mode, for all to see and for one to set.
#[derive(Debug)]
pub(super) struct AtomicMode(AtomicU8);

impl AtomicMode {
    pub(super) fn new(mode: PoolMode) -> Self {
        Self(AtomicU8::new(mode as u8))
    }

    pub(super) fn get(&self) -> PoolMode {
        PoolMode::ALL[usize::from(self.0.load(Ordering::Acquire))]
    }

    pub(super) fn set(&self, mode: PoolMode) {
        self.0.store(mode as u8, Ordering::Release);
    }
}
