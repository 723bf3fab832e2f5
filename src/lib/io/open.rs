//! Opening inputs and outputs: refuses what cannot be metadata, what is in use, and what would overwrite its own input.

use super::file::Flags;
use super::{BlockEngine, FileEngine, compressed};
use crate::error::{Error, ErrorKind, Result};
use crate::units::BLOCK_SIZE;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// How a block device is shared while we read it. Regular files know no such lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nobody else may have it open; the rule for everything but metadata snapshots.
    Exclusive,
    /// An active pool may go on using it: only a metadata snapshot can be read safely.
    Live,
}

/// Identity of a file or device, whatever path or link leads to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileId {
    /// A regular file: device and inode.
    File(u64, u64),
    /// A block device: its number.
    Device(u64),
    /// Something else: device and inode.
    Other(u64, u64),
}

/// What `path` (links followed) is.
pub fn file_id(path: &Path) -> io::Result<FileId> {
    let meta = fs::metadata(path)?;
    Ok(if meta.file_type().is_block_device() {
        FileId::Device(meta.rdev())
    } else if meta.is_file() {
        FileId::File(meta.dev(), meta.ino())
    } else {
        FileId::Other(meta.dev(), meta.ino())
    })
}

fn is_device(path: &Path, role: &str) -> Result<bool> {
    let shown = path.display();
    match file_id(path) {
        Ok(FileId::Device(_)) => Ok(true),
        Ok(FileId::File(..)) => Ok(false),
        Ok(FileId::Other(..)) => {
            let what = fs::metadata(path).map_or("special file", |m| {
                if m.is_dir() {
                    "directory"
                } else if m.file_type().is_char_device() {
                    "character device"
                } else if m.file_type().is_fifo() {
                    "pipe"
                } else {
                    "special file"
                }
            });
            Err(Error::new(
                ErrorKind::NotMetadata,
                format!("{role} {shown} is a {what}; metadata is a block device or a regular file"),
            ))
        }
        Err(e) => Err(Error::io(format!("cannot find {role} {shown}"), e)),
    }
}

fn open_engine(path: &Path, role: &str, flags: Flags) -> Result<FileEngine> {
    let shown = path.display();
    FileEngine::open(path, flags).map_err(|e| {
        if e.kind() == io::ErrorKind::ResourceBusy {
            return Error::with_source(
                ErrorKind::Busy,
                format!(
                    "{role} {shown} is in use, most likely by an active pool or another command that writes to it: live metadata changes while it is read; \
                     deactivate the pool first, or reserve a metadata snapshot and use -m where the command has it"
                ),
                e,
            );
        }
        Error::io(format!("cannot open {role} {shown}"), e)
    })
}

/// Opens metadata to read. Regular files may be images compressed with zstd, gzip or xz.
///
/// # Errors
/// `NotMetadata` for what cannot be metadata (directory, pipe, too small, XML), `Busy` for a device in use, `Io`.
pub fn open_read(path: &Path, access: Access) -> Result<Box<dyn BlockEngine>> {
    let flags = Flags {
        write: false,
        exclusive: access == Access::Exclusive,
        is_device: is_device(path, "input")?,
    };
    if !flags.is_device {
        let mut head = [0; 64];
        let (file, len) = read_head(path, &mut head)?;
        if let Some(compression) = compressed::detect(&head[..len]) {
            return Ok(Box::new(compressed::expand(file, compression, path)?));
        }
        refuse_text(path, &head[..len])?;
    }
    let engine = open_engine(path, "input", flags)?;
    refuse_small(path, &engine)?;
    Ok(Box::new(engine))
}

/// Opens metadata to change it in place; compressed images are refused.
pub fn open_write(path: &Path) -> Result<Box<dyn BlockEngine>> {
    Ok(Box::new(open_pool(path)?))
}

/// The same for a running pool, whose metadata device may grow.
pub fn open_pool(path: &Path) -> Result<FileEngine> {
    let flags = Flags {
        write: true,
        exclusive: true,
        is_device: is_device(path, "input")?,
    };
    if !flags.is_device {
        let mut head = [0; 64];
        let (_, len) = read_head(path, &mut head)?;
        if compressed::is_compressed(&head[..len]) {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!(
                    "{} is a compressed image, which can only be read; expand it first",
                    path.display()
                ),
            ));
        }
        refuse_text(path, &head[..len])?;
    }
    let engine = open_engine(path, "input", flags)?;
    refuse_small(path, &engine)?;
    Ok(engine)
}

/// Opens the device or file that a restore or repair fills. It must exist, and must not be the input.
///
/// # Errors
/// `Unsuitable` when it is the input (also through links) or cannot hold metadata, `Busy`, `Io`.
pub fn open_output(path: &Path, input: Option<&Path>) -> Result<Box<dyn BlockEngine>> {
    let is_device = is_device(path, "output").map_err(|e| match e.kind() {
        ErrorKind::NotMetadata => e.with_kind(ErrorKind::Unsuitable),
        ErrorKind::Io => e.context(format!(
            "the output {} must exist, as a block device or a file of the size the metadata shall have",
            path.display()
        )),
        _ => e,
    })?;
    if let Some(input) = input
        && let (Ok(a), Ok(b)) = (file_id(path), file_id(input))
        && a == b
    {
        return Err(Error::new(
            ErrorKind::Unsuitable,
            format!(
                "output {} is the input {}; give another device",
                path.display(),
                input.display()
            ),
        ));
    }
    let flags = Flags {
        write: true,
        exclusive: true,
        is_device,
    };
    Ok(Box::new(open_engine(path, "output", flags)?))
}

fn read_head(path: &Path, head: &mut [u8]) -> Result<(File, usize)> {
    let shown = path.display();
    let file = File::open(path).map_err(|e| Error::io(format!("cannot open input {shown}"), e))?;
    let mut len = 0;
    while len < head.len() {
        match file.read_at(&mut head[len..], len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(format!("cannot read input {shown}"), e)),
        }
    }
    Ok((file, len))
}

fn refuse_text(path: &Path, head: &[u8]) -> Result<()> {
    let text = head.trim_ascii_start();
    if text.starts_with(b"<superblock") || text.starts_with(b"<?xml") || text.starts_with(b"<!--") {
        return Err(Error::new(
            ErrorKind::NotMetadata,
            format!(
                "{} looks like XML; this command reads binary metadata (thin_restore turns XML into it)",
                path.display()
            ),
        ));
    }
    Ok(())
}

fn refuse_small(path: &Path, engine: &FileEngine) -> Result<()> {
    if engine.nr_blocks() == 0 {
        return Err(Error::new(
            ErrorKind::NotMetadata,
            format!(
                "{} is smaller than one metadata block of {BLOCK_SIZE} bytes; is this the metadata device?",
                path.display()
            ),
        ));
    }
    Ok(())
}

/// Runs `fill` on a writer for the text output `path`. A regular file appears, or is replaced, only when everything is
/// written and synced, so a crash leaves the old contents or the new; a device, pipe or terminal is written directly.
///
/// # Errors
/// `Unsuitable` when `path` is `input`, a directory or a block device; whatever `fill` returns; `Io`.
pub fn write_replacing(
    path: &Path,
    input: &Path,
    fill: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let shown = path.display();
    let cannot = |what: &str, e: io::Error| Error::io(format!("cannot {what} output {shown}"), e);
    let existing = match fs::metadata(path) {
        Ok(meta) => Some(meta),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(cannot("look at", e)),
    };
    if let Some(meta) = &existing {
        if meta.is_dir() || meta.file_type().is_block_device() {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!(
                    "output {shown} is a directory or a block device; give the name of a text file"
                ),
            ));
        }
        if matches!((file_id(path), file_id(input)), (Ok(a), Ok(b)) if a == b) {
            return Err(Error::new(
                ErrorKind::Unsuitable,
                format!("output {shown} is the input; give another file"),
            ));
        }
        if !meta.is_file() {
            let mut file = File::options()
                .write(true)
                .open(path)
                .map_err(|e| cannot("open", e))?;
            return fill(&mut file);
        }
    }
    // Through a link, the file it points to is replaced, not the link.
    let target: PathBuf = match existing {
        Some(_) => fs::canonicalize(path).map_err(|e| cannot("resolve", e))?,
        None => path.to_path_buf(),
    };
    let folder = folder_of(&target);
    let mut temporary = tempfile::Builder::new()
        .prefix(".thintools-")
        .permissions(permissions(existing.as_ref()))
        .tempfile_in(folder)
        .map_err(|e| cannot("make a temporary file beside", e))?;
    let _listed = Listed::new(temporary.path());
    fill(&mut temporary)?;
    temporary
        .as_file()
        .sync_all()
        .map_err(|e| cannot("sync", e))?;
    temporary
        .persist(&target)
        .map_err(|e| cannot("put in place", e.error))?;
    sync_folder(folder).map_err(|e| cannot("sync the folder of", e))
}

/// Bytes that are written to a new file at once.
const WRITTEN: usize = 64 << 10;

/// Runs `fill` on a buffered writer for the file `path`, which must not exist. It appears only when everything is written and synced,
/// and its folder is synced too: after an error or a crash there is no such file, after success it is there to stay.
///
/// # Errors
/// `Unsuitable` when there is anything of that name; whatever `fill` returns; `Io`.
pub fn write_new(path: &Path, fill: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<()> {
    create(path, permissions(None), fill)
}

/// The same for a file that is its owner's only: what it has was read from a device that may be, too.
///
/// # Errors
/// Those of [`write_new`].
pub fn write_new_private(
    path: &Path,
    fill: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    create(path, fs::Permissions::from_mode(0o600), fill)
}

fn create(
    path: &Path,
    permissions: fs::Permissions,
    fill: &mut dyn FnMut(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let shown = path.display();
    let cannot = |what: &str, e: io::Error| Error::io(format!("cannot {what} {shown}"), e);
    let exists = || {
        Error::new(
            ErrorKind::Unsuitable,
            format!("{shown} exists, and is not overwritten; give another name"),
        )
    };
    if fs::symlink_metadata(path).is_ok() {
        return Err(exists());
    }
    let folder = folder_of(path);
    let mut temporary = tempfile::Builder::new()
        .prefix(".thintools-")
        .permissions(permissions)
        .tempfile_in(folder)
        .map_err(|e| cannot("make a temporary file beside", e))?;
    let _listed = Listed::new(temporary.path());
    // The file itself: errors of the other name the temporary one.
    let mut out = BufWriter::with_capacity(WRITTEN, temporary.as_file_mut());
    fill(&mut out)?;
    out.flush().map_err(|e| cannot("write", e))?;
    drop(out);
    temporary
        .as_file()
        .sync_all()
        .map_err(|e| cannot("sync", e))?;
    temporary.persist_noclobber(path).map_err(|e| {
        if e.error.kind() == io::ErrorKind::AlreadyExists {
            exists()
        } else {
            cannot("put in place", e.error)
        }
    })?;
    sync_folder(folder).map_err(|e| {
        // The error that matters is the first; a file that cannot be removed is found by the next run.
        let _ = fs::remove_file(path);
        cannot("sync the folder of", e)
    })
}

/// Makes a folder that output goes to, unless there is one already; it must be empty.
///
/// # Errors
/// `Unsuitable` if it has anything in it; `Io`.
pub fn make_empty_folder(folder: &Path) -> Result<()> {
    let shown = folder.display();
    let cannot = |e| Error::io(format!("cannot make the folder {shown}"), e);
    fs::create_dir_all(folder).map_err(cannot)?;
    match fs::read_dir(folder).map_err(cannot)?.next() {
        None => Ok(()),
        Some(_) => Err(Error::new(
            ErrorKind::Unsuitable,
            format!("{shown} is not empty; give another folder"),
        )),
    }
}

/// The folder that a file of this name lies in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Temporary files that exist at the moment.
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes the temporary files of outputs that are not complete, for a process that is about to end at once.
pub fn remove_temporary_files() {
    for path in TEMPORARY
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .drain(..)
    {
        // The process ends: there is nobody left to tell that a file stays behind.
        let _ = fs::remove_file(path);
    }
}

/// Keeps a path on the list of temporary files while it lives.
struct Listed(PathBuf);

impl Listed {
    fn new(path: &Path) -> Self {
        let mut list = TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner);
        list.push(path.to_path_buf());
        Self(path.to_path_buf())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut list = TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|path| *path != self.0);
    }
}

/// The permissions of the file that is replaced; for a new file what the umask leaves of 0666.
fn permissions(existing: Option<&fs::Metadata>) -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    existing.map_or_else(
        || fs::Permissions::from_mode(0o666),
        fs::Metadata::permissions,
    )
}
