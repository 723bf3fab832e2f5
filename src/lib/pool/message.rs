//! The messages of dmsetup to a pool.

use crate::error::{Error, ErrorKind};
use crate::thin::PoolMetadata;
use crate::units::{MAX_THIN_ID, ThinId};
use std::str::FromStr;

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// `create_thin ID`
    CreateThin(ThinId),
    /// `create_snap ID ORIGIN`
    CreateSnap {
        /// The new device.
        id: ThinId,
        /// Of which it is a snapshot.
        origin: ThinId,
    },
    /// `delete ID`
    Delete(ThinId),
    /// `set_transaction_id OLD NEW`
    SetTransactionId {
        /// What it has to be.
        old: u64,
        /// What it becomes.
        new: u64,
    },
    /// `reserve_metadata_snap`
    ReserveMetadataSnap,
    /// `release_metadata_snap`
    ReleaseMetadataSnap,
}

pub(super) fn refused(message: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

pub(super) fn number(word: &str) -> Result<u64, Error> {
    word.parse()
        .map_err(|_| refused(format!("{word:?} is not a number of 64 bits")))
}

fn id(word: &str) -> Result<ThinId, Error> {
    match number(word)? {
        id if id <= MAX_THIN_ID => Ok(ThinId(id)),
        id => Err(refused(format!(
            "device id {id} is past the last, {MAX_THIN_ID}"
        ))),
    }
}

impl Message {
    /// Does what it says. Only the commit that follows makes it last.
    ///
    /// # Errors
    /// Those of the method of [`PoolMetadata`] that it names.
    pub fn apply(self, pool: &mut PoolMetadata) -> crate::Result<()> {
        match self {
            Self::CreateThin(id) => pool.create_thin(id),
            Self::CreateSnap { id, origin } => pool.create_snap(id, origin),
            Self::Delete(id) => pool.delete_device(id),
            Self::SetTransactionId { old, new } => pool.set_transaction_id(old, new),
            Self::ReserveMetadataSnap => pool.reserve_metadata_snap().map(drop),
            Self::ReleaseMetadataSnap => pool.release_metadata_snap(),
        }
    }
}

/// As the kernel reads it: the words in any case, their number exactly right.
impl FromStr for Message {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let name = words.first().map(|w| w.to_ascii_lowercase());
        Ok(match (name.as_deref(), &words[words.len().min(1)..]) {
            (Some("create_thin"), [new]) => Self::CreateThin(id(new)?),
            (Some("create_snap"), [new, origin]) => Self::CreateSnap {
                id: id(new)?,
                origin: id(origin)?,
            },
            (Some("delete"), [old]) => Self::Delete(id(old)?),
            (Some("set_transaction_id"), [old, new]) => Self::SetTransactionId {
                old: number(old)?,
                new: number(new)?,
            },
            (Some("reserve_metadata_snap"), []) => Self::ReserveMetadataSnap,
            (Some("release_metadata_snap"), []) => Self::ReleaseMetadataSnap,
            _ => {
                return Err(refused(format!(
                    "{text:?} is no message to a pool: create_thin ID, create_snap ID ORIGIN, delete ID, \
                     set_transaction_id OLD NEW, reserve_metadata_snap and release_metadata_snap are"
                )));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_at_their_edges() {
        for (text, expected) in [
            ("create_thin 0", Message::CreateThin(ThinId(0))),
            (
                "CREATE_THIN 16777215",
                Message::CreateThin(ThinId(16_777_215)),
            ),
            (
                "create_snap 1 0",
                Message::CreateSnap {
                    id: ThinId(1),
                    origin: ThinId(0),
                },
            ),
            ("delete 7", Message::Delete(ThinId(7))),
            (
                "set_transaction_id 0 18446744073709551615",
                Message::SetTransactionId {
                    old: 0,
                    new: u64::MAX,
                },
            ),
            ("reserve_metadata_snap", Message::ReserveMetadataSnap),
        ] {
            assert_eq!(text.parse::<Message>().unwrap(), expected, "{text}");
        }
        for bad in [
            "",
            "create_thin",
            "create_thin 16777216",
            "create_thin -1",
            "create_thin x",
            "create_thin 1 2",
            "create_snap 1",
            "delete",
            "set_transaction_id 1",
            "set_transaction_id 0 18446744073709551616",
            "reserve_metadata_snap 1",
            "shrink",
        ] {
            let refusal = bad.parse::<Message>().unwrap_err();
            assert_eq!(refusal.kind(), ErrorKind::InvalidArgument, "{bad}");
        }
    }
}
