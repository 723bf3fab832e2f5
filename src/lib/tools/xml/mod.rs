//! The source that reads a dump in XML, from a file or a pipe, in memory that does not depend on its size.
//!
//! The text is cut into segments that begin with a tag; segments are parsed on all cores and their events told in order.
//! What stands between two tags must be white space. Comments and declarations are blanked before parsing.

mod ahead;
mod parse;
mod segments;

use self::ahead::{Ahead, Told};
use self::parse::{Parsed, Tag};
use self::segments::{Segment, Segments, line_at};
use super::event::{PoolInfo, Sink, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::io::is_compressed;
use crate::observer::Observer;
use crate::units::MAGIC;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

/// A dump in XML.
pub struct XmlSource<'a> {
    file: File,
    name: String,
    observer: &'a dyn Observer,
}

impl std::fmt::Debug for XmlSource<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XmlSource")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<'a> XmlSource<'a> {
    /// Opens the dump at `path`; `-` is standard input. What cannot be read twice (a pipe) is copied to a temporary file
    /// first, because everything is judged before anything is written.
    ///
    /// # Errors
    /// `Io`, `InvalidDescription` for what cannot be XML.
    pub fn open(path: &Path, observer: &'a dyn Observer) -> Result<Self> {
        let is_stdin = path == Path::new("-");
        let name = if is_stdin {
            "standard input".to_owned()
        } else {
            path.display().to_string()
        };
        let open = |e| Error::io(format!("cannot open input {name}"), e);
        let file = if is_stdin {
            io::stdin().as_fd().try_clone_to_owned().map(File::from)
        } else {
            File::open(path)
        };
        let file = file.map_err(open)?;
        let meta = file.metadata().map_err(open)?;
        let refuse = |what: &str| {
            Err(Error::new(
                ErrorKind::InvalidDescription,
                format!("input {name} is {what}"),
            ))
        };
        if meta.is_dir() {
            return refuse("a directory, not an XML file");
        }
        if meta.file_type().is_char_device() && !file.is_terminal() {
            return refuse("a character device, not an XML file");
        }
        let file = if meta.is_file() {
            file
        } else {
            spool(file, &name, observer)?
        };
        let mut head = [0; 40];
        let len = file.read_at(&mut head, 0).map_err(open)?;
        if head[..len].get(32..) == Some(MAGIC.to_le_bytes().as_slice()) {
            return refuse("binary metadata; this command reads XML, which thin_dump makes of it");
        }
        if is_compressed(&head[..len]) {
            return refuse("compressed; expand it and pipe it to -i -");
        }
        Ok(Self {
            file,
            name,
            observer,
        })
    }

    /// The dump in an open file.
    pub fn from_file(file: File, name: &str, observer: &'a dyn Observer) -> Self {
        Self {
            file,
            name: name.to_owned(),
            observer,
        }
    }
}

/// Copies a pipe to an unlinked temporary file.
fn spool(mut from: File, name: &str, observer: &dyn Observer) -> Result<File> {
    let hint = "cannot keep a copy of the piped input; set TMPDIR to a folder with room";
    let mut copy = tempfile::tempfile().map_err(|e| Error::io(hint, e))?;
    let mut chunk = vec![0; 1 << 20];
    loop {
        observer.check_cancelled()?;
        match from.read(&mut chunk) {
            Ok(0) => return Ok(copy),
            Ok(n) => {
                io::Write::write_all(&mut copy, &chunk[..n]).map_err(|e| Error::io(hint, e))?
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(format!("cannot read {name}"), e)),
        }
    }
}

impl Source for XmlSource<'_> {
    fn emit(&self, sink: &mut dyn Sink) -> Result<()> {
        let ahead = Ahead::new(Segments::new(&self.file, &self.name));
        let workers = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(MOST_WORKERS);
        std::thread::scope(|scope| {
            for number in 0..workers {
                let worker = std::thread::Builder::new().spawn_scoped(scope, || ahead.work());
                if let (Err(e), 0) = (worker, number) {
                    return Err(Error::io("cannot start a thread", e));
                }
            }
            let _stop = ahead.stop_when_dropped();
            let mut teller = Teller {
                file: &self.file,
                sink,
                at: Place::Start,
                open: None,
            };
            let told = teller.tell_all(&ahead, self.observer);
            told.map_err(|e| match e.kind() {
                ErrorKind::InvalidDescription | ErrorKind::OutputTooSmall
                    if e.event_fault().is_none() =>
                {
                    e.context(self.name.clone())
                }
                _ => e,
            })
        })
    }
}

/// Threads that parse; more would wait for the one that tells.
const MOST_WORKERS: usize = 6;

/// Where the telling stands between the tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Start,
    Pool,
    Definition,
    Device,
    End,
}

struct Teller<'a> {
    file: &'a File,
    sink: &'a mut dyn Sink,
    at: Place,
    /// A mapping or reference written as a pair of tags, whose end has not come.
    open: Option<&'static str>,
}

impl Teller<'_> {
    fn tell_all(&mut self, from: &Ahead<'_>, observer: &dyn Observer) -> Result<()> {
        let mut end = 0;
        let size = self.file.metadata().map_or(0, |m| m.len());
        while let Some(Told { segment, parsed }) = from.next()? {
            observer.check_cancelled()?;
            observer.progress("reading", end, size);
            let parsed = parsed.map_err(|(offset, e)| self.locate(e, &segment, offset))?;
            self.tell(&segment, &parsed)?;
            end = segment.position + segment.text.len() as u64;
            from.give_back(segment, parsed);
        }
        let line = line_at(self.file, end);
        match self.at {
            Place::End => Ok(()),
            Place::Start => Err(invalid(
                line,
                "no <superblock> in it: this is no dump of thin metadata",
            )),
            _ => Err(invalid(
                line,
                "the input ends before </superblock>: it is incomplete",
            )),
        }
    }

    fn tell(&mut self, segment: &Segment, parsed: &Parsed) -> Result<()> {
        let mut told = 0;
        for (runs_before, offset, tag) in &parsed.tags {
            self.tell_runs(segment, parsed, told..*runs_before)?;
            told = *runs_before;
            let told = self.tell_tag(tag);
            told.map_err(|e| self.locate(e, segment, *offset as usize))?;
        }
        self.tell_runs(segment, parsed, told..parsed.runs.len())
    }

    fn tell_runs(
        &mut self,
        segment: &Segment,
        parsed: &Parsed,
        range: std::ops::Range<usize>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let offset = |index: usize| parsed.offsets[range.start + index] as usize;
        if !matches!(self.at, Place::Definition | Place::Device) {
            let e = Error::event(0, "", "a mapping outside of <device> and <def>");
            return Err(self.locate(e, segment, offset(0)));
        }
        if let Some(open) = self.open {
            let e = Error::event(0, "", format!("a mapping inside <{open}>"));
            return Err(self.locate(e, segment, offset(0)));
        }
        self.sink
            .mappings(&parsed.runs[range.clone()])
            .map_err(|e| match e.event_fault() {
                Some(fault) => {
                    let index = fault.index.min(range.len() - 1);
                    self.locate(e, segment, offset(index))
                }
                None => e,
            })
    }

    /// The error with the line of the tag at `offset` and the attribute at fault.
    fn locate(&self, e: Error, segment: &Segment, offset: usize) -> Error {
        let Some(fault) = e.event_fault() else {
            return e;
        };
        let line = line_at(self.file, segment.position + offset as u64);
        let attribute = match fault.attribute {
            "" => String::new(),
            name => format!(", attribute {name}"),
        };
        e.relabel(|m| format!("line {line}{attribute}: {m}"))
    }

    fn tell_tag(&mut self, tag: &Tag) -> Result<()> {
        if let Tag::End(name) = tag {
            return self.tell_end(name);
        }
        if let (Some(open), true) = (self.open, !matches!(tag, Tag::Opened(_))) {
            return Err(Error::event(0, "", format!("a tag inside <{open}>")));
        }
        match (tag, self.at) {
            (Tag::Pool(pool), Place::Start) => {
                self.at = Place::Pool;
                self.sink.pool(pool)
            }
            (Tag::Device(device), Place::Pool) => {
                self.at = Place::Device;
                self.sink.device(device)
            }
            (Tag::Define(name), Place::Pool) => {
                self.at = Place::Definition;
                self.sink.define(name)
            }
            (Tag::Reference(name), Place::Device) => self.sink.reference(name),
            (Tag::Opened(name), _) => {
                self.open = Some(name);
                Ok(())
            }
            (_, Place::Start) => Err(Error::event(
                0,
                "",
                format!("<{}> before <superblock>", tag.name()),
            )),
            (_, Place::End) => Err(Error::event(
                0,
                "",
                format!("<{}> after </superblock>", tag.name()),
            )),
            _ => Err(Error::event(
                0,
                "",
                format!("<{}> may not stand here", tag.name()),
            )),
        }
    }

    fn tell_end(&mut self, name: &str) -> Result<()> {
        if let Some(open) = self.open.take() {
            if open == name {
                return Ok(());
            }
            return Err(Error::event(0, "", format!("</{name}> ends <{open}>")));
        }
        match (self.at, name) {
            (Place::Pool, "superblock") => {
                self.at = Place::End;
                self.sink.end()
            }
            (Place::Device, "device") => {
                self.at = Place::Pool;
                self.sink.end_device()
            }
            (Place::Definition, "def") => {
                self.at = Place::Pool;
                self.sink.end_define()
            }
            _ => Err(Error::event(
                0,
                "",
                format!("</{name}> ends nothing that is open"),
            )),
        }
    }
}

fn invalid(line: u64, what: &str) -> Error {
    Error::new(
        ErrorKind::InvalidDescription,
        format!("line {line}: {what}"),
    )
}

/// The pool that the first tag of a dump describes.
pub(super) type Pool = PoolInfo;
