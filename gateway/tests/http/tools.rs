//! Tools and reasoning: what the coordinator is asked, and what becomes of its answer.

use phalanx_proto::v1::{ToolChoice, tool_choice::Mode};
use serde_json::{Value, json};

use crate::support::{Script, Server, config, pair, post};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn the_fields_of_tools_and_templates_reach_the_coordinator() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body = r#"{"messages": [{"role": "user", "content": "hi"}], "tools": [{"z": 1, "a": 2}],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": false,
        "continue_final_message": true, "add_generation_prompt": false, "documents": [{"text": "x"}], "echo": true,
        "chat_template": "{{ 1 }}", "add_special_tokens": true, "include_reasoning": false, "reasoning_effort": "low"}"#;
    let reply = post(server.address, CHAT, body).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(
        reply.json()["choices"][0]["message"]["role"],
        "user",
        "the turn goes on"
    );
    let asked = coordinator.chat().await;
    assert_eq!(asked.tools_json, r#"[{"z": 1, "a": 2}]"#, "in the client's order");
    let named = ToolChoice {
        mode: Mode::Named.into(),
        function: "f".to_owned(),
    };
    assert_eq!(
        (asked.tool_choice, asked.parallel_tool_calls),
        (Some(named), Some(false))
    );
    assert!(asked.continue_final_message && asked.add_special_tokens);
    assert_eq!(asked.documents_json, r#"[{"text": "x"}]"#);
    assert_eq!(asked.chat_template, "{{ 1 }}");
    assert_eq!(
        (asked.include_reasoning, asked.reasoning_effort.as_str()),
        (Some(false), "low")
    );
    assert!(asked.output.expect("always sent").echo);
}

#[tokio::test]
async fn a_reply_of_a_call() {
    let (_coordinator, server) = pair(Script::Call).await;
    let body = r#"{"messages": [{"role": "user", "content": "hi"}]}"#;
    let reply = post(server.address, CHAT, body).await.json();
    let expected = json!({
        "index": 0,
        "message": {
            "role": "assistant",
            "content": null,
            "refusal": null,
            "reasoning": "Hm.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        "logprobs": null,
        "finish_reason": "tool_calls",
        "stop_reason": null,
    });
    assert_eq!(reply["choices"], json!([expected]));
}

#[tokio::test]
async fn reasoning_that_is_left_out_has_no_token_ids_either() {
    let (_coordinator, server) = pair(Script::Hello).await;
    for (include, shown) in [("true", true), ("false", false)] {
        let body = format!(
            r#"{{"messages": [{{"role": "user", "content": "hi"}}], "return_token_ids": true,
            "include_reasoning": {include}}}"#
        );
        let reply = post(server.address, CHAT, &body).await.json();
        assert_eq!(reply["choices"][0].get("token_ids").is_some(), shown, "{reply}");
    }
}

#[tokio::test]
async fn the_operator_names_the_models_role() {
    let (coordinator, _) = pair(Script::Hello).await;
    let mut config = config(&coordinator);
    config.response_role = "model".to_owned();
    let server = Server::start(config).await;
    let body = r#"{"messages": [{"role": "user", "content": "hi"}]}"#;
    let reply = post(server.address, CHAT, body).await.json();
    assert_eq!(reply["choices"][0]["message"]["role"], "model");
}

#[tokio::test]
async fn a_stream_of_a_call() {
    let (_coordinator, server) = pair(Script::Call).await;
    let body = r#"{"messages": [{"role": "user", "content": "hi"}], "stream": true}"#;
    let reply = post(server.address, CHAT, body).await;
    let events = reply.events();
    let (done, events) = events.split_last().expect("events");
    assert_eq!(*done, "[DONE]");
    let choice = |event: &&str| serde_json::from_str::<Value>(event).expect("JSON")["choices"][0].clone();
    let choices: Vec<Value> = events.iter().map(choice).collect();
    let deltas: Vec<&Value> = choices.iter().map(|choice| &choice["delta"]).collect();
    assert_eq!(
        deltas,
        [
            &json!({"role": "assistant", "content": ""}),
            &json!({"reasoning": "Hm.", "reasoning_content": "Hm."}),
            &json!({"tool_calls": [{"index": 0, "id": "call-1", "type": "function",
                "function": {"name": "f", "arguments": "{"}}]}),
            &json!({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}),
        ]
    );
    let reasons: Vec<&Value> = choices.iter().map(|choice| &choice["finish_reason"]).collect();
    assert_eq!(
        reasons,
        [&Value::Null, &Value::Null, &Value::Null, &json!("tool_calls")]
    );
}
