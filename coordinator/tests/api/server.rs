//! A server to test: the services, the engine thread, and scripted ranks.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, mpsc},
    time::Duration,
};

use phalanx_coordinator::{
    api::{Api, EngineSlot, Listeners, Observers, StatusHandle, serve},
    engine::EngineConfig,
    engine_thread::{EngineHandle, EngineThreadConfig, spawn_engine},
    metrics::Metrics,
    text::TextProcessor,
};
use phalanx_proto::{
    RpcError,
    secret::ApiKeys,
    v1::{self, generate_request::Prompt, inference_client::InferenceClient},
};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

use crate::{
    ranks::{PROMPT, Permit, ScriptedRanks},
    support::demo_processor,
};

pub(crate) const MAX_MODEL_LEN: u32 = 8192;
/// Longer than anything here takes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks at the engine.
const PAUSE: Duration = Duration::from_millis(2);
pub(crate) static TEXT: LazyLock<Arc<TextProcessor>> =
    LazyLock::new(|| Arc::new(demo_processor(MAX_MODEL_LEN)));

/// How a server differs from the others.
pub(crate) struct Setup {
    /// What a sequence says, by its seed.
    pub(crate) scripts: Vec<(u64, Vec<u32>)>,
    pub(crate) max_num_seqs: u32,
    pub(crate) max_num_queued_reqs: usize,
    pub(crate) stream_capacity: usize,
    pub(crate) text: Arc<TextProcessor>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            scripts: Vec::new(),
            max_num_seqs: 256,
            max_num_queued_reqs: 100,
            stream_capacity: 4096,
            text: TEXT.clone(),
        }
    }
}

pub(crate) struct Server {
    pub(crate) socket: PathBuf,
    pub(crate) status: StatusHandle,
    pub(crate) engine: EngineHandle,
    pub(crate) stop: oneshot::Sender<()>,
    pub(crate) serving: JoinHandle<()>,
    gate: Option<mpsc::Sender<Permit>>,
    _dir: tempfile::TempDir,
}

/// The services over `engine`.
pub(crate) fn api(engine: EngineSlot, status: StatusHandle) -> Api {
    Api {
        text: TEXT.clone(),
        engine,
        kv_events: None,
        metrics: Arc::new(Metrics::new("demo", MAX_MODEL_LEN)),
        status,
        served_model_names: vec!["demo".into(), "alias".into()],
        model_root: "/models/demo.gguf".into(),
        tensor_parallel_size: 2,
        api_keys: ApiKeys::default(),
        admin_keys: ApiKeys::default(),
        server_info: r#"{"version": "1"}"#.into(),
        observers: Observers::default(),
        shutdown: Arc::new(Notify::new()),
    }
}

impl Server {
    /// Takes no step until told to.
    pub(crate) fn start(setup: Setup) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("api.sock");
        let status = StatusHandle::new();
        let slot = EngineSlot::default();
        let api = Api {
            text: setup.text,
            ..api(slot.clone(), status.clone())
        };

        let mut config = EngineConfig::new(4 * MAX_MODEL_LEN, MAX_MODEL_LEN, 49_152);
        config.block_size = 1;
        config.max_num_seqs = setup.max_num_seqs;
        let mut config = EngineThreadConfig::new(config);
        config.max_num_queued_reqs = setup.max_num_queued_reqs;
        config.stream_capacity = setup.stream_capacity;
        let (gate, permits) = mpsc::channel();
        let ranks = ScriptedRanks {
            scripts: HashMap::from_iter(setup.scripts),
            gate: permits,
            output: None,
        };
        let (engine, _) = spawn_engine(config, ranks, api.metrics.clone()).expect("starts");
        slot.set(engine.clone());

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
            engine,
            stop,
            serving,
            gate: Some(gate),
            _dir: dir,
        }
    }

    /// Takes steps freely.
    pub(crate) fn free(setup: Setup) -> Self {
        let mut server = Self::start(setup);
        server.run_free();
        server
    }

    pub(crate) fn permit(&self, permit: Permit) {
        let gate = self.gate.as_ref().expect("steps are not free yet");
        gate.send(permit).expect("the engine runs");
    }

    pub(crate) fn run_free(&mut self) {
        self.gate = None;
    }

    pub(crate) async fn channel(&self) -> Channel {
        connect(&self.socket).await
    }

    pub(crate) async fn inference(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel().await)
    }

    /// Returns once the engine says that `count` sequences hold blocks. What it says lags behind what it does, so this
    /// comes before any wait for it to be idle.
    pub(crate) async fn running(&self, count: usize) {
        let running = async {
            while self.engine.status().snapshot.num_running != count {
                sleep(PAUSE).await;
            }
        };
        timeout(DEADLINE, running).await.expect("running in time");
    }

    /// Returns once the engine has no sequence left.
    pub(crate) async fn idle(&self) {
        let idle = async {
            while self.is_busy() {
                sleep(PAUSE).await;
            }
        };
        timeout(DEADLINE, idle).await.expect("idle in time");
    }

    /// Permits a step at a time until the engine has no sequence left; returns how many it took in all.
    pub(crate) async fn steps_until_idle(&self) -> u64 {
        let steps = async {
            while self.is_busy() {
                self.permit(Permit::Step);
                sleep(PAUSE).await;
            }
        };
        timeout(DEADLINE, steps).await.expect("idle in time");
        self.engine.status().snapshot.num_steps
    }

    fn is_busy(&self) -> bool {
        let snapshot = self.engine.status().snapshot;
        snapshot.num_running + snapshot.num_waiting > 0
    }
}

pub(crate) async fn connect(socket: &Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("a URI");
    endpoint.connect().await.expect("connects")
}

/// A request for what the script of `seed` says.
pub(crate) fn request(seed: u64, edit: impl FnOnce(&mut v1::SamplingParams)) -> v1::GenerateRequest {
    let mut sampling = v1::SamplingParams {
        seed: Some(seed),
        ..v1::SamplingParams::default()
    };
    edit(&mut sampling);
    v1::GenerateRequest {
        prompt: Some(Prompt::Text(PROMPT.into())),
        sampling: Some(sampling),
        ..v1::GenerateRequest::default()
    }
}

pub(crate) fn tokens(text: &str) -> Vec<u32> {
    TEXT.tokenizer().encode(text, false).expect("encodes")
}

pub(crate) async fn open(
    client: &mut InferenceClient<Channel>,
    request: v1::GenerateRequest,
) -> Streaming<v1::GenerateChunk> {
    client
        .generate_stream(request)
        .await
        .expect("accepted")
        .into_inner()
}

pub(crate) async fn next(
    stream: &mut Streaming<v1::GenerateChunk>,
) -> Result<Option<v1::GenerateChunk>, RpcError> {
    let message = timeout(DEADLINE, stream.message()).await.expect("in time");
    message.map_err(|status| RpcError::from(&status))
}

/// The choice of the next chunk.
pub(crate) async fn piece(stream: &mut Streaming<v1::GenerateChunk>) -> v1::Choice {
    let chunk = next(stream).await.expect("no error").expect("a chunk");
    chunk.choice.expect("a choice")
}

/// The rest of a stream of one choice, put together, and its last usage.
pub(crate) async fn rest(stream: &mut Streaming<v1::GenerateChunk>) -> (v1::Choice, Option<v1::Usage>) {
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
