//! What the kernel asks of the folder and its files.

use super::directory::Directory;
use super::file::File;
use crate::runtime::export::{Answer, Export, Exports, Replier, Request};
use fuser::{
    FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    TimeOrNow, WriteFlags,
};
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

/// Bytes of one write, as far as the kernel goes with us.
const MOST_WRITE: u32 = 1 << 20;
/// Requests that nobody waits for, such as those of a loop device, that the kernel sends at once.
const MOST_BACKGROUND: u16 = 128;
/// Names and attributes are asked for each time: devices come and go, and are written on other ways.
const NO_TIME: Duration = Duration::ZERO;
/// Characters of a name, as everywhere; a thin id has 8.
const MOST_NAME: u32 = 255;
const ROOT: INodeNo = INodeNo(1);

/// The folder of the files.
pub(super) struct Folder {
    exports: Arc<dyn Exports>,
    directory: Directory,
    open: RwLock<HashMap<u64, Arc<File>>>,
    last_handle: AtomicU64,
    /// Held to read while requests are submitted; true when no more are taken.
    is_over: Arc<RwLock<bool>>,
    /// The time of all files: it is not known when they were written.
    started: SystemTime,
}

fn code(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.raw_os_error())
}

impl Folder {
    pub(super) fn new(exports: Arc<dyn Exports>, is_over: Arc<RwLock<bool>>) -> Self {
        Self {
            exports,
            directory: Directory::default(),
            open: RwLock::default(),
            last_handle: AtomicU64::new(0),
            is_over,
            started: SystemTime::now(),
        }
    }

    fn file(&self, handle: FileHandle) -> Result<Arc<File>, Errno> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&handle.0).cloned().ok_or(Errno::BADF)
    }

    /// The export that is the inode, as long as it is there.
    fn export(&self, inode: INodeNo) -> Result<Arc<dyn Export>, Errno> {
        let name = self.directory.name(inode).ok_or(Errno::NOENT)?;
        self.while_running(|| self.exports.find(&name).ok_or(Errno::NOENT))
    }

    /// Does something for which the exports have to be served still.
    fn while_running<T>(&self, go: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let is_over = self.is_over.read().unwrap_or_else(PoisonError::into_inner);
        match *is_over {
            true => Err(Errno::IO),
            false => go(),
        }
    }

    /// Submits what a file makes of a request; `reply` tells the kernel.
    fn submit(
        &self,
        handle: FileHandle,
        request: impl FnOnce(&File) -> Result<Request, Errno>,
        reply: impl FnOnce(Answer) + Send + 'static,
    ) {
        let mut reply = Some(reply);
        let done = self.while_running(|| {
            let file = self.file(handle)?;
            let request = request(&file)?;
            if let Some(reply) = reply.take() {
                file.submit(request, Replier::new(reply));
            }
            Ok(())
        });
        if let (Err(error), Some(reply)) = (done, reply) {
            reply(Err(error));
        }
    }

    fn attributes(&self, inode: INodeNo, export: Option<&dyn Export>) -> Result<FileAttr, Errno> {
        let (kind, perm) = match export {
            None => (FileType::Directory, 0o500),
            Some(export) if export.is_read_only() => (FileType::RegularFile, 0o400),
            Some(_) => (FileType::RegularFile, 0o600),
        };
        let allocated = export.map_or(Ok(0), |export| export.allocated())?;
        Ok(FileAttr {
            ino: inode,
            size: export.map_or(0, |export| export.size()),
            blocks: allocated / 512,
            atime: self.started,
            mtime: self.started,
            ctime: self.started,
            crtime: self.started,
            kind,
            perm,
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: export.map_or(4096, |export| export.preferred_block()),
            flags: 0,
        })
    }

    fn attributes_of(&self, inode: INodeNo, fh: Option<FileHandle>) -> Result<FileAttr, Errno> {
        if inode == ROOT {
            return self.attributes(inode, None);
        }
        let export = match fh.map(|fh| self.file(fh)) {
            Some(Ok(file)) => Arc::clone(file.export()),
            _ => self.export(inode)?,
        };
        self.while_running(|| self.attributes(inode, Some(&*export)))
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let name = name.to_str().filter(|_| parent == ROOT);
        let name = name.ok_or(Errno::NOENT)?;
        let export = self.while_running(|| self.exports.find(name).ok_or(Errno::NOENT))?;
        self.attributes(self.directory.number(name), Some(&*export))
    }

    fn open_file(&self, inode: INodeNo, flags: OpenFlags) -> Result<FileHandle, Errno> {
        let export = self.export(inode)?;
        if flags.acc_mode() != OpenAccMode::O_RDONLY && export.is_read_only() {
            return Err(Errno::ROFS);
        }
        let handle = self.last_handle.fetch_add(1, Ordering::Relaxed) + 1;
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        open.insert(handle, Arc::new(File::new(export)));
        Ok(FileHandle(handle))
    }
}

/// Answers with what was found, or with the error.
macro_rules! answer {
    ($reply:expr, $found:expr, $ok:expr) => {
        match $found {
            Ok(found) => $ok($reply, found),
            Err(error) => $reply.error(code(error)),
        }
    };
}

fn empty(reply: ReplyEmpty) -> impl FnOnce(Answer) + Send + 'static {
    move |done| answer!(reply, done, |reply: ReplyEmpty, _| reply.ok())
}

impl Filesystem for Folder {
    fn init(&mut self, _: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each where the kernel has it; without, it is slower, or opening to truncate is refused.
        for wanted in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
        ] {
            let _ = config.add_capabilities(wanted);
        }
        let _ = config.set_max_write(MOST_WRITE);
        let _ = config.set_max_background(MOST_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &fuser::Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer!(
            reply,
            self.find(parent, name),
            |reply: ReplyEntry, found| reply.entry(&NO_TIME, &found, Generation(0))
        );
    }

    fn getattr(&self, _: &fuser::Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let found = self.attributes_of(ino, fh);
        answer!(reply, found, |reply: ReplyAttr, found| reply
            .attr(&NO_TIME, &found));
    }

    /// The size is that of the device. Times are taken and forgotten.
    fn setattr(
        &self,
        _: &fuser::Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        fh: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let found = self.attributes_of(ino, fh).and_then(|found| {
            let is_changed = size.is_some_and(|size| size != found.size);
            let owner = mode.is_some() || uid.is_some() || gid.is_some();
            match is_changed || owner {
                true => Err(Errno::PERM),
                false => Ok(found),
            }
        });
        answer!(reply, found, |reply: ReplyAttr, found| reply
            .attr(&NO_TIME, &found));
    }

    fn mknod(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        reply.error(fuser::Errno::EPERM);
    }

    fn mkdir(&self, _: &fuser::Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(fuser::Errno::EPERM);
    }

    fn unlink(&self, _: &fuser::Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(fuser::Errno::EPERM);
    }

    fn rename(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(fuser::Errno::EPERM);
    }

    /// Opening to truncate changes nothing, as with block devices.
    fn open(&self, _: &fuser::Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let how = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        let opened = self.open_file(ino, flags);
        answer!(reply, opened, |reply: ReplyOpen, handle| reply
            .opened(handle, how));
    }

    fn release(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let closed = open.remove(&fh.0);
        drop(open);
        drop(closed);
        reply.ok();
    }

    fn read(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let is_past_end = |file: &Arc<File>| file.read(offset, size as usize).is_none();
        if self.file(fh).is_ok_and(|file| is_past_end(&file)) {
            return reply.data(&[]);
        }
        self.submit(
            fh,
            |file| file.read(offset, size as usize).ok_or(Errno::INVAL),
            move |done| {
                answer!(reply, done, |reply: ReplyData, data: Vec<u8>| reply
                    .data(&data))
            },
        );
    }

    fn write(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let durably = OFlags::SYNC | OFlags::DSYNC;
        let fua = OFlags::from_bits_retain(flags.0 as u32).intersects(durably);
        // The kernel sends no more than fits.
        let written = data.len() as u32;
        self.submit(
            fh,
            |file| file.write(offset, data, fua),
            move |done| answer!(reply, done, |reply: ReplyWrite, _| reply.written(written)),
        );
    }

    /// Closing makes nothing durable.
    fn flush(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(&self, _: &fuser::Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        self.submit(fh, |_| Ok(Request::Flush), empty(reply));
    }

    fn fallocate(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode as u32);
        let request = |file: &File| file.fallocate(offset, length, mode);
        self.submit(fh, request, empty(reply));
    }

    fn lseek(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = self.while_running(|| {
            let is_hole = match whence {
                3 => false,
                4 => true,
                _ => return Err(Errno::INVAL),
            };
            let offset = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
            let found = self.file(fh)?.seek(offset, is_hole)?;
            i64::try_from(found).map_err(|_| Errno::OVERFLOW)
        });
        answer!(reply, found, |reply: ReplyLseek, at| reply.offset(at));
    }

    /// The pool's data blocks. A file is a thin device, so there can be as many as there are ids.
    fn statfs(&self, _: &fuser::Request, _: INodeNo, reply: ReplyStatfs) {
        let found = self.while_running(|| Ok((self.exports.space(), self.exports.list().len())));
        let (space, files) = match found {
            Ok(found) => found,
            Err(error) => return reply.error(code(error)),
        };
        let (size, most) = (space.block_bytes, space.most_exports);
        let ids_left = most.saturating_sub(files as u64);
        let (blocks, free) = (space.blocks, space.free);
        reply.statfs(blocks, free, free, most, ids_left, size, MOST_NAME, size);
    }

    fn readdir(
        &self,
        _: &fuser::Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if ino != ROOT {
            return reply.error(fuser::Errno::ENOTDIR);
        }
        let files = self.while_running(|| Ok(self.directory.list(&*self.exports)));
        let mut files = match files {
            Ok(files) => files,
            Err(error) => return reply.error(code(error)),
        };
        // An entry's place is its number, 1 and 2 are those of the folder itself.
        let after = files.split_off(&(offset + 1).max(3));
        let own = [(1, "."), (2, "..")].map(|(at, name)| (at, name.to_owned()));
        let own = own.into_iter().filter(|(at, _)| *at > offset);
        for (at, name) in own.chain(after) {
            let (inode, kind) = match at {
                1 | 2 => (ROOT, FileType::Directory),
                file => (INodeNo(file), FileType::RegularFile),
            };
            if reply.add(inode, at, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
