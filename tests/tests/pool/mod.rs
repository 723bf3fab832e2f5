//! The pool engine, driven without threads and without a clock.

mod basics;
mod cells;
mod concurrency;
mod discards;
pub(crate) mod disk;
mod durability;
mod kernel_lists;
mod lines;
mod model;
mod moments;
mod player;
mod provisioning;
pub(crate) mod rig;
pub(crate) mod scene;
mod sharing;
mod simulation;
mod space;
mod suspension;
