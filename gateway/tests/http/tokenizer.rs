//! The tokenizer's routes.

use serde_json::json;

use crate::support::{Coordinator, Script, Server, config, get, pair, post};

#[tokio::test]
async fn a_text_and_a_conversation_are_tokenized() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let body =
        r#"{"model": "scripted", "prompt": "a b", "add_special_tokens": false, "return_token_strs": true}"#;
    let reply = post(server.address, "/tokenize", body).await;
    let expected = json!({"count": 2, "max_model_len": 2048, "tokens": [7, 8], "token_strs": ["a", "Ġb"]});
    assert_eq!((reply.status, reply.json()), (200, expected));
    let (asked, _) = coordinator.other().await;
    for part in ["\"scripted\"", "Text(\"a b\")", "add_special_tokens: Some(false)"] {
        assert!(asked.contains(part), "{asked}");
    }

    let body = r#"{"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": false,
        "chat_template_kwargs": {"x": 1}}"#;
    let reply = post(server.address, "/tokenize", body).await;
    let expected = json!({"count": 2, "max_model_len": 2048, "tokens": [7, 8], "token_strs": null});
    assert_eq!((reply.status, reply.json()), (200, expected));
    let (asked, _) = coordinator.other().await;
    for part in ["\"hi\"", "add_generation_prompt: Some(false)", "x"] {
        assert!(asked.contains(part), "{asked}");
    }
}

#[tokio::test]
async fn tokens_become_text() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    let reply = post(server.address, "/detokenize", r#"{"tokens": [7, 8]}"#).await;
    assert_eq!((reply.status, reply.json()), (200, json!({"prompt": "a b"})));
    assert!(coordinator.other().await.0.contains("[7, 8]"));
}

#[tokio::test]
async fn bad_bodies_are_refused_with_the_field_named() {
    let (mut coordinator, server) = pair(Script::Hello).await;
    for (path, body, param) in [
        ("/tokenize", "{}", "prompt"),
        ("/tokenize", r#"{"prompt": ["a"]}"#, "prompt"),
        ("/tokenize", r#"{"messages": []}"#, "messages"),
        (
            "/tokenize",
            r#"{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}"#,
            "messages",
        ),
        (
            "/tokenize",
            r#"{"prompt": "a", "add_special_tokens": 1}"#,
            "add_special_tokens",
        ),
        (
            "/tokenize",
            r#"{"prompt": "a", "mm_processor_kwargs": {"a": 1}}"#,
            "mm_processor_kwargs",
        ),
        ("/detokenize", "{}", "tokens"),
        ("/detokenize", r#"{"tokens": [-1]}"#, "tokens[0]"),
        ("/detokenize", r#"{"tokens": "a"}"#, "tokens"),
    ] {
        let reply = post(server.address, path, body).await;
        assert_eq!(
            (reply.status, &reply.json()["error"]["param"]),
            (400, &json!(param)),
            "{body}"
        );
    }
    assert!(coordinator.received.try_recv().is_err(), "nothing was asked");
}

#[tokio::test]
async fn the_tokenizers_configuration_is_shown_only_if_asked_for() {
    let (_coordinator, server) = pair(Script::Hello).await;
    assert_eq!(get(server.address, "/tokenizer_info").await.status, 404);
    let coordinator = Coordinator::start(Script::Hello).await;
    let mut config = config(&coordinator);
    config.routes.tokenizer_info = true;
    let server = Server::start(config).await;
    let reply = get(server.address, "/tokenizer_info").await;
    assert_eq!(
        (reply.status, reply.header("content-type"), reply.json()),
        (
            200,
            Some("application/json"),
            json!({"tokenizer_class": "PreTrainedTokenizerFast"})
        )
    );
}
