//! A deployment in the words of `Cluster.Attach`.

use std::{ops, time::Duration};

use phalanx_model::{KvDtype, ModelConfig, RankShard, RopeLayout, RopeScaling, TensorParallelStyle};
use phalanx_proto::v1;

use super::Deployment;

impl Deployment {
    /// What each rank is told, in rank order. `threads` is per rank.
    pub fn assigns(&self, threads: &[usize], step_timeout: Duration) -> Vec<v1::Assign> {
        let shards: Vec<v1::RankShard> = self.plan.memory.shards.ranks.iter().map(shard).collect();
        let assign = |(rank, threads): (usize, &usize)| v1::Assign {
            rank: rank as u32,
            world_size: shards.len() as u32,
            model_path: self.checkpoint.path().to_string_lossy().into_owned(),
            model: Some(spec(self.checkpoint.config())),
            shards: shards.clone(),
            style: match self.plan.style {
                TensorParallelStyle::Gather => v1::TensorParallelStyle::Gather.into(),
                TensorParallelStyle::Reduce => v1::TensorParallelStyle::Reduce.into(),
            },
            block_size: self.blueprint.options.block_size as u32,
            num_blocks: self.plan.num_blocks,
            max_tokens: self.limits.max_tokens,
            max_rows: self.limits.max_rows,
            max_blocks_per_row: self.limits.max_blocks_per_row,
            kv_dtype: match self.blueprint.options.kv_dtype {
                KvDtype::F32 => v1::KvDtype::F32.into(),
                KvDtype::F16 => v1::KvDtype::F16.into(),
                KvDtype::BF16 => v1::KvDtype::Bf16.into(),
                KvDtype::E4M3 => v1::KvDtype::E4m3.into(),
                KvDtype::INT8 => v1::KvDtype::Int8.into(),
            },
            threads: *threads as u32,
            step_timeout_ms: step_timeout.as_millis() as u64,
            max_edits_per_row: self.limits.max_edits_per_row,
            max_logprobs: self.limits.max_logprobs,
            device: self.device.into(),
            disable_custom_all_reduce: self.blueprint.options.disable_custom_all_reduce,
            cudagraph_capture_sizes: self.cudagraph_capture_sizes(),
            quantize_to_fp8: self.checkpoint.is_quantized_online(),
            trace: None,
        };
        threads.iter().enumerate().map(assign).collect()
    }
}

fn range(range: &ops::Range<usize>) -> Option<v1::Range> {
    Some(v1::Range {
        start: range.start as u32,
        end: range.end as u32,
    })
}

fn shard(shard: &RankShard) -> v1::RankShard {
    v1::RankShard {
        q_heads: range(&shard.q_heads),
        kv_heads: range(&shard.kv_heads),
        intermediate: range(&shard.intermediate),
        hidden: range(&shard.hidden),
        vocab: range(&shard.vocab),
    }
}

fn spec(config: &ModelConfig) -> v1::ModelSpec {
    v1::ModelSpec {
        architecture: config.architecture.clone(),
        hidden_size: config.hidden_size as u32,
        intermediate_size: config.intermediate_size as u32,
        num_hidden_layers: config.num_hidden_layers as u32,
        num_attention_heads: config.num_attention_heads as u32,
        num_key_value_heads: config.num_key_value_heads as u32,
        head_dim: config.head_dim as u32,
        vocab_size: config.vocab_size as u32,
        max_position_embeddings: config.max_position_embeddings as u32,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope.theta,
        rotary_dim: config.rope.rotary_dim as u32,
        rope_layout: match config.rope.layout {
            RopeLayout::Half => v1::RopeLayout::Half.into(),
            RopeLayout::Interleaved => v1::RopeLayout::Interleaved.into(),
        },
        rope_scaling: scaling(&config.rope.scaling),
        tie_word_embeddings: config.tie_word_embeddings,
        attention_bias: config.attention_bias,
        mlp_bias: config.mlp_bias,
        sliding_window: config.sliding_window.map(|window| window as u32),
    }
}

fn scaling(scaling: &RopeScaling) -> Option<v1::model_spec::RopeScaling> {
    use v1::model_spec::RopeScaling as Wire;
    match scaling {
        RopeScaling::None => None,
        RopeScaling::Linear { factor } => Some(Wire::Linear(v1::LinearScaling { factor: *factor })),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => Some(Wire::Llama3(v1::Llama3Scaling {
            factor: *factor,
            low_freq_factor: *low_freq_factor,
            high_freq_factor: *high_freq_factor,
            original_max_position_embeddings: *original_max_position_embeddings as u32,
        })),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
        } => Some(Wire::Yarn(v1::YarnScaling {
            factor: *factor,
            original_max_position_embeddings: *original_max_position_embeddings as u32,
            beta_fast: *beta_fast,
            beta_slow: *beta_slow,
            attention_factor: *attention_factor,
        })),
        RopeScaling::FrequencyFactors { factors } => Some(Wire::FrequencyFactors(v1::FrequencyFactors {
            factors: factors.clone(),
        })),
    }
}
