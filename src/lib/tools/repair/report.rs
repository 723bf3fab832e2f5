//! What a repair chose, on which evidence, and what it could not get back.

use super::attribute::Evidence;
use super::mend::Mend;
use crate::tools::affected::Affected;
use crate::units::{MetadataBlock, ThinId};
use serde::Serialize;
use std::fmt;

/// A pair of roots that a repair found on the device.
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
    /// Mappings in whole trees, shared ones once for each device.
    pub mappings: u64,
    /// Latest time of any device's details.
    pub time: u32,
    /// Latest transaction id of any device's details.
    pub transaction_id: u64,
    /// Whether a readable space map has all blocks of both trees in use; none when there is no readable space map.
    pub in_use: Option<bool>,
    /// The index block of the space map that has.
    pub space_map: Option<MetadataBlock>,
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
            ": {} devices, {} of them whole, {} mappings, time {}, transaction {}, ",
            self.devices, self.whole_devices, self.mappings, self.time, self.transaction_id
        )?;
        match (self.in_use, self.space_map) {
            (_, Some(index)) => write!(f, "in use by the space map of index block {index}"),
            (Some(_), None) => f.write_str("no readable space map has all of it in use"),
            (None, None) => f.write_str("no space map is readable"),
        }
    }
}

/// Mappings that may belong to a device, or to others.
#[derive(Clone, Debug, Serialize)]
pub struct Ambiguous {
    /// The subtree that holds them.
    pub block: MetadataBlock,
    /// First virtual block.
    pub begin: u64,
    /// Last virtual block and one.
    pub end: u64,
    /// How many mappings.
    pub mappings: u64,
    /// The devices that it may belong to.
    pub devices: Vec<ThinId>,
}

impl fmt::Display for Ambiguous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} mappings of blocks {}..{} in block {} ",
            self.mappings, self.begin, self.end, self.block
        )?;
        f.write_str(match &self.devices[..] {
            [] => "fit no device that is left",
            _ => "may belong to device",
        })?;
        for (i, device) in self.devices.iter().enumerate() {
            write!(f, "{} {device}", if i > 0 { " or" } else { "" })?;
        }
        Ok(())
    }
}

/// A subtree that nothing on the device led to any more, with the place that was found for it.
#[derive(Clone, Debug, Serialize)]
pub struct Reattached {
    /// The subtree's root.
    pub block: MetadataBlock,
    /// First virtual block; none if it is empty.
    pub begin: Option<u64>,
    /// Mappings in it.
    pub mappings: u64,
    /// Why it belongs here.
    pub evidence: Evidence,
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
    /// Subtrees that were put back in their place.
    pub reattached: Vec<Reattached>,
    /// Virtual blocks whose mappings, if there were any, are lost.
    pub lost: Vec<Affected>,
    /// Virtual blocks whose mappings contradict the data space map, and are left out.
    pub contested: Vec<u64>,
}

impl RecoveredDevice {
    /// True if nothing of it is known to be missing.
    pub fn is_whole(&self) -> bool {
        self.lost.is_empty() && self.contested.is_empty() && self.expected == Some(self.mappings)
    }
}

/// A damaged block whose contents could be told.
#[derive(Clone, Debug, Serialize)]
pub struct Mended {
    /// The block.
    pub block: MetadataBlock,
    /// How.
    pub mend: Mend,
}

/// What a repair did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RepairReport {
    /// Root of the top-level tree that was used; none if it was rebuilt.
    pub mapping_root: Option<MetadataBlock>,
    /// Root of the details tree that was used; none if they were rebuilt.
    pub details_root: Option<MetadataBlock>,
    /// Why these roots.
    pub why: String,
    /// The pairs of roots on the device, the best first.
    pub candidates: Vec<Candidate>,
    /// How many more there were.
    pub more_candidates: usize,
    /// Damaged blocks whose contents could be told, the first thousand.
    pub mended: Vec<Mended>,
    /// Every device that was recovered.
    pub devices: Vec<RecoveredDevice>,
    /// Device ids that could not be read: ranges of the top-level tree that are damaged.
    pub lost_ids: Vec<Affected>,
    /// What is in use but could not be told to belong to one device.
    pub ambiguous: Vec<Ambiguous>,
    /// Everything that was guessed or left out, in words.
    pub notes: Vec<String>,
    /// False when something was guessed or is lost.
    pub is_complete: bool,
}
