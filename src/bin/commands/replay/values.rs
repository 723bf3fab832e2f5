//! Values of options: sizes, times, and what a device of the trace is.

use std::time::Duration;

use thintools::pool::Features;
use thintools::units::{MAX_THIN_ID, ThinId};

/// A number with a letter for what it is multiplied by.
fn scaled(text: &str, letters: &[(char, u64)]) -> Result<u64, String> {
    let (digits, scale) = split_letter(text, letters);
    let number: u64 = digits.parse().map_err(|_| {
        format!("{text:?} is not a number with one of the letters that it may have")
    })?;
    number
        .checked_mul(scale)
        .ok_or_else(|| format!("{text} is too large"))
}

/// What is before a letter, and what it is multiplied by.
fn split_letter<'a>(text: &'a str, letters: &[(char, u64)]) -> (&'a str, u64) {
    let scaled = letters
        .iter()
        .find_map(|&(letter, scale)| Some((text.strip_suffix(letter)?, scale)));
    scaled.unwrap_or((text, 1))
}

/// A size in sectors of 512 bytes.
pub(in crate::commands) fn sectors(text: &str) -> Result<u64, String> {
    let letters = [
        ('s', 512),
        ('k', 1 << 10),
        ('m', 1 << 20),
        ('g', 1 << 30),
        ('t', 1 << 40),
    ];
    let bytes = scaled(&text.to_ascii_lowercase(), &letters)?;
    match bytes.is_multiple_of(512) {
        true => Ok(bytes / 512),
        false => Err(format!(
            "{text} is not a whole number of sectors of 512 bytes"
        )),
    }
}

/// A size of data blocks in sectors of 512 bytes.
pub(super) fn data_block(text: &str) -> Result<u64, String> {
    match sectors(text)? {
        size if size.is_multiple_of(128) && (128..=2_097_152).contains(&size) => Ok(size),
        size => Err(format!(
            "data blocks of {size} sectors; a multiple of 64k up to 1g is possible"
        )),
    }
}

pub(super) fn feature(word: &str) -> Result<String, String> {
    let known = Features::from_words(&[word]);
    known.map(|_| word.to_owned()).map_err(|e| e.to_string())
}

pub(super) fn time(text: &str) -> Result<Duration, String> {
    let letters = [('s', 1), ('m', 60), ('h', 3600), ('d', 86_400)];
    let (digits, scale) = split_letter(text, &letters);
    // What is a number otherwise, as inf, 1e9 and -0, is no time.
    let is_plain = digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number = digits.parse::<f64>().ok().filter(|_| is_plain);
    let number = number.ok_or_else(|| format!("{text:?} is not a number with s, m, h or d"))?;
    match Duration::try_from_secs_f64(number * scale as f64) {
        Ok(Duration::ZERO) => Err("a time of 0 is no interval".into()),
        Ok(time) if u64::try_from(time.as_nanos()).is_ok() => Ok(time),
        _ => Err(format!("{text} is too long")),
    }
}

/// Time between snapshots; none is never.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule(pub(super) Option<Duration>);

pub(super) fn schedule(text: &str) -> Result<Schedule, String> {
    Ok(Schedule(match text {
        "never" => None,
        text => Some(time(text)?),
    }))
}

/// `DEV=ID[:SIZE]`
pub(super) fn mapping(text: &str) -> Result<(String, ThinId, Option<u64>), String> {
    let wrong = || format!("{text:?} is not DEV=ID or DEV=ID:SIZE");
    let (device, thin) = text.rsplit_once('=').ok_or_else(wrong)?;
    let (id, size) = match thin.split_once(':') {
        Some((id, size)) => (id, Some(sectors(size)?)),
        None => (thin, None),
    };
    match id.parse() {
        Ok(id) if id <= MAX_THIN_ID => Ok((device.into(), ThinId(id), size)),
        Ok(id) => Err(format!("thin device {id} is past the last, {MAX_THIN_ID}")),
        Err(_) => Err(wrong()),
    }
}
