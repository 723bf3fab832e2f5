//! Numbers and words in text, without a copy.

/// The number that `text` begins with, and its length.
#[inline]
pub(super) fn digits(text: &[u8]) -> Option<(u64, usize)> {
    let (mut value, mut len) = first_digits(text)?;
    if len == 8
        && let Some((more, more_len)) = first_digits(&text[8..])
    {
        value = value * TENS[more_len] + more;
        len += more_len;
    }
    if len == 16 {
        for &byte in text[16..].iter().take_while(|byte| byte.is_ascii_digit()) {
            value = value.checked_mul(10)?.checked_add(u64::from(byte - b'0'))?;
            len += 1;
        }
    }
    Some((value, len))
}

const TENS: [u64; 9] = {
    let mut tens = [1; 9];
    let mut i = 1;
    while i < tens.len() {
        tens[i] = 10 * tens[i - 1];
        i += 1;
    }
    tens
};

/// The number of up to eight digits that `text` begins with, and its length: all digits at once, since a loop over a number of digits
/// that nobody can foretell costs several times as much.
#[inline]
fn first_digits(text: &[u8]) -> Option<(u64, usize)> {
    let word = match text.first_chunk() {
        Some(chunk) => *chunk,
        None => {
            let mut chunk = [0; 8];
            chunk[..text.len()].copy_from_slice(text);
            chunk
        }
    };
    let values = u64::from_le_bytes(word) ^ 0x3030_3030_3030_3030;
    // The first byte above 9 gets its top bit; what a carry does to those behind it is of no interest.
    let others = (values.wrapping_add(0x7676_7676_7676_7676) | values) & 0x8080_8080_8080_8080;
    let len = others.trailing_zeros() as usize / 8;
    if len == 0 {
        return None;
    }
    let digits = values << (64 - 8 * len);
    let pairs = (digits.wrapping_mul(10) + (digits >> 8)) & 0x00ff_00ff_00ff_00ff;
    let fours = (pairs.wrapping_mul(100) + (pairs >> 16)) & 0x0000_ffff_0000_ffff;
    let value = (fours.wrapping_mul(10_000) + (fours >> 32)) & 0xffff_ffff;
    Some((value, len))
}

/// The number that `text` is.
#[inline]
pub(super) fn number(text: &[u8]) -> Option<u64> {
    let (value, len) = digits(text)?;
    (len == text.len()).then_some(value)
}

/// The time that `text` is, a decimal number of units of `unit` nanoseconds.
#[inline]
pub(super) fn time(text: &[u8], unit: u64) -> Option<u64> {
    let (whole, len) = digits(text)?;
    let whole = whole.checked_mul(unit)?;
    if len == text.len() {
        return Some(whole);
    }
    let fraction = text[len..].strip_prefix(b".")?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let fraction = &fraction[..fraction.len().min(9)];
    let (value, len) = digits(fraction).unwrap_or((0, 0));
    whole.checked_add((u128::from(value) * u128::from(unit) / 10u128.pow(len as u32)) as u64)
}

/// The next word of `text`, which is left at what follows it; empty at the end.
#[inline]
pub(super) fn word<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    *text = text.trim_ascii_start();
    let len = text.iter().position(u8::is_ascii_whitespace);
    let (word, rest) = text.split_at(len.unwrap_or(text.len()));
    *text = rest;
    word
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
        for wrong in ["", ".5", "1.5.", "1.x", "-1", "18446744073709551615"] {
            assert_eq!(time(wrong.as_bytes(), 1000), None, "{wrong}");
        }
    }
}
