//! What a repair chose, on which evidence, and what it could not get back.

use crate::tools::affected::Affected;
use crate::units::{MetadataBlock, ThinId};
use serde::Serialize;
use std::fmt;

/// A pair of roots that a repair considered.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// Root of the top-level tree.
    pub mapping_root: MetadataBlock,
    /// Root of the details tree; none if there is no tree with the same devices.
    pub details_root: Option<MetadataBlock>,
    /// Devices in the top-level tree.
    pub devices: u64,
    /// Devices whose mapping tree is whole and has as many mappings as the details say.
    pub whole_devices: u64,
    /// Latest time of any device's details.
    pub time: u32,
    /// Latest transaction id of any device's details.
    pub transaction_id: u64,
    /// Whether a readable space map says that both roots are in use; none when there is no readable space map.
    pub in_use: Option<bool>,
    /// The index block of the space map that says so.
    pub space_map: Option<MetadataBlock>,
    /// The age of that space map among those with whole candidates, the oldest being 0.
    pub generation: Option<usize>,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mapping root {}, details root ", self.mapping_root)?;
        match self.details_root {
            Some(root) => write!(f, "{root}")?,
            None => f.write_str("none")?,
        }
        write!(
            f,
            ": {} devices, {} of them whole, time {}, transaction {}, ",
            self.devices, self.whole_devices, self.time, self.transaction_id
        )?;
        f.write_str(match self.in_use {
            Some(true) => "in use by a metadata space map",
            Some(false) => "freed in the metadata space map",
            None => "no readable space map says whether in use",
        })
    }
}

/// A device that was recovered, all or in part.
#[derive(Clone, Debug, Serialize)]
pub struct RecoveredDevice {
    /// Its id.
    pub dev_id: ThinId,
    /// Mappings that were recovered.
    pub mappings: u64,
    /// Mappings that its details say it had; none if the details are lost.
    pub expected: Option<u64>,
    /// Virtual blocks whose mappings, if there were any, are lost.
    pub lost: Vec<Affected>,
}

/// What a repair did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RepairReport {
    /// Root of the top-level tree that was used.
    pub mapping_root: MetadataBlock,
    /// Root of the details tree that was used; none if all details were made up from the mappings.
    pub details_root: Option<MetadataBlock>,
    /// Why these roots.
    pub why: String,
    /// Other roots that were considered, the best first.
    pub candidates: Vec<Candidate>,
    /// How many more there were.
    pub more_candidates: usize,
    /// Every device that was recovered.
    pub devices: Vec<RecoveredDevice>,
    /// Device ids that could not be read: ranges of the top-level tree that are damaged.
    pub lost_ids: Vec<Affected>,
    /// Everything that was guessed or left out, in words.
    pub notes: Vec<String>,
    /// False when something was guessed or is lost.
    pub is_complete: bool,
}
