//! The thin pool on real devices, for clients that come over a socket.
//!
//! [`Runtime`] is a pool: a metadata device, a data device, the worker, which has a thread of its own but is anybody's who has something
//! for it (`turn`), and threads that carry out what it wants done (`driver`). A client's requests are cut into bios (`cut`) and mapped on
//! the thread of its connection, which reads and writes what is mapped itself (`submitter`); what the worker has of a request is kept as
//! `transfer`.

mod autoextend;
mod buffers;
pub mod control;
mod cut;
mod data_device;
mod direct;
mod driver;
mod event_log;
pub mod export;
mod exports;
#[cfg(feature = "devtools")]
mod fault;
pub mod fuse;
mod gathering;
mod io_counts;
pub mod memory_export;
pub mod nbd;
mod opening;
mod ring;
#[expect(clippy::module_inception, reason = "the runtime of the pool")]
mod runtime;
mod seam;
mod submitter;
mod thin_contexts;
mod thin_export;
mod transfer;
mod turn;

pub use autoextend::Autoextend;
pub use control::bind_socket;
pub use data_device::DataDevice;
pub use event_log::{EventLog, PoolEvent};
#[cfg(feature = "devtools")]
pub use fault::{Fault, Faults};
pub use io_counts::IoTotals;
pub use opening::Options;
pub use runtime::{Activation, Runtime};
#[cfg(feature = "devtools")]
pub use seam::{DeviceRequest, Interceptor, PoolDevice};
