//! What the commands do: options in, outcome out, nothing printed.

mod affected;
pub mod check;
#[cfg(feature = "devtools")]
pub mod devtools;
pub mod event;
mod metadata_source;
mod overrides;
pub mod repair;
mod restore;
mod restorer;
mod sharing;
pub mod text;
mod xml;

pub use affected::Affected;
pub use metadata_source::{MetadataSource, Selection, Trees, held_root};
pub use overrides::{Overridden, Overrides};
pub use restore::{Restored, restore};
pub use restorer::Restorer;
pub use text::TextSink;
pub use xml::XmlSource;
