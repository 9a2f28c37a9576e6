//! OpenAI's Responses.

use std::{sync::Arc, time::Duration};

use phalanx_gateway::StoreLimits;
use phalanx_proto::{ErrorKind, RpcError, secret::ApiKeys, v1::tool_choice::Mode};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::support::{
    Connection, Coordinator, Reply, Script, Server, config, get, get_with, pair, post, post_with,
};

const PATH: &str = "/v1/responses";

/// A gateway that stores responses.
async fn storing(script: Script, limits: StoreLimits) -> (Coordinator, Server) {
    let coordinator = Coordinator::start(script).await;
    let mut config = config(&coordinator);
    config.responses = Some(limits);
    config.drain_timeout = Duration::from_millis(50);
    let server = Server::start(config).await;
    (coordinator, server)
}

async fn ask(server: &Server, body: Value) -> Reply {
    post(server.address, PATH, &body.to_string()).await
}

async fn retrieve(server: &Server, id: &str, query: &str) -> Reply {
    get(server.address, &format!("{PATH}/{id}{query}")).await
}

async fn cancel(server: &Server, id: &str) -> Reply {
    post(server.address, &format!("{PATH}/{id}/cancel"), "{}").await
}

/// The response once it has this status.
async fn until(server: &Server, id: &str, status: &str) -> Value {
    let mut reply = retrieve(server, id, "").await.json();
    while reply["status"] != status {
        assert!(
            ["queued", "in_progress"].contains(&reply["status"].as_str().expect("a status")),
            "{reply}"
        );
        reply = retrieve(server, id, "").await.json();
    }
    reply
}

fn names(events: &[(String, Value)]) -> Vec<&str> {
    let names = events.iter().map(|(name, _)| name.as_str());
    names
        .map(|name| name.strip_prefix("response.").expect("a prefix"))
        .collect()
}

fn error(reply: &Reply) -> (u16, String, String) {
    let error = &reply.json()["error"];
    let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    (reply.status, text("param"), text("code"))
}

#[tokio::test]
async fn a_response_is_answered() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let reply = ask(
        &server,
        json!({"model": "scripted", "input": "hi", "instructions": "Be brief.", "max_output_tokens": 9, "user": "u",
            "request_id": "resp_17"}),
    )
    .await;
    assert_eq!(reply.status, 200);
    let body = reply.json();
    let expected = json!([{"type": "message", "id": "msg_17_0", "status": "completed", "role": "assistant",
        "content": [{"type": "output_text", "text": "Hello world", "annotations": [], "logprobs": []}]}]);
    assert_eq!(body["output"], expected);
    assert_eq!(
        body["usage"],
        json!({"input_tokens": 5, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 7})
    );
    for (field, value) in [
        ("id", json!("resp_17")),
        ("object", json!("response")),
        ("status", json!("completed")),
        ("model", json!("scripted")),
        ("error", Value::Null),
        ("store", json!(false)),
        ("instructions", json!("Be brief.")),
    ] {
        assert_eq!(body[field], value, "{field}");
    }
    assert!(body["completed_at"].as_i64() >= body["created_at"].as_i64());
    let asked = coordinator.chat().await;
    assert_eq!(asked.request_id, "resp_17");
    let messages: Vec<(&str, &str)> = asked
        .messages
        .iter()
        .map(|message| (message.role.as_str(), message.content.as_str()))
        .collect();
    assert_eq!(messages, [("system", "Be brief."), ("user", "hi")]);
    assert_eq!(asked.sampling.expect("given").max_tokens, Some(9));
    // Nothing is stored by default, as with vLLM.
    let missing = retrieve(&server, "resp_17", "").await;
    assert_eq!(
        error(&missing),
        (404, "response_id".to_owned(), "not_found".to_owned())
    );
}

#[tokio::test]
async fn a_stream_has_numbered_events_in_order_and_no_done() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let reply = ask(&server, json!({"input": "hi", "stream": true})).await;
    assert_eq!(
        reply.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    let events = reply.named_events();
    assert_eq!(
        names(&events).join(" "),
        "created in_progress output_item.added content_part.added output_text.delta output_text.delta \
         output_text.done content_part.done output_item.done completed"
    );
    for (number, (name, data)) in events.iter().enumerate() {
        assert_eq!(
            (&data["type"], &data["sequence_number"]),
            (&json!(name), &json!(number))
        );
    }
    assert_eq!(events[0].1["response"]["status"], "in_progress");
    let text: String = events
        .iter()
        .filter_map(|(_, data)| data["delta"].as_str())
        .collect();
    assert_eq!(text, "Hello world");
    let last = &events[9].1["response"];
    assert_eq!(last["output"][0], events[8].1["item"]);
    assert_eq!(last["usage"]["total_tokens"], 7);
}

#[tokio::test]
async fn thoughts_and_calls_are_items() {
    let (mut coordinator, server) = pair(Script::Call).await;
    let tool = json!({"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true});
    let body = json!({"input": "hi", "tools": [tool], "tool_choice": {"type": "function", "name": "f"},
        "parallel_tool_calls": false});
    let whole = ask(&server, body.clone()).await.json();
    let kinds: Vec<&str> = whole["output"]
        .as_array()
        .expect("items")
        .iter()
        .map(|item| item["type"].as_str().expect("a type"))
        .collect();
    assert_eq!(kinds, ["reasoning", "function_call"]);
    assert_eq!(
        whole["output"][0]["content"][0],
        json!({"type": "reasoning_text", "text": "Hm."})
    );
    let call = &whole["output"][1];
    assert_eq!(
        (&call["call_id"], &call["name"], &call["arguments"]),
        (&json!("call-1"), &json!("f"), &json!("{}"))
    );
    assert_eq!(
        (&whole["tools"], &whole["parallel_tool_calls"]),
        (&body["tools"], &json!(false))
    );
    let asked = coordinator.chat().await;
    let tools: Value = serde_json::from_str(&asked.tools_json).expect("JSON");
    assert_eq!(tools[0]["function"]["name"], "f");
    assert_eq!(asked.tool_choice.expect("given").mode(), Mode::Named);
    let mut streamed = body;
    streamed["stream"] = true.into();
    let events = ask(&server, streamed).await.named_events();
    assert_eq!(
        names(&events).join(" "),
        "created in_progress output_item.added content_part.added reasoning_text.delta reasoning_text.done \
         content_part.done output_item.done output_item.added function_call_arguments.delta \
         function_call_arguments.delta function_call_arguments.done output_item.done completed"
    );
}

#[tokio::test]
async fn a_format_of_the_text_is_a_constraint() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let format = json!({"type": "json_schema", "name": "city", "schema": {"type": "object"}});
    let body = json!({"input": "hi", "text": {"format": format}});
    let reply = ask(&server, body.clone()).await.json();
    assert_eq!(reply["text"], body["text"]);
    let sampling = coordinator.chat().await.sampling.expect("given");
    let structured = sampling.structured_outputs.expect("given");
    assert_eq!(structured.param, "text.format.schema");
    let both = json!({"input": "hi", "text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}});
    assert_eq!(error(&ask(&server, both).await).1, "text.format");
}

#[tokio::test]
async fn errors_name_the_field() {
    let (_coordinator, server) = pair(Script::Hello).await;
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": "hi", "background": true}), "background"),
        (
            json!({"input": "hi", "tools": [{"type": "web_search"}]}),
            "tools[0].type",
        ),
        (
            json!({"input": [{"type": "item_reference", "id": "x"}]}),
            "input[0].type",
        ),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a"}]}]}),
            "input[0].content[0]",
        ),
    ] {
        let reply = ask(&server, body.clone()).await;
        let expected = (400, param.to_owned(), "invalid_argument".to_owned());
        assert_eq!(error(&reply), expected, "{body}");
    }
    let unknown = ask(&server, json!({"input": "hi", "previous_response_id": "x"})).await;
    assert_eq!(
        error(&unknown),
        (404, "previous_response_id".to_owned(), "not_found".to_owned())
    );
    for reply in [retrieve(&server, "x", "").await, cancel(&server, "x").await] {
        assert_eq!(
            error(&reply),
            (404, "response_id".to_owned(), "not_found".to_owned())
        );
    }
    let too_long = RpcError::new(ErrorKind::ContextLengthExceeded, "too long").with_param("prompt");
    let (_coordinator, server) = pair(Script::Refuse(too_long)).await;
    for body in [json!({"input": "hi"}), json!({"input": "hi", "stream": true})] {
        let reply = ask(&server, body).await;
        assert_eq!(
            error(&reply),
            (400, "input".to_owned(), "context_length_exceeded".to_owned())
        );
    }
    let lost = RpcError::new(ErrorKind::WorkerLost, "rank 1 is gone");
    let (_coordinator, server) = pair(Script::Break(lost)).await;
    assert_eq!(ask(&server, json!({"input": "hi"})).await.status, 503);
    let events = ask(&server, json!({"input": "hi", "stream": true}))
        .await
        .named_events();
    let (name, data) = events.last().expect("an end");
    assert_eq!(name, "response.failed");
    assert_eq!(
        data["response"]["error"],
        json!({"code": "server_error", "message": "rank 1 is gone"})
    );
}

#[tokio::test]
async fn what_is_stored_is_found_and_gone_on_from() {
    let limits = StoreLimits {
        responses: 2,
        ..StoreLimits::default()
    };
    let (mut coordinator, server) = storing(Script::Hello, limits).await;
    let first = ask(&server, json!({"input": "hi", "instructions": "Old."}))
        .await
        .json();
    let id = first["id"].as_str().expect("an id");
    assert_eq!(first["store"], true);
    assert_eq!(retrieve(&server, id, "").await.json(), first);
    let next = json!({"input": "and?", "previous_response_id": id, "stream": true});
    let events = ask(&server, next).await.named_events();
    let second = &events.last().expect("an end").1["response"];
    assert_eq!(second["previous_response_id"], id);
    assert_eq!(
        retrieve(&server, second["id"].as_str().expect("an id"), "")
            .await
            .json(),
        *second
    );
    let _first = coordinator.chat().await;
    let asked = coordinator.chat().await;
    let messages: Vec<(&str, &str)> = asked
        .messages
        .iter()
        .map(|message| (message.role.as_str(), message.content.as_str()))
        .collect();
    assert_eq!(
        messages,
        [("user", "hi"), ("assistant", "Hello world"), ("user", "and?")]
    );
    let refused = cancel(&server, id).await;
    assert_eq!(
        error(&refused),
        (400, "response_id".to_owned(), "invalid_argument".to_owned())
    );
    let refused = retrieve(&server, id, "?stream=true").await;
    assert_eq!(
        error(&refused),
        (400, "stream".to_owned(), "invalid_argument".to_owned())
    );
    let unstored = ask(&server, json!({"input": "hi", "store": false})).await.json();
    let missing = retrieve(&server, unstored["id"].as_str().expect("an id"), "").await;
    assert_eq!(missing.status, 404);
    ask(&server, json!({"input": "a third"})).await;
    assert_eq!(retrieve(&server, id, "").await.status, 404, "the oldest is gone");
}

#[tokio::test]
async fn one_key_does_not_see_what_another_stored() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.api_keys = ApiKeys::new(["first".to_owned(), "second".to_owned()]).expect("not empty");
    config.responses = Some(StoreLimits::default());
    let server = Server::start(config).await;
    let (mine, theirs) = (
        "Authorization: Bearer first\r\n",
        "Authorization: Bearer second\r\n",
    );
    let body = br#"{"input": "hi", "request_id": "resp_mine"}"#;
    assert_eq!(post_with(server.address, PATH, mine, body).await.status, 200);
    let path = format!("{PATH}/resp_mine");
    assert_eq!(get_with(server.address, &path, mine).await.status, 200);
    assert_eq!(get_with(server.address, &path, theirs).await.status, 404);
    let next = br#"{"input": "hi", "previous_response_id": "resp_mine"}"#;
    assert_eq!(post_with(server.address, PATH, theirs, next).await.status, 404);
    assert_eq!(post_with(server.address, PATH, mine, next).await.status, 200);
    let cancel = format!("{path}/cancel");
    assert_eq!(
        post_with(server.address, &cancel, theirs, b"{}").await.status,
        404
    );
    // Of another one's names nothing is known either.
    assert_eq!(post_with(server.address, PATH, theirs, body).await.status, 200);
    let taken = post_with(server.address, PATH, mine, body).await;
    assert_eq!(
        error(&taken),
        (400, "request_id".to_owned(), "invalid_argument".to_owned())
    );
}

#[tokio::test]
async fn a_background_response_is_made_whoever_listens() {
    let release = Arc::new(Semaphore::new(0));
    let script = Script::Wait(Arc::clone(&release));
    let (_coordinator, server) = storing(script, StoreLimits::default()).await;
    let queued = ask(&server, json!({"input": "hi", "background": true}))
        .await
        .json();
    let id = queued["id"].as_str().expect("an id").to_owned();
    assert_eq!(
        (&queued["status"], &queued["model"], &queued["output"]),
        (&json!("queued"), &json!("scripted"), &json!([]))
    );
    until(&server, &id, "in_progress").await;
    let early = ask(&server, json!({"input": "and?", "previous_response_id": id})).await;
    assert_eq!(error(&early).1, "previous_response_id");
    let mut listener = Connection::open(server.address).await;
    let body = br#"{"input": "hi", "background": true, "stream": true, "request_id": "resp_2"}"#;
    listener.send_post(PATH, "", body).await;
    listener.read_until("\"delta\":\"Hello\"").await;
    drop(listener);
    release.add_permits(2);
    let done = until(&server, &id, "completed").await;
    assert_eq!(done["output"][0]["content"][0]["text"], "Hello world");
    until(&server, "resp_2", "completed").await;
    let whole = retrieve(&server, "resp_2", "?stream=true").await.named_events();
    assert_eq!(names(&whole).last(), Some(&"completed"));
    let rest = retrieve(&server, "resp_2", "?stream=true&starting_after=4")
        .await
        .named_events();
    assert_eq!(rest, whole[5..]);
    let nothing = retrieve(&server, "resp_2", "?stream=true&starting_after=99").await;
    assert_eq!((nothing.status, nothing.text()), (200, ""));
    let wrong = retrieve(&server, "resp_2", "?stream=true&starting_after=-1").await;
    assert_eq!(error(&wrong).1, "starting_after");
}

#[tokio::test]
async fn a_cancelled_response_ends_at_the_coordinator() {
    let (mut coordinator, server) = storing(Script::Endless, StoreLimits::default()).await;
    let body = json!({"input": "hi", "background": true, "request_id": "resp_1"});
    assert_eq!(ask(&server, body).await.status, 200);
    let cancelled = cancel(&server, "resp_1").await;
    assert_eq!(
        (cancelled.status, &cancelled.json()["status"]),
        (200, &json!("cancelled"))
    );
    coordinator.dropped.recv().await.expect("the stream is dropped");
    assert_eq!(
        cancel(&server, "resp_1").await.json(),
        retrieve(&server, "resp_1", "").await.json()
    );
    server.ended().await;
}

#[tokio::test]
async fn a_response_that_outgrows_the_store_fails() {
    let limits = StoreLimits {
        bytes: 1 << 20,
        ..StoreLimits::default()
    };
    let (mut coordinator, server) = storing(Script::Endless, limits).await;
    let body = json!({"input": "hi", "background": true, "stream": true});
    let events = ask(&server, body).await.named_events();
    let (name, data) = events.last().expect("an end");
    assert_eq!(name, "response.failed");
    assert_eq!(data["response"]["error"]["code"], "rate_limit_exceeded");
    coordinator.dropped.recv().await.expect("the stream is dropped");
}

#[tokio::test]
async fn a_server_that_shuts_down_does_not_wait_for_ever() {
    let script = Script::Wait(Arc::new(Semaphore::new(0)));
    let (_coordinator, server) = storing(script, StoreLimits::default()).await;
    let body = br#"{"input": "hi", "background": true, "stream": true}"#;
    let mut listener = Connection::open(server.address).await;
    listener.send_post(PATH, "", body).await;
    listener.read_until("Hello").await;
    let ending = tokio::spawn(server.ended());
    let rest = listener.read_until("response.failed").await;
    assert!(!rest.contains("response.completed"), "{rest}");
    ending.await.expect("it ends");
}
