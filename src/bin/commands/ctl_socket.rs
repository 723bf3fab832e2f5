//! `thin_ctl --socket`: asks a running pool.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;
use thintools::runtime::control::Request;
use thintools::units::MAX_THIN_ID;

use super::replay::sectors;
use super::{ctl, ctl_top};
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
    let request = match request(words, sizes) {
        Ok(request) => request,
        Err(wrong) => return Ok(ctl::wrong_usage(wrong)),
    };
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

/// What to ask, or what is wrong with the words.
fn request(
    words: &[String],
    (data, metadata): (Option<u64>, Option<u64>),
) -> Result<Request, String> {
    let Some((first, rest)) = words.split_first() else {
        return Err("there is nothing to ask".into());
    };
    let number = |word: &String| {
        word.parse::<u64>()
            .map_err(|_| format!("{word:?} is not a number"))
    };
    let id = |word: &String| {
        let id = number(word).ok().filter(|&id| id <= MAX_THIN_ID);
        id.ok_or_else(|| format!("{word:?} is no device id; 0 to {MAX_THIN_ID} are possible"))
    };
    let thin = || rest.first().map(id).transpose();
    let one = |thin: Option<u64>| thin.ok_or_else(|| format!("{first} takes an id"));
    let word = first.to_ascii_lowercase().replace('-', "_");
    let most = match word.as_str() {
        "status" | "table" | "deactivate" | "events" => 1,
        "activate" => 3,
        "message" | "resume" => usize::MAX,
        word if MESSAGES.contains(&word) => usize::MAX,
        _ => 0,
    };
    let request = match word.as_str() {
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
            thin: one(thin()?)?,
            size: rest.get(1).map(bytes).transpose()?,
            origin: rest.get(2).map(origin).transpose()?,
        },
        "deactivate" => Request::Deactivate {
            thin: one(thin()?)?,
        },
        "exported" => Request::Exported,
        "events" => Request::Events {
            after: rest.first().map(number).transpose()?,
        },
        "stats" => Request::Stats,
        "metrics" => Request::Metrics,
        "top" => return Err("top takes no other words".into()),
        _ => {
            return Err(format!(
                "{first:?} is nothing that a running pool is asked; see the manual"
            ));
        }
    };
    match rest.get(most) {
        Some(word) => Err(format!("{first} takes fewer words: {word:?} is too much")),
        None => Ok(request),
    }
}

/// A size; whether a device can have so many bytes is for the pool to say.
fn bytes(word: &String) -> Result<u64, String> {
    match word.parse() {
        Ok(bytes) => Ok(bytes),
        Err(_) => sectors(word)?
            .checked_mul(512)
            .ok_or_else(|| format!("{word:?} is more than any device has")),
    }
}

/// The server has another folder than whoever asks it.
fn origin(word: &String) -> Result<PathBuf, String> {
    std::path::absolute(word).map_err(|e| format!("{word:?} is no file: {e}"))
}
