//! A CSV that several threads read, a piece of it each: a line means the same wherever it is.

use std::collections::BTreeMap;

use memchr::{memchr_iter, memrchr};

use super::crew::Crew;
use super::csv::Csv;
use super::devices::Devices;
use super::input::Input;
use super::lines::{Fault, Fill, Lines};
use crate::error::{Error, ErrorKind, Result};
use crate::replay::event::{Batch, TraceNotes, TraceReader};

/// Bytes of a piece: longer than the longest line.
const PIECE: usize = 128 << 10;
/// Pieces that are read at once or wait to be taken.
const AHEAD: usize = 6;

/// The pieces, in their order.
pub(super) struct CsvPieces {
    /// None once all of it is in pieces.
    input: Option<Input>,
    format: Csv,
    is_lenient: bool,
    crew: Crew<Piece>,
    /// Lines in the pieces that were made.
    lines: u64,
    /// Pieces that were made, and those that were taken.
    made: u64,
    taken: u64,
    /// Those that are read, by their numbers.
    read: BTreeMap<u64, Piece>,
    idle: Vec<Piece>,
    current: Option<Piece>,
    /// What follows all pieces and is read by whoever asks for it.
    rest: Option<Piece>,
    devices: Devices,
    notes: TraceNotes,
}

/// One piece after the other, in the same room.
pub(super) struct Piece {
    number: u64,
    lines: Lines<Csv>,
    batches: Vec<Batch>,
    /// Batches that were found, and those that were taken.
    found: usize,
    taken: usize,
    /// Why it ends before its end.
    fault: Option<Error>,
    /// Our index of each of its devices, or why there is none.
    devices: Vec<std::result::Result<u32, Fault>>,
}

impl CsvPieces {
    /// Threads to read such a text. None where nothing would be gained: if it comes slowly, or there is one processor.
    pub(super) fn crew(input: &Input) -> Option<Crew<Piece>> {
        match input.is_live() {
            true => None,
            false => Crew::new(AHEAD, Piece::read),
        }
    }

    pub(super) fn new(crew: Crew<Piece>, input: Input, format: Csv, is_lenient: bool) -> Self {
        Self {
            input: Some(input),
            format,
            is_lenient,
            crew,
            lines: 0,
            made: 0,
            taken: 0,
            read: BTreeMap::new(),
            idle: Vec::new(),
            current: None,
            rest: None,
            devices: Devices::new(),
            notes: TraceNotes::default(),
        }
    }

    /// Gives the crew the next piece. False if there is none.
    fn make(&mut self) -> Result<bool> {
        let Some(mut input) = self.input.take() else {
            return Ok(false);
        };
        let has_more = input.want(PIECE)?;
        let data = input.data();
        let end = match has_more {
            true => memrchr(b'\n', data).map(|at| at + 1),
            false => Some(data.len()),
        };
        let format = match self.made {
            0 => self.format.clone(),
            _ => self.format.without_heading(),
        };
        let Some(end) = end else {
            // One thread passes over a line of such a length, and reads what comes after it.
            let lines = Lines::new(input, format, self.is_lenient);
            self.rest = Some(Piece::new(lines.after(self.lines)));
            return Ok(false);
        };
        let text = &data[..end];
        let mut piece = self.idle.pop().unwrap_or_else(|| {
            let pieces = Input::of_pieces(input.name().into());
            Piece::new(Lines::new(pieces, format.clone(), self.is_lenient))
        });
        let is_cut = !has_more && input.is_cut();
        piece.lines.go_on(text, is_cut, self.lines, format);
        piece.number = self.made;
        self.made += 1;
        self.crew.give(piece);
        self.lines += memchr_iter(b'\n', text).count() as u64;
        if has_more {
            input.consume(end);
            self.input = Some(input);
        }
        Ok(true)
    }

    /// Waits for the piece that comes next. None if there is none.
    fn next(&mut self) -> Result<Option<Piece>> {
        while self.made - self.taken < AHEAD as u64 && self.make()? {}
        if self.made == self.taken {
            return Ok(None);
        }
        let mut piece = loop {
            match self.read.remove(&self.taken) {
                Some(piece) => break piece,
                None => {
                    let piece = self.crew.take()?;
                    self.read.insert(piece.number, piece);
                }
            }
        };
        self.taken += 1;
        piece.know(&mut self.devices);
        Ok(Some(piece))
    }

    fn note(&mut self, notes: &TraceNotes) {
        self.notes.skipped += notes.skipped;
        self.notes.malformed += notes.malformed;
        self.notes.is_truncated |= notes.is_truncated;
    }
}

impl TraceReader for CsvPieces {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        batch.ios.clear();
        batch.controls.clear();
        loop {
            if self.current.is_none() {
                self.current = self.next()?;
            }
            let Some(piece) = &mut self.current else {
                break;
            };
            if piece.taken < piece.found {
                std::mem::swap(batch, &mut piece.batches[piece.taken]);
                piece.taken += 1;
                piece.place(batch, self.is_lenient)?;
                return Ok(true);
            }
            let notes = std::mem::take(&mut piece.lines.sink_mut().notes);
            let fault = piece.fault.take();
            self.idle.extend(self.current.take());
            self.note(&notes);
            fault.map_or(Ok(()), Err)?;
        }
        let Some(rest) = &mut self.rest else {
            return Ok(false);
        };
        let is_more = rest.lines.read(batch)?;
        rest.know(&mut self.devices);
        rest.place(batch, self.is_lenient)?;
        let notes = std::mem::take(&mut rest.lines.sink_mut().notes);
        self.note(&notes);
        Ok(is_more)
    }

    fn devices(&self) -> &[String] {
        self.devices.names()
    }

    fn notes(&self) -> &TraceNotes {
        &self.notes
    }
}

impl Piece {
    fn new(lines: Lines<Csv>) -> Self {
        Self {
            number: 0,
            lines,
            batches: Vec::new(),
            found: 0,
            taken: 0,
            fault: None,
            devices: Vec::new(),
        }
    }

    /// Finds all that is in it.
    fn read(&mut self) {
        (self.found, self.taken) = (0, 0);
        loop {
            if self.found == self.batches.len() {
                self.batches.push(Batch::default());
            }
            match self.lines.read(&mut self.batches[self.found]) {
                Ok(true) => self.found += 1,
                Ok(false) => return,
                Err(fault) => {
                    self.fault = Some(fault);
                    return;
                }
            }
        }
    }

    /// Gives its devices the indexes that they have in all pieces, new ones in the order in which they are met.
    fn know(&mut self, all: &mut Devices) {
        for (key, name) in self.lines.sink_mut().devices.from(self.devices.len()) {
            self.devices.push(all.index(key, || name.into()));
        }
    }

    /// Gives requests our indexes of their devices.
    fn place(&mut self, batch: &mut Batch, is_lenient: bool) -> Result<()> {
        let (before, mut fault) = (batch.ios.len(), None);
        batch
            .ios
            .retain_mut(|io| match self.devices[io.device as usize] {
                Ok(index) => {
                    io.device = index;
                    true
                }
                Err(found) => {
                    fault.get_or_insert((found, io.device as usize));
                    false
                }
            });
        match fault {
            Some((fault, device)) if !is_lenient => {
                let sink = self.lines.sink_mut();
                let name = &sink.devices.names()[device];
                let message = format!("the trace has {fault}, of which {name:?} is the next");
                Err(Error::new(ErrorKind::InvalidDescription, message))
            }
            _ => {
                let gone = before - batch.ios.len();
                self.lines.sink_mut().notes.malformed += gone as u64;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::event::TraceIo;
    use crate::replay::trace::csv_spec::CsvSpec;
    use std::fmt::Write;

    type All = (Vec<TraceIo>, Vec<String>, TraceNotes, Option<String>);

    /// All that a reader finds, and the error that it ends with.
    fn all(mut reader: impl TraceReader) -> All {
        let (mut ios, mut batch) = (Vec::new(), Batch::default());
        let fault = loop {
            match reader.read(&mut batch) {
                Ok(true) => ios.append(&mut batch.ios),
                Ok(false) => break None,
                Err(fault) => break Some(fault.to_string()),
            }
        };
        (
            ios,
            reader.devices().to_vec(),
            reader.notes().clone(),
            fault,
        )
    }

    /// What one thread finds in a text is what several find.
    fn read(text: &str, is_lenient: bool) -> All {
        let input = || {
            Input::new(
                "text".into(),
                Box::new(std::io::Cursor::new(text.to_owned())),
            )
        };
        let csv = || Csv::new(CsvSpec::alibaba());
        let by_one = all(Lines::new(input(), csv(), is_lenient));
        if let Some(crew) = CsvPieces::crew(&input()) {
            let by_many = all(CsvPieces::new(crew, input(), csv(), is_lenient));
            assert_eq!(by_many.3, by_one.3);
            // Up to an error they may hand over more or less.
            if by_one.3.is_none() {
                assert!(by_many == by_one, "{:?} and {:?}", by_many.2, by_one.2);
            }
        }
        by_one
    }

    fn rows(count: u64, seed: u64) -> String {
        let mut text = String::new();
        for n in 0..count {
            let device = (n * (seed | 1)) % 977 + n / 1000;
            let end = if n % 7 == seed % 7 { "\r\n" } else { "\n" };
            let op = if n % 3 == 0 { 'R' } else { 'W' };
            write!(
                text,
                "{device},{op},{},{},{n}{end}",
                n * 4096,
                512 + n % 9 * 512
            )
            .unwrap();
        }
        text
    }

    #[test]
    fn several_threads_find_what_one_finds() {
        for (count, seed) in [(0, 1), (1, 2), (20_000, 3), (100_000, 4)] {
            let text = rows(count, seed);
            let (ios, _, notes, fault) = read(&text, false);
            assert_eq!((ios.len() as u64, fault), (count, None));
            assert!(!notes.is_truncated);
            read(text.trim_end(), false);
            read(
                &format!("device,op,offset,length,time\n# remark\n{text}"),
                false,
            );
            read(&format!("{text}77,R,40"), false);
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_or_counted() {
        let (sound, long) = (rows(30_000, 5), "x".repeat(600 << 10));
        for wrong in [
            "device,op,offset,length,time\n",
            "1,X,2,3,4\n",
            &format!("{long}\n"),
        ] {
            let text = format!("{sound}{wrong}{sound}{wrong}{sound}");
            let (.., fault) = read(&text, false);
            assert!(fault.is_some_and(|fault| fault.starts_with("text, line 30001: ")));
            let (ios, _, notes, fault) = read(&text, true);
            assert_eq!((ios.len(), notes.malformed, fault), (90_000, 2, None));
        }
    }

    #[test]
    fn more_devices_than_there_can_be_are_an_error() {
        let text: String = (0..70_000).map(|n| format!("{n},R,0,512,{n}\n")).collect();
        let input = || Input::new("text".into(), Box::new(std::io::Cursor::new(text.clone())));
        let csv = || Csv::new(CsvSpec::alibaba());
        if let Some(crew) = CsvPieces::crew(&input()) {
            let pieces = CsvPieces::new(crew, input(), csv(), false);
            let (.., fault) = all(pieces);
            assert_eq!(
                fault.as_deref(),
                Some("the trace has more than 65536 devices, of which \"65536\" is the next")
            );
        }
        if let Some(crew) = CsvPieces::crew(&input()) {
            let pieces = CsvPieces::new(crew, input(), csv(), true);
            let (ios, devices, notes, _) = all(pieces);
            assert_eq!(
                (ios.len(), devices.len(), notes.malformed),
                (65_536, 65_536, 4464)
            );
        }
    }
}
