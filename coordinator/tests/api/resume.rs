//! Going on where another server was lost: the rest is what the undisturbed stream would have brought.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{
        self, Choice, FinishReason, RepetitionDetection, ResumedChoice, SamplingParams, Usage,
        choice::StopReason,
    },
};

use crate::{
    ranks::Permit,
    server::{Server, Setup, next, open, piece, request, rest, tokens},
};

const EOS: u32 = 2;

fn known(token_ids: &[u32]) -> ResumedChoice {
    ResumedChoice {
        token_ids: token_ids.to_vec(),
        ended_after: None,
    }
}

fn asking(script: &[u32], edit: impl Fn(&mut SamplingParams)) -> (Setup, v1::GenerateRequest) {
    let setup = Setup {
        scripts: vec![(1, script.to_vec())],
        ..Setup::default()
    };
    let mut ask = request(1, edit);
    ask.output = Some(v1::OutputOptions {
        logprobs: Some(1),
        include_usage: true,
        ..Default::default()
    });
    (setup, ask)
}

/// The pieces of a stream, one for each step, and its usage.
async fn pieces(setup: Setup, ask: v1::GenerateRequest) -> (Vec<Choice>, Option<Usage>) {
    let server = Server::start(setup);
    let mut stream = open(&mut server.inference().await, ask).await;
    let mut pieces = Vec::new();
    loop {
        server.permit(Permit::Step);
        let chunk = next(&mut stream).await.expect("no error").expect("a chunk");
        let piece = chunk.choice.expect("a choice");
        let is_last = piece.finish_reason() != FinishReason::Unspecified;
        pieces.push(piece);
        if is_last {
            let usage = next(&mut stream).await.expect("no error").expect("a chunk").usage;
            return (pieces, usage);
        }
    }
}

fn join(pieces: &[Choice]) -> Choice {
    let mut whole = Choice::default();
    for piece in pieces {
        whole.text.push_str(&piece.text);
        whole.token_ids.extend(&piece.token_ids);
        whole.logprobs.extend(piece.logprobs.clone());
        whole.finish_reason = piece.finish_reason;
        whole.stop_reason = piece.stop_reason.clone();
    }
    whole
}

/// Plays `script` undisturbed, then from every point at which a server could have been lost; with an echoed prompt, too.
async fn assert_seamless(script: &[u32], edit: impl Fn(&mut SamplingParams)) -> Choice {
    play(script, &edit, true).await;
    play(script, &edit, false).await
}

async fn play(script: &[u32], edit: &impl Fn(&mut SamplingParams), echo: bool) -> Choice {
    let (setup, mut ask) = asking(script, edit);
    if let Some(output) = &mut ask.output {
        output.echo = echo;
    }
    let (pieces, usage) = pieces(setup, ask.clone()).await;
    for cut in 0..pieces.len() {
        let (setup, _) = asking(script, edit);
        let server = Server::free(setup);
        let mut resumed = ask.clone();
        resumed.resume = vec![known(&join(&pieces[..cut]).token_ids)];
        let mut stream = open(&mut server.inference().await, resumed).await;
        let (whole, total) = rest(&mut stream).await;
        // As text: a prompt's first token has NaN, which equals nothing.
        let told = |choice: &Choice| format!("{choice:?}");
        assert_eq!(told(&whole), told(&join(&pieces[cut..])), "after {cut} pieces");
        let counts = |usage: Option<Usage>| usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
        assert_eq!(counts(total), counts(usage), "after {cut} pieces");
        server.idle().await;
    }
    join(&pieces)
}

#[tokio::test]
async fn text_goes_on_inside_a_character() {
    let script = [tokens("a 🙂 b"), vec![EOS]].concat();
    let whole = assert_seamless(&script, |_| {}).await;
    assert_eq!(
        (whole.text.as_str(), whole.finish_reason()),
        ("a 🙂 b", FinishReason::Stop)
    );
}

#[tokio::test]
async fn a_stop_string_is_found_across_the_seam() {
    let stop = |sampling: &mut SamplingParams| sampling.stop = vec!["o wor".into(), "never".into()];
    let whole = assert_seamless(&tokens("Hello world, and so on"), stop).await;
    assert_eq!(whole.text, "Hell");
    assert_eq!(whole.stop_reason, Some(StopReason::StopString("o wor".into())));
}

/// Of any one token.
fn twice() -> RepetitionDetection {
    RepetitionDetection {
        max_pattern_size: 1,
        min_pattern_size: 0,
        min_count: 2,
    }
}

#[tokio::test]
async fn limits_count_from_the_first_token() {
    let newline = tokens("\n")[0];
    let lines = tokens("a b\nc d\ne f\n");
    let stop = |sampling: &mut SamplingParams| {
        sampling.stop_token_ids = vec![newline];
        sampling.min_tokens = Some(4);
    };
    let whole = assert_seamless(&lines, stop).await;
    assert_eq!(whole.stop_reason, Some(StopReason::StopTokenId(newline)));
    let song = tokens("so la la la la");
    let circles = |sampling: &mut SamplingParams| sampling.repetition_detection = Some(twice());
    let whole = assert_seamless(&song, circles).await;
    assert_eq!(whole.finish_reason(), FinishReason::Repetition);
    assert_eq!(whole.text, "so la la");
    let whole = assert_seamless(&lines, |sampling| sampling.max_tokens = Some(5)).await;
    assert_eq!(
        (whole.token_ids.len(), whole.finish_reason()),
        (5, FinishReason::Length)
    );
}

#[tokio::test]
async fn an_end_that_was_not_told_is_told_without_a_step() {
    let (setup, ask) = asking(&[], |sampling| {
        sampling.max_tokens = Some(3);
        sampling.repetition_detection = Some(twice());
    });
    let server = Server::start(setup);
    let mut client = server.inference().await;
    let mut end = async |token_ids: &[u32]| {
        let mut ask = ask.clone();
        ask.resume = vec![known(token_ids)];
        let mut stream = open(&mut client, ask).await;
        let (whole, usage) = rest(&mut stream).await;
        assert_eq!((whole.text.as_str(), whole.token_ids.len()), ("", 0));
        (whole.finish_reason(), usage.expect("asked for").completion_tokens)
    };
    assert_eq!(end(&[905, EOS]).await, (FinishReason::Stop, 2));
    assert_eq!(end(&[905, 904, 905]).await, (FinishReason::Length, 3));
    assert_eq!(end(&[905, 905]).await, (FinishReason::Repetition, 2));
    assert_eq!(server.engine.status().snapshot.num_steps, 0);
}

#[tokio::test]
async fn ended_choices_are_counted_and_not_repeated() {
    let word = tokens(" one");
    let setup = Setup {
        scripts: vec![(7, word.clone()), (8, [word.clone(), word.clone()].concat())],
        ..Setup::default()
    };
    let server = Server::free(setup);
    let mut client = server.inference().await;
    let mut ask = request(7, |sampling| {
        sampling.n = Some(2);
        sampling.max_tokens = Some(2);
    });
    ask.resume = vec![
        ResumedChoice {
            token_ids: vec![],
            ended_after: Some(2),
        },
        known(&word),
    ];
    ask.output = Some(v1::OutputOptions {
        include_usage: true,
        ..v1::OutputOptions::default()
    });
    let mut stream = open(&mut client, ask.clone()).await;
    let choice = piece(&mut stream).await;
    assert_eq!((choice.index, choice.text.as_str()), (1, " one"));
    let (end, usage) = rest(&mut stream).await;
    assert_eq!(
        (end.text.as_str(), usage.expect("asked for").completion_tokens),
        ("", 4)
    );

    ask.resume[1] = ask.resume[0].clone();
    let mut stream = open(&mut client, ask).await;
    let chunk = next(&mut stream).await.expect("no error").expect("a chunk");
    assert_eq!(chunk.choice, None, "nothing is left but the usage");
    assert_eq!(chunk.usage.expect("the usage").completion_tokens, 4);
}

#[tokio::test]
async fn what_cannot_be_resumed_is_refused_by_name() {
    let (setup, ask) = asking(&[], |sampling| sampling.max_tokens = Some(3));
    let server = Server::free(setup);
    let mut client = server.inference().await;
    for resume in [
        vec![known(&[1]), known(&[1])],
        vec![known(&[1; 4])],
        vec![known(&[49_152])],
        vec![ResumedChoice {
            token_ids: vec![],
            ended_after: Some(4),
        }],
    ] {
        let mut ask = ask.clone();
        ask.resume = resume;
        let error = RpcError::from(&client.generate(ask).await.expect_err("refused"));
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::InvalidArgument, Some("resume"))
        );
    }
}

#[tokio::test]
async fn a_seed_comes_before_the_fallback() {
    let script = tokens(" one two");
    let setup = Setup {
        scripts: vec![(5, script.clone()), (6, tokens(" other words"))],
        ..Setup::default()
    };
    let server = Server::free(setup);
    let mut client = server.inference().await;
    for (seed, text) in [(None, " one two"), (Some(6), " other words")] {
        let ask = request(1, |sampling| {
            sampling.seed = seed;
            sampling.fallback_seed = Some(5);
            sampling.max_tokens = Some(script.len() as u32);
        });
        let reply = client.generate(ask).await.expect("a reply").into_inner();
        assert_eq!(reply.choices[0].text, text);
    }
}
