//! Where data blocks are: a regular file or a block device, through the page cache or directly.
//!
//! 1. Reads and writes may come from any number of threads; they are complete, or an error.
//! 2. A write that has returned is durable after the next [`flush`](DataDevice::flush) that is asked for has succeeded. One call of the
//!    system serves everybody who asked before it began.
//! 3. Once a flush has failed, it is not known what was lost, and the system tells it once only: every later flush fails, too.

use super::direct::Direct;
use super::ring::Flight;
use super::seam::{DeviceRequest, Seam};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{FileId, file_id};
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, flock};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes in a sector.
pub(super) const SECTOR: u64 = 512;
/// Bytes that a copy or zeros move at once.
const CHUNK: u64 = 1 << 20;
/// A flush that takes less costs less than to have another thread do it.
const QUICK: Duration = Duration::from_micros(50);

/// Flushes: who asked, and what was done.
#[derive(Debug, Default)]
struct Flushes {
    /// Flushes that have begun.
    begun: u64,
    /// The last of them that has ended.
    ended: u64,
    is_running: bool,
    failure: Option<i32>,
}

/// A device of sectors of 512 bytes.
#[derive(Debug)]
pub struct DataDevice {
    file: File,
    path: PathBuf,
    is_file: bool,
    /// None if it goes through the page cache.
    direct: Option<Direct>,
    flushes: Mutex<Flushes>,
    has_flushed: Condvar,
    seam: Seam,
    /// It may end within a sector; behind that are zeros.
    is_padded: bool,
    /// What the last flush took, in nanoseconds.
    last_flush_ns: AtomicU64,
}

impl DataDevice {
    /// Opens it for nobody else to use, to be written or only read, through the page cache.
    ///
    /// # Errors
    /// `Unsuitable` for what is neither a block device nor a regular file, `Busy`, `Io`.
    pub fn open(path: &Path, is_written: bool) -> Result<Self> {
        Self::open_how(path, is_written, false)
    }

    /// The same, past the page cache.
    ///
    /// # Errors
    /// `Unsuitable` also for what takes no direct I/O.
    pub fn open_direct(path: &Path, is_written: bool) -> Result<Self> {
        Self::open_how(path, is_written, true)
    }

    /// Opens an external origin, to be read. It need not end with a whole sector: the last one is filled up with zeros.
    ///
    /// # Errors
    /// `Unsuitable` for what is neither a block device nor a regular file, `Busy`, `Io`.
    pub fn open_origin(path: &Path) -> Result<Self> {
        Ok(Self {
            is_padded: true,
            ..Self::open(path, false)?
        })
    }

    fn open_how(path: &Path, is_written: bool, is_direct: bool) -> Result<Self> {
        let shown = path.display();
        let is_file =
            match file_id(path).map_err(|e| Error::io(format!("cannot find {shown}"), e))? {
                FileId::File(..) => true,
                FileId::Device(_) => false,
                FileId::Other(..) => {
                    return Err(Error::new(
                        ErrorKind::Unsuitable,
                        format!("{shown} is neither a block device nor a regular file"),
                    ));
                }
            };
        let mut flags = OFlags::CLOEXEC;
        if !is_file && is_written {
            flags |= OFlags::EXCL;
        }
        if is_direct {
            flags |= OFlags::DIRECT;
        }
        let busy = |e: io::Error| match e.kind() {
            io::ErrorKind::ResourceBusy => Error::with_source(
                ErrorKind::Busy,
                format!("{shown} is in use; only one pool, or one program, may have it"),
                e,
            ),
            io::ErrorKind::InvalidInput if is_direct => Error::with_source(
                ErrorKind::Unsuitable,
                format!(
                    "{shown} takes no direct I/O; use it through the page cache, without --direct"
                ),
                e,
            ),
            _ => Error::io(format!("cannot open {shown}"), e),
        };
        let file = OpenOptions::new()
            .read(true)
            .write(is_written)
            .custom_flags(flags.bits() as i32)
            .open(path)
            .map_err(busy)?;
        // Readers share it. Where locks are not known, nothing is lost.
        let lock = match is_written {
            true => FlockOperation::NonBlockingLockExclusive,
            false => FlockOperation::NonBlockingLockShared,
        };
        if is_file && flock(&file, lock) == Err(Errno::WOULDBLOCK) {
            return Err(busy(io::ErrorKind::ResourceBusy.into()));
        }
        let direct = match is_direct {
            true => Some(Direct::of(&file).map_err(busy)?),
            false => None,
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            is_file,
            direct,
            flushes: Mutex::default(),
            has_flushed: Condvar::new(),
            seam: Seam::default(),
            is_padded: false,
            last_flush_ns: AtomicU64::new(0),
        })
    }

    /// The same, with requests that pass this seam.
    #[cfg(feature = "devtools")]
    pub(super) fn behind(self, seam: Seam) -> Self {
        Self { seam, ..self }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// True for a regular file.
    pub(super) fn is_file(&self) -> bool {
        self.is_file
    }

    /// True if it is used past the page cache: reads and writes wait for the device.
    pub(super) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// True if [`start_all`](Self::start_all) does not wait for reads and writes of whole units. What it starts passes no seam.
    pub(super) fn has_ring(&self) -> bool {
        !self.seam.is_watched() && self.direct.as_ref().is_some_and(Direct::has_ring)
    }

    /// True if a range can be given to [`start_all`](Self::start_all).
    pub(super) fn is_whole(&self, byte: u64, len: usize) -> bool {
        (self.direct.as_ref()).is_some_and(|direct| direct.is_whole(byte, len))
    }

    /// Starts reads and writes of whole units of a device that is used directly, together.
    pub(super) fn start_all(&self, flights: Vec<Flight>) {
        match &self.direct {
            Some(direct) => direct.start_all(&self.file, flights),
            None => flights
                .into_iter()
                .for_each(|flight| flight.end(&self.file, 0)),
        }
    }

    /// Its size now, in whole sectors.
    ///
    /// # Errors
    /// `Io`.
    pub fn sectors(&self) -> Result<u64> {
        let end = (&self.file).seek(SeekFrom::End(0));
        let bytes =
            end.map_err(|e| Error::io(format!("cannot measure {}", self.path.display()), e))?;
        Ok(match self.is_padded {
            true => bytes.div_ceil(SECTOR),
            false => bytes / SECTOR,
        })
    }

    /// Makes a regular file larger; the new part takes no room yet.
    ///
    /// # Errors
    /// `Unsuitable` for a block device, `InvalidArgument` for more than its file system takes, `NoSpace`, `Io`.
    pub fn grow(&self, sectors: u64) -> Result<()> {
        let shown = self.path.display();
        if !self.is_file {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!("{shown} is a block device, which grows by other means"),
            ));
        }
        if sectors > self.sectors()? {
            let grown = self.file.set_len(sectors.saturating_mul(SECTOR));
            grown.map_err(|e| not_grown(&shown.to_string(), e))?;
        }
        Ok(())
    }

    pub(super) fn read(&self, buffer: &mut [u8], byte: u64) -> io::Result<()> {
        let len = buffer.len() as u64;
        let _passage = self.seam.pass(DeviceRequest::Read { byte, len })?;
        match &self.direct {
            Some(direct) => direct.read(&self.file, buffer, byte),
            None if self.is_padded => self.read_padded(buffer, byte),
            None => self.file.read_exact_at(buffer, byte),
        }
    }

    fn read_padded(&self, buffer: &mut [u8], byte: u64) -> io::Result<()> {
        let mut there = 0;
        while there < buffer.len() {
            match self.file.read_at(&mut buffer[there..], byte + there as u64) {
                Ok(0) => break,
                Ok(n) => there += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let (end, rest) = (byte + there as u64, &mut buffer[there..]);
        // What is missing of more than a sector has been cut off meanwhile.
        if rest.len() as u64 > end.next_multiple_of(SECTOR) - end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        rest.fill(0);
        Ok(())
    }

    pub(super) fn write(&self, data: &[u8], byte: u64) -> io::Result<()> {
        let is_durable = false;
        let _passage = self.seam.pass(DeviceRequest::Write {
            byte,
            data,
            is_durable,
        })?;
        self.put(data, byte, |data, byte| self.file.write_all_at(data, byte))
    }

    /// Writes by calls of `put`.
    fn put(
        &self,
        data: &[u8],
        byte: u64,
        put: impl Fn(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        match &self.direct {
            Some(direct) => direct.write(&self.file, data, byte, put),
            None => put(data, byte),
        }
    }

    /// Writes what is durable when this returns.
    pub(super) fn write_durably(&self, data: &[u8], byte: u64) -> io::Result<()> {
        let is_durable = true;
        let _passage = self.seam.pass(DeviceRequest::Write {
            byte,
            data,
            is_durable,
        })?;
        self.put(data, byte, |data, byte| self.put_durably(data, byte))
    }

    fn put_durably(&self, mut data: &[u8], mut byte: u64) -> io::Result<()> {
        while !data.is_empty() {
            match pwritev2(
                &self.file,
                &[IoSlice::new(data)],
                byte,
                ReadWriteFlags::DSYNC,
            ) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    data = &data[n..];
                    byte += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    self.file.write_all_at(data, byte)?;
                    return self.flush();
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Writes zeros. In a file they take no room until they are written to.
    pub(super) fn zero(&self, sector: u64, sectors: u64) -> io::Result<()> {
        let (mut byte, len) = (sector * SECTOR, sectors * SECTOR);
        let _passage = self.seam.pass(DeviceRequest::Zero { byte, len })?;
        let how = match self.is_file {
            true => FallocateFlags::PUNCH_HOLE,
            false => FallocateFlags::ZERO_RANGE,
        };
        let done = fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, byte, len);
        if !matches!(done, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)) {
            return Ok(done?);
        }
        let zeros = vec![0; len.min(CHUNK) as usize];
        let end = byte + len;
        while byte < end {
            let n = (end - byte).min(CHUNK);
            self.write(&zeros[..n as usize], byte)?;
            byte += n;
        }
        Ok(())
    }

    /// Writes zeros to bytes, which may be no whole sectors.
    pub(super) fn write_zeros(&self, byte: u64, len: u64) -> io::Result<()> {
        if byte.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) {
            return self.zero(byte / SECTOR, len / SECTOR);
        }
        self.write(&vec![0; len as usize], byte)
    }

    /// Gives room back to whoever provides it; what is there afterwards is undefined, in practice zeros.
    pub(super) fn discard(&self, sector: u64, sectors: u64) -> io::Result<()> {
        let (byte, len) = (sector * SECTOR, sectors * SECTOR);
        let _passage = self.seam.pass(DeviceRequest::Discard { byte, len })?;
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, how, byte, len)?)
    }

    /// Copies sectors of `from`, which may be the same device.
    pub(super) fn copy(
        &self,
        from: &Self,
        from_sector: u64,
        sector: u64,
        sectors: u64,
    ) -> io::Result<()> {
        let len = sectors * SECTOR;
        let mut buffer = vec![0; len.min(CHUNK) as usize];
        let mut at = 0;
        while at < len {
            let part = &mut buffer[..(len - at).min(CHUNK) as usize];
            from.read(part, from_sector * SECTOR + at)?;
            self.write(part, sector * SECTOR + at)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// True if a flush is likely to take next to no time.
    pub(super) fn flushes_quickly(&self) -> bool {
        u128::from(self.last_flush_ns.load(Ordering::Relaxed)) < QUICK.as_nanos()
    }

    /// Makes everything durable that was written before.
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut flushes = self.flushes.lock().unwrap_or_else(PoisonError::into_inner);
        // One that runs already may have missed what was written since it began.
        let wanted = flushes.begun + 1;
        while flushes.ended < wanted {
            if flushes.is_running {
                flushes = self
                    .has_flushed
                    .wait(flushes)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            flushes.is_running = true;
            flushes.begun += 1;
            let number = flushes.begun;
            drop(flushes);
            let since = Instant::now();
            let passage = self.seam.pass(DeviceRequest::Flush);
            let flushed = passage.and_then(|_passage| self.file.sync_data());
            let took = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.last_flush_ns.store(took, Ordering::Relaxed);
            flushes = self.flushes.lock().unwrap_or_else(PoisonError::into_inner);
            flushes.is_running = false;
            flushes.ended = number;
            if let Err(e) = flushed {
                flushes.failure = e.raw_os_error().or(Some(Errno::IO.raw_os_error()));
            }
            self.has_flushed.notify_all();
        }
        match flushes.failure {
            Some(number) => Err(io::Error::from_raw_os_error(number)),
            None => Ok(()),
        }
    }
}

/// Why a file was not made larger.
pub(super) fn not_grown(file: &str, error: io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput => ErrorKind::InvalidArgument,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        _ => ErrorKind::Io,
    };
    Error::with_source(kind, format!("cannot grow {file}"), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(sectors: u64) -> (tempfile::TempDir, DataDevice) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        File::create(&path)
            .unwrap()
            .set_len(sectors * SECTOR)
            .unwrap();
        let device = DataDevice::open(&path, true).unwrap();
        (folder, device)
    }

    /// The same device past the page cache, where that is possible.
    fn direct(sectors: u64) -> Option<(tempfile::TempDir, DataDevice)> {
        let (folder, device) = device(sectors);
        drop(device);
        match DataDevice::open_direct(&folder.path().join("data"), true) {
            Ok(device) => Some((folder, device)),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Unsuitable);
                eprintln!("direct I/O is not tested: {e}");
                None
            }
        }
    }

    #[test]
    fn what_was_written_is_read_copied_and_zeroed() {
        moves_data(&device(8192).1);
        if let Some((_folder, device)) = direct(8192) {
            moves_data(&device);
        }
    }

    /// Writers of parts of a unit and of all of it do not undo each other.
    #[test]
    fn direct_writes_to_parts_of_one_unit_are_all_there() {
        let Some((_folder, device)) = direct(64) else {
            return;
        };
        std::thread::scope(|scope| {
            for writer in 0..4_u8 {
                let device = &device;
                scope.spawn(move || {
                    for n in 0..100 {
                        let own = [writer * 50 + n % 50 + 1; 100];
                        device.write(&own, u64::from(writer) * 1000).unwrap();
                        device.write(&[n; 4096], 4096).unwrap();
                    }
                });
            }
        });
        let mut found = vec![0; 8192];
        device.read(&mut found, 0).unwrap();
        for (writer, part) in found[..4000].chunks(1000).enumerate() {
            assert!(part[..100].iter().all(|&b| b == writer as u8 * 50 + 50));
            assert!(part[100..].iter().all(|&b| b == 0));
        }
        assert!(found[4096..].iter().all(|&b| b == 99));
    }

    fn moves_data(device: &DataDevice) {
        device.write(&[7; 5000], 1000).unwrap();
        device.write_durably(&[8; 3000], 6000).unwrap();
        device.copy(device, 0, 4096, 4096).unwrap();
        let mut found = vec![0; 9000];
        device.read(&mut found, 4096 * SECTOR + 1000).unwrap();
        assert!(found[..5000].iter().all(|&b| b == 7) && found[5000..8000].iter().all(|&b| b == 8));
        device.zero(4097, 16).unwrap();
        device.read(&mut found, 4096 * SECTOR).unwrap();
        assert!(
            found[SECTOR as usize..17 * SECTOR as usize]
                .iter()
                .all(|&b| b == 0)
        );
        device.flush().unwrap();
        assert!(
            device.read(&mut found, 8192 * SECTOR - 1).is_err(),
            "past the end"
        );
        device.grow(9000).unwrap();
        assert_eq!(device.sectors().unwrap(), 9000);
        device.grow(10).unwrap();
        assert_eq!(device.sectors().unwrap(), 9000, "never smaller");
    }

    #[test]
    fn a_device_that_is_written_is_nobody_elses() {
        let (folder, _device) = device(8);
        for is_written in [false, true] {
            let refusal = DataDevice::open(&folder.path().join("data"), is_written).unwrap_err();
            assert_eq!(refusal.kind(), ErrorKind::Busy);
        }
        assert_eq!(
            DataDevice::open(folder.path(), true).unwrap_err().kind(),
            ErrorKind::Unsuitable
        );
    }

    #[test]
    fn flushes_at_once_all_end() {
        let (_folder, device) = device(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..50).for_each(|_| device.flush().unwrap()));
            }
        });
        let flushes = device.flushes.lock().unwrap();
        assert!(flushes.begun <= 400 && flushes.ended == flushes.begun && !flushes.is_running);
    }
}
