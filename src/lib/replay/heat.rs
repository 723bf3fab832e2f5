//! Where on the devices requests went, and when: a map of as many cells as fit a page, however long the trace and large the devices.
//!
//! Both edges of a cell are powers of two of the smallest, so that two maps can be added once they have the larger of both scales.

use super::event::{TraceIo, TraceOp};
use serde::{Deserialize, Serialize};

/// Cells along the address.
pub(super) const ROWS: usize = 64;
/// Cells along the time.
pub(super) const COLUMNS: usize = 200;
/// Kinds of requests that are told apart.
pub(super) const KINDS: [&str; 3] = ["reads", "writes", "discards"];
/// The kind of each operation.
const KIND_OF: [Option<usize>; TraceOp::ALL.len()] = {
    let mut kinds = [None; TraceOp::ALL.len()];
    kinds[TraceOp::Read as usize] = Some(0);
    kinds[TraceOp::Write as usize] = Some(1);
    kinds[TraceOp::WriteZeroes as usize] = Some(1);
    kinds[TraceOp::Discard as usize] = Some(2);
    kinds
};
/// The smallest cell: 4 KiB, and 1.05 ms, by which division is a shift.
const LEAST_SECTORS: u64 = 8;
const LEAST_NS: u64 = 1 << 20;

/// How many requests touched each cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Text", try_from = "Text")]
pub struct HeatMap {
    cell_sectors: u64,
    cell_ns: u64,
    /// By kind, row and column.
    cells: Vec<u32>,
}

impl Default for HeatMap {
    fn default() -> Self {
        Self {
            cell_sectors: LEAST_SECTORS,
            cell_ns: LEAST_NS,
            cells: vec![0; KINDS.len() * ROWS * COLUMNS],
        }
    }
}

fn at(kind: usize, row: usize, column: usize) -> usize {
    (kind * ROWS + row) * COLUMNS + column
}

impl HeatMap {
    /// Notes a request. Flushes are nowhere.
    pub(super) fn record(&mut self, io: &TraceIo) {
        // Looked up, since the branches of a match would be taken at random.
        let Some(kind) = KIND_OF[io.op as usize] else {
            return;
        };
        let Some(more) = io.sectors.checked_sub(1) else {
            return;
        };
        let last = io.sector.saturating_add(more);
        // Both edges are powers of two.
        let row = |map: &Self, sector: u64| sector >> map.cell_sectors.trailing_zeros();
        while row(self, last) >= ROWS as u64 {
            self.double_sectors();
        }
        let column = |map: &Self| io.time_ns >> map.cell_ns.trailing_zeros();
        while column(self) >= COLUMNS as u64 {
            self.double_time();
        }
        let column = column(self) as usize;
        for row in row(self, io.sector)..=row(self, last) {
            let cell = &mut self.cells[at(kind, row as usize, column)];
            *cell = cell.saturating_add(1);
        }
    }

    /// Every cell is as large as two were along the address.
    fn double_sectors(&mut self) {
        self.cell_sectors *= 2;
        self.regroup(|row, column| (row / 2, column));
    }

    fn double_time(&mut self) {
        self.cell_ns *= 2;
        self.regroup(|row, column| (row, column / 2));
    }

    fn regroup(&mut self, place: impl Fn(usize, usize) -> (usize, usize)) {
        let old = std::mem::replace(&mut self.cells, Self::default().cells);
        for kind in 0..KINDS.len() {
            for row in 0..ROWS {
                for column in 0..COLUMNS {
                    let (to_row, to_column) = place(row, column);
                    let cell = &mut self.cells[at(kind, to_row, to_column)];
                    *cell = cell.saturating_add(old[at(kind, row, column)]);
                }
            }
        }
    }

    /// Adds another map.
    pub fn add(&mut self, other: &Self) {
        let mut other = other.clone();
        let sectors = self.cell_sectors.max(other.cell_sectors);
        let time = self.cell_ns.max(other.cell_ns);
        for map in [&mut *self, &mut other] {
            while map.cell_sectors < sectors {
                map.double_sectors();
            }
            while map.cell_ns < time {
                map.double_time();
            }
        }
        for (cell, more) in self.cells.iter_mut().zip(&other.cells) {
            *cell = cell.saturating_add(*more);
        }
    }

    /// Sectors of 512 bytes along one cell.
    pub fn cell_sectors(&self) -> u64 {
        self.cell_sectors
    }

    /// Nanoseconds along one cell.
    pub fn cell_ns(&self) -> u64 {
        self.cell_ns
    }

    /// How many reads (0), writes (1) or discards (2) there were in a row of addresses, by time.
    pub fn row(&self, kind: usize, row: usize) -> &[u32] {
        &self.cells[at(kind, row, 0)..at(kind, row, COLUMNS)]
    }
}

/// As JSON has it: each row of numbers is a text, without the zeros at its end, and so is the list of rows.
#[derive(Clone, Serialize, Deserialize)]
struct Text {
    cell_sectors: u64,
    cell_ns: u64,
    reads: Vec<String>,
    writes: Vec<String>,
    discards: Vec<String>,
}

impl From<HeatMap> for Text {
    fn from(map: HeatMap) -> Self {
        let rows = |kind| {
            let row = |row| {
                let cells = map.row(kind, row);
                let used = cells
                    .iter()
                    .rposition(|&n| n > 0)
                    .map_or(0, |last| last + 1);
                let words: Vec<String> = cells[..used].iter().map(u32::to_string).collect();
                words.join(" ")
            };
            let mut rows: Vec<String> = (0..ROWS).map(row).collect();
            while rows.last().is_some_and(String::is_empty) {
                rows.pop();
            }
            rows
        };
        Self {
            cell_sectors: map.cell_sectors,
            cell_ns: map.cell_ns,
            reads: rows(0),
            writes: rows(1),
            discards: rows(2),
        }
    }
}

impl TryFrom<Text> for HeatMap {
    type Error = String;

    fn try_from(text: Text) -> Result<Self, String> {
        let is_scale = |value: u64, least: u64| {
            value.is_multiple_of(least) && (value / least).is_power_of_two()
        };
        if !is_scale(text.cell_sectors, LEAST_SECTORS) || !is_scale(text.cell_ns, LEAST_NS) {
            return Err(format!(
                "cells of a heat map are not of {} sectors and {} ns",
                text.cell_sectors, text.cell_ns
            ));
        }
        let mut map = Self {
            cell_sectors: text.cell_sectors,
            cell_ns: text.cell_ns,
            ..Self::default()
        };
        for (kind, rows) in [text.reads, text.writes, text.discards].iter().enumerate() {
            if rows.len() > ROWS {
                return Err(format!(
                    "a heat map has {} rows, more than {ROWS}",
                    rows.len()
                ));
            }
            for (row, words) in rows.iter().enumerate() {
                for (column, word) in words.split_ascii_whitespace().enumerate() {
                    if column >= COLUMNS {
                        return Err(format!("a row of a heat map has more than {COLUMNS} cells"));
                    }
                    let wrong = |_| format!("{word:?} is no number of requests");
                    map.cells[at(kind, row, column)] = word.parse().map_err(wrong)?;
                }
            }
        }
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io(time_ns: u64, sector: u64, sectors: u64, op: TraceOp) -> TraceIo {
        TraceIo {
            time_ns,
            sector,
            sectors,
            device: 0,
            cpu: 0,
            op,
            is_preflush: false,
            is_fua: false,
        }
    }

    fn total(map: &HeatMap) -> u64 {
        map.cells.iter().map(|&n| u64::from(n)).sum()
    }

    #[test]
    fn nothing_is_lost_as_it_grows() {
        let mut map = HeatMap::default();
        for n in 0..5000 {
            map.record(&io(n * n * 1_000_003, n * 37 % 8_000, 8, TraceOp::Write));
        }
        // Some touch two cells while cells are small.
        assert!((5000..10_000).contains(&total(&map)), "{}", total(&map));
        map.record(&io(u64::MAX, u64::MAX - 1, 1, TraceOp::Read));
        map.record(&io(0, 0, u64::MAX, TraceOp::Discard));
        assert!(map.row(2, 0)[0] == 1);
        assert_eq!(map.cells.len(), 3 * ROWS * COLUMNS);
    }

    #[test]
    fn maps_of_different_scales_add_up() {
        let (mut small, mut large) = (HeatMap::default(), HeatMap::default());
        small.record(&io(3_000_000, 8, 8, TraceOp::Read));
        large.record(&io(10_000_000_000, 1 << 30, 8, TraceOp::Read));
        let mut sums = [small.clone(), large.clone()];
        sums[0].add(&large);
        sums[1].add(&small);
        assert_eq!(sums[0], sums[1]);
        assert_eq!(total(&sums[0]), 2);
        assert_eq!(sums[0].cell_sectors(), large.cell_sectors());
    }

    #[test]
    fn a_map_comes_back_from_its_text() {
        let mut map = HeatMap::default();
        map.record(&io(5_000_000_000, 4096, 800, TraceOp::Write));
        let json = serde_json::to_string(&map).unwrap();
        assert_eq!(serde_json::from_str::<HeatMap>(&json).unwrap(), map);
        for (from, to) in [
            ("\"cell_sectors\":", "\"cell_sectors\":7"),
            ("\"reads\":[", "\"reads\":[\"-1\","),
            ("\"reads\":[", "\"reads\":[\"4294967296\","),
        ] {
            let bad = json.replace(from, to).replace(",]", "]");
            assert!(serde_json::from_str::<HeatMap>(&bad).is_err(), "{bad}");
        }
    }
}
