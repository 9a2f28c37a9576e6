//! The tokenizer by itself.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, tokenize_request::Input, tokenizer_client::TokenizerClient},
};

use crate::server::{MAX_MODEL_LEN, Server, Setup, tokens};

fn chat(content: &str) -> v1::ChatRequest {
    v1::ChatRequest {
        messages: vec![v1::ChatMessage {
            role: "user".into(),
            content: content.into(),
            ..v1::ChatMessage::default()
        }],
        ..v1::ChatRequest::default()
    }
}

#[tokio::test]
async fn text_and_conversations_become_tokens_and_text_again() {
    let server = Server::start(Setup::default());
    let mut client = TokenizerClient::new(server.channel().await);
    let ask = v1::TokenizeRequest {
        input: Some(Input::Text("Hello world".into())),
        return_token_strs: true,
        ..v1::TokenizeRequest::default()
    };
    let reply = client.tokenize(ask).await.expect("a reply").into_inner();
    assert_eq!(reply.token_ids, tokens("Hello world"));
    assert_eq!(reply.token_strs, ["Hello", "Ġworld"]);
    assert_eq!(reply.max_model_len, MAX_MODEL_LEN);

    let ask = v1::TokenizeRequest {
        input: Some(Input::Chat(chat("Hi"))),
        ..v1::TokenizeRequest::default()
    };
    let reply = client.tokenize(ask).await.expect("a reply").into_inner();
    assert!(reply.token_strs.is_empty(), "not asked for");
    let token_ids = reply.token_ids;
    let back = client
        .detokenize(v1::DetokenizeRequest {
            token_ids,
            ..v1::DetokenizeRequest::default()
        })
        .await;
    let text = back.expect("a reply").into_inner().text;
    assert!(text.contains("<|im_start|>user\nHi<|im_end|>\n"), "{text:?}");
    assert!(text.ends_with("<|im_start|>assistant\n"), "{text:?}");

    let info = client.get_tokenizer_info(v1::GetTokenizerInfoRequest {}).await;
    let info: serde_json::Value =
        serde_json::from_str(&info.expect("a reply").into_inner().json).expect("a JSON object");
    assert_eq!(info["eos_token"], "<|im_end|>");
    assert!(
        info["chat_template"]
            .as_str()
            .is_some_and(|text| text.contains("im_start"))
    );
}

#[tokio::test]
async fn what_cannot_be_tokenized_is_refused_by_name() {
    let server = Server::start(Setup::default());
    let mut client = TokenizerClient::new(server.channel().await);
    let refusal = |status: tonic::Status| {
        let error = RpcError::from(&status);
        (error.kind, error.param.unwrap_or_default())
    };
    let mut tokenize = async |model: &str, input| {
        let ask = v1::TokenizeRequest {
            model: model.into(),
            input,
            ..v1::TokenizeRequest::default()
        };
        refusal(client.tokenize(ask).await.expect_err("refused"))
    };
    let text = |text: String| Some(Input::Text(text));
    assert_eq!(
        tokenize("other", text("a".into())).await,
        (ErrorKind::NotFound, "model".into())
    );
    assert_eq!(
        tokenize("", None).await,
        (ErrorKind::InvalidArgument, "prompt".into())
    );
    let long = text("a".repeat(3 << 20));
    assert_eq!(
        tokenize("", long).await,
        (ErrorKind::ContextLengthExceeded, "prompt".into())
    );
    let nobody = Some(Input::Chat(v1::ChatRequest::default()));
    assert_eq!(
        tokenize("", nobody).await,
        (ErrorKind::InvalidArgument, "messages".into())
    );
    for (token_ids, kind) in [
        (vec![49_152], ErrorKind::InvalidArgument),
        (
            vec![1; MAX_MODEL_LEN as usize + 1],
            ErrorKind::ContextLengthExceeded,
        ),
    ] {
        let ask = v1::DetokenizeRequest {
            token_ids,
            ..v1::DetokenizeRequest::default()
        };
        let refused = refusal(client.detokenize(ask).await.expect_err("refused"));
        assert_eq!(refused, (kind, "tokens".into()));
    }
}
