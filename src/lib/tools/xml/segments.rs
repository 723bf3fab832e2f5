//! Cuts XML into segments that can be parsed on their own: each begins with a tag (or white space before one) and ends before
//! one. Comments, declarations and processing instructions are blanked, their line breaks kept.

use super::invalid;
use crate::error::{Error, Result};
use memchr::{memchr_iter, memmem, memrchr};
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
    first_line: u64,
}

impl Segment {
    /// The line, counted from 1, of the byte at `offset`.
    pub(super) fn line_at(&self, offset: usize) -> u64 {
        self.first_line + memchr_iter(b'\n', &self.text[..offset]).count() as u64
    }
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
    position: u64,
    line: u64,
    inside: Inside,
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
            line: 1,
            inside: Inside::Tags,
            rest: Vec::new(),
            ended: false,
        }
    }

    /// The next segment; none at the end.
    pub(super) fn next(&mut self) -> Result<Option<Segment>> {
        let mut text = std::mem::take(&mut self.rest);
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
            // Cut after a complete tag and the white space behind it, or before the last tag, which may be incomplete.
            let end = text[..kept].trim_ascii_end();
            let is_complete = end.is_empty() || end.ends_with(b">");
            let cut = if is_complete {
                Some(kept)
            } else {
                memrchr(b'<', &text[..kept])
            };
            if let Some(cut) = cut.filter(|&cut| cut > 0) {
                self.rest = text.split_off(cut);
                break;
            }
            if text.len() > LONGEST_TAG {
                return Err(invalid(
                    self.line,
                    &format!("no tag ends within {LONGEST_TAG} bytes: this is no XML dump"),
                ));
            }
        }
        if text.is_empty() {
            return Ok(None);
        }
        let segment = Segment {
            text,
            first_line: self.line,
        };
        self.line = segment.line_at(segment.text.len());
        Ok(Some(segment))
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

    /// Blanks comments and instructions in `text` from about `from` on. Returns how much of the text is final: a `<` at the
    /// very end may still become one.
    fn blank(&mut self, text: &mut [u8], from: usize) -> Result<usize> {
        // What began before the last cut is known; a `<!-` split by it is not.
        let mut at = from.saturating_sub(3);
        loop {
            match self.inside {
                Inside::Tags => {
                    let special = memmem::find(&text[at..], b"<!").into_iter();
                    let special = special.chain(memmem::find(&text[at..], b"<?")).min();
                    let Some(found) = special.map(|f| at + f) else {
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
                        let line = self.line + memchr_iter(b'\n', &text[..found]).count() as u64;
                        return Err(invalid(line, "only comments may begin with <! in a dump"));
                    };
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
                            return Err(invalid(
                                self.line,
                                "a comment or declaration that does not end",
                            ));
                        }
                        return Ok(upto);
                    }
                    self.inside = Inside::Tags;
                }
            }
        }
    }
}
