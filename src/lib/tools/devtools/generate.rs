//! Makes metadata with a history: a pool that went through transactions as the kernel commits them, so that freed blocks
//! still hold older nodes, correctly sealed.
//!
//! Invariants:
//! 1. A block that the last commit uses is not written before the next commit, and is not free before it either.
//! 2. Blocks are taken in ascending order from a cursor that goes around, as the kernel's allocator does.
//! 3. A node is changed in place only if this transaction made it and nothing else leads to it; else a copy is (shadowing).

use super::super::metadata_source::read_small_tree;
use super::random::{Random, Shuffle};
use crate::bytes::{put_u32, put_u64};
use crate::checksum::{self, BlockKind};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{BlockEngine, RamEngine};
use crate::observer::{Observer, Silent};
use crate::pdata::{
    BlockSink, CountMap, Forest, IndexEntry, NODE_HEADER, Node, SharedTree, TreeBuilder, TreeKind,
    build_data_map, build_metadata_map, max_entries, nr_bitmaps,
};
use crate::thin::{BlockTime, DeviceDetail, Fields, SUPERBLOCK, read_block};
use crate::units::{
    DataBlock, ENTRIES_PER_BITMAP, MAX_DATA_BLOCKS, MAX_METADATA_BLOCKS, MAX_THIN_ID, MAX_TIME,
    MetadataBlock,
};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Entries of a mapping leaf, or of any inner node.
const CAPACITY: usize = max_entries(8);
/// Where the values of such a node begin.
const VALUES: usize = NODE_HEADER + 8 * CAPACITY;
/// A transaction changes one device of so many.
const PART: u64 = 4;
/// Places at which a transaction changes a device.
const PLACES: u64 = 3;
/// Mappings that it changes at one place, at most.
const CHANGES: u64 = 12;
/// Virtual blocks for each mapping of a random device.
const SPREAD: u64 = 4;
/// Every so many transactions a snapshot is taken that is deleted two transactions later.
const PASSING: u64 = 4;

/// How mappings are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// All virtual blocks from 0, data blocks one after the other.
    Sequential,
    /// Every fourth virtual block or so, data blocks in a random order.
    Random,
}

/// What metadata to make.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Devices that are no snapshots.
    pub devices: u64,
    /// Mappings of each.
    pub mappings: u64,
    /// How they are laid out.
    pub pattern: Pattern,
    /// Snapshots, of one device after the other.
    pub snapshots: u64,
    /// Transactions after the one that made the devices.
    pub transactions: u64,
    /// Selects everything that is random.
    pub seed: u64,
    /// In sectors of 512 bytes.
    pub data_block_size: u32,
    /// Metadata blocks; none takes four times what is needed.
    pub metadata_blocks: Option<u64>,
}

/// Makes the metadata.
///
/// # Errors
/// `Unsuitable` when the format cannot hold that much, `OutputTooSmall` when the metadata blocks do not suffice,
/// `Interrupted`.
pub fn generate(recipe: &Recipe, observer: &dyn Observer) -> Result<RamEngine> {
    let mut history = History::new(recipe)?;
    for id in 0..recipe.devices {
        observer.check_cancelled()?;
        history.create(recipe, id)?;
    }
    let mut snapshots = 0;
    for transaction in 0..=recipe.transactions {
        observer.check_cancelled()?;
        if transaction > 0 {
            history.change_devices()?;
            history.passing_snapshot(transaction, recipe.transactions)?;
        }
        // Spread over the transactions, the last of them in the last.
        let due = recipe.snapshots * (transaction + 1) / (recipe.transactions + 1);
        while snapshots < due {
            history.snapshot(snapshots % recipe.devices, recipe.devices + snapshots)?;
            snapshots += 1;
        }
        history.commit()?;
    }
    Ok(history.store.engine)
}

/// Metadata blocks, with their counts.
struct Store {
    engine: RamEngine,
    counts: CountMap,
    /// Where the search for a free block goes on.
    cursor: u64,
    /// Freed in this transaction: the last commit still uses them.
    freed: HashSet<u64>,
    /// Made in this transaction.
    fresh: HashSet<u64>,
    /// Handed out since somebody last asked.
    taken: Vec<MetadataBlock>,
}

impl Store {
    fn read(&self, block: MetadataBlock) -> Result<Vec<u8>> {
        Ok(read_block(&self.engine, block)?.blocks(1).to_vec())
    }

    /// Takes one reference from `block`; true if that was the last.
    fn release(&mut self, block: MetadataBlock) -> bool {
        self.counts.remove_one(block.0);
        let is_free = self.counts.get(block.0) == 0;
        if is_free {
            self.freed.insert(block.0);
        }
        is_free
    }
}

impl BlockSink for Store {
    fn allocate(&mut self) -> Result<MetadataBlock> {
        let limit = self.counts.nr_blocks();
        let around = (self.cursor..limit).chain(1..self.cursor);
        let mut free = around.filter(|b| self.counts.get(*b) == 0 && !self.freed.contains(b));
        let Some(block) = free.next() else {
            return Err(Error::new(
                ErrorKind::OutputTooSmall,
                format!("{limit} metadata blocks do not suffice; give a larger --metadata-size"),
            ));
        };
        self.cursor = block + 1;
        self.counts.add(block, 1);
        self.fresh.insert(block);
        self.taken.push(MetadataBlock(block));
        Ok(MetadataBlock(block))
    }

    fn write(&mut self, block: MetadataBlock, kind: BlockKind, contents: &[u8]) -> Result<()> {
        let mut sealed = contents.to_vec();
        checksum::seal(&mut sealed, kind, block);
        self.engine
            .write(block, &sealed)
            .map_err(|e| Error::io(format!("cannot write metadata block {block}"), e))
    }

    fn keep(&mut self, _: MetadataBlock, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn read_back(&mut self, block: MetadataBlock) -> Result<Vec<u8>> {
        self.read(block)
    }

    fn counts(&mut self) -> &mut CountMap {
        &mut self.counts
    }
}

/// A device's tree and details.
#[derive(Clone, Copy)]
struct Device {
    root: MetadataBlock,
    detail: DeviceDetail,
}

/// A pool in the middle of a transaction.
struct History {
    store: Store,
    random: Random,
    data: CountMap,
    order: Shuffle,
    is_random: bool,
    /// The next place in the order of data blocks.
    next_data: u64,
    /// Data blocks freed in this transaction.
    freed_data: HashSet<u64>,
    /// The data bitmaps of the last commit.
    bitmaps: HashMap<u64, MetadataBlock>,
    /// Those that have other counts now.
    dirty: HashSet<u64>,
    /// Blocks of top-level tree, details and data space map, bitmaps aside, of the last commit.
    old: Vec<MetadataBlock>,
    /// Blocks of the metadata space map of the last commit.
    old_map: Vec<MetadataBlock>,
    devices: BTreeMap<u64, Device>,
    /// The id of snapshots that are deleted again.
    passing: u64,
    fields: Fields,
}

impl History {
    fn new(recipe: &Recipe) -> Result<Self> {
        let Recipe {
            devices, mappings, ..
        } = *recipe;
        let unsuitable = |message: String| Err(Error::new(ErrorKind::Unsuitable, message));
        let changed = devices.saturating_add(recipe.snapshots) / PART + 1;
        let changed = changed
            .saturating_mul(recipe.transactions)
            .saturating_mul(PLACES * CHANGES);
        let total = devices.saturating_mul(mappings);
        let ids = devices.saturating_add(recipe.snapshots);
        if devices == 0 || ids >= MAX_THIN_ID {
            return unsuitable(format!(
                "{devices} devices with {} snapshots; give 1 to {MAX_THIN_ID} in all, of which one is no snapshot",
                recipe.snapshots
            ));
        }
        if recipe.snapshots.saturating_add(recipe.transactions) >= u64::from(MAX_TIME) {
            return unsuitable(format!(
                "{} snapshots and {} transactions are too many for the snapshot clock; give fewer",
                recipe.snapshots, recipe.transactions
            ));
        }
        // Twice as many data blocks as mappings, and more for those that change.
        let nr_data_blocks = total.saturating_mul(2).saturating_add(changed).max(4096);
        let (bits, nodes) = match nr_data_blocks.checked_next_power_of_two() {
            Some(blocks) if blocks <= MAX_DATA_BLOCKS => {
                let leaves = mappings.div_ceil(CAPACITY as u64) + 2;
                let trees = devices * (leaves + leaves / CAPACITY as u64);
                (blocks.ilog2(), trees + nr_bitmaps(blocks) + ids / 50 + 100)
            }
            _ => return unsuitable(format!("{total} mappings are too many; give fewer")),
        };
        let nr_blocks = recipe.metadata_blocks.unwrap_or(4 * nodes);
        if nr_blocks > MAX_METADATA_BLOCKS {
            return unsuitable(format!(
                "{nr_blocks} metadata blocks; the format holds {MAX_METADATA_BLOCKS}, give a smaller --metadata-size or fewer \
                 mappings"
            ));
        }
        let mut counts = CountMap::new(nr_blocks);
        if nr_blocks > 0 {
            counts.add(SUPERBLOCK.0, 1);
        }
        Ok(Self {
            store: Store {
                engine: RamEngine::new(nr_blocks as usize),
                counts,
                cursor: 1,
                freed: HashSet::new(),
                fresh: HashSet::new(),
                taken: Vec::new(),
            },
            random: Random::new(recipe.seed),
            data: CountMap::new(1 << bits),
            order: Shuffle::new(bits, recipe.seed),
            is_random: recipe.pattern == Pattern::Random,
            next_data: 0,
            freed_data: HashSet::new(),
            bitmaps: HashMap::new(),
            dirty: HashSet::new(),
            passing: ids,
            old: Vec::new(),
            old_map: Vec::new(),
            devices: BTreeMap::new(),
            fields: Fields {
                data_block_size: recipe.data_block_size,
                ..Fields::fresh(nr_blocks)
            },
        })
    }

    /// Makes a device with all its mappings.
    fn create(&mut self, recipe: &Recipe, id: u64) -> Result<()> {
        let mut none = SharedTree::default();
        let mut tree = TreeBuilder::<u64>::new();
        for i in 0..recipe.mappings {
            let thin = match recipe.pattern {
                Pattern::Sequential => i,
                Pattern::Random => i * SPREAD + self.random.below(SPREAD),
            };
            let value = self.new_value()?;
            tree.push(&mut self.store, &mut none, thin, value)?;
        }
        let root = tree.finish(&mut self.store, &mut none)?.root;
        let detail = DeviceDetail {
            mapped_blocks: recipe.mappings,
            transaction_id: self.fields.transaction_id,
            creation_time: self.fields.time,
            snapshotted_time: self.fields.time,
        };
        self.devices.insert(id, Device { root, detail });
        Ok(())
    }

    /// Takes a snapshot.
    fn snapshot(&mut self, origin: u64, id: u64) -> Result<()> {
        self.fields.time += 1;
        let time = self.fields.time;
        let Some(device) = self.devices.get_mut(&origin) else {
            return Err(no_device(origin));
        };
        device.detail.snapshotted_time = time;
        let mut copy = *device;
        copy.detail.creation_time = time;
        copy.detail.transaction_id = self.fields.transaction_id;
        self.store.counts.add(copy.root.0, 1);
        self.devices.insert(id, copy);
        Ok(())
    }

    /// Takes a snapshot now and then, and deletes it two transactions later.
    fn passing_snapshot(&mut self, transaction: u64, last: u64) -> Result<()> {
        if transaction % PASSING == 1 && transaction + 2 <= last {
            let origin = self.any_device();
            self.snapshot(origin, self.passing)?;
        } else if transaction % PASSING == 3
            && let Some(device) = self.devices.remove(&self.passing)
        {
            self.delete(device.root)?;
        }
        Ok(())
    }

    fn any_device(&mut self) -> u64 {
        let ids: Vec<u64> = self.devices.keys().copied().collect();
        self.random.pick(&ids).unwrap_or(0)
    }

    /// Takes the reference of a device from its tree.
    fn delete(&mut self, root: MetadataBlock) -> Result<()> {
        let mut roots = vec![root];
        while let Some(block) = roots.pop() {
            if !self.store.release(block) {
                continue;
            }
            let contents = self.store.read(block)?;
            let (is_leaf, entries) = entries(&contents, block)?;
            for (_, value) in entries {
                match is_leaf {
                    true => self.unmap(value),
                    false => roots.push(MetadataBlock(value)),
                }
            }
        }
        Ok(())
    }

    /// Changes mappings of some devices.
    fn change_devices(&mut self) -> Result<()> {
        let mut ids: Vec<u64> = self.devices.keys().copied().collect();
        let changed = ids.len().div_ceil(PART as usize);
        for id in self.random.take(&mut ids, changed) {
            for _ in 0..PLACES {
                self.change_device(id)?;
            }
        }
        Ok(())
    }

    /// Changes a few neighbouring mappings somewhere in a device.
    fn change_device(&mut self, id: u64) -> Result<()> {
        let root = self.devices.get(&id).ok_or_else(|| no_device(id))?.root;
        let root = self.shadow(root)?;
        let mut block = root;
        let (mut contents, mut pairs) = loop {
            let mut contents = self.store.read(block)?;
            let (is_leaf, pairs) = entries(&contents, block)?;
            if is_leaf {
                break (contents, pairs);
            }
            let at = self.random.below(pairs.len() as u64) as usize;
            let child = self.shadow(MetadataBlock(pairs[at].1))?;
            put_u64(&mut contents, VALUES + 8 * at, child.0);
            self.store.write(block, BlockKind::Node, &contents)?;
            block = child;
        };
        let before = pairs.len() as u64;
        self.change_entries(&mut pairs, block == root)?;
        put_u32(&mut contents, 16, pairs.len() as u32);
        for (at, (key, value)) in pairs.iter().enumerate() {
            put_u64(&mut contents, NODE_HEADER + 8 * at, *key);
            put_u64(&mut contents, VALUES + 8 * at, *value);
        }
        self.store.write(block, BlockKind::Node, &contents)?;
        if let Some(device) = self.devices.get_mut(&id) {
            device.root = root;
            device.detail.mapped_blocks += pairs.len() as u64;
            device.detail.mapped_blocks -= before;
        }
        Ok(())
    }

    /// Discards, adds or replaces mappings of one leaf; it keeps the kernel's bounds, and its first key unless that goes up.
    fn change_entries(&mut self, pairs: &mut Vec<(u64, u64)>, is_root: bool) -> Result<()> {
        if pairs.is_empty() {
            return Ok(());
        }
        let at = self.random.below(pairs.len() as u64) as usize;
        let n = 1 + self.random.below(CHANGES) as usize;
        match self.random.below(5) {
            0 => {
                let least = if is_root { 1 } else { CAPACITY / 3 };
                let n = n
                    .min(pairs.len() - at)
                    .min(pairs.len().saturating_sub(least));
                for (_, value) in pairs.drain(at..at + n) {
                    self.unmap(value);
                }
            }
            1 => {
                let first = pairs[at].0 + 1;
                let end = match pairs.get(at + 1) {
                    Some(next) => next.0,
                    // What follows may belong to the next leaf.
                    None if is_root => first + n as u64,
                    None => first,
                };
                let room = (CAPACITY - pairs.len()).min(n);
                for (i, key) in (first..end).take(room).enumerate() {
                    pairs.insert(at + 1 + i, (key, self.new_value()?));
                }
            }
            _ => {
                for pair in pairs.iter_mut().skip(at).take(n) {
                    self.unmap(pair.1);
                    pair.1 = self.new_value()?;
                }
            }
        }
        Ok(())
    }

    /// The block to change instead of `block`: itself if that is allowed, else a copy.
    fn shadow(&mut self, block: MetadataBlock) -> Result<MetadataBlock> {
        let references = self.store.counts.get(block.0);
        if references == 1 && self.store.fresh.contains(&block.0) {
            return Ok(block);
        }
        let contents = self.store.read(block)?;
        let copy = self.store.allocate()?;
        self.store.write(copy, BlockKind::Node, &contents)?;
        if references > 1 {
            let (is_leaf, entries) = entries(&contents, block)?;
            for (_, value) in entries {
                match is_leaf {
                    true => self.count_data(BlockTime::unpack(value).block),
                    false => self.store.counts.add(value, 1),
                }
            }
        }
        self.store.release(block);
        Ok(copy)
    }

    fn count_data(&mut self, block: DataBlock) {
        self.data.add(block.0, 1);
        self.dirty.insert(block.0 / ENTRIES_PER_BITMAP);
    }

    /// Takes the reference of a mapping from its data block.
    fn unmap(&mut self, value: u64) {
        let block = BlockTime::unpack(value).block.0;
        self.data.remove_one(block);
        self.dirty.insert(block / ENTRIES_PER_BITMAP);
        if self.data.get(block) == 0 {
            self.freed_data.insert(block);
        }
    }

    /// A mapping, made now, to a data block that nothing uses.
    fn new_value(&mut self) -> Result<u64> {
        for _ in 0..self.order.len() {
            let block = match self.is_random {
                true => self.order.at(self.next_data),
                false => self.next_data,
            };
            self.next_data = (self.next_data + 1) % self.order.len();
            if self.data.get(block) == 0 && !self.freed_data.contains(&block) {
                let block = DataBlock(block);
                self.count_data(block);
                let time = self.fields.time;
                return Ok(BlockTime { block, time }.pack());
            }
        }
        Err(Error::new(
            ErrorKind::OutputTooSmall,
            "no data block is left; give fewer snapshots or transactions",
        ))
    }

    /// Writes the trees of the pool and both space maps to free blocks, and then the superblock.
    fn commit(&mut self) -> Result<()> {
        let mut none = SharedTree::default();
        let store = &mut self.store;
        store.taken.clear();
        let old = std::mem::take(&mut self.old);
        let dirty = self.dirty.iter().filter_map(|n| self.bitmaps.remove(n));
        for block in old.into_iter().chain(dirty) {
            store.release(block);
        }
        let mut top = TreeBuilder::<u64>::new();
        let mut details = TreeBuilder::<DeviceDetail>::new();
        for (&id, device) in &self.devices {
            top.push(store, &mut none, id, device.root.0)?;
            details.push(store, &mut none, id, device.detail)?;
        }
        self.fields.mapping_root = top.finish(store, &mut none)?.root;
        self.fields.details_root = details.finish(store, &mut none)?.root;
        let bitmaps = &self.bitmaps;
        let map = build_data_map(store, &self.data, &|n| bitmaps.get(&n).copied())?;
        self.fields.data_space_map = map;
        self.old = std::mem::take(&mut store.taken);
        let mut forest = Forest::new(store.engine.nr_blocks());
        let (tree, root) = (TreeKind::DataIndex, map.bitmap_root);
        let index = read_small_tree::<IndexEntry>(&store.engine, &mut forest, tree, root, &Silent)?;
        self.bitmaps = index.into_iter().map(|(n, e)| (n, e.block)).collect();
        let bitmaps: HashSet<MetadataBlock> = self.bitmaps.values().copied().collect();
        self.old.retain(|block| !bitmaps.contains(block));
        self.fields.metadata_space_map = build_metadata_map(store, &self.old_map)?;
        self.old_map = std::mem::take(&mut store.taken);
        self.fields.transaction_id += 1;
        store
            .engine
            .write(SUPERBLOCK, &self.fields.pack())
            .map_err(|e| Error::io("cannot write the superblock", e))?;
        store.freed.clear();
        store.fresh.clear();
        self.freed_data.clear();
        self.dirty.clear();
        Ok(())
    }
}

/// Whether a node is a leaf, and its keys with their values.
fn entries(contents: &[u8], block: MetadataBlock) -> Result<(bool, Vec<(u64, u64)>)> {
    let node = Node::parse(contents, block, TreeKind::Mappings.value_size()).map_err(|fault| {
        Error::new(
            ErrorKind::Damaged,
            format!("metadata block {block}, which was just made: {fault}"),
        )
    })?;
    Ok((node.is_leaf(), node.keys().zip(node.values_u64()).collect()))
}

fn no_device(id: u64) -> Error {
    Error::new(ErrorKind::Unsuitable, format!("there is no device {id}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::devtools::Inventory;

    fn recipe() -> Recipe {
        Recipe {
            devices: 3,
            mappings: 3000,
            pattern: Pattern::Random,
            snapshots: 2,
            transactions: 9,
            seed: 1,
            data_block_size: 128,
            metadata_blocks: None,
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_metadata() {
        let made = |seed| {
            let recipe = Recipe { seed, ..recipe() };
            generate(&recipe, &Silent).unwrap().into_bytes()
        };
        assert_eq!(made(1), made(1));
        assert_ne!(made(1), made(2));
    }

    #[test]
    fn a_history_leaves_older_nodes_behind() {
        let left = |transactions| {
            let engine = generate(
                &Recipe {
                    transactions,
                    ..recipe()
                },
                &Silent,
            )
            .unwrap();
            let inventory = Inventory::read(&engine, &Silent).unwrap();
            inventory.freed(&engine, &Silent).unwrap().len()
        };
        assert_eq!(left(0), 0);
        assert!(left(9) > 30, "{}", left(9));
    }

    #[test]
    fn what_the_format_cannot_hold_is_refused() {
        let refused = |change: fn(&mut Recipe)| {
            let mut recipe = recipe();
            change(&mut recipe);
            generate(&recipe, &Silent).err().map(|e| e.kind())
        };
        assert_eq!(refused(|_| ()), None);
        assert_eq!(refused(|r| r.devices = 0), Some(ErrorKind::Unsuitable));
        assert_eq!(
            refused(|r| r.devices = 1 << 24),
            Some(ErrorKind::Unsuitable)
        );
        assert_eq!(
            refused(|r| r.mappings = u64::MAX),
            Some(ErrorKind::Unsuitable)
        );
        assert_eq!(
            refused(|r| r.transactions = 1 << 24),
            Some(ErrorKind::Unsuitable)
        );
        for blocks in [0, 1, 10, 60] {
            let mut recipe = recipe();
            recipe.metadata_blocks = Some(blocks);
            let kind = generate(&recipe, &Silent).err().map(|e| e.kind());
            assert_eq!(kind, Some(ErrorKind::OutputTooSmall), "{blocks}");
        }
    }
}
