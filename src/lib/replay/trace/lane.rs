//! One file of a blktrace on its way: it is read, and what was read is understood, a stretch at a time, by whoever has the time.

use std::collections::VecDeque;
use std::mem;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::crew::{Steps, locked};
use super::decoder::{Decoder, Found};
use super::input::Input;
use crate::error::Error;

/// Stretches that are read and not understood yet, and understood and not taken yet.
const AHEAD: usize = 2;

/// Bytes of a file.
#[derive(Default)]
pub(super) struct Stretch {
    bytes: Vec<u8>,
    start: usize,
    stop: usize,
    /// Why there is nothing behind it.
    pub(super) end: Option<End>,
}

/// The end of a file.
pub(super) struct End {
    /// It is compressed, and what there is of it ended before its contents did.
    pub(super) is_cut: bool,
    pub(super) end_warning: Option<String>,
    /// It could not be read.
    pub(super) failed: Option<Error>,
}

impl Stretch {
    pub(super) fn data(&self) -> &[u8] {
        &self.bytes[self.start..self.stop]
    }

    /// Begins with what was left of the stretch before.
    pub(super) fn put_before(&mut self, rest: &[u8]) {
        match self.start.checked_sub(rest.len()) {
            Some(start) => {
                self.bytes[start..self.start].copy_from_slice(rest);
                self.start = start;
            }
            None => {
                self.bytes.splice(..self.start, rest.iter().copied());
                self.stop += rest.len() - self.start;
                self.start = 0;
            }
        }
    }
}

/// A file.
pub(super) struct Lane {
    source: Mutex<Source>,
    decoder: Mutex<Decoder>,
    store: Mutex<Store>,
}

struct Source {
    input: Input,
    /// Bytes of a stretch.
    at_once: usize,
    is_ended: bool,
}

/// What is under way, each in its order, and vectors that go round.
#[derive(Default)]
struct Store {
    stretches: VecDeque<Stretch>,
    found: VecDeque<Found>,
    spare_stretches: Vec<Stretch>,
    spare_found: Vec<Found>,
}

impl Lane {
    /// Of a file that is read so many bytes at a time.
    pub(super) fn new(mut input: Input, decoder: Decoder, at_once: usize) -> Self {
        // As much is read as there is room for.
        if input.data().is_empty() {
            input.give(&mut Vec::new(), at_once);
        }
        let is_ended = false;
        Self {
            source: Mutex::new(Source {
                input,
                at_once,
                is_ended,
            }),
            decoder: Mutex::new(decoder),
            store: Mutex::default(),
        }
    }

    /// Takes what was found next, if it was, for what it left.
    pub(super) fn exchange(&self, found: &mut Found) -> bool {
        let mut store = locked(&self.store);
        let Some(next) = store.found.pop_front() else {
            return false;
        };
        store.spare_found.push(mem::replace(found, next));
        true
    }

    /// Reads a stretch. False if that is done by somebody else, or far enough.
    fn read(&self) -> bool {
        let Ok(mut source) = self.source.try_lock() else {
            return false;
        };
        let mut store = locked(&self.store);
        if source.is_ended || store.stretches.len() >= AHEAD {
            return false;
        }
        let mut stretch = store.spare_stretches.pop().unwrap_or_default();
        drop(store);
        source.read(&mut stretch);
        locked(&self.store).stretches.push_back(stretch);
        true
    }

    /// Understands a stretch. False if that is done by somebody else, or far enough, or there is none.
    fn find(&self) -> bool {
        let Ok(mut decoder) = self.decoder.try_lock() else {
            return false;
        };
        let mut store = locked(&self.store);
        if store.found.len() >= AHEAD {
            return false;
        }
        let Some(mut stretch) = store.stretches.pop_front() else {
            return false;
        };
        let room = store.spare_found.pop().unwrap_or_default();
        drop(store);
        let found = decoder.find(&mut stretch, room);
        let mut store = locked(&self.store);
        store.found.push_back(found);
        store.spare_stretches.push(stretch);
        true
    }
}

impl Source {
    /// Reads so much at once, or of what may be still in the making whatever there is.
    fn read(&mut self, stretch: &mut Stretch) {
        let Self { input, at_once, .. } = self;
        let least = if input.is_live() { 1 } else { *at_once };
        let more = input.want(least);
        self.is_ended = !matches!(more, Ok(true));
        let given = input.give(&mut stretch.bytes, *at_once);
        (stretch.start, stretch.stop) = (given.start, given.end);
        stretch.end = self.is_ended.then(|| End {
            is_cut: input.is_cut(),
            end_warning: input.end_warning(),
            failed: more.err(),
        });
    }
}

/// All files of a trace.
pub(super) struct Lanes {
    all: Vec<Lane>,
    /// Which of them is looked at first: they come along side by side.
    next: AtomicUsize,
}

impl Lanes {
    pub(super) fn new(all: Vec<Lane>) -> Self {
        let next = AtomicUsize::new(0);
        Self { all, next }
    }

    pub(super) fn get(&self, number: usize) -> &Lane {
        &self.all[number]
    }
}

impl Steps for Lanes {
    fn step(&self) -> bool {
        let first = self.next.fetch_add(1, Ordering::Relaxed) % self.all.len();
        let (before, from) = self.all.split_at(first);
        let mut lanes = from.iter().chain(before);
        lanes.any(|lane| lane.find() || lane.read())
    }
}
