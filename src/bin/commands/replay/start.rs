//! The pool before a trace begins.

use std::sync::Arc;

use anyhow::{Context, bail};
use thintools::io::{BlockEngine, OverlayEngine};
use thintools::observer::Observer;
use thintools::pool::{AllocationOrder, Features, PoolTable, Settings};
use thintools::replay::{ControlEvent, DeviceModel, PlayOptions, Prefill, Prefilled};
use thintools::thin::PoolMetadata;
use thintools::units::MAX_METADATA_BLOCKS;

use super::args::{Args, Fill};
use super::ways::Way;

/// The metadata that it begins with, which is only read.
pub(super) type Below = Option<Arc<dyn BlockEngine>>;

fn first_word(text: &str) -> &str {
    text.split_ascii_whitespace().next().unwrap_or_default()
}

impl Args {
    /// The pool before the trace begins.
    pub(super) fn start(
        &self,
        way: &Way,
        below: Below,
    ) -> anyhow::Result<(Arc<OverlayEngine>, PoolMetadata)> {
        let data_blocks = |size: u64| self.data_size.map(|sectors| sectors / size);
        if let (Some(path), Some(below)) = (&self.metadata, below) {
            let engine = Arc::new(OverlayEngine::over(below));
            let metadata = PoolMetadata::open(Arc::clone(&engine) as _, way.cache(&*engine));
            let shown = || path.display().to_string();
            let mut metadata = metadata.with_context(shown)?;
            let status = metadata.status()?;
            if let Some(blocks) = data_blocks(status.data_block_size.into()) {
                // As the kernel does when the pool is activated.
                if blocks < status.data_blocks {
                    bail!(
                        "--data-size: {blocks} blocks are fewer than the {} that the pool of {} has; give {} or more",
                        status.data_blocks,
                        path.display(),
                        format_args!(
                            "{}s",
                            status
                                .data_blocks
                                .saturating_mul(status.data_block_size.into())
                        )
                    );
                }
                if blocks > status.data_blocks && status.needs_check {
                    bail!(
                        "--data-size: a pool that needs a check does not grow; thin_check --clear-needs-check-flag {}",
                        path.display()
                    );
                }
                metadata.resize_data(blocks)?;
                metadata.commit()?;
            }
            return Ok((engine, metadata));
        }
        let size = u32::try_from(way.block_size).unwrap_or(u32::MAX);
        let blocks = self.metadata_size / 8;
        if blocks > MAX_METADATA_BLOCKS {
            bail!(
                "a pool uses {MAX_METADATA_BLOCKS} blocks of 4 KiB of metadata at most, not {blocks}"
            );
        }
        let engine = Arc::new(OverlayEngine::zeroed(blocks));
        let mut metadata =
            PoolMetadata::format(Arc::clone(&engine) as _, size, way.cache(&*engine))?;
        let blocks = data_blocks(way.block_size).unwrap_or((1 << 31) / way.block_size);
        metadata.resize_data(blocks)?;
        metadata.commit()?;
        Ok((engine, metadata))
    }

    /// `beside` are the events of --events.
    pub(super) fn options(
        &self,
        metadata: &PoolMetadata,
        way: &Way,
        beside: &[ControlEvent],
    ) -> anyhow::Result<PlayOptions> {
        let says_what_is_what =
            |event: &ControlEvent| ["activate", "create_thin"].contains(&first_word(&event.text));
        let status = metadata.status()?;
        let block_sectors = status.data_block_size;
        let table = PoolTable {
            metadata_device: "metadata".into(),
            data_device: "data".into(),
            block_sectors,
            low_water_blocks: self.low_water,
            features: Features::from_words(&self.feature)?,
        };
        let devices = self.map.iter().cloned();
        let mut settings = Settings {
            scheme: way.scheme,
            ..Settings::new(table)
        };
        if let Some(cells) = way.cells {
            settings.cells = cells as usize;
            settings.allocation_order = AllocationOrder::OneByOne;
        }
        Ok(PlayOptions {
            settings,
            data_blocks: match self.data_size {
                Some(sectors) => sectors / u64::from(block_sectors),
                None => status.data_blocks,
            },
            max_sectors: self.max_sectors,
            cpus: usize::from(self.cpus),
            device: DeviceModel::default(),
            devices: devices.map(|(name, id, size)| (name, (id, size))).collect(),
            makes_devices: self.map.is_empty() && !beside.iter().any(says_what_is_what),
            seed: self.seed,
        })
    }

    /// Maps what is to be mapped before the trace begins.
    pub(super) fn prefill(
        &self,
        beside: &[ControlEvent],
        metadata: &mut PoolMetadata,
        options: &mut PlayOptions,
        observer: &dyn Observer,
    ) -> anyhow::Result<Option<Prefilled>> {
        if self.prefill == Fill::None {
            return Ok(None);
        }
        let mut reader = self.trace.open_again()?;
        let prefill = Prefill::of(
            &mut *reader,
            beside.to_vec(),
            metadata,
            &options.devices,
            options.makes_devices,
            observer,
        )?;
        let named = prefill.named().iter();
        options
            .devices
            .extend(named.map(|(name, &id)| (name.clone(), (id, None))));
        Ok(Some(prefill.apply(metadata)?))
    }
}
