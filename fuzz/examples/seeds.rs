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

/// The beginning of a trace in each format, as many bytes as are read in no time.
fn traces() -> Vec<Vec<u8>> {
    let packed = [
        include_bytes!("../../testdata/traces/oracle/thin.blktrace.0.zst").as_slice(),
        include_bytes!("../../testdata/traces/oracle/thin.blkparse.txt.zst"),
        include_bytes!("../../testdata/traces/misc/ftrace-block.txt.zst"),
        include_bytes!("../../testdata/traces/pool/merged-pool.blktrace-dump.zst"),
    ];
    let mut traces: Vec<Vec<u8>> = packed
        .map(|packed| zstd::decode_all(packed).expect("a bundled trace expands"))
        .into();
    let plain = [
        include_bytes!("../../testdata/traces/misc/fio-v2.synthetic.iolog").as_slice(),
        include_bytes!("../../testdata/traces/oracle/fio-v3.iolog"),
        b"128166372003061629,usr,0,Read,7014609920,24576,41286\n",
        b"419,W,8792731648,16384,1577808000000046\n",
        b"1538323200,0,8,0,1283\n1538323200,8,8,1,7\n",
        b"0,20941264,8192,W,0.551706\n",
        b"      0.300422537 ;     13108142 ;    8 ; W ; 0.0 ; 0.0\n",
        b"2.500000 0 200 16 0\n",
        b"TIME(s) COMM PID DISK T SECTOR BYTES LAT(ms)\n0.5 a b 25 vda W 8 4096 0.01\n",
        b"R,0,512,1.5\n",
        b"254,1 0 1 0.000001000 161 Q R 8 + 8 [fio]\nCPU0 (a):\nSkips: 3 forward (1,500 -  99.9%)\n254,1 0 1 0.0000005 161 Q WS 8 + 8 [a]\n",
    ];
    traces.extend(plain.map(<[u8]>::to_vec));
    let mut scsi = [[0; 32]; 3];
    scsi.iter_mut()
        .for_each(|record| (record[5], record[12], record[15]) = (16, 0x2a, 1));
    traces.push(scsi.concat());
    let mut log = vec![0; 2048];
    let entry = [8u64, 1, 3, 0];
    for (at, fields) in [
        (0, [0x006a_7366_7773_6872, 1, 2, 512]),
        (512, entry),
        (1536, [0, 0, 8, 9]),
    ] {
        log[at..at + 32].copy_from_slice(&fields.map(u64::to_le_bytes).concat());
    }
    log[1568..1577].copy_from_slice(b"ctl mark!");
    traces.push(log);
    traces.iter_mut().for_each(|trace| trace.truncate(2000));
    traces
}

/// What clients say that people have: the handshakes of `nbdinfo` and of the kernel's client, and requests of each kind in each style.
fn conversations() -> Vec<Vec<u8>> {
    let option = |number: u8, data: &[u8]| {
        let head = [&b"IHAVEOPT\0\0\0"[..], &[number, 0, 0, 0, data.len() as u8]];
        [&head.concat(), data].concat()
    };
    let contexts = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    let of_library: Vec<Vec<u8>> = vec![
        option(11, b""),
        option(3, b""),
        option(9, b"\0\0\0\0\0\0\0\0"),
        option(10, contexts),
        option(6, b"\0\0\0\x02ro\0\x03\0\x01\0\x02\0\x03"),
        option(5, b""),
        option(7, b"\0\0\0\x04disk\0\0"),
        vec![0x21, 0xe4, 0x1c, 0x71, 0, 0, 0, 7],
        vec![0; 23],
        vec![9],
    ];
    let of_kernel = vec![
        option(8, b""),
        option(1, b"disk"),
        b"\x25\x60\x95\x13\0\0\0\0".to_vec(),
        vec![1; 16],
        vec![0, 0, 2, 0],
    ];
    let greet = |said: Vec<Vec<u8>>| [vec![0, 0, 0, 0, 3], said.concat()].concat();
    let mut all = vec![
        greet(of_library),
        greet(of_kernel),
        greet(vec![option(2, b"")]),
    ];
    for how in 1..16 {
        let mut script = vec![how];
        for step in 0..40 {
            // Every command in turn, of more and more bytes here and there.
            let command = [1, 0, 6, 7, 4, 3, 5, 0][usize::from(step) % 8];
            let place = [step % 4 | (step / 5 % 4) << 2, 3 * step, step];
            script.extend([
                command,
                step % 3,
                place[0],
                place[1],
                place[2],
                step,
                7,
                0,
                step,
                0,
            ]);
        }
        all.push(script);
    }
    all
}

fn main() {
    let folder = std::env::args().nth(1).expect("usage: seeds FOLDER");
    let seeds = Seeds {
        folder: Path::new(&folder).to_owned(),
    };
    for (number, trace) in traces().into_iter().enumerate() {
        // Told from the contents, in one file and in two.
        for how in [0, 0x80, 0xc0] {
            seeds.write(
                "trace",
                &format!("{number}-{how}"),
                &[&[how], &*trace].concat(),
            );
        }
        let packed = zstd::encode_all(&trace[..trace.len().min(600)], 1).expect("memory");
        seeds.write(
            "trace",
            &format!("{number}-zst"),
            &[&[0], &*packed].concat(),
        );
    }
    for (number, said) in conversations().iter().enumerate() {
        seeds.write("nbd", &number.to_string(), said);
    }
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
