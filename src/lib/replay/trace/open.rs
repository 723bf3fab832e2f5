//! From paths to a reader: siblings of per-processor files, what form they have, several as one.

use std::cmp::Reverse;
use std::path::{Path, PathBuf};

use super::ahead::Ahead;
use super::biosnoop::{self, Biosnoop};
use super::blkparse::Blkparse;
use super::blktrace::Blktrace;
use super::clock::Clock;
use super::csv::Csv;
use super::csv_spec::{CsvSpec, Preset};
use super::disksim::Disksim;
use super::events::{self, Events};
use super::format::{Format, NAMED};
use super::ftrace::Ftrace;
use super::input::{Input, without_mark};
use super::iolog::Iolog;
use super::lines::{LineFormat, Lines, Sink};
use super::load::Load;
use super::log_writes::{self, LogWrites};
use super::merge::Merge;
use super::pieces::Pieces;
use super::record;
use super::records::Records;
use super::resort::Resort;
use super::siblings::Group;
use super::spread::Spread;
use super::vscsi::{self, Vscsi};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::TraceReader;

/// As much of a file as is looked at to tell its format.
const HEAD: usize = 64 << 10;
/// Of what comes slowly.
const LIVE_HEAD: usize = 4 << 10;
/// Lines of it that are tried.
const TRIED: usize = 200;

/// Opens the trace that `paths` hold, `-` being standard input: compressed or not, several merged by time. Of a blktrace each file
/// brings those of the other processors with it. Without a `format` it is told from the contents. With `lenient`, what cannot be read
/// is counted instead of an error.
///
/// # Errors
/// `Io`; `Unsuitable` if the format cannot be told, or differs between files.
pub fn open(
    paths: &[PathBuf],
    format: Option<Format>,
    lenient: bool,
) -> Result<(Format, Box<dyn TraceReader>)> {
    let mut found = format.clone();
    let mut readers: Vec<Box<dyn TraceReader>> = Vec::new();
    let mut processors = Vec::new();
    let mut missing = Vec::new();
    let (mut inputs, mut is_live) = (Vec::new(), false);
    for group in Group::of(paths)? {
        let is_processors = group.is_processors && matches!(format, None | Some(Format::Blktrace));
        for path in &group.paths {
            let mut input = Input::open(path)?;
            inputs.push(input.progress());
            is_live |= input.is_live();
            let here = match &format {
                Some(format) => format.clone(),
                None if is_processors => Format::Blktrace,
                None => detect(&mut input, path)?,
            };
            let first = found.get_or_insert_with(|| here.clone());
            if *first != here {
                let message = format!(
                    "{} is {here}, but other files of the trace are {first}",
                    path.display()
                );
                return Err(Error::new(ErrorKind::Unsuitable, message));
            }
            if is_processors {
                processors.push(input);
            } else {
                readers.push(reader(&here, input, lenient, paths.len() == 1));
            }
        }
        missing.extend(group.missing);
    }
    if !processors.is_empty() {
        let mut reader = Blktrace::new(processors, lenient)?;
        missing.into_iter().for_each(|warning| reader.warn(warning));
        readers.push(Box::new(reader));
    }
    let format =
        found.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "no trace is named"))?;
    let one = match readers.len() {
        1 => readers.remove(0),
        _ => Box::new(Merge::new(readers)),
    };
    // Parts of one trace stay in step.
    let base = (format == Format::Events).then_some(0);
    let reader = Box::new(Clock::new(one, inputs, base));
    match is_live {
        true => Ok((format, Box::new(Ahead::new(reader)?))),
        false => Ok((format, reader)),
    }
}

/// A reader of one file; if it `is_alone`, threads of its own may help.
fn reader(format: &Format, input: Input, lenient: bool, is_alone: bool) -> Box<dyn TraceReader> {
    let csv = |spec: CsvSpec, input: Input| -> Box<dyn TraceReader> {
        let is_whole_seconds = spec.is_whole_seconds();
        // Whoever waits for a pipe waits on a thread of its own already.
        let is_alone = is_alone && !input.is_live();
        let lines = Pieces::new(Lines::new(input, Csv::new(spec), lenient), is_alone);
        if is_whole_seconds {
            Box::new(Spread::new(lines))
        } else {
            Box::new(lines)
        }
    };
    match format {
        Format::Events => Box::new(Records::new(input, Events::default(), lenient)),
        Format::Blktrace => Box::new(Resort::new(Blktrace::dump(input, lenient))),
        Format::Blkparse => Box::new(Lines::new(input, Blkparse::default(), lenient)),
        Format::Iolog => Box::new(Lines::new(input, Iolog::default(), lenient)),
        Format::Csv(spec) => csv((**spec).clone(), input),
        Format::Msr => csv(Preset::Msr.into(), input),
        Format::Alibaba => csv(Preset::Alibaba.into(), input),
        Format::Tencent => csv(Preset::Tencent.into(), input),
        Format::Spc => csv(Preset::Spc.into(), input),
        Format::Load => Box::new(Lines::new(input, Load::default(), lenient)),
        Format::Disksim => Box::new(Lines::new(input, Disksim::default(), lenient)),
        Format::Ftrace => Box::new(Lines::new(input, Ftrace::default(), lenient)),
        // It tells of requests when they are complete.
        Format::Biosnoop => Box::new(Resort::new(Lines::new(input, Biosnoop::default(), lenient))),
        Format::Vscsi => Box::new(Records::new(input, Vscsi::default(), lenient)),
        Format::LogWrites => Box::new(Records::new(input, LogWrites::default(), lenient)),
    }
}

/// Tells the format from the contents.
fn detect(input: &mut Input, path: &Path) -> Result<Format> {
    input.want(if input.is_live() { LIVE_HEAD } else { HEAD })?;
    let head = input.data();
    let mut likeliest: Option<(Likeness, Format)> = None;
    for (_, format) in NAMED {
        let here = likeness(&format, head);
        if likeliest.as_ref().is_none_or(|(most, _)| *most < here) {
            likeliest = Some((here, format));
        }
    }
    let format = likeliest.filter(|(likeness, _)| likeness.is_enough());
    let format = format.map(|(_, format)| format);
    format.ok_or_else(|| {
        let tar = head.get(257..262) == Some(b"ustar".as_slice());
        let message = match () {
            () if tar => "is an archive: unpack it first",
            () if head.is_empty() && input.is_cut() => {
                "ends too early: it is compressed, and nothing of it can be expanded; copy it again"
            }
            () if head.is_empty() => "is empty",
            () => "is no trace that is recognised: name its format",
        };
        Error::new(
            ErrorKind::Unsuitable,
            format!("{} {message}", path.display()),
        )
    })
}

/// How much of a head is of a format: wholly before in part, and of those in part by how many lines are not of it, the fewer the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Likeness {
    None,
    /// Most of the lines; this many are not.
    Most(Reverse<usize>),
    Whole,
}

impl Likeness {
    fn is_enough(self) -> bool {
        self != Self::None
    }

    fn whole(is_whole: bool) -> Self {
        if is_whole { Self::Whole } else { Self::None }
    }
}

fn likeness(format: &Format, head: &[u8]) -> Likeness {
    match format {
        Format::Events => Likeness::whole(events::is_events(head)),
        Format::Blktrace => Likeness::whole(record::is_big_endian(head).is_some()),
        Format::LogWrites => Likeness::whole(log_writes::is_log(head)),
        Format::Vscsi => Likeness::whole(vscsi::version(head).is_some()),
        Format::Blkparse => of_lines(Blkparse::default(), head),
        Format::Iolog => of_lines(Iolog::default(), head),
        Format::Csv(_) => Likeness::None,
        Format::Msr => of_lines(Csv::new(Preset::Msr.into()), head),
        Format::Alibaba => of_lines(Csv::new(Preset::Alibaba.into()), head),
        Format::Tencent => of_lines(Csv::new(Preset::Tencent.into()), head),
        Format::Spc => of_lines(Csv::new(Preset::Spc.into()), head),
        Format::Load => of_lines(Load::default(), head),
        Format::Disksim => of_lines(Disksim::default(), head),
        Format::Ftrace => of_lines(Ftrace::default(), head),
        // One without what a replay needs is told from others, to say what it has not.
        Format::Biosnoop => Likeness::whole(biosnoop::has_heading(&first_lines(head))),
    }
}

/// How much sense the format finds in the lines that `head` begins with. A few that are nonsense are for the reader to complain about.
fn of_lines(mut format: impl LineFormat, head: &[u8]) -> Likeness {
    let mut sink = Sink::new();
    let (mut sense, mut nonsense) = (0, 0);
    for line in first_lines(head) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match format.line(line, &mut sink) {
            Ok(_) => sense += 1,
            Err(_) => nonsense += 1,
        }
    }
    let has_events = !(sink.batch.ios.is_empty() && sink.batch.controls.is_empty());
    match nonsense {
        0 => Likeness::whole(has_events),
        _ if has_events && nonsense < sense => Likeness::Most(Reverse(nonsense)),
        _ => Likeness::None,
    }
}

fn first_lines(head: &[u8]) -> Vec<&[u8]> {
    let text = without_mark(head);
    let mut lines: Vec<&[u8]> = text.split(|&b| b == b'\n').take(TRIED).collect();
    // The last one may go on beyond the head.
    if lines.len() > 1 {
        lines.pop();
    }
    lines
}
