//! Memory of large requests, to be used again. The allocator gives large pieces back to the system and takes new ones, and a third of the
//! processor time of requests of 1 MiB went into their page faults.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Smaller ones the allocator keeps itself.
const LARGE: usize = 128 << 10;
/// Bytes that are kept in all.
const MOST_BYTES: usize = 16 << 20;

struct Kept {
    all: Vec<Vec<u8>>,
    bytes: usize,
}

static KEPT: Mutex<Kept> = Mutex::new(Kept {
    all: Vec::new(),
    bytes: 0,
});

fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A buffer of `len` zeros.
pub(super) fn take(len: usize) -> Vec<u8> {
    if len < LARGE {
        return vec![0; len];
    }
    let mut kept = kept();
    // The last one is the most likely to be in the processor's cache.
    let fits = |buffer: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&buffer.capacity());
    let Some(at) = kept.all.iter().rposition(fits) else {
        drop(kept);
        return vec![0; len];
    };
    let mut buffer = kept.all.swap_remove(at);
    kept.bytes -= buffer.capacity();
    drop(kept);
    buffer.clear();
    buffer.resize(len, 0);
    buffer
}

/// The buffer is not needed any more.
pub(super) fn give(buffer: Vec<u8>) {
    if buffer.capacity() < LARGE {
        return;
    }
    let mut kept = kept();
    if kept.bytes + buffer.capacity() <= MOST_BYTES {
        kept.bytes += buffer.capacity();
        kept.all.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_again_is_zeros_and_what_is_kept_is_bounded() {
        for len in [0, 1, LARGE, 3 * LARGE / 2, LARGE] {
            let mut buffer = take(len);
            assert!(buffer.len() == len && buffer.iter().all(|&byte| byte == 0));
            buffer.fill(7);
            give(buffer);
        }
        (0..100).for_each(|_| give(vec![1; 1 << 20]));
        assert!(kept().bytes <= MOST_BYTES);
        let sum: usize = kept().all.iter().map(Vec::capacity).sum();
        assert_eq!(sum, kept().bytes);
    }
}
