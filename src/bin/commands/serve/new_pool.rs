//! What `--create` makes before there is a pool: its files, which go away again if nothing comes of it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context;
use thintools::io::{Access, open_read};
use thintools::runtime::DataDevice;
use thintools::thin::Superblock;
use thintools::units::{BLOCK_SIZE, MAX_METADATA_BLOCKS};
use thintools::{Error, ErrorKind};

use super::Args;
use crate::output;

/// Bytes of metadata that a new file has for each data block, as LVM reckons.
const METADATA_BYTES: u64 = 64;
/// The smallest new metadata file: 2 MiB.
const LEAST_METADATA: u64 = 2 << 20;

/// Files that were made just now, and are removed unless they are kept.
#[derive(Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            // Somebody else may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

impl Made {
    /// Makes the files of a new pool that are not there.
    pub(super) fn files(args: &Args) -> anyhow::Result<Self> {
        let mut this = Self::default();
        if !args.create {
            return Ok(this);
        }
        match args.data_size {
            Some(sectors) if !args.data.exists() => this.make(&args.data, sectors * 512)?,
            Some(sectors) => say_if_other(args, sectors)?,
            None => {}
        }
        if args.metadata.exists() {
            refuse_other_blocks(args)?;
        } else {
            let sectors = DataDevice::open(&args.data, false)?.sectors()?;
            let blocks = sectors / u64::from(args.new_block_size());
            let most = MAX_METADATA_BLOCKS * BLOCK_SIZE as u64;
            let bytes = blocks
                .saturating_mul(METADATA_BYTES)
                .next_multiple_of(BLOCK_SIZE as u64);
            this.make(&args.metadata, bytes.clamp(LEAST_METADATA, most))?;
        }
        Ok(this)
    }

    /// There is a pool in them.
    pub(super) fn keep(mut self) {
        self.0.clear();
    }

    fn make(&mut self, path: &Path, bytes: u64) -> anyhow::Result<()> {
        let shown = path.display();
        let file = File::create_new(path).with_context(|| format!("cannot make {shown}"))?;
        self.0.push(path.into());
        file.set_len(bytes).with_context(|| {
            format!("cannot make {shown} {bytes} bytes long; make room, or give another file")
        })
    }
}

/// Says that the size of what is there already stays. It is no error, for pools grow, and are started anew with the same command line.
fn say_if_other(args: &Args, wanted: u64) -> anyhow::Result<()> {
    let sectors = DataDevice::open(&args.data, false)?.sectors()?;
    if sectors != wanted && !args.quiet {
        output::stderr_line(&format!(
            "{}: {} is there already and stays {} bytes long; --data-size is for a file that is not there",
            output::program(),
            args.data.display(),
            sectors * 512
        ));
    }
    Ok(())
}

/// Refuses to take a pool that has other blocks than those that are asked for.
fn refuse_other_blocks(args: &Args) -> anyhow::Result<()> {
    let Some(wanted) = args.block_size else {
        return Ok(());
    };
    let engine = open_read(&args.metadata, Access::Exclusive)?;
    match Superblock::read(&*engine) {
        Ok(superblock) if superblock.data_block_size != wanted => {
            let what = format!(
                "the pool in {} has data blocks of {} bytes for good, and --block-size is {}: leave it out, or make another pool",
                args.metadata.display(),
                u64::from(superblock.data_block_size) * 512,
                u64::from(wanted) * 512
            );
            Err(Error::new(ErrorKind::Unsuitable, what).into())
        }
        // Whoever opens it says what is wrong with the superblock.
        _ => Ok(()),
    }
}
