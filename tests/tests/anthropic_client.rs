//! The real Anthropic client package against the real cluster.

use std::process::Command;

use phalanx_tests::{root, server::Server};

#[test]
fn the_python_client_asks_streams_counts_and_gets_its_own_errors() {
    let python = root().join(".venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run ./scripts/test",
        python.display()
    );
    let server = Server::start(&["-tp", "2", "--max-model-len", "2048"]);
    let output = Command::new(python)
        .arg(root().join("tests/python/anthropic_client.py"))
        .arg(format!("http://{}", server.address))
        .output()
        .expect("python starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    server.wait_idle();
    assert!(server.stop().success());
}
