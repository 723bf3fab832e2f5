//! The names of a trace's devices, found again by what the trace calls them.

use std::collections::HashMap;

/// More than any known trace has; a file of nonsense must not fill the memory.
const MAX_DEVICES: usize = 1 << 16;
const MAX_NAME: usize = 255;
const SLOTS: usize = 4096;

/// A table that only grows.
pub(super) struct Devices {
    names: Vec<String>,
    keys: Vec<Box<[u8]>>,
    by_key: HashMap<Box<[u8]>, u32>,
    /// Indexes by a cheap hash of the key, right or not: what is found is compared.
    slots: Vec<u32>,
}

impl Devices {
    pub(super) fn new() -> Self {
        Self {
            names: Vec::new(),
            keys: Vec::new(),
            by_key: HashMap::new(),
            slots: vec![0; SLOTS],
        }
    }

    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// The index of the device that the trace calls `key`; a new one gets its `name`.
    #[inline]
    pub(super) fn index(
        &mut self,
        key: &[u8],
        name: impl FnOnce() -> String,
    ) -> Result<u32, &'static str> {
        let slot = slot(key);
        let index = self.slots[slot];
        if self.keys.get(index as usize).is_some_and(|k| **k == *key) {
            return Ok(index);
        }
        let index = self.find(key, name)?;
        self.slots[slot] = index;
        Ok(index)
    }

    #[cold]
    fn find(&mut self, key: &[u8], name: impl FnOnce() -> String) -> Result<u32, &'static str> {
        if let Some(&index) = self.by_key.get(key) {
            return Ok(index);
        }
        if key.len() > MAX_NAME {
            return Err("the name of the device is too long");
        }
        if self.names.len() == MAX_DEVICES {
            return Err("more than 65536 devices");
        }
        let index = self.names.len() as u32;
        self.names.push(name());
        self.keys.push(key.into());
        self.by_key.insert(key.into(), index);
        Ok(index)
    }

    /// The device `252,3` of a text.
    pub(super) fn numbered(&mut self, key: &[u8]) -> Result<u32, &'static str> {
        self.index(key, || text(key).replace(',', ":"))
    }

    /// A device that is called what it is called.
    pub(super) fn named(&mut self, key: &[u8]) -> Result<u32, &'static str> {
        self.index(key, || text(key))
    }
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[inline]
fn slot(key: &[u8]) -> usize {
    let mut hash = key.len() as u64;
    let mut chunks = key.chunks_exact(8);
    for chunk in &mut chunks {
        let word = u64::from_le_bytes(chunk.try_into().expect("eight bytes"));
        hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    for &byte in chunks.remainder() {
        hash = hash << 8 ^ u64::from(byte) ^ hash >> 56;
    }
    (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52) as usize
}
