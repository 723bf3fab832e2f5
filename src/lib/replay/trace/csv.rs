//! Columns with commas between them, read in one pass over each line.

use memchr::memchr;

use super::csv_spec::{CsvSpec, TimeUnit};
use super::devices::text;
use super::lines::{Fault, Line, LineFormat, Sink, flush, plain, sectors};
use super::scan::{self, field_len};
use crate::replay::event::TraceOp;

/// What a column means.
#[derive(Clone, Copy, Debug)]
enum Column {
    None,
    /// The device, which may go on over so many more columns.
    Device(usize),
    Op,
    Offset,
    Length,
    Time,
}

/// What the words of a [`CsvSpec`] stand for.
const OPS: [TraceOp; 4] = [
    TraceOp::Read,
    TraceOp::Write,
    TraceOp::Discard,
    TraceOp::Flush,
];

/// The columns of a line, and what follows them.
struct Row<'a> {
    device: Option<&'a [u8]>,
    op: Option<TraceOp>,
    offset: u64,
    length: u64,
    time: u64,
    rest: &'a [u8],
}

/// Lines of columns that a [`CsvSpec`] names.
pub(super) struct Csv {
    columns: Vec<Column>,
    offset_unit: u64,
    length_unit: u64,
    time_unit: TimeUnit,
    words: [String; 4],
    /// Those of up to eight letters, as they are and in the other case.
    ops: Vec<(u64, TraceOp)>,
    offset_column: usize,
    /// A heading may come yet.
    is_first: bool,
}

impl Csv {
    pub(super) fn new(spec: CsvSpec) -> Self {
        let (offset_column, offset_unit) = spec.offset;
        let (length_column, length_unit) = spec.length;
        let device = spec
            .device
            .clone()
            .map(|device| *device.start()..device.end() + 1);
        let ends = [
            spec.op,
            offset_column,
            length_column,
            spec.time.map_or(0, |(column, _)| column),
            device.as_ref().map_or(0, |device| device.end - 1),
        ];
        let mut columns = vec![Column::None; ends.into_iter().max().unwrap_or(0) + 1];
        columns[spec.op] = Column::Op;
        columns[offset_column] = Column::Offset;
        columns[length_column] = Column::Length;
        if let Some((column, _)) = spec.time {
            columns[column] = Column::Time;
        }
        if let Some(device) = device {
            columns.splice(device.clone(), [Column::Device(device.len() - 1)]);
        }
        let mut ops = Vec::new();
        for (word, op) in spec.words.iter().zip(OPS) {
            for word in [word, &word.to_ascii_lowercase(), &word.to_ascii_uppercase()] {
                let short = (scan::eight(word.as_bytes()), op);
                if (1..=8).contains(&word.len()) && !ops.contains(&short) {
                    ops.push(short);
                }
            }
        }
        Self {
            columns,
            ops,
            offset_unit,
            length_unit,
            time_unit: spec.time.map_or(TimeUnit::Of(1), |(_, unit)| unit),
            words: spec.words,
            offset_column,
            is_first: true,
        }
    }

    /// Reads the columns of the line that `text` begins with.
    #[inline(always)]
    fn row<'a>(&self, text: &'a [u8]) -> Result<Row<'a>, Fault> {
        let mut row = Row {
            device: None,
            op: None,
            offset: 0,
            length: 0,
            time: 0,
            rest: text,
        };
        let rest = &mut row.rest;
        for (index, column) in self.columns.iter().enumerate() {
            if index > 0 {
                let [b',', behind @ ..] = *rest else {
                    return Err("too few columns");
                };
                *rest = behind;
            }
            match column {
                Column::None => {
                    field(rest, 0)?;
                }
                Column::Device(more) => row.device = Some(field(rest, *more)?),
                Column::Op => row.op = Some(self.op(field(rest, 0)?)?),
                Column::Offset => row.offset = number(rest, self.offset_unit).ok_or("no offset")?,
                Column::Length => row.length = number(rest, self.length_unit).ok_or("no length")?,
                Column::Time => row.time = self.time(rest).ok_or("no time")?,
            }
        }
        Ok(row)
    }

    #[inline(always)]
    fn op(&self, field: &[u8]) -> Result<TraceOp, Fault> {
        let word = scan::eight(field);
        let mut found = None;
        // Reads and writes take turns at random: whoever stops at the one that fits mispredicts every other time.
        for (known, op) in &self.ops {
            if *known == word {
                found = Some(*op);
            }
        }
        match found {
            Some(op) if field.len() <= 8 => Ok(op),
            _ => self.op_in_any_case(field),
        }
    }

    #[cold]
    fn op_in_any_case(&self, field: &[u8]) -> Result<TraceOp, Fault> {
        let field = field.trim_ascii();
        let is = |word: &String| !word.is_empty() && field.eq_ignore_ascii_case(word.as_bytes());
        let found = self.words.iter().zip(OPS).find(|(word, _)| is(word));
        found.map(|(_, op)| op).ok_or("no operation")
    }

    #[inline(always)]
    fn time(&self, rest: &mut &[u8]) -> Option<u64> {
        if let Some(count) = plain_number(rest) {
            return self.time_unit.whole(count);
        }
        self.time_unit.read(field(rest, 0).ok()?.trim_ascii())
    }

    /// Takes the request of a row.
    #[inline]
    fn event(&mut self, row: &Row<'_>, out: &mut Sink) -> Result<Line, Fault> {
        let op = row.op.ok_or("no operation")?;
        let device = match row.device {
            None => out.devices.named(b"0")?,
            Some(key) => out.devices.index(key, || text(key).replace(',', "_"))?,
        };
        let line = out.io(match op {
            TraceOp::Flush => flush(row.time, device),
            _ => {
                let (sector, sectors) = sectors(row.offset, row.length)?;
                plain(row.time, device, op, sector, sectors)
            }
        })?;
        self.is_first = false;
        Ok(line)
    }

    /// True for a line that names columns: words where numbers have to be.
    fn is_heading(&self, line: &[u8]) -> bool {
        let offset = line.split(|&b| b == b',').nth(self.offset_column);
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
        let row = self.row(text).ok()?;
        let len = text.len() - row.rest.len();
        let end = match row.rest {
            // The last column is not to end in the first half of what DOS ends lines with.
            [b'\n', ..] if text[..len].last() != Some(&b'\r') => 1,
            [b'\r', b'\n', ..] => 2,
            [b',', ..] => memchr(b'\n', row.rest)? + 1,
            _ => return None,
        };
        let line = self.event(&row, out).ok()?;
        Some((line, len + end))
    }
}

/// The next field with so many more and the commas between; what comes next is a comma or the end of the line.
#[inline(always)]
fn field<'a>(rest: &mut &'a [u8], more: usize) -> Result<&'a [u8], Fault> {
    let mut end = field_len(rest, b',');
    for _ in 0..more {
        if rest.get(end) != Some(&b',') {
            return Err("too few columns");
        }
        end += 1 + field_len(&rest[end + 1..], b',');
    }
    let (field, behind) = rest.split_at(end);
    *rest = behind;
    Ok(field)
}

/// The next field, a number of `unit`s.
#[inline(always)]
fn number(rest: &mut &[u8], unit: u64) -> Option<u64> {
    let value = match plain_number(rest) {
        Some(value) => value,
        None => scan::number(field(rest, 0).ok()?.trim_ascii())?,
    };
    value.checked_mul(unit)
}

/// The next field if it is nothing but digits.
#[inline(always)]
fn plain_number(rest: &mut &[u8]) -> Option<u64> {
    let (value, len) = scan::digits(rest)?;
    let behind = &rest[len..];
    if !matches!(behind, [] | [b',' | b'\n', ..] | [b'\r', b'\n', ..]) {
        return None;
    }
    *rest = behind;
    Some(value)
}
