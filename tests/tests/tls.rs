//! TLS of a real cluster: HTTPS, gRPC, and a gateway elsewhere that reaches the coordinator over it.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use phalanx_tests::{
    http, phalanx,
    processes::{self, eventually},
    python,
    server::{Server, free_port},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustix::process::Signal;

/// Files of an authority and of what it has signed for `localhost`.
fn certificates(directory: &Path) {
    let write = |name: &str, text: String| fs::write(directory.join(name), text).expect("written");
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    // Who has the same name as what it signs looks self-signed to OpenSSL.
    params.distinguished_name.push(DnType::CommonName, "authority");
    write("ca.pem", params.self_signed(&key).expect("signed").pem());
    let issuer = Issuer::new(params, key);
    for name in ["server", "client"] {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]);
        let mut params = params.expect("names");
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &issuer).expect("signed");
        write(&format!("{name}.pem"), certificate.pem());
        write(&format!("{name}.key"), key.serialize_pem());
    }
}

#[test]
fn clients_with_a_certificate_reach_http_and_grpc_and_others_reach_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    certificates(directory.path());
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (ca, certificate, key) = (path("ca.pem"), path("client.pem"), path("client.key"));
    let port = free_port();
    let server = Server::launch(
        &phalanx_tests::demo_model().to_string_lossy(),
        &[
            "--max-model-len",
            "512",
            "--grpc-port",
            &port.to_string(),
            "--ssl-certfile",
            &path("server.pem"),
            "--ssl-keyfile",
            &path("server.key"),
            "--ssl-ca-certs",
            &ca,
            "--ssl-cert-reqs",
            "2",
        ],
    );
    server.wait_logged("ready");
    let (https, grpc) = (format!("https://{}", server.address), format!("127.0.0.1:{port}"));
    python::run("tls_client.py", &[&https, &grpc, &ca, &certificate, &key]);

    // A gateway on another machine, which shows the coordinator who it is.
    let http_port = free_port();
    let mut gateway = Command::new(phalanx())
        .args(["gateway", "--host", "127.0.0.1", "--port", &http_port.to_string()])
        .args(["--coordinator", &format!("https://localhost:{port}")])
        .args(["--coordinator-ca-certs", &ca])
        .args([
            "--coordinator-certfile",
            &certificate,
            "--coordinator-keyfile",
            &key,
        ])
        .args(["--parent-pid", &std::process::id().to_string()])
        .stdin(Stdio::null())
        .spawn()
        .expect("a gateway");
    let address = format!("127.0.0.1:{http_port}");
    eventually("the other gateway", Duration::from_secs(30), || {
        http::get(&address, "/health").is_ok_and(|reply| reply.status == 200)
    });
    processes::kill(gateway.id(), Signal::TERM);
    gateway.wait().expect("it ends");
    assert!(server.stop().success());
}
