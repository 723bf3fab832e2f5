//! The sink that writes metadata: judges every event, builds the trees, counts references, writes the space maps.
//!
//! Run twice over the same source it first rehearses (nothing is written, the size is learnt, every event judged) and then
//! writes; the superblock comes last, after a flush.

use super::event::{Device, PoolInfo, Run, Sink};
use crate::bytes::{get_u32, get_u64};
use crate::error::{Error, ErrorKind, Result};
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{
    BlockSink, CountBatch, CountMap, MetadataWriter, NODE_HEADER, SharedTree, TreeBuilder,
    build_data_map, build_metadata_map, max_entries, nr_bitmaps,
};
use crate::thin::{BlockTime, DeviceDetail, Fields};
use crate::units::{
    DataBlock, MAX_METADATA_BLOCKS, MAX_THIN_ID, MAX_TIME, MetadataBlock, is_legal_data_block_size,
};
use std::collections::{BTreeMap, HashMap};

/// Where mappings go at the moment.
#[derive(Debug)]
enum Open {
    Nothing,
    Definition(String),
    Device(Device),
}

#[derive(Clone, Copy, Debug)]
struct Definition {
    /// The root of its tree; none for a definition without mappings.
    node: Option<u32>,
    first: u64,
    last: u64,
    mappings: u64,
}

/// Builds metadata from events.
pub struct Restorer<'a> {
    writer: MetadataWriter<'a>,
    observer: &'a dyn Observer,
    pool: Option<PoolInfo>,
    data_counts: CountMap,
    batch: CountBatch,
    shared: SharedTree,
    definitions: HashMap<String, Definition>,
    devices: BTreeMap<u64, (MetadataBlock, DeviceDetail)>,
    open: Open,
    tree: TreeBuilder<u64>,
    /// A definition that opens a device: if nothing else follows, the device shares its whole tree.
    alone: Option<u32>,
    /// First virtual block of the open device or definition, once it has one.
    first_thin: u64,
    /// First virtual block that may come next.
    next_thin: u64,
    mapped: u64,
    total: u64,
}

impl std::fmt::Debug for Restorer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Restorer")
            .field("writer", &self.writer)
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

impl<'a> Restorer<'a> {
    /// A restorer for a device of `nr_blocks` blocks; without an engine it rehearses.
    pub fn new(
        engine: Option<&'a dyn BlockEngine>,
        nr_blocks: u64,
        observer: &'a dyn Observer,
    ) -> Self {
        let data_counts = CountMap::new(0);
        Self {
            writer: MetadataWriter::new(engine, CountMap::new(nr_blocks.min(MAX_METADATA_BLOCKS))),
            observer,
            pool: None,
            batch: CountBatch::new(&data_counts),
            data_counts,
            shared: SharedTree::default(),
            definitions: HashMap::new(),
            devices: BTreeMap::new(),
            open: Open::Nothing,
            tree: TreeBuilder::new(),
            alone: None,
            first_thin: 0,
            next_thin: 0,
            mapped: 0,
            total: 0,
        }
    }

    /// Mappings of all devices told so far, those of references included.
    pub fn mappings(&self) -> u64 {
        self.total
    }

    /// One past the highest block in use.
    pub fn used_blocks(&self) -> u64 {
        self.writer.used()
    }

    /// Writes the remaining trees and the space maps; the superblock's fields come back, to be written after a flush.
    ///
    /// # Errors
    /// `InvalidDescription` when the events stopped short, `OutputTooSmall`, `Io`.
    pub fn finish(&mut self) -> Result<Fields> {
        let Some(pool) = self.pool.take() else {
            return Err(Error::new(
                ErrorKind::InvalidDescription,
                "there is no superblock in it",
            ));
        };
        let mut none = SharedTree::default();
        let mut details = TreeBuilder::<DeviceDetail>::new();
        let mut roots = TreeBuilder::<u64>::new();
        for (&id, &(root, detail)) in &self.devices {
            details.push(&mut self.writer, &mut none, id, detail)?;
            roots.push(&mut self.writer, &mut none, id, root.0)?;
        }
        let mapping_root = roots.finish(&mut self.writer, &mut none)?.root;
        let details_root = details.finish(&mut self.writer, &mut none)?.root;
        self.batch.flush(&self.data_counts);
        self.settle_shared()?;
        let data_space_map = build_data_map(&mut self.writer, &self.data_counts, &|_| None)?;
        let metadata_space_map = build_metadata_map(&mut self.writer, &[])?;
        self.writer.flush()?;
        let nr_blocks = self.writer.nr_blocks();
        Ok(Fields {
            uuid: uuid_bytes(&pool.uuid),
            time: pool.time,
            transaction_id: pool.transaction,
            mapping_root,
            details_root,
            data_block_size: pool.data_block_size,
            data_space_map,
            metadata_space_map,
            ..Fields::fresh(nr_blocks)
        })
    }

    /// Gives the nodes of definitions the references they have; a node that nobody attached is free again, and so are the
    /// data blocks that only it maps.
    fn settle_shared(&mut self) -> Result<()> {
        for (block, references, is_leaf) in self.shared.references() {
            if references > 1 {
                self.writer.counts().add(block.0, references - 1);
            }
            if references == 0 {
                self.writer.counts().remove_one(block.0);
                if is_leaf {
                    let contents = self.writer.read_back(block)?;
                    let entries = get_u32(&contents, 16) as usize;
                    for i in 0..entries {
                        let value = get_u64(&contents, NODE_HEADER + 8 * (max_entries(8) + i));
                        self.data_counts
                            .remove_one(BlockTime::unpack(value).block.0);
                    }
                }
            }
        }
        Ok(())
    }

    fn nr_data_blocks(&self) -> u64 {
        self.data_counts.nr_blocks()
    }

    fn count_copied(&mut self) {
        for value in self.tree.copied.drain(..) {
            let block = BlockTime::unpack(value).block.0;
            if block < self.data_counts.nr_blocks() {
                self.data_counts.add(block, 1);
            }
        }
    }

    /// Attaches the definition that opened the device, now that something follows it.
    fn attach_alone(&mut self) -> Result<()> {
        if let Some(node) = self.alone.take() {
            self.tree.attach(&mut self.writer, &mut self.shared, node)?;
            self.count_copied();
        }
        Ok(())
    }

    fn start(&mut self, open: Open, tree: TreeBuilder<u64>) -> Result<()> {
        if self.pool.is_none() || !matches!(self.open, Open::Nothing) {
            return Err(Error::event(
                0,
                "superblock",
                "a device or definition stands where none may",
            ));
        }
        self.open = open;
        self.tree = tree;
        self.next_thin = 0;
        self.mapped = 0;
        Ok(())
    }

    /// Judges a run against the pool, and against what came before it in its device or definition.
    fn judge(&self, index: usize, run: &Run) -> Result<()> {
        let is_single = run.length == 1;
        let name = |single, range| if is_single { single } else { range };
        if run.length == 0 {
            return Err(Error::event(
                index,
                "length",
                "length is 0; a range has at least 1 block",
            ));
        }
        if run.thin_begin.0 < self.next_thin {
            return Err(Error::event(
                index,
                name("origin_block", "origin_begin"),
                format!(
                    "virtual block {} comes after block {}; mappings ascend and do not overlap",
                    run.thin_begin,
                    self.next_thin - 1
                ),
            ));
        }
        if run.thin_begin.0.checked_add(run.length).is_none() {
            return Err(Error::event(
                index,
                "length",
                format!(
                    "{} blocks from virtual block {} do not fit 64 bits",
                    run.length, run.thin_begin
                ),
            ));
        }
        let limit = self.nr_data_blocks();
        if run.data_begin.0 >= limit || run.length > limit - run.data_begin.0 {
            let at = if run.data_begin.0 >= limit {
                name("data_block", "data_begin")
            } else {
                "length"
            };
            return Err(Error::event(
                index,
                at,
                format!(
                    "{} blocks from data block {}: the pool has {limit} data blocks (nr_data_blocks)",
                    run.length, run.data_begin
                ),
            ));
        }
        judge_time(
            index,
            "time",
            run.time,
            self.pool.as_ref().map_or(MAX_TIME, |p| p.time),
        )?;
        // Said before the blocks of an absurd range are counted one by one.
        let nr_blocks = self.writer.nr_blocks();
        if run.length / max_entries(8) as u64 >= nr_blocks {
            return Err(Error::event(
                index,
                "length",
                format!(
                    "{} mappings do not fit metadata of {nr_blocks} blocks",
                    run.length
                ),
            )
            .with_kind(ErrorKind::OutputTooSmall));
        }
        Ok(())
    }
}

fn judge_time(index: usize, attribute: &'static str, time: u32, clock: u32) -> Result<()> {
    if time > MAX_TIME {
        return Err(Error::event(
            index,
            attribute,
            format!("{attribute} is {time}; metadata holds times up to {MAX_TIME}"),
        ));
    }
    if time > clock {
        return Err(Error::event(
            index,
            attribute,
            format!(
                "{attribute} is {time}, later than the superblock's time {clock}: new snapshots would not be kept apart"
            ),
        ));
    }
    Ok(())
}

/// Bytes of the uuid field.
const UUID_BYTES: usize = 16;

/// The uuid field for a dumped text.
pub(super) fn uuid_bytes(text: &str) -> [u8; UUID_BYTES] {
    let mut bytes = [0; UUID_BYTES];
    for (to, from) in bytes.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

impl Sink for Restorer<'_> {
    fn pool(&mut self, pool: &PoolInfo) -> Result<()> {
        if self.pool.is_some() {
            return Err(Error::event(0, "superblock", "a second superblock"));
        }
        if !is_legal_data_block_size(pool.data_block_size) {
            return Err(Error::event(
                0,
                "data_block_size",
                format!(
                    "data_block_size is {} sectors; the kernel takes 128 to 2097152 in steps of 128",
                    pool.data_block_size
                ),
            ));
        }
        judge_time(0, "time", pool.time, MAX_TIME)?;
        if pool.uuid.len() > UUID_BYTES {
            return Err(Error::event(
                0,
                "uuid",
                format!("uuid {:?} is longer than {UUID_BYTES} bytes", pool.uuid),
            ));
        }
        let nr_blocks = self.writer.nr_blocks();
        let bitmaps = nr_bitmaps(pool.nr_data_blocks);
        if bitmaps >= nr_blocks {
            let kind = if bitmaps >= MAX_METADATA_BLOCKS {
                ErrorKind::InvalidDescription
            } else {
                ErrorKind::OutputTooSmall
            };
            let fault = Error::event(
                0,
                "nr_data_blocks",
                format!(
                    "nr_data_blocks is {}: its space map alone needs {bitmaps} metadata blocks, the output has {nr_blocks} \
                     (and the format at most {MAX_METADATA_BLOCKS})",
                    pool.nr_data_blocks
                ),
            );
            return Err(fault.with_kind(kind));
        }
        self.data_counts = CountMap::new(pool.nr_data_blocks);
        self.batch = CountBatch::new(&self.data_counts);
        self.pool = Some(pool.clone());
        Ok(())
    }

    fn define(&mut self, name: &str) -> Result<()> {
        if self.definitions.contains_key(name) {
            return Err(Error::event(
                0,
                "name",
                format!("a second definition of {name:?}"),
            ));
        }
        self.start(Open::Definition(name.to_owned()), TreeBuilder::recorded())
    }

    fn end_define(&mut self) -> Result<()> {
        let Open::Definition(name) = std::mem::replace(&mut self.open, Open::Nothing) else {
            return Err(Error::event(
                0,
                "def",
                "the end of a definition that was not begun",
            ));
        };
        let mut definition = Definition {
            node: None,
            first: 0,
            last: 0,
            mappings: self.mapped,
        };
        if self.mapped > 0 {
            definition.first = self.first_thin;
            definition.last = self.next_thin - 1;
            definition.node = self.tree.finish(&mut self.writer, &mut self.shared)?.shared;
        }
        self.definitions.insert(name, definition);
        Ok(())
    }

    fn device(&mut self, device: &Device) -> Result<()> {
        if device.dev_id.0 > MAX_THIN_ID {
            return Err(Error::event(
                0,
                "dev_id",
                format!(
                    "dev_id is {}; the kernel takes ids up to {MAX_THIN_ID}",
                    device.dev_id
                ),
            ));
        }
        if self.devices.contains_key(&device.dev_id.0) {
            return Err(Error::event(
                0,
                "dev_id",
                format!("a second device {}", device.dev_id),
            ));
        }
        judge_time(0, "creation_time", device.creation_time, MAX_TIME)?;
        judge_time(0, "snap_time", device.snap_time, MAX_TIME)?;
        self.observer.check_cancelled()?;
        self.start(Open::Device(*device), TreeBuilder::new())
    }

    fn end_device(&mut self) -> Result<()> {
        let Open::Device(device) = std::mem::replace(&mut self.open, Open::Nothing) else {
            return Err(Error::event(
                0,
                "device",
                "the end of a device that was not begun",
            ));
        };
        let root = match self.alone.take() {
            Some(node) => self.shared.refer(node),
            None => {
                let tree = self.tree.finish(&mut self.writer, &mut self.shared)?;
                match tree.shared {
                    Some(node) => self.shared.refer(node),
                    None => tree.root,
                }
            }
        };
        self.count_copied();
        if device.mapped_blocks != self.mapped {
            self.observer.warning(&format!(
                "device {}: mapped_blocks says {}, {} are mapped; the latter is written",
                device.dev_id, device.mapped_blocks, self.mapped
            ));
        }
        let detail = DeviceDetail {
            mapped_blocks: self.mapped,
            transaction_id: device.transaction,
            creation_time: device.creation_time,
            snapshotted_time: device.snap_time,
        };
        self.total = self.total.saturating_add(self.mapped);
        self.devices.insert(device.dev_id.0, (root, detail));
        Ok(())
    }

    fn mappings(&mut self, runs: &[Run]) -> Result<()> {
        if matches!(self.open, Open::Nothing) {
            return Err(Error::event(
                0,
                "device",
                "mappings outside of a device or definition",
            ));
        }
        self.attach_alone()?;
        self.observer.check_cancelled()?;
        for (index, run) in runs.iter().enumerate() {
            self.judge(index, run)?;
            if self.mapped == 0 {
                self.first_thin = run.thin_begin.0;
            }
            for i in 0..run.length {
                let data = run.data_begin.0 + i;
                let value = BlockTime {
                    block: DataBlock(data),
                    time: run.time,
                };
                let thin = run.thin_begin.0 + i;
                self.tree
                    .push(&mut self.writer, &mut self.shared, thin, value.pack())?;
                self.batch.add(&self.data_counts, data);
            }
            self.next_thin = run.thin_begin.0 + run.length;
            self.mapped += run.length;
        }
        Ok(())
    }

    fn reference(&mut self, name: &str) -> Result<()> {
        if !matches!(self.open, Open::Device(_)) {
            return Err(Error::event(0, "ref", "a reference outside of a device"));
        }
        let Some(&definition) = self.definitions.get(name) else {
            return Err(Error::event(
                0,
                "name",
                format!("there is no definition {name:?} before this reference"),
            ));
        };
        let Some(node) = definition.node else {
            return Ok(());
        };
        if definition.first < self.next_thin {
            return Err(Error::event(
                0,
                "name",
                format!(
                    "definition {name:?} begins at virtual block {}, after block {}; mappings ascend and do not overlap",
                    definition.first,
                    self.next_thin - 1
                ),
            ));
        }
        self.attach_alone()?;
        if self.tree.is_empty() {
            self.alone = Some(node);
        } else {
            self.tree.attach(&mut self.writer, &mut self.shared, node)?;
            self.count_copied();
        }
        self.next_thin = definition.last + 1;
        self.mapped += definition.mappings;
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        if matches!(self.open, Open::Nothing) {
            return Ok(());
        }
        Err(Error::event(
            0,
            "superblock",
            "the end inside a device or definition",
        ))
    }
}
