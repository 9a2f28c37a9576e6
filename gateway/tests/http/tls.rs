//! TLS: who gets in, and certificates that change under a running server.

use std::{fs, path::Path, sync::Arc, time::Duration};

use phalanx_gateway::{Gateway, GatewayError};
use phalanx_proto::tls::{ClientCertificates, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::support::{Connection, Coordinator, Script, Server, config};

const DEADLINE: Duration = Duration::from_secs(20);
const REQUEST: &[u8] = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// An authority that signs certificates for `localhost`.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("signed").pem();
        Self {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// Certificate and key.
    fn sign(&self) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        (certificate.pem(), key.serialize_pem())
    }

    /// What a client trusts, and who it says it is.
    fn client(&self, identity: Option<(String, String)>) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        let root = CertificateDer::from_pem_slice(self.certificate.as_bytes()).expect("a certificate");
        roots.add(root).expect("an authority");
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let certificate =
                    CertificateDer::from_pem_slice(certificate.as_bytes()).expect("a certificate");
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
                builder
                    .with_client_auth_cert(vec![certificate], key)
                    .expect("an identity")
            }
        };
        Arc::new(config)
    }
}

fn write(directory: &Path, (certificate, key): &(String, String), authority: &Authority) -> TlsFiles {
    let path = |name: &str| directory.join(name);
    fs::write(path("cert.pem"), certificate).expect("written");
    fs::write(path("key.pem"), key).expect("written");
    fs::write(path("ca.pem"), &authority.certificate).expect("written");
    TlsFiles {
        certificates: path("cert.pem"),
        key: path("key.pem"),
        client_authorities: Some(path("ca.pem")),
        client_certificates: ClientCertificates::Ignored,
    }
}

async fn handshake(server: &Server, client: Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(server.address).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    TlsConnector::from(client).connect(name, stream).await
}

/// Whether a whole exchange works: with TLS 1.3 a client learns of its refusal only after its own handshake.
async fn answers(server: &Server, client: Arc<ClientConfig>) -> bool {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let exchange = async {
        let mut stream = handshake(server, client).await?;
        stream.write_all(REQUEST).await?;
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).await?;
        std::io::Result::Ok(reply)
    };
    let reply = timeout(DEADLINE, exchange).await.expect("in time");
    reply.is_ok_and(|reply| reply.starts_with(b"HTTP/1.1 200 "))
}

#[tokio::test]
async fn tls_clients_are_served_and_others_are_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let authority = Authority::new();
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.tls = Some(write(directory.path(), &authority.sign(), &authority));
    let server = Server::start(config).await;
    assert!(answers(&server, authority.client(None)).await);
    assert!(
        !answers(&server, Authority::new().client(None)).await,
        "another authority's client"
    );
    let mut plain = Connection::open(server.address).await;
    plain.send(REQUEST).await;
    let reply = timeout(DEADLINE, plain.0.readable()).await.expect("in time");
    reply.expect("an alert or the end, not a reply");
}

#[tokio::test]
async fn clients_must_show_the_certificate_that_is_asked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let authority = Authority::new();
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    let files = write(directory.path(), &authority.sign(), &authority);
    config.tls = Some(TlsFiles {
        client_certificates: ClientCertificates::Required,
        ..files.clone()
    });
    let server = Server::start(config.clone()).await;
    assert!(!answers(&server, authority.client(None)).await);
    assert!(answers(&server, authority.client(Some(authority.sign()))).await);
    assert!(!answers(&server, authority.client(Some(Authority::new().sign()))).await);

    config.tls = Some(TlsFiles {
        client_certificates: ClientCertificates::Optional,
        ..files.clone()
    });
    let server = Server::start(config.clone()).await;
    assert!(answers(&server, authority.client(None)).await);

    config.tls = Some(TlsFiles {
        client_authorities: None,
        client_certificates: ClientCertificates::Required,
        ..files
    });
    assert!(matches!(Gateway::bind(config).await, Err(GatewayError::Tls(_))));
}

#[tokio::test]
async fn a_changed_certificate_is_used_and_a_broken_one_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let (old, new) = (Authority::new(), Authority::new());
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    let files = write(directory.path(), &old.sign(), &old);
    config.tls = Some(files.clone());
    let server = Server::start(config.clone()).await;
    assert!(answers(&server, old.client(None)).await);
    fs::write(&files.key, "no key").expect("written");
    // Looked at again after a second; what is there is no key, so the old one stays.
    assert!(answers(&server, old.client(None)).await);
    write(directory.path(), &new.sign(), &new);
    let changed = async {
        while !answers(&server, new.client(None)).await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, changed).await.expect("reloaded in time");
    assert!(!answers(&server, old.client(None)).await);

    fs::write(&files.key, "no key").expect("written");
    let refusal = Gateway::bind(config).await.err().expect("refused").to_string();
    assert!(refusal.contains("key.pem"), "{refusal}");
}
