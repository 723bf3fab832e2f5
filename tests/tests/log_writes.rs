//! Recordings in the format of the kernel's dm-log-writes, so that replay-log can replay them and run a check after every flush:
//! written from what the recorder has, and read by a parser of its own.
//!
//! All numbers are little-endian. The first sector has magic, version, number of entries and sector size. Each entry follows in a
//! sector of its own: sector, number of sectors, flags, length of data in the entry itself; then the sectors that were written. Only
//! a mark has data in the entry. The kernel ends a log with a mark of its own.

use std::sync::Arc;

use thintools::io::BlockEngine;
use thintools::thin::PoolMetadata;
use thintools::units::{BLOCK_SIZE, MetadataBlock, ThinBlock, ThinId};

use crate::crash::{Recorder, Step, codes_of};
use crate::support::{get_u32, get_u64, put_u32, put_u64};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const SECTOR: usize = 512;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
const END: &str = "dm-log-writes-end";

fn entry(sector: u64, nr_sectors: u64, flags: u64, text: &str) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let words = [sector, nr_sectors, flags, text.len() as u64];
    for (at, word) in words.into_iter().enumerate() {
        put_u64(&mut bytes, at * 8, word);
    }
    bytes[32..32 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// The recording as a log. Each mark stands before the step that it has the number of.
pub(crate) fn log_of(steps: &[Step], marks: &[(usize, &str)]) -> Vec<u8> {
    let mut log = vec![0; SECTOR];
    let mut nr_entries = 0;
    let mut put = |header: [u8; SECTOR], data: &[u8]| {
        log.extend_from_slice(&header);
        log.extend_from_slice(data);
        nr_entries += 1;
    };
    let per_block = (BLOCK_SIZE / SECTOR) as u64;
    for number in 0..=steps.len() {
        for (_, text) in marks.iter().filter(|m| m.0 == number) {
            put(entry(0, 0, MARK, text), &[]);
        }
        match steps.get(number) {
            Some(Step::Write(block, data)) => {
                put(entry(block * per_block, per_block, 0, ""), data);
            }
            Some(Step::Sync) => put(entry(0, 0, FLUSH, ""), &[]),
            None => {}
        }
    }
    put(entry(0, 0, MARK, END), &[]);
    put_u64(&mut log, 0, MAGIC);
    put_u64(&mut log, 8, 1);
    put_u64(&mut log, 16, nr_entries);
    put_u32(&mut log, 24, SECTOR as u32);
    log
}

/// An entry of a log.
#[derive(Debug, PartialEq)]
struct Entry<'a> {
    sector: u64,
    flags: u64,
    text: &'a [u8],
    data: &'a [u8],
}

/// Sector size and entries of a log; what is wrong with it otherwise.
fn parse(log: &[u8]) -> Result<(usize, Vec<Entry<'_>>), String> {
    if log.len() < 28 || get_u64(log, 0) != MAGIC || get_u64(log, 8) != 1 {
        return Err("no log of version 1".to_owned());
    }
    let size = get_u32(log, 24) as usize;
    if !size.is_power_of_two() || !(512..=4096).contains(&size) {
        return Err(format!("sectors of {size} bytes"));
    }
    let mut rest = log.get(size..).ok_or("no first sector")?;
    let mut entries = Vec::new();
    for number in 0..get_u64(log, 16) {
        let cut = || format!("entry {number} is cut off");
        let (header, behind) = rest.split_at_checked(size).ok_or_else(cut)?;
        let [sector, nr_sectors, flags, len] = [0, 8, 16, 24].map(|at| get_u64(header, at));
        let data = match flags & DISCARD {
            0 => nr_sectors as usize * size,
            _ => 0,
        };
        let (data, behind) = behind.split_at_checked(data).ok_or_else(cut)?;
        let text = header.get(32..32 + len as usize).ok_or_else(cut)?;
        entries.push(Entry {
            sector,
            flags,
            text,
            data,
        });
        rest = behind;
    }
    match rest.is_empty() {
        true => Ok((size, entries)),
        false => Err(format!("{} bytes behind the last entry", rest.len())),
    }
}

/// A log put together by hand of every kind of entry that a kernel writes.
#[test]
fn a_log_is_read_as_the_kernel_writes_it() {
    let mut log = vec![0; SECTOR];
    for (at, byte) in [0x72, 0x68, 0x73, 0x77, 0x66, 0x73, 0x6a, 0, 1]
        .into_iter()
        .enumerate()
    {
        log[at] = byte;
    }
    log[16] = 5;
    log[25] = 2;
    let mut put = |words: [u64; 4], text: &[u8], data: usize| {
        let mut header: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        header.extend_from_slice(text);
        header.resize(SECTOR, 0);
        log.extend(header);
        log.extend(vec![7; data]);
    };
    // An empty flush; a discard; metadata with FUA; a mark; the kernel's end.
    put([0, 0, 1, 0], b"", 0);
    put([0x1_ff80, 128, 4, 0], b"", 0);
    put([2, 2, 18, 0], b"", 1024);
    put([0, 0, 8, 9], b"mkfs-done", 0);
    put([0, 0, 8, 17], b"dm-log-writes-end", 0);
    let (size, entries) = parse(&log).expect("a log");
    assert_eq!(size, SECTOR);
    let facts: Vec<_> = entries
        .iter()
        .map(|e| (e.sector, e.flags, e.text, e.data.len()))
        .collect();
    let expected: [(u64, u64, &[u8], usize); 5] = [
        (0, 1, b"", 0),
        (0x1_ff80, 4, b"", 0),
        (2, 18, b"", 1024),
        (0, 8, b"mkfs-done", 0),
        (0, 8, b"dm-log-writes-end", 0),
    ];
    assert_eq!(facts, expected);
    assert!(parse(&log[..log.len() - 1]).is_err());
}

/// What was recorded, written as a log and read again, makes the same image, and a sound one at every mark.
#[test]
fn a_recording_is_a_log() {
    let empty = vec![0; 64 * BLOCK_SIZE];
    let engine = Arc::new(Recorder::new(&empty));
    let mut pool = PoolMetadata::format(Arc::clone(&engine) as _, 128, 0).expect("formatted");
    let mut marks = vec![(engine.nr_steps(), "formatted")];
    pool.resize_data(100).expect("resized");
    pool.create_thin(ThinId(1)).expect("made");
    for block in 0..50 {
        let data = pool.alloc_data_block().expect("room").expect("a block");
        pool.insert_block(ThinId(1), ThinBlock(block * 3), data)
            .expect("mapped");
    }
    pool.commit().expect("committed");
    marks.push((engine.nr_steps(), "mapped"));
    pool.create_snap(ThinId(2), ThinId(1)).expect("made");
    pool.delete_device(ThinId(1)).expect("deleted");
    pool.commit().expect("committed");
    marks.push((engine.nr_steps(), "deleted"));

    let steps = engine.steps();
    let log = log_of(&steps, &marks);
    let (size, entries) = parse(&log).expect("a log");
    assert_eq!(size, SECTOR);
    assert_eq!(entries.len(), steps.len() + marks.len() + 1);
    let flushes = steps.iter().filter(|s| matches!(s, Step::Sync)).count();
    assert_eq!(entries.iter().filter(|e| e.flags == FLUSH).count(), flushes);
    let mut image = empty;
    let mut texts = Vec::new();
    for entry in &entries {
        let at = entry.sector as usize * size;
        image[at..at + entry.data.len()].copy_from_slice(entry.data);
        if entry.flags == MARK {
            texts.push(String::from_utf8_lossy(entry.text).into_owned());
            assert!(codes_of(image.clone()).is_empty(), "{texts:?}");
        }
    }
    assert_eq!(texts, ["formatted", "mapped", "deleted", END]);
    let mut block = vec![0; BLOCK_SIZE];
    for (number, of_log) in image.chunks(BLOCK_SIZE).enumerate() {
        engine
            .read(MetadataBlock(number as u64), &mut block)
            .expect("memory");
        assert!(block == of_log, "block {number}");
    }
}
