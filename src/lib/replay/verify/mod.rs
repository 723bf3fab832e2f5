//! Whether readers find what was written: a model of the data device beside the engine, and of what each thin device has to show.
//!
//! The data device begins as one that was used before, so a block that nobody zeroed is found, and a discard of it leaves nobody knows
//! what. A write reaches it when it ends, a copy has what its source held when it began. Every read is looked at when it is issued and
//! when it has ended, and all that a thin device has at the end, or before it is deleted.
//!
//! In memory there are 8 bytes for each sector of a block that was not always written as a whole: 4 for what it holds and 4 for what
//! it has to show. Blocks that were take less than a hundred, whatever their size. To have less, one of so many virtual blocks is
//! looked at, the same ones of all devices, so that snapshots and what they were taken of are looked at together.

mod changes;
mod content;
mod device;
mod disk;
#[cfg(test)]
mod faults;
mod verified;
mod watch;

use crate::error::Result;
use crate::pool::{
    Bio, BioError, BioResult, DISCARD_BLOCKS, Effect, JobId, Mapped, Message, Notice, Op,
};
use crate::thin::PoolMetadata;
use crate::units::{ThinBlock, ThinId};
use changes::{Changes, What};
use content::{Content, Tag};
use device::Devices;
use disk::Disk;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use verified::MOST_TOLD;
pub use verified::Verified;
pub(super) use watch::Watch;

/// A bio that is looked at.
#[derive(Debug)]
struct Flight {
    id: ThinId,
    /// The step at which it began, by which its change is known.
    begun: u64,
    kind: Kind,
    /// The sector of the data device that it went to.
    at: Option<u64>,
    /// A read that was looked at.
    is_seen: bool,
    is_wrong: bool,
}

#[derive(Clone, Debug)]
enum Kind {
    Read,
    /// With the tag of its first sector.
    Write(Tag),
    /// Of these whole blocks.
    Discard(Range<u64>),
}

/// When a discard began, and its blocks.
type Discard = (u64, Range<u64>);

/// The model.
#[derive(Debug)]
struct Verify {
    /// Sectors in a block.
    size: u64,
    /// What is mapped may hold what it held before where nobody wrote (skip_block_zeroing).
    is_unzeroed: bool,
    step: u64,
    next_tag: u32,
    disk: Disk,
    devices: Devices,
    /// By number and first sector.
    flights: HashMap<(u64, u64), Flight>,
    /// Blocks in which something is under way.
    active: BTreeMap<(ThinId, u64), Changes>,
    /// Discards under way, with when they began, by the first of the blocks that one bio may cover.
    discards: BTreeMap<(ThinId, u64), Vec<Discard>>,
    found: Verified,
}

impl Verify {
    /// A model of a pool that is not used yet. One virtual block of `one_of` is looked at.
    ///
    /// # Errors
    /// `Io`, `Damaged`: its metadata cannot be read.
    fn new(metadata: &PoolMetadata, size: u64, is_unzeroed: bool, one_of: u64) -> Result<Self> {
        let mut verify = Self {
            size,
            is_unzeroed,
            step: 0,
            next_tag: 0,
            disk: Disk::new(size),
            devices: Devices::default(),
            flights: HashMap::new(),
            active: BTreeMap::new(),
            discards: BTreeMap::new(),
            found: Verified {
                one_of: one_of.max(1),
                ..Verified::default()
            },
        };
        for id in metadata.devices()? {
            let mut from = 0;
            while let Some((block, to)) = metadata.next_block(id, ThinBlock(from))? {
                if verify.is_sampled(block.0) {
                    let prior = Content::Run(Tag::prior(to.block.0 * size));
                    *verify.devices.get_mut(id, block.0) = prior;
                }
                from = block.0 + 1;
            }
        }
        Ok(verify)
    }

    /// A hash, since traces like multiples of something.
    fn is_sampled(&self, block: u64) -> bool {
        let hash = (block ^ block >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> 32).is_multiple_of(self.found.one_of)
    }

    fn step(&mut self) -> u64 {
        self.step += 1;
        self.step
    }

    fn changes(&mut self, id: ThinId, block: u64) -> &mut Changes {
        let discards = self.discards.get(&(id, block / DISCARD_BLOCKS));
        self.active.entry((id, block)).or_insert_with(|| {
            let mut changes = Changes::default();
            for (begun, blocks) in discards.into_iter().flatten() {
                if blocks.contains(&block) {
                    changes.begin(What::Discard, 0, self.size, *begun);
                }
            }
            changes
        })
    }

    /// A bio is submitted to a thin device.
    fn begin(&mut self, id: ThinId, bio: &Bio) {
        self.devices.note_use(id);
        let size = self.size;
        let begun = self.step();
        let (block, at) = (bio.sector / size, bio.sector % size);
        let end = bio.sector.saturating_add(bio.sectors);
        let kind = match bio.op {
            Op::Flush => return,
            Op::Read | Op::Write if !self.is_sampled(block) => return,
            Op::Read => {
                self.changes(id, block).begin_read(begun);
                Kind::Read
            }
            Op::Write => {
                let first = Tag::of_write(&mut self.next_tag, bio.sectors);
                let what = What::Write(first);
                self.changes(id, block)
                    .begin(what, at, at + bio.sectors, begun);
                Kind::Write(first)
            }
            Op::Discard => {
                let blocks = bio.sector.div_ceil(size)..end / size;
                if blocks.is_empty() {
                    return;
                }
                for (_, changes) in self.active_mut(id, &blocks) {
                    changes.begin(What::Discard, 0, size, begun);
                }
                let place = (id, blocks.start / DISCARD_BLOCKS);
                let discards = self.discards.entry(place).or_default();
                discards.push((begun, blocks.clone()));
                Kind::Discard(blocks)
            }
        };
        let flight = Flight {
            id,
            begun,
            kind,
            at: None,
            is_seen: false,
            is_wrong: false,
        };
        self.flights.insert((bio.id, bio.sector), flight);
    }

    fn active_mut(
        &mut self,
        id: ThinId,
        blocks: &Range<u64>,
    ) -> impl Iterator<Item = (&(ThinId, u64), &mut Changes)> {
        self.active
            .range_mut((id, blocks.start)..(id, blocks.end.max(blocks.start)))
    }

    /// The map half has looked at a bio.
    fn mapped(&mut self, mapped: &Mapped) {
        match mapped {
            Mapped::Remapped { bio, sector } => self.issued(bio, *sector),
            Mapped::Zero(bio) => self.read(bio, &Content::Same(Tag::ZERO)),
            Mapped::Deferred(_) | Mapped::Failed(..) => {}
        }
    }

    /// The worker wants something done.
    fn effect(&mut self, effect: &Effect) {
        match effect {
            Effect::Issue { bio, sector } => self.issued(bio, *sector),
            Effect::ReadOrigin { bio, sectors } => {
                let mut content = Content::Same(Tag::ZERO);
                let origin = Content::Run(Tag::origin(bio.sector));
                let sectors = bio.sectors.min(*sectors);
                content.set(0, sectors, &origin, bio.sectors);
                self.read(bio, &content);
            }
            Effect::End {
                bio, is_zero: true, ..
            } => self.read(bio, &Content::Same(Tag::ZERO)),
            &Effect::Zero {
                job,
                sector,
                sectors,
            } => self.disk.begin(job, sector, sectors, Tag::ZERO),
            &Effect::Copy {
                job,
                from,
                from_sector,
                sector,
                sectors,
            } => {
                self.disk
                    .begin_copy(job, from, from_sector, sector, sectors);
            }
            &Effect::Discard {
                job,
                sector,
                sectors,
            } => self.disk.begin(job, sector, sectors, Tag::DISCARDED),
            Effect::Notice(Notice::MetadataFailed(_)) => self.found.is_cut_short = true,
            Effect::End { .. } | Effect::Flush { .. } => {}
            Effect::Answer { .. } | Effect::Notice(_) => {}
        }
    }

    /// A bio goes to a sector of the data device.
    fn issued(&mut self, bio: &Bio, sector: u64) {
        match self.flights.get_mut(&(bio.id, bio.sector)) {
            Some(flight) => {
                flight.at = Some(sector);
                self.look(bio);
            }
            None if bio.op == Op::Write => self.disk.forget(sector),
            None => {}
        }
    }

    /// A read that is issued looks at the data device.
    fn look(&mut self, bio: &Bio) {
        let flight = self.flights.get(&(bio.id, bio.sector));
        if let Some(flight) = flight
            && let (Kind::Read, Some(at)) = (&flight.kind, flight.at)
        {
            let content = self.disk.read(at, bio.sectors);
            self.read(bio, &content);
        }
    }

    /// The data device is done with a bio.
    fn landed(&mut self, bio: &Bio) {
        let flight = self.flights.get(&(bio.id, bio.sector));
        if let Some(flight) = flight
            && let (&Kind::Write(first), Some(at)) = (&flight.kind, flight.at)
        {
            return self.disk.write(at, bio.sectors, &Content::Run(first));
        }
        self.look(bio);
    }

    /// Something that a job began is done.
    fn done(&mut self, job: JobId) {
        self.disk.done(job);
    }

    /// A read found this.
    fn read(&mut self, bio: &Bio, content: &Content) {
        let key = (bio.id, bio.sector);
        let Some(flight) = self.flights.get_mut(&key) else {
            return;
        };
        flight.is_seen = true;
        let (id, begun, was_wrong) = (flight.id, flight.begun, flight.is_wrong);
        if was_wrong || self.found.is_cut_short {
            return;
        }
        let block = bio.sector / self.size;
        let range = bio.sector % self.size..bio.sector % self.size + bio.sectors;
        if let Err(wrong) = self.compare(id, block, range, begun, Found::Content(content)) {
            self.found
                .add_wrong(|| format!("thin device {id}, a read of {wrong}"));
            if let Some(flight) = self.flights.get_mut(&key) {
                flight.is_wrong = true;
            }
        }
    }

    /// A bio has ended.
    fn end(&mut self, bio: &Bio, result: BioResult) {
        let Some(flight) = self.flights.remove(&(bio.id, bio.sector)) else {
            return;
        };
        let (id, begun, now) = (flight.id, flight.begun, self.step());
        // What has no place to go to changes nothing.
        let ended = |what| match result {
            Ok(()) => Some(what),
            Err(BioError::Io) => Some(What::Failed),
            Err(_) => None,
        };
        match flight.kind {
            Kind::Read => {
                let block = bio.sector / self.size;
                if result.is_ok() && !self.found.is_cut_short {
                    self.found.reads += 1;
                    self.found.sectors += bio.sectors;
                    if !flight.is_seen {
                        let sector = bio.sector;
                        self.found.add_wrong(|| {
                            format!("thin device {id}, a read of sector {sector} ended and had read nothing")
                        });
                    }
                }
                if let Some(changes) = self.active.get_mut(&(id, block)) {
                    changes.end_read(begun);
                }
                self.settle(id, block);
            }
            Kind::Write(first) => {
                let block = bio.sector / self.size;
                if let Some(changes) = self.active.get_mut(&(id, block)) {
                    changes.end(begun, ended(What::Write(first)), now);
                }
                self.settle(id, block);
            }
            Kind::Discard(blocks) => {
                let what = result.is_ok().then_some(What::Discard);
                self.end_discard(id, &blocks, begun, what);
            }
        }
    }

    fn end_discard(&mut self, id: ThinId, blocks: &Range<u64>, begun: u64, what: Option<What>) {
        let place = (id, blocks.start / DISCARD_BLOCKS);
        let Some(discards) = self.discards.get_mut(&place) else {
            return;
        };
        discards.retain(|discard| discard.0 != begun);
        if discards.is_empty() {
            self.discards.remove(&place);
        }
        let now = self.step;
        let mut busy = Vec::new();
        for (&(_, block), changes) in self.active_mut(id, blocks) {
            changes.end(begun, what, now);
            busy.push(block);
        }
        if what.is_some() {
            for block in self.devices.blocks(id, blocks.clone()) {
                if busy.binary_search(&block).is_err() {
                    let content = self.devices.get_mut(id, block);
                    *content = content.or_hole();
                }
            }
        }
        for block in busy {
            self.settle(id, block);
        }
    }

    fn settle(&mut self, id: ThinId, block: u64) {
        let Some(changes) = self.active.get_mut(&(id, block)) else {
            return;
        };
        if !changes.is_due() {
            return;
        }
        if changes.has_changes() {
            changes.settle(self.devices.get_mut(id, block), self.size);
        }
        if changes.is_empty() {
            self.active.remove(&(id, block));
        }
    }

    /// A message is about to be carried out. What a snapshot has is what there is before, since the commit that follows gives room to
    /// writes that wait for it; those may be in it or not. A device that is deleted is looked at before.
    fn before_message(&mut self, message: Message, metadata: &PoolMetadata) -> Result<()> {
        if let Message::Delete(id) = message
            && !self.found.is_cut_short
            && metadata.details(id).is_ok()
        {
            self.sweep_device(id, metadata)?;
        }
        if let Message::CreateSnap { origin, .. } = message {
            self.devices.prepare(origin);
            for (&(_, block), changes) in self.active.range((origin, 0)..=(origin, u64::MAX)) {
                let copy = self.devices.get_mut(Devices::TO_COME, block);
                changes.give_up_in_copy(copy, self.size);
            }
        }
        Ok(())
    }

    /// A message was carried out.
    fn message(&mut self, message: Message) {
        match message {
            Message::CreateThin(id) => {
                self.forget(id);
                self.devices.create(id);
            }
            Message::CreateSnap { id, origin } => {
                self.forget(id);
                self.devices.snapshot(id, origin);
            }
            Message::Delete(id) => {
                self.forget(id);
                self.devices.delete(id);
            }
            _ => {}
        }
    }

    /// What is under way on a device that is no more is of no interest.
    fn forget(&mut self, id: ThinId) {
        self.active.retain(|key, _| key.0 != id);
        self.discards.retain(|key, _| key.0 != id);
        self.flights.retain(|_, flight| flight.id != id);
    }

    /// A thin device has an external origin of so many sectors from here on.
    fn opened(&mut self, id: ThinId, origin_sectors: Option<u64>) {
        self.devices.note_origin(id, origin_sectors.unwrap_or(0));
    }

    /// Looks at everything that every thin device has, at the end.
    ///
    /// # Errors
    /// `Io`, `Damaged`: the metadata cannot be read.
    fn sweep(&mut self, metadata: &PoolMetadata) -> Result<()> {
        if self.found.is_cut_short {
            return Ok(());
        }
        for id in metadata.devices()? {
            self.sweep_device(id, metadata)?;
        }
        Ok(())
    }

    fn sweep_device(&mut self, id: ThinId, metadata: &PoolMetadata) -> Result<()> {
        let now = self.step();
        let mut from = 0;
        while let Some((block, to)) = metadata.next_block(id, ThinBlock(from))? {
            if self.is_sampled(block.0) {
                let content = self.disk.read(to.block.0 * self.size, self.size);
                self.sweep_block(id, block.0, now, Found::Content(&content));
            }
            from = block.0 + 1;
        }
        for block in self.devices.blocks(id, 0..u64::MAX) {
            if metadata.find_block(id, ThinBlock(block))?.is_none() {
                self.sweep_block(id, block, now, Found::Hole);
            }
        }
        Ok(())
    }

    fn sweep_block(&mut self, id: ThinId, block: u64, now: u64, found: Found<'_>) {
        self.found.blocks += 1;
        if let Err(wrong) = self.compare(id, block, 0..self.size, now, found) {
            self.found
                .add_wrong(|| format!("thin device {id}, as a whole: {wrong}"));
        }
    }

    /// Sectors of a block hold what a read that began at `begun` may find.
    fn compare(
        &self,
        id: ThinId,
        block: u64,
        range: Range<u64>,
        begun: u64,
        found: Found<'_>,
    ) -> std::result::Result<(), String> {
        let content = self.devices.get(id, block);
        let changes = self.active.get(&(id, block));
        let changes = changes.filter(|changes| changes.has_changes());
        let is_right = |at: u64| {
            let tag = content.at(at);
            let is_it =
                |tag| self.allows(id, block * self.size + at, tag, &found, at - range.start);
            match changes {
                None => is_it(tag),
                Some(changes) => changes.may_find(tag, at, begun).any(is_it),
            }
        };
        if let (None, Found::Content(found)) = (changes, found)
            && content
                .part(range.start, range.end - range.start)
                .is_same(found, range.end - range.start)
        {
            return Ok(());
        }
        let Some(at) = range.clone().find(|&at| !is_right(at)) else {
            return Ok(());
        };
        let sectors = range.clone().filter(|&at| !is_right(at)).count();
        let tags = match changes {
            None => vec![content.at(at)],
            Some(changes) => changes.may_find(content.at(at), at, begun).collect(),
        };
        let expected: Vec<String> = tags.into_iter().map(|tag| self.words(tag)).collect();
        let found = match found {
            Found::Hole => "nothing mapped".into(),
            Found::Content(content) => self.words(content.at(at - range.start)),
        };
        Err(format!(
            "sector {}: found {found}; expected {} ({sectors} of {} sectors are wrong)",
            block * self.size + at,
            expected.join(" or "),
            range.end - range.start
        ))
    }

    fn allows(&self, id: ThinId, sector: u64, tag: Tag, found: &Found<'_>, at: u64) -> bool {
        let content = match found {
            Found::Hole => return tag.may_be_hole(),
            Found::Content(content) => content.at(at),
        };
        let is_hole = || self.is_unzeroed || self.devices.is_of_hole(id, sector, content);
        tag == Tag::ANY || tag.but_for_hole() == content || tag.may_be_hole() && is_hole()
    }

    /// What a tag stands for, and whose it is.
    fn words(&self, tag: Tag) -> String {
        let known = tag.but_for_hole();
        if !known.is_of_write() || self.found.first.len() >= MOST_TOLD {
            return tag.to_string();
        }
        match self.devices.whose(known, self.size) {
            Some((id, sector)) => format!("{tag}, which is sector {sector} of thin device {id}"),
            None => format!("{tag}, which nobody has by now"),
        }
    }
}

/// What there is at a place.
#[derive(Clone, Copy)]
enum Found<'a> {
    /// Nothing is mapped there.
    Hole,
    Content(&'a Content),
}
