//! What the commands for developers leave behind: images and JSON.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use thintools::io::{AlignedBuffer, BlockEngine};
use thintools::observer::Observer;
use thintools::tools::devtools::Damaged;
use thintools::units::{BLOCK_SIZE, MetadataBlock};

/// Blocks copied at once: 1 MiB.
const RUN: u64 = 256;

/// Makes the new file `output` a copy of `engine` with damage.
pub(super) fn copy(
    output: &Path,
    engine: &dyn BlockEngine,
    damaged: &[Damaged],
    observer: &dyn Observer,
) -> anyhow::Result<()> {
    let file = File::options()
        .write(true)
        .create_new(true)
        .open(output)
        .with_context(|| {
            format!(
                "cannot make {}; give the name of a file that does not exist",
                output.display()
            )
        })?;
    fill(&file, output, engine, damaged, observer).inspect_err(|_| {
        // Half an image helps nobody; the error is reported whether or not this succeeds.
        let _ = fs::remove_file(output);
    })
}

/// Writes the copy, with holes for zeros, and the damage over it.
fn fill(
    file: &File,
    path: &Path,
    engine: &dyn BlockEngine,
    damaged: &[Damaged],
    observer: &dyn Observer,
) -> anyhow::Result<()> {
    let write = |bytes: &[u8], block: u64| {
        file.write_all_at(bytes, block * BLOCK_SIZE as u64)
            .with_context(|| format!("cannot write {}", path.display()))
    };
    let nr_blocks = engine.nr_blocks();
    file.set_len(nr_blocks * BLOCK_SIZE as u64)
        .with_context(|| format!("cannot make {} as large as the input", path.display()))?;
    let mut buffer = AlignedBuffer::new(RUN as usize);
    for start in (0..nr_blocks).step_by(RUN as usize) {
        observer.check_cancelled()?;
        let blocks = RUN.min(nr_blocks - start) as usize;
        engine
            .read(MetadataBlock(start), buffer.blocks_mut(blocks))
            .with_context(|| format!("cannot read the input from block {start}"))?;
        let run = buffer.blocks(blocks);
        if run.iter().any(|&b| b != 0) {
            write(run, start)?;
        }
    }
    for Damaged {
        block, contents, ..
    } in damaged
    {
        write(contents, block.0)?;
    }
    Ok(())
}

/// Prints a line of JSON.
pub(super) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string(value).context("cannot write JSON")?;
    text.push('\n');
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("cannot write to standard output")
}
