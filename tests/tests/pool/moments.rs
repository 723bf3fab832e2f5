//! Labelled moments at which the kernel was asked for the status and the tables of its devices.

use super::player::Command;
use crate::support::testdata;

/// Where in the log a moment was.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Anchor {
    /// Behind the next command that ends with this.
    After(&'static str),
    /// While the I/O of the next command that ends with this waits.
    Waiting(&'static str),
    /// Before the pool and its devices are removed for the first time.
    End,
}

/// A moment of status.log.
pub(crate) struct Moment {
    pub(crate) label: String,
    /// The status lines of the pool and of its devices, in this order.
    pub(crate) status: Vec<String>,
    /// Their tables.
    pub(crate) tables: Vec<String>,
    /// The command that it is behind, or in.
    pub(crate) at: usize,
    pub(crate) is_waiting: bool,
}

/// The label that all but a few logs have last, and that [`Anchor::End`] is for.
pub(crate) const END: &str = "end, before removal";

/// The moments of a fixture. The log does not say where they were; `anchors` do, one for each label that is not [`END`].
pub(crate) fn moments(folder: &str, commands: &[Command], anchors: &[Anchor]) -> Vec<Moment> {
    let path = testdata().join(folder).join("status.log");
    let text = std::fs::read_to_string(path).expect("a status.log");
    let mut anchors = anchors.iter().copied();
    let mut from = 0;
    let moments = text.split("## ").skip(1).map(|part| {
        let (label, lines) = part.split_once('\n').expect("a label");
        let anchor = match label {
            END => Anchor::End,
            _ => anchors.next().expect("an anchor for each label"),
        };
        let at = match anchor {
            Anchor::End => end_of(commands),
            Anchor::After(text) | Anchor::Waiting(text) => {
                let mut later = commands[from..].iter();
                from + later
                    .position(|command| command.text.ends_with(text))
                    .unwrap_or_else(|| panic!("{anchor:?} is not there"))
            }
        };
        let is_waiting = matches!(anchor, Anchor::Waiting(_));
        from = at + usize::from(!is_waiting);
        let (status, tables) = lines.split_once("# table\n").expect("both");
        let ours = |text: &str| {
            let lines = text.lines().filter(|line| line.contains(" thin"));
            lines.map(str::to_owned).collect()
        };
        Moment {
            label: label.to_owned(),
            status: ours(status),
            tables: ours(tables),
            at,
            is_waiting,
        }
    });
    let moments = moments.collect();
    assert!(anchors.next().is_none(), "a label for each anchor");
    moments
}

fn end_of(commands: &[Command]) -> usize {
    let is_last = |command: &Command| command.text == "dmsetup remove pool";
    let removed = commands.iter().position(is_last);
    let mut at = removed.expect("the pool is removed");
    while commands[at].text.starts_with("dmsetup remove ") {
        at -= 1;
    }
    at
}
