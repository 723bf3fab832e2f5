//! Traces as other programs recorded them, a format in a file.

mod ahead;
mod biosnoop;
mod blkparse;
mod blktrace;
mod clock;
mod crew;
mod csv;
mod csv_spec;
mod decoder;
mod devices;
mod disksim;
mod dump;
pub(super) mod events;
mod expand;
mod format;
mod ftrace;
mod input;
mod iolog;
mod lines;
mod load;
mod log_writes;
mod merge;
mod open;
mod record;
mod records;
mod resort;
mod rwbs;
mod scan;
mod siblings;
mod spread;
mod vscsi;
mod window;

pub use csv_spec::CsvSpec;
pub use format::Format;
pub use open::open;
pub use window::Window;
