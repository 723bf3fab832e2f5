//! The names of a trace's devices, found again by what the trace calls them.

use std::collections::HashMap;
use std::sync::Arc;

use super::scan::eight;

/// More than any known trace has; a file of nonsense must not fill the memory.
const MAX_DEVICES: usize = 1 << 16;
const MAX_NAME: usize = 255;
const SLOTS: usize = 1 << 13;
const WAYS: usize = 4;
/// No index, or the last there can be.
const FREE: u16 = u16::MAX;

/// A table that only grows.
pub(super) struct Devices {
    names: Vec<String>,
    keys: Vec<Arc<[u8]>>,
    by_key: HashMap<Arc<[u8]>, u32>,
    /// Keys that are short, as one word; 0 for those that are not.
    words: Vec<u64>,
    /// Indexes of short keys that were met last, by a cheap hash or near it. What is looked at often is small: it stays in a processor's
    /// nearest cache.
    slots: Vec<u16>,
}

impl Devices {
    pub(super) fn new() -> Self {
        Self {
            names: Vec::new(),
            keys: Vec::new(),
            by_key: HashMap::new(),
            words: Vec::new(),
            slots: vec![FREE; SLOTS],
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
        let slot = (mixed(mixed(short)) >> (64 - SLOTS.ilog2())) as usize;
        for way in 0..WAYS {
            let index = self.slots[slot ^ way];
            if self.words.get(usize::from(index)) == Some(&short) {
                return Ok(index.into());
            }
        }
        let index = self.find(key, name)?;
        self.words[index as usize] = short;
        let mut moved = index as u16;
        for way in 0..WAYS {
            moved = std::mem::replace(&mut self.slots[slot ^ way], moved);
            if moved == FREE {
                break;
            }
        }
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
        self.words.push(0);
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

/// A word of a few digits differs from another in few bits only.
#[inline(always)]
fn mixed(word: u64) -> u64 {
    let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
}

pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_devices_is_found_again() {
        let mut devices = Devices::new();
        let names: Vec<String> = (0..MAX_DEVICES).map(|at| at.to_string()).collect();
        for round in 0..2 {
            for (index, name) in names.iter().enumerate() {
                let found = devices.named(name.as_bytes());
                assert_eq!(found, Ok(index as u32), "{round}");
            }
        }
        assert!(devices.named(b"one more").is_err() && devices.named(b"1more").is_err());
        // A name may begin with another, end in zeros, or be long.
        let mut devices = Devices::new();
        let names: [&[u8]; 8] = [
            b"",
            b"\0",
            b"\0\0",
            b"1234567",
            b"1234567\0",
            b"12345678",
            b"123456789",
            b"1",
        ];
        for _ in 0..2 {
            for (index, name) in names.iter().enumerate() {
                assert_eq!(devices.named(name), Ok(index as u32), "{name:?}");
            }
        }
    }
}
