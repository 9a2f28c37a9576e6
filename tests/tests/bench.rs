//! `phalanx bench serve` against a real server, and against what is none.

use std::process::{Command, Output};

use phalanx_tests::{demo_model, phalanx, server::Server};
use serde_json::Value;

fn bench(base_url: &str, extra: &[&str]) -> Output {
    Command::new(phalanx())
        .args([
            "bench",
            "serve",
            "--json",
            "--base-url",
            base_url,
            "--model",
            "demo",
        ])
        .args(extra)
        .output()
        .expect("phalanx starts")
}

#[test]
fn what_it_reports_is_what_the_server_did() {
    let server = Server::start(&["--api-key", "secret"]);
    let base_url = format!("http://{}", server.address);
    let generated = || server.metric("vllm:generation_tokens_total").expect("the metric");
    let at_start = generated();
    let load = [
        "--api-key",
        "secret",
        "--num-prompts",
        "6",
        "--max-concurrency",
        "3",
        "--random-input-len",
        "40",
        "--random-prefix-len",
        "32",
        "--random-output-len",
        "8",
    ];
    let output = bench(&base_url, &load);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON and nothing else");
    assert_eq!((&report["completed"], &report["failed"]), (&6.into(), &0.into()));
    assert_eq!(report["total_input_tokens"], 6 * 40);
    assert_eq!(report["total_output_tokens"], 6 * 8);
    assert_eq!(generated() - at_start, 48.0);
    let of = |field: &str, part: &str| report[field][part].as_f64().expect("a number");
    assert!(of("ttft_ms", "median") > 0.0 && of("itl_ms", "p99") > 0.0);
    assert!(of("e2el_ms", "median") > of("ttft_ms", "median"));

    let chat = bench(
        &base_url,
        &[
            "--api-key",
            "secret",
            "--endpoint",
            "chat",
            "--num-prompts",
            "1",
            "--random-output-len",
            "4",
        ],
    );
    let report: Value = serde_json::from_slice(&chat.stdout).expect("JSON and nothing else");
    assert_eq!(report["total_output_tokens"], 4);

    let refused = bench(&base_url, &["--api-key", "wrong", "--num-prompts", "2"]);
    assert!(!refused.status.success());
    let report: Value = serde_json::from_slice(&refused.stdout).expect("JSON and nothing else");
    assert_eq!(report["failed"], 2);
    let errors = report["errors"].as_object().expect("errors by text");
    assert!(
        errors.keys().all(|error| error.starts_with("status 401")),
        "{errors:?}"
    );
    server.wait_idle();
    assert!(server.stop().success());
}

#[test]
fn what_cannot_be_measured_is_said() {
    let says = |output: Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let nobody = bench("http://127.0.0.1:9", &["--num-prompts", "1"]);
    assert!(!nobody.status.success());
    assert!(
        String::from_utf8_lossy(&nobody.stdout).contains("connection:"),
        "{nobody:?}"
    );
    let tls = says(bench("https://127.0.0.1:9", &[]));
    assert!(tls.contains("only http://"), "{tls}");
    let none = says(bench("http://127.0.0.1:9", &["--num-prompts", "0"]));
    assert!(none.contains("--num-prompts is 0"), "{none}");
}

#[test]
fn the_control_plane_is_measured_without_ranks() {
    let streams = [
        "--num-prompts",
        "60",
        "--max-concurrency",
        "30",
        "--random-output-len",
        "20",
    ];
    for step_ms in ["0", "5"] {
        let output = Command::new(phalanx())
            .args(["bench", "control-plane", "--json", "--step-ms", step_ms])
            .args(streams)
            .arg(demo_model())
            .output()
            .expect("phalanx starts");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON and nothing else");
        assert_eq!((&report["completed"], &report["failed"]), (&60.into(), &0.into()));
        assert_eq!(report["total_output_tokens"], 60 * 20);
        for part in ["engine", "coordinator", "gateway", "load"] {
            let seconds = report["cpu_seconds"][part].as_f64().expect("a part");
            assert!(seconds > 0.0, "{part}: {report}");
        }
        if step_ms == "5" {
            // Two rounds of 30 streams, each of 20 steps.
            let seconds = report["duration"].as_f64().expect("a number");
            assert!(seconds >= 2.0 * 20.0 * 0.005, "{report}");
        }
    }
}
