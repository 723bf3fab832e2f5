//! Writes space maps from counts, the way the kernel reads them: bitmaps with whole-bitmap free counts, their index, and the
//! tree of counts of 3 and more.

use super::build::{BlockSink, SharedTree, TreeBuilder};
use super::counts::CountMap;
use super::space_map::{
    BITMAP_BYTES, BITMAP_HEADER, Bitmap, INDEX_ENTRY_SIZE, IndexEntry, SpaceMapRoot, nr_bitmaps,
};
use crate::checksum::BlockKind;
use crate::error::Result;
use crate::units::{BLOCK_SIZE, ENTRIES_PER_BITMAP, MetadataBlock};

/// Writes the data space map for `counts`. A bitmap for which `existing` knows a block that already holds the right counts
/// is not written again.
pub fn build_data_map(
    sink: &mut dyn BlockSink,
    counts: &CountMap,
    existing: &dyn Fn(u64) -> Option<MetadataBlock>,
) -> Result<SpaceMapRoot> {
    let mut none = SharedTree::default();
    let mut index = TreeBuilder::<IndexEntry>::new();
    let mut many = TreeBuilder::<u32>::new();
    let mut nr_allocated = 0;
    // Most bitmaps of a large pool have no count: nothing is worked out for each of them.
    let empty = Packed::of(&Bitmap::from_words(&[0; BITMAP_BYTES / 8]));
    for number in 0..nr_bitmaps(counts.nr_blocks()) {
        let touched;
        let (bitmap, counts_of_many) = if counts.is_untouched(number) {
            (&empty, Vec::new())
        } else {
            let (words, counts_of_many) = counts.bitmap(number);
            touched = Packed::of(&Bitmap::from_words(&words));
            (&touched, counts_of_many)
        };
        let block = match existing(number) {
            Some(block) => block,
            None => {
                let block = sink.allocate()?;
                sink.write(block, BlockKind::Bitmap, &bitmap.contents)?;
                block
            }
        };
        let entry = bitmap.index_entry(block);
        nr_allocated += ENTRIES_PER_BITMAP - u64::from(entry.nr_free);
        index.push(sink, &mut none, number, entry)?;
        for (block, count) in counts_of_many {
            many.push(sink, &mut none, block, count)?;
        }
    }
    Ok(SpaceMapRoot {
        nr_blocks: counts.nr_blocks(),
        nr_allocated,
        bitmap_root: index.finish(sink, &mut none)?.root,
        ref_count_root: many.finish(sink, &mut none)?.root,
    })
}

/// Writes the metadata space map for the counts that `sink` keeps, its own blocks included. One reference to each of `freed`
/// (blocks of a space map that is being replaced) is gone in the counts written, but none of them is written over.
pub fn build_metadata_map(
    sink: &mut dyn BlockSink,
    freed: &[MetadataBlock],
) -> Result<SpaceMapRoot> {
    let nr_blocks = sink.counts().nr_blocks();
    let numbers = 0..nr_bitmaps(nr_blocks);
    let mut none = SharedTree::default();
    let mut many = TreeBuilder::<u32>::new();
    // Blocks allocated from here on have one reference, so the counts of 3 and more are final already.
    for number in numbers.clone() {
        for (block, count) in sink.counts().bitmap(number).1 {
            many.push(sink, &mut none, block, count)?;
        }
    }
    let ref_count_root = many.finish(sink, &mut none)?.root;
    let blocks: Vec<_> = numbers
        .clone()
        .map(|_| sink.allocate())
        .collect::<Result<_>>()?;
    let bitmap_root = sink.allocate()?;
    for block in freed {
        sink.counts().remove_one(block.0);
    }
    let mut index = [0; BLOCK_SIZE];
    let mut nr_allocated = 0;
    let slots = index[BITMAP_HEADER..].chunks_exact_mut(INDEX_ENTRY_SIZE);
    for ((number, block), slot) in numbers.zip(blocks).zip(slots) {
        let bitmap = Packed::of(&Bitmap::from_words(&sink.counts().bitmap(number).0));
        sink.write(block, BlockKind::Bitmap, &bitmap.contents)?;
        let entry = bitmap.index_entry(block);
        nr_allocated += ENTRIES_PER_BITMAP - u64::from(entry.nr_free);
        entry.pack(slot);
    }
    sink.write(bitmap_root, BlockKind::Index, &index)?;
    Ok(SpaceMapRoot {
        nr_blocks,
        nr_allocated,
        bitmap_root,
        ref_count_root,
    })
}

/// A bitmap as it is written, with what its index entry says.
struct Packed {
    contents: [u8; BLOCK_SIZE],
    nr_free: u32,
    first_free: u32,
}

impl Packed {
    fn of(bitmap: &Bitmap) -> Self {
        let mut contents = [0; BLOCK_SIZE];
        bitmap.write_to(&mut contents);
        Self {
            contents,
            nr_free: bitmap.nr_free(),
            first_free: bitmap.first_free(),
        }
    }

    fn index_entry(&self, block: MetadataBlock) -> IndexEntry {
        IndexEntry {
            block,
            nr_free: self.nr_free,
            none_free_before: self.first_free,
        }
    }
}
