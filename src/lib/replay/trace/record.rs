//! One record of a binary blktrace, of version 7 or 8 and either byte order.

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

impl Record {
    /// Reads the header that `data` begins with. None if it is none; there are at least [`V7`] bytes.
    #[inline]
    pub(super) fn parse<const BIG: bool>(data: &[u8]) -> Option<Self> {
        let bytes = data.first_chunk::<V7>()?;
        let u16_at = |at: usize| -> u16 {
            let field = bytes[at..at + 2].try_into().expect("two bytes");
            if BIG {
                u16::from_be_bytes(field)
            } else {
                u16::from_le_bytes(field)
            }
        };
        let u32_at = |at: usize| -> u32 {
            let field = bytes[at..at + 4].try_into().expect("four bytes");
            if BIG {
                u32::from_be_bytes(field)
            } else {
                u32::from_le_bytes(field)
            }
        };
        let u64_at = |at: usize| -> u64 {
            let field = bytes[at..at + 8].try_into().expect("eight bytes");
            if BIG {
                u64::from_be_bytes(field)
            } else {
                u64::from_le_bytes(field)
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

/// A device's numbers as they are written.
pub(super) fn device_name(device: u32) -> String {
    format!("{}:{}", device >> 20, device & 0xf_ffff)
}
