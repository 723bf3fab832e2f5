//! Requests of a client that has opened an export.

use super::handshake::{Session, bad};
use super::memory::Memory;
use super::outbox::{Outbox, Pieces};
use super::spin::Spin;
use super::stream::Stream;
use super::wire::{Head, Style, command, flag};
use crate::runtime::buffers;
use crate::runtime::export::{Connection, Extent, MOST_PAYLOAD, Replier, Request, add_extent};
use rustix::io::Errno;
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::sync::{Arc, mpsc};

/// What is read of the data of a request that is refused, before the client is left alone.
const MOST_REFUSED: u64 = 2 * MOST_PAYLOAD as u64;
/// Extents that are told in one reply, in all of its contexts.
const MOST_EXTENTS: usize = 4096;
/// Reads of so many bytes are searched for holes: a block of the smallest size.
const LEAST_SEARCHED: u64 = 65536;
/// The bit of `base:allocation` of what reads as zeros.
const ZEROES: u32 = 2;
/// Requests that are read in one system call have up to this many bytes. Clients that are idle may have filled it.
const RECEIVE_BUFFER: usize = 64 << 10;

/// Serves requests until the client goes.
///
/// # Errors
/// Of the stream, and `InvalidData` for what is no request.
pub(super) fn transmit(
    session: Session,
    stream: &Arc<Stream>,
    memory: &Arc<Memory>,
) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(RECEIVE_BUFFER, &**stream);
    let outbox = Outbox::new(Arc::clone(stream), session.style, memory);
    std::thread::scope(|scope| {
        let writer = std::thread::Builder::new().name("nbd-replies".into());
        writer.spawn_scoped(scope, || outbox.be_writer())?;
        let mut requests = Requests {
            connection: Arc::clone(&session.export).connect(),
            size: session.export.size(),
            session: &session,
            outbox: &outbox,
        };
        let served = requests.serve(&mut reader);
        requests.connection.start();
        outbox.end();
        served
    })
}

struct Requests<'a> {
    connection: Box<dyn Connection>,
    size: u64,
    session: &'a Session,
    outbox: &'a Arc<Outbox>,
}

/// Data on their way from a client, which may wait for replies before it sends them.
struct Data<'a, 'b> {
    reader: &'a mut BufReader<&'b Stream>,
    outbox: &'a Outbox,
}

impl Read for Data<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let waits = || !self.reader.get_ref().is_readable();
        if self.reader.buffer().is_empty() && self.outbox.has_replies() && waits() {
            self.outbox.send()?;
        }
        self.reader.read(buffer)
    }
}

impl Requests<'_> {
    fn serve(&mut self, reader: &mut BufReader<&Stream>) -> io::Result<()> {
        let style = self.session.style;
        let mut bytes = [0; 32];
        let bytes = &mut bytes[..style.head_len()];
        let mut spin = Spin::new();
        loop {
            if reader.buffer().len() < bytes.len() {
                self.connection.start();
                self.outbox.send()?;
                if reader.buffer().is_empty() {
                    spin.wait(|| reader.get_ref().is_readable());
                }
            }
            match reader.read_exact(bytes) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                read => read?,
            }
            let head = style.head(bytes).ok_or_else(|| bad("no request"))?;
            if head.command == command::DISCONNECT {
                return Ok(());
            }
            self.take(&head, reader)?;
        }
    }

    fn take(&mut self, head: &Head, reader: &mut BufReader<&Stream>) -> io::Result<()> {
        let is_extended = self.session.style == Style::Extended;
        let has_data =
            head.command == command::WRITE || is_extended && head.flags & flag::PAYLOAD_LEN != 0;
        if let Err(error) = self.refusal(head) {
            if has_data {
                if head.len > MOST_REFUSED {
                    return Err(bad("more data than may come with a request"));
                }
                self.connection.start();
                let mut data = self.data_of(reader).take(head.len);
                let drained = io::copy(&mut data, &mut io::sink())?;
                if drained < head.len {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            self.begin(0)?;
            self.outbox.reply(head, 0, Err(error));
            return Ok(());
        }
        let fua = head.flags & flag::FUA != 0;
        let (offset, len) = (head.offset, head.len);
        match head.command {
            command::BLOCK_STATUS => return self.block_status(head),
            command::READ => return self.read(head),
            command::WRITE => return self.write(head, fua, reader),
            _ => self.begin(0)?,
        };
        let request = match head.command {
            command::FLUSH => Request::Flush,
            command::TRIM => Request::Trim { offset, len, fua },
            command::WRITE_ZEROES => Request::WriteZeroes {
                offset,
                len,
                fua,
                no_hole: head.flags & flag::NO_HOLE != 0,
                fast_zero: head.flags & flag::FAST_ZERO != 0,
            },
            _ => Request::Cache { offset, len },
        };
        self.submit(head, 0, request);
        Ok(())
    }

    /// Submits a request as a whole, which was begun with `begun` bytes.
    fn submit(&mut self, head: &Head, begun: usize, request: Request) {
        let (outbox, head) = (Arc::clone(self.outbox), *head);
        let reply = Replier::new(move |answer| outbox.reply(&head, begun, answer));
        self.connection.submit(request, reply);
    }

    /// Submits the piece of a request that begins at `offset`, and was begun with its `len` bytes.
    fn submit_piece(&mut self, pieces: &Arc<Pieces>, offset: u64, len: usize, request: Request) {
        let (outbox, pieces) = (Arc::clone(self.outbox), Arc::clone(pieces));
        let reply = Replier::new(move |answer| {
            outbox.reply_piece(&pieces, (offset, len as u64), len, answer);
        });
        self.connection.submit(request, reply);
    }

    fn read(&mut self, head: &Head) -> io::Result<()> {
        let (mut offset, all) = (head.offset, head.len as usize);
        if self.session.style == Style::Simple || head.flags & flag::DF != 0 {
            let len = self.begin(all)?;
            if len < all {
                return self.read_in_order(head, len);
            }
            self.submit(head, len, Request::Read { offset, len });
            return Ok(());
        }
        let mut pieces = None;
        for Extent { len, status } in self.parts(head) {
            if status & ZEROES != 0 {
                self.begin(0)?;
                let pieces = pieces.get_or_insert_with(|| Pieces::of(head));
                (self.outbox).reply_piece(pieces, (offset, len), 0, Ok(Vec::new()));
                offset += len;
                continue;
            }
            let end = offset + len;
            while offset < end {
                let len = self.begin((end - offset) as usize)?;
                let request = Request::Read { offset, len };
                if len == all {
                    self.submit(head, len, request);
                    return Ok(());
                }
                let pieces = pieces.get_or_insert_with(|| Pieces::of(head));
                self.submit_piece(pieces, offset, len, request);
                offset += len as u64;
            }
        }
        Ok(())
    }

    /// What of a read is a hole, and what has to be read.
    fn parts(&mut self, head: &Head) -> Vec<Extent> {
        let (range, mut found) = (head.offset..head.offset + head.len, Vec::new());
        if head.len >= LEAST_SEARCHED {
            found = self.connection.holes(range);
        }
        let told: u64 = found.iter().map(|extent| extent.len).sum();
        add_extent(&mut found, head.len.saturating_sub(told), 0);
        found
    }

    /// Reads for a reply that has to come in one, when there is no memory for all of it: one part after the other, nothing in between.
    /// After the first there is no way to tell of an error but to hang up.
    fn read_in_order(&mut self, head: &Head, mut len: usize) -> io::Result<()> {
        self.connection.start();
        self.outbox.wait_for_answers(1);
        let (mut offset, mut left) = (head.offset, head.len as usize);
        loop {
            let (sender, answers) = mpsc::channel();
            let reply = Replier::new(move |answer| drop(sender.send(answer)));
            self.connection.submit(Request::Read { offset, len }, reply);
            self.connection.start();
            let is_first = offset == head.offset;
            match answers.recv().unwrap_or(Err(Errno::IO)) {
                Ok(data) if is_first => self.outbox.begin_reply(head, data),
                Ok(data) => self.outbox.go_on(data),
                Err(error) if is_first => {
                    self.outbox.reply(head, len, Err(error));
                    return Ok(());
                }
                Err(_) => {
                    self.outbox.forget(len);
                    return Err(bad("an error in the middle of a reply"));
                }
            }
            (offset, left) = (offset + len as u64, left - len);
            if left == 0 {
                return Ok(());
            }
            len = self.begin(left)?;
        }
    }

    fn write(&mut self, head: &Head, fua: bool, reader: &mut BufReader<&Stream>) -> io::Result<()> {
        let (mut offset, mut left) = (head.offset, head.len as usize);
        let mut pieces = None;
        while left > 0 {
            let len = self.begin(left)?;
            let mut data = buffers::take(len);
            if reader.buffer().len() < len {
                self.connection.start();
            }
            let received = (self.outbox).receive(|| self.data_of(reader).read_exact(&mut data));
            if let Err(e) = received {
                self.outbox.forget(len);
                return Err(e);
            }
            let request = Request::Write { offset, data, fua };
            if len as u64 == head.len {
                self.submit(head, len, request);
                return Ok(());
            }
            let pieces = pieces.get_or_insert_with(|| Pieces::of(head));
            self.submit_piece(pieces, offset, len, request);
            (offset, left) = (offset + len as u64, left - len);
        }
        Ok(())
    }

    /// The data that come with a request.
    fn data_of<'b, 'c>(&'b self, reader: &'b mut BufReader<&'c Stream>) -> Data<'b, 'c> {
        Data {
            reader,
            outbox: self.outbox,
        }
    }

    /// Why a request is not carried out.
    fn refusal(&self, head: &Head) -> Result<(), Errno> {
        let style = self.session.style;
        let for_command = match head.command {
            command::READ if style != Style::Simple => flag::DF,
            // Its clients may say so; the data come in any case.
            command::WRITE if style == Style::Extended => flag::PAYLOAD_LEN,
            command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS if !self.session.contexts.is_empty() => flag::REQ_ONE,
            _ => return Err(Errno::INVAL),
        };
        if head.flags & !(for_command | flag::FUA) != 0 {
            return Err(Errno::INVAL);
        }
        let is_change = matches!(
            head.command,
            command::WRITE | command::TRIM | command::WRITE_ZEROES
        );
        if is_change && self.session.export.is_read_only() {
            return Err(Errno::PERM);
        }
        if head.command == command::FLUSH {
            return match (head.offset, head.len) {
                (0, 0) => Ok(()),
                _ => Err(Errno::INVAL),
            };
        }
        let has_payload = matches!(head.command, command::READ | command::WRITE);
        if head.len == 0 || has_payload && head.len > MOST_PAYLOAD.into() {
            return Err(Errno::INVAL);
        }
        let end = head.offset.checked_add(head.len);
        if end.is_none_or(|end| end > self.size) {
            let grows = matches!(head.command, command::WRITE | command::WRITE_ZEROES);
            return Err(if grows { Errno::NOSPC } else { Errno::INVAL });
        }
        Ok(())
    }

    /// As [`Outbox::begin`]; what is waited for is started first.
    fn begin(&mut self, want: usize) -> io::Result<usize> {
        if let Some(granted) = self.outbox.try_begin(want) {
            return Ok(granted);
        }
        self.connection.start();
        self.outbox.begin(want)
    }

    fn block_status(&mut self, head: &Head) -> io::Result<()> {
        let session = self.session;
        let contexts = &session.contexts;
        let most = match head.flags & flag::REQ_ONE {
            0 => MOST_EXTENTS / contexts.len(),
            _ => 1,
        };
        let range = head.offset..head.offset + head.len;
        // As they are found, and as they are sent.
        let begun = self.begin(most * contexts.len() * (size_of::<Extent>() + 16))?;
        let found: Result<Vec<_>, Errno> = (1..)
            .zip(contexts)
            .map(|(id, context)| Ok((id, self.extents(context, range.clone(), most)?)))
            .collect();
        match found {
            Ok(contexts) => self.outbox.reply_extents(head, begun, &contexts),
            Err(error) => self.outbox.reply(head, begun, Err(error)),
        }
        Ok(())
    }

    /// The status of bytes in a context: what is allocated is told while others change the metadata, too.
    fn extents(
        &mut self,
        context: &str,
        range: Range<u64>,
        most: usize,
    ) -> Result<Vec<Extent>, Errno> {
        if context != "base:allocation" {
            self.connection.start();
            return self.session.export.extents(context, range, most);
        }
        let told = (self.session.export).try_allocation(range.clone(), most);
        told.unwrap_or_else(|| {
            let mut found = self.connection.holes(range);
            found.truncate(most);
            Ok(found)
        })
    }
}
