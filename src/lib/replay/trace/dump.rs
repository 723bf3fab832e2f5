//! What blkparse -d does to the times of a trace, and how it is put right.

use std::collections::HashMap;

use super::record::{self, Record};
use crate::replay::event::ControlEvent;

/// Processes and messages of a dump that are remembered.
const MAX_REMEMBERED: usize = 4096;

/// blkparse subtracts the start of the trace from the times of records but not of notifications, and writes those out too early.
#[derive(Default)]
pub(super) struct Dump {
    /// When processes were first noticed, which was just before their first record.
    processes: HashMap<u32, u64>,
    first_notice: Option<u64>,
    /// What was subtracted: no less than this.
    start: Option<i64>,
    messages: Vec<ControlEvent>,
}

impl Dump {
    pub(super) fn notice(&mut self, record: Record, words: Option<String>) {
        self.first_notice.get_or_insert(record.time);
        if let Some(text) = words {
            let time_ns = record.time;
            self.messages.push(ControlEvent { time_ns, text });
        } else if record.event == record::PROCESS && self.processes.len() < MAX_REMEMBERED {
            self.processes.entry(record.pid).or_insert(record.time);
        }
    }

    #[inline(always)]
    pub(super) fn see(&mut self, record: Record) {
        if self.is_looking() {
            self.look_for_start(record);
        }
    }

    /// The next record may tell of the start.
    #[inline(always)]
    pub(super) fn is_looking(&self) -> bool {
        !self.processes.is_empty() || (self.start.is_none() && self.first_notice.is_some())
    }

    #[inline(never)]
    fn look_for_start(&mut self, record: Record) {
        let noticed = self.processes.remove(&record.pid);
        let noticed = noticed.or(self.first_notice.filter(|_| self.start.is_none()));
        if let Some(noticed) = noticed {
            let start = noticed.wrapping_sub(record.time) as i64;
            self.start = self.start.max(Some(start));
        }
    }

    /// Hands over the messages once the start is known, or there is no more.
    pub(super) fn placed(&mut self, is_end: bool) -> impl Iterator<Item = ControlEvent> {
        let is_known = self.start.is_some() || is_end || self.messages.len() >= MAX_REMEMBERED;
        let start = self.start.unwrap_or(0);
        let ready = if is_known { self.messages.len() } else { 0 };
        // Those before the start all come at it, in their order, whichever processor they are of.
        self.messages[..ready].sort_by_key(|message| message.time_ns);
        self.messages.drain(..ready).map(move |mut message| {
            message.time_ns = message
                .time_ns
                .saturating_add_signed(start.saturating_neg());
            message
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record of version 7.
    fn record(event: u8, time: u64) -> Record {
        let mut bytes = [0; record::V7];
        bytes[..4].copy_from_slice(&0x6561_7407_u32.to_le_bytes());
        bytes[8..16].copy_from_slice(&time.to_le_bytes());
        bytes[28] = event;
        Record::parse::<false>(&bytes).expect("a record")
    }

    #[test]
    fn messages_before_the_first_request_keep_their_order() {
        let mut dump = Dump::default();
        // blkparse writes out what it has of one processor after the other.
        for (time, words) in [
            (1200, "third"),
            (1900, "fifth"),
            (1100, "first"),
            (1150, "second"),
            (1300, "fourth"),
        ] {
            dump.notice(record(record::MESSAGE, time), Some(words.into()));
        }
        dump.notice(record(record::PROCESS, 1500), None);
        dump.see(record(record::QUEUE, 0));
        let placed: Vec<_> = dump
            .placed(false)
            .map(|message| (message.time_ns, message.text))
            .collect();
        let expected = [
            (0, "first"),
            (0, "second"),
            (0, "third"),
            (0, "fourth"),
            (400, "fifth"),
        ];
        assert_eq!(
            placed,
            expected.map(|(time, words)| (time, words.to_string()))
        );
    }
}
