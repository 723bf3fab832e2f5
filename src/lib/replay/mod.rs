//! Recorded block I/O, played through the pool engine.

mod event;

pub use event::{Batch, ControlEvent, TraceIo, TraceNotes, TraceOp, TraceReader};
