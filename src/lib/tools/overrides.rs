//! Values that the user puts in place of what a source says of the pool.

use super::event::{Device, PoolInfo, Run, Sink, Source};
use crate::error::Result;
use crate::observer::{Observer, Silent};
use std::cell::Cell;

/// What to put in place. As with the other tools of this name, the transaction id and the number of data blocks are only
/// ever raised: lowering them makes LVM refuse the pool, or cuts mappings off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The least transaction id.
    pub transaction_id: Option<u64>,
    /// The data block size in sectors.
    pub data_block_size: Option<u32>,
    /// The least number of data blocks.
    pub nr_data_blocks: Option<u64>,
}

impl Overrides {
    /// The pool as the user wants it.
    pub fn apply(&self, pool: &PoolInfo, observer: &dyn Observer) -> PoolInfo {
        let raise = |name, wanted: Option<u64>, found: u64| {
            if let Some(wanted) = wanted.filter(|&w| w < found) {
                observer.warning(&format!(
                    "{name} stays {found}: it is never lowered, {wanted} was asked for"
                ));
            }
            wanted.map_or(found, |w| w.max(found))
        };
        PoolInfo {
            transaction: raise("the transaction id", self.transaction_id, pool.transaction),
            nr_data_blocks: raise(
                "the number of data blocks",
                self.nr_data_blocks,
                pool.nr_data_blocks,
            ),
            data_block_size: self.data_block_size.unwrap_or(pool.data_block_size),
            ..pool.clone()
        }
    }
}

/// A source with overrides applied.
pub struct Overridden<'a> {
    /// Where the events come from.
    pub source: &'a dyn Source,
    /// What is put in place.
    pub overrides: Overrides,
    /// Hears of values that were not lowered.
    pub observer: &'a dyn Observer,
    /// The observer has heard of them: a source is told more than once.
    pub heard: Cell<bool>,
}

impl std::fmt::Debug for Overridden<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.overrides.fmt(f)
    }
}

impl Source for Overridden<'_> {
    fn emit(&self, sink: &mut dyn Sink) -> Result<()> {
        self.source.emit(&mut Overriding { to: sink, by: self })
    }
}

struct Overriding<'a> {
    to: &'a mut dyn Sink,
    by: &'a Overridden<'a>,
}

impl Sink for Overriding<'_> {
    fn pool(&mut self, pool: &PoolInfo) -> Result<()> {
        let observer: &dyn Observer = if self.by.heard.replace(true) {
            &Silent
        } else {
            self.by.observer
        };
        self.to.pool(&self.by.overrides.apply(pool, observer))
    }

    fn define(&mut self, name: &str) -> Result<()> {
        self.to.define(name)
    }

    fn end_define(&mut self) -> Result<()> {
        self.to.end_define()
    }

    fn device(&mut self, device: &Device) -> Result<()> {
        self.to.device(device)
    }

    fn end_device(&mut self) -> Result<()> {
        self.to.end_device()
    }

    fn mappings(&mut self, runs: &[Run]) -> Result<()> {
        self.to.mappings(runs)
    }

    fn reference(&mut self, name: &str) -> Result<()> {
        self.to.reference(name)
    }

    fn end(&mut self) -> Result<()> {
        self.to.end()
    }
}
