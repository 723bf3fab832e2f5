//! Requests of a client that has opened an export.

use super::handshake::{Session, bad};
use super::outbox::Outbox;
use super::stream::Stream;
use super::wire::{Head, Style, command, flag};
use crate::runtime::export::{Connection, Extent, MOST_PAYLOAD, Replier, Request};
use rustix::io::Errno;
use std::io::{self, BufReader, Read};
use std::sync::Arc;

/// What is read of the data of a request that is refused, before the client is left alone.
const MOST_REFUSED: u64 = 2 * MOST_PAYLOAD as u64;
/// Extents that are told in one context of one reply.
const MOST_EXTENTS: usize = 8192;
/// Requests that are read in one system call have up to this many bytes.
const RECEIVE_BUFFER: usize = 256 << 10;

/// Serves requests until the client goes.
///
/// # Errors
/// Of the stream, and `InvalidData` for what is no request.
pub(super) fn transmit(session: Session, stream: Stream) -> io::Result<()> {
    let mut reader = BufReader::with_capacity(RECEIVE_BUFFER, stream.try_clone()?);
    let outbox = Outbox::new(stream, session.style);
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

impl Requests<'_> {
    fn serve(&mut self, reader: &mut BufReader<Stream>) -> io::Result<()> {
        let style = self.session.style;
        let mut bytes = [0; 32];
        let bytes = &mut bytes[..style.head_len()];
        loop {
            if reader.buffer().len() < bytes.len() {
                self.outbox.send()?;
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

    fn take(&mut self, head: &Head, reader: &mut BufReader<Stream>) -> io::Result<()> {
        let is_extended = self.session.style == Style::Extended;
        let has_data =
            head.command == command::WRITE || is_extended && head.flags & flag::PAYLOAD_LEN != 0;
        if let Err(error) = self.refusal(head) {
            if has_data {
                if head.len > MOST_REFUSED {
                    return Err(bad("more data than may come with a request"));
                }
                let drained = io::copy(&mut reader.take(head.len), &mut io::sink())?;
                if drained < head.len {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            self.outbox.begin(0);
            self.outbox.reply(head, 0, Err(error));
            return Ok(());
        }
        if head.command == command::BLOCK_STATUS {
            self.block_status(head);
            return Ok(());
        }
        let len = match head.command {
            command::READ | command::WRITE => head.len as usize,
            _ => 0,
        };
        self.outbox.begin(len);
        let outbox = Arc::clone(self.outbox);
        let told = *head;
        let reply = Replier::new(move |answer| outbox.reply(&told, len, answer));
        let mut data = Vec::new();
        if has_data {
            data = vec![0; len];
            reader.read_exact(&mut data)?;
        }
        let (offset, fua) = (head.offset, head.flags & flag::FUA != 0);
        let request = match head.command {
            command::READ => Request::Read { offset, len },
            command::WRITE => Request::Write { offset, data, fua },
            command::FLUSH => Request::Flush,
            command::TRIM => Request::Trim {
                offset,
                len: head.len,
                fua,
            },
            command::WRITE_ZEROES => Request::WriteZeroes {
                offset,
                len: head.len,
                fua,
                no_hole: head.flags & flag::NO_HOLE != 0,
                fast_zero: head.flags & flag::FAST_ZERO != 0,
            },
            _ => Request::Cache {
                offset,
                len: head.len,
            },
        };
        self.connection.submit(request, reply);
        Ok(())
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

    fn block_status(&self, head: &Head) {
        let most = match head.flags & flag::REQ_ONE {
            0 => MOST_EXTENTS,
            _ => 1,
        };
        let range = head.offset..head.offset + head.len;
        let begun = MOST_EXTENTS * size_of::<Extent>() * self.session.contexts.len();
        self.outbox.begin(begun);
        let found: Result<Vec<_>, Errno> = (1..)
            .zip(&self.session.contexts)
            .map(|(id, context)| {
                let extents = self.session.export.extents(context, range.clone(), most)?;
                Ok((id, extents))
            })
            .collect();
        match found {
            Ok(contexts) => self.outbox.reply_extents(head, begun, &contexts),
            Err(error) => self.outbox.reply(head, begun, Err(error)),
        }
    }
}
