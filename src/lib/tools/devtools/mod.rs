//! For those who develop repairs: metadata with a history, damage of every kind, and what a repair made of it.
//!
//! Only with the feature `devtools`. Nothing else in the library uses this folder.

mod compare;
mod damage;
mod generate;
mod inventory;
mod random;

pub use compare::{Comparison, WrongMapping, compare};
pub use damage::{Amount, Damage, Damaged, Spec, damage};
pub use generate::{Pattern, Recipe, generate};
pub use inventory::{Inventory, Kind, Target};
