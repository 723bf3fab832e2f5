//! One record of a binary blktrace, of version 7 or 8 and either byte order.

use crate::replay::event::{TraceIo, TraceOp};

/// Bytes before the payload, by version.
pub(super) const V7: usize = 48;
pub(super) const V8: usize = 64;
const MAGIC: u32 = 0x6561_7400;

/// Events, the low byte of an action.
pub(super) const QUEUE: u8 = 1;
pub(super) const REMAP: u8 = 15;
/// The same of a notification.
pub(super) const PROCESS: u8 = 0;
pub(super) const MESSAGE: u8 = 2;
/// Bit 8: the payload begins with the number of a control group.
const CGROUP: u64 = 1 << 8;

/// Categories, above the low 16 bits of an action.
pub(super) const WRITE: u16 = 1 << 1;
pub(super) const FLUSH: u16 = 1 << 2;
pub(super) const PASSTHROUGH: u16 = 1 << 9;
pub(super) const NOTIFY: u16 = 1 << 10;
pub(super) const DISCARD: u16 = 1 << 13;
pub(super) const FUA: u16 = 1 << 15;

/// What a record says, but for its payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) sequence: u32,
    pub(super) time: u64,
    pub(super) sector: u64,
    pub(super) bytes: u32,
    pub(super) pid: u32,
    pub(super) device: u32,
    pub(super) cpu: u32,
    pub(super) event: u8,
    pub(super) categories: u16,
    has_cgroup: bool,
    header: usize,
    payload: usize,
}

/// The byte order of the trace that begins with `head`, if it is a trace.
pub(super) fn is_big_endian(head: &[u8]) -> Option<bool> {
    let magic = *head.first_chunk::<4>()?;
    let is_magic = |magic: u32| magic & !0xff == MAGIC && matches!(magic & 0xff, 7 | 8);
    if is_magic(u32::from_le_bytes(magic)) {
        Some(false)
    } else {
        is_magic(u32::from_be_bytes(magic)).then_some(true)
    }
}

#[inline(always)]
fn u32_at<const BIG: bool>(bytes: &[u8; V7], at: usize) -> u32 {
    let field = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
    match BIG {
        true => u32::from_be_bytes(field),
        false => u32::from_le_bytes(field),
    }
}

#[inline(always)]
fn u64_at<const BIG: bool>(bytes: &[u8; V7], at: usize) -> u64 {
    let (first, last) = (u32_at::<BIG>(bytes, at), u32_at::<BIG>(bytes, at + 4));
    match BIG {
        true => u64::from(first) << 32 | u64::from(last),
        false => u64::from(last) << 32 | u64::from(first),
    }
}

impl Record {
    /// Reads the header that `data` begins with. None if it is none; there are at least [`V7`] bytes.
    #[inline]
    pub(super) fn parse<const BIG: bool>(data: &[u8]) -> Option<Self> {
        let bytes = data.first_chunk::<V7>()?;
        let (u32_at, u64_at) = (|at| u32_at::<BIG>(bytes, at), |at| u64_at::<BIG>(bytes, at));
        let u16_at = |at: usize| -> u16 {
            let field = bytes[at..at + 2].try_into().expect("two bytes");
            if BIG {
                u16::from_be_bytes(field)
            } else {
                u16::from_le_bytes(field)
            }
        };
        let magic = u32_at(0);
        let is_v8 = match magic ^ MAGIC {
            7 => false,
            8 => true,
            _ => return None,
        };
        // Both versions are alike up to the number of bytes; payload lengths of version 8 are at 50, of which 48 bytes have no part.
        let (action, pid, device, cpu, payload) = if is_v8 {
            let field = data.get(50..52)?.try_into().expect("two bytes");
            let payload = if BIG {
                u16::from_be_bytes(field)
            } else {
                u16::from_le_bytes(field)
            };
            (u64_at(32), u32_at(28), u32_at(40), u32_at(44), payload)
        } else {
            (
                u64::from(u32_at(28)),
                u32_at(32),
                u32_at(36),
                u32_at(40),
                u16_at(46),
            )
        };
        Some(Self {
            sequence: u32_at(4),
            time: u64_at(8),
            sector: u64_at(16),
            bytes: u32_at(24),
            pid,
            device,
            cpu,
            event: action as u8,
            categories: (action >> 16) as u16,
            has_cgroup: action & CGROUP != 0,
            header: if is_v8 { V8 } else { V7 },
            payload: payload.into(),
        })
    }

    /// Bytes of the whole record.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.header + self.payload
    }

    /// The payload proper in `data`, the whole record.
    pub(super) fn payload<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        let payload = &data[self.header..self.len()];
        let cgroup = if self.has_cgroup { 8 } else { 0 };
        payload.get(cgroup..).unwrap_or_default()
    }

    #[inline]
    pub(super) fn has(&self, category: u16) -> bool {
        self.categories & category != 0
    }
}

/// What a record says that is as most are, of version 7 and without a payload: a read or a write that was queued, or anything that says
/// no more than what became of one.
#[derive(Clone, Copy)]
pub(super) struct Plain {
    pub(super) sequence: u32,
    pub(super) time: u64,
    pub(super) device: u32,
    pub(super) cpu: u32,
    sector: u64,
    bytes: u32,
    action: u32,
    /// It was queued; of everything else nothing but its number is of interest.
    pub(super) is_request: bool,
}

impl Plain {
    /// Reads such a record; none if it is another.
    #[inline(always)]
    pub(super) fn of<const BIG: bool>(bytes: &[u8; V7]) -> Option<Self> {
        /// Whatever is not so in a plain request; [`QUEUE`] is all that is left.
        const OTHER: u32 = 0xff | ((NOTIFY | PASSTHROUGH | FLUSH | DISCARD | FUA) as u32) << 16;
        /// No request goes on beyond what a device can have from here.
        const FAR: u64 = 1 << 54;
        let (u32_at, u64_at) = (|at| u32_at::<BIG>(bytes, at), |at| u64_at::<BIG>(bytes, at));
        let mut this = Self {
            sequence: u32_at(4),
            time: u64_at(8),
            device: u32_at(36),
            cpu: u32_at(40),
            sector: u64_at(16),
            bytes: u32_at(24),
            action: u32_at(28),
            is_request: false,
        };
        this.is_request =
            (this.action & OTHER == u32::from(QUEUE)) & (this.bytes != 0) & (this.sector < FAR);
        let event = this.action as u8;
        let is_idle =
            (event != QUEUE) & (event != REMAP) & (this.action & u32::from(NOTIFY) << 16 == 0);
        let is_plain =
            (u32_at(0) == MAGIC | 7) & (bytes[46] | bytes[47] == 0) & (this.is_request | is_idle);
        is_plain.then_some(this)
    }

    /// The request; its device is the trace's number of it, and its processor is known to have one of 16 bits.
    #[inline(always)]
    pub(super) fn io(self) -> TraceIo {
        TraceIo {
            time_ns: self.time,
            sector: self.sector,
            sectors: u64::from(self.bytes).div_ceil(512),
            device: self.device,
            cpu: self.cpu as u16,
            // Reads and writes take turns at random, so there is no branch between them.
            op: match self.action & u32::from(WRITE) << 16 {
                0 => TraceOp::Read,
                _ => TraceOp::Write,
            },
            is_preflush: false,
            is_fua: false,
        }
    }
}

/// A device's numbers as they are written.
pub(super) fn device_name(device: u32) -> String {
    format!("{}:{}", device >> 20, device & 0xf_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPLETE: u8 = 8;

    fn head<const BIG: bool>(event: u8, is_write: bool) -> [u8; V7] {
        let action = u32::from(event) | if is_write { u32::from(WRITE) << 16 } else { 0 };
        let mut head = [0; V7];
        // All but the last are whole or half words: magic, number, time, sector, bytes, action, process, device, processor.
        let words = [
            MAGIC | 7,
            5,
            0x89,
            0xab,
            0x123,
            0,
            4096,
            action,
            77,
            0x0fd0_0003,
            6,
        ];
        for (field, word) in head.chunks_exact_mut(4).zip(words) {
            field.copy_from_slice(&if BIG {
                word.to_be_bytes()
            } else {
                word.to_le_bytes()
            });
        }
        head
    }

    /// Whether a record counts as plain; it must say what it says to the thorough.
    fn is_plain<const BIG: bool>(head: &[u8; V7]) -> bool {
        let Some(plain) = Plain::of::<BIG>(head) else {
            return false;
        };
        let record = Record::parse::<BIG>(head).expect("a record");
        let io = plain.io();
        assert_eq!(
            (
                plain.sequence,
                io.time_ns,
                io.sector,
                plain.bytes,
                plain.device,
                plain.cpu
            ),
            (
                record.sequence,
                record.time,
                record.sector,
                record.bytes,
                record.device,
                record.cpu
            )
        );
        assert_eq!(record.len(), V7);
        if !plain.is_request {
            assert!(![QUEUE, REMAP].contains(&record.event) && !record.has(NOTIFY));
            return true;
        }
        assert_eq!(record.event, QUEUE);
        assert_eq!(io.op == TraceOp::Write, record.has(WRITE));
        let others = [FLUSH, PASSTHROUGH, NOTIFY, DISCARD, FUA];
        assert!(!others.iter().any(|&other| record.has(other)));
        true
    }

    /// How many records are plain of one that is and those that differ from it by a bit.
    fn flip_every_bit<const BIG: bool>(event: u8) -> [u32; 2] {
        [false, true].map(|is_write| {
            let sound = head::<BIG>(event, is_write);
            let mut plain = u32::from(is_plain::<BIG>(&sound));
            for bit in 0..V7 * 8 {
                let mut head = sound;
                head[bit / 8] ^= 1 << (bit % 8);
                plain += u32::from(is_plain::<BIG>(&head));
            }
            plain
        })
    }

    #[test]
    fn a_plain_record_says_what_it_says_to_the_thorough() {
        // Number, time, process, device, processor, error, and of the action the byte above the event.
        let common = 1 + 32 + 64 + 32 + 32 + 32 + 16 + 8;
        // Sectors that are not far, bytes but for the only bit that is set, eleven other categories, and any other event.
        let queued = common + 54 + 31 + 11 + 8;
        // All sectors and bytes, all categories but that of a notification, and events that are neither queued nor a remap.
        let completed = common + 64 + 32 + 15 + 8;
        for (event, expected) in [(QUEUE, queued), (COMPLETE, completed)] {
            assert_eq!(flip_every_bit::<false>(event), [expected; 2]);
            assert_eq!(flip_every_bit::<true>(event), [expected; 2]);
        }
        assert!(!is_plain::<false>(&head::<false>(REMAP, false)));
    }
}
