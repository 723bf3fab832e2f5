//! thin_repair --in-place: damage that spares the mapping trees is put right on the device itself.
//!
//! Invariants:
//! 1. All that is to be written is staged first, and a check of the staged device finds it sound; until then, and until an undo
//!    file is on disk, the device is only read.
//! 2. No block is overwritten that a kept tree uses or that the old superblock leads to, except block 0. Everything else is
//!    written and flushed before block 0, so that a crash leaves the old state or the new one.
//! 3. Where block 0 was lost, it first gets the roots that were chosen, without space maps, and is flushed: a repair that is cut
//!    short goes on with the same roots, whatever else it had written by then. The kernel refuses such a superblock.

use super::kept::{Kept, Old, read_details, snapshot};
use super::report::RepairReport;
use super::undo::save;
use super::{Options, Recovery, recover};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine, StagedEngine, sweep};
use crate::observer::Observer;
use crate::pdata::{
    BlockSink, Forest, MetadataWriter, SharedTree, SpaceMapRoot, TreeBuilder, TreeKind,
    build_data_map, build_metadata_map, nr_bitmaps,
};
use crate::thin::{
    DeviceDetail, Fields, NEEDS_CHECK, SUPERBLOCK, Superblock, SuperblockFault, read_block,
};
use crate::tools::check::{CheckOptions, Code, Damage, Severity, check, fix};
use crate::tools::metadata_source::read_small_tree;
use crate::tools::overrides::Overrides;
use crate::tools::restorer::uuid_bytes;
use crate::units::{
    BLOCK_SIZE, MAX_METADATA_BLOCKS, MAX_TIME, MetadataBlock, is_legal_data_block_size,
};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// What is said of everything that only a repair to another device deals with.
const REFUSED: &str = "nothing was written: what is damaged cannot be put right in place; thin_repair -i DEV -o NEWDEV recovers \
                       what is whole to another device";
/// A device with what is to be written to it.
pub(super) type Staged<'a> = StagedEngine<&'a dyn BlockEngine>;

/// Blocks that are written at once: 1 MiB.
const RUN: usize = 256;

/// What a repair in place does.
#[derive(Debug, Default, Serialize)]
pub struct InPlaceReport {
    /// Everything that a check found wrong; of a pool whose superblock is lost, that only.
    pub damages: Vec<Damage>,
    /// Which roots were chosen and what was made up; none if nothing had to be looked for.
    pub recovery: Option<RepairReport>,
    /// What is changed, in words.
    pub actions: Vec<String>,
    /// Blocks that are written, block 0 among them.
    pub blocks: u64,
    /// False when something was guessed or is lost.
    pub is_complete: bool,
}

/// A repair in place that is worked out and found to be sound, but not written.
#[derive(Debug)]
pub struct InPlace<'a> {
    /// What it does.
    pub report: InPlaceReport,
    staged: Staged<'a>,
    /// What block 0 holds while the other blocks are written.
    interim: Option<[u8; BLOCK_SIZE]>,
}

/// Works out how to put the metadata on `engine` right in place; none if nothing is wrong with it. `overrides` stand in for what
/// a lost superblock would say. Nothing is written.
///
/// # Errors
/// `Damaged` when a mapping tree or the top-level tree is damaged, or the superblock has features that are not known;
/// `OutputTooSmall` when there is no room for what has to be written beside what is there; `Io`, `Interrupted`.
pub fn plan_in_place<'a>(
    engine: &'a dyn BlockEngine,
    overrides: &Overrides,
    observer: &dyn Observer,
) -> Result<Option<InPlace<'a>>> {
    let checked = check(engine, &CheckOptions::default(), observer)?;
    let report = &checked.report;
    if let Some(damage) = report.damages.iter().find(|d| d.code == Code::ReadError) {
        return Err(unreadable(damage.block, &damage.message));
    }
    let worst = report.verdict.severity;
    if worst <= Some(Severity::Note) && !report.needs_check {
        return Ok(None);
    }
    if worst == Some(Severity::Fatal) {
        let mut repair = rebuild(engine, overrides, observer)?;
        repair.report.damages = checked.report.damages;
        return Ok(Some(repair));
    }
    let staged = stage(engine)?;
    let actions = fix(&staged, &checked).map_err(|e| e.context("nothing was written"))?;
    refuse_unsound(&staged, observer)?;
    Ok(Some(InPlace::new(
        staged,
        None,
        InPlaceReport {
            damages: checked.report.damages,
            actions,
            is_complete: true,
            ..InPlaceReport::default()
        },
    )))
}

impl<'a> InPlace<'a> {
    fn new(staged: Staged<'a>, interim: Option<[u8; BLOCK_SIZE]>, report: InPlaceReport) -> Self {
        let blocks = staged.written().len() as u64;
        Self {
            report: InPlaceReport { blocks, ..report },
            staged,
            interim,
        }
    }

    /// Saves what is going to be overwritten to the new file `undo_file`, then writes the repair to the device.
    ///
    /// # Errors
    /// Whatever keeps the undo file from being written, with nothing changed on the device; `Io`.
    pub fn write(&self, undo_file: &Path, observer: &dyn Observer) -> Result<()> {
        let engine = self.staged.base();
        let interim = self.interim.as_ref().map(|block| &block[..]);
        save(undo_file, engine, &self.staged, interim, observer)
            .map_err(|e| e.context("nothing was changed on the device"))?;
        observer.progress("writing", 0, 1);
        self.write_saved(interim).map_err(|e| {
            let what = format!(
                "cannot write the repaired metadata; undo what was written, with --undo {}, or run the command again with another \
                 undo file",
                undo_file.display()
            );
            Error::io(what, e)
        })
    }

    /// Writes the repair in the order that is safe.
    fn write_saved(&self, interim: Option<&[u8]>) -> io::Result<()> {
        let engine = self.staged.base();
        let mut zero = AlignedBuffer::new(1);
        if let Some(interim) = interim {
            zero.blocks_mut(1).copy_from_slice(interim);
            engine.write(SUPERBLOCK, zero.blocks(1))?;
            engine.sync()?;
        }
        self.write_all_but_zero()?;
        engine.sync()?;
        self.staged.read(SUPERBLOCK, zero.blocks_mut(1))?;
        engine.write(SUPERBLOCK, zero.blocks(1))?;
        engine.sync()
    }

    fn write_all_but_zero(&self) -> io::Result<()> {
        let written = self.staged.written();
        let mut rest = &written[written.partition_point(|&b| b == SUPERBLOCK.0)..];
        let mut buffer = AlignedBuffer::new(RUN);
        while let Some(&first) = rest.first() {
            let follows = |(place, block): &(u64, &u64)| place == *block;
            let run = (first..).zip(rest).take(RUN).take_while(follows).count();
            let start = MetadataBlock(first);
            self.staged.read(start, buffer.blocks_mut(run))?;
            self.staged.base().write(start, buffer.blocks(run))?;
            rest = &rest[run..];
        }
        Ok(())
    }
}

fn stage(engine: &dyn BlockEngine) -> Result<Staged<'_>> {
    StagedEngine::new(engine).map_err(|e| {
        Error::io(
            "cannot make a temporary file for what is to be written; set TMPDIR to a folder with room",
            e,
        )
    })
}

/// Nothing is written that a check would object to.
fn refuse_unsound(staged: &Staged<'_>, observer: &dyn Observer) -> Result<()> {
    let report = check(staged, &CheckOptions::default(), observer)?.report;
    match report.damages.iter().find(|d| d.severity > Severity::Note) {
        Some(damage) => Err(Error::new(
            ErrorKind::Damaged,
            format!("damage would be left: {damage}"),
        )),
        None => Ok(()),
    }
}

/// Works out a repair of fatal damage.
fn rebuild<'a>(
    engine: &'a dyn BlockEngine,
    overrides: &Overrides,
    observer: &dyn Observer,
) -> Result<InPlace<'a>> {
    let superblock = usable_superblock(engine).map_err(refused)?;
    let rebuild = Rebuild {
        engine,
        observer,
        start: Start::find(engine, superblock, overrides, observer)?,
    };
    let held = superblock.and_then(|s| snapshot(engine, &s));
    let with_snapshot = held.and_then(|_| match rebuild.stage(held) {
        Err(e) if e.kind() == ErrorKind::Damaged => None,
        other => Some(other),
    });
    let built = with_snapshot
        .unwrap_or_else(|| rebuild.stage(None))
        .map_err(refused)?;
    let (interim, report) = (rebuild.interim(&built), rebuild.report(&built));
    Ok(InPlace::new(built.staged, interim, report))
}

fn refused(e: Error) -> Error {
    match e.kind() {
        ErrorKind::Damaged => e.context(REFUSED),
        _ => e.context("nothing was written"),
    }
}

/// Reads every block that metadata can be in.
fn refuse_unreadable(engine: &dyn BlockEngine, observer: &dyn Observer) -> Result<()> {
    let blocks: Vec<u64> = (0..engine.nr_blocks().min(MAX_METADATA_BLOCKS)).collect();
    let stop = || observer.is_cancelled();
    let parts = sweep(
        engine,
        &blocks,
        &stop,
        || None,
        |bad, block, data| {
            if let Err(e) = data {
                *bad = Some((block, e));
            }
        },
    );
    observer.check_cancelled()?;
    match parts.into_iter().flatten().next() {
        Some((block, e)) => Err(unreadable(block, &e.to_string())),
        None => Ok(()),
    }
}

fn unreadable(block: MetadataBlock, why: &str) -> Error {
    let what = format!(
        "nothing was written: block {block} cannot be read ({why}); copy the metadata to a healthy device first"
    );
    Error::new(ErrorKind::Io, what)
}

/// The superblock, if there is one in block 0 that can be believed.
fn usable_superblock(engine: &dyn BlockEngine) -> Result<Option<Superblock>> {
    let block = read_block(engine, SUPERBLOCK)?;
    let (superblock, faults) = Superblock::verify(block.blocks(1), SUPERBLOCK, engine.nr_blocks());
    let is_unknown = |f: &&SuperblockFault| {
        matches!(
            f,
            SuperblockFault::IncompatFlags(_) | SuperblockFault::CompatRoFlags(_)
        )
    };
    match faults.iter().find(is_unknown) {
        Some(fault) => Err(Error::new(ErrorKind::Damaged, fault.to_string())),
        None => Ok(superblock),
    }
}

/// What a search found.
struct Found {
    report: RepairReport,
    /// Every device with the root of its mapping tree.
    devices: BTreeMap<u64, (MetadataBlock, DeviceDetail)>,
}

/// What a repair of fatal damage starts from.
struct Start {
    superblock: Option<Superblock>,
    /// What had to be searched for, and the devices that were found; none if the superblock and the details are whole.
    found: Option<Found>,
    /// The new superblock, but for the time of the latest mapping and for what has to be written first.
    fields: Fields,
    /// A details tree that may stay.
    details_root: Option<MetadataBlock>,
    /// What is in it, as far as it can be read.
    details: BTreeMap<u64, DeviceDetail>,
    details_are_whole: bool,
}

impl Start {
    /// From the superblock, and from a search for what it does not lead to any more.
    fn find(
        engine: &dyn BlockEngine,
        superblock: Option<Superblock>,
        overrides: &Overrides,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let Some(superblock) = superblock else {
            // A search would pass over the latest roots where they cannot be read, and take older ones.
            refuse_unreadable(engine, observer)?;
            return Self::search(engine, None, overrides, observer);
        };
        // Nothing is searched for in place of a top-level tree that is damaged.
        let (kind, root) = (TreeKind::TopLevel, superblock.mapping_root);
        let mut forest = Forest::new(engine.nr_blocks());
        let devices =
            read_small_tree::<u64>(engine, &mut forest, kind, root, observer).map_err(refused)?;
        let (details, is_whole) = read_details(engine, superblock.details_root, observer)?;
        let is_known = |id: &u64| devices.binary_search_by_key(id, |d| d.0).is_ok();
        if let Some(id) = details.keys().find(|id| !is_known(id)) {
            let what = format!("device {id} has details but no mapping tree");
            return Err(refused(Error::new(ErrorKind::Damaged, what)));
        }
        let has_block_size = is_legal_data_block_size(superblock.data_block_size);
        if has_block_size && *overrides != Overrides::default() {
            observer.warning(
                "the superblock can be read, and keeps its transaction id and sizes: the values given for them are not used",
            );
        }
        if !is_whole || details.len() < devices.len() || !has_block_size {
            let lost = match has_block_size {
                true => &Overrides::default(),
                false => overrides,
            };
            return Self::search(engine, Some(superblock), lost, observer);
        }
        Ok(Self {
            fields: *superblock,
            details_root: Some(superblock.details_root),
            details,
            details_are_whole: true,
            found: None,
            superblock: Some(superblock),
        })
    }

    fn search(
        engine: &dyn BlockEngine,
        superblock: Option<Superblock>,
        overrides: &Overrides,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let options = Options {
            overrides: *overrides,
            ..Options::default()
        };
        let Recovery { report, trees, .. } =
            recover(engine, &options, observer).map_err(|e| e.context("nothing was written"))?;
        let pool = overrides.apply(&trees.pool, observer);
        let (details, details_are_whole) = match report.details_root {
            Some(root) => read_details(engine, root, observer)?,
            None => (BTreeMap::new(), false),
        };
        let fresh = || Fields {
            uuid: uuid_bytes(&pool.uuid),
            // A top-level tree that was rebuilt is not on the device.
            mapping_root: report.mapping_root.unwrap_or(SUPERBLOCK),
            ..Fields::fresh(engine.nr_blocks().min(MAX_METADATA_BLOCKS))
        };
        let mut fields = superblock.map_or_else(fresh, |s| *s);
        fields.time = pool.time;
        fields.transaction_id = pool.transaction;
        fields.data_block_size = pool.data_block_size;
        fields.data_space_map.nr_blocks = pool.nr_data_blocks;
        Ok(Self {
            superblock,
            fields,
            details_root: report.details_root,
            details,
            details_are_whole,
            found: Some(Found {
                report,
                devices: trees.devices,
            }),
        })
    }

    /// The details of every device, each with as many mappings as it has.
    fn wanted_details(&self, kept: &Kept) -> Result<BTreeMap<u64, DeviceDetail>> {
        let mut wanted = BTreeMap::new();
        for device in &kept.devices {
            let known = match &self.found {
                None => self.details.get(&device.id),
                Some(found) => found
                    .devices
                    .get(&device.id)
                    .filter(|(root, _)| *root == device.root)
                    .map(|(_, detail)| detail),
            };
            let Some(&known) = known else {
                let what = format!("device {} cannot be recovered as it is", device.id);
                return Err(Error::new(ErrorKind::Damaged, what));
            };
            let mapped_blocks = device.mapped_blocks;
            wanted.insert(
                device.id,
                DeviceDetail {
                    mapped_blocks,
                    ..known
                },
            );
        }
        match &self.found {
            Some(found) if found.devices.len() > wanted.len() => Err(Error::new(
                ErrorKind::Damaged,
                "there are devices that the top-level tree does not have",
            )),
            _ => Ok(wanted),
        }
    }
}

/// A repair that is staged.
struct Built<'a> {
    staged: Staged<'a>,
    /// The new superblock.
    fields: Fields,
    /// The details tree stays as it is.
    keeps_details: bool,
}

/// Stages a repair of fatal damage.
struct Rebuild<'a, 'o> {
    engine: &'a dyn BlockEngine,
    observer: &'o dyn Observer,
    start: Start,
}

impl<'a> Rebuild<'a, '_> {
    /// Stages the repaired metadata, with the metadata snapshot `snapshot` if there is one to keep.
    fn stage(&self, snapshot: Option<(MetadataBlock, Superblock)>) -> Result<Built<'a>> {
        let nr_data_blocks = self.start.fields.data_space_map.nr_blocks;
        self.refuse_large_data(nr_data_blocks)?;
        let root = self.start.fields.mapping_root;
        let mut kept = Kept::read(self.engine, root, snapshot, nr_data_blocks, self.observer)?;
        let details = self.start.wanted_details(&kept)?;
        let is_right = self.start.details_are_whole && self.start.details == details;
        let details_root = self.start.details_root.filter(|_| is_right);
        if let Some(root) = details_root {
            kept.keep_details(self.engine, root, self.observer)?;
        }
        let fields = Fields {
            flags: self.start.fields.flags & !NEEDS_CHECK,
            time: self.start.fields.time.max(kept.time).min(MAX_TIME),
            held_root: snapshot.map_or(SUPERBLOCK, |s| s.0),
            ..self.start.fields
        };
        let staged = stage(self.engine)?;
        let fields = self
            .write(&staged, fields, &kept, details_root, &details)
            .map_err(|e| match e.kind() {
                ErrorKind::OutputTooSmall => e.context(
                    "new space maps must be written beside what is in use; extend the metadata device and try again, or run \
                     thin_repair -i DEV -o NEWDEV with a larger one",
                ),
                _ => e,
            })?;
        refuse_unsound(&staged, self.observer)?;
        Ok(Built {
            staged,
            fields,
            keeps_details: details_root.is_some(),
        })
    }

    /// A size of the data device that needs more bitmaps than fit is not counted in memory either.
    fn refuse_large_data(&self, nr_data_blocks: u64) -> Result<()> {
        let bitmaps = nr_bitmaps(nr_data_blocks);
        let nr_blocks = self.engine.nr_blocks().min(MAX_METADATA_BLOCKS);
        if bitmaps < nr_blocks {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutputTooSmall,
            format!(
                "the space map of {nr_data_blocks} data blocks needs {bitmaps} metadata blocks, the device has {nr_blocks}"
            ),
        ))
    }

    /// Writes details, unless they are kept, both space maps and block 0 to `staged`. Returns the new superblock.
    fn write(
        &self,
        staged: &Staged<'_>,
        fields: Fields,
        kept: &Kept,
        details_root: Option<MetadataBlock>,
        details: &BTreeMap<u64, DeviceDetail>,
    ) -> Result<Fields> {
        let old = match &self.start.superblock {
            Some(superblock) => Old::read(self.engine, superblock, self.observer)?,
            None => Old::default(),
        };
        let mut metadata = kept.count_metadata();
        let bitmaps = old.right_bitmaps(self.engine, &kept.data, &metadata, self.observer)?;
        bitmaps.values().for_each(|block| metadata.add(block.0, 1));
        // What the old superblock leads to is not handed out, but in the new space map it is free.
        let mut freed = old.blocks;
        freed.retain(|block| {
            let is_free = metadata.get(block.0) == 0;
            if is_free {
                metadata.add(block.0, 1);
            }
            is_free
        });
        let mut writer = MetadataWriter::new(Some(staged), metadata);
        let details_root = match details_root {
            Some(root) => root,
            None => write_details(&mut writer, details)?,
        };
        let existing = |number: u64| bitmaps.get(&number).copied();
        let fields = Fields {
            details_root,
            data_space_map: build_data_map(&mut writer, &kept.data, &existing)?,
            metadata_space_map: build_metadata_map(&mut writer, &freed)?,
            ..fields
        };
        writer.flush()?;
        let mut block = AlignedBuffer::new(1);
        block.blocks_mut(1).copy_from_slice(&fields.pack());
        staged
            .write(SUPERBLOCK, block.blocks(1))
            .map_err(|e| Error::io("cannot write the superblock to a temporary file", e))?;
        Ok(fields)
    }

    /// What block 0 holds while the rest is written, if it was lost: the roots, and where the space maps shall be, nothing.
    fn interim(&self, built: &Built<'_>) -> Option<[u8; BLOCK_SIZE]> {
        let without = |map: &SpaceMapRoot| SpaceMapRoot {
            nr_blocks: map.nr_blocks,
            ..SpaceMapRoot::default()
        };
        let fields = built.fields;
        let interim = Fields {
            details_root: match built.keeps_details {
                true => fields.details_root,
                false => SUPERBLOCK,
            },
            data_space_map: without(&fields.data_space_map),
            metadata_space_map: without(&fields.metadata_space_map),
            ..fields
        };
        self.start.superblock.is_none().then(|| interim.pack())
    }

    /// Says what is changed.
    fn report(&self, built: &Built<'_>) -> InPlaceReport {
        let fields = &built.fields;
        let mut actions = Vec::new();
        match &self.start.superblock {
            None => {
                actions.push("rebuilt the superblock".to_owned());
                actions.push("dropped the metadata snapshot, if there was one".to_owned());
            }
            Some(before) => {
                if before.needs_check() {
                    actions.push("cleared the needs_check flag".to_owned());
                }
                if before.time != fields.time {
                    actions.push(format!("set the snapshot clock to {}", fields.time));
                }
                if before.held_root != fields.held_root {
                    actions.push(format!(
                        "dropped the metadata snapshot in block {}, which is damaged",
                        before.held_root
                    ));
                }
            }
        }
        if !built.keeps_details {
            actions.push("wrote the device details anew".to_owned());
        }
        actions.push("wrote both space maps anew, counted from the mappings".to_owned());
        let recovery = self.start.found.as_ref().map(|found| found.report.clone());
        InPlaceReport {
            is_complete: recovery.as_ref().is_none_or(|r| r.is_complete),
            recovery,
            actions,
            ..InPlaceReport::default()
        }
    }
}

fn write_details(
    sink: &mut dyn BlockSink,
    details: &BTreeMap<u64, DeviceDetail>,
) -> Result<MetadataBlock> {
    let mut none = SharedTree::default();
    let mut tree = TreeBuilder::<DeviceDetail>::new();
    for (&id, &detail) in details {
        tree.push(sink, &mut none, id, detail)?;
    }
    Ok(tree.finish(sink, &mut none)?.root)
}
