//! Whatever a file holds, it is an error or a trace: no panic, no hang, no memory without bounds.

use std::fs;
use std::io::Read;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::{contents, read_all, recorded};
use crate::support::folder;

const FORMATS: [&str; 15] = [
    "events",
    "blktrace",
    "blkparse",
    "iolog",
    "msr",
    "alibaba",
    "tencent",
    "spc",
    "load",
    "disksim",
    "ftrace",
    "biosnoop",
    "vscsi",
    "log-writes",
    "csv:op=0,off=1,len=2,ts=3:s,read=R",
];

/// Reads it in every way there is.
fn try_all(bytes: &[u8]) {
    let folder = folder();
    let paths = [folder.path().join("trace")];
    fs::write(&paths[0], bytes).expect("there is room");
    let formats = FORMATS.iter().map(|format| Some(*format)).chain([None]);
    for format in formats {
        let strict = read_all(&paths, format, false);
        let lenient = read_all(&paths, format, true);
        if let (Ok(strict), Ok(lenient)) = (strict, lenient) {
            assert_eq!(strict, lenient, "{format:?}");
        }
    }
}

/// The beginning of a sample of each format.
fn samples() -> Vec<Vec<u8>> {
    let start = |mut from: Box<dyn Read>| {
        let mut bytes = vec![0; 3000];
        let len = from.read(&mut bytes).expect("sound");
        bytes.truncate(len);
        bytes
    };
    let open = |name: &str| fs::File::open(recorded(name)).expect("it is there");
    let mut samples = vec![
        start(Box::new(flate2::read::GzDecoder::new(open(
            "oracle/thin.blkparse-d.bin.gz",
        )))),
        start(Box::new(liblzma::read::XzDecoder::new(open(
            "misc/log-writes-ext4.img.xz",
        )))),
        start(Box::new(open("misc/fio-v2.synthetic.iolog"))),
        start(Box::new(open("oracle/fio-v3.iolog"))),
        start(Box::new(open("oracle/thin.blktrace.0.zst"))),
    ];
    for name in [
        "oracle/thin.blktrace.0.zst",
        "oracle/thin.blkparse.txt.zst",
        "misc/ftrace-block.txt.zst",
    ] {
        samples.push(start(Box::new(
            zstd::Decoder::new(open(name)).expect("sound"),
        )));
    }
    let texts = [
        "128166372003061629,usr,0,Read,7014609920,24576,41286\n",
        "419,W,8792731648,16384,1577808000000046\n",
        "1538323200,0,8,0,1283\n",
        "0,20941264,8192,W,0.551706\n",
        "      0.300422537 ;     13108142 ;    8 ; W ; 0.0 ; 0.0\n",
        "2.500000 0 200 16 0\n",
        "TIME(s) COMM PID DISK T SECTOR BYTES LAT(ms)\n0.5 a b 25 vda W 8 4096 0.01\n",
        "R,0,512,1.5\n",
    ];
    samples.extend(texts.map(|text| text.repeat(3).into_bytes()));
    samples.push(
        [
            [0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0x2a, 0, 0, 1],
            [1; 16],
        ]
        .concat()
        .repeat(4),
    );
    samples.push(super::events::event_file("volume"));
    samples
}

#[test]
fn random_bytes_are_no_trace() {
    let mut rng = SmallRng::seed_from_u64(1);
    for round in 0..60 {
        let mut bytes = vec![0u8; rng.random_range(0..4000)];
        rng.fill(&mut bytes[..]);
        // Digits and separators get further into texts.
        if round % 2 == 0 {
            let letters = b"0123456789,. +-[]()RWDFQ;\n";
            bytes
                .iter_mut()
                .for_each(|byte| *byte = letters[usize::from(*byte) % letters.len()]);
        }
        try_all(&bytes);
    }
}

#[test]
fn samples_that_are_cut_off_or_changed() {
    let mut rng = SmallRng::seed_from_u64(2);
    for sample in samples() {
        try_all(&sample);
        for _ in 0..4 {
            try_all(&sample[..rng.random_range(0..sample.len())]);
            let mut changed = sample.clone();
            for _ in 0..rng.random_range(1..8) {
                let at = rng.random_range(0..changed.len());
                changed[at] = match rng.random_range(0..3) {
                    0 => rng.random(),
                    1 => 0xff,
                    _ => b"0,9 \n"[rng.random_range(0..5)],
                };
            }
            try_all(&changed);
        }
    }
}

#[test]
fn devices_without_end_are_refused() {
    let csv: String = (0..70_000).map(|i| format!("{i},W,0,512,{i}\n")).collect();
    let error = contents(csv.as_bytes(), None, false)
        .expect_err("too many")
        .to_string();
    assert!(
        error.contains("line 65537: more than 65536 devices"),
        "{error}"
    );
    assert_eq!(
        contents(csv.as_bytes(), None, true)
            .expect("lenient")
            .devices
            .len(),
        65_536
    );
}
