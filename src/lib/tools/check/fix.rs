//! Puts right in place what a complete check has proved safe to: leaks, counters of the space maps, a clock behind its
//! mappings, and the needs_check flag.
//!
//! Nothing that the superblock leads to is overwritten. New space maps go to unused blocks; then flush, superblock, flush. A
//! crash at any point leaves the old state or the new one.

use super::damage::{Code, Severity};
use super::{Checked, Ground};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine};
use crate::pdata::{CountMap, MetadataWriter, build_data_map, build_metadata_map};
use crate::thin::{Fields, NEEDS_CHECK, SUPERBLOCK};
use crate::units::MetadataBlock;

/// Repairs what `checked` found on `engine`, and clears needs_check. Says what was done; nothing if nothing needed doing.
///
/// # Errors
/// `Damaged` when the check was not complete or found fatal damage, `OutputTooSmall` when there is no room for new space
/// maps beside the old ones (in both cases nothing is changed); `Io`.
pub fn fix(engine: &dyn BlockEngine, checked: &Checked) -> Result<Vec<String>> {
    let report = &checked.report;
    let is_fatal = report.damages.iter().any(|d| d.severity == Severity::Fatal);
    let Some(ground) = checked.ground.as_ref().filter(|_| !is_fatal) else {
        return Err(Error::new(
            ErrorKind::Damaged,
            "nothing was changed: only metadata that was checked completely and has no fatal damage is changed in place",
        ));
    };
    let mut done = Vec::new();
    let mut fields = *ground.superblock;
    if report.needs_check {
        fields.flags &= !NEEDS_CHECK;
        done.push("cleared the needs_check flag".to_owned());
    }
    if report.damages.iter().any(|d| d.code == Code::MappingTime) {
        fields.time = fields.time.max(ground.latest);
        done.push(format!(
            "set the snapshot clock to {}, its latest mapping's time",
            fields.time
        ));
    }
    fix_counters(ground, &mut fields, &mut done);
    if ground.counted.data.is_wrong || ground.counted.metadata.is_wrong {
        rewrite_space_maps(engine, ground, &mut fields).map_err(|e| match e.kind() {
            ErrorKind::OutputTooSmall => e.context(
                "nothing was changed: new space maps must be written beside the old ones; extend the metadata device and try \
                 again, or run thin_repair to a larger one",
            ),
            _ => e,
        })?;
        done.push("wrote corrected space maps".to_owned());
    }
    if done.is_empty() {
        return Ok(done);
    }
    let flush = |what| {
        move |e| {
            Error::io(
                format!("cannot {what}; the metadata is as it was before"),
                e,
            )
        }
    };
    engine
        .sync()
        .map_err(flush("flush the corrected space maps"))?;
    let mut block = AlignedBuffer::new(1);
    block.blocks_mut(1).copy_from_slice(&fields.pack());
    engine
        .write(SUPERBLOCK, block.blocks(1))
        .and_then(|()| engine.sync())
        .map_err(|e| Error::io("cannot write the superblock", e))?;
    Ok(done)
}

/// The superblock's own counters need no new space map.
fn fix_counters(ground: &Ground, fields: &mut Fields, done: &mut Vec<String>) {
    let pairs = [
        (&mut fields.data_space_map, &ground.counted.data, "data"),
        (
            &mut fields.metadata_space_map,
            &ground.counted.metadata,
            "metadata",
        ),
    ];
    for (map, judged, name) in pairs {
        if map.nr_allocated != judged.nr_allocated {
            map.nr_allocated = judged.nr_allocated;
            done.push(format!(
                "set the number of {name} blocks in use to {}",
                judged.nr_allocated
            ));
        }
    }
}

fn rewrite_space_maps(
    engine: &dyn BlockEngine,
    ground: &Ground,
    fields: &mut Fields,
) -> Result<()> {
    let counted = &ground.counted;
    // Blocks with a reference, the old space maps' among them, are not handed out.
    let mut writer = MetadataWriter::new(Some(engine), copy_counts(&counted.metadata.counts));
    let mut freed: Vec<MetadataBlock> = Vec::new();
    if counted.data.is_wrong {
        let kept = |number: u64| {
            let is_right = counted.data.right.binary_search(&number).is_ok();
            counted
                .data
                .index
                .entries
                .get(&number)
                .filter(|_| is_right)
                .map(|e| e.block)
        };
        fields.data_space_map = build_data_map(&mut writer, &counted.data.counts, &kept)?;
        freed.extend(&counted.data_nodes);
        let replaced = counted
            .data
            .index
            .entries
            .iter()
            .filter(|(n, _)| kept(**n).is_none());
        freed.extend(replaced.map(|(_, e)| e.block));
    }
    freed.extend(&counted.metadata_nodes);
    freed.extend(counted.metadata.index.entries.values().map(|e| e.block));
    freed.push(ground.superblock.metadata_space_map.bitmap_root);
    fields.metadata_space_map = build_metadata_map(&mut writer, &freed)?;
    writer.flush()
}

fn copy_counts(counts: &CountMap) -> CountMap {
    let mut copy = CountMap::new(counts.nr_blocks());
    for block in 0..counts.nr_blocks() {
        match counts.get(block) {
            0 => {}
            n => copy.add(block, n),
        }
    }
    copy
}
