//! Replies on their way to a client, and how much of its requests may be under way.

use super::stream::Stream;
use super::wire::{Head, Style};
use crate::runtime::export::{Answer, Extent, MOST_PAYLOAD};
use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;

/// Requests of one connection that are under way at once.
const MOST_PENDING: usize = 256;
/// Bytes that they, and replies that are not sent yet, may have beside those of the last one.
const MOST_BYTES: usize = MOST_PAYLOAD as usize;
/// Data up to this size are copied behind the head of their reply.
const SMALL: usize = 16384;
/// Segments that are gathered into one system call.
const MOST_SEGMENTS: usize = 256;

#[derive(Default)]
struct Out {
    segments: VecDeque<Vec<u8>>,
    pending: usize,
    /// Bytes of requests under way, and of replies that are not sent.
    bytes: usize,
    /// Somebody beside the reader left something to be sent.
    is_due: bool,
    is_over: bool,
    is_broken: bool,
}

impl Out {
    fn append(&mut self, head: Vec<u8>, data: Vec<u8>) {
        match self.segments.back_mut() {
            Some(last)
                if last.len() + head.len() + data.len() <= SMALL * 4 && data.len() <= SMALL =>
            {
                last.extend(head);
                last.extend(data);
            }
            _ if data.len() <= SMALL => {
                let mut segment = head;
                segment.extend(data);
                self.segments.push_back(segment);
            }
            _ => self.segments.extend([head, data]),
        }
    }

    /// What a request, or its reply, had in memory.
    fn has_room(&self, len: usize) -> bool {
        self.pending < MOST_PENDING && (self.bytes == 0 || self.bytes + len <= MOST_BYTES)
    }
}

pub(super) struct Outbox {
    style: Style,
    out: Mutex<Out>,
    changed: Condvar,
    stream: Mutex<Stream>,
    /// Sends what it answered itself before it waits for more.
    reader: ThreadId,
}

impl Outbox {
    /// Of the connection that this thread reads.
    pub(super) fn new(stream: Stream, style: Style) -> Arc<Self> {
        Arc::new(Self {
            style,
            out: Mutex::default(),
            changed: Condvar::new(),
            stream: Mutex::new(stream),
            reader: std::thread::current().id(),
        })
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more request, with `len` bytes of data, may be under way.
    pub(super) fn begin(&self, len: usize) {
        let mut out = self.out();
        if !out.has_room(len) {
            out.is_due = true;
            self.changed.notify_all();
            let waited = self
                .changed
                .wait_while(out, |out| !out.has_room(len) && !out.is_broken);
            out = waited.unwrap_or_else(PoisonError::into_inner);
        }
        out.pending += 1;
        out.bytes += len;
    }

    /// Answers a request that was begun with `begun` bytes.
    pub(super) fn reply(&self, head: &Head, begun: usize, answer: Answer) {
        let front = self
            .style
            .reply(head, answer.as_ref().map(Vec::len).map_err(|e| *e));
        self.append(begun, front, answer.unwrap_or_default());
    }

    /// Answers a request for the status of blocks: the extents of each context, by its id.
    pub(super) fn reply_extents(&self, head: &Head, begun: usize, contexts: &[(u32, Vec<Extent>)]) {
        let is_extended = self.style == Style::Extended;
        let mut all = Vec::new();
        for (place, (id, extents)) in contexts.iter().enumerate() {
            let (kind, fixed, each) = if is_extended { (6, 8, 16) } else { (5, 4, 8) };
            let len = fixed + each * extents.len() as u64;
            all.extend(
                self.style
                    .chunk(head, kind, place + 1 == contexts.len(), len),
            );
            all.extend(id.to_be_bytes());
            if is_extended {
                all.extend((extents.len() as u32).to_be_bytes());
            }
            for Extent { len, status } in extents {
                if is_extended {
                    all.extend(len.to_be_bytes());
                    all.extend(u64::from(*status).to_be_bytes());
                } else {
                    all.extend((*len as u32).to_be_bytes());
                    all.extend(status.to_be_bytes());
                }
            }
        }
        self.append(begun, all, Vec::new());
    }

    fn append(&self, begun: usize, front: Vec<u8>, data: Vec<u8>) {
        let mut out = self.out();
        out.pending -= 1;
        out.bytes -= begun;
        if !out.is_broken {
            out.bytes += front.len() + data.len();
            out.append(front, data);
        }
        if std::thread::current().id() != self.reader {
            out.is_due = true;
            drop(out);
            self.changed.notify_all();
        }
    }

    /// Sends what there is.
    ///
    /// # Errors
    /// Of the stream.
    pub(super) fn send(&self) -> io::Result<()> {
        if self.out().segments.is_empty() {
            return Ok(());
        }
        // Whoever has the stream sends in the order in which replies were appended.
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut out = self.out();
            let count = out.segments.len().min(MOST_SEGMENTS);
            let segments: Vec<Vec<u8>> = out.segments.drain(..count).collect();
            drop(out);
            if segments.is_empty() {
                return Ok(());
            }
            let sent = write_all(&mut stream, &segments);
            let mut out = self.out();
            out.bytes -= segments.iter().map(Vec::len).sum::<usize>();
            if sent.is_err() {
                // Whoever hung up gets no replies; those that still come are dropped.
                let lost: usize = out.segments.drain(..).map(|s| s.len()).sum();
                out.bytes -= lost;
                out.is_broken = true;
            }
            drop(out);
            self.changed.notify_all();
            sent?;
        }
    }

    /// Sends what others than the reader have answered, until the connection is over.
    pub(super) fn be_writer(&self) {
        loop {
            let out = self.out();
            let waited = self
                .changed
                .wait_while(out, |out| !out.is_due && !out.is_over);
            let mut out = waited.unwrap_or_else(PoisonError::into_inner);
            let is_over = out.is_over;
            out.is_due = false;
            drop(out);
            if self.send().is_err() {
                self.lock_and_hang_up();
            }
            if is_over {
                return;
            }
        }
    }

    fn lock_and_hang_up(&self) {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.hang_up();
    }

    /// Waits until all that is under way is answered, and lets the writer send the rest and end.
    pub(super) fn end(&self) {
        let out = self.out();
        let waited = self.changed.wait_while(out, |out| out.pending > 0);
        waited.unwrap_or_else(PoisonError::into_inner).is_over = true;
        self.changed.notify_all();
    }
}

fn write_all(stream: &mut Stream, segments: &[Vec<u8>]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = segments.iter().map(|s| IoSlice::new(s)).collect();
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        match stream.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut rest, written),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
