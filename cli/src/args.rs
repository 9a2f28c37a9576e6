//! The command line. Names are vLLM's where vLLM has the flag; every flag is also an environment variable
//! (`PHALANX_` + its name) and a key of the YAML file given by `--config`, in that order of precedence.

mod tls;

use std::path::PathBuf;

use clap::{
    ArgAction, ArgMatches, Args, Parser, Subcommand, ValueEnum, builder::BoolishValueParser,
    parser::ValueSource, value_parser,
};
use phalanx_coordinator::{
    config::{KvEventsOptions, MaxModelLen},
    engine::NgramSpeculation,
};

pub(crate) use self::tls::{CoordinatorTlsArgs, TlsArgs};
use crate::{
    kv_events,
    output_args::{GenerationArgs, ReplyArgs},
    responses_args::ResponsesArgs,
    speculative,
    values::{parse_bytes, parse_max_model_len, parse_utilization, parse_watermark},
};

/// A distributed tensor-parallel LLM serving cluster.
#[derive(Debug, Parser)]
#[command(
    name = "phalanx",
    version,
    max_term_width = 100,
    propagate_version = true,
    args_override_self = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) logging: LoggingArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model on this machine: coordinator, workers and HTTP gateway together.
    Serve(Box<ServeArgs>),
    /// Only the coordinator: gRPC API, scheduler, and the ranks it starts or waits for.
    Coordinator(Box<CoordinatorArgs>),
    /// Only one rank, attached to a coordinator.
    Worker(WorkerArgs),
    /// Only the OpenAI-compatible HTTP gateway: in front of one coordinator, or as a router over several.
    Gateway(Box<GatewayArgs>),
    /// Print who would hold what and the bytes, without loading anything.
    Plan(Box<PlanArgs>),
    /// Measure a server.
    Bench(crate::bench::BenchArgs),
    /// Compile the CUDA kernels ahead of time, e.g. into a container image; needs NVRTC and no GPU.
    WarmKernels(WarmKernelsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct LoggingArgs {
    /// error, warn, info, debug, trace, or a filter such as `info,phalanx_worker=debug`.
    #[arg(long, global = true, env = "PHALANX_LOG_LEVEL", default_value = "info")]
    pub(crate) log_level: String,
    /// How log lines look.
    #[arg(long, global = true, env = "PHALANX_LOG_FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// Log a line for every request when it ends, without its text.
    #[arg(long, global = true, env = "PHALANX_ENABLE_LOG_REQUESTS", value_parser = BoolishValueParser::new())]
    pub(crate) enable_log_requests: bool,
    /// OpenTelemetry collector that takes spans over gRPC, e.g. `http://localhost:4317`.
    #[arg(long, global = true, env = "PHALANX_OTLP_TRACES_ENDPOINT")]
    pub(crate) otlp_traces_endpoint: Option<String>,
}

impl LoggingArgs {
    /// The same flags for a child process.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let format = match self.log_format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        let mut arguments = ["--log-level", &self.log_level, "--log-format", format]
            .map(str::to_owned)
            .to_vec();
        if self.enable_log_requests {
            arguments.push("--enable-log-requests".to_owned());
        }
        if let Some(endpoint) = &self.otlp_traces_endpoint {
            arguments.push(format!("--otlp-traces-endpoint={endpoint}"));
        }
        arguments
    }
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// What model, and how it is cut and scheduled.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A .gguf file, or a directory with config.json, tokenizer.json and safetensors files.
    #[arg(value_name = "MODEL")]
    pub(crate) model_tag: Option<PathBuf>,
    /// The same as the positional argument, which wins over the environment and the file.
    #[arg(long, env = "PHALANX_MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// Number of ranks the model is cut into; any number up to the number of attention heads.
    #[arg(
        long,
        visible_alias = "tp",
        env = "PHALANX_TENSOR_PARALLEL_SIZE",
        default_value_t = 1
    )]
    pub(crate) tensor_parallel_size: usize,
    /// Relative capacity of the ranks, e.g. `2,1`.
    #[arg(long, env = "PHALANX_RANK_WEIGHTS", value_delimiter = ',')]
    pub(crate) rank_weights: Option<Vec<f32>>,
    /// What the ranks compute on; auto: GPUs if there is one for every rank, else CPUs.
    #[arg(long, env = "PHALANX_DEVICE", default_value = "auto")]
    pub(crate) device: Device,
    /// How partial results are combined; gather gives the same bits at any number of ranks. Default: gather on CPUs,
    /// reduce on GPUs.
    #[arg(long, env = "PHALANX_TENSOR_PARALLEL_STYLE")]
    pub(crate) tensor_parallel_style: Option<Style>,
    /// Longest sequence, prompt and output together (suffixes k, m: thousands, K, M: 1024s); `auto` or -1: the longest
    /// that fits the memory; default: the model's.
    #[arg(
        long,
        env = "PHALANX_MAX_MODEL_LEN",
        allow_hyphen_values = true,
        value_parser = parse_max_model_len
    )]
    pub(crate) max_model_len: Option<MaxModelLen>,
    /// Most sequences in one step.
    #[arg(long, env = "PHALANX_MAX_NUM_SEQS", default_value_t = 256)]
    pub(crate) max_num_seqs: usize,
    /// Most tokens in one step; longer prompts are computed in chunks.
    #[arg(long, env = "PHALANX_MAX_NUM_BATCHED_TOKENS", default_value_t = 512)]
    pub(crate) max_num_batched_tokens: usize,
    /// Guess tokens and verify them in one step, as JSON: {"method": "ngram", "num_speculative_tokens": 4,
    /// "prompt_lookup_min": 2, "prompt_lookup_max": 4} looks the last tokens up in the sequence so far. Output stays the
    /// same.
    #[arg(long, env = "PHALANX_SPECULATIVE_CONFIG", value_parser = speculative::parse)]
    pub(crate) speculative_config: Option<NgramSpeculation>,
    /// Most alternatives per token that a request may ask log-probabilities of.
    #[arg(long, env = "PHALANX_MAX_LOGPROBS", default_value_t = 20)]
    pub(crate) max_logprobs: usize,
    /// Tokens per KV block.
    #[arg(long, env = "PHALANX_BLOCK_SIZE", default_value_t = 16)]
    pub(crate) block_size: usize,
    /// Bytes of KV cache per rank (suffixes K, M, G, Ki, Mi, Gi); default: on CPUs a tenth of the
    /// free memory, at most 4 GiB in all; on GPUs what is left.
    #[arg(long, env = "PHALANX_KV_CACHE_MEMORY_BYTES", value_parser = parse_bytes)]
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// The part of a GPU's memory that a rank may take.
    #[arg(
        long,
        alias = "device-memory-utilization",
        env = "PHALANX_GPU_MEMORY_UTILIZATION",
        default_value_t = 0.9,
        value_parser = parse_utilization
    )]
    pub(crate) gpu_memory_utilization: f32,
    /// Leave all sums over GPUs to NCCL, also short ones.
    #[arg(long, env = "PHALANX_DISABLE_CUSTOM_ALL_REDUCE", value_parser = BoolishValueParser::new())]
    pub(crate) disable_custom_all_reduce: bool,
    /// Launch every op by itself on GPUs: no CUDA graphs, and a faster start.
    #[arg(long, env = "PHALANX_ENFORCE_EAGER", value_parser = BoolishValueParser::new())]
    pub(crate) enforce_eager: bool,
    /// Rows of the decode steps that are captured as CUDA graphs; others are padded to the next of them, and run
    /// eagerly beyond the last. Default: 1, 2, 4, then every 8th to 256 and every 16th to 512, up to max-num-seqs.
    #[arg(
        long,
        env = "PHALANX_CUDAGRAPH_CAPTURE_SIZES",
        num_args = 1..,
        value_delimiter = ',',
        value_parser = value_parser!(u32).range(1..)
    )]
    pub(crate) cudagraph_capture_sizes: Option<Vec<u32>>,
    /// Exactly so many KV blocks, whatever the memory.
    #[arg(long, env = "PHALANX_NUM_GPU_BLOCKS_OVERRIDE")]
    pub(crate) num_gpu_blocks_override: Option<usize>,
    /// Element type of the KV cache.
    #[arg(long, env = "PHALANX_KV_CACHE_DTYPE", default_value = "auto")]
    pub(crate) kv_cache_dtype: KvCacheDtype,
    /// How the weights are quantized; default: as the checkpoint says. fp8 rounds a checkpoint of plain numbers when it
    /// is loaded.
    #[arg(long, short, env = "PHALANX_QUANTIZATION")]
    pub(crate) quantization: Option<QuantizationName>,
    /// Threads of each rank; default: the CPUs divided by the ranks.
    #[arg(long, env = "PHALANX_THREADS_PER_RANK")]
    pub(crate) threads_per_rank: Option<usize>,
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub(crate) enum Device {
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub(crate) enum Style {
    Gather,
    Reduce,
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub(crate) enum KvCacheDtype {
    /// f16.
    Auto,
    F32,
    F16,
    Bf16,
    /// 8-bit floats with no scale: half the bytes of f16, 3 bits of mantissa.
    #[value(name = "fp8", alias = "fp8_e4m3")]
    Fp8,
    /// 8-bit integers with a scale for each token and head: half the bytes of f16, on CPUs only.
    #[value(name = "int8", alias = "int8_per_token_head")]
    Int8,
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub(crate) enum QuantizationName {
    Awq,
    Gptq,
    Gguf,
    #[value(alias = "compressed-tensors")]
    Fp8,
}

/// What only a running coordinator needs.
#[derive(Debug, Args)]
pub(crate) struct EngineArgs {
    /// Names clients may call the model by; default: the MODEL argument's file name.
    #[arg(long, env = "PHALANX_SERVED_MODEL_NAME", num_args = 1.., value_delimiter = ',')]
    pub(crate) served_model_name: Vec<String>,
    /// Reuse the KV of prompts that begin alike; --no-enable-prefix-caching: compute every prompt anew.
    #[arg(
        long,
        env = "PHALANX_ENABLE_PREFIX_CACHING",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = true
    )]
    pub(crate) enable_prefix_caching: bool,
    /// How cached blocks are named; sha256_cbor: as vLLM does, so that indexers outside can compute the names (seeded with
    /// $PYTHONHASHSEED if that is set); sha256: with a secret of this process.
    #[arg(long, env = "PHALANX_PREFIX_CACHING_HASH_ALGO", default_value = "sha256")]
    pub(crate) prefix_caching_hash_algo: HashAlgo,
    /// Tell what changes in the prefix cache, as JSON: {"enable_kv_cache_events": true} offers it over gRPC, and
    /// "publisher": "zmq" publishes it as well ("endpoint", "replay_endpoint", "buffer_steps", "topic").
    #[arg(long, env = "PHALANX_KV_EVENTS_CONFIG", value_parser = kv_events::parse)]
    pub(crate) kv_events_config: Option<KvEventsOptions>,
    /// Order in which waiting requests are admitted.
    #[arg(long, env = "PHALANX_SCHEDULING_POLICY", default_value = "fcfs")]
    pub(crate) scheduling_policy: Policy,
    /// Prompts compute at most so many tokens in a step beside others; 0: no limit.
    #[arg(long, env = "PHALANX_LONG_PREFILL_TOKEN_THRESHOLD", default_value_t = 0)]
    pub(crate) long_prefill_token_threshold: usize,
    /// Share of the KV blocks that admission leaves free, so that running requests can grow.
    #[arg(long, env = "PHALANX_WATERMARK", default_value_t = 0.01, value_parser = parse_watermark)]
    pub(crate) watermark: f32,
    /// Admit a prompt only if all of it fits the KV cache; --no-scheduler-reserve-full-isl: if its first chunk does.
    #[arg(
        long,
        env = "PHALANX_SCHEDULER_RESERVE_FULL_ISL",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        default_value_t = true
    )]
    pub(crate) scheduler_reserve_full_isl: bool,
    /// Requests that may wait; more are refused with 429.
    #[arg(long, env = "PHALANX_MAX_NUM_QUEUED_REQS", default_value_t = 1024)]
    pub(crate) max_num_queued_reqs: usize,
    /// Prompt tokens that may wait; more are refused with 429, but a prompt that waits alone may be longer.
    #[arg(long, env = "PHALANX_MAX_NUM_QUEUED_TOKENS", default_value_t = 1 << 22)]
    pub(crate) max_num_queued_tokens: usize,
    #[command(flatten)]
    pub(crate) chat: crate::chat_args::ChatArgs,
    #[command(flatten)]
    pub(crate) generation: GenerationArgs,
    /// Seed of requests that bring none; default: a new one for every request.
    #[arg(long, env = "PHALANX_SEED")]
    pub(crate) seed: Option<u64>,
    /// A step that takes longer ends the group.
    #[arg(long, env = "PHALANX_EXECUTE_MODEL_TIMEOUT_SECONDS", default_value_t = 60)]
    pub(crate) execute_model_timeout_seconds: u64,
    /// Ranks that are not ready by then end the start.
    #[arg(long, env = "PHALANX_ENGINE_READY_TIMEOUT_SECONDS", default_value_t = 600)]
    pub(crate) engine_ready_timeout_seconds: u64,
    /// Seconds that running requests may take to end after SIGTERM; 0: they are aborted.
    #[arg(long, env = "PHALANX_SHUTDOWN_TIMEOUT", default_value_t = 30)]
    pub(crate) shutdown_timeout: u64,
    /// Port of the gRPC API (0: any free one); without it, gRPC is offered on a unix socket only.
    #[arg(long, env = "PHALANX_GRPC_PORT")]
    pub(crate) grpc_port: Option<u16>,
    /// Address of the gRPC port.
    #[arg(long, env = "PHALANX_GRPC_HOST", default_value = "127.0.0.1")]
    pub(crate) grpc_host: String,
    /// Keys of which clients over HTTP and over gRPC's port must bring one as a bearer token; probes need none.
    #[arg(long, env = "PHALANX_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub(crate) api_key: Vec<String>,
    /// File of such keys, one a line.
    #[arg(long, env = "PHALANX_API_KEY_FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Keys of which an operator must bring one to pause, resume, abort or reset, over HTTP as a bearer token; without
    /// any, nobody can.
    #[arg(
        long,
        env = "PHALANX_ADMIN_API_KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub(crate) admin_api_key: Vec<String>,
    /// Unix socket of the gRPC API; default: one in a private directory.
    #[arg(long, env = "PHALANX_GRPC_UDS")]
    pub(crate) grpc_uds: Option<PathBuf>,
    /// Record what the engine and every rank do in their first steps, for Perfetto or chrome://tracing.
    #[arg(long, env = "PHALANX_TRACE_FILE", value_name = "FILE")]
    pub(crate) trace_file: Option<PathBuf>,
    /// Steps that --trace-file records: some 40 kB each of a model of 30 layers, for every rank.
    #[arg(long, env = "PHALANX_TRACE_STEPS", default_value_t = 2000, value_parser = value_parser!(u64).range(1..))]
    pub(crate) trace_steps: u64,
    /// Where shared segments are made.
    #[arg(long, env = "PHALANX_SHM_DIR", default_value = "/dev/shm", hide = true)]
    pub(crate) shm_dir: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub(crate) enum HashAlgo {
    #[value(alias = "builtin-fast", alias = "builtin")]
    Sha256,
    #[value(name = "sha256_cbor")]
    Sha256Cbor,
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub(crate) enum Policy {
    /// By arrival.
    Fcfs,
    /// By the requests' `priority`, smaller first.
    Priority,
    /// API keys in turn, by the tokens they have had.
    Fair,
}

/// The HTTP side.
#[derive(Debug, Args)]
pub(crate) struct FrontendArgs {
    /// Address to listen on.
    #[arg(long, env = "PHALANX_HOST", default_value = "0.0.0.0")]
    pub(crate) host: String,
    /// Port to listen on; 0: any free one.
    #[arg(long, env = "PHALANX_PORT", default_value_t = 8000)]
    pub(crate) port: u16,
    /// Unix socket to listen on instead of host and port.
    #[arg(long, env = "PHALANX_UDS")]
    pub(crate) uds: Option<PathBuf>,
    /// Path under which a proxy serves the gateway, e.g. `/llm`: every route answers there, too.
    #[arg(long, env = "PHALANX_ROOT_PATH", default_value = "")]
    pub(crate) root_path: String,
    /// Serve /tokenizer_info, which shows the tokenizer's configuration and the chat template.
    #[arg(long, env = "PHALANX_ENABLE_TOKENIZER_INFO_ENDPOINT", value_parser = BoolishValueParser::new())]
    pub(crate) enable_tokenizer_info_endpoint: bool,
    /// Serve neither /openapi.json nor /docs.
    #[arg(long, env = "PHALANX_DISABLE_FASTAPI_DOCS", value_parser = BoolishValueParser::new())]
    pub(crate) disable_fastapi_docs: bool,
    #[command(flatten)]
    pub(crate) reply: ReplyArgs,
    #[command(flatten)]
    pub(crate) responses: ResponsesArgs,
    /// Role of the messages that the model makes.
    #[arg(long, env = "PHALANX_RESPONSE_ROLE", default_value = "assistant")]
    pub(crate) response_role: String,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) frontend: FrontendArgs,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// YAML file of flags.
    #[arg(long, env = "PHALANX_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// mp: start the workers; external_launcher: wait for workers that others start.
    #[arg(long, env = "PHALANX_DISTRIBUTED_EXECUTOR_BACKEND", default_value = "mp")]
    pub(crate) distributed_executor_backend: ExecutorBackend,
    /// What an external worker must know to join.
    #[arg(
        long,
        env = "PHALANX_JOIN_TOKEN",
        hide_env_values = true,
        required_if_eq("distributed_executor_backend", "external_launcher")
    )]
    pub(crate) join_token: Option<String>,
    /// YAML file of flags.
    #[arg(long, env = "PHALANX_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum, PartialEq, Eq)]
pub(crate) enum ExecutorBackend {
    Mp,
    #[value(name = "external_launcher")]
    ExternalLauncher,
}

#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// `unix:/path`, `http://host:port` or `https://host:port` of the coordinator.
    #[arg(long, env = "PHALANX_COORDINATOR")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) tls: CoordinatorTlsArgs,
    /// This worker's place, from 0.
    #[arg(long, env = "PHALANX_RANK")]
    pub(crate) rank: u32,
    #[arg(long, env = "PHALANX_JOIN_TOKEN", hide_env_values = true, default_value = "")]
    pub(crate) join_token: String,
    /// What to look for: auto offers a GPU if there is one. The coordinator decides.
    #[arg(long, env = "PHALANX_DEVICE", default_value = "auto")]
    pub(crate) device: Device,
    /// CPUs to run on; default: all that the process may use.
    #[arg(long, env = "PHALANX_CPUS", value_delimiter = ',')]
    pub(crate) cpus: Option<Vec<usize>>,
    /// Exit when this process is no longer the parent.
    #[arg(long, hide = true)]
    pub(crate) parent_pid: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct GatewayArgs {
    #[command(flatten)]
    pub(crate) backends: crate::gateway::BackendArgs,
    #[command(flatten)]
    pub(crate) coordinator_tls: CoordinatorTlsArgs,
    #[command(flatten)]
    pub(crate) frontend: FrontendArgs,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Keys of which every request but probes must bring one as a bearer token. Coordinators are shown the first.
    #[arg(long, env = "PHALANX_API_KEY", value_delimiter = ',', hide_env_values = true)]
    pub(crate) api_key: Vec<String>,
    /// File of such keys, one a line.
    #[arg(long, env = "PHALANX_API_KEY_FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Keys of which an operator must bring one as a bearer token to control the engine; without any, nobody can. The
    /// coordinator is shown the first.
    #[arg(
        long,
        env = "PHALANX_ADMIN_API_KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub(crate) admin_api_key: Vec<String>,
    /// Seconds that running streams may take to end after SIGTERM.
    #[arg(long, env = "PHALANX_SHUTDOWN_TIMEOUT", default_value_t = 30)]
    pub(crate) shutdown_timeout: u64,
    /// Exit when this process is no longer the parent.
    #[arg(long, hide = true)]
    pub(crate) parent_pid: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct WarmKernelsArgs {
    /// Architecture to compile for, e.g. `sm_90`.
    #[arg(long, env = "PHALANX_ARCH")]
    pub(crate) arch: String,
    /// Where workers will look: $PHALANX_PREBUILT_KERNELS there. Default: the kernel cache of this user.
    #[arg(long, env = "PHALANX_OUTPUT")]
    pub(crate) output: Option<PathBuf>,
    /// Head sizes of the models that will be served.
    #[arg(
        long,
        env = "PHALANX_HEAD_DIM",
        value_delimiter = ',',
        default_value = "64,128"
    )]
    pub(crate) head_dim: Vec<usize>,
    /// Element types of the KV caches.
    #[arg(
        long,
        env = "PHALANX_KV_CACHE_DTYPE",
        value_delimiter = ',',
        default_value = "f16,bf16"
    )]
    pub(crate) kv_cache_dtype: Vec<KvCacheDtype>,
    /// YAML file of flags.
    #[arg(long, env = "PHALANX_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Plan for a GPU of this kind for every rank: a card such as H100-80GB, or a size such as 80GiB. MODEL may then be
    /// a config.json without weights.
    #[arg(long, env = "PHALANX_GPU")]
    pub(crate) gpu: Option<String>,
    /// Print one JSON object instead of text.
    #[arg(long, env = "PHALANX_JSON")]
    pub(crate) json: bool,
    /// YAML file of flags.
    #[arg(long, env = "PHALANX_CONFIG")]
    pub(crate) config: Option<PathBuf>,
}

/// MODEL and `--model` on one command line contradict each other. A clap conflict would also count the environment.
pub(crate) fn refuse_two_models(matches: &ArgMatches) -> anyhow::Result<()> {
    let Some((_, matches)) = matches.subcommand() else {
        return Ok(());
    };
    let typed = |id| {
        matches.try_contains_id(id).unwrap_or(false)
            && matches.value_source(id) == Some(ValueSource::CommandLine)
    };
    anyhow::ensure!(
        !(typed("model_tag") && typed("model")),
        "the model is given twice, as MODEL and as --model"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
