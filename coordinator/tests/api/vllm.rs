//! vLLM's services beside ours: the same tokens, told in other words.

use phalanx_proto::{
    ErrorKind, RpcError,
    v1::GroupState,
    vllm::{
        self, CandidateTokens, GenerateRequest, GenerateResponse, RandomSampling, ResponseOptions,
        StoppingCriteria, TokenIds,
        candidate_tokens::Select,
        control_client::ControlClient,
        finish_info::{FinishReason, StopReason},
        generate_request::Prompt,
        inference_client::InferenceClient,
    },
};
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    ranks::PROMPT,
    server::{Server, Setup, TEXT, tokens},
};

/// What a client sends that wants to know everything.
fn request(seed: i64, max_new_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: tokens(PROMPT) })),
        sampling: Some(RandomSampling {
            num_sequences: 1,
            seed: Some(seed),
            ..RandomSampling::default()
        }),
        stopping: Some(StoppingCriteria {
            max_new_tokens,
            ..StoppingCriteria::default()
        }),
        response: Some(ResponseOptions {
            prompt_token_ids: true,
            output_token_ids: true,
            ..ResponseOptions::default()
        }),
        ..GenerateRequest::default()
    }
}

async fn client(server: &Server) -> InferenceClient<Channel> {
    InferenceClient::new(server.channel().await)
}

/// A server on which the sequence of seed 1 says `text` and ends.
fn saying(text: &str) -> Server {
    let mut script = tokens(text);
    script.push(TEXT.tokenizer().special_tokens().eos.expect("an end"));
    Server::free(Setup {
        scripts: vec![(1, script)],
        ..Setup::default()
    })
}

async fn streamed(server: &Server, request: GenerateRequest) -> Vec<GenerateResponse> {
    let stream = client(server)
        .await
        .generate_stream(request)
        .await
        .expect("accepted");
    let mut stream = stream.into_inner();
    let mut pieces = Vec::new();
    while let Some(piece) = stream.message().await.expect("no error") {
        pieces.push(piece);
    }
    pieces
}

#[tokio::test]
async fn a_whole_reply_and_a_streamed_one_say_the_same() {
    let server = saying(" is Paris.");
    let whole = client(&server)
        .await
        .generate(request(1, 40))
        .await
        .expect("a reply")
        .into_inner();
    let pieces = streamed(&server, request(1, 40)).await;
    let prompt = whole.prompt_info.expect("the prompt");
    assert_eq!(prompt.token_ids, tokens(PROMPT));
    assert_eq!(prompt.num_prompt_tokens as usize, prompt.token_ids.len());
    let output = whole.outputs.expect("an output");
    assert_eq!(output.text, " is Paris.");
    assert_eq!(output.num_tokens as usize, output.token_ids.len());
    let finish = output.finish_info.expect("an end");
    assert_eq!(
        (finish.finish_reason(), finish.num_output_tokens),
        (FinishReason::Stop, output.num_tokens)
    );
    assert_eq!(
        finish.stop_reason,
        output.token_ids.last().copied().map(StopReason::EosTokenId)
    );

    assert!(pieces.iter().skip(1).all(|piece| piece.prompt_info.is_none()));
    let outputs: Vec<_> = pieces.into_iter().filter_map(|piece| piece.outputs).collect();
    let text: String = outputs.iter().map(|piece| piece.text.as_str()).collect();
    let ids: Vec<u32> = outputs.iter().flat_map(|piece| piece.token_ids.clone()).collect();
    assert_eq!((text, ids), (output.text, output.token_ids));
    let last = outputs
        .last()
        .and_then(|piece| piece.finish_info.clone())
        .expect("an end");
    assert_eq!(last.num_output_tokens, output.num_tokens);
    assert!(
        last.num_cached_tokens.is_some_and(|cached| cached > 0),
        "the prompt was cached"
    );
}

#[tokio::test]
async fn sequences_are_told_apart_and_stop_strings_named() {
    let server = Server::free(Setup {
        scripts: vec![(1, tokens(" one two three")), (2, tokens(" four two five"))],
        ..Setup::default()
    });
    let mut both = request(1, 40);
    both.sampling.as_mut().expect("sampling").num_sequences = 2;
    both.stopping.as_mut().expect("stopping").stop_strings = vec![" two".into()];
    let refused = client(&server)
        .await
        .generate(both.clone())
        .await
        .expect_err("one reply, two texts");
    assert_eq!(
        RpcError::from(&refused).param.as_deref(),
        Some("sampling.num_sequences")
    );
    let pieces = streamed(&server, both).await;
    for (index, expected) in [(0, " one"), (1, " four")] {
        let mut of = pieces
            .iter()
            .filter_map(|piece| piece.outputs.as_ref())
            .filter(|output| output.index == index);
        let text: String = of.clone().map(|output| output.text.as_str()).collect();
        let finish = of
            .next_back()
            .and_then(|output| output.finish_info.clone())
            .expect("an end");
        assert_eq!(text, expected);
        assert_eq!(finish.stop_reason, Some(StopReason::StopString(" two".into())));
    }
}

#[tokio::test]
async fn logprobs_come_for_every_token() {
    let server = saying(" a b");
    let mut wants = request(1, 40);
    wants.response = Some(ResponseOptions {
        output_token_ids: true,
        output_logprobs: true,
        output_text: Some(false),
        output_candidates: Some(CandidateTokens {
            select: Some(Select::TopN(0)),
        }),
        ..ResponseOptions::default()
    });
    let output = client(&server)
        .await
        .generate(wants)
        .await
        .expect("a reply")
        .into_inner()
        .outputs;
    let output = output.expect("an output");
    let count = output.token_ids.len();
    assert!(count > 1 && output.text.is_empty());
    assert_eq!(
        (
            output.logprobs.len(),
            output.ranks.len(),
            output.candidate_tokens.len()
        ),
        (count, count, count)
    );
    assert!(
        output
            .candidate_tokens
            .iter()
            .all(|candidates| candidates.tokens.is_empty())
    );
}

#[tokio::test]
async fn errors_have_the_kinds_of_our_own_service() {
    let server = saying("x");
    let refused = async |edit: fn(&mut GenerateRequest)| {
        let mut request = request(1, 4);
        edit(&mut request);
        let status = client(&server)
            .await
            .generate(request)
            .await
            .expect_err("refused");
        let error = RpcError::from(&status);
        (error.kind, error.param.unwrap_or_default())
    };
    assert_eq!(
        refused(|request| request.model = "nobody".into()).await,
        (ErrorKind::NotFound, "model".into())
    );
    assert_eq!(
        refused(|request| request.temperature = Some(-1.0)).await,
        (ErrorKind::InvalidArgument, "temperature".into())
    );
    assert_eq!(
        refused(|request| request.prompt = None).await,
        (ErrorKind::InvalidArgument, "prompt".into())
    );
    assert_eq!(
        refused(|request| request.lora_name = "mine".into()).await,
        (ErrorKind::InvalidArgument, "lora_name".into())
    );
    assert_eq!(
        refused(|request| request.stopping.as_mut().expect("there").max_new_tokens = 9000).await,
        (ErrorKind::ContextLengthExceeded, "max_tokens".into())
    );
}

#[tokio::test]
async fn control_tells_what_runs_and_what_is_not_offered() {
    let server = saying("x");
    let mut control = ControlClient::new(server.channel().await);
    let info = control
        .get_server_info(vllm::GetServerInfoRequest {})
        .await
        .expect("a reply")
        .into_inner();
    assert_eq!((info.max_model_len, info.kv_block_size), (8192, 1));
    let parallelism = info.parallelism.expect("parallelism");
    assert_eq!((parallelism.tensor_parallel_size, parallelism.world_size), (2, 2));
    assert!(!info.instance_id.is_empty() && info.total_kv_blocks > 0);
    let model = control
        .get_model_info(vllm::GetModelInfoRequest {})
        .await
        .expect("a reply")
        .into_inner();
    assert_eq!(
        (model.served_model_name.as_str(), model.model_id.as_str()),
        ("demo", "/models/demo.gguf")
    );
    assert_eq!(model.served_model_aliases, ["alias"]);
    assert!(model.supports_token_ids_input && !model.supports_lora);
    let sleep = control
        .sleep(vllm::SleepRequest::default())
        .await
        .expect_err("not offered");
    assert_eq!(RpcError::from(&sleep).kind, ErrorKind::Unimplemented);
    let mut health = HealthClient::new(server.channel().await);
    server.status.update(|status| status.set_state(GroupState::Ready));
    let service = "vllm.Inference".to_owned();
    let mut watch = health
        .watch(HealthCheckRequest { service })
        .await
        .expect("watches")
        .into_inner();
    while watch
        .message()
        .await
        .expect("no error")
        .expect("a status")
        .status()
        != ServingStatus::Serving
    {}
}

#[tokio::test]
async fn control_aborts_by_id_and_asks_for_the_end() {
    let server = Server::start(Setup::default());
    let mut endless = request(7, 4000);
    endless.request_id = "mine".into();
    let stream = client(&server)
        .await
        .generate_stream(endless)
        .await
        .expect("accepted");
    let mut control = ControlClient::new(server.channel().await);
    let request_ids = vec!["mine".to_owned(), "nobody's".into()];
    control
        .abort(vllm::AbortRequest { request_ids })
        .await
        .expect("a reply");
    let piece = stream
        .into_inner()
        .message()
        .await
        .expect("no error")
        .expect("a piece");
    let finish = piece
        .outputs
        .and_then(|output| output.finish_info)
        .expect("an end");
    assert_eq!(
        (finish.finish_reason(), finish.num_output_tokens),
        (FinishReason::Aborted, 0)
    );
    control
        .shutdown(vllm::ShutdownRequest {})
        .await
        .expect("over a unix socket");
}
