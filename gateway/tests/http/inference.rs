//! Token ids in, token ids out; and SageMaker's one route for everything.

use serde_json::{Value, json};

use crate::support::{Script, pair, post, post_with};

const GENERATE: &str = "/inference/v1/generate";

#[tokio::test]
async fn token_ids_are_completed_with_token_ids() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 4, "logprobs": 1}}"#;
    let headers = "X-Request-Id: trace-1\r\n";
    let reply = post_with(server.address, GENERATE, headers, body.as_bytes()).await;
    let logprob = |top: bool| {
        let mut entry = json!({"token": "token_id:1", "logprob": -0.25, "bytes": null});
        if top {
            entry["top_logprobs"] = json!([entry.clone()]);
        }
        entry
    };
    let expected = json!({
        "request_id": "generate-tokens-trace-1",
        "choices": [{
            "index": 0,
            "logprobs": {"content": [logprob(true), logprob(true)]},
            "finish_reason": "stop",
            "token_ids": [1, 2],
        }],
        "prompt_logprobs": null,
        "kv_transfer_params": null,
        "usage": {"prompt_tokens": 5, "total_tokens": 7, "completion_tokens": 2},
    });
    assert_eq!((reply.status, reply.json()), (200, expected));
    let asked = coordinator.generate().await;
    assert_eq!(asked.request_id, "generate-tokens-trace-1");
    assert_eq!(asked.sampling.expect("given").max_tokens, Some(4));
}

#[tokio::test]
async fn token_ids_are_streamed() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"request_id": "mine", "token_ids": [1], "sampling_params": {}, "stream": true,
        "stream_options": {"include_usage": true}}"#;
    let reply = post(server.address, GENERATE, body).await;
    let events = reply.events();
    let (last, pieces) = events.split_last().expect("events");
    assert_eq!(*last, "[DONE]");
    let pieces: Vec<Value> = pieces
        .iter()
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect();
    let ids: Vec<&Value> = pieces
        .iter()
        .filter_map(|piece| piece["choices"].get(0))
        .map(|c| &c["token_ids"])
        .collect();
    assert_eq!(ids, [&json!([1]), &json!([2])]);
    assert!(
        pieces
            .iter()
            .all(|piece| piece["request_id"] == "generate-tokens-mine")
    );
    let end = &pieces[2];
    assert_eq!(
        (&end["choices"], &end["usage"]["total_tokens"]),
        (&json!([]), &json!(7))
    );
    assert_eq!(pieces[0]["usage"], Value::Null);
}

#[tokio::test]
async fn clients_end_their_own_requests() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let path = "/inference/v1/abort_requests";
    let reply = post(server.address, path, r#"{"request_ids": ["a", "b"]}"#).await;
    assert_eq!((reply.status, reply.body.len()), (200, 0));
    for id in ["a", "b"] {
        let asked = coordinator.other().await.0;
        assert_eq!(asked, format!("AbortRequestRequest {{ request_id: {id:?} }}"));
    }
    for body in ["{}", r#"{"request_ids": null}"#, r#"{"request_ids": "a"}"#] {
        let reply = post(server.address, path, body).await;
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (400, &json!("request_ids"))
        );
    }
}

#[tokio::test]
async fn invocations_are_dispatched_by_their_body() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let path = "/invocations";
    let chat = post(
        server.address,
        path,
        r#"{"messages": [{"role": "user", "content": "hi"}]}"#,
    )
    .await;
    assert_eq!(
        (chat.status, &chat.json()["object"]),
        (200, &json!("chat.completion"))
    );
    coordinator.chat().await;
    let completion = post(server.address, path, r#"{"prompt": "hi", "stream": true}"#).await;
    assert!(completion.events()[0].contains("text_completion"));
    coordinator.generate().await;
    for body in ["{}", r#"{"input": "hi"}"#, "[]", "", r#"{"prompt": null}"#] {
        assert_eq!(post(server.address, path, body).await.status, 400, "{body}");
    }
    let typed = post_with(server.address, path, "Content-Type: text/plain\r\n", b"{}").await;
    assert_eq!(typed.status, 415);
}
