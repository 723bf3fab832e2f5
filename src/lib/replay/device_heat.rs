//! Where on each device requests went, for as many devices as a page has room for.

use super::event::TraceIo;
use super::heat::HeatMap;
use serde::{Deserialize, Serialize};

/// Devices with a map of their own: the first that the trace names. All others share one, so that memory is bounded.
pub(super) const MOST_MAPS: usize = 16;
/// Devices that a report has maps of: those with most requests.
pub(super) const MOST_SHOWN: usize = 8;

/// The heat map of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceHeat {
    /// Its name.
    pub device: String,
    /// Requests to it.
    pub requests: u64,
    /// Where they went, and when.
    pub heat: HeatMap,
}

/// Those with most requests; none unless there are several.
pub(super) fn busiest<'a>(
    devices: impl Iterator<Item = (String, u64, &'a HeatMap)>,
) -> Vec<DeviceHeat> {
    let mut all: Vec<_> = devices.filter(|(_, requests, _)| *requests > 0).collect();
    if all.len() < 2 {
        return Vec::new();
    }
    all.sort_by_key(|(_, requests, _)| std::cmp::Reverse(*requests));
    let shown = all.into_iter().take(MOST_SHOWN);
    let own = |(device, requests, heat): (_, _, &HeatMap)| DeviceHeat {
        device,
        requests,
        heat: heat.clone(),
    };
    shown.map(own).collect()
}

/// Heat maps by the trace's number for a device, each with its requests.
#[derive(Debug, Default)]
pub(super) struct HeatByDevice(Vec<(u64, HeatMap)>);

impl HeatByDevice {
    /// Notes a request.
    pub(super) fn record(&mut self, io: &TraceIo) {
        let (requests, map) = self.of(MOST_MAPS.min(io.device as usize));
        *requests += 1;
        map.record(io);
    }

    fn of(&mut self, number: usize) -> &mut (u64, HeatMap) {
        if self.0.len() <= number {
            self.0.resize_with(number + 1, Default::default);
        }
        &mut self.0[number]
    }

    /// Adds what others noted.
    pub(super) fn add(&mut self, other: &Self) {
        for (number, (more, heat)) in other.0.iter().enumerate() {
            let (requests, map) = self.of(number);
            *requests += more;
            map.add(heat);
        }
    }

    /// All devices on top of each other.
    pub(super) fn sum(&self) -> HeatMap {
        let mut all = HeatMap::default();
        self.0.iter().for_each(|(_, map)| all.add(map));
        all
    }

    /// Those with most requests, by the trace's names.
    pub(super) fn busiest(&self, names: &[String]) -> Vec<DeviceHeat> {
        let own = names.iter().zip(&self.0).take(MOST_MAPS);
        busiest(own.map(|(name, (requests, map))| (name.clone(), *requests, map)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::event::TraceOp;

    #[test]
    fn memory_is_bounded_however_many_devices_there_are() {
        let mut maps = HeatByDevice::default();
        let names: Vec<String> = (0..5000).map(|n: u32| n.to_string()).collect();
        for device in 0..5000 {
            let io = TraceIo {
                time_ns: 0,
                sector: 0,
                sectors: 8,
                device,
                cpu: 0,
                op: TraceOp::Read,
                is_preflush: false,
                is_fua: false,
            };
            (0..=device % 16).for_each(|_| maps.record(&io));
        }
        assert_eq!(maps.0.len(), MOST_MAPS + 1);
        let busiest = maps.busiest(&names);
        let devices: Vec<&str> = busiest.iter().map(|map| &map.device[..]).collect();
        assert_eq!(devices, ["15", "14", "13", "12", "11", "10", "9", "8"]);
        let all: u64 = (0..5000).map(|device| device % 16 + 1).sum();
        assert_eq!(u64::from(maps.sum().row(0, 0)[0]), all);
        assert_eq!(busiest[0].heat.row(0, 0)[0], 16);
        assert!(maps.busiest(&names[..1]).is_empty());
    }
}
