//! Recorded block I/O, played through the pool engine.

mod control;
mod counts;
mod device;
mod event;
mod expect;
mod fan;
mod heat;
mod latencies;
mod manifest;
mod player;
mod prefill;
mod report;
mod run;
mod split;
mod trace;

pub use control::Control;
pub use counts::{ByReason, InputCounts, Moments, WorkCounts};
pub use device::DeviceModel;
pub use event::{Batch, ControlEvent, TraceIo, TraceNotes, TraceOp, TraceReader};
pub use expect::{
    Compared, Difference, METADATA_TOLERANCE, MappedRun, Mappings, compare_mappings, compare_status,
};
pub use fan::{Fan, Share};
pub use heat::HeatMap;
pub use latencies::{Latencies, LatencyClasses};
pub use manifest::{FLEET_SCHEMA, FleetPool, MANIFEST, Manifest, Volume, shard};
pub use player::{Mark, PlayOptions, Player, Sample};
pub use prefill::{Prefill, Prefilled};
pub use report::{
    Clock, Fill, Forecast, Map, Metadata, Noticed, Report, SCHEMA, Setup, Space, Topic, Verdict,
    best_block_size, bytes, compare, csv, html, jsonl, merge, seconds, ways,
};
pub use run::{SnapshotSchedule, play, side_events};
pub use split::split;
pub use trace::{CsvSpec, Format, Window, open};
