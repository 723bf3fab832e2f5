//! Persistent data as the kernel's persistent-data library lays it out: btree nodes, space maps, walks and bulk builds.

mod build;
mod counts;
mod fold;
mod forest;
mod node;
mod space_map;
mod space_map_build;
pub mod txn;
mod writer;

pub use build::{BlockSink, BuiltTree, SharedTree, TreeBuilder, Value, inner_node};
pub use counts::{CountBatch, CountMap};
pub use fold::{Structure, StructureFault, Summary};
pub use forest::{Edge, Forest, Leaves, NodeInfo, NodeProblem, Shape, TreeKind, Walk};
pub use node::{NODE_HEADER, Node, NodeFault, max_entries};
pub(crate) use space_map::BITMAP_HEADER;
pub use space_map::{
    BITMAP_BYTES, Bitmap, Difference, INDEX_ENTRY_SIZE, IndexEntry, OverflowEntry, ROOT_SIZE,
    SpaceMapRoot, nr_bitmaps,
};
pub use space_map_build::{build_data_map, build_metadata_map};
pub use writer::MetadataWriter;
