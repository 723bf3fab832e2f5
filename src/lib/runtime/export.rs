//! What a server of any protocol can serve: exports, their connections, and requests that are answered now or later.

use rustix::io::Errno;
use std::ops::Range;
use std::sync::Arc;

/// Bytes that one request may read or write.
pub const MOST_PAYLOAD: u32 = 32 << 20;

/// What a client asks of an export. Ranges lie within the export; those who submit have seen to that.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes, up to [`MOST_PAYLOAD`].
    Read {
        /// The first byte.
        offset: u64,
        /// Bytes.
        len: usize,
    },
    /// Write bytes.
    Write {
        /// The first byte.
        offset: u64,
        /// What to write, up to [`MOST_PAYLOAD`].
        data: Vec<u8>,
        /// Answered when it is durable.
        fua: bool,
    },
    /// Make durable all writes answered before, on every connection.
    Flush,
    /// Free the space of a range; it may read as anything afterwards.
    Trim {
        /// The first byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Answered when it is durable.
        fua: bool,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// The first byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Answered when it is durable.
        fua: bool,
        /// Space is to be allocated.
        no_hole: bool,
        /// `OPNOTSUPP` at once if it would take as long as writing zeros.
        fast_zero: bool,
    },
    /// A range will be read soon.
    Cache {
        /// The first byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// How a request ended; a read brings its data.
pub type Answer = Result<Vec<u8>, Errno>;

type Tell = Box<dyn FnOnce(Answer) + Send>;

/// Tells how a request ended, once, from any thread. Dropped without an answer it tells `EIO`.
pub struct Replier(Option<Tell>);

impl Replier {
    /// Calls `tell` with the answer.
    pub fn new(tell: impl FnOnce(Answer) + Send + 'static) -> Self {
        Self(Some(Box::new(tell)))
    }

    /// The request ended like this.
    pub fn answer(mut self, answer: Answer) {
        if let Some(tell) = self.0.take() {
            tell(answer);
        }
    }
}

impl Drop for Replier {
    fn drop(&mut self) {
        if let Some(tell) = self.0.take() {
            tell(Err(Errno::IO));
        }
    }
}

/// A run of bytes with the same status in a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, never 0.
    pub len: u64,
    /// What the context says of them.
    pub status: u32,
}

/// A disk that clients can open.
pub trait Export: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;

    /// Writes are refused.
    fn is_read_only(&self) -> bool;

    /// What is flushed on one connection is durable for all of them.
    fn is_multi_conn(&self) -> bool {
        true
    }

    /// The size of requests that suits it best: a power of two from 512 to [`MOST_PAYLOAD`].
    fn preferred_block(&self) -> u32;

    /// Zeros can give space back. If not, they may even take as much as other data.
    fn punches_holes(&self) -> bool {
        true
    }

    /// The contexts in which it knows the status of its bytes, `base:allocation` for example.
    fn contexts(&self) -> Vec<String>;

    /// The status of the bytes of `range` in a context: at most `most` extents from the start of the range, at least one. They may
    /// end before the range does, and never after it.
    ///
    /// # Errors
    /// `INVAL` for a context that it does not have, `IO` where it cannot be found out.
    fn extents(&self, context: &str, range: Range<u64>, most: usize) -> Result<Vec<Extent>, Errno>;

    /// The same in the context `base:allocation`; none if a change of the metadata would have to be waited for.
    fn try_allocation(&self, range: Range<u64>, most: usize) -> Option<Result<Vec<Extent>, Errno>> {
        Some(self.extents("base:allocation", range, most))
    }

    /// True for a context that it has at any time, so that nobody has to look.
    fn always_has(&self, _context: &str) -> bool {
        false
    }

    /// Bytes that have space of their own.
    ///
    /// # Errors
    /// `IO` where it cannot be found out.
    fn allocated(&self) -> Result<u64, Errno>;

    /// Opens it for one client.
    fn connect(self: Arc<Self>) -> Box<dyn Connection>;
}

/// A client's way into an export. Used by one thread at a time.
pub trait Connection: Send {
    /// Carries a request out. It is answered within the call if nothing has to be waited for, otherwise from another thread.
    /// It may be held back until [`start`](Self::start), to be carried out together with others.
    fn submit(&mut self, request: Request, reply: Replier);

    /// What is known without a wait of the bytes of `range`, from its start on, with the statuses of `base:allocation`: what cannot be told
    /// at once counts as allocated, and all of it does where this ends.
    fn holes(&mut self, _range: Range<u64>) -> Vec<Extent> {
        Vec::new()
    }

    /// Starts what was held back. Whoever submits calls this before it waits for anything.
    fn start(&mut self) {}
}

/// The space that exports share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes of a block, up to 2^30.
    pub block_bytes: u32,
    /// Blocks.
    pub blocks: u64,
    /// Blocks that no export has.
    pub free: u64,
    /// As many exports as there can be.
    pub most_exports: u64,
}

/// The exports that a server offers. They may come and go.
pub trait Exports: Send + Sync {
    /// The export of this name; the empty name means the default one.
    fn find(&self, name: &str) -> Option<Arc<dyn Export>>;

    /// The space that they share; 0 where nothing is known of it.
    fn space(&self) -> Space {
        Space {
            block_bytes: 512,
            ..Space::default()
        }
    }

    /// True if something waits, or will, for what may never come, such as space.
    fn waits(&self) -> bool {
        false
    }

    /// Nothing more is asked for: what waits for something that may never come, such as space, fails from now on. For servers that stop, when
    /// what was under way has had its time.
    fn end_waits(&self) {}

    /// The names with their descriptions.
    fn list(&self) -> Vec<(String, String)>;
}

/// Adds `len` bytes of `status` to extents, joined to the last one if that has the same status.
pub(in crate::runtime) fn add_extent(extents: &mut Vec<Extent>, len: u64, status: u32) {
    match extents.last_mut() {
        Some(last) if last.status == status => last.len += len,
        _ if len > 0 => extents.push(Extent { len, status }),
        _ => {}
    }
}
