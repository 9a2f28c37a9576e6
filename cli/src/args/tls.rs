//! TLS: of what we serve, and to a coordinator elsewhere.

use std::path::PathBuf;

use clap::{Args, value_parser};
use phalanx_proto::tls::{ClientCertificates, ClientTlsFiles, TlsFiles};

/// TLS of HTTP and of gRPC's port.
#[derive(Debug, Args)]
pub(crate) struct TlsArgs {
    /// PEM file of the private key; default: the certificate's file holds it, too.
    #[arg(long, env = "PHALANX_SSL_KEYFILE", requires = "ssl_certfile")]
    pub(crate) ssl_keyfile: Option<PathBuf>,
    /// PEM file of the certificate and those above it. Read again when it changes.
    #[arg(long, env = "PHALANX_SSL_CERTFILE")]
    pub(crate) ssl_certfile: Option<PathBuf>,
    /// PEM file of the authorities of clients' certificates.
    #[arg(long, env = "PHALANX_SSL_CA_CERTS", requires = "ssl_certfile")]
    pub(crate) ssl_ca_certs: Option<PathBuf>,
    /// Clients' certificates: 0: not looked at, 1: checked if there is one, 2: required.
    #[arg(
        long,
        env = "PHALANX_SSL_CERT_REQS",
        default_value_t = 0,
        value_parser = value_parser!(u8).range(0..=2)
    )]
    pub(crate) ssl_cert_reqs: u8,
}

impl TlsArgs {
    /// None without a certificate.
    pub(crate) fn files(&self) -> Option<TlsFiles> {
        let certificates = self.ssl_certfile.clone()?;
        Some(TlsFiles {
            key: self.ssl_keyfile.clone().unwrap_or_else(|| certificates.clone()),
            certificates,
            client_authorities: self.ssl_ca_certs.clone(),
            client_certificates: match self.ssl_cert_reqs {
                0 => ClientCertificates::Ignored,
                1 => ClientCertificates::Optional,
                _ => ClientCertificates::Required,
            },
        })
    }

    /// The same flags for a child process.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let files = [
            ("--ssl-keyfile", &self.ssl_keyfile),
            ("--ssl-certfile", &self.ssl_certfile),
            ("--ssl-ca-certs", &self.ssl_ca_certs),
        ];
        let files = files
            .into_iter()
            .filter_map(|(flag, path)| Some((flag, path.as_ref()?)));
        let mut arguments: Vec<String> = files
            .map(|(flag, path)| format!("{flag}={}", path.display()))
            .collect();
        arguments.push(format!("--ssl-cert-reqs={}", self.ssl_cert_reqs));
        arguments
    }
}

/// The client's side of TLS to a coordinator.
#[derive(Debug, Args)]
pub(crate) struct CoordinatorTlsArgs {
    /// PEM file of the authorities of the coordinator's certificate; for `https`.
    #[arg(long, env = "PHALANX_COORDINATOR_CA_CERTS")]
    pub(crate) coordinator_ca_certs: Option<PathBuf>,
    /// PEM file of the certificate to show to the coordinator.
    #[arg(long, env = "PHALANX_COORDINATOR_CERTFILE", requires = "coordinator_ca_certs")]
    pub(crate) coordinator_certfile: Option<PathBuf>,
    /// PEM file of its private key; default: the certificate's file holds it, too.
    #[arg(long, env = "PHALANX_COORDINATOR_KEYFILE", requires = "coordinator_certfile")]
    pub(crate) coordinator_keyfile: Option<PathBuf>,
}

impl CoordinatorTlsArgs {
    /// None without an authority.
    pub(crate) fn files(&self) -> Option<ClientTlsFiles> {
        let identity = self.coordinator_certfile.clone().map(|certificate| {
            let key = self.coordinator_keyfile.clone();
            (certificate.clone(), key.unwrap_or(certificate))
        });
        Some(ClientTlsFiles {
            authorities: self.coordinator_ca_certs.clone()?,
            identity,
        })
    }
}
