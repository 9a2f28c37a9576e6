//! What the engine promises, asked of real clusters: guesses change nothing but the time, and what cannot be served is
//! refused at once, by name and with a number.

use std::time::{Duration, Instant};

use phalanx_tests::{
    http,
    processes::eventually,
    python,
    server::{Server, chat, free_port},
};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";

fn complete(server: &Server, body: &Value) -> Value {
    let reply = http::post(&server.address, COMPLETIONS, body).expect("a reply");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["choices"].clone()
}

/// Requests that use all that a guess must be verified with.
fn requests() -> Vec<Value> {
    let list = "red, green, blue, red, green, blue, red, green, blue, red, green,";
    let with = |more: Value| {
        let mut body = json!({"prompt": list, "max_tokens": 60, "temperature": 0});
        body.as_object_mut()
            .expect("an object")
            .extend(more.as_object().expect("an object").clone());
        body
    };
    vec![
        with(json!({})),
        with(json!({"logprobs": 3})),
        with(json!({"temperature": 0.8, "seed": 11, "n": 3})),
        with(json!({"temperature": 1.0, "top_p": 0.9, "top_k": 40, "seed": 5, "ignore_eos": true})),
        with(json!({"repetition_penalty": 1.05, "presence_penalty": 0.2, "frequency_penalty": 0.1})),
        with(json!({"logit_bias": {"28": -2.5}, "min_tokens": 30})),
        with(json!({"stop": ["green, blue, red, green, blue, red, green"]})),
        with(
            json!({"prompt": "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return", "max_tokens": 40}),
        ),
    ]
}

#[test]
fn circles_and_thoughts_have_an_end() {
    let arguments = ["--max-model-len", "2048", "--reasoning-parser", "deepseek_r1"];
    let guesses = r#"{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}"#;
    let servers = [
        Server::start(&arguments),
        Server::start(&[&arguments[..], &["-tp", "2", "--speculative-config", guesses]].concat()),
    ];
    let mut sung = Vec::new();
    for server in &servers {
        sung.push(song(server));
        thoughts(server);
        let ended = server.metric_where("vllm:request_success_total", "finished_reason=\"repetition\"");
        assert_eq!(ended, Some(2.0));
    }
    assert_eq!(sung[0], sung[1]);
    for server in servers {
        server.wait_idle();
        assert!(server.stop().success());
    }
}

/// The tokens of a text that goes round in circles, checked to end where it has done so for the third time.
fn song(server: &Server) -> Vec<u64> {
    let sing = |fields: Value| {
        let mut body = json!({"prompt": "la la la la la la la la", "temperature": 0, "max_tokens": 200,
            "ignore_eos": true, "return_token_ids": true});
        body.as_object_mut()
            .expect("an object")
            .extend(fields.as_object().expect("an object").clone());
        let choice = complete(server, &body)[0].clone();
        let tokens: Vec<u64> = serde_json::from_value(choice["token_ids"].clone()).expect("token ids");
        (tokens, choice)
    };
    let (endless, _) = sing(json!({}));
    let circles = json!({"max_pattern_size": 60, "min_pattern_size": 2, "min_count": 3});
    let repeats = |tokens: &[u64]| {
        (2..=60).any(|size| {
            let pattern = tokens
                .len()
                .checked_sub(size)
                .map(|first| tokens[first..].repeat(3));
            pattern.is_some_and(|pattern| tokens.ends_with(&pattern))
        })
    };
    let ends = |min_tokens: usize| {
        let mut lengths = min_tokens.max(1)..=endless.len();
        lengths
            .find(|&length| repeats(&endless[..length]))
            .expect("circles")
    };
    for min_tokens in [0, 150] {
        let (tokens, choice) = sing(json!({"repetition_detection": circles, "min_tokens": min_tokens}));
        assert_eq!(choice["finish_reason"], "repetition", "{choice}");
        assert_eq!(choice["stop_reason"], "repetition_detected");
        assert_eq!(tokens, endless[..ends(min_tokens)]);
    }
    let (free, choice) = sing(json!({"repetition_detection": {"max_pattern_size": 0}}));
    assert_eq!(
        (free, choice["finish_reason"].as_str()),
        (endless.clone(), Some("length"))
    );
    let body = json!({"prompt": "la", "repetition_detection": {"max_pattern_size": 513, "min_count": 2}});
    let reply = http::post(&server.address, COMPLETIONS, &body).expect("a reply");
    assert_eq!(reply.status, 400);
    assert_eq!(
        reply.json()["error"]["param"],
        "repetition_detection.max_pattern_size"
    );
    endless
}

/// The model does not reason of its own accord, but it is told that it has begun to.
fn thoughts(server: &Server) {
    let think = |fields: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Why is the sky blue?"},
            {"role": "assistant", "content": "<think>\nWell,"}], "temperature": 0, "max_tokens": 60,
            "ignore_eos": true, "add_generation_prompt": false, "continue_final_message": true});
        body.as_object_mut()
            .expect("an object")
            .extend(fields.as_object().expect("an object").clone());
        let reply = http::post(&server.address, "/v1/chat/completions", &body).expect("a reply");
        assert_eq!(reply.status, 200, "{}", reply.text());
        let message = reply.json()["choices"][0]["message"].clone();
        let text = |field: &str| message[field].as_str().unwrap_or_default().to_owned();
        (text("reasoning"), text("content"))
    };
    let (endless, nothing) = think(json!({}));
    assert_eq!(nothing, "", "{endless}");
    for budget in [0, 1, 12] {
        let (reasoning, content) = think(json!({"thinking_token_budget": budget}));
        assert!(
            endless.starts_with(&reasoning) && !content.is_empty(),
            "{reasoning}|{content}"
        );
        let body = json!({"prompt": reasoning, "add_special_tokens": false});
        let counted = http::post(&server.address, "/tokenize", &body).expect("a reply");
        assert_eq!(counted.json()["count"], budget, "{reasoning}");
    }
    let (reasoning, answer) = think(json!({"thinking_token_budget": 6, "guided_regex": "(yes|no)"}));
    assert!(
        endless.starts_with(&reasoning) && ["yes", "no"].contains(&answer.as_str()),
        "{answer}"
    );
    assert_eq!(think(json!({"thinking_token_budget": -1})), (endless, nothing));
}

#[test]
fn guesses_change_nothing_but_the_number_of_steps() {
    let answers = |extra: &[&str]| {
        let arguments = [
            &["-tp", "2", "--max-model-len", "2048", "--max-num-seqs", "8"],
            extra,
        ]
        .concat();
        let server = Server::start(&arguments);
        let before = steps(&server);
        let answers: Vec<Value> = requests().iter().map(|body| complete(&server, body)).collect();
        let steps = steps(&server) - before;
        // Together in one batch as well.
        let target = &server;
        let together: Vec<Value> = std::thread::scope(|scope| {
            let requests = requests().into_iter();
            let asked: Vec<_> = requests
                .map(|body| scope.spawn(move || complete(target, &body)))
                .collect();
            asked
                .into_iter()
                .map(|asked| asked.join().expect("an answer"))
                .collect()
        });
        assert_eq!(together, answers);
        server.wait_idle();
        let accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total");
        let guessed = server.metric("vllm:spec_decode_num_draft_tokens_total");
        assert!(server.stop().success());
        (
            answers,
            steps,
            accepted.expect("counted"),
            guessed.expect("counted"),
        )
    };
    let config =
        r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}"#;
    let (plain, plain_steps, none, _) = answers(&[]);
    let (guessed, guessed_steps, accepted, drafts) = answers(&["--speculative-config", config]);
    assert_eq!(guessed, plain);
    assert_eq!(none, 0.0);
    assert!(accepted > 50.0 && accepted <= drafts, "{accepted} of {drafts}");
    assert!(
        guessed_steps < 0.8 * plain_steps,
        "{guessed_steps} steps where there were {plain_steps}"
    );
}

fn steps(server: &Server) -> f64 {
    server.metric("phalanx_step_seconds_count").expect("counted")
}

#[test]
fn full_queues_and_deadlines_are_told_at_once() {
    let server = Server::start(&[
        "--max-num-seqs",
        "1",
        "--max-num-queued-reqs",
        "1",
        "--max-model-len",
        "4096",
    ]);
    let endless =
        json!({"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": true, "stream": true});
    let running = http::open(&server.address, COMPLETIONS, &endless).expect("a stream");
    assert_eq!(running.status, 200);
    let short = json!({"prompt": "Hello", "max_tokens": 4});
    a_deadline_ends_what_waits(&server, &short);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| complete(&server, &short));
        let waits = || server.metric("vllm:num_requests_waiting") == Some(1.0);
        eventually("one that waits", Duration::from_secs(20), waits);
        let asked = Instant::now();
        let refused = http::post(&server.address, COMPLETIONS, &short).expect("a reply");
        assert!(asked.elapsed() < Duration::from_secs(1));
        assert_eq!(refused.status, 429, "{}", refused.text());
        assert_eq!(refused.header("retry-after"), Some("1"));
        assert_eq!(refused.json()["error"]["code"], "queue_full");
        let label = r#"reason="max_num_queued_reqs""#;
        assert_eq!(
            server.metric_where("vllm:admission_rejections_total", label),
            Some(1.0)
        );
        drop(running);
        waiting.join().expect("its turn came");
    });
    a_deadline_ends_what_runs(&server);
    let refused = http::post(
        &server.address,
        COMPLETIONS,
        &json!({"prompt": "x", "timeout": 0}),
    )
    .expect("a reply");
    assert_eq!(
        (refused.status, &refused.json()["error"]["param"]),
        (400, &json!("timeout"))
    );
    server.wait_idle();
    assert!(server.stop().success());
}

fn a_deadline_ends_what_waits(server: &Server, short: &Value) {
    let mut hurried = short.clone();
    hurried["timeout"] = 0.2.into();
    let asked = Instant::now();
    let late = http::post(&server.address, COMPLETIONS, &hurried).expect("a reply");
    assert_eq!(late.status, 408, "{}", late.text());
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert_eq!(late.json()["error"]["code"], "deadline_exceeded");
    let waits = || server.metric("vllm:num_requests_waiting") == Some(0.0);
    eventually("its place in the queue is free", Duration::from_secs(10), waits);
}

fn a_deadline_ends_what_runs(server: &Server) {
    let mut body = chat("Tell me a long story.");
    body["max_tokens"] = 3000.into();
    body["ignore_eos"] = true.into();
    body["timeout"] = 1.into();
    body["stream"] = true.into();
    let mut stream = http::open(&server.address, "/v1/chat/completions", &body).expect("a stream");
    let mut events = Vec::new();
    while let Some(event) = stream.next_event().expect("an event") {
        events.push(event);
    }
    assert!(events.len() > 1, "tokens came before the deadline");
    let failed = events.iter().find(|event| event.contains("deadline_exceeded"));
    assert!(failed.is_some(), "{:?}", events.last());
    server.wait_idle();
}

#[test]
fn the_context_is_made_to_fit_and_what_does_not_is_refused_with_the_number() {
    let server = Server::start(&["--max-model-len", "auto", "--num-gpu-blocks-override", "20"]);
    let models = http::get(&server.address, "/v1/models").expect("models").json();
    assert_eq!(models["data"][0]["max_model_len"], 320);
    let body = json!({"prompt": "Hello", "max_tokens": 1000});
    let refused = http::post(&server.address, COMPLETIONS, &body).expect("a reply");
    assert_eq!(refused.status, 400);
    let error = &refused.json()["error"];
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("context_length_exceeded"), &json!("max_tokens"))
    );
    assert!(
        error["message"].as_str().expect("text").contains("320"),
        "{error}"
    );
    complete(
        &server,
        &json!({"prompt": "Hello", "max_tokens": 300, "ignore_eos": true}),
    );
    assert!(server.stop().success());
}

#[test]
fn indexers_outside_hear_of_cached_blocks_and_can_compute_their_names() {
    let (endpoint, replay) = (free_port(), free_port());
    let config = json!({
        "enable_kv_cache_events": true,
        "publisher": "zmq",
        "endpoint": format!("tcp://*:{endpoint}"),
        "replay_endpoint": format!("tcp://*:{replay}"),
        "topic": "kv-events",
    });
    let server = Server::start(&[
        "--kv-events-config",
        &config.to_string(),
        "--prefix-caching-hash-algo",
        "sha256_cbor",
        "--max-model-len",
        "256",
        "--num-gpu-blocks-override",
        "20",
    ]);
    let ports = [endpoint.to_string(), replay.to_string()];
    python::run("kv_events.py", &[&server.address, &ports[0], &ports[1]]);
    assert!(server.stop().success());
}
