//! Whole replies, and what the coordinator was asked.

use phalanx_proto::v1::{
    ChatMessage, OutputOptions, RepetitionDetection, SamplingParams, TokenIds, generate_request::Prompt,
};
use serde_json::json;

use crate::support::{Script, Server, config, get, pair, post, post_with};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn a_chat_completion() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body =
        r#"{"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "somebody_elses": 1}"#;
    let headers = "Content-Type: application/json; charset=utf-8\r\nX-Request-Id: trace-17\r\n";
    let reply = post_with(server.address, CHAT, headers, body.as_bytes()).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.header("x-request-id"), Some("trace-17"));
    let expected = json!({
        "id": "chatcmpl-trace-17",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "scripted",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world", "refusal": null},
            "logprobs": null,
            "finish_reason": "stop",
            "stop_reason": "!",
        }],
        "usage": {"prompt_tokens": 5, "total_tokens": 7, "completion_tokens": 2},
    });
    assert_eq!(reply.json(), expected);
    let asked = coordinator.chat().await;
    assert_eq!(
        (asked.request_id.as_str(), asked.model.as_str()),
        ("chatcmpl-trace-17", "scripted")
    );
    let message = ChatMessage {
        role: "user".to_owned(),
        content: "hi".to_owned(),
        ..ChatMessage::default()
    };
    assert_eq!(asked.messages, [message]);
    assert_eq!(asked.sampling, Some(SamplingParams::default()));
    assert_eq!(asked.output, Some(OutputOptions::default()));
    assert_eq!(
        (asked.add_generation_prompt, asked.template_kwargs_json.as_str()),
        (None, "")
    );
}

#[tokio::test]
async fn the_fields_of_a_chat_reach_the_coordinator() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "max_completion_tokens": 8,
        "logprobs": true, "top_logprobs": 2, "logprob_token_ids": [7, 5], "add_generation_prompt": false,
        "repetition_detection": {"max_pattern_size": 20, "min_pattern_size": 3, "min_count": 4},
        "thinking_token_budget": 32, "chat_template_kwargs": {"thinking": true}, "stop": ["a", "b"], "seed": 7, "user": "somebody"}"#;
    let reply = post(server.address, CHAT, body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let asked = coordinator.chat().await;
    let sampling = asked.sampling.expect("always sent");
    assert_eq!((sampling.max_tokens, sampling.seed), (Some(8), Some(7)));
    assert_eq!(sampling.stop, ["a", "b"]);
    assert_eq!(sampling.logprob_token_ids, [7, 5]);
    let repetition = RepetitionDetection {
        max_pattern_size: 20,
        min_pattern_size: 3,
        min_count: 4,
    };
    assert_eq!(sampling.repetition_detection, Some(repetition));
    assert_eq!(sampling.thinking_token_budget, Some(32));
    assert_eq!(asked.output.expect("always sent").logprobs, Some(2));
    assert_eq!(asked.add_generation_prompt, Some(false));
    assert_eq!(asked.template_kwargs_json, r#"{"thinking": true}"#);
    let logprobs = &reply.json()["choices"][0]["logprobs"]["content"];
    let token = json!({"token": "Hello", "logprob": -0.25, "bytes": [72, 101, 108, 108, 111]});
    assert_eq!(logprobs[0]["top_logprobs"], json!([token]));
    assert_eq!(logprobs[1]["token"], " world");
}

#[tokio::test]
async fn repetition_is_an_end_in_every_dialect() {
    let (mut coordinator, server) = pair(Script::Repeat).await;
    let messages = json!([{"role": "user", "content": "sing"}]);
    let mut end = async |path: &str, mut body: serde_json::Value, of: &[&str]| {
        body["repetition_detection"] = json!({"max_pattern_size": 2, "min_count": 2});
        let reply = post(server.address, path, &body.to_string()).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.text());
        let _asked = coordinator.received.recv().await;
        let reply = reply.json();
        of.iter().map(|at| reply.pointer(at).cloned()).collect::<Vec<_>>()
    };
    let openai = ["/choices/0/finish_reason", "/choices/0/stop_reason"];
    let repetition = [Some(json!("repetition")), Some(json!("repetition_detected"))];
    let chat = end(CHAT, json!({"messages": messages}), &openai).await;
    assert_eq!(chat, repetition);
    let completion = end(COMPLETIONS, json!({"prompt": "sing"}), &openai).await;
    assert_eq!(completion, repetition);
    let response = end(
        "/v1/responses",
        json!({"input": "sing"}),
        &["/status", "/incomplete_details/reason"],
    );
    assert_eq!(
        response.await,
        [Some(json!("incomplete")), Some(json!("repetition"))]
    );
    let anthropic = json!({"model": "scripted", "messages": messages, "max_tokens": 9});
    let anthropic = end("/v1/messages", anthropic, &["/stop_reason"]).await;
    assert_eq!(anthropic, [Some(json!("end_turn"))]);
    let tgi = json!({"inputs": "sing", "parameters": {"details": true}});
    let tgi = end("/generate", tgi, &["/details/finish_reason"]).await;
    assert_eq!(tgi, [Some(json!("eos_token"))]);
}

#[tokio::test]
async fn several_prompts_are_numbered_through() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"prompt": ["a", "b"], "n": 2, "logprobs": 0, "logprob_token_ids": [3], "echo": true,
        "add_special_tokens": false}"#;
    let reply = post(server.address, COMPLETIONS, body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let reply = reply.json();
    assert_eq!(reply["object"], "text_completion");
    assert_eq!(
        reply["usage"],
        json!({"prompt_tokens": 10, "total_tokens": 18, "completion_tokens": 8})
    );
    let choices = reply["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 4);
    for (index, choice) in choices.iter().enumerate() {
        let expected = json!({
            "index": index,
            "text": "Hello world",
            "logprobs": {
                "text_offset": [0, 5],
                "token_logprobs": [-0.25, -0.25],
                "tokens": ["Hello", " world"],
                "top_logprobs": [{"Hello": -0.25}, {" world": -0.25}],
            },
            "finish_reason": "stop",
            "stop_reason": "!",
        });
        assert_eq!(*choice, expected);
    }
    let mut asked = [coordinator.generate().await, coordinator.generate().await];
    asked.sort_by(|a, b| a.request_id.cmp(&b.request_id));
    let id = reply["id"].as_str().expect("an id");
    for (index, (asked, text)) in asked.into_iter().zip(["a", "b"]).enumerate() {
        assert_eq!(asked.request_id, format!("{id}-{index}"));
        assert_eq!(asked.prompt, Some(Prompt::Text(text.to_owned())));
        let output = asked.output.expect("always sent");
        assert_eq!((output.logprobs, output.echo), (Some(0), true));
        assert_eq!(asked.sampling.expect("always sent").logprob_token_ids, [3]);
        assert_eq!(asked.add_special_tokens, Some(false));
    }
}

#[tokio::test]
async fn completions_have_their_own_default_of_max_tokens() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    for (field, expected) in [
        ("", Some(16)),
        (r#", "max_tokens": 3"#, Some(3)),
        (r#", "max_tokens": null"#, None),
    ] {
        let reply = post(
            server.address,
            COMPLETIONS,
            &format!(r#"{{"prompt": [1, 2]{field}}}"#),
        )
        .await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let id = reply.json()["id"]
            .as_str()
            .and_then(|id| id.strip_prefix("cmpl-"))
            .map(str::len);
        assert_eq!(id, Some(32));
        let asked = coordinator.generate().await;
        assert_eq!(asked.sampling.expect("always sent").max_tokens, expected);
        assert_eq!(asked.prompt, Some(Prompt::TokenIds(TokenIds { ids: vec![1, 2] })));
    }
}

#[tokio::test]
async fn cached_tokens_are_reported_where_the_operator_wants_it() {
    let (coordinator, _) = pair(Script::Hello).await;
    let mut config = config(&coordinator);
    config.reply.prompt_tokens_details = true;
    let server = Server::start(config).await;
    let reply = post(server.address, COMPLETIONS, r#"{"prompt": "a"}"#)
        .await
        .json();
    assert_eq!(
        reply["usage"]["prompt_tokens_details"],
        json!({"cached_tokens": 3})
    );
}

#[tokio::test]
async fn the_model_list() {
    let (_coordinator, server) = pair(Script::Hello).await;
    let expected = json!({
        "object": "list",
        "data": [{
            "id": "scripted",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "phalanx",
            "root": "weights.gguf",
            "parent": null,
            "max_model_len": 2048,
        }],
    });
    assert_eq!(get(server.address, "/v1/models").await.json(), expected);
}
