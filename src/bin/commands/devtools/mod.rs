//! Commands for those who develop repairs; only with the feature `devtools`, and not in the manual.

mod compare_mappings;
mod generate_damage;
mod generate_metadata;
mod output;

use super::{Spec, parsed};

/// These commands, in the order in which they are listed.
pub(crate) static COMMANDS: &[Spec] = &[
    Spec {
        name: generate_metadata::NAME,
        short: "generate-metadata",
        title: generate_metadata::TITLE,
        hidden: false,
        page: None,
        build: generate_metadata::build,
        run: |m| parsed(m, generate_metadata::run),
    },
    Spec {
        name: generate_damage::NAME,
        short: "generate-damage",
        title: generate_damage::TITLE,
        hidden: false,
        page: None,
        build: generate_damage::build,
        run: |m| parsed(m, generate_damage::run),
    },
    Spec {
        name: compare_mappings::NAME,
        short: "compare-mappings",
        title: compare_mappings::TITLE,
        hidden: false,
        page: None,
        build: compare_mappings::build,
        run: |m| parsed(m, compare_mappings::run),
    },
];
