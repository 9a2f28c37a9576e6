//! Requests that schemathesis makes from our own OpenAPI document, right ones and wrong ones: none may be answered by a
//! 5xx, and the server has nothing left of them.

use std::{env, process::Command};

use phalanx_tests::{http, root, server::Server};

/// Seconds; more of them when somebody has time: PHALANX_FUZZ_SECONDS=3600.
const BUDGET: &str = "40";

#[test]
fn no_request_of_the_document_is_answered_by_a_server_error() {
    let tool = root().join(".venv/bin/schemathesis");
    assert!(tool.exists(), "{} is missing: run ./scripts/test", tool.display());
    let server = Server::start(&[
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "16",
        "--enable-responses-api-store",
        "--enable-tokenizer-info-endpoint",
    ]);
    let budget = env::var("PHALANX_FUZZ_SECONDS").unwrap_or_else(|_| BUDGET.to_owned());
    let output = Command::new(tool)
        .args(["run", &format!("http://{}/openapi.json", server.address)])
        .args(["--checks", "not_a_server_error", "--phases", "coverage,fuzzing"])
        // One worker: Hypothesis fails now and then where several threads generate.
        .args(["--max-time", &budget, "--workers", "1", "--request-timeout", "30"])
        .args(["--generation-database", "none", "--warnings", "off", "--no-color"])
        .current_dir(env::temp_dir())
        .output()
        .expect("schemathesis starts");
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        server.log_text()
    );
    server.wait_idle();
    assert_eq!(
        http::get(&server.address, "/health").expect("answers").status,
        200
    );
    assert!(server.stop().success());
}
