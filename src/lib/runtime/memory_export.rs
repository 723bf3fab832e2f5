//! An export in memory: for tests of servers, and for whoever wants to see one at work.

use super::export::{Answer, Connection, Export, Exports, Extent, Replier, Request, add_extent};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE: u64 = 65536;

#[derive(Default)]
struct Pages {
    /// What is there; the rest is a hole.
    of_data: BTreeMap<u64, Box<[u8]>>,
    /// Pages changed since it was made.
    dirty: BTreeSet<u64>,
}

/// A disk in memory, in pages of 64 KiB, with holes.
pub struct MemoryExport {
    size: u64,
    is_read_only: bool,
    pages: Mutex<Pages>,
    flushes: AtomicU64,
}

impl MemoryExport {
    /// Of `size` bytes, all of them a hole.
    pub fn new(size: u64, is_read_only: bool) -> Self {
        Self {
            size,
            is_read_only,
            pages: Mutex::default(),
            flushes: AtomicU64::new(0),
        }
    }

    /// How often something was made durable: flushes, and what came with FUA.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Acquire)
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let pages = self.pages();
        for (page, at, range) in cut(offset, data.len() as u64) {
            let part = &mut data[range];
            match pages.of_data.get(&page) {
                Some(bytes) => part.copy_from_slice(&bytes[at..at + part.len()]),
                None => part.fill(0),
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut pages = self.pages();
        for (page, at, range) in cut(offset, data.len() as u64) {
            let part = &data[range];
            pages.dirty.insert(page);
            let bytes = pages.of_data.entry(page);
            let bytes = bytes.or_insert_with(|| vec![0; PAGE as usize].into());
            bytes[at..at + part.len()].copy_from_slice(part);
        }
    }

    /// Makes a range read as zeros; what is a hole remains one.
    fn zero(&self, offset: u64, len: u64, keeps_pages: bool) {
        let mut pages = self.pages();
        let end = offset + len;
        let touched: Vec<u64> = match keeps_pages {
            true => (offset / PAGE..end.div_ceil(PAGE)).collect(),
            false => {
                let there = pages.of_data.range(offset / PAGE..end.div_ceil(PAGE));
                there.map(|(page, _)| *page).collect()
            }
        };
        for page in touched {
            pages.dirty.insert(page);
            let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
            if to - from == PAGE && !keeps_pages {
                pages.of_data.remove(&page);
                continue;
            }
            let bytes = pages.of_data.entry(page);
            let bytes = bytes.or_insert_with(|| vec![0; PAGE as usize].into());
            bytes[(from % PAGE) as usize..][..(to - from) as usize].fill(0);
        }
    }

    fn carry_out(&self, request: Request) -> Answer {
        let is_durable = matches!(
            request,
            Request::Flush
                | Request::Write { fua: true, .. }
                | Request::Trim { fua: true, .. }
                | Request::WriteZeroes { fua: true, .. }
        );
        if is_durable {
            self.flushes.fetch_add(1, Ordering::AcqRel);
        }
        match request {
            Request::Read { offset, len } => {
                let mut data = vec![0; len];
                self.read(offset, &mut data);
                return Ok(data);
            }
            Request::Write { offset, data, .. } => self.write(offset, &data),
            Request::Trim { offset, len, .. } => self.zero(offset, len, false),
            Request::WriteZeroes {
                no_hole: true,
                fast_zero: true,
                ..
            } => return Err(Errno::OPNOTSUPP),
            Request::WriteZeroes {
                offset,
                len,
                no_hole,
                ..
            } => self.zero(offset, len, no_hole),
            Request::Flush | Request::Cache { .. } => {}
        }
        Ok(Vec::new())
    }
}

/// The pages of a range, with where in the page and in the range each part is.
fn cut(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let end = offset + len;
    (offset / PAGE..end.div_ceil(PAGE)).map(move |page| {
        let (from, to) = (offset.max(page * PAGE), end.min((page + 1) * PAGE));
        let range = (from - offset) as usize..(to - offset) as usize;
        (page, (from % PAGE) as usize, range)
    })
}

impl Export for MemoryExport {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    fn preferred_block(&self) -> u32 {
        PAGE as u32
    }

    fn contexts(&self) -> Vec<String> {
        [
            "base:allocation",
            "qemu:allocation-depth",
            "qemu:dirty-bitmap:all",
        ]
        .map(String::from)
        .into()
    }

    fn extents(&self, context: &str, range: Range<u64>, most: usize) -> Result<Vec<Extent>, Errno> {
        let pages = self.pages();
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let page = at / PAGE;
            let end = ((page + 1) * PAGE).min(range.end);
            let is_there = pages.of_data.contains_key(&page);
            let status = match context {
                "base:allocation" => u32::from(!is_there) * 3,
                "qemu:allocation-depth" => u32::from(is_there),
                "qemu:dirty-bitmap:all" => u32::from(pages.dirty.contains(&page)),
                _ => return Err(Errno::INVAL),
            };
            if extents.len() == most && extents.last().is_some_and(|e: &Extent| e.status != status)
            {
                break;
            }
            add_extent(&mut extents, end - at, status);
            at = end;
        }
        Ok(extents)
    }

    fn allocated(&self) -> Result<u64, Errno> {
        Ok(self.pages().of_data.len() as u64 * PAGE)
    }

    fn connect(self: Arc<Self>) -> Box<dyn Connection> {
        Box::new(Direct(self))
    }
}

struct Direct(Arc<MemoryExport>);

impl Connection for Direct {
    fn submit(&mut self, request: Request, reply: Replier) {
        reply.answer(self.0.carry_out(request));
    }

    fn holes(&mut self, range: Range<u64>) -> Vec<Extent> {
        let found = self.0.extents("base:allocation", range, usize::MAX);
        found.unwrap_or_default()
    }
}

/// Exports by name; the default is the first of them.
impl Exports for BTreeMap<String, Arc<MemoryExport>> {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        let found = match name {
            "" => self.values().next(),
            name => self.get(name),
        };
        found.map(|export| Arc::clone(export) as Arc<dyn Export>)
    }

    fn list(&self) -> Vec<(String, String)> {
        let described = |export: &MemoryExport| format!("{} bytes in memory", export.size);
        self.iter()
            .map(|(name, export)| (name.clone(), described(export)))
            .collect()
    }
}
