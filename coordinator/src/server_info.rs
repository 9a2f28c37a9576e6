//! What a server was started with, for whoever debugs one from afar.

use serde_json::{Value, json};

use crate::config::{CoordinatorConfig, KvCacheSize};

/// The configuration as one JSON object, in the groups of vLLM's `VllmConfig`. Keys, tokens and addresses are not in it.
pub(crate) fn describe(config: &CoordinatorConfig, max_model_len: usize) -> Value {
    let (model, engine) = (&config.model, &config.engine);
    let (kv_blocks, kv_bytes) = match model.kv_cache {
        KvCacheSize::Auto => (None, None),
        KvCacheSize::BytesPerRank(bytes) => (None, Some(bytes)),
        KvCacheSize::Blocks(blocks) => (Some(blocks), None),
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model_config": {
            "model": model.path.to_string_lossy(),
            "served_model_name": engine.served_model_names,
            "max_model_len": max_model_len,
            "quantization": model.quantization.map(|method| method.name()),
            "seed": engine.seed,
        },
        "cache_config": {
            "block_size": model.block_size,
            "cache_dtype": model.kv_dtype.to_string().to_lowercase(),
            "gpu_memory_utilization": model.gpu_memory_utilization,
            "kv_cache_memory_bytes": kv_bytes,
            "num_gpu_blocks_override": kv_blocks,
            "enable_prefix_caching": engine.enable_prefix_caching,
        },
        "parallel_config": {
            "tensor_parallel_size": model.tensor_parallel_size,
            "rank_weights": model.rank_weights,
            "disable_custom_all_reduce": model.disable_custom_all_reduce,
        },
        "scheduler_config": {
            "max_num_seqs": model.max_num_seqs,
            "max_num_batched_tokens": model.max_num_batched_tokens,
            "long_prefill_token_threshold": engine.long_prefill_token_threshold,
            "max_num_queued_reqs": engine.max_num_queued_reqs,
        },
        "device_config": {
            "device": model.device.name(),
            "enforce_eager": model.enforce_eager,
        },
    })
}
