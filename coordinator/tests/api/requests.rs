//! Completions and conversations, from the client's side.

use std::time::Duration;

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{self, FinishReason, admin_client::AdminClient, choice::StopReason, generate_request::Prompt},
};

use tokio::time::timeout;
use tonic::Streaming;

use crate::{
    ranks::{FILLER, Permit},
    server::{DEADLINE, MAX_MODEL_LEN, Server, Setup, next, open, piece, request, rest, tokens},
};

const EOS: u32 = 2;
/// Steps after which a sequence without `max_tokens` has filled its context.
const SELF_ENDING: u64 = MAX_MODEL_LEN as u64 - 2;

fn scripted(scripts: impl IntoIterator<Item = (u64, Vec<u32>)>) -> Setup {
    Setup {
        scripts: scripts.into_iter().collect(),
        ..Setup::default()
    }
}

/// The error a stream ends with.
async fn failure(stream: &mut Streaming<v1::GenerateChunk>) -> RpcError {
    loop {
        match next(stream).await {
            Ok(chunk) => assert!(chunk.is_some(), "the stream ended without an error"),
            Err(error) => return error,
        }
    }
}

#[tokio::test]
async fn a_stream_carries_text_tokens_logprobs_and_usage() {
    let mut server = Server::start(scripted([(1, vec![FILLER, EOS])]));
    let mut client = server.inference().await;
    let mut ask = request(1, |_| {});
    ask.request_id = "mine".into();
    ask.model = "alias".into();
    ask.output = Some(v1::OutputOptions {
        logprobs: Some(1),
        include_usage: true,
        continuous_usage: true,
        ..Default::default()
    });
    let mut stream = open(&mut client, ask.clone()).await;
    server.permit(Permit::Step);
    let first = next(&mut stream).await.expect("no error").expect("a chunk");
    assert_eq!(
        (first.request_id.as_str(), first.model.as_str()),
        ("mine", "demo")
    );
    let usage = |completion_tokens, cached_tokens| v1::Usage {
        prompt_tokens: 2,
        completion_tokens,
        cached_tokens,
    };
    assert_eq!(first.usage, Some(usage(1, 0)));
    let choice = first.choice.expect("a choice");
    assert_eq!(choice.text, " world");
    assert_eq!(choice.token_ids, [FILLER]);
    let logprobs = &choice.logprobs[0];
    assert_eq!((logprobs.text_offset, logprobs.top.len()), (0, 1));
    let chosen = logprobs.chosen.clone().expect("chosen");
    assert_eq!((chosen.token.as_str(), chosen.logprob), (" world", -0.5));
    assert_eq!(chosen.bytes, b" world");

    server.run_free();
    let (end, total) = rest(&mut stream).await;
    assert_eq!((end.text.as_str(), end.token_ids.as_slice()), ("", &[EOS][..]));
    assert_eq!((end.finish_reason(), end.stop_reason), (FinishReason::Stop, None));
    assert_eq!(total, Some(usage(2, 0)));

    let again = client.generate(ask).await.expect("a reply").into_inner();
    assert_eq!(again.usage, Some(usage(2, 1)), "the second time finds the prefix");
}

/// The chosen token first and each token once, in streams as in whole replies; only of the chosen one the rank is known.
#[tokio::test]
async fn listed_tokens_are_reported_in_place_of_the_best() {
    let server = Server::free(scripted([(1, vec![FILLER, EOS])]));
    let mut client = server.inference().await;
    let mut ask = request(1, |sampling| sampling.logprob_token_ids = vec![9, EOS, 9, FILLER]);
    ask.output = Some(v1::OutputOptions {
        logprobs: Some(3),
        ..Default::default()
    });
    let whole = client
        .generate(ask.clone())
        .await
        .expect("a reply")
        .into_inner()
        .choices
        .remove(0);
    let told = |choice: &v1::Choice| -> Vec<Vec<(u32, f32, Option<u32>)>> {
        let entry = |entry: &v1::TokenLogprob| (entry.token_id, entry.logprob, entry.rank);
        let tops = choice.logprobs.iter().map(|token| &token.top);
        tops.map(|top| top.iter().map(entry).collect()).collect()
    };
    let expected = [
        vec![(FILLER, -0.5, Some(1)), (9, -2.5, None), (EOS, -2.5, None)],
        vec![(EOS, -0.5, Some(1)), (9, -2.5, None), (FILLER, -2.5, None)],
    ];
    assert_eq!(told(&whole), expected);
    let (streamed, _) = rest(&mut open(&mut client, ask.clone()).await).await;
    assert_eq!(told(&streamed), expected);

    ask.output = None;
    let status = client.generate(ask).await.expect_err("nothing to report them in");
    let refused = RpcError::from(&status);
    assert_eq!(
        (refused.kind, refused.param.as_deref()),
        (ErrorKind::InvalidArgument, Some("logprob_token_ids"))
    );
}

#[tokio::test]
async fn requests_of_one_id_run_beside_each_other_and_end_together() {
    let server = Server::start(Setup::default());
    let mut client = server.inference().await;
    let mut ask = request(1, |sampling| sampling.ignore_eos = true);
    ask.request_id = "same".into();
    let mut streams = [open(&mut client, ask.clone()).await, open(&mut client, ask).await];
    // The first may have been planned alone.
    server.permit(Permit::Step);
    server.permit(Permit::Step);
    for stream in &mut streams {
        let first = next(stream).await.expect("no error").expect("a chunk");
        assert_eq!(first.request_id, "same");
    }
    let mut admin = AdminClient::new(server.channel().await);
    let ask = v1::AbortRequestRequest {
        request_id: "same".into(),
    };
    assert!(
        admin
            .abort_request(ask)
            .await
            .expect("a reply")
            .into_inner()
            .found
    );
    for stream in &mut streams {
        assert_eq!(rest(stream).await.0.finish_reason(), FinishReason::Abort);
    }
}

#[tokio::test]
async fn priority_salt_and_bias_reach_the_engine() {
    let server = Server::free(Setup::default());
    let mut client = server.inference().await;
    let biased = request(1, |sampling| {
        sampling.max_tokens = Some(1);
        sampling.logit_bias.insert(7, 1e9);
    });
    let mut refused = async |param: &str, edit: fn(&mut v1::GenerateRequest)| {
        let mut ask = biased.clone();
        edit(&mut ask);
        let error = RpcError::from(&client.generate(ask).await.expect_err(param));
        assert_eq!(error.param.as_deref(), Some(param), "{error}");
    };
    refused("priority", |ask| ask.priority = -1).await;
    refused("cache_salt", |ask| ask.cache_salt = Some(String::new())).await;
    refused("cache_salt", |ask| ask.cache_salt = Some("x".repeat(257))).await;

    let mut cached = async |salt: Option<&str>| {
        let mut ask = biased.clone();
        ask.cache_salt = salt.map(str::to_owned);
        let reply = client.generate(ask).await.expect("a reply").into_inner();
        assert_eq!(reply.choices[0].token_ids, [7], "the bias decides");
        reply.usage.expect("usage").cached_tokens
    };
    assert_eq!(cached(Some("a")).await, 0);
    assert_eq!(cached(None).await, 0, "another's prefix is not seen");
    assert_eq!(cached(Some("a")).await, 1);
}

#[tokio::test]
async fn a_unary_call_merges_n_choices() {
    let newline = tokens("\n")[0];
    let one = [tokens("one"), vec![newline]].concat();
    let two = tokens("two 🙂");
    let server = Server::free(scripted([(7, one.clone()), (8, two.clone())]));
    let mut client = server.inference().await;
    let ask = request(7, |sampling| {
        sampling.n = Some(2);
        sampling.stop_token_ids = vec![newline];
        sampling.max_tokens = Some(two.len() as u32);
    });
    let reply = client.generate(ask).await.expect("a reply").into_inner();
    let [first, second] = reply.choices.as_slice() else {
        panic!("two choices: {reply:?}")
    };
    assert_eq!((first.index, first.text.as_str()), (0, "one"));
    assert_eq!(first.token_ids, one);
    assert_eq!(first.stop_reason, Some(StopReason::StopTokenId(newline)));
    assert_eq!((second.index, second.text.as_str()), (1, "two 🙂"));
    assert_eq!(second.finish_reason(), FinishReason::Length);
    let made = (one.len() + two.len()) as u32;
    assert_eq!(reply.usage.expect("usage").completion_tokens, made);
    assert!(reply.request_id.starts_with("cmpl-"), "{}", reply.request_id);
}

#[tokio::test]
async fn conversations_are_rendered_and_completed() {
    // The ranks count from a two-token prompt, so this one's script would be over: it says the filler.
    let server = Server::free(Setup::default());
    let mut client = server.inference().await;
    let ask = v1::ChatRequest {
        messages: vec![v1::ChatMessage {
            role: "user".into(),
            content: "Hi".into(),
            ..v1::ChatMessage::default()
        }],
        sampling: Some(v1::SamplingParams {
            max_tokens: Some(3),
            ..v1::SamplingParams::default()
        }),
        ..v1::ChatRequest::default()
    };
    let reply = client.chat(ask.clone()).await.expect("a reply").into_inner();
    assert_eq!(reply.choices[0].text, " world world world");
    assert!(reply.request_id.starts_with("chatcmpl-"));
    let mut stream = client.chat_stream(ask).await.expect("accepted").into_inner();
    let (whole, usage) = rest(&mut stream).await;
    assert_eq!(whole.text, " world world world");
    assert_eq!(usage, None, "not asked for");
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_sequence() {
    let mut server = Server::start(scripted([(1, tokens("Hello world"))]));
    let mut client = server.inference().await;
    let ask = request(1, |sampling| sampling.stop = vec!["o wor".into()]);
    let mut stream = open(&mut client, ask).await;
    server.permit(Permit::Step);
    let held = piece(&mut stream).await;
    assert_eq!((held.text.as_str(), held.finish_reason), ("Hell", 0));
    server.run_free();
    let (end, _) = rest(&mut stream).await;
    assert_eq!((end.text.as_str(), end.finish_reason()), ("", FinishReason::Stop));
    assert_eq!(end.stop_reason, Some(StopReason::StopString("o wor".into())));
    server.idle().await;
}

#[tokio::test]
async fn stops_are_shown_if_asked_for_and_wait_for_min_tokens() {
    let newline = tokens("\n")[0];
    let lines = tokens("a b\nc d\n");
    assert_eq!(lines.len(), 6);
    let server = Server::free(scripted([(1, lines)]));
    let mut client = server.inference().await;
    let mut text = async |edit: fn(&mut v1::SamplingParams, u32)| {
        let ask = request(1, |sampling| edit(sampling, newline));
        let reply = client.generate(ask).await.expect("a reply").into_inner();
        reply.choices[0].text.clone()
    };
    let by_token = text(|sampling, newline| {
        sampling.stop_token_ids = vec![newline];
        sampling.include_stop_str_in_output = true;
    });
    assert_eq!(by_token.await, "a b\n");
    let by_string = text(|sampling, _| {
        sampling.stop = vec![" b\n".into()];
        sampling.include_stop_str_in_output = true;
    });
    assert_eq!(by_string.await, "a b\n");
    let late = text(|sampling, _| {
        sampling.stop = vec!["\n".into()];
        sampling.min_tokens = Some(4);
    });
    assert_eq!(late.await, "a b\nc d");
}

#[tokio::test]
async fn half_characters_wait_for_their_end() {
    let smile = tokens("🙂");
    assert!(smile.len() > 1);
    let server = Server::start(scripted([(1, smile.clone())]));
    let mut client = server.inference().await;
    let ask = request(1, |sampling| sampling.max_tokens = Some(smile.len() as u32));
    let mut stream = open(&mut client, ask).await;
    for left in (0..smile.len()).rev() {
        server.permit(Permit::Step);
        let text = piece(&mut stream).await.text;
        assert_eq!(text, if left == 0 { "🙂" } else { "" });
    }
}

#[tokio::test]
async fn a_client_that_drops_its_stream_aborts_its_sequence() {
    let server = Server::start(Setup::default());
    let mut client = server.inference().await;
    let mut stream = open(&mut client, request(1, |_| {})).await;
    server.permit(Permit::Step);
    piece(&mut stream).await;
    server.running(1).await;
    drop(stream);
    assert!(server.steps_until_idle().await < SELF_ENDING);
}

#[tokio::test]
async fn a_client_that_gives_up_a_unary_call_aborts_its_sequence() {
    let server = Server::start(Setup::default());
    let mut client = server.inference().await;
    let call = tokio::spawn(async move { client.generate(request(1, |_| {})).await });
    server.permit(Permit::Step);
    server.running(1).await;
    call.abort();
    assert!(server.steps_until_idle().await < SELF_ENDING);
}

#[tokio::test]
async fn abort_request_ends_every_choice_and_frees_the_id() {
    let server = Server::start(Setup::default());
    let mut client = server.inference().await;
    let mut admin = AdminClient::new(server.channel().await);
    let mut ask = request(1, |sampling| sampling.n = Some(2));
    ask.request_id = "r1".into();
    let mut stream = open(&mut client, ask.clone()).await;
    server.permit(Permit::Step);
    server.permit(Permit::Step);
    server.running(2).await;

    let abort = |request_id: &str| v1::AbortRequestRequest {
        request_id: request_id.into(),
    };
    let reply = admin.abort_request(abort("r2")).await.expect("a reply");
    assert!(!reply.into_inner().found);
    let reply = admin.abort_request(abort("r1")).await.expect("a reply");
    assert!(reply.into_inner().found);
    let mut ends = Vec::new();
    while let Some(chunk) = next(&mut stream).await.expect("no error") {
        let choice = chunk.choice.expect("no usage was asked for");
        if choice.finish_reason() != FinishReason::Unspecified {
            ends.push((choice.index, choice.finish_reason()));
        }
    }
    assert_eq!(ends, [(0, FinishReason::Abort), (1, FinishReason::Abort)]);
    drop(stream);
    assert!(server.steps_until_idle().await < SELF_ENDING);
    ask.sampling = request(1, |sampling| sampling.max_tokens = Some(1)).sampling;
    server.permit(Permit::Step);
    client.generate(ask).await.expect("the id is free again");
}

#[tokio::test]
async fn a_request_that_does_not_fit_the_queue_leaves_nothing_there() {
    let server = Server::start(Setup {
        max_num_seqs: 1,
        max_num_queued_reqs: 1,
        ..Setup::default()
    });
    let mut client = server.inference().await;
    let three = request(1, |sampling| sampling.n = Some(3));
    let full = client.generate(three).await.expect_err("two of three fit");
    let full = RpcError::from(&full);
    assert_eq!(full.kind, ErrorKind::QueueFull);
    assert!(full.kind.is_retryable());
    // The places of those that fitted are free as soon as the engine has heard of its end.
    let retry = async {
        loop {
            server.permit(Permit::Step);
            match client.generate_stream(request(1, |_| {})).await {
                Ok(stream) => return stream,
                Err(status) => assert_eq!(RpcError::from(&status).kind, ErrorKind::QueueFull),
            }
        }
    };
    timeout(DEADLINE, retry).await.expect("accepted in time");
    assert!(server.engine.status().snapshot.num_steps < SELF_ENDING);
}

#[tokio::test]
async fn a_lost_group_reaches_the_client_with_its_kind() {
    let server = Server::start(Setup::default());
    let mut client = server.inference().await;
    let mut stream = open(&mut client, request(1, |_| {})).await;
    server.permit(Permit::Step);
    piece(&mut stream).await;
    server.permit(Permit::LoseRank);
    let error = failure(&mut stream).await;
    assert_eq!(error.kind, ErrorKind::WorkerLost);
    assert!(error.message.contains("rank 3 lost: killed"), "{}", error.message);
}

#[tokio::test]
async fn an_engine_that_stops_is_an_error_not_a_hang() {
    let mut server = Server::start(Setup::default());
    let mut client = server.inference().await;
    let mut stream = open(&mut client, request(1, |_| {})).await;
    server.permit(Permit::Step);
    piece(&mut stream).await;
    server.engine.shutdown();
    server.run_free();
    let error = failure(&mut stream).await;
    assert_eq!(error.kind, ErrorKind::Unavailable);
}

#[tokio::test]
async fn bad_requests_are_refused_before_the_engine() {
    let server = Server::start(Setup::default());
    let mut client = server.inference().await;
    let mut unknown = request(1, |_| {});
    unknown.model = "gpt-4".into();
    let error = RpcError::from(&client.generate(unknown).await.expect_err("unknown"));
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert_eq!(error.message, "The model `gpt-4` does not exist.");
    let mut control = request(1, |_| {});
    control.request_id = "a\nb".into();
    let error = RpcError::from(&client.generate(control).await.expect_err("control character"));
    assert_eq!(error.param.as_deref(), Some("request_id"));
    let hot = request(1, |sampling| sampling.temperature = Some(-1.0));
    let error = RpcError::from(&client.generate_stream(hot).await.expect_err("out of range"));
    assert_eq!(error.param.as_deref(), Some("temperature"));

    let mut large = request(1, |_| {});
    large.prompt = Some(Prompt::Text("x".repeat(5 << 20)));
    let error = RpcError::from(&client.generate(large).await.expect_err("too large"));
    assert_eq!(error.kind, ErrorKind::PayloadTooLarge);

    let empty = client.chat(v1::ChatRequest::default()).await;
    let error = RpcError::from(&empty.expect_err("no messages"));
    assert_eq!(error.param.as_deref(), Some("messages"));
    assert_eq!(server.engine.status().snapshot.num_steps, 0);
}

/// A stream nobody reads holds a window of 64 KiB; with alternatives, that is some hundred tokens.
#[tokio::test]
async fn a_slow_client_stops_only_itself() {
    let server = Server::free(Setup {
        stream_capacity: 64,
        ..Setup::default()
    });
    let mut slow = server.inference().await;
    let mut ask = request(1, |_| {});
    ask.output = Some(v1::OutputOptions {
        logprobs: Some(20),
        ..v1::OutputOptions::default()
    });
    let mut unread = open(&mut slow, ask).await;
    let mut quick = server.inference().await;
    let ask = request(2, |sampling| sampling.max_tokens = Some(3));
    let reply = quick.generate(ask).await.expect("a reply").into_inner();
    assert_eq!(reply.choices[0].text, " world world world");

    server.idle().await;
    let error = failure(&mut unread).await;
    assert_eq!(error.kind, ErrorKind::QueueFull);
    assert!(error.message.contains("was not read"), "{}", error.message);
}

#[tokio::test]
async fn a_deadline_ends_a_request_and_frees_its_blocks() {
    let server = Server::start(Setup::default());
    let mut client = server.inference().await;
    let mut ask = request(1, |sampling| sampling.ignore_eos = true);
    ask.timeout_ms = Some(200);
    let mut own = open(&mut client, ask.clone()).await;
    server.permit(Permit::Step);
    next(&mut own).await.expect("no error").expect("a token in time");
    let error = failure(&mut own).await;
    assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
    assert!(error.message.contains("200ms"), "{}", error.message);
    ask.timeout_ms = None;
    let mut call = tonic::Request::new(ask.clone());
    call.set_timeout(Duration::from_millis(100));
    let mut of_call = client.generate_stream(call).await.expect("accepted").into_inner();
    assert_eq!(failure(&mut of_call).await.kind, ErrorKind::DeadlineExceeded);
    ask.timeout_ms = Some(0);
    let error = client.generate(ask).await.expect_err("refused");
    assert_eq!(RpcError::from(&error).param.as_deref(), Some("timeout"));
    assert!(server.steps_until_idle().await < 10, "nobody computes on");
}
