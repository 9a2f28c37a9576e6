//! Text Generation Inference's routes.

use phalanx_proto::{ErrorKind, RpcError, v1::generate_request::Prompt};
use serde_json::{Value, json};

use crate::support::{Script, get, pair, post};

#[tokio::test]
async fn a_prompt_is_generated_from() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"inputs": "Say ", "parameters": {"max_new_tokens": 5, "stop": ["!"], "seed": 7}}"#;
    let reply = post(server.address, "/generate", body).await;
    assert_eq!(
        (reply.status, reply.json()),
        (200, json!({"generated_text": "Hello world"}))
    );
    let asked = coordinator.generate().await;
    assert_eq!(asked.prompt, Some(Prompt::Text("Say ".to_owned())));
    let sampling = asked.sampling.expect("given");
    assert_eq!(
        (sampling.max_tokens, sampling.temperature, sampling.seed),
        (Some(5), Some(0.0), Some(7))
    );
    assert_eq!(
        (sampling.stop, sampling.include_stop_str_in_output),
        (vec!["!".to_owned()], true)
    );
    assert_eq!(asked.output.expect("given").logprobs, None);

    let body = r#"{"inputs": "Say ", "parameters": {"return_full_text": true, "details": true, "seed": 7}}"#;
    let token = |text: &str| json!({"id": 1, "text": text, "logprob": -0.25, "special": false});
    let expected = json!({
        "generated_text": "Say Hello world",
        "details": {
            "finish_reason": "stop_sequence",
            "generated_tokens": 2,
            "seed": 7,
            "prefill": [],
            "tokens": [token("Hello"), token(" world")],
        },
    });
    assert_eq!(post(server.address, "/generate", body).await.json(), expected);
    let list = post(server.address, "/", r#"{"inputs": "Say "}"#).await;
    assert_eq!(list.json(), json!([{"generated_text": "Hello world"}]));
}

#[tokio::test]
async fn a_stream_has_an_event_for_every_token() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let streamed =
        r#"{"inputs": "Say ", "parameters": {"return_full_text": true, "top_n_tokens": 1}, "stream": true}"#;
    for path in ["/generate_stream", "/"] {
        let reply = post(server.address, path, streamed).await;
        assert_eq!(
            reply.header("content-type"),
            Some("text/event-stream; charset=utf-8")
        );
        let events: Vec<Value> = reply
            .events()
            .into_iter()
            .map(|data| serde_json::from_str(data).expect("JSON"))
            .collect();
        let token = |text: &str| json!({"id": 1, "text": text, "logprob": -0.25, "special": false});
        let first = json!({
            "index": 1, "token": token("Hello"), "top_tokens": [token("Hello")], "generated_text": null, "details": null,
        });
        let last = json!({
            "index": 2, "token": token(" world"), "top_tokens": [token(" world")], "generated_text": "Say Hello world",
            "details": {"finish_reason": "stop_sequence", "generated_tokens": 2, "seed": null, "input_length": 5},
        });
        assert_eq!(events, [first, last], "{path}");
    }
}

#[tokio::test]
async fn errors_have_tgis_shape() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    for (body, part) in [
        ("{}", "inputs is needed"),
        (r#"{"inputs": 5}"#, "inputs"),
        (
            r#"{"inputs": "a", "parameters": {"decoder_input_details": true}}"#,
            "decoder_input_details",
        ),
        (r#"{"inputs": "a", "parameters": {"best_of": 2}}"#, "best_of"),
        ("[]", "expected an object"),
    ] {
        for path in ["/generate", "/generate_stream", "/"] {
            let reply = post(server.address, path, body).await;
            let error = reply.json();
            assert_eq!(
                (reply.status, &error["error_type"]),
                (422, &json!("validation")),
                "{body}"
            );
            assert!(error["error"].as_str().expect("text").contains(part), "{error}");
        }
    }
    assert!(coordinator.received.try_recv().is_err(), "nothing was asked");
    for (kind, status, error_type) in [
        (ErrorKind::QueueFull, 429, "overloaded"),
        (ErrorKind::WorkerLost, 424, "generation"),
        (ErrorKind::ContextLengthExceeded, 422, "validation"),
    ] {
        let (_coordinator, server) = pair(Script::Refuse(RpcError::new(kind, "why"))).await;
        for path in ["/generate", "/generate_stream"] {
            let reply = post(server.address, path, r#"{"inputs": "a"}"#).await;
            let expected = json!({"error": "why", "error_type": error_type});
            assert_eq!((reply.status, reply.json()), (status, expected));
        }
    }
}

#[tokio::test]
async fn a_stream_that_breaks_says_so() {
    let error = RpcError::new(ErrorKind::WorkerLost, "rank 1 is gone");
    let (_coordinator, server) = pair(Script::Break(error)).await;
    let reply = post(server.address, "/generate_stream", r#"{"inputs": "a"}"#).await;
    let events = reply.events();
    let last: Value = serde_json::from_str(events.last().expect("events")).expect("JSON");
    assert_eq!(
        last,
        json!({"error": "rank 1 is gone", "error_type": "generation"})
    );
}

#[tokio::test]
async fn the_model_and_its_limits_are_told() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let info = get(server.address, "/info").await.json();
    assert_eq!(
        (&info["model_id"], &info["router"]),
        (&json!("scripted"), &json!("phalanx"))
    );
    assert_eq!(
        (&info["max_input_tokens"], &info["max_total_tokens"]),
        (&json!(2047), &json!(2048))
    );
}
