//! The undo file of a repair in place: what every overwritten block held before, and how to put it back.
//!
//! The file is a header of 512 bytes and a record for each block, ascending by block, block 0 first. Numbers are little-endian.
//!
//! | header | size | field |
//! |---|---|---|
//! | 0 | 256 | text that says what the file is, then zeros |
//! | 256 | 8 | version: 1 |
//! | 264 | 8 | blocks of the device |
//! | 272 | 8 | records |
//! | 280 | 32 | checksums of what block 0 holds while the other blocks are written, a sector of 512 bytes each |
//! | 312 | 196 | zeros |
//! | 508 | 4 | CRC-32C of bytes 0 to 507 |
//!
//! | record | size | field |
//! |---|---|---|
//! | 0 | 4 | CRC-32C of the rest of the record, continued from the header's |
//! | 4 | 4 | zeros |
//! | 8 | 8 | block |
//! | 16 | 32 | checksums of what the repair writes to it, by sector |
//! | 48 | 4096 | what it held before |
//!
//! Invariants:
//! 1. Nothing is put back unless the file is whole and each sector of each block holds what it held before the repair or what
//!    the repair wrote. That is judged by sector because a write that is cut short may leave a block that is partly new.
//! 2. Block 0 is put back first, and flushed. The metadata that it led to before was never overwritten, so it is whole from
//!    then on; put back last, it would for a while lead to space maps that are partly gone.
//! 3. How much is read follows from the size of the file, which must be that of the records that the header promises.

use super::in_place::Staged;
use crate::bytes::{get_u32, get_u64, put_u32, put_u64};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine, write_new_private};
use crate::observer::Observer;
use crate::thin::{SUPERBLOCK, read_block};
use crate::units::{BLOCK_SIZE, MetadataBlock};
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

/// What the file begins with.
const TEXT: &[u8] = b"thintools undo file\n\
    Metadata blocks as they were before thin_repair --in-place wrote to them. To put them back:\n\
    thin_repair --in-place DEVICE --undo THIS_FILE\n";
const VERSION: u64 = 1;
const HEADER_SIZE: usize = 512;
const HEADER_SUM: usize = HEADER_SIZE - 4;
/// Bytes before the contents in a record.
const RECORD_HEAD: usize = 48;
const RECORD_SIZE: usize = RECORD_HEAD + BLOCK_SIZE;
/// What a device writes whole or not at all.
const SECTOR: usize = 512;
/// Bytes of the checksums of a block's sectors.
const SUMS: usize = BLOCK_SIZE / SECTOR * 4;

/// What an undo did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Undone {
    /// Blocks in the undo file.
    pub blocks: u64,
    /// Blocks among them that do not hold their old contents yet: these are put back.
    pub changed: u64,
}

/// Saves what `after` would overwrite to a new file. `interim` is what block 0 holds while the other blocks are written, if
/// that is neither its old nor its new contents.
pub(super) fn save(
    path: &Path,
    before: &dyn BlockEngine,
    after: &Staged<'_>,
    interim: Option<&[u8]>,
    observer: &dyn Observer,
) -> Result<()> {
    let cannot = |e: io::Error| Error::io(format!("cannot write undo file {}", path.display()), e);
    let blocks = after.written();
    write_new_private(path, &mut |out| {
        let new_zero = read_block(after, SUPERBLOCK)?;
        let interim = interim.unwrap_or(new_zero.blocks(1));
        let header = pack_header(before.nr_blocks(), blocks.len() as u64, &sums(interim));
        out.write_all(&header).map_err(cannot)?;
        let seed = get_u32(&header, HEADER_SUM);
        for &block in &blocks {
            observer.check_cancelled()?;
            let block = MetadataBlock(block);
            let (old, new) = (read_block(before, block)?, read_block(after, block)?);
            let record = pack_record(seed, block, old.blocks(1), &sums(new.blocks(1)));
            out.write_all(&record).map_err(cannot)?;
        }
        Ok(())
    })
}

/// Puts back what the undo file at `path` holds; without `write` it only says what it would do.
///
/// # Errors
/// `NotMetadata` when the file is no undo file, `Damaged` when it is not whole, `Unsuitable` when the device is not the one that
/// was repaired or has been written to since (in all these cases nothing is written); `Io`, `Interrupted`.
pub fn undo(
    engine: &dyn BlockEngine,
    path: &Path,
    write: bool,
    observer: &dyn Observer,
) -> Result<Undone> {
    let mut undone = Undone {
        blocks: 0,
        changed: 0,
    };
    let mut file = UndoFile::open(path, engine.nr_blocks())?;
    let interim = file.interim;
    while let Some(record) = file.next()? {
        observer.check_cancelled()?;
        let now = read_block(engine, record.block())?;
        if !record.knows(now.blocks(1), &interim) {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!(
                    "block {} has changed since the repair: undoing it would destroy newer metadata; nothing was written",
                    record.block()
                ),
            ));
        }
        undone.blocks += 1;
        undone.changed += u64::from(now.blocks(1) != record.contents());
    }
    if write && undone.changed > 0 {
        put_back(engine, UndoFile::open(path, engine.nr_blocks())?, observer)?;
    }
    Ok(undone)
}

fn put_back(engine: &dyn BlockEngine, mut file: UndoFile, observer: &dyn Observer) -> Result<()> {
    let cannot = |block, e| {
        let what = format!("cannot put back metadata block {block}; run the same command again");
        Error::io(what, e)
    };
    let mut buffer = AlignedBuffer::new(1);
    while let Some(record) = file.next()? {
        let block = record.block();
        if read_block(engine, block)?.blocks(1) != record.contents() {
            buffer.blocks_mut(1).copy_from_slice(record.contents());
            engine
                .write(block, buffer.blocks(1))
                .map_err(|e| cannot(block, e))?;
        }
        if block == SUPERBLOCK {
            engine.sync().map_err(|e| cannot(block, e))?;
        }
        observer.check_cancelled()?;
    }
    engine.sync().map_err(|e| {
        Error::io(
            "cannot flush what was put back; run the same command again",
            e,
        )
    })
}

fn pack_header(nr_blocks: u64, records: u64, interim: &[u8; SUMS]) -> [u8; HEADER_SIZE] {
    let mut header = [0; HEADER_SIZE];
    header[..TEXT.len()].copy_from_slice(TEXT);
    put_u64(&mut header, 256, VERSION);
    put_u64(&mut header, 264, nr_blocks);
    put_u64(&mut header, 272, records);
    header[280..280 + SUMS].copy_from_slice(interim);
    let sum = crc32c::crc32c(&header[..HEADER_SUM]);
    put_u32(&mut header, HEADER_SUM, sum);
    header
}

fn pack_record(
    seed: u32,
    block: MetadataBlock,
    old: &[u8],
    new_sums: &[u8; SUMS],
) -> [u8; RECORD_SIZE] {
    let mut record = [0; RECORD_SIZE];
    put_u64(&mut record, 8, block.0);
    record[16..16 + SUMS].copy_from_slice(new_sums);
    record[RECORD_HEAD..].copy_from_slice(old);
    let sum = crc32c::crc32c_append(seed, &record[4..]);
    put_u32(&mut record, 0, sum);
    record
}

/// The checksums of a block's sectors.
fn sums(block: &[u8]) -> [u8; SUMS] {
    let mut sums = [0; SUMS];
    for (sum, sector) in sums.chunks_exact_mut(4).zip(block.chunks_exact(SECTOR)) {
        sum.copy_from_slice(&crc32c::crc32c(sector).to_le_bytes());
    }
    sums
}

/// An undo file that is being read, record by record.
struct UndoFile {
    reader: BufReader<File>,
    shown: String,
    interim: [u8; SUMS],
    seed: u32,
    /// Blocks of the device.
    nr_blocks: u64,
    /// Records not read yet.
    left: u64,
    /// The least block that may come next.
    next: u64,
}

impl UndoFile {
    /// Opens the file and judges its header: against itself, its own size, and a device of `nr_blocks` blocks.
    fn open(path: &Path, nr_blocks: u64) -> Result<Self> {
        let shown = path.display().to_string();
        let cannot = |e| Error::io(format!("cannot read undo file {shown}"), e);
        let no_undo_file =
            || Error::new(ErrorKind::NotMetadata, format!("{shown} is no undo file"));
        // A pipe would never come to an end, or never begin.
        let meta = std::fs::metadata(path).map_err(cannot)?;
        if !meta.is_file() || meta.len() < HEADER_SIZE as u64 {
            return Err(no_undo_file());
        }
        let mut reader =
            BufReader::with_capacity(16 * RECORD_SIZE, File::open(path).map_err(cannot)?);
        let mut header = [0; HEADER_SIZE];
        reader.read_exact(&mut header).map_err(cannot)?;
        let first_line = TEXT.iter().position(|&b| b == b'\n').unwrap_or(TEXT.len());
        if header[..first_line] != TEXT[..first_line] {
            return Err(no_undo_file());
        }
        let damaged =
            |what: &str| Error::new(ErrorKind::Damaged, format!("undo file {shown} {what}"));
        if crc32c::crc32c(&header[..HEADER_SUM]) != get_u32(&header, HEADER_SUM) {
            return Err(damaged("is damaged: the checksum of its header is wrong"));
        }
        if get_u64(&header, 256) != VERSION {
            return Err(damaged("was written by a later version of thin_repair"));
        }
        let records = get_u64(&header, 272);
        let size = records.checked_mul(RECORD_SIZE as u64);
        if size.and_then(|s| s.checked_add(HEADER_SIZE as u64)) != Some(meta.len()) {
            return Err(damaged(
                "is damaged: it has been cut off, or something follows it",
            ));
        }
        let device = get_u64(&header, 264);
        if device != nr_blocks {
            let what = format!(
                "undo file {shown} is of a device of {device} blocks, this one has {nr_blocks}; nothing was written"
            );
            return Err(Error::new(ErrorKind::Unsuitable, what));
        }
        let mut interim = [0; SUMS];
        interim.copy_from_slice(&header[280..280 + SUMS]);
        Ok(Self {
            reader,
            interim,
            seed: get_u32(&header, HEADER_SUM),
            nr_blocks,
            left: records,
            next: 0,
            shown,
        })
    }

    /// The next record; none after the last.
    fn next(&mut self) -> Result<Option<Record>> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        let mut bytes = [0; RECORD_SIZE];
        self.reader
            .read_exact(&mut bytes)
            .map_err(|e| Error::io(format!("cannot read undo file {}", self.shown), e))?;
        let record = Record { bytes };
        let block = record.block().0;
        let is_in_order =
            block >= self.next && block < self.nr_blocks && (self.next > 0 || block == 0);
        let sum = crc32c::crc32c_append(self.seed, &record.bytes[4..]);
        if !is_in_order || sum != get_u32(&record.bytes, 0) {
            return Err(Error::new(
                ErrorKind::Damaged,
                format!(
                    "undo file {} is damaged: its record for block {block} is wrong",
                    self.shown
                ),
            ));
        }
        (self.left, self.next) = (left, block + 1);
        Ok(Some(record))
    }
}

/// What one block was, and how to recognise what the repair made of it.
struct Record {
    bytes: [u8; RECORD_SIZE],
}

impl Record {
    fn block(&self) -> MetadataBlock {
        MetadataBlock(get_u64(&self.bytes, 8))
    }

    fn contents(&self) -> &[u8] {
        &self.bytes[RECORD_HEAD..]
    }

    /// True when every sector of `now` is what it was before the repair, or what the repair wrote.
    fn knows(&self, now: &[u8], interim: &[u8; SUMS]) -> bool {
        let now_sums = sums(now);
        let new_sums = &self.bytes[16..16 + SUMS];
        (0..BLOCK_SIZE / SECTOR).all(|i| {
            let sector = i * SECTOR..(i + 1) * SECTOR;
            let sum = i * 4..(i + 1) * 4;
            now[sector.clone()] == self.contents()[sector]
                || now_sums[sum.clone()] == new_sums[sum.clone()]
                || self.block() == SUPERBLOCK && now_sums[sum.clone()] == interim[sum]
        })
    }
}
