//! Bytes of a request to sectors of bios.

use super::data_device::SECTOR;
use crate::pool::{Op, pieces};
use std::ops::Range;

/// What one bio moves of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// First sector of the bio.
    pub(super) sector: u64,
    /// Sectors that it covers.
    pub(super) sectors: u64,
    /// Bytes of the first sector that it leaves out.
    pub(super) skip: u64,
    /// Its bytes, from the request's first.
    pub(super) range: Range<u64>,
}

/// Cuts `len` bytes at `byte` at the boundaries of blocks. Sectors that are covered in part have bios of their own, so that a bio that
/// covers a whole block has all the bytes of it.
pub(super) fn cut(byte: u64, len: u64, block_sectors: u64) -> impl Iterator<Item = Cut> {
    let end = byte + len;
    let head = byte.next_multiple_of(SECTOR).min(end);
    let tail = (end - end % SECTOR).max(head);
    let whole = pieces(
        Op::Write,
        head / SECTOR,
        (tail - head) / SECTOR,
        block_sectors,
        None,
    );
    let part = move |from: u64, to: u64| {
        (from < to).then(|| Cut {
            sector: from / SECTOR,
            sectors: to.div_ceil(SECTOR) - from / SECTOR,
            skip: from % SECTOR,
            range: from - byte..to - byte,
        })
    };
    let whole = whole
        .filter_map(move |(sector, sectors)| part(sector * SECTOR, (sector + sectors) * SECTOR));
    part(byte, head)
        .into_iter()
        .chain(whole)
        .chain(part(tail, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(byte: u64, len: u64) -> Vec<(u64, u64, u64, Range<u64>)> {
        cut(byte, len, 128)
            .map(|c| (c.sector, c.sectors, c.skip, c.range))
            .collect()
    }

    #[test]
    fn blocks_and_partial_sectors_have_bios_of_their_own() {
        assert_eq!(shown(0, 65536), [(0, 128, 0, 0..65536)]);
        assert_eq!(
            shown(65024, 1024),
            [(127, 1, 0, 0..512), (128, 1, 0, 512..1024)]
        );
        assert_eq!(
            shown(1, 65535),
            [(0, 1, 1, 0..511), (1, 127, 0, 511..65535)]
        );
        assert_eq!(
            shown(0, 65535),
            [(0, 127, 0, 0..65024), (127, 1, 0, 65024..65535)]
        );
        assert_eq!(shown(100, 7), [(0, 1, 100, 0..7)]);
        assert_eq!(shown(500, 24), [(0, 1, 500, 0..12), (1, 1, 0, 12..24)]);
        assert_eq!(shown(512, 0), []);
    }
}
