//! Names and inode numbers of the files: an export keeps its number while the server runs.

use crate::runtime::export::Exports;
use fuser::INodeNo;
use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The first number that is neither the root's nor nobody's.
const FIRST: u64 = 3;

/// Names that exports have, or had.
#[derive(Default)]
struct Names {
    by_number: BTreeMap<u64, String>,
    by_name: HashMap<String, u64>,
}

/// Inode numbers by name, and names by inode number.
#[derive(Default)]
pub(super) struct Directory(Mutex<Names>);

impl Directory {
    fn names(&self) -> MutexGuard<'_, Names> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of an inode.
    pub(super) fn name(&self, number: INodeNo) -> Option<String> {
        self.names().by_number.get(&number.0).cloned()
    }

    /// The number of an export that is there.
    pub(super) fn number(&self, name: &str) -> INodeNo {
        let mut names = self.names();
        let next = FIRST + names.by_number.len() as u64;
        let number = *names.by_name.entry(name.into()).or_insert(next);
        if number == next {
            names.by_number.insert(number, name.into());
        }
        INodeNo(number)
    }

    /// What is there now, in an order that stays when others come and go.
    pub(super) fn list(&self, exports: &dyn Exports) -> BTreeMap<u64, String> {
        let listed = exports.list().into_iter();
        listed
            .map(|(name, _)| (self.number(&name).0, name))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number() {
        let directory = Directory::default();
        let (a, b) = (directory.number("0"), directory.number("7"));
        assert_ne!(a, b);
        assert_eq!(directory.number("0"), a);
        assert_eq!(directory.name(b).as_deref(), Some("7"));
        assert_eq!(directory.name(INodeNo(1)), None);
    }
}
