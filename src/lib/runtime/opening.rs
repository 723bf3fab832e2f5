//! How a pool's devices are opened, or made a pool, and what is refused with what to do about it.

use super::data_device::DataDevice;
#[cfg(feature = "devtools")]
use super::seam::Interceptor;
use crate::checksum;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedBuffer, BlockEngine, file_id, sweep};
use crate::pool::Features;
use crate::thin::{DEFAULT_CACHE, PoolMetadata, Superblock};
use crate::units::{BLOCK_SIZE, MAX_DATA_BLOCKS, MetadataBlock, is_legal_data_block_size};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Blocks at the beginning that are looked at for the remains of a pool: 4 MiB. The kernel hands out blocks from the beginning on.
pub(super) const LOOKED_AT: u64 = 1024;

/// How a pool is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Device or file of the metadata.
    pub metadata: PathBuf,
    /// Device or file of the data.
    pub data: PathBuf,
    /// Data moves past the page cache.
    pub is_direct: bool,
    /// Nothing is written anywhere; what can be read is served, however damaged the rest is.
    pub is_read_only: bool,
    /// Make a pool with data blocks of so many sectors if the metadata begins with zeros, as the kernel does.
    pub create: Option<u32>,
    /// Free data blocks at which whoever manages the pool is told.
    pub low_water_blocks: u64,
    /// The words of the pool's table.
    pub features: Features,
    /// For how long writes wait for space if they wait; none is for ever.
    pub no_space_timeout: Option<Duration>,
    /// Bytes of metadata that are cached.
    pub cache_bytes: usize,
    /// Who stands between the pool and its devices.
    #[cfg(feature = "devtools")]
    pub interceptor: Option<Arc<dyn Interceptor>>,
}

impl Options {
    /// The defaults: a pool that exists, writes that fail at once where there is no space.
    pub fn new(metadata: &Path, data: &Path) -> Self {
        Self {
            metadata: metadata.to_owned(),
            data: data.to_owned(),
            is_direct: false,
            is_read_only: false,
            create: None,
            low_water_blocks: 0,
            features: Features {
                error_if_no_space: true,
                ..Features::default()
            },
            no_space_timeout: Some(Duration::from_secs(60)),
            cache_bytes: DEFAULT_CACHE,
            #[cfg(feature = "devtools")]
            interceptor: None,
        }
    }
}

/// Refuses one device for both, of which its locks would say that it is in use.
pub(super) fn refuse_same(options: &Options) -> Result<()> {
    let id = |path| file_id(path).ok();
    if id(&options.metadata).is_some_and(|metadata| Some(metadata) == id(&options.data)) {
        let shown = options.data.display();
        return Err(Error::new(
            ErrorKind::Unsuitable,
            format!("{shown} is given as the metadata and as the data; give both"),
        ));
    }
    Ok(())
}

/// Opens the data device, in the way that was asked for.
pub(super) fn open_data(options: &Options) -> Result<DataDevice> {
    let open = match options.is_direct {
        true => DataDevice::open_direct,
        false => DataDevice::open,
    };
    open(&options.data, !options.is_read_only)
}

/// Opens the metadata, or makes it; within, true if it was made.
pub(super) fn open_metadata(
    engine: Arc<dyn BlockEngine>,
    data: &DataDevice,
    options: &Options,
) -> Result<(PoolMetadata, bool)> {
    let shown = options.metadata.display();
    let mut block = AlignedBuffer::new(1);
    let is_blank = match engine.read(MetadataBlock(0), block.blocks_mut(1)) {
        Ok(()) => block.blocks(1).iter().all(|&byte| byte == 0),
        Err(_) if options.is_read_only => false,
        Err(e) => {
            return Err(Error::io(
                format!("cannot read the superblock of {shown}"),
                e,
            ));
        }
    };
    let superblock = Superblock::read(&*engine);
    if superblock.is_err() && is_superblock(data, engine.nr_blocks()) {
        return Err(Error::new(
            ErrorKind::Unsuitable,
            format!(
                "{shown} has no superblock, and {} has one: the metadata and the data are given the wrong way round",
                data.path().display()
            ),
        ));
    }
    match options.create {
        // What is read only is looked for behind a superblock that was zeroed, too.
        _ if options.is_read_only => {}
        Some(block_sectors) if is_blank => {
            refuse_too_many(data, block_sectors)?;
            refuse_remains(&*engine, &options.metadata)?;
            let made = PoolMetadata::format(engine, block_sectors, options.cache_bytes);
            return made.map(|pool| (pool, true)).map_err(|e| {
                let next = match is_full(&e) {
                    true => ": the file system of this file has no room for it; make room, or give another file, and run the command with --create again",
                    false => "",
                };
                e.context(format!("cannot make a pool on {shown}{next}"))
            });
        }
        Some(_) if superblock.is_err() => {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!(
                    "{shown} has no superblock and does not begin with zeros either, and is not overwritten; \
                     clear its first 4096 bytes if nothing in it is needed"
                ),
            ));
        }
        None if is_blank => {
            return Err(Error::new(
                ErrorKind::NotMetadata,
                format!("{shown} begins with zeros: there is no pool yet; --create makes one"),
            ));
        }
        // What is there already need not be made.
        _ => {}
    }
    let unusable = |e: Error| {
        match options.is_read_only {
        true => e.context(format!("cannot use the metadata {shown}")),
        false => e.context(format!(
            "cannot use the metadata {shown} to write; --read-only serves what there is, and thin_check {shown} says what puts it right"
        )),
    }
    };
    let superblock = superblock.map_err(unusable)?;
    if !is_legal_data_block_size(superblock.data_block_size) {
        return Err(Error::new(
            ErrorKind::Damaged,
            format!(
                "the superblock of {shown} says that data blocks have {} sectors, which no pool can have; \
                 thin_repair --data-block-size puts it right, and --read-only --block-size serves what is there",
                superblock.data_block_size
            ),
        ));
    }
    if superblock.needs_check() && !options.is_read_only {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!(
                "the needs_check flag of {shown} is set, which makes the pool read-only; \
                 thin_check --clear-needs-check-flag clears it if the check passes, \
                 and --read-only serves what is there meanwhile"
            ),
        ));
    }
    let pool = match options.is_read_only {
        true => PoolMetadata::open_to_rescue(engine, options.cache_bytes),
        // A bitmap that turned out to be lost later would fail a write, and make the pool read-only.
        false => PoolMetadata::open(engine, options.cache_bytes)
            .and_then(|mut pool| pool.verify_space_maps().map(|()| pool)),
    };
    Ok((pool.map_err(unusable)?, false))
}

/// Refuses to make a pool over one that has lost its superblock only. The kernel would.
fn refuse_remains(engine: &dyn BlockEngine, path: &Path) -> Result<()> {
    let blocks: Vec<u64> = (1..engine.nr_blocks().min(LOOKED_AT)).collect();
    let is_sealed = |bytes: &[u8], block| {
        checksum::identify(bytes).is_some_and(|kind| checksum::verify(bytes, kind, block).is_ok())
    };
    let visit = |first: &mut Option<MetadataBlock>, block, read: io::Result<&[u8]>| {
        // What cannot be read is found out by whoever writes it.
        if read.is_ok_and(|bytes| is_sealed(bytes, block)) {
            *first = Some(first.map_or(block, |first| first.min(block)));
        }
    };
    let found = sweep(engine, &blocks, &|| false, || None, visit);
    let Some(block) = found.into_iter().flatten().min() else {
        return Ok(());
    };
    let shown = path.display();
    Err(Error::new(
        ErrorKind::Unsuitable,
        format!(
            "{shown} begins with zeros, but block {block} is of a pool, and no pool is made over it: --read-only serves what is left, and thin_repair saves it; \
             clear the first {} bytes if nothing in it is needed",
            LOOKED_AT * BLOCK_SIZE as u64
        ),
    ))
}

/// Refuses data of which no pool can use all. To try would set needs_check.
pub(super) fn refuse_too_many(data: &DataDevice, block_sectors: u32) -> Result<()> {
    let blocks = data.sectors()? / u64::from(block_sectors.max(1));
    if blocks <= MAX_DATA_BLOCKS {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsuitable,
        format!(
            "{} has {blocks} blocks of {block_sectors} sectors, and a pool can have {MAX_DATA_BLOCKS}: \
             make it smaller, or make a pool of larger blocks (--block-size)",
            data.path().display()
        ),
    ))
}

/// True if it is the file system that keeps a file from getting longer.
fn is_full(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref());
    source.is_some_and(|e: &io::Error| {
        matches!(
            e.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::FileTooLarge | io::ErrorKind::QuotaExceeded
        )
    })
}

/// True if what should be data begins with a superblock.
fn is_superblock(data: &DataDevice, device_blocks: u64) -> bool {
    let mut block = AlignedBuffer::new(1);
    let bytes = block.blocks_mut(1);
    data.read(bytes, 0).is_ok()
        && Superblock::verify(bytes, MetadataBlock(0), device_blocks)
            .0
            .is_some()
}
