//! Replicas behind one gateway, killed under their streams.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use phalanx_tests::{
    fleet::{Gateway, Replica},
    http,
    processes::eventually,
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const STREAMS: usize = 32;
const MAX_TOKENS: u64 = 40;
const SOON: Duration = Duration::from_secs(30);

/// One start of the replicas for all of it: each part leaves them as the next needs them.
#[test]
fn streams_outlive_their_replica() {
    let (first, second) = (Replica::start(), Replica::start());
    let backends = format!("{},http://{}", first.address, second.address);
    let gateway = Gateway::start(&["--backend", &backends, "--routing-policy", "round_robin"]);
    gateway.wait_serving(2);
    a_name_is_as_good_as_addresses(&first);
    let undisturbed = play(&gateway, |_| {});
    let port = first.port();
    losing_one_changes_no_stream(&gateway, || drop(first), &undisturbed);
    let first = one_that_returns_is_used_again(&gateway, port);
    let port = second.port();
    losing_one_changes_no_stream(&gateway, || second.terminate(), &undisturbed);
    let second = one_that_returns_is_used_again(&gateway, port);
    without_any_streams_end_with_an_error(&gateway, [first, second]);
}

/// What a client gets of one stream, put together.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    /// Of each choice.
    texts: BTreeMap<u64, String>,
    reasons: BTreeMap<u64, String>,
    logprobs: Vec<Value>,
    usage: Value,
}

/// The request of stream `index`: greedy and sampled, of both routes, with all that a seam could disturb.
fn request(index: usize) -> (&'static str, Value) {
    let topic = ["the sea", "a horse", "the moon", "bread"][index / 8 % 4];
    let mut body = json!({
        "model": "demo", "stream": true, "max_tokens": MAX_TOKENS, "stream_options": {"include_usage": true},
        "ignore_eos": true, "temperature": 0,
    });
    let mut edit = |fields: Value| {
        for (key, value) in fields.as_object().expect("fields") {
            body[key] = value.clone();
        }
    };
    match index % 8 {
        0 => edit(json!({})),
        1 => edit(json!({"temperature": 0.9, "seed": index})),
        2 => edit(json!({"logprobs": true, "top_logprobs": 2})),
        3 => edit(
            json!({"temperature": 1, "seed": index, "n": 2, "logprobs": 1, "logprob_token_ids": [260, 5, 28]}),
        ),
        4 => edit(json!({"stop": [" and", "."], "min_tokens": 20, "ignore_eos": false})),
        5 => {
            edit(json!({"repetition_penalty": 1.3, "frequency_penalty": 0.5, "temperature": 0.7, "seed": 5}))
        }
        6 => edit(json!({"echo": true, "top_k": 20, "temperature": 0.8, "seed": 6})),
        _ => edit(json!({"temperature": 1})),
    }
    if index % 8 < 3 {
        body["messages"] = json!([{"role": "user", "content": format!("Write a poem about {topic} 🙂.")}]);
        (CHAT, body)
    } else {
        body["prompt"] = json!(format!("{index}. A story about {topic}:"));
        (COMPLETIONS, body)
    }
}

/// All streams at once; `meanwhile` is told of every event's number, and may do harm.
fn play(gateway: &Gateway, meanwhile: impl Fn(usize) + Sync) -> Vec<Outcome> {
    let events = AtomicUsize::new(0);
    let count = || meanwhile(events.fetch_add(1, Ordering::Relaxed));
    thread::scope(|scope| {
        let streams: Vec<_> = (0..STREAMS)
            .map(|index| scope.spawn(move || read(gateway, index, &count)))
            .collect();
        streams
            .into_iter()
            .map(|stream| stream.join().expect("a whole stream"))
            .collect()
    })
}

fn read(gateway: &Gateway, index: usize, count: &impl Fn()) -> Outcome {
    let (path, body) = request(index);
    let mut stream = http::open(&gateway.address, path, &body).expect("a stream");
    assert_eq!(stream.status, 200);
    let mut outcome = Outcome::default();
    while let Some(data) = stream.next_event().expect("the stream is not cut") {
        if data == "[DONE]" {
            return outcome;
        }
        let event: Value = serde_json::from_str(&data).expect("JSON");
        assert!(event["error"].is_null(), "stream {index}: {event}");
        note(&mut outcome, &event);
        count();
    }
    panic!("stream {index} ended without [DONE]");
}

fn note(outcome: &mut Outcome, event: &Value) {
    if !event["usage"].is_null() {
        outcome.usage = event["usage"].clone();
    }
    for choice in event["choices"].as_array().expect("choices") {
        let index = choice["index"].as_u64().expect("an index");
        let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
        let whole = outcome.texts.entry(index).or_default();
        whole.push_str(text.unwrap_or_default());
        if let Some(reason) = choice["finish_reason"].as_str() {
            let before = outcome.reasons.insert(index, reason.to_owned());
            assert_eq!(before, None, "one end of each choice");
        }
        // Of several choices the order is that of time.
        if index == 0 && !choice["logprobs"].is_null() {
            let lists = &choice["logprobs"];
            let content = lists["content"].as_array().cloned();
            let tokens = || lists["text_offset"].as_array().cloned();
            outcome
                .logprobs
                .extend(content.or_else(tokens).unwrap_or_default());
        }
    }
}

/// `harm` ends one replica under its streams.
fn losing_one_changes_no_stream(gateway: &Gateway, harm: impl FnOnce() + Send, undisturbed: &[Outcome]) {
    let migrations = |outcome| gateway.metric("phalanx_gateway_migrations_total", outcome);
    let before = migrations("resumed");
    let harm = Mutex::new(Some(harm));
    // By then every stream has begun and none has ended.
    let disturbed = play(gateway, |event| {
        if event == STREAMS * MAX_TOKENS as usize / 4
            && let Some(harm) = harm.lock().expect("not poisoned").take()
        {
            harm();
        }
    });
    for (index, (got, expected)) in disturbed.iter().zip(undisturbed).enumerate() {
        let (_, body) = request(index);
        let n = body["n"].as_u64().unwrap_or(1) as usize;
        assert_eq!(got.reasons.len(), n, "stream {index}: every choice has ended");
        if index % 8 == 7 {
            // Without a seed each run draws its own, but the length is the same.
            assert_eq!(got.usage, expected.usage, "stream {index}");
            continue;
        }
        assert_eq!(got, expected, "stream {index}");
    }
    let moved = migrations("resumed") - before;
    assert!(
        moved >= STREAMS as f64 / 4.0,
        "only {moved} streams were on the replica that ended"
    );
    assert_eq!(migrations("failed"), 0.0);
    let health = http::get(&gateway.address, "/health").expect("a reply");
    assert_eq!((health.status, &health.json()["state"]), (200, &json!("ready")));
    assert_eq!(
        gateway
            .post(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 1}))
            .status,
        200
    );
}

fn one_that_returns_is_used_again(gateway: &Gateway, port: u16) -> Replica {
    let back = Replica::start_at(port);
    gateway.wait_serving(2);
    let name = "phalanx_gateway_backend_requests_total";
    let label = format!("backend=\"http://{}\",outcome=\"accepted\"", back.address);
    let before = gateway.metric(name, &label);
    eventually("a request for the replica that is back", SOON, || {
        let reply = gateway.post(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 1}));
        assert_eq!(reply.status, 200, "{}", reply.text());
        gateway.metric(name, &label) > before
    });
    // The coordinators' own metrics say whose they are.
    let label = format!("backend=\"http://{}\"", back.address);
    assert!(gateway.metric("vllm:generation_tokens_total", &label) > 0.0);
    back
}

fn without_any_streams_end_with_an_error(gateway: &Gateway, replicas: [Replica; 2]) {
    let body = json!({"prompt": "a", "stream": true, "ignore_eos": true, "max_tokens": 2000});
    let mut stream = http::open(&gateway.address, COMPLETIONS, &body).expect("a stream");
    for _ in 0..3 {
        stream.next_event().expect("an event").expect("not over");
    }
    drop(replicas);
    let mut last = Value::Null;
    while let Some(data) = stream.next_event().expect("the stream is not cut") {
        if data == "[DONE]" {
            break;
        }
        last = serde_json::from_str(&data).expect("JSON");
    }
    assert_eq!(last["error"]["code"], "unavailable", "{last}");
    for (path, body) in [
        (COMPLETIONS, json!({"prompt": "a"})),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "a"}], "stream": true}),
        ),
    ] {
        let reply = gateway.post(path, &body);
        assert_eq!((reply.status, reply.header("retry-after")), (503, Some("1")));
        assert_eq!(reply.json()["error"]["code"], "unavailable");
    }
    let health = http::get(&gateway.address, "/health").expect("a reply");
    assert_eq!(health.status, 503, "{}", health.text());
}

fn a_name_is_as_good_as_addresses(replica: &Replica) {
    let name = format!("localhost:{}", replica.port());
    let gateway = Gateway::start(&["--backend-dns", &name]);
    gateway.wait_serving(1);
    let reply = gateway.post(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 2}));
    assert_eq!(reply.status, 200, "{}", reply.text());
}
