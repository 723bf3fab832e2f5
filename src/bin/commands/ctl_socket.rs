//! `thin_ctl --socket`: asks a running pool.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};
use serde_json::Value;
use thintools::runtime::control::Request;

use super::ctl_top;
use crate::exit::Exit;
use crate::output;

/// Messages to a pool; everything else is the runtime's.
const MESSAGES: [&str; 6] = [
    "create_thin",
    "create_snap",
    "delete",
    "set_transaction_id",
    "reserve_metadata_snap",
    "release_metadata_snap",
];

/// Sends what `words` say to the pool behind `socket`, and prints what it answers.
pub(super) fn run(
    socket: &Path,
    words: &[String],
    sizes: (Option<u64>, Option<u64>),
) -> anyhow::Result<Exit> {
    if let [word] = words
        && word.eq_ignore_ascii_case("top")
    {
        return ctl_top::run(socket);
    }
    let request = request(words, sizes)?;
    let shown = socket.display();
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("cannot reach a pool at {shown}"))?;
    let line = serde_json::to_string(&request)?;
    writeln!(stream, "{line}").with_context(|| format!("cannot ask the pool at {shown}"))?;
    let is_endless = matches!(request, Request::Events { .. });
    for line in BufReader::new(stream).lines() {
        let line = line.with_context(|| format!("cannot hear the pool at {shown}"))?;
        let answer: Value = serde_json::from_str(&line)
            .with_context(|| format!("the pool at {shown} answered {line:?}"))?;
        if let Some(error) = answer.get("error") {
            let text = |member: &str| error[member].as_str().unwrap_or_default().to_owned();
            bail!(
                "{}: {}: {}",
                words.join(" "),
                text("errno"),
                text("message")
            );
        }
        let printed = match &answer["ok"] {
            Value::Null => Ok(()),
            Value::String(text) => output::stdout_line(text.trim_end_matches('\n')),
            other => output::stdout_line(&other.to_string()),
        };
        printed.context("cannot write to standard output")?;
        if !is_endless {
            return Ok(Exit::Ok);
        }
    }
    match is_endless {
        true => Ok(Exit::Ok),
        false => bail!("the pool at {shown} hung up"),
    }
}

fn request(
    words: &[String],
    (data, metadata): (Option<u64>, Option<u64>),
) -> anyhow::Result<Request> {
    let Some((first, rest)) = words.split_first() else {
        bail!("there is nothing to ask");
    };
    let number = |word: &String| {
        word.parse()
            .with_context(|| format!("{word:?} is not a number"))
    };
    let thin = || rest.first().map(number).transpose();
    let word = first.to_ascii_lowercase().replace('-', "_");
    let most = match word.as_str() {
        "status" | "table" | "deactivate" | "events" => 1,
        "activate" => 3,
        "message" | "resume" => usize::MAX,
        word if MESSAGES.contains(&word) => usize::MAX,
        _ => 0,
    };
    if rest.len() > most {
        bail!("{first} takes fewer words: {:?} is too much", rest[most]);
    }
    Ok(match word.as_str() {
        "message" => Request::Message {
            message: rest.join(" "),
        },
        word if MESSAGES.contains(&word) => Request::Message {
            message: [&[word.to_owned()], rest].concat().join(" "),
        },
        "status" => Request::Status { thin: thin()? },
        "table" => Request::Table { thin: thin()? },
        "suspend" => Request::Suspend,
        "resume" => Request::Resume {
            features: (!rest.is_empty()).then(|| rest.to_vec()),
        },
        "resize" => Request::Resize { data, metadata },
        "activate" => Request::Activate {
            thin: thin()?.context("activate takes an id")?,
            size: rest.get(1).map(number).transpose()?,
            origin: rest.get(2).map(Into::into),
        },
        "deactivate" => Request::Deactivate {
            thin: thin()?.context("deactivate takes an id")?,
        },
        "exported" => Request::Exported,
        "events" => Request::Events { after: thin()? },
        "stats" => Request::Stats,
        "metrics" => Request::Metrics,
        _ => bail!("{first:?} is nothing that a running pool is asked; see the manual"),
    })
}
