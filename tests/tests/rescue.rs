//! `thin_serve --read-only` on metadata that is damaged: what can be found is served as it is, the rest is an I/O error, and nothing
//! is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::serve::{EIO, Scene};
use crate::support::{expand, get_u32, get_u64, thintools};
use thintools::ErrorKind;
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::runtime::{Options, Runtime};
use thintools::thin::Fields;
use thintools::tools::repair;
use thintools::units::{BLOCK_SIZE, MetadataBlock};

/// A mapping, and the metadata blocks that lead to it, from the root of its device.
pub(crate) struct Mapping {
    pub(crate) thin_block: u64,
    pub(crate) data_block: u64,
    path: BTreeSet<u64>,
    /// The last of these.
    pub(crate) leaf: u64,
}

/// What whole metadata holds, read without the library.
pub(crate) struct Known {
    pub(crate) image: Vec<u8>,
    block_size: u64,
    pub(crate) thins: BTreeMap<u64, Vec<Mapping>>,
    /// Nodes of the top-level tree.
    top: BTreeSet<u64>,
    /// Nodes of the mapping trees.
    pub(crate) nodes: BTreeSet<u64>,
}

/// Gets key, value, leaf, and all the blocks that lead to it.
type Tell<'a> = dyn FnMut(u64, u64, u64, &BTreeSet<u64>) + 'a;

/// Tells the entries of the leaves of the tree at `root`, each with its leaf and all the blocks that lead to it.
fn walk(image: &[u8], root: u64, path: &BTreeSet<u64>, tell: &mut Tell<'_>) {
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
            true => tell(key, value, root, path),
            false => walk(image, value, path, tell),
        }
    }
}

impl Known {
    pub(crate) fn of(image: Vec<u8>) -> Self {
        let mut thins: BTreeMap<u64, Vec<Mapping>> = BTreeMap::new();
        let (mut top, mut nodes) = (BTreeSet::new(), BTreeSet::new());
        let mut roots = Vec::new();
        walk(
            &image,
            get_u64(&image, 320),
            &BTreeSet::new(),
            &mut |id, root, _, path| {
                top.extend(path);
                roots.push((id, root));
            },
        );
        for (id, root) in roots {
            let mappings = thins.entry(id).or_default();
            walk(
                &image,
                root,
                &BTreeSet::new(),
                &mut |thin_block, value, leaf, path| {
                    nodes.extend(path);
                    mappings.push(Mapping {
                        thin_block,
                        data_block: value >> 24,
                        path: path.clone(),
                        leaf,
                    });
                },
            );
        }
        let block_size = u64::from(get_u32(&image, 336)) * 512;
        Self {
            image,
            block_size,
            thins,
            top,
            nodes,
        }
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

    /// Serves the damaged pool and reads what is lost, and some of the rest: a block is an error if `is_lost`, else what it was; unmapped ones are zeros.
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
            let is_whole = !mappings.iter().any(is_lost);
            // Of what is not lost, other samples each time.
            let stride = mappings.len() / 50 + 1;
            let phase = what.bytes().map(usize::from).sum::<usize>() % stride;
            let sample = mappings
                .iter()
                .zip(0..)
                .filter(|(mapping, at)| at % stride == phase || is_lost(mapping));
            for (mapping, at) in sample {
                let next = mappings[..at]
                    .last()
                    .map_or(0, |before| before.thin_block + 1);
                if is_whole && next < mapping.thin_block {
                    let found = client.read((mapping.thin_block - 1) * self.block_size, 8);
                    assert_eq!(
                        found,
                        Ok(vec![0; 8]),
                        "{what}, device {id}, the hole before block {}",
                        mapping.thin_block
                    );
                }
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

    /// Blocks of every kind: superblock, trees, and both space maps.
    fn in_use(&self) -> BTreeSet<u64> {
        // Each root of a space map ends with those of its bitmaps and of its large counts, which lie at these places.
        let roots = [80, 88, 208, 216, 320, 328].map(|at| get_u64(&self.image, at));
        let trees = self.top.union(&self.nodes).copied();
        let index = get_u64(&self.image, 208) as usize * BLOCK_SIZE;
        let bitmap = get_u64(&self.image, index + 16);
        trees.chain(roots).chain([0, bitmap]).collect()
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

#[test]
fn one_lost_block_of_metadata_costs_the_mappings_in_it_and_no_more() {
    for name in ["snap-mix-a", "crash-log", "needs-check-set"] {
        let known = Known::of(expand(&format!("{name}/meta.img")));
        let mut scene = known.scene();
        for block in known.in_use() {
            known.spoil(&scene, block, |bytes| bytes.fill(0xa5));
            known.expect(&mut scene, &format!("{name}, block {block}"), &|m| {
                m.leaf == block
            });
            known.spoil(&scene, block, |_| ());
        }
    }
}

#[test]
fn a_flipped_bit_costs_nothing() {
    let known = Known::of(expand("snap-mix-a/meta.img"));
    let mut scene = known.scene();
    for block in known.in_use() {
        known.spoil(&scene, block, |bytes| {
            bytes[(block as usize * 97 + 5) % BLOCK_SIZE] ^= 1 << (block % 8)
        });
        known.expect(&mut scene, &format!("block {block}"), &|_| false);
        known.spoil(&scene, block, |_| ());
    }
}

/// A top-level tree of two levels, and details that are as large.
#[test]
fn devices_are_found_without_a_part_of_the_top_level_tree() {
    let known = Known::of(expand("rand-600thins-5/meta.img"));
    assert!(known.top.len() > 2);
    let mut scene = known.scene();
    for block in known
        .top
        .iter()
        .copied()
        .chain([get_u64(&known.image, 328)])
    {
        known.spoil(&scene, block, |bytes| bytes.fill(0xa5));
        known.expect(&mut scene, &format!("block {block}"), &|_| false);
        known.spoil(&scene, block, |_| ());
    }
}

#[test]
fn metadata_and_data_that_were_cut_off_are_read_as_far_as_they_go() {
    let known = Known::of(expand("crash-log/meta.img"));
    let mut scene = known.scene();
    let (meta, data) = (scene.path("meta"), scene.path("data"));
    let cut = |path: &Path, to: u64| {
        let file = File::options().write(true).open(path).expect("opened");
        file.set_len(to).expect("cut");
    };
    // Behind the top-level tree, but before some of what it leads to.
    let top = *known.top.last().expect("there is a root");
    let last = *known.nodes.last().expect("there are nodes");
    assert!(top < last, "{top} {last}");
    cut(&meta, last * BLOCK_SIZE as u64 + 100);
    let half = known
        .thins
        .values()
        .flatten()
        .map(|m| m.data_block)
        .max()
        .expect("mapped")
        / 2;
    cut(&data, half * known.block_size + 4);
    known.expect(&mut scene, "cut off", &|m| {
        m.path.contains(&last) || m.data_block >= half
    });
    cut(&meta, BLOCK_SIZE as u64);
    let nothing = scene.run(&["--read-only", "--block-size", "64k", "--run", "true"]);
    nothing.expect(5).expect_stderr(&["nothing to serve"]);
}

#[test]
fn a_device_whose_end_is_lost_is_as_long_as_is_known() {
    let known = Known::of(expand("seq-1thin/meta.img"));
    let mut scene = known.scene();
    let (&id, mappings) = known
        .thins
        .iter()
        .find(|(_, m)| m.last().is_some_and(|l| l.path.len() > 1))
        .expect("it has two levels");
    let last = mappings.last().expect("it is mapped");
    let leaf = last
        .path
        .iter()
        .copied()
        .find(|block| mappings[0].path.contains(block) != last.path.contains(block))
        .expect("several leaves");
    let first = mappings
        .iter()
        .find(|m| m.path.contains(&leaf))
        .expect("mapped")
        .thin_block;
    known.spoil(&scene, leaf, |bytes| bytes.fill(0));
    scene.serve(&["--read-only", "--quiet"]);
    let mut client = scene.connect(&id.to_string());
    assert_eq!(client.size, (first + 1) * known.block_size);
    assert_eq!(client.read(first * known.block_size, 8), Err(EIO));
    drop(client);
    scene.kill();
    let size = known.blocks(id) * known.block_size;
    let thin = format!("{id}:{size}");
    // What a copy that goes on after errors brings home.
    let copy = scene.path("copy");
    let salvage = format!(
        "qemu-img convert --salvage -f raw -O raw \"$uri\" {}",
        copy.display()
    );
    scene
        .run(&["--read-only", "--thin", &thin, "--run", &salvage])
        .expect(0);
    let copy = File::open(copy).expect("copied");
    assert_eq!(copy.metadata().expect("there").len(), size);
    for mapping in mappings {
        let mut found = [0; 8];
        copy.read_exact_at(&mut found, mapping.thin_block * known.block_size)
            .expect("read");
        let expected = match mapping.path.contains(&leaf) {
            true => 0,
            false => mapping.data_block + 1,
        };
        assert_eq!(
            u64::from_le_bytes(found),
            expected,
            "block {}",
            mapping.thin_block
        );
    }
}

#[test]
fn what_is_no_pool_is_refused_with_what_to_do() {
    let known = Known::of(expand("snap-mix-a/meta.img"));
    let scene = known.scene();
    let refused = |texts: &[&str]| {
        scene
            .run(&["--read-only", "--run", "true"])
            .expect_stderr(texts)
            .code
            .expect("it ended")
    };
    let with = |metadata: &str, data: &str, text: &str| {
        let (metadata, data) = (scene.path(metadata), scene.path(data));
        let words = ["thin_serve", "--read-only", "--run", "true", "--metadata"];
        let words = words.iter().map(AsRef::as_ref).chain([
            metadata.as_os_str(),
            "--data".as_ref(),
            data.as_os_str(),
        ]);
        thintools(words).run().expect(1).expect_stderr(&[text]);
    };
    with("data", "meta", "wrong way round");
    with("meta", "meta", "as the metadata and as the data");
    known.spoil(&scene, 0, |bytes| bytes.fill(0));
    assert_eq!(refused(&["--block-size"]), 5);
    fs::write(scene.path("meta"), vec![0x5a; 1 << 20]).expect("written");
    assert_eq!(refused(&["make sure that it is the metadata"]), 5);
    fs::write(scene.path("meta"), "<superblock>").expect("written");
    assert_eq!(refused(&["looks like XML"]), 5);
}

/// What a superblock says, and how it comes to.
type Lie<'a> = (&'a str, &'a dyn Fn(&mut Fields));

/// The seal is right, so that whoever wrote it may have meant it.
#[test]
fn a_superblock_that_says_nonsense_is_no_more_than_an_error() {
    let known = Known::of(expand("snap-mix-a/meta.img"));
    let mut scene = known.scene();
    let say = |scene: &Scene, change: &dyn Fn(&mut Fields)| {
        known.spoil(scene, 0, |bytes| {
            let mut fields = Fields::unpack(bytes);
            change(&mut fields);
            bytes.copy_from_slice(&fields.pack());
        });
    };
    let run: [&[&str]; 2] = [&["--run", "true"], &["--read-only", "--run", "true"]];
    for sectors in [0, 1, 127, u32::MAX] {
        say(&scene, &|fields| fields.data_block_size = sectors);
        for more in run {
            let refused = scene.run(more).expect(5);
            refused.expect_stderr(&[&format!(" {sectors} sectors"), "--block-size"]);
        }
        known.expect(&mut scene, "the size of data blocks", &|_| false);
    }
    let lies: [Lie<'_>; 6] = [
        ("no data blocks", &|fields| {
            fields.data_space_map.nr_blocks = 0
        }),
        ("too many", &|fields| {
            fields.data_space_map.nr_blocks = u64::MAX
        }),
        ("all in use", &|fields| {
            fields.metadata_space_map.nr_allocated = u64::MAX
        }),
        ("no metadata", &|fields| {
            fields.metadata_space_map.nr_blocks = 0
        }),
        ("far away", &|fields| fields.details_root.0 = u64::MAX),
        ("the clock", &|fields| fields.time = u32::MAX),
    ];
    for (what, lie) in lies {
        say(&scene, lie);
        known.expect(&mut scene, what, &|_| false);
    }
    say(&scene, &|fields| fields.mapping_root.0 = 0);
    known.expect(&mut scene, "the root", &|_| false);
}

/// Whoever manages the pool cannot make it writable either.
#[test]
fn what_is_served_to_be_read_only_stays_so() {
    let known = Known::of(expand("snap-mix-a/meta.img"));
    let mut scene = known.scene();
    scene.serve(&["--read-only", "--quiet"]);
    let id = known
        .thins
        .keys()
        .next_back()
        .expect("there is one")
        .to_string();
    let mut client = scene.connect(&id);
    assert_eq!(client.write(0, &[1; 512]), Err(Some(1)));
    for words in [
        &["create_thin", "500"][..],
        &["delete", &id],
        &["reserve_metadata_snap"],
        &["resize"],
        &["resize", "--data", "9999", "--metadata", "1024"],
    ] {
        scene.ctl(words).expect(1).expect_stderr(&["EOPNOTSUPP"]);
    }
    for words in [
        &["suspend"][..],
        &["resume"],
        &["resume", "skip_block_zeroing"],
        &["resume", "no_discard_passdown"],
    ] {
        scene.asked(words);
        assert!(scene.asked(&["status"]).contains(" - ro "), "{words:?}");
    }
    let mapping = &known.thins.values().next_back().expect("there is one")[0];
    let found = client.read(mapping.thin_block * known.block_size, 8);
    assert_eq!(found, Ok((mapping.data_block + 1).to_le_bytes().to_vec()));
    scene.kill();
    assert!(fs::read(scene.path("meta")).expect("read") == known.image);
}

/// A disk with a block that cannot be read.
struct BadBlock(RamEngine, u64);

impl BlockEngine for BadBlock {
    fn nr_blocks(&self) -> u64 {
        self.0.nr_blocks()
    }

    fn read(&self, start: MetadataBlock, buf: &mut [u8]) -> io::Result<()> {
        match (start.0..start.0 + (buf.len() / BLOCK_SIZE) as u64).contains(&self.1) {
            true => Err(io::Error::other("bad sector")),
            false => self.0.read(start, buf),
        }
    }

    fn write(&self, _: MetadataBlock, _: &[u8]) -> io::Result<()> {
        panic!("it is written to")
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn depth(&self) -> usize {
        1
    }
}

#[test]
fn bad_sectors_are_no_worse_than_wrong_contents() {
    let known = Known::of(expand("snap-mix-a/meta.img"));
    let scene = known.scene();
    let options = Options::new(&scene.path("meta"), &scene.path("data"));
    let ids = |runtime: &Runtime| {
        runtime.export_all();
        let ids = runtime.exported().expect("readable");
        ids.iter().map(|id| id.0).collect::<Vec<_>>()
    };
    let all: Vec<u64> = known.thins.keys().copied().collect();
    for block in known.in_use() {
        let engine: Arc<dyn BlockEngine> =
            Arc::new(BadBlock(RamEngine::from_bytes(known.image.clone()), block));
        let found = match Runtime::open_to_read(Arc::clone(&engine), &options) {
            Ok(runtime) => ids(&runtime),
            Err(e) => {
                assert!(
                    e.kind() == ErrorKind::Damaged && (block == 0 || known.top.contains(&block)),
                    "block {block}: {e}"
                );
                let mut wanted = repair::Options::default();
                wanted.overrides.data_block_size = Some(128);
                let rescue = repair::rescue(engine, &wanted, &Silent).expect("found");
                ids(&Runtime::open_to_read(rescue.engine, &options).expect("readable"))
            }
        };
        assert_eq!(found, all, "block {block}");
    }
}
