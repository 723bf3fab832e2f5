//! When a pool is full, if it goes on as it did.

use crate::replay::books::Sample;
use crate::replay::counts::Moments;
use serde::{Deserialize, Serialize};
use std::fmt;

/// When data and metadata are full. All times are of the report's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forecast {
    /// Data blocks.
    pub data: Fill,
    /// Metadata blocks.
    pub metadata: Fill,
    /// When the pool first was low, or a write found no block.
    pub moments: Moments,
    /// Why nothing is forecast, if that is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub none_because: Option<NoForecast>,
}

/// Why nothing is said of how it would go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoForecast {
    /// The trace has no times.
    NoTimes,
    /// By the clock of threads it is played as fast as it goes: that is no speed of the load.
    SpeedOfReplay,
    /// The metadata failed on the way.
    MetadataFailed,
}

impl fmt::Display for NoForecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoTimes => "the trace has no times",
            Self::SpeedOfReplay => "the speed is that of this replay, not of the load",
            Self::MetadataFailed => "the metadata failed on the way",
        })
    }
}

/// How one kind of blocks fills up. Nanoseconds are counted from the end of the replay; none if there is no end in sight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    /// In use at the end.
    pub used: u64,
    /// That there are.
    pub total: u64,
    /// Since the start: when the last one was taken, if it was.
    pub full_at_ns: Option<u64>,
    /// At the rate of the whole replay.
    pub linear_ns: Option<u64>,
    /// At that of its last quarter.
    pub last_ns: Option<u64>,
    /// At that of its steepest tenth.
    pub worst_ns: Option<u64>,
}

impl Forecast {
    pub(super) fn new(
        timeline: &[Sample],
        data_blocks: u64,
        metadata_blocks: u64,
        moments: Moments,
        none_because: Option<NoForecast>,
    ) -> Self {
        let data: fn(&Sample) -> u64 = |sample| sample.used_data_blocks;
        let metadata: fn(&Sample) -> u64 = |sample| sample.used_metadata_blocks;
        let failed = moments
            .metadata_failed_ns
            .map(|_| NoForecast::MetadataFailed);
        let none_because = none_because.or(failed);
        // Between two samples a pool may be full, and be emptied again.
        let fill = |total, used: fn(&Sample) -> u64, full: Option<u64>| {
            let fill = Fill::new(timeline, total, used);
            let full_at_ns = fill.full_at_ns.into_iter().chain(full).min();
            match none_because {
                None => Fill { full_at_ns, ..fill },
                Some(_) => Fill {
                    used: fill.used,
                    total: fill.total,
                    full_at_ns,
                    ..Fill::default()
                },
            }
        };
        Self {
            data: fill(data_blocks, data, moments.out_of_space_ns),
            metadata: fill(metadata_blocks, metadata, moments.metadata_full_ns),
            moments,
            none_because,
        }
    }

    /// The sooner of each: of several pools, the first to fill.
    pub(super) fn sooner(&self, other: &Self) -> Self {
        let first = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        let fill = |a: &Fill, b: &Fill| Fill {
            used: a.used.saturating_add(b.used),
            total: a.total.saturating_add(b.total),
            full_at_ns: first(a.full_at_ns, b.full_at_ns),
            linear_ns: first(a.linear_ns, b.linear_ns),
            last_ns: first(a.last_ns, b.last_ns),
            worst_ns: first(a.worst_ns, b.worst_ns),
        };
        let (a, b) = (self.moments, other.moments);
        Self {
            data: fill(&self.data, &other.data),
            metadata: fill(&self.metadata, &other.metadata),
            moments: Moments {
                low_water_ns: first(a.low_water_ns, b.low_water_ns),
                out_of_space_ns: first(a.out_of_space_ns, b.out_of_space_ns),
                metadata_failed_ns: first(a.metadata_failed_ns, b.metadata_failed_ns),
                metadata_full_ns: first(a.metadata_full_ns, b.metadata_full_ns),
            },
            none_because: self.none_because.and(other.none_because),
        }
    }
}

impl Fill {
    fn new(timeline: &[Sample], total: u64, used: impl Fn(&Sample) -> u64) -> Self {
        let (Some(first), Some(last)) = (timeline.first(), timeline.last()) else {
            return Self {
                total,
                ..Self::default()
            };
        };
        let left = total.saturating_sub(used(last));
        let time = last.time_ns.saturating_sub(first.time_ns);
        let full = |from: &Sample, to: &Sample| {
            let time = to.time_ns.checked_sub(from.time_ns)?;
            let grown = used(to).checked_sub(used(from)).filter(|&n| n > 0)?;
            let rest = u128::from(left) * u128::from(time) / u128::from(grown);
            u64::try_from(rest).ok()
        };
        // The samples that lie this long before another one.
        let before = |to: &Sample, window: u64| {
            let from = to.time_ns.saturating_sub(window);
            let next = timeline.partition_point(|sample| sample.time_ns <= from);
            &timeline[next.saturating_sub(1)]
        };
        let worst = timeline.iter().map(|to| full(before(to, time / 10), to));
        Self {
            used: used(last),
            total,
            full_at_ns: timeline
                .iter()
                .find(|s| used(s) >= total)
                .map(|s| s.time_ns),
            linear_ns: full(first, last),
            last_ns: full(before(last, time / 4), last),
            worst_ns: worst.flatten().min(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(used: &[u64]) -> Vec<Sample> {
        let sample = |(n, &used_data_blocks): (usize, &u64)| Sample {
            time_ns: n as u64 * 1_000,
            used_data_blocks,
            ..Sample::default()
        };
        used.iter().enumerate().map(sample).collect()
    }

    fn fill(used: &[u64], total: u64) -> Fill {
        Fill::new(&timeline(used), total, |sample| sample.used_data_blocks)
    }

    #[test]
    fn steady_growth_is_forecast_the_same_by_all_three() {
        let steady: Vec<u64> = (0..=40).map(|n| n * 5).collect();
        let fill = fill(&steady, 1000);
        assert_eq!(fill.linear_ns, Some(160_000));
        assert_eq!(
            (fill.last_ns, fill.worst_ns),
            (Some(160_000), Some(160_000))
        );
        assert_eq!(fill.full_at_ns, None);
    }

    #[test]
    fn a_burst_is_the_worst_and_a_lull_the_last() {
        let mut used: Vec<u64> = (0..=20).map(|n| n * 10).collect();
        used.extend([200; 20]);
        let fill = fill(&used, 400);
        assert_eq!(fill.last_ns, None);
        assert_eq!(fill.linear_ns, Some(40_000));
        assert_eq!(fill.worst_ns, Some(20_000));
    }

    #[test]
    fn what_is_full_says_when_it_was() {
        let fill = fill(&[0, 10, 20, 20], 20);
        assert_eq!(fill.full_at_ns, Some(2_000));
        assert_eq!(Fill::new(&[], 20, |_| 0).linear_ns, None);
    }

    #[test]
    fn several_pools_are_forecast_by_the_first_to_fill() {
        let of = |linear_ns| Forecast {
            data: Fill {
                total: 10,
                linear_ns,
                ..Fill::default()
            },
            ..Forecast::default()
        };
        let sooner = of(None).sooner(&of(Some(5))).sooner(&of(Some(7)));
        assert_eq!(sooner.data.linear_ns, Some(5));
        assert_eq!(sooner.data.total, 30);
    }
}
