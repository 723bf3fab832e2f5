//! Recorded block I/O, played through the pool engine.

mod control;
mod counts;
mod device;
mod event;
mod manifest;
mod player;
mod report;
mod run;
mod split;
mod trace;

pub use control::Control;
pub use counts::{InputCounts, Latencies, WorkCounts};
pub use device::DeviceModel;
pub use event::{Batch, ControlEvent, TraceIo, TraceNotes, TraceOp, TraceReader};
pub use manifest::{FLEET_SCHEMA, FleetPool, MANIFEST, Manifest, Volume, shard};
pub use player::{Mark, PlayOptions, Player, Sample};
pub use report::{Latency, Map, Report, SCHEMA, Setup, Space, bytes, seconds};
pub use run::{SnapshotSchedule, play, side_events};
pub use split::split;
pub use trace::{CsvSpec, Format, open};
