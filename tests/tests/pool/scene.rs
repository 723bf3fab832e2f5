//! Pools on metadata that records and fails, what a crash leaves of them, and picking from what is pending.

use std::collections::BTreeMap;
use std::sync::Arc;

use thintools::io::{AlignedBuffer, BlockEngine, RamEngine};
use thintools::pool::{BioResult, Event, Features, Op, PoolMode, Settings, Thin};
use thintools::thin::PoolMetadata;
use thintools::units::{BLOCK_SIZE, ThinBlock, ThinId};

use super::disk::{CHUNK, Disk, Tag};
use super::rig::{BLOCK, Io, Rig, settings, table};
use crate::crash::{Recorder, Step, codes_of};

pub(crate) const CHUNKS: u64 = BLOCK / CHUNK;
const METADATA_BLOCKS: usize = 256;

/// A new pool on metadata that records what is written to it from here on.
pub(crate) fn recorded(data_blocks: u64, settings: Settings) -> (Rig, Arc<Recorder>) {
    let image = image_of(METADATA_BLOCKS, data_blocks);
    reopened(&image, Disk::used(), data_blocks, settings)
}

/// An empty pool.
pub(crate) fn image_of(metadata_blocks: usize, data_blocks: u64) -> Vec<u8> {
    let engine = Arc::new(RamEngine::new(metadata_blocks));
    let mut metadata =
        PoolMetadata::format(Arc::clone(&engine) as _, BLOCK as u32, 1 << 20).expect("formatted");
    metadata.resize_data(data_blocks).expect("resized");
    metadata.commit().expect("committed");
    let mut image = AlignedBuffer::new(metadata_blocks);
    let bytes = image.blocks_mut(metadata_blocks);
    engine.read(Default::default(), bytes).expect("memory");
    bytes.to_vec()
}

/// The pool that is in `image`.
pub(crate) fn reopened(
    image: &[u8],
    disk: Disk,
    data_blocks: u64,
    settings: Settings,
) -> (Rig, Arc<Recorder>) {
    let engine = Arc::new(Recorder::new(image));
    let metadata = PoolMetadata::open(Arc::clone(&engine) as _, 1 << 20).expect("opened");
    let rig = Rig::on(metadata, disk, data_blocks, settings).expect("started");
    (rig, engine)
}

pub(crate) fn with(features: Features) -> Settings {
    Settings::new(table(features))
}

/// With the kernel's steps joined.
pub(crate) fn in_one_go() -> Settings {
    Settings {
        joins_discards: true,
        zeroes_with_write: true,
        ..settings()
    }
}

/// What a crash leaves of the metadata if everything is lost that was not flushed.
pub(crate) fn flushed(engine: &Recorder) -> Vec<u8> {
    let mut image = engine.before();
    let steps = engine.steps();
    let end = steps.iter().rposition(|s| matches!(s, Step::Sync));
    for step in &steps[..end.unwrap_or(0)] {
        if let Step::Write(block, data) = step {
            image[*block as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(data);
        }
    }
    image
}

/// The pool after a crash that loses everything that was not flushed.
pub(crate) fn crashed(rig: &Rig, engine: &Recorder) -> Rig {
    let disk = rig.disk.clone().crash(|| false);
    reopened(&flushed(engine), disk, rig.data_blocks, settings()).0
}

/// Nothing is wrong with the metadata, not even a leak.
#[track_caller]
pub(crate) fn assert_sound(image: Vec<u8>) {
    assert_eq!(codes_of(image), [].into());
}

/// Commits: each ends with the superblock.
pub(crate) fn commits(engine: &Recorder) -> usize {
    let steps = engine.steps();
    let is_superblock = |s: &&Step| matches!(s, Step::Write(0, _));
    steps.iter().filter(is_superblock).count()
}

/// The mappings of all devices.
pub(crate) type Mappings = BTreeMap<u64, BTreeMap<u64, u64>>;

pub(crate) fn mappings_in(image: &[u8]) -> Mappings {
    let engine = Arc::new(RamEngine::from_bytes(image.to_vec()));
    let metadata = PoolMetadata::open(engine, 1 << 20).expect("opened");
    let devices = metadata.devices().expect("read");
    let mappings_of = |id: ThinId| {
        let mut mappings = BTreeMap::new();
        let mut from = 0;
        while let Some((block, at)) = metadata.next_block(id, ThinBlock(from)).expect("read") {
            mappings.insert(block.0, at.block.0);
            from = block.0 + 1;
        }
        (id.0, mappings)
    };
    devices.into_iter().map(mappings_of).collect()
}

pub(crate) fn is_zero(io: &Io) -> bool {
    matches!(io, Io::Zero { .. })
}

pub(crate) fn is_copy(io: &Io) -> bool {
    matches!(io, Io::Copy { .. })
}

pub(crate) fn is_discard(io: &Io) -> bool {
    matches!(io, Io::Discard { .. })
}

/// The flush of the data device that begins a commit.
pub(crate) fn is_flush(io: &Io) -> bool {
    matches!(io, Io::Flush { .. })
}

pub(crate) fn is_bio(id: u64) -> impl Fn(&Io) -> bool {
    move |io| matches!(io, Io::Bio { bio, .. } | Io::Origin { bio, .. } if bio.id == id)
}

impl Rig {
    pub(crate) fn has_pending(&self, is: impl Fn(&Io) -> bool) -> bool {
        self.pending.iter().any(|pending| is(&pending.io))
    }

    /// Carries out the oldest request of those that are meant, or lets it fail.
    #[track_caller]
    pub(crate) fn end_one(&mut self, is: impl Fn(&Io) -> bool, result: BioResult) {
        let found = self.pending.iter().position(|pending| is(&pending.io));
        let at = found.unwrap_or_else(|| panic!("none is pending: {:?}", self.pending));
        self.carry_out(at, result);
    }

    /// A result, if the bio is done.
    pub(crate) fn result(&self, id: u64) -> Option<BioResult> {
        self.done.get(&id).map(|done| done.result)
    }

    /// How often a bio was issued.
    pub(crate) fn issued(&self, id: u64) -> usize {
        let bio = format!("Issue {{ bio: Bio {{ id: {id},");
        self.log
            .iter()
            .filter(|line| line.starts_with(&bio))
            .count()
    }

    /// Submits without letting the worker run. Returns the number.
    pub(crate) fn map_only(&mut self, thin: &Thin, op: Op, sector: u64, sectors: u64) -> u64 {
        let id = self.number();
        self.map(thin, thintools::pool::Bio::new(id, op, sector, sectors));
        id
    }

    /// What is in the whole block, each chunk.
    #[track_caller]
    pub(crate) fn content(&mut self, thin: &Thin, block: u64) -> Vec<Tag> {
        self.read(thin, block * BLOCK, BLOCK).expect("read")
    }

    /// One tag for the whole block.
    #[track_caller]
    pub(crate) fn assert_block(&mut self, thin: &Thin, block: u64, tag: Tag) {
        assert_eq!(self.content(thin, block), vec![tag; CHUNKS as usize]);
    }

    /// Asks for a commit, whose I/O is left pending.
    pub(crate) fn commit_now(&mut self) {
        let tag = self.number();
        self.tell(Event::Commit { tag });
    }

    /// Commits, and what is on the metadata device then is sound and says the same as memory.
    #[track_caller]
    pub(crate) fn assert_counts(&mut self, engine: &Recorder) {
        self.commit().expect("committed");
        assert_sound(engine.contents());
    }

    #[track_caller]
    pub(crate) fn assert_mode(&self, mode: PoolMode) {
        assert_eq!(self.pool.mode(), mode);
    }
}
