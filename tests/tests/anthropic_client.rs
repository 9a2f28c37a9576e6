//! The real Anthropic client package against the real cluster.

use phalanx_tests::{python, server::Server};

#[test]
fn the_python_client_asks_streams_counts_and_gets_its_own_errors() {
    let server = Server::start(&["-tp", "2", "--max-model-len", "2048"]);
    python::run("anthropic_client.py", &[&format!("http://{}", server.address)]);
    server.wait_idle();
    assert!(server.stop().success());
}
