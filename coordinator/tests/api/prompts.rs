//! What a reply tells of its prompt: echo, log-probabilities, token ids, and what is cut off.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, FinishReason, generate_request::Prompt},
};

use crate::{
    ranks::FILLER,
    server::{Server, Setup, open, request, rest, tokens},
};

const EOS: u32 = 2;

fn says_world() -> Setup {
    Setup {
        scripts: [(1, vec![FILLER, EOS]), (2, vec![FILLER, EOS])]
            .into_iter()
            .collect(),
        ..Setup::default()
    }
}

fn asking(output: v1::OutputOptions) -> v1::GenerateRequest {
    v1::GenerateRequest {
        output: Some(output),
        ..request(1, |_| {})
    }
}

/// `(token, log-probability if it has one, alternatives, offset)` of each.
fn seen(logprobs: &[v1::TokenLogprobs]) -> Vec<(&str, Option<f32>, usize, u32)> {
    let mut all = Vec::new();
    for token in logprobs {
        let chosen = token.chosen.as_ref().expect("always there");
        let logprob = Some(chosen.logprob).filter(|logprob| !logprob.is_nan());
        assert_eq!(logprob.is_some(), chosen.rank.is_some());
        all.push((chosen.token.as_str(), logprob, token.top.len(), token.text_offset));
    }
    all
}

#[tokio::test]
async fn an_echoed_prompt_comes_first_with_its_logprobs() {
    let server = Server::free(says_world());
    let mut client = server.inference().await;
    let ask = |logprobs| {
        asking(v1::OutputOptions {
            echo: true,
            logprobs,
            ..Default::default()
        })
    };
    let plain = client.generate(ask(None)).await.expect("a reply").into_inner();
    assert_eq!(plain.choices[0].text, "Hello world world");
    assert!(plain.choices[0].logprobs.is_empty() && plain.prompt.is_none());

    let whole = client.generate(ask(Some(1))).await.expect("a reply").into_inner();
    let choice = &whole.choices[0];
    assert_eq!(choice.text, "Hello world world");
    let expected = [
        ("Hello", None, 0, 0),
        (" world", Some(-1.5), 1, 5),
        (" world", Some(-0.5), 1, 11),
        ("<|im_end|>", Some(-0.5), 1, 17),
    ];
    assert_eq!(seen(&choice.logprobs), expected);
    assert_eq!(choice.token_ids, [FILLER, EOS]);

    let mut stream = open(&mut client, ask(Some(1))).await;
    let (streamed, _) = rest(&mut stream).await;
    assert_eq!(
        (&streamed.text, seen(&streamed.logprobs)),
        (&choice.text, expected.to_vec())
    );
}

#[tokio::test]
async fn a_prompt_is_echoed_without_a_completion() {
    let server = Server::free(says_world());
    let mut client = server.inference().await;
    let output = v1::OutputOptions {
        echo: true,
        logprobs: Some(2),
        ..Default::default()
    };
    let ask = v1::GenerateRequest {
        output: Some(output),
        ..request(1, |sampling| sampling.max_tokens = Some(0))
    };
    let reply = client.generate(ask).await.expect("a reply").into_inner();
    let choice = &reply.choices[0];
    assert_eq!(
        (choice.text.as_str(), choice.finish_reason()),
        ("Hello world", FinishReason::Length)
    );
    assert!(choice.token_ids.is_empty());
    assert_eq!(
        seen(&choice.logprobs),
        [("Hello", None, 0, 0), (" world", Some(-1.5), 2, 5)]
    );
    assert_eq!(reply.usage.expect("always").completion_tokens, 0);
    let silent = request(1, |sampling| sampling.max_tokens = Some(0));
    let error = RpcError::from(&client.generate(silent).await.expect_err("refused"));
    assert_eq!(error.param.as_deref(), Some("max_tokens"));
}

#[tokio::test]
async fn the_prompt_is_told_once_for_all_completions() {
    let server = Server::free(says_world());
    let mut client = server.inference().await;
    let ask = v1::GenerateRequest {
        output: Some(v1::OutputOptions {
            echo: true,
            logprobs: Some(0),
            prompt_logprobs: Some(2),
            return_prompt_token_ids: true,
            ..Default::default()
        }),
        ..request(1, |sampling| sampling.n = Some(2))
    };
    // Twice: what is cached must not be missing.
    for _ in 0..2 {
        let reply = client.generate(ask.clone()).await.expect("a reply").into_inner();
        let prompt = reply.prompt.expect("asked for");
        assert_eq!(prompt.token_ids, tokens("Hello world"));
        assert_eq!(
            seen(&prompt.logprobs),
            [("Hello", None, 0, 0), (" world", Some(-1.5), 2, 5)]
        );
        let second = prompt.logprobs[1].clone();
        assert_eq!(second.chosen.expect("always").rank, Some(2));
        assert_eq!(
            second.top.iter().map(|top| top.rank).collect::<Vec<_>>(),
            [Some(1), Some(2)]
        );
        for choice in &reply.choices {
            let expected = [
                ("Hello", None, 0, 0),
                (" world", Some(-1.5), 0, 5),
                (" world", Some(-0.5), 0, 11),
                ("<|im_end|>", Some(-0.5), 0, 17),
            ];
            assert_eq!(seen(&choice.logprobs), expected, "choice {}", choice.index);
        }
    }
    let mut stream = open(&mut client, ask).await;
    let mut prompts = 0;
    while let Some(chunk) = stream.message().await.expect("no error") {
        prompts += usize::from(chunk.prompt.is_some());
    }
    assert_eq!(prompts, 1);
}

#[tokio::test]
async fn a_prompt_is_cut_to_its_last_tokens() {
    let server = Server::free(says_world());
    let mut client = server.inference().await;
    let ask = |kept: i32| {
        let mut client = client.clone();
        let ask = v1::GenerateRequest {
            truncate_prompt_tokens: Some(kept),
            ..asking(v1::OutputOptions {
                echo: true,
                return_prompt_token_ids: true,
                ..Default::default()
            })
        };
        async move { client.generate(ask).await.map(tonic::Response::into_inner) }
    };
    let reply = ask(1).await.expect("a reply");
    assert_eq!(reply.prompt.expect("asked for").token_ids, tokens(" world"));
    assert!(
        reply.choices[0].text.starts_with(" world"),
        "{}",
        reply.choices[0].text
    );
    assert_eq!(reply.usage.expect("always").prompt_tokens, 1);
    let whole = ask(-1).await.expect("a reply").prompt.expect("asked for");
    assert_eq!(whole.token_ids, tokens("Hello world"));
    for kept in [0, -2, 1 << 20] {
        let error = RpcError::from(&ask(kept).await.expect_err("refused"));
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::InvalidArgument, Some("truncate_prompt_tokens"))
        );
    }
    let long = v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds {
            ids: vec![FILLER; 10_000],
        })),
        truncate_prompt_tokens: Some(-1),
        ..request(1, |sampling| sampling.max_tokens = Some(2))
    };
    let usage = client
        .generate(long)
        .await
        .expect("fits")
        .into_inner()
        .usage
        .expect("always");
    assert_eq!(usage.prompt_tokens, crate::server::MAX_MODEL_LEN - 2);
}

#[tokio::test]
async fn too_many_alternatives_are_refused_by_name_and_limit() {
    let server = Server::free(says_world());
    let mut client = server.inference().await;
    let outputs = [
        (
            "logprobs",
            v1::OutputOptions {
                logprobs: Some(21),
                ..Default::default()
            },
        ),
        (
            "prompt_logprobs",
            v1::OutputOptions {
                prompt_logprobs: Some(21),
                ..Default::default()
            },
        ),
    ];
    for (param, output) in outputs {
        let error = RpcError::from(&client.generate(asking(output)).await.expect_err("refused"));
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::InvalidArgument, Some(param))
        );
        assert!(error.message.contains("20 (--max-logprobs)"), "{}", error.message);
    }
}
