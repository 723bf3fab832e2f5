//! thin_repair: finds the trees of damaged metadata that are whole, and tells them to a restorer, which rebuilds the rest.
//!
//! Roots are chosen by the superblock; where that or its root is lost, by what a readable metadata space map says is in use,
//! then by times. Damaged nodes are left out, with a report of the ranges behind them. Nothing is written to the input.

mod choose;
mod in_place;
mod kept;
mod report;
mod scan;
mod undo;

pub use in_place::{InPlace, InPlaceReport, plan_in_place};
pub use report::{Candidate, RecoveredDevice, RepairReport};
pub use undo::{Undone, undo};

use self::choose::{Chosen, choose};
use super::affected::{Affected, affected};
use super::event::PoolInfo;
use super::metadata_source::{MetadataSource, Selection, Trees, uuid_text};
use super::overrides::Overrides;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine};
use crate::observer::Observer;
use crate::pdata::{Forest, Leaves, Shape, Structure, TreeKind, Walk};
use crate::thin::{DeviceDetail, Fields, SUPERBLOCK, Superblock, SuperblockFault, VERSION};
use crate::units::{MAX_THIN_ID, MAX_TIME, MetadataBlock, ThinId, is_legal_data_block_size};
use std::collections::{BTreeMap, HashSet};

/// Metadata that can be told to a restorer or dumped.
#[derive(Debug)]
pub struct Recovery {
    /// What was chosen and what is lost.
    pub report: RepairReport,
    trees: Trees,
    forest: Forest,
}

impl Recovery {
    /// The recovered trees as a source of events.
    pub fn source<'a>(
        &'a self,
        engine: &'a dyn BlockEngine,
        selection: Selection,
        observer: &'a dyn Observer,
    ) -> MetadataSource<'a> {
        MetadataSource {
            engine,
            trees: self.trees.clone(),
            selection,
            recovered: Some(&self.forest),
            observer,
        }
    }
}

/// Finds what can be recovered from `engine`. `overrides` stand in for what a lost superblock would say.
///
/// # Errors
/// `Damaged` when no top-level tree in use can be found, or the data block size is neither known nor given; `Io`.
pub fn recover(
    engine: &dyn BlockEngine,
    overrides: &Overrides,
    observer: &dyn Observer,
) -> Result<Recovery> {
    let superblock = usable_superblock(engine)?;
    let mut report = RepairReport {
        is_complete: true,
        ..RepairReport::default()
    };
    let chosen = choose(engine, superblock.as_ref(), &mut report, observer)?;
    let mut forest = Forest::new(engine.nr_blocks());
    let limit = forest.nr_blocks();
    let roots: Vec<MetadataBlock> = chosen
        .roots
        .values()
        .copied()
        .filter(|r| r.0 > 0 && r.0 < limit)
        .collect();
    let given = overrides.nr_data_blocks.unwrap_or(u64::MAX);
    let nr_data_blocks = superblock
        .as_ref()
        .map_or(given, |s| s.data_space_map.nr_blocks);
    observer.progress("reading mappings", 0, 1);
    let spans = forest.walk(
        &Walk {
            engine,
            observer,
            tree: TreeKind::Mappings,
            leaves: Leaves::Read,
        },
        roots.iter().copied(),
        Span::default,
        |span, node| span.see(node.values_u64(), nr_data_blocks),
    )?;
    let span = spans.into_iter().fold(Span::default(), Span::join);
    if span.past_end > 0 {
        report.is_complete = false;
        report.notes.push(format!(
            "{} mappings to data blocks past the last of {nr_data_blocks} are left out",
            span.past_end
        ));
    }
    // A node of the top-level tree that a device claims as its own is not the device's.
    chosen
        .top_nodes
        .iter()
        .for_each(|&block| forest.exclude(block));
    let damaged = cut_damaged(&mut forest, &roots);
    let pool = pool_info(superblock.as_ref(), &chosen, span, overrides, &mut report)?;
    let pool = raise_clock(pool, superblock.is_some(), &chosen, &mut report);
    let trees = describe_devices(&forest, &chosen, pool, &damaged, &mut report);
    Ok(Recovery {
        report,
        trees,
        forest,
    })
}

/// The superblock, if its roots can be believed. A wrong size of the device does not matter to a repair.
fn usable_superblock(engine: &dyn BlockEngine) -> Result<Option<Superblock>> {
    let mut block = AlignedBuffer::new(1);
    if engine.read(SUPERBLOCK, block.blocks_mut(1)).is_err() {
        return Ok(None);
    }
    let (superblock, faults) = Superblock::verify(block.blocks(1), SUPERBLOCK, engine.nr_blocks());
    if faults.contains(&SuperblockFault::Unfinished) {
        return Err(Error::new(
            ErrorKind::Damaged,
            "writing metadata to this device has not finished: there is nothing to repair; repair the device that it came from",
        ));
    }
    Ok(superblock)
}

/// The furthest data block and the latest time of mappings, and how many are to data blocks that do not exist.
#[derive(Clone, Copy, Default)]
struct Span {
    data_blocks: u64,
    time: u32,
    past_end: u64,
}

impl Span {
    fn see(&mut self, values: impl Iterator<Item = u64>, limit: u64) {
        for value in values {
            self.past_end += u64::from(value >> 24 >= limit);
            self.data_blocks = self.data_blocks.max((value >> 24) + 1);
            self.time = self.time.max(value as u32 & MAX_TIME);
        }
    }

    fn join(self, other: Self) -> Self {
        Self {
            data_blocks: self.data_blocks.max(other.data_blocks),
            time: self.time.max(other.time),
            past_end: self.past_end + other.past_end,
        }
    }
}

/// Rounds of judging after which a tree that still shows new faults is left as it is; honest damage needs one or two.
const MOST_ROUNDS: usize = 16;

/// Cuts every pointer that leads where it should not. Returns the damaged nodes.
fn cut_damaged(forest: &mut Forest, roots: &[MetadataBlock]) -> HashSet<MetadataBlock> {
    // A pointer that is cut may have hidden what is wrong with another, so judge until nothing new is found.
    for round in 0..=MOST_ROUNDS {
        let structure = Structure::of(forest, TreeKind::Mappings, roots);
        let cuts: Vec<(MetadataBlock, MetadataBlock)> = structure
            .faults
            .iter()
            .filter_map(|&(child, fault)| Some((fault.parent()?, child)))
            .collect();
        if cuts.is_empty() {
            break;
        }
        for (parent, child) in cuts {
            forest.cut(parent, child);
            if round == MOST_ROUNDS {
                forest.exclude(parent);
            }
        }
    }
    forest
        .nodes()
        .iter()
        .filter(|n| n.shape == Shape::Bad)
        .map(|n| n.block)
        .collect()
}

fn pool_info(
    superblock: Option<&Superblock>,
    chosen: &Chosen,
    span: Span,
    overrides: &Overrides,
    report: &mut RepairReport,
) -> Result<PoolInfo> {
    let fields: Option<&Fields> = superblock.map(|s| &**s).or(chosen.copy.as_ref());
    let mut note = |text: String| {
        report.notes.push(text);
        report.is_complete = false;
    };
    let known = fields
        .map(|f| f.data_block_size)
        .filter(|&s| is_legal_data_block_size(s));
    let data_block_size = overrides.data_block_size.or(known).ok_or_else(|| {
        Error::new(
            ErrorKind::Damaged,
            "the superblock is lost, and with it the data block size; give it with --data-block-size (in sectors of 512 bytes, \
             'lvs -o chunksize' or the pool's table has it)",
        )
    })?;
    let details = chosen.details.values();
    let latest_transaction = details.clone().map(|d| d.transaction_id).max();
    let latest_time = details
        .map(|d| d.snapshotted_time.max(d.creation_time))
        .max()
        .unwrap_or(0);
    let clock = superblock.map_or(0, |s| s.time);
    let time = clock
        .max(span.time)
        .max(latest_time.min(MAX_TIME))
        .min(MAX_TIME);
    if superblock.is_some() && time != clock {
        note(format!(
            "the snapshot clock {clock} is behind the mappings; {time} is written"
        ));
    }
    let transaction = match superblock {
        Some(superblock) => superblock.transaction_id,
        None => {
            let guess = latest_transaction.map_or(0, |t| t.saturating_add(1));
            let used = overrides.transaction_id.unwrap_or(0).max(guess);
            if overrides.transaction_id.is_none() {
                note(format!(
                    "the transaction id is guessed to be {guess}, one above the latest device's; LVM accepts only its own number \
                     or the one before: give it with --transaction-id"
                ));
            }
            used
        }
    };
    let nr_data_blocks = match superblock {
        Some(superblock) => superblock.data_space_map.nr_blocks,
        None => {
            if overrides.nr_data_blocks.is_none() {
                note(format!(
                    "the size of the data device is taken to be {} blocks, the last one mapped; the kernel grows it at activation",
                    span.data_blocks
                ));
            }
            overrides.nr_data_blocks.unwrap_or(span.data_blocks)
        }
    };
    if superblock.is_none() {
        note("the superblock is lost and was rebuilt".to_owned());
    }
    Ok(PoolInfo {
        uuid: fields.map_or_else(String::new, |f| uuid_text(&f.uuid)),
        time,
        transaction,
        flags: 0,
        version: VERSION,
        data_block_size,
        nr_data_blocks,
    })
}

/// Details that are made up, or may be stale, must presume blocks shared: a block counts as shared when it was mapped before the
/// device's last snapshot, so that must lie after every mapping. The superblock's own clock does; a guessed one is raised.
fn raise_clock(
    pool: PoolInfo,
    is_known: bool,
    chosen: &Chosen,
    report: &mut RepairReport,
) -> PoolInfo {
    let all_there = chosen
        .roots
        .keys()
        .all(|id| chosen.details.contains_key(id));
    if is_known || chosen.details_are_current && all_there {
        return pool;
    }
    if pool.time == MAX_TIME {
        report.notes.push(format!(
            "the snapshot clock is at its end, {MAX_TIME}: take no snapshots of this pool"
        ));
    }
    PoolInfo {
        time: (pool.time + 1).min(MAX_TIME),
        ..pool
    }
}

/// Says of every device what is recovered, and makes up details where they are lost.
fn describe_devices(
    forest: &Forest,
    chosen: &Chosen,
    pool: PoolInfo,
    damaged: &HashSet<MetadataBlock>,
    report: &mut RepairReport,
) -> Trees {
    let roots: Vec<MetadataBlock> = chosen.roots.values().copied().collect();
    let structure = Structure::of(forest, TreeKind::Mappings, &roots);
    let by_device: Vec<(Option<ThinId>, MetadataBlock)> = chosen
        .roots
        .iter()
        .map(|(&id, &root)| (Some(ThinId(id)), root))
        .collect();
    let mut lost: BTreeMap<ThinId, Vec<Affected>> = BTreeMap::new();
    for (list, _) in affected(forest, &by_device, damaged).into_values() {
        for range in list {
            if let Some(device) = range.device {
                lost.entry(device).or_default().push(range);
            }
        }
    }
    let mut devices = BTreeMap::new();
    for (&id, &root) in &chosen.roots {
        if id > MAX_THIN_ID {
            report.is_complete = false;
            report.notes.push(format!(
                "device {id} is left out: the kernel takes ids up to {MAX_THIN_ID}"
            ));
            continue;
        }
        let summary = structure.summary(forest, root).unwrap_or_default();
        let is_there = forest.number(root).is_some();
        let detail = chosen.details.get(&id);
        let mut lost = lost.remove(&ThinId(id)).unwrap_or_default();
        lost.sort_unstable();
        if !is_there {
            lost.push(Affected {
                device: Some(ThinId(id)),
                begin: 0,
                end: None,
            });
        }
        if !lost.is_empty() || detail.is_none_or(|d| d.mapped_blocks != summary.entries) {
            report.is_complete = false;
        }
        if detail.is_none() {
            report.notes.push(format!(
                "device {id} has no details left; they are made up, all its blocks presumed shared with snapshots"
            ));
        }
        report.devices.push(RecoveredDevice {
            dev_id: ThinId(id),
            mappings: summary.entries,
            expected: detail.map(|d| d.mapped_blocks),
            lost,
        });
        let made_up = DeviceDetail {
            mapped_blocks: summary.entries,
            transaction_id: pool.transaction,
            creation_time: 0,
            snapshotted_time: pool.time,
        };
        let known = *detail.unwrap_or(&made_up);
        let snapshotted_time = if chosen.details_are_current {
            known.snapshotted_time.min(MAX_TIME)
        } else {
            pool.time
        };
        let detail = DeviceDetail {
            mapped_blocks: summary.entries,
            creation_time: known.creation_time.min(MAX_TIME),
            snapshotted_time,
            ..known
        };
        devices.insert(id, (root, detail));
    }
    for id in chosen
        .details
        .keys()
        .filter(|id| !chosen.roots.contains_key(id))
    {
        report.is_complete = false;
        report.notes.push(format!(
            "device {id} has details, but its mapping tree is lost; it is left out"
        ));
    }
    Trees { pool, devices }
}
