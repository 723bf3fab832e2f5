//! Images compressed with zstd, gzip or xz, as they reach people who give support: expanded into an unlinked temporary file,
//! leaving holes for zeroed blocks, so neither memory nor disk depends on the size of the device the image was taken from.

use super::FileEngine;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BLOCK_SIZE, MAGIC, MAX_METADATA_BLOCKS};
use liblzma::read::XzDecoder;
use liblzma::stream::Stream;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Largest image that is expanded: the most metadata a pool can use, and as much again for devices larger than that.
const MAX_EXPANDED: u64 = 2 * MAX_METADATA_BLOCKS * BLOCK_SIZE as u64;
/// A dictionary of 64 MiB, as of xz -9, and what xz counts beside it.
const XZ_MEMORY: u64 = 66 << 20;
const CHUNK: usize = 256 * BLOCK_SIZE;

/// How an image is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Zstd,
    Gzip,
    Xz,
}

/// Recognises a compressed image by its first bytes. A superblock has its own magic at 32, whatever its checksum bytes are.
pub(super) fn detect(head: &[u8]) -> Option<Compression> {
    let is_superblock = head.get(32..40) == Some(MAGIC.to_le_bytes().as_slice());
    match head {
        _ if is_superblock => None,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
        [0x1f, 0x8b, ..] => Some(Compression::Gzip),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Compression::Xz),
        _ => None,
    }
}

/// True when the first bytes of a file are those of a compressed one.
pub(crate) fn is_compressed(head: &[u8]) -> bool {
    detect(head).is_some()
}

/// Expands the image that `file` holds and returns an engine over the copy.
pub(super) fn expand(file: File, compression: Compression, path: &Path) -> Result<FileEngine> {
    let shown = path.display();
    let bad = |e: io::Error| Error::io(format!("cannot expand the compressed image {shown}"), e);
    let copy = tempfile::tempfile().map_err(|e| {
        Error::io(
            format!("cannot make a temporary file to expand {shown} into; set TMPDIR to a folder with room"),
            e,
        )
    })?;
    let written = match compression {
        Compression::Zstd => copy_sparse(zstd::Decoder::new(file).map_err(bad)?, &copy),
        Compression::Gzip => copy_sparse(flate2::read::MultiGzDecoder::new(file), &copy),
        Compression::Xz => {
            let flags = liblzma::stream::CONCATENATED;
            let stream = Stream::new_stream_decoder(XZ_MEMORY, flags).map_err(|e| bad(e.into()))?;
            copy_sparse(XzDecoder::new_stream(file, stream), &copy)
        }
    }
    .map_err(|e| match e {
        Failure::Read(e) => bad(e),
        Failure::Write(e) => Error::io(
            format!("cannot write the expanded copy of {shown}; set TMPDIR to a folder with room"),
            e,
        ),
        Failure::TooLarge => Error::new(
            ErrorKind::NotMetadata,
            format!(
                "{shown} expands to more than {MAX_EXPANDED} bytes, which no metadata device needs"
            ),
        ),
    })?;
    if written < BLOCK_SIZE as u64 {
        return Err(Error::new(
            ErrorKind::NotMetadata,
            format!("{shown} expands to {written} bytes; metadata is at least {BLOCK_SIZE}"),
        ));
    }
    FileEngine::from_file(copy, false).map_err(bad)
}

enum Failure {
    Read(io::Error),
    Write(io::Error),
    TooLarge,
}

fn copy_sparse(mut from: impl Read, to: &File) -> std::result::Result<u64, Failure> {
    let mut chunk = vec![0; CHUNK];
    let mut position = 0;
    loop {
        let filled = fill(&mut from, &mut chunk).map_err(Failure::Read)?;
        if filled == 0 {
            to.set_len(position).map_err(Failure::Write)?;
            return Ok(position);
        }
        if position + filled as u64 > MAX_EXPANDED {
            return Err(Failure::TooLarge);
        }
        if chunk[..filled].iter().any(|&b| b != 0) {
            to.write_all_at(&chunk[..filled], position)
                .map_err(Failure::Write)?;
        }
        position += filled as u64;
    }
}

/// Reads until `buf` is full or the input ends.
fn fill(from: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buf.len() {
        match from.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}
