//! Faults of a pool's devices on purpose: requests that fail or are late, power that goes. For those who test what becomes of a pool
//! then, or of what uses it; only with the feature `devtools`.

use super::seam::{DeviceRequest, Interceptor, PoolDevice};
use crate::error::{Error, ErrorKind, Result};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// What is done to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Fail(Errno),
    Delay(Duration),
    Off,
    Kill,
}

/// The kinds of requests, as they are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
}

/// What goes wrong, and when: `DEVICE:REQUEST:ACTION[:CONDITION[,CONDITION]...]`.
///
/// | | |
/// |---|---|
/// | `DEVICE` | `data`, `metadata`, `any` |
/// | `REQUEST` | `read`, `write`, `zero`, `discard`, `flush`, `any` |
/// | `ACTION` | `eio`, `enospc`: it fails, and nothing of it is done. `delay=MS`: it is late. `off`: the power of both devices goes; this and all that follows is `EIO`. `kill`: the process ends at once, as after kill -9 |
/// | `nth=N` | the N-th of the requests that meet the other conditions; the first is 1 |
/// | `from=N` | the N-th, and all that follow |
/// | `at=BYTE+LEN` | those that touch these bytes of the device; a flush touches none |
/// | `while=PATH` | those that come while there is such a file |
/// | `chance=PERCENT` | so many of them, at random |
/// | `seed=N` | which ones; 0 if it is not given |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// None is either of them.
    device: Option<PoolDevice>,
    /// None is any of them.
    kind: Option<Kind>,
    action: Action,
    /// Of the requests that meet all else, counted from 1.
    which: Range<u64>,
    at: Option<Range<u64>>,
    while_there_is: Option<PathBuf>,
    chance: u64,
    seed: u64,
}

impl FromStr for Fault {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |what: &str| {
            Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{what} in the fault {text:?}: it is DEVICE:REQUEST:ACTION[:CONDITION,...]"
                ),
            )
        };
        let mut parts = text.splitn(4, ':');
        let mut next = |what| parts.next().ok_or_else(|| wrong(what));
        let device = match next("no device")? {
            "data" => Some(PoolDevice::Data),
            "metadata" => Some(PoolDevice::Metadata),
            "any" => None,
            _ => return Err(wrong("neither data, metadata nor any")),
        };
        let kind = match next("no request")? {
            "read" => Some(Kind::Read),
            "write" => Some(Kind::Write),
            "zero" => Some(Kind::Zero),
            "discard" => Some(Kind::Discard),
            "flush" => Some(Kind::Flush),
            "any" => None,
            _ => return Err(wrong("an unknown request")),
        };
        let number = |text: &str| text.parse::<u64>().map_err(|_| wrong("no number"));
        let action = next("no action")?;
        let action = match (action, action.split_once('=')) {
            ("eio", _) => Action::Fail(Errno::IO),
            ("enospc", _) => Action::Fail(Errno::NOSPC),
            ("off", _) => Action::Off,
            ("kill", _) => Action::Kill,
            (_, Some(("delay", ms))) => Action::Delay(Duration::from_millis(number(ms)?)),
            _ => return Err(wrong("an unknown action")),
        };
        let mut fault = Self {
            device,
            kind,
            action,
            which: 1..u64::MAX,
            at: None,
            while_there_is: None,
            chance: 100,
            seed: 0,
        };
        for condition in parts.next().into_iter().flat_map(|all| all.split(',')) {
            let condition = condition.split_once('=');
            match condition.ok_or_else(|| wrong("a condition without a value"))? {
                ("nth", n) => {
                    let n = number(n)?;
                    fault.which = n..n.saturating_add(1);
                }
                ("from", n) => fault.which = number(n)?..u64::MAX,
                ("at", range) => {
                    let (byte, len) = range.split_once('+').ok_or_else(|| wrong("no BYTE+LEN"))?;
                    let byte = number(byte)?;
                    fault.at = Some(byte..byte.saturating_add(number(len)?));
                }
                ("while", path) => fault.while_there_is = Some(path.into()),
                ("chance", percent) => fault.chance = number(percent)?,
                ("seed", seed) => fault.seed = number(seed)?,
                _ => return Err(wrong("an unknown condition")),
            }
        }
        Ok(fault)
    }
}

impl Fault {
    /// True if a request is of those that are counted.
    fn meets(&self, device: PoolDevice, kind: Kind, bytes: &Range<u64>) -> bool {
        self.device.is_none_or(|of| of == device)
            && self.kind.is_none_or(|of| of == kind)
            && self
                .at
                .as_ref()
                .is_none_or(|at| at.start < bytes.end && bytes.start < at.end)
            && self
                .while_there_is
                .as_ref()
                .is_none_or(|path| path.exists())
    }

    /// True if the n-th of those that are counted is to go wrong.
    fn strikes(&self, n: u64) -> bool {
        self.which.contains(&n) && mix(self.seed ^ mix(n)) % 100 < self.chance
    }
}

/// Scatters a number: the finalizer of MurmurHash3.
fn mix(mut number: u64) -> u64 {
    number ^= number >> 33;
    number = number.wrapping_mul(0xff51_afd7_ed55_8ccd);
    number ^= number >> 33;
    number = number.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    number ^ number >> 33
}

/// Faults that happen to the devices of a pool.
#[derive(Debug)]
pub struct Faults {
    /// Each with how many requests it has counted.
    faults: Vec<(Fault, AtomicU64)>,
    is_off: AtomicBool,
}

impl Faults {
    /// All of these. They are looked at in this order; a request is late as often as they say, and fails as the first says.
    pub fn new(faults: Vec<Fault>) -> Self {
        Self {
            faults: faults
                .into_iter()
                .map(|fault| (fault, AtomicU64::new(0)))
                .collect(),
            is_off: AtomicBool::new(false),
        }
    }
}

impl Interceptor for Faults {
    fn begin(&self, device: PoolDevice, request: &DeviceRequest<'_>) -> io::Result<u64> {
        let (kind, bytes) = match *request {
            DeviceRequest::Read { byte, len } => (Kind::Read, byte..byte.saturating_add(len)),
            DeviceRequest::Write { byte, data, .. } => {
                (Kind::Write, byte..byte.saturating_add(data.len() as u64))
            }
            DeviceRequest::Zero { byte, len } => (Kind::Zero, byte..byte.saturating_add(len)),
            DeviceRequest::Discard { byte, len } => (Kind::Discard, byte..byte.saturating_add(len)),
            DeviceRequest::Flush => (Kind::Flush, 0..0),
        };
        for (fault, counted) in &self.faults {
            if !fault.meets(device, kind, &bytes)
                || !fault.strikes(counted.fetch_add(1, Ordering::Relaxed) + 1)
            {
                continue;
            }
            match fault.action {
                Action::Fail(errno) => return Err(errno.into()),
                Action::Delay(time) => std::thread::sleep(time),
                Action::Off => self.is_off.store(true, Ordering::SeqCst),
                Action::Kill => {
                    // A process may always end itself.
                    let _ = kill_process(getpid(), Signal::KILL);
                }
            }
        }
        match self.is_off.load(Ordering::SeqCst) {
            true => Err(Errno::IO.into()),
            false => Ok(0),
        }
    }

    fn end(&self, _: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(texts: &[&str]) -> Faults {
        Faults::new(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn read(faults: &Faults, byte: u64) -> Option<Errno> {
        let request = DeviceRequest::Read { byte, len: 512 };
        let begun = faults.begin(PoolDevice::Data, &request);
        begun.err().map(|e| Errno::from_io_error(&e).unwrap())
    }

    #[test]
    fn faults_strike_where_and_when_they_are_told_to() {
        let some = faults(&["data:read:eio:nth=2,at=1024+512", "any:any:enospc:from=5"]);
        let at = [1024, 1023, 1536, 1535, 0, 0];
        let found = at.map(|byte| read(&some, byte));
        let (eio, full) = (Some(Errno::IO), Some(Errno::NOSPC));
        // The second counts what came to it.
        assert_eq!(found, [None, eio, None, None, None, full]);
        let other = faults(&["metadata:read:eio", "data:write:eio", "data:flush:eio"]);
        assert_eq!(read(&other, 0), None);
        assert!(
            other
                .begin(PoolDevice::Data, &DeviceRequest::Flush)
                .is_err()
        );
        assert!(
            other
                .begin(PoolDevice::Metadata, &DeviceRequest::Flush)
                .is_ok()
        );
    }

    #[test]
    fn once_the_power_is_off_nothing_goes_on() {
        let off = faults(&["data:read:off:nth=3"]);
        assert_eq!((0..2).find_map(|_| read(&off, 0)), None);
        assert_eq!(read(&off, 0), Some(Errno::IO));
        assert!(
            off.begin(PoolDevice::Metadata, &DeviceRequest::Flush)
                .is_err()
        );
    }

    #[test]
    fn chance_is_the_same_for_the_same_seed() {
        let struck = |text| {
            let faults = faults(&[text]);
            (0..1000)
                .map(|_| read(&faults, 0).is_some())
                .collect::<Vec<_>>()
        };
        let first = struck("any:read:eio:chance=20,seed=5");
        assert_eq!(first, struck("any:read:eio:chance=20,seed=5"));
        assert_ne!(first, struck("any:read:eio:chance=20"));
        let share = first.iter().filter(|struck| **struck).count();
        assert!((150..250).contains(&share), "{share}");
    }

    #[test]
    fn a_fault_lasts_while_there_is_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fail");
        let spec = format!("data:any:eio:while={}", path.display());
        let faults = faults(&[&spec]);
        assert_eq!(read(&faults, 0), None);
        std::fs::write(&path, "").unwrap();
        assert_eq!(read(&faults, 0), Some(Errno::IO));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&faults, 0), None);
    }

    #[test]
    fn what_is_no_fault_is_refused() {
        let bad = [
            "",
            "data",
            "data:read",
            "disk:read:eio",
            "data:seek:eio",
            "data:read:eperm",
            "data:read:delay",
            "data:read:delay=x",
            "data:read:eio:",
            "data:read:eio:nth",
            "data:read:eio:nth=-1",
            "data:read:eio:at=5",
            "data:read:eio:on=3",
        ];
        for text in bad {
            let refusal = text.parse::<Fault>().unwrap_err();
            assert_eq!(refusal.kind(), ErrorKind::InvalidArgument, "{text}");
        }
    }
}
