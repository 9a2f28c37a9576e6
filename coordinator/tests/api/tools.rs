//! Calls of tools and reasoning, from the tokens of the ranks to the pieces of a stream.

use std::sync::Arc;

use phalanx_coordinator::text::{ChatOptions, ModelLimits, TextOptions, TextProcessor};
use phalanx_proto::{
    RpcError,
    v1::{self, FinishReason},
};

use crate::{
    ranks::{PROMPT, Permit},
    server::{MAX_MODEL_LEN, Server, Setup, next, request, tokens},
    support::demo_model,
};

const EOS: u32 = 2;
const TOOLS: &str = r#"[{"type": "function", "function": {"name": "get_weather"}}]"#;
const SAYS: &str = "Hm.</think>Let me look.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \
                    \"Paris\"}}\n</tool_call>";

/// Every conversation is the ranks' prompt; what the model says is of Hermes' kind.
fn text() -> Arc<TextProcessor> {
    let options = TextOptions {
        limits: ModelLimits {
            max_model_len: MAX_MODEL_LEN,
            vocab_size: 49_152,
            max_logprobs: 20,
        },
        chat_template: Some(PROMPT.to_owned()),
        chat: ChatOptions {
            tool_parser: Some("hermes".parse().expect("known")),
            reasoning_parser: Some("deepseek_r1".parse().expect("known")),
            ..ChatOptions::default()
        },
        threads: Some(1),
        seed: None,
    };
    Arc::new(TextProcessor::new(demo_model(), options).expect("loads"))
}

fn says(text_said: &str) -> Setup {
    let mut script = tokens(text_said);
    script.push(EOS);
    Setup {
        scripts: vec![(1, script)],
        text: text(),
        ..Setup::default()
    }
}

fn ask(tools: &str) -> v1::ChatRequest {
    v1::ChatRequest {
        messages: vec![v1::ChatMessage {
            role: "user".into(),
            content: "Weather?".into(),
            ..v1::ChatMessage::default()
        }],
        sampling: Some(v1::SamplingParams {
            seed: Some(1),
            ..v1::SamplingParams::default()
        }),
        tools_json: tools.into(),
        ..v1::ChatRequest::default()
    }
}

#[tokio::test]
async fn a_whole_reply_tells_reasoning_content_and_calls_apart() {
    let server = Server::free(says(SAYS));
    let mut client = server.inference().await;
    let reply = client.chat(ask(TOOLS)).await.expect("a reply").into_inner();
    let choice = &reply.choices[0];
    assert_eq!(choice.reasoning.as_deref(), Some("Hm."));
    assert_eq!(choice.text, "Let me look.");
    let [call] = choice.tool_calls.as_slice() else {
        panic!("one call: {choice:?}");
    };
    assert!(call.id.starts_with("chatcmpl-tool-"));
    assert_eq!(
        (call.name.as_str(), call.arguments.as_str()),
        ("get_weather", r#"{"city": "Paris"}"#)
    );
    assert_eq!(choice.finish_reason(), FinishReason::ToolCalls);
}

#[tokio::test]
async fn without_tools_a_call_is_text() {
    let server = Server::free(says(SAYS));
    let mut client = server.inference().await;
    for request in [
        ask(""),
        v1::ChatRequest {
            tool_choice: Some(v1::ToolChoice {
                mode: v1::tool_choice::Mode::None.into(),
                function: String::new(),
            }),
            ..ask(TOOLS)
        },
    ] {
        let reply = client.chat(request).await.expect("a reply").into_inner();
        let choice = &reply.choices[0];
        assert_eq!(Some(choice.text.as_str()), SAYS.strip_prefix("Hm.</think>"));
        assert_eq!(choice.finish_reason(), FinishReason::Stop);
    }
}

#[tokio::test]
async fn a_stream_tells_arguments_as_they_come_and_never_half_a_tag() {
    let server = Server::start(says(SAYS));
    let mut client = server.inference().await;
    let mut stream = client
        .chat_stream(ask(TOOLS))
        .await
        .expect("accepted")
        .into_inner();
    let (mut reasoning, mut text, mut arguments) = (String::new(), String::new(), Vec::new());
    let mut last = FinishReason::Unspecified;
    loop {
        server.permit(Permit::Step);
        let Some(chunk) = next(&mut stream).await.expect("no error") else {
            break;
        };
        let choice = chunk.choice.expect("a choice");
        last = choice.finish_reason();
        reasoning.push_str(choice.reasoning.as_deref().unwrap_or_default());
        text.push_str(&choice.text);
        assert!(!choice.text.contains('<'), "{:?}", choice.text);
        for call in choice.tool_calls {
            assert_eq!(call.index, 0);
            assert_eq!(
                call.id.is_empty(),
                !arguments.is_empty(),
                "the first piece has the id"
            );
            arguments.push(call.arguments);
        }
    }
    assert_eq!((reasoning.as_str(), text.as_str()), ("Hm.", "Let me look."));
    assert!(arguments.len() > 2, "{arguments:?}");
    assert_eq!(arguments.concat(), r#"{"city": "Paris"}"#);
    assert_eq!(last, FinishReason::ToolCalls);
}

#[tokio::test]
async fn a_call_that_was_cut_short_ends_for_its_length() {
    let cut = &SAYS[..SAYS.len() - 20];
    let server = Server::free(says(cut));
    let mut client = server.inference().await;
    let mut request = ask(TOOLS);
    let sampling = request.sampling.as_mut().expect("set");
    sampling.max_tokens = Some(tokens(cut).len() as u32);
    let reply = client.chat(request).await.expect("a reply").into_inner();
    let choice = &reply.choices[0];
    assert_eq!(choice.tool_calls.len(), 1);
    assert_eq!(choice.finish_reason(), FinishReason::Length);
}

/// Reasoning, text, names and arguments of calls, and the end.
fn told(pieces: &[v1::Choice]) -> ([String; 4], FinishReason) {
    let mut all: [String; 4] = Default::default();
    for piece in pieces {
        all[0].push_str(piece.reasoning.as_deref().unwrap_or_default());
        all[1].push_str(&piece.text);
        for call in &piece.tool_calls {
            all[2].push_str(&call.name);
            all[3].push_str(&call.arguments);
        }
    }
    let end = pieces
        .last()
        .map_or(FinishReason::Unspecified, v1::Choice::finish_reason);
    (all, end)
}

#[tokio::test]
async fn calls_and_reasoning_go_on_where_another_server_was_lost() {
    let play = async |resume: Vec<v1::ResumedChoice>| {
        let server = Server::start(says(SAYS));
        let request = v1::ChatRequest { resume, ..ask(TOOLS) };
        let mut client = server.inference().await;
        let mut stream = client.chat_stream(request).await.expect("accepted").into_inner();
        let mut pieces = Vec::new();
        loop {
            server.permit(Permit::Step);
            let Some(chunk) = next(&mut stream).await.expect("no error") else {
                return pieces;
            };
            pieces.push(chunk.choice.expect("a choice"));
        }
    };
    let undisturbed = play(Vec::new()).await;
    for cut in 1..undisturbed.len() {
        let (known, rest) = undisturbed.split_at(cut);
        let resumed = v1::ResumedChoice {
            token_ids: known.iter().flat_map(|piece| piece.token_ids.clone()).collect(),
            ended_after: None,
        };
        assert_eq!(told(&play(vec![resumed]).await), told(rest), "after {cut} pieces");
    }
}

#[tokio::test]
async fn reasoning_ends_when_its_budget_is_spent() {
    let server = Server::free(says(
        "<think>I could think about this for a very long time.</think>Done.",
    ));
    let mut client = server.inference().await;
    let mut think = async |budget: Option<u32>| {
        let mut asked = ask("");
        let sampling = asked.sampling.as_mut().expect("given");
        (sampling.thinking_token_budget, sampling.max_tokens) = (budget, Some(30));
        let reply = client.chat(asked).await.expect("a reply").into_inner();
        let choice = reply.choices.into_iter().next().expect("a choice");
        (choice.reasoning.expect("told"), choice.text)
    };
    let (whole, text) = think(None).await;
    assert_eq!(
        (whole.as_str(), text.as_str()),
        ("I could think about this for a very long time.", "Done.")
    );
    for budget in [0, 1, 4] {
        let (reasoning, text) = think(Some(budget)).await;
        assert!(
            whole.starts_with(&reasoning) && !text.is_empty(),
            "{reasoning}: {text}"
        );
        assert_eq!(tokens(&reasoning).len(), budget as usize, "{reasoning}");
    }
    assert_eq!(think(Some(100)).await.0, whole);
    server.idle().await;
}

#[tokio::test]
async fn a_budget_needs_a_reasoning_parser() {
    let server = Server::free(Setup::default());
    let mut client = server.inference().await;
    let asked = request(1, |sampling| sampling.thinking_token_budget = Some(5));
    let error = RpcError::from(&client.generate(asked).await.expect_err("refused"));
    assert_eq!(error.param.as_deref(), Some("thinking_token_budget"));
    assert!(error.message.contains("--reasoning-parser"), "{error}");
}
