//! The words that dmsetup loads a pool and its thin devices with, refused with the kernel's sentences.

use super::line::Words;
use super::message::refused;
use crate::error::Error;
use crate::units::{
    DATA_BLOCK_SIZE_STEP, MAX_DATA_BLOCK_SIZE, MAX_THIN_ID, ThinId, is_legal_data_block_size,
};
use std::fmt;
use std::str::FromStr;

/// The optional words of a pool's table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// New blocks are not zeroed.
    pub skip_block_zeroing: bool,
    /// Discards are not supported.
    pub ignore_discard: bool,
    /// Discards unmap, but are not passed down to the data device.
    pub no_discard_passdown: bool,
    /// The metadata is not changed.
    pub read_only: bool,
    /// Writes that need a block when there is none fail at once.
    pub error_if_no_space: bool,
}

/// Feature words that a table may have.
const MOST_WORDS: usize = 4;

impl Features {
    fn switch(&mut self, word: &str) -> Option<&mut bool> {
        Some(match word.to_ascii_lowercase().as_str() {
            "skip_block_zeroing" => &mut self.skip_block_zeroing,
            "ignore_discard" => &mut self.ignore_discard,
            "no_discard_passdown" => &mut self.no_discard_passdown,
            "read_only" => &mut self.read_only,
            "error_if_no_space" => &mut self.error_if_no_space,
            _ => return None,
        })
    }

    /// Those that are on, in the order in which the kernel prints them.
    fn words(&self) -> impl Iterator<Item = &'static str> + Clone + use<> {
        [
            (self.skip_block_zeroing, "skip_block_zeroing"),
            (self.ignore_discard, "ignore_discard"),
            (self.no_discard_passdown, "no_discard_passdown"),
            (self.read_only, "read_only"),
            (self.error_if_no_space, "error_if_no_space"),
        ]
        .into_iter()
        .filter_map(|(is_on, word)| is_on.then_some(word))
    }

    /// Those that are named.
    ///
    /// # Errors
    /// `InvalidArgument` for a word that is none.
    pub fn from_words<S: AsRef<str>>(words: &[S]) -> Result<Self, Error> {
        let mut features = Self::default();
        for word in words {
            let word = word.as_ref();
            *features.switch(word).ok_or_else(|| {
                refused(format!("Unrecognised pool feature requested: {word:?}"))
            })? = true;
        }
        Ok(features)
    }

    /// Reads the number of words, and the words.
    fn parse(words: &[&str]) -> Result<Self, Error> {
        let Some((count, words)) = words.split_first() else {
            return Ok(Self::default());
        };
        if count.parse() != Ok(words.len()) || words.len() > MOST_WORDS {
            return Err(refused(format!(
                "Invalid number of pool feature arguments: {count:?} for {} words; up to {MOST_WORDS} are possible",
                words.len()
            )));
        }
        Self::from_words(words)
    }
}

/// A pool's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolTable {
    /// The metadata device, as it was named.
    pub metadata_device: String,
    /// The data device, as it was named.
    pub data_device: String,
    /// Sectors of 512 bytes in a data block.
    pub block_sectors: u32,
    /// Free data blocks at which the manager is told.
    pub low_water_blocks: u64,
    /// What was asked for.
    pub features: Features,
}

impl Words for PoolTable {
    const TARGET: &'static str = "thin-pool";
}

/// With a blank behind the last word, as the kernel has it.
impl fmt::Display for PoolTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.features.words();
        write!(
            f,
            "{} {} {} {} {} ",
            self.metadata_device,
            self.data_device,
            self.block_sectors,
            self.low_water_blocks,
            words.clone().count()
        )?;
        words.into_iter().try_for_each(|word| write!(f, "{word} "))
    }
}

impl FromStr for PoolTable {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let [metadata, data, block, low_water, features @ ..] = &words[..] else {
            return Err(refused(format!(
                "Invalid argument count: {}, where METADATA DATA BLOCK_SIZE LOW_WATER are expected",
                words.len()
            )));
        };
        if metadata == data {
            return Err(refused(format!(
                "Error setting metadata or data device: {data} is named for both"
            )));
        }
        let features = Features::parse(features)?;
        let size = block.parse().ok().filter(|&s| is_legal_data_block_size(s));
        let block_sectors = size.ok_or_else(|| {
            refused(format!(
                "Invalid block size: {block:?}; a multiple of {DATA_BLOCK_SIZE_STEP} sectors up to {MAX_DATA_BLOCK_SIZE} is possible"
            ))
        })?;
        let low_water_blocks = low_water
            .parse()
            .map_err(|_| refused(format!("Invalid low water mark: {low_water:?}")))?;
        Ok(Self {
            metadata_device: (*metadata).into(),
            data_device: (*data).into(),
            block_sectors,
            low_water_blocks,
            features,
        })
    }
}

/// A thin device's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThinTable {
    /// The pool, as it was named.
    pub pool: String,
    /// Which device of the pool.
    pub id: ThinId,
    /// The read-only device that has what was never written.
    pub origin: Option<String>,
}

impl Words for ThinTable {
    const TARGET: &'static str = "thin";
}

impl fmt::Display for ThinTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pool, self.id)?;
        match &self.origin {
            Some(origin) => write!(f, " {origin}"),
            None => Ok(()),
        }
    }
}

impl FromStr for ThinTable {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let (pool, id, origin) = match words[..] {
            [pool, id] => (pool, id, None),
            [pool, id, origin] => (pool, id, Some(origin)),
            _ => {
                return Err(refused(format!(
                    "Invalid argument count: {}, where POOL ID [ORIGIN] are expected",
                    words.len()
                )));
            }
        };
        if origin == Some(pool) {
            return Err(refused(format!(
                "Error setting origin device: {pool} is the pool"
            )));
        }
        let number = id.parse().ok().filter(|&number| number <= MAX_THIN_ID);
        let number = number.ok_or_else(|| {
            refused(format!(
                "Invalid device id: {id:?}; 0 to {MAX_THIN_ID} are possible"
            ))
        })?;
        Ok(Self {
            pool: pool.into(),
            id: ThinId(number),
            origin: origin.map(Into::into),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::line::Line;
    use super::*;
    use crate::error::ErrorKind;

    fn printed(text: &str) -> String {
        text.parse::<Line<PoolTable>>().unwrap().to_string()
    }

    #[test]
    fn features_are_printed_once_and_in_order() {
        for (given, expected) in [
            ("m d 128 0", "m d 128 0 0 "),
            ("m d 384 7 0", "m d 384 7 0 "),
            (
                "m d 128 0 4 error_if_no_space read_only read_only skip_block_zeroing",
                "m d 128 0 3 skip_block_zeroing read_only error_if_no_space ",
            ),
            (
                "m d 2097152 0 2 no_discard_passdown ignore_discard",
                "m d 2097152 0 2 ignore_discard no_discard_passdown ",
            ),
        ] {
            assert_eq!(
                printed(&format!("0 2048 thin-pool {given}")),
                format!("0 2048 thin-pool {expected}")
            );
        }
    }

    #[test]
    fn wrong_tables_are_refused_with_the_kernels_sentences() {
        let five = "m d 128 0 5 read_only read_only read_only read_only read_only";
        for (given, sentence) in [
            ("", "Invalid argument count"),
            ("m d 128", "Invalid argument count"),
            ("m m 128 0", "Error setting metadata or data device"),
            ("m d 0 0", "Invalid block size"),
            ("m d 64 0", "Invalid block size"),
            ("m d 192 0", "Invalid block size"),
            ("m d 2097280 0", "Invalid block size"),
            ("m d big 0", "Invalid block size"),
            ("m d 128 low", "Invalid low water mark"),
            ("m d 128 -1", "Invalid low water mark"),
            ("m d 128 0 x", "Invalid number of pool feature arguments"),
            ("m d 128 0 1", "Invalid number of pool feature arguments"),
            (
                "m d 128 0 0 read_only",
                "Invalid number of pool feature arguments",
            ),
            (five, "Invalid number of pool feature arguments"),
            ("m d 128 0 1 fast", "Unrecognised pool feature requested"),
        ] {
            let refusal = given.parse::<PoolTable>().unwrap_err();
            assert_eq!(refusal.kind(), ErrorKind::InvalidArgument, "{given}");
            assert!(refusal.to_string().starts_with(sentence), "{refusal}");
        }
        for (given, sentence) in [
            ("p", "Invalid argument count"),
            ("p 1 o more", "Invalid argument count"),
            ("p 16777216", "Invalid device id"),
            ("p -1", "Invalid device id"),
            ("p a", "Invalid device id"),
            ("p 1 p", "Error setting origin device"),
        ] {
            let refusal = given.parse::<ThinTable>().unwrap_err();
            assert_eq!(refusal.kind(), ErrorKind::InvalidArgument, "{given}");
            assert!(refusal.to_string().starts_with(sentence), "{refusal}");
        }
        for given in [
            "128 2048 thin-pool m d 128 0",
            "0 2048 thin m d 128 0",
            "0 -1 thin-pool m d 128 0",
            "0 2048",
        ] {
            let refusal = given.parse::<Line<PoolTable>>().unwrap_err();
            assert_eq!(refusal.kind(), ErrorKind::InvalidArgument, "{given}");
        }
    }
}
