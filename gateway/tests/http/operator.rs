//! Health, version, load and metrics.

use phalanx_gateway::Backends;
use phalanx_proto::v1::{GetStatusResponse, GroupState, Phase, RankStatus};
use serde_json::json;

use crate::support::{Coordinator, Script, Server, config, get, get_with, pair, post};

const OPENMETRICS: &str = "Accept: application/openmetrics-text; version=1.0.0\r\n";

#[tokio::test]
async fn health_is_the_state_of_the_ranks() {
    let (coordinator, server) = pair(Script::Hello).await;
    for path in ["/health", "/ping"] {
        let reply = get(server.address, path).await;
        assert_eq!((reply.status, &reply.json()["state"]), (200, &json!("ready")));
    }
    assert_eq!(post(server.address, "/ping", "").await.status, 200);

    let mut rank = RankStatus {
        rank: 1,
        bytes_done: 10,
        bytes_total: 40,
        ..RankStatus::default()
    };
    rank.set_phase(Phase::LoadingWeights);
    let mut starting = GetStatusResponse {
        epoch: 3,
        ranks: vec![rank],
        ..GetStatusResponse::default()
    };
    starting.set_state(GroupState::Starting);
    *coordinator.status.lock().expect("not poisoned") = starting;
    let reply = get(server.address, "/health").await;
    assert_eq!(reply.status, 503);
    let health = reply.json();
    assert_eq!(
        (&health["state"], &health["epoch"]),
        (&json!("starting"), &json!(3))
    );
    let rank = &health["ranks"][0];
    assert_eq!(
        (&rank["phase"], &rank["bytes_done"], &rank["bytes_total"]),
        (&json!("loading_weights"), &json!(10), &json!(40))
    );
}

#[tokio::test]
async fn version_and_load() {
    let (_coordinator, server) = pair(Script::Hello).await;
    assert_eq!(
        get(server.address, "/version").await.json(),
        json!({"version": env!("CARGO_PKG_VERSION")})
    );
    assert_eq!(
        get(server.address, "/load").await.json(),
        json!({"server_load": 0})
    );
}

#[tokio::test]
async fn the_server_info_is_a_text_or_an_object() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let info = async |query: &str| get(server.address, &format!("/server_info{query}")).await;
    let text = info("").await.json();
    assert_eq!(
        text["vllm_config"],
        r#"{"model_config": {"max_model_len": 2048}}"#
    );
    assert_eq!(text["system_env"]["os"], "linux");
    let object = info("?config_format=json").await.json();
    assert_eq!(object["vllm_config"]["model_config"]["max_model_len"], 2048);
    assert_eq!(
        info("?config_format=xml").await.json()["error"]["param"],
        "config_format"
    );
}

#[tokio::test]
async fn metrics_are_one_exposition() {
    let (_coordinator, server) = pair(Script::Hello).await;
    assert_eq!(
        post(server.address, "/v1/completions", r#"{"prompt": "a"}"#)
            .await
            .status,
        200
    );
    assert_eq!(get(server.address, "/somewhere/else").await.status, 404);
    // A reply is counted when its connection lets go of it, which is just after its last byte.
    let counted = r#"http_requests_total{method="GET",handler="none",status="4xx"} 1"#;
    let mut reply = get_with(server.address, "/metrics", OPENMETRICS).await;
    while !reply.text().contains(counted) {
        reply = get_with(server.address, "/metrics", OPENMETRICS).await;
    }
    let content_type = reply.header("content-type").expect("a content type");
    assert_eq!(
        content_type,
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    let text = reply.text();
    assert!(
        text.starts_with("# HELP steps Steps.\n# TYPE steps counter\nsteps_total 17\n# HELP http"),
        "{text}"
    );
    assert!(text.contains(r#"http_requests_total{method="POST",handler="/v1/completions",status="2xx"} 1"#));
    assert!(
        text.contains(r#"http_request_duration_seconds_count{method="POST",handler="/v1/completions"} 1"#)
    );
    assert!(text.contains("# TYPE http_request_duration_highr_seconds histogram"));
    assert_valid_exposition(text);

    let plain = get(server.address, "/metrics").await;
    let content_type = plain.header("content-type").expect("a content type");
    assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
    assert!(plain.text().starts_with(
        "# HELP steps_total Steps.\n# TYPE steps_total counter\nsteps_total 17\n# HELP http_requests_total "
    ));
}

#[tokio::test]
async fn without_a_coordinator_the_gateways_own_metrics_remain() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.backends = Backends::one("unix:/nonexistent/coordinator.sock");
    let server = Server::start(config).await;
    let reply = get_with(server.address, "/metrics", OPENMETRICS).await;
    assert_eq!(reply.status, 200);
    assert_valid_exposition(reply.text());
}

/// The rules of OpenMetrics that merging could break: one end, no empty line, one block for every family.
fn assert_valid_exposition(text: &str) {
    assert!(text.ends_with("# EOF\n"));
    let mut families = Vec::new();
    let mut lines = text.lines().collect::<Vec<_>>();
    assert_eq!(lines.pop(), Some("# EOF"));
    for line in lines {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let name = family.split(' ').next().expect("a name");
            assert!(!families.contains(&name), "{name} twice");
            families.push(name);
        } else if !line.starts_with("# HELP ") {
            let family = families.last().expect("a family before its samples");
            assert!(line.starts_with(family), "{line} is not of {family}");
            let value = line.rsplit(' ').next().expect("a value");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
