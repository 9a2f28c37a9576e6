//! Several coordinators behind one gateway.

use std::time::Duration;

use phalanx_gateway::{Backends, GatewayConfig, RoutingPolicy};
use phalanx_proto::{ErrorKind, RpcError, v1::ResumedChoice};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{Coordinator, Reply, Script, Server, get, post, post_with};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const JSON: &str = "Content-Type: application/json\r\n";
/// For what takes milliseconds, on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// A gateway over scripted coordinators.
async fn router<const N: usize>(scripts: [Script; N], policy: RoutingPolicy) -> (Vec<Coordinator>, Server) {
    let mut coordinators = Vec::new();
    for script in scripts {
        coordinators.push(Coordinator::start(script).await);
    }
    let backends = Backends {
        addresses: coordinators.iter().map(Coordinator::address).collect(),
        policy,
        ..Backends::default()
    };
    let server = Server::start(GatewayConfig::new("127.0.0.1:0", backends)).await;
    (coordinators, server)
}

fn unavailable() -> Script {
    Script::Refuse(RpcError::new(ErrorKind::Unavailable, "still loading"))
}

/// The text of each choice of a stream of completions, and its last finish reason.
fn texts(reply: &Reply, n: usize) -> Vec<(String, Value)> {
    let mut texts = vec![(String::new(), Value::Null); n];
    let events = reply.events();
    let (done, events) = events.split_last().expect("an end");
    assert_eq!(*done, "[DONE]");
    for event in events {
        let event: Value = serde_json::from_str(event).expect("JSON");
        assert!(event.get("error").is_none(), "{event}");
        let choice = &event["choices"][0];
        let (text, reason) = &mut texts[choice["index"].as_u64().expect("an index") as usize];
        assert!(reason.is_null(), "nothing follows a finish reason");
        text.push_str(choice["text"].as_str().expect("text"));
        *reason = choice["finish_reason"].clone();
    }
    texts
}

async fn metrics_with(server: &Server, line: &str) -> String {
    let found = async {
        loop {
            let text = get(server.address, "/metrics").await.text().to_owned();
            if text.contains(line) {
                return text;
            }
        }
    };
    timeout(SOON, found).await.unwrap_or_else(|_| panic!("no {line}"))
}

#[tokio::test]
async fn a_stream_goes_on_elsewhere_without_a_gap() {
    let count = Script::Count { willing: true };
    let (mut coordinators, server) = router([count.clone(), count], RoutingPolicy::RoundRobin).await;
    let body = r#"{"prompt": "a", "stream": true, "n": 2, "temperature": 1, "return_token_ids": true}"#;
    let reply = post(server.address, COMPLETIONS, body).await;
    let prompts = reply.text().matches(r#""prompt_token_ids":[7,9]"#);
    assert_eq!(prompts.count(), 2, "once for each choice: {}", reply.text());
    let length = json!("length");
    assert_eq!(
        texts(&reply, 2),
        [
            ("1 2 3 4 ".to_owned(), length.clone()),
            ("1 2 3 4 5 6 ".to_owned(), length)
        ]
    );
    let mut requests = Vec::new();
    for coordinator in &mut coordinators {
        requests.push(coordinator.generate().await);
    }
    requests.sort_by_key(|request| request.resume.len());
    let [first, second] = requests.as_slice() else {
        panic!("each was asked once")
    };
    let tokens = |token_ids: &[u32]| ResumedChoice {
        token_ids: token_ids.to_vec(),
        ended_after: None,
    };
    assert_eq!(second.resume, [tokens(&[1, 2, 3]), tokens(&[1, 2])]);
    assert_eq!(first.sampling, second.sampling, "the same draws");
    assert!(
        first
            .sampling
            .as_ref()
            .is_some_and(|sampling| sampling.fallback_seed.is_some())
    );
    metrics_with(
        &server,
        r#"phalanx_gateway_migrations_total{outcome="resumed"} 1"#,
    )
    .await;
}

#[tokio::test]
async fn a_stream_that_nobody_can_go_on_with_ends_with_the_loss() {
    let count = Script::Count { willing: false };
    let (_coordinators, server) = router([count.clone(), count], RoutingPolicy::RoundRobin).await;
    let body = r#"{"messages": [{"role": "user", "content": "a"}], "stream": true}"#;
    let reply = post(server.address, CHAT, body).await;
    assert_eq!(reply.status, 200);
    let events = reply.events();
    let [.., error, "[DONE]"] = events.as_slice() else {
        panic!("{events:?}")
    };
    let error: Value = serde_json::from_str(error).expect("JSON");
    assert_eq!(error["error"]["code"], "worker_lost");
    let message = error["error"]["message"].as_str().expect("a message");
    assert!(message.contains("no other replica could go on"), "{message}");
    metrics_with(&server, r#"phalanx_gateway_migrations_total{outcome="failed"} 1"#).await;
}

#[tokio::test]
async fn what_one_refuses_another_is_asked() {
    let full = Script::Refuse(RpcError::new(ErrorKind::QueueFull, "full"));
    for ill in [unavailable(), full] {
        let (_coordinators, server) = router([ill, Script::Hello], RoutingPolicy::RoundRobin).await;
        for stream in [false, true] {
            for _ in 0..4 {
                let body = json!({"prompt": "a", "stream": stream}).to_string();
                let reply = post(server.address, COMPLETIONS, &body).await;
                assert_eq!(reply.status, 200, "{}", reply.text());
                assert!(reply.text().contains("world"));
            }
        }
        let text = metrics_with(&server, "phalanx_gateway_retries_total").await;
        let retries = text
            .lines()
            .find_map(|line| line.strip_prefix("phalanx_gateway_retries_total "));
        assert_ne!(retries, Some("0"));
    }
}

#[tokio::test]
async fn a_bad_request_is_refused_once() {
    let bad = Script::Refuse(RpcError::invalid("top_p", "top_p is odd"));
    let (mut coordinators, server) = router([bad.clone(), bad], RoutingPolicy::RoundRobin).await;
    let reply = post(server.address, COMPLETIONS, r#"{"prompt": "a"}"#).await;
    assert_eq!(
        (reply.status, &reply.json()["error"]["param"]),
        (400, &json!("top_p"))
    );
    let asked = coordinators
        .iter_mut()
        .filter_map(|coordinator| coordinator.received.try_recv().ok());
    assert_eq!(asked.count(), 1);
}

#[tokio::test]
async fn none_that_serves_is_503_and_says_when_to_try_again() {
    let (coordinators, server) = router([unavailable(), unavailable()], RoutingPolicy::LeastRequest).await;
    for _ in 0..2 {
        let reply = post(server.address, COMPLETIONS, r#"{"prompt": "a", "stream": true}"#).await;
        assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
        assert_eq!(reply.json()["error"]["code"], "unavailable");
    }
    drop(coordinators);
    let health = async {
        loop {
            let reply = get(server.address, "/health").await;
            if reply.status == 503 {
                return reply.json();
            }
        }
    };
    let health = timeout(SOON, health).await.expect("not healthy");
    assert_eq!(
        health["backends"].as_array().expect("a list").len(),
        2,
        "{health}"
    );
}

#[tokio::test]
async fn one_that_serves_is_health_and_one_that_returns_is_used_again() {
    let (mut coordinators, server) = router([Script::Hello, Script::Hello], RoutingPolicy::RoundRobin).await;
    let gone = coordinators.pop().expect("two");
    let address = gone.address();
    drop(gone);
    for _ in 0..4 {
        let reply = post(server.address, COMPLETIONS, r#"{"prompt": "a"}"#).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    let health = get(server.address, "/health").await;
    assert_eq!((health.status, &health.json()["state"]), (200, &json!("ready")));
    let port = address.trim_start_matches("http://");
    let mut back = Coordinator::start_at(port, Script::Hello).await;
    let used = async {
        while back.received.try_recv().is_err() {
            post(server.address, COMPLETIONS, r#"{"prompt": "a"}"#).await;
        }
    };
    timeout(SOON, used).await.expect("it gets requests again");
}

#[tokio::test]
async fn a_session_stays_where_it_is() {
    let hello = || Script::Hello;
    let (mut coordinators, server) = router([hello(), hello(), hello()], RoutingPolicy::Session).await;
    let mut homes = Vec::new();
    for session in 0..12 {
        let headers = format!("{JSON}X-Session-Id: s-{session}\r\n");
        for _ in 0..3 {
            let reply = post_with(server.address, COMPLETIONS, &headers, br#"{"prompt": "a"}"#).await;
            assert_eq!(reply.status, 200);
        }
        let asked: Vec<usize> = coordinators
            .iter_mut()
            .map(|coordinator| std::iter::from_fn(|| coordinator.received.try_recv().ok()).count())
            .collect();
        homes.push(
            asked
                .iter()
                .position(|&count| count == 3)
                .expect("one got all three"),
        );
    }
    homes.sort_unstable();
    homes.dedup();
    assert!(homes.len() > 1, "not all sessions at one");
}

#[tokio::test]
async fn metrics_say_whose_they_are() {
    let (coordinators, server) = router([Script::Hello, Script::Hello], RoutingPolicy::RoundRobin).await;
    let reply = post(server.address, COMPLETIONS, r#"{"prompt": "a"}"#).await;
    assert_eq!(reply.status, 200);
    let text = get(server.address, "/metrics").await.text().to_owned();
    assert_eq!(text.matches("# TYPE steps_total counter").count(), 1);
    for coordinator in &coordinators {
        let address = coordinator.address();
        assert!(
            text.contains(&format!("steps_total{{backend=\"{address}\"}} 17\n")),
            "{text}"
        );
    }
    assert!(text.contains("phalanx_gateway_backend_requests_total{"), "{text}");
}
