//! Structured outputs on the real model: whatever it would rather say, what comes out is of the language asked for.

use std::{
    thread,
    time::{Duration, Instant},
};

use phalanx_tests::{
    http,
    server::{Server, chat},
};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Two clusters, of one rank and of two: every answer is checked, and must be the same text from both.
#[test]
fn completions_are_of_the_language_asked_for() {
    let clusters = ["1", "2"].map(|ranks| Server::start(&["-tp", ranks, "--max-model-len", "2048"]));
    json_follows_its_schema(&clusters);
    every_kind_holds(&clusters);
    the_older_spelling_holds(&clusters);
    tags_stand_in_free_text(&clusters);
    token_lists_and_words_hold(&clusters);
    stops_and_lengths_go_together_with_grammars(&clusters);
    let [_, server] = &clusters;
    streams_are_the_same_text(server);
    completions_of_one_prompt_differ_and_hold(server);
    many_at_once_keep_apart(server);
    what_cannot_be_compiled_is_refused(server);
    what_takes_long_to_compile_is_answered_soon(server);
    other_routes_hold_as_well(server);
    for server in clusters {
        server.wait_idle();
        assert!(server.stop().success());
    }
}

fn post(server: &Server, path: &str, body: &Value) -> Value {
    let reply = http::post(&server.address, path, body).expect("a reply");
    assert_eq!(reply.status, 200, "{body}: {}", reply.text());
    reply.json()["choices"][0].clone()
}

/// Text and finish reason, which all clusters agree on.
fn ask(clusters: &[Server], path: &str, body: &Value) -> (String, String) {
    let mut answers = clusters.iter().map(|server| {
        let choice = post(server, path, body);
        let content = if path == CHAT {
            &choice["message"]["content"]
        } else {
            &choice["text"]
        };
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        (text(content), text(&choice["finish_reason"]))
    });
    let first = answers.next().expect("a cluster");
    for other in answers {
        assert_eq!(first, other, "{body}");
    }
    first
}

fn prompt(text: &str, fields: Value) -> Value {
    let mut body = json!({"prompt": text, "temperature": 0, "max_tokens": 200});
    merge(&mut body, fields);
    body
}

fn merge(body: &mut Value, fields: Value) {
    let Value::Object(fields) = fields else {
        panic!("fields")
    };
    body.as_object_mut().expect("an object").extend(fields);
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 1, "maximum": 120},
            "colour": {"enum": ["red", "green"]},
            "pets": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}$"}, "maxItems": 3},
            "home": {"$ref": "#/$defs/home"}
        },
        "required": ["name", "age", "colour", "pets", "home"],
        "additionalProperties": false,
        "$defs": {"home": {"type": ["object"], "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"], "additionalProperties": false}}
    })
}

#[track_caller]
fn assert_person(text: &str) {
    let person: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let fields = person.as_object().expect("an object");
    assert_eq!(fields.len(), 5, "{text}");
    assert!(
        person["name"].as_str().expect("a string").chars().count() <= 24,
        "{text}"
    );
    assert!(
        (1..=120).contains(&person["age"].as_i64().expect("an integer")),
        "{text}"
    );
    assert!(
        ["red", "green"].contains(&person["colour"].as_str().expect("a string")),
        "{text}"
    );
    let pets = person["pets"].as_array().expect("a list");
    let is_pet = |pet: &Value| {
        let pet = pet.as_str().unwrap_or_default();
        (1..=8).contains(&pet.len()) && pet.bytes().all(|byte| byte.is_ascii_lowercase())
    };
    assert!(pets.len() <= 3 && pets.iter().all(is_pet), "{text}");
    assert!(person["home"]["city"].is_string(), "{text}");
}

fn json_follows_its_schema(clusters: &[Server]) {
    let mut body = chat("Describe a person as JSON.");
    body["max_tokens"] = 400.into();
    body["response_format"] =
        json!({"type": "json_schema", "json_schema": {"name": "person", "strict": true, "schema": person()}});
    let (text, reason) = ask(clusters, CHAT, &body);
    assert_eq!(reason, "stop", "{text}");
    assert_person(&text);
    // Drawn, with filters that look at what the mask leaves, and with log-probabilities.
    for seed in 1..4 {
        merge(
            &mut body,
            json!({"temperature": 1.2, "top_p": 0.95, "top_k": 40, "seed": seed, "logprobs": true, "top_logprobs": 2}),
        );
        let (text, reason) = ask(clusters, CHAT, &body);
        assert_eq!(reason, "stop", "{text}");
        assert_person(&text);
    }
    let fields = json!({"structured_outputs": {"json": person(), "disable_any_whitespace": true}});
    let (text, _) = ask(clusters, COMPLETIONS, &prompt("A person:", fields));
    assert_person(&text);
    let compact = serde_json::from_str::<Value>(&text).expect("JSON").to_string();
    assert_eq!(compact.len(), text.len(), "no white space: {text}");
}

fn every_kind_holds(clusters: &[Server]) {
    let structured = |constraint: Value| {
        let mut body = chat("Answer in one word or number.");
        body["structured_outputs"] = constraint;
        let (text, reason) = ask(clusters, CHAT, &body);
        assert_eq!(reason, "stop", "{body}: {text}");
        text
    };
    let text = structured(json!({"regex": "[0-9]{3}-[0-9]{4}(/[a-z])?"}));
    let (left, right) = text.split_once('-').expect("a dash");
    assert!(
        left.len() == 3 && left.bytes().all(|byte| byte.is_ascii_digit()),
        "{text}"
    );
    assert!(right.len() == 4 || right.len() == 6, "{text}");
    let choices = ["crimson", "ultramarine \"blue\"", "vert/green"];
    let text = structured(json!({"choice": choices}));
    assert!(choices.contains(&text.as_str()), "{text}");
    let text = structured(json!({"grammar": "start: \"<\" WORD (\",\" WORD)~2 \">\"\nWORD: /[a-z]{2,6}/"}));
    let words: Vec<&str> = text.trim_matches(['<', '>']).split(',').collect();
    assert!(
        words.len() == 3 && words.iter().all(|word| (2..=6).contains(&word.len())),
        "{text}"
    );
    let ebnf = "root ::= \"SELECT \" column \" FROM \" table\ncolumn ::= \"name\" | \"age\"\ntable ::= \"people\" | \"pets\"";
    let text = structured(json!({"grammar": ebnf}));
    let words: Vec<&str> = text.split(' ').collect();
    assert!(
        matches!(words[..], ["SELECT", "name" | "age", "FROM", "people" | "pets"]),
        "{text}"
    );
    let mut body = chat("Reply with a JSON object that holds your name.");
    merge(
        &mut body,
        json!({"response_format": {"type": "json_object"}, "max_tokens": 300}),
    );
    let (text, _) = ask(clusters, CHAT, &body);
    assert!(text.starts_with('{'), "{text}");
    if let Ok(value) = serde_json::from_str::<Value>(&text) {
        assert!(value.is_object(), "{text}");
    }
}

fn the_older_spelling_holds(clusters: &[Server]) {
    let fields =
        json!({"guided_json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}});
    let (text, _) = ask(clusters, COMPLETIONS, &prompt("Flags:", fields));
    let flags: Vec<bool> = serde_json::from_str(&text).expect("flags");
    assert!((2..=4).contains(&flags.len()), "{text}");
    let (text, _) = ask(
        clusters,
        COMPLETIONS,
        &prompt("The year is", json!({"guided_regex": " (19|20)[0-9]{2}"})),
    );
    assert!(
        text.len() == 5 && text.trim_start().parse::<u32>().is_ok(),
        "{text:?}"
    );
    let (text, _) = ask(
        clusters,
        COMPLETIONS,
        &prompt("Yes or no?", json!({"guided_choice": ["Yes", "No"]})),
    );
    assert!(["Yes", "No"].contains(&text.as_str()), "{text}");
    let grammar = json!({"guided_grammar": "start: \"a\"~5"});
    assert_eq!(
        ask(clusters, COMPLETIONS, &prompt("x", grammar)),
        ("aaaaa".into(), "stop".into())
    );
}

fn tags_stand_in_free_text(clusters: &[Server]) {
    let mut body = chat("Call the tool.");
    body["response_format"] = json!({"type": "structural_tag", "format": {"type": "triggered_tags",
        "triggers": ["<call:"], "at_least_one": true, "stop_after_first": true, "tags": [
            {"type": "tag", "begin": "<call:sum>", "end": "</call>",
             "content": {"type": "json_schema", "json_schema": {"type": "object",
                 "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"], "additionalProperties": false}}}]}});
    let (text, reason) = ask(clusters, CHAT, &body);
    assert_eq!(reason, "stop", "{text}");
    let inner = text
        .strip_prefix("<call:sum>")
        .and_then(|rest| rest.strip_suffix("</call>"));
    let inner: Value = serde_json::from_str(inner.expect("a tag")).expect("JSON");
    assert!(inner["a"].is_u64(), "{text}");
    body["response_format"] = json!({"type": "structural_tag", "triggers": ["<call:"],
        "structures": [{"begin": "<call:sum>", "schema": {"type": "integer"}, "end": "</call>"}]});
    let (free, _) = ask(clusters, CHAT, &body);
    assert!(!free.is_empty() && !free.contains("<call:x"), "{free}");
}

fn token_lists_and_words_hold(clusters: &[Server]) {
    let listed = json!({"allowed_token_ids": [28, 33, 1000], "max_tokens": 12, "ignore_eos": true});
    for server in clusters {
        let mut body = prompt("1 2 3", listed.clone());
        body["logprobs"] = 0.into();
        let choice = post(server, COMPLETIONS, &body);
        let tokens = choice["logprobs"]["tokens"].as_array().expect("tokens").clone();
        let mut kinds: Vec<String> = tokens.iter().map(Value::to_string).collect();
        kinds.sort();
        kinds.dedup();
        assert!(tokens.len() == 12 && kinds.len() <= 3, "{choice}");
    }
    let free = prompt("The capital of France is", json!({"max_tokens": 8}));
    let (text, _) = ask(clusters, COMPLETIONS, &free);
    assert!(text.contains("Paris"), "{text}");
    let mut clean = free;
    clean["bad_words"] = json!(["Paris"]);
    let (text, _) = ask(clusters, COMPLETIONS, &clean);
    assert!(!text.contains("Paris"), "{text}");
}

fn stops_and_lengths_go_together_with_grammars(clusters: &[Server]) {
    let complete = |fields: Value| ask(clusters, COMPLETIONS, &prompt("Count: 1", fields));
    // The end of the grammar is the end, whatever else is asked for.
    let ended = complete(json!({"guided_regex": "ab", "min_tokens": 50, "ignore_eos": true}));
    assert_eq!(ended, ("ab".into(), "stop".into()));
    // Where it may go on, it does.
    let (text, reason) = complete(json!({"guided_regex": "[0-9 ]+", "min_tokens": 20, "max_tokens": 25}));
    assert!(
        text.len() >= 20 && text.bytes().all(|byte| byte == b' ' || byte.is_ascii_digit()),
        "{text} {reason}"
    );
    let (text, reason) = complete(json!({"guided_regex": "[0-9 ]+", "ignore_eos": true, "max_tokens": 30}));
    assert!(text.len() >= 30 && reason == "length", "{text} {reason}");
    let stopped = complete(json!({"guided_regex": "abcdef", "stop": ["d"]}));
    assert_eq!(stopped, ("abc".into(), "stop".into()));
    let (text, reason) = complete(json!({"guided_json": person(), "max_tokens": 5}));
    assert!(reason == "length" && text.starts_with('{'), "{text}");
}

fn streams_are_the_same_text(server: &Server) {
    let mut body = chat("Describe a person as JSON.");
    merge(&mut body, json!({"max_tokens": 400, "guided_json": person()}));
    let whole = post(server, CHAT, &body)["message"]["content"]
        .as_str()
        .expect("text")
        .to_owned();
    assert_person(&whole);
    body["stream"] = true.into();
    let mut stream = http::open(&server.address, CHAT, &body).expect("a stream");
    assert_eq!(stream.status, 200);
    let (mut text, mut reason) = (String::new(), String::new());
    while let Some(data) = stream.next_event().expect("an event") {
        if data == "[DONE]" {
            break;
        }
        let event: Value = serde_json::from_str(&data).expect("JSON");
        let choice = &event["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    assert_eq!((text, reason.as_str()), (whole, "stop"));
}

fn completions_of_one_prompt_differ_and_hold(server: &Server) {
    let mut body = prompt(
        "A random word:",
        json!({"guided_regex": "[a-z]{3,10}", "n": 4, "temperature": 1.0, "seed": 5}),
    );
    body["max_tokens"] = 20.into();
    let reply = http::post(&server.address, COMPLETIONS, &body)
        .expect("a reply")
        .json();
    let texts: Vec<&str> = reply["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .filter_map(|choice| choice["text"].as_str())
        .collect();
    assert_eq!(texts.len(), 4);
    let holds =
        |text: &&str| (3..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_lowercase());
    assert!(texts.iter().all(holds), "{texts:?}");
    assert!(texts.iter().any(|text| *text != texts[0]), "{texts:?}");
}

fn many_at_once_keep_apart(server: &Server) {
    thread::scope(|scope| {
        let requests: Vec<_> = (0..24)
            .map(|i| {
                scope.spawn(move || {
                    let letter = char::from(b'a' + i as u8);
                    let constraint =
                        json!({"guided_regex": format!("{letter}{{20}}"), "cache_salt": letter.to_string()});
                    let free = i % 3 == 0;
                    let fields = if free {
                        json!({"max_tokens": 20})
                    } else {
                        constraint
                    };
                    let text = post(server, COMPLETIONS, &prompt("Once upon a time", fields))["text"].clone();
                    let text = text.as_str().expect("text").to_owned();
                    assert!(free || text == letter.to_string().repeat(20), "{text}");
                    (free, text)
                })
            })
            .collect();
        let texts = requests
            .into_iter()
            .map(|request| request.join().expect("no panic"));
        let free: Vec<String> = texts.filter(|(free, _)| *free).map(|(_, text)| text).collect();
        assert!(
            free.iter().all(|text| *text == free[0]),
            "a neighbour's mask is not mine: {free:?}"
        );
    });
}

fn what_cannot_be_compiled_is_refused(server: &Server) {
    let deep = format!("{}{}", "{\"not\":".repeat(90), "}".repeat(90)).replace("{\"not\":}", "{\"not\":{}}");
    let deep: Value = serde_json::from_str(&deep).expect("JSON");
    let cases = [
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}}),
            "response_format.json_schema.schema",
        ),
        (json!({"guided_json": deep}), "guided_json"),
        (
            json!({"structured_outputs": {"regex": "("}}),
            "structured_outputs.regex",
        ),
        (
            json!({"structured_outputs": {"choice": []}}),
            "structured_outputs.choice",
        ),
        (
            json!({"structured_outputs": {"grammar": "?"}}),
            "structured_outputs.grammar",
        ),
        (json!({"structured_outputs": {}}), "structured_outputs"),
        (
            json!({"guided_regex": "(a{1,999}){1,999}", "guided_choice": ["a"]}),
            "guided_choice",
        ),
        (json!({"allowed_token_ids": [49_152]}), "allowed_token_ids"),
        (json!({"bad_words": [" "]}), "bad_words"),
    ];
    for (fields, param) in cases {
        let mut body = chat("x");
        merge(&mut body, fields);
        let reply = http::post(&server.address, CHAT, &body).expect("a reply");
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(
            (&error["param"], &error["code"]),
            (&param.into(), &"invalid_argument".into()),
            "{body}: {error}"
        );
    }
    // One token, which the grammar does not have: nothing may be drawn.
    let mut body = chat("x");
    merge(
        &mut body,
        json!({"guided_choice": ["yes"], "bad_words": ["yes", "y", "ye"], "allowed_token_ids": [1000]}),
    );
    let reply = http::post(&server.address, CHAT, &body).expect("a reply");
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.text().contains("allowed_token_ids"), "{}", reply.text());
}

/// Each compiles or is refused, and nobody waits for it.
fn what_takes_long_to_compile_is_answered_soon(server: &Server) {
    let wide: Vec<String> = (0..5000).map(|i| format!("p{i}")).collect();
    for fields in [
        json!({"guided_regex": "(((a{1,100}){1,100}){1,100}){1,100}"}),
        json!({"guided_regex": "(.*a){40}.*"}),
        json!({"guided_regex": "x".repeat(20_000)}),
        json!({"guided_choice": wide}),
        json!({"guided_json": {"type": "array", "items": {}, "minItems": 1_000_000_000}}),
        json!({"guided_grammar": format!("start: {}\"a\"{}", "(".repeat(5000), ")".repeat(5000))}),
    ] {
        let name = format!("{:.80}", fields.to_string());
        let mut body = prompt("x", fields);
        body["max_tokens"] = 1.into();
        let start = Instant::now();
        let reply = http::post(&server.address, COMPLETIONS, &body).expect("a reply");
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{name}: {:?}",
            start.elapsed()
        );
        let text = reply.text();
        assert!(
            reply.status == 200 || reply.status == 400 && text.contains("guided_"),
            "{name}: {text}"
        );
    }
}

/// TGI's grammar, and the token ids of a completion of one of two choices.
fn other_routes_hold_as_well(server: &Server) {
    let grammar = json!({"type": "regex", "value": "[0-9]{4}"});
    let body = json!({"inputs": "The year is", "parameters": {"grammar": grammar, "max_new_tokens": 20}});
    let reply = http::post(&server.address, "/generate", &body).expect("a reply");
    let text = reply.json()["generated_text"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(
        text.len() == 4 && text.bytes().all(|byte| byte.is_ascii_digit()),
        "{}",
        reply.text()
    );
    let sampling = json!({"temperature": 0, "structured_outputs": {"choice": ["yes", "no"]}});
    let body = json!({"token_ids": [1, 2, 3], "sampling_params": sampling});
    let reply = http::post(&server.address, "/inference/v1/generate", &body).expect("a reply");
    let ids = reply.json()["choices"][0]["token_ids"].clone();
    let reply = http::post(&server.address, "/detokenize", &json!({"tokens": ids})).expect("a reply");
    let text = reply.json()["prompt"].as_str().unwrap_or_default().to_owned();
    assert!(["yes", "no"].contains(&text.as_str()), "{ids} are {text:?}");
}
