//! What happens to a pool beside I/O: the words of control events.

use crate::pool::Message;
use crate::units::ThinId;

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
    /// `resize SECTORS`: the data device has this size; the pool uses it from the next resumption on.
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
    /// One whose arguments are wrong, so that every pool refuses it, and why.
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

/// All other events.
const FORMS: [&str; 6] = [
    "activate MAJ:MIN ID SECTORS [ORIGIN_SECTORS]",
    "deactivate MAJ:MIN",
    "resize SECTORS",
    "suspend",
    "resume",
    "phase-end NAME",
];

impl Control {
    /// What the words of an event ask for.
    pub fn of(text: &str) -> Self {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let number = |word: &str| word.parse::<u64>().ok();
        let found = match words[..] {
            ["activate", device, id, sectors, ref origin @ ..] if origin.len() < 2 => {
                let numbers = || {
                    let origin = origin.first().map_or(Some(0), |sectors| number(sectors))?;
                    Some((number(id)?, number(sectors)?, origin))
                };
                numbers().map(|(id, sectors, origin)| Self::Activate {
                    device: device.into(),
                    id: ThinId(id),
                    sectors,
                    origin_sectors: Some(origin).filter(|&sectors| sectors > 0),
                })
            }
            ["deactivate", device] => Some(Self::Deactivate {
                device: device.into(),
            }),
            ["resize", sectors] => number(sectors).map(|sectors| Self::Resize { sectors }),
            ["suspend"] => Some(Self::Suspend),
            ["resume"] => Some(Self::Resume),
            ["phase-end", name] => Some(Self::Mark(name.into())),
            [word, ..] if MESSAGES.contains(&&*word.to_ascii_lowercase()) => {
                Some(match text.parse() {
                    Ok(message) => Self::Message(message),
                    Err(e) => Self::Refused(e.to_string()),
                })
            }
            _ => None,
        };
        let first = words.first().copied().unwrap_or_default();
        let form = FORMS
            .iter()
            .find(|form| form.split(' ').next() == Some(first));
        match (found, form) {
            (Some(control), _) => control,
            (None, Some(form)) => Self::Refused(format!("its arguments are wrong; it is {form}")),
            (None, None) => Self::Unknown(text.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood_or_kept() {
        let control = Control::of;
        assert_eq!(
            control("activate 252:2 3 4096 0"),
            Control::Activate {
                device: "252:2".into(),
                id: ThinId(3),
                sectors: 4096,
                origin_sectors: None
            }
        );
        assert_eq!(
            control("activate 252:2 3 4096"),
            control("activate 252:2 3 4096 0")
        );
        assert_eq!(control("DELETE 7"), control("delete 7"));
        for bad in ["delete", "create_thin 16777216", "create_snap 1"] {
            assert!(matches!(control(bad), Control::Refused(_)), "{bad}");
        }
        assert_eq!(control("phase-end 1"), Control::Mark("1".into()));
        assert!(matches!(control("delete 7"), Control::Message(_)));
        assert!(matches!(control("hello world"), Control::Unknown(_)));
        for bad in [
            "activate 252:2 x 1 0",
            "activate 252:2 1",
            "resize",
            "phase-end",
            "phase-end a b",
            "suspend now",
        ] {
            assert!(
                matches!(control(bad), Control::Refused(why) if why.contains("it is ")),
                "{bad}"
            );
        }
    }
}
