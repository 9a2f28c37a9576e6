//! What comes out of a request: log-probabilities, token ids, echo and usage, through the whole cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use phalanx_tests::{http, python, server::Server};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// Longer than a step has tokens.
const PROMPT: &str = "The capital of France is Paris, and the capital of Italy is Rome. The quick brown fox jumps over \
                      the lazy dog, while the little girl who lived near the river walked slowly home in the rain.";

#[test]
fn outputs_are_reported_as_asked_for() {
    let server = Server::start(&[
        "-tp",
        "2",
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "16",
        "--max-num-batched-tokens",
        "24",
        "--max-logprobs",
        "7",
        "--enable-prompt-tokens-details",
    ]);
    prompts_are_scored_as_their_continuations_are(&server);
    cached_prompts_are_scored_alike(&server);
    an_echo_carries_the_prompts_logprobs(&server);
    a_chat_tells_of_its_prompt(&server);
    prompts_and_completions_are_numbered_through(&server);
    penalties_reach_back_beyond_a_thousand_tokens(&server);
    bad_requests_are_refused_at_once(&server);
    the_openai_client_reads_it_all(&server);
    let plain = listed_tokens_are_those_of_the_best(&server);
    bad_lists_are_refused(&server);
    server.wait_idle();
    assert!(server.stop().success());

    let guesses =
        r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}"#;
    let guessing = Server::start(&[
        "-tp",
        "2",
        "--max-model-len",
        "1024",
        "--max-logprobs",
        "7",
        "--speculative-config",
        guesses,
    ]);
    assert_eq!(listed_tokens_are_those_of_the_best(&guessing), plain);
    let accepted = guessing.metric("vllm:spec_decode_num_accepted_tokens_total");
    assert!(accepted.is_some_and(|accepted| accepted > 0.0), "{accepted:?}");
    assert!(guessing.stop().success());
}

fn ask(server: &Server, path: &str, body: &Value) -> Value {
    let reply = http::post(&server.address, path, body).expect("a reply");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()
}

fn scored_prompt(server: &Server, prompt: &Value) -> Value {
    let body = json!({
        "model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 5,
        "return_token_ids": true,
    });
    let mut reply = ask(server, COMPLETIONS, &body);
    reply["choices"][0].take()
}

/// The oracle: what the model says of the next token of every prefix, asked for one by one.
fn prompts_are_scored_as_their_continuations_are(server: &Server) {
    let choice = scored_prompt(server, &json!(PROMPT));
    let tokens = choice["prompt_token_ids"].as_array().expect("token ids").clone();
    let scored = choice["prompt_logprobs"].as_array().expect("a list");
    assert!(tokens.len() > 30, "more than one step: {}", tokens.len());
    assert_eq!(scored.len(), tokens.len());
    assert!(scored[0].is_null());
    for at in [1, 2, 23, 24, 25, tokens.len() - 1] {
        let body = json!({
            "model": "demo", "prompt": tokens[..at], "max_tokens": 1, "temperature": 0, "logprobs": 5,
            "return_tokens_as_token_ids": true,
        });
        let reply = ask(server, COMPLETIONS, &body);
        let top = reply["choices"][0]["logprobs"]["top_logprobs"][0].clone();
        let position = scored[at].as_object().expect("an object");
        let known = &position[&tokens[at].to_string()];
        assert!(known["rank"].as_u64().is_some_and(|rank| rank >= 1), "{known}");
        assert!(known["decoded_token"].is_string());
        for (name, logprob) in top.as_object().expect("alternatives") {
            let id = name
                .strip_prefix("token_id:")
                .expect("the form that was asked for");
            assert_eq!(position[id]["logprob"], *logprob, "token {at}, alternative {id}");
        }
    }
}

fn cached_prompts_are_scored_alike(server: &Server) {
    let warm = json!({"model": "demo", "prompt": PROMPT, "max_tokens": 1, "temperature": 0});
    ask(server, COMPLETIONS, &warm);
    let cached = ask(server, COMPLETIONS, &warm)["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    assert!(cached.as_u64().is_some_and(|cached| cached > 16), "{cached}");
    let first = scored_prompt(server, &json!(PROMPT));
    assert_eq!(scored_prompt(server, &json!(PROMPT)), first);
    assert_eq!(
        first["prompt_logprobs"][1]
            .as_object()
            .map(serde_json::Map::is_empty),
        Some(false)
    );
}

fn an_echo_carries_the_prompts_logprobs(server: &Server) {
    let mut body = json!({
        "model": "demo", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 1,
        "prompt_logprobs": 1,
    });
    let choice = ask(server, COMPLETIONS, &body)["choices"][0].take();
    let text = choice["text"].as_str().expect("text");
    assert!(text.starts_with(PROMPT) && text.len() > PROMPT.len());
    let list = |name: &str| choice["logprobs"][name].as_array().expect("a list").clone();
    let (tokens, logprobs, top) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    let scored = choice["prompt_logprobs"].as_array().expect("a list");
    assert_eq!(tokens.len(), scored.len() + 3);
    assert!(logprobs[0].is_null() && top[0].is_null());
    let joined: String = tokens.iter().filter_map(Value::as_str).collect();
    assert_eq!(joined, text);
    for (token, offset) in tokens.iter().zip(list("text_offset")) {
        let rest = &text[offset.as_u64().expect("an offset") as usize..];
        assert!(
            rest.starts_with(token.as_str().expect("text")),
            "{token} at {offset}"
        );
    }
    for (scored, logprob) in scored.iter().zip(&logprobs).skip(1) {
        let known = scored.as_object().expect("an object");
        assert!(known.values().any(|known| known["logprob"] == *logprob));
    }

    body["max_tokens"] = 0.into();
    let reply = ask(server, COMPLETIONS, &body);
    let alone = &reply["choices"][0];
    assert_eq!(
        (alone["text"].as_str(), &alone["finish_reason"]),
        (Some(PROMPT), &json!("length"))
    );
    assert_eq!(
        alone["logprobs"]["token_logprobs"],
        json!(logprobs[..scored.len()])
    );
    assert_eq!(reply["usage"]["completion_tokens"], 0);
}

fn a_chat_tells_of_its_prompt(server: &Server) {
    let body = json!({
        "model": "demo", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4, "temperature": 0,
        "logprobs": true, "top_logprobs": 0, "prompt_logprobs": 0, "return_token_ids": true,
    });
    let reply = ask(server, CHAT, &body);
    let prompt = reply["prompt_token_ids"].as_array().expect("token ids");
    assert_eq!(
        prompt.len() as u64,
        reply["usage"]["prompt_tokens"].as_u64().expect("a count")
    );
    let scored = reply["prompt_logprobs"].as_array().expect("a list");
    assert_eq!(scored.len(), prompt.len());
    let single = |position: &Value| position.as_object().is_some_and(|known| known.len() == 1);
    assert!(scored[0].is_null() && scored[1..].iter().all(single));
    let choice = &reply["choices"][0];
    let content = choice["logprobs"]["content"].as_array().expect("a list");
    assert_eq!(choice["token_ids"].as_array().map(Vec::len), Some(content.len()));
    assert!(content.iter().all(|token| token["top_logprobs"] == json!([])));
}

fn prompts_and_completions_are_numbered_through(server: &Server) {
    let body = json!({
        "model": "demo", "prompt": [[9, 8, 7], [9, 8]], "n": 2, "max_tokens": 2, "temperature": 1.0, "seed": 5,
        "return_token_ids": true, "echo": true,
    });
    let reply = ask(server, COMPLETIONS, &body);
    let choices = reply["choices"].as_array().expect("choices");
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        let expected = if index < 2 {
            json!([9, 8, 7])
        } else {
            json!([9, 8])
        };
        assert_eq!(choice["prompt_token_ids"], expected);
    }
    assert_eq!(choices.len(), 4);
    assert_eq!(reply["usage"]["prompt_tokens"], 5);
}

/// More distinct tokens than a row once had room for: the first of them still counts.
fn penalties_reach_back_beyond_a_thousand_tokens(server: &Server) {
    let chosen = |prompt: &[u32], penalty: f64| {
        let body = json!({
            "model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "repetition_penalty": penalty,
            "return_token_ids": true,
        });
        ask(server, COMPLETIONS, &body)["choices"][0]["token_ids"][0].clone()
    };
    let after = |first: u32| -> Vec<u32> { std::iter::once(first).chain(1000..2000).collect() };
    // A prompt that begins with the token that the model would say after it.
    let mut first = 100;
    for _ in 0..8 {
        let said = chosen(&after(first), 1.0).as_u64().expect("a token") as u32;
        if said == first {
            assert_ne!(chosen(&after(first), 2.0), first);
            return;
        }
        first = said;
    }
    panic!("no prompt begins with what follows it");
}

/// Names and log-probabilities beside each token, in their order.
type Listed = Vec<Vec<(String, Value)>>;

/// A text that goes round in circles, so that there is something to guess.
const CIRCLES: &str = "one two three four, one two three four, one two three four, one two three";
const LISTED_TOKENS: u32 = 12;

/// What is reported of a list that holds whatever is ever among the best. Alike in streams and in whole replies, and of
/// both routes.
fn listed_tokens_are_those_of_the_best(server: &Server) -> [Listed; 2] {
    let fixed = json!({
        "model": "demo", "max_tokens": LISTED_TOKENS, "temperature": 0, "ignore_eos": true, "repetition_penalty": 1.01,
        "return_tokens_as_token_ids": true, "return_token_ids": true,
    });
    let completion = json!({"prompt": CIRCLES});
    let chat = json!({"messages": [{"role": "user", "content": CIRCLES}]});
    let (seven, none) = (json!({"logprobs": 7}), json!({"logprobs": 0}));
    let chats_seven = json!({"logprobs": true, "top_logprobs": 7});
    let routes = [
        (COMPLETIONS, completion, seven, none),
        (CHAT, chat, chats_seven, json!({"logprobs": true})),
    ];
    routes.map(|(path, prompt, best, list)| {
        let body = with(&with(&fixed, &prompt), &best);
        let reply = ask(server, path, &body)["choices"][0].take();
        let (tokens, best) = (ids_of(&reply), reported(path, &reply["logprobs"]));
        assert_eq!(best.len(), LISTED_TOKENS as usize);

        // From the greatest id to the smallest, and with some that hardly are among the best.
        let ids = best.iter().flatten().map(|(name, _)| id_of(name));
        let ids: BTreeSet<u64> = ids.chain([0, 1, 49_151]).collect();
        let ids: Vec<u64> = ids.into_iter().rev().collect();
        let body = with(&with(&fixed, &prompt), &list);
        let body = with(&body, &json!({"logprob_token_ids": ids}));
        let reply = ask(server, path, &body)["choices"][0].take();
        assert_eq!(ids_of(&reply), tokens, "a list draws nothing");
        let listed = reported(path, &reply["logprobs"]);
        assert_eq!(listed, streamed(server, path, &body), "{path}");
        for ((best, listed), token) in best.iter().zip(&listed).zip(tokens) {
            let others = ids.iter().copied().filter(|&id| id != token);
            let mut expected: Vec<u64> = std::iter::once(token).chain(others).collect();
            let mut told: Vec<u64> = listed.iter().map(|(name, _)| id_of(name)).collect();
            if path == COMPLETIONS {
                // An object, which has no order.
                expected.sort_unstable();
                told.sort_unstable();
            }
            assert_eq!(told, expected);
            assert_agrees(best, listed);
        }
        listed
    })
}

/// To the digit where a token is among the best; the others are less likely than all of these.
fn assert_agrees(best: &[(String, Value)], listed: &[(String, Value)]) {
    let best: BTreeMap<&str, &Value> = best.iter().map(|(name, value)| (name.as_str(), value)).collect();
    let least = best.values().filter_map(|value| value.as_f64());
    let least = least.fold(0.0, f64::min);
    for (name, value) in listed {
        match best.get(name.as_str()) {
            Some(expected) => assert_eq!(value, *expected, "{name}"),
            None => assert!(
                value.as_f64().is_some_and(|value| value <= least),
                "{name}: {value}"
            ),
        }
    }
}

/// `body` with more fields.
fn with(body: &Value, fields: &Value) -> Value {
    let mut body = body.clone();
    let fields = fields.as_object().expect("fields").clone();
    body.as_object_mut().expect("an object").extend(fields);
    body
}

fn ids_of(choice: &Value) -> Vec<u64> {
    let ids = choice["token_ids"].as_array().expect("token ids");
    ids.iter().filter_map(Value::as_u64).collect()
}

fn id_of(name: &str) -> u64 {
    let id = name.strip_prefix("token_id:").expect("named by its id");
    id.parse().expect("a number")
}

/// What a reply's `logprobs` say beside each token.
fn reported(path: &str, logprobs: &Value) -> Listed {
    if path == COMPLETIONS {
        let tops = logprobs["top_logprobs"].as_array().expect("a list");
        let entries = |top: &Value| top.as_object().expect("an object").clone().into_iter().collect();
        return tops.iter().map(entries).collect();
    }
    let content = logprobs["content"].as_array().expect("a list");
    let entry = |entry: &Value| {
        let name = entry["token"].as_str().expect("a name");
        (name.to_owned(), entry["logprob"].clone())
    };
    let tops = content
        .iter()
        .map(|token| token["top_logprobs"].as_array().expect("a list"));
    tops.map(|top| top.iter().map(entry).collect()).collect()
}

/// The same of a stream's pieces, put together.
fn streamed(server: &Server, path: &str, body: &Value) -> Listed {
    let mut body = body.clone();
    body["stream"] = true.into();
    let mut stream = http::open(&server.address, path, &body).expect("a stream");
    let mut all = Vec::new();
    while let Some(data) = stream.next_event().expect("an event") {
        if data == "[DONE]" {
            break;
        }
        let event: Value = serde_json::from_str(&data).expect("JSON");
        let logprobs = &event["choices"][0]["logprobs"];
        if !logprobs.is_null() {
            all.extend(reported(path, logprobs));
        }
    }
    all
}

fn bad_lists_are_refused(server: &Server) {
    let refused = |path: &str, body: Value| {
        let reply = http::post(&server.address, path, &body).expect("a reply");
        assert_eq!(reply.status, 400, "{}", reply.text());
        let error = reply.json()["error"].take();
        assert!(error["code"].is_string(), "{error}");
        let text = |field: &str| error[field].as_str().expect("a text").to_owned();
        (text("param"), text("message"))
    };
    let completion = json!({"model": "demo", "prompt": "hi", "max_tokens": 2});
    let chat = json!({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    for (path, body, on) in [(COMPLETIONS, completion, json!(0)), (CHAT, chat, json!(true))] {
        for (fields, param, part) in [
            (
                json!({"logprobs": on, "logprob_token_ids": [5, 49_152]}),
                "logprob_token_ids",
                "49152",
            ),
            (
                json!({"logprobs": on, "logprob_token_ids": vec![5; 129]}),
                "logprob_token_ids",
                "128",
            ),
            (
                json!({"logprobs": on, "logprob_token_ids": [5, "a"]}),
                "logprob_token_ids[1]",
                "",
            ),
            (json!({"logprob_token_ids": [5]}), "logprob_token_ids", "logprobs"),
        ] {
            let (named, message) = refused(path, with(&body, &fields));
            assert_eq!(named, param, "{message}");
            assert!(message.contains(part), "{message}");
        }
        let nothing = with(&body, &json!({"logprob_token_ids": []}));
        assert!(ask(server, path, &nothing)["choices"][0]["logprobs"].is_null());
    }
    let tokens =
        json!({"token_ids": [5, 6], "sampling_params": {"logprob_token_ids": [7, 5], "max_tokens": 2}});
    let reply = ask(server, "/inference/v1/generate", &tokens);
    let content = reply["choices"][0]["logprobs"]["content"]
        .as_array()
        .expect("a list");
    assert!(
        content.len() == 2
            && content
                .iter()
                .all(|token| token["top_logprobs"][1]["token"] == "token_id:7")
    );
}

fn bad_requests_are_refused_at_once(server: &Server) {
    let with = |field: &str, value: Value| {
        let mut body = json!({"model": "demo", "prompt": "hi", "max_tokens": 4});
        body[field] = value;
        body
    };
    let cases = [
        (with("logprobs", json!(8)), "logprobs", "7 (--max-logprobs)"),
        (
            with("prompt_logprobs", json!(8)),
            "prompt_logprobs",
            "7 (--max-logprobs)",
        ),
        (with("logprobs", json!(-1)), "logprobs", ""),
        (with("n", json!(1_000_000)), "n", "128"),
        (with("max_tokens", json!(4_000_000_000_u32)), "max_tokens", "1024"),
        (with("max_tokens", json!(0)), "max_tokens", ""),
        (with("stop", json!(vec!["a"; 100])), "stop", "64"),
        (with("temperature", json!("NaN")), "temperature", ""),
        (with("temperature", json!(-1)), "temperature", ""),
        (with("prompt", json!("")), "prompt", "empty"),
        (with("prompt", json!([])), "prompt", ""),
        (with("prompt", json!("word ".repeat(40_000))), "prompt", "1024"),
        (
            with("truncate_prompt_tokens", json!(0)),
            "truncate_prompt_tokens",
            "at least 1",
        ),
        (
            with("truncate_prompt_tokens", json!(4096)),
            "truncate_prompt_tokens",
            "1024",
        ),
    ];
    for (body, param, part) in cases {
        let begun = Instant::now();
        let reply = http::post(&server.address, COMPLETIONS, &body).expect("a reply");
        assert!(
            begun.elapsed() < Duration::from_secs(1),
            "{param} took {:?}",
            begun.elapsed()
        );
        assert_eq!(reply.status, 400, "{param}: {}", reply.text());
        let error = reply.json()["error"].take();
        assert_eq!(error["param"], param, "{error}");
        assert!(error["code"].is_string());
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(part), "{message}");
    }
    let chat = json!({
        "model": "demo", "messages": [{"role": "user", "content": "hi"}], "logprobs": true, "top_logprobs": 8,
    });
    let reply = http::post(&server.address, CHAT, &chat).expect("a reply");
    assert_eq!(
        (reply.status, &reply.json()["error"]["param"]),
        (400, &json!("top_logprobs"))
    );
    let reply =
        http::post_bytes(&server.address, COMPLETIONS, b"{\"prompt\": \"\xff\xfe\"}").expect("a reply");
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.json()["error"]["code"].is_string());
    let nan = http::post_bytes(
        &server.address,
        COMPLETIONS,
        br#"{"prompt": "a", "temperature": NaN}"#,
    );
    assert_eq!(nan.expect("a reply").status, 400);
}

fn the_openai_client_reads_it_all(server: &Server) {
    python::run("outputs_client.py", &[&format!("http://{}/v1", server.address)]);
}

#[test]
fn defaults_are_the_operators() {
    let server = Server::start(&[
        "--max-model-len",
        "512",
        "--override-generation-config",
        r#"{"temperature": 0, "max_new_tokens": 3}"#,
        "--enable-force-include-usage",
        "--return-tokens-as-token-ids",
    ]);
    let body = json!({"model": "demo", "prompt": "Once upon a time", "max_tokens": null, "logprobs": 0});
    let first = ask(&server, COMPLETIONS, &body);
    assert_eq!(first["usage"]["completion_tokens"], 3);
    assert_eq!(
        ask(&server, COMPLETIONS, &body)["choices"],
        first["choices"],
        "greedy by default"
    );
    let name = first["choices"][0]["logprobs"]["tokens"][0]
        .as_str()
        .expect("a name")
        .to_owned();
    assert!(name.starts_with("token_id:"), "{name}");

    let mut streamed = body;
    streamed["stream"] = true.into();
    let mut stream = http::open(&server.address, COMPLETIONS, &streamed).expect("a stream");
    let mut last = Value::Null;
    while let Some(data) = stream.next_event().expect("an event") {
        if data != "[DONE]" {
            last = serde_json::from_str(&data).expect("JSON");
        }
    }
    assert_eq!(
        (&last["choices"], &last["usage"]["completion_tokens"]),
        (&json!([]), &json!(3))
    );
    assert!(server.stop().success());
}
