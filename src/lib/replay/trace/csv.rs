//! Columns with commas between them.

use memchr::{memchr, memchr_iter};

use super::csv_spec::{Columns, CsvSpec, Preset};
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

/// Lines of columns that a [`CsvSpec`] names.
#[derive(Clone)]
pub(super) struct Csv {
    spec: CsvSpec,
    /// [`short_words`].
    ops: [u64; 4],
    /// A heading may come yet.
    is_first: bool,
}

impl Csv {
    pub(super) fn new(spec: CsvSpec) -> Self {
        Self {
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
        let op = column(self.spec.columns.op)?;
        let is = |word: &String| !word.is_empty() && op.eq_ignore_ascii_case(word.as_bytes());
        let number = |(at, unit): (usize, u64), fault| {
            let number = scan::number(column(at)?);
            number
                .and_then(|number| number.checked_mul(unit))
                .ok_or(fault)
        };
        Ok(Row {
            device: match self.spec.columns.device {
                None => None,
                Some((first, last)) => {
                    let device = columns(line, first, last).ok_or("too few columns")?;
                    Some((device, eight(device)))
                }
            },
            op: (self.spec.words.iter().zip(OPS))
                .find_map(|(word, op)| is(word).then_some(op))
                .ok_or("no operation")?,
            offset: number(self.spec.columns.offset, "no offset")?,
            length: number(self.spec.columns.length, "no length")?,
            time: match self.spec.columns.time {
                None => 0,
                Some((at, unit)) => unit.read(column(at)?).ok_or("no time")?,
            },
        })
    }

    /// Does the same with fields that were found at once. None if it is not all as it mostly is.
    #[inline(always)]
    fn usual_row<'a>(&self, columns: Columns, fields: &Fields<'a>) -> Option<Row<'a>> {
        let one = |column| fields.get(column, column);
        Some(Row {
            device: columns.device.map(|(first, last)| {
                let field = fields.get(first, last);
                (field.text(), field.word())
            }),
            op: self.usual_op(one(columns.op))?,
            offset: one(columns.offset.0)
                .number()?
                .checked_mul(columns.offset.1)?,
            length: one(columns.length.0)
                .number()?
                .checked_mul(columns.length.1)?,
            time: match columns.time {
                None => 0,
                Some((column, unit)) => match one(column).number() {
                    Some(count) => unit.whole(count)?,
                    None => unit.read(one(column).text())?,
                },
            },
        })
    }

    #[inline(always)]
    fn usual_op(&self, field: Field<'_>) -> Option<TraceOp> {
        let word = in_small_letters(field.word());
        // Reads and writes take turns at random: whoever stops at the one that fits mispredicts every other time. So it is counted
        // out, as words differ.
        let mut place = 0;
        for (at, known) in self.ops.iter().enumerate() {
            place += usize::from(*known == word) * (at + 1);
        }
        let op = OPS.get(place.wrapping_sub(1))?;
        (field.len() <= 8).then_some(*op)
    }

    /// Takes a line with such columns as lines mostly are.
    #[inline(always)]
    fn usual_line(
        &mut self,
        columns: Columns,
        text: &[u8],
        out: &mut Sink,
    ) -> Option<(Line, usize)> {
        let fields = Fields::of(text, columns.last() + 1)?;
        let row = self.usual_row(columns, &fields)?;
        let len = fields.len();
        let end = match &text[len..] {
            [b'\n', ..] => 1,
            [b'\r', b'\n', ..] => 2,
            [b',', rest @ ..] => memchr(b'\n', rest)? + 2,
            _ => return None,
        };
        let line = self.event(&row, out).ok()?;
        Some((line, len + end))
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
        let offset = line.split(|&b| b == b',').nth(self.spec.columns.offset.0);
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
        // Columns cost less where the compiler knows them.
        match self.spec.preset {
            Some(Preset::Alibaba) => {
                self.usual_line(const { Preset::Alibaba.columns() }, text, out)
            }
            Some(Preset::Msr) => self.usual_line(const { Preset::Msr.columns() }, text, out),
            _ => self.usual_line(self.spec.columns, text, out),
        }
    }
}

/// The words of operations that have up to eight letters and digits, in small letters; of those that have not, what no word is.
fn short_words(spec: &CsvSpec) -> [u64; 4] {
    let mut short = [0; 4];
    for (at, word) in spec.words.iter().enumerate() {
        let is_plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let letters = in_small_letters(eight(word.as_bytes()));
        // Of two that are alike the first one counts.
        if is_plain && (1..=8).contains(&word.len()) && !short.contains(&letters) {
            short[at] = letters;
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
            CsvSpec::from(Preset::Alibaba),
            CsvSpec::from(Preset::Msr),
            CsvSpec::from(Preset::Tencent),
            CsvSpec::from(Preset::Spc),
        ] {
            let is_word = |op: &str| spec.words.iter().any(|word| word == op);
            for op in ["R", "Read", "r", "0"].into_iter().filter(|op| is_word(op)) {
                for (at, number) in
                    (0..7).flat_map(|at| numbers.iter().map(move |number| (at, number)))
                {
                    let mut fields = vec!["130000000000000000", "80", "16", "7", "9", "5", "3"];
                    fields[spec.columns.op] = op;
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
                CsvSpec::from(Preset::Alibaba),
                "746,W,30601408512,16384,1577808000000046",
            ),
            (
                CsvSpec::from(Preset::Msr),
                "128166372003061629,hm,1,Read,383496192,32768,58000",
            ),
            (
                CsvSpec::from(Preset::Tencent),
                "1538323200,12910952,128,0,1063",
            ),
            (
                CsvSpec::from(Preset::Spc),
                "0,20941264,8192,W,0.551706,Alpha/NT",
            ),
        ];
        for (spec, line) in usual {
            for end in ["\n", "\r\n"] {
                let (thorough, quick) = both(&spec, line, end);
                assert!(quick.is_some() && quick == thorough, "{line}");
            }
        }
    }
}
