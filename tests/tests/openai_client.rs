//! The real OpenAI client package against the real cluster.

use std::process::Command;

use phalanx_tests::{root, server::Server};

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
    let python = root().join(".venv/bin/python");
    assert!(
        python.exists(),
        "{} is missing: run ./scripts/test",
        python.display()
    );
    let output = Command::new(python)
        .arg(root().join("tests/python").join(script))
        .arg(format!("http://{}/v1", server.address))
        .output()
        .expect("python starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}
