//! A pool whose superblock or top-level tree is lost, to be read where it lies: nothing is written to the device.
//!
//! What a repair finds out about the roots stands in a temporary file in front of the device: block 0, top-level tree and details,
//! behind the last block of the device, and the blocks that could be mended. Mapping trees are read on the device itself. So what of
//! them is lost stays an error for whoever reads it, where the output of a repair would read as zeros.

use super::{Options, RepairReport, recover};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine, StagedEngine};
use crate::observer::Observer;
use crate::pdata::{CountMap, MetadataWriter, SharedTree, SpaceMapRoot, TreeBuilder, Value};
use crate::thin::{DeviceDetail, Fields, SUPERBLOCK};
use crate::tools::restorer::uuid_bytes;
use crate::units::{MAX_METADATA_BLOCKS, MetadataBlock};
use std::sync::Arc;

/// A pool that can be read.
#[expect(missing_debug_implementations, reason = "an engine has none")]
pub struct Rescue {
    /// The metadata as it should be, as far as it is known.
    pub engine: Arc<dyn BlockEngine>,
    /// What was chosen and what is lost.
    pub report: RepairReport,
}

/// Finds the devices of a pool and makes what leads to them.
///
/// # Errors
/// `Damaged` when no top-level tree can be found, or the data block size is neither known nor given; `Io`.
pub fn rescue(
    engine: Arc<dyn BlockEngine>,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Rescue> {
    let recovery = recover(&*engine, options, observer)?;
    let on_device = engine.nr_blocks();
    let devices = &recovery.trees.devices;
    let lost = &recovery.lost;
    // Nodes are a third full at least, and those of the details have room for 126 entries.
    let more = (devices.len() + lost.len()) as u64 / 16 + 16;
    if on_device + more > MAX_METADATA_BLOCKS {
        return Err(Error::new(
            ErrorKind::OutputTooSmall,
            "there is no room for a new top-level tree behind the last block; thin_repair -i DEV -o NEWDEV recovers what is whole",
        ));
    }
    let no_room = |e| {
        Error::io(
            "cannot write to a temporary file; set TMPDIR to a folder with room",
            e,
        )
    };
    let staged = StagedEngine::longer(Arc::clone(&engine), more).map_err(no_room)?;
    let mut block = AlignedBuffer::new(1);
    for &mended in recovery.engine.mends.keys() {
        let read = recovery.engine.read(mended, block.blocks_mut(1));
        read.map_err(|e| Error::io(format!("cannot read block {mended}"), e))?;
        staged.write(mended, block.blocks(1)).map_err(no_room)?;
    }
    let mut counts = CountMap::new(on_device + more);
    (0..on_device).for_each(|block| counts.add(block, 1));
    let mut writer = MetadataWriter::new(Some(&staged), counts);
    // A root that a repair made up is not on the device; nor is one that is lost.
    let nowhere = MetadataBlock(on_device + more);
    let is_there = |root: &MetadataBlock| root.0 > 0 && root.0 < on_device;
    let mut roots: Vec<(u64, u64)> = devices
        .iter()
        .map(|(&id, &(root, _))| (id, Some(root).filter(is_there).unwrap_or(nowhere).0))
        .collect();
    roots.extend(lost.keys().map(|&id| (id, nowhere.0)));
    roots.sort_unstable();
    let mut details: Vec<(u64, DeviceDetail)> = devices
        .iter()
        .map(|(&id, &(_, detail))| (id, detail))
        .collect();
    details.extend(lost.iter().map(|(&id, &detail)| (id, detail)));
    details.sort_unstable_by_key(|d| d.0);
    let pool = &recovery.trees.pool;
    let known = recovery.superblock.map(|superblock| *superblock);
    let known = known.unwrap_or_else(|| Fields::fresh(on_device));
    let fields = Fields {
        uuid: uuid_bytes(&pool.uuid),
        mapping_root: tree(&mut writer, roots)?,
        details_root: tree(&mut writer, details)?,
        time: pool.time,
        transaction_id: pool.transaction,
        data_block_size: pool.data_block_size,
        data_space_map: SpaceMapRoot {
            nr_blocks: pool.nr_data_blocks,
            ..known.data_space_map
        },
        ..known
    };
    writer.flush()?;
    block.blocks_mut(1).copy_from_slice(&fields.pack());
    staged.write(SUPERBLOCK, block.blocks(1)).map_err(no_room)?;
    let report = recovery.report;
    Ok(Rescue {
        engine: Arc::new(staged),
        report,
    })
}

fn tree<V: Value>(
    writer: &mut MetadataWriter<'_>,
    entries: Vec<(u64, V)>,
) -> Result<MetadataBlock> {
    let mut none = SharedTree::default();
    let mut tree = TreeBuilder::<V>::new();
    for (id, value) in entries {
        tree.push(writer, &mut none, id, value)?;
    }
    Ok(tree.finish(writer, &mut none)?.root)
}
