//! Between a pool and its two devices: every request passes here first.
//!
//! With the feature `devtools` somebody may stand here, who sees what goes to the devices or spoils it ([`Interceptor`]). Without it
//! nothing is left of this: a [`Seam`] has no size, and passing it cannot fail.

#[cfg(feature = "devtools")]
use crate::io::BlockEngine;
#[cfg(feature = "devtools")]
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::io;
#[cfg(feature = "devtools")]
use std::sync::Arc;

/// One of the devices of a pool.
#[cfg(feature = "devtools")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolDevice {
    /// Has the superblock, the trees and the space maps.
    Metadata,
    /// Has the blocks of the thin devices.
    Data,
}

/// What is about to be done to a device. All numbers are bytes.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(feature = "devtools"),
    expect(dead_code, unreachable_pub, reason = "nobody stands here who reads it")
)]
pub enum DeviceRequest<'a> {
    /// Reading `len` bytes from `byte` on.
    Read {
        /// The first byte.
        byte: u64,
        /// How many.
        len: u64,
    },
    /// Writing.
    Write {
        /// The first byte.
        byte: u64,
        /// What is written.
        data: &'a [u8],
        /// Durable when it ends, without a flush.
        is_durable: bool,
    },
    /// Making it read as zeros.
    Zero {
        /// The first byte.
        byte: u64,
        /// How many.
        len: u64,
    },
    /// Giving room back; what is there afterwards is undefined, in practice zeros.
    Discard {
        /// The first byte.
        byte: u64,
        /// How many.
        len: u64,
    },
    /// Making durable what was written before.
    Flush,
}

/// Stands between a pool and its devices.
#[cfg(feature = "devtools")]
pub trait Interceptor: Send + Sync + std::fmt::Debug {
    /// A request is about to be carried out, from any thread. It goes on under the number that is returned.
    ///
    /// # Errors
    /// Whatever the request is to fail with; nothing of it is done then.
    fn begin(&self, device: PoolDevice, request: &DeviceRequest<'_>) -> io::Result<u64>;

    /// What went on under this number is over, whether it succeeded or not.
    fn end(&self, number: u64);
}

/// Where the requests to one device pass.
#[derive(Debug, Default)]
pub(super) struct Seam {
    #[cfg(feature = "devtools")]
    interceptor: Option<(PoolDevice, Arc<dyn Interceptor>)>,
}

/// Kept while a request is carried out.
pub(super) struct Passage<'a> {
    #[cfg(feature = "devtools")]
    number: Option<(u64, &'a dyn Interceptor)>,
    #[cfg(not(feature = "devtools"))]
    _of: std::marker::PhantomData<&'a Seam>,
}

#[cfg(not(feature = "devtools"))]
impl Seam {
    /// True if somebody has to see every request.
    pub(super) fn is_watched(&self) -> bool {
        false
    }

    /// Lets a request pass.
    pub(super) fn pass(&self, _: DeviceRequest<'_>) -> io::Result<Passage<'_>> {
        let _of = std::marker::PhantomData;
        Ok(Passage { _of })
    }
}

#[cfg(feature = "devtools")]
impl Seam {
    /// True if somebody has to see every request.
    pub(super) fn is_watched(&self) -> bool {
        self.interceptor.is_some()
    }

    /// With whoever stands there.
    pub(super) fn new(device: PoolDevice, interceptor: Option<&Arc<dyn Interceptor>>) -> Self {
        Self {
            interceptor: interceptor.map(|interceptor| (device, Arc::clone(interceptor))),
        }
    }

    /// Lets a request pass, unless it is to fail.
    pub(super) fn pass(&self, request: DeviceRequest<'_>) -> io::Result<Passage<'_>> {
        let number = match &self.interceptor {
            Some((device, interceptor)) => {
                Some((interceptor.begin(*device, &request)?, &**interceptor))
            }
            None => None,
        };
        Ok(Passage { number })
    }
}

#[cfg(feature = "devtools")]
impl Drop for Passage<'_> {
    fn drop(&mut self) {
        if let Some((number, interceptor)) = self.number {
            interceptor.end(number);
        }
    }
}

/// An engine whose requests pass a seam.
#[cfg(feature = "devtools")]
pub(super) struct PassedEngine {
    pub(super) engine: Arc<dyn BlockEngine>,
    pub(super) seam: Seam,
}

#[cfg(feature = "devtools")]
impl BlockEngine for PassedEngine {
    fn nr_blocks(&self) -> u64 {
        self.engine.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        let _passage = self.seam.pass(DeviceRequest::Read {
            byte: start.0.saturating_mul(BLOCK_SIZE as u64),
            len: buf.len() as u64,
        })?;
        self.engine.read(start, buf)
    }

    fn write(&self, start: MetadataBlock, buf: &[u8]) -> io::Result<()> {
        let _passage = self.seam.pass(DeviceRequest::Write {
            byte: start.0.saturating_mul(BLOCK_SIZE as u64),
            data: buf,
            is_durable: false,
        })?;
        self.engine.write(start, buf)
    }

    fn sync(&self) -> io::Result<()> {
        let _passage = self.seam.pass(DeviceRequest::Flush)?;
        self.engine.sync()
    }

    fn depth(&self) -> usize {
        self.engine.depth()
    }
}
