//! Exit statuses: one enum, and the table that documents it in help and manual pages.

use std::process::ExitCode;

/// How a command ended, as reported to the calling process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The command did what was asked and has nothing to object to.
    Ok,
    /// The system got in the way: an open, read or write failed, or a device is in use.
    Failure,
    /// The command line is wrong; nothing was opened.
    Usage,
    /// The only damage is leaked blocks.
    Leaks,
    /// There is damage, but the tools deal with it.
    Repairable,
    /// The input cannot be used: damaged too far, or not what it should be.
    Fatal,
    /// The result is not the one that was expected.
    Unexpected,
    /// A signal ended the command early.
    Interrupted,
    /// The status of a command that was run.
    Command(u8),
}

impl Exit {
    /// The number the calling process sees.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::Leaks => 3,
            Self::Repairable => 4,
            Self::Fatal => 5,
            Self::Unexpected => 6,
            Self::Interrupted => 130,
            Self::Command(status) => status,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Every exit status with its meaning, in ascending order, the same for all commands.
pub(crate) const TABLE: &[(Exit, &str)] = &[
    (
        Exit::Ok,
        "Success. thin_check: no damage, or all of it was corrected or ignored as asked. Other \
         commands: the output is complete.",
    ),
    (
        Exit::Failure,
        "I/O or system error: something cannot be opened, read or written, or is in use; or what \
         was asked for is not there (a device, a metadata snapshot) or makes no sense (an output \
         that is the input). thin_ctl: the kernel, too, would answer the message with an error.",
    ),
    (
        Exit::Usage,
        "The command line is wrong. No device or file was opened.",
    ),
    (
        Exit::Leaks,
        "thin_check: the only damage is leaked blocks. They waste space but endanger no data; \
         --auto-repair frees them.",
    ),
    (
        Exit::Repairable,
        "thin_check: there is damage, all of it of the kind --auto-repair corrects; or a \
         needs_check flag was to be cleared after an incomplete check. thin_repair and thin_dump \
         --repair: the output was written, but some metadata could not be recovered or had to be \
         guessed.",
    ),
    (
        Exit::Fatal,
        "The metadata is damaged beyond repair in place (thin_ctl: damaged in any way but leaks), \
         the input is not thin metadata, or the XML is not valid.",
    ),
    (
        Exit::Unexpected,
        "thin_replay: the replay was complete, but what --expect says of its marks is not so, \
         or --verify found something else than what was written.",
    ),
    (
        Exit::Interrupted,
        "Interrupted by a signal before the work was complete.",
    ),
];

/// Width to which the table is filled in `--help`.
const HELP_WIDTH: usize = 78;

/// Column at which the meanings start in `--help`.
const HELP_INDENT: usize = 7;

/// The table as plain text, for the end of `--help`.
pub(crate) fn help_text() -> String {
    let mut text = String::from("Exit status:");
    for (exit, meaning) in TABLE {
        text.push_str(&format!("\n  {:<3}", exit.code()));
        let mut column = 5;
        for word in meaning.split_whitespace() {
            let width = word.chars().count();
            if column > HELP_INDENT && column + 1 + width > HELP_WIDTH {
                text.push('\n');
                column = 0;
            }
            let gap = if column <= HELP_INDENT {
                HELP_INDENT - column
            } else {
                1
            };
            text.push_str(&" ".repeat(gap));
            text.push_str(word);
            column += gap + width;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table names every status once, in ascending order.
    #[test]
    fn table_is_ascending() {
        assert!(TABLE.is_sorted_by(|a, b| a.0.code() < b.0.code()));
        assert_eq!(TABLE.len(), 8);
    }

    /// No line of the help text is wider than an 80 column terminal.
    #[test]
    fn help_fits() {
        let text = help_text();
        assert!(text.lines().all(|line| line.len() <= HELP_WIDTH));
    }
}
