//! What the pool knows of a thin device beside its mappings. Facts: `FORMAT.md`, "Device details tree".

use crate::bytes::{get_u32, get_u64, put_u32, put_u64};
use crate::pdata::Value;
use serde::Serialize;

/// The value of the device details tree, 24 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceDetail {
    /// Entries in the device's mapping tree.
    pub mapped_blocks: u64,
    /// The pool's transaction id when the device was created.
    pub transaction_id: u64,
    /// The snapshot clock when the device was created.
    pub creation_time: u32,
    /// The snapshot clock when the device was last the origin of a snapshot, or was created.
    pub snapshotted_time: u32,
}

impl Value for DeviceDetail {
    const SIZE: usize = 24;

    fn pack(&self, bytes: &mut [u8]) {
        put_u64(bytes, 0, self.mapped_blocks);
        put_u64(bytes, 8, self.transaction_id);
        put_u32(bytes, 16, self.creation_time);
        put_u32(bytes, 20, self.snapshotted_time);
    }

    fn unpack(bytes: &[u8]) -> Self {
        Self {
            mapped_blocks: get_u64(bytes, 0),
            transaction_id: get_u64(bytes, 8),
            creation_time: get_u32(bytes, 16),
            snapshotted_time: get_u32(bytes, 20),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let detail = DeviceDetail {
            mapped_blocks: 5,
            transaction_id: u64::MAX,
            creation_time: 1,
            snapshotted_time: 2,
        };
        let mut bytes = [0; DeviceDetail::SIZE];
        detail.pack(&mut bytes);
        assert_eq!(DeviceDetail::unpack(&bytes), detail);
    }
}
