//! What a coordinator is started with: resolved once from flags, environment and file, then immutable.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use phalanx_model::{KvDtype, TensorParallelStyle};

use crate::engine::SchedulingPolicy;

#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    pub model: ModelOptions,
    pub engine: EngineOptions,
    pub api: ApiOptions,
    pub workers: WorkerOptions,
}

/// The model and how it is cut.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// A .gguf file or a directory.
    pub path: PathBuf,
    pub tensor_parallel_size: usize,
    pub style: TensorParallelStyle,
    pub rank_weights: Option<Vec<f32>>,
    /// None: the model's own.
    pub max_model_len: Option<usize>,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub block_size: usize,
    pub kv_cache: KvCacheSize,
    pub kv_dtype: KvDtype,
}

/// How many KV blocks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCacheSize {
    /// A tenth of the free memory, at most 4 GiB over all ranks, never less than one longest sequence.
    Auto,
    /// As many as fit so many bytes on every rank.
    BytesPerRank(u64),
    Blocks(usize),
}

#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Never empty; the first is the canonical one.
    pub served_model_names: Vec<String>,
    pub enable_prefix_caching: bool,
    pub policy: SchedulingPolicy,
    pub long_prefill_token_threshold: usize,
    pub max_num_queued_reqs: usize,
    /// Replaces the model's chat template.
    pub chat_template: Option<PathBuf>,
    /// Seed of requests that bring none.
    pub seed: Option<u64>,
    pub step_timeout: Duration,
}

/// Where the gRPC services listen; at least one of them.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    pub tcp: Option<SocketAddr>,
    pub uds: Option<PathBuf>,
}

#[derive(Clone, Debug)]
pub struct WorkerOptions {
    pub source: WorkerSource,
    /// None: the CPUs of this process divided by the ranks.
    pub threads_per_rank: Option<usize>,
    /// From the start of the workers until every rank is ready.
    pub ready_timeout: Duration,
    /// Where segments are made.
    pub shm_dir: PathBuf,
}

#[derive(Clone, Debug)]
pub enum WorkerSource {
    /// Child processes of this one.
    Local {
        /// A binary that understands `worker`.
        program: PathBuf,
        /// Flags for it beside those of its rank.
        arguments: Vec<String>,
    },
    /// Others start them; they must know the token.
    External { join_token: String },
}
