//! Structured outputs through gRPC. The scripted ranks want to say something else, and say the first token that their mask
//! allows instead.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{
        self, FinishReason, StructuredOutputs,
        structured_outputs::{Choices, Constraint},
    },
};

use crate::server::{Server, Setup, open, request, rest, tokens};

fn structured(constraint: Constraint) -> Option<StructuredOutputs> {
    Some(StructuredOutputs {
        constraint: Some(constraint),
        ..StructuredOutputs::default()
    })
}

fn choice(choices: &[&str]) -> Option<StructuredOutputs> {
    let choices = choices.iter().map(ToString::to_string).collect();
    structured(Constraint::Choice(Choices { choices }))
}

#[tokio::test]
async fn a_completion_is_of_its_language_and_ends_with_it() {
    let server = Server::free(Setup::default());
    let mut client = server.inference().await;
    let mut ask = async |edit: fn(&mut v1::SamplingParams)| {
        let reply = client.generate(request(1, edit)).await;
        let mut reply = reply.expect("a reply").into_inner();
        let choice = reply.choices.remove(0);
        (choice.text.clone(), choice.finish_reason())
    };
    let choices = ask(|sampling| sampling.structured_outputs = choice(&["alpha", "beta"]));
    let (text, reason) = choices.await;
    assert!(["alpha", "beta"].contains(&text.as_str()), "{text}");
    assert_eq!(reason, FinishReason::Stop);
    let flags = ask(|sampling| {
        let schema = r#"{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}"#;
        sampling.structured_outputs = structured(Constraint::JsonSchema(schema.into()));
    });
    let (text, _) = flags.await;
    let flags: Vec<bool> = serde_json::from_str(&text).expect("flags");
    assert_eq!(flags.len(), 2);
    let short = ask(|sampling| {
        sampling.structured_outputs = structured(Constraint::Regex("x{40}y".into()));
        sampling.max_tokens = Some(2);
    });
    assert_eq!(short.await.1, FinishReason::Length);
    server.idle().await;
}

#[tokio::test]
async fn the_models_end_is_allowed_where_the_text_may_end() {
    // The script says x twice and would end then: in a language that needs three it cannot.
    let mut script = [tokens("x"), tokens("x")].concat();
    script.push(2);
    let setup = Setup {
        scripts: vec![(1, script)],
        ..Setup::default()
    };
    let server = Server::free(setup);
    let mut client = server.inference().await;
    for (regex, text) in [("x*", "xx"), ("x{3}x*y?", "xx")] {
        let ask = request(1, |sampling| {
            sampling.structured_outputs = structured(Constraint::Regex(regex.into()));
            sampling.max_tokens = Some(3);
        });
        let mut stream = open(&mut client, ask).await;
        let (whole, _) = rest(&mut stream).await;
        let ended = whole.finish_reason() == FinishReason::Stop;
        assert_eq!(ended, regex == "x*", "{whole:?}");
        assert!(whole.text.starts_with(text), "{whole:?}");
    }
}

#[tokio::test]
async fn lists_of_tokens_and_words_restrict_as_well() {
    let server = Server::free(Setup::default());
    let mut client = server.inference().await;
    let only = tokens("q");
    let ask = request(1, |sampling| {
        sampling.allowed_token_ids = only;
        sampling.max_tokens = Some(3);
    });
    let reply = client.generate(ask).await.expect("a reply").into_inner();
    assert_eq!(reply.choices[0].text, "qqq");
    let ask = request(1, |sampling| {
        sampling.bad_words = vec!["world".into()];
        sampling.max_tokens = Some(3);
    });
    let reply = client.generate(ask).await.expect("a reply").into_inner();
    assert!(!reply.choices[0].text.contains("world"), "{reply:?}");
}

#[tokio::test]
async fn bad_grammars_and_empty_masks_are_the_requests_fault() {
    let server = Server::free(Setup::default());
    let mut client = server.inference().await;
    let mut refused = async |edit: fn(&mut v1::SamplingParams)| {
        let status = client.generate(request(1, edit)).await.expect_err("refused");
        RpcError::from(&status)
    };
    let error = refused(|sampling| sampling.structured_outputs = Some(StructuredOutputs::default())).await;
    assert_eq!(error.param.as_deref(), Some("structured_outputs"));
    let error =
        refused(|sampling| sampling.structured_outputs = structured(Constraint::Regex("(".into()))).await;
    assert_eq!(error.param.as_deref(), Some("structured_outputs.regex"));
    let error = refused(|sampling| sampling.allowed_token_ids = vec![1 << 20]).await;
    assert_eq!(error.param.as_deref(), Some("allowed_token_ids"));
    let error = refused(|sampling| sampling.bad_words = vec!["x".into(); 200]).await;
    assert_eq!(error.param.as_deref(), Some("bad_words"));
    let error = refused(|sampling| {
        sampling.structured_outputs = choice(&["alpha"]);
        sampling.allowed_token_ids = vec![5];
    });
    let error = error.await;
    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    assert!(error.message.contains("no token is allowed"), "{error}");
    server.idle().await;
}
