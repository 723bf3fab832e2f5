//! What the kernel would do with a pool, and what to run next.

use super::damage::{Code, Damage, KernelEffect, Severity};
use serde::Serialize;

/// How the kernel would answer to an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// The pool comes up read-write.
    ReadWrite,
    /// It comes up read-only, for want of free metadata blocks.
    ReadOnlyFull,
    /// It comes up read-only, with needs_check.
    ReadOnlyNeedsCheck,
    /// It does not come up.
    Refused,
    /// The device is formatted as a new, empty pool, silently.
    FormattedAnew,
}

/// The sum of a check.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The worst damage; none when there is not even a note.
    pub severity: Option<Severity>,
    /// What happens at activation.
    pub activation: Activation,
    /// What happens at activation and afterwards, in words.
    pub kernel: String,
    /// What to do, in words; empty when nothing needs doing.
    pub next: String,
}

impl Verdict {
    pub(super) fn of(damages: &[Damage]) -> Self {
        let severity = damages.iter().map(|d| d.severity).max();
        let has = |effect| damages.iter().any(|d| d.effect == effect);
        let activation = if has(KernelEffect::Formats) {
            Activation::FormattedAnew
        } else if has(KernelEffect::Refuses) {
            Activation::Refused
        } else if has(KernelEffect::ActivatesReadOnly) {
            Activation::ReadOnlyNeedsCheck
        } else if has(KernelEffect::ActivatesFull) {
            Activation::ReadOnlyFull
        } else {
            Activation::ReadWrite
        };
        let mut kernel = String::from(match activation {
            Activation::FormattedAnew => {
                "it would format this device as a new, empty pool without a word: do not activate it"
            }
            Activation::Refused => "it would refuse to activate this pool",
            Activation::ReadOnlyNeedsCheck => {
                "it would activate this pool read-only, with needs_check"
            }
            Activation::ReadOnlyFull => {
                "it would activate this pool read-only until its metadata device is extended"
            }
            Activation::ReadWrite => "it would activate this pool read-write",
        });
        if matches!(
            activation,
            Activation::ReadWrite | Activation::ReadOnlyNeedsCheck
        ) {
            let later = [
                (
                    KernelEffect::Corrupts,
                    "may then write over data that is in use",
                ),
                (
                    KernelEffect::AllocationFails,
                    "would go read-only with needs_check at the first allocation",
                ),
                (
                    KernelEffect::DevicesFail,
                    "would fail I/O to the devices named above",
                ),
                (
                    KernelEffect::MessageFails,
                    "would fail to release the metadata snapshot",
                ),
                (
                    KernelEffect::WrongSpace,
                    "would report or find less space than there is",
                ),
            ];
            for (_, what) in later.iter().filter(|(effect, _)| has(*effect)) {
                kernel.push_str("; it ");
                kernel.push_str(what);
            }
        }
        Self {
            severity,
            activation,
            kernel,
            next: next_step(severity, damages).to_owned(),
        }
    }
}

fn next_step(severity: Option<Severity>, damages: &[Damage]) -> &'static str {
    let has = |code| damages.iter().any(|d| d.code == code);
    match severity {
        _ if has(Code::ReadError) => {
            "copy the metadata to a healthy device first (ddrescue), then check the copy"
        }
        _ if has(Code::DeviceTooSmall) => {
            "give the metadata device its full size back; if that is not possible, thin_repair -i DEV -o NEWDEV"
        }
        _ if has(Code::SuperblockUnfinished) => {
            "run the thin_restore or thin_repair that was to fill this device again"
        }
        Some(Severity::Fatal) => {
            "deactivate the pool and run thin_repair -i DEV -o NEWDEV, then thin_check NEWDEV"
        }
        Some(Severity::Repairable) => "run thin_check --auto-repair DEV",
        Some(Severity::Leak) => {
            "nothing is at risk, a crash of a healthy pool leaves such leaks; thin_check --auto-repair DEV frees the blocks"
        }
        _ if has(Code::MetadataFull) => "extend the metadata device (lvextend --poolmetadatasize)",
        _ if has(Code::NeedsCheck) => "run thin_check --clear-needs-check-flag DEV",
        _ if has(Code::SuperblockLastTime) => {
            "take no more snapshots; dump and restore cannot lower the clock, copy the data to a new pool"
        }
        _ => "",
    }
}
