//! Edited images, changed by a short script: nothing may panic, and metadata that the check finds nothing wrong with is sound after
//! it, too.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use thintools::Result;
use thintools::io::RamEngine;
use thintools::pdata::txn::LockScheme;
use thintools::thin::{PoolMetadata, SharedMetadata};
use thintools::units::{BLOCK_SIZE, DataBlock, ThinBlock, ThinId};
use thintools_fuzz::{BASES, Input, assert_clean, check_all, edited, is_clean};

/// Blocks that the device has behind the image, for the metadata to grow into.
const MORE: usize = 16;
const MOST_STEPS: u8 = 32;

/// One operation. Counts that no mapping stands for make sound metadata leak, and are not changed in it.
fn step(pool: &mut PoolMetadata, input: &mut Input<'_>, is_sound: bool) -> Result<()> {
    let (op, id) = (input.u8() % 21, ThinId(u64::from(input.u8())));
    let at = u64::from(input.u16());
    let (begin, n) = (ThinBlock(at), u64::from(input.u8()));
    match op {
        0 => pool.create_thin(id),
        1 | 2 => pool.create_snap(id, ThinId(n)),
        3 => pool.delete_device(id),
        4..=6 => (0..n.min(16)).try_for_each(|i| match pool.alloc_data_block()? {
            Some(data) => pool.insert_block(id, ThinBlock(at + i * n), data),
            None => Ok(()),
        }),
        7 | 8 => {
            let end = if n == 255 { u64::MAX } else { at + n * n };
            pool.remove_range(id, begin, ThinBlock(end)).map(|_| ())
        }
        9 => pool.find_block(id, begin).map(|_| ()),
        10 => pool.highest_block(id).map(|_| ()),
        11 => pool.next_block(id, begin).map(|_| ()),
        12 => pool.status().map(|_| ()),
        13 => pool.resize_data(pool.status()?.data_blocks.saturating_add(at)),
        14 => pool.resize_metadata(pool.status()?.metadata_blocks.saturating_add(n % 4)),
        15 if !is_sound => pool.inc_data_range(DataBlock(at), DataBlock(at + n)),
        16 if !is_sound => pool.dec_data_range(DataBlock(at), DataBlock(at + n)),
        17 => pool.reserve_metadata_snap().map(|_| ()),
        18 => pool.release_metadata_snap(),
        19 => pool.abort(),
        _ => pool.commit(),
    }
}

fn run(pool: &mut PoolMetadata, input: &mut Input<'_>, is_sound: bool) -> Result<()> {
    for _ in 0..input.u8() % MOST_STEPS {
        if step(pool, input, is_sound).is_err() {
            pool.abort()?;
        }
    }
    match pool.commit() {
        Ok(()) => Ok(()),
        Err(_) => pool.abort(),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let base = &BASES[usize::from(input.u8()) % BASES.len()];
    let (how, script) = (input.u8(), input.bytes(6 * usize::from(MOST_STEPS)));
    let mut image = edited(base, &mut input);
    image.resize(image.len() + MORE * BLOCK_SIZE, 0);
    let engine = Arc::new(RamEngine::from_bytes(image));
    let is_sound = how & 1 != 0 && is_clean(&check_all(&*engine));
    let cache = if how & 2 != 0 { 0 } else { 4 << 20 };
    let Ok(mut pool) = PoolMetadata::open(Arc::clone(&engine) as _, cache) else {
        return;
    };
    let mut script = Input(script);
    if run(&mut pool, &mut script, is_sound).is_err() {
        return;
    }
    let shared = SharedMetadata::new(pool, LockScheme::ALL[usize::from(how >> 2) % 5]);
    if let Ok(thin) = shared.open_thin(ThinId(u64::from(script.u8()))) {
        let mut reader = shared.reader(true);
        for block in [0, u64::from(script.u16()), u64::MAX] {
            let _ = reader.try_find_block(&thin, ThinBlock(block));
            let _ = reader.find_block(&thin, ThinBlock(block));
        }
    }
    if is_sound {
        assert_clean(&*engine);
    }
});
