//! A tonic server that answers every prompt by the same script.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use futures_util::{StreamExt, stream, stream::BoxStream};
use phalanx_proto::{
    ErrorKind, RpcError,
    v1::{
        self, AbortRequestRequest, AbortRequestResponse, ChatRequest, Choice, FinishReason, GenerateChunk,
        GenerateRequest, GenerateResponse, GetMetricsRequest, GetMetricsResponse, GetServerInfoRequest,
        GetServerInfoResponse, GetStatusRequest, GetStatusResponse, GroupState, ListModelsRequest,
        ListModelsResponse, ModelCard, OutputOptions, PromptOutput, ResumedChoice, SamplingParams,
        TokenLogprob, TokenLogprobs, ToolCall, Usage, admin_server, choice::StopReason, control_server,
        inference_server, tokenizer_server,
    },
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

pub(crate) const MODEL: &str = "scripted";
pub(crate) const CREATED: i64 = 1_700_000_000;

/// What happens to every prompt.
#[derive(Clone, Debug)]
pub(crate) enum Script {
    /// Every choice says "Hello" and " world", one chunk each, and stops at the string "!".
    Hello,
    /// Every choice says "la la", one chunk, and ends because it repeats itself.
    Repeat,
    /// Every choice thinks "Hm.", calls `f` with `{}`, one chunk for each brace, and stops.
    Call,
    /// An error instead of a stream.
    Refuse(RpcError),
    /// An error after the first chunk.
    Break(RpcError),
    /// The stream ends after the first chunk.
    EndEarly,
    /// Chunks of 16 KiB for as long as somebody takes them; a unary call is never answered.
    Endless,
    /// One chunk, then nothing until released, then the end of `Hello`.
    Wait(Arc<tokio::sync::Semaphore>),
    /// Choice i counts to 4 + 2 * i, a token and a word each. Lost on the way, unless it is resumed: then it goes on,
    /// or refuses to if it is not `willing`.
    Count { willing: bool },
}

/// A request as it came over gRPC.
#[derive(Debug)]
pub(crate) enum Received {
    Generate(GenerateRequest),
    Chat(ChatRequest),
    /// To a service that has no script: the message as text, and the admin key that came with it.
    Other(String, Option<String>),
}

/// A scripted coordinator on a port of its own.
pub(crate) struct Coordinator {
    address: SocketAddr,
    pub(crate) received: mpsc::UnboundedReceiver<Received>,
    /// One message for every call whose future or stream was dropped before its end.
    pub(crate) dropped: mpsc::UnboundedReceiver<()>,
    pub(crate) status: Arc<Mutex<GetStatusResponse>>,
    task: JoinHandle<()>,
}

impl Coordinator {
    pub(crate) async fn start(script: Script) -> Self {
        Self::start_at("127.0.0.1:0", script).await
    }

    pub(crate) async fn start_at(address: &str, script: Script) -> Self {
        let listener = TcpListener::bind(address).await.expect("bind");
        let address = listener.local_addr().expect("bound");
        let (received_tx, received) = mpsc::unbounded_channel();
        let (dropped_tx, dropped) = mpsc::unbounded_channel();
        let mut ready = GetStatusResponse::default();
        ready.set_state(GroupState::Ready);
        let status = Arc::new(Mutex::new(ready));
        let service = Scripted {
            script,
            received: received_tx,
            dropped: dropped_tx,
            status: Arc::clone(&status),
        };
        let server = Server::builder()
            .add_service(inference_server::InferenceServer::new(service.clone()))
            .add_service(tokenizer_server::TokenizerServer::new(service.clone()))
            .add_service(control_server::ControlServer::new(service.clone()))
            .add_service(admin_server::AdminServer::new(service));
        // Without it a stream waits 40 ms for the client's delayed acknowledgement, again and again.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let task = tokio::spawn(async move {
            server.serve_with_incoming(incoming).await.expect("serve");
        });
        Self {
            address,
            received,
            dropped,
            status,
            task,
        }
    }

    pub(crate) fn address(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next request, which must be a chat.
    pub(crate) async fn chat(&mut self) -> ChatRequest {
        match self.received.recv().await {
            Some(Received::Chat(request)) => request,
            other => panic!("expected a chat, not {other:?}"),
        }
    }

    /// The next request, which must be a completion.
    pub(crate) async fn generate(&mut self) -> GenerateRequest {
        match self.received.recv().await {
            Some(Received::Generate(request)) => request,
            other => panic!("expected a completion, not {other:?}"),
        }
    }

    /// The next request, which must be to a service without a script.
    pub(crate) async fn other(&mut self) -> (String, Option<String>) {
        match self.received.recv().await {
            Some(Received::Other(message, key)) => (message, key),
            other => panic!("expected another call, not {other:?}"),
        }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
pub(super) struct Scripted {
    script: Script,
    pub(super) received: mpsc::UnboundedSender<Received>,
    dropped: mpsc::UnboundedSender<()>,
    pub(super) status: Arc<Mutex<GetStatusResponse>>,
}

/// Tells when it is dropped.
struct Alarm(mpsc::UnboundedSender<()>);

impl Drop for Alarm {
    fn drop(&mut self) {
        // Nobody listens once the test has ended.
        let _ = self.0.send(());
    }
}

type Chunks = BoxStream<'static, Result<GenerateChunk, Status>>;

impl Scripted {
    fn stream(
        &self,
        sampling: &SamplingParams,
        output: &OutputOptions,
        resume: &[ResumedChoice],
    ) -> Result<Chunks, Status> {
        let n = sampling.n.unwrap_or(1);
        let chunks = match self.script {
            Script::Call => call(n, output),
            Script::Repeat => repeat(n, output),
            _ => hello(n, output),
        };
        let mut chunks = chunks.into_iter().map(Ok);
        let first = chunks.next().expect("never empty");
        match &self.script {
            Script::Hello | Script::Call | Script::Repeat => {
                Ok(stream::iter([first].into_iter().chain(chunks)).boxed())
            }
            Script::Refuse(error) => Err(error.clone().into()),
            Script::Break(error) => Ok(stream::iter([first, Err(error.clone().into())]).boxed()),
            Script::EndEarly => Ok(stream::iter([first]).boxed()),
            Script::Endless => {
                let alarm = Alarm(self.dropped.clone());
                let chunk = chunk(Choice {
                    text: "x".repeat(16 << 10),
                    ..Choice::default()
                });
                Ok(stream::repeat(chunk)
                    .map(move |chunk| {
                        let _alarm = &alarm;
                        Ok(chunk)
                    })
                    .boxed())
            }
            Script::Wait(released) => {
                let released = Arc::clone(released);
                let rest: Vec<_> = chunks.collect();
                let wait = async move {
                    released.acquire().await.expect("never closed").forget();
                    stream::iter(rest)
                };
                Ok(stream::iter([first]).chain(stream::once(wait).flatten()).boxed())
            }
            Script::Count { willing } => {
                let lost = RpcError::new(ErrorKind::WorkerLost, "rank 1 is gone");
                match (resume, willing) {
                    ([], _) => {
                        let n = sampling.n.unwrap_or(1) as usize;
                        let begin = count(&vec![ResumedChoice::default(); n], output).into_iter();
                        let begin = begin.take(2 * n + 1).map(Ok);
                        Ok(stream::iter(begin.chain([Err(lost.into())])).boxed())
                    }
                    (resume, true) => Ok(stream::iter(count(resume, output).into_iter().map(Ok)).boxed()),
                    (_, false) => Err(lost.into()),
                }
            }
        }
    }

    async fn unary(
        &self,
        sampling: &SamplingParams,
        output: &OutputOptions,
    ) -> Result<GenerateResponse, Status> {
        if let Script::Endless = self.script {
            let _alarm = Alarm(self.dropped.clone());
            std::future::pending::<()>().await;
        }
        let mut whole = GenerateResponse {
            model: MODEL.to_owned(),
            created: CREATED,
            ..GenerateResponse::default()
        };
        let with_usage = OutputOptions {
            include_usage: true,
            ..*output
        };
        let mut chunks = self.stream(sampling, &with_usage, &[])?;
        while let Some(chunk) = chunks.next().await.transpose()? {
            whole.prompt = whole.prompt.or(chunk.prompt);
            let Some(piece) = chunk.choice else {
                whole.usage = chunk.usage;
                continue;
            };
            match whole
                .choices
                .iter_mut()
                .find(|choice| choice.index == piece.index)
            {
                Some(choice) => {
                    choice.text.push_str(&piece.text);
                    choice.token_ids.extend(piece.token_ids);
                    choice.logprobs.extend(piece.logprobs);
                    for piece in piece.tool_calls {
                        match choice.tool_calls.last_mut() {
                            Some(call) => call.arguments.push_str(&piece.arguments),
                            None => choice.tool_calls.push(piece),
                        }
                    }
                    choice.finish_reason = piece.finish_reason;
                    choice.stop_reason = piece.stop_reason;
                }
                // In the wrong order, which must not matter.
                None => whole.choices.insert(0, piece),
            }
        }
        Ok(whole)
    }
}

fn chunk(choice: Choice) -> GenerateChunk {
    GenerateChunk {
        request_id: String::new(),
        model: MODEL.to_owned(),
        created: CREATED,
        choice: Some(choice),
        usage: None,
        prompt: None,
    }
}

/// A text that repeats itself of every choice, and the usage if it is asked for.
fn repeat(n: u32, output: &OutputOptions) -> Vec<GenerateChunk> {
    let said = |index| {
        let mut choice = Choice {
            index,
            text: "la la".to_owned(),
            token_ids: vec![3, 3],
            ..Choice::default()
        };
        choice.set_finish_reason(FinishReason::Repetition);
        chunk(choice)
    };
    let mut chunks: Vec<GenerateChunk> = (0..n).map(said).collect();
    if output.include_usage {
        chunks.push(GenerateChunk {
            choice: None,
            usage: Some(usage(2 * n)),
            ..chunk(Choice::default())
        });
    }
    chunks
}

/// A thought and a call in two pieces of every choice, and the usage if it is asked for.
fn call(n: u32, output: &OutputOptions) -> Vec<GenerateChunk> {
    let piece = |index, id: &str, name: &str, arguments: &str| Choice {
        index,
        tool_calls: vec![ToolCall {
            index: 0,
            id: id.to_owned(),
            name: name.to_owned(),
            arguments: arguments.to_owned(),
        }],
        ..Choice::default()
    };
    let mut chunks = Vec::new();
    for index in 0..n {
        let thought = Choice {
            index,
            reasoning: Some("Hm.".to_owned()),
            ..Choice::default()
        };
        let mut end = piece(index, "", "", "}");
        end.set_finish_reason(FinishReason::ToolCalls);
        chunks.extend([thought, piece(index, "call-1", "f", "{"), end].map(chunk));
    }
    if output.include_usage {
        chunks.push(GenerateChunk {
            choice: None,
            usage: Some(usage(3 * n)),
            ..chunk(Choice::default())
        });
    }
    chunks
}

/// What is still to be counted, a token of each choice in turn.
fn count(resume: &[ResumedChoice], output: &OutputOptions) -> Vec<GenerateChunk> {
    let mut chunks = Vec::new();
    for token in 1..=4 + 2 * resume.len() as u32 {
        for (index, choice) in (0..).zip(resume) {
            let end = 4 + 2 * index;
            let known = choice.ended_after.unwrap_or(choice.token_ids.len() as u32);
            if token <= known || token > end {
                continue;
            }
            let mut piece = Choice {
                index,
                text: format!("{token} "),
                token_ids: vec![token],
                ..Choice::default()
            };
            if token == end {
                piece.set_finish_reason(FinishReason::Length);
            }
            chunks.push(chunk(piece));
        }
    }
    if let Some(first) = chunks.first_mut() {
        first.prompt = prompt(output);
    }
    chunks
}

/// "Hello" and " world" of every choice, and the usage if it is asked for.
fn hello(n: u32, output: &OutputOptions) -> Vec<GenerateChunk> {
    let mut chunks = Vec::new();
    for (number, word) in (1..).zip(["Hello", " world"]) {
        for index in 0..n {
            let mut choice = Choice {
                index,
                text: word.to_owned(),
                token_ids: vec![number],
                logprobs: output.logprobs.map(|_| logprobs(word)).into_iter().collect(),
                ..Choice::default()
            };
            if number == 2 {
                choice.set_finish_reason(FinishReason::Stop);
                choice.stop_reason = Some(StopReason::StopString("!".to_owned()));
            }
            chunks.push(GenerateChunk {
                usage: output.continuous_usage.then(|| usage(number)),
                prompt: if chunks.is_empty() { prompt(output) } else { None },
                ..chunk(choice)
            });
        }
    }
    if output.include_usage {
        chunks.push(GenerateChunk {
            choice: None,
            usage: Some(usage(2 * n)),
            ..chunk(Choice::default())
        });
    }
    chunks
}

/// What is told of a prompt of the tokens 7 and 9.
fn prompt(output: &OutputOptions) -> Option<PromptOutput> {
    let token = |token_id, text: &str, logprob, rank| TokenLogprob {
        token_id,
        token: text.to_owned(),
        logprob,
        bytes: text.as_bytes().to_vec(),
        rank,
        special: false,
    };
    let first = TokenLogprobs {
        chosen: Some(token(7, "a", f32::NAN, None)),
        ..TokenLogprobs::default()
    };
    let second = TokenLogprobs {
        chosen: Some(token(9, "b", -3.0, Some(40))),
        top: vec![token(8, "c", -0.5, Some(1))],
        text_offset: 1,
    };
    let told = PromptOutput {
        token_ids: if output.return_prompt_token_ids {
            vec![7, 9]
        } else {
            vec![]
        },
        logprobs: output
            .prompt_logprobs
            .map_or_else(Vec::new, |_| vec![first, second]),
    };
    (told != PromptOutput::default()).then_some(told)
}

fn usage(completion_tokens: u32) -> Usage {
    Usage {
        prompt_tokens: 5,
        completion_tokens,
        cached_tokens: 3,
    }
}

fn logprobs(word: &str) -> TokenLogprobs {
    let token = TokenLogprob {
        token_id: 1,
        token: word.to_owned(),
        logprob: -0.25,
        bytes: word.as_bytes().to_vec(),
        special: false,
        rank: Some(1),
    };
    TokenLogprobs {
        text_offset: if word.starts_with(' ') { 5 } else { 0 },
        top: vec![token.clone()],
        chosen: Some(token),
    }
}

#[tonic::async_trait]
impl inference_server::Inference for Scripted {
    type GenerateStreamStream = Chunks;
    type ChatStreamStream = Chunks;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        let request = request.into_inner();
        let (sampling, output) = (
            request.sampling.clone().unwrap_or_default(),
            request.output.unwrap_or_default(),
        );
        let _ = self.received.send(Received::Generate(request));
        self.unary(&sampling, &output).await.map(Response::new)
    }

    async fn generate_stream(&self, request: Request<GenerateRequest>) -> Result<Response<Chunks>, Status> {
        let request = request.into_inner();
        let (sampling, output) = (
            request.sampling.clone().unwrap_or_default(),
            request.output.unwrap_or_default(),
        );
        let resume = request.resume.clone();
        let _ = self.received.send(Received::Generate(request));
        self.stream(&sampling, &output, &resume).map(Response::new)
    }

    async fn chat(&self, request: Request<ChatRequest>) -> Result<Response<GenerateResponse>, Status> {
        let request = request.into_inner();
        let (sampling, output) = (
            request.sampling.clone().unwrap_or_default(),
            request.output.unwrap_or_default(),
        );
        let _ = self.received.send(Received::Chat(request));
        self.unary(&sampling, &output).await.map(Response::new)
    }

    async fn chat_stream(&self, request: Request<ChatRequest>) -> Result<Response<Chunks>, Status> {
        let request = request.into_inner();
        let (sampling, output) = (
            request.sampling.clone().unwrap_or_default(),
            request.output.unwrap_or_default(),
        );
        let resume = request.resume.clone();
        let _ = self.received.send(Received::Chat(request));
        self.stream(&sampling, &output, &resume).map(Response::new)
    }

    async fn list_models(
        &self,
        _: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let card = ModelCard {
            id: MODEL.to_owned(),
            created: CREATED,
            max_model_len: 2048,
            root: "weights.gguf".to_owned(),
        };
        Ok(Response::new(ListModelsResponse { models: vec![card] }))
    }
}

#[tonic::async_trait]
impl admin_server::Admin for Scripted {
    type SubscribeKvEventsStream = BoxStream<'static, Result<v1::KvEventBatch, Status>>;

    async fn subscribe_kv_events(
        &self,
        _: Request<v1::SubscribeKvEventsRequest>,
    ) -> Result<Response<Self::SubscribeKvEventsStream>, Status> {
        Err(Status::unimplemented("the gateway does not call it"))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        Ok(Response::new(self.status.lock().expect("not poisoned").clone()))
    }

    async fn get_metrics(
        &self,
        _: Request<GetMetricsRequest>,
    ) -> Result<Response<GetMetricsResponse>, Status> {
        let text = "# HELP steps Steps.\n# TYPE steps counter\nsteps_total 17\n# EOF\n";
        Ok(Response::new(GetMetricsResponse {
            content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8".to_owned(),
            body: text.into(),
        }))
    }

    async fn abort_request(
        &self,
        request: Request<AbortRequestRequest>,
    ) -> Result<Response<AbortRequestResponse>, Status> {
        self.note(&request);
        Ok(Response::new(AbortRequestResponse { found: false }))
    }

    async fn get_server_info(
        &self,
        _: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        let json = r#"{"model_config": {"max_model_len": 2048}}"#.to_owned();
        Ok(Response::new(GetServerInfoResponse { json }))
    }
}
