//! Server-sent events, byte by byte, and what a client that goes away leaves behind.

use std::time::Duration;

use phalanx_proto::{ErrorKind, RpcError};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{Connection, Script, pair, post, post_with};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const CHAT_BODY: &[u8] = br#"{"messages": [{"role": "user", "content": "hi"}], "stream": true}"#;
/// For what happens in microseconds or not at all.
const SOON: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_chat_stream() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let reply = post_with(server.address, CHAT, "X-Request-Id: 1\r\n", CHAT_BODY).await;
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    let event = |choice: &str| {
        format!(
            "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\
             \"model\":\"scripted\",\"choices\":[{choice}]}}\n\n"
        )
    };
    let expected = [
        event(
            r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#,
        ),
        event(r#"{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}"#),
        event(
            r#"{"index":0,"delta":{"content":" world"},"logprobs":null,"finish_reason":"stop","stop_reason":"!"}"#,
        ),
        "data: [DONE]\n\n".to_owned(),
    ];
    assert_eq!(reply.text(), expected.concat());
}

#[tokio::test]
async fn every_choice_of_a_chat_opens_with_its_role() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"messages": [{"role": "user", "content": "hi"}], "stream": true, "n": 2}"#;
    let reply = post(server.address, CHAT, body).await;
    let events = reply.events();
    let deltas: Vec<(u64, Value)> = events[..events.len() - 1]
        .iter()
        .map(|event| {
            let event: Value = serde_json::from_str(event).expect("JSON");
            let choice = &event["choices"][0];
            (
                choice["index"].as_u64().expect("an index"),
                choice["delta"].clone(),
            )
        })
        .collect();
    let role = json!({"role": "assistant", "content": ""});
    let (hello, world) = (json!({"content": "Hello"}), json!({"content": " world"}));
    let expected = [
        (0, &role),
        (1, &role),
        (0, &hello),
        (1, &hello),
        (0, &world),
        (1, &world),
    ];
    assert_eq!(deltas, expected.map(|(index, delta)| (index, delta.clone())));
}

#[tokio::test]
async fn usage_comes_last_and_on_the_way_when_asked_for() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let usages = async |options: &str| {
        let body = format!(r#"{{"prompt": ["a", "b"], "stream": true, "stream_options": {options}}}"#);
        let reply = post(server.address, COMPLETIONS, &body).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let (done, events) = reply
            .events()
            .split_last()
            .map(|(last, rest)| (*last, rest.to_vec()))
            .expect("events");
        assert_eq!(done, "[DONE]");
        let parse = |event: &str| serde_json::from_str::<Value>(event).expect("JSON");
        events.into_iter().map(parse).collect::<Vec<_>>()
    };
    let total = json!({"prompt_tokens": 10, "total_tokens": 14, "completion_tokens": 4});

    let events = usages(r#"{"include_usage": true}"#).await;
    assert_eq!(events.len(), 5);
    assert!(
        events[..4]
            .iter()
            .all(|event| event.get("usage") == Some(&Value::Null))
    );
    assert_eq!((&events[4]["choices"], &events[4]["usage"]), (&json!([]), &total));

    let events = usages(r#"{"include_usage": true, "continuous_usage_stats": true}"#).await;
    let first = events
        .iter()
        .find(|event| event["choices"][0]["text"] == "Hello")
        .expect("a first chunk");
    assert_eq!(
        first["usage"],
        json!({"prompt_tokens": 5, "total_tokens": 6, "completion_tokens": 1})
    );
    assert_eq!(events[4]["usage"], total);

    let events = usages("null").await;
    assert_eq!(events.len(), 4);
    assert!(events.iter().all(|event| event.get("usage").is_none()));
}

#[tokio::test]
async fn an_error_before_the_first_chunk_has_its_own_status() {
    let (_coordinator, server) = pair(Script::Refuse(RpcError::new(ErrorKind::QueueFull, "full"))).await;
    let reply = post_with(server.address, CHAT, "", CHAT_BODY).await;
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("1")));
    assert_eq!(reply.json()["error"]["code"], "queue_full");
}

#[tokio::test]
async fn an_error_in_the_middle_is_the_last_event_but_one() {
    let lost = RpcError::new(ErrorKind::WorkerLost, "rank 1 died");
    for (script, code) in [
        (Script::Break(lost), "worker_lost"),
        (Script::EndEarly, "internal"),
    ] {
        let (_coordinator, server) = pair(script).await;
        let reply = post_with(server.address, CHAT, "", CHAT_BODY).await;
        assert_eq!(reply.status, 200);
        let events = reply.events();
        let [_role, _hello, error, "[DONE]"] = events[..] else {
            panic!("{events:?}");
        };
        let error: Value = serde_json::from_str(error).expect("JSON");
        assert_eq!(error["error"]["code"], code);
        assert!(error["error"]["message"].is_string());
    }
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_generation() {
    let (mut coordinator, server) = pair(Script::Endless).await;
    let mut streaming = Connection::open(server.address).await;
    streaming.send_post(CHAT, "", CHAT_BODY).await;
    streaming.read_until("xxxx").await;
    assert!(coordinator.dropped.try_recv().is_err());
    drop(streaming);
    timeout(SOON, coordinator.dropped.recv())
        .await
        .expect("the stream is dropped");

    let mut waiting = Connection::open(server.address).await;
    waiting
        .send_post(COMPLETIONS, "", br#"{"prompt": ["a", "b"]}"#)
        .await;
    // The chat, then both prompts.
    for _ in 0..3 {
        coordinator.received.recv().await.expect("a request");
    }
    drop(waiting);
    for _ in 0..2 {
        timeout(SOON, coordinator.dropped.recv())
            .await
            .expect("the call is dropped");
    }
}

#[tokio::test]
async fn clients_that_do_not_read_hold_up_nobody_else() {
    let (_coordinator, server) = pair(Script::Endless).await;
    // Each holds up to one HTTP/2 stream's window of unread bytes. With the usual windows a few of them would use up
    // what all streams of the connection share.
    let mut stalled = Vec::new();
    for _ in 0..6 {
        let mut connection = Connection::open(server.address).await;
        connection.send_post(CHAT, "", CHAT_BODY).await;
        connection.read_until("xxxx").await;
        stalled.push(connection);
    }
    let mut reading = Connection::open(server.address).await;
    reading.send_post(CHAT, "", CHAT_BODY).await;
    // As much as the sockets of the stalled clients may take before they stall.
    timeout(SOON, reading.skip(64 << 20))
        .await
        .expect("the stream goes on");
}
