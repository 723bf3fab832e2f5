//! The control socket: lines of JSON, each a request with its answer, in the words of dmsetup.
//!
//! A request is an object whose member `command` says what is wanted. Its answer is `{"ok": ...}`, or `{"error": {"errno": "EEXIST",
//! "message": "..."}}` with the error that the kernel would have given. After `events` the answers do not end: each is an event.

mod metrics;
mod request;
mod server;

pub use metrics::{Stats, ThinStats};
pub use request::Request;
pub use server::{Control, bind_socket};
