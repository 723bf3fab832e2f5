//! Reads and writes of one file, many at once, by one thread with an io_uring of its own.
//!
//! 1. The ring belongs to its thread alone, which puts entries in, submits them together, and reaps. Others leave [`Flight`]s in its inbox.
//! 2. The memory of a flight is the flight's, and a flight is kept until the kernel has said that it is done with it.
//! 3. A flight ends as a system call of its kind would have: all of it moved, or an error. What the kernel left is moved by calls.

#![expect(
    unsafe_code,
    reason = "the kernel reads and writes memory by its address while no call is under way"
)]

use crate::io::AlignedBuffer;
use crate::units::BLOCK_SIZE;
use io_uring::{IoUring, opcode, types};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Flights that the kernel has at once.
const DEPTH: u32 = 256;
/// The completion that says that there is something in the inbox.
const WOKEN: u64 = u64::MAX;
/// After an error that says nothing of a flight, before the ring is tried again.
const PAUSE: Duration = Duration::from_millis(1);

/// Told how a flight went, with its memory.
type Ended = Box<dyn FnOnce(io::Result<()>, &AlignedBuffer) + Send>;

/// A read or a write of whole units of the device, with aligned memory.
pub(super) struct Flight {
    pub(super) is_write: bool,
    pub(super) buffer: AlignedBuffer,
    /// Bytes of the buffer.
    pub(super) len: usize,
    /// Where on the device.
    pub(super) byte: u64,
    pub(super) ended: Ended,
}

impl Flight {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.buffer.blocks_mut(self.len.div_ceil(BLOCK_SIZE))[..self.len]
    }

    /// Goes on where the kernel stopped, after so many bytes or with an error, and tells how it went.
    pub(super) fn end(mut self, file: &File, result: i32) {
        let (is_write, byte, len) = (self.is_write, self.byte, self.len);
        let done = match usize::try_from(result) {
            Ok(moved) if moved >= len => Ok(()),
            Ok(moved) => {
                let (rest, at) = (&mut self.bytes()[moved..], byte + moved as u64);
                match is_write {
                    true => file.write_all_at(rest, at),
                    false => file.read_exact_at(rest, at),
                }
            }
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        (self.ended)(done, &self.buffer);
    }
}

#[derive(Default)]
struct Inbox {
    flights: VecDeque<Flight>,
    /// The thread waits, or is about to.
    is_asleep: bool,
    is_over: bool,
}

struct Shared {
    inbox: Mutex<Inbox>,
    wake: OwnedFd,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, mut inbox: MutexGuard<'_, Inbox>) {
        if std::mem::take(&mut inbox.is_asleep) {
            drop(inbox);
            // It fails only where it has been told more often than can be counted.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }
}

/// The thread of a ring.
pub(super) struct Ring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    /// For this file.
    ///
    /// # Errors
    /// Where the kernel has no io_uring, or does not let this process have one; if there is no thread to be had.
    pub(super) fn start(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let (told, started) = mpsc::channel();
        let own = Arc::clone(&shared);
        // The kernel knows the thread that made a ring as the one that submits.
        let run = move || match build() {
            Ok(ring) => {
                told.send(Ok(())).ok();
                Thread::new(ring, file, own).run();
            }
            Err(e) => drop(told.send(Err(e))),
        };
        let thread = std::thread::Builder::new().name("ring".into()).spawn(run)?;
        started
            .recv()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Starts these, together.
    pub(super) fn start_all(&self, flights: impl IntoIterator<Item = Flight>) {
        let mut inbox = self.shared.inbox();
        inbox.flights.extend(flights);
        self.shared.wake(inbox);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut inbox = self.shared.inbox();
        inbox.is_over = true;
        self.shared.wake(inbox);
        // The last who had it may be what a flight told of its end.
        let is_other =
            |thread: &JoinHandle<()>| thread.thread().id() != std::thread::current().id();
        if let Some(thread) = self.thread.take().filter(is_other) {
            thread.join().ok();
        }
    }
}

fn build() -> io::Result<IoUring> {
    // Kernels before 6.1 do not know the last two.
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_defer_taskrun();
    match builder.build(DEPTH) {
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
            IoUring::new(DEPTH)
        }
        built => built,
    }
}

/// Flights that the kernel has, by the number that it was told.
#[derive(Default)]
struct Flights {
    all: Vec<Option<Flight>>,
    free: Vec<usize>,
}

impl Flights {
    fn count(&self) -> usize {
        self.all.len() - self.free.len()
    }

    fn add(&mut self, flight: Flight) -> (usize, &mut Flight) {
        let at = self.free.pop().unwrap_or_else(|| {
            self.all.push(None);
            self.all.len() - 1
        });
        (at, self.all[at].insert(flight))
    }

    fn remove(&mut self, at: usize) -> Option<Flight> {
        let flight = self.all.get_mut(at)?.take()?;
        self.free.push(at);
        Some(flight)
    }
}

impl Drop for Flights {
    fn drop(&mut self) {
        // Should the thread panic, the kernel still has their memory.
        if self.count() > 0 {
            std::mem::forget(std::mem::take(&mut self.all));
        }
    }
}

struct Thread {
    ring: IoUring,
    file: File,
    shared: Arc<Shared>,
    flights: Flights,
    waiting: VecDeque<Flight>,
    /// The kernel watches for a wake.
    is_armed: bool,
}

impl Thread {
    fn new(ring: IoUring, file: File, shared: Arc<Shared>) -> Self {
        Self {
            ring,
            file,
            shared,
            flights: Flights::default(),
            waiting: VecDeque::new(),
            is_armed: false,
        }
    }

    fn run(mut self) {
        loop {
            let mut inbox = self.shared.inbox();
            self.waiting.append(&mut inbox.flights);
            if inbox.is_over && self.waiting.is_empty() && self.flights.count() == 0 {
                return;
            }
            inbox.is_asleep = true;
            drop(inbox);
            self.push_all();
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => std::thread::sleep(PAUSE),
                _ => {}
            }
            self.reap();
        }
    }

    /// Puts in what there is room for.
    fn push_all(&mut self) {
        if !self.is_armed {
            let wake = types::Fd(self.shared.wake.as_raw_fd());
            let entry = opcode::PollAdd::new(wake, rustix::event::PollFlags::IN.bits().into());
            // SAFETY: the entry names no memory, and a descriptor that is open as long as the ring.
            let pushed = unsafe { self.ring.submission().push(&entry.build().user_data(WOKEN)) };
            self.is_armed = pushed.is_ok();
        }
        while self.flights.count() < DEPTH as usize - 1 {
            let Some(flight) = self.waiting.pop_front() else {
                return;
            };
            let (at, flight) = self.flights.add(flight);
            let (fd, byte, is_write) = (
                types::Fd(self.file.as_raw_fd()),
                flight.byte,
                flight.is_write,
            );
            let bytes = flight.bytes();
            let (memory, len) = (bytes.as_mut_ptr(), bytes.len() as u32);
            let entry = match is_write {
                true => opcode::Write::new(fd, memory, len).offset(byte).build(),
                false => opcode::Read::new(fd, memory, len).offset(byte).build(),
            };
            // SAFETY: the memory is the flight's own, on the heap, and nobody else has the flight before its completion has been reaped;
            // `Flights` does not give it back before. The file is open as long as the ring.
            let pushed = unsafe { self.ring.submission().push(&entry.user_data(at as u64)) };
            if pushed.is_err() {
                // What is in the queue is submitted first.
                self.waiting.extend(self.flights.remove(at));
                return;
            }
        }
    }

    fn reap(&mut self) {
        let completions: Vec<_> = (self.ring.completion())
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        for (number, result) in completions {
            if number == WOKEN {
                self.is_armed = false;
                // Nothing is lost if it cannot be read: the inbox is looked at in any case.
                let _ = rustix::io::read(&self.shared.wake, &mut [0_u8; 8]);
                continue;
            }
            if let Some(flight) = self.flights.remove(number as usize) {
                flight.end(&self.file, result);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flights_move_what_calls_would_have_moved_and_end_with_their_errors() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let Ok(ring) = Ring::start(&file) else {
            eprintln!("this kernel lets nobody have an io_uring");
            return;
        };
        let (told, ends) = mpsc::channel();
        let flight = |is_write, byte, fill: u8| {
            let mut buffer = AlignedBuffer::new(2);
            buffer.blocks_mut(2).fill(fill);
            let told = told.clone();
            let ended: Ended = Box::new(move |done, buffer: &AlignedBuffer| {
                let kind = done.err().map(|e| e.kind());
                told.send((byte, kind, buffer.blocks(2)[..5000].to_vec()))
                    .unwrap();
            });
            Flight {
                is_write,
                buffer,
                len: 5000,
                byte,
                ended,
            }
        };
        // More than the kernel has at once.
        let places = |n: u64| (0..n).map(|i| i * 8192 % (1 << 19));
        for _ in 0..10 {
            ring.start_all(places(64).map(|byte| flight(true, byte, (byte >> 13) as u8)));
        }
        (0..640).for_each(|_| assert_eq!(ends.recv().unwrap().1, None));
        ring.start_all(places(64).map(|byte| flight(false, byte, 0)));
        for _ in 0..64 {
            let (byte, kind, found) = ends.recv().unwrap();
            assert_eq!((kind, found), (None, vec![(byte >> 13) as u8; 5000]));
        }
        ring.start_all([flight(false, (1 << 20) - 100, 0)]);
        assert_eq!(
            ends.recv().unwrap().1,
            Some(io::ErrorKind::UnexpectedEof),
            "past the end"
        );
        ring.start_all(places(64).map(|byte| flight(false, byte, 0)));
        drop(ring);
        assert_eq!(ends.try_iter().count(), 64, "it ends when all have ended");
    }
}
