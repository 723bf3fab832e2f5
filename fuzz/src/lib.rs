//! What the fuzz targets share: metadata to start from, edits of it, and the promises that all tools keep.

use std::io::Write;
use std::sync::LazyLock;
use thintools::checksum::{BlockKind, identify, seal};
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::pdata::{NODE_HEADER, max_entries};
use thintools::thin::Superblock;
use thintools::tools::check::{CheckOptions, Checked, Severity, check};
use thintools::tools::event::Source;
use thintools::tools::{MetadataSource, Selection, TextSink, Trees, XmlSource, restore, text};
use thintools::units::{BLOCK_SIZE, MetadataBlock};

/// Blocks of [`small`] and of images that begin with nothing.
pub const SMALL_BLOCKS: usize = 64;

macro_rules! fixture {
    ($name:literal) => {
        include_bytes!(concat!("../../testdata/kernel/", $name, ".img.zst")).as_slice()
    };
}

/// Images that the kernel made: snapshots, another block size, a crash, many devices, a metadata snapshot.
const KERNEL_MADE: [&[u8]; 5] = [
    fixture!("snap-mix-a/meta"),
    fixture!("bs-384/meta"),
    fixture!("crash-log/meta"),
    fixture!("rand-600thins-5/meta"),
    fixture!("held-root/meta-just-reserved"),
];

/// An image to edit.
#[derive(Debug)]
pub struct Base {
    /// Its contents.
    pub image: Vec<u8>,
    /// Blocks that are not all zeros.
    pub used: Vec<usize>,
}

impl Base {
    fn of(image: Vec<u8>) -> Self {
        let blocks = image.chunks_exact(BLOCK_SIZE).enumerate();
        let used = blocks.filter(|(_, block)| block.iter().any(|&b| b != 0));
        Self {
            used: used.map(|(number, _)| number).collect(),
            image,
        }
    }
}

/// The kernel-made images, the small one, and nothing.
pub static BASES: LazyLock<Vec<Base>> = LazyLock::new(|| {
    let expand = |packed| zstd::decode_all(packed).expect("a bundled image expands");
    let kernel_made = KERNEL_MADE.into_iter().map(expand);
    let others = [small(), vec![0; SMALL_BLOCKS * BLOCK_SIZE]];
    kernel_made.chain(others).map(Base::of).collect()
});

/// A pool in a few blocks that has everything: inner nodes, shared leaves, several bitmaps, counts of 3 and more.
pub fn small() -> Vec<u8> {
    let mut xml = String::from(
        "<superblock uuid=\"\" time=\"2\" transaction=\"4\" data_block_size=\"128\" nr_data_blocks=\"40000\">\n\
         <def name=\"a\"><range_mapping origin_begin=\"0\" data_begin=\"100\" length=\"200\" time=\"0\"/></def>\n",
    );
    for device in 0..4 {
        xml += &format!(
            "<device dev_id=\"{device}\" mapped_blocks=\"{}\" transaction=\"{device}\" creation_time=\"0\" snap_time=\"1\">\n\
             <ref name=\"a\"/>\n",
            200 + 90 * device
        );
        for i in 0..device {
            xml += &format!(
                "<range_mapping origin_begin=\"{}\" data_begin=\"{}\" length=\"90\" time=\"{}\"/>\n",
                1000 * (i + 1),
                13_000 * device + 100 * i,
                i % 3,
            );
        }
        xml += "</device>\n";
    }
    xml += "</superblock>\n";
    let output = RamEngine::new(SMALL_BLOCKS);
    restore_text(xml.as_bytes(), &output).expect("a valid description");
    output.into_bytes()
}

/// Restores XML.
///
/// # Errors
/// Those of [`restore`].
pub fn restore_text(text: &[u8], output: &RamEngine) -> thintools::Result<()> {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(text)
        .expect("a temporary file can be written");
    restore(
        &XmlSource::from_file(file, "input", &Silent),
        output,
        &Silent,
    )
    .map(|_| ())
}

/// Checks everything.
pub fn check_all(engine: &dyn BlockEngine) -> Checked {
    check(engine, &CheckOptions::default(), &Silent).expect("block 0 is readable")
}

/// True when there is nothing worse than a note.
pub fn is_clean(checked: &Checked) -> bool {
    checked.report.verdict.severity <= Some(Severity::Note)
}

/// Fails unless the metadata passes the check.
pub fn assert_clean(engine: &dyn BlockEngine) {
    let checked = check_all(engine);
    assert!(is_clean(&checked), "{:?}", checked.report.damages);
}

/// What `source` tells, as XML.
///
/// # Errors
/// Those of the source.
pub fn told(source: &dyn Source) -> thintools::Result<Vec<u8>> {
    let mut out = Vec::new();
    source.emit(&mut TextSink::new(&mut out, &text::Xml))?;
    Ok(out)
}

/// A dump.
///
/// # Errors
/// `Damaged`.
pub fn dump(engine: &dyn BlockEngine, selection: Selection) -> thintools::Result<Vec<u8>> {
    let superblock = Superblock::read(engine)?;
    let nr_data_blocks = superblock.data_space_map.nr_blocks;
    told(&MetadataSource {
        engine,
        trees: Trees::read(engine, &superblock, nr_data_blocks, &Silent)?,
        selection,
        recovered: None,
        observer: &Silent,
    })
}

/// A selection that tells shared mappings again for each device: such dumps of the same pool are equal wherever its blocks lie.
pub fn unshared() -> Selection {
    Selection {
        no_shared: true,
        ..Selection::default()
    }
}

/// The kinds of sealed blocks.
pub const KINDS: [BlockKind; 4] = [
    BlockKind::Superblock,
    BlockKind::Node,
    BlockKind::Bitmap,
    BlockKind::Index,
];

/// Reads numbers off the front of a fuzzer's input; what is missing is zero.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next bytes, at most `n`.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, left) = self.0.split_at(n.min(self.0.len()));
        self.0 = left;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A block of an image that begins as `base`: most often one that is not all zeros.
    pub fn block(&mut self, base: &Base) -> usize {
        let n = usize::from(self.u16());
        let blocks = base.image.len() / BLOCK_SIZE;
        match base.used.len() {
            used if used > 0 && n < 0xc000 => base.used[n % used],
            _ => n % blocks,
        }
    }
}

/// Offsets of the superblock's fields.
const FIELDS: [usize; 18] = [
    4, 16, 40, 44, 48, 56, 64, 72, 80, 88, 192, 200, 208, 216, 320, 328, 336, 352,
];
/// Most edits of an image.
const MOST_EDITS: usize = 64;

/// `base` with the edits that `input` describes.
pub fn edited(base: &Base, input: &mut Input<'_>) -> Vec<u8> {
    let mut image = base.image.clone();
    for _ in 0..MOST_EDITS {
        if input.0.is_empty() {
            break;
        }
        edit(base, &mut image, input);
    }
    image
}

/// Edits are: bytes (sealed again or not), a block zeroed, copied (sealed again or not) or put in whole as a block of some kind,
/// a flipped bit, a field of the superblock, a key or value or the header of a node, the end cut off.
fn edit(base: &Base, image: &mut Vec<u8>, input: &mut Input<'_>) {
    let op = input.u8() % 16;
    if op == 15 {
        let kept = usize::from(input.u16()) % (base.image.len() / BLOCK_SIZE);
        image.truncate(kept.max(1) * BLOCK_SIZE);
        return;
    }
    let at = match op {
        9..=11 => 0,
        _ => input.block(base),
    };
    let from = match op {
        5..=6 => input.block(base),
        _ => at,
    };
    let (Some(range), Some(from)) = (whole(image, at), whole(image, from)) else {
        return;
    };
    let source = image[from].to_vec();
    let block = &mut image[range];
    let kind = identify(&source);
    let kind = match op {
        // Sealed again as what it was.
        0..=2 => {
            overwrite(block, input);
            kind
        }
        3 => {
            overwrite(block, input);
            None
        }
        4 => {
            block.fill(0);
            None
        }
        5 => {
            block.copy_from_slice(&source);
            kind
        }
        6 => {
            block.copy_from_slice(&source);
            None
        }
        7 => {
            let bit = usize::from(input.u16()) % (8 * BLOCK_SIZE);
            block[bit / 8] ^= 1 << (bit % 8);
            None
        }
        8 => {
            let kind = KINDS.get(usize::from(input.u8() % 5)).copied();
            let len = usize::from(input.u16()) % (BLOCK_SIZE + 1);
            let bytes = input.bytes(len);
            block.fill(0);
            block[..bytes.len()].copy_from_slice(bytes);
            kind
        }
        9..=11 => {
            let field = FIELDS[usize::from(input.u8()) % FIELDS.len()];
            put(block, field, input);
            kind
        }
        _ => {
            let index = usize::from(input.u8());
            let offset = match op {
                12 => NODE_HEADER + 8 * (index % max_entries(8)),
                13 => NODE_HEADER + 8 * (max_entries(8) + index % max_entries(8)),
                _ => 4 * (1 + index % 6),
            };
            put(block, offset, input);
            kind
        }
    };
    if let Some(kind) = kind {
        seal(block, kind, MetadataBlock(at as u64));
    }
}

fn whole(image: &[u8], number: usize) -> Option<std::ops::Range<usize>> {
    let range = number * BLOCK_SIZE..(number + 1) * BLOCK_SIZE;
    (range.end <= image.len()).then_some(range)
}

fn overwrite(block: &mut [u8], input: &mut Input<'_>) {
    let offset = usize::from(input.u16()) % BLOCK_SIZE;
    let len = usize::from(input.u8());
    let bytes = input.bytes(len.min(BLOCK_SIZE - offset));
    block[offset..][..bytes.len()].copy_from_slice(bytes);
}

/// Four or eight bytes.
fn put(block: &mut [u8], offset: usize, input: &mut Input<'_>) {
    let size = if input.u8().is_multiple_of(2) { 4 } else { 8 };
    let value = input.u64().to_le_bytes();
    block[offset..][..size].copy_from_slice(&value[..size]);
}
