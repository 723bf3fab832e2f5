//! Metadata block I/O: engines, opening them safely, and reading many blocks at once.

mod buffer;
mod compressed;
mod engine;
mod file;
mod open;
mod overlay;
mod ram;
mod staged;
mod sweep;

pub use buffer::AlignedBuffer;
pub(crate) use compressed::is_compressed;
pub use engine::BlockEngine;
pub use file::FileEngine;
pub use open::{
    Access, FileId, file_id, make_empty_folder, open_output, open_pool, open_read, open_write,
    remove_temporary_files, write_new, write_new_private, write_replacing,
};
pub use overlay::OverlayEngine;
pub use ram::RamEngine;
pub use staged::StagedEngine;
pub use sweep::sweep;
