//! Recorded block I/O, played through the pool engine.

mod books;
mod clock;
mod control;
mod counts;
mod device;
mod device_heat;
mod devices;
mod ends;
mod engine;
mod event;
mod expect;
mod fan;
mod heat;
mod latencies;
mod manifest;
mod player;
mod prefill;
mod report;
mod requests;
mod run;
mod split;
mod threads;
mod trace;
mod verify;

pub use books::{Mark, Sample};
pub use clock::Clock;
pub use control::Control;
pub use counts::{ByReason, InputCounts, Moments, WorkCounts};
pub use device::DeviceModel;
pub use device_heat::DeviceHeat;
pub use devices::PlayedDevice;
pub use event::{Batch, ControlEvent, TraceIo, TraceNotes, TraceOp, TraceReader};
pub use expect::{
    Compared, Difference, METADATA_TOLERANCE, MappedRun, Mappings, compare_mappings, compare_status,
};
pub use fan::{Fan, Share};
pub use heat::HeatMap;
pub use latencies::{Latencies, LatencyClasses};
pub use manifest::{FLEET_SCHEMA, FleetPool, MANIFEST, Manifest, Volume, shard};
pub use player::{PlayOptions, Player};
pub use prefill::{Prefill, Prefilled};
pub use report::{
    Contention, Fill, Forecast, Map, Metadata, NoForecast, Noticed, PlayedTrace, Report, SCHEMA,
    Setup, Space, Topic, Verdict, best_block_size, bytes, cell_pools, compare, csv, html, jsonl,
    merge, schemes, seconds, ways,
};
pub use run::{SnapshotSchedule, play, side_events};
pub use split::split;
pub use threads::play_on_threads;
pub use trace::{CsvSpec, Format, Window, open};
pub use verify::Verified;
