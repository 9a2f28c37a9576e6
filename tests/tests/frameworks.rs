//! What people build with OpenAI's API, against the real cluster: Python frameworks, and OpenAI's package for Node.

use std::process::Command;

use phalanx_tests::{python, root, server::Server};

fn server() -> Server {
    let template = root().join("tests/templates/weather.jinja");
    Server::start(&[
        "--max-model-len",
        "2048",
        "--chat-template",
        &template.to_string_lossy(),
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    ])
}

#[test]
fn langchain_litellm_and_outlines_get_what_they_ask_for() {
    let server = server();
    python::run("frameworks.py", &[&format!("http://{}/v1", server.address)]);
    server.wait_idle();
    assert!(server.stop().success());
}

#[test]
#[expect(
    clippy::print_stderr,
    reason = "a test that tests nothing must not look like one that passed"
)]
fn the_node_client_chats_streams_and_gets_its_own_errors() {
    if !root().join("tests/node/node_modules/openai").is_dir() {
        eprintln!("SKIPPED: no openai package for Node; ./scripts/test installs it where npm is");
        return;
    }
    let server = server();
    let output = Command::new("node")
        .arg(root().join("tests/node/openai_client.mjs"))
        .arg(format!("http://{}/v1", server.address))
        .output()
        .expect("node starts");
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    server.wait_idle();
    assert!(server.stop().success());
}
