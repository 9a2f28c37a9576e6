//! A running coordinator, from the first listener to the last worker.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use phalanx_proto::{
    RpcError,
    secret::random_u64,
    trace::TraceFile,
    v1::{self, Assign, GetStatusResponse, GroupState, Phase, cluster_server::ClusterServer},
};
use phalanx_shm::{EnginePort, Segment, ShmError, Wait, sweep_orphans};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::{
    api::{Api, EngineSlot, ListenError, Listeners, StatusHandle, serve},
    cluster::{
        AttachService, Cluster, ClusterError, CudaLibraries, LaunchSpec, Launcher, RankFailure, split_cpus,
        split_threads, visible_devices,
    },
    config::{ApiOptions, CoordinatorConfig, DeviceChoice, WorkerOptions, WorkerSource},
    deployment::{Deployment, DeploymentError, Hardware, NoGpu, Proposal},
    engine::{Constraint, EngineConfig, SamplingParams, StopRules, TenantId},
    engine_thread::{EngineHandle, EngineThreadConfig, NewSequence, StartError, StreamEvent, spawn_engine},
    executor::{ShmExecutor, TracedExecutor},
    kv_events::{KvEventHub, ZmqError, ZmqPublisher},
    metrics::Metrics,
    server_info::describe,
    text::{ModelLimits, TextError, TextModel, TextOptions, TextProcessor},
};

/// The first group.
const FIRST_EPOCH: u32 = 1;
/// Joining a group maps a segment and allocates a few buffers; on a large host NCCL takes seconds to connect its GPUs.
/// Ranks on GPUs give up earlier.
const JOIN_LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    #[error(transparent)]
    Deployment(#[from] DeploymentError),
    #[error(transparent)]
    NoGpu(#[from] NoGpu),
    #[error("tokenizer or chat template: {0}")]
    Text(#[from] TextError),
    #[error("{path}: {source}")]
    ChatTemplate { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Shm(#[from] ShmError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    RankFailed(#[from] RankFailure),
    #[error("cannot start workers: {0}")]
    Launch(std::io::Error),
    #[error("KV events: {0}")]
    KvEvents(#[from] ZmqError),
    #[error(transparent)]
    Engine(#[from] StartError),
    #[error("--trace-file: {0}")]
    Trace(std::io::Error),
    #[error("the first step through all ranks failed: {0}")]
    WarmUp(RpcError),
}

/// A coordinator whose services answer and whose workers have been started. Dropping it kills local workers.
pub struct Coordinator {
    proposal: Proposal,
    /// Set once it is known what the ranks compute on.
    deployment: std::sync::OnceLock<Deployment>,
    workers: WorkerPlan,
    config: CoordinatorConfig,
    cluster: Cluster,
    launcher: std::sync::Mutex<Option<Launcher>>,
    text: Arc<TextProcessor>,
    /// None: nobody is told of changes in the prefix cache.
    kv_events: Option<KvEventHub>,
    _zmq: Option<ZmqPublisher>,
    engine: EngineSlot,
    running: std::sync::OnceLock<EngineHandle>,
    status: StatusHandle,
    metrics: Arc<Metrics>,
    /// A client has asked for the end.
    asked_to_stop: Arc<Notify>,
    /// Ends the services.
    shutdown: watch::Sender<bool>,
    services: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Coordinator {
    /// Checks that the deployment fits, opens the listeners, starts the workers and the services. The workers load while
    /// the tokenizer is built; [`Coordinator::wait_ready`] waits for them.
    ///
    /// # Errors
    /// Whatever makes a start pointless, before any weight is read.
    pub async fn start(config: CoordinatorConfig) -> Result<Self, CoordinatorError> {
        let started = Instant::now();
        // First, so that the memory of the dead is not counted as taken.
        let swept = sweep_orphans(&config.workers.shm_dir)?;
        if swept > 0 {
            tracing::info!(swept, "removed segments of dead groups");
        }
        let proposal = Proposal::open(config.model.clone())?;
        let libraries = CudaLibraries::of(&config.workers.source);
        // Ranks that can only be on CPUs get their work when they attach; others are asked first what they have.
        let deployment = std::sync::OnceLock::new();
        if libraries.only_cpu(config.model.device) {
            let _ = deployment.set(proposal.resolve(&Hardware::Cpu, &config.workers.shm_dir)?);
        }
        if let Some(trace) = &config.workers.trace {
            TraceFile::create(&trace.path).map_err(CoordinatorError::Trace)?;
        }
        let (listeners, tcp) = listen(&config.api).await?;
        let kv_options = &config.engine.kv_events;
        let kv_events = kv_options.enabled.then(KvEventHub::default);
        let zmq = match (&kv_events, &kv_options.zmq) {
            (Some(hub), Some(zmq)) => Some(ZmqPublisher::start(zmq, hub).await?),
            _ => None,
        };
        let workers = WorkerPlan::new(&config.workers, config.model.tensor_parallel_size);
        let cluster = Cluster::new(config.model.tensor_parallel_size, &workers.join_token);
        if let Some(deployment) = deployment.get() {
            cluster.assign(workers.assigns(deployment, &config));
        }
        let launcher = workers
            .launch((&config, &libraries), tcp, &cluster)
            .map_err(CoordinatorError::Launch)?;
        let text = Arc::new(text_processor(&proposal, &config)?);
        let names = &config.engine.served_model_names;
        let name = names.first().cloned().unwrap_or_default();
        let coordinator = Self {
            metrics: Arc::new(Metrics::new(&name, proposal.blueprint.max_model_len as u32)),
            status: StatusHandle::new(),
            text,
            kv_events,
            _zmq: zmq,
            engine: EngineSlot::default(),
            running: std::sync::OnceLock::new(),
            launcher: std::sync::Mutex::new(launcher),
            asked_to_stop: Arc::new(Notify::new()),
            shutdown: watch::Sender::new(false),
            services: std::sync::Mutex::new(None),
            proposal,
            deployment,
            workers,
            config,
            cluster,
        };
        coordinator.serve(listeners);
        tracing::info!(took = ?started.elapsed(), "coordinator started");
        Ok(coordinator)
    }

    /// Starts the services and whatever follows the ranks' state.
    fn serve(&self, listeners: Listeners) {
        let api = Api {
            text: self.text.clone(),
            engine: self.engine.clone(),
            kv_events: self.kv_events.clone(),
            metrics: self.metrics.clone(),
            status: self.status.clone(),
            served_model_names: self.config.engine.served_model_names.clone(),
            model_root: self.config.model.path.to_string_lossy().into_owned(),
            tensor_parallel_size: self.config.model.tensor_parallel_size as u32,
            api_keys: self.config.api.api_keys.clone(),
            admin_keys: self.config.api.admin_keys.clone(),
            server_info: describe(&self.config, self.proposal.blueprint.max_model_len).to_string(),
            observers: self.config.api.observers.clone(),
            shutdown: self.asked_to_stop.clone(),
        };
        let attach = ClusterServer::new(AttachService(self.cluster.clone()));
        let routes = api.routes().add_service(attach);
        let mut stop = self.shutdown.subscribe();
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        let services = tokio::spawn(async move {
            // Draining is the engine's business; what is left when the services stop is cut off.
            if let Err(error) = serve(routes, listeners, stopped, Duration::from_millis(200)).await {
                tracing::error!(%error, "the gRPC services ended");
            }
        });
        *lock(&self.services) = Some(services);
        tokio::spawn(follow(
            self.cluster.clone(),
            (self.status.clone(), self.metrics.clone()),
            self.shutdown.subscribe(),
        ));
    }

    pub fn status(&self) -> watch::Receiver<GetStatusResponse> {
        self.status.subscribe()
    }

    /// Waits until a step has gone through every rank; then requests are served. A second call tells what has failed
    /// since.
    ///
    /// # Errors
    /// The first failure of any rank, or a rank that is not there in time.
    pub async fn wait_ready(&self) -> Result<(), CoordinatorError> {
        if let Some(failure) = self.cluster.failure() {
            return Err(failure.into());
        }
        if self.running.get().is_some() {
            return Ok(());
        }
        let deployment = self.settle(self.deployment().await?).await?;
        self.text
            .set_max_model_len(deployment.blueprint.max_model_len as u32);
        self.cluster
            .wait_loaded(self.config.workers.ready_timeout)
            .await?;
        let engine = self.start_engine(&deployment, FIRST_EPOCH).await?;
        if let Err(error) = warm_up(&engine).await {
            return Err(self
                .cluster
                .failure()
                .map_or(CoordinatorError::WarmUp(error), CoordinatorError::from));
        }
        self.cluster.mark_serving();
        self.engine.set(engine.clone());
        let _ = self.running.set(engine);
        self.status.update(|status| {
            status.epoch = FIRST_EPOCH;
            if status.state() == GroupState::Starting {
                status.state = GroupState::Ready.into();
            }
        });
        Ok(())
    }

    /// What the ranks do; decided and told to them when all have said what they have, if not before.
    async fn deployment(&self) -> Result<&Deployment, CoordinatorError> {
        if let Some(deployment) = self.deployment.get() {
            return Ok(deployment);
        }
        let devices = self
            .cluster
            .wait_attached(self.config.workers.ready_timeout)
            .await?;
        let hardware = Hardware::decide(self.config.model.device, &devices).inspect_err(|lack| {
            self.cluster
                .fail(lack.rank, Some(Phase::Starting), lack.reason.clone());
        })?;
        let resolved = self.proposal.resolve(&hardware, &self.config.workers.shm_dir)?;
        tracing::info!(?hardware, style = ?resolved.plan.style, kv_blocks = resolved.plan.num_blocks, "deployment decided");
        resolved.note_graph_options();
        self.cluster.assign(self.workers.assigns(&resolved, &self.config));
        Ok(self.deployment.get_or_init(|| resolved))
    }

    /// Decides how many KV blocks there are, now that the ranks know what their weights have left, and tells them.
    async fn settle(&self, deployment: &Deployment) -> Result<Deployment, CoordinatorError> {
        let limit = self.config.workers.ready_timeout;
        let weights = self.cluster.wait_weights(limit).await?;
        let taken: Vec<Option<u64>> = weights.iter().map(|rank| rank.taken_bytes).collect();
        let settled = deployment.settle(&taken)?;
        self.cluster.allocate_kv(settled.plan.num_blocks);
        Ok(settled)
    }

    /// Forms the group of `epoch` and starts the engine over it.
    async fn start_engine(
        &self,
        deployment: &Deployment,
        epoch: u32,
    ) -> Result<EngineHandle, CoordinatorError> {
        let group = format!("{}", std::process::id());
        let segment = Segment::create(&self.config.workers.shm_dir, &group, deployment.shape(epoch))?;
        let segment = Arc::new(segment);
        let port = EnginePort::join(segment.clone(), Wait::ADAPTIVE)?;
        self.cluster.form_group(&segment, JOIN_LIMIT).await?;
        self.metrics.group_formed(&segment);
        segment.unlink_when_joined(Duration::from_secs(1))?;
        let progress = deployment.counts_collectives().then(|| port.progress()).flatten();
        let executor = ShmExecutor::new(port, self.cluster.clone(), deployment.limits, progress);
        let options = &self.config.engine;
        let engine = EngineConfig {
            epoch,
            enable_prefix_caching: options.enable_prefix_caching,
            policy: options.policy,
            long_prefill_token_threshold: options.long_prefill_token_threshold as u32,
            prefix_hash_algo: options.prefix_hash_algo,
            watermark: options.watermark,
            reserve_full_isl: options.reserve_full_isl,
            step_timeout: options.step_timeout,
            ..deployment.engine_config()
        };
        let thread = EngineThreadConfig {
            max_num_queued_reqs: options.max_num_queued_reqs,
            max_num_queued_tokens: options.max_num_queued_tokens,
            kv_events: self.kv_events.clone(),
            prefix_hash_seed: options.prefix_hash_seed.clone(),
            ..EngineThreadConfig::new(engine)
        };
        let metrics = self.metrics.clone();
        let (engine, _thread) = match &self.config.workers.trace {
            Some(trace) => {
                let traced = TracedExecutor::new(executor, &trace.path, trace.steps);
                spawn_engine(thread, traced.map_err(CoordinatorError::Trace)?, metrics)?
            }
            None => spawn_engine(thread, executor, metrics)?,
        };
        tokio::spawn(tell_losses(self.cluster.clone(), engine.clone(), epoch));
        Ok(engine)
    }

    /// Returns once a rank has failed.
    pub async fn failed(&self) -> RankFailure {
        let mut changes = self.cluster.subscribe();
        loop {
            if let Some(failure) = self.cluster.failure() {
                return failure;
            }
            // The sender lives in `self`.
            let _ = changes.changed().await;
        }
    }

    /// Returns once a client has asked the server to shut down, over gRPC.
    pub async fn asked_to_stop(&self) {
        self.asked_to_stop.notified().await;
    }

    /// Refuses new requests from now on; those that were admitted go on.
    pub fn begin_drain(&self) {
        self.status.update(|status| {
            if status.state() != GroupState::Failed {
                status.state = GroupState::Draining.into();
            }
        });
        if let Some(engine) = self.running.get() {
            engine.drain();
        }
    }

    /// Waits until no request is left, for at most `limit`.
    pub async fn drain(&self, limit: Duration) {
        self.begin_drain();
        let Some(engine) = self.running.get() else { return };
        if tokio::time::timeout(limit, engine.drained()).await.is_err() {
            tracing::warn!(
                ?limit,
                "requests still run after the drain time, they are aborted"
            );
        }
    }

    /// Ends the engine, the workers (which get `grace` to leave by themselves) and the services.
    pub async fn stop(&self, grace: Duration) {
        if let Some(engine) = self.running.get() {
            engine.shutdown();
        }
        self.cluster.shutdown();
        let launcher = lock(&self.launcher).take();
        if let Some(launcher) = launcher {
            launcher.stop(grace).await;
        }
        self.shutdown.send_replace(true);
        let services = lock(&self.services).take();
        if let Some(services) = services {
            let _ = services.await;
        }
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Opens the listeners and says where they are: port 0 and the default socket are known only here. Returns the TCP
/// address.
async fn listen(options: &ApiOptions) -> Result<(Listeners, Option<SocketAddr>), ListenError> {
    let mut listeners = Listeners::default();
    let mut tcp = None;
    if let Some(address) = options.tcp {
        let address = listeners.bind_tcp(address).await?;
        tracing::info!(%address, "gRPC listening");
        if !address.ip().is_loopback() && options.api_keys.is_empty() {
            tracing::warn!(%address, "gRPC answers everybody who reaches it: there is no --api-key");
        }
        tcp = Some(address);
        if let Some(files) = &options.tls {
            listeners.secure(files.clone())?;
        }
    }
    if let Some(path) = &options.uds {
        listeners.bind_unix(path)?;
        tracing::info!(path = %path.display(), "gRPC listening");
    }
    Ok((listeners, tcp))
}

/// CPUs, threads and the secret of the workers.
struct WorkerPlan {
    cpus: Vec<Vec<usize>>,
    threads: Vec<usize>,
    join_token: String,
}

impl WorkerPlan {
    fn new(options: &WorkerOptions, ranks: usize) -> Self {
        let own = own_cpus();
        let cpus = split_cpus(&own, ranks);
        let threads = match options.threads_per_rank {
            Some(threads) => vec![threads; cpus.len()],
            // Which counts what a control group lets this process have, too.
            None => split_threads(&cpus, thread::available_parallelism().map_or(1, usize::from)),
        };
        let join_token = match &options.source {
            WorkerSource::External { join_token } => join_token.clone(),
            WorkerSource::Local { .. } => format!("{:016x}{:016x}", random_u64(), random_u64()),
        };
        Self {
            cpus,
            threads,
            join_token,
        }
    }

    /// What each rank is told, in rank order.
    fn assigns(&self, deployment: &Deployment, config: &CoordinatorConfig) -> Vec<Assign> {
        let assigns = deployment.assigns(&self.threads, config.engine.step_timeout);
        let trace = config.workers.trace.as_ref().map(|trace| v1::Trace {
            path: trace.path.to_string_lossy().into_owned(),
            steps: trace.steps,
        });
        let with_trace = |assign| Assign {
            trace: trace.clone(),
            ..assign
        };
        assigns.into_iter().map(with_trace).collect()
    }

    fn launch(
        &self,
        (config, libraries): (&CoordinatorConfig, &CudaLibraries),
        tcp: Option<SocketAddr>,
        cluster: &Cluster,
    ) -> std::io::Result<Option<Launcher>> {
        let WorkerSource::Local {
            program,
            arguments,
            gpus,
        } = &config.workers.source
        else {
            return Ok(None);
        };
        let coordinator = match (&config.api.uds, tcp) {
            (Some(path), _) => format!("unix:{}", path.display()),
            (None, Some(address)) => format!("http://{address}"),
            (None, None) => return Err(std::io::Error::other("no address for workers to attach to")),
        };
        let device = config.model.device;
        let spec = LaunchSpec {
            program: program.clone(),
            arguments: arguments.clone(),
            coordinator,
            join_token: self.join_token.clone(),
            cpus: self.cpus.clone(),
            device,
            visible_devices: visible_devices(gpus.visible_devices.as_deref(), self.cpus.len()),
            search_path: match device {
                DeviceChoice::Cpu => None,
                DeviceChoice::Auto | DeviceChoice::Cuda => libraries.search_path(gpus)?,
            },
        };
        Launcher::start(&spec, cluster).map(Some)
    }
}

/// The CPUs this process may use.
fn own_cpus() -> Vec<usize> {
    let all = || (0..thread::available_parallelism().map_or(1, usize::from)).collect();
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|cpu| set.is_set(*cpu))
            .collect(),
        Err(_) => all(),
    }
}

fn text_processor(
    proposal: &Proposal,
    config: &CoordinatorConfig,
) -> Result<TextProcessor, CoordinatorError> {
    let mut model = TextModel::open(&proposal.checkpoint)?;
    model.defaults = config.engine.generation.resolve(model.defaults)?;
    let template = config.engine.chat_template.as_ref().map(|path| {
        let read = std::fs::read_to_string(path);
        read.map_err(|source| CoordinatorError::ChatTemplate {
            path: path.clone(),
            source,
        })
    });
    let step = proposal.blueprint.limits(u32::MAX);
    let limits = ModelLimits {
        max_model_len: proposal.blueprint.max_model_len as u32,
        vocab_size: step.vocab_size,
        max_logprobs: step.max_logprobs,
    };
    let options = TextOptions {
        limits,
        chat_template: template.transpose()?,
        chat: config.engine.chat.clone(),
        threads: None,
        seed: config.engine.seed,
    };
    Ok(TextProcessor::new(model, options)?)
}

/// One token through every rank: the proof that the group works, and the first touch of its memory.
async fn warm_up(engine: &EngineHandle) -> Result<(), RpcError> {
    let sequence = NewSequence {
        prompt: vec![0],
        output: Vec::new(),
        sampling: SamplingParams::GREEDY,
        stop: StopRules {
            max_tokens: 1,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            repetition: None,
        },
        constraint: Constraint::default(),
        priority: 0,
        cache_salt: Some("warm-up".into()),
        tenant: TenantId::default(),
    };
    let mut submission = engine.probe(sequence)?;
    while let Some(event) = submission.events.recv().await {
        if let StreamEvent::Failed(error) = event {
            return Err(error);
        }
    }
    Ok(())
}

/// Copies the ranks' state into the status and the metrics until the services stop.
async fn follow(
    cluster: Cluster,
    (status, metrics): (StatusHandle, Arc<Metrics>),
    mut stop: watch::Receiver<bool>,
) {
    let mut changes = cluster.subscribe();
    loop {
        let (ranks, failure) = (cluster.statuses(), cluster.failure());
        metrics.ranks(&ranks);
        status.update(|status| {
            status.ranks = ranks;
            if let Some(failure) = failure {
                status.state = GroupState::Failed.into();
                status.message = failure.to_string();
            }
        });
        tokio::select! {
            _ = changes.changed() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Tells an engine, which may be idle, that its group has lost a rank.
async fn tell_losses(cluster: Cluster, engine: EngineHandle, epoch: u32) {
    let mut changes = cluster.subscribe();
    loop {
        if let Some(failure) = cluster.failure() {
            return engine.rank_lost(epoch, failure.rank, failure.cause);
        }
        if cluster.is_closing() || changes.changed().await.is_err() {
            return;
        }
    }
}
