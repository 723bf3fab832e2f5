//! Whether the space maps can be read, for whoever is about to change what they count.

use super::maps::entry_of;
use super::transaction::Transaction;
use super::validator::Validator;
use crate::error::{Error, ErrorKind, Result};
use crate::io::sweep;
use crate::pdata::forest::TreeKind;
use crate::pdata::space_map::nr_bitmaps;
use crate::units::MetadataBlock;

impl Transaction {
    /// Reads both indexes and all bitmaps, each once, past the cache: a bitmap is 4 KiB for 16320 blocks. Counts of three and more are in trees of
    /// their own, which are not read.
    ///
    /// # Errors
    /// `Damaged` with the first block that cannot be used, `Io`.
    pub(crate) fn verify_maps(&mut self) -> Result<()> {
        let mut bitmaps: Vec<u64> = self.metadata_bitmaps().map(|block| block.0).collect();
        let wanted = nr_bitmaps(self.data_map().nr_blocks);
        let index = self.cursor(TreeKind::DataIndex, self.data_map().bitmap_root, 0)?;
        let mut number = 0;
        for found in index.take_while(|found| !matches!(found, Ok((key, _)) if *key >= wanted)) {
            let (key, words) = found?;
            if key != number {
                break;
            }
            bitmaps.push(entry_of(number, words)?.block.0);
            number += 1;
        }
        if number < wanted {
            return Err(missing(number));
        }
        bitmaps.sort_unstable();
        if let Some(twice) = bitmaps.windows(2).find(|two| two[0] == two[1]) {
            let what = format!(
                "metadata block {} is the bitmap of two places in the space maps; run thin_check",
                twice[0]
            );
            return Err(Error::new(ErrorKind::Damaged, what));
        }
        let visit =
            |worst: &mut Option<(MetadataBlock, Error)>, block, read: std::io::Result<&[u8]>| {
                let verified = match read {
                    Ok(bytes) => Validator::Bitmap.check(bytes, block),
                    Err(e) => Err(Error::io(format!("cannot read metadata block {block}"), e)),
                };
                if let Err(e) = verified
                    && worst.as_ref().is_none_or(|(first, _)| block < *first)
                {
                    *worst = Some((block, e));
                }
            };
        let engine = &**self.blocks().engine();
        let worst = sweep(engine, &bitmaps, &|| false, || None, visit);
        match worst.into_iter().flatten().min_by_key(|(block, _)| *block) {
            Some((_, e)) => Err(e),
            None => Ok(()),
        }
    }
}

/// The index has no such bitmap.
pub(super) fn missing(number: u64) -> Error {
    Error::new(
        ErrorKind::Damaged,
        format!("the space map has no bitmap {number}; run thin_check"),
    )
}
