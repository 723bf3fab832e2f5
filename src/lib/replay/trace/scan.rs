//! Numbers and words in text, without a copy.

/// The first eight bytes of `text`, zeros behind its end.
#[inline(always)]
pub(super) fn eight(text: &[u8]) -> u64 {
    if let Some(chunk) = text.first_chunk() {
        return u64::from_le_bytes(*chunk);
    }
    match (text.first_chunk(), text.last_chunk()) {
        // Where they overlap they agree.
        (Some(first), Some(last)) => {
            let last = u64::from(u32::from_le_bytes(*last));
            u64::from(u32::from_le_bytes(*first)) | last << (8 * (text.len() - 4))
        }
        // The first, the middle and the last of three are all; of fewer they are the same.
        _ => match (text.first(), text.get(text.len() / 2), text.last()) {
            (Some(&first), Some(&middle), Some(&last)) => {
                let last = u64::from(last) << (8 * (text.len() - 1));
                u64::from(first) | u64::from(middle) << (8 * (text.len() / 2)) | last
            }
            _ => 0,
        },
    }
}

/// Eight times this byte.
pub(super) const fn repeated(byte: u8) -> u64 {
    u64::from_le_bytes([byte; 8])
}

/// Where the first of eight bytes is whose top bit is set; 8 if none is.
#[inline(always)]
fn first_marked(word: u64) -> usize {
    (word & repeated(0x80)).trailing_zeros() as usize / 8
}

/// The number that `text` begins with, and its length.
#[inline(always)]
pub(super) fn digits(text: &[u8]) -> Option<(u64, usize)> {
    match first_digits(text) {
        (_, 0) => None,
        (value, 8) => more_digits(value, &text[8..]),
        found => Some(found),
    }
}

/// The number whose first eight digits are `value`, and its length.
fn more_digits(mut value: u64, rest: &[u8]) -> Option<(u64, usize)> {
    let (more, mut len) = first_digits(rest);
    value = value * TENS[len] + more;
    if len == 8 {
        for &byte in rest[8..].iter().take_while(|byte| byte.is_ascii_digit()) {
            value = value.checked_mul(10)?.checked_add(u64::from(byte - b'0'))?;
            len += 1;
        }
    }
    Some((value, 8 + len))
}

const TENS: [u64; 10] = {
    let mut tens = [1; 10];
    let mut i = 1;
    while i < tens.len() {
        tens[i] = 10 * tens[i - 1];
        i += 1;
    }
    tens
};

/// The number of up to eight digits that `text` begins with, and its length: all digits at once, since a loop over a number of digits
/// that nobody can foretell costs several times as much.
#[inline(always)]
fn first_digits(text: &[u8]) -> (u64, usize) {
    let values = eight(text) ^ repeated(b'0');
    let len = first_marked(above_nine(values));
    let digits = values.checked_shl(64 - 8 * len as u32).unwrap_or(0);
    (from_digits(digits), len)
}

/// The number of eight digits' values, the first in the lowest byte. None if one is above 9.
#[inline(always)]
pub(super) fn eight_digits(values: u64) -> Option<u64> {
    (above_nine(values) & repeated(0x80) == 0).then(|| from_digits(values))
}

/// Marks the first of eight bytes that is above 9, and perhaps some behind it.
#[inline(always)]
fn above_nine(values: u64) -> u64 {
    values.wrapping_add(repeated(0x76)) | values
}

#[inline(always)]
fn from_digits(values: u64) -> u64 {
    let pairs = (values.wrapping_mul(10) + (values >> 8)) & 0x00ff_00ff_00ff_00ff;
    let fours = (pairs.wrapping_mul(100) + (pairs >> 16)) & 0x0000_ffff_0000_ffff;
    (fours.wrapping_mul(10_000) + (fours >> 32)) & 0xffff_ffff
}

/// The number that `text` is.
#[inline]
pub(super) fn number(text: &[u8]) -> Option<u64> {
    let (value, len) = digits(text)?;
    (len == text.len()).then_some(value)
}

/// The time that `text` is, a decimal number of units of `unit` nanoseconds, a second at most.
#[inline]
pub(super) fn time(text: &[u8], unit: u64) -> Option<u64> {
    let mut rest = text;
    let time = next_time(&mut rest, unit)?;
    rest.is_empty().then_some(time)
}

/// The time that `text` begins with, in such units; it is left at what follows.
#[inline]
pub(super) fn next_time(text: &mut &[u8], unit: u64) -> Option<u64> {
    let (whole, len) = digits(text)?;
    let whole = whole.checked_mul(unit)?;
    *text = &text[len..];
    let Some(fraction) = text.strip_prefix(b".") else {
        return Some(whole);
    };
    let (mut value, mut len) = first_digits(fraction);
    if len == 8 {
        let ninth = fraction.get(8).map_or(10, |byte| byte.wrapping_sub(b'0'));
        if ninth < 10 {
            (value, len) = (10 * value + u64::from(ninth), 9);
            // Nobody has parts of nanoseconds.
            len += fraction[9..]
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count();
        }
    }
    *text = &fraction[len..];
    let billionths = value * TENS[9 - len.min(9)];
    whole.checked_add(billionths * unit / 1_000_000_000)
}

/// The next word of `text`, which is left at what follows it; empty at the end.
#[inline]
pub(super) fn word<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    skip_blanks(text);
    let len = word_len(text);
    let (word, rest) = text.split_at(len);
    *text = rest;
    word
}

/// The next word of `text` if it is a number; it is left at what follows.
#[inline]
pub(super) fn next_number(text: &mut &[u8]) -> Option<u64> {
    skip_blanks(text);
    let (value, len) = digits(text)?;
    *text = &text[len..];
    text.first()
        .is_none_or(u8::is_ascii_whitespace)
        .then_some(value)
}

/// Leaves out white space at the beginning; mostly it is less than eight spaces.
#[inline]
pub(super) fn skip_blanks(text: &mut &[u8]) {
    let others = eight(text) ^ repeated(b' ');
    let len = others.trailing_zeros() as usize / 8;
    match text.get(len) {
        Some(byte) if !byte.is_ascii_whitespace() => *text = &text[len..],
        _ => *text = text.trim_ascii_start(),
    }
}

/// The length of the word that `text` begins with; mostly it is less than eight bytes, and a space follows.
#[inline]
fn word_len(text: &[u8]) -> usize {
    let word = eight(text);
    // Whatever is below the exclamation mark.
    let len = first_marked(word.wrapping_sub(repeated(b'!')) & !word);
    match text.get(len) {
        Some(byte) if byte.is_ascii_whitespace() => len,
        _ => text
            .iter()
            .position(u8::is_ascii_whitespace)
            .unwrap_or(text.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_length() {
        for len in 0..20 {
            for after in ["", ",", "/", ":", "\u{ff}1", " 12345678"] {
                let number = &"12345678901234567890"[..len];
                let expected = number.parse().ok().map(|value: u64| (value, len));
                assert_eq!(digits(format!("{number}{after}").as_bytes()), expected);
            }
        }
        assert_eq!(digits(b"18446744073709551615"), Some((u64::MAX, 20)));
        assert_eq!(digits(b"18446744073709551616"), None);
        assert_eq!(digits(b"000000000000000000000000000001 "), Some((1, 30)));
    }

    #[test]
    fn times_with_fractions() {
        assert_eq!(time(b"1.5", 1_000_000_000), Some(1_500_000_000));
        assert_eq!(time(b"0.0000000019", 1_000_000_000), Some(1));
        assert_eq!(time(b"7.", 1000), Some(7000));
        for (text, rest) in [
            ("1.25 x", " x"),
            ("1.", ""),
            ("0.12345678", ""),
            ("0.1234567891,", ","),
        ] {
            let mut after = text.as_bytes();
            next_time(&mut after, 1_000_000_000).expect("a time");
            assert_eq!(after, rest.as_bytes(), "{text}");
        }
        for wrong in ["", ".5", "1.5.", "1.x", "-1", "18446744073709551615"] {
            assert_eq!(time(wrong.as_bytes(), 1000), None, "{wrong}");
        }
    }

    #[test]
    fn words_of_every_length_and_distance() {
        for len in 0..20 {
            for blanks in 0..20 {
                for blank in [" ", "\t", "\x0c"] {
                    let text = format!("{}{}{blank}y", blank.repeat(blanks), "x\u{1}".repeat(len));
                    let (mut rest, expected) = (text.as_bytes(), text.trim_start());
                    assert_eq!(
                        Some(word(&mut rest)),
                        expected.split(blank).next().map(str::as_bytes),
                        "{text:?}"
                    );
                    assert_eq!(
                        word(&mut rest),
                        if len == 0 { &b""[..] } else { b"y" },
                        "{text:?}"
                    );
                    let text = format!("{}{}", " ".repeat(blanks), &"12345678901234567890"[..len]);
                    let expected = text.trim().parse().ok();
                    assert_eq!(next_number(&mut text.as_bytes()), expected, "{text:?}");
                    let text = format!("{text}{blank}y");
                    assert_eq!(next_number(&mut text.as_bytes()), expected, "{text:?}");
                }
            }
        }
        assert_eq!(next_number(&mut &b"12x"[..]), None);
    }
}
