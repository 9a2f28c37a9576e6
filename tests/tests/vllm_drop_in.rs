//! What was written for vLLM, unchanged: a command line, a gRPC client, a scraper.

use std::{net::SocketAddr, time::Duration};

use phalanx_tests::{
    demo_model, http,
    processes::listening,
    python,
    server::{Server, free_port},
};

use serde_json::json;

#[test]
fn a_grpc_client_of_vllm_generates_aborts_and_shuts_down() {
    let port = free_port().to_string();
    let flags = [
        "-tp",
        "2",
        "--max-model-len",
        "2048",
        "--grpc-port",
        &port,
        "--api-key",
        "sesame",
        "--admin-api-key",
        "operator",
    ];
    let mut server = Server::start(&flags);
    let address = format!("127.0.0.1:{port}");
    python::run("vllm_client.py", &[&address, "sesame", "operator"]);
    // The client's last call was Control.Shutdown.
    assert!(server.wait(Duration::from_secs(30)).success());
}

#[test]
fn a_scraper_reads_vllms_names_of_a_server_started_with_vllms_flags() {
    let flags = "--tensor_parallel_size 2 --max-model-len 2048 --trust-remote-code --dtype auto --disable-log-requests \
                 --pipeline-parallel-size 1 --compilation-config {\"mode\":3} --no-enforce-eager --generation-config auto";
    let flags: Vec<&str> = flags.split_whitespace().collect();
    let server = Server::start(&flags);
    let log = server.log_text();
    for flag in [
        "--trust-remote-code",
        "--disable-log-requests",
        "--compilation-config",
    ] {
        let warnings = log
            .lines()
            .filter(|line| line.contains("accepted and ignored") && line.contains(flag));
        assert_eq!(warnings.count(), 1, "{flag}:\n{log}");
    }
    assert!(
        !log.contains("--pipeline-parallel-size") && !log.contains("--dtype"),
        "{log}"
    );
    assert_eq!(
        server.metric("vllm:generation_tokens_total"),
        Some(0.0),
        "the warm-up is no request"
    );
    server.complete("One, two,", 8);
    assert_eq!(server.metric("vllm:generation_tokens_total"), Some(8.0));
    python::run(
        "metrics_client.py",
        &[&format!("http://{}/metrics", server.address)],
    );
    assert!(server.stop().success());
}

#[test]
fn a_flag_that_would_change_replies_is_refused_with_its_reason() {
    let mut server = Server::launch("no-such-model.gguf", &["--enable-lora"]);
    assert!(!server.wait(Duration::from_secs(30)).success());
    let log = server.log_text();
    assert!(
        log.contains("--enable-lora is not offered: adapters are not offered"),
        "{log}"
    );
}

#[test]
fn only_http_is_reached_from_elsewhere_and_only_with_a_key() {
    let directory = tempfile::tempdir().expect("a directory");
    let keys = directory.path().join("keys");
    std::fs::write(&keys, "# ours\nsesame\n").expect("written");
    let keys = format!("--api-key-file={}", keys.display());
    let server = Server::start(&[
        "-tp",
        "2",
        "--max-model-len",
        "512",
        "--host",
        "0.0.0.0",
        "--grpc-port",
        "0",
        &keys,
    ]);
    let listening = listening(&server.family());
    let (local, open): (Vec<SocketAddr>, Vec<_>) =
        listening.iter().partition(|address| address.ip().is_loopback());
    assert_eq!(open.len(), 1, "{listening:?}");
    assert!(
        server.address.ends_with(&format!(":{}", open[0].port())),
        "{listening:?}"
    );
    assert_eq!(local.len(), 1, "gRPC: {listening:?}");
    for path in ["/metrics", "/v1/models", "/version", "/load", "/nothing", "/docs"] {
        let reply = http::get(&server.address, path).expect("a reply");
        assert_eq!(reply.status, 401, "{path}");
    }
    let reply = http::get(&server.address, "/pause").expect("a reply");
    assert_eq!(reply.status, 403, "without --admin-api-key no key would help");
    assert!(server.stop().success());
}

#[test]
fn vllms_variable_for_a_key_closes_the_door_and_dotted_flags_are_json() {
    let flags = [
        "--max-model-len",
        "512",
        "--speculative-config.method",
        "ngram",
        "--speculative-config.num_speculative_tokens=3",
        "--override-generation-config.temperature",
        "0.0",
    ];
    let key = [("VLLM_API_KEY", "of vllm".as_ref())];
    let model = demo_model();
    let server = Server::launch_in(&model.to_string_lossy(), &flags, &key);
    server.wait_ready();
    assert_eq!(
        http::get(&server.address, "/v1/models").expect("a reply").status,
        401
    );
    let log = server.log_text();
    assert!(!log.contains("accepted and ignored"), "{log}");
    let metrics = http::get_keyed(&server.address, "/metrics", "of vllm").expect("a reply");
    assert_eq!(metrics.status, 200, "the key admits");
    let text = metrics.text();
    assert!(text.contains("vllm:spec_decode_num_draft_tokens_total"), "{text}");
    assert!(server.stop().success());
}

/// The burst that fits the seats and the queue is admitted, whatever the queue's own bound.
#[test]
fn the_bound_of_the_queue_is_for_those_that_wait() {
    let server = Server::start(&[
        "--max-num-queued-reqs",
        "1",
        "--max-num-seqs",
        "8",
        "--max-model-len",
        "512",
    ]);
    for _ in 0..3 {
        let body = json!({"prompt": "x", "n": 8, "seed": 1, "max_tokens": 2});
        let reply = http::post(&server.address, "/v1/completions", &body).expect("a reply");
        assert_eq!(reply.status, 200, "{}", reply.text());
        server.wait_idle();
    }
    let body = json!({"prompt": "x", "n": 10, "seed": 1, "max_tokens": 2});
    let reply = http::post(&server.address, "/v1/completions", &body).expect("a reply");
    assert_eq!(reply.status, 429, "{}", reply.text());
    server.wait_idle();
    assert!(server.stop().success());
}
