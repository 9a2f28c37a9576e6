//! The services over a real gRPC server on a unix socket. The engine's place is taken by the test: it receives every
//! sequence the services submit and plays the events back by hand.

mod support;

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use phalanx_coordinator::{
    api::{Api, Engine, Listeners, MetricsSource, StatusHandle, serve},
    engine::FinishReason,
    engine_thread::{NewSequence, StreamEvent, Submission},
    text::TextProcessor,
};
use phalanx_proto::{
    ErrorKind, RpcError,
    step::{SampledToken, SequenceId},
    v1::{
        self, GroupState, admin_client::AdminClient, choice::StopReason, generate_request::Prompt,
        inference_client::InferenceClient,
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

static TEXT: LazyLock<Arc<TextProcessor>> = LazyLock::new(|| Arc::new(support::demo_processor(8192)));
/// Longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(30);
const EOS: u32 = 2;

/// A sequence as the engine sees it.
struct Sequence {
    request: NewSequence,
    id: SequenceId,
    events: mpsc::Sender<StreamEvent>,
}

impl Sequence {
    async fn send(&self, event: StreamEvent) {
        self.events.send(event).await.expect("the request still listens");
    }
    fn sampled(&self, token: u32) -> SampledToken {
        SampledToken {
            sequence: self.id,
            token,
            finite: true,
            logprob: None,
            top_logprobs: Vec::new(),
        }
    }
    async fn token(&self, token: u32) {
        self.send(StreamEvent::Token(self.sampled(token))).await;
    }
    async fn text(&self, text: &str) {
        for token in TEXT.tokenizer().encode(text, false).expect("encodes") {
            self.token(token).await;
        }
    }
    async fn finish(&self, reason: FinishReason) {
        self.send(StreamEvent::Finished(reason)).await;
    }
    /// Returns once the services have dropped the sequence, which is what aborts it.
    async fn dropped(&self) {
        timeout(DEADLINE, self.events.closed())
            .await
            .expect("dropped in time");
    }
}

/// Hands every submitted sequence to the test.
struct HandFedEngine {
    sequences: mpsc::UnboundedSender<Sequence>,
    next_id: AtomicU64,
    /// Sequences accepted before the queue is full.
    capacity: u64,
}

impl Engine for HandFedEngine {
    fn submit(&self, request: NewSequence) -> Result<Submission, RpcError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        if id >= self.capacity {
            return Err(RpcError::new(ErrorKind::QueueFull, "the queue is full"));
        }
        let id = SequenceId(id);
        let (sender, events) = mpsc::channel(64);
        let sequence = Sequence {
            request,
            id,
            events: sender,
        };
        self.sequences.send(sequence).expect("the test listens");
        Ok(Submission { id, events })
    }
}

struct FixedMetrics;

impl MetricsSource for FixedMetrics {
    fn render(&self) -> (String, Vec<u8>) {
        ("text/plain".into(), b"# EOF\n".to_vec())
    }
}

struct Server {
    socket: PathBuf,
    status: StatusHandle,
    sequences: mpsc::UnboundedReceiver<Sequence>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        Self::with_capacity(u64::MAX)
    }

    fn with_capacity(capacity: u64) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("api.sock");
        let (sender, sequences) = mpsc::unbounded_channel();
        let status = StatusHandle::new();
        let api = Api {
            text: TEXT.clone(),
            engine: Arc::new(HandFedEngine {
                sequences: sender,
                next_id: AtomicU64::new(0),
                capacity,
            }),
            metrics: Arc::new(FixedMetrics),
            status: status.clone(),
            served_model_names: vec!["demo".into(), "alias".into()],
            model_root: "/models/demo.gguf".into(),
        };
        let mut listeners = Listeners::default();
        listeners.bind_unix(&socket).expect("a free path");
        let (stop, stopped) = oneshot::channel::<()>();
        let routes = api.routes();
        let serving = tokio::spawn(async move {
            let shutdown = async { stopped.await.unwrap_or_default() };
            serve(routes, listeners, shutdown, DEADLINE)
                .await
                .expect("serves");
        });
        Self {
            socket,
            status,
            sequences,
            stop,
            serving,
            _dir: dir,
        }
    }

    async fn channel(&self) -> Channel {
        connect(&self.socket).await
    }

    async fn inference(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel().await)
    }

    async fn sequence(&mut self) -> Sequence {
        let sequence = timeout(DEADLINE, self.sequences.recv()).await;
        sequence.expect("submitted in time").expect("the server lives")
    }
}

async fn connect(socket: &Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("a URI");
    endpoint.connect().await.expect("connects")
}

fn request(prompt: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(Prompt::Text(prompt.into())),
        ..v1::GenerateRequest::default()
    }
}

async fn next(stream: &mut Streaming<v1::GenerateChunk>) -> Result<Option<v1::GenerateChunk>, RpcError> {
    let message = timeout(DEADLINE, stream.message()).await.expect("in time");
    message.map_err(|status| RpcError::from(&status))
}

/// The rest of a stream of one choice, put together, and its usage.
async fn rest(stream: &mut Streaming<v1::GenerateChunk>) -> (v1::Choice, Option<v1::Usage>) {
    let (mut whole, mut usage) = (v1::Choice::default(), None);
    while let Some(chunk) = next(stream).await.expect("no error") {
        usage = chunk.usage.or(usage);
        let Some(choice) = chunk.choice else { continue };
        assert_eq!(whole.finish_reason, 0, "nothing follows a finish reason");
        whole.text.push_str(&choice.text);
        whole.token_ids.extend(choice.token_ids);
        whole.logprobs.extend(choice.logprobs);
        whole.finish_reason = choice.finish_reason;
        whole.stop_reason = choice.stop_reason;
    }
    (whole, usage)
}

#[tokio::test]
async fn a_stream_carries_text_tokens_logprobs_and_usage() {
    let mut server = Server::start();
    let mut client = server.inference().await;
    let mut ask = request("Hello");
    ask.request_id = "mine".into();
    ask.model = "alias".into();
    ask.output = Some(v1::OutputOptions {
        logprobs: Some(1),
        echo: true,
        include_usage: true,
        continuous_usage: true,
    });
    let mut stream = client.generate_stream(ask).await.expect("accepted").into_inner();
    let sequence = server.sequence().await;
    assert_eq!(sequence.request.prompt, [19556]);
    assert_eq!(sequence.request.stop.max_tokens, 8191);
    sequence.send(StreamEvent::Started { cached_tokens: 1 }).await;
    sequence
        .send(StreamEvent::Token(SampledToken {
            logprob: Some(-0.5),
            top_logprobs: vec![(905, -0.5)],
            ..sequence.sampled(905)
        }))
        .await;
    let first = next(&mut stream).await.expect("no error").expect("a chunk");
    assert_eq!(
        (first.request_id.as_str(), first.model.as_str()),
        ("mine", "demo")
    );
    let usage = |completion_tokens| v1::Usage {
        prompt_tokens: 1,
        completion_tokens,
        cached_tokens: 1,
    };
    assert_eq!(first.usage, Some(usage(1)));
    let choice = first.choice.expect("a choice");
    assert_eq!(
        (choice.text.as_str(), choice.token_ids.as_slice()),
        ("Hello world", &[905][..])
    );
    let logprobs = &choice.logprobs[0];
    assert_eq!((logprobs.text_offset, logprobs.top.len()), (5, 1));
    let chosen = logprobs.chosen.clone().expect("chosen");
    assert_eq!(
        (chosen.token.as_str(), chosen.bytes.as_slice()),
        (" world", &b" world"[..])
    );

    sequence.token(EOS).await;
    sequence.finish(FinishReason::Stop).await;
    let (end, total) = rest(&mut stream).await;
    assert_eq!((end.text.as_str(), end.token_ids.as_slice()), ("", &[EOS][..]));
    assert_eq!(
        (end.finish_reason(), end.stop_reason),
        (v1::FinishReason::Stop, None)
    );
    assert_eq!(total, Some(usage(2)));
}

#[tokio::test]
async fn a_unary_call_merges_n_choices() {
    let mut server = Server::start();
    let mut client = server.inference().await;
    let mut ask = request("Hello");
    ask.sampling = Some(v1::SamplingParams {
        n: Some(2),
        seed: Some(7),
        stop_token_ids: vec![198],
        ..v1::SamplingParams::default()
    });
    let call = tokio::spawn(async move { client.generate(ask).await });
    let (first, second) = (server.sequence().await, server.sequence().await);
    assert_eq!(
        (first.request.sampling.seed, second.request.sampling.seed),
        (7, 8)
    );
    second.text("two 🙂").await;
    first.text("one").await;
    first.token(198).await;
    first.finish(FinishReason::Stop).await;
    second.finish(FinishReason::Length).await;
    let reply = call.await.expect("no panic").expect("a reply").into_inner();
    let [one, two] = reply.choices.as_slice() else {
        panic!("two choices: {reply:?}")
    };
    assert_eq!((one.index, one.text.as_str()), (0, "one"));
    assert_eq!(one.stop_reason, Some(StopReason::StopTokenId(198)));
    assert_eq!((two.index, two.text.as_str()), (1, "two 🙂"));
    assert_eq!(two.finish_reason(), v1::FinishReason::Length);
    let made = one.token_ids.len() + two.token_ids.len();
    assert_eq!(reply.usage.expect("usage").completion_tokens as usize, made);
    assert!(reply.request_id.starts_with("cmpl-"));
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_sequence() {
    let mut server = Server::start();
    let mut client = server.inference().await;
    let mut ask = request("Hello");
    ask.sampling = Some(v1::SamplingParams {
        stop: vec!["o wor".into()],
        ..v1::SamplingParams::default()
    });
    let mut stream = client.generate_stream(ask).await.expect("accepted").into_inner();
    let sequence = server.sequence().await;
    sequence.token(19556).await;
    let held = next(&mut stream)
        .await
        .expect("no error")
        .expect("a chunk")
        .choice
        .expect("a choice");
    assert_eq!((held.text.as_str(), held.finish_reason), ("Hell", 0));
    sequence.token(905).await;
    let (end, _) = rest(&mut stream).await;
    assert_eq!(
        (end.text.as_str(), end.finish_reason()),
        ("", v1::FinishReason::Stop)
    );
    assert_eq!(end.stop_reason, Some(StopReason::StopString("o wor".into())));
    sequence.dropped().await;
}

#[tokio::test]
async fn a_client_that_goes_away_aborts_its_sequence() {
    let mut server = Server::start();
    let mut client = server.inference().await;
    let mut stream = client
        .generate_stream(request("Hello"))
        .await
        .expect("accepted")
        .into_inner();
    let streamed = server.sequence().await;
    streamed.token(905).await;
    next(&mut stream).await.expect("no error").expect("a chunk");
    drop(stream);
    streamed.dropped().await;

    let call = tokio::spawn(async move { client.generate(request("Hello")).await });
    let unary = server.sequence().await;
    call.abort();
    unary.dropped().await;
}

#[tokio::test]
async fn abort_request_ends_every_choice_and_frees_the_id() {
    let mut server = Server::start();
    let mut client = server.inference().await;
    let mut admin = AdminClient::new(server.channel().await);
    let mut ask = request("Hello");
    ask.request_id = "r1".into();
    ask.sampling = Some(v1::SamplingParams {
        n: Some(2),
        ..v1::SamplingParams::default()
    });
    let mut stream = client
        .generate_stream(ask.clone())
        .await
        .expect("accepted")
        .into_inner();
    let sequences = [server.sequence().await, server.sequence().await];
    sequences[1].token(905).await;
    next(&mut stream).await.expect("no error").expect("a chunk");

    let taken = client
        .generate_stream(ask.clone())
        .await
        .expect_err("the id is taken");
    assert_eq!(RpcError::from(&taken).param.as_deref(), Some("request_id"));

    let abort = |request_id: &str| v1::AbortRequestRequest {
        request_id: request_id.into(),
    };
    assert!(
        !admin
            .abort_request(abort("r2"))
            .await
            .expect("a reply")
            .into_inner()
            .found
    );
    assert!(
        admin
            .abort_request(abort("r1"))
            .await
            .expect("a reply")
            .into_inner()
            .found
    );
    for _ in 0..2 {
        let chunk = next(&mut stream).await.expect("no error").expect("a chunk");
        assert_eq!(
            chunk.choice.expect("a choice").finish_reason(),
            v1::FinishReason::Abort
        );
    }
    assert_eq!(next(&mut stream).await, Ok(None));
    for sequence in &sequences {
        sequence.dropped().await;
    }
    drop(stream);
    client.generate_stream(ask).await.expect("the id is free again");
}

#[tokio::test]
async fn failures_reach_the_client_with_their_kind() {
    let mut server = Server::with_capacity(2);
    let mut client = server.inference().await;
    let mut stream = client
        .generate_stream(request("Hello"))
        .await
        .expect("accepted")
        .into_inner();
    let sequence = server.sequence().await;
    sequence.token(905).await;
    next(&mut stream).await.expect("no error").expect("a chunk");
    let lost = RpcError::new(ErrorKind::WorkerLost, "rank 3 lost");
    sequence.send(StreamEvent::Failed(lost.clone())).await;
    assert_eq!(next(&mut stream).await, Err(lost));

    let mut two = request("Hello");
    two.sampling = Some(v1::SamplingParams {
        n: Some(2),
        ..v1::SamplingParams::default()
    });
    let full = client.generate(two).await.expect_err("one of two fits");
    assert_eq!(RpcError::from(&full).kind, ErrorKind::QueueFull);
    server.sequence().await.dropped().await;
}

#[tokio::test]
async fn an_engine_that_vanishes_is_an_error_not_a_hang() {
    let mut server = Server::start();
    let mut client = server.inference().await;
    let mut stream = client
        .generate_stream(request("Hello"))
        .await
        .expect("accepted")
        .into_inner();
    drop(server.sequence().await);
    let error = next(&mut stream).await.expect_err("no silent end");
    assert_eq!(error.kind, ErrorKind::Unavailable);
}

#[tokio::test]
async fn bad_requests_are_refused_before_the_engine() {
    let mut server = Server::start();
    let mut client = server.inference().await;
    let mut unknown = request("Hello");
    unknown.model = "gpt-4".into();
    let error = RpcError::from(&client.generate(unknown).await.expect_err("unknown"));
    assert_eq!(
        (error.kind, error.message.as_str()),
        (ErrorKind::NotFound, "The model `gpt-4` does not exist.")
    );
    let mut control = request("Hello");
    control.request_id = "a\nb".into();
    let error = RpcError::from(&client.generate(control).await.expect_err("control character"));
    assert_eq!(error.param.as_deref(), Some("request_id"));

    let large = client
        .generate(request(&"x".repeat(5 << 20)))
        .await
        .expect_err("too large");
    assert_eq!(RpcError::from(&large).kind, ErrorKind::PayloadTooLarge);

    let empty = client
        .chat(v1::ChatRequest::default())
        .await
        .expect_err("no messages");
    assert_eq!(RpcError::from(&empty).param.as_deref(), Some("messages"));
    assert!(server.sequences.try_recv().is_err());
}

/// A chunk of a few tokens is about 60 bytes, so the window of a stream nobody reads (64 KiB) holds some thousand.
#[tokio::test]
async fn a_slow_client_stops_only_itself() {
    const PLENTY: usize = 400_000;
    let mut server = Server::start();
    let mut slow = server.inference().await;
    let mut idle = slow
        .generate_stream(request("Hello"))
        .await
        .expect("accepted")
        .into_inner();
    let sequence = server.sequence().await;
    let mut sent = 0;
    while sent < PLENTY {
        match timeout(Duration::from_secs(1), sequence.events.reserve()).await {
            Ok(permit) => permit
                .expect("open")
                .send(StreamEvent::Token(sequence.sampled(905))),
            Err(_) => break,
        }
        sent += 1;
    }
    assert!(sent < PLENTY, "the server buffers without a bound");

    let mut quick = server.inference().await;
    let call = tokio::spawn(async move { quick.generate(request("Hello")).await });
    let other = server.sequence().await;
    other.text("done").await;
    other.finish(FinishReason::Length).await;
    let reply = call.await.expect("no panic").expect("a reply").into_inner();
    assert_eq!(reply.choices[0].text, "done");

    let finish = tokio::spawn(async move { sequence.finish(FinishReason::Length).await });
    let (whole, _) = rest(&mut idle).await;
    finish.await.expect("sent");
    assert_eq!(whole.token_ids.len(), sent);
}

#[tokio::test]
async fn operators_see_status_metrics_models_and_health() {
    let server = Server::start();
    let mut admin = AdminClient::new(server.channel().await);
    let mut health = HealthClient::new(server.channel().await);
    let check = |service: &str| HealthCheckRequest {
        service: service.into(),
    };
    let mut watch = health
        .watch(check("phalanx.v1.Inference"))
        .await
        .expect("watches")
        .into_inner();
    let mut seen = async || {
        let message = timeout(DEADLINE, watch.message()).await.expect("in time");
        message.expect("no error").expect("a status").status()
    };
    assert_eq!(seen().await, ServingStatus::NotServing);
    server.status.update(|status| {
        status.set_state(GroupState::Ready);
        status.epoch = 4;
    });
    assert_eq!(seen().await, ServingStatus::Serving);
    let status = admin
        .get_status(v1::GetStatusRequest {})
        .await
        .expect("a reply")
        .into_inner();
    assert_eq!((status.state(), status.epoch), (GroupState::Ready, 4));
    assert!(!status.version.is_empty());
    server
        .status
        .update(|status| status.set_state(GroupState::Draining));
    assert_eq!(seen().await, ServingStatus::NotServing);

    let metrics = admin
        .get_metrics(v1::GetMetricsRequest {})
        .await
        .expect("a reply")
        .into_inner();
    assert_eq!(metrics.body, b"# EOF\n");
    let mut client = server.inference().await;
    let models = client
        .list_models(v1::ListModelsRequest {})
        .await
        .expect("a reply")
        .into_inner()
        .models;
    let ids: Vec<&str> = models.iter().map(|model| model.id.as_str()).collect();
    assert_eq!(ids, ["demo", "alias"]);
    assert_eq!(
        (models[0].max_model_len, models[0].root.as_str()),
        (8192, "/models/demo.gguf")
    );
}

#[tokio::test]
async fn reflection_lists_the_services() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let server = Server::start();
    let mut client = ServerReflectionClient::new(server.channel().await);
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let asks = futures_util::stream::iter([ask]);
    let mut replies = client
        .server_reflection_info(asks)
        .await
        .expect("answers")
        .into_inner();
    let reply = replies.message().await.expect("no error").expect("a reply");
    let Some(MessageResponse::ListServicesResponse(list)) = reply.message_response else {
        panic!("a list of services: {reply:?}")
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in [
        "phalanx.v1.Inference",
        "phalanx.v1.Admin",
        "grpc.health.v1.Health",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
}

#[tokio::test]
async fn running_requests_finish_after_shutdown_and_the_socket_goes() {
    let mut server = Server::start();
    let mode = std::fs::metadata(&server.socket)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = server.inference().await;
    let mut stream = client
        .generate_stream(request("Hello"))
        .await
        .expect("accepted")
        .into_inner();
    let sequence = server.sequence().await;
    sequence.token(905).await;
    next(&mut stream).await.expect("no error").expect("a chunk");
    server.stop.send(()).expect("serving");
    while server.socket.exists() {
        tokio::task::yield_now().await;
    }
    sequence.finish(FinishReason::Length).await;
    let (end, _) = rest(&mut stream).await;
    assert_eq!(end.finish_reason(), v1::FinishReason::Length);
    drop((stream, client));
    timeout(DEADLINE, server.serving)
        .await
        .expect("ends")
        .expect("no panic");
}

#[tokio::test]
async fn stale_sockets_are_replaced_and_live_ones_left_alone() {
    let server = Server::start();
    let mut listeners = Listeners::default();
    let error = listeners.bind_unix(&server.socket).expect_err("a live server");
    assert!(error.to_string().contains("another server listens"), "{error}");

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "data").expect("written");
    let error = listeners.bind_unix(&file).expect_err("not a socket");
    assert!(error.to_string().contains("not a socket"), "{error}");
    assert_eq!(std::fs::read(&file).expect("still there"), b"data");

    let stale = dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("binds"));
    listeners.bind_unix(&stale).expect("replaced");
    assert!(std::os::unix::net::UnixStream::connect(&stale).is_ok());
    drop(listeners);
    assert!(!stale.exists());
}

#[tokio::test]
async fn tcp_serves_the_same_services() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut listeners = Listeners::default();
    let address = listeners
        .bind_tcp("127.0.0.1:0".parse().expect("an address"))
        .await
        .expect("binds");
    listeners.bind_unix(&dir.path().join("s")).expect("binds");
    let (sequences, _receiver) = mpsc::unbounded_channel();
    let api = Api {
        text: TEXT.clone(),
        engine: Arc::new(HandFedEngine {
            sequences,
            next_id: AtomicU64::new(0),
            capacity: 0,
        }),
        metrics: Arc::new(FixedMetrics),
        status: StatusHandle::new(),
        served_model_names: vec!["demo".into()],
        model_root: String::new(),
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async { stopped.await.unwrap_or_default() };
    let serving = tokio::spawn(serve(api.routes(), listeners, shutdown, DEADLINE));
    let mut client = InferenceClient::connect(format!("http://{address}"))
        .await
        .expect("connects");
    let full = client.generate(request("Hello")).await.expect_err("no capacity");
    assert_eq!(full.code(), Code::ResourceExhausted);
    connect(&dir.path().join("s")).await;
    drop(client);
    stop.send(()).expect("serving");
    timeout(DEADLINE, serving)
        .await
        .expect("ends")
        .expect("no panic")
        .expect("no error");
}
