//! A text whose lines mean the same wherever they are, read by several threads, a piece each.
//!
//! Pieces are taken in their order. A line that a thread does not understand is left, with what follows it in the piece, to the reader of
//! [`Lines`], who knows what to say of it.

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;

use super::crew::{Crew, Parts};
use super::lines::{BATCH, Fill, LineFormat, Lines, Sink, Taker};
use crate::error::{Error, Result};

/// Pieces that are under way; the crew has something to do while one is taken.
const PIECES: usize = 4;
/// Devices that a piece knows of those before it: what it knows takes memory, and its lines may name others.
const KNOWN: usize = 1 << 14;

/// Whole lines, and what was found in them.
struct Piece<F> {
    number: u64,
    text: Vec<u8>,
    lines: Range<usize>,
    /// Those from here on are not understood.
    at: usize,
    taker: Taker<F>,
    /// The trace's numbers of the devices that `taker` knows.
    devices: Vec<u32>,
}

impl<F: LineFormat + Clone> Piece<F> {
    fn new(taker: &Taker<F>) -> Self {
        Self {
            number: 0,
            text: Vec::new(),
            lines: 0..0,
            at: 0,
            taker: taker.fresh(),
            devices: Vec::new(),
        }
    }

    /// Understands what there is to understand.
    fn find(self: &mut Box<Self>) {
        let this = &mut **self;
        let text = &this.text[..this.lines.end];
        // What is wrong with a line is told when its turn has come.
        this.taker.take(text, &mut this.at, usize::MAX).ok();
    }

    /// Leaves all lines as they were, and knows no devices.
    fn renew(&mut self) {
        self.at = self.lines.start;
        self.taker = self.taker.fresh();
        self.devices.clear();
    }
}

/// A text that is read with a format.
pub(super) struct Pieces<F> {
    lines: Lines<F>,
    may_share: bool,
    crew: Option<Crew<Parts<Box<Piece<F>>>>>,
    spare: Vec<Box<Piece<F>>>,
    /// Those under way, in order, as far as they are back.
    under_way: VecDeque<Option<Box<Piece<F>>>>,
    /// The number of the first of them.
    first: u64,
    /// A piece that was taken in part.
    rest: Option<Box<Piece<F>>>,
    /// Why there is nothing behind them.
    failed: Option<Error>,
}

impl<F: LineFormat + Clone + 'static> Pieces<F> {
    /// Reads what `lines` would read; on other threads, too, if it `may_share`.
    pub(super) fn new(lines: Lines<F>, may_share: bool) -> Self {
        Self {
            lines,
            may_share,
            crew: None,
            spare: Vec::new(),
            under_way: VecDeque::new(),
            first: 0,
            rest: None,
            failed: None,
        }
    }

    /// Begins to share once there was so much that it pays; a heading, which is at the beginning, is over then.
    fn share(&mut self) {
        if self.sink().batch.ios.len() >= BATCH && mem::take(&mut self.may_share) {
            self.crew = Some(Crew::new(Parts::new(Piece::find), PIECES));
            let piece = |_| Box::new(Piece::new(&self.lines.taker));
            self.spare = (0..PIECES).map(piece).collect();
        }
    }

    /// Gives the crew as much as it can have.
    fn give(&mut self) {
        while let (Some(crew), None) = (&self.crew, &self.failed)
            && self.lines.taker.is_at_line()
            && let Some(mut piece) = self.spare.pop()
        {
            let input = &mut self.lines.input;
            piece.lines = input.give_lines(&mut piece.text);
            if piece.lines.is_empty() {
                self.failed = input.fill().err();
                piece.lines = input.give_lines(&mut piece.text);
            }
            if piece.lines.is_empty() {
                self.spare.push(piece);
                return;
            }
            if piece.devices.len() > KNOWN {
                piece.renew();
            }
            piece.at = piece.lines.start;
            piece.number = self.first + self.under_way.len() as u64;
            self.under_way.push_back(None);
            crew.give(|parts| parts.give(piece));
        }
    }

    /// The piece that comes next, if one is under way.
    fn next(&mut self) -> Result<Option<Box<Piece<F>>>> {
        while let (Some(None), Some(crew)) = (self.under_way.front(), &self.crew) {
            let piece = crew.take(Parts::take)?;
            let place = (piece.number - self.first) as usize;
            self.under_way[place] = Some(piece);
        }
        let piece = self.under_way.pop_front().flatten();
        self.first += u64::from(piece.is_some());
        Ok(piece)
    }

    /// Takes what was found in a piece; nothing was taken since the last batch.
    fn accept(&mut self, mut piece: Box<Piece<F>>) {
        let all = &mut self.lines.taker;
        let new = piece.taker.sink.devices.since(piece.devices.len());
        let new = new.map(|(key, name)| all.sink.devices.index(key, || name.into()));
        match new.collect::<std::result::Result<Vec<_>, _>>() {
            Ok(new) => piece.devices.extend(new),
            // The line that names one too many is found by whoever takes them one by one.
            Err(_) => piece.renew(),
        }
        let Piece { taker, devices, .. } = &mut *piece;
        mem::swap(&mut all.sink.batch.ios, &mut taker.sink.batch.ios);
        taker.sink.batch.ios.clear();
        for io in &mut all.sink.batch.ios {
            io.device = devices[io.device as usize];
        }
        all.lines += mem::take(&mut taker.lines);
        all.sink.notes.skipped += mem::take(&mut taker.sink.notes.skipped);
        self.rest = Some(piece);
    }
}

impl<F: LineFormat + Clone + 'static> Fill for Pieces<F> {
    fn sink(&self) -> &Sink {
        self.lines.sink()
    }

    fn sink_mut(&mut self) -> &mut Sink {
        self.lines.sink_mut()
    }

    fn fill(&mut self) -> Result<()> {
        loop {
            if let Some(piece) = &mut self.rest {
                let text = &piece.text[..piece.lines.end];
                self.lines.taker.take(text, &mut piece.at, BATCH)?;
                if piece.at == piece.lines.end {
                    self.spare.extend(self.rest.take());
                }
            }
            if self.rest.is_some() || !self.sink().batch.ios.is_empty() {
                return Ok(());
            }
            self.give();
            match self.next()? {
                Some(piece) => self.accept(piece),
                None => break,
            }
        }
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        self.lines.fill()?;
        self.share();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::event::{Batch, TraceIo, TraceNotes, TraceReader};
    use crate::replay::trace::csv::Csv;
    use crate::replay::trace::csv_spec::Preset;
    use crate::replay::trace::input::Input;
    use std::io::{self, Read};

    /// Reads so much at a time.
    struct Slowly(io::Cursor<Vec<u8>>, usize);

    impl Read for Slowly {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let most = buf.len().min(self.1);
            self.0.read(&mut buf[..most])
        }
    }

    type All = (Vec<TraceIo>, Vec<String>, TraceNotes, Option<String>);

    /// All that is found in a text.
    fn all(text: &str, at_once: usize, is_lenient: bool, shares: bool) -> All {
        let from = Slowly(io::Cursor::new(text.into()), at_once);
        let input = Input::new("t".into(), Box::new(from));
        let lines = Lines::new(input, Csv::new(Preset::Alibaba.into()), is_lenient);
        let mut reader = Pieces::new(lines, shares);
        let (mut ios, mut batch) = (Vec::new(), Batch::default());
        let error = loop {
            let more = reader.read(&mut batch);
            ios.append(&mut batch.ios);
            match more {
                Ok(true) => {}
                Ok(false) => break None,
                Err(e) => break Some(e.to_string()),
            }
        };
        assert!(!shares || reader.crew.is_some());
        (
            ios,
            reader.devices().to_vec(),
            reader.notes().clone(),
            error,
        )
    }

    /// A text of more than a batch whose line of that number is `odd`.
    fn text(odd: &str, number: usize) -> String {
        let line = |at: usize| match at {
            _ if at == number => format!("{odd}\n"),
            0 => "device_id,opcode,offset,length,timestamp\n".into(),
            // New devices come all the time.
            _ => format!(
                "{},{},{},4096,{at}\n",
                at * at % (at / 40 + 1),
                ["R", "W"][at % 2],
                at * 4096
            ),
        };
        (0..20_000).map(line).collect()
    }

    #[test]
    fn what_several_find_is_what_one_finds() {
        let long = format!("1,R,0,4096,{}", "9".repeat(70_000));
        let odd = [
            "3,W,0,512,7",
            "",
            "# 5",
            "a,W,word,1,1",
            "device,opcode,offset,length,timestamp",
            "5,R,4096,0,6",
            "5,R,4096,4096,6,more",
            "seventeen,W,512,512,7\r",
            &long,
        ];
        for odd in odd {
            for number in [1, 4100, 12_345, 19_999] {
                let text = text(odd, number);
                for at_once in [1000, 100_000, 1 << 20] {
                    for is_lenient in [false, true] {
                        let alone = all(&text, at_once, is_lenient, false);
                        // What is wrong at the beginning ends it before there is anything to share.
                        let shares = number > 1 || alone.3.is_none();
                        let shared = all(&text, at_once, is_lenient, shares);
                        assert!(shared == alone, "{odd:?} {number} {at_once} {:?}", shared.3);
                    }
                }
            }
        }
    }

    #[test]
    fn more_devices_than_there_may_be_are_told_at_their_line() {
        let line = |at: usize| format!("{at},R,0,4096,{at}\n");
        let text: String = (0..70_000).map(line).collect();
        for is_lenient in [false, true] {
            let alone = all(&text, 1 << 20, is_lenient, false);
            assert!(all(&text, 1 << 20, is_lenient, true) == alone);
            assert_eq!(alone.1.len(), 1 << 16);
            assert_eq!(alone.3.is_some(), !is_lenient);
        }
    }
}
