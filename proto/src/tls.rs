//! TLS (rustls). Servers: certificates from files, which are read again when they change, and clients' certificates.
//! Clients of a coordinator: whom to trust, and who they say they are.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// A client that takes longer for its handshake is cut off.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How often the files are looked at, at most.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// Whether clients must show a certificate of a given authority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCertificates {
    #[default]
    Ignored,
    /// Checked if there is one.
    Optional,
    Required,
}

/// What a server's TLS is made of. All files are PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those between it and its authority.
    pub certificates: PathBuf,
    pub key: PathBuf,
    /// Authorities of clients' certificates.
    pub client_authorities: Option<PathBuf>,
    pub client_certificates: ClientCertificates,
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path}: {reason}", path = path.display())]
    File { path: PathBuf, reason: String },
    #[error("clients' certificates cannot be checked without their authorities")]
    NoAuthorities,
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
}

impl TlsFiles {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let authorities = self.client_authorities.as_deref();
        [self.certificates.as_path(), self.key.as_path()]
            .into_iter()
            .chain(authorities)
    }

    /// When each was last written; none for one that is not there.
    fn stamps(&self) -> Vec<Option<SystemTime>> {
        let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
        self.paths().map(modified).collect()
    }

    fn load(&self, protocols: &[&[u8]]) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = match (self.client_certificates, &self.client_authorities) {
            (ClientCertificates::Ignored, _) => builder.with_no_client_auth(),
            (_, None) => return Err(TlsError::NoAuthorities),
            (wanted, Some(path)) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(path)? {
                    roots.add(authority)?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
                let verifier = if wanted == ClientCertificates::Optional {
                    verifier.allow_unauthenticated()
                } else {
                    verifier
                };
                let verifier = verifier.build().map_err(|error| file(path, error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| file(&self.key, error))?;
        let mut config = builder.with_single_cert(certificates(&self.certificates)?, key)?;
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        Ok(config)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let certificates: Vec<_> = read.map_err(|error| file(path, error))?;
    if certificates.is_empty() {
        return Err(file(path, "holds no certificate"));
    }
    Ok(certificates)
}

fn file(path: &Path, reason: impl ToString) -> TlsError {
    TlsError::File {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

/// A server's side of TLS. Cheap to clone.
#[derive(Clone)]
pub struct ServerTls {
    files: Arc<TlsFiles>,
    /// Application protocols (ALPN), the best first.
    protocols: &'static [&'static [u8]],
    current: Arc<Mutex<Current>>,
}

struct Current {
    config: Arc<ServerConfig>,
    stamps: Vec<Option<SystemTime>>,
    looked: Instant,
}

impl ServerTls {
    /// # Errors
    /// A file that is missing or holds something else; a key that does not fit the certificate.
    pub fn new(files: TlsFiles, protocols: &'static [&'static [u8]]) -> Result<Self, TlsError> {
        let current = Current {
            // Before the files are read: what is written in between is seen the next time.
            stamps: files.stamps(),
            config: Arc::new(files.load(protocols)?),
            looked: Instant::now(),
        };
        Ok(Self {
            files: Arc::new(files),
            protocols,
            current: Arc::new(Mutex::new(current)),
        })
    }

    /// Shakes hands. Errors: the client does not, or not in time.
    pub async fn accept<T: AsyncRead + AsyncWrite + Unpin>(&self, stream: T) -> io::Result<TlsStream<T>> {
        let acceptor = TlsAcceptor::from(self.config());
        timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await?
    }

    /// Of the files as they are now, if they make sense; else as they were.
    fn config(&self) -> Arc<ServerConfig> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() < RELOAD_INTERVAL {
            return current.config.clone();
        }
        current.looked = Instant::now();
        let stamps = self.files.stamps();
        if stamps != current.stamps {
            current.stamps = stamps;
            match self.files.load(self.protocols) {
                Ok(config) => {
                    tracing::info!(path = %self.files.certificates.display(), "certificates reloaded");
                    current.config = Arc::new(config);
                }
                Err(error) => tracing::warn!(%error, "changed certificates are not used"),
            }
        }
        current.config.clone()
    }
}

/// What a client needs for a coordinator with TLS. All files are PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTlsFiles {
    /// Authorities of the coordinator's certificate.
    pub authorities: PathBuf,
    /// Certificate and key of this client, if the coordinator asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl ClientTlsFiles {
    /// # Errors
    /// A file that cannot be read. What it holds is judged when a connection is made.
    pub fn load(&self) -> Result<ClientTlsConfig, TlsError> {
        let read = |path: &Path| fs::read(path).map_err(|error| file(path, error));
        let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&self.authorities)?));
        Ok(match &self.identity {
            Some((certificate, key)) => config.identity(Identity::from_pem(read(certificate)?, read(key)?)),
            None => config,
        })
    }
}
