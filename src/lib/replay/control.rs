//! What happens to a pool beside I/O: the words of control events.

use crate::error::{Error, ErrorKind};
use crate::pool::Message;
use crate::units::ThinId;
use std::str::FromStr;

/// A control event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// A message to the pool.
    Message(Message),
    /// `activate MAJ:MIN ID SECTORS [ORIGIN_SECTORS]`: from here on the trace's device is this thin device. It may come before the
    /// message that makes it.
    Activate {
        /// Name of the trace's device.
        device: String,
        /// The thin device.
        id: ThinId,
        /// Its size.
        sectors: u64,
        /// Size of its external origin; none without one.
        origin_sectors: Option<u64>,
    },
    /// `deactivate MAJ:MIN`
    Deactivate {
        /// Name of the trace's device.
        device: String,
    },
    /// `resize SECTORS`: the data device has this size now.
    Resize {
        /// Sectors of 512 bytes.
        sectors: u64,
    },
    /// `suspend`
    Suspend,
    /// `resume`
    Resume,
    /// `phase-end NAME`: a mark at which the report says how things are.
    Mark(String),
    /// A message that every pool refuses, and why.
    Refused(String),
    /// Anything else.
    Unknown(String),
}

/// The words of messages, which the kernel takes in any case.
const MESSAGES: [&str; 6] = [
    "create_thin",
    "create_snap",
    "delete",
    "set_transaction_id",
    "reserve_metadata_snap",
    "release_metadata_snap",
];

fn refused(text: &str) -> Error {
    Error::new(
        ErrorKind::InvalidDescription,
        format!("the arguments of the control event {text:?} are wrong"),
    )
}

impl FromStr for Control {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let number = |word: &str| word.parse::<u64>().map_err(|_| refused(text));
        Ok(match words[..] {
            ["activate", device, id, sectors, ref origin @ ..] if origin.len() < 2 => {
                let origin = origin.first().map_or(Ok(0), |sectors| number(sectors))?;
                Self::Activate {
                    device: device.into(),
                    id: ThinId(number(id)?),
                    sectors: number(sectors)?,
                    origin_sectors: Some(origin).filter(|&sectors| sectors > 0),
                }
            }
            ["deactivate", device] => Self::Deactivate {
                device: device.into(),
            },
            ["resize", sectors] => Self::Resize {
                sectors: number(sectors)?,
            },
            ["suspend"] => Self::Suspend,
            ["resume"] => Self::Resume,
            ["phase-end", name] => Self::Mark(name.into()),
            [word, ..] if MESSAGES.contains(&&*word.to_ascii_lowercase()) => match text.parse() {
                Ok(message) => Self::Message(message),
                Err(e) => Self::Refused(e.to_string()),
            },
            ["activate" | "deactivate" | "resize" | "phase-end", ..] => return Err(refused(text)),
            _ => Self::Unknown(text.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood_or_kept() {
        let control = |text: &str| text.parse::<Control>();
        assert_eq!(
            control("activate 252:2 3 4096 0").unwrap(),
            Control::Activate {
                device: "252:2".into(),
                id: ThinId(3),
                sectors: 4096,
                origin_sectors: None
            }
        );
        assert_eq!(
            control("activate 252:2 3 4096").unwrap(),
            control("activate 252:2 3 4096 0").unwrap()
        );
        assert_eq!(control("DELETE 7").unwrap(), control("delete 7").unwrap());
        for bad in ["delete", "create_thin 16777216", "create_snap 1"] {
            assert!(matches!(control(bad), Ok(Control::Refused(_))), "{bad}");
        }
        assert_eq!(control("phase-end 1").unwrap(), Control::Mark("1".into()));
        assert!(matches!(control("delete 7"), Ok(Control::Message(_))));
        assert!(matches!(control("hello world"), Ok(Control::Unknown(_))));
        for bad in [
            "activate 252:2 x 1 0",
            "activate 252:2 1",
            "resize",
            "phase-end",
        ] {
            assert!(control(bad).is_err(), "{bad}");
        }
    }
}
