//! Many small trees at once, as far as they can be read: top-level trees, details trees, trees of large counts.

use crate::error::Result;
use crate::io::BlockEngine;
use crate::observer::Observer;
use crate::pdata::{Forest, Leaves, Structure, TreeKind, Value, Walk};
use crate::tools::affected::{Affected, affected};
use crate::units::MetadataBlock;
use std::collections::{BTreeMap, HashMap, HashSet};

/// The trees of one kind below any number of roots, every block read once.
pub(super) struct SmallTrees<V> {
    forest: Forest,
    by_leaf: HashMap<MetadataBlock, Vec<(u64, V)>>,
    damaged: HashSet<MetadataBlock>,
}

/// One tree as far as it can be read.
#[derive(Clone, Debug)]
pub(super) struct SmallTree<V> {
    pub(super) entries: BTreeMap<u64, V>,
    /// Every block of it that was reached.
    pub(super) nodes: Vec<MetadataBlock>,
    /// The nodes that are damaged or do not belong where they are.
    pub(super) damaged: HashSet<MetadataBlock>,
    /// Ranges of keys behind the damage.
    pub(super) lost: Vec<Affected>,
}

impl<V: Value + Send> SmallTrees<V> {
    /// Reads the trees at `roots`; roots past the end of the device have no tree.
    pub(super) fn read(
        engine: &dyn BlockEngine,
        tree: TreeKind,
        roots: &[MetadataBlock],
        observer: &dyn Observer,
    ) -> Result<Self> {
        let mut forest = Forest::new(engine.nr_blocks());
        let limit = forest.nr_blocks();
        let roots: Vec<MetadataBlock> = roots
            .iter()
            .copied()
            .filter(|r| r.0 > 0 && r.0 < limit)
            .collect();
        let walk = Walk {
            engine,
            observer,
            tree,
            leaves: Leaves::Read,
        };
        let parts = forest.walk(&walk, roots.iter().copied(), Vec::new, |leaves, node| {
            let entries = node.keys().zip(node.values().map(V::unpack));
            leaves.push((node.location(), entries.collect::<Vec<_>>()));
        })?;
        let structure = Structure::of(&forest, tree, &roots);
        let problems = forest.problems.iter().map(|p| p.0);
        let faults = structure.faults.iter().filter(|f| f.1.parent().is_some());
        Ok(Self {
            damaged: problems.chain(faults.map(|f| f.0)).collect(),
            by_leaf: parts.into_iter().flatten().collect(),
            forest,
        })
    }

    /// The tree at `root`; without any nodes if that lies past the end of the device.
    pub(super) fn tree(&self, root: MetadataBlock) -> SmallTree<V> {
        let Some(number) = self.forest.number(root) else {
            return SmallTree {
                entries: BTreeMap::new(),
                nodes: Vec::new(),
                damaged: HashSet::from([root]),
                lost: vec![Affected {
                    device: None,
                    begin: 0,
                    end: None,
                }],
            };
        };
        let nodes = self.forest.children_first(&[number]);
        let nodes: Vec<MetadataBlock> = nodes
            .iter()
            .map(|&n| self.forest.nodes()[n].block)
            .collect();
        let good = nodes.iter().filter(|block| !self.damaged.contains(block));
        let entries = good.filter_map(|block| self.by_leaf.get(block)).flatten();
        let damaged: HashSet<MetadataBlock> = nodes
            .iter()
            .copied()
            .filter(|block| self.damaged.contains(block))
            .collect();
        let ranges = affected(&self.forest, &[(None, root)], &damaged);
        let mut lost: Vec<Affected> = ranges.into_values().flat_map(|(list, _)| list).collect();
        lost.sort_unstable();
        SmallTree {
            entries: entries.copied().collect(),
            nodes,
            damaged,
            lost,
        }
    }
}
