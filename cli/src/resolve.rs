//! Flags to configuration, once. Below this, nothing is "auto" because a flag was left out, and nobody reads a flag.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use phalanx_coordinator::{
    api::Observers,
    config::{
        ApiOptions, DeviceChoice, EngineOptions, GpuEnvironment, KvCacheSize, ModelOptions, TraceOptions,
        WorkerOptions, WorkerSource,
    },
    engine::{PrefixHashAlgo, SchedulingPolicy},
};
use phalanx_model::{KvDtype, QuantizationMethod, TensorParallelStyle};
use phalanx_proto::secret::ApiKeys;

use crate::{
    args::{
        Device, EngineArgs, HashAlgo, KvCacheDtype, LoggingArgs, ModelArgs, Policy, QuantizationName, Style,
        TlsArgs,
    },
    keys, limits, logging,
};

pub(crate) fn model(args: &ModelArgs) -> anyhow::Result<ModelOptions> {
    let Some(path) = args.model_tag.clone().or_else(|| args.model.clone()) else {
        bail!("MODEL is missing: give a .gguf file or a model directory");
    };
    ensure!(path.exists(), "{}: no such file or directory", path.display());
    limits::model(args)?;
    let kv_cache = match (args.num_gpu_blocks_override, args.kv_cache_memory_bytes) {
        (Some(blocks), _) => KvCacheSize::Blocks(blocks),
        (None, Some(bytes)) => KvCacheSize::BytesPerRank(bytes),
        (None, None) => KvCacheSize::Auto,
    };
    Ok(ModelOptions {
        path,
        tensor_parallel_size: args.tensor_parallel_size,
        device: match args.device {
            Device::Auto => DeviceChoice::Auto,
            Device::Cpu => DeviceChoice::Cpu,
            Device::Cuda => DeviceChoice::Cuda,
        },
        style: args.tensor_parallel_style.map(|style| match style {
            Style::Gather => TensorParallelStyle::Gather,
            Style::Reduce => TensorParallelStyle::Reduce,
        }),
        rank_weights: args.rank_weights.clone(),
        max_model_len: args.max_model_len.unwrap_or_default(),
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        speculative: args.speculative_config,
        max_logprobs: args.max_logprobs,
        block_size: args.block_size,
        kv_cache,
        kv_dtype: args.kv_cache_dtype.into(),
        quantization: args.quantization.map(|name| match name {
            QuantizationName::Awq => QuantizationMethod::Awq,
            QuantizationName::Gptq => QuantizationMethod::Gptq,
            QuantizationName::Gguf => QuantizationMethod::Gguf,
            QuantizationName::Fp8 => QuantizationMethod::Fp8,
        }),
        gpu_memory_utilization: args.gpu_memory_utilization,
        disable_custom_all_reduce: args.disable_custom_all_reduce,
        enforce_eager: args.enforce_eager,
        cudagraph_capture_sizes: args.cudagraph_capture_sizes.clone(),
    })
}

impl From<KvCacheDtype> for KvDtype {
    fn from(dtype: KvCacheDtype) -> Self {
        match dtype {
            KvCacheDtype::Auto | KvCacheDtype::F16 => Self::F16,
            KvCacheDtype::F32 => Self::F32,
            KvCacheDtype::Bf16 => Self::BF16,
            KvCacheDtype::Fp8 => Self::E4M3,
            KvCacheDtype::Int8 => Self::INT8,
        }
    }
}

pub(crate) fn engine(args: &EngineArgs, model: &ModelOptions) -> anyhow::Result<EngineOptions> {
    limits::engine(args)?;
    let file_name = model.path.file_name().unwrap_or(model.path.as_os_str());
    let default_name = || vec![file_name.to_string_lossy().trim_end_matches(".gguf").to_owned()];
    let names = args.served_model_name.clone();
    Ok(EngineOptions {
        served_model_names: if names.is_empty() { default_name() } else { names },
        enable_prefix_caching: args.enable_prefix_caching,
        prefix_hash_algo: match args.prefix_caching_hash_algo {
            HashAlgo::Sha256 => PrefixHashAlgo::Builtin,
            HashAlgo::Sha256Cbor => PrefixHashAlgo::Sha256Cbor,
        },
        // vLLM's own name for it: indexers are configured with the same.
        prefix_hash_seed: Some(
            std::env::var("PYTHONHASHSEED").unwrap_or_else(|_| PrefixHashAlgo::DEFAULT_SEED.to_owned()),
        ),
        kv_events: args.kv_events_config.clone().unwrap_or_default(),
        policy: match args.scheduling_policy {
            Policy::Fcfs => SchedulingPolicy::Fcfs,
            Policy::Priority => SchedulingPolicy::Priority,
            Policy::Fair => SchedulingPolicy::Fair,
        },
        long_prefill_token_threshold: args.long_prefill_token_threshold,
        watermark: args.watermark,
        reserve_full_isl: args.scheduler_reserve_full_isl,
        max_num_queued_reqs: args.max_num_queued_reqs,
        max_num_queued_tokens: args.max_num_queued_tokens,
        chat_template: args.chat.chat_template.clone(),
        chat: args.chat.resolve()?,
        generation: args.generation.options(),
        seed: args.seed,
        step_timeout: Duration::from_secs(args.execute_model_timeout_seconds),
    })
}

pub(crate) fn workers(
    args: &EngineArgs,
    model: &ModelArgs,
    source: WorkerSource,
) -> anyhow::Result<WorkerOptions> {
    // Workers may be elsewhere in the file system.
    let path = args.trace_file.as_ref().map(std::path::absolute).transpose();
    let path = path.context("--trace-file")?;
    Ok(WorkerOptions {
        source,
        threads_per_rank: model.threads_per_rank,
        ready_timeout: Duration::from_secs(args.engine_ready_timeout_seconds),
        shm_dir: args.shm_dir.clone(),
        trace: path.map(|path| TraceOptions {
            path,
            steps: args.trace_steps,
        }),
    })
}

/// Workers that are children of this process. `scratch` is a directory of this process alone.
pub(crate) fn local_workers(program: PathBuf, arguments: Vec<String>, scratch: PathBuf) -> WorkerSource {
    WorkerSource::Local {
        program,
        arguments,
        gpus: GpuEnvironment {
            search_path: std::env::var_os("LD_LIBRARY_PATH"),
            visible_devices: std::env::var("CUDA_VISIBLE_DEVICES").ok(),
            scratch,
        },
    }
}

/// `default_uds` is used when no socket was named.
pub(crate) fn api(
    args: &EngineArgs,
    (tls, logging): (&TlsArgs, &LoggingArgs),
    default_uds: PathBuf,
) -> anyhow::Result<ApiOptions> {
    let tcp = args.grpc_port.map(|port| address(&args.grpc_host, port));
    Ok(ApiOptions {
        tcp: tcp.transpose()?,
        tls: tls.files(),
        api_keys: keys::load(&args.api_key, args.api_key_file.as_deref())?,
        admin_keys: ApiKeys::new(args.admin_api_key.iter().cloned()).context("--admin-api-key")?,
        observers: Observers {
            log_requests: logging.enable_log_requests,
            tracer: logging::tracer(logging)?,
        },
        uds: Some(args.grpc_uds.clone().unwrap_or(default_uds)),
    })
}

fn address(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let mut addresses = (host, port)
        .to_socket_addrs()
        .with_context(|| format!("--grpc-host {host:?}"))?;
    addresses
        .next()
        .with_context(|| format!("--grpc-host {host:?} has no address"))
}
