//! Columns with commas between them, read in one pass over each line.

use memchr::memchr;

use super::csv_spec::{CsvSpec, TimeUnit};
use super::devices::text;
use super::lines::{Fault, Line, LineFormat, Sink, plain, sectors};
use super::scan;
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

/// Lines of columns that a [`CsvSpec`] names.
pub(super) struct Csv {
    columns: Vec<Column>,
    offset_unit: u64,
    length_unit: u64,
    time_unit: TimeUnit,
    words: [String; 4],
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
        Self {
            columns,
            offset_unit,
            length_unit,
            time_unit: spec.time.map_or(TimeUnit::Of(1), |(_, unit)| unit),
            words: spec.words,
            offset_column,
            is_first: true,
        }
    }

    #[inline]
    fn event(&self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        let mut rest = Some(line);
        let (mut device, mut op, mut offset, mut length, mut time) = (None, None, 0, 0, 0);
        for column in &self.columns {
            match column {
                Column::None => {
                    field(&mut rest)?;
                }
                Column::Device(more) => device = Some(fields(&mut rest, *more)?),
                Column::Op => op = Some(self.op(field(&mut rest)?)?),
                Column::Offset => offset = number(&mut rest, self.offset_unit, "no offset")?,
                Column::Length => length = number(&mut rest, self.length_unit, "no length")?,
                Column::Time => {
                    let read = match plain_number(&mut rest) {
                        Some(count) => self.time_unit.whole(count),
                        None => self.time_unit.read(field(&mut rest)?.trim_ascii()),
                    };
                    time = read.ok_or("no time")?;
                }
            }
        }
        let op = op.ok_or("no operation")?;
        let device = match device {
            None => out.devices.named(b"0")?,
            Some(key) => out.devices.index(key, || text(key).replace(',', "_"))?,
        };
        let (sector, sectors) = match op {
            TraceOp::Flush => return out.io(super::lines::flush(time, device)),
            _ => sectors(offset, length)?,
        };
        out.io(plain(time, device, op, sector, sectors))
    }

    #[inline]
    fn op(&self, field: &[u8]) -> Result<TraceOp, Fault> {
        let field = field.trim_ascii();
        let ops = [
            TraceOp::Read,
            TraceOp::Write,
            TraceOp::Discard,
            TraceOp::Flush,
        ];
        for (word, op) in self.words.iter().zip(ops) {
            if !word.is_empty() && field.eq_ignore_ascii_case(word.as_bytes()) {
                return Ok(op);
            }
        }
        Err("no operation")
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
    #[inline]
    fn line(&mut self, line: &[u8], out: &mut Sink) -> Result<Line, Fault> {
        match self.event(line, out) {
            Ok(line) => {
                self.is_first = false;
                Ok(line)
            }
            Err(_) if line.trim_ascii().is_empty() || line.starts_with(b"#") => Ok(Line::Other),
            Err(_) if std::mem::take(&mut self.is_first) && self.is_heading(line) => {
                Ok(Line::Other)
            }
            Err(fault) => Err(fault),
        }
    }
}

/// The next field, and what follows it; nothing after the last one.
#[inline]
fn field<'a>(rest: &mut Option<&'a [u8]>) -> Result<&'a [u8], Fault> {
    fields(rest, 0)
}

/// The next field with so many more and the commas between.
#[inline]
fn fields<'a>(rest: &mut Option<&'a [u8]>, more: usize) -> Result<&'a [u8], Fault> {
    let line = rest.ok_or("too few columns")?;
    let mut end = comma(line);
    for _ in 0..more {
        let at = end.ok_or("too few columns")? + 1;
        end = comma(&line[at..]).map(|len| at + len);
    }
    *rest = end.map(|end| &line[end + 1..]);
    Ok(&line[..end.unwrap_or(line.len())])
}

/// Where the first comma is; most fields are so short that a look at eight bytes is all it takes.
#[inline]
fn comma(text: &[u8]) -> Option<usize> {
    let Some(chunk) = text.first_chunk() else {
        return text.iter().position(|&b| b == b',');
    };
    let others = u64::from_le_bytes(*chunk) ^ 0x2c2c_2c2c_2c2c_2c2c;
    let commas = others.wrapping_sub(0x0101_0101_0101_0101) & !others & 0x8080_8080_8080_8080;
    if commas != 0 {
        Some(commas.trailing_zeros() as usize / 8)
    } else {
        memchr(b',', &text[8..]).map(|at| at + 8)
    }
}

/// The next field, a number of `unit`s.
#[inline]
fn number(rest: &mut Option<&[u8]>, unit: u64, fault: Fault) -> Result<u64, Fault> {
    let value = match plain_number(rest) {
        Some(value) => value,
        None => scan::number(field(rest)?.trim_ascii()).ok_or(fault)?,
    };
    value.checked_mul(unit).ok_or(fault)
}

/// The next field if it is nothing but digits.
#[inline]
fn plain_number(rest: &mut Option<&[u8]>) -> Option<u64> {
    let line = (*rest)?;
    let (value, len) = scan::digits(line)?;
    *rest = match line.get(len) {
        Some(b',') => Some(&line[len + 1..]),
        Some(_) => return None,
        None => None,
    };
    Some(value)
}
