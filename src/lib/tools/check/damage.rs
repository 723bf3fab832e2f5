//! Everything that can be wrong with a pool's metadata: one table of codes, with how bad each is and what the kernel makes of it.
//!
//! Codes are stable: scripts may match on them. Facts about the kernel: `FORMAT.md`, "What the kernel does with damage".

use crate::tools::affected::Affected;
use crate::units::{MetadataBlock, ThinId};
use serde::{Serialize, Serializer};
use std::fmt;

/// How bad a damage is. The worst one decides thin_check's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing; nothing has to be done.
    Note,
    /// Blocks are counted as used that nothing uses: space is lost, nothing else. A crash of a healthy pool leaves such leaks.
    Leak,
    /// Wrong, and put right in place by `thin_check --auto-repair`.
    Repairable,
    /// Needs `thin_repair`, or help.
    Fatal,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Note => "note",
            Self::Leak => "leak",
            Self::Repairable => "repairable",
            Self::Fatal => "fatal",
        })
    }
}

/// What the kernel makes of a damage, the mildest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelEffect {
    /// It does not notice, and nothing comes of it.
    None,
    /// It reports or hands out the wrong amount of space.
    WrongSpace,
    /// A message to the pool fails.
    MessageFails,
    /// I/O to some devices fails.
    DevicesFail,
    /// The first allocation or release fails; the transaction is aborted and the pool goes read-only with needs_check.
    AllocationFails,
    /// It may hand out blocks that are in use, or write over shared ones: data is lost silently.
    Corrupts,
    /// It activates the pool read-only until the metadata device is extended.
    ActivatesFull,
    /// It activates the pool read-only, with needs_check.
    ActivatesReadOnly,
    /// It refuses to activate the pool.
    Refuses,
    /// It takes the device for a new one and formats it without a word.
    Formats,
}

macro_rules! codes {
    ($($(#[$attribute:meta])* $code:ident = ($name:literal, $severity:ident, $effect:ident, $meaning:literal);)*) => {
        /// A kind of damage.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $(#[doc = $meaning] $(#[$attribute])* $code,)*
        }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$code),*];

            const fn row(self) -> (&'static str, Severity, KernelEffect, &'static str) {
                match self {
                    $(Self::$code => ($name, Severity::$severity, KernelEffect::$effect, $meaning),)*
                }
            }
        }
    };
}

codes! {
    SuperblockZeroed = ("superblock-zeroed", Fatal, Formats, "block 0 is all zeros");
    SuperblockUnfinished = ("superblock-unfinished", Fatal, Refuses, "a restore or repair to this device did not finish");
    SuperblockSeal = ("superblock-checksum", Fatal, Refuses, "block 0 has a wrong checksum, or is no superblock");
    SuperblockLocation = ("superblock-location", Fatal, Refuses, "block 0 says that it is another block");
    SuperblockMagic = ("superblock-magic", Fatal, Refuses, "the checksum is right but this is no thin metadata");
    SuperblockIncompat = ("superblock-incompat", Fatal, Refuses, "unknown incompatible feature bits");
    SuperblockCompatRo = ("superblock-compat-ro", Fatal, Refuses, "unknown feature bits that forbid writing");
    SuperblockBlockSize = ("superblock-data-block-size", Fatal, Refuses, "a data block size that no table can have");
    SuperblockTime = ("superblock-time", Fatal, Corrupts, "the snapshot clock is past 24 bits");
    SuperblockLastTime = ("superblock-last-time", Note, Corrupts, "the snapshot clock is at its last value: the next snapshot overflows it");
    SuperblockRoot = ("superblock-root", Fatal, DevicesFail, "a root that points nowhere");
    SuperblockIndexRoot = ("superblock-index-root", Fatal, Refuses, "the metadata space map's index points nowhere");
    SuperblockOdd = ("superblock-odd-field", Note, None, "a field that the kernel never writes so and does not look at");
    DeviceTooSmall = ("device-too-small", Fatal, Refuses, "the device is smaller than its metadata, or than the format allows");
    NeedsCheck = ("needs-check", Note, ActivatesReadOnly, "a transaction was aborted; the flag asks for this check");
    MetadataFull = ("metadata-full", Note, ActivatesFull, "no metadata block is free beyond the kernel's reserve");
    ReadError = ("read-error", Fatal, DevicesFail, "a block cannot be read");
    NodeZeroed = ("node-zeroed", Fatal, DevicesFail, "zeros where a node of a tree should be");
    NodeChecksum = ("node-checksum", Fatal, DevicesFail, "a node with a wrong checksum");
    NodeWrongKind = ("node-wrong-kind", Fatal, DevicesFail, "another kind of block where a node should be");
    NodeLocation = ("node-location", Fatal, DevicesFail, "a node that was written for another place, or is a stale copy");
    NodeHeader = ("node-header", Fatal, DevicesFail, "impossible flags, sizes or counts in a node");
    NodeKeyOrder = ("node-key-order", Fatal, DevicesFail, "keys of a node that do not ascend, or stand twice");
    NodePointer = ("node-pointer", Fatal, DevicesFail, "a node that points past the end of the metadata");
    NodeUsedTwice = ("node-used-twice", Fatal, Corrupts, "a block that is part of two different trees");
    TreeKeyRange = ("tree-key-range", Fatal, DevicesFail, "keys outside of the range that the parent gives");
    TreeDepth = ("tree-depth", Fatal, DevicesFail, "leaves at different depths");
    TreeCycle = ("tree-cycle", Fatal, DevicesFail, "a node that is its own ancestor");
    TreeEmptyLeaf = ("tree-empty-leaf", Fatal, DevicesFail, "an empty leaf in a tree that is not empty");
    TreeUnderFull = ("tree-under-full", Note, None, "a node with fewer entries than usual; old kernels left such nodes");
    DeviceNoDetails = ("device-without-details", Fatal, DevicesFail, "a device with mappings but no details");
    DeviceNoMappings = ("device-without-mappings", Fatal, DevicesFail, "a device with details but no mapping tree");
    DeviceMappedBlocks = ("device-mapped-blocks", Fatal, None, "a device's count of mapped blocks is not what is mapped");
    DeviceOdd = ("device-odd-field", Note, None, "an id, time or transaction id of a device that the pool cannot have given it");
    MappingPastEnd = ("mapping-past-end", Fatal, DevicesFail, "a mapping to a data block that does not exist");
    MappingTime = ("mapping-time", Repairable, Corrupts, "mappings later than the snapshot clock: a new snapshot would not be kept apart");
    SnapshotBlock = ("snapshot-block", Fatal, MessageFails, "the metadata snapshot's block is no superblock");
    SnapshotFields = ("snapshot-fields", Fatal, MessageFails, "the metadata snapshot's superblock has fields that it must not have");
    IndexBlock = ("index-block", Fatal, Refuses, "the metadata space map's index block is damaged");
    IndexEntries = ("index-entries", Fatal, AllocationFails, "a space map without the bitmaps that it needs");
    BitmapBlock = ("bitmap-block", Fatal, AllocationFails, "a bitmap of a space map is damaged");
    BitmapTail = ("bitmap-tail", Repairable, WrongSpace, "counts past the end of the device");
    CountTree = ("count-tree", Fatal, Corrupts, "the tree of counts of 3 and more does not match the bitmaps");
    DataLeak = ("data-leak", Leak, WrongSpace, "data blocks counted more often than they are mapped");
    MetadataLeak = ("metadata-leak", Leak, WrongSpace, "metadata blocks counted more often than they are used");
    DataCountLow = ("data-count-low", Fatal, Corrupts, "data blocks counted less often than they are mapped");
    MetadataCountLow = ("metadata-count-low", Fatal, Corrupts, "metadata blocks counted less often than they are used");
    IndexFreeCount = ("index-free-count", Repairable, WrongSpace, "a bitmap's number of free entries is wrong in the index");
    IndexFreeHint = ("index-free-hint", Repairable, WrongSpace, "the index says that no entry is free before one, and one is");
    SpaceMapAllocated = ("space-map-allocated", Repairable, WrongSpace, "the superblock's number of blocks in use is wrong");
    CountsNotCompared = ("counts-not-compared", Note, None, "reference counts could not be compared, because what refers to blocks is damaged or was not read");
}

impl Code {
    /// The name that is printed.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// How bad it is.
    pub const fn severity(self) -> Severity {
        self.row().1
    }

    /// What the kernel makes of it.
    pub const fn effect(self) -> KernelEffect {
        self.row().2
    }

    /// What it means, in a few words.
    pub const fn meaning(self) -> &'static str {
        self.row().3
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Damage {
    /// What kind of damage.
    pub code: Code,
    /// How bad it is.
    pub severity: Severity,
    /// What the kernel makes of it.
    pub effect: KernelEffect,
    /// The metadata block at fault.
    pub block: MetadataBlock,
    /// The device at fault, if it is one device's own record.
    pub device: Option<ThinId>,
    /// What is out of reach because of it.
    pub affected: Vec<Affected>,
    /// There is more out of reach than is listed.
    pub more_affected: bool,
    /// The values at fault.
    pub message: String,
}

impl Damage {
    /// A damage in `block`.
    pub(super) fn new(code: Code, block: MetadataBlock, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: code.severity(),
            effect: code.effect(),
            block,
            device: None,
            affected: Vec::new(),
            more_affected: false,
            message: message.into(),
        }
    }

    /// The same with another effect than the code usually has.
    pub(super) fn with_effect(self, effect: KernelEffect) -> Self {
        Self { effect, ..self }
    }

    /// The same, worse or milder than the code usually is.
    pub(super) fn with_severity(self, severity: Severity) -> Self {
        Self { severity, ..self }
    }

    /// The same, said of one device.
    pub(super) fn of_device(self, device: u64) -> Self {
        Self {
            device: Some(ThinId(device)),
            ..self
        }
    }
}

/// Ranges that a line of text lists; JSON has them all.
const SHOWN: usize = 4;

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}: block {}: ",
            self.severity,
            self.code.name(),
            self.block
        )?;
        if let Some(device) = self.device {
            write!(f, "device {device}: ")?;
        }
        f.write_str(&self.message)?;
        for (i, affected) in self.affected.iter().take(SHOWN).enumerate() {
            f.write_str(if i == 0 { "; affects " } else { ", " })?;
            affected.fmt(f)?;
        }
        if self.more_affected {
            f.write_str(", and more")?;
        } else if self.affected.len() > SHOWN {
            write!(f, ", and {} more", self.affected.len() - SHOWN)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_plain() {
        let names: std::collections::HashSet<_> = Code::ALL.iter().map(|c| c.name()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        assert!(
            names
                .iter()
                .all(|n| n.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'))
        );
    }

    #[test]
    fn a_line_has_all_there_is_to_know() {
        let mut damage = Damage::new(
            Code::NodeChecksum,
            MetadataBlock(412),
            "mapping tree: broken",
        );
        damage.affected = (0..6)
            .map(|i| Affected {
                device: Some(ThinId(i)),
                begin: 10,
                end: (i < 5).then_some(20),
            })
            .collect();
        assert_eq!(
            damage.to_string(),
            "fatal node-checksum: block 412: mapping tree: broken; affects device 0 blocks 10..20, \
             device 1 blocks 10..20, device 2 blocks 10..20, device 3 blocks 10..20, and 2 more"
        );
    }
}
