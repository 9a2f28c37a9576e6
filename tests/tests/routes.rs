//! The routes beside chat and completions, on one real cluster of two ranks.

use std::{thread, time::Duration};

use phalanx_tests::{
    http,
    processes::eventually,
    server::{Server, chat},
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const KEY: &str = "operator";
const LIMIT: Duration = Duration::from_secs(60);

/// One start of the cluster for all of it.
#[test]
fn tokens_operators_and_other_servers_clients_are_served() {
    let server = Server::start(&[
        "-tp",
        "2",
        "--max-model-len",
        "2048",
        "--admin-api-key",
        KEY,
        "--enable-tokenizer-info-endpoint",
        "--root-path",
        "/llm",
    ]);
    a_conversation_by_its_tokens_gives_the_same_answer(&server);
    tgi_clients_get_the_same_text_whole_and_in_pieces(&server);
    a_pause_lets_a_stream_end_and_holds_the_next_request(&server);
    a_frozen_stream_goes_on_with_the_same_text(&server);
    an_aborted_stream_says_so(&server);
    a_reset_cache_finds_nothing(&server);
    the_server_describes_itself(&server);
    server.wait_idle();
    assert!(server.stop().success());
}

fn post(server: &Server, path: &str, body: &Value) -> Value {
    let reply = http::post(&server.address, path, body).expect("a reply");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

fn get(server: &Server, path: &str) -> Value {
    let reply = http::get(&server.address, path).expect("a reply");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

fn operate(server: &Server, path: &str, body: &Value) -> http::Reply {
    let refused = http::post_keyed(&server.address, path, "somebody", body).expect("a reply");
    assert_eq!(refused.status, 401, "{path}");
    let reply = http::post_keyed(&server.address, path, KEY, body).expect("a reply");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply
}

fn text_of(event: &Value) -> String {
    let text = event["choices"][0]["delta"]["content"].as_str();
    text.unwrap_or_default().to_owned()
}

/// The rest of a stream: its text and finish reason.
fn rest(stream: &mut http::Stream) -> (String, Value) {
    let (mut text, mut reason) = (String::new(), Value::Null);
    while let Some(data) = stream.next_event().expect("an event") {
        if data == "[DONE]" {
            break;
        }
        let event: Value = serde_json::from_str(&data).expect("JSON");
        text.push_str(&text_of(&event));
        if !event["choices"][0]["finish_reason"].is_null() {
            reason = event["choices"][0]["finish_reason"].clone();
        }
    }
    (text, reason)
}

/// A stream of which some text has come: the text, the stream, and its id.
fn running(server: &Server, body: &Value) -> (String, http::Stream, String) {
    let mut stream = http::open(&server.address, CHAT, body).expect("a stream");
    assert_eq!(stream.status, 200);
    let mut text = String::new();
    loop {
        let data = stream.next_event().expect("an event").expect("no end yet");
        let event: Value = serde_json::from_str(&data).expect("JSON");
        text.push_str(&text_of(&event));
        if text.split_whitespace().count() > 3 {
            let id = event["id"].as_str().expect("an id").to_owned();
            return (text, stream, id);
        }
    }
}

fn long_story(max_tokens: u32) -> Value {
    let mut body = chat("Tell me a long story about a dog and the sea.");
    body["max_tokens"] = max_tokens.into();
    body["stream"] = true.into();
    body["ignore_eos"] = true.into();
    body
}

fn whole_text(server: &Server, body: &Value) -> String {
    let mut body = body.clone();
    body["stream"] = false.into();
    let answer = post(server, CHAT, &body);
    answer["choices"][0]["message"]["content"]
        .as_str()
        .expect("text")
        .to_owned()
}

fn a_conversation_by_its_tokens_gives_the_same_answer(server: &Server) {
    let question = chat("What is the capital of France?");
    let expected = whole_text(server, &question);
    let asked = json!({"messages": question["messages"], "return_token_strs": true});
    let tokens = post(server, "/tokenize", &asked);
    assert_eq!(
        tokens["count"],
        tokens["token_strs"].as_array().expect("spelled").len()
    );
    assert_eq!(tokens["max_model_len"], 2048);
    let prompt = post(server, "/detokenize", &json!({"tokens": tokens["tokens"]}));
    assert!(
        prompt["prompt"]
            .as_str()
            .expect("text")
            .contains("capital of France?<|im_end|>")
    );
    let generated = post(
        server,
        "/llm/inference/v1/generate",
        &json!({"token_ids": tokens["tokens"], "sampling_params": {"temperature": 0, "max_tokens": 64}}),
    );
    let ids = &generated["choices"][0]["token_ids"];
    assert_eq!(
        generated["usage"]["completion_tokens"],
        ids.as_array().expect("ids").len()
    );
    let text = post(server, "/detokenize", &json!({"tokens": ids}));
    let text = text["prompt"].as_str().expect("text");
    assert_eq!(text.trim_end_matches("<|im_end|>"), expected);
    let invoked = post(server, "/invocations", &question);
    assert_eq!(invoked["choices"][0]["message"]["content"], expected.as_str());
    assert_eq!(get(server, "/tokenizer_info")["eos_token"], "<|im_end|>");
}

fn tgi_clients_get_the_same_text_whole_and_in_pieces(server: &Server) {
    let prompt = "The three primary colours are";
    let expected = server.complete(prompt, 24);
    let body = json!({"inputs": prompt, "parameters": {"max_new_tokens": 24, "details": true}});
    let reply = post(server, "/generate", &body);
    assert_eq!(reply["generated_text"], expected.as_str());
    let tokens = reply["details"]["tokens"].as_array().expect("tokens");
    assert_eq!(reply["details"]["generated_tokens"], tokens.len());
    let mut stream = http::open(&server.address, "/generate_stream", &body).expect("a stream");
    let (mut pieces, mut last) = (String::new(), Value::Null);
    while let Some(data) = stream.next_event().expect("an event") {
        last = serde_json::from_str(&data).expect("JSON");
        if last["token"]["special"] == false {
            pieces.push_str(last["token"]["text"].as_str().expect("text"));
        }
    }
    assert_eq!(pieces, expected);
    assert_eq!(last["generated_text"], expected.as_str());
    assert_eq!(
        last["details"]["generated_tokens"],
        reply["details"]["generated_tokens"]
    );
    assert_eq!(get(server, "/info")["max_total_tokens"], 2048);
}

fn a_pause_lets_a_stream_end_and_holds_the_next_request(server: &Server) {
    let body = long_story(80);
    let expected = whole_text(server, &body);
    let (begun, mut stream, _) = running(server, &body);
    thread::scope(|scope| {
        let paused = scope.spawn(|| operate(server, "/pause?mode=wait", &json!({})));
        let (ended, reason) = rest(&mut stream);
        assert_eq!((begun + &ended, reason), (expected, json!("length")));
        assert_eq!(
            paused.join().expect("no panic").json(),
            json!({"status": "paused"})
        );
        assert_eq!(server.metric("phalanx_paused"), Some(1.0));
        assert_eq!(get(server, "/health")["paused"], true);

        let held = scope.spawn(|| server.complete("One, two, three,", 8));
        eventually("a request that waits", LIMIT, || {
            server.metric_where("vllm:num_requests_waiting_by_reason", "deferred") == Some(1.0)
        });
        assert!(!held.is_finished());
        operate(server, "/resume", &json!({}));
        assert!(held.join().expect("no panic").contains("four"));
    });
    assert_eq!(server.metric("phalanx_paused"), Some(0.0));
}

fn a_frozen_stream_goes_on_with_the_same_text(server: &Server) {
    let body = long_story(80);
    let expected = whole_text(server, &body);
    let (begun, mut stream, _) = running(server, &body);
    operate(server, "/pause?mode=keep", &json!({}));
    let generated = server.metric("vllm:generation_tokens_total");
    assert_eq!(
        server.metric("vllm:num_requests_running"),
        Some(1.0),
        "it holds its blocks"
    );
    operate(
        server,
        "/reset_prefix_cache?reset_running_requests=true",
        &json!({}),
    );
    assert_eq!(
        server.metric("vllm:generation_tokens_total"),
        generated,
        "and stands still"
    );
    operate(server, "/resume", &json!({}));
    let (ended, _) = rest(&mut stream);
    assert_eq!(begun + &ended, expected);
}

fn an_aborted_stream_says_so(server: &Server) {
    let (_, mut stream, id) = running(server, &long_story(1500));
    let reply = operate(server, "/abort_requests", &json!({"request_ids": [id]}));
    assert_eq!(reply.json()["aborted"], 1);
    assert_eq!(rest(&mut stream).1, "abort");
    let (_, mut stream, id) = running(server, &long_story(1500));
    let body = json!({"request_ids": [id, "unknown"]});
    let reply = http::post(&server.address, "/inference/v1/abort_requests", &body).expect("a reply");
    assert_eq!(reply.status, 200);
    assert_eq!(rest(&mut stream).1, "abort");
}

fn a_reset_cache_finds_nothing(server: &Server) {
    let prompt = "All that we see or seem is but a dream within a dream. ".repeat(8);
    let hits = || {
        let before = server.metric("vllm:prefix_cache_hits_total").expect("counted");
        server.complete(&prompt, 1);
        server.metric("vllm:prefix_cache_hits_total").expect("counted") - before
    };
    hits();
    assert!(hits() > 0.0, "the same prompt is found");
    operate(server, "/reset_prefix_cache", &json!({}));
    assert_eq!(hits(), 0.0, "and forgotten");
}

fn the_server_describes_itself(server: &Server) {
    let info = get(server, "/server_info?config_format=json");
    assert_eq!(info["vllm_config"]["parallel_config"]["tensor_parallel_size"], 2);
    let text = info.to_string();
    assert!(!text.contains(KEY), "no secrets: {text}");
    let document = get(server, "/llm/openapi.json");
    assert!(
        document["paths"]
            .as_object()
            .expect("paths")
            .contains_key("/v1/chat/completions")
    );
    let page = http::get(&server.address, "/docs").expect("a reply");
    assert!(page.text().contains("/v1/chat/completions"));
}
