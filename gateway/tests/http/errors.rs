//! Every way to be refused, as an OpenAI error object.

use std::{sync::Arc, time::Duration};

use phalanx_gateway::{Backends, GatewayConfig};
use phalanx_proto::{ErrorKind, RpcError};
use serde_json::Value;
use tokio::{sync::Semaphore, time::timeout};

use crate::support::{
    Connection, Coordinator, Reply, Script, Server, config, delete, get, pair, post, post_with,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// The error object of a reply, which must have all four members.
fn error(reply: &Reply) -> Value {
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let error = reply.json()["error"].clone();
    let members = error.as_object().expect("an error object");
    let named = ["code", "message", "param", "type"];
    let complete = members.len() == named.len() && named.iter().all(|name| members.contains_key(*name));
    assert!(complete, "{error}");
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| !message.is_empty())
    );
    error
}

#[tokio::test]
async fn bad_bodies_are_refused_with_the_field_named() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let chat = |fields: &str| format!(r#"{{"messages": [{{"role": "user", "content": "hi"}}], {fields}}}"#);
    let complete = |fields: &str| format!(r#"{{"prompt": "hi", {fields}}}"#);
    let many_prompts = format!(r#"{{"prompt": [{}"a"]}}"#, r#""a","#.repeat(128));
    let deep = "[".repeat(100_000);
    let cases = [
        (CHAT, "\"hello\"".to_owned(), None),
        (CHAT, "[]".to_owned(), None),
        (CHAT, "42".to_owned(), None),
        (CHAT, "null".to_owned(), None),
        (CHAT, String::new(), None),
        (CHAT, "{\"messages\": ".to_owned(), None),
        (CHAT, deep.clone(), None),
        (CHAT, format!(r#"{{"x": {deep}"#), None),
        (CHAT, "{}".to_owned(), Some("messages")),
        (CHAT, r#"{"messages": "hi"}"#.to_owned(), Some("messages")),
        (CHAT, chat(r#""temperature": "hot""#), Some("temperature")),
        (CHAT, chat(r#""max_tokens": -1"#), Some("max_tokens")),
        (CHAT, chat(r#""max_tokens": 5000000000"#), Some("max_tokens")),
        (CHAT, chat(r#""n": 0"#), Some("n")),
        (CHAT, chat(r#""stream": "yes""#), Some("stream")),
        (
            CHAT,
            chat(r#""stream_options": {"include_usage": true}"#),
            Some("stream_options"),
        ),
        (
            CHAT,
            chat(r#""stream_options": {"include_usage": 1}"#),
            Some("stream_options.include_usage"),
        ),
        (CHAT, chat(r#""top_logprobs": 3"#), Some("top_logprobs")),
        (CHAT, chat(r#""tools": {"type": "function"}"#), Some("tools")),
        (CHAT, chat(r#""tool_choice": "any""#), Some("tool_choice")),
        (
            CHAT,
            chat(r#""parallel_tool_calls": "no""#),
            Some("parallel_tool_calls"),
        ),
        (CHAT, chat(r#""documents": "none""#), Some("documents")),
        (CHAT, chat(r#""use_beam_search": true"#), Some("use_beam_search")),
        (
            CHAT,
            chat(r#""logprob_token_ids": [5, -1]"#),
            Some("logprob_token_ids[1]"),
        ),
        (
            CHAT,
            chat(r#""thinking_token_budget": -2"#),
            Some("thinking_token_budget"),
        ),
        (
            COMPLETIONS,
            complete(r#""logits_processors": ["a"]"#),
            Some("logits_processors"),
        ),
        (
            COMPLETIONS,
            complete(&format!(r#""logprob_token_ids": [{}5]"#, "5,".repeat(128))),
            Some("logprob_token_ids"),
        ),
        (
            COMPLETIONS,
            complete(r#""repetition_detection": {"min_count": "many"}"#),
            Some("repetition_detection.min_count"),
        ),
        (CHAT, chat(r#""functions": [{"name": "f"}]"#), Some("functions")),
        (
            CHAT,
            chat(r#""response_format": {"type": "yaml"}"#),
            Some("response_format.type"),
        ),
        (
            CHAT,
            chat(r#""chat_template_kwargs": []"#),
            Some("chat_template_kwargs"),
        ),
        (COMPLETIONS, "{}".to_owned(), Some("prompt")),
        (COMPLETIONS, r#"{"prompt": []}"#.to_owned(), Some("prompt")),
        (COMPLETIONS, r#"{"prompt": {}}"#.to_owned(), Some("prompt")),
        (COMPLETIONS, many_prompts, Some("prompt")),
        (
            COMPLETIONS,
            r#"{"prompt": ["a", "b", "c"], "n": 128}"#.to_owned(),
            Some("n"),
        ),
        (COMPLETIONS, complete(r#""suffix": "x""#), Some("suffix")),
        (COMPLETIONS, complete(r#""logprobs": true"#), Some("logprobs")),
    ];
    for (path, body, param) in cases {
        let reply = post(server.address, path, &body).await;
        let shown = &body[..body.len().min(80)];
        assert_eq!(reply.status, 400, "{shown}");
        let error = error(&reply);
        assert_eq!(error["param"].as_str(), param, "{shown}: {error}");
        assert_eq!(
            (error["type"].as_str(), error["code"].as_str()),
            (Some("BadRequestError"), Some("invalid_argument"))
        );
    }
    let reply = post_with(server.address, CHAT, "", b"{\"messages\": \"\xff\"}").await;
    assert_eq!(reply.status, 400);
    assert!(
        coordinator.received.try_recv().is_err(),
        "no bad request goes further"
    );
}

#[tokio::test]
async fn the_coordinators_errors_keep_their_kind() {
    let cases = [
        (ErrorKind::InvalidArgument, 400, false),
        (ErrorKind::ContextLengthExceeded, 400, false),
        (ErrorKind::NotFound, 404, false),
        (ErrorKind::PayloadTooLarge, 413, false),
        (ErrorKind::QueueFull, 429, true),
        (ErrorKind::Unavailable, 503, true),
        (ErrorKind::WorkerLost, 503, true),
        (ErrorKind::DeadlineExceeded, 408, false),
        (ErrorKind::Internal, 500, false),
    ];
    for (kind, status, retry) in cases {
        let refusal = RpcError::new(kind, "because").with_param("model");
        let (_coordinator, server) = pair(Script::Refuse(refusal)).await;
        for stream in [false, true] {
            let reply = post(
                server.address,
                COMPLETIONS,
                &format!(r#"{{"prompt": "a", "stream": {stream}}}"#),
            )
            .await;
            assert_eq!(
                (reply.status, reply.header("retry-after").is_some()),
                (status, retry),
                "{kind:?}"
            );
            let error = error(&reply);
            assert_eq!(
                (&error["message"], &error["param"]),
                (&"because".into(), &"model".into())
            );
            assert_eq!(
                (&error["code"], &error["type"]),
                (&kind.name().into(), &kind.openai_type().into())
            );
        }
    }
}

#[tokio::test]
async fn what_http_refuses() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.limits.body_bytes = 1000;
    config.limits.body_timeout = Duration::from_millis(100);
    let server = Server::start(config).await;

    let reply = get(server.address, "/v1/nothing").await;
    assert_eq!(
        (reply.status, error(&reply)["code"].as_str()),
        (404, Some("not_found"))
    );
    let reply = delete(server.address, CHAT).await;
    assert_eq!(
        (reply.status, error(&reply)["code"].as_str()),
        (405, Some("method_not_allowed"))
    );
    assert_eq!(reply.header("allow"), Some("POST"));

    let reply = post_with(server.address, CHAT, "Content-Type: text/plain\r\n", b"{}").await;
    assert_eq!(
        (reply.status, error(&reply)["code"].as_str()),
        (415, Some("unsupported_media_type"))
    );

    // Over the limit; a little more than is read and thrown away.
    for size in [1001, 4500] {
        let reply = post(server.address, CHAT, &" ".repeat(size)).await;
        assert_eq!(
            (reply.status, error(&reply)["code"].as_str()),
            (413, Some("payload_too_large"))
        );
    }

    let mut slow = Connection::open(server.address).await;
    slow.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{")
        .await;
    let reply = slow.reply().await.expect("a reply");
    assert_eq!(
        (reply.status, error(&reply)["code"].as_str()),
        (408, Some("request_timeout"))
    );

    let many = "X: y\r\n".repeat(200);
    assert_eq!(post_with(server.address, CHAT, &many, b"{}").await.status, 431);
}

#[tokio::test]
async fn too_many_running_prompts_are_429() {
    let release = Arc::new(Semaphore::new(0));
    let coordinator = Coordinator::start(Script::Wait(Arc::clone(&release))).await;
    let mut config = config(&coordinator);
    config.limits.running_prompts = 2;
    let server = Server::start(config).await;
    let mut running = Connection::open(server.address).await;
    running
        .send_post(COMPLETIONS, "", br#"{"prompt": "a", "stream": true}"#)
        .await;
    running.read_until("Hello").await;
    let reply = post(server.address, COMPLETIONS, r#"{"prompt": ["a", "b"]}"#).await;
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("1")));
    assert_eq!(error(&reply)["code"], "queue_full");
    release.add_permits(3);
    running.read_until("[DONE]").await;
    // Its permit returns when its connection lets go of the reply, just after the last byte.
    let again = async {
        while post(server.address, COMPLETIONS, r#"{"prompt": ["a", "b"]}"#)
            .await
            .status
            != 200
        {}
    };
    timeout(Duration::from_secs(20), again).await.expect("room again");
}

#[tokio::test]
async fn a_slow_head_is_cut() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.limits.header_timeout = Duration::from_millis(100);
    let server = Server::start(config).await;
    let mut slow = Connection::open(server.address).await;
    slow.send(b"GET /health HTTP/1.1\r\nHo").await;
    let closed = timeout(Duration::from_secs(20), slow.reply())
        .await
        .expect("closed");
    assert!(closed.is_none_or(|reply| reply.status == 408));
}

#[tokio::test]
async fn an_absent_coordinator_is_503_and_a_late_one_is_found() {
    // A port that was free a moment ago.
    let coordinator = Coordinator::start(Script::Hello).await;
    let address = coordinator.address();
    drop(coordinator);
    let server = Server::start(GatewayConfig::new("127.0.0.1:0", Backends::one(address.clone()))).await;
    let body = r#"{"prompt": "a"}"#;
    let mut reply = post(server.address, COMPLETIONS, body).await;
    // The old listener may take a moment to close.
    while reply.status == 200 {
        reply = post(server.address, COMPLETIONS, body).await;
    }
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
    let refused = error(&reply);
    assert_eq!(refused["message"], "the coordinator cannot be reached");
    assert_eq!(refused["type"], "ServiceUnavailableError");
    assert_eq!(
        get(server.address, "/health").await.json()["state"],
        "unreachable"
    );

    let _late = Coordinator::start_at(address.trim_start_matches("http://"), Script::Hello).await;
    let found = async { while post(server.address, COMPLETIONS, body).await.status != 200 {} };
    timeout(Duration::from_secs(20), found).await.expect("reconnects");
}
