//! Recorded block I/O, played through the pool engine.

mod control;
mod counts;
mod device;
mod event;
mod expect;
mod player;
mod prefill;
mod report;
mod run;
mod trace;

pub use control::Control;
pub use counts::{InputCounts, Latencies, WorkCounts};
pub use device::DeviceModel;
pub use event::{Batch, ControlEvent, TraceIo, TraceNotes, TraceOp, TraceReader};
pub use expect::{
    Compared, Difference, METADATA_TOLERANCE, MappedRun, Mappings, compare_mappings, compare_status,
};
pub use player::{Mark, PlayOptions, Player, Sample};
pub use prefill::{Prefill, Prefilled};
pub use report::{Latency, Map, Report, SCHEMA, Setup, Space, bytes, seconds};
pub use run::{SnapshotSchedule, play, side_events};
pub use trace::{CsvSpec, Format, open};
