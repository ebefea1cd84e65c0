//! The certificate of the service, from files that are read again when they change.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::SystemTime,
};

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio_rustls::TlsAcceptor;

/// The reason why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read as PEM.
    #[error("cannot read {}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The fault.
        why: String,
    },
    /// The certificate and the key do not fit together, or are not supported.
    #[error("the certificate {} cannot be used: {source}", path.display())]
    Certificate {
        /// The file of the certificate.
        path: PathBuf,
        /// The fault.
        source: rustls::Error,
    },
}

struct Loaded {
    acceptor: TlsAcceptor,
    stamps: [Option<SystemTime>; 2],
}

/// The certificate in force.
pub(crate) struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    loaded: RwLock<Loaded>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files. Blocks for file I/O.
    pub(crate) fn load(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let loaded = RwLock::new(load(certificate, key)?);
        Ok(Self { certificate: certificate.to_owned(), key: key.to_owned(), loaded })
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).acceptor.clone()
    }

    /// Reads the files again if one has changed. The certificate in force stays if the new one is
    /// refused. Blocks for file I/O.
    pub(crate) fn refresh(&self) -> Result<bool, TlsError> {
        let known = self.loaded.read().unwrap_or_else(PoisonError::into_inner).stamps;
        if stamps(&self.certificate, &self.key) == known {
            return Ok(false);
        }
        let new = load(&self.certificate, &self.key)?;
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(true)
    }
}

fn stamps(certificate: &Path, key: &Path) -> [Option<SystemTime>; 2] {
    [certificate, key].map(|path| fs::metadata(path).and_then(|it| it.modified()).ok())
}

fn load(certificate: &Path, key: &Path) -> Result<Loaded, TlsError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |error: rustls::pki_types::pem::Error| TlsError::File { path, why: error.to_string() }
    };
    let stamps = stamps(certificate, key);
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(unreadable(certificate))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(unreadable(key))?;
    let unusable = |source| TlsError::Certificate { path: certificate.to_owned(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Loaded { acceptor: TlsAcceptor::from(Arc::new(config)), stamps })
}
