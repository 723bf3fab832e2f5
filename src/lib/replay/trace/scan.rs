//! Numbers and words in text, without a copy.

/// The number that `text` begins with, and its length.
#[inline]
pub(super) fn digits(text: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0u64;
    let mut len = 0;
    for &byte in text {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            break;
        }
        value = if len < 19 {
            value * 10 + u64::from(digit)
        } else {
            value.checked_mul(10)?.checked_add(u64::from(digit))?
        };
        len += 1;
    }
    (len > 0).then_some((value, len))
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
