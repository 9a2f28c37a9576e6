//! The real OpenAI client package against the real cluster.

use phalanx_tests::{python, root, server::Server};

#[test]
fn the_python_client_chats_streams_and_gets_its_own_errors() {
    let server = Server::start(&["-tp", "2", "--max-model-len", "2048"]);
    run("openai_client.py", &server);
    server.wait_idle();
    assert!(server.stop().success());
}

#[test]
fn the_python_client_calls_tools() {
    let template = root().join("tests/templates/weather.jinja");
    let server = Server::start(&[
        "--max-model-len",
        "2048",
        "--chat-template",
        &template.to_string_lossy(),
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--reasoning-parser",
        "qwen3",
    ]);
    run("openai_tools.py", &server);
    server.wait_idle();
    assert!(server.stop().success());
}

/// Runs a script of tests/python against `server`; it must end well.
fn run(script: &str, server: &Server) {
    python::run(script, &[&format!("http://{}/v1", server.address)]);
}
