//! The names of a trace's devices, found again by what the trace calls them.

use std::collections::HashMap;
use std::sync::Arc;

use super::scan::eight;

/// More than any known trace has; a file of nonsense must not fill the memory.
const MAX_DEVICES: usize = 1 << 16;
const MAX_NAME: usize = 255;
const SLOTS: usize = 1 << 13;

/// A table that only grows.
pub(super) struct Devices {
    names: Vec<String>,
    keys: Vec<Arc<[u8]>>,
    by_key: HashMap<Arc<[u8]>, u32>,
    /// Short keys that were met last, by a cheap hash or beside it, and their indexes.
    slots: Vec<(u64, u32)>,
}

impl Devices {
    pub(super) fn new() -> Self {
        Self {
            names: Vec::new(),
            keys: Vec::new(),
            by_key: HashMap::new(),
            slots: vec![(0, 0); SLOTS],
        }
    }

    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    /// What the trace calls those from an index on, and their names.
    pub(super) fn since(&self, index: usize) -> impl Iterator<Item = (&[u8], &str)> {
        let keys = self.keys[index..].iter().map(|key| &**key);
        keys.zip(self.names[index..].iter().map(String::as_str))
    }

    /// The index of the device that the trace calls `key`; a new one gets its `name`.
    #[inline]
    pub(super) fn index(
        &mut self,
        key: &[u8],
        name: impl FnOnce() -> String,
    ) -> Result<u32, &'static str> {
        self.index_of(key, eight(key), name)
    }

    /// The same of a key whose first eight bytes are known, zeros behind its end.
    #[inline(always)]
    pub(super) fn index_of(
        &mut self,
        key: &[u8],
        first: u64,
        name: impl FnOnce() -> String,
    ) -> Result<u32, &'static str> {
        if key.len() >= 8 {
            return self.find(key, name);
        }
        // With its length it is never 0.
        let short = first | (key.len() as u64 + 1) << 56;
        let slot = (short.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SLOTS.ilog2())) as usize;
        for slot in [slot, slot ^ 1] {
            let (known, index) = self.slots[slot];
            if known == short {
                return Ok(index);
            }
        }
        let index = self.find(key, name)?;
        self.slots[slot ^ 1] = std::mem::replace(&mut self.slots[slot], (short, index));
        Ok(index)
    }

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
        let key: Arc<[u8]> = key.into();
        self.names.push(name());
        self.keys.push(Arc::clone(&key));
        self.by_key.insert(key, index);
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
