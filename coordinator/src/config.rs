//! What a coordinator is started with: resolved once from flags, environment and file, then immutable.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use phalanx_model::{KvDtype, QuantizationMethod, TensorParallelStyle};
use phalanx_proto::{secret::ApiKeys, tls::TlsFiles};

use crate::{
    api::Observers,
    engine::{NgramSpeculation, PrefixHashAlgo, SchedulingPolicy},
    kv_events::ZmqOptions,
    text::{ChatOptions, GenerationOptions},
};

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
    pub device: DeviceChoice,
    /// None: gather on CPUs, which gives the same bits at any number of ranks; reduce on GPUs, where it moves less.
    pub style: Option<TensorParallelStyle>,
    pub rank_weights: Option<Vec<f32>>,
    pub max_model_len: MaxModelLen,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    /// Guess tokens and verify several in a step.
    pub speculative: Option<NgramSpeculation>,
    /// Most alternatives per token that a request may ask for.
    pub max_logprobs: usize,
    pub block_size: usize,
    pub kv_cache: KvCacheSize,
    pub kv_dtype: KvDtype,
    /// None: as the checkpoint is.
    pub quantization: Option<QuantizationMethod>,
    /// The part of a GPU's memory that a rank may take, above 0 and at most 1.
    pub gpu_memory_utilization: f32,
    /// GPUs leave all sums to NCCL.
    pub disable_custom_all_reduce: bool,
    /// GPUs get every op by itself: no CUDA graphs.
    pub enforce_eager: bool,
    /// Rows of the decode steps that are captured as CUDA graphs; steps never have more rows than `max_num_seqs`. None:
    /// vLLM's.
    pub cudagraph_capture_sizes: Option<Vec<u32>>,
}

/// What the ranks compute on. All of them on the same kind of device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// GPUs if every rank has one, else CPUs.
    #[default]
    Auto,
    Cpu,
    /// GPUs, or no start.
    Cuda,
}

impl DeviceChoice {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// Most tokens of prompt and completion together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MaxModelLen {
    /// The model's own limit.
    #[default]
    Model,
    /// As many as fit the memory, at most the model's own limit.
    Auto,
    Tokens(usize),
}

/// How many KV blocks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCacheSize {
    /// On CPUs a tenth of the free memory, at most 4 GiB over all ranks, never less than one longest sequence; on GPUs
    /// what weights and activations leave.
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
    pub prefix_hash_algo: PrefixHashAlgo,
    /// Starts the chains of block names that others can compute.
    pub prefix_hash_seed: Option<String>,
    pub kv_events: KvEventsOptions,
    pub policy: SchedulingPolicy,
    pub long_prefill_token_threshold: usize,
    /// Share of the KV blocks that admission leaves free.
    pub watermark: f32,
    /// Admit a prompt only if all of it fits.
    pub reserve_full_isl: bool,
    pub max_num_queued_reqs: usize,
    pub max_num_queued_tokens: usize,
    /// Replaces the model's chat template.
    pub chat_template: Option<PathBuf>,
    /// What requests leave unset.
    pub generation: GenerationOptions,
    pub chat: ChatOptions,
    /// Seed of requests that bring none.
    pub seed: Option<u64>,
    pub step_timeout: Duration,
}

/// Who hears what changes in the prefix cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvEventsOptions {
    /// Offer the changes over gRPC.
    pub enabled: bool,
    /// And publish them over ZeroMQ.
    pub zmq: Option<ZmqOptions>,
}

/// Where the gRPC services listen; at least one of them.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    pub tcp: Option<SocketAddr>,
    /// TLS of the TCP listener.
    pub tls: Option<TlsFiles>,
    pub uds: Option<PathBuf>,
    /// What clients over TCP must present.
    pub api_keys: ApiKeys,
    /// What operators over TCP must present; without any, there are none.
    pub admin_keys: ApiKeys,
    pub observers: Observers,
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
    /// Record what engine and ranks do.
    pub trace: Option<TraceOptions>,
}

/// Which file, and how many steps of every group.
#[derive(Clone, Debug)]
pub struct TraceOptions {
    pub path: PathBuf,
    pub steps: u64,
}

#[derive(Clone, Debug)]
pub enum WorkerSource {
    /// Child processes of this one.
    Local {
        /// A binary that understands `worker`.
        program: PathBuf,
        /// Flags for it beside those of its rank.
        arguments: Vec<String>,
        gpus: GpuEnvironment,
    },
    /// Others start them; they must know the token.
    External { join_token: String },
}

/// What local workers need of this process's environment to find CUDA.
#[derive(Clone, Debug, Default)]
pub struct GpuEnvironment {
    /// `LD_LIBRARY_PATH`.
    pub search_path: Option<OsString>,
    /// `CUDA_VISIBLE_DEVICES`: rank `n` gets the `n`-th entry. None: all devices, by number.
    pub visible_devices: Option<String>,
    /// A directory of this process alone, for links to libraries under the names the workers look for.
    pub scratch: PathBuf,
}
