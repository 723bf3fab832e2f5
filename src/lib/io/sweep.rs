//! Reads many blocks in ascending order: neighbours in one large request, many requests in flight, work on all cores.

use super::{AlignedBuffer, BlockEngine};
use crate::units::{BLOCK_SIZE, MetadataBlock};
use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Blocks in the largest request: 1 MiB.
const MAX_REQUEST: u64 = 256;
/// Blocks that are read and thrown away rather than starting another request.
const MAX_GAP: u64 = 8;
/// Fewer requests than this are not worth a thread each.
const REQUESTS_PER_THREAD: usize = 2;

/// Reads each of `blocks` (ascending, no doubles) once and hands it to `visit`, with the state of the thread that read it.
/// Returns the states. Blocks arrive in no particular order when there is more than one thread; a block that cannot be
/// read arrives as its error, its neighbours unharmed. `stop` is asked before each request.
pub fn sweep<S: Send>(
    engine: &dyn BlockEngine,
    blocks: &[u64],
    stop: &(dyn Fn() -> bool + Sync),
    state: impl Fn() -> S + Sync,
    visit: impl Fn(&mut S, MetadataBlock, io::Result<&[u8]>) + Sync,
) -> Vec<S> {
    let requests = plan(blocks);
    let threads = engine
        .depth()
        .min(requests.len() / REQUESTS_PER_THREAD)
        .max(1);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut state = state();
        let mut buffer = None;
        while let Some(request) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop() {
                break;
            }
            let wanted = &blocks[request.clone()];
            // The first request tells how large the rest can be: a lone block needs no megabyte.
            let span = span(wanted) as usize;
            let buffer = match &mut buffer {
                Some((buffer, room)) if *room >= span => buffer,
                slot => &mut slot.insert((AlignedBuffer::new(span), span)).0,
            };
            read_request(engine, wanted, buffer, |block, data| {
                visit(&mut state, block, data)
            });
        }
        state
    };
    if threads == 1 {
        return vec![work()];
    }
    let states = Mutex::new(Vec::with_capacity(threads));
    std::thread::scope(|scope| {
        let run = || {
            let state = work();
            states
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .push(state);
        };
        // Where no more threads can be had, those there are do the work, at the least this one.
        for _ in 1..threads {
            if std::thread::Builder::new()
                .spawn_scoped(scope, run)
                .is_err()
            {
                break;
            }
        }
        run();
    });
    states
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn span(wanted: &[u64]) -> u64 {
    match wanted {
        [first, .., last] => last - first + 1,
        _ => 1,
    }
}

/// Cuts the list into requests of near neighbours.
fn plan(blocks: &[u64]) -> Vec<Range<usize>> {
    let mut requests = Vec::new();
    let mut start = 0;
    for i in 1..=blocks.len() {
        let ends = i == blocks.len()
            || blocks[i] - blocks[i - 1] > MAX_GAP
            || blocks[i] - blocks[start] >= MAX_REQUEST;
        if ends {
            requests.push(start..i);
            start = i;
        }
    }
    requests
}

fn read_request(
    engine: &dyn BlockEngine,
    wanted: &[u64],
    buffer: &mut AlignedBuffer,
    mut visit: impl FnMut(MetadataBlock, io::Result<&[u8]>),
) {
    let first = wanted[0];
    let blocks = span(wanted) as usize;
    if engine
        .read(MetadataBlock(first), buffer.blocks_mut(blocks))
        .is_ok()
    {
        for &block in wanted {
            let at = (block - first) as usize * BLOCK_SIZE;
            visit(
                MetadataBlock(block),
                Ok(&buffer.blocks(blocks)[at..at + BLOCK_SIZE]),
            );
        }
        return;
    }
    for &block in wanted {
        match engine.read(MetadataBlock(block), buffer.blocks_mut(1)) {
            Ok(()) => visit(MetadataBlock(block), Ok(buffer.blocks(1))),
            Err(e) => visit(MetadataBlock(block), Err(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::RamEngine;

    fn never() -> bool {
        false
    }

    #[test]
    fn every_block_arrives_once_with_its_own_contents() {
        let mut bytes = vec![0; 5000 * BLOCK_SIZE];
        for (i, block) in bytes.chunks_exact_mut(BLOCK_SIZE).enumerate() {
            block[..8].copy_from_slice(&(i as u64).to_le_bytes());
        }
        let engine = RamEngine::from_bytes(bytes);
        let blocks: Vec<u64> = (0..5000).filter(|b| b % 3 != 1 && b % 700 > 20).collect();
        let mut seen: Vec<u64> = sweep(&engine, &blocks, &never, Vec::new, |seen, block, data| {
            let data = data.unwrap();
            assert_eq!(data[..8], block.0.to_le_bytes());
            seen.push(block.0);
        })
        .concat();
        seen.sort_unstable();
        assert_eq!(seen, blocks);
    }

    #[test]
    fn a_block_past_the_end_is_an_error_and_its_neighbours_are_not() {
        let engine = RamEngine::new(10);
        let mut results = sweep(
            &engine,
            &[8, 9, 10],
            &never,
            Vec::new,
            |seen, block, data| {
                seen.push((block.0, data.is_ok()));
            },
        )
        .concat();
        results.sort_unstable();
        assert_eq!(results, [(8, true), (9, true), (10, false)]);
    }

    #[test]
    fn requests_bridge_small_gaps_only() {
        assert_eq!(plan(&[]), Vec::<Range<usize>>::new());
        assert_eq!(plan(&[5, 6, 14, 23]), [0..3, 3..4]);
        let long: Vec<u64> = (0..300).collect();
        assert_eq!(plan(&long), [0..256, 256..300]);
    }
}
