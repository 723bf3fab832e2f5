//! The fields of a short line with commas between them, whose ends are all found at once.
//!
//! A search from each comma to the next, and a loop over digits, end where nobody can foretell; here a line costs the same whatever its
//! fields are like.

use wide::u8x16;

use super::scan::{self, eight_digits, repeated};

/// The bytes of a line in which fields are looked for.
const LINE: usize = 64;
/// Fields that are looked for.
pub(super) const MOST: usize = 15;
/// Eight bytes can be read from wherever a field starts.
const WINDOW: usize = LINE + 8;
/// Ends of lines, blanks and quotes are below this, as commas are; digits and letters are not.
const PLAIN: u8 = b'-';

/// The fields that a line begins with.
pub(super) struct Fields<'a> {
    window: &'a [u8; WINDOW],
    /// Where each field starts, and one more would.
    starts: [u8; MOST + 1],
    len: usize,
}

/// A field, or several with commas between them. All other bytes are plain.
#[derive(Clone, Copy)]
pub(super) struct Field<'a> {
    window: &'a [u8; WINDOW],
    start: usize,
    len: usize,
}

impl<'a> Fields<'a> {
    /// The first fields, at least one and [`MOST`] at most, of the line that `text` begins with. None if there are not so many with
    /// nothing but plain bytes, and at the end of what was read.
    #[inline(always)]
    pub(super) fn of(text: &'a [u8], count: usize) -> Option<Self> {
        let window = text.first_chunk::<WINDOW>()?;
        let (all, commas) = marks(window);
        let (mut ends, mut starts) = (all, [0; MOST + 1]);
        for start in starts.get_mut(1..=count)? {
            *start = ends.trailing_zeros() as u8 + 1;
            ends &= ends.wrapping_sub(1);
        }
        let len = usize::from(starts[count]) - 1;
        let between = 1_u64.checked_shl(len as u32)? - 1;
        ((all ^ commas) & between == 0).then_some(Self {
            window,
            starts,
            len,
        })
    }

    /// The fields from one to another, of those there are.
    #[inline(always)]
    pub(super) fn get(&self, first: usize, last: usize) -> Field<'a> {
        let start = usize::from(self.starts[first]);
        Field {
            window: self.window,
            start,
            len: usize::from(self.starts[last + 1]) - 1 - start,
        }
    }

    /// Where the last of them ends.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.len
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

/// A bit for each byte of a line that is not plain, and for those of them that are commas.
#[inline(always)]
fn marks(window: &[u8; WINDOW]) -> (u64, u64) {
    let (mut all, mut commas) = (0, 0);
    for at in (0..LINE).step_by(16) {
        let bytes: [u8; 16] = *window[at..].first_chunk().expect("in the window");
        let bytes = u8x16::new(bytes);
        let not_plain = bytes.min(u8x16::splat(PLAIN - 1)).simd_eq(bytes);
        all |= u64::from(not_plain.to_bitmask()) << at;
        commas |= u64::from(bytes.simd_eq(u8x16::splat(b',')).to_bitmask()) << at;
    }
    (all, commas)
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
                    let bits = |is: fn(u8) -> bool| -> u64 {
                        (0..LINE).map(|at| u64::from(is(window[at])) << at).sum()
                    };
                    let expected = (bits(|byte| byte < b'-'), bits(|byte| byte == b','));
                    assert_eq!(marks(&window), expected, "{window:?}");
                }
            }
        }
    }
}
