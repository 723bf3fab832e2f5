//! Grows the backing files of a pool before it is full.

use super::runtime::Runtime;
use crate::error::{Error, Result};
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked, even if nothing is heard of the pool.
const PATIENCE: Duration = Duration::from_secs(1);

/// When to grow, and by how much; for data and metadata alike, as LVM's thin_pool_autoextend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Autoextend {
    /// Percent in use from which on the pool grows, up to 100.
    pub threshold: u8,
    /// Percent of its size that it grows by, at least 1.
    pub percent: u16,
}

impl Autoextend {
    /// Blocks after growth; none if there is no need.
    fn grown(self, used: u64, blocks: u64) -> Option<u64> {
        let is_due = u128::from(used) * 100 >= u128::from(blocks) * u128::from(self.threshold);
        let by = u128::from(blocks) * u128::from(self.percent) / 100;
        is_due.then(|| blocks.saturating_add(u64::try_from(by).unwrap_or(u64::MAX).max(1)))
    }

    /// Free blocks of so many at which it has to be looked.
    pub fn low_water(self, blocks: u64) -> u64 {
        (u128::from(blocks) * (100 - u128::from(self.threshold.min(100))) / 100) as u64
    }
}

impl Runtime {
    /// Grows the backing files from now on, on a thread of its own that ends with the pool.
    ///
    /// # Errors
    /// `Io` if there is no thread to be had.
    pub fn autoextend(self: &Arc<Self>, how: Autoextend) -> Result<()> {
        let runtime = Arc::downgrade(self);
        let driver = Arc::clone(&self.driver);
        let extend = move || {
            let mut last = driver.events.last();
            let mut last_failure = String::new();
            while let Some(events) = driver.events.after(last, PATIENCE) {
                last = events.last().map_or(last, |event| event.number);
                let Some(runtime) = runtime.upgrade() else {
                    return;
                };
                match runtime.extend(how) {
                    Ok(None) => {}
                    Ok(Some(what)) => driver.events.add("grown", what),
                    // The same again every second would be no news.
                    Err(e) if e.to_string() == last_failure => {}
                    Err(e) => {
                        last_failure = e.to_string();
                        driver.events.add("grow_failed", last_failure.clone());
                    }
                }
            }
        };
        let spawned = std::thread::Builder::new()
            .name("autoextend".into())
            .spawn(extend);
        spawned
            .map(drop)
            .map_err(|e| Error::io("cannot start the thread that grows the pool", e))
    }

    /// Grows what is due, and says what that was.
    fn extend(&self, how: Autoextend) -> Result<Option<String>> {
        let status = self.driver.pool.inspect(|pool| pool.status())?;
        let data = how.grown(status.used_data_blocks, status.data_blocks);
        let metadata = how.grown(status.used_metadata_blocks, status.metadata_blocks);
        if data.is_none() && metadata.is_none() {
            return Ok(None);
        }
        self.grow(data, metadata)?;
        let after = self.driver.pool.inspect(|pool| pool.status())?;
        if (after.data_blocks, after.metadata_blocks)
            == (status.data_blocks, status.metadata_blocks)
        {
            return Ok(None);
        }
        Ok(Some(format!(
            "data: {} blocks, metadata: {} blocks",
            after.data_blocks, after.metadata_blocks
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_grows_from_the_threshold_on() {
        let how = Autoextend {
            threshold: 80,
            percent: 20,
        };
        assert_eq!(how.grown(79, 100), None);
        assert_eq!(how.grown(80, 100), Some(120));
        assert_eq!(how.grown(1, 1), Some(2), "by one block at least");
        assert_eq!(how.low_water(100), 20);
        let all = Autoextend {
            threshold: 100,
            percent: 1,
        };
        assert_eq!((all.grown(99, 100), all.grown(100, 100)), (None, Some(101)));
        assert_eq!(all.low_water(u64::MAX), 0);
    }
}
