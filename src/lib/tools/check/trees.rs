//! Walks every tree that the superblock and the metadata snapshot lead to, and judges devices against each other.

use super::damage::{Code, Damage, KernelEffect};
use super::mappings::{Leaf, MappingVisitor};
use super::space_maps::{self, Counted};
use super::{CheckOptions, Checker, Scope};
use crate::checksum::SealFault;
use crate::error::Result;
use crate::pdata::{
    CountMap, Leaves, NodeFault, NodeProblem, Shape, Structure, StructureFault, TreeKind, Value,
    Walk,
};
use crate::thin::{DeviceDetail, Superblock};
use crate::tools::affected::affected;
use crate::units::{MAX_THIN_ID, MAX_TIME, MetadataBlock, ThinId};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Entries of small trees by the leaf that holds them.
type ByLeaf<V> = HashMap<MetadataBlock, Vec<(u64, V)>>;

/// The devices of one top-level tree and one details tree, with the leaves where they stand.
#[derive(Debug, Default)]
pub(super) struct Devices {
    roots: BTreeMap<u64, (MetadataBlock, MetadataBlock)>,
    details: BTreeMap<u64, (DeviceDetail, MetadataBlock)>,
    mapping_root: Option<MetadataBlock>,
    details_root: Option<MetadataBlock>,
    /// Both trees were read without damage, so that they can be held against each other.
    whole: bool,
}

/// All that the walks found, for the counting of references.
#[derive(Debug, Default)]
pub(super) struct Walked {
    tops: ByLeaf<u64>,
    details: ByLeaf<DeviceDetail>,
}

impl Walked {
    /// How often top-level leaves point to each device's root.
    pub(super) fn device_roots(&self) -> impl Iterator<Item = MetadataBlock> + '_ {
        self.tops
            .values()
            .flatten()
            .map(|&(_, root)| MetadataBlock(root))
    }
}

impl Checker<'_> {
    /// Checks the current state, the metadata snapshot included. Returns the counts if everything could be counted.
    pub(super) fn check_pool(&mut self, options: &CheckOptions) -> Result<Option<Counted>> {
        let is_overridden = options.mapping_root.is_some() || options.details_root.is_some();
        let roots = (
            options.mapping_root.unwrap_or(self.superblock.mapping_root),
            options.details_root.unwrap_or(self.superblock.details_root),
        );
        let mut walked = Walked::default();
        let mut pools = vec![self.read_devices(&mut walked, roots)?];
        let held = self.superblock.held_root;
        if let Some(snapshot) = self.read_snapshot_block(held) {
            pools.push(
                self.read_devices(&mut walked, (snapshot.mapping_root, snapshot.details_root))?,
            );
        }
        self.devices = pools[0].roots.len() as u64;
        if options.scope == Scope::SkipMappings {
            self.report_trees(&pools, &[TreeKind::TopLevel, TreeKind::Details], &[]);
            self.judge_devices(&pools, None);
            return Ok(None);
        }
        let indexes = self.read_indexes()?;
        let data_counts = CountMap::new(indexes.countable_data_blocks(&self.superblock));
        let leaves = self.walk_mappings(&pools, &data_counts)?;
        let structure = self.report_trees(&pools, &TreeKind::ALL, &leaves);
        self.judge_devices(&pools, Some(&structure));
        if is_overridden {
            let message = "reference counts are not compared when roots are overridden";
            self.damages.push(Damage::new(
                Code::CountsNotCompared,
                MetadataBlock(0),
                message,
            ));
            return Ok(None);
        }
        space_maps::compare(self, indexes, &walked, data_counts)
    }

    /// Checks only the metadata snapshot: its trees, no space maps.
    pub(super) fn check_snapshot_alone(
        &mut self,
        snapshot: &Superblock,
        options: &CheckOptions,
    ) -> Result<()> {
        let roots = (
            options.mapping_root.unwrap_or(snapshot.mapping_root),
            options.details_root.unwrap_or(snapshot.details_root),
        );
        let pools = [self.read_devices(&mut Walked::default(), roots)?];
        self.devices = pools[0].roots.len() as u64;
        let mut structure = None;
        if options.scope == Scope::All {
            let leaves = self.walk_mappings(&pools, &CountMap::new(0))?;
            structure = Some(self.report_trees(&pools, &TreeKind::ALL, &leaves));
        } else {
            self.report_trees(&pools, &[TreeKind::TopLevel, TreeKind::Details], &[]);
        }
        self.judge_devices(&pools, structure.as_ref());
        Ok(())
    }

    /// Judges the block that the superblock names as metadata snapshot.
    fn read_snapshot_block(&mut self, block: MetadataBlock) -> Option<Superblock> {
        if block.0 == 0 {
            return None;
        }
        let limit = self.forest.nr_blocks();
        if block.0 >= limit {
            let message =
                format!("the metadata snapshot's block is past the last of {limit} blocks");
            self.damages
                .push(Damage::new(Code::SnapshotBlock, block, message));
            return None;
        }
        let snapshot = match Superblock::read_at(self.engine, block) {
            Ok(snapshot) => snapshot,
            Err(e) => {
                self.damages
                    .push(Damage::new(Code::SnapshotBlock, block, e.to_string()));
                return None;
            }
        };
        let maps = [snapshot.data_space_map, snapshot.metadata_space_map];
        if snapshot.held_root.0 != 0
            || maps
                .iter()
                .any(|m| *m != crate::pdata::SpaceMapRoot::default())
        {
            let message =
                "the metadata snapshot's superblock has a snapshot or space maps of its own";
            self.damages
                .push(Damage::new(Code::SnapshotFields, block, message));
        }
        Some(snapshot)
    }

    /// Walks a top-level tree and a details tree.
    fn read_devices(
        &mut self,
        walked: &mut Walked,
        roots: (MetadataBlock, MetadataBlock),
    ) -> Result<Devices> {
        let limit = self.forest.nr_blocks();
        // A root that points nowhere is on record as a fault of the superblock, unless the user or a snapshot named it.
        let (mapping_root, details_root) = roots;
        let usable = |root: MetadataBlock| (root.0 > 0 && root.0 < limit).then_some(root);
        let mut devices = Devices {
            mapping_root: usable(mapping_root),
            details_root: usable(details_root),
            ..Devices::default()
        };
        for root in [mapping_root, details_root] {
            let is_known =
                [self.superblock.mapping_root, self.superblock.details_root].contains(&root);
            if usable(root).is_none() && !is_known {
                let message = format!(
                    "a root is block {root}; blocks 1 to {} exist",
                    limit.saturating_sub(1)
                );
                self.damages
                    .push(Damage::new(Code::SuperblockRoot, root, message));
            }
        }
        self.walk_small(TreeKind::TopLevel, devices.mapping_root, &mut walked.tops)?;
        self.walk_small(TreeKind::Details, devices.details_root, &mut walked.details)?;
        devices.whole = self.is_whole(TreeKind::TopLevel, devices.mapping_root)
            && self.is_whole(TreeKind::Details, devices.details_root);
        for (id, root, leaf) in self.entries(TreeKind::TopLevel, devices.mapping_root, &walked.tops)
        {
            devices.roots.insert(id, (MetadataBlock(root), leaf));
        }
        for (id, detail, leaf) in
            self.entries(TreeKind::Details, devices.details_root, &walked.details)
        {
            devices.details.insert(id, (detail, leaf));
        }
        Ok(devices)
    }

    /// True when every node below `root` was read.
    pub(super) fn is_whole(&self, tree: TreeKind, root: Option<MetadataBlock>) -> bool {
        let number = root.and_then(|root| self.forest.number(root));
        let nodes = self.forest.children_first(number.as_slice());
        let is_good = |&number: &usize| {
            let node = &self.forest.nodes()[number];
            let edges = self.forest.edges(node);
            node.tree == tree
                && node.shape != Shape::Bad
                && edges.iter().all(|e| self.forest.child(e).is_some())
        };
        number.is_some() && nodes.iter().all(is_good)
    }

    /// Walks a small tree and keeps its entries by leaf.
    pub(super) fn walk_small<V: Value + Send>(
        &mut self,
        tree: TreeKind,
        root: Option<MetadataBlock>,
        by_leaf: &mut ByLeaf<V>,
    ) -> Result<()> {
        let parts = self.forest.walk(
            &Walk {
                engine: self.engine,
                observer: self.observer,
                tree,
                leaves: Leaves::Read,
            },
            root,
            Vec::new,
            |leaves, node| {
                let entries: Vec<(u64, V)> =
                    node.keys().zip(node.values().map(V::unpack)).collect();
                leaves.push((node.location(), entries));
            },
        )?;
        by_leaf.extend(parts.into_iter().flatten());
        Ok(())
    }

    /// The entries below `root`, each with its leaf; every leaf once, whatever the shape of the tree.
    pub(super) fn entries<V: Copy>(
        &self,
        tree: TreeKind,
        root: Option<MetadataBlock>,
        by_leaf: &ByLeaf<V>,
    ) -> Vec<(u64, V, MetadataBlock)> {
        let root = root.and_then(|root| self.forest.number(root));
        let nodes = self.forest.children_first(root.as_slice());
        nodes
            .into_iter()
            .map(|number| &self.forest.nodes()[number])
            .filter(|node| node.tree == tree)
            .filter_map(|node| Some((node.block, by_leaf.get(&node.block)?)))
            .flat_map(|(block, entries)| {
                entries.iter().map(move |&(key, value)| (key, value, block))
            })
            .collect()
    }

    /// Reads all mapping trees, counting data blocks on the way.
    fn walk_mappings(&mut self, pools: &[Devices], data_counts: &CountMap) -> Result<Vec<Leaf>> {
        let limit = self.forest.nr_blocks();
        let mut roots = Vec::new();
        for (id, root, leaf) in pools
            .iter()
            .flat_map(|p| p.roots.iter().map(|(id, r)| (*id, r.0, r.1)))
        {
            if root.0 > 0 && root.0 < limit {
                roots.push(root);
                continue;
            }
            let message = format!(
                "its mapping tree's root is block {root}; blocks 1 to {} exist",
                limit.saturating_sub(1)
            );
            self.damages
                .push(Damage::new(Code::NodePointer, leaf, message).of_device(id));
        }
        self.observer.progress("mappings", 0, 1);
        let nr_data_blocks = self.superblock.data_space_map.nr_blocks;
        let clock = self.superblock.time;
        let visitors = self.forest.walk(
            &Walk {
                engine: self.engine,
                observer: self.observer,
                tree: TreeKind::Mappings,
                leaves: Leaves::Read,
            },
            roots,
            || MappingVisitor::new(data_counts, nr_data_blocks, clock),
            MappingVisitor::visit,
        )?;
        let mut leaves = Vec::new();
        for visitor in visitors {
            let (found, latest) = visitor.finish();
            leaves.extend(found);
            self.latest = self.latest.max(latest);
        }
        Ok(leaves)
    }

    /// Turns everything that is wrong with nodes, and between them, into damages. Returns the structure of the mapping trees.
    fn report_trees(
        &mut self,
        pools: &[Devices],
        kinds: &[TreeKind],
        leaves: &[Leaf],
    ) -> Structure {
        let mut found: Vec<(TreeKind, Damage)> = Vec::new();
        for (block, tree, problem) in std::mem::take(&mut self.forest.problems) {
            found.push((tree, problem_damage(block, tree, &problem)));
        }
        let mut mappings = None;
        for &tree in kinds {
            let structure = Structure::of(&self.forest, tree, &self.roots(pools, tree));
            // Five hundred parents may see the same fault of one node.
            let mut known = HashSet::new();
            for &(block, fault) in &structure.faults {
                let damage = structure_damage(block, tree, &fault);
                if known.insert((block, damage.code)) {
                    found.push((tree, damage));
                }
            }
            if tree == TreeKind::Mappings {
                mappings = Some(structure);
            }
        }
        for leaf in leaves {
            found.extend(
                leaf.damages(&self.superblock)
                    .map(|d| (TreeKind::Mappings, d)),
            );
        }
        self.add_affected(pools, &mut found);
        self.damages
            .extend(found.into_iter().map(|(_, damage)| damage));
        mappings.unwrap_or_else(|| Structure::of(&self.forest, TreeKind::Mappings, &[]))
    }

    fn roots(&self, pools: &[Devices], tree: TreeKind) -> Vec<MetadataBlock> {
        let limit = self.forest.nr_blocks();
        let all: Vec<MetadataBlock> = match tree {
            TreeKind::TopLevel => pools.iter().filter_map(|p| p.mapping_root).collect(),
            TreeKind::Details => pools.iter().filter_map(|p| p.details_root).collect(),
            TreeKind::Mappings => pools
                .iter()
                .flat_map(|p| p.roots.values().map(|r| r.0))
                .collect(),
            TreeKind::DataIndex => vec![self.superblock.data_space_map.bitmap_root],
            TreeKind::DataCounts => vec![self.superblock.data_space_map.ref_count_root],
            TreeKind::MetadataCounts => vec![self.superblock.metadata_space_map.ref_count_root],
        };
        all.into_iter().filter(|root| root.0 < limit).collect()
    }

    /// Says of each damage in a pool's trees what it puts out of reach.
    fn add_affected(&self, pools: &[Devices], found: &mut [(TreeKind, Damage)]) {
        for tree in [TreeKind::TopLevel, TreeKind::Details, TreeKind::Mappings] {
            let damaged: HashSet<MetadataBlock> = found
                .iter()
                .filter(|(t, d)| *t == tree && d.code != Code::TreeUnderFull)
                .map(|(_, d)| d.block)
                .collect();
            if damaged.is_empty() {
                continue;
            }
            let devices = pools[0].roots.iter();
            let roots: Vec<(Option<ThinId>, MetadataBlock)> = match tree {
                TreeKind::Mappings => devices.map(|(&id, r)| (Some(ThinId(id)), r.0)).collect(),
                TreeKind::TopLevel => pools[0]
                    .mapping_root
                    .map(|r| (None, r))
                    .into_iter()
                    .collect(),
                _ => pools[0]
                    .details_root
                    .map(|r| (None, r))
                    .into_iter()
                    .collect(),
            };
            let mut ranges = affected(&self.forest, &roots, &damaged);
            for (_, damage) in found
                .iter_mut()
                .filter(|(t, d)| *t == tree && d.affected.is_empty())
            {
                if let Some((list, more)) = ranges.get_mut(&damage.block) {
                    damage.affected.clone_from(list);
                    damage.more_affected = *more;
                }
            }
        }
    }

    /// Holds the devices of each pool (the current one, the snapshot's) against their details and mappings.
    fn judge_devices(&mut self, pools: &[Devices], structure: Option<&Structure>) {
        for (i, pool) in pools.iter().enumerate() {
            if pool.whole {
                self.judge_ids(pool);
            }
            for (&id, &(detail, leaf)) in &pool.details {
                for message in odd_details(id, &detail, &self.superblock) {
                    self.damages
                        .push(Damage::new(Code::DeviceOdd, leaf, message).of_device(id));
                }
                let root = pool.roots.get(&id).map(|r| r.0);
                let Some(summary) = root.and_then(|root| structure?.summary(&self.forest, root))
                else {
                    continue;
                };
                if i == 0 {
                    self.mappings = self.mappings.saturating_add(summary.entries);
                }
                if summary.entries != detail.mapped_blocks {
                    let why = if summary.damaged {
                        ": the rest is out of reach"
                    } else {
                        ""
                    };
                    let message = format!(
                        "the details say {} mapped blocks, {} are mapped{why}",
                        detail.mapped_blocks, summary.entries
                    );
                    self.damages
                        .push(Damage::new(Code::DeviceMappedBlocks, leaf, message).of_device(id));
                }
            }
        }
    }

    fn judge_ids(&mut self, pool: &Devices) {
        for (&id, &(_, leaf)) in pool
            .roots
            .iter()
            .filter(|(id, _)| !pool.details.contains_key(id))
        {
            let damage = Damage::new(
                Code::DeviceNoDetails,
                leaf,
                "it has a mapping tree but no details",
            );
            self.damages.push(damage.of_device(id));
        }
        for (&id, &(_, leaf)) in pool
            .details
            .iter()
            .filter(|(id, _)| !pool.roots.contains_key(id))
        {
            let damage = Damage::new(
                Code::DeviceNoMappings,
                leaf,
                "it has details but no mapping tree",
            );
            self.damages.push(damage.of_device(id));
        }
    }
}

/// What a device's details say that no kernel writes.
fn odd_details(id: u64, detail: &DeviceDetail, superblock: &Superblock) -> Vec<String> {
    let clock = superblock.time;
    let (created, snapped) = (detail.creation_time, detail.snapshotted_time);
    let mut odd = Vec::new();
    if id > MAX_THIN_ID {
        odd.push(format!(
            "the kernel's messages take ids up to {MAX_THIN_ID} only"
        ));
    }
    if created > snapped {
        odd.push(format!(
            "created at time {created}, snapshotted before, at {snapped}"
        ));
    }
    if snapped > clock || created > clock {
        let latest = snapped.max(created);
        let limit = if latest > MAX_TIME {
            ", and past 24 bits"
        } else {
            ""
        };
        odd.push(format!(
            "its time {latest} is later than the snapshot clock {clock}{limit}"
        ));
    }
    if detail.transaction_id > superblock.transaction_id {
        odd.push(format!(
            "created in transaction {}, the pool is at {}",
            detail.transaction_id, superblock.transaction_id
        ));
    }
    odd
}

fn problem_damage(block: MetadataBlock, tree: TreeKind, problem: &NodeProblem) -> Damage {
    let (code, message) = match problem {
        NodeProblem::Unreadable(e) => (Code::ReadError, e.to_string()),
        NodeProblem::Fault(fault) => {
            let code = match fault {
                NodeFault::Seal(SealFault::Zeroed) => Code::NodeZeroed,
                NodeFault::Seal(SealFault::WrongKind { .. }) => Code::NodeWrongKind,
                NodeFault::Seal(SealFault::Checksum { .. }) => Code::NodeChecksum,
                NodeFault::Seal(SealFault::Location { .. }) => Code::NodeLocation,
                NodeFault::KeyOrder { .. } => Code::NodeKeyOrder,
                _ => Code::NodeHeader,
            };
            (code, fault.to_string())
        }
        NodeProblem::Pointers {
            count,
            key,
            child,
            limit,
        } => {
            let message = format!(
                "{count} of its children do not exist; the first, for key {key}, would be block {child} of {limit}"
            );
            (Code::NodePointer, message)
        }
        NodeProblem::UsedTwice { first } => (
            Code::NodeUsedTwice,
            format!("it is part of the {first} too"),
        ),
    };
    let damage = Damage::new(code, block, format!("{tree}: {message}"));
    with_tree_effect(damage, tree)
}

fn structure_damage(block: MetadataBlock, tree: TreeKind, fault: &StructureFault) -> Damage {
    let code = match fault {
        StructureFault::ChildKeys { .. } | StructureFault::Repeated { .. } => Code::TreeKeyRange,
        StructureFault::Depth { .. } => Code::TreeDepth,
        StructureFault::Cycle { .. } => Code::TreeCycle,
        StructureFault::EmptyLeaf { .. } => Code::TreeEmptyLeaf,
        StructureFault::UnderFull { .. } => Code::TreeUnderFull,
    };
    with_tree_effect(Damage::new(code, block, format!("{tree}: {fault}")), tree)
}

/// Damage of a space map's tree does not fail devices but allocations, or counts silently wrong.
fn with_tree_effect(damage: Damage, tree: TreeKind) -> Damage {
    match tree {
        _ if damage.effect != KernelEffect::DevicesFail => damage,
        TreeKind::DataIndex => damage.with_effect(KernelEffect::AllocationFails),
        TreeKind::DataCounts | TreeKind::MetadataCounts => {
            damage.with_effect(KernelEffect::Corrupts)
        }
        _ => damage,
    }
}
