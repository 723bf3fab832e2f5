//! The fields of a short line with commas between them, whose ends are all found at once.
//!
//! A search from each comma to the next, and a loop over digits, end where nobody can foretell; here a line costs the same whatever its
//! fields are like.

use super::scan::{self, eight_digits, repeated};

/// The bytes of a line in which fields are looked for.
const LINE: usize = 64;
/// Eight bytes can be read from wherever a field starts.
const WINDOW: usize = LINE + 8;
/// Ends of lines, blanks and quotes are below this, as commas are; digits and letters are not.
const PLAIN: u8 = b'-';

/// What is left of a line.
pub(super) struct Fields<'a> {
    window: &'a [u8; WINDOW],
    /// A bit for each byte that is not plain, from the end of the next field on.
    ends: u64,
    /// Where the next field starts.
    start: usize,
    /// Nothing but commas was between those before.
    are_plain: bool,
}

/// A field, or several with what is between them. All of its bytes are plain.
#[derive(Clone, Copy)]
pub(super) struct Field<'a> {
    window: &'a [u8; WINDOW],
    start: usize,
    len: usize,
}

impl<'a> Fields<'a> {
    /// The fields of the line that `text` begins with. None at the end of what was read.
    #[inline(always)]
    pub(super) fn of(text: &'a [u8]) -> Option<Self> {
        let window = text.first_chunk::<WINDOW>()?;
        Some(Self {
            window,
            ends: not_plain(window),
            start: 0,
            are_plain: true,
        })
    }

    /// The next field with so many more behind it. None if there are not so many.
    #[inline(always)]
    pub(super) fn next(&mut self, more: usize) -> Option<Field<'a>> {
        let start = self.start;
        for _ in 0..=more {
            self.are_plain &= self.start == 0 || self.window[self.start - 1] == b',';
            if self.ends == 0 {
                return None;
            }
            self.start = self.ends.trailing_zeros() as usize + 1;
            self.ends &= self.ends - 1;
        }
        Some(Field {
            window: self.window,
            start,
            len: self.start - 1 - start,
        })
    }

    /// Where the last field ended. None if one before had bytes that are not plain.
    #[inline(always)]
    pub(super) fn end(&self) -> Option<usize> {
        self.are_plain.then_some(self.start - 1)
    }
}

impl<'a> Field<'a> {
    #[inline(always)]
    pub(super) fn text(self) -> &'a [u8] {
        &self.window[self.start..][..self.len]
    }

    /// As many of the bytes as a word has, zeros behind the last.
    #[inline(always)]
    pub(super) fn word(self) -> u64 {
        let word = word(self.window, self.start);
        match self.len {
            0 => 0,
            len if len < 8 => word & u64::MAX >> (64 - 8 * len),
            _ => word,
        }
    }

    #[inline(always)]
    pub(super) fn len(self) -> usize {
        self.len
    }

    /// The number that the field is.
    #[inline(always)]
    pub(super) fn number(self) -> Option<u64> {
        // What is shifted out at the end of a word is not of the field; zeros in front make no difference.
        let first = |len: usize| (word(self.window, self.start) ^ repeated(b'0')) << (64 - 8 * len);
        match self.len {
            len @ 1..=8 => eight_digits(first(len)),
            len @ 9..=16 => {
                let low = word(self.window, self.start + len - 8) ^ repeated(b'0');
                Some(eight_digits(first(len - 8))? * 100_000_000 + eight_digits(low)?)
            }
            _ => scan::number(self.text()),
        }
    }
}

#[inline(always)]
fn word(window: &[u8; WINDOW], at: usize) -> u64 {
    // Fields start in the line.
    let bytes = window[at % LINE..].first_chunk();
    u64::from_le_bytes(*bytes.expect("there are eight more than a line has"))
}

/// A bit for each byte of a line that is below [`PLAIN`].
#[inline(always)]
fn not_plain(window: &[u8; WINDOW]) -> u64 {
    // The compiler compares many at once.
    let marks: [u8; LINE] = std::array::from_fn(|at| u8::from(window[at] < PLAIN));
    let mut bits = 0;
    for (at, marks) in marks.chunks_exact(8).enumerate() {
        let marks = u64::from_le_bytes(marks.try_into().expect("eight of them"));
        // No two marks times two bits of this come to the same place, so that nothing is carried.
        bits |= (marks.wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * at);
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_marked_that_are_not_plain() {
        for byte in 0..=u8::MAX {
            for other in [0, b',', b'-', b'9', 0x7f, 0x80, 0xff] {
                for at in 0..LINE {
                    let mut window = [other; WINDOW];
                    window[at] = byte;
                    let bit = |at: usize| u64::from(window[at] < b'-') << at;
                    let expected: u64 = (0..LINE).map(bit).sum();
                    assert_eq!(not_plain(&window), expected, "{window:?}");
                }
            }
        }
    }
}
