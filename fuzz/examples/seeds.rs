//! Writes the inputs that fuzzing begins with, a folder for each target, made of the bundled images: `seeds FOLDER`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use thintools::bytes::{get_u32, put_u32};
use thintools::checksum::{BlockKind, identify};
use thintools::io::RamEngine;
use thintools::tools::Selection;
use thintools::units::BLOCK_SIZE;
use thintools_fuzz::{BASES, KINDS, dump, small};

struct Seeds {
    folder: PathBuf,
}

impl Seeds {
    fn write(&self, target: &str, name: &str, contents: &[u8]) {
        let folder = self.folder.join(target);
        std::fs::create_dir_all(&folder).expect("the folder can be made");
        std::fs::write(folder.join(name), contents).expect("the seed can be written");
    }
}

fn without_zeros(block: &[u8]) -> &[u8] {
    let end = block.iter().rposition(|&b| b != 0);
    &block[..end.map_or(0, |last| last + 1)]
}

fn kind_number(kind: BlockKind) -> u8 {
    KINDS.iter().position(|&k| k == kind).expect("it is there") as u8
}

/// The records of the `image` target that put these blocks in whole.
fn whole_blocks(image: &[u8]) -> Vec<u8> {
    let mut script = Vec::new();
    for (number, block) in image.chunks_exact(BLOCK_SIZE).enumerate() {
        let Some(kind) = identify(block) else {
            continue;
        };
        let contents = without_zeros(block);
        script.push(8);
        script.extend((0xc000 + number as u16).to_le_bytes());
        script.push(kind_number(kind));
        script.extend((contents.len() as u16).to_le_bytes());
        script.extend(contents);
    }
    script
}

fn main() {
    let folder = std::env::args().nth(1).expect("usage: seeds FOLDER");
    let seeds = Seeds {
        folder: Path::new(&folder).to_owned(),
    };
    let small = small();
    for (number, base) in BASES.iter().enumerate() {
        let name = format!("base-{number}");
        let block_0 = &base.image[..BLOCK_SIZE];
        for how in 0..4 {
            seeds.write(
                "superblock",
                &format!("{name}-{how}"),
                &[&[how], without_zeros(&block_0[..512])].concat(),
            );
        }
        // A node of each size, of leaves and of inner nodes.
        let mut nodes = BTreeMap::new();
        for block in base.image.chunks_exact(BLOCK_SIZE) {
            if identify(block) == Some(BlockKind::Node) {
                nodes.insert((get_u32(block, 4), get_u32(block, 24)), block);
            }
        }
        for ((flags, size), block) in nodes {
            for place in 0..6 {
                let script = [&[8, place, 0, 0], without_zeros(block)].concat();
                seeds.write("node", &format!("{name}-{flags}-{size}-{place}"), &script);
            }
        }
        let engine = RamEngine::from_bytes(base.image.clone());
        if let Ok(xml) = dump(&engine, Selection::default())
            && xml.len() <= 32 << 10
        {
            seeds.write("xml", &name, &xml);
        }
        for how in 0..20 {
            // Every operation in turn, with a commit now and then; then an edit.
            let steps = (0..31).flat_map(|i| {
                [
                    if i % 5 == 4 { 20 } else { (i + how) % 20 },
                    i % 4,
                    8 * i,
                    0,
                    9,
                ]
            });
            let edit = [how, 5 * how + 1, 0, 16, 0, 4, 0, 1, 2, 3, 4];
            let mut script = vec![number as u8, how, 31];
            script.extend(steps);
            script.resize(2 + 6 * 32, how);
            script.extend(edit);
            seeds.write("transaction", &format!("{name}-{how}"), &script);
        }
        for how in [0, 1, 8, 0x30, 0x40, 0x80] {
            // One edit of each kind, of a few blocks, small numbers in it.
            for op in 0..16 {
                let at = 5 * op + 1;
                let script = [
                    number as u8,
                    how,
                    1,
                    0,
                    2,
                    0,
                    op,
                    at,
                    0,
                    16,
                    0,
                    4,
                    0,
                    1,
                    2,
                    3,
                    4,
                ];
                seeds.write("image", &format!("{name}-{how}-{op}"), &script);
            }
            let lost = [number as u8, how, 1, 0, 2, 0, 4, 0, 0];
            seeds.write("image", &format!("{name}-{how}-lost"), &lost);
        }
    }
    let last = BASES.len() as u8 - 1;
    let mut script = vec![last, 1, 0, 0, 0, 0];
    script.extend(whole_blocks(&small));
    seeds.write("image", "whole", &script);
    let mut number = 0;
    for block in small.chunks_exact(BLOCK_SIZE) {
        if let Some(BlockKind::Bitmap | BlockKind::Index) = identify(block) {
            for role in [3, 5, 6, 7] {
                let contents = &without_zeros(block)[16..];
                let mut script = vec![role, 16, 0];
                script.extend((contents.len() as u16).to_le_bytes());
                script.extend(contents);
                seeds.write("space_map", &format!("block-{number}-{role}"), &script);
            }
            number += 1;
        }
    }
    for role in 0..10 {
        let mut counts = vec![role, 16, 0, 64, 0];
        counts.resize(5 + 64, 0);
        put_u32(&mut counts, 5, 0xe9_1b_56_00);
        seeds.write("space_map", &format!("role-{role}"), &counts);
    }
}
