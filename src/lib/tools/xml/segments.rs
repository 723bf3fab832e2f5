//! Cuts XML into segments that can be parsed on their own: each begins with a tag (or white space before one) and ends before
//! one. Comments, declarations and processing instructions are blanked, their line breaks kept.

use super::invalid;
use crate::error::{Error, Result};
use memchr::{memchr_iter, memchr2_iter, memmem, memrchr};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes read at a time.
const CHUNK: usize = 512 * 1024;
/// No tag of a dump is longer; more is not one tag but a hostile input.
const LONGEST_TAG: usize = 64 * 1024;

/// A piece of XML.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) text: Vec<u8>,
    /// Where it begins in the file; blanking does not change its length.
    pub(super) position: u64,
}

/// The line, counted from 1, of the byte at `position`. Lines are counted only for an error: doing it on the way would cost
/// a twentieth of a restore.
pub(super) fn line_at(file: &File, position: u64) -> u64 {
    let mut line = 1;
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while at < position {
        let wanted = (position - at).min(CHUNK as u64) as usize;
        match file.read_at(&mut chunk[..wanted], at) {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                line += memchr_iter(b'\n', &chunk[..n]).count() as u64;
                at += n as u64;
            }
        }
    }
    line
}

/// What the text is inside of, where a chunk ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    Tags,
    Comment,
    Instruction,
}

/// Reads a file as segments.
pub(super) struct Segments<'a> {
    file: &'a File,
    name: &'a str,
    /// Where the next chunk begins in the file.
    position: u64,
    inside: Inside,
    /// Where that begins.
    began: u64,
    /// Text after the last cut.
    rest: Vec<u8>,
    ended: bool,
}

impl<'a> Segments<'a> {
    pub(super) fn new(file: &'a File, name: &'a str) -> Self {
        Self {
            file,
            name,
            position: 0,
            inside: Inside::Tags,
            began: 0,
            rest: Vec::new(),
            ended: false,
        }
    }

    /// The next segment; none at the end. `text` is memory to use for it.
    pub(super) fn next(&mut self, mut text: Vec<u8>) -> Result<Option<Segment>> {
        text.clear();
        text.append(&mut self.rest);
        while !self.ended {
            let old = text.len();
            text.resize(old + CHUNK, 0);
            let read = self.read(&mut text[old..])?;
            text.truncate(old + read);
            self.ended = read < CHUNK;
            if self.position == 0 && text.starts_with(b"\xef\xbb\xbf") {
                text[..3].fill(b' ');
            }
            self.position += read as u64;
            let kept = self.blank(&mut text, old)?;
            if self.ended {
                break;
            }
            // Cut before the last tag, which may be incomplete; or, when there is only one and much white space (a blanked
            // comment) behind it, after that.
            let end = text[..kept].trim_ascii_end();
            let is_complete = end.is_empty() || end.ends_with(b">") && end.len() < LONGEST_TAG;
            let before_last = memrchr(b'<', &text[..kept]).filter(|&cut| cut > 0);
            if let Some(cut) = before_last
                .or(is_complete.then_some(kept))
                .filter(|&cut| cut > 0)
            {
                self.rest.extend_from_slice(&text[cut..]);
                text.truncate(cut);
                break;
            }
            if text.len() > LONGEST_TAG {
                let what = format!("no tag ends within {LONGEST_TAG} bytes: this is no XML dump");
                return Err(self.fault(&text, 0, &what));
            }
        }
        if text.is_empty() {
            return Ok(None);
        }
        let position = self.position - (text.len() + self.rest.len()) as u64;
        Ok(Some(Segment { text, position }))
    }

    fn read(&self, to: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < to.len() {
            match self
                .file
                .read_at(&mut to[filled..], self.position + filled as u64)
            {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(format!("cannot read {}", self.name), e)),
            }
        }
        Ok(filled)
    }

    /// An error at a byte of a text that has been read up to now.
    fn fault(&self, text: &[u8], at: usize, what: &str) -> Error {
        invalid(
            line_at(self.file, self.position - (text.len() - at) as u64),
            what,
        )
    }

    /// Blanks comments and instructions in `text` from about `from` on. Returns how much of the text is final: a `<` at the
    /// very end may still become one.
    fn blank(&mut self, text: &mut [u8], from: usize) -> Result<usize> {
        // What began before the last cut is known; a `<!-` split by it is not.
        let mut at = from.saturating_sub(3);
        loop {
            match self.inside {
                Inside::Tags => {
                    let mut marks = memchr2_iter(b'!', b'?', &text[at..]).map(|f| at + f);
                    let Some(found) =
                        marks.find_map(|m| (text[..m].ends_with(b"<")).then(|| m - 1))
                    else {
                        return Ok(text.len());
                    };
                    let head = &text[found..];
                    self.inside = if head.starts_with(b"<?") {
                        Inside::Instruction
                    } else if head.starts_with(b"<!--") {
                        Inside::Comment
                    } else if !self.ended && head.len() < 4 {
                        return Ok(found);
                    } else {
                        return Err(self.fault(
                            text,
                            found,
                            "only comments may begin with <! in a dump",
                        ));
                    };
                    self.began = self.position - (text.len() - found) as u64;
                    // Past its first characters, so that <!--> is not taken for a whole comment.
                    let past = found + if self.inside == Inside::Comment { 4 } else { 2 };
                    text[found..past].fill(b' ');
                    at = past;
                }
                Inside::Comment | Inside::Instruction => {
                    let end: &[u8] = if self.inside == Inside::Comment {
                        b"-->"
                    } else {
                        b"?>"
                    };
                    let found = memmem::find(&text[at..], end).map(|f| at + f + end.len());
                    // What may be the beginning of the end is left for the next chunk.
                    let upto =
                        found.unwrap_or_else(|| text.len().saturating_sub(end.len() - 1).max(at));
                    for byte in text[at..upto].iter_mut().filter(|b| **b != b'\n') {
                        *byte = b' ';
                    }
                    at = upto;
                    if found.is_none() {
                        if self.ended {
                            let what = "a comment or declaration that does not end";
                            return Err(invalid(line_at(self.file, self.began), what));
                        }
                        return Ok(upto);
                    }
                    self.inside = Inside::Tags;
                }
            }
        }
    }
}
