//! What replies contain beside the text, in vLLM's shape.

use phalanx_gateway::ReplyOptions;
use serde_json::{Value, json};

use crate::support::{Coordinator, Reply, Script, Server, config, pair, post};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const MESSAGES: &str = r#""messages": [{"role": "user", "content": "hi"}]"#;

fn prompt_logprobs() -> Value {
    json!([
        null,
        {
            "9": {"logprob": -3.0, "rank": 40, "decoded_token": "b"},
            "8": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
        },
    ])
}

/// The events of a stream without its end.
fn events(reply: &Reply) -> Vec<Value> {
    let data = reply.events().into_iter().filter(|data| *data != "[DONE]");
    data.map(|data| serde_json::from_str(data).expect("JSON"))
        .collect()
}

#[tokio::test]
async fn a_chat_tells_of_its_prompt_once_and_of_each_choices_tokens() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body = format!(
        r#"{{{MESSAGES}, "n": 2, "prompt_logprobs": 1, "return_token_ids": true, "truncate_prompt_tokens": -1}}"#
    );
    let reply = post(server.address, CHAT, &body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let reply = reply.json();
    assert_eq!(reply["prompt_logprobs"], prompt_logprobs());
    assert_eq!(reply["prompt_token_ids"], json!([7, 9]));
    for choice in reply["choices"].as_array().expect("choices") {
        assert_eq!(choice["token_ids"], json!([1, 2]));
        assert!(choice.get("prompt_token_ids").is_none());
    }
    let asked = coordinator.chat().await;
    assert_eq!(asked.truncate_prompt_tokens, Some(-1));
    let output = asked.output.expect("always sent");
    assert_eq!(
        (output.prompt_logprobs, output.return_prompt_token_ids),
        (Some(1), true)
    );
}

#[tokio::test]
async fn a_completion_tells_of_its_prompt_with_every_choice() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"prompt": ["a", "b"], "n": 2, "prompt_logprobs": 1, "return_token_ids": true}"#;
    let reply = post(server.address, COMPLETIONS, body).await.json();
    let choices = reply["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 4);
    for choice in choices {
        assert_eq!(choice["prompt_logprobs"], prompt_logprobs());
        assert_eq!(choice["prompt_token_ids"], json!([7, 9]));
        assert_eq!(choice["token_ids"], json!([1, 2]));
    }
    assert!(reply.get("prompt_token_ids").is_none());
}

#[tokio::test]
async fn streams_carry_token_ids() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"prompt": ["a", "b"], "stream": true, "return_token_ids": true}"#;
    let reply = events(&post(server.address, COMPLETIONS, body).await);
    let of = |index: u64| {
        let choices = reply.iter().map(|event| &event["choices"][0]);
        choices.filter(move |choice| choice["index"] == index)
    };
    for index in 0..2 {
        let prompts: Vec<_> = of(index).map(|choice| choice.get("prompt_token_ids")).collect();
        assert_eq!(prompts, [Some(&json!([7, 9])), None], "with the first piece only");
        let tokens: Vec<_> = of(index).map(|choice| &choice["token_ids"]).collect();
        assert_eq!(tokens, [&json!([1]), &json!([2])]);
    }
    let body = format!(r#"{{{MESSAGES}, "stream": true, "return_token_ids": true}}"#);
    let reply = events(&post(server.address, CHAT, &body).await);
    assert_eq!(reply[0]["prompt_token_ids"], json!([7, 9]));
    assert_eq!(reply[0]["choices"][0]["delta"]["role"], "assistant");
    assert!(reply[1].get("prompt_token_ids").is_none());
    assert_eq!(reply[1]["choices"][0]["token_ids"], json!([1]));
}

#[tokio::test]
async fn tokens_are_named_by_their_ids_where_request_or_operator_wants_it() {
    let (coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"prompt": "a", "logprobs": 1, "return_tokens_as_token_ids": true}"#;
    let reply = post(server.address, COMPLETIONS, body).await.json();
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["token_id:1", "token_id:1"]));
    assert_eq!(logprobs["top_logprobs"][0], json!({"token_id:1": -0.25}));

    let mut config = config(&coordinator);
    config.reply = ReplyOptions {
        tokens_as_token_ids: true,
        ..ReplyOptions::default()
    };
    let server = Server::start(config).await;
    let body = format!(r#"{{{MESSAGES}, "logprobs": true, "top_logprobs": 0}}"#);
    let reply = post(server.address, CHAT, &body).await.json();
    let content = &reply["choices"][0]["logprobs"]["content"][0];
    assert_eq!(content["token"], "token_id:1");
    assert_eq!(content["bytes"], json!([72, 101, 108, 108, 111]));
}

#[tokio::test]
async fn a_stream_ends_with_its_usage_where_the_operator_wants_it() {
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.reply.force_include_usage = true;
    let server = Server::start(config).await;
    for options in ["", r#", "stream_options": {"include_usage": false}"#] {
        let body = format!(r#"{{"prompt": "a", "stream": true{options}}}"#);
        let events = events(&post(server.address, COMPLETIONS, &body).await);
        let (last, others) = events.split_last().expect("events");
        assert_eq!(
            (&last["choices"], &last["usage"]["completion_tokens"]),
            (&json!([]), &json!(2))
        );
        assert!(others.iter().all(|event| event["usage"].is_null()));
    }
}

#[tokio::test]
async fn what_cannot_be_reported_is_refused_by_name() {
    let (_coordinator, server) = pair(Script::Hello).await;
    for (route, fields, param) in [
        (CHAT, r#""prompt_logprobs": 1, "stream": true"#, "prompt_logprobs"),
        (CHAT, r#""prompt_logprobs": -1"#, "prompt_logprobs"),
        (COMPLETIONS, r#""prompt_logprobs": -7"#, "prompt_logprobs"),
        (COMPLETIONS, r#""prompt_logprobs": "all""#, "prompt_logprobs"),
        (COMPLETIONS, r#""logprobs": -1"#, "logprobs"),
        (
            COMPLETIONS,
            r#""truncate_prompt_tokens": 1.5"#,
            "truncate_prompt_tokens",
        ),
        (COMPLETIONS, r#""return_token_ids": 1"#, "return_token_ids"),
    ] {
        let body = format!(r#"{{{MESSAGES}, "prompt": "a", {fields}}}"#);
        let reply = post(server.address, route, &body).await;
        assert_eq!(reply.status, 400, "{fields}: {}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!(error["param"], param, "{error}");
        assert!(error["code"].is_string());
    }
}
