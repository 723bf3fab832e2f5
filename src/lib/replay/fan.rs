//! One trace for several players: it is read once, and each of them gets all of it, on a thread of its own.
//!
//! A player that is slower than the others holds the reading up, so that what was read and not played is bounded.

use super::event::{Batch, TraceNotes, TraceReader};
use crate::error::Result;
use crate::observer::Observer;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Batches that may wait for a player.
const WAITING: usize = 4;

/// What was read in one go, and what is known of the trace by then.
#[derive(Debug, Default)]
struct Part {
    batch: Batch,
    devices: Arc<[String]>,
    notes: TraceNotes,
}

/// Hands a trace out.
#[derive(Debug)]
pub struct Fan(Vec<SyncSender<Arc<Part>>>);

/// A player's share: all of the trace.
#[derive(Debug)]
pub struct Share {
    receiver: Receiver<Arc<Part>>,
    last: Arc<Part>,
}

impl Fan {
    /// For so many players.
    pub fn new(players: usize) -> (Self, Vec<Share>) {
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..players).map(|_| sync_channel(WAITING)).unzip();
        let share = |receiver| Share {
            receiver,
            last: Arc::default(),
        };
        (Self(senders), receivers.into_iter().map(share).collect())
    }

    /// Reads the trace to its end, or until no player is left. The players must be at work meanwhile, on other threads.
    ///
    /// # Errors
    /// Those of the reader; for the players the trace ends there.
    pub fn hand_out(mut self, reader: &mut dyn TraceReader, observer: &dyn Observer) -> Result<()> {
        let mut devices: Arc<[String]> = Arc::default();
        let mut has_more = true;
        while has_more && !self.0.is_empty() {
            let mut batch = Batch::default();
            has_more = reader.read(&mut batch)?;
            if devices.len() != reader.devices().len() {
                devices = reader.devices().into();
            }
            let part = Arc::new(Part {
                batch,
                devices: Arc::clone(&devices),
                notes: reader.notes().clone(),
            });
            if let Some((done, total)) = reader.progress() {
                observer.progress("", done, total);
            }
            // One that has failed, or was told to stop, takes no more.
            self.0
                .retain(|sender| sender.send(Arc::clone(&part)).is_ok());
        }
        Ok(())
    }
}

impl TraceReader for Share {
    fn read(&mut self, batch: &mut Batch) -> Result<bool> {
        let Ok(mut part) = self.receiver.recv() else {
            batch.ios.clear();
            batch.controls.clear();
            return Ok(false);
        };
        match Arc::get_mut(&mut part) {
            // Nobody else wants it.
            Some(part) => std::mem::swap(batch, &mut part.batch),
            None => batch.clone_from(&part.batch),
        }
        self.last = part;
        Ok(true)
    }

    fn devices(&self) -> &[String] {
        &self.last.devices
    }

    fn notes(&self) -> &TraceNotes {
        &self.last.notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::observer::Silent;
    use crate::replay::{TraceIo, TraceOp};

    /// Ten batches of one request each; then it ends, or fails.
    #[derive(Default)]
    struct Ten {
        notes: TraceNotes,
        devices: Vec<String>,
        fails: bool,
    }

    impl TraceReader for Ten {
        fn read(&mut self, batch: &mut Batch) -> Result<bool> {
            let n = self.notes.events;
            if n == 10 {
                return match self.fails {
                    true => Err(Error::new(ErrorKind::Io, "it is torn")),
                    false => Ok(false),
                };
            }
            batch.ios = vec![TraceIo {
                time_ns: n,
                sector: 8 * n,
                sectors: 8,
                device: n as u32,
                cpu: 0,
                op: TraceOp::Write,
                is_preflush: false,
                is_fua: false,
            }];
            self.devices.push(format!("volume {n}"));
            self.notes.events += 1;
            Ok(true)
        }

        fn devices(&self) -> &[String] {
            &self.devices
        }

        fn notes(&self) -> &TraceNotes {
            &self.notes
        }
    }

    fn hand_out(fails: bool, patience: &[usize]) -> (Result<()>, Vec<(usize, u64, usize)>) {
        let (fan, shares) = Fan::new(patience.len());
        std::thread::scope(|scope| {
            let players: Vec<_> = shares
                .into_iter()
                .zip(patience)
                .map(|(mut share, &patience)| {
                    scope.spawn(move || {
                        let (mut batch, mut ios) = (Batch::default(), 0);
                        while ios < patience && share.read(&mut batch).unwrap() {
                            ios += batch.ios.len();
                        }
                        (ios, share.notes().events, share.devices().len())
                    })
                })
                .collect();
            let mut ten = Ten {
                fails,
                ..Ten::default()
            };
            let read = fan.hand_out(&mut ten, &Silent);
            let played = players.into_iter().map(|player| player.join().unwrap());
            (read, played.collect())
        })
    }

    #[test]
    fn each_gets_all_of_it() {
        let (read, played) = hand_out(false, &[usize::MAX; 3]);
        read.unwrap();
        assert_eq!(played, [(10, 10, 10); 3]);
    }

    #[test]
    fn one_that_stops_does_not_hold_the_others_up() {
        let (read, played) = hand_out(false, &[1, usize::MAX, 0]);
        read.unwrap();
        assert_eq!(played, [(1, 1, 1), (10, 10, 10), (0, 0, 0)]);
        assert!(hand_out(false, &[1, 1]).0.is_ok());
    }

    #[test]
    fn an_error_of_the_reader_is_told() {
        let (read, played) = hand_out(true, &[usize::MAX; 2]);
        assert_eq!(read.unwrap_err().to_string(), "it is torn");
        assert_eq!(played, [(10, 10, 10); 2]);
    }
}
