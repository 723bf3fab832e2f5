//! What is told of deleted devices, and asked for.

use crate::tools::affected::Affected;
use crate::tools::repair::Recovery;
use crate::units::{MetadataBlock, ThinId};
use serde::Serialize;
use std::fmt;

/// What became of a deleted device's mappings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Remains {
    /// Mappings whose data blocks nobody maps now. What they hold is not known: they may have been discarded, or used and
    /// freed again.
    pub free: u64,
    /// Mappings that the device shares with a current one, as snapshots do: their data blocks were never freed.
    pub shared: u64,
    /// Mappings whose data blocks others have by now: lost.
    pub reused: u64,
    /// Mappings in leaves that may have been written after the device was deleted: not to be believed.
    pub doubtful: u64,
}

impl Remains {
    /// Mappings that can be brought back.
    pub fn kept(&self) -> u64 {
        self.free + self.shared
    }

    /// Mappings that cannot.
    pub fn left_out(&self) -> u64 {
        self.reused + self.doubtful
    }

    pub(super) fn add(&mut self, other: Self) {
        self.free += other.free;
        self.shared += other.shared;
        self.reused += other.reused;
        self.doubtful += other.doubtful;
    }
}

/// A device that an older state of the pool has, and the current one has not.
#[derive(Clone, Debug, Serialize)]
pub struct DeletedDevice {
    /// Its id.
    pub dev_id: ThinId,
    /// The pool's transaction id when it was created.
    pub transaction: u64,
    /// The snapshot clock when it was created.
    pub creation_time: u32,
    /// Root of the top-level tree of the state that it is told of: the latest in which it is whole.
    pub mapping_root: MetadataBlock,
    /// Its mappings in that state.
    pub mapped_blocks: u64,
    /// All of its tree is left.
    pub is_whole: bool,
    /// No later version of it is known, be it whole or overwritten.
    pub is_latest: bool,
    /// The last virtual block that is mapped, and one; 0 if none is or the tree is not whole.
    pub end: u64,
    /// What became of its mappings; none if the tree is not whole.
    pub remains: Option<Remains>,
    /// Another device has its id now.
    pub id_is_taken: bool,
    /// Roots of the top-level trees of states with other versions of it that are whole, the latest first.
    pub other_versions: Vec<MetadataBlock>,
}

impl fmt::Display for DeletedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "device {}: {} mapped blocks, created at transaction {}, time {}; in the state of mapping root {}",
            self.dev_id,
            self.mapped_blocks,
            self.transaction,
            self.creation_time,
            self.mapping_root
        )?;
        match self.remains {
            None => f.write_str("; part of its tree is overwritten, it cannot be brought back")?,
            Some(remains) => write!(
                f,
                "; {} shared with current devices, {} in free data blocks, {} reused by others, {} doubtful",
                remains.shared, remains.free, remains.reused, remains.doubtful
            )?,
        }
        if !self.is_latest {
            f.write_str("; a later version of it existed")?;
        }
        if self.id_is_taken {
            f.write_str("; another device has its id")?;
        }
        for (i, root) in self.other_versions.iter().enumerate() {
            let before = if i == 0 { "; other versions: " } else { ", " };
            write!(f, "{before}{root}")?;
        }
        Ok(())
    }
}

/// Deleted devices that are left in older states.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DeletedList {
    /// The devices, ascending by id, those of one id the latest first.
    pub devices: Vec<DeletedDevice>,
    /// How many more there are.
    pub more_devices: usize,
    /// Older versions of devices that still exist.
    pub older_versions: usize,
}

/// Which device to bring back, and as which.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Its id.
    pub dev_id: ThinId,
    /// The id to give it; none for its own.
    pub new_id: Option<ThinId>,
    /// Root of the top-level tree of the state to take it from; none for the latest in which it is whole.
    pub from: Option<MetadataBlock>,
}

/// The current state with a device brought back.
#[derive(Debug)]
pub struct Undeleted<'a> {
    /// The pool, to be told to a restorer.
    pub recovery: Recovery<'a>,
    /// The device as it was found.
    pub device: DeletedDevice,
    /// The id that it has now.
    pub new_id: ThinId,
    /// Ranges of virtual blocks whose mappings are left out, in whole or in part.
    pub left_out: Vec<Affected>,
}
