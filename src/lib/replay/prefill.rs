//! What a pool had before its trace began, as far as the trace tells: a block that is read before anything was written to it must have
//! been written earlier. A first reading of the trace finds such blocks, and they are mapped before the second one plays it.
//!
//! 1. Blocks of a device that the trace itself makes are none: it began empty. A snapshot's belong to what it is a snapshot of.
//! 2. Nor are those of a device with an external origin, which is where such reads go.
//! 3. A discard decides like a write: what is read behind it is not there any more.

use super::control::Control;
use super::event::{ControlEvent, TraceIo, TraceOp, TraceReader};
use super::run::{Happening, follow};
use crate::error::{Error, ErrorKind, Result};
use crate::observer::Observer;
use crate::pool::Message;
use crate::thin::PoolMetadata;
use crate::units::{ThinBlock, ThinId};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A set of blocks, as ranges `begin..end` that do not touch.
#[derive(Clone, Debug, Default)]
struct Blocks {
    ranges: BTreeMap<u64, u64>,
    len: u64,
}

impl Blocks {
    /// Parts of `begin..end` that are not in it.
    fn missing(&self, begin: u64, end: u64) -> Vec<(u64, u64)> {
        let before = self.ranges.range(..=begin).next_back();
        let mut at = before.map_or(begin, |(_, &to)| to.max(begin));
        let mut missing = Vec::new();
        if at < end {
            for (&from, &to) in self.ranges.range(at..end) {
                if at < from {
                    missing.push((at, from));
                }
                at = to;
            }
        }
        if at < end {
            missing.push((at, end));
        }
        missing
    }

    fn insert(&mut self, mut begin: u64, mut end: u64) {
        if begin >= end {
            return;
        }
        while let Some((&from, &to)) = self.ranges.range(..=end).next_back() {
            if to < begin {
                break;
            }
            self.ranges.remove(&from);
            self.len -= to - from;
            (begin, end) = (begin.min(from), end.max(to));
        }
        self.ranges.insert(begin, end);
        self.len += end - begin;
    }
}

/// A thin device as the first reading follows it.
#[derive(Clone, Debug, Default)]
struct Device {
    /// Whose blocks its blocks were before the trace began; none if it began empty.
    ancestor: Option<ThinId>,
    /// Blocks of which the trace says how they came to be what they are.
    decided: Blocks,
}

/// Which thin device a device of the trace is.
#[derive(Clone, Copy, Debug)]
struct Active {
    id: ThinId,
    sectors: u64,
    has_origin: bool,
}

/// What is to be mapped before a trace begins.
#[derive(Debug)]
pub struct Prefill {
    block_sectors: u64,
    data_blocks: u64,
    makes_devices: bool,
    taken: BTreeSet<ThinId>,
    active: HashMap<String, Active>,
    named: BTreeMap<String, ThinId>,
    /// None for one that was deleted.
    devices: BTreeMap<ThinId, Option<Device>>,
    needed: BTreeMap<ThinId, Blocks>,
}

/// What was mapped before a trace began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Prefilled {
    /// Thin devices that got blocks.
    pub devices: u64,
    /// The blocks.
    pub blocks: u64,
}

impl Prefill {
    /// Reads a trace to its end, with the events beside it, for a pool that has `metadata`. `devices` says which thin device a device of
    /// the trace is at first, and its size in sectors of 512 bytes; with `makes_devices` others become new ones, in order.
    ///
    /// # Errors
    /// Those of the reader; `InvalidDescription` for a control event with wrong arguments; `NoSpace` if the data device has not as
    /// many blocks as are needed; `Interrupted`.
    pub fn of(
        reader: &mut dyn TraceReader,
        beside: Vec<ControlEvent>,
        metadata: &PoolMetadata,
        devices: &BTreeMap<String, (ThinId, Option<u64>)>,
        makes_devices: bool,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let status = metadata.status()?;
        let active = devices.iter().map(|(name, &(id, sectors))| {
            let active = Active {
                id,
                sectors: sectors.unwrap_or(u64::MAX),
                has_origin: false,
            };
            (name.clone(), active)
        });
        let mut prefill = Self {
            block_sectors: u64::from(status.data_block_size),
            data_blocks: status.data_blocks,
            makes_devices,
            taken: metadata.devices()?.into_iter().collect(),
            active: active.collect(),
            named: BTreeMap::new(),
            devices: BTreeMap::new(),
            needed: BTreeMap::new(),
        };
        let is_complete = follow(reader, beside, observer, |happening| match happening {
            Happening::Io(device, io) => prefill.io(device, io),
            Happening::Control(event) => prefill.control(event),
            Happening::Soon(_) => Ok(()),
        })?;
        match is_complete {
            true => Ok(prefill),
            false => Err(Error::new(ErrorKind::Interrupted, "interrupted")),
        }
    }

    /// The thin devices that devices of the trace became, since nothing else said which they are.
    pub fn named(&self) -> &BTreeMap<String, ThinId> {
        &self.named
    }

    fn io(&mut self, device: &str, io: &TraceIo) -> Result<()> {
        let active = match self.active.get(device) {
            Some(active) => *active,
            None if self.makes_devices => self.name(device),
            None => return Ok(()),
        };
        let end = io.sector.saturating_add(io.sectors);
        if active.has_origin || io.sectors == 0 || end > active.sectors {
            return Ok(());
        }
        let known = self.devices.entry(active.id).or_insert_with(|| {
            Some(Device {
                ancestor: Some(active.id),
                decided: Blocks::default(),
            })
        });
        let Some(known) = known else { return Ok(()) };
        let size = self.block_sectors;
        let (begin, end) = match io.op {
            // What is left of a block keeps what it was.
            TraceOp::Discard => (io.sector.div_ceil(size), end / size),
            _ => (io.sector / size, end.div_ceil(size)),
        };
        if io.op == TraceOp::Read {
            let Some(ancestor) = known.ancestor else {
                return Ok(());
            };
            let needed = self.needed.entry(ancestor).or_default();
            for (from, to) in known.decided.missing(begin, end) {
                needed.insert(from, to);
            }
            if needed.len > self.data_blocks {
                return Err(no_room(self.data_blocks));
            }
        } else {
            known.decided.insert(begin, end);
        }
        Ok(())
    }

    /// A thin device of the first id that is free.
    fn name(&mut self, device: &str) -> Active {
        let is_free = |id: &ThinId| !self.taken.contains(id);
        let id = (0..).map(ThinId).find(is_free).unwrap_or_default();
        self.taken.insert(id);
        self.named.insert(device.into(), id);
        let active = Active {
            id,
            sectors: u64::MAX,
            has_origin: false,
        };
        self.active.insert(device.into(), active);
        active
    }

    fn control(&mut self, event: &ControlEvent) -> Result<()> {
        match Control::of(&event.text) {
            Control::Activate {
                device,
                id,
                sectors,
                origin_sectors,
            } => {
                self.taken.insert(id);
                let has_origin = origin_sectors.is_some();
                let active = Active {
                    id,
                    sectors,
                    has_origin,
                };
                self.active.insert(device, active);
            }
            Control::Deactivate { device } => {
                self.active.remove(&device);
            }
            Control::Message(Message::CreateThin(id)) => self.make(id, Device::default()),
            Control::Message(Message::CreateSnap { id, origin }) => {
                let of_origin = self.devices.get(&origin).cloned();
                let before = Device {
                    ancestor: Some(origin),
                    decided: Blocks::default(),
                };
                if let Some(of_origin) = of_origin.unwrap_or(Some(before)) {
                    self.make(id, of_origin);
                }
            }
            Control::Message(Message::Delete(id)) => {
                self.devices.insert(id, None);
            }
            _ => {}
        }
        Ok(())
    }

    /// A device that the trace makes, unless it is there.
    fn make(&mut self, id: ThinId, device: Device) {
        self.taken.insert(id);
        let known = self.devices.entry(id).or_default();
        if known.is_none() {
            *known = Some(device);
        }
    }

    /// Maps what is needed and is not mapped yet, and commits it.
    ///
    /// # Errors
    /// `NoSpace`, `Io`, `Damaged`.
    pub fn apply(&self, metadata: &mut PoolMetadata) -> Result<Prefilled> {
        let mut filled = Prefilled::default();
        for (&id, blocks) in &self.needed {
            if blocks.len == 0 {
                continue;
            }
            if metadata.details(id).is_err() {
                metadata.create_thin(id)?;
            }
            let before = filled.blocks;
            for block in blocks.ranges.iter().flat_map(|(&from, &to)| from..to) {
                let next = metadata.next_block(id, ThinBlock(block))?;
                if next.is_some_and(|(mapped, _)| mapped.0 == block) {
                    continue;
                }
                let data = metadata
                    .alloc_data_block()?
                    .ok_or_else(|| no_room(self.data_blocks))?;
                metadata.insert_block(id, ThinBlock(block), data)?;
                filled.blocks += 1;
            }
            filled.devices += u64::from(filled.blocks > before);
        }
        metadata.commit()?;
        Ok(filled)
    }
}

fn no_room(data_blocks: u64) -> Error {
    Error::new(
        ErrorKind::NoSpace,
        format!(
            "the trace reads more blocks before it writes them than the data device has, {data_blocks}; give a larger --data-size"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_a_set_of_ranges() {
        let mut blocks = Blocks::default();
        for (begin, end) in [(10, 20), (30, 40), (5, 5), (20, 25)] {
            blocks.insert(begin, end);
        }
        assert_eq!(blocks.len, 25);
        assert_eq!(blocks.missing(0, 50), [(0, 10), (25, 30), (40, 50)]);
        assert_eq!(blocks.missing(12, 24), []);
        assert_eq!(blocks.missing(15, 28), [(25, 28)]);
        assert_eq!(blocks.missing(40, 41), [(40, 41)]);
        blocks.insert(12, 60);
        assert_eq!(blocks.ranges, BTreeMap::from([(10, 60)]));
        blocks.insert(0, u64::MAX);
        assert_eq!(blocks.len, u64::MAX);
        let draw = |seed: &mut u64| {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *seed >> 58
        };
        let (mut blocks, mut plain, mut seed) = (Blocks::default(), BTreeSet::new(), 7);
        for _ in 0..200 {
            let (begin, len) = (draw(&mut seed), draw(&mut seed) / 8);
            let missing: Vec<u64> = blocks
                .missing(begin, begin + len)
                .into_iter()
                .flat_map(|(from, to)| from..to)
                .collect();
            let expected: Vec<u64> = (begin..begin + len)
                .filter(|b| !plain.contains(b))
                .collect();
            assert_eq!(missing, expected);
            if draw(&mut seed) < 16 {
                blocks.insert(begin, begin + len);
                plain.extend(begin..begin + len);
            }
            assert_eq!(blocks.len, plain.len() as u64);
        }
    }
}
