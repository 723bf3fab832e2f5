//! The letters in which blkparse and the kernel's trace events say what a request asks for.

use crate::replay::event::TraceOp;

/// What the letters mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rwbs {
    /// The operation; none for those that a thin device has not, of zones for example.
    pub(super) op: Option<TraceOp>,
    pub(super) is_preflush: bool,
    pub(super) is_fua: bool,
}

impl Rwbs {
    /// Reads the letters. An F before the operation is a flush before it, one after it forces unit access.
    pub(super) fn parse(letters: &[u8]) -> Option<Self> {
        if letters.is_empty() || letters.len() > 16 || !letters.iter().all(u8::is_ascii_uppercase) {
            return None;
        }
        let (is_preflush, rest) = match letters {
            [b'F', rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        let (op, flags) = match rest {
            [b'R', flags @ ..] => (Some(TraceOp::Read), flags),
            [b'W', b'Z', flags @ ..] | [b'N', flags @ ..] => (Some(TraceOp::WriteZeroes), flags),
            [b'W', flags @ ..] => (Some(TraceOp::Write), flags),
            [b'D', b'E', flags @ ..] | [b'D', flags @ ..] => (Some(TraceOp::Discard), flags),
            [b'F', flags @ ..] if is_preflush => (Some(TraceOp::Flush), flags),
            [] if is_preflush => (Some(TraceOp::Flush), rest),
            _ => (None, rest),
        };
        Some(Self {
            op,
            is_preflush,
            is_fua: flags.contains(&b'F'),
        })
    }

    /// The operation on so many sectors: what has none and flushes is a flush.
    pub(super) fn op(self, sectors: u64) -> Option<TraceOp> {
        match self.op {
            Some(_) if sectors == 0 && self.is_preflush => Some(TraceOp::Flush),
            Some(TraceOp::Flush) => None,
            op => op,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_f_and_the_second_f_differ() {
        let of = |letters: &str| Rwbs::parse(letters.as_bytes()).expect("letters");
        let preflush = of("FWS");
        assert_eq!(preflush.op(8), Some(TraceOp::Write));
        assert_eq!(preflush.op(0), Some(TraceOp::Flush));
        assert!(preflush.is_preflush && !preflush.is_fua);
        let fua = of("WFSM");
        assert!(!fua.is_preflush && fua.is_fua);
        let both = of("FWFSM");
        assert!(both.is_preflush && both.is_fua);
        assert_eq!(of("FF").op(0), Some(TraceOp::Flush));
        assert_eq!(of("DS").op(8), Some(TraceOp::Discard));
        assert_eq!(of("WZ").op(8), Some(TraceOp::WriteZeroes));
        assert_eq!(of("ZR").op(8), None);
        assert_eq!(Rwbs::parse(b"+"), None);
    }
}
