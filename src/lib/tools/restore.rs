//! Writes a source's pool to a device: rehearse, invalidate, write, flush, superblock, flush.

use super::event::Source;
use super::restorer::Restorer;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine};
use crate::observer::{Observer, Silent};
use crate::pdata::nr_bitmaps;
use crate::thin::{MARKER, SUPERBLOCK};
use crate::units::{BLOCK_SIZE, MAX_METADATA_BLOCKS};

/// What was written.
#[derive(Clone, Copy, Debug)]
pub struct Restored {
    /// Mappings of all devices.
    pub mappings: u64,
    /// Metadata blocks from the beginning of the device to the last one in use.
    pub used_blocks: u64,
    /// Metadata blocks of the device.
    pub nr_blocks: u64,
}

/// Writes the pool that `source` tells to `output`.
///
/// Nothing is written before a rehearsal has judged every event and found the output large enough. Then block 0 is replaced
/// by [`MARKER`] and flushed, so that no superblock ever points at blocks that are being overwritten; the new superblock is
/// written after everything else is on the device.
///
/// # Errors
/// `InvalidDescription`, `OutputTooSmall` (nothing was written), or `Io`, `Interrupted` (block 0 may hold the marker).
pub fn restore(
    source: &dyn Source,
    output: &dyn BlockEngine,
    observer: &dyn Observer,
) -> Result<Restored> {
    let nr_blocks = output.nr_blocks().min(MAX_METADATA_BLOCKS);
    if let Err(e) = rehearse(source, nr_blocks, observer) {
        return Err(if e.kind() == ErrorKind::OutputTooSmall {
            tell_size(source, output.nr_blocks(), e)
        } else {
            e
        });
    }
    let mut marker = AlignedBuffer::new(1);
    marker.blocks_mut(1)[..MARKER.len()].copy_from_slice(MARKER);
    let write_zero = |buffer: &AlignedBuffer| {
        output
            .write(SUPERBLOCK, buffer.blocks(1))
            .and_then(|()| output.sync())
            .map_err(|e| Error::io("cannot write block 0 of the output", e))
    };
    write_zero(&marker)?;
    // What the rehearsal warned of need not be said again.
    let quiet = Quiet(observer);
    let mut restorer = Restorer::new(Some(output), nr_blocks, &quiet);
    source.emit(&mut restorer)?;
    let fields = restorer.finish()?;
    output
        .sync()
        .map_err(|e| Error::io("cannot flush the output", e))?;
    observer.check_cancelled()?;
    let mut superblock = AlignedBuffer::new(1);
    superblock.blocks_mut(1).copy_from_slice(&fields.pack());
    write_zero(&superblock)?;
    Ok(Restored {
        mappings: restorer.mappings(),
        used_blocks: restorer.used_blocks(),
        nr_blocks,
    })
}

struct Quiet<'a>(&'a dyn Observer);

impl Observer for Quiet<'_> {
    fn progress(&self, phase: &'static str, done: u64, total: u64) {
        self.0.progress(phase, done, total);
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

fn rehearse(source: &dyn Source, nr_blocks: u64, observer: &dyn Observer) -> Result<u64> {
    let mut rehearsal = Restorer::new(None, nr_blocks, observer);
    source.emit(&mut rehearsal)?;
    rehearsal.finish()?;
    Ok(rehearsal.used_blocks())
}

/// Finds out how large the output must be, for the error that says that it is not.
fn tell_size(source: &dyn Source, has: u64, why: Error) -> Error {
    let Ok(used) = rehearse(source, MAX_METADATA_BLOCKS, &Silent) else {
        return why.context("the output is too small; nothing was written");
    };
    // That rehearsal has the bitmaps of the largest device; how many are needed depends on the size looked for.
    let rest = used - nr_bitmaps(MAX_METADATA_BLOCKS);
    let mut needs = rest;
    while needs < rest + nr_bitmaps(needs) {
        needs = rest + nr_bitmaps(needs);
    }
    Error::new(
        ErrorKind::OutputTooSmall,
        format!(
            "the output has {has} blocks ({} bytes); this metadata needs {needs} blocks ({} bytes) and more to grow; nothing \
             was written",
            has * BLOCK_SIZE as u64,
            needs * BLOCK_SIZE as u64
        ),
    )
}
