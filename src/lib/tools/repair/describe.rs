//! Makes the pool and its devices of what was recovered, and says what is missing.

use super::contested::Omitted;
use super::mend::MendedEngine;
use super::report::{Ambiguous, Candidate, Mended, Reattached, RecoveredDevice, RepairReport};
use super::scan::Scan;
use super::states::{State, States};
use super::{Options, Recovery, Work};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::{Forest, Shape};
use crate::thin::{DeviceDetail, Fields, Superblock, VERSION};
use crate::tools::affected::{Affected, affected};
use crate::tools::event::PoolInfo;
use crate::tools::metadata_source::{Recovered, Trees, uuid_text};
use crate::units::{MAX_THIN_ID, MAX_TIME, MetadataBlock, ThinId, is_legal_data_block_size};
use std::collections::{BTreeMap, BTreeSet};

/// Candidates that a report lists.
const MOST_CANDIDATES: usize = 16;
/// Mended blocks that a report lists.
const MOST_MENDED: usize = 1000;
/// Ambiguous subtrees that a report lists.
const MOST_AMBIGUOUS: usize = 1000;

impl RepairReport {
    /// The superblock's roots are used.
    pub(super) fn take_as_is(&mut self, superblock: &Superblock) {
        self.mapping_root = Some(superblock.mapping_root);
        self.details_root = Some(superblock.details_root);
        self.why = "the superblock names them".into();
    }

    /// Says what the scan could mend.
    pub(super) fn tell_scan(&mut self, scan: &Scan) {
        let mends = scan.mends.iter().take(MOST_MENDED);
        self.mended = mends
            .map(|(&block, &mend)| Mended { block, mend })
            .collect();
        if scan.unreadable > 0 {
            self.notes
                .push(format!("{} blocks cannot be read", scan.unreadable));
        }
    }

    /// Lists the states of the pool, the one that is `best` first.
    pub(super) fn list(&mut self, states: &States, best: Option<usize>) {
        let listed = |i: &usize| !states.states[*i].roots.is_empty() || Some(*i) == best;
        let mut order: Vec<usize> = (0..states.states.len()).filter(listed).collect();
        order.sort_by_key(|&i| {
            let state = &states.states[i];
            std::cmp::Reverse((
                Some(i) == best,
                state.details_root.is_some(),
                state.time(),
                state.transaction_id(),
                state.mapping_root,
            ))
        });
        self.more_candidates = order.len().saturating_sub(MOST_CANDIDATES);
        let first = order.iter().take(MOST_CANDIDATES);
        self.candidates = first
            .map(|&i| candidate(&states.states[i], states))
            .collect();
    }

    /// The top-level tree is not the last one.
    pub(super) fn note_old_top(&mut self) {
        self.mapping_root = None;
        self.lose(
            "the top-level tree is of an older transaction than the space map; every device's root was looked for".into(),
        );
    }

    /// The details are not the last ones.
    pub(super) fn note_old_details(&mut self) {
        self.lose("the device details do not go with any tree that is in use; they are taken to be of an older transaction".into());
    }

    /// Devices of which only what others prove is taken.
    pub(super) fn note_doubtful(&mut self, older: usize, devices: &[ThinId]) {
        let ids: Vec<String> = devices.iter().map(ToString::to_string).collect();
        self.lose(format!(
                        "writes to this disk were lost: {older} leaves are older than they should be, and of devices {} the number of mappings is not \
             what their details say; what no other device bears out is left out, --include-ambiguous takes it in",
            ids.join(", ")
        ));
    }

    /// Of devices that could have any of several trees, only what these have in common was taken.
    pub(super) fn note_common(&mut self, devices: &[ThinId]) {
        let ids: Vec<String> = devices.iter().map(ToString::to_string).collect();
        self.lose(format!(
            "which tree belongs to which of the devices {} cannot be told: each gets the mappings that all of the trees have",
            ids.join(", ")
        ));
    }

    fn lose(&mut self, note: String) {
        self.notes.push(note);
        self.is_complete = false;
    }
}

fn candidate(state: &State, states: &States) -> Candidate {
    Candidate {
        mapping_root: state.mapping_root,
        details_root: state.details_root,
        devices: state.roots.len() as u64,
        whole_devices: state.whole,
        mappings: state.mappings,
        time: state.time(),
        transaction_id: state.transaction_id(),
        in_use: (!states.maps.is_empty()).then_some(state.index.is_some()),
        space_map: state.index,
    }
}

/// Mappings below each of `roots`, by device.
pub(super) fn totals(
    forest: &Forest,
    roots: &BTreeMap<u64, MetadataBlock>,
    omitted: &Omitted,
) -> BTreeMap<u64, u64> {
    let numbers: Vec<usize> = roots.values().filter_map(|&r| forest.number(r)).collect();
    let mut sums = vec![0_u64; forest.nodes().len()];
    for n in forest.children_first(&numbers) {
        let node = &forest.nodes()[n];
        sums[n] = match node.shape {
            Shape::Leaf { entries, .. } => {
                let left_out = omitted.get(&node.block).map_or(0, Vec::len);
                u64::from(entries) - left_out as u64
            }
            _ => {
                let children = forest
                    .edges(node)
                    .iter()
                    .filter_map(|e| forest.number(forest.child(e)?));
                children.fold(0, |sum, c| sum.saturating_add(sums[c]))
            }
        };
    }
    let of = |root: &MetadataBlock| forest.number(*root).map_or(0, |n| sums[n]);
    roots.iter().map(|(&id, root)| (id, of(root))).collect()
}

impl Work {
    /// The recovery, with its report completed.
    pub(super) fn finish<'a>(
        self,
        engine: MendedEngine<'a>,
        superblock: Option<&Superblock>,
        options: &Options,
        mut report: RepairReport,
    ) -> Result<Recovery<'a>> {
        if self.span.past_end > 0 {
            report.lose(format!(
                "{} mappings to data blocks past the last of the pool are left out",
                self.span.past_end
            ));
        }
        let pool = self.pool_info(superblock, options, &mut report)?;
        let pool = self.raise_clock(pool, superblock.is_some(), &mut report);
        self.tell_ambiguous(&mut report);
        let devices = self.devices(&pool, &mut report);
        Ok(Recovery {
            report,
            engine,
            superblock: superblock.copied(),
            trees: Trees { pool, devices },
            lost: self.without_trees(),
            recovered: Recovered {
                forest: self.forest,
                omitted: self.omitted,
            },
        })
    }

    fn pool_info(
        &self,
        superblock: Option<&Superblock>,
        options: &Options,
        report: &mut RepairReport,
    ) -> Result<PoolInfo> {
        let overrides = &options.overrides;
        let fields: Option<&Fields> = superblock.map(|s| &**s).or(self.basis.copy.as_ref());
        let known = fields
            .map(|f| f.data_block_size)
            .filter(|&s| is_legal_data_block_size(s));
        let data_block_size = overrides.data_block_size.or(known).ok_or_else(|| {
            Error::new(
                ErrorKind::Damaged,
                "the superblock is lost, and with it the data block size; give it (thin_repair --data-block-size, in sectors of 512 bytes, or \
                 thin_serve --block-size; 'lvs -o chunksize' or the pool's table has it)",
            )
        })?;
        let details = self.basis.details.values();
        let latest_transaction = details.clone().map(|d| d.transaction_id).max();
        let latest_time = details
            .map(|d| d.snapshotted_time.max(d.creation_time))
            .max()
            .unwrap_or(0);
        let clock = superblock.map_or(0, |s| s.time);
        let time = clock
            .max(self.span.time)
            .max(latest_time.min(MAX_TIME))
            .min(MAX_TIME);
        if superblock.is_some() && time != clock {
            report.lose(format!(
                "the snapshot clock {clock} is behind the mappings; {time} is written"
            ));
        }
        let transaction = match superblock {
            Some(superblock) => superblock.transaction_id,
            None => {
                let guess = latest_transaction.map_or(0, |t| t.saturating_add(1));
                if overrides.transaction_id.is_none() {
                    report.lose(format!(
                        "the transaction id is guessed to be {guess}, one above the latest device's; LVM accepts only its own number \
                         or the one before: give it with --transaction-id"
                    ));
                }
                match overrides.transaction_id {
                    Some(given) => given.max(latest_transaction.unwrap_or(0)),
                    None => guess,
                }
            }
        };
        let nr_data_blocks = match superblock {
            Some(superblock) => superblock.data_space_map.nr_blocks,
            None => {
                if overrides.nr_data_blocks.is_none() {
                    report.lose(format!(
                        "the size of the data device is taken to be {} blocks, the last one mapped; the kernel grows it at activation",
                        self.span.data_blocks
                    ));
                }
                overrides.nr_data_blocks.unwrap_or(self.span.data_blocks)
            }
        };
        if superblock.is_none() {
            report.lose("the superblock is lost and was rebuilt".to_owned());
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

    /// Details that are made up, or may be stale, must presume blocks shared: a block counts as shared when it was mapped before
    /// the device's last snapshot, so that must lie after every mapping. The superblock's own clock does; a guessed one is raised.
    fn raise_clock(&self, pool: PoolInfo, is_known: bool, report: &mut RepairReport) -> PoolInfo {
        let basis = &self.basis;
        let all_there = basis.roots.keys().all(|id| basis.details.contains_key(id));
        if is_known || basis.details_are_current && all_there {
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

    /// Lists what is in use but could not be put anywhere.
    fn tell_ambiguous(&self, report: &mut RepairReport) {
        let orphans = &self.orphans;
        for (o, orphan) in orphans.orphans.iter().enumerate() {
            let Some((first, last)) = orphan.keys.filter(|_| orphan.missing > 0) else {
                continue;
            };
            let holes = orphans.candidates(o);
            let devices = holes
                .iter()
                .flat_map(|&h| orphans.holes[h].devices.iter().copied());
            let devices: BTreeSet<ThinId> = devices.collect();
            if report.ambiguous.len() == MOST_AMBIGUOUS {
                report.lose(
                    "more than a thousand subtrees are in doubt; the rest is not listed".into(),
                );
                return;
            }
            if devices.is_empty() && orphans.holes.is_empty() {
                // Nothing is lost that it could belong to: blocks that leaked, or a deleted snapshot of the metadata.
                continue;
            }
            report.is_complete = false;
            report.ambiguous.push(Ambiguous {
                block: orphan.block,
                begin: first,
                end: last.saturating_add(1),
                mappings: orphan.entries,
                devices: devices.into_iter().collect(),
            });
        }
    }

    /// Says of every device what is recovered, and makes up details where they are lost.
    fn devices(
        &self,
        pool: &PoolInfo,
        report: &mut RepairReport,
    ) -> BTreeMap<u64, (MetadataBlock, DeviceDetail)> {
        let totals = totals(&self.forest, &self.basis.roots, &self.omitted);
        let mut lost = self.lost();
        let mut contested = self.contested();
        let mut devices = BTreeMap::new();
        for (&id, &root) in &self.basis.roots {
            if id > MAX_THIN_ID {
                report.lose(format!(
                    "device {id} is left out: the kernel takes ids up to {MAX_THIN_ID}"
                ));
                continue;
            }
            let mappings = totals[&id];
            let known = self.basis.details.get(&id);
            let device = RecoveredDevice {
                dev_id: ThinId(id),
                mappings,
                expected: known
                    .filter(|_| self.basis.details_are_current)
                    .map(|d| d.mapped_blocks),
                reattached: self.reattached(ThinId(id)),
                lost: lost.remove(&ThinId(id)).unwrap_or_default(),
                contested: contested.remove(&ThinId(id)).unwrap_or_default(),
            };
            if known.is_none() {
                report.lose(format!(
                    "device {id} has no details left; they are made up, all its blocks presumed shared with snapshots"
                ));
            }
            report.is_complete &= device.is_whole();
            report.devices.push(device);
            let made_up = DeviceDetail {
                mapped_blocks: mappings,
                transaction_id: pool.transaction,
                creation_time: 0,
                snapshotted_time: pool.time,
            };
            let known = *known.unwrap_or(&made_up);
            let snapshotted_time = match self.basis.details_are_current {
                true => known.snapshotted_time.min(MAX_TIME),
                false => pool.time,
            };
            let detail = DeviceDetail {
                mapped_blocks: mappings,
                creation_time: known.creation_time.min(MAX_TIME),
                snapshotted_time,
                ..known
            };
            devices.insert(id, (root, detail));
        }
        for id in self.without_trees().keys() {
            report.lose(format!(
                "device {id} has details, but its mapping tree is lost; it is left out"
            ));
        }
        devices
    }

    /// Devices that have details, and no tree that was found.
    fn without_trees(&self) -> BTreeMap<u64, DeviceDetail> {
        let details = self.basis.details.iter();
        details
            .filter(|(id, _)| !self.basis.roots.contains_key(id))
            .map(|(&id, &detail)| (id, detail))
            .collect()
    }

    /// Ranges of virtual blocks whose mappings are out of reach.
    fn lost(&self) -> BTreeMap<ThinId, Vec<Affected>> {
        let roots = self.basis.roots.iter();
        let by_device: Vec<_> = roots.map(|(&id, &root)| (Some(ThinId(id)), root)).collect();
        let mut lost: BTreeMap<ThinId, Vec<Affected>> = BTreeMap::new();
        let ranges = affected(&self.forest, &by_device, &self.damaged);
        let ranges = ranges.into_values().flat_map(|(list, _)| list);
        for range in ranges {
            if let Some(device) = range.device {
                lost.entry(device).or_default().push(range);
            }
        }
        for (&id, &root) in &self.basis.roots {
            if self.forest.number(root).is_none() {
                let all = Affected {
                    device: Some(ThinId(id)),
                    begin: 0,
                    end: None,
                };
                lost.entry(ThinId(id)).or_default().push(all);
            }
        }
        lost.values_mut().for_each(|list| list.sort_unstable());
        lost
    }

    fn reattached(&self, device: ThinId) -> Vec<Reattached> {
        let here = self
            .placed
            .iter()
            .filter(|p| self.orphans.holes[p.hole].devices.contains(&device));
        let mut reattached: Vec<Reattached> = here
            .map(|p| {
                let orphan = &self.orphans.orphans[p.orphan];
                Reattached {
                    block: orphan.block,
                    begin: orphan.keys.map(|k| k.0),
                    mappings: orphan.entries,
                    evidence: p.evidence,
                }
            })
            .collect();
        reattached.sort_by_key(|r| r.begin);
        reattached
    }

    /// Virtual blocks, by device, whose mappings are left out.
    fn contested(&self) -> BTreeMap<ThinId, Vec<u64>> {
        let mut contested: BTreeMap<ThinId, Vec<u64>> = BTreeMap::new();
        if self.omitted.is_empty() {
            return contested;
        }
        for (&id, &root) in &self.basis.roots {
            for n in self
                .forest
                .children_first(self.forest.number(root).as_slice())
            {
                if let Some(keys) = self.omitted.get(&self.forest.nodes()[n].block) {
                    contested.entry(ThinId(id)).or_default().extend(keys);
                }
            }
        }
        contested.values_mut().for_each(|keys| keys.sort_unstable());
        contested
    }
}
