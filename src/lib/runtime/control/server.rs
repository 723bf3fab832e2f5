//! Serves the control socket: a thread for each connection.

use super::request::Request;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Runtime;
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// The longest line that is read.
const LONGEST_LINE: u64 = 64 << 10;
/// Connections at once.
const MOST_CONNECTIONS: usize = 64;
/// How often whoever waits for events looks whether anybody still listens.
const PATIENCE: Duration = Duration::from_secs(1);

/// A control socket that is served until this is dropped.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    is_over: Arc<AtomicBool>,
}

impl Control {
    /// Serves `runtime` on a socket at `path`, which only its owner may use. A socket there that nobody serves any more is replaced.
    ///
    /// # Errors
    /// `Busy` if somebody serves it, `Unsuitable` if there is something else of that name, `Io`.
    pub fn serve(path: &Path, runtime: Arc<Runtime>) -> Result<Self> {
        let listener = bind_socket(path)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let this = Self {
            path: path.to_owned(),
            is_over: Arc::clone(&is_over),
        };
        let places = Arc::default();
        let accept = move || {
            for stream in listener.incoming() {
                if is_over.load(Ordering::Acquire) {
                    return;
                }
                let Ok(stream) = stream else {
                    // Out of descriptors, most likely: others have to leave first.
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                };
                let Some(place) = Place::take(&places) else {
                    continue;
                };
                let runtime = Arc::clone(&runtime);
                let is_over = Arc::clone(&is_over);
                // Where there are no threads to be had, the client finds the connection closed.
                let _ = std::thread::Builder::new()
                    .name("control".into())
                    .spawn(move || {
                        let _place = place;
                        // Whoever hangs up in the middle of a line has nothing to be told.
                        let _ = answer(&stream, &runtime, &is_over);
                    });
            }
        };
        let spawned = std::thread::Builder::new()
            .name("control".into())
            .spawn(accept);
        spawned.map_err(|e| Error::io("cannot start the thread of the control socket", e))?;
        Ok(this)
    }
}

/// The place of a connection. It is given back when this is dropped, whether a thread has come to it or not.
struct Place(Arc<AtomicUsize>);

impl Place {
    /// None if all are taken.
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let next = |n: usize| (n < MOST_CONNECTIONS).then_some(n + 1);
        let place = taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        place.is_ok().then(|| Self(Arc::clone(taken)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        // Wakes whoever waits for connections; both may have gone already.
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Makes a socket that only its owner may use. One there that nobody serves any more is replaced.
///
/// # Errors
/// `Busy` if somebody serves it, `Unsuitable` if there is something else of that name, `Io`.
pub fn bind_socket(path: &Path) -> Result<UnixListener> {
    let shown = path.display();
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!("{shown} is there already, and is no socket; give another name"),
            ));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{shown} is served by somebody else"),
            ));
        }
        let removed = std::fs::remove_file(path);
        removed.map_err(|e| Error::io(format!("cannot remove {shown}, which nobody serves"), e))?;
    }
    let bound = UnixListener::bind(path)
        .map_err(|e| Error::io(format!("cannot make the socket {shown}"), e))?;
    let only_owner = std::fs::set_permissions(path, PermissionsExt::from_mode(0o600));
    only_owner.map_err(|e| Error::io(format!("cannot protect {shown}"), e))?;
    Ok(bound)
}

fn answer(stream: &UnixStream, runtime: &Runtime, is_over: &AtomicBool) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut reader)
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut line)?
            == 0
        {
            return Ok(());
        }
        if line.last() != Some(&b'\n') && line.len() as u64 == LONGEST_LINE {
            let error = Error::new(
                ErrorKind::InvalidArgument,
                format!("the line is longer than {LONGEST_LINE} bytes"),
            );
            return say(stream, &refusal(&error));
        }
        let said = match Request::from_json(&line) {
            Ok(Request::Events { after }) => return tell_events(stream, runtime, after, is_over),
            Ok(request) => request.carry_out(runtime),
            Err(e) => Err(e),
        };
        say(
            stream,
            &said.map_or_else(|e| refusal(&e), |ok| json!({ "ok": ok })),
        )?;
    }
}

fn refusal(error: &Error) -> Value {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        message.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    json!({ "error": { "errno": error.kind().errno().map_or("EIO", |(name, _)| name), "message": message } })
}

fn say(mut stream: &UnixStream, value: &Value) -> io::Result<()> {
    stream.write_all(format!("{value}\n").as_bytes())
}

fn tell_events(
    stream: &UnixStream,
    runtime: &Runtime,
    after: Option<u64>,
    is_over: &AtomicBool,
) -> io::Result<()> {
    let mut last = after.unwrap_or_else(|| runtime.events().last());
    stream.set_nonblocking(true)?;
    while !is_over.load(Ordering::Acquire) {
        let Some(events) = runtime.events().after(last, PATIENCE) else {
            return Ok(());
        };
        // Nothing is said any more; the end is that of the client.
        match (&*stream).read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
            _ => {}
        }
        for event in events {
            last = event.number;
            say(stream, &json!({ "ok": event }))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_no_thread_came_to_is_there_again() {
        let taken = Arc::default();
        let all: Vec<_> = (0..MOST_CONNECTIONS).map(|_| Place::take(&taken)).collect();
        assert!(all.iter().all(Option::is_some) && Place::take(&taken).is_none());
        // As a thread that cannot be started does.
        for place in all {
            drop(move || place);
        }
        assert!(Place::take(&taken).is_some());
    }
}
