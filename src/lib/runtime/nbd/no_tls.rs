//! A server that is built without TLS: nobody has a certificate.

use crate::error::{Error, ErrorKind, Result};
use std::io::{self, IoSlice};
use std::path::Path;

/// There is none.
#[derive(Clone, Debug)]
pub enum Tls {}

impl Tls {
    /// # Errors
    /// `Unsuitable`.
    pub fn open(_: &Path, _: bool) -> Result<Self> {
        Err(Error::new(
            ErrorKind::Unsuitable,
            "this program is built without TLS; build it with the cargo feature tls",
        ))
    }
}

#[derive(Debug)]
pub(super) enum Session {}

impl Session {
    pub(super) fn accept<S>(tls: &Tls, _: &mut S) -> io::Result<Self> {
        match *tls {}
    }

    pub(super) fn read<S>(&self, _: &S, _: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }

    pub(super) fn write<S>(&self, _: &S, _: &[IoSlice<'_>]) -> io::Result<usize> {
        match *self {}
    }
}
