//! The way of a mapped block allocates nothing, but for the mappings that a reader remembers, whose room doubles a few times. A program of
//! its own, for it has an allocator that counts.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use thintools::io::RamEngine;
use thintools::pdata::txn::LockScheme;
use thintools::pool::{Bio, Features, Mapped, Mapper, Op, PoolTable, Settings, Worker};
use thintools::thin::PoolMetadata;
use thintools::units::{ThinBlock, ThinId};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is left to the system's allocator; counting touches a thread-local number that needs neither an allocation nor
// a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` above, that is from `System`, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

const BLOCKS: u64 = 4096;

/// Times that a reader's room for mappings doubles, under the scheme in which it remembers them.
const DOUBLINGS: u64 = 5;

fn pool(scheme: LockScheme) -> Worker {
    let mut metadata =
        PoolMetadata::format(Arc::new(RamEngine::new(1024)), 128, 16 << 20).expect("formatted");
    metadata.resize_data(BLOCKS).expect("resized");
    metadata.create_thin(ThinId(0)).expect("made");
    for block in 0..BLOCKS {
        let data = metadata.alloc_data_block().expect("room").expect("a block");
        let inserted = metadata.insert_block(ThinId(0), ThinBlock(block), data);
        inserted.expect("mapped");
    }
    metadata.commit().expect("committed");
    let table = PoolTable {
        metadata_device: "252:0".into(),
        data_device: "252:1".into(),
        block_sectors: 128,
        low_water_blocks: 0,
        features: Features::default(),
    };
    let settings = Settings {
        scheme,
        ..Settings::new(table)
    };
    Worker::start(metadata, settings).expect("started")
}

#[test]
fn mapped_blocks_cost_no_allocation_but_room_to_remember_them() {
    for scheme in LockScheme::ALL {
        let mut worker = pool(scheme);
        let thin = worker.open_thin(ThinId(0), None).expect("opened");
        let pool = Arc::clone(worker.pool());
        let mut mapper = Mapper::new(&pool, false);
        let mut bio = Box::new(Bio::new(0, Op::Read, 0, 8));
        let before = allocations();
        for block in (0..BLOCKS).cycle().take(30 * BLOCKS as usize) {
            bio.sector = block * 128;
            let Mapped::Remapped { bio: mapped, .. } = mapper.map(&thin, bio) else {
                panic!("{scheme}: block {block} is mapped");
            };
            let (ended, result) = pool.end_io(mapped, Ok(())).expect("it is done");
            assert_eq!(result, Ok(()));
            bio = ended;
        }
        let most = match scheme {
            LockScheme::Optimistic => DOUBLINGS,
            _ => 0,
        };
        let made = allocations() - before;
        assert!(made <= most, "{scheme}: {made}");
        // The counter counts.
        let mut effects = Vec::new();
        worker.apply(Duration::ZERO, thintools::pool::Event::Work, &mut effects);
        drop(Box::new(Bio::flush(1)));
        assert!(allocations() > before);
    }
}
