//! The log of what dmsetup and the other programs did, and printed.

use thintools::ErrorKind;

/// A command of commands.log, and what it printed.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) text: String,
    pub(crate) output: Vec<String>,
}

impl Command {
    /// All of a log.
    pub(crate) fn read(log: &str) -> Vec<Self> {
        let mut commands: Vec<Self> = Vec::new();
        for line in log.lines() {
            match (line.strip_prefix("$ "), commands.last_mut()) {
                (Some(text), _) => commands.push(Self {
                    text: text.to_owned(),
                    output: Vec::new(),
                }),
                (None, Some(command)) => command.output.push(line.trim_start().to_owned()),
                (None, None) => {}
            }
        }
        commands
    }

    /// What stands between quotes.
    fn quoted(&self) -> Option<&str> {
        self.text.split('\'').nth(1)
    }

    /// A table: on the command line, or in a file whose lines the log has.
    pub(super) fn table(&self) -> String {
        let of_file = || {
            let lines = self.output.iter().map(String::as_str);
            lines
                .collect::<Vec<_>>()
                .join("\n")
                .replacen("# reload table was: ", "", 1)
        };
        self.quoted().map_or_else(of_file, str::to_owned)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.output.iter().any(|line| line.starts_with("[exit"))
    }

    /// Fails unless the engine refused what the kernel refused, with the same error.
    pub(super) fn expect<T>(&self, result: thintools::Result<T>) -> Option<T> {
        let said = match &result {
            Ok(_) => "",
            Err(e) => match e.kind() {
                ErrorKind::NotFound => "No data available",
                ErrorKind::ReadOnly => "Operation not supported",
                ErrorKind::InvalidArgument => "Invalid argument",
                kind => panic!("{}: {kind:?}: {e}", self.text),
            },
        };
        let printed = match self.has_failed() {
            true => self.output[0].as_str(),
            false => "",
        };
        assert!(
            printed.ends_with(said) && printed.is_empty() == said.is_empty(),
            "{}: {said:?}, and {printed:?} from the kernel",
            self.text
        );
        result.ok()
    }
}
