//! Columns with commas between them.

use memchr::{memchr, memchr_iter};

use super::csv_spec::CsvSpec;
use super::devices::text;
use super::fields::{Field, Fields};
use super::lines::{Fault, Line, LineFormat, Sink, flush, plain, sectors};
use super::scan::{self, eight};
use crate::replay::event::TraceOp;

/// What the words of a [`CsvSpec`] stand for.
const OPS: [TraceOp; 4] = [
    TraceOp::Read,
    TraceOp::Write,
    TraceOp::Discard,
    TraceOp::Flush,
];

/// What the columns of a line say.
struct Row<'a> {
    /// The device, and the first eight bytes of it.
    device: Option<(&'a [u8], u64)>,
    op: TraceOp,
    offset: u64,
    length: u64,
    time: u64,
}

/// What a column means, for those who take one after the other.
#[derive(Clone, Copy, Debug)]
enum Column {
    None,
    /// The device, which goes on over so many more columns.
    Device(usize),
    Op,
    Offset,
    Length,
    Time,
}

/// Lines of columns that a [`CsvSpec`] names.
#[derive(Clone)]
pub(super) struct Csv {
    spec: CsvSpec,
    /// Those that are looked at.
    columns: Vec<Column>,
    /// [`short_words`].
    ops: Vec<(u64, TraceOp)>,
    /// A heading may come yet.
    is_first: bool,
}

impl Csv {
    pub(super) fn new(spec: CsvSpec) -> Self {
        Self {
            columns: columns_of(&spec),
            ops: short_words(&spec),
            is_first: true,
            spec,
        }
    }

    /// Reads the columns of a line.
    fn row<'a>(&self, line: &'a [u8]) -> Result<Row<'a>, Fault> {
        let column = |column: usize| {
            let field = line.split(|&b| b == b',').nth(column);
            field.map(<[u8]>::trim_ascii).ok_or("too few columns")
        };
        let op = column(self.spec.op)?;
        let is = |word: &String| !word.is_empty() && op.eq_ignore_ascii_case(word.as_bytes());
        let number = |(at, unit): (usize, u64), fault| {
            let number = scan::number(column(at)?);
            number
                .and_then(|number| number.checked_mul(unit))
                .ok_or(fault)
        };
        Ok(Row {
            device: match self.spec.device {
                None => None,
                Some((first, last)) => {
                    let device = columns(line, first, last).ok_or("too few columns")?;
                    Some((device, eight(device)))
                }
            },
            op: (self.spec.words.iter().zip(OPS))
                .find_map(|(word, op)| is(word).then_some(op))
                .ok_or("no operation")?,
            offset: number(self.spec.offset, "no offset")?,
            length: number(self.spec.length, "no length")?,
            time: match self.spec.time {
                None => 0,
                Some((at, unit)) => unit.read(column(at)?).ok_or("no time")?,
            },
        })
    }

    /// Does the same with fields that were found at once. None if it is not all as it mostly is.
    #[inline(always)]
    fn usual_row<'a>(&self, fields: &mut Fields<'a>) -> Option<Row<'a>> {
        let mut row = Row {
            device: None,
            op: TraceOp::Read,
            offset: 0,
            length: 0,
            time: 0,
        };
        for column in &self.columns {
            match column {
                Column::None => _ = fields.next(0)?,
                Column::Device(more) => {
                    let field = fields.next(*more)?;
                    row.device = Some((field.text(), field.word()));
                }
                Column::Op => row.op = self.usual_op(fields.next(0)?)?,
                Column::Offset => {
                    row.offset = fields.next(0)?.number()?.checked_mul(self.spec.offset.1)?;
                }
                Column::Length => {
                    row.length = fields.next(0)?.number()?.checked_mul(self.spec.length.1)?;
                }
                Column::Time => {
                    let (_, unit) = self.spec.time?;
                    let field = fields.next(0)?;
                    row.time = match field.number() {
                        Some(count) => unit.whole(count)?,
                        None => unit.read(field.text())?,
                    };
                }
            }
        }
        Some(row)
    }

    #[inline(always)]
    fn usual_op(&self, field: Field<'_>) -> Option<TraceOp> {
        let word = in_small_letters(field.word());
        // Reads and writes take turns at random: whoever stops at the one that fits mispredicts every other time. So it is counted
        // out, as words differ.
        let mut place = 0;
        for (at, (known, _)) in self.ops.iter().enumerate() {
            place += usize::from(*known == word) * (at + 1);
        }
        let (_, op) = self.ops.get(place.wrapping_sub(1))?;
        (field.len() <= 8).then_some(*op)
    }

    /// Takes the request of a row.
    #[inline(always)]
    fn event(&mut self, row: &Row<'_>, out: &mut Sink) -> Result<Line, Fault> {
        let device = match row.device {
            None => out.devices.named(b"0")?,
            Some((key, first)) => {
                (out.devices).index_of(key, first, || text(key).replace(',', "_"))?
            }
        };
        let line = out.io(match row.op {
            TraceOp::Flush => flush(row.time, device),
            _ => {
                let (sector, sectors) = sectors(row.offset, row.length)?;
                plain(row.time, device, row.op, sector, sectors)
            }
        })?;
        self.is_first = false;
        Ok(line)
    }

    /// True for a line that names columns: words where numbers have to be.
    fn is_heading(&self, line: &[u8]) -> bool {
        let offset = line.split(|&b| b == b',').nth(self.spec.offset.0);
        offset.is_some_and(|field| {
            field
                .trim_ascii()
                .first()
                .is_some_and(u8::is_ascii_alphabetic)
        })
    }
}

impl LineFormat for Csv {
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        match self.row(line).and_then(|row| self.event(&row, out)) {
            Err(_) if line.trim_ascii().is_empty() || line.starts_with(b"#") => Ok(Line::Other),
            Err(_) if std::mem::take(&mut self.is_first) && self.is_heading(line) => {
                Ok(Line::Other)
            }
            taken => taken,
        }
    }

    #[inline]
    fn usual(&mut self, text: &[u8], out: &mut Sink) -> Option<(Line, usize)> {
        let mut fields = Fields::of(text)?;
        let row = self.usual_row(&mut fields)?;
        let len = fields.end()?;
        let end = match &text[len..] {
            [b'\n', ..] => 1,
            [b'\r', b'\n', ..] => 2,
            [b',', rest @ ..] => memchr(b'\n', rest)? + 2,
            _ => return None,
        };
        let line = self.event(&row, out).ok()?;
        Some((line, len + end))
    }
}

/// What the columns mean, one after the other.
fn columns_of(spec: &CsvSpec) -> Vec<Column> {
    let mut meant = vec![
        (spec.op, Column::Op),
        (spec.offset.0, Column::Offset),
        (spec.length.0, Column::Length),
    ];
    meant.extend(spec.time.map(|(at, _)| (at, Column::Time)));
    let device = |(first, last)| (first, Column::Device(last - first));
    meant.extend(spec.device.map(device));
    meant.sort_unstable_by_key(|&(at, _)| at);
    let (mut columns, mut next) = (Vec::new(), 0);
    for (at, column) in meant {
        columns.extend((next..at).map(|_| Column::None));
        columns.push(column);
        next = at + 1;
        if let Column::Device(more) = column {
            next += more;
        }
    }
    columns
}

/// The words of operations that have up to eight letters and digits, in small letters.
fn short_words(spec: &CsvSpec) -> Vec<(u64, TraceOp)> {
    let mut short: Vec<(u64, TraceOp)> = Vec::new();
    for (word, op) in spec.words.iter().zip(OPS) {
        let is_plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let letters = in_small_letters(eight(word.as_bytes()));
        // Of two that are alike the first one counts.
        let is_known = short.iter().any(|&(known, _)| known == letters);
        if is_plain && (1..=8).contains(&word.len()) && !is_known {
            short.push((letters, op));
        }
    }
    short
}

/// The columns from one to another, with the commas between them.
fn columns(line: &[u8], first: usize, last: usize) -> Option<&[u8]> {
    let mut ends = memchr_iter(b',', line).chain([line.len()]);
    let start = match first {
        0 => 0,
        _ => ends.nth(first - 1)? + 1,
    };
    let end = ends.nth(last - first)?;
    line.get(start..end)
}

/// Letters of a word, which may have digits: of those the bit is set anyway.
fn in_small_letters(word: u64) -> u64 {
    word | 0x2020_2020_2020_2020
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::event::TraceIo;

    /// What a line is found to be by the thorough and, if it is as lines mostly are, by the quick.
    fn both(spec: &CsvSpec, line: &str, end: &str) -> (Option<TraceIo>, Option<TraceIo>) {
        let io = |out: Sink| out.batch.ios.first().copied();
        let (mut thorough, mut quick) = (Sink::new(), Sink::new());
        let _ = Csv::new(spec.clone())
            .row(line.as_bytes())
            .and_then(|row| Csv::new(spec.clone()).event(&row, &mut thorough));
        let text = format!("{line}{end}{}", "9,".repeat(64));
        let found = Csv::new(spec.clone()).usual(text.as_bytes(), &mut quick);
        if let Some((_, len)) = found {
            assert_eq!(len, line.len() + end.len(), "{line:?}");
            assert_eq!(quick.devices.names(), thorough.devices.names(), "{line:?}");
        }
        (io(thorough), io(quick))
    }

    #[test]
    fn the_quick_finds_what_the_thorough_finds() {
        let digits = "123456789012345678901";
        let odd = [
            "", "x", "-1", "1x", "1/", "1:", "\u{e9}", " 1", "1\t", "+1", "\"1\"", "1.5", "0x1",
        ];
        let numbers = (1..=digits.len()).map(|len| &digits[..len]).chain(odd);
        let numbers: Vec<&str> = numbers.collect();
        let mut found = 0;
        for spec in [
            CsvSpec::alibaba(),
            CsvSpec::msr(),
            CsvSpec::tencent(),
            CsvSpec::spc(),
        ] {
            let columns = spec.to_string();
            let is_word = |op: &str| columns.contains(&format!("={op}"));
            for op in ["R", "Read", "r", "0"].into_iter().filter(|op| is_word(op)) {
                for (at, number) in
                    (0..7).flat_map(|at| numbers.iter().map(move |number| (at, number)))
                {
                    let mut fields = vec!["130000000000000000", "80", "16", "7", "9", "5", "3"];
                    fields[spec.op] = op;
                    fields[at] = number;
                    for len in 1..=fields.len() {
                        for end in ["\n", "\r\n"] {
                            let (thorough, quick) = both(&spec, &fields[..len].join(","), end);
                            assert!(quick.is_none() || quick == thorough, "{fields:?} {len}");
                            found += usize::from(quick.is_some());
                        }
                    }
                }
            }
        }
        assert!(found > 1000, "{found}");
    }

    #[test]
    fn usual_lines_are_read_the_quick_way() {
        let usual = [
            (
                CsvSpec::alibaba(),
                "746,W,30601408512,16384,1577808000000046",
            ),
            (
                CsvSpec::msr(),
                "128166372003061629,hm,1,Read,383496192,32768,58000",
            ),
            (CsvSpec::tencent(), "1538323200,12910952,128,0,1063"),
            (CsvSpec::spc(), "0,20941264,8192,W,0.551706,Alpha/NT"),
        ];
        for (spec, line) in usual {
            for end in ["\n", "\r\n"] {
                let (thorough, quick) = both(&spec, line, end);
                assert!(quick.is_some() && quick == thorough, "{line}");
            }
        }
    }
}
