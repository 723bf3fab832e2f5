//! What the worker wants done, and what it is told. It does no I/O on data and knows no clock: a driver executes its effects.

use super::bio::{Bio, BioResult};
use super::message::Message;
use super::mode::PoolMode;
use super::table::PoolTable;
use super::worker::JobId;
use crate::error::Result;

/// Where a copy reads from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The data device.
    Data,
    /// The external origin of the open thin device of this number.
    Origin(u32),
}

/// Something to be done. All sectors are of 512 bytes.
#[derive(Debug)]
pub enum Effect {
    /// Issue the bio at `sector` of the data device, then [`Pool::end_io`](super::Pool::end_io). A flush bio flushes the device; a
    /// write that is FUA is to be durable when it ends.
    Issue {
        /// The bio.
        bio: Box<Bio>,
        /// Sector of the data device.
        sector: u64,
    },
    /// Fill the bio from its device's external origin, at its own sector, then [`Pool::end_io`](super::Pool::end_io).
    ReadOrigin {
        /// The bio.
        bio: Box<Bio>,
        /// How much the origin has; what is behind it is zeros.
        sectors: u64,
    },
    /// The bio is done: tell its submitter.
    End {
        /// The bio.
        bio: Box<Bio>,
        /// How it went.
        result: BioResult,
        /// A read of what was never written: zeros.
        is_zero: bool,
    },
    /// Write zeros to the data device, then [`Event::Done`].
    Zero {
        /// To be told.
        job: JobId,
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// Copy to the data device, then [`Event::Done`].
    Copy {
        /// To be told.
        job: JobId,
        /// Where from.
        from: Source,
        /// First sector there.
        from_sector: u64,
        /// First sector of the data device.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// Discard sectors of the data device, then [`Event::Done`]. Errors are of no interest.
    Discard {
        /// To be told.
        job: JobId,
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// Flush the data device, then [`Event::Done`]. Until then the worker does nothing.
    Flush {
        /// To be told.
        job: JobId,
    },
    /// The answer to a request.
    Answer {
        /// The number that the request came with.
        tag: u64,
        /// How it went.
        result: Result<()>,
    },
    /// Something that whoever manages the pool wants to know.
    Notice(Notice),
}

/// What raises the event number of the pool's device in the kernel.
#[derive(Debug)]
pub enum Notice {
    /// The pool is in another mode.
    Mode(PoolMode),
    /// Free data blocks have come down to the low-water mark; told once until the pool is resumed.
    LowWater,
    /// Free metadata blocks have come down to the threshold.
    MetadataThreshold,
    /// Every cell is held by somebody who waits for another one ([`AllocationOrder::OneByOne`](super::AllocationOrder)). One more cell
    /// was lent, so that it goes on.
    Deadlock(Vec<super::Wait>),
    /// The policy has changed by itself: what waited for space long enough fails.
    NoSpaceTimeout,
    /// An operation on the metadata failed, and what was not committed is lost.
    MetadataFailed(crate::error::Error),
}

/// Something that the worker is told.
#[derive(Debug)]
pub enum Event {
    /// Look around: the time has come ([`Worker::deadline`](super::Worker::deadline)), or somebody woke it.
    Work,
    /// An effect was carried out.
    Done {
        /// Whose effect it was.
        job: JobId,
        /// How it went.
        result: BioResult,
    },
    /// A message to the pool.
    Message {
        /// To be answered with.
        tag: u64,
        /// The message.
        message: Message,
    },
    /// Commit, as the status line without `--noflush` does.
    Commit {
        /// To be answered with.
        tag: u64,
    },
    /// Accept no more bios, finish those that were accepted, and commit.
    Suspend {
        /// To be answered with.
        tag: u64,
        /// Give the bios back instead, where they can be ([`BioError::Requeue`](super::BioError::Requeue)).
        is_noflush: bool,
    },
    /// Go on, with another table if there is one; grows the metadata and the data to the sizes that their devices have now.
    Resume {
        /// To be answered with.
        tag: u64,
        /// Another table.
        table: Option<PoolTable>,
        /// Blocks of the data device.
        data_blocks: u64,
    },
}
