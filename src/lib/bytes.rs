//! Little-endian fields of on-disk records. The offsets are the caller's constants, within blocks of a fixed size.

/// The `u32` at `offset`.
pub fn get_u32(block: &[u8], offset: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&block[offset..offset + 4]);
    u32::from_le_bytes(bytes)
}

/// The `u64` at `offset`.
pub fn get_u64(block: &[u8], offset: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[offset..offset + 8]);
    u64::from_le_bytes(bytes)
}

/// Stores a `u32` at `offset`.
pub fn put_u32(block: &mut [u8], offset: usize, value: u32) {
    block[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// Stores a `u64` at `offset`.
pub fn put_u64(block: &mut [u8], offset: usize, value: u64) {
    block[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

/// True if every byte is zero. A comparison with itself, shifted by one byte, is as fast as memory.
pub(crate) fn is_zeroed(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && rest == &bytes[..rest.len()],
    }
}
