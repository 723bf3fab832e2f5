//! Replies on their way to a client, and how much of its requests may be under way.

use super::memory::{Memory, SHARE};
use super::stream::Stream;
use super::wire::{Head, Style, command};
use crate::runtime::buffers;
use crate::runtime::export::{Answer, Extent, MOST_PAYLOAD};
use crate::runtime::gathering::{self, Sleeper};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// Requests of one connection that are under way at once.
const MOST_PENDING: usize = 256;
/// Bytes that they, and replies that are not sent yet, may have.
const MOST_BYTES: usize = MOST_PAYLOAD as usize + SHARE;
/// Bytes that each request under way counts beside its data.
const OVERHEAD: usize = 64;
/// Data up to this size are copied behind the head of their reply.
const SMALL: usize = 16384;
/// Segments that are gathered into one system call.
const MOST_SEGMENTS: usize = 256;
/// Bytes that small replies are gathered in.
const SEGMENT: usize = SMALL * 4;

#[derive(Debug, Default)]
struct Out {
    segments: VecDeque<Vec<u8>>,
    /// Memory of a segment that was sent, for the next one.
    spare: Vec<u8>,
    pending: usize,
    /// Bytes of requests under way.
    begun: usize,
    /// Bytes of replies that are not sent.
    unsent: usize,
    /// How many of them are borrowed.
    borrowed: usize,
    /// Since when the client is waited for, to take replies and to send data.
    waits: [Option<Instant>; 2],
    /// Somebody beside the reader left something to be sent.
    is_due: bool,
    /// The writer waits for that.
    is_asleep: bool,
    /// The reader waits for a request to end.
    is_awaited: bool,
    is_over: bool,
    is_broken: bool,
}

/// What a client is waited for to do.
#[derive(Clone, Copy, Debug)]
enum Wait {
    Take = 0,
    Send = 1,
}

impl Out {
    fn append(&mut self, head: Vec<u8>, data: Vec<u8>) {
        if self.is_broken {
            return;
        }
        self.unsent += head.len() + data.len();
        match self.segments.back_mut() {
            Some(last)
                if last.len() + head.len() + data.len() <= SEGMENT && data.len() <= SMALL =>
            {
                last.extend(head);
                last.extend(data);
            }
            _ if data.len() <= SMALL => {
                let mut segment = std::mem::take(&mut self.spare);
                segment.extend(head);
                segment.extend(data);
                self.segments.push_back(segment);
            }
            _ => self.segments.extend([head, data]),
        }
    }

    /// Has one more request begin, with up to `want` bytes of data: all of them if there is memory, or a part that fits into the
    /// share; none if others have to end first. Only who takes its replies may borrow.
    fn grant(&mut self, want: usize, memory: &Memory) -> Option<usize> {
        if self.pending >= MOST_PENDING {
            return None;
        }
        let all = self.begun + self.unsent + OVERHEAD + want;
        let missing = all.saturating_sub(SHARE + self.borrowed);
        let granted = if missing == 0 {
            want
        } else if self.unsent <= SHARE && all <= MOST_BYTES && memory.borrow(missing) {
            self.borrowed += missing;
            want
        } else if self.pending == 0 && self.unsent == 0 {
            want.min(SHARE - OVERHEAD)
        } else {
            return None;
        };
        self.pending += 1;
        self.begun += OVERHEAD + granted;
        Some(granted)
    }

    /// Gives back what is no longer needed.
    fn settle(&mut self, memory: &Memory) {
        let needed = (self.begun + self.unsent).saturating_sub(SHARE);
        if self.borrowed > needed {
            memory.give_back(self.borrowed - needed);
            self.borrowed = needed;
        }
    }
}

/// A request that is answered in pieces, as memory or holes have it.
#[derive(Debug)]
pub(super) struct Pieces {
    head: Head,
    state: Mutex<PiecesState>,
}

#[derive(Debug)]
struct PiecesState {
    /// Bytes that are not answered.
    left: u64,
    /// The first one of a write.
    error: Option<Errno>,
}

impl Pieces {
    pub(super) fn of(head: &Head) -> Arc<Self> {
        Arc::new(Self {
            head: *head,
            state: Mutex::new(PiecesState {
                left: head.len,
                error: None,
            }),
        })
    }
}

#[derive(Debug)]
pub(super) struct Outbox {
    style: Style,
    out: Mutex<Out>,
    /// A request has ended, or replies were sent.
    changed: Condvar,
    /// There is something for the writer.
    is_due: Condvar,
    stream: Arc<Stream>,
    /// Whoever has it sends.
    sends: Mutex<()>,
    memory: Arc<Memory>,
    /// Sends what it answered itself before it waits for more.
    reader: ThreadId,
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.memory.give_back(self.out().borrowed);
    }
}

/// The writer.
impl Sleeper for Outbox {
    fn wake(&self) {
        let mut out = self.out();
        let is_asleep = out.is_asleep && !out.is_due;
        out.is_due = true;
        drop(out);
        if is_asleep {
            self.is_due.notify_one();
        }
    }
}

impl Outbox {
    /// Of the connection that this thread reads.
    pub(super) fn new(stream: Arc<Stream>, style: Style, memory: &Arc<Memory>) -> Arc<Self> {
        let outbox = Arc::new(Self {
            style,
            out: Mutex::default(),
            changed: Condvar::new(),
            is_due: Condvar::new(),
            stream,
            sends: Mutex::default(),
            memory: Arc::clone(memory),
            reader: std::thread::current().id(),
        });
        memory.join(&outbox);
        outbox
    }

    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same as [`begin`](Self::begin), if nothing has to be waited for.
    pub(super) fn try_begin(&self, want: usize) -> Option<usize> {
        let mut out = self.out();
        match out.is_broken {
            true => None,
            false => out.grant(want, &self.memory),
        }
    }

    /// Waits until one more request may be under way; how many of the `want` bytes of its data it may have.
    ///
    /// # Errors
    /// Of the stream.
    pub(super) fn begin(&self, want: usize) -> io::Result<usize> {
        let mut out = self.out();
        loop {
            if out.is_broken {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if let Some(granted) = out.grant(want, &self.memory) {
                return Ok(granted);
            }
            if out.pending == 0 && !out.segments.is_empty() {
                drop(out);
                self.send()?;
                out = self.out();
                continue;
            }
            out.is_due = true;
            self.is_due.notify_one();
            out.is_awaited = true;
            let waited = self.changed.wait(out);
            out = waited.unwrap_or_else(PoisonError::into_inner);
            out.is_awaited = false;
        }
    }

    /// Waits while more than so many requests are under way.
    fn wait_while_more(&self, than: usize) -> MutexGuard<'_, Out> {
        let is_more = |out: &mut Out| {
            out.is_awaited = out.pending > than;
            out.is_awaited
        };
        let waited = self.changed.wait_while(self.out(), is_more);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until everything else is answered.
    pub(super) fn wait_for_answers(&self, but: usize) {
        drop(self.wait_while_more(but));
    }

    /// Answers a request that was begun with `begun` bytes.
    pub(super) fn reply(self: &Arc<Self>, head: &Head, begun: usize, answer: Answer) {
        let done = answer.as_ref().map(Vec::len).map_err(|e| *e);
        let front = self.style.reply(head, done);
        self.end_one(begun, |out| out.append(front, answer.unwrap_or_default()));
    }

    /// Sends the first part of a reply that tells of all that was read.
    pub(super) fn begin_reply(self: &Arc<Self>, head: &Head, data: Vec<u8>) {
        let front = self.style.reply(head, Ok(head.len as usize));
        self.end_one(data.len(), |out| out.append(front, data));
    }

    /// Sends a part of what a reply has begun to tell.
    pub(super) fn go_on(self: &Arc<Self>, data: Vec<u8>) {
        self.end_one(data.len(), |out| out.append(Vec::new(), data));
    }

    /// Answers a piece of `len` bytes at `offset` of a request; a read without data has found a hole.
    pub(super) fn reply_piece(
        self: &Arc<Self>,
        pieces: &Pieces,
        (offset, len): (u64, u64),
        begun: usize,
        answer: Answer,
    ) {
        let (style, head) = (self.style, &pieces.head);
        self.end_one(begun, |out| {
            let mut state = pieces.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.left -= len;
            let is_last = state.left == 0;
            match answer {
                Ok(data) if head.command == command::READ && data.is_empty() => {
                    out.append(style.hole(head, offset, is_last, len as u32), data);
                }
                Ok(data) if head.command == command::READ => {
                    out.append(style.data(head, offset, is_last, data.len()), data);
                }
                Err(error) if head.command == command::READ => {
                    out.append(style.error_at(head, offset, is_last, error), Vec::new());
                }
                done => {
                    state.error = state.error.or(done.err());
                    if is_last {
                        let done = state.error.map_or(Ok(0), Err);
                        out.append(style.reply(head, done), Vec::new());
                    }
                }
            }
        });
    }

    /// Answers a request for the status of blocks: the extents of each context, by its id.
    pub(super) fn reply_extents(
        self: &Arc<Self>,
        head: &Head,
        begun: usize,
        contexts: &[(u32, Vec<Extent>)],
    ) {
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
        self.end_one(begun, |out| out.append(all, Vec::new()));
    }

    /// A request that was begun with `begun` bytes is never answered.
    pub(super) fn forget(self: &Arc<Self>, begun: usize) {
        self.end_one(begun, |_| ());
    }

    /// A request that was begun with `begun` bytes of data has ended.
    fn end_one(self: &Arc<Self>, begun: usize, say: impl FnOnce(&mut Out)) {
        let mut out = self.out();
        out.pending -= 1;
        out.begun -= OVERHEAD + begun;
        say(&mut out);
        out.settle(&self.memory);
        if std::thread::current().id() == self.reader {
            return;
        }
        let is_awaited = out.is_awaited;
        drop(out);
        if is_awaited {
            self.changed.notify_all();
        }
        gathering::wake(self);
    }

    /// Reads what the client has to send; how long that takes is looked at.
    ///
    /// # Errors
    /// Of the stream.
    pub(super) fn receive<T>(&self, receive: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.out().waits[Wait::Send as usize] = Some(Instant::now());
        let received = receive();
        self.out().waits[Wait::Send as usize] = None;
        received
    }

    /// True if it has memory that is borrowed, and has waited so long for its client.
    pub(super) fn has_held_for(&self, time: Duration) -> bool {
        let Ok(out) = self.out.try_lock() else {
            return false;
        };
        let waited = out
            .waits
            .iter()
            .flatten()
            .any(|since| since.elapsed() >= time);
        out.borrowed > 0 && waited
    }

    /// True if there is something to be sent.
    pub(super) fn has_replies(&self) -> bool {
        !self.out().segments.is_empty()
    }

    /// Sends what there is.
    ///
    /// # Errors
    /// Of the stream.
    pub(super) fn send(&self) -> io::Result<()> {
        if !self.has_replies() {
            return Ok(());
        }
        // Whoever sends does so in the order in which replies were appended.
        let sends = self.sends.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut out = self.out();
            let count = out.segments.len().min(MOST_SEGMENTS);
            let segments: Vec<Vec<u8>> = out.segments.drain(..count).collect();
            if segments.is_empty() {
                drop(sends);
                return Ok(());
            }
            out.waits[Wait::Take as usize] = Some(Instant::now());
            drop(out);
            let sent = write_all(&mut &*self.stream, &segments);
            let len = segments.iter().map(Vec::len).sum::<usize>();
            let mut out = self.out();
            for mut segment in segments {
                segment.clear();
                match segment.capacity() {
                    n if n <= SEGMENT && n > out.spare.capacity() => out.spare = segment,
                    _ => buffers::give(segment),
                }
            }
            out.waits[Wait::Take as usize] = None;
            out.unsent -= len;
            if sent.is_err() {
                // Whoever hung up gets no replies; those that still come are dropped.
                let lost: usize = out.segments.drain(..).map(|s| s.len()).sum();
                out.unsent -= lost;
                out.is_broken = true;
            }
            out.settle(&self.memory);
            let is_awaited = out.is_awaited;
            drop(out);
            if is_awaited {
                self.changed.notify_all();
            }
            sent?;
        }
    }

    /// Sends what others than the reader have answered, until the connection is over.
    pub(super) fn be_writer(&self) {
        loop {
            let has_nothing = |out: &mut Out| {
                out.is_asleep = !out.is_due && !out.is_over;
                out.is_asleep
            };
            let waited = self.is_due.wait_while(self.out(), has_nothing);
            let mut out = waited.unwrap_or_else(PoisonError::into_inner);
            let is_over = out.is_over;
            out.is_due = false;
            drop(out);
            if self.send().is_err() {
                self.hang_up();
            }
            if is_over {
                return;
            }
        }
    }

    /// What is under way goes on; the client is told nothing more.
    pub(super) fn hang_up(&self) {
        self.stream.hang_up();
    }

    /// Waits until all that is under way is answered, and lets the writer send the rest and end.
    pub(super) fn end(&self) {
        self.wait_while_more(0).is_over = true;
        self.is_due.notify_one();
    }
}

fn write_all(stream: &mut &Stream, segments: &[Vec<u8>]) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::nbd::stream::Socket;
    use std::os::unix::net::UnixStream;

    const MIB: usize = 1 << 20;

    #[test]
    fn what_is_borrowed_and_not_taken_is_found_and_given_back() {
        let memory = Arc::default();
        let (socket, client) = UnixStream::pair().unwrap();
        let stream = Arc::new(Stream::new(Socket::Unix(socket)));
        let outbox = Outbox::new(stream, Style::Simple, &memory);
        let rest = memory.left() - MIB;
        assert!(memory.borrow(rest), "another one has all but a megabyte");
        assert_eq!(outbox.begin(MIB).unwrap(), MIB);
        assert!(memory.left() < SHARE);
        assert!(!outbox.has_held_for(Duration::ZERO), "nobody waits for it");
        let head = Head {
            flags: 0,
            command: command::READ,
            cookie: 0,
            offset: 0,
            len: MIB as u64,
        };
        outbox.reply(&head, MIB, Ok(vec![1; MIB]));
        std::thread::scope(|scope| {
            let sends = scope.spawn(|| outbox.send());
            let end = Instant::now() + Duration::from_secs(60);
            while !outbox.has_held_for(Duration::ZERO) {
                assert!(Instant::now() < end, "it is not seen to wait");
            }
            assert!(!outbox.has_held_for(Duration::from_secs(3600)));
            outbox.hang_up();
            assert!(sends.join().unwrap().is_err());
        });
        assert!(!outbox.has_held_for(Duration::ZERO));
        assert_eq!(memory.left(), MIB, "all is given back");
        assert!(outbox.begin(0).is_err(), "nothing more is done for it");
        drop(client);
    }

    #[test]
    fn a_share_is_enough_and_only_who_takes_its_replies_borrows() {
        let memory = Arc::default();
        let (socket, _client) = UnixStream::pair().unwrap();
        let stream = Arc::new(Stream::new(Socket::Unix(socket)));
        let outbox = Outbox::new(stream, Style::Simple, &memory);
        let all = memory.left();
        assert!(memory.borrow(all));
        let part = SHARE - OVERHEAD;
        assert_eq!(outbox.begin(MIB).unwrap(), part);
        assert_eq!(outbox.out().grant(1, &memory), None, "the share is used");
        memory.give_back(all);
        assert_eq!(outbox.out().grant(MIB, &memory), Some(MIB));
        outbox.out().append(Vec::new(), vec![0; SHARE + 1]);
        assert_eq!(outbox.out().grant(1, &memory), None);
        outbox.forget(MIB);
        outbox.forget(part);
        drop(outbox);
        assert_eq!(memory.left(), all);
    }
}
