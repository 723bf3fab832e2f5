//! What thin devices are expected to hold, when nothing is under way.

use super::content::{Content, Tag};
use crate::units::ThinId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Blocks of which snapshots have a copy of their own together.
const CHUNK: u64 = 256;

/// A device. Its snapshots share what did not change since.
#[derive(Clone, Debug, Default)]
struct Device {
    chunks: BTreeMap<u64, Arc<BTreeMap<u64, Content>>>,
}

/// The least and the most that external origins of a device had, in sectors; none is 0.
type Origin = (u64, u64);

/// All devices.
#[derive(Debug, Default)]
pub(super) struct Devices {
    by_id: BTreeMap<ThinId, Device>,
    /// Of those that were open, since a device may be opened with another one.
    origins: BTreeMap<ThinId, Origin>,
}

const HOLE: Content = Content::Same(Tag::HOLE);

impl Devices {
    /// An id that no device has.
    pub(super) const TO_COME: ThinId = ThinId(u64::MAX);

    /// What a block holds.
    pub(super) fn get(&self, id: ThinId, block: u64) -> &Content {
        let device = self.by_id.get(&id);
        match device.and_then(|device| device.chunks.get(&(block / CHUNK))) {
            Some(chunk) => chunk.get(&block).unwrap_or(&HOLE),
            None => &HOLE,
        }
    }

    /// What a block holds, to be changed.
    pub(super) fn get_mut(&mut self, id: ThinId, block: u64) -> &mut Content {
        let device = self.by_id.entry(id).or_default();
        let chunk = device.chunks.entry(block / CHUNK).or_default();
        Arc::make_mut(chunk).entry(block).or_insert(HOLE)
    }

    /// Of `blocks`, those that hold something.
    pub(super) fn blocks(&self, id: ThinId, blocks: std::ops::Range<u64>) -> Vec<u64> {
        let Some(device) = self.by_id.get(&id) else {
            return Vec::new();
        };
        let chunks = device
            .chunks
            .range(blocks.start / CHUNK..=blocks.end / CHUNK);
        let all = chunks.flat_map(|(_, chunk)| chunk.keys().copied());
        all.filter(|block| blocks.contains(block)).collect()
    }

    /// A device was made.
    pub(super) fn create(&mut self, id: ThinId) {
        self.by_id.insert(id, Device::default());
    }

    /// A snapshot is about to be taken; as what it will be is to be found under [`Self::TO_COME`].
    pub(super) fn prepare(&mut self, origin: ThinId) {
        let copy = self.by_id.get(&origin).cloned().unwrap_or_default();
        self.by_id.insert(Self::TO_COME, copy);
    }

    /// The snapshot that was prepared was taken.
    pub(super) fn snapshot(&mut self, id: ThinId, origin: ThinId) {
        let copy = self.by_id.remove(&Self::TO_COME).unwrap_or_default();
        self.by_id.insert(id, copy);
        if let Some(&(least, most)) = self.origins.get(&origin) {
            self.note_origin(id, least);
            self.note_origin(id, most);
        }
    }

    /// A device was deleted.
    pub(super) fn delete(&mut self, id: ThinId) {
        self.by_id.remove(&id);
    }

    /// A device is opened with an external origin of so many sectors.
    pub(super) fn note_origin(&mut self, id: ThinId, sectors: u64) {
        let origin = self.origins.entry(id).or_insert((sectors, sectors));
        *origin = (origin.0.min(sectors), origin.1.max(sectors));
    }

    /// A device is used.
    pub(super) fn note_use(&mut self, id: ThinId) {
        self.origins.entry(id).or_insert((0, 0));
    }

    /// A hole of the device may hold this at `sector`.
    pub(super) fn is_of_hole(&self, id: ThinId, sector: u64, found: Tag) -> bool {
        let (least, most) = self.origins.get(&id).copied().unwrap_or_default();
        found == Tag::ZERO && sector >= least || found == Tag::origin(sector) && sector < most
    }

    /// Where somebody is expected to have what was written: device and sector.
    pub(super) fn whose(&self, tag: Tag, size: u64) -> Option<(ThinId, u64)> {
        let blocks = self.by_id.iter().flat_map(|(&id, device)| {
            let chunks = device.chunks.values();
            chunks.flat_map(move |chunk| chunk.iter().map(move |(block, c)| (id, block, c)))
        });
        for (id, block, content) in blocks {
            if let Some(at) = (0..size).find(|&at| content.at(at).but_for_hole() == tag) {
                return Some((id, block * size + at));
            }
        }
        None
    }
}
