//! The real clients of Responses against the real cluster: OpenAI's package, and its agents.

use phalanx_tests::{python, root, server::Server};

#[test]
fn the_python_client_asks_for_responses() {
    let server = Server::start(&[
        "-tp",
        "2",
        "--max-model-len",
        "2048",
        "--enable-responses-api-store",
    ]);
    run("openai_responses.py", &server);
    server.wait_idle();
    assert!(server.stop().success());
}

#[test]
fn agents_call_their_tools() {
    let template = root().join("tests/templates/weather.jinja");
    let arguments = [
        "--max-model-len",
        "2048",
        "--chat-template",
        &template.to_string_lossy(),
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--reasoning-parser",
        "qwen3",
    ];
    // As those who come from vLLM turn the store on.
    let environment = [("VLLM_ENABLE_RESPONSES_API_STORE", "1".as_ref())];
    let model = phalanx_tests::demo_model();
    let server = Server::launch_in(&model.to_string_lossy(), &arguments, &environment);
    server.wait_ready();
    run("openai_agents.py", &server);
    server.wait_idle();
    assert!(server.stop().success());
}

/// Runs a script of tests/python against `server`; it must end well.
fn run(script: &str, server: &Server) {
    python::run(script, &[&format!("http://{}/v1", server.address)]);
}
