//! How long the data device takes, in virtual time.

use crate::pool::Op;
use std::time::Duration;

/// The modelled device: a time for each request and one for each 4 KiB of it. Requests do not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeviceModel {
    /// A read.
    pub read: Duration,
    /// A write.
    pub write: Duration,
    /// A flush.
    pub flush: Duration,
    /// A discard, of any size.
    pub discard: Duration,
    /// Beside that, each 4 KiB that is read, written, zeroed or copied.
    pub each_4k: Duration,
}

/// A solid-state disk of the usual kind.
impl Default for DeviceModel {
    fn default() -> Self {
        Self {
            read: Duration::from_micros(80),
            write: Duration::from_micros(20),
            flush: Duration::from_micros(500),
            discard: Duration::from_micros(50),
            each_4k: Duration::from_micros(1),
        }
    }
}

impl DeviceModel {
    /// Whatever it is asked for is done at once.
    pub const NULL: Self = Self {
        read: Duration::ZERO,
        write: Duration::ZERO,
        flush: Duration::ZERO,
        discard: Duration::ZERO,
        each_4k: Duration::ZERO,
    };

    fn moved(&self, sectors: u64) -> Duration {
        let nanos = self.each_4k.as_nanos() as u64;
        Duration::from_nanos(nanos.saturating_mul(sectors.div_ceil(8)))
    }

    /// How long a bio takes.
    pub fn bio(&self, op: Op, sectors: u64, is_fua: bool) -> Duration {
        let flush = if is_fua { self.flush } else { Duration::ZERO };
        match op {
            Op::Read => self.read + self.moved(sectors),
            Op::Write => self.write + self.moved(sectors) + flush,
            Op::Flush => self.flush,
            Op::Discard => self.discard,
        }
    }

    /// How long zeroing takes.
    pub fn zero(&self, sectors: u64) -> Duration {
        self.write + self.moved(sectors)
    }

    /// How long a copy takes.
    pub fn copy(&self, sectors: u64) -> Duration {
        self.read + self.write + self.moved(sectors) * 2
    }
}
