//! One real cluster of two ranks behind its gateway, and what clients ask of it.

use std::{
    thread,
    time::{Duration, Instant},
};

use phalanx_tests::{
    http,
    processes::eventually,
    server::{Server, chat},
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

/// One start of the cluster for all of it: what each part asks does not disturb the others.
#[test]
fn clients_are_served() {
    let server = Server::start(&["-tp", "2", "--max-model-len", "4096"]);
    answers_are_sensible_english(&server);
    a_stream_is_the_same_text_in_pieces(&server);
    the_seed_decides_a_sampled_answer(&server);
    stop_strings_end_the_text_before_them(&server);
    a_bias_forces_and_bans_tokens(&server);
    bad_requests_are_refused_with_the_field_and_the_limit(&server);
    models_health_and_metrics_answer(&server);
    a_client_that_leaves_frees_its_blocks(&server);
    long_prompts_and_many_streams_at_once(&server);
    server.wait_idle();
    assert!(server.stop().success());
}

fn ask(server: &Server, body: &Value) -> Value {
    let reply = http::post(&server.address, CHAT, body).expect("a reply");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

/// The events of a stream up to, and without, `[DONE]`.
fn events(server: &Server, path: &str, body: &Value) -> Vec<Value> {
    let mut stream = http::open(&server.address, path, body).expect("a stream");
    assert_eq!(stream.status, 200);
    let mut events = Vec::new();
    while let Some(data) = stream.next_event().expect("an event") {
        if data == "[DONE]" {
            return events;
        }
        events.push(serde_json::from_str(&data).expect("JSON"));
    }
    panic!("the stream ended without [DONE]");
}

fn streamed_text(events: &[Value]) -> String {
    events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect()
}

fn answers_are_sensible_english(server: &Server) {
    let answer = ask(
        server,
        &chat("What is the capital of France, and what is it famous for?"),
    );
    let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(text.contains("Paris"), "{text:?}");
    assert_eq!(answer["object"], "chat.completion");
    let answer = ask(server, &chat("Write one sentence about the sea."));
    let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(text.is_ascii() && text.split_whitespace().count() > 5, "{text:?}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let usage = &answer["usage"];
    let sum =
        usage["prompt_tokens"].as_u64().expect("count") + usage["completion_tokens"].as_u64().expect("count");
    assert_eq!(usage["total_tokens"], sum);
}

fn a_stream_is_the_same_text_in_pieces(server: &Server) {
    let mut body = chat("Name three colours.");
    let whole = ask(server, &body)["choices"][0]["message"]["content"]
        .as_str()
        .expect("text")
        .to_owned();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let events = events(server, CHAT, &body);
    assert_eq!(streamed_text(&events), whole);
    assert!(events.len() > 5, "token by token, not all at once");
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let last = events.last().expect("events");
    assert_eq!(last["choices"], json!([]));
    assert!(last["usage"]["completion_tokens"].as_u64().expect("count") > 3);
}

fn the_seed_decides_a_sampled_answer(server: &Server) {
    let mut body = chat("Tell me a short story about a dog.");
    body["temperature"] = 1.0.into();
    let text = |seed: u64| {
        let mut body = body.clone();
        body["seed"] = seed.into();
        ask(server, &body)["choices"][0]["message"]["content"]
            .as_str()
            .expect("text")
            .to_owned()
    };
    let (first, again, other) = (text(1), text(1), text(2));
    assert_eq!(first, again);
    assert_ne!(first, other);
    body["n"] = 3.into();
    body["seed"] = 1.into();
    let choices = ask(server, &body)["choices"].as_array().expect("choices").clone();
    assert_eq!(choices.len(), 3);
    assert_eq!(choices[0]["message"]["content"], first.as_str());
    assert_eq!(choices[1]["message"]["content"], other.as_str());
}

fn stop_strings_end_the_text_before_them(server: &Server) {
    let body = json!({"model": "demo", "prompt": "1, 2, 3, 4,", "max_tokens": 40, "temperature": 0});
    let complete = |body: &Value| {
        http::post(&server.address, "/v1/completions", body)
            .expect("a reply")
            .json()
    };
    let free = complete(&body)["choices"][0]["text"]
        .as_str()
        .expect("text")
        .to_owned();
    assert!(free.contains(" 7,"), "{free:?}");
    let mut stopped = body.clone();
    stopped["stop"] = json!([" 7,"]);
    let reply = complete(&stopped);
    assert_eq!(reply["choices"][0]["text"].as_str(), free.split(" 7,").next());
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    assert_eq!(complete(&body)["choices"][0]["finish_reason"], "length");
    let mut echoed = body;
    echoed["echo"] = true.into();
    let text = complete(&echoed)["choices"][0]["text"]
        .as_str()
        .expect("text")
        .to_owned();
    assert_eq!(text, format!("1, 2, 3, 4,{free}"));
}

fn a_bias_forces_and_bans_tokens(server: &Server) {
    let greedy = |bias: Value| {
        let body = json!({"prompt": "The sun rises in the", "temperature": 0, "max_tokens": 3, "logprobs": 0,
            "logit_bias": bias, "cache_salt": "bias", "ignore_eos": true});
        let reply = http::post(&server.address, "/v1/completions", &body).expect("a reply");
        assert_eq!(reply.status, 200, "{}", reply.text());
        let tokens = reply.json()["choices"][0]["logprobs"]["tokens"].clone();
        let tokens: Vec<String> = serde_json::from_value(tokens).expect("tokens");
        tokens
    };
    let forced = greedy(json!({"1000": 100}));
    assert_eq!((forced.len(), &forced[0]), (3, &forced[1]), "{forced:?}");
    assert_eq!(forced[1], forced[2]);
    let free = greedy(json!({}));
    assert_ne!(free, forced);
    assert_eq!(
        free,
        greedy(json!({"1000": -100})),
        "it was not going to be sampled"
    );
}

fn bad_requests_are_refused_with_the_field_and_the_limit(server: &Server) {
    let model = |id: &str| json!({"model": id, "messages": [{"role": "user", "content": "x"}]});
    let with = |key: &str, value: Value| {
        let mut body = chat("x");
        body[key] = value;
        body
    };
    let cases = [
        (model("gpt-4"), 404, "gpt-4"),
        (with("temperature", json!(-1)), 400, "temperature"),
        (with("top_p", json!(1.5)), 400, "top_p"),
        (with("n", json!(0)), 400, "n"),
        (with("max_tokens", json!(0)), 400, "max_tokens"),
        (with("max_tokens", json!(100_000)), 400, "4096"),
        (with("messages", json!([])), 400, "messages"),
        (with("messages", json!("hello")), 400, "messages"),
        (with("stop", json!(7)), 400, "stop"),
        (with("priority", json!(1)), 400, "priority"),
        (with("cache_salt", json!("")), 400, "cache_salt"),
        (with("logit_bias", json!({"99999": 1})), 400, "99999"),
        (json!([]), 400, ""),
        (json!(null), 400, ""),
    ];
    for (body, status, word) in cases {
        let reply = http::post(&server.address, CHAT, &body).expect("a reply");
        assert_eq!(reply.status, status, "{body}: {}", reply.text());
        let error = &reply.json()["error"];
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|message| message.contains(word)),
            "{body}: {error}"
        );
    }
    let reply = http::post_bytes(&server.address, CHAT, b"{\"messages\": ").expect("a reply");
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert_eq!(
        http::get(&server.address, "/v1/nothing").expect("a reply").status,
        404
    );
    assert_eq!(http::get(&server.address, CHAT).expect("a reply").status, 405);
}

fn models_health_and_metrics_answer(server: &Server) {
    let models = http::get(&server.address, "/v1/models").expect("a reply").json();
    assert_eq!(models["data"][0]["id"], "demo");
    assert_eq!(models["data"][0]["max_model_len"], 4096);
    server.complete("Hello", 4);
    for name in [
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:time_to_first_token_seconds_count",
    ] {
        assert!(server.metric(name).is_some_and(|value| value > 0.0), "{name}");
    }
}

fn a_client_that_leaves_frees_its_blocks(server: &Server) {
    let mut body = chat("Count from one to one thousand in words.");
    body["stream"] = true.into();
    body["max_tokens"] = 2000.into();
    body["ignore_eos"] = true.into();
    let aborted = || {
        server
            .metric_where("vllm:request_success_total", "finished_reason=\"abort\"")
            .unwrap_or(0.0)
    };
    let before = aborted();
    let mut stream = http::open(&server.address, CHAT, &body).expect("a stream");
    for _ in 0..5 {
        stream.next_event().expect("an event").expect("not over");
    }
    drop(stream);
    eventually("the abort", Duration::from_secs(5), || aborted() > before);
}

fn long_prompts_and_many_streams_at_once(server: &Server) {
    let long = "The quick brown fox jumps over the lazy dog. ".repeat(300);
    let prompts: Vec<String> = (0..64).map(|i| format!("{i} + {i} =")).collect();
    let address = &server.address;
    let start = Instant::now();
    thread::scope(|scope| {
        let streams: Vec<_> = prompts
            .iter()
            .map(|prompt| {
                let body = json!({"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": true});
                scope.spawn(move || events(server, "/v1/completions", &body).len())
            })
            .collect();
        let body = json!({"model": "demo", "prompt": long, "max_tokens": 4, "temperature": 0});
        let reply = http::post(address, "/v1/completions", &body).expect("a reply");
        assert_eq!(reply.status, 200, "{}", reply.text());
        let prompt_tokens = reply.json()["usage"]["prompt_tokens"].as_u64().expect("count");
        assert!(prompt_tokens > 2500, "{prompt_tokens}");
        for stream in streams {
            assert!(stream.join().expect("no panic") > 1);
        }
    });
    assert!(start.elapsed() < Duration::from_secs(120));
    let answers: Vec<String> = prompts[..4]
        .iter()
        .map(|prompt| server.complete(prompt, 8))
        .collect();
    let alone: Vec<String> = prompts[..4]
        .iter()
        .map(|prompt| server.complete(prompt, 8))
        .collect();
    assert_eq!(answers, alone, "the second time from the prefix cache");
}
