//! TLS of a connection, which a client asks for with `STARTTLS`.

use crate::error::{Error, ErrorKind, Result};
use rustix::net::{RecvFlags, recv};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A server's certificate, and whom it lets in.
#[derive(Clone, Debug)]
pub struct Tls(Arc<ServerConfig>);

impl Tls {
    /// Reads `server-cert.pem` and `server-key.pem` of a folder. With `verifies_clients` they have to show a certificate that one in
    /// `ca-cert.pem` has signed.
    ///
    /// # Errors
    /// `Io` for a file that cannot be read; `Unsuitable` for one without what is expected of it.
    pub fn open(folder: &Path, verifies_clients: bool) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let certificates = certificates(&folder.join("server-cert.pem"))?;
        let path = folder.join("server-key.pem");
        let key = PrivateKeyDer::from_pem_file(&path).map_err(|e| unusable(&path, e))?;
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| unusable(folder, e))?;
        let config = match verifies_clients {
            false => config.with_no_client_auth(),
            true => {
                let path = folder.join("ca-cert.pem");
                let mut roots = RootCertStore::empty();
                for certificate in self::certificates(&path)? {
                    roots.add(certificate).map_err(|e| unusable(&path, e))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = verifier.build().map_err(|e| unusable(&path, e))?;
                config.with_client_cert_verifier(verifier)
            }
        };
        let config = config.with_single_cert(certificates, key);
        Ok(Self(Arc::new(config.map_err(|e| unusable(&path, e))?)))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read: std::result::Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(|e| unusable(path, e))?
        .collect();
    let read = read.map_err(|e| unusable(path, e))?;
    if read.is_empty() {
        let text = format!("{} has no certificate in PEM form", path.display());
        return Err(Error::new(ErrorKind::Unsuitable, text));
    }
    Ok(read)
}

fn unusable(path: &Path, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let text = format!("cannot use {} for TLS", path.display());
    Error::with_source(ErrorKind::Unsuitable, text, error)
}

/// TLS of one connection. One thread reads while others send.
#[derive(Debug)]
pub(super) struct Session {
    tls: Mutex<ServerConnection>,
    /// Records leave in the order in which they were made.
    sends: Mutex<()>,
}

impl Session {
    /// Agrees with a client on a stream.
    pub(super) fn accept(Tls(config): &Tls, stream: &mut (impl Read + Write)) -> io::Result<Self> {
        let tls = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        let session = Self {
            tls: Mutex::new(tls),
            sends: Mutex::default(),
        };
        let mut tls = session.tls();
        while tls.is_handshaking() {
            tls.complete_io(stream)?;
        }
        drop(tls);
        Ok(session)
    }

    fn tls(&self) -> MutexGuard<'_, ServerConnection> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read<S: AsFd>(&self, socket: &S, buffer: &mut [u8]) -> io::Result<usize>
    where
        for<'a> &'a S: Read + Write,
    {
        loop {
            match self.tls().reader().read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // Whoever hung up without a word has hung up.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            // Waits without keeping from sending whoever does.
            recv(socket, &mut [0; 1][..], RecvFlags::PEEK)?;
            let mut tls = self.tls();
            tls.read_tls(&mut &*socket)?;
            let understood = tls.process_new_packets();
            let has_answer = tls.wants_write();
            drop(tls);
            if has_answer {
                self.send(socket, |_| Ok(0))?;
            }
            understood.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        }
    }

    pub(super) fn write<S>(&self, socket: &S, slices: &[IoSlice<'_>]) -> io::Result<usize>
    where
        for<'a> &'a S: Write,
    {
        self.send(socket, |tls| tls.writer().write_vectored(slices))
    }

    fn send<S>(
        &self,
        socket: &S,
        say: impl FnOnce(&mut ServerConnection) -> io::Result<usize>,
    ) -> io::Result<usize>
    where
        for<'a> &'a S: Write,
    {
        let sends = self.sends.lock().unwrap_or_else(PoisonError::into_inner);
        let mut records = Vec::new();
        let mut tls = self.tls();
        let said = say(&mut tls)?;
        while tls.wants_write() {
            tls.write_tls(&mut records)?;
        }
        drop(tls);
        (&mut &*socket).write_all(&records)?;
        drop(sends);
        Ok(said)
    }
}
