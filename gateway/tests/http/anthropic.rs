//! Anthropic's routes.

use phalanx_proto::{ErrorKind, RpcError};
use serde_json::{Value, json};

use crate::support::{Script, pair, post, post_with};

const MESSAGES: &str = "/v1/messages";
const ASK: &str = r#"{"model": "scripted", "max_tokens": 9, "system": "Be brief.", "stop_sequences": ["!"],
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}"#;

#[tokio::test]
async fn a_message_is_answered() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let headers = "X-Request-Id: 17\r\nAnthropic-Version: 2023-06-01\r\n";
    let reply = post_with(server.address, MESSAGES, headers, ASK.as_bytes()).await;
    let expected = json!({
        "id": "msg_17",
        "type": "message",
        "role": "assistant",
        "model": "scripted",
        "content": [{"type": "text", "text": "Hello world"}],
        "stop_reason": "stop_sequence",
        "stop_sequence": "!",
        "usage": {"input_tokens": 2, "output_tokens": 2, "cache_read_input_tokens": 3},
    });
    assert_eq!((reply.status, reply.json()), (200, expected));
    let asked = coordinator.chat().await;
    assert_eq!(
        (asked.request_id.as_str(), asked.model.as_str()),
        ("msg_17", "scripted")
    );
    assert_eq!(
        (
            asked.messages[0].role.as_str(),
            asked.messages[1].text_parts[0].as_str()
        ),
        ("system", "hi")
    );
    let sampling = asked.sampling.expect("given");
    assert_eq!(
        (sampling.max_tokens, sampling.stop),
        (Some(9), vec!["!".to_owned()])
    );
}

#[tokio::test]
async fn a_stream_has_named_events_in_order() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let body = ASK.replacen('{', r#"{"stream": true, "#, 1);
    let reply = post(server.address, MESSAGES, &body).await;
    let events = reply.named_events();
    assert!(events.iter().all(|(name, data)| data["type"] == name.as_str()));
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    );
    let message = &events[0].1["message"];
    assert_eq!(
        (&message["content"], &message["stop_reason"]),
        (&json!([]), &Value::Null)
    );
    assert_eq!(
        (
            &message["usage"]["input_tokens"],
            &message["usage"]["output_tokens"]
        ),
        (&json!(2), &json!(0))
    );
    let text: String = events
        .iter()
        .filter_map(|(_, data)| data["delta"]["text"].as_str())
        .collect();
    assert_eq!(text, "Hello world");
    let end = &events[5].1;
    assert_eq!(
        end["delta"],
        json!({"stop_reason": "stop_sequence", "stop_sequence": "!"})
    );
    assert_eq!(end["usage"]["output_tokens"], 2);
}

#[tokio::test]
async fn tokens_are_counted() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}"#;
    let reply = post(server.address, "/v1/messages/count_tokens", body).await;
    assert_eq!((reply.status, reply.json()), (200, json!({"input_tokens": 2})));
    assert!(coordinator.other().await.0.contains("\"hi\""));
}

#[tokio::test]
async fn errors_have_anthropics_shape() {
    let (_coordinator, server) = pair(Script::Hello).await;
    for (path, body) in [
        (MESSAGES, "{}"),
        (MESSAGES, r#"{"model": "m", "max_tokens": 1, "messages": "hi"}"#),
        ("/v1/messages/count_tokens", r#"{"model": "m"}"#),
    ] {
        let reply = post(server.address, path, body).await;
        let error = reply.json();
        assert_eq!((reply.status, &error["type"]), (400, &json!("error")), "{body}");
        assert_eq!(error["error"]["type"], "invalid_request_error");
        assert!(
            error["error"]["message"]
                .as_str()
                .is_some_and(|text| !text.is_empty())
        );
    }
    for (kind, status, name) in [
        (ErrorKind::NotFound, 404, "not_found_error"),
        (ErrorKind::QueueFull, 429, "rate_limit_error"),
        (ErrorKind::Unavailable, 503, "overloaded_error"),
        (ErrorKind::Internal, 500, "api_error"),
    ] {
        let (_coordinator, server) = pair(Script::Refuse(RpcError::new(kind, "why"))).await;
        let reply = post(server.address, MESSAGES, ASK).await;
        let expected = json!({"type": "error", "error": {"type": name, "message": "why"}});
        assert_eq!((reply.status, reply.json()), (status, expected));
    }
    let (_coordinator, server) = pair(Script::Break(RpcError::new(ErrorKind::WorkerLost, "rank 1"))).await;
    let body = ASK.replacen('{', r#"{"stream": true, "#, 1);
    let reply = post(server.address, MESSAGES, &body).await;
    let last = reply
        .text()
        .trim_end()
        .rsplit("\n\n")
        .next()
        .expect("an event")
        .to_owned();
    assert!(
        last.starts_with("event: error\ndata: {\"type\":\"error\""),
        "{last}"
    );
}
