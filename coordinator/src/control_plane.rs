//! A coordinator without ranks, to measure what a token costs on its way from a step's output to a client.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use phalanx_model::{Checkpoint, Geometry};
use phalanx_proto::{secret::ApiKeys, v1::GroupState};
use phalanx_shm::MappedFile;
use tokio::{sync::watch, task::JoinHandle};

use crate::{
    CoordinatorError,
    api::{Api, EngineSlot, Listeners, Observers, StatusHandle, serve},
    deployment::DeploymentError,
    engine::EngineConfig,
    engine_thread::{EngineHandle, EngineThreadConfig, spawn_engine},
    executor::PacedExecutor,
    metrics::Metrics,
    text::{ModelLimits, TextModel, TextOptions, TextProcessor},
};

/// What every sequence says. Sentences of several lengths, so that detokenization has its usual work.
const TEXT: &str = "A phalanx moves as one: each rank holds a part of every layer, and no token is known before all of \
                    them have said theirs. The coordinator counts blocks, orders requests and turns numbers into \
                    words; clients see only words. How fast? That depends on what lies between the two.\n\n";

pub struct ControlPlaneConfig {
    /// Whose tokenizer is used: a .gguf file or a directory.
    pub model: PathBuf,
    /// Where the gRPC services listen.
    pub uds: PathBuf,
    pub served_model_name: String,
    /// Most sequences in a step.
    pub max_num_seqs: u32,
    /// Most tokens of a prompt and its completion.
    pub max_model_len: u32,
    pub step_time: Duration,
}

/// Text, engine and services as in [`crate::Coordinator`], over a [`PacedExecutor`].
pub struct ControlPlane {
    engine: EngineHandle,
    shutdown: watch::Sender<bool>,
    services: JoinHandle<()>,
}

impl ControlPlane {
    /// # Errors
    /// A model without a tokenizer, a socket that cannot be bound, or numbers that the engine refuses.
    pub fn start(config: &ControlPlaneConfig) -> Result<Self, CoordinatorError> {
        let checkpoint = Checkpoint::open(&config.model, MappedFile::open).map_err(DeploymentError::from)?;
        let vocab_size = Geometry::of_checkpoint(&checkpoint).config.vocab_size as u32;
        let limits = ModelLimits {
            max_model_len: config.max_model_len,
            vocab_size,
            max_logprobs: 20,
        };
        let text = Arc::new(text_processor(&checkpoint, limits)?);
        let tokens = text.tokenizer().encode(TEXT, false)?;
        let engine = EngineConfig {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_seqs.max(8192),
            ..EngineConfig::new(0, config.max_model_len, vocab_size)
        };
        // Nobody waits for blocks.
        let blocks_per_sequence = config.max_model_len.div_ceil(engine.block_size) + 1;
        let engine = EngineConfig {
            num_blocks: blocks_per_sequence.saturating_mul(config.max_num_seqs),
            ..engine
        };
        let thread = EngineThreadConfig {
            max_num_queued_reqs: 4 * config.max_num_seqs as usize,
            ..EngineThreadConfig::new(engine)
        };
        let metrics = Arc::new(Metrics::new(&config.served_model_name, config.max_model_len));
        let executor = PacedExecutor::new(tokens, config.step_time);
        let (engine, _thread) = spawn_engine(thread, executor, metrics.clone())?;
        let status = StatusHandle::new();
        status.update(|status| status.state = GroupState::Ready.into());
        let slot = EngineSlot::default();
        slot.set(engine.clone());
        let api = Api {
            text,
            engine: slot,
            kv_events: None,
            metrics,
            status,
            served_model_names: vec![config.served_model_name.clone()],
            model_root: config.model.to_string_lossy().into_owned(),
            api_keys: ApiKeys::default(),
            admin_keys: ApiKeys::default(),
            server_info: "{}".into(),
            tensor_parallel_size: 1,
            observers: Observers::default(),
            shutdown: Arc::default(),
        };
        let (shutdown, services) = listen(api, &config.uds)?;
        Ok(Self {
            engine,
            shutdown,
            services,
        })
    }

    pub async fn stop(self) {
        self.engine.shutdown();
        self.shutdown.send_replace(true);
        let _ = self.services.await;
    }
}

fn text_processor(
    checkpoint: &Checkpoint<MappedFile>,
    limits: ModelLimits,
) -> Result<TextProcessor, CoordinatorError> {
    let options = TextOptions {
        limits,
        chat_template: None,
        chat: Default::default(),
        threads: None,
        seed: None,
    };
    Ok(TextProcessor::new(TextModel::open(checkpoint)?, options)?)
}

fn listen(api: Api, uds: &Path) -> Result<(watch::Sender<bool>, JoinHandle<()>), CoordinatorError> {
    let mut listeners = Listeners::default();
    listeners.bind_unix(uds)?;
    let shutdown = watch::Sender::new(false);
    let mut stop = shutdown.subscribe();
    let services = tokio::spawn(async move {
        let stopped = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        if let Err(error) = serve(api.routes(), listeners, stopped, Duration::from_millis(200)).await {
            tracing::error!(%error, "the gRPC services ended");
        }
    });
    Ok((shutdown, services))
}
