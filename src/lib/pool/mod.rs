//! The thin pool itself, as drivers/md/dm-thin.c does it.
//!
//! Two halves. [`Mapper`] decides on the submitter's thread where a bio goes, and leaves what it cannot decide to [`Worker`], the
//! single owner of all that changes. The worker does no I/O on data: it is told [`Event`]s and answers with [`Effect`]s, so that
//! replay, runtime and tests drive the same code, and a run repeats from its seed. [`Pool`] is what the two share.

mod bio;
mod block_size;
mod cells;
mod contention;
mod deferred_set;
mod effect;
mod line;
mod list;
mod map;
mod message;
mod mode;
#[expect(clippy::module_inception, reason = "the pool of the pool engine")]
mod pool;
mod prison;
mod status;
mod table;
mod thin;
mod worker;

pub use bio::{Bio, BioError, BioResult, DISCARD_BLOCKS, Op, pieces};
pub(crate) use block_size::BlockSize;
pub use cells::{AllocationOrder, Wait};
pub use contention::LockCounts;
pub use effect::{Effect, Event, Notice, Source};
pub use line::{Line, Words};
pub use map::{Left, MapCounts, Mapped, Mapper, Passage, Passed, Reason};
pub use message::Message;
pub use mode::PoolMode;
pub use pool::Pool;
pub use prison::{Cell, Detained, Held, Inmates, Key, Prison};
pub use status::{Discards, PoolState, PoolStatusLine, ThinStatus};
pub use table::{Features, PoolTable, ThinTable};
pub use thin::Thin;
pub use worker::{CommitCounts, JobId, Settings, Worker, WorkerCounts};
