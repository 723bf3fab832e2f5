//! `thin_serve --read-only` on metadata that is damaged: what can be found is served as it is, the rest is an I/O error, and nothing
//! is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::serve::{EIO, Scene};
use crate::support::{Pool, dump, expand, get_u32, get_u64, program, thintools};
use thintools::units::BLOCK_SIZE;

/// A mapping, and the metadata blocks that lead to it, from the root of its device.
struct Mapping {
    thin_block: u64,
    data_block: u64,
    path: BTreeSet<u64>,
}

/// What whole metadata holds, read without the library.
struct Known {
    image: Vec<u8>,
    block_size: u64,
    thins: BTreeMap<u64, Vec<Mapping>>,
    /// Nodes of the top-level tree.
    top: BTreeSet<u64>,
    /// Nodes of the mapping trees.
    nodes: BTreeSet<u64>,
}

/// Tells the entries of the leaves of the tree at `root`, each with the blocks that lead to it.
fn walk(
    image: &[u8],
    root: u64,
    path: &BTreeSet<u64>,
    tell: &mut dyn FnMut(u64, u64, &BTreeSet<u64>),
) {
    let node = &image[root as usize * BLOCK_SIZE..][..BLOCK_SIZE];
    let (is_leaf, entries, max) = (
        get_u32(node, 4) & 2 != 0,
        get_u32(node, 16),
        get_u32(node, 20),
    );
    let path = &path.iter().copied().chain([root]).collect();
    for at in 0..entries as usize {
        let (key, value) = (
            get_u64(node, 32 + 8 * at),
            get_u64(node, 32 + 8 * (max as usize + at)),
        );
        match is_leaf {
            true => tell(key, value, path),
            false => walk(image, value, path, tell),
        }
    }
}

impl Known {
    fn of(image: Vec<u8>) -> Self {
        let mut known = Self {
            block_size: u64::from(get_u32(&image, 336)) * 512,
            thins: BTreeMap::new(),
            top: BTreeSet::new(),
            nodes: BTreeSet::new(),
            image,
        };
        let mut roots = Vec::new();
        walk(
            &known.image,
            get_u64(&known.image, 320),
            &BTreeSet::new(),
            &mut |id, root, path| {
                known.top.extend(path);
                roots.push((id, root));
            },
        );
        for (id, root) in roots {
            let mappings = known.thins.entry(id).or_default();
            walk(
                &known.image,
                root,
                &BTreeSet::new(),
                &mut |thin_block, value, path| {
                    known.nodes.extend(path);
                    mappings.push(Mapping {
                        thin_block,
                        data_block: value >> 24,
                        path: path.clone(),
                    });
                },
            );
        }
        known
    }

    /// A pool whose data blocks begin with their number and one.
    fn scene(&self) -> Scene {
        let all = || self.thins.values().flatten().map(|m| m.data_block);
        let scene = Scene::new(0, 0);
        fs::write(scene.path("meta"), &self.image).expect("written");
        let data = File::options()
            .write(true)
            .open(scene.path("data"))
            .expect("opened");
        let blocks = all().max().map_or(0, |last| last + 1);
        data.set_len(blocks * self.block_size).expect("long");
        for block in all() {
            data.write_all_at(&(block + 1).to_le_bytes(), block * self.block_size)
                .expect("written");
        }
        scene
    }

    /// Blocks of a device, up to the last mapped one.
    fn blocks(&self, thin: u64) -> u64 {
        self.thins[&thin]
            .last()
            .map_or(1, |last| last.thin_block + 1)
    }

    /// Serves the damaged pool and reads everything: a block is an error if `is_lost`, else what it was; unmapped ones are zeros.
    fn expect(&self, scene: &mut Scene, what: &str, is_lost: &dyn Fn(&Mapping) -> bool) {
        let before = fs::read(scene.path("meta")).expect("read");
        let sizes: Vec<String> = self
            .thins
            .keys()
            .map(|&id| format!("{id}:{}", self.blocks(id) * self.block_size))
            .collect();
        let mut arguments = vec!["--read-only", "--quiet", "--block-size"];
        let block_size = self.block_size.to_string();
        arguments.push(&block_size);
        arguments.extend(sizes.iter().flat_map(|size| ["--thin", size]));
        scene.serve(&arguments);
        for (id, mappings) in &self.thins {
            let mut client = scene.connect(&id.to_string());
            let mut next = 0;
            let is_whole = !mappings.iter().any(is_lost);
            for mapping in mappings {
                if is_whole && next < mapping.thin_block {
                    let found = client.read((mapping.thin_block - 1) * self.block_size, 8);
                    assert_eq!(
                        found,
                        Ok(vec![0; 8]),
                        "{what}, device {id}, the hole before block {}",
                        mapping.thin_block
                    );
                }
                next = mapping.thin_block + 1;
                let found = client.read(mapping.thin_block * self.block_size, 8);
                let expected = match is_lost(mapping) {
                    true => Err(EIO),
                    false => Ok((mapping.data_block + 1).to_le_bytes().to_vec()),
                };
                assert_eq!(
                    found, expected,
                    "{what}, device {id}, block {}",
                    mapping.thin_block
                );
            }
        }
        scene.kill();
        assert!(
            fs::read(scene.path("meta")).expect("read") == before,
            "{what}: something was written"
        );
    }

    fn spoil(&self, scene: &Scene, block: u64, change: impl FnOnce(&mut [u8])) {
        let at = block as usize * BLOCK_SIZE;
        let mut spoilt = self.image[at..at + BLOCK_SIZE].to_vec();
        change(&mut spoilt);
        let meta = File::options()
            .write(true)
            .open(scene.path("meta"))
            .expect("opened");
        meta.write_all_at(&spoilt, at as u64).expect("written");
    }
}

/// Every block of the metadata that is in use, the superblock included.
fn in_use(image: &[u8]) -> Vec<u64> {
    let blocks = image.chunks(BLOCK_SIZE).zip(0..);
    blocks
        .filter(|(block, _)| block.iter().any(|&b| b != 0))
        .map(|(_, number)| number)
        .collect()
}

#[test]
fn one_lost_block_of_metadata_costs_what_it_leads_to_and_no_more() {
    for name in ["snap-mix-a", "crash-log", "needs-check-set"] {
        let known = Known::of(expand(&format!("{name}/meta.img")));
        let mut scene = known.scene();
        for block in in_use(&known.image) {
            known.spoil(&scene, block, |bytes| bytes.fill(0xa5));
            known.expect(&mut scene, &format!("{name}, block {block}"), &|m| {
                m.path.contains(&block)
            });
            known.spoil(&scene, block, |_| ());
        }
    }
}

#[test]
fn a_flipped_bit_costs_nothing() {
    let known = Known::of(expand("snap-mix-a/meta.img"));
    let mut scene = known.scene();
    for block in in_use(&known.image) {
        known.spoil(&scene, block, |bytes| {
            bytes[(block as usize * 97 + 5) % BLOCK_SIZE] ^= 1 << (block % 8)
        });
        known.expect(&mut scene, &format!("block {block}"), &|_| false);
        known.spoil(&scene, block, |_| ());
    }
}
