//! The pool engine, driven without threads and without a clock.

mod basics;
pub(crate) mod disk;
pub(crate) mod rig;
