//! Memory that is asked for before it is needed.

#![expect(
    unsafe_code,
    reason = "the processor is told of an address, which has no safe form yet"
)]

/// Asks for the memory of `of`, which is read soon, without waiting for it. Nothing is done where the processor is not known.
#[inline(always)]
pub(crate) fn prefetch<T>(of: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let at = std::ptr::from_ref(of).cast();
        // SAFETY: the instruction changes and faults nothing, whatever the address is; this one is of a reference.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = of;
}
