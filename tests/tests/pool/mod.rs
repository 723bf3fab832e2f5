//! The pool engine, driven without threads and without a clock.

mod basics;
pub(crate) mod disk;
mod lines;
mod model;
pub(crate) mod rig;
mod simulation;
