//! Where the primitives that are modelled with loom take their atomics and locks from.

/// To be called between a sequentially consistent change and a sequentially consistent load that must not go before it. They are in
/// order without; but loom takes both for acquire and release, and needs to be told.
#[inline(always)]
pub(crate) fn keep_order() {
    #[cfg(loom)]
    atomic::fence(atomic::Ordering::SeqCst);
}

#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
