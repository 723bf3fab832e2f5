#![doc = include_str!("ARCHITECTURE.md")]

#[doc = include_str!("FORMAT.md")]
pub mod format {}

pub mod bytes;
pub mod checksum;
pub mod error;
pub mod io;
pub mod observer;
pub mod pdata;
pub mod pool;
mod prefetch;
pub mod replay;
pub mod runtime;
mod sync;
pub mod thin;
pub mod tools;
pub mod units;

pub use error::{Error, ErrorKind, Result};
